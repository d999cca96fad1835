"""The arguments of the kernels. Every program sees whole arrays and takes its own part of them."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_attn import pointwise
from pallas_attn.kernels.call import Call, CallShape
from pallas_attn.kernels.lse import Lse
from pallas_attn.kernels.rounding import rounded
from pallas_attn.kernels.triton import tiles
from pallas_attn.kernels.triton.tables import with_tables
from pallas_attn.quantized import KVArray, QuantizedArray
from pallas_attn.scores import Scores
from pallas_attn.tuning import BlockSizes

_LARGEST = float(jnp.finfo(jnp.float32).max)


@dataclasses.dataclass(frozen=True)
class Tiling(CallShape):
    """The static facts of a kernel call: its shape, its blocks, and how logits and exponentials are computed."""

    dtype: jnp.dtype
    q_block: int
    kv_block: int
    q_blocks: int
    kv_blocks: int
    scale: float
    has_scores: bool
    interpret: bool

    @staticmethod
    def of_call(call: Call, scale: float, interpret: bool) -> "Tiling":
        block_mask = call.block_mask
        shape = CallShape.of(call.query, call.key, call.value, call.page_table)
        q_blocks, kv_blocks = block_mask.grid
        return Tiling(
            **vars(shape),
            dtype=call.query.dtype,
            q_block=block_mask.q_block,
            kv_block=block_mask.kv_block,
            q_blocks=q_blocks,
            kv_blocks=kv_blocks,
            scale=scale,
            has_scores=bool(call.scores),
            interpret=interpret,
        )

    # A compiled kernel sees arrays as they are: where a block does not divide an array, JAX 0.12 masks every load from
    # it, even in the loop over full blocks. The interpreter sees whole blocks, because it moves a slice that reaches
    # beyond its array.
    @property
    def q_rows(self) -> int:
        """T of the arrays that a kernel sees."""
        return self.q_blocks * self.q_block if self.interpret else self.q_len

    @property
    def kv_rows(self) -> int:
        """S of the arrays that a kernel sees."""
        return self.kv_blocks * self.kv_block if self.interpret else self.kv_len

    def queries(self, width: int) -> pl.BlockSpec:
        """Of ``[B, T, N, width]``, in a whole tile of columns."""
        return of_shape((self.batch, self.q_rows, self.q_heads, tiles.tile_width(width)))

    def keys(self, width: int) -> pl.BlockSpec:
        """Of ``[B, S, K, width]``, in a whole tile of columns."""
        return of_shape((self.batch, self.kv_rows, self.kv_heads, tiles.tile_width(width)))

    def per_query(self) -> pl.BlockSpec:
        """Of ``[B, N, T]``."""
        return of_shape((self.batch, self.q_heads, self.q_rows))

    def dot(self, a: Array, b: Array, contract: tuple[int, int]) -> Array:
        """The float32 product of two tiles, over axis ``contract[0]`` of a and ``contract[1]`` of b."""
        return tiles.dot(a.astype(self.dtype), b, contract)

    @property
    def unit(self) -> float:
        """The unit of logits: ``|scale|`` without scores, so that products need no factor of their own; else 1."""
        return 1.0 if self.has_scores else abs(self.scale) or 1.0

    def logits(self, products: Array) -> Array:
        """Logits from products ``q k'``, in units of :attr:`unit`; with scores, the scaled products that these take."""
        if self.has_scores:
            return self.rounded(products) * self.scale
        return products if self.scale > 0 else products * (-1.0 if self.scale < 0 else 0.0)

    def rounded(self, x: Array) -> Array:
        """x, rounded before it is used in the interpreter; compiled, :meth:`minus` does that."""
        return rounded(x) if self.interpret else x

    def minus(self, x: Array, y: Array) -> Array:
        """``x - y`` with x rounded first, so that the result is at most 0 if y is the largest x."""
        return x - y if self.interpret else tiles.minus(x, y)

    def exp(self, x: Array, unit: float = 1.0) -> Array:
        """``exp(unit * x)``."""
        return self._exp2(_in_base_2(x, unit))

    def probabilities(self, logits: Array, peak: Array, log_total: Array) -> Array:
        """Probabilities of logits in units of :attr:`unit`; the arrays of :func:`in_kernels` broadcast to them."""
        # Tiles of another shape than in the forward pass may round to more than the largest logit.
        below_peak = jnp.minimum(self.minus(self.rounded(logits), peak), 0.0)
        return self._exp2(_in_base_2(below_peak, self.unit) - log_total)

    def _exp2(self, x: Array) -> Array:
        return jnp.exp2(x) if self.interpret else tiles.exp2(x)

    def opaque(self, x: Array) -> Array:
        """x through an opaque ``mov``, so that what depends on it is rematerialized instead of kept.

        For values that are needed before and after a loop, but not in it. Not in float32 with wide heads: there the
        compiler would use the freed registers for one more program on a multiprocessor, and spill for it.
        """
        is_wide = self.dtype == jnp.float32 and self.head_dim > 64
        return x if self.interpret or is_wide else tiles.opaque(x)


