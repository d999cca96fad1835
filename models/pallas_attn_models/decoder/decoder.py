"""The decoder: one call trains, prefills (any number of tokens) and decodes.

Reads downwards: what a call gives back, one layer, the decoder.
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
from pallas_attn_models.decoder.config import DecoderConfig
from pallas_attn_models.decoder.layer_caches import init_caches
from pallas_attn_models.decoder.layers import MLP, Embedding, RMSNorm, counted, linear, rotary_tables

FLOAT_DTYPES = ("float32", "bfloat16", "float16")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DecoderOutput:
    """What a call of :class:`Decoder` gives back; a pytree.

    Attributes:
      logits: float32 ``[B, T, V]``, or None with ``apply_head=False``. At padding they are finite and mean nothing.
      hidden: ``[B, T, E]`` after the last norm, in the decoder's dtype.
      caches: the caches with these tokens in them, one per layer, or None.
      block_masks: the ``pa.BlockMask`` of every layer, most often the same object: ``num_active`` says how many KV
        blocks the layer visited.
    """

    logits: Array | None
    hidden: Array
    caches: tuple[pa.caches.KVCache, ...] | None
    block_masks: tuple[pa.BlockMask, ...]


class DecoderLayer(nnx.Module):
    """Attention and MLP, each on the normalised residual stream and added back to it."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        implementation: str | None,
    ) -> None:
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **dtypes)
        self.attention = Attention(config, rngs=rngs, implementation=implementation, **dtypes)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **dtypes)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, rngs=rngs, **dtypes)

    def __call__(
        self,
        hidden: Array,
        rotary: tuple[Array, Array],
        block_mask: pa.BlockMask,
        cache: pa.caches.KVCache | None,
        reservation: pa.caches.Reservation | None,
    ) -> tuple[Array, pa.caches.KVCache | None]:
        """``[B, T, E] -> [B, T, E]``, and the cache; arguments as in :meth:`Attention.__call__`."""
        attended, cache = self.attention(self.attention_norm(hidden), rotary, block_mask, cache, reservation)
        hidden = hidden + attended
        return hidden + self.mlp(self.mlp_norm(hidden)), cache


