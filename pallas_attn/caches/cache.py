"""A KV cache of fixed shape, as a pytree: policy × storage.

Every row of the batch has its own tokens. A slot knows the position of the token that it holds, so it does not matter
to attention which slot a token went to, and an empty slot (position -1) is never read.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_attn import masks
from pallas_attn.caches.pages import Pages
from pallas_attn.caches.policies import Dense, Policy, Slots, State, Tokens, at_slots
from pallas_attn.caches.storage import Paged, Plain, Storage, Stored, bits, from_bits, write


class CacheView(NamedTuple):
    """What attention reads.

    Attributes:
      key, value: ``[B, capacity, K, D]``, arrays or ``pa.QuantizedArray``; paged: the pool ``[P, page_size, K, D]``.
      positions: int32 ``[B, 1|K, capacity]``; -1 is an empty slot, whatever it holds.
      page_table: None, or int32 ``[B, capacity // page_size]`` for paged storage.
    """

    key: Stored
    value: Stored
    positions: Array
    page_table: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class KVCache:
    """Keys and values of the tokens so far, for one layer. Every method returns a new cache of the same shapes.

    Use it under jit and donate it: then every update happens in place. A step is: :meth:`append`, attend to
    :meth:`view`, and :meth:`observe` if the policy asks for it (``policy.observes``).

    Attributes:
      key, value: what the storage holds.
      positions: int32 ``[B, 1|K, capacity]``, the position of each slot's token, -1 where there is none.
      lengths: int32 ``[B]``, tokens that came in. A bounded policy may have dropped some of them since.
      overflowed: bool ``[B]``: the row lost a token that its policy would have kept.
      state: what the policy knows of each slot.
      pages: for paged storage, who has which page.
      dtype, policy, storage: static.
    """

    key: Stored
    value: Stored
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
        """Rows."""
        return self.positions.shape[0]

    @property
    def capacity(self) -> int:
        """Slots in each row."""
        return self.positions.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays of the cache."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    @property
    def mask(self) -> masks.Mask | None:
        """What the policy lets queries see of the cache, to be combined (``&``) with the model's own; None: all."""
        return self.policy.mask

    def append(self, key: Array, value: Array, positions: Array) -> "KVCache":
        """Stores each row's real tokens; what has to go for them goes now.

        Args:
          key, value: ``[B, t, K, D]``; keys already rotated.
          positions: int32 ``[B, t]``; -1 marks padding, which is not stored.

        Raises:
          TypeError: what is not an array.
          ValueError: shapes or dtypes that do not fit the cache. A row without room (known only when it runs) keeps
            what it has and sets ``overflowed``.
        """
        self._check_positions(positions)
        for name, x, buffer in (("key", key, self.key), ("value", value, self.value)):
            expected = (*positions.shape, *buffer.shape[2:])
            if not hasattr(x, "dtype"):
                raise TypeError(f"{name}: expected an array, got {type(x).__name__}")
            if x.shape != expected:
                raise ValueError(f"{name}: expected shape {expected}, got {x.shape}")
            if not jnp.issubdtype(x.dtype, jnp.floating):
                raise ValueError(f"{name}: expected floating point numbers, got {x.dtype}")
        encoded = self.storage.encode(key, self.dtype), self.storage.encode(value, self.dtype)
        after, slots, sources = self._place(positions)
        first, second = after._addresses(slots)
        new_state = self.policy.new_state(Tokens(key, value, *encoded))
        state_slots = jnp.broadcast_to(slots, (slots.shape[0], key.shape[2], slots.shape[2]))
        buffers = bits(self.key), bits(self.value)
        if after.pages is not None and sources is not None:
            buffers = after.pages.copy(sources, buffers)
        new_key, new_value = (write(into, first, second, bits(x)) for into, x in zip(buffers, encoded, strict=True))
        return dataclasses.replace(
            after,
            key=from_bits(new_key, self.key),
            value=from_bits(new_value, self.value),
            state={name: at_slots(x, state_slots, new_state[name].swapaxes(1, 2)) for name, x in self.state.items()},
        )

    def positions_after(self, positions: Array) -> Array:
        """``view().positions`` as it will be once tokens at ``positions`` ``[B, t]`` are appended.

        So a model can build the BlockMask of a call before its layers run.
        """
        self._check_positions(positions)
        return self._place(positions)[0].positions

    def view(self) -> CacheView:
        """What attention reads: no copy is made."""
        return CacheView(self.key, self.value, self.positions, None if self.pages is None else self.pages.table)

    def observe(self, key_weights: Array) -> "KVCache":
        """Tells the policy what attention was paid to each slot; a policy that does not ask for it ignores it.

        Args:
          key_weights: float32 ``[B, K, capacity]``, as ``pa.attention(.., return_key_weights=True)`` gives them.

        Raises:
          ValueError: another shape or dtype.
        """
        expected = (self.batch_size, self.key.shape[-2], self.capacity)
        if key_weights.shape != expected or key_weights.dtype != jnp.float32:
            got = f"{key_weights.dtype} {list(key_weights.shape)}"
            raise ValueError(f"key_weights: expected float32 {list(expected)}, got {got}")
        return dataclasses.replace(self, state=self.policy.observe(self._slots, key_weights))

    def truncate(self, lengths: Array) -> "KVCache":
        """Keeps at most each row's first ``lengths`` (int ``[B]``) tokens and takes the others back.

        Raises:
          NotImplementedError: the policy cannot, for it has dropped tokens in favour of those.
        """
        requested = self._check_rows("lengths", lengths, jnp.integer).astype(jnp.int32)
        lengths = jnp.clip(requested, 0, self.lengths)
        kept, lost = self.policy.truncate(self._slots, lengths)
        overflowed = self.overflowed | (lost & (lengths < self.lengths))
        if not self.policy.bounded:
            # What found no room came after all that is stored, so taking any of this back takes that, too.
            overflowed = overflowed & (requested > self.lengths)
        after = dataclasses.replace(
            self, positions=jnp.where(kept, self.positions, -1), lengths=lengths, overflowed=overflowed
        )
        return after._release()

    def reset(self, rows: Array) -> "KVCache":
        """Empties the rows where ``rows`` (bool ``[B]``) is True."""
        rows = self._check_rows("rows", rows, jnp.bool_)
        after = dataclasses.replace(
            self,
            positions=jnp.where(rows[:, None, None], -1, self.positions),
            lengths=jnp.where(rows, 0, self.lengths),
            overflowed=self.overflowed & ~rows,
        )
        return after._release()

    def fork(self, sources: Array) -> "KVCache":
        """Row b becomes what row ``sources[b]`` is: several continuations of one prompt, or of a prefix of it.

        With paged storage nothing is copied: rows share pages, until one writes to such a page. Together with
        :meth:`truncate` rows share a prefix. Other storages copy the rows.

        Args:
          sources: int32 ``[B]``; ``arange(B)`` changes nothing. What is no row is taken as the nearest one.
        """
        sources = jnp.clip(self._check_rows("sources", sources, jnp.integer).astype(jnp.int32), 0, self.batch_size - 1)

        def take(x: Array) -> Array:
            return x[sources]

        key, value, pages = self.key, self.value, self.pages
        if pages is None:
            key, value = jax.tree.map(take, (key, value))
        else:
            pages = pages.of_table(take(pages.table))
        rows = jax.tree.map(take, (self.positions, self.lengths, self.overflowed, self.state))
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

    @property
    def _slots(self) -> Slots:
        return Slots(self.positions, self.lengths, self.state)

    def _place(self, positions: Array) -> tuple["KVCache", Array, Array | None]:
        """The cache with new tokens in all but keys, values and state; their slots; and the pages to copy first."""
        placed = self.policy.place(self._slots, positions >= 0)
        slots, lengths, lost = placed
        pages, sources = self.pages, None
        if pages is not None:
            page_size = self.key.shape[1]
            pages, refused, sources = pages.reserve(slots.reshape(slots.shape[0], -1) // page_size)
            slots = jnp.where(refused[:, None, None], self.capacity, slots)
            lengths = jnp.where(refused, self.lengths, lengths)
            lost = lost | refused
        new_positions = jnp.broadcast_to(positions[:, None], slots.shape)
        after = dataclasses.replace(
            self,
            positions=at_slots(self.positions, slots, new_positions),
            lengths=lengths,
            overflowed=self.overflowed | lost,
            pages=pages,
        )
        return after, slots, sources

    def _addresses(self, slots: Array) -> tuple[Array, Array]:
        """Where slots int32 ``[B, M, t]`` are in the first two axes of ``key`` and ``value``."""
        if self.pages is None:
            return lax.broadcasted_iota(jnp.int32, slots.shape, 0), slots
        num_pages, page_size = self.key.shape[:2]
        row = lax.broadcasted_iota(jnp.int32, slots.shape, 0)
        page = self.pages.table.at[row, slots // page_size].get(mode="fill", fill_value=num_pages)
        return page, slots % page_size

    def _release(self) -> "KVCache":
        if self.pages is None:
            return self
        return dataclasses.replace(self, pages=self.pages.release((self.positions >= 0).any(1)))

    def _check_positions(self, positions: Array) -> None:
        if not hasattr(positions, "dtype"):
            raise TypeError(f"positions: expected an array, got {type(positions).__name__}")
        if positions.ndim != 2 or positions.shape[0] != self.batch_size:
            raise ValueError(f"positions: expected shape ({self.batch_size}, t), got {positions.shape}")
        if positions.dtype != jnp.int32:
            raise ValueError(f"positions: expected int32, got {positions.dtype}")

    def _check_rows(self, name: str, x: Array, kind) -> Array:
        x = jnp.asarray(x)
        if x.shape != (self.batch_size,) or not jnp.issubdtype(x.dtype, kind):
            wanted = "bool" if kind is jnp.bool_ else "integers"
            raise ValueError(f"{name}: expected {wanted} of shape ({self.batch_size},), got {x.dtype} {x.shape}")
        return x


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
      policy: which tokens are kept, and where; default ``Dense()``.
      storage: how a slot is held; default ``Plain()``.
      batch_size, capacity: rows, and slots in each row.
      kv_heads, head_dim, dtype: of keys and values; the quantised storages have a dtype of their own.

    Raises:
      ValueError: a size below 1, or that policy or storage cannot work with, or a dtype that is not of floating point.
      TypeError: a policy or storage of another kind, or a size that is not an int.
    """
    policy, storage = Dense() if policy is None else policy, Plain() if storage is None else storage
    for name, value, kind in (("policy", policy, Policy), ("storage", storage, Storage)):
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected a pallas_attn.caches.{kind.__name__}, got {value!r}")
    sizes = {"batch_size": batch_size, "capacity": capacity, "kv_heads": kv_heads, "head_dim": head_dim}
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name}: expected an int, got {size!r}")
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype: expected floating point numbers, got {dtype}")
    policy.check(capacity)

    rows, pages = (batch_size, capacity), None
    if isinstance(storage, Paged):
        if capacity % storage.page_size:
            raise ValueError(f"capacity: expected a multiple of page_size={storage.page_size}, got {capacity}")
        rows = (storage.num_pages, storage.page_size)
        pages = Pages.empty(batch_size, capacity // storage.page_size, storage.num_pages)

    def zeros(shape: tuple[int, ...]) -> Stored:
        like = jax.eval_shape(lambda x: storage.encode(x, dtype), jax.ShapeDtypeStruct(shape, dtype))
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


def nbytes(policy: Policy | None = None, storage: Storage | None = None, **sizes) -> int:
    """Bytes that a cache of one layer would take; arguments as of :func:`init`. Nothing is allocated."""
    return jax.eval_shape(lambda: init(policy, storage, **sizes)).nbytes
