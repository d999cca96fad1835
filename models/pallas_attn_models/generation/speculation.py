"""Speculation: several tokens drafted cheaply, and checked by one call of the model.

The check draws the new tokens one after the other exactly as plain decoding does, from the same logits with the same
key (seed and index of the token), and a draft is worth something for as long as it says what was drawn. So what comes
out is what plain decoding gives, for drafts of any kind, at any temperature, and in every row on its own; drafts decide
only how many tokens a call brings. The logits are the same but for rounding, as for any other number of queries.

A draft model draws with the same keys too: where the model takes the largest of log p + g, it takes the largest of
log q + g with the same Gumbel noise g (Daliri, Musco and Suresh 2024, arXiv:2408.07978). These agree with probability
sum_i 1 / sum_j max(p_j / p_i, q_j / q_i) (Moulton and Jiang 2018, arXiv:1809.04052), which is never less than the
sum_i p_i q_i of independent draws, nor than (1 - d) / (1 + d), where d is the total variation distance of p and q; of
ways to draw that do not know both of p and q, none can promise more. Rejection sampling (Leviathan et al. 2022,
arXiv:2211.17192) knows both and accepts with probability 1 - d, the most there is, so it accepts up to 1 + d times as
often, and never less often. But its tokens depend on the drafts: the same seed gives others than without them.
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
from pallas_attn_models.generation.drawing import draw
from pallas_attn_models.generation.rows import FREE, INVALID, RUNNING, Rows, State


class Speculation(Protocol):
    """Drafts ``num_candidates`` ways for a row to go on, of ``length`` tokens each."""

    @property
    def length(self) -> int: ...

    @property
    def num_candidates(self) -> int: ...

    @property
    def draft_model(self) -> Decoder | None:
        """The decoder that :meth:`draft` needs, or None."""
        ...

    def draft(self, state: State, may: Array, feed: "Feed") -> tuple[State, Array, Array]:
        """Drafts for the rows that can use them.

        Args:
          state: of the Generator.
          may: bool ``[B]``: which rows these are.
          feed: runs the draft model.

        Returns:
          The state, int32 ``[B, num_candidates, length]``, and bool ``[B]``: rows that have drafts. Whatever the drafts
          are, they change no result.
        """
        ...


# tokens, positions [B, T] and state -> state and the draft model's logits for the last of them, [B, V].
Feed = Callable[[Array, Array, State], tuple[State, Array]]


@dataclasses.dataclass(frozen=True)
class PromptLookup:
    """Drafts what followed the last tokens where they stood before, in the prompt or after it.

    Prompt lookup decoding (Saxena 2023; LLMA, Yang et al. 2023, arXiv:2304.04487): no model, for text that repeats
    itself or its prompt. Searches all tokens of a row on the device.

    Attributes:
      length: tokens of a draft.
      ngram: of the places where the last token stood before, the one is taken where most tokens up to it are the last
        ones, but no more than so many are compared; of equals the latest.
      num_candidates: different ways to go on that are checked at once, as a tree, each from a place of its own; no two
        begin with the same token.

    Raises:
      ValueError: a number below 1, or more than 15 tokens together.
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
        """What may follow the first ``length`` int32 ``[B]`` of ``tokens`` int32 ``[B, P]``.

        Returns:
          int32 ``[B, num_candidates, length]``, the best candidates first, -1 where there is none; and bool ``[B]``:
          rows that have one.
        """
        places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        last = length[:, None] - 1
        agree = jnp.zeros(tokens.shape, jnp.int32)
        agrees = places < last
        for back in range(min(self.ngram, tokens.shape[1])):  # no more tokens can agree
            newest = jnp.take_along_axis(tokens, jnp.maximum(last - back, 0), axis=1)
            earlier = jnp.pad(tokens, ((0, 0), (back, 0)))[:, : tokens.shape[1]]
            agrees = agrees & (earlier == newest) & (places >= back)
            agree = agree + agrees.astype(jnp.int32)
        # More agreement first, then the later place.
        rank = jnp.where(agree > 0, agree * tokens.shape[1] + places, -1)
        following = jnp.pad(tokens, ((0, 0), (0, 1)))[:, 1:]
        drafts = []
        for _ in range(self.num_candidates):
            place = lax.argmax(rank, 1, jnp.int32)[:, None]
            exists = jnp.take_along_axis(rank, place, axis=1) >= 0
            # What repeats itself is taken to go on doing so.
            period = jnp.maximum(last - place, 1)
            ahead = jnp.arange(self.length, dtype=jnp.int32)[None] % period
            draft = jnp.take_along_axis(tokens, jnp.minimum(place + 1 + ahead, tokens.shape[1] - 1), axis=1)
            drafts.append(jnp.where(exists, draft, -1))
            rank = jnp.where(following == draft[:, :1], -1, rank)
        return jnp.stack(drafts, axis=1), drafts[0][:, 0] >= 0