class Decoder(nnx.Module):
    """A decoder of the Llama family (Touvron et al. 2023, arXiv:2302.13971; Llama 3: arXiv:2407.21783), or Mistral.

    Args:
      config: the sizes and constants.
      rngs: from which the weights are drawn; :func:`~pallas_attn_models.checkpoints.load_hf` draws none.
      dtype: of activations and matrix products. Norms, rotary angles, softmax and logits are float32 whatever it is.
      param_dtype: of the weights; default ``dtype``.
      implementation: of ``pa.attention``; default: the best that can serve.
      block_sizes: a ``pa.BlockSizes`` for the block masks; default from the tuning table. Where its ``chunk`` is None,
        decode gets a fixed one all the same, so that a row does not depend, to the bit, on who shares the batch.

    Raises:
      ValueError: a dtype that weights cannot have, an unknown implementation, or ``rngs`` without parameters' stream.
      TypeError: the wrong kind of object.
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
            self.layers = nnx.List(
                DecoderLayer(config, rngs=rngs, implementation=implementation, **dtypes)
                for _ in range(config.num_layers)
            )
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **dtypes)
            self.head = (
                None
                if config.tie_word_embeddings
                else linear(*sizes, rngs=rngs, preferred_element_type=jnp.float32, **dtypes)
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
        """Runs the decoder over ``tokens``, each of which sees itself and what comes before it.

        Args:
          tokens: int32 ``[B, T]``. One that is not in the vocabulary has the vector NaN, unless it is padding.
          positions: int32 ``[B|1, T]``; -1 is padding, wherever it stands, and whatever token stands there. Default:
            ``arange(T)``, after what each row's cache already holds.
          caches: one per layer, from :meth:`init_caches` or an earlier call; the tokens are appended to them.
          segment_ids: int32 ``[B|1, T]`` for packed documents: a token sees only its own document. Rotary embedding
            knows only distances, so positions may start anew in each document or run on. Not together with caches.
          layer_hook: ``layer_hook(layer_index, hidden) -> hidden``, ``[B, T, E]``, called before each layer. What it
            returns has the shape and dtype of what it was given.
          apply_head: False leaves the logits out; :meth:`logits` gives them for chosen rows of ``hidden``.
          rows: int32 ``[B]``, distinct: the rows of the caches to which the rows of ``tokens`` belong, where these are
            only some of them; no copy is made. What is no row of the caches is an unused entry: all of its tokens count
            as padding. The caches of all other rows stay as they are.
          tree: bool ``[T, T]`` or ``[B|1, T, T]``: the tokens are the nodes of a draft tree, and a node sees itself,
            its ancestors (True), and what its row's caches hold, as ``pa.masks.tree`` says. Then positions are needed,
            of each node by its depth; what is padding comes last in its row. Only together with caches that keep every
            token in order (``pa.caches.Dense``); ``KVCache.keep`` takes back all but one path.

        Raises:
          ValueError: a shape, dtype or count that does not fit, or an integer that 32 bits do not hold; names the
            argument, what was expected and what came.
          TypeError: the wrong kind of object.
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
                wanted = "None together with caches, which hold one document a row"
                raise ValueError(f"segment_ids: expected {wanted}, got {checks.describe(segment_ids)}")
            extra = pa.masks.segments(_segment_ids(segment_ids, tokens))
        if tree is not None:
            extra = _tree_mask(tree, tokens, has_positions, caches, rows)
        if caches is not None:
            positions = jnp.broadcast_to(positions, tokens.shape)
            if rows is not None:
                exist = (rows >= 0) & (rows < caches[0].batch_size)
                positions = jnp.where(exist[:, None], positions, -1)
            reserved = reservations(positions, rows, caches)
        sizes = Sizes(self.block_sizes, self.implementation, self.config.head_dim, self.dtype)
        masks = block_masks(self.config, positions, extra, caches, reserved, sizes)

        # What stands at padding may be no token at all, and the embedding answers that with NaN.
        hidden = self.embedding(jnp.where(positions >= 0, tokens, 0))
        rotary = rotary_tables(positions, self.config.head_dim, self.config.rope)
        new_caches = []
        for index, layer in enumerate(self.layers):
            if layer_hook is not None:
                hidden = _hooked(layer_hook, index, hidden)
            cache = None if caches is None else caches[index]
            reservation = None if reserved is None else reserved[index]
            hidden, cache = layer(hidden, rotary, masks[index], cache, reservation)
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
          ValueError: another shape, or no floating-point numbers.
          TypeError: what is no array.
        """
        given = checks.array("hidden", hidden)
        if given.ndim != 3 or given.shape[-1] != self.config.hidden_size:
            raise ValueError(f"hidden: expected [B, T, {self.config.hidden_size}], got {list(given.shape)}")
        if not jnp.issubdtype(given.dtype, jnp.floating):
            raise ValueError(f"hidden: expected floating-point numbers, got {given.dtype}")
        hidden = jnp.asarray(given)
        return self.embedding.logits(hidden) if self.head is None else self.head(hidden)

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
        """Empty caches, one per layer.

        Args:
          batch_size: B.
          capacity: how many tokens a row can hold; for all layers, or one for each.
          policy: which tokens are kept; for all layers, or one for each; default ``pa.caches.Dense()``.
          storage: how a slot is held; for all layers, or one for each; default ``pa.caches.Plain()``.
          dtype: of the keys and values; default the decoder's.
          chunk: the most tokens of one call. If given, a layer with a sliding window gets a ``pa.caches.Window`` of as
            many slots as that takes, whatever the policy of the others, unless the capacity is less.

        Raises:
          ValueError: a number of capacities, policies or storages that is not that of the layers.
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

    def _check_caches(
        self, caches: Sequence[pa.caches.KVCache] | None, rows: ArrayLike | None, batch_size: int
    ) -> Array | None:
        """The rows, if they and the caches fit tokens of so many rows."""
        if rows is not None:
            rows = checks.array_or_list("rows", rows, f"int32 [{batch_size}]")
            if caches is None:
                raise ValueError(f"rows: expected None without caches, got {checks.describe(rows)}")
            if rows.shape != (batch_size,) or not checks.is_integer(rows):
                raise ValueError(f"rows: expected int32 [{batch_size}], as tokens, got {rows.dtype} {list(rows.shape)}")
            # What 32 bits do not hold is no row, either.
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
        expected, of = (batch_size, "tokens") if rows is None else (caches[0].batch_size, "caches[0]")
        for index, cache in enumerate(caches):
            if cache.batch_size != expected:
                raise ValueError(
                    f"caches[{index}]: expected the batch size of {of}, {expected}, got {cache.batch_size}"
                )
        return rows


