"""The decoder: one call serves training, prefill (any number of tokens) and decode.

Reads downwards: output, layer, decoder.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike

import pallas_attn as pa
from pallas_attn import checks
from pallas_attn_models.decoder.attention import Attention
from pallas_attn_models.decoder.block_masks import Sizes, block_masks, reservations
from pallas_attn_models.decoder.config import DecoderConfig, LayerConfig
from pallas_attn_models.decoder.experts import Experts
from pallas_attn_models.decoder.latent_attention import LatentAttention
from pallas_attn_models.decoder.layer_caches import init_caches
from pallas_attn_models.decoder.layers import MLP, Embedding, counted, linear
from pallas_attn_models.decoder.norms import Norm
from pallas_attn_models.decoder.rope import RopeConfig, RotaryTables, rotary_tables

FLOAT_DTYPES = ("float32", "bfloat16", "float16")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DecoderOutput:
    """The output of :class:`Decoder`; a pytree.

    Attributes:
      logits: float32 ``[B, T, V]``, or None with ``apply_head=False``. Finite but meaningless at padding.
      hidden: ``[B, T, E]`` after the last norm, in the decoder's dtype.
      caches: the updated caches, one per layer, or None.
      block_masks: the ``pa.BlockMask`` of every layer, usually one shared object; ``num_active`` counts the KV blocks
        that the layer visited.
    """

    logits: Array | None
    hidden: Array
    caches: tuple[pa.caches.KVCache, ...] | None
    block_masks: tuple[pa.BlockMask, ...]


class DecoderLayer(nnx.Module):
    """Attention and MLP, each added to the residual stream; ``config.norm_position`` says what is normalized."""

    def __init__(
        self,
        config: DecoderConfig,
        layer: LayerConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        implementation: str | None,
    ) -> None:
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}

        def norm(*positions: str) -> Norm | None:
            if config.norm_position not in positions:
                return None
            return Norm((config.hidden_size,), config.norm, config.rms_norm_eps, **dtypes)

        self.attention_norm = norm("pre", "both", "parallel", "parallel_two")
        attention = Attention if config.latent is None else LatentAttention
        self.attention = attention(config, layer, rngs=rngs, implementation=implementation, **dtypes)
        self.attention_out_norm = norm("post", "both")
        self.mlp_norm = norm("pre", "both", "parallel_two")
        if layer.experts is None:
            self.mlp = MLP(
                config.hidden_size,
                layer.intermediate_size,
                activation=config.activation,
                gated=config.mlp_gated,
                bias=config.mlp_bias,
                rngs=rngs,
                **dtypes,
            )
        else:
            self.mlp = Experts(config, layer.experts, rngs=rngs, **dtypes)
        self.mlp_out_norm = norm("post", "both")
        self.is_parallel = config.norm_position in ("parallel", "parallel_two")
        self.residual_scale = config.residual_scale

    def __call__(
        self,
        hidden: Array,
        positions: Array,
        rotary: RotaryTables | None,
        block_mask: pa.BlockMask,
        cache: pa.caches.KVCache | None,
        reservation: pa.caches.Reservation | None,
    ) -> tuple[Array, pa.caches.KVCache | None]:
        """``[B, T, E] -> [B, T, E]``, and the cache; arguments as in :meth:`Attention.__call__`."""
        with jax.named_scope("attention"):
            normalized = _apply(self.attention_norm, hidden)
            attended, cache = self.attention(normalized, positions, rotary, block_mask, cache, reservation)
            after = self._add(hidden, _apply(self.attention_out_norm, attended))
        with jax.named_scope("mlp"):
            if not self.is_parallel:
                normalized = _apply(self.mlp_norm, after)
            elif self.mlp_norm is not None:
                normalized = self.mlp_norm(hidden)
            return self._add(after, _apply(self.mlp_out_norm, self.mlp(normalized))), cache

    def _add(self, hidden: Array, update: Array) -> Array:
        return hidden + (update if self.residual_scale == 1 else update * self.residual_scale)


def _apply(norm: Norm | None, x: Array) -> Array:
    return x if norm is None else norm(x)


class Decoder(nnx.Module):
    """A decoder of the kind that its configuration describes: Llama (arXiv:2302.13971) by default, and most others.

    Args:
      config: sizes, constants and variants.
      rngs: initializes the weights; :func:`~pallas_attn_models.checkpoints.load_hf` skips this.
      dtype: of activations and matrix products. Norms, rotary angles, softmax and logits are always float32.
      param_dtype: of the weights; default ``dtype``.
      implementation: of ``pa.attention``; default: the best available.
      block_sizes: a ``pa.BlockSizes`` for the block masks; default: the tuning table. If its ``chunk`` is None, decode
        still uses a fixed one, so that a row's bits do not depend on the other rows.

    Raises:
      ValueError: an unsupported dtype, an unknown implementation, or ``rngs`` without a stream for parameters.
      TypeError: an argument of the wrong kind.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike | None = None,
        implementation: str | None = None,
        block_sizes: pa.BlockSizes | None = None,
    ) -> None:
        if not isinstance(config, DecoderConfig):
            raise TypeError(f"config: expected a DecoderConfig, got {type(config).__name__}")
        if not isinstance(rngs, nnx.Rngs):
            raise TypeError(f"rngs: expected an nnx.Rngs, got {type(rngs).__name__}")
        if not isinstance(block_sizes, pa.BlockSizes | None):
            raise TypeError(f"block_sizes: expected a BlockSizes or None, got {type(block_sizes).__name__}")
        if "params" not in rngs and "default" not in rngs:
            raise ValueError(f"rngs: expected a stream 'params' or 'default', got {sorted(rngs)}")
        check_implementation(implementation)
        dtype = check_dtype("dtype", dtype)
        param_dtype = dtype if param_dtype is None else check_dtype("param_dtype", param_dtype)
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.config = config
        self.dtype = dtype
        self.implementation = implementation
        self.block_sizes = block_sizes
        sizes = config.hidden_size, config.vocab_size
        with counted(rngs) as rngs:
            self.embedding = Embedding(config.vocab_size, config.hidden_size, rngs=rngs, **dtypes)
            self.positions = (
                None
                if config.learned_positions is None
                else Embedding(config.learned_positions, config.hidden_size, rngs=rngs, **dtypes)
            )
            self.layers = nnx.List(
                DecoderLayer(config, config.layer(index), rngs=rngs, implementation=implementation, **dtypes)
                for index in range(config.num_layers)
            )
            self.norm = Norm((config.hidden_size,), config.norm, config.rms_norm_eps, **dtypes)
            self.head = (
                None
                if config.tie_word_embeddings
                else linear(*sizes, bias=config.head_bias, rngs=rngs, preferred_element_type=jnp.float32, **dtypes)
            )

    def __call__(
        self,
        tokens: ArrayLike,
        positions: ArrayLike | None = None,
        caches: Sequence[pa.caches.KVCache] | None = None,
        segment_ids: ArrayLike | None = None,
        layer_hook: Callable[[int, Array], Array] | None = None,
        apply_head: bool = True,
        rows: ArrayLike | None = None,
        tree: ArrayLike | None = None,
    ) -> DecoderOutput:
        """Runs the decoder over ``tokens`` with causal attention.

        Args:
          tokens: int32 ``[B, T]``. A token outside the vocabulary is embedded as NaN, unless it is padding.
          positions: int32 ``[B|1, T]``; -1 marks padding, anywhere and with any token. Default: ``arange(T)`` after the
            tokens in each row's cache.
          caches: one per layer, from :meth:`init_caches` or an earlier call; the tokens are appended.
          segment_ids: int32 ``[B|1, T]`` for packed documents: a token sees only its own document. Rotary embedding
            depends only on distances, so positions may restart in each document or continue. Excludes ``caches``.
          layer_hook: ``layer_hook(layer_index, hidden) -> hidden``, ``[B, T, E]``, called before each layer. It must
            preserve shape and dtype.
          apply_head: False omits the logits; :meth:`logits` computes them for selected rows of ``hidden``.
          rows: int32 ``[B]``, distinct: the cache rows to which the rows of ``tokens`` belong; nothing is copied. An
            index outside the caches marks an unused entry, whose tokens are padding. Other cache rows stay unchanged.
          tree: bool ``[T, T]`` or ``[B|1, T, T]``: the tokens are the nodes of a draft tree; a node sees itself, its
            ancestors (True) and its row's cached tokens, as in ``pa.masks.tree``. Requires ``positions`` that follow
            the depth of each node, padding at the end of each row, and caches that keep every token in order
            (``pa.caches.Dense``); ``KVCache.keep`` then keeps one path.

        Raises:
          ValueError: an invalid shape, dtype, count, or integer beyond 32 bits; names the argument.
          TypeError: an argument of the wrong kind.
        """
        if layer_hook is not None and not callable(layer_hook):
            raise TypeError(f"layer_hook: expected a function or None, got {checks.describe(layer_hook)}")
        apply_head = checks.boolean("apply_head", apply_head)
        tokens = _as_int32("tokens", tokens)
        rows = self._check_caches(caches, rows, tokens.shape[0])
        has_positions = positions is not None
        if positions is None:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
            if caches is not None:
                positions = positions + _lengths(caches[0], rows)[:, None]
        positions = _per_token("positions", positions, tokens)

        extra, reserved = None, None
        if segment_ids is not None:
            if caches is not None:
                expected = "None together with caches, which hold one document per row"
                raise ValueError(f"segment_ids: expected {expected}, got {checks.describe(segment_ids)}")
            extra = pa.masks.segments(_segment_ids(segment_ids, tokens))
        if tree is not None:
            extra = _tree_mask(tree, tokens, has_positions, caches, rows)
        if caches is not None:
            positions = jnp.broadcast_to(positions, tokens.shape)
            if rows is not None:
                in_bounds = (rows >= 0) & (rows < caches[0].batch_size)
                positions = jnp.where(in_bounds[:, None], positions, -1)
            with jax.named_scope("cache"):
                reserved = reservations(positions, rows, caches)
        sizes = Sizes(self.block_sizes, self.implementation, self.dtype)
        with jax.named_scope("block_masks"):
            masks = block_masks(self.config, positions, extra, caches, reserved, sizes)

        hidden = self._embed(tokens, positions)
        rotary = self._rotary_tables(positions, caches)
        new_caches = []
        for index, layer in enumerate(self.layers):
            if layer_hook is not None:
                hidden = _hooked(layer_hook, index, hidden)
            cache = None if caches is None else caches[index]
            reservation = None if reserved is None else reserved[index]
            with jax.named_scope(f"layer_{index}"):
                hidden, cache = layer(hidden, positions, rotary[index], masks[index], cache, reservation)
            new_caches.append(cache)
        hidden = self.norm(hidden)
        return DecoderOutput(
            logits=self.logits(hidden) if apply_head else None,
            hidden=hidden,
            caches=None if caches is None else tuple(new_caches),
            block_masks=masks,
        )

    def logits(self, hidden: Array) -> Array:
        """The output head: ``[B, T, E]``, as in :class:`DecoderOutput`, to float32 ``[B, T, V]``.

        Raises:
          ValueError: a different shape, or a dtype that is not floating-point.
          TypeError: not an array.
        """
        given = checks.array("hidden", hidden)
        if given.ndim != 3 or given.shape[-1] != self.config.hidden_size:
            raise ValueError(f"hidden: expected [B, T, {self.config.hidden_size}], got {list(given.shape)}")
        if not jnp.issubdtype(given.dtype, jnp.floating):
            raise ValueError(f"hidden: expected floating-point numbers, got {given.dtype}")
        hidden = jnp.asarray(given)
        with jax.named_scope("head"):
            logits = self.embedding.logits(hidden) if self.head is None else self.head(hidden)
            if self.config.logit_scale != 1:
                logits = logits * jnp.float32(self.config.logit_scale)
            if (cap := self.config.logit_softcap) is not None:
                logits = cap * jnp.tanh(logits / cap)
            return logits

    def init_caches(
        self,
        *,
        batch_size: int,
        capacity: int | Sequence[int],
        policy: pa.caches.Policy | Sequence[pa.caches.Policy] | None = None,
        storage: pa.caches.Storage | Sequence[pa.caches.Storage] | None = None,
        dtype: DTypeLike | None = None,
        chunk: int | None = None,
    ) -> tuple[pa.caches.KVCache, ...]:
        """Creates empty caches, one per layer.

        Args:
          batch_size: B.
          capacity: tokens per row; one number, or one per layer.
          policy: selects the tokens to keep; one, or one per layer; default ``pa.caches.Dense()``.
          storage: format of a slot; one, or one per layer; default ``pa.caches.Plain()``.
          dtype: of the keys and values; default: the decoder's.
          chunk: maximum number of tokens per call. If given, a layer with a sliding window gets a ``pa.caches.Window``
            with only the slots it needs, whatever ``policy``, unless its capacity is smaller.

        Raises:
          ValueError: the number of capacities, policies or storages differs from the number of layers.
        """
        return init_caches(
            self.config,
            batch_size=batch_size,
            capacity=capacity,
            policy=policy,
            storage=storage,
            dtype=self.dtype if dtype is None else dtype,
            chunk=chunk,
        )

    def _embed(self, tokens: Array, positions: Array) -> Array:
        """``[B, T, E]``: token embeddings, scaled, and position embeddings."""
        # Padding may hold invalid tokens, which the embedding would map to NaN.
        hidden = self.embedding(jnp.where(positions >= 0, tokens, 0))
        if self.config.embedding_scale != 1:
            hidden = hidden * jnp.asarray(self.config.embedding_scale, self.dtype)
        return hidden if self.positions is None else hidden + self.positions(jnp.maximum(positions, 0))

    def _rotary_tables(
        self, positions: Array, caches: Sequence[pa.caches.KVCache] | None
    ) -> tuple[RotaryTables | None, ...]:
        """One per layer; layers with the same settings share one object."""
        length = positions.shape[1] if caches is None else max(cache.capacity for cache in caches)
        made: dict[tuple[RopeConfig | None, int], RotaryTables | None] = {}
        layers = []
        for index in range(self.config.num_layers):
            layer = self.config.layer(index)
            size = layer.head_dim if self.config.latent is None else self.config.latent.rope_dim
            if (layer.rope, size) not in made:
                tables = None if layer.rope is None else rotary_tables(positions, size, layer.rope, length)
                made[layer.rope, size] = tables
            layers.append(made[layer.rope, size])
        return tuple(layers)

    def _check_caches(
        self, caches: Sequence[pa.caches.KVCache] | None, rows: ArrayLike | None, batch_size: int
    ) -> Array | None:
        """Checks ``caches`` and ``rows`` against the batch size of the tokens; returns the rows."""
        if rows is not None:
            rows = checks.array_or_list("rows", rows, f"int32 [{batch_size}]")
            if caches is None:
                raise ValueError(f"rows: expected None without caches, got {checks.describe(rows)}")
            if rows.shape != (batch_size,) or not checks.is_integer(rows):
                raise ValueError(f"rows: expected int32 [{batch_size}], as tokens, got {rows.dtype} {list(rows.shape)}")
            # Integers beyond 32 bits count as out of bounds, too.
            rows = checks.positions("rows", rows, ranks=(1,))
        if caches is None:
            return None
        if not isinstance(caches, Sequence):
            raise TypeError(f"caches: expected one per layer, {self.config.num_layers}, got {checks.describe(caches)}")
        for index, cache in enumerate(caches):
            if not isinstance(cache, pa.caches.KVCache):
                raise TypeError(f"caches[{index}]: expected a KVCache, got {checks.describe(cache)}")
        if len(caches) != self.config.num_layers:
            raise ValueError(f"caches: expected one per layer, {self.config.num_layers}, got {len(caches)}")
        expected, source = (batch_size, "tokens") if rows is None else (caches[0].batch_size, "caches[0]")
        for index, cache in enumerate(caches):
            if cache.batch_size != expected:
                raise ValueError(
                    f"caches[{index}]: expected the batch size of {source}, {expected}, got {cache.batch_size}"
                )
        return rows


