"""A KV cache of fixed shape, as a pytree: policy × storage.

Every row of the batch has its own cursor. A slot knows the position of the token that it holds, so it does not matter
to attention which slot a token went to, and an empty slot (position -1) is never read.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_attn.caches.policies import Dense, Policy
from pallas_attn.caches.storage import Plain, Storage


class CacheView(NamedTuple):
    """What attention reads.

    Attributes:
      key, value: ``[B, capacity, K, D]``.
      positions: int32 ``[B, 1|K, capacity]``; -1 is an empty slot, whatever it holds.
      page_table: None, or int32 ``[B, capacity // page]`` for paged storage.
    """

    key: Array
    value: Array
    positions: Array
    page_table: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class KVCache:
    """Keys and values of the tokens so far, for one layer. Every method returns a new cache of the same shapes.

    Use it under jit and donate it: then every update happens in place.

    Attributes:
      key, value: what the storage allocated.
      positions: int32 ``[B, 1, capacity]``, the position of each slot's token, -1 where there is none.
      lengths: int32 ``[B]``, tokens stored in each row.
      overflowed: bool ``[B]``: the row lost a token for which it had no room.
      policy, storage: static.
    """

    key: Array
    value: Array
    positions: Array
    lengths: Array
    overflowed: Array
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

    def append(self, key: Array, value: Array, positions: Array) -> "KVCache":
        """Stores each row's real tokens at that row's own cursor.

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
        placed = self.policy.place(self.lengths, positions >= 0, self.capacity)
        return dataclasses.replace(
            self,
            key=self.storage.write(self.key, placed.slots, key),
            value=self.storage.write(self.value, placed.slots, value),
            positions=_write_positions(self.positions, placed.slots, positions),
            lengths=placed.lengths,
            overflowed=self.overflowed | placed.lost,
        )

    def positions_after(self, positions: Array) -> Array:
        """``view().positions`` as it will be once tokens at ``positions`` ``[B, t]`` are appended.

        Layers with the same policy agree on it, so a model builds one BlockMask before its layers run.
        """
        self._check_positions(positions)
        placed = self.policy.place(self.lengths, positions >= 0, self.capacity)
        return _write_positions(self.positions, placed.slots, positions)

    def view(self) -> CacheView:
        """What attention reads: no copy is made."""
        return CacheView(self.storage.read(self.key), self.storage.read(self.value), self.positions)

    def truncate(self, lengths: Array) -> "KVCache":
        """Keeps at most each row's first ``lengths`` (int ``[B]``) tokens and takes the others back."""
        lengths = self._check_rows("lengths", lengths, jnp.integer).astype(jnp.int32)
        kept = jax.lax.broadcasted_iota(jnp.int32, self.positions.shape, 2) < lengths[:, None, None]
        return dataclasses.replace(
            self,
            positions=jnp.where(kept, self.positions, -1),
            lengths=jnp.clip(lengths, 0, self.lengths),
            # The tokens that found no room came after all those stored, so taking any of these back takes them too.
            overflowed=self.overflowed & (lengths > self.lengths),
        )

    def reset(self, rows: Array) -> "KVCache":
        """Empties the rows where ``rows`` (bool ``[B]``) is True."""
        rows = self._check_rows("rows", rows, jnp.bool_)
        return dataclasses.replace(
            self,
            positions=jnp.where(rows[:, None, None], -1, self.positions),
            lengths=jnp.where(rows, 0, self.lengths),
            overflowed=self.overflowed & ~rows,
        )

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
      policy: which slot a token takes; default ``Dense()``.
      storage: how a slot is held; default ``Plain()``.
      batch_size, capacity: rows, and slots in each row.
      kv_heads, head_dim, dtype: of keys and values.

    Raises:
      ValueError: a size below 1, or a dtype that is not of floating point.
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
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype: expected floating point numbers, got {jnp.dtype(dtype)}")
    return KVCache(
        key=storage.allocate(batch_size, capacity, kv_heads, head_dim, dtype),
        value=storage.allocate(batch_size, capacity, kv_heads, head_dim, dtype),
        positions=jnp.full((batch_size, 1, capacity), -1, jnp.int32),
        lengths=jnp.zeros((batch_size,), jnp.int32),
        overflowed=jnp.zeros((batch_size,), jnp.bool_),
        policy=policy,
        storage=storage,
    )


def _write_positions(target: Array, slots: Array, positions: Array) -> Array:
    row = jax.lax.broadcasted_iota(jnp.int32, slots.shape, 0)
    return target.at[row, 0, slots].set(positions, mode="drop")
