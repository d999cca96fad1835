"""The functions that a Generator compiles: prefill, decode and score.

Everything that differs between calls (rows, lengths, budgets, sampling settings, stop conditions) is data.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_attn.caches import row_index
from pallas_attn_models.decoder import Decoder, DecoderOutput, LayerCaches
from pallas_attn_models.generation.sampling import count_prompt
from pallas_attn_models.generation.speculation import Speculation, TreeVerification, ancestors, depths, speculated_rows
from pallas_attn_models.generation.state import (
    CAPACITY,
    FREE,
    INVALID,
    PREFILLING,
    RUNNING,
    DecodeOutput,
    PrefillBatch,
    RowState,
    State,
)
from pallas_attn_models.generation.token_log import TokenLog
from pallas_attn_models.generation.token_step import sample_step

# Capacity of a DecodeOutput in new tokens per row; decode returns to Python after at most this many steps.
OUTPUT_WIDTH = 64


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A decoder without its weights, and the location of its caches.

    Attributes:
      bind: builds the decoder from weights, in the form in which the executables receive them.
      caches: the slice of the state's caches that belongs to its layers.
      layer_hook: see :class:`~pallas_attn_models.decoder.Decoder`.
    """

    bind: Callable[[Any], Decoder]
    caches: slice
    layer_hook: Callable[[int, Array], Array] | None = None

    def with_weights(self, weights: Any) -> "BoundModel":
        """The decoder with these weights."""
        return BoundModel(self, self.bind(weights))


@dataclasses.dataclass(frozen=True)
class BoundModel:
    """A decoder with weights that runs on the caches of a state."""

    spec: ModelSpec
    decoder: Decoder

    def __call__(self, tokens: Array, positions: Array, state: State, **options: Any) -> tuple[State, Array]:
        """The state after these tokens, and the last layer's output ``[.., T, E]``; arguments as for Decoder."""
        hook, own = self.spec.layer_hook, self.spec.caches
        out = self.decoder(tokens, positions, state.caches[own], layer_hook=hook, apply_head=False, **options)
        return _with_output(state, state.caches.replaced(own, out.caches or ()), out), out.hidden


# --- prefill ---


def prefill(specs: Sequence[ModelSpec], weights: Sequence[Any], state: State, batch: PrefillBatch) -> State:
    """Runs the batch. The last token of a prompt is left to decode, which feeds it first."""
    models = [spec.with_weights(x) for spec, x in zip(specs, weights, strict=True)]
    state = _admit(state, batch)

    def run(_: Array, state: State) -> State:
        for model in models:
            state, _ = _prefill_chunk(model, state, batch)
        return state

    # A loop of at most one iteration: a batch without tokens costs nothing.
    iterations = (jnp.asarray(batch.count) > 0).any().astype(jnp.int32)
    return _start(_record_prompt(lax.fori_loop(0, iterations, run, state), batch), batch)


def score(
    specs: Sequence[ModelSpec], weights: Sequence[Any], state: State, batch: PrefillBatch
) -> tuple[State, Array, Array]:
    """Like prefill; also returns logits after each token ``[R, C, V]`` and log-probabilities of the next ``[R, C]``.

    Both are float32. The log-probability after the last token of a prompt is meaningless.
    """
    model = specs[0].with_weights(weights[0])
    state, hidden = _prefill_chunk(model, _admit(state, batch), batch)
    logits = model.decoder.logits(hidden)
    targets = _with_next_token(batch)[:, 1:, None]
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), targets, axis=-1)[..., 0]
    return _start(_record_prompt(state, batch), batch), logits, logprobs


