"""The mask algebra: who may attend to whom, as a relation on positions.

A mask answers two questions. ``allowed`` is exact and elementwise: may this query see this key? It is traced into the
kernels, the reference and the oracle alike. ``bounds`` is cheap and per block: may *any* query of this block see a key
of that one, and may *all* of them? ``any`` may say yes too often and ``all`` no too often, never the reverse, so that
``&``, ``|`` and ``~`` of masks stay sound.

Padding is not a mask: a token at position -1 is not there (see :mod:`pallas_attn.block_mask`). Masks are therefore only
ever asked about positions >= 0.

An array that a mask needs (its *operand*: prefix lengths, segment ids, a boolean array) is stored with rank 4, aligned
with ``[B, M, T, S]``, with size 1 along every axis on which it does not depend. A kernel that works on a tile replaces
each operand by its tile; ``bounds`` sees each operand replaced by its :class:`Interval` per block. What the function of
:func:`custom` closes over has any shape, and kernels see it whole (:mod:`pallas_attn.pointwise`).
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
    """The smallest and the largest value of something within each block."""

    min: Array
    max: Array


class Mask:
    """A relation between query positions and key positions. Combine masks with ``&``, ``|`` and ``~``."""

    def allowed(self, q: Array, kv: Array) -> Array:
        """Exact and elementwise: bool that broadcasts with positions ``q`` ``[.., T, 1]``, ``kv`` ``[.., 1, S]``."""
        raise NotImplementedError(type(self).__name__)

    def bounds(self, q: Interval, kv: Interval) -> tuple[Array, Array]:
        """Sound, per pair of blocks: bool ``(any, all)`` for ``q`` bounds ``[.., nq, 1]``, ``kv`` ``[.., 1, nk]``."""
        raise NotImplementedError(type(self).__name__)

    def span(self) -> int | None:
        """How many consecutive positions one query can see at most, or None where there is no such bound."""
        return None

    def is_fine(self) -> bool:
        """Whether what a query sees may begin and end anywhere, so that small blocks skip more than large ones."""
        return True

    def dense_array(self, q_positions: Array, kv_positions: Array) -> Array:
        """The mask with padding, written out: bool ``[B, M, T, S]``. For tests, pictures and the reference.

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
    """The arrays that a mask (or a composition of masks) needs, each ``[B|1, M|1, T|1, S|1]``, in a fixed order."""
    return pointwise.operands(mask)


def with_keys(mask: Mask, kv_len: int) -> Mask:
    """The same mask for S = ``kv_len`` keys, ready for kernels.

    A tree, which is about keys and not positions, becomes a dense mask, and a custom mask the program of its function.

    Raises:
      ValueError: a tree of more nodes than there are keys.
    """

    def ready(x: Any) -> Any:
        if isinstance(x, Tree):
            return x.as_dense(kv_len)
        return x.traced() if isinstance(x, Custom) else x

    return jax.tree.map(ready, mask, is_leaf=lambda x: isinstance(x, Tree | Custom))


