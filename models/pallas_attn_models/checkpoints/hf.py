"""Loads and saves decoders in the format of transformers: ``config.json`` and safetensors.

Loading is strict: the files must hold every tensor of the model, in its shape, and no other.
"""

import itertools
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.typing import DTypeLike
from safetensors import SafetensorError
from safetensors.numpy import save_file

from pallas_attn_models.checkpoints.families import FAMILIES
from pallas_attn_models.checkpoints.family import Family
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
from pallas_attn_models.checkpoints.mxfp4 import dequantized
from pallas_attn_models.checkpoints.tensors import Layout, Place, parameter
from pallas_attn_models.checks import listed, require_positive_int
from pallas_attn_models.decoder import Decoder, check_dtype, check_implementation

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

EMBEDDING = "embedding.table"
_SHOWN = 5

_logger = logging.getLogger(__name__)


def load_hf(
    directory: str | os.PathLike[str],
    dtype: DTypeLike = jnp.bfloat16,
    *,
    param_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Decoder:
    """Loads a checkpoint of a model family in ``families/``, as saved by transformers, tensor by tensor.

    Names, shapes and dtypes of all tensors are checked against the config first. While :func:`save_hf` replaces the
    checkpoint, the result is entirely the old or entirely the new one.

    Args:
      directory: holds ``config.json`` and either ``model.safetensors`` or ``model.safetensors.index.json`` with its
        shards. Weights may be float32, bfloat16 or float16, and those of experts MXFP4.
      dtype: of the activations and, unless ``param_dtype`` is given, of the weights; other dtypes are rounded.
      param_dtype: of the weights; default: ``dtype``.
      implementation: of ``pa.attention``; default: the best available.

    Returns:
      The decoder, on JAX's default device.

    Raises:
      FileNotFoundError: a file is missing; named.
      NotADirectoryError: ``directory`` is a file.
      ValueError: a file that cannot be parsed, an unsupported config, or a tensor that is missing, unused, duplicated,
        or of another shape or dtype; named. Exceptions: tensors that follow from the config are ignored, such as
        ``rotary_emb.inv_freq``; a tied model may have a head equal to its embedding, or only one of both.
      TypeError: an argument of the wrong kind.
    """
    path = as_path("directory", directory)
    dtype = check_dtype("dtype", dtype)
    param_dtype = dtype if param_dtype is None else check_dtype("param_dtype", param_dtype)
    check_implementation(implementation)
    if not path.is_dir():
        kind, got = (NotADirectoryError, "a file") if path.exists() else (FileNotFoundError, "nothing")
        raise kind(f"directory: expected a directory with a checkpoint, got {path}, where {got} is")

    with reading(path) as checkpoint:
        try:
            fields, stored = dequantized(checkpoint.fields, checkpoint.tensors)
            config = config_from_hf(fields)
        except ValueError as error:
            raise ValueError(f"{checkpoint.config_path}: {error}") from error
        family = FAMILIES[config.family]
        layout = Layout(family, config)
        tensors = _check_tensors(path, layout, _by_our_names(path, family, layout, stored), config.tie_word_embeddings)

        # Abstract initialization avoids memory for random weights that would be replaced at once.
        options = {"dtype": dtype, "param_dtype": param_dtype, "implementation": implementation}
        model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), **options))
        for place in layout.places():
            values = place.tensor.to_parameters(
                [tensors[name].read() for name in place.names], place.shapes, place.layer
            )
            for target, value in zip(place.parameters, values, strict=True):
                variable = parameter(model, target)
                variable.set_value(jnp.asarray(value).astype(variable.dtype))
    return model