def _lengths(cache: pa.caches.KVCache, rows: Array | None) -> Array:
    """int32 ``[B]``: cached tokens of each row of ``tokens``."""
    return cache.lengths if rows is None else jnp.take(cache.lengths, rows, mode="clip")


def _tree_mask(
    tree: ArrayLike,
    tokens: Array,
    has_positions: bool,
    caches: Sequence[pa.caches.KVCache] | None,
    rows: Array | None,
) -> pa.masks.Mask:
    """The mask of a draft tree whose nodes follow the cached tokens."""
    if caches is None or not all(cache.policy.ordered for cache in caches):
        got = "no caches" if caches is None else ", ".join(type(cache.policy).__name__ for cache in caches)
        raise ValueError(f"tree: expected Dense caches in every layer, got {got}")
    if not has_positions:
        raise ValueError("tree: expected also positions, which follow the depth of each node, got None")
    tree = checks.array_or_list("tree", tree, "bool")
    batch_size, length = tokens.shape
    shapes = [(length, length), (batch_size, length, length), (1, length, length)]
    if tree.dtype != jnp.bool_ or tree.shape not in shapes:
        expected = f"bool [{length}, {length}] or [{batch_size}|1, {length}, {length}]"
        raise ValueError(f"tree: expected {expected}, got {tree.dtype} {list(tree.shape)}")
    return pa.masks.tree(jnp.asarray(tree), start=_lengths(caches[0], rows))


