"""Loads and saves decoders in the format of transformers: ``config.json`` and safetensors.

Loading is strict: the files must hold every tensor of the model, in its shape, and no other.
"""

import itertools
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.typing import DTypeLike
from safetensors import SafetensorError
from safetensors.numpy import save_file

from pallas_attn_models.checkpoints.files import (
    CONFIG,
    INDEX,
    SAVE,
    WEIGHTS,
    StoredTensor,
    as_path,
    reading,
    replacing,
    writable_directory,
    write_json,
)
from pallas_attn_models.checkpoints.hf_config import config_from_hf, config_to_hf
from pallas_attn_models.checkpoints.tensors import EMBEDDING, HEAD, Layout, parameter
from pallas_attn_models.checks import listed, require_positive_int
from pallas_attn_models.decoder import Decoder, check_dtype, check_implementation

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# Rotary frequencies in old checkpoints are redundant with config.json.
_DERIVED = re.compile(r"model\.layers\.[0-9]+\.self_attn\.rotary_emb\.inv_freq")
_SHOWN = 5

_logger = logging.getLogger(__name__)


def load_hf(
    directory: str | os.PathLike[str], dtype: DTypeLike = jnp.bfloat16, *, implementation: str | None = None
) -> Decoder:
    """Loads a Llama or Mistral checkpoint, as saved by transformers, tensor by tensor.

    Names, shapes and dtypes of all tensors are checked against the config first. While :func:`save_hf` replaces the
    checkpoint, the result is entirely the old or entirely the new one.

    Args:
      directory: holds ``config.json`` and either ``model.safetensors`` or ``model.safetensors.index.json`` with its
        shards. Weights may be float32, bfloat16 or float16.
      dtype: of the weights and activations; tensors of other dtypes are rounded.
      implementation: of ``pa.attention``; default: the best available.

    Returns:
      The decoder, on JAX's default device.

    Raises:
      FileNotFoundError: a file is missing; named.
      NotADirectoryError: ``directory`` is a file.
      ValueError: a file that cannot be parsed, an unsupported config, or a tensor that is missing, unused, duplicated,
        or of another shape or dtype; named. Exceptions: redundant ``rotary_emb.inv_freq`` tensors are ignored, and a
        tied model may have an ``lm_head.weight`` equal to its embedding.
      TypeError: an argument of the wrong kind.
    """
    path = as_path("directory", directory)
    dtype = check_dtype("dtype", dtype)
    check_implementation(implementation)
    if not path.is_dir():
        kind, got = (NotADirectoryError, "a file") if path.exists() else (FileNotFoundError, "nothing")
        raise kind(f"directory: expected a directory with a checkpoint, got {path}, where {got} is")

    with reading(path) as checkpoint:
        try:
            config = config_from_hf(checkpoint.fields)
        except ValueError as error:
            raise ValueError(f"{checkpoint.config_path}: {error}") from error
        layout = Layout(config)
        _check_tensors(path, layout, checkpoint.tensors)

        # Abstract initialization avoids memory for random weights that would be replaced at once.
        model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype, implementation=implementation))
        for name in layout:
            place = layout[name]
            value = jnp.asarray(checkpoint.tensors[name].read()).astype(dtype)
            parameter(model, place).set_value(value.T if place.is_transposed else value)
    return model