@dataclasses.dataclass(frozen=True, eq=False)
class DraftModel:
    """Drafts what a smaller decoder of the same vocabulary would draw, with caches of its own.

    Speculative decoding (Leviathan et al. 2022, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318).

    Attributes:
      model: the decoder. Its weights are taken when the weights of the model are.
      length: tokens of a draft.

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

        def another(carry: tuple[State, Rows], _: None) -> tuple[tuple[State, Rows], None]:
            state, rows = carry
            # The newest token, and the one before it where it is unread: the last of a draft that was right to the end.
            newest = rows.length[:, None] - 1
            pair = jnp.concatenate([newest - 1, newest], axis=1)
            unread = (pair >= state.caches[-1].lengths[:, None]) & (rows.status == RUNNING)[:, None]
            tokens = jnp.take_along_axis(rows.tokens, jnp.maximum(pair, 0), axis=1)
            state, logits = feed(tokens, jnp.where(unread, pair, -1), state)
            return (state, draw(rows, logits)[0]), None

        (state, drawn), _ = lax.scan(another, (state, rows), length=self.length)
        new = rows.length[:, None] + jnp.arange(self.length, dtype=jnp.int32)[None]
        drafts = jnp.take_along_axis(drawn.tokens, jnp.minimum(new, drawn.tokens.shape[1] - 1), axis=1)
        return state, drafts[:, None], may & (drawn.status != INVALID)


def check_speculation(speculation: object) -> None:
    """Raises an error that names the argument unless it is a :class:`Speculation`."""
    parts = ("length", "num_candidates", "draft_model", "draft")
    if isinstance(speculation, type) or not all(hasattr(speculation, name) for name in parts):
        got = speculation.__name__ + " itself" if isinstance(speculation, type) else type(speculation).__name__
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
    # More queries at once than that would not be decode any more.
    if length * num_candidates >= DECODE_QUERIES:
        wanted = f"at most {DECODE_QUERIES - 1} drafted tokens together"
        got = f"{shown(num_candidates)} of {shown(length)}"
        raise ValueError(f"length, num_candidates: expected {wanted}, got {got}")


def num_nodes(speculation: Speculation | None) -> int:
    """How many tokens a step of decode feeds: the newest, and what is drafted after it."""
    return 1 if speculation is None else 1 + speculation.length * speculation.num_candidates


def ancestors(speculation: Speculation) -> Array | None:
    """Who is before whom in the tree of drafts, bool ``[T, T]``: the newest token, then the candidates, one by one.

    None for one candidate, where every node is before all that follow.
    """
    if speculation.num_candidates == 1:
        return None
    node = jnp.arange(num_nodes(speculation), dtype=jnp.int32)
    candidate = (node - 1) // speculation.length  # -1: the newest token, which is before all
    before = (candidate[:, None] == candidate[None]) | (node == 0)[None]
    return before & (node[None] <= node[:, None])


def depths(speculation: Speculation) -> Array:
    """int32 ``[T]``: how far after the newest token each node stands."""
    steps = jnp.arange(speculation.length, dtype=jnp.int32) + 1
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.tile(steps, speculation.num_candidates)])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Walk:
    """How far a check has come down the tree.

    Attributes:
      depth: int32 scalar, tokens that were drawn.
      right: bool ``[B, C]``, the candidates that have said all of them so far.
      going: bool ``[B]``, the rows that draw from the logits at :meth:`node`.
    """

    depth: Array
    right: Array
    going: Array

    def node(self, speculation: Speculation) -> Array:
        """int32 ``[B]``: the node whose logits the next token comes from."""
        candidate = lax.argmax(self.right, 1, jnp.int32)
        return jnp.where(self.depth == 0, 0, 1 + candidate * speculation.length + self.depth - 1)

    def after(self, drafts: Array, token: Array, running: Array) -> "Walk":
        """One deeper, where a candidate says ``token`` int32 ``[B]`` and the row is still ``running`` bool ``[B]``."""
        at = jnp.minimum(self.depth, drafts.shape[2] - 1)
        said = lax.dynamic_index_in_dim(drafts, at, axis=2, keepdims=False)
        right = self.right & (said == token[:, None]) & (self.depth < drafts.shape[2])
        # The candidate that a row followed stays known when it ends.
        return Walk(
            self.depth + 1,
            jnp.where(right.any(1, keepdims=True), right, self.right),
            self.going & running & right.any(1),
        )


def speculated_rows(rows: Rows, speculation: Speculation) -> Array:
    """bool ``[B]``: running rows with room for a whole tree that may have drafts; of a guided pair, both or none."""
    fits = (rows.status == RUNNING) & ~rows.alone & (rows.length - 1 + num_nodes(speculation) <= rows.tokens.shape[1])
    return (fits & fits[rows.request.partner])[rows.request.leader]
