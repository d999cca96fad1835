"""Decoders read from and written to disk, in the format of transformers: ``config.json`` and safetensors.

Loading is strict: every tensor that the model needs is there, with its shape, and every tensor that is there is used.
"""

import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pallas_attn_models.config import DecoderConfig, require_positive_int
from pallas_attn_models.decoder import Decoder, check_dtype
from pallas_attn_models.text_files import read_json

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# Old checkpoints carry the rotary frequencies, which follow from config.json.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")

_logger = logging.getLogger(__name__)


class _Weight(NamedTuple):
    """Where a tensor of a checkpoint lives in a :class:`Decoder`."""

    param: nnx.Param
    is_kernel: bool  # PyTorch holds a linear map as [out, in], Flax as [in, out]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.param.shape[::-1] if self.is_kernel else self.param.shape


def _weights(model: Decoder) -> dict[str, _Weight]:
    """Every parameter of the model by its name in a checkpoint."""
    weights = {EMBEDDING: _Weight(model.embedding.table, False), "model.norm.weight": _Weight(model.norm.scale, False)}
    if model.head is not None:
        weights[HEAD] = _Weight(model.head.kernel, True)
    for index, layer in enumerate(model.layers):
        prefix = f"model.layers.{index}."
        weights |= {
            prefix + "input_layernorm.weight": _Weight(layer.attention_norm.scale, False),
            prefix + "self_attn.q_proj.weight": _Weight(layer.attention.query.kernel, True),
            prefix + "self_attn.k_proj.weight": _Weight(layer.attention.key.kernel, True),
            prefix + "self_attn.v_proj.weight": _Weight(layer.attention.value.kernel, True),
            prefix + "self_attn.o_proj.weight": _Weight(layer.attention.output.kernel, True),
            prefix + "post_attention_layernorm.weight": _Weight(layer.mlp_norm.scale, False),
            prefix + "mlp.gate_proj.weight": _Weight(layer.mlp.gate.kernel, True),
            prefix + "mlp.up_proj.weight": _Weight(layer.mlp.up.kernel, True),
            prefix + "mlp.down_proj.weight": _Weight(layer.mlp.down.kernel, True),
        }
    return weights


def load_hf(
    directory: str | os.PathLike[str], dtype: DTypeLike = jnp.bfloat16, *, implementation: str | None = None
) -> Decoder:
    """Loads a Llama or Mistral checkpoint as transformers saves it, tensor by tensor.

    Args:
      directory: holds ``config.json`` and either ``model.safetensors`` or ``model.safetensors.index.json`` with its
        shards. Weights may be float32, bfloat16 or float16.
      dtype: of the weights and activations; tensors of another dtype are rounded to it.
      implementation: of ``pa.attention``; default: the best that can serve.

    Returns:
      The decoder, on JAX's default device.

    Raises:
      FileNotFoundError: a file is missing; named.
      ValueError: a file that cannot be parsed, a config that is not supported, or a tensor that is missing, not used,
        there twice, or has another shape or dtype; named. Only ``rotary_emb.inv_freq``, which follows from the config,
        is left aside; and a tied model may carry an ``lm_head.weight`` that equals its embedding.
    """
    directory = Path(directory)
    dtype = check_dtype("dtype", dtype)
    fields = read_json(directory / CONFIG)
    try:
        config = DecoderConfig.from_hf(fields)
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG}: {error}") from error

    files = _locate_tensors(directory)
    # No memory is taken by random weights that are about to be replaced.
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype, implementation=implementation))
    weights = _weights(model)
    if derived := {name for name in files if _DERIVED.fullmatch(name)}:
        _logger.info("%s: %d rotary_emb.inv_freq tensors ignored; they follow from the config", directory, len(derived))
    if missing := weights.keys() - files.keys():
        raise ValueError(f"{directory}: expected every tensor of the model, missing {_names(missing)}")
    tied_head = {HEAD} & files.keys() if config.tie_word_embeddings else set()
    if extra := files.keys() - weights.keys() - derived - tied_head:
        raise ValueError(f"{directory}: expected only tensors of the model, got also {_names(extra)}")

    for path in sorted(set(files.values())):
        with _open(path) as tensors:
            for name in sorted(name for name in weights if files[name] == path):
                param, is_kernel = weights[name]
                tensor = _read(tensors, path, name, weights[name].stored_shape)
                value = jnp.asarray(tensor).astype(dtype)
                param.set_value(value.T if is_kernel else value)
    if tied_head:
        _check_tied_head(files, weights[EMBEDDING].stored_shape)
    return model


