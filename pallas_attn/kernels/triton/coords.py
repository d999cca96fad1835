"""Which part of every array a program works on."""

from typing import Any, NamedTuple

import numpy as np

from pallas_attn.kernels.call import CallShape

_ZERO = np.int32(0)  # a plain int fails in the interpreter


class ProgramCoords(NamedTuple):
    """The batch row and the heads of a program."""

    b: Any  # its batch row
    h: Any  # its KV head
    n: Any  # its query head, or int32 [rows]: one for each row of its tile

    def row(self, ref: Any) -> Any:
        """The index along the first axis of ``[B|1, ...]``."""
        return self.b if ref.shape[0] > 1 else _ZERO

    def at(self, ref: Any, shape: CallShape) -> tuple[Any, Any]:
        """The index along the first axes of ``[B|1, 1|K|N, ...]``."""
        heads = ref.shape[1]
        return self.row(ref), _ZERO if heads == 1 else self.h if heads == shape.kv_heads else self.n
