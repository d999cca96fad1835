"""A KV cache of fixed shape, as a pytree: policy × storage.

Every row of the batch has its own tokens. The cache stores the position of each slot's token, so the order of slots
does not matter to attention, and an empty slot (position -1) is never read.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_attn import bits, checks, masks
from pallas_attn.caches import row_index
from pallas_attn.caches.pages import PageCopies, Pages
from pallas_attn.caches.policies import Dense, Policy, Slots, State, Tokens, at_slots
from pallas_attn.caches.storage import Paged, Plain, Storage, read, take, write
from pallas_attn.quantized import KVArray, QuantizedArray
from pallas_attn.tuning import PAGE_MULTIPLE


class CacheView(NamedTuple):
    """The arguments of attention that a cache provides.

    Attributes:
      key, value: ``[B, capacity, K, D]``, arrays or ``pa.QuantizedArray``; paged: the pool ``[P, page, K, D]``.
      positions: int32 ``[R, 1|K, capacity]``; -1 is an empty slot, whose contents are ignored.
      page_table: None, or int32 ``[R, capacity // page]`` if the view is paged.
    """

    key: KVArray
    value: KVArray
    positions: Array
    page_table: Array | None = None


class Reservation(NamedTuple):
    """Slots for new tokens, and the state of the cache after storing them.

    Attributes:
      rows: int32 ``[R]``, the rows of the cache to which the tokens belong; None: all.
      positions: int32 ``[R, t]``, of the tokens.
      slots: int32 ``[R, M, t]``; ``capacity`` for a token that is not stored.
      lengths: int32 ``[R]``, tokens appended so far, including these.
      lost: bool ``[R]``, rows that lose a token which the policy should keep.
      pages: for paged storage, the page table afterwards.
      copies: for paged storage, the copies of shared pages to make before the tokens are written.
    """

    rows: Array | None
    positions: Array
    slots: Array
    lengths: Array
    lost: Array
    pages: Pages | None
    copies: PageCopies | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class KVCache:
    """Keys and values of the tokens so far, for one layer. Every method returns a new cache of the same shapes.

    Use it under jit and donate it, so that updates are in place. A step is: :meth:`append`, attend to :meth:`view`, and
    :meth:`observe` if ``policy.observes``.

    Attributes:
      key, value: encoded by the storage; small floats may be :class:`pallas_attn.bits.BitcastArray`, which :meth:`view`
        converts back.
      positions: int32 ``[B, 1|K, capacity]``, the position of each slot's token, -1 in empty slots.
      lengths: int32 ``[B]``, tokens appended so far, including those that a bounded policy has evicted.
      overflowed: bool ``[B]``: the row lost a token that its policy should keep.
      state: the policy's data for each slot.
      pages: for paged storage, the page table.
      dtype, policy, storage: static.
    """

    key: KVArray
    value: KVArray
    positions: Array
    lengths: Array
    overflowed: Array
    state: State
    pages: Pages | None
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})
    policy: Policy = dataclasses.field(metadata={"static": True})
    storage: Storage = dataclasses.field(metadata={"static": True})

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.positions.shape[0]

    @property
    def capacity(self) -> int:
        """Slots per row."""
        return self.positions.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, without the gradient carriers of :class:`pallas_attn.bits.BitcastArray`."""
        arrays = jax.tree.map(lambda x: x.integers if bits.is_packed(x) else x, self, is_leaf=bits.is_packed)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))

    @property
    def mask(self) -> masks.Mask | None:
        """The policy's mask, to combine (``&``) with the model's; None: queries may see the whole cache."""
        return self.policy.mask

    def append(self, key: Array, value: Array, positions: Array, rows: Array | None = None) -> "KVCache":
        """Stores each row's valid tokens; evicts first, then writes.

        A row without room, which is known only at run time, does not raise: it sets ``overflowed``.

        Args:
          key, value: ``[R, t, K, D]``; keys already rotated.
          positions: int32 ``[R, t]``; -1 marks padding, which is not stored.
          rows: int32 ``[R]``, distinct: the rows to which the tokens belong; other rows do not change. An index outside
            ``[0, B)`` marks an unused entry, whose tokens are padding. Default: all B rows in order.

        Raises:
          TypeError: an argument is not an array.
          ValueError: shapes or dtypes do not fit the cache.
        """
        return self.write(key, value, self.reserve(positions, rows))

    def reserve(self, positions: Array, rows: Array | None = None) -> Reservation:
        """The first half of :meth:`append`: chooses slots. Caches with the same tokens can share the result.

        Args:
          positions, rows: as in :meth:`append`, with the same errors.
        """
        rows = row_index.check(rows, self.batch_size)
        positions = self._check_positions(positions, rows)
        slots, lengths, lost = self.policy.place(self._slots_of(rows), positions >= 0)
        pages, copies = self.pages, None
        if pages is not None:
            page_size = self.key.shape[1]
            # In order, only the page of the last token can be shared: those after it hold none, so no row has them.
            shared = 1 if self.policy.ordered else None
            pages, refused, copies = pages.reserve(slots.reshape(slots.shape[0], -1) // page_size, rows, shared)
            refused = row_index.take(refused, rows)
            slots = jnp.where(refused[:, None, None], self.capacity, slots)
            lengths = jnp.where(refused, row_index.take(self.lengths, rows), lengths)
            lost = lost | refused
        return Reservation(rows, positions, slots, lengths, lost, pages, copies)

    def write(self, key: Array, value: Array, reservation: Reservation) -> "KVCache":
        """The second half of :meth:`append`: writes tokens ``[R, t, K, D]`` to reserved slots.

        Args:
          key, value: as in :meth:`append`, with the same errors.
          reservation: from :meth:`reserve` of this cache or, unless ``policy.per_head``, of another with the same
            policy, storage, capacity and tokens.
        """
        rows, positions, slots, lengths, lost, pages, copies = _check_reservation(reservation)
        key, value = (
            _check_tokens(name, x, (*positions.shape, *buffer.shape[2:]))
            for name, x, buffer in (("key", key, self.key), ("value", value, self.value))
        )
        encoded = self.storage.encode(key, self.dtype), self.storage.encode(value, self.dtype)
        after = dataclasses.replace(self, pages=pages)
        first, second = after._addresses(slots, rows)
        new_state = self.policy.new_state(Tokens(*lax.stop_gradient((key, value, *encoded))))
        state_slots = jnp.broadcast_to(slots, (slots.shape[0], key.shape[2], slots.shape[2]))
        buffers = self.key, self.value
        if copies is not None:
            buffers = copies.make(buffers)
        new_key, new_value = (write(into, first, second, x) for into, x in zip(buffers, encoded, strict=True))
        return dataclasses.replace(
            after,
            key=new_key,
            value=new_value,
            positions=at_slots(self.positions, slots, _of_heads(positions, slots), rows),
            lengths=row_index.put(self.lengths, rows, lengths),
            overflowed=row_index.put(self.overflowed, rows, row_index.take(self.overflowed, rows) | lost),
            state={
                name: at_slots(x, state_slots, new_state[name].swapaxes(1, 2), rows) for name, x in self.state.items()
            },
        )

    def positions_after(self, positions: Array, rows: Array | None = None) -> Array:
        """``view(rows).positions`` after an append of tokens at ``positions`` ``[R, t]`` to ``rows``.

        With it a model can build the BlockMask of a call before its layers run.
        """
        return self.positions_with(self.reserve(positions, rows))

    def positions_with(self, reservation: Reservation) -> Array:
        """:meth:`positions_after` for tokens with a reservation."""
        rows, positions, slots, *_ = _check_reservation(reservation)
        return at_slots(row_index.take(self.positions, rows, -1), slots, _of_heads(positions, slots))

    def view(self, rows: Array | None = None) -> CacheView:
        """The arguments of attention for all rows, or for ``rows`` as in :meth:`append`. Under jit it makes no copy.

        A view of some rows is paged with any storage: the whole cache is the pool, and each row is a page.

        Raises:
          ValueError: ``rows`` of a cache whose capacity is not a multiple of 16, the unit of page sizes.
        """
        rows = row_index.check(rows, self.batch_size)
        positions = row_index.take(self.positions, rows, -1)
        key, value = bits.unpack((self.key, self.value))
        if self.pages is not None:
            return CacheView(key, value, positions, row_index.take(self.pages.table, rows, -1))
        if rows is None:
            return CacheView(key, value, positions)
        if self.capacity % PAGE_MULTIPLE:
            wanted = f"None, or a capacity that is a multiple of {PAGE_MULTIPLE}"
            raise ValueError(f"rows: expected {wanted}, got capacity {self.capacity}")
        return CacheView(key, value, positions, rows[:, None])

    def observe(self, key_weights: Array, rows: Array | None = None) -> "KVCache":
        """Updates the policy's state with the attention paid to each slot; a no-op unless ``policy.observes``.

        The weights only influence the choice of slots, so they get no gradient.

        Args:
          key_weights: float32 ``[R, K, capacity]``, from ``pa.attention(.., return_key_weights=True)``.
          rows: int32 ``[R]``, as in :meth:`append`; other rows do not change.

        Raises:
          ValueError: another shape or dtype.
        """
        rows = row_index.check(rows, self.batch_size)
        expected = (self.batch_size if rows is None else rows.shape[0], self.key.shape[-2], self.capacity)
        key_weights = checks.array("key_weights", key_weights)
        if key_weights.shape != expected or key_weights.dtype != jnp.float32:
            got = f"{key_weights.dtype} {list(key_weights.shape)}"
            raise ValueError(f"key_weights: expected float32 {list(expected)}, got {got}")
        state = self.policy.observe(self._slots_of(rows), lax.stop_gradient(jnp.asarray(key_weights)))
        return dataclasses.replace(
            self, state={name: row_index.put(x, rows, state[name]) for name, x in self.state.items()}
        )

    def truncate(self, lengths: jax.typing.ArrayLike) -> "KVCache":
        """Keeps at most each row's first ``lengths`` (int ``[B]``) tokens and removes the others.

        Raises:
          TypeError: ``lengths`` is not an array.
          NotImplementedError: the policy has evicted tokens for those, so it cannot truncate.
          ValueError: another shape or dtype.
        """
        requested = self._check_integers("lengths", lengths)
        lengths = jnp.clip(requested, 0, self.lengths)
        kept, lost = self.policy.truncate(self._slots_of(None), lengths)
        overflowed = self.overflowed | (lost & (lengths < self.lengths))
        if not self.policy.bounded:
            # Dropped tokens came after all stored ones, so removing a stored token removes them too.
            overflowed = overflowed & (requested > self.lengths)
        after = dataclasses.replace(
            self, positions=jnp.where(kept, self.positions, -1), lengths=lengths, overflowed=overflowed
        )
        return after._release()

    def keep(self, first: Array, path: Array, count: Array) -> "KVCache":
        """Keeps one path of the tree at each row's end, made contiguous, and removes the other nodes.

        After verification with :func:`pallas_attn.masks.tree` (SpecInfer, arXiv:2305.09781, section 4): token number
        ``first + path[n]`` becomes token number ``first + n``, and the row ends after ``count`` of them. It reads and
        writes ``n`` tokens in place; shared pages are copied first. ``path = arange(n)`` is :meth:`truncate` to
        ``first + count``. A row whose nodes had no room, or that finds no free page, keeps the longest possible part of
        the path and sets ``overflowed``.

        Args:
          first: int32 ``[B]``, the number of the token that is node 0.
          path: int32 ``[B, n]``, nodes in ascending order.
          count: int32 ``[B]``, number of valid nodes at the start of the path.

        Raises:
          TypeError: an argument is not an array.
          NotImplementedError: the policy does not keep tokens in order.
          ValueError: other shapes or dtypes.
        """
        if not self.policy.ordered:
            raise NotImplementedError(f"{type(self.policy).__name__} cannot keep a path: its slots are not in order")
        first, count = self._check_integers("first", first), self._check_integers("count", count)
        path = checks.array("path", path)
        if path.ndim != 2 or path.shape[0] != self.batch_size or not checks.is_integer(path):
            raise ValueError(f"path: expected int32 [{self.batch_size}, n], got {path.dtype} {list(path.shape)}")
        # Nodes are at most the capacity, so no 32-bit sum overflows.
        first, path = jnp.clip(first, 0, self.lengths), jnp.minimum(checks.clipped(path), self.capacity)
        number = lax.broadcasted_iota(jnp.int32, path.shape, 1)
        sources, targets = first[:, None] + path, first[:, None] + number
        stored = (number < count[:, None]) & (sources < self.lengths[:, None])
        moved = stored & (path != number)
        after, refused = self, jnp.zeros_like(self.overflowed)
        buffers = self.key, self.value
        if self.pages is not None:
            written = jnp.where(moved, targets, self.capacity) // self.key.shape[1]
            pages, refused, copies = self.pages.reserve(written)
            # A refused row keeps the nodes before the first that would move.
            stays = (jnp.cumsum(moved, axis=1, dtype=jnp.int32) == 0) | ~refused[:, None]
            stored, moved = stored & stays, moved & stays
            buffers = copies.make(buffers)
            after = dataclasses.replace(self, pages=pages)
        sources = jnp.where(moved, sources, 0)[:, None]
        targets = jnp.where(moved, targets, self.capacity)[:, None]
        places, written = after._addresses(sources, None), after._addresses(targets, None)
        key, value = (write(x, *written, read(x, *places)) for x in buffers)
        lengths = first + stored.sum(1, dtype=jnp.int32)
        missing = jnp.minimum(count, path.shape[1]) > stored.sum(1, dtype=jnp.int32)

        def move(x: Array) -> Array:
            into, out_of = (jnp.broadcast_to(slots, (*x.shape[:2], path.shape[1])) for slots in (targets, sources))
            return at_slots(x, into, jnp.take_along_axis(x, out_of, axis=-1))

        slot = lax.broadcasted_iota(jnp.int32, self.positions.shape, 2)
        after = dataclasses.replace(
            after,
            key=key,
            value=value,
            positions=jnp.where(slot < lengths[:, None, None], move(self.positions), -1),
            lengths=lengths,
            overflowed=missing & (self.overflowed | refused),
            state=jax.tree.map(move, self.state),
        )
        return after._release()

    def reset(self, rows: Array) -> "KVCache":
        """Empties the rows where ``rows`` (bool ``[B]``) is True.

        Raises:
          TypeError: ``rows`` is not an array.
          ValueError: another shape or dtype.
        """
        rows = checks.array_or_list("rows", rows, "bool")
        if rows.shape != (self.batch_size,) or rows.dtype != jnp.bool_:
            raise ValueError(f"rows: expected bool of shape ({self.batch_size},), got {rows.dtype} {rows.shape}")
        rows = jnp.asarray(rows)
        after = dataclasses.replace(
            self,
            positions=jnp.where(rows[:, None, None], -1, self.positions),
            lengths=jnp.where(rows, 0, self.lengths),
            overflowed=self.overflowed & ~rows,
        )
        return after._release()

    def fork(self, sources: jax.typing.ArrayLike) -> "KVCache":
        """Rewrites row b as a copy of row ``sources[b]``: several continuations of one prompt, or of a prefix of it.

        With paged storage rows share pages until one writes to them (copy-on-write); other storages copy the rows.
        Followed by :meth:`truncate`, rows share a prefix.

        Args:
          sources: int32 ``[B]``, clipped to valid rows; ``arange(B)`` changes nothing.

        Raises:
          TypeError: ``sources`` is not an array.
          ValueError: another shape or dtype.
        """
        sources = jnp.clip(self._check_integers("sources", sources), 0, self.batch_size - 1)

        key, value, pages = self.key, self.value, self.pages
        if pages is None:
            key, value = take(key, sources), take(value, sources)
        else:
            pages = pages.of_table(pages.table[sources])
        rows = jax.tree.map(lambda x: x[sources], (self.positions, self.lengths, self.overflowed, self.state))
        positions, lengths, overflowed, state = rows
        return dataclasses.replace(
            self,
            key=key,
            value=value,
            pages=pages,
            positions=positions,
            lengths=lengths,
            overflowed=overflowed,
            state=state,
        )

    def copy_rows(self, sources: Array, targets: Array, count: Array) -> "KVCache":
        """Copies row ``sources[n]`` to row ``targets[n]``, for n < ``count`` in order.

        Unlike :meth:`fork` it touches no other row, and costs nothing if count is 0. Paged storage copies no key or
        value here either.

        Args:
          sources, targets: int32 ``[n]``; a pair with an out-of-bounds row does nothing.
          count: int32 scalar; may be traced.

        Raises:
          TypeError: an argument is not an array.
          ValueError: other shapes or dtypes.
        """
        sources, targets, count = (
            checks.array_or_list(name, x, "integers")
            for name, x in (("sources", sources), ("targets", targets), ("count", count))
        )
        for name, x in (("sources", sources), ("targets", targets)):
            if x.ndim != 1 or x.shape != sources.shape or not checks.is_integer(x):
                raise ValueError(f"{name}: expected integers [n], got {x.dtype} {list(x.shape)}")
        if count.ndim or not checks.is_integer(count):
            raise ValueError(f"count: expected an integer, got {count.dtype} {list(count.shape)}")
        sources, targets, count = map(checks.clipped, (sources, targets, count))
        in_bounds = row_index.in_bounds(sources, self.batch_size) & row_index.in_bounds(targets, self.batch_size)
        sources, targets = (jnp.where(in_bounds, x, 0) for x in (sources, targets))
        count = jnp.minimum(count, sources.shape[0])
        return self.with_row_data(row_index.copy(self.row_data, sources, targets, count))

    @property
    def row_data(self) -> "KVCache":
        """The cache without the arrays that its rows share, the pools and the reference counts of their pages.

        The first axis of every array is B.
        """
        if self.pages is None:
            return self
        pages: Any = dataclasses.replace(self.pages, users=None)
        return dataclasses.replace(self, key=None, value=None, pages=pages)

    def with_row_data(self, rows: "KVCache") -> "KVCache":
        """The cache with ``rows``, a changed :attr:`row_data`."""
        if self.pages is None or rows.pages is None:
            return rows
        return dataclasses.replace(rows, key=self.key, value=self.value, pages=self.pages.of_table(rows.pages.table))

    def _slots_of(self, rows: Array | None) -> Slots:
        state = {name: row_index.take(lax.stop_gradient(x), rows) for name, x in self.state.items()}
        return Slots(row_index.take(self.positions, rows, -1), row_index.take(self.lengths, rows), state)

    def _addresses(self, slots: Array, rows: Array | None) -> tuple[Array, Array]:
        """Indices of slots int32 ``[R, M, t]`` of ``rows`` along the first two axes of ``key`` and ``value``."""
        row = row_index.numbers(rows, slots.shape)
        if self.pages is None:
            return row, slots
        num_pages, page_size = self.key.shape[:2]
        page = self.pages.table.at[row, slots // page_size].get(mode="fill", fill_value=num_pages)
        return page, slots % page_size

    def _release(self) -> "KVCache":
        if self.pages is None:
            return self
        return dataclasses.replace(self, pages=self.pages.release((self.positions >= 0).any(1)))

    def _check_positions(self, positions: Array, rows: Array | None) -> Array:
        positions = checks.array("positions", positions)
        expected = self.batch_size if rows is None else rows.shape[0]
        if positions.ndim != 2 or positions.shape[0] != expected:
            raise ValueError(f"positions: expected shape ({expected}, t), got {positions.shape}")
        return checks.positions("positions", positions, ranks=(2,))

    def _check_integers(self, name: str, x: jax.typing.ArrayLike) -> Array:
        """Validates one integer per row. Clipping to int32 keeps values past every length and row past them."""
        x = checks.array_or_list(name, x, "integers")
        if x.shape != (self.batch_size,) or not checks.is_integer(x):
            raise ValueError(f"{name}: expected integers of shape ({self.batch_size},), got {x.dtype} {x.shape}")
        return checks.clipped(x)


def _check_reservation(reservation: Reservation) -> Reservation:
    if not isinstance(reservation, Reservation):
        raise TypeError(f"reservation: expected a pallas_attn.caches.Reservation, got {checks.describe(reservation)}")
    return reservation


def _check_tokens(name: str, x: Array, expected: tuple[int, ...]) -> Array:
    x = checks.array(name, x)
    if x.shape != expected:
        raise ValueError(f"{name}: expected shape {expected}, got {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name}: expected floating-point numbers, got {x.dtype}")
    return checks.floats(name, x)


def _of_heads(positions: Array, slots: Array) -> Array:
    """Broadcasts positions ``[R, t]`` to the shape ``[R, M, t]`` of ``slots``."""
    return jnp.broadcast_to(positions[:, None], slots.shape)


def init(
    policy: Policy | None = None,
    storage: Storage | None = None,
    *,
    batch_size: int,
    capacity: int,
    kv_heads: int,
    head_dim: int,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> KVCache:
    """An empty cache for one layer.

    Args:
      policy: which tokens to keep, and in which slots; default ``Dense()``.
      storage: how to encode a slot; default ``Plain()``.
      batch_size, capacity: rows, and slots per row.
      kv_heads, head_dim, dtype: of keys and values; quantized storages have their own dtypes.

    Raises:
      ValueError: a size below 1 or above 2^30, a size that does not fit the policy or storage, or a dtype that is not
        floating-point with at most 32 bits.
      TypeError: a policy or storage of another kind, or a size that is not an int.
    """
    policy, storage = Dense() if policy is None else policy, Plain() if storage is None else storage
    for name, value, kind in (("policy", policy, Policy), ("storage", storage, Storage)):
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected a pallas_attn.caches.{kind.__name__}, got {checks.describe(value)}")
    sizes = {"batch_size": batch_size, "capacity": capacity, "kv_heads": kv_heads, "head_dim": head_dim}
    batch_size, capacity, kv_heads, head_dim = (
        checks.integer(name, size, least=1, most=checks.LONGEST_AXIS) for name, size in sizes.items()
    )
    dtype = checks.float_dtype("dtype", dtype)
    policy.check(capacity)

    rows, pages = (batch_size, capacity), None
    if isinstance(storage, Paged):
        if capacity % storage.page_size:
            raise ValueError(f"capacity: expected a multiple of page_size={storage.page_size}, got {capacity}")
        rows = (storage.num_pages, storage.page_size)
        pages = Pages.empty(batch_size, capacity // storage.page_size, storage.num_pages)

    def zeros(shape: tuple[int, ...]) -> KVArray:
        x = jax.ShapeDtypeStruct(shape, dtype)
        like = jax.eval_shape(lambda x: _as_buffer(storage.encode(x, dtype)), x)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)

    def new_state(x: Array) -> State:
        return policy.new_state(Tokens(x, x, storage.encode(x, dtype), storage.encode(x, dtype)))

    state = jax.eval_shape(new_state, jax.ShapeDtypeStruct((1, 1, kv_heads, head_dim), dtype))
    heads = kv_heads if policy.per_head else 1
    return KVCache(
        key=zeros((*rows, kv_heads, head_dim)),
        value=zeros((*rows, kv_heads, head_dim)),
        positions=jnp.full((batch_size, heads, capacity), -1, jnp.int32),
        lengths=jnp.zeros((batch_size,), jnp.int32),
        overflowed=jnp.zeros((batch_size,), jnp.bool_),
        state={name: jnp.zeros((batch_size, kv_heads, capacity), x.dtype) for name, x in state.items()},
        pages=pages,
        dtype=dtype,
        policy=policy,
        storage=storage,
    )


def _as_buffer(x: KVArray) -> KVArray:
    """Packs small floats for a buffer; quantized numbers need no gradient carrier."""
    return bits.pack(x) if isinstance(x, QuantizedArray) else bits.pack_with_derivatives(x)


def nbytes(policy: Policy | None = None, storage: Storage | None = None, **sizes) -> int:
    """Estimates the bytes of a cache of one layer without allocating it; arguments as in :func:`init`."""
    return jax.eval_shape(lambda: init(policy, storage, **sizes)).nbytes