def save_hf(model: Decoder, directory: str | os.PathLike[str], *, max_shard_bytes: int = 5 * 10**9) -> None:
    """Saves a decoder for :func:`load_hf` and transformers' ``AutoModelForCausalLM.from_pretrained``.

    Tensors keep their dtype: ``load_hf(directory, dtype=model.dtype)`` restores the same bits if the weights have that
    dtype. The host holds one shard at a time.

    An existing checkpoint in ``directory`` is replaced atomically: if a save fails or is killed at any moment,
    :func:`load_hf` still loads the old or the new checkpoint. (transformers may see, for an instant between two
    renames, the new weights with the old ``config.json``.) Shards therefore get unused names, and files of earlier
    saves are removed. Concurrent saves of one directory run one after the other.

    Args:
      model: the decoder.
      directory: created if missing.
      max_shard_bytes: maximum size of a shard, unless a single tensor is larger; one shard becomes one plain file.

    Raises:
      ValueError: ``max_shard_bytes`` is not a positive int, the parameters do not match the model's config, or the
        file format cannot represent the config (:func:`config_to_hf`).
      TypeError: an argument of the wrong kind, or a model without values.
      OSError: ``directory`` is a file or not writable, or the disk is full.
    """
    if not isinstance(model, Decoder):
        raise TypeError(f"model: expected a Decoder, got {type(model).__name__}")
    path = as_path("directory", directory)
    require_positive_int("max_shard_bytes", max_shard_bytes)
    fields = {**config_to_hf(model.config), "torch_dtype": str(model.embedding.table.dtype)}
    layout = Layout(model.config)
    weights = _check_parameters(model, layout)
    shards = _split_into_shards({name: weight.nbytes for name, weight in weights.items()}, max_shard_bytes)

    with replacing(writable_directory("directory", path)) as save:
        names = [WEIGHTS] if len(shards) == 1 else save.shard_names(len(shards))
        for file, shard in zip(names, shards, strict=True):
            tensors = {name: _to_numpy(weights[name], layout[name].is_transposed) for name in shard}
            try:
                save_file(tensors, save.folder / file, {"format": "pt", SAVE: save.id})
            except SafetensorError as error:
                raise OSError(f"{path / file}: expected a writable file, got: {error}") from error
        if len(shards) > 1:
            metadata = {"total_size": sum(weight.nbytes for weight in weights.values()), SAVE: save.id}
            weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
            write_json(save.folder / INDEX, {"metadata": metadata, "weight_map": weight_map})
        write_json(save.folder / CONFIG, fields)


def _check_tensors(directory: Path, layout: Layout, tensors: Mapping[str, StoredTensor]) -> None:
    """Raises ValueError unless these are the tensors of the layout."""
    derived = {name for name in tensors if _DERIVED.fullmatch(name)}
    if derived:
        _logger.info("%s: %d rotary_emb.inv_freq tensors ignored, redundant with the config", directory, len(derived))
    used = {name for name in tensors if name in layout}
    if missing := len(layout) - len(used):
        first = itertools.islice((name for name in layout if name not in tensors), _SHOWN)
        names = listed(first, total=missing)
        expected = f"all {len(layout)} tensors of {layout.num_layers} layers"
        raise ValueError(f"{directory}: expected {expected}, got all but {missing} of them: missing {names}")
    tied_head = {HEAD} & tensors.keys() - used if HEAD not in layout else set()
    if extra := tensors.keys() - used - derived - tied_head:
        raise ValueError(f"{directory}: expected only tensors of the model, got also {listed(extra)}")

    wrong = []
    for name in [*sorted(used), *tied_head]:
        tensor, shape = tensors[name], layout[name if name in layout else EMBEDDING].shape
        if tensor.dtype not in DTYPES:
            wrong.append(f"{tensor.path}: {name}: expected one of {', '.join(DTYPES)}, got {tensor.dtype}")
        elif tensor.shape != shape:
            wrong.append(f"{tensor.path}: {name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if wrong:
        more = f"; and {len(wrong) - 1} more tensors have the wrong shape or dtype" if len(wrong) > 1 else ""
        raise ValueError(wrong[0] + more)
    if tied_head and not np.array_equal(tensors[HEAD].read(), tensors[EMBEDDING].read()):
        raise ValueError(
            f"{tensors[HEAD].path}: {HEAD}: expected the values of {EMBEDDING}, because tie_word_embeddings is true, "
            "got different ones"
        )


def _check_parameters(model: Decoder, layout: Layout) -> dict[str, jax.Array]:
    """Parameter values by tensor name, after checking that a checkpoint can hold them."""
    found = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    required = {layout[name].parameter for name in layout}
    if found != required:
        differences = f"missing {listed(required - found) or 'none'}, and also {listed(found - required) or 'none'}"
        raise ValueError(f"model: expected the parameters of a Decoder of its config, got {differences}")
    weights = {}
    for name in layout:
        place = layout[name]
        value = parameter(model, place).get_value()
        if not isinstance(value, jax.Array | np.ndarray) or isinstance(value, Tracer):
            kind = type(value).__name__
            raise TypeError(f"model: expected parameters with values, got {kind} for {place.parameter}")
        shape = place.shape[::-1] if place.is_transposed else place.shape
        if value.shape != shape or str(value.dtype) not in DTYPES.values():
            expected = f"{' or '.join(DTYPES.values())} {list(shape)}"
            got = f"{value.dtype} {list(value.shape)}"
            raise ValueError(f"model: expected {expected} for {place.parameter}, as in its config, got {got}")
        weights[name] = value
    return weights


def _split_into_shards(sizes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def _to_numpy(weight: jax.Array, is_transposed: bool) -> np.ndarray:
    array = np.asarray(jax.device_get(weight))
    return np.ascontiguousarray(array.T if is_transposed else array)
