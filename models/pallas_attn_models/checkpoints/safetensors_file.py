"""A safetensors file, mapped into memory and read tensor by tensor."""

import json
import mmap
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from pallas_attn_models.checks import listed

_MAX_HEADER = 10**8  # bytes; as in the safetensors library
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "U8": np.uint8}


class StoredTensor(NamedTuple):
    """A tensor of an open file.

    Attributes:
      path: of the file.
      name, shape: of the tensor.
      dtype: safetensors' name for it.
      start, nbytes: where the values are in the file.
      mapped: the file; None if only its header is at hand.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    nbytes: int
    mapped: mmap.mmap | None

    def read(self) -> np.ndarray:
        """The values, as a read-only view of the file: the system loads its pages when they are used."""
        assert self.mapped is not None
        values = np.ndarray(self.shape, _DTYPES[self.dtype], self.mapped, self.start)
        return values if values.flags.aligned else values.copy()

    def release(self) -> None:
        """Takes all pages of the file out of the memory of this process; views stay valid and load them again.

        All, because the system loads some neighbors of each page that is used.
        """
        if self.mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.mapped.madvise(mmap.MADV_DONTNEED)


class SafetensorsFile(NamedTuple):
    """The metadata of an open file, and its tensors by name."""

    metadata: dict[str, str] | None
    tensors: dict[str, StoredTensor]


def opened(path: Path) -> SafetensorsFile:
    """Opens a file, which stays readable if another one takes its name, and closes when nothing refers to a tensor.

    Raises:
      FileNotFoundError: there is none.
      ValueError: not a complete safetensors file, or one that names a tensor twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a safetensors file, found none")
    try:
        with path.open("rb") as file:
            header, start = _read_header(file)
            with safe_open(path, framework="numpy"):  # checks that the tensors fill the file
                pass
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a complete safetensors file, got: {error}") from error
    except OSError as error:
        raise type(error)(f"{path}: expected a readable safetensors file, got: {error}") from error
    metadata = header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        first, end = entry["data_offsets"]
        tensors[name] = StoredTensor(
            path, name, tuple(entry["shape"]), entry["dtype"], start + first, end - first, mapped
        )
    return SafetensorsFile(metadata, tensors)


def _read_header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """The header, and where the values start."""
    size = int.from_bytes(file.read(8), "little")
    text = file.read(size) if size <= _MAX_HEADER else b""
    if len(text) < size:
        raise ValueError(f"a header of {size} bytes, beyond the end of the file or the limit of {_MAX_HEADER}")
    return json.loads(text, object_pairs_hook=_without_duplicates), 8 + size


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; Python would keep the last of equal names, and safetensors another one."""
    counts = Counter(name for name, _ in pairs)
    if len(counts) < len(pairs):
        raise ValueError(f"duplicates in the header of {listed(name for name, count in counts.items() if count > 1)}")
    return dict(pairs)
