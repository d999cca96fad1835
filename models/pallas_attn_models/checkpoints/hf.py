"""Loads and saves decoders in the format of transformers: ``config.json`` and safetensors.

Loading is strict: the files must hold every tensor of the model, in its shape, and no other.
"""

import itertools
import math
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.typing import DTypeLike
from safetensors import SafetensorError
from safetensors.numpy import save_file

from pallas_attn_models.checkpoints.contents import DTYPES, Stored, check_contents
from pallas_attn_models.checkpoints.families import FAMILIES
from pallas_attn_models.checkpoints.files import (
    CONFIG,
    INDEX,
    SAVE,
    WEIGHTS,
    as_path,
    open_checkpoint,
    replacing,
    writable_directory,
    write_json,
)
from pallas_attn_models.checkpoints.hf_config import config_to_hf
from pallas_attn_models.checkpoints.hub import local_directory
from pallas_attn_models.checkpoints.progress import Progress, check_progress, reporting
from pallas_attn_models.checkpoints.tensors import Layout, Place, parameter
from pallas_attn_models.checks import listed, require_positive_int
from pallas_attn_models.decoder import Decoder, abstract_decoder, check_dtype, check_implementation

_ALIGNMENT = 64  # bytes; of XLA's buffers on a CPU


def load_hf(
    directory: str | os.PathLike[str],
    dtype: DTypeLike = jnp.bfloat16,
    *,
    revision: str | None = None,
    param_dtype: DTypeLike | None = None,
    implementation: str | None = None,
    progress: Progress | bool | None = None,
) -> Decoder:
    """Loads a checkpoint of a model family in ``families/``, as saved by transformers.

    Names, shapes and dtypes of all tensors are checked against the config first. Then one tensor after the other goes
    from the mapped files straight to the device: beside the model, the host needs memory for about one parameter.
    While :func:`save_hf` replaces the checkpoint, the result is entirely the old or entirely the new one.

    Args:
      directory: holds ``config.json`` and either ``model.safetensors`` or ``model.safetensors.index.json`` with its
        shards. Weights may be float32, bfloat16 or float16, and those of experts MXFP4. Or, where nothing has that
        path, ``"org/name"``: a model on the Hugging Face Hub, of which these files are fetched into the Hub's cache.
      dtype: of the activations and, unless ``param_dtype`` is given, of the weights; other dtypes are rounded.
      revision: a branch, tag or commit of a model on the Hub; default: its main branch.
      param_dtype: of the weights; default: ``dtype``.
      implementation: of ``pa.attention``; default: the best available.
      progress: called with the bytes of the files read so far, and with their total; True: a bar on stderr.

    Returns:
      The decoder, on JAX's default device.

    Raises:
      FileNotFoundError: a file is missing; named. Or a model that is not in the Hub's cache and cannot be fetched.
      NotADirectoryError: ``directory`` is a file.
      PermissionError: a model on the Hub that needs a token.
      ValueError: a file that cannot be parsed, an unsupported config, or a tensor that is missing, unused, duplicated,
        or of another shape or dtype; named. Exceptions: tensors that follow from the config are ignored, such as
        ``rotary_emb.inv_freq``; a tied model may have a head equal to its embedding, or only one of both.
      TypeError: an argument of the wrong kind.
    """
    dtype = check_dtype("dtype", dtype)
    param_dtype = dtype if param_dtype is None else check_dtype("param_dtype", param_dtype)
    check_implementation(implementation)
    check_progress(progress)
    path = local_directory("directory", directory, revision)

    contents = check_contents(path, open_checkpoint(path))
    contents.check_tied_head()
    with reporting(progress) as report:
        # Abstract initialization avoids memory for random weights that would be replaced at once.
        model = abstract_decoder(contents.config, dtype=dtype, param_dtype=param_dtype, implementation=implementation)
        done, total = 0, sum(contents.tensors[name].nbytes for name in contents.layout.names())
        for place in contents.layout.places():
            stored = [contents.tensors[name] for name in place.names]
            values = place.tensor.to_parameters([one.read() for one in stored], place.shapes, place.layer)
            _release(stored)  # those that were stacked are copies now
            for target, value in zip(place.parameters, values, strict=True):
                variable = parameter(model, target)
                variable.set_value(_on_device(value, variable.dtype))
            _release(stored)
            done += sum(one.nbytes for one in stored)
            report(done, total)
    return model


def _on_device(value: np.ndarray, dtype: DTypeLike) -> jax.Array:
    """The values on JAX's default device, complete when this returns and independent of the file.

    A CPU shares the memory of contiguous arrays at the right address, and copies others into its own layout. So it may
    get a view of the file, which is read-only, unless that is contiguous.
    """
    if value.flags.c_contiguous and not value.flags.writeable:
        value = _aligned_copy(value)
    return jax.block_until_ready(jax.device_put(value).astype(dtype))


def _release(tensors: Iterable[Stored]) -> None:
    for tensor in tensors:
        tensor.release()


def _aligned_copy(value: np.ndarray) -> np.ndarray:
    """A copy at an address whose memory a CPU shares instead of copying it once more."""
    room = np.empty(value.nbytes + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    copy = room[start : start + value.nbytes].view(value.dtype).reshape(value.shape)
    copy[...] = value
    return copy


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
    items = {item.name: item for item in _check_parameters(model, layout)}

    from huggingface_hub import split_state_dict_into_shards_factory  # importing it takes a while

    with replacing(writable_directory("directory", path)) as save:
        split = split_state_dict_into_shards_factory(
            items,
            get_storage_size=lambda item: item.nbytes,
            filename_pattern=save.shard_pattern(),
            max_shard_size=max_shard_bytes,
        )
        for name, shard in split.filename_to_tensors.items():
            file = name if split.is_sharded else WEIGHTS
            values = _values(model, [items[tensor] for tensor in shard])
            try:
                save_file(dict(values), save.folder / file, {"format": "pt", SAVE: save.id})
            except SafetensorError as error:
                raise OSError(f"{path / file}: expected a writable file, got: {error}") from error
        if split.is_sharded:
            metadata = {**split.metadata, SAVE: save.id}
            write_json(save.folder / INDEX, {"metadata": metadata, "weight_map": split.tensor_to_filename})
        write_json(save.folder / CONFIG, fields)


class _Item(NamedTuple):
    """A tensor to be written: one of those of a place."""

    name: str
    place: Place
    number: int
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


def _values(model: Decoder, shard: Iterable[_Item]) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a shard by name."""
    for place, items in itertools.groupby(shard, key=lambda item: item.place):
        values = [np.asarray(jax.device_get(parameter(model, path).get_value())) for path in place.parameters]
        tensors = place.tensor.to_tensors(values, place.layer)
        for item in items:
            yield item.name, np.ascontiguousarray(tensors[item.number])