def _in_base_2(x: Array, unit: float) -> Array:
    factor = unit * tiles.LOG2_E
    return x * factor if factor <= _LARGEST else x * unit * tiles.LOG2_E


def whole(x: Any) -> pl.BlockSpec:
    """The BlockSpec of an array that every program sees whole, from anything with its shape."""
    return of_shape(x.shape)


def of_shape(shape: tuple[int, ...]) -> pl.BlockSpec:
    """The same, of a shape."""
    return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))


class KernelArgs(NamedTuple):
    """The arrays that every kernel reads; inside a kernel, refs to them."""

    query: Any  # [B, T, N, D]
    key: Any  # [B, S, K, D] or a pool [P, page, K, D]; quantized or not
    value: Any  # [B, S, K, Dv] or a pool [P, page, K, Dv]; quantized or not
    q_positions: Any  # [B|1, T]
    kv_positions: Any  # [B|1, 1|K, S]
    lists: Any  # BlockLists
    mask: Any
    scores: Scores
    page_table: Any  # [B, S // page], or None

    @classmethod
    def from_call(cls, call: Call) -> "KernelArgs":
        query, key, value, block_mask, scores, _, page_table = call

        def stored(x: KVArray) -> KVArray:
            """Scales of int4 by half: ``[B, S, K, 2, groups / 2]``."""
            if not isinstance(x, QuantizedArray) or x.kind != "int4":
                return x
            return QuantizedArray(x.values, x.scales.reshape(*x.scales.shape[:-1], 2, -1))

        positions = block_mask.q_positions, block_mask.kv_positions
        arrays = query, stored(key), stored(value)
        mask, scores = with_tables((block_mask.mask, scores))
        return cls(*arrays, *positions, block_mask.lists, mask, scores, page_table)

    def block_specs(self, tiling: Tiling) -> "KernelArgs":
        """The same structure, of BlockSpecs: arrays whole, in whole tiles of columns."""

        def operand(x: Array) -> pl.BlockSpec:
            rows, heads, queries, keys = x.shape
            return of_shape((rows, heads, tiling.q_rows if queries > 1 else 1, tiling.kv_rows if keys > 1 else 1))

        def stored(x: KVArray) -> Any:
            if isinstance(x, QuantizedArray):
                return dataclasses.replace(x, values=tokens(x.values), scales=of_shape(rows(x.scales)))
            return tokens(x)

        def tokens(x: Array) -> pl.BlockSpec:
            return of_shape((*rows(x)[:-1], tiles.tile_width(x.shape[-1])))

        def rows(x: Array) -> tuple[int, ...]:
            return x.shape if self.page_table is not None else (x.shape[0], tiling.kv_rows, *x.shape[2:])

        return KernelArgs(
            tiling.queries(tiling.head_dim),
            stored(self.key),
            stored(self.value),
            of_shape((self.q_positions.shape[0], tiling.q_rows)),
            of_shape((*self.kv_positions.shape[:2], tiling.kv_rows)),
            jax.tree.map(whole, self.lists),
            pointwise.map_arrays(operand, whole, self.mask),
            pointwise.map_arrays(operand, whole, self.scores),
            None if self.page_table is None else whole(self.page_table),
        )


class Residuals(NamedTuple):
    """The further arguments of the backward kernels: residuals of the forward pass and the gradient of its output."""

    lse: Lse  # of rows; see in_kernels
    delta: Any  # [B, N, T]
    d_out: Any  # [B, T, N, Dv]

    @classmethod
    def of(cls, lse: Lse, delta: Array, d_out: Array) -> "Residuals":
        """From the ``lse`` of the forward pass."""
        return cls(in_kernels(lse), delta, d_out)

    def block_specs(self, tiling: Tiling) -> "Residuals":
        """The same structure, of BlockSpecs."""
        rows = tiling.per_query()
        return Residuals(jax.tree.map(lambda _: rows, self.lse), rows, tiling.queries(tiling.value_dim))


def in_kernels(lse: Lse) -> Lse:
    """The ``lse`` of a forward pass in the form that other kernels read, ready for :meth:`Tiling.probabilities`.

    Its ``log_total`` is in base 2. The peak of a query that sees no key is inf, so that its probabilities are 0; where
    the largest logit overflowed to inf it is NaN, which propagates.
    """
    overflow_shows = jnp.where(lse.peak == jnp.inf, jnp.nan, lse.peak)
    peak = jnp.where(lse.peak == -jnp.inf, jnp.inf, overflow_shows)
    return dataclasses.replace(lse, peak=peak, log_total=lse.log_total * tiles.LOG2_E)


def call(kernel: Callable, name: str, sizes: BlockSizes, tiling: Tiling, **options):
    """``pl.pallas_call`` through the Triton lowering."""
    parameters = plgpu.CompilerParams(num_warps=sizes.num_warps, num_stages=sizes.num_stages)
    return pl.pallas_call(kernel, name=name, compiler_params=parameters, interpret=tiling.interpret, **options)