def save_hf(model: Decoder, directory: str | os.PathLike[str], *, max_shard_bytes: int = 5 * 10**9) -> None:
    """Saves a decoder for :func:`load_hf` and transformers' ``AutoModelForCausalLM.from_pretrained``.

    The format is that of the model family that the decoder was loaded from, else of the first one that can express its
    config. Tensors keep their dtype: ``load_hf(directory, dtype=model.dtype)`` restores the same bits if the weights
    have that dtype. The host holds one shard at a time.

    An existing checkpoint in ``directory`` is replaced atomically: if a save fails or is killed at any moment,
    :func:`load_hf` still loads the old or the new checkpoint. (transformers may see, for an instant between two
    renames, the new weights with the old ``config.json``.) Shards therefore get unused names, and files of earlier
    saves are removed. Concurrent saves of one directory run one after the other.

    Args:
      model: the decoder.
      directory: created if missing.
      max_shard_bytes: maximum size of a shard, unless a single tensor is larger; one shard becomes one plain file.

    Raises:
      ValueError: ``max_shard_bytes`` is not a positive int, the parameters do not match the model's config, or no
        family can express the config (:func:`config_to_hf`).
      TypeError: an argument of the wrong kind, or a model without values.
      OSError: ``directory`` is a file or not writable, or the disk is full.
    """
    if not isinstance(model, Decoder):
        raise TypeError(f"model: expected a Decoder, got {type(model).__name__}")
    path = as_path("directory", directory)
    require_positive_int("max_shard_bytes", max_shard_bytes)
    fields = {**config_to_hf(model.config), "torch_dtype": str(model.embedding.table.dtype)}
    layout = Layout(FAMILIES[fields["model_type"]], model.config)
    shards = _split_into_shards(_check_parameters(model, layout), max_shard_bytes)

    with replacing(writable_directory("directory", path)) as save:
        names = [WEIGHTS] if len(shards) == 1 else save.shard_names(len(shards))
        for file, shard in zip(names, shards, strict=True):
            try:
                save_file(dict(_values(model, shard)), save.folder / file, {"format": "pt", SAVE: save.id})
            except SafetensorError as error:
                raise OSError(f"{path / file}: expected a writable file, got: {error}") from error
        if len(shards) > 1:
            metadata = {"total_size": sum(one.nbytes for shard in shards for one in shard), SAVE: save.id}
            weight_map = {one.name: file for file, shard in zip(names, shards, strict=True) for one in shard}
            write_json(save.folder / INDEX, {"metadata": metadata, "weight_map": weight_map})
        write_json(save.folder / CONFIG, fields)


