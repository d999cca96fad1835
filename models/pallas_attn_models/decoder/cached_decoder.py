"""A decoder that holds its caches as module state."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

import pallas_attn as pa
from pallas_attn import checks
from pallas_attn_models.decoder.decoder import Decoder, DecoderOutput


class CachedDecoder(nnx.Module):
    """``decoder(tokens)`` continues each row where the last call stopped.

    Every array of the caches is an ``nnx.Cache`` variable, named by layer and field, so ``nnx.jit``, ``nnx.split``,
    ``nnx.state`` and checkpoints handle them like weights. As fast as :class:`Decoder` under ``nnx.jit``; for many
    steps, a :class:`~pallas_attn_models.generation.Generator` spends less time in Python.

    Args:
      model: the decoder; shared, not copied.
      batch_size, capacity, policy, storage, dtype, chunk: as in :meth:`Decoder.init_caches`.

    Raises:
      TypeError: ``model`` is not a Decoder.
      ValueError: as in :meth:`Decoder.init_caches`.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        batch_size: int,
        capacity: int | Sequence[int],
        policy: pa.caches.Policy | Sequence[pa.caches.Policy] | None = None,
        storage: pa.caches.Storage | Sequence[pa.caches.Storage] | None = None,
        dtype: DTypeLike | None = None,
        chunk: int | None = None,
    ) -> None:
        if not isinstance(model, Decoder):
            raise TypeError(f"model: expected a Decoder, got {type(model).__name__}")
        self.model = model
        caches = model.init_caches(
            batch_size=batch_size, capacity=capacity, policy=policy, storage=storage, dtype=dtype, chunk=chunk
        )
        leaves, self._structure = jax.tree_util.tree_flatten_with_path(caches)
        # In the order of the leaves, because nnx containers may sort their variables.
        self._names = tuple("layer_" + jax.tree_util.keystr(path, simple=True, separator="_") for path, _ in leaves)
        self.cache = nnx.Dict({name: nnx.Cache(leaf) for name, (_, leaf) in zip(self._names, leaves, strict=True)})

    @property
    def caches(self) -> tuple[pa.caches.KVCache, ...]:
        """The current caches, one per layer."""
        return jax.tree.unflatten(self._structure, [self.cache[name].get_value() for name in self._names])

    @property
    def next_positions(self) -> Array:
        """int32 ``[B]``: the position of each row's next token."""
        return self.caches[0].lengths

    @property
    def overflowed(self) -> Array:
        """bool ``[B]``: rows that lost a token because a cache was full."""
        return jnp.stack([cache.overflowed for cache in self.caches]).any(0)

    def __call__(
        self,
        tokens: ArrayLike,
        positions: ArrayLike | None = None,
        *,
        real: ArrayLike | None = None,
        layer_hook: Callable[[int, Array], Array] | None = None,
        apply_head: bool = True,
    ) -> DecoderOutput:
        """Runs the decoder on ``tokens`` and appends them to the caches.

        Args:
          tokens: int32 ``[B, T]``.
          positions: int32 ``[B|1, T]``; -1 is padding, and each row must continue at :attr:`next_positions`. Values
            cannot be checked under jit; pass ``real`` there.
          real: bool ``[B, T]``, False is padding; default: all True. Excludes ``positions``.
          layer_hook, apply_head: as in :meth:`Decoder.__call__`.

        Returns:
          The decoder's output; its ``caches`` are None.

        Raises:
          ValueError: positions that do not continue the rows, or as in :meth:`Decoder.__call__`.
          TypeError: an argument of the wrong kind.
        """
        caches = self.caches
        tokens = checks.array_or_list("tokens", tokens, f"int32 [{caches[0].batch_size}, T]")
        shape = tokens.shape
        if len(shape) != 2 or shape[0] != caches[0].batch_size:
            raise ValueError(f"tokens: expected int32 [{caches[0].batch_size}, T], got {list(shape)}")
        if positions is not None:
            if real is not None:
                got = checks.describe(real)
                raise ValueError(f"real: expected None together with positions, which mark padding too, got {got}")
            positions = _checked(positions, caches[0].lengths, shape)
        else:
            is_real = jnp.ones(shape, jnp.bool_) if real is None else checks.array_or_list("real", real, "bool")
            if is_real.shape != shape or is_real.dtype != jnp.bool_:
                raise ValueError(f"real: expected bool {list(shape)}, got {is_real.dtype} {list(is_real.shape)}")
            positions = _next_positions(jnp.asarray(is_real), caches[0].lengths)
        out = self.model(tokens, positions, caches, layer_hook=layer_hook, apply_head=apply_head)
        self._set(out.caches)
        return dataclasses.replace(out, caches=None)

    def reset(self, rows: ArrayLike | None = None) -> None:
        """Clears the rows where ``rows`` (bool ``[B]``) is True; default: all."""
        batch_size = self.caches[0].batch_size
        selected: Any = np.ones(batch_size, np.bool_) if rows is None else rows
        self._set(tuple(cache.reset(selected) for cache in self.caches))

    def truncate(self, lengths: ArrayLike) -> None:
        """Keeps each row's first ``lengths`` (int ``[B]``) tokens."""
        kept: Any = lengths  # caches accept lists, too
        self._set(tuple(cache.truncate(kept) for cache in self.caches))

    def fork(self, sources: ArrayLike) -> None:
        """Rewrites row b as a copy of row ``sources[b]`` (int ``[B]``)."""
        copied: Any = sources
        self._set(tuple(cache.fork(copied) for cache in self.caches))

    def _set(self, caches: tuple[pa.caches.KVCache, ...] | None) -> None:
        for name, leaf in zip(self._names, jax.tree.leaves(caches), strict=True):
            self.cache[name].set_value(leaf)


def _next_positions(real: Array, lengths: Array) -> Array:
    return jnp.where(real, lengths[:, None] + jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, -1)


def _checked(positions: ArrayLike, lengths: Array, shape: tuple[int, ...]) -> Array:
    """The positions, broadcast to all rows, after checking that they continue the rows."""
    positions = checks.array_or_list("positions", positions, "int32")
    if not checks.is_integer(positions) or positions.shape not in (shape, (1, shape[1])):
        expected = f"int32 [{shape[0]}|1, {shape[1]}]"
        raise ValueError(f"positions: expected {expected}, got {positions.dtype} {list(positions.shape)}")
    if isinstance(positions, Tracer) or isinstance(lengths, Tracer):
        expected = "None under jit, where they cannot be checked; pass real instead"
        raise ValueError(f"positions: expected {expected}, got {checks.describe(positions)}")
    positions = jnp.broadcast_to(checks.positions("positions", positions, ranks=(2,)), shape)
    expected = _next_positions(positions >= 0, lengths)
    wrong = ((positions != expected) & (positions >= 0)).any(1)
    if wrong.any():
        row = int(wrong.argmax())
        got = [int(position) for position in positions[row] if position >= 0]
        raise ValueError(f"positions: expected consecutive positions from {int(lengths[row])} in row {row}, got {got}")
    return positions