def _admit(state: State, batch: PrefillBatch) -> State:
    """Clears released and admitted rows, and stores the requests of the admitted ones."""
    admitted, emptied = jnp.asarray(batch.admitted), jnp.asarray(batch.admitted | batch.released)

    def where_admitted(new: Array, old: Array) -> Array:
        return jnp.where(admitted.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    rows = state.rows
    rows = dataclasses.replace(
        rows,
        status=jnp.where(admitted, PREFILLING, jnp.where(batch.released, FREE, rows.status)),
        length=jnp.where(emptied, 0, rows.length),
        counts=jnp.where(admitted[:, None], 0, rows.counts),
        matched=jnp.where(emptied, 0, rows.matched),
        request=jax.tree.map(where_admitted, batch.request, rows.request),
    )
    rows = _cleared(rows, jnp.asarray(batch.released) & ~admitted)
    return dataclasses.replace(state, rows=rows, caches=_emptied(state.caches, emptied))


def _prefill_chunk(model: BoundModel, state: State, batch: PrefillBatch) -> tuple[State, Array]:
    """Runs the decoder on the batch's chunks, which enter the caches of their rows."""
    start = state.rows.length.at[batch.rows].get(mode="fill", fill_value=0)[:, None]
    index = jnp.arange(batch.tokens.shape[1], dtype=jnp.int32)[None]
    positions = jnp.where(index < jnp.asarray(batch.count)[:, None], start + index, -1)
    return model(jnp.asarray(batch.tokens), positions, state, rows=jnp.asarray(batch.rows))


def _record_prompt(state: State, batch: PrefillBatch) -> State:
    """Appends the prefilled tokens, and the one after them, to the rows."""
    rows, tokens = state.rows, _with_next_token(batch)
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    count, next_token = (jnp.asarray(x)[:, None] for x in (batch.count, batch.next_token))
    known = (index < count) | ((index == count) & (next_token >= 0))
    batch_size, max_length = rows.tokens.shape

    def scatter(x: Array) -> Array:  # [R, ..] -> [B, ..]
        return jnp.zeros((batch_size, *x.shape[1:]), x.dtype).at[batch.rows].set(x, mode="drop")

    tokens, known = scatter(tokens), scatter(known)
    column = jnp.where(known, rows.length[:, None] + index, max_length)  # max_length is out of bounds: dropped
    row = lax.broadcasted_iota(jnp.int32, column.shape, 0)
    rows = dataclasses.replace(
        rows,
        tokens=rows.tokens.at[row, column].set(tokens, mode="drop"),
        length=rows.length + scatter(count)[:, 0],
        counts=count_prompt(rows.counts, tokens, known),
    )
    return dataclasses.replace(state, rows=rows)


def _with_next_token(batch: PrefillBatch) -> Array:
    """int32 ``[R, C + 1]``: each chunk followed by its next token, then zeros."""
    tokens = jnp.pad(jnp.asarray(batch.tokens), ((0, 0), (0, 1)))
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    next_token = jnp.maximum(jnp.asarray(batch.next_token), 0)[:, None]
    return jnp.where(index == jnp.asarray(batch.count)[:, None], next_token, tokens)


def _start(state: State, batch: PrefillBatch) -> State:
    """Copies prefilled rows to the samples that share a prompt, and starts decoding in rows with a complete prompt."""
    rows = state.rows
    before = state.caches.map(lambda cache: cache.row_data), (rows.status, rows.tokens, rows.length, rows.counts)
    pairs = (jnp.asarray(x) for x in (batch.sources, batch.targets, batch.num_copies))
    row_data, (status, tokens, length, counts) = row_index.copy(before, *pairs)
    caches = state.caches.map(lambda cache, rows: cache.with_row_data(rows), row_data)
    rows = dataclasses.replace(
        rows,
        status=jnp.where(batch.started & (status == PREFILLING), RUNNING, status),
        tokens=tokens,
        length=jnp.where(batch.started, rows.request.prompt_length, length),
        counts=counts,
    )
    return dataclasses.replace(state, rows=rows, caches=caches)


# --- decode ---


def decode(
    specs: Sequence[ModelSpec],
    speculation: Speculation | None,
    weights: Sequence[Any],
    state: State,
    steps: Array,
    eager: Array,
) -> tuple[State, DecodeOutput]:
    """Takes up to ``steps`` (int32 scalar) decode steps with all running rows, while the output has room.

    Stops early when no row is running or, if ``eager`` (bool scalar), when a row finishes, so that a queued request can
    take it. Clears the caches of finished rows.
    """
    models = [spec.with_weights(x) for spec, x in zip(specs, weights, strict=True)]
    before = state.rows.status == RUNNING
    tokens_per_step = 1 if speculation is None else 1 + speculation.length

    def step(carry: tuple[Array, State, TokenLog]) -> tuple[Array, State, TokenLog]:
        number, state, log = carry
        running = (state.rows.status == RUNNING).sum(dtype=jnp.int32)
        state = dataclasses.replace(state, counters=state.counters.plus(row_steps=running))
        if speculation is None:
            state, log = _advance(models[0], state, log)
        else:
            state, log = _speculate(models, speculation, state, log)
        return number + 1, state, log

    def should_continue(carry: tuple[Array, State, TokenLog]) -> Array:
        number, state, log = carry
        running = state.rows.status == RUNNING
        has_room = (state.rows.num_new - log.first).max() + tokens_per_step <= OUTPUT_WIDTH
        return (number < steps) & has_room & running.any() & ~(eager & (before & ~running).any())

    log = TokenLog.empty(state.rows.num_new, OUTPUT_WIDTH, state.rows.request.sampling.limits.top_logprobs)
    _, state, log = lax.while_loop(should_continue, step, (jnp.int32(0), state, log))
    done = before & (state.rows.status != RUNNING)
    caches, rows = _emptied(state.caches, done), _cleared(state.rows, done)
    output = DecodeOutput(
        status=rows.status,
        num_new=rows.num_new,
        matched=rows.matched,
        first=log.first,
        counters=state.counters.digits,
        **log.fields(),
    )
    return dataclasses.replace(state, caches=caches, rows=rows), output


def _advance(model: BoundModel, state: State, log: TokenLog) -> tuple[State, TokenLog]:
    """One new token for every running row."""
    rows = state.rows
    newest = jnp.maximum(rows.length - 1, 0)[:, None]
    row = lax.broadcasted_iota(jnp.int32, newest.shape, 0)
    tokens = rows.tokens.at[row, newest].get(mode="promise_in_bounds")
    # Other rows feed padding, which leaves their caches unchanged and their lists of KV blocks empty.
    positions = jnp.where((rows.status == RUNNING)[:, None], newest, -1)
    state, hidden = model(tokens, positions, state)
    return _sample_next(state, log, model.decoder.logits(hidden)[:, 0])


def _speculate(
    models: Sequence[BoundModel], speculation: Speculation, state: State, log: TokenLog
) -> tuple[State, TokenLog]:
    """One new token for every running row, plus one for each accepted draft token."""
    state, drafts, found = speculation.draft(state, speculated_rows(state.rows, speculation), _feed(models[-1]))
    model, before = models[0], state.rows
    running, leader = before.status == RUNNING, before.request.leader
    shape = (len(running), speculation.num_candidates, speculation.length)
    if (drafts.shape, drafts.dtype, found.shape, found.dtype) != (shape, jnp.int32, running.shape, jnp.bool_):
        got = f"{drafts.dtype} {list(drafts.shape)} and {found.dtype} {list(found.shape)}"
        raise ValueError(f"speculation.draft: expected int32 {list(shape)} and bool {list(running.shape)}, got {got}")
    # Both rows of a guided pair verify the leader's drafts.
    drafts, found = drafts[leader], found[leader] & running

    last = jnp.maximum(before.length - 1, 0)[:, None]
    tokens = jnp.concatenate(
        [jnp.take_along_axis(before.tokens, last, axis=1), drafts.reshape(len(drafts), -1)], axis=1
    )
    depth = depths(speculation)[None]
    positions = jnp.where(running[:, None] & ((depth == 0) | found[:, None]), last + depth, -1)
    state, hidden = model(jnp.maximum(tokens, 0), positions, state, tree=ancestors(speculation))
    logits = model.decoder.logits(hidden)

    def deeper(carry: tuple[TreeVerification, State, TokenLog]) -> tuple[TreeVerification, State, TokenLog]:
        verification, state, log = carry
        node = verification.node(speculation)[:, None, None]
        state, log = _sample_next(state, log, jnp.take_along_axis(logits, node, axis=1)[:, 0], verification.active)
        newest = jnp.take_along_axis(state.rows.tokens, jnp.maximum(state.rows.length - 1, 0)[:, None], axis=1)[:, 0]
        return verification.advance(drafts, newest, state.rows.status == RUNNING), state, log

    accepted = jnp.broadcast_to(found[:, None], drafts.shape[:2])
    start = TreeVerification(jnp.int32(0), accepted, running & (state.rows.status == RUNNING)), state, log
    verification, state, log = lax.while_loop(lambda carry: carry[0].active.any(), deeper, start)

    # Masked keys have probability 0, but 0 * NaN is NaN: a rejected draft may have contaminated valid logits. Repeat
    # the step without drafts to find out.
    doubtful = found & (state.rows.status == INVALID)
    rows = dataclasses.replace(state.rows, status=jnp.where(doubtful, RUNNING, state.rows.status), alone=doubtful)
    state = dataclasses.replace(state, rows=rows)
    new = state.rows.length - before.length
    caches = _kept(state.caches, speculation, verification, before.length - 1, jnp.where(running, new, 0), running)
    counters = state.counters.plus(
        drafted=found.sum(dtype=jnp.int32) * speculation.length,
        accepted=jnp.maximum(new - 1, 0).sum(dtype=jnp.int32),
    )
    return dataclasses.replace(state, caches=caches, counters=counters), log


def _feed(model: BoundModel) -> Callable[[Array, Array, State], tuple[State, Array]]:
    """Runs a draft model; see :class:`~pallas_attn_models.generation.speculation.Speculation`."""

    def feed(tokens: Array, positions: Array, state: State) -> tuple[State, Array]:
        state, hidden = model(tokens, positions, state)
        return state, model.decoder.logits(hidden[:, -1:])[:, 0]

    return feed


def _kept(
    caches: LayerCaches,
    speculation: Speculation,
    verification: TreeVerification,
    first: Array,
    new: Array,
    running: Array,
) -> LayerCaches:
    """The caches without rejected drafts: keeps ``new`` tokens from index ``first`` on, both int32 ``[B]``."""
    if speculation.num_candidates == 1:
        return caches.map(lambda cache: cache.truncate(jnp.where(running, first + new, cache.lengths)))
    path = jnp.arange(speculation.length + 1, dtype=jnp.int32)[None]
    candidate = lax.argmax(verification.accepted, 1, jnp.int32)[:, None]
    path = jnp.where(path == 0, 0, path + candidate * speculation.length)
    return caches.map(lambda cache: cache.keep(jnp.where(running, first, cache.lengths), path, new))


def _sample_next(state: State, log: TokenLog, logits: Array, live: Array | None = None) -> tuple[State, TokenLog]:
    """Samples the next token of the running (or ``live``) rows and logs it."""
    rows, entries, written = sample_step(state.rows, logits, live)
    return dataclasses.replace(state, rows=rows), log.plus(entries, written, rows.num_new - 1)


# --- caches ---


def _cleared(rows: RowState, done: Array) -> RowState:
    """The rows after resetting guidance and sampling settings in those that are done."""
    request, own = rows.request, jnp.arange(done.shape[0], dtype=jnp.int32)
    request = dataclasses.replace(
        request,
        leader=jnp.where(done, own, request.leader),
        partner=jnp.where(done, own, request.partner),
        sampling=request.sampling.cleared(done),
    )
    return dataclasses.replace(rows, request=request)


def _emptied(caches: LayerCaches, rows: Array) -> LayerCaches:
    """The caches after clearing ``rows`` bool ``[B]``; without such rows, as in most calls, nothing is computed."""
    iterations = rows.any().astype(jnp.int32)
    return lax.fori_loop(0, iterations, lambda _, caches: caches.map(lambda cache: cache.reset(rows)), caches)


def _with_output(state: State, caches: LayerCaches, out: DecoderOutput) -> State:
    """The state after a decoder call: stores the caches and counts the KV blocks.

    A row whose cache overflowed is finished, because it lacks tokens that later queries must see.
    """
    counters = state.counters
    for mask in out.block_masks:
        live = (mask.q_positions >= 0).any(-1).sum(dtype=jnp.int32)
        counters = counters.plus(
            kv_blocks_visited=mask.num_active.sum(dtype=jnp.int32),
            kv_blocks_total=live * (mask.num_active.shape[1] * math.prod(mask.grid)),
        )
    rows, request = state.rows, state.rows.request
    overflowed = functools.reduce(jnp.logical_or, (cache.overflowed for cache in caches.distinct))
    overflowed = (overflowed | overflowed[request.partner])[request.leader]
    ends = overflowed & ((rows.status == PREFILLING) | (rows.status == RUNNING))
    rows = dataclasses.replace(rows, status=jnp.where(ends, CAPACITY, rows.status))
    return State(caches, rows, counters)
