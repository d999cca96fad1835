"""Workloads: arrays, masks, the work in them, and how the library computes them.

B batch, T queries, S keys, N query heads, K KV heads, D head size, as in ``pa.attention``.
"""

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import pallas_attn as pa
from bench.times import physics
from bench.times.timing import Contender
from pallas_attn import tuning


@dataclasses.dataclass(frozen=True)
class Size:
    """Extents of a case. ``new``: tokens that a generation produces, or an append writes, per row."""

    batch: int
    q_len: int
    kv_len: int
    q_heads: int
    kv_heads: int
    head_dim: int
    dtype: str = "float32"
    new: int = 1

    def as_dict(self) -> dict[str, int]:
        """The shape for the result file."""
        names = {"B": "batch", "T": "q_len", "S": "kv_len", "N": "q_heads", "K": "kv_heads", "D": "head_dim"}
        return {letter: getattr(self, name) for letter, name in names.items()}

    def __str__(self) -> str:
        return " ".join(f"{letter}{extent}" for letter, extent in self.as_dict().items()) + f" {self.dtype}"

    def toy(self) -> "Size":
        """A small version for interpreted kernels: the same kind of shape, at most 256 keys."""
        group = min(2, self.q_heads // self.kv_heads)
        kv_len = min(self.kv_len, 256)
        q_len = 1 if self.q_len == 1 else kv_len
        return Size(min(self.batch, 2), q_len, kv_len, 2 * group, 2, 32, self.dtype, min(self.new, 4))


def _slots(x: np.ndarray) -> np.ndarray:
    """``[1, L]``, the index along the last axis."""
    return np.arange(x.shape[1])[None]


@dataclasses.dataclass(frozen=True, eq=False)
class Attention:
    """One call of attention, or its gradients.

    Attributes:
      size: extents and dtype.
      mask: which queries see which keys.
      q_positions: int32 ``[B|1, T]``.
      kv_positions: int32 ``[B|1, S]``.
      backward: the gradients alone, from the residuals of the forward pass.
      quantized: the kind of our keys and values; peers get the dequantized numbers.
      page: keys per page of our pool, in random order.
      lists_at_hand: our block lists are prebuilt, as the layers of a model share those of a step.
    """

    size: Size
    mask: pa.masks.Mask
    q_positions: Array
    kv_positions: Array
    backward: bool = False
    quantized: Literal["int8", "float8_e4m3fn", "int4"] | None = None
    page: int | None = None
    lists_at_hand: bool = False

    @functools.cached_property
    def work(self) -> physics.Work:
        """FLOPs and bytes of the pairs that the mask allows."""
        size = self.size
        return physics.attention_work(
            physics.count(self.mask, self.q_positions, self.kv_positions, size.batch),
            q_heads=size.q_heads,
            kv_heads=size.kv_heads,
            head_dim=size.head_dim,
            itemsize=jnp.dtype(size.dtype).itemsize,
            kv_itemsize=self._bytes_per_number,
            backward=self.backward,
        )

    @property
    def active_fraction(self) -> float:
        """Fraction of the T x S pairs that the mask allows."""
        size = self.size
        return self.work.pairs / (size.batch * size.q_heads * size.q_len * size.kv_len)

    def visited_fraction(self, implementation: str | None) -> float:
        """Fraction of the blocks that the lists name."""
        size = self.size
        sizes = tuning.default_block_sizes(
            size.q_len,
            size.kv_len,
            implementation=implementation,
            head_dim=size.head_dim,
            dtype=size.dtype,
            fine=self.mask.has_fine_edges(),
        )
        return float(pa.BlockMask.from_mask(self.mask, self.q_positions, self.kv_positions, sizes).density())

    @property
    def input_bytes(self) -> int:
        """Bytes of query, key and value in the dtype of the query."""
        size = self.size
        tokens = size.q_len * size.q_heads + 2 * size.kv_len * size.kv_heads
        return size.batch * tokens * size.head_dim * jnp.dtype(size.dtype).itemsize

    @functools.cached_property
    def _made(self) -> dict[int, tuple[Array, Array, Array, Array]]:
        return {}

    def arrays(self, seed: int) -> tuple[Array, Array, Array, Array]:
        """Random query, key, value and output gradient, determined by the seed."""
        if seed not in self._made:
            self._made[seed] = self.make(seed)
        return self._made[seed]

    def make(self, seed: int) -> tuple[Array, Array, Array, Array]:
        """The arrays of :meth:`arrays`, new ones."""
        size = self.size
        q_shape = (size.batch, size.q_len, size.q_heads, size.head_dim)
        kv_shape = (size.batch, size.kv_len, size.kv_heads, size.head_dim)
        query, key, value, cotangent = _normal(seed, (q_shape, kv_shape, kv_shape, q_shape), size.dtype)
        # A loss ignores padding, whose output is 0 here and the mean of all values in some peers.
        cotangent = jnp.where((self.q_positions >= 0)[..., None, None], cotangent, 0)
        if self.quantized is not None:
            key, value = (self._stored(x).dequantize().astype(x.dtype) for x in (key, value))
        return query, key, value, cotangent

    def _stored(self, x: Array) -> Any:
        """``[B, S, K, D]`` as we store it; quantizing again changes nothing."""
        stored: Any = x
        if self.quantized is not None:
            stored = pa.QuantizedArray.quantize(x.astype(jnp.float32), self.quantized, self._group)
        if self.page is None:
            return stored
        _, order = self._page_table
        return jax.tree.map(lambda part: part.reshape(-1, self.page, *part.shape[2:])[order], stored)

    @property
    def _group(self) -> int:
        """Columns per scale of int4."""
        return min(32, self.size.head_dim // 2)

    @property
    def _bytes_per_number(self) -> float:
        """Bytes per stored number of keys and values, scales included."""
        head_dim = self.size.head_dim
        each = {None: jnp.dtype(self.size.dtype).itemsize, "int4": 0.5 + 4 / self._group}
        return each.get(self.quantized, 1 + 4 / head_dim)

    @functools.cached_property
    def _page_table(self) -> tuple[Array, np.ndarray]:
        """int32 ``[B, S // page]``, and which page of the contiguous keys each page of the pool holds."""
        count = self.size.batch * self.size.kv_len // (self.page or 1)
        order = np.random.default_rng(0).permutation(count)
        return jnp.asarray(np.argsort(order).reshape(self.size.batch, -1), jnp.int32), order

    @functools.cached_property
    def boolean_mask(self) -> Array:
        """The mask with padding, bool ``[B|1, 1, T, S]``, for peers that accept no other."""
        return self.mask.dense_array(self.q_positions, self.kv_positions)

    @property
    def logits_bytes(self) -> int:
        """Bytes of the float32 T x S matrices that an implementation without tiles holds."""
        return 4 * self.size.batch * self.size.q_heads * self.size.q_len * self.size.kv_len

    @property
    def plain(self) -> bool:
        """No padding, and the first query is the first token."""
        queries, keys = (np.asarray(x) for x in (self.q_positions, self.kv_positions))
        return queries.shape == keys.shape and bool((queries == keys).all() and (keys == _slots(keys)).all())

    @property
    def live_lengths(self) -> Array | None:
        """int32 ``[B]`` if each row's only query sees its first filled slots (decode from a buffer), else None."""
        queries, keys = (np.asarray(x) for x in (self.q_positions, self.kv_positions))
        lengths = (keys >= 0).sum(1, keepdims=True)
        filled = (keys == np.where(_slots(keys) < lengths, _slots(keys), -1)).all()
        if not isinstance(self.mask, pa.masks.Causal) or queries.shape[1] != 1 or not filled:
            return None
        return jnp.asarray(np.broadcast_to(lengths[:, 0], self.size.batch), jnp.int32)

    def contender(self, attend, extras: tuple = (), sets: int = 1) -> Contender:
        """The contender for ``attend(query, key, value, *extras)``, or for its gradients by the first three."""
        inputs = [self.arrays(seed) for seed in range(sets)]
        if not self.backward:
            return Contender(attend, [(q, k, v, *extras) for q, k, v, _ in inputs])
        # Runs the forward pass now, so that an implementation without gradients fails here.
        keep = jax.jit(lambda q, k, v, *rest: jax.vjp(lambda *qkv: attend(*qkv, *rest), q, k, v)[1])
        return Contender(
            lambda pull, cotangent: pull(cotangent), [(keep(q, k, v, *extras), do) for q, k, v, do in inputs]
        )

    def ours(self, *, sets: int = 1, interpret: bool = False) -> Contender:
        """Our contender. It builds the lists in the timed call unless they are at hand."""

        def attend(query, key, value, mask, positions, page_table=None):
            return pa.attention(query, key, value, mask, **positions, page_table=page_table, interpret=interpret)

        if self.lists_at_hand:
            mask, positions = pa.BlockMask.from_mask(self.mask, self.q_positions, self.kv_positions), {}
        else:
            mask, positions = self.mask, {"q_positions": self.q_positions, "kv_positions": self.kv_positions}
        extras = (mask, positions) if self.page is None else (mask, positions, self._page_table[0])
        if self.page is None and self.quantized is None:
            return self.contender(attend, extras, sets)
        inputs = [self.arrays(seed) for seed in range(sets)]
        return Contender(attend, [(q, self._stored(k), self._stored(v), *extras) for q, k, v, _ in inputs])


@functools.partial(jax.jit, static_argnames=("shapes", "dtype"))
def _normal(seed: int, shapes: tuple[tuple[int, ...], ...], dtype: str) -> list[Array]:
    """Standard normal arrays."""
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    # One loop body for all, because random bits are slow to compile.
    longest = max(map(math.prod, shapes))
    drawn = jax.lax.map(lambda key: jax.random.normal(key, (longest,), jnp.dtype(dtype)), keys)
    return [row[: math.prod(shape)].reshape(shape) for row, shape in zip(drawn, shapes, strict=True)]


class BlockClasses(NamedTuple):
    """Block classes of the first batch row, ``[nq, nk]``, as in ``pa.BlockMask.bitmap``."""

    q_block: int
    kv_block: int
    classes: np.ndarray


@dataclasses.dataclass(frozen=True)
class MaskBuild:
    """Building block lists from a mask and positions, without attention."""

    attention: Attention

    @property
    def size(self) -> Size:
        return self.attention.size

    def ours(self, *, sets: int = 1, interpret: bool = False) -> Contender:
        """Builds lists for the kernels of this machine from arrays on the device."""
        del interpret  # no kernel is called
        x = self.attention

        def build(mask, q_positions, kv_positions):
            return pa.BlockMask.from_mask(mask, q_positions, kv_positions)

        return Contender(
            build,
            [(x.mask, x.q_positions, x.kv_positions)] * sets,
            as_result=lambda built: BlockClasses(built.q_block, built.kv_block, np.asarray(built.bitmap())[0, 0]),
        )


@dataclasses.dataclass(frozen=True)
class Append:
    """Writing new tokens of every row into a half-full cache, in place."""

    size: Size

    @property
    def nbytes(self) -> int:
        """Keys and values read once and written once."""
        size = self.size
        tokens = size.batch * size.new * size.kv_heads * size.head_dim
        return 2 * 2 * tokens * jnp.dtype(size.dtype).itemsize

    def state(self) -> pa.caches.KVCache:
        """A fresh cache; row b holds ``lengths[b]`` tokens, about half of the capacity."""
        size = self.size
        cache = pa.caches.init(
            pa.caches.Dense(),
            pa.caches.Plain(),
            batch_size=size.batch,
            capacity=size.kv_len,
            kv_heads=size.kv_heads,
            head_dim=size.head_dim,
            dtype=jnp.dtype(size.dtype),
        )
        return dataclasses.replace(cache, lengths=jnp.asarray(self.lengths))

    @property
    def lengths(self) -> np.ndarray:
        """int32 ``[B]``."""
        half = self.size.kv_len // 2
        return np.linspace(half // 2, half, self.size.batch).astype(np.int32)

    @functools.cached_property
    def tokens(self) -> tuple[Array, Array, Array]:
        """Keys, values and positions to write."""
        size = self.size
        shape = (size.batch, size.new, size.kv_heads, size.head_dim)
        key, value = _normal(0, (shape, shape), size.dtype)
        positions = self.lengths[:, None] + np.arange(size.new, dtype=np.int32)
        return key, value, jnp.asarray(positions)

    def ours(self, *, sets: int = 1, interpret: bool = False) -> Contender:
        """``append`` with the cursors reset, so that each call writes the same slots."""
        del interpret  # no kernel is called

        def append(cache, key, value, positions):
            return dataclasses.replace(cache.append(key, value, positions), lengths=cache.lengths)

        def out_of_reach(cache):
            return jax.tree.map(np.array, cache)  # the next call reuses the buffers

        return Contender(append, [(self.state(), *self.tokens)] * sets, carries=True, as_result=out_of_reach)


@dataclasses.dataclass(frozen=True)
class Generation:
    """Greedy generation from prompts of unequal lengths by a random Llama.

    ``size.kv_len`` is the capacity of the cache, ``size.new`` the new tokens per row.
    """

    size: Size
    layers: int
    vocab_size: int
    longest_prompt: int

    @property
    def llama(self) -> dict[str, Any]:
        """Fields of the Llama's ``config.json``."""
        width = self.size.q_heads * self.size.head_dim
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": width,
            "intermediate_size": 8 * width // 3,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.size.q_heads,
            "num_key_value_heads": self.size.kv_heads,
            "head_dim": self.size.head_dim,
            "max_position_embeddings": self.size.kv_len,
            "tie_word_embeddings": False,
        }

    def prompts(self) -> list[list[int]]:
        """Random prompts with lengths from a sixteenth of the longest to the longest."""
        rng = np.random.default_rng(0)
        lengths = np.linspace(max(1, self.longest_prompt // 16), self.longest_prompt, self.size.batch).astype(int)
        # 0, 1 and 2 are Llama's padding, beginning and end.
        return [rng.integers(3, self.vocab_size, length).tolist() for length in lengths]


Workload = Attention | MaskBuild | Append | Generation