def check_dtype(name: str, dtype: DTypeLike) -> jnp.dtype:
    """Normalizes a dtype for weights and activations; raises ValueError or TypeError, naming the argument."""
    expected = f"{name}: expected one of {', '.join(FLOAT_DTYPES)}"
    try:
        checked = None if dtype is None else jnp.dtype(dtype)  # NumPy takes None for float64
    except (TypeError, ValueError):
        checked = None
    if checked is None:
        raise (ValueError if isinstance(dtype, str) else TypeError)(f"{expected}, got {dtype!r}")
    if checked.name not in FLOAT_DTYPES:
        raise ValueError(f"{expected}, got {checked.name}")
    return checked


def check_implementation(implementation: str | None) -> None:
    """Raises ValueError or TypeError unless None or the name of an implementation of ``pa.attention``."""
    if implementation is None:
        return
    expected = f"implementation: expected one of {', '.join(pa.implementations())}, or None"
    if not isinstance(implementation, str):
        raise TypeError(f"{expected}, got {type(implementation).__name__}")
    if implementation not in pa.implementations():
        raise ValueError(f"{expected}, got {implementation!r}")


def _as_int32(name: str, value: ArrayLike) -> Array:
    """The array as int32 ``[B, T]``; traced values beyond 32 bits become -1."""
    array = checks.array_or_list(name, value, "int32 [B, T]")
    if not checks.is_integer(array) or array.ndim != 2 or array.size == 0:
        raise ValueError(f"{name}: expected int32 [B, T], none of them 0, got {array.dtype} {list(array.shape)}")
    return checks.positions(name, array, ranks=(2,))