def save_hf(model: Decoder, directory: str | os.PathLike[str], *, max_shard_bytes: int = 5 * 10**9) -> None:
    """Saves a decoder so that :func:`load_hf` and transformers' ``AutoModelForCausalLM.from_pretrained`` load it.

    Tensors keep their dtype: ``load_hf(directory, dtype=model.dtype)`` gives the same bits back where the weights have
    that dtype. Every file is written whole beside its place, then renamed into it; what an earlier save left in
    ``directory`` besides is removed. The host holds one shard at a time.

    Args:
      model: the decoder.
      directory: made if it is not there.
      max_shard_bytes: a shard holds no more, unless a single tensor does; one shard becomes one plain file.

    Raises:
      ValueError: ``max_shard_bytes`` is not a positive int, or a config that no file can say
        (:meth:`DecoderConfig.to_hf`).
    """
    require_positive_int("max_shard_bytes", max_shard_bytes)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights = _weights(model)
    shards = _split_into_shards(weights, max_shard_bytes)
    if len(shards) == 1:
        paths = [WEIGHTS]
    else:
        paths = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]

    with tempfile.TemporaryDirectory(dir=directory, prefix=".save-") as temporary:
        unfinished = Path(temporary)
        for path, shard in zip(paths, shards, strict=True):
            save_file({name: _to_numpy(weights[name]) for name in shard}, unfinished / path, {"format": "pt"})
        if len(shards) > 1:
            total = sum(_num_bytes(weight) for weight in weights.values())
            weight_map = {name: path for path, shard in zip(paths, shards, strict=True) for name in shard}
            _write_json(unfinished / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        dtype = str(model.embedding.table.dtype)
        _write_json(unfinished / CONFIG, {**model.config.to_hf(), "torch_dtype": dtype})
        written = [path.name for path in unfinished.iterdir()]
        mode = (unfinished / CONFIG).stat().st_mode
        for file in written:
            (unfinished / file).chmod(mode)  # safetensors lets only the owner read what it writes
            (unfinished / file).replace(directory / file)
    for old in directory.iterdir():
        if old.name not in written and (old.name in (WEIGHTS, INDEX) or _SHARD.fullmatch(old.name)):
            old.unlink()


def _locate_tensors(directory: Path) -> dict[str, Path]:
    """The file of every tensor in the checkpoint."""
    if (directory / WEIGHTS).exists():
        with _open(directory / WEIGHTS) as tensors:
            return dict.fromkeys(tensors.keys(), directory / WEIGHTS)
    if not (directory / INDEX).exists():
        raise FileNotFoundError(f"{directory}: expected {WEIGHTS} or {INDEX}, found neither")

    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{directory / INDEX}: expected an object weight_map from tensors to files")
    files: dict[str, Path] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise ValueError(f"{directory / INDEX}: expected the names of files beside it, got {file!r}")
        with _open(directory / file) as tensors:
            if twice := files.keys() & tensors.keys():
                raise ValueError(f"{directory / file}: expected every tensor once, got again {_names(twice)}")
            files |= dict.fromkeys(tensors.keys(), directory / file)
    indexed = {name: directory / file for name, file in weight_map.items()}
    if wrong := {name for name, _ in files.items() ^ indexed.items()}:
        raise ValueError(f"{directory / INDEX}: expected what the shards hold, differs in {_names(wrong)}")
    return files


def _read(tensors: Any, path: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    stored = tensors.get_slice(name)
    if stored.get_dtype() not in DTYPES:
        raise ValueError(f"{path}: {name}: expected one of {', '.join(DTYPES)}, got {stored.get_dtype()}")
    if tuple(stored.get_shape()) != shape:
        raise ValueError(f"{path}: {name}: expected shape {list(shape)}, got {list(stored.get_shape())}")
    return tensors.get_tensor(name)


def _check_tied_head(files: dict[str, Path], shape: tuple[int, ...]) -> None:
    with _open(files[HEAD]) as head, _open(files[EMBEDDING]) as embedding:
        same = np.array_equal(
            _read(head, files[HEAD], HEAD, shape), _read(embedding, files[EMBEDDING], EMBEDDING, shape)
        )
    if not same:
        raise ValueError(
            f"{files[HEAD]}: {HEAD}: expected the values of {EMBEDDING}, as tie_word_embeddings is true, got others"
        )


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a safetensors file, found none")
    try:
        with safe_open(path, framework="numpy") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a whole safetensors file, got: {error}") from error


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _split_into_shards(weights: dict[str, _Weight], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, weight in weights.items():
        if shards[-1] and _num_bytes(weight) > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= _num_bytes(weight)
    return shards


def _num_bytes(weight: _Weight) -> int:
    return weight.param.size * weight.param.dtype.itemsize


def _to_numpy(weight: _Weight) -> np.ndarray:
    array = np.asarray(jax.device_get(weight.param[...]))
    return np.ascontiguousarray(array.T if weight.is_kernel else array)


def _names(names: set[str]) -> str:
    return ", ".join(sorted(names))