def repeat_heads(x: Array, heads: int) -> Array:
    """``[B, h, ...]`` -> ``[B, heads, ...]``, each head repeated for its group; one head for all (h = 1) stays so."""
    return x if x.shape[1] in (1, heads) else jnp.repeat(x, heads // x.shape[1], axis=1)


def _checked(operator: str, other: Any) -> Mask:
    if not isinstance(other, Mask):
        raise TypeError(f"{operator}: expected a mask on both sides, got {checks.describe(other)}")
    return other


@dataclass_transform(frozen_default=True)
def _mask(*, data: tuple[str, ...] = (), static: tuple[str, ...] = ()):
    """Makes a frozen dataclass a pytree: ``data`` fields are traced, ``static`` fields are part of the structure."""

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

    def is_fine(self):
        return False


@_mask()
class Causal(Mask):
    def allowed(self, q, kv):
        return kv <= q

    def bounds(self, q, kv):
        return kv.min <= q.max, kv.max <= q.min

    def is_fine(self):
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

    def is_fine(self):
        return False


@_mask(static=("n",))
class Sink(Mask):
    n: int

    def allowed(self, q, kv):
        return kv < self.n

    def bounds(self, q, kv):
        return kv.min < self.n, kv.max < self.n

    def is_fine(self):
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
        # Exact for sorted ids: an id between the smallest and the largest of a block either occurs in it or nowhere.
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
            # What runs past the last key is cut off.
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
        """With what the function closes over now."""
        program, tables = self._trace()
        return Traced(self.arrays, tables(), program)

    def check(self) -> None:
        """Raises what is wrong with the function."""
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
    """A custom mask as kernels evaluate it."""

    arrays: tuple[Operand, ...]
    tables: pointwise.Tables
    program: pointwise.Program

    def allowed(self, q, kv):
        allowed = self.program.evaluate(self.tables, q, kv, *self.arrays)
        return allowed if np.ndim(allowed) else jnp.full(jnp.broadcast_shapes(q.shape, kv.shape), allowed)

    def bounds(self, q, kv):
        # Nothing is known of the function: every block is partial.
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

    def is_fine(self):
        return self.left.is_fine() or self.right.is_fine()


@_mask(data=("left", "right"))
class Or(Mask):
    left: Mask
    right: Mask

    def allowed(self, q, kv):
        return self.left.allowed(q, kv) | self.right.allowed(q, kv)

    def bounds(self, q, kv):
        left, right = self.left.bounds(q, kv), self.right.bounds(q, kv)
        return left[0] | right[0], left[1] | right[1]

    def is_fine(self):
        return self.left.is_fine() or self.right.is_fine()


@_mask(data=("mask",))
class Not(Mask):
    mask: Mask

    def allowed(self, q, kv):
        return ~self.mask.allowed(q, kv)

    def bounds(self, q, kv):
        some, every = self.mask.bounds(q, kv)
        return ~every, ~some

    def is_fine(self):
        return self.mask.is_fine()


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
    """Keys near the query: ``q - left < k <= q + right``; with ``right=0`` the last ``left`` keys, its own included.

    Raises:
      ValueError: a negative bound, or a window that holds no key.
    """
    left, right = checks.integer("left", left, least=0), checks.integer("right", right, least=0)
    if left + right < 1:
        raise ValueError("sliding_window: expected left + right >= 1, got an empty window (left=0, right=0)")
    return SlidingWindow(left, right)


def prefix(lengths: Array) -> Mask:
    """Keys at positions below each row's length, whatever the query (prefix-LM: ``prefix(lengths) | causal()``).

    Args:
      lengths: integers ``[B]``; known ones that 32 bits do not hold are refused.
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

    A value that is NaN reaches the other documents of its row that share a KV block with it, for a probability of 0
    times NaN is NaN, as in every attention that masks logits. Rows of the batch never reach each other.

    Args:
      q_ids: integers ``[B|1, T]``, of any width.
      kv_ids: integers ``[B|1, S]``; default ``q_ids``. The block lists are tight when the ids are sorted.
    """
    q_ids = _integers("segments: q_ids", q_ids, rank=2)
    kv_ids = q_ids if kv_ids is None else _integers("segments: kv_ids", kv_ids, rank=2)
    q_ids, kv_ids = _same_ids(q_ids, kv_ids)
    return Segments(q_ids[:, None, :, None], kv_ids[:, None, None, :])


def dense(array: Array) -> Mask:
    """An explicit mask, True where attention is allowed. Its fully masked blocks are skipped like any other's.

    Args:
      array: bool ``[B|1, N|K|1, T, S]`` or ``[T, S]``.
    """
    array = _bools("dense: array", array, rank=4, or_rank=2)
    return Dense(array if array.ndim == 4 else array[None, None])


def tree(ancestors: Array, start: Array | None = None) -> Mask:
    """A draft tree in verification (SpecInfer, arXiv:2305.09781): T keys are its nodes, in the queries' order.

    Args:
      ancestors: bool ``[T, T]`` or ``[B|1, T, T]``: True where the node of the column is the node of the row or one of
        its ancestors. All keys before the nodes are visible, and none after them.
      start: integers ``[B]``, 0 to S: the key that is node 0 of each row, where a row has fewer keys left than nodes
        the last nodes have none; default S - T: the nodes are the last keys.
    """
    ancestors = _bools("tree: ancestors", ancestors, rank=3, or_rank=2)
    if ancestors.shape[-1] != ancestors.shape[-2]:
        raise ValueError(f"tree: ancestors: expected [T, T] or [B|1, T, T], got shape {tuple(ancestors.shape)}")
    if start is not None:
        start = _integers("tree: start", start, rank=1)
        values = checks.known(start)
        if values is not None and values.min() < 0:
            raise ValueError(f"tree: start: expected keys, from 0 on, got {values.min()}")
        start = checks.clipped(start)[:, None, None, None]
        if ancestors.ndim == 3 and ancestors.shape[0] not in (1, start.shape[0]):
            raise ValueError(f"tree: start: expected [{ancestors.shape[0]}], as ancestors, got [{start.shape[0]}]")
    return Tree(ancestors[None, None] if ancestors.ndim == 2 else ancestors[:, None], start)


def custom(function: Callable[..., Any], *arrays: Array) -> Mask:
    """Any elementwise relation: ``function(q_position, kv_position, *arrays) -> bool``.

    Nothing is known of its blocks, so alone it skips none: combine it by ``&`` with a mask that bounds it.

    The function is written in JAX for a single query and key, as numbers: int32 positions, and the arrays' elements at
    the place. It may close over arrays of any shape, as ``document[q_position] == document[kv_position]`` does; what
    they hold when :func:`attention` is called, or a BlockMask made, counts. See :func:`pallas_attn.scores.custom` for
    what may be done with them. What differs by head or by row of the batch is given by ``arrays``.

    Args:
      function: its result is a boolean. To compile once, pass the same function in every call, or one of the same
        operations.
      *arrays: bool or integers ``[B|1, N|K|1, T|1, S|1]``. Integers become int32: those that it cannot hold are refused
        where their values are known, and stay as they are where they are being traced.

    Raises:
      TypeError: not a function; a result that is no boolean; a NumPy array in its closure that it indexes by an
        argument. What the function itself raises passes through.
      ValueError: a result that is an array; ``arrays`` of another dtype or rank.
      NotImplementedError: a function that kernels cannot evaluate, on every implementation.
    """
    if not callable(function):
        raise TypeError(f"custom: function: expected a callable, got {type(function).__name__}")
    mask = Custom(function, tuple(_bools_or_integers("custom: arrays", x, rank=4) for x in arrays))
    mask.check()
    return mask


def _integers(name: str, value: Any, *, rank: int) -> Array:
    """Of any width."""
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
    """The ids as int32. Where 32 bits may not hold them, each becomes its rank among all: equal as they were equal."""
    if checks.fits_int32(q_ids) and checks.fits_int32(kv_ids):
        return jnp.asarray(q_ids.astype(np.int32)), jnp.asarray(kv_ids.astype(np.int32))
    known = isinstance(q_ids, np.ndarray) and isinstance(kv_ids, np.ndarray)
    dtype = np.promote_types(q_ids.dtype, kv_ids.dtype)
    if dtype.kind == "f" or (not known and jax.dtypes.canonicalize_dtype(dtype) != dtype):
        got = f"{q_ids.dtype} for q_ids and {kv_ids.dtype} for kv_ids"
        raise ValueError(f"segments: expected ids of one dtype, or such as 32 bits hold, got {got}")
    module = np if known else jnp
    both: Any = [module.asarray(x).astype(dtype) for x in (q_ids, kv_ids)]
    in_order = module.sort(module.concatenate([x.reshape(-1) for x in both]))
    q_ranks, kv_ranks = (jnp.asarray(module.searchsorted(in_order, x).astype(np.int32)) for x in both)
    return q_ranks, kv_ranks