def _lengths(cache: pa.caches.KVCache, rows: Array | None) -> Array:
    """int32 ``[B]``, of the rows of tokens."""
    return cache.lengths if rows is None else jnp.take(cache.lengths, rows, mode="clip")


def _tree_mask(
    tree: ArrayLike,
    tokens: Array,
    has_positions: bool,
    caches: Sequence[pa.caches.KVCache] | None,
    rows: Array | None,
) -> pa.masks.Mask:
    """Of nodes that come after all that the caches hold."""
    if caches is None or not all(cache.policy.ordered for cache in caches):
        got = "no caches" if caches is None else ", ".join(type(cache.policy).__name__ for cache in caches)
        raise ValueError(f"tree: expected caches that are Dense in every layer, got {got}")
    if not has_positions:
        raise ValueError("tree: expected positions with it, of each node by its depth, got None")
    tree = checks.array_or_list("tree", tree, "bool")
    batch_size, length = tokens.shape
    shapes = [(length, length), (batch_size, length, length), (1, length, length)]
    if tree.dtype != jnp.bool_ or tree.shape not in shapes:
        wanted = f"bool [{length}, {length}] or [{batch_size}|1, {length}, {length}]"
        raise ValueError(f"tree: expected {wanted}, got {tree.dtype} {list(tree.shape)}")
    return pa.masks.tree(jnp.asarray(tree), start=_lengths(caches[0], rows))


def check_dtype(name: str, dtype: DTypeLike) -> jnp.dtype:
    """A dtype that weights and activations can have, or a ValueError or TypeError that names the argument."""
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
    """Raises a ValueError or TypeError unless ``pa.attention`` has an implementation of this name, or it is None."""
    if implementation is None:
        return
    expected = f"implementation: expected one of {', '.join(pa.implementations())}, or None"
    if not isinstance(implementation, str):
        raise TypeError(f"{expected}, got {type(implementation).__name__}")
    if implementation not in pa.implementations():
        raise ValueError(f"{expected}, got {implementation!r}")


def _as_int32(name: str, value: ArrayLike) -> Array:
    """As int32, ``[B, T]``; what is being traced, and 32 bits do not hold, becomes -1."""
    array = checks.array_or_list(name, value, "int32 [B, T]")
    if not checks.is_integer(array) or array.ndim != 2 or array.size == 0:
        raise ValueError(f"{name}: expected int32 [B, T], none of them 0, got {array.dtype} {list(array.shape)}")
    return checks.positions(name, array, ranks=(2,))


def _per_token(name: str, value: ArrayLike, tokens: Array) -> Array:
    array = _as_int32(name, value)
    _check_per_token(name, array.shape, tokens)
    return array


def _segment_ids(value: ArrayLike, tokens: Array) -> Any:
    """Of any integer dtype, as they are only compared."""
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
    """What the hook makes of ``hidden``."""
    wanted = f"{hidden.dtype} {list(hidden.shape)} from layer {layer}, as it was given"
    hooked = layer_hook(layer, hidden)
    if not isinstance(hooked, Array | np.ndarray):
        raise TypeError(f"layer_hook: expected {wanted}, got {checks.describe(hooked)}")
    if (hooked.shape, hooked.dtype) != (hidden.shape, hidden.dtype):
        raise ValueError(f"layer_hook: expected {wanted}, got {hooked.dtype} {list(hooked.shape)}")
    return jnp.asarray(hooked)