def _per_token(name: str, value: ArrayLike, tokens: Array) -> Array:
    array = _as_int32(name, value)
    _check_per_token(name, array.shape, tokens)
    return array


def _segment_ids(value: ArrayLike, tokens: Array) -> Any:
    """Segment ids of any integer dtype, because they are only compared."""
    array: Any = checks.array_or_list("segment_ids", value, "integers [B, T]")
    if not checks.is_integer(array):
        raise ValueError(f"segment_ids: expected integers, got {array.dtype}")
    _check_per_token("segment_ids", array.shape, tokens)
    return array


def _check_per_token(name: str, shape: tuple[int, ...], tokens: Array) -> None:
    batch_size, length = tokens.shape
    if shape not in ((batch_size, length), (1, length)):
        raise ValueError(f"{name}: expected the shape of tokens, [{batch_size}|1, {length}], got {list(shape)}")


def _hooked(layer_hook: Callable[[int, Array], Array], layer: int, hidden: Array) -> Array:
    """The hook's output, after checking its shape and dtype."""
    expected = f"{hidden.dtype} {list(hidden.shape)} for layer {layer}, like its input"
    hooked = layer_hook(layer, hidden)
    if not isinstance(hooked, Array | np.ndarray):
        raise TypeError(f"layer_hook: expected {expected}, got {checks.describe(hooked)}")
    if (hooked.shape, hooked.dtype) != (hidden.shape, hidden.dtype):
        raise ValueError(f"layer_hook: expected {expected}, got {hooked.dtype} {list(hooked.shape)}")
    return jnp.asarray(hooked)
