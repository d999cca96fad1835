"""The mask algebra: which query may attend to which key, as a relation on positions.

A mask has two methods. ``allowed`` is exact and elementwise: may this query see this key? The kernels, the reference
and the oracle all trace it. ``bounds`` is cheap and per pair of blocks: may *any* query of one block see a key of the
other, and may *all* of them see all keys? ``any`` may be True too often and ``all`` False too often, never the reverse,
so that ``&``, ``|`` and ``~`` of masks stay sound.

Padding is not a mask: position -1 marks a missing token (see :mod:`pallas_attn.block_mask`). Masks are evaluated only
at positions >= 0.

An array that a mask needs (its *operand*: prefix lengths, segment ids, a boolean array) is stored with rank 4, aligned
with ``[B, M, T, S]``, with size 1 along every axis on which it does not depend. A kernel that works on a tile replaces
each operand by its tile; ``bounds`` sees each operand replaced by its :class:`Interval` per block. Arrays in the
closure of a :func:`custom` function may have any shape; kernels see them whole (:mod:`pallas_attn.pointwise`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_attn import checks, pointwise, pytrees

# An array, or, inside `bounds`, its Interval per block.
Operand = Any


class Interval(NamedTuple):
    """The smallest and the largest value within each block."""

    min: Array
    max: Array


class Mask:
    """A relation between query positions and key positions. Combine masks with ``&``, ``|`` and ``~``."""

    def allowed(self, q: Array, kv: Array) -> Array:
        """Exact and elementwise: bool, broadcast from positions ``q`` ``[.., T, 1]`` and ``kv`` ``[.., 1, S]``."""
        raise NotImplementedError(type(self).__name__)

    def bounds(self, q: Interval, kv: Interval) -> tuple[Array, Array]:
        """Sound, per pair of blocks: bool ``(any, all)`` for ``q`` bounds ``[.., nq, 1]``, ``kv`` ``[.., 1, nk]``."""
        raise NotImplementedError(type(self).__name__)

    def span(self) -> int | None:
        """An upper bound on the consecutive positions that one query sees, or None if there is none."""
        return None

    def has_fine_edges(self) -> bool:
        """Whether a query's visible range may begin and end anywhere, so that small blocks skip more than large."""
        return True

    def dense_array(self, q_positions: Array, kv_positions: Array) -> Array:
        """The mask and padding as a dense bool array ``[B, M, T, S]``, for tests, pictures and the reference.

        Args:
          q_positions: int32 ``[B|1, T]``; -1 is padding.
          kv_positions: int32 ``[B|1, S]`` or ``[B|1, K, S]``; -1 is an empty slot.
        """
        q_positions = checks.positions("q_positions", q_positions, ranks=(2,))
        kv_positions = checks.positions("kv_positions", kv_positions, ranks=(2, 3))
        q = q_positions[:, None, :, None]
        kv = kv_positions[:, None, None, :] if kv_positions.ndim == 2 else kv_positions[:, :, None, :]
        mask = with_keys(self, kv.shape[-1])
        heads = max([kv.shape[1], *(operand.shape[1] for operand in operands(mask))])
        mask, kv = pointwise.map_operands(lambda x: repeat_heads(x, heads), (mask, kv))
        return mask.allowed(q, kv) & (q >= 0) & (kv >= 0)

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, _checked("&", other))

    def __or__(self, other: "Mask") -> "Mask":
        return Or(self, _checked("|", other))

    def __invert__(self) -> "Mask":
        return Not(self)

    def __bool__(self) -> bool:
        raise TypeError(
            "a mask has no truth value: combine masks with & | ~ instead of and, or, not (and compare with `is None`)"
        )


def operands(mask: Mask) -> list[Array]:
    """The operands of a mask (or a composition of masks), each ``[B|1, M|1, T|1, S|1]``, in a fixed order."""
    return pointwise.operands(mask)


def with_keys(mask: Mask, kv_len: int) -> Mask:
    """Prepares a mask for kernels over S = ``kv_len`` keys.

    A tree, which relates keys rather than positions, becomes a dense mask; a custom mask becomes its traced program.

    Raises:
      ValueError: a tree has more nodes than there are keys.
    """

    def prepared(x: Any) -> Any:
        if isinstance(x, Tree):
            return x.as_dense(kv_len)
        return x.traced() if isinstance(x, Custom) else x

    return jax.tree.map(prepared, mask, is_leaf=lambda x: isinstance(x, Tree | Custom))


