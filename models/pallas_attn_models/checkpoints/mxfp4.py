"""Weights in MXFP4 (OCP Microscaling Formats 1.0): blocks of 32 numbers of 4 bits with one scale, a power of two."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from pallas_attn_models.checkpoints.safetensors_file import StoredTensor
from pallas_attn_models.checks import shown

_BLOCKS, _SCALES = "_blocks", "_scales"
# The numbers of 4 bits, E2M1: sign, two bits of exponent, one of mantissa.
_VALUES = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class DequantizedTensor:
    """Blocks ``[X, out, in / 32, 16]`` of bytes and scales ``[X, out, in / 32]``, as one tensor ``[X, in, out]``."""

    blocks: StoredTensor
    scales: StoredTensor
    name: str
    dtype: str = "BF16"

    @property
    def path(self) -> Any:
        return self.blocks.path

    @property
    def shape(self) -> tuple[int, ...]:
        experts, out, groups, size = self.blocks.shape
        return experts, groups * size * 2, out

    @property
    def nbytes(self) -> int:
        """Of the file."""
        return self.blocks.nbytes + self.scales.nbytes

    def read(self) -> np.ndarray:
        """All values, in bfloat16."""
        blocks, scales = self.blocks.read(), self.scales.read()
        out = np.empty((blocks.shape[0], *self.shape[1:]), ml_dtypes.bfloat16)
        for expert in range(blocks.shape[0]):  # one at a time: unpacked, they take eight times the memory
            low, high = _VALUES[blocks[expert] & 15], _VALUES[blocks[expert] >> 4]
            numbers = np.stack([low, high], axis=-1).reshape(*scales.shape[1:], -1)
            numbers = np.ldexp(numbers, scales[expert].astype(np.int32)[..., None] - 127)
            out[expert] = numbers.reshape(scales.shape[1], -1).T.astype(ml_dtypes.bfloat16)
        return out

    def release(self) -> None:
        """As for :class:`StoredTensor`."""
        self.blocks.release()
        self.scales.release()


def dequantized(
    fields: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> tuple[dict[str, Any], dict[str, StoredTensor | DequantizedTensor]]:
    """The fields and tensors of a checkpoint, with those in MXFP4 replaced by bfloat16.

    Raises:
      ValueError: another quantization, or blocks without scales.
    """
    fields = dict(fields)
    left: dict[str, StoredTensor | DequantizedTensor] = dict(tensors)
    config = fields.get("quantization_config")
    if not isinstance(config, Mapping) or config.get("quant_method") != "mxfp4":
        return fields, left
    del fields["quantization_config"]
    for name in [name for name in tensors if name.endswith(_BLOCKS)]:
        base = name.removesuffix(_BLOCKS)
        blocks, scales = tensors[name], tensors.get(base + _SCALES)
        if scales is None or len(blocks.shape) != 4 or scales.shape != blocks.shape[:-1]:
            got = "none" if scales is None else shown(list(scales.shape))
            expected = f"expected scales {list(blocks.shape[:-1])} of its blocks"
            raise ValueError(f"{blocks.path}: {base}{_SCALES}: {expected}, got {got}")
        if (blocks.dtype, scales.dtype) != ("U8", "U8"):
            got = f"{blocks.dtype} with scales {scales.dtype}"
            raise ValueError(f"{blocks.path}: {name}: expected bytes (U8), got {got}")
        del left[name], left[base + _SCALES]
        left[base] = DequantizedTensor(blocks, scales, base)
    return fields, left