def _by_our_names(
    directory: Path, family: Family, layout: Layout, tensors: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """The tensors by the names in the tables of the family, without those that follow from the config.

    Published files often leave out the first part of the names, or have another one.
    """
    ignored = [re.compile(pattern) for pattern in (*family.redundant, *family.other_parts)]
    base = family.layer_prefix.split(".")[0]
    renamed: dict[str, StoredTensor] = {}
    redundant = []
    for name, tensor in tensors.items():
        candidates = [name, *_other_names(name, {**family.prefixes, "": f"{base}."})]
        if any(pattern.fullmatch(one) for pattern in ignored for one in candidates):
            redundant.append(name)
            continue
        ours = next((one for one in candidates if one in layout), name)
        if ours in renamed:
            raise ValueError(f"{directory}: expected {ours} once, got it as {renamed[ours].name} and {name}")
        renamed[ours] = tensor
    if redundant:
        reason = "redundant with the config, or of other parts of the model"
        _logger.info("%s: %d tensors ignored, %s: %s", directory, len(redundant), reason, listed(redundant))
    return renamed


def _other_names(name: str, prefixes: Mapping[str, str]) -> Iterator[str]:
    for theirs, ours in prefixes.items():
        if name.startswith(theirs):
            yield ours + name.removeprefix(theirs)


def _check_tensors(
    directory: Path, layout: Layout, tensors: dict[str, StoredTensor], is_tied: bool
) -> dict[str, StoredTensor]:
    """The tensors of the layout; raises ValueError unless all of them are there, and no others."""
    embedding, head = layout.tensor_of(EMBEDDING), layout.head
    if is_tied and head in tensors:
        # A head beside the table must be equal to it. Some files hold only the head.
        tensors.setdefault(embedding, tensors[head])
    used = {name for name in tensors if name in layout}
    if missing := len(layout) - len(used):
        first = itertools.islice((name for name in layout.names() if name not in tensors), _SHOWN)
        names = listed(first, total=missing)
        expected = f"all {len(layout)} tensors of {layout.num_layers} layers"
        raise ValueError(f"{directory}: expected {expected}, got all but {missing} of them: missing {names}")
    tied_head = {head} & tensors.keys() - used if is_tied else set()
    if extra := tensors.keys() - used - tied_head:
        raise ValueError(f"{directory}: expected only tensors of the model, got also {listed(extra)}")

    wrong = []
    for name in [*sorted(used), *tied_head]:
        tensor, shape = tensors[name], layout.shape_of(name if name in layout else embedding)
        if tensor.dtype not in DTYPES:
            wrong.append(f"{tensor.path}: {name}: expected one of {', '.join(DTYPES)}, got {tensor.dtype}")
        elif tensor.shape != shape:
            wrong.append(f"{tensor.path}: {name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if wrong:
        more = f"; and {len(wrong) - 1} more tensors have the wrong shape or dtype" if len(wrong) > 1 else ""
        raise ValueError(wrong[0] + more)
    if tied_head and not np.array_equal(tensors[head].read(), tensors[embedding].read()):
        raise ValueError(
            f"{tensors[head].path}: {head}: expected the values of {embedding}, because tie_word_embeddings is true, "
            "got different ones"
        )
    return tensors


class _Item(NamedTuple):
    """A tensor to be written: one of those of a place."""

    name: str
    place: Place
    index: int
    nbytes: int


def _check_parameters(model: Decoder, layout: Layout) -> list[_Item]:
    """The tensors to be written, after checking that a checkpoint can hold the parameters."""
    found = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    required = {path for place in layout.places() for path in place.parameters}
    if found != required:
        differences = f"missing {listed(required - found) or 'none'}, and also {listed(found - required) or 'none'}"
        raise ValueError(f"model: expected the parameters of a Decoder of its config, got {differences}")
    items = []
    for place in layout.places():
        dtypes = set()
        for path, shape in zip(place.parameters, place.shapes, strict=True):
            value = parameter(model, path).get_value()
            if not isinstance(value, jax.Array | np.ndarray) or isinstance(value, Tracer):
                raise TypeError(f"model: expected parameters with values, got {type(value).__name__} for {path}")
            if value.shape != shape or str(value.dtype) not in DTYPES.values():
                expected = f"{' or '.join(DTYPES.values())} {list(shape)}"
                got = f"{value.dtype} {list(value.shape)}"
                raise ValueError(f"model: expected {expected} for {path}, as in its config, got {got}")
            dtypes.add(value.dtype)
        if len(dtypes) > 1:
            names, got = ", ".join(place.parameters), listed(map(str, dtypes))
            raise ValueError(f"model: expected one dtype for {names}, which share a tensor, got {got}")
        nbytes = math.prod(place.shape) * dtypes.pop().itemsize
        items += [_Item(name, place, index, nbytes) for index, name in enumerate(place.names)]
    return items


def _split_into_shards(items: Iterable[_Item], max_shard_bytes: int) -> list[list[_Item]]:
    shards: list[list[_Item]] = [[]]
    room = max_shard_bytes
    for item in items:
        if shards[-1] and item.nbytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(item)
        room -= item.nbytes
    return shards


def _values(model: Decoder, shard: Iterable[_Item]) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a shard by name."""
    for place, items in itertools.groupby(shard, key=lambda item: item.place):
        values = [np.asarray(jax.device_get(parameter(model, path).get_value())) for path in place.parameters]
        tensors = place.tensor.to_tensors(values, place.layer)
        for item in items:
            yield item.name, np.ascontiguousarray(tensors[item.index])