def repeat_heads(x: Array, heads: int) -> Array:
    """``[B, h, ...]`` -> ``[B, heads, ...]``, each head repeated for its group; h = 1 (shared by all heads) stays 1."""
    return x if x.shape[1] in (1, heads) else jnp.repeat(x, heads // x.shape[1], axis=1)


def _checked(operator: str, other: Any) -> Mask:
    if not isinstance(other, Mask):
        raise TypeError(f"{operator}: expected a mask on both sides, got {checks.describe(other)}")
    return other


@dataclass_transform(frozen_default=True)
def _mask(*, data: tuple[str, ...] = (), static: tuple[str, ...] = ()):
    """Makes a class a frozen dataclass and pytree: ``data`` fields are traced, ``static`` ones are in the structure."""

    def register(cls):
        # eq=False: comparing masks would compare traced arrays; static fields are compared by the pytree structure.
        cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
        return pytrees.register(cls, data=data, static=static)

    return register


@_mask()
class Full(Mask):
    def allowed(self, q, kv):
        return jnp.ones_like(kv, jnp.bool_)

    def bounds(self, q, kv):
        return jnp.ones_like(kv.min, jnp.bool_), jnp.ones_like(kv.min, jnp.bool_)

    def has_fine_edges(self):
        return False


@_mask()
class Causal(Mask):
    def allowed(self, q, kv):
        return kv <= q

    def bounds(self, q, kv):
        return kv.min <= q.max, kv.max <= q.min

    def has_fine_edges(self):
        return False


@_mask(static=("left", "right"))
class SlidingWindow(Mask):
    left: int
    right: int

    def allowed(self, q, kv):
        offset = kv - q
        return (offset > -self.left) & (offset <= self.right)

    def bounds(self, q, kv):
        offset = Interval(kv.min - q.max, kv.max - q.min)
        return (
            (offset.max > -self.left) & (offset.min <= self.right),
            (offset.min > -self.left) & (offset.max <= self.right),
        )

    def span(self):
        return self.left + self.right


@_mask(data=("lengths",))
class Prefix(Mask):
    lengths: Operand

    def allowed(self, q, kv):
        return kv < self.lengths

    def bounds(self, q, kv):
        return kv.min < self.lengths.max, kv.max < self.lengths.min

    def has_fine_edges(self):
        return False


@_mask(static=("n",))
class Sink(Mask):
    n: int

    def allowed(self, q, kv):
        return kv < self.n

    def bounds(self, q, kv):
        return kv.min < self.n, kv.max < self.n

    def has_fine_edges(self):
        return False


@_mask(static=("size",))
class Chunked(Mask):
    size: int

    def allowed(self, q, kv):
        return q // self.size == kv // self.size

    def bounds(self, q, kv):
        q = Interval(q.min // self.size, q.max // self.size)
        kv = Interval(kv.min // self.size, kv.max // self.size)
        return _may_be_equal(q, kv), _must_be_equal(q, kv)


@_mask(data=("q_ids", "kv_ids"))
class Segments(Mask):
    q_ids: Operand
    kv_ids: Operand

    def allowed(self, q, kv):
        return self.q_ids == self.kv_ids

    def bounds(self, q, kv):
        # Exact for sorted ids: an id between a block's smallest and largest occurs in that block or nowhere.
        return _may_be_equal(self.q_ids, self.kv_ids), _must_be_equal(self.q_ids, self.kv_ids)


@_mask(data=("array",))
class Dense(Mask):
    array: Operand

    def allowed(self, q, kv):
        return self.array

    def bounds(self, q, kv):
        return self.array.max, self.array.min


@_mask(data=("ancestors", "start"))
class Tree(Mask):
    ancestors: Operand  # [B|1, 1, T, T]
    start: Operand | None  # [B, 1, 1, 1]

    def as_dense(self, kv_len: int) -> Dense:
        nodes = self.ancestors.shape[-1]
        if self.start is not None:
            # Nodes past the last key are cut off.
            shape = (self.start.shape[0], 1, nodes, kv_len + nodes)
            earlier = jax.lax.broadcasted_iota(jnp.int32, shape, 3) < self.start
            ancestors = jnp.broadcast_to(self.ancestors, (shape[0], *self.ancestors.shape[1:]))
            put = jax.vmap(lambda x, nodes, start: jax.lax.dynamic_update_slice_in_dim(x, nodes, start, axis=2))
            return Dense(put(earlier, ancestors, self.start.reshape(-1))[..., :kv_len])
        if nodes > kv_len:
            raise ValueError(f"tree: ancestors: expected at most as many nodes as keys, S={kv_len}, got {nodes}")
        earlier = jnp.ones((*self.ancestors.shape[:-1], kv_len - nodes), jnp.bool_)
        return Dense(jnp.concatenate([earlier, self.ancestors], axis=-1))


@_mask(data=("arrays",), static=("function",))
class Custom(Mask):
    function: Callable[..., Array]
    arrays: tuple[Operand, ...]

    def allowed(self, q, kv):
        return self.traced().allowed(q, kv)

    def bounds(self, q, kv):
        return self.traced().bounds(q, kv)

    def traced(self) -> "Traced":
        """Traces the function with the current values of its closure."""
        program, tables = self._trace()
        return Traced(self.arrays, tables(), program)

    def check(self) -> None:
        """Traces the function, which raises if kernels cannot evaluate it."""
        self._trace()

    def _trace(self) -> pointwise.Trace:
        def relation(*arguments):
            allowed = self.function(*arguments)
            dtype = pointwise.check_number("custom: function", allowed, "a boolean")
            if dtype != jnp.bool_:
                raise TypeError(f"custom: function: expected a boolean, got {dtype}")
            return allowed

        dtypes = (jnp.int32, jnp.int32, *(x.dtype for x in self.arrays))
        return pointwise.trace("custom: function", self.function, relation, dtypes)


@_mask(data=("arrays", "tables"), static=("program",))
class Traced(Mask):
    """A traced custom mask, which kernels evaluate."""

    arrays: tuple[Operand, ...]
    tables: pointwise.Tables
    program: pointwise.Program

    def allowed(self, q, kv):
        allowed = self.program.evaluate(self.tables, q, kv, *self.arrays)
        return allowed if np.ndim(allowed) else jnp.full(jnp.broadcast_shapes(q.shape, kv.shape), allowed)

    def bounds(self, q, kv):
        # The function is opaque: every block is partial.
        return jnp.ones_like(kv.min, jnp.bool_), jnp.zeros_like(kv.min, jnp.bool_)


@_mask(data=("left", "right"))
class And(Mask):
    left: Mask
    right: Mask

    def allowed(self, q, kv):
        return self.left.allowed(q, kv) & self.right.allowed(q, kv)

    def bounds(self, q, kv):
        left, right = self.left.bounds(q, kv), self.right.bounds(q, kv)
        return left[0] & right[0], left[1] & right[1]

    def span(self):
        return min((s for s in (self.left.span(), self.right.span()) if s is not None), default=None)

    def has_fine_edges(self):
        return self.left.has_fine_edges() or self.right.has_fine_edges()


@_mask(data=("left", "right"))
class Or(Mask):
    left: Mask
    right: Mask

    def allowed(self, q, kv):
        return self.left.allowed(q, kv) | self.right.allowed(q, kv)

    def bounds(self, q, kv):
        left, right = self.left.bounds(q, kv), self.right.bounds(q, kv)
        return left[0] | right[0], left[1] | right[1]

    def has_fine_edges(self):
        return self.left.has_fine_edges() or self.right.has_fine_edges()


@_mask(data=("mask",))
class Not(Mask):
    mask: Mask

    def allowed(self, q, kv):
        return ~self.mask.allowed(q, kv)

    def bounds(self, q, kv):
        some, every = self.mask.bounds(q, kv)
        return ~every, ~some

    def has_fine_edges(self):
        return self.mask.has_fine_edges()


def _may_be_equal(a: Interval, b: Interval) -> Array:
    return (a.min <= b.max) & (b.min <= a.max)


def _must_be_equal(a: Interval, b: Interval) -> Array:
    return (a.min == b.max) & (b.min == a.max)


def full() -> Mask:
    """Every key."""
    return Full()


def causal() -> Mask:
    """Keys at or before the query: ``k <= q``."""
    return Causal()


def sliding_window(left: int, right: int = 0) -> Mask:
    """Keys near the query: ``q - left < k <= q + right``; with ``right=0`` the last ``left`` keys, including its own.

    Raises:
      ValueError: a negative bound, or an empty window.
    """
    left, right = checks.integer("left", left, least=0), checks.integer("right", right, least=0)
    if left + right < 1:
        raise ValueError("sliding_window: expected left + right >= 1, got an empty window (left=0, right=0)")
    return SlidingWindow(left, right)


def prefix(lengths: Array) -> Mask:
    """Keys at positions below each row's length, for every query (prefix-LM: ``prefix(lengths) | causal()``).

    Args:
      lengths: integers ``[B]``; known values that do not fit in 32 bits raise a ValueError.
    """
    lengths = _integers("prefix: lengths", lengths, rank=1)
    return Prefix(checks.clipped(checks.int32("prefix: lengths", lengths))[:, None, None, None])


def sink(n: int) -> Mask:
    """Keys at positions below ``n``: attention sinks (StreamingLLM, arXiv:2309.17453)."""
    return Sink(checks.integer("n", n, least=0))


def chunked(size: int) -> Mask:
    """Keys in the query's own chunk: ``q // size == k // size``."""
    return Chunked(checks.integer("size", size, least=1))


def segments(q_ids: Array, kv_ids: Array | None = None) -> Mask:
    """Keys of the query's own segment, for packed documents.

    A NaN value reaches the other documents of its row that share its KV block, because a probability of 0 times NaN is
    NaN, as in every attention that masks logits. Rows of the batch never affect each other.

    Args:
      q_ids: integers ``[B|1, T]``, of any width.
      kv_ids: integers ``[B|1, S]``; default ``q_ids``. The block lists are tight when the ids are sorted.
    """
    q_ids = _integers("segments: q_ids", q_ids, rank=2)
    kv_ids = q_ids if kv_ids is None else _integers("segments: kv_ids", kv_ids, rank=2)
    q_ids, kv_ids = _same_ids(q_ids, kv_ids)
    return Segments(q_ids[:, None, :, None], kv_ids[:, None, None, :])


def dense(array: Array) -> Mask:
    """An explicit mask, True where attention is allowed. Fully masked blocks are skipped.

    Args:
      array: bool ``[B|1, N|K|1, T, S]`` or ``[T, S]``.
    """
    array = _bools("dense: array", array, rank=4, or_rank=2)
    return Dense(array if array.ndim == 4 else array[None, None])


def tree(ancestors: Array, start: Array | None = None) -> Mask:
    """A draft tree in verification (SpecInfer, arXiv:2305.09781): T keys are its nodes, in the queries' order.

    Args:
      ancestors: bool ``[T, T]`` or ``[B|1, T, T]``: True where the column's node is the row's node or one of its
        ancestors. All keys before the nodes are visible, and none after them.
      start: integers ``[B]``, 0 to S: the index of each row's key for node 0; nodes past the last key are ignored.
        Default S - T: the nodes are the last keys.
    """
    ancestors = _bools("tree: ancestors", ancestors, rank=3, or_rank=2)
    if ancestors.shape[-1] != ancestors.shape[-2]:
        raise ValueError(f"tree: ancestors: expected [T, T] or [B|1, T, T], got shape {tuple(ancestors.shape)}")
    if start is not None:
        start = _integers("tree: start", start, rank=1)
        values = checks.known(start)
        if values is not None and values.min() < 0:
            raise ValueError(f"tree: start: expected at least 0, got {values.min()}")
        start = checks.clipped(start)[:, None, None, None]
        if ancestors.ndim == 3 and ancestors.shape[0] not in (1, start.shape[0]):
            wanted = f"[{ancestors.shape[0]}], the batch size of ancestors"
            raise ValueError(f"tree: start: expected {wanted}, got [{start.shape[0]}]")
    return Tree(ancestors[None, None] if ancestors.ndim == 2 else ancestors[:, None], start)


def custom(function: Callable[..., Any], *arrays: Array) -> Mask:
    """Any elementwise relation: ``function(q_position, kv_position, *arrays) -> bool``.

    The function is opaque, so alone it skips no block: combine it (``&``) with a mask that bounds it.

    Write the function in JAX for a single query and key, as scalars: int32 positions and the arrays' elements for that
    pair. It may close over arrays of any shape, as in ``document[q_position] == document[kv_position]``; their values
    are read at each :func:`attention` or BlockMask call. :func:`pallas_attn.scores.custom` lists the operations allowed
    on them. Pass data that differs by head or batch row as ``arrays``.

    Args:
      function: returns a boolean. To compile once, pass the same function, or one with the same operations, each time.
      *arrays: bool or integers ``[B|1, N|K|1, T|1, S|1]``. Integers are converted to int32: known values that do not
        fit raise a ValueError, traced ones keep their dtype.

    Raises:
      TypeError: not a function; a non-boolean result; a NumPy array in the closure that is indexed by an argument.
        Exceptions of the function itself propagate.
      ValueError: the result is an array; ``arrays`` of another dtype or rank.
      NotImplementedError: kernels cannot evaluate the function; raised for every implementation.
    """
    if not callable(function):
        raise TypeError(f"custom: function: expected a callable, got {type(function).__name__}")
    mask = Custom(function, tuple(_bools_or_integers("custom: arrays", x, rank=4) for x in arrays))
    mask.check()
    return mask


def _integers(name: str, value: Any, *, rank: int) -> Array:
    x = checks.array_or_list(name, value, "integers")
    if not checks.is_integer(x):
        raise ValueError(f"{name}: expected integers, got dtype {x.dtype}")
    return _of_rank(name, x, rank)


def _bools(name: str, value: Any, *, rank: int, or_rank: int) -> Array:
    x = checks.array_or_list(name, value, "bool")
    if x.dtype != jnp.bool_:
        raise ValueError(f"{name}: expected bool, got dtype {x.dtype}")
    return jnp.asarray(_of_rank(name, x, or_rank if x.ndim == or_rank else rank))


def _bools_or_integers(name: str, value: Any, *, rank: int) -> Array:
    x = checks.array_or_list(name, value, "bool or integers")
    if x.dtype == jnp.bool_:
        return jnp.asarray(_of_rank(name, x, rank))
    return checks.int32(name, _integers(name, x, rank=rank))


def _of_rank(name: str, x: Array, rank: int) -> Array:
    if x.ndim != rank:
        raise ValueError(f"{name}: expected rank {rank}, got shape {tuple(x.shape)}")
    if 0 in x.shape:
        raise ValueError(f"{name}: expected no empty axis, got shape {tuple(x.shape)}")
    return x


def _same_ids(q_ids: Array, kv_ids: Array) -> tuple[Array, Array]:
    """The ids as int32. If they may not fit, each id becomes its rank among all ids, which preserves equality."""
    if checks.fits_int32(q_ids) and checks.fits_int32(kv_ids):
        return jnp.asarray(q_ids.astype(np.int32)), jnp.asarray(kv_ids.astype(np.int32))
    known = isinstance(q_ids, np.ndarray) and isinstance(kv_ids, np.ndarray)
    dtype = np.promote_types(q_ids.dtype, kv_ids.dtype)
    if dtype.kind == "f" or (not known and jax.dtypes.canonicalize_dtype(dtype) != dtype):
        got = f"{q_ids.dtype} for q_ids and {kv_ids.dtype} for kv_ids"
        raise ValueError(f"segments: expected ids of one dtype, or that fit in 32 bits, got {got}")
    module = np if known else jnp
    both: Any = [module.asarray(x).astype(dtype) for x in (q_ids, kv_ids)]
    in_order = module.sort(module.concatenate([x.reshape(-1) for x in both]))
    q_ranks, kv_ranks = (jnp.asarray(module.searchsorted(in_order, x).astype(np.int32)) for x in both)
    return q_ranks, kv_ranks
