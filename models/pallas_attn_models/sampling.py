"""From logits to the next token, with every setting an array of one value per row: other settings are other data."""

import dataclasses
import math
import numbers
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the new tokens of a prompt are chosen.

    Attributes:
      max_new_tokens: the budget, at least 1; a token that ends the row counts too.
      temperature: 0 takes the most likely token (greedy); otherwise logits are divided by it before anything else.
      top_k: only the k most likely tokens can be drawn (Fan et al. 2018, arXiv:1805.04833); 0 is off.
      top_p: of those, only the most likely that are needed to reach this probability (nucleus sampling, Holtzman et al.
        2019, arXiv:1904.09751), in (0, 1]; 1 is off. Among equal logits the smaller token id counts as more likely.
      seed: of the row's random stream, in [0, 2**32). A token depends on its logits, the seed and its index among the
        row's new tokens, never on the other rows.
      min_p, repetition_penalty: part of the contract, not available yet.

    Raises:
      ValueError: a value out of its range; names the setting, what was expected and what came.
      NotImplementedError: a setting that is not available yet is used.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        _require_int("max_new_tokens", self.max_new_tokens, 1, 2**31)
        _require_int("top_k", self.top_k, 0, 2**31)
        _require_int("seed", self.seed, 0, 2**32)
        if not _is_real(self.temperature) or not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: expected a finite number of at least 0, got {self.temperature!r}")
        if not _is_real(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p!r}")
        for name, off in (("min_p", 0), ("repetition_penalty", 1)):
            if getattr(self, name) != off:
                raise NotImplementedError(f"{name}: not available yet; leave it out")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SamplingArrays:
    """The settings of a batch as a pytree; see :class:`Sampling`.

    Attributes:
      temperature: float32 ``[B]``.
      top_k: int32 ``[B]``.
      top_p: float32 ``[B]``.
      seed: uint32 ``[B]``.
    """

    temperature: Array | np.ndarray
    top_k: Array | np.ndarray
    top_p: Array | np.ndarray
    seed: Array | np.ndarray

    @staticmethod
    def stack(samplings: Sequence[Sampling]) -> "SamplingArrays":
        """One row for each of ``samplings``."""
        return SamplingArrays(
            temperature=np.array([sampling.temperature for sampling in samplings], np.float32),
            top_k=np.array([sampling.top_k for sampling in samplings], np.int32),
            top_p=np.array([sampling.top_p for sampling in samplings], np.float32),
            seed=np.array([sampling.seed for sampling in samplings], np.uint32),
        )


def sample(logits: Array, settings: SamplingArrays, step: Array) -> tuple[Array, Array]:
    """Chooses the next token of every row.

    Args:
      logits: float32 ``[B, V]``.
      settings: of the rows.
      step: int32 ``[B]``, the index of the token among the row's new tokens.

    Returns:
      The tokens, int32 ``[B]``, and their log-probabilities, float32 ``[B]``: those that the model itself gives, from
      the logits as they came, whatever temperature, top-k and top-p make of them.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    random = settings.temperature > 0
    # Rows of either kind share a batch, but a batch that is all greedy neither draws nor sorts.
    tokens = lax.cond(random.any(), lambda: jnp.where(random, _draw(logits, settings, step), greedy), lambda: greedy)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    return tokens, jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]


def _draw(logits: Array, settings: SamplingArrays, step: Array) -> Array:
    """One random token per row, int32 ``[B]``; what it gives for a greedy row means nothing."""
    # From the row's largest logit on, so that the smallest temperature cannot divide infinity by infinity.
    logits = logits - logits.max(axis=-1, keepdims=True)
    logits = logits / jnp.maximum(settings.temperature, jnp.finfo(jnp.float32).tiny)[:, None]
    filtered = (settings.temperature > 0) & ((settings.top_k > 0) | (settings.top_p < 1))
    kept = lax.cond(filtered.any(), lambda: _top_k_top_p(logits, settings), lambda: jnp.ones(logits.shape, jnp.bool_))
    draw = jax.vmap(lambda seed, step, row: jax.random.categorical(_key(seed, step), row))
    return draw(settings.seed, step, jnp.where(kept, logits, -jnp.inf)).astype(jnp.int32)


def _key(seed: Array, step: Array) -> Array:
    # Named, as what other generators draw under vmap depends on the size of the batch.
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)


def _top_k_top_p(logits: Array, settings: SamplingArrays) -> Array:
    """Which tokens top-k, and top-p after it, leave: bool ``[B, V]``, at least one per row."""
    batch_size, vocab_size = logits.shape
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    rank = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    kept = rank < jnp.where(settings.top_k == 0, vocab_size, settings.top_k)[:, None]
    probability = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # A sum of float32 can reach 1 before its last term, and a tiny top_p can round to 0: both ends need saying.
    top_p = settings.top_p[:, None]
    kept &= (rank == 0) | (before < top_p) | (top_p == 1)
    row = lax.broadcasted_iota(jnp.int32, (batch_size, 1), 0)
    return jnp.zeros(logits.shape, jnp.bool_).at[row, order].set(kept)


def _is_real(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _require_int(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or not low <= int(value) < high:
        raise ValueError(f"{name}: expected an int in [{low}, {high}), got {value!r}")
