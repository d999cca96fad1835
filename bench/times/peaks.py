"""Measures the machine's peaks within a run: a large matrix product and a large copy.

The copy counts each byte twice, because it is read and written. It adds one to an array in place, which moves the bytes
of a copy on all cores without allocating a new array; on a CPU that would take several times as long. The product
counts ``2 M^3`` operations.
"""

import dataclasses
import statistics

import jax
import jax.numpy as jnp

from bench.machine import Peaks
from bench.times.timing import Contender, prepare


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Side of the square matrices, and bytes of the copied array, which exceed any cache."""

    side: int
    nbytes: int


SIZES = {"cpu": Sizes(2048, 2**28), "gpu": Sizes(8192, 2**30)}
TOY = Sizes(64, 2**16)
_ROUNDS = 7


def measure(dtype: str, sizes: Sizes, *, by_device: bool) -> Peaks:
    """Peaks from the medians of a few turns. ``by_device``: use the device's clock."""
    product = _seconds(_product(dtype, sizes), by_device)
    copy = _seconds(_copy(dtype, sizes), by_device)
    return Peaks(2 * sizes.side**3 / product / 1e12, 2 * sizes.nbytes / copy / 1e9)


def _product(dtype: str, sizes: Sizes) -> Contender:
    # A GPU's clock drops with the number of toggled bits; zeros toggle none, so they would be too fast.
    left, right = (jax.random.normal(jax.random.key(i), (sizes.side, sizes.side), dtype) for i in range(2))
    return Contender(jnp.matmul, [(left, right)])


def _copy(dtype: str, sizes: Sizes) -> Contender:
    array = jnp.zeros(sizes.nbytes // jnp.dtype(dtype).itemsize, dtype)
    return Contender(lambda x: x + jnp.ones((), x.dtype), [(array,)], carries=True)


def _seconds(contender: Contender, by_device: bool) -> float:
    turn = prepare(contender, by_device=by_device).turn
    return statistics.median(turn() for _ in range(_ROUNDS))
