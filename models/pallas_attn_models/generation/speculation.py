"""Speculative decoding: drafts several tokens cheaply and verifies them in one call of the model.

Verification samples the new tokens one by one, exactly as plain decoding does, from the same logits with the same key
(seed and index of the token); it continues as long as the draft equals the sampled token. The output therefore equals
plain decoding for any drafts, at any temperature, per row; drafts decide only how many tokens a call yields. The
logits are equal up to rounding, as for any other number of queries.

A draft model samples with the same keys: the model takes the argmax of log p + g, and the draft model the argmax of
log q + g with the same Gumbel noise g (Daliri, Musco and Suresh 2024, arXiv:2408.07978). The two agree with probability
sum_i 1 / sum_j max(p_j / p_i, q_j / q_i) (Moulton and Jiang 2018, arXiv:1809.04052), which is at least the
sum_i p_i q_i of independent samples, and at least (1 - d) / (1 + d), where d is the total variation distance of p and
q; no method that samples without knowing both p and q can guarantee more. Rejection sampling (Leviathan et al. 2022,
arXiv:2211.17192) knows both and accepts with the optimal probability 1 - d: up to 1 + d times as often, and never less
often. But its tokens depend on the drafts: with the same seed, it generates other tokens than plain decoding.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_attn.tuning import DECODE_QUERIES
from pallas_attn_models.checks import require_positive_int, shown
from pallas_attn_models.decoder import Decoder
from pallas_attn_models.generation.state import FREE, INVALID, RUNNING, RowState, State
from pallas_attn_models.generation.token_step import sample_step


class Speculation(Protocol):
    """Drafts ``num_candidates`` continuations of ``length`` tokens for each row."""

    @property
    def length(self) -> int: ...

    @property
    def num_candidates(self) -> int: ...

    @property
    def draft_model(self) -> Decoder | None:
        """The decoder that :meth:`draft` runs, or None."""
        ...

    def draft(self, state: State, may: Array, feed: "Feed") -> tuple[State, Array, Array]:
        """Drafts tokens for the rows that can use them.

        Args:
          state: the Generator's state.
          may: bool ``[B]``: rows that can use drafts.
          feed: runs the draft model.

        Returns:
          The state, drafts int32 ``[B, num_candidates, length]``, and bool ``[B]``: rows that have drafts. No draft can
          change a result.
        """
        ...


# (tokens [B, T], positions [B, T], state) -> (state, the draft model's logits after the last token [B, V])
Feed = Callable[[Array, Array, State], tuple[State, Array]]


@dataclasses.dataclass(frozen=True)
class PromptLookup:
    """Drafts the tokens that followed an earlier occurrence of the row's last tokens.

    Prompt lookup decoding (Saxena 2023; LLMA, Yang et al. 2023, arXiv:2304.04487) needs no model and suits text that
    repeats itself or its prompt. It searches all tokens of a row, prompt and new ones, on the device.

    Attributes:
      length: tokens per draft.
      ngram: longest match to look for. The longest match up to this length wins; among equals, the latest.
      num_candidates: drafts verified at once, as a tree. Each comes from another occurrence, and no two start with the
        same token.

    Raises:
      ValueError: a number below 1, or more than 15 draft tokens in total.
    """

    length: int = 8
    ngram: int = 3
    num_candidates: int = 1

    def __post_init__(self):
        _check_sizes(self.length, self.num_candidates)
        require_positive_int("ngram", self.ngram)

    @property
    def draft_model(self) -> None:
        return None

    def draft(self, state: State, may: Array, feed: Feed) -> tuple[State, Array, Array]:
        del feed
        drafts, found = self.look_up(state.rows.tokens, state.rows.length)
        return state, drafts, found & may

    def look_up(self, tokens: Array, length: Array) -> tuple[Array, Array]:
        """Drafts for the first ``length`` (int32 ``[B]``) of ``tokens`` (int32 ``[B, P]``).

        Returns:
          int32 ``[B, num_candidates, length]``, best candidates first, -1 for missing ones; and bool ``[B]``: rows with
          at least one candidate.
        """
        places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        last = length[:, None] - 1
        agree = jnp.zeros(tokens.shape, jnp.int32)
        agrees = places < last
        for back in range(min(self.ngram, tokens.shape[1])):
            newest = jnp.take_along_axis(tokens, jnp.maximum(last - back, 0), axis=1)
            earlier = jnp.pad(tokens, ((0, 0), (back, 0)))[:, : tokens.shape[1]]
            agrees = agrees & (earlier == newest) & (places >= back)
            agree = agree + agrees.astype(jnp.int32)
        # Longer matches first, then later ones.
        rank = jnp.where(agree > 0, agree * tokens.shape[1] + places, -1)
        next_token = jnp.pad(tokens, ((0, 0), (0, 1)))[:, 1:]
        drafts = []
        for _ in range(self.num_candidates):
            place = lax.argmax(rank, 1, jnp.int32)[:, None]
            exists = jnp.take_along_axis(rank, place, axis=1) >= 0
            # Past the end of the row, assume that the text repeats with this period.
            period = jnp.maximum(last - place, 1)
            ahead = jnp.arange(self.length, dtype=jnp.int32)[None] % period
            draft = jnp.take_along_axis(tokens, jnp.minimum(place + 1 + ahead, tokens.shape[1] - 1), axis=1)
            drafts.append(jnp.where(exists, draft, -1))
            rank = jnp.where(next_token == draft[:, :1], -1, rank)
        return jnp.stack(drafts, axis=1), drafts[0][:, 0] >= 0


@dataclasses.dataclass(frozen=True, eq=False)
class DraftModel:
    """Drafts with a smaller decoder of the same vocabulary, which has caches of its own.

    Speculative decoding (Leviathan et al. 2022, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318).

    Attributes:
      model: the decoder. Its weights are read together with those of the model.
      length: tokens per draft.

    Raises:
      ValueError: a length below 1 or above 15.
    """

    model: Decoder
    length: int = 4
    num_candidates: int = dataclasses.field(default=1, init=False)

    def __post_init__(self):
        if not isinstance(self.model, Decoder):
            raise TypeError(f"model: expected a Decoder, got {type(self.model).__name__}")
        _check_sizes(self.length, 1)

    @property
    def draft_model(self) -> Decoder:
        return self.model

    def draft(self, state: State, may: Array, feed: Feed) -> tuple[State, Array, Array]:
        rows = dataclasses.replace(state.rows, status=jnp.where(may, state.rows.status, FREE))

        def step(carry: tuple[State, RowState], _: None) -> tuple[tuple[State, RowState], None]:
            state, rows = carry
            # Feed the newest token, and the one before it if the cache lacks it: after a fully accepted draft, the
            # draft model has not processed the draft's last token.
            newest = rows.length[:, None] - 1
            pair = jnp.concatenate([newest - 1, newest], axis=1)
            missing = (pair >= state.caches[-1].lengths[:, None]) & (rows.status == RUNNING)[:, None]
            tokens = jnp.take_along_axis(rows.tokens, jnp.maximum(pair, 0), axis=1)
            state, logits = feed(tokens, jnp.where(missing, pair, -1), state)
            return (state, sample_step(rows, logits)[0]), None

        (state, drafted), _ = lax.scan(step, (state, rows), length=self.length)
        new = rows.length[:, None] + jnp.arange(self.length, dtype=jnp.int32)[None]
        drafts = jnp.take_along_axis(drafted.tokens, jnp.minimum(new, drafted.tokens.shape[1] - 1), axis=1)
        return state, drafts[:, None], may & (drafted.status != INVALID)


def check_speculation(speculation: object) -> None:
    """Raises TypeError or ValueError unless ``speculation`` implements :class:`Speculation`."""
    parts = ("length", "num_candidates", "draft_model", "draft")
    if isinstance(speculation, type) or not all(hasattr(speculation, name) for name in parts):
        got = f"the class {speculation.__name__}" if isinstance(speculation, type) else type(speculation).__name__
        raise TypeError(f"speculation: expected a PromptLookup, a DraftModel or another Speculation, got {got}")
    length, num_candidates, draft_model, draft = (getattr(speculation, name) for name in parts)
    require_positive_int("speculation.length", length)
    require_positive_int("speculation.num_candidates", num_candidates)
    if not isinstance(draft_model, Decoder | None):
        got = type(draft_model).__name__
        raise TypeError(f"speculation.draft_model: expected a Decoder or None, got {got}")
    if not callable(draft):
        raise TypeError(f"speculation.draft: expected a method, got {type(draft).__name__}")


def _check_sizes(length: int, num_candidates: int) -> None:
    require_positive_int("length", length)
    require_positive_int("num_candidates", num_candidates)
    # The decode kernels take at most DECODE_QUERIES queries.
    if length * num_candidates >= DECODE_QUERIES:
        expected = f"at most {DECODE_QUERIES - 1} draft tokens in total"
        got = f"{shown(num_candidates)} of {shown(length)}"
        raise ValueError(f"length, num_candidates: expected {expected}, got {got}")


def num_nodes(speculation: Speculation | None) -> int:
    """Tokens that a decode step feeds per row: the newest token and its drafts."""
    return 1 if speculation is None else 1 + speculation.length * speculation.num_candidates


def ancestors(speculation: Speculation) -> Array | None:
    """The tree mask, bool ``[T, T]``, whose nodes are the newest token and then the candidates, one by one.

    None for a single candidate, whose tree is a chain.
    """
    if speculation.num_candidates == 1:
        return None
    node = jnp.arange(num_nodes(speculation), dtype=jnp.int32)
    candidate = (node - 1) // speculation.length  # -1: the newest token, the root
    same_path = (candidate[:, None] == candidate[None]) | (node == 0)[None]
    return same_path & (node[None] <= node[:, None])


def depths(speculation: Speculation) -> Array:
    """int32 ``[T]``: depth of each node of the tree; 0 is the newest token."""
    steps = jnp.arange(speculation.length, dtype=jnp.int32) + 1
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.tile(steps, speculation.num_candidates)])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TreeVerification:
    """Progress of verification down the tree.

    Attributes:
      depth: int32 scalar, tokens sampled so far.
      accepted: bool ``[B, C]``, candidates that equal all of them.
      active: bool ``[B]``, rows that sample their next token from the logits at :meth:`node`.
    """

    depth: Array
    accepted: Array
    active: Array

    def node(self, speculation: Speculation) -> Array:
        """int32 ``[B]``: the node whose logits give the next token."""
        candidate = lax.argmax(self.accepted, 1, jnp.int32)
        return jnp.where(self.depth == 0, 0, 1 + candidate * speculation.length + self.depth - 1)

    def advance(self, drafts: Array, token: Array, running: Array) -> "TreeVerification":
        """Descends one level in ``running`` rows (bool ``[B]``) where a draft equals ``token`` (int32 ``[B]``)."""
        at = jnp.minimum(self.depth, drafts.shape[2] - 1)
        drafted = lax.dynamic_index_in_dim(drafts, at, axis=2, keepdims=False)
        accepted = self.accepted & (drafted == token[:, None]) & (self.depth < drafts.shape[2])
        # A row that stops keeps the last candidate it accepted.
        return TreeVerification(
            self.depth + 1,
            jnp.where(accepted.any(1, keepdims=True), accepted, self.accepted),
            self.active & running & accepted.any(1),
        )


def speculated_rows(rows: RowState, speculation: Speculation) -> Array:
    """bool ``[B]``: running rows that may use drafts and have room for a whole tree; a guided pair agrees."""
    fits = (rows.status == RUNNING) & ~rows.alone & (rows.length - 1 + num_nodes(speculation) <= rows.tokens.shape[1])
    return (fits & fits[rows.request.partner])[rows.request.leader]
