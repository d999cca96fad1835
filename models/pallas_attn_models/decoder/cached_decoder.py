"""A decoder that holds its caches itself, for those who like their state in the module."""

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
    """``decoder(tokens)`` goes on where the last call stopped, row by row.

    Every array of the caches is an ``nnx.Cache`` variable, named by layer and field, so that ``nnx.jit``,
    ``nnx.split``, ``nnx.state`` and checkpoints treat them as they treat weights. Speed is that of :class:`Decoder`
    under ``nnx.jit``; for many steps a :class:`~pallas_attn_models.generation.Generator` has less to do in Python.

    Args:
      model: the decoder, which is shared, not copied.
      batch_size, capacity, policy, storage, dtype, chunk: of the caches, as :meth:`Decoder.init_caches` takes them.

    Raises:
      TypeError: another kind of model.
      ValueError: what :meth:`Decoder.init_caches` refuses.
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
        # In the order of the leaves: what holds variables may sort them.
        self._names = tuple("layer_" + jax.tree_util.keystr(path, simple=True, separator="_") for path, _ in leaves)
        self.cache = nnx.Dict({name: nnx.Cache(leaf) for name, (_, leaf) in zip(self._names, leaves, strict=True)})

    @property
    def caches(self) -> tuple[pa.caches.KVCache, ...]:
        """One per layer, as they are now."""
        return jax.tree.unflatten(self._structure, [self.cache[name].get_value() for name in self._names])

    @property
    def next_positions(self) -> Array:
        """int32 ``[B]``: the position that each row's next token has."""
        return self.caches[0].lengths

    @property
    def overflowed(self) -> Array:
        """bool ``[B]``: rows that lost a token for which a cache had no room."""
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
        """Reads ``tokens`` and keeps them.

        Args:
          tokens: int32 ``[B, T]``.
          positions: int32 ``[B|1, T]``, to be checked: -1 is padding, and each row goes on at :attr:`next_positions`.
            Under jit values cannot be checked; say ``real`` there.
          real: bool ``[B, T]``, False is padding; default: every token is real. Not together with positions.
          layer_hook, apply_head: as :meth:`Decoder.__call__` takes them.

        Returns:
          The decoder's output; its ``caches`` are None.

        Raises:
          ValueError: positions that are not the next ones, or what a Decoder refuses.
          TypeError: the wrong kind of object.
        """
        caches = self.caches
        tokens = checks.array_or_list("tokens", tokens, f"int32 [{caches[0].batch_size}, T]")
        shape = tokens.shape
        if len(shape) != 2 or shape[0] != caches[0].batch_size:
            raise ValueError(f"tokens: expected int32 [{caches[0].batch_size}, T], got {list(shape)}")
        if positions is not None:
            if real is not None:
                got = checks.describe(real)
                raise ValueError(f"real: expected None together with positions, which say it too, got {got}")
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
        """Empties the rows where ``rows`` (bool ``[B]``) is True; default: all."""
        batch_size = self.caches[0].batch_size
        wanted: Any = np.ones(batch_size, np.bool_) if rows is None else rows
        self._set(tuple(cache.reset(wanted) for cache in self.caches))

    def truncate(self, lengths: ArrayLike) -> None:
        """Takes back what comes after each row's first ``lengths`` (int ``[B]``) tokens."""
        wanted: Any = lengths  # a cache takes lists, too
        self._set(tuple(cache.truncate(wanted) for cache in self.caches))

    def fork(self, sources: ArrayLike) -> None:
        """Row b goes on as what row ``sources[b]`` (int ``[B]``) is."""
        wanted: Any = sources
        self._set(tuple(cache.fork(wanted) for cache in self.caches))

    def _set(self, caches: tuple[pa.caches.KVCache, ...] | None) -> None:
        for name, leaf in zip(self._names, jax.tree.leaves(caches), strict=True):
            self.cache[name].set_value(leaf)


def _next_positions(real: Array, lengths: Array) -> Array:
    return jnp.where(real, lengths[:, None] + jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, -1)


def _checked(positions: ArrayLike, lengths: Array, shape: tuple[int, ...]) -> Array:
    """The positions of all rows, if they go on where the rows are."""
    positions = checks.array_or_list("positions", positions, "int32")
    if not checks.is_integer(positions) or positions.shape not in (shape, (1, shape[1])):
        wanted = f"int32 [{shape[0]}|1, {shape[1]}]"
        raise ValueError(f"positions: expected {wanted}, got {positions.dtype} {list(positions.shape)}")
    if isinstance(positions, Tracer) or isinstance(lengths, Tracer):
        wanted = "None under jit, where they cannot be checked; say which tokens are real"
        raise ValueError(f"positions: expected {wanted}, got {checks.describe(positions)}")
    positions = jnp.broadcast_to(checks.positions("positions", positions, ranks=(2,)), shape)
    expected = _next_positions(positions >= 0, lengths)
    wrong = ((positions != expected) & (positions >= 0)).any(1)
    if wrong.any():
        row = int(wrong.argmax())
        got = [int(position) for position in positions[row] if position >= 0]
        raise ValueError(f"positions: expected row {row} to go on at {int(lengths[row])}, one by one, got {got}")
    return positions
