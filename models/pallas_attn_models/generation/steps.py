"""The functions that a Generator compiles: prefill reads prompts, decode draws tokens, score does what its name says.

Whatever differs between calls (whose prompt is read, lengths, budgets, sampling, what ends a row) is data.
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
from pallas_attn_models.decoder import Decoder, DecoderOutput
from pallas_attn_models.generation.drawing import draw
from pallas_attn_models.generation.rows import CAPACITY, FREE, INVALID, READING, RUNNING, Report, Rows, State, Work
from pallas_attn_models.generation.sampling import Drawn, count_prompt, sample
from pallas_attn_models.generation.speculation import Speculation, Walk, ancestors, depths, speculated_rows

# New tokens of a row that one report can hold, so decode comes back to Python after as many steps.
REPORT_WIDTH = 64


@dataclasses.dataclass(frozen=True)
class Network:
    """A decoder without its weights, and where its caches are.

    Attributes:
      bind: from the weights, in whatever form they are passed to the executables, to the decoder.
      caches: which of the state's caches are those of its layers.
      layer_hook: see :class:`~pallas_attn_models.decoder.Decoder`.
    """

    bind: Callable[[Any], Decoder]
    caches: slice
    layer_hook: Callable[[int, Array], Array] | None = None

    def with_weights(self, weights: Any) -> "Forward":
        """Ready to run."""
        return Forward(self, self.bind(weights))


@dataclasses.dataclass(frozen=True)
class Forward:
    """A decoder that reads tokens into the caches of a state."""

    network: Network
    model: Decoder

    def __call__(self, tokens: Array, positions: Array, state: State, **options: Any) -> tuple[State, Array]:
        """The state with these tokens in its caches, and ``[.., T, E]`` from the last layer; arguments of Decoder."""
        caches, own = [*state.caches], self.network.caches
        hook = self.network.layer_hook
        out = self.model(tokens, positions, caches[own], layer_hook=hook, apply_head=False, **options)
        caches[own] = out.caches or ()
        return _with_output(state, tuple(caches), out), out.hidden


# --- prompts ---


def prefill(networks: Sequence[Network], weights: Sequence[Any], state: State, work: Work) -> State:
    """Does ``work``. The last token of a prompt is not read: it is the first that decode feeds."""
    forwards = [network.with_weights(x) for network, x in zip(networks, weights, strict=True)]
    state = _admit(state, work)

    def read(_: Array, state: State) -> State:
        for forward in forwards:
            state, _ = _read(forward, state, work)
        return state

    # A loop of one turn or none: where nothing is to be read, nothing is computed.
    turns = (jnp.asarray(work.count) > 0).any().astype(jnp.int32)
    return _start(_note(lax.fori_loop(0, turns, read, state), work), work)


def score(networks: Sequence[Network], weights: Sequence[Any], state: State, work: Work) -> tuple[State, Array, Array]:
    """Like prefill; also the logits after each token ``[R, C, V]`` and what they give the next one ``[R, C]``, float32.

    The latter are log-probabilities; they mean nothing after the last token.
    """
    forward = networks[0].with_weights(weights[0])
    state, hidden = _read(forward, _admit(state, work), work)
    logits = forward.model.logits(hidden)
    following = _with_following(work)[:, 1:, None]
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), following, axis=-1)[..., 0]
    return _start(_note(state, work), work), logits, logprobs


def _admit(state: State, work: Work) -> State:
    """Empties the rows that are given back or begin anew, and says what the latter are asked for."""
    admitted, emptied = jnp.asarray(work.admitted), jnp.asarray(work.admitted | work.released)

    def where_admitted(new: Array, old: Array) -> Array:
        return jnp.where(admitted.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    rows = state.rows
    rows = dataclasses.replace(
        rows,
        status=jnp.where(admitted, READING, jnp.where(work.released, FREE, rows.status)),
        length=jnp.where(emptied, 0, rows.length),
        counts=jnp.where(admitted[:, None], 0, rows.counts),
        matched=jnp.where(emptied, 0, rows.matched),
        request=jax.tree.map(where_admitted, work.request, rows.request),
    )
    rows = _cleared(rows, jnp.asarray(work.released) & ~admitted)
    return dataclasses.replace(state, rows=rows, caches=_emptied(state.caches, emptied))


def _read(forward: Forward, state: State, work: Work) -> tuple[State, Array]:
    """Reads the prompts' next tokens into the caches of their rows."""
    start = state.rows.length.at[work.rows].get(mode="fill", fill_value=0)[:, None]
    index = jnp.arange(work.tokens.shape[1], dtype=jnp.int32)[None]
    positions = jnp.where(index < jnp.asarray(work.count)[:, None], start + index, -1)
    return forward(jnp.asarray(work.tokens), positions, state, rows=jnp.asarray(work.rows))


def _note(state: State, work: Work) -> State:
    """Writes down the tokens that were read, and the one after them."""
    rows, tokens = state.rows, _with_following(work)
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    count, following = (jnp.asarray(x)[:, None] for x in (work.count, work.following))
    known = (index < count) | ((index == count) & (following >= 0))
    batch_size, max_length = rows.tokens.shape

    def of_all(x: Array) -> Array:
        return jnp.zeros((batch_size, *x.shape[1:]), x.dtype).at[work.rows].set(x, mode="drop")

    tokens, known = of_all(tokens), of_all(known)
    place = jnp.where(known, rows.length[:, None] + index, max_length)  # beyond the last there is no place
    row = lax.broadcasted_iota(jnp.int32, place.shape, 0)
    rows = dataclasses.replace(
        rows,
        tokens=rows.tokens.at[row, place].set(tokens, mode="drop"),
        length=rows.length + of_all(count)[:, 0],
        counts=count_prompt(rows.counts, tokens, known),
    )
    return dataclasses.replace(state, rows=rows)


def _with_following(work: Work) -> Array:
    """int32 ``[R, C + 1]``: the tokens, and after them the following one; the rest is 0."""
    tokens = jnp.pad(jnp.asarray(work.tokens), ((0, 0), (0, 1)))
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    following = jnp.maximum(jnp.asarray(work.following), 0)[:, None]
    return jnp.where(index == jnp.asarray(work.count)[:, None], following, tokens)


def _start(state: State, work: Work) -> State:
    """Copies rows for the samples that share a prompt, and lets those that have theirs draw."""
    sources, targets = jnp.asarray(work.sources), jnp.asarray(work.targets)
    caches = tuple(cache.copy_rows(sources, targets, jnp.asarray(work.num_copies)) for cache in state.caches)
    rows = state.rows
    read = (rows.status, rows.tokens, rows.length, rows.counts)
    status, tokens, length, counts = row_index.copy(read, sources, targets, jnp.asarray(work.num_copies))
    rows = dataclasses.replace(
        rows,
        status=jnp.where(work.started & (status == READING), RUNNING, status),
        tokens=tokens,
        length=jnp.where(work.started, rows.request.prompt_length, length),
        counts=counts,
    )
    return dataclasses.replace(state, rows=rows, caches=caches)


# --- new tokens ---


def decode(
    networks: Sequence[Network],
    speculation: Speculation | None,
    weights: Sequence[Any],
    state: State,
    steps: Array,
    eager: Array,
) -> tuple[State, Report]:
    """Takes up to ``steps`` (int32 scalar) steps with every row that is running, as long as the report has room.

    Ends as soon as none is running, or, if ``eager`` (bool scalar), as soon as one is done, to make room for another.
    Rows that are done leave the caches.
    """
    forwards = [network.with_weights(x) for network, x in zip(networks, weights, strict=True)]
    before = state.rows.status == RUNNING
    at_once = 1 if speculation is None else 1 + speculation.length

    def step(carry: tuple[Array, State, Report]) -> tuple[Array, State, Report]:
        number, state, report = carry
        turns = (state.rows.status == RUNNING).sum(dtype=jnp.int32)
        state = dataclasses.replace(state, tally=state.tally.plus(turns=turns))
        if speculation is None:
            state, report = _advance(forwards[0], state, report)
        else:
            state, report = _speculate(forwards, speculation, state, report)
        return number + 1, state, report

    def goes_on(carry: tuple[Array, State, Report]) -> Array:
        number, state, report = carry
        running = state.rows.status == RUNNING
        has_room = (state.rows.num_new - report.first).max() + at_once <= REPORT_WIDTH
        return (number < steps) & has_room & running.any() & ~(eager & (before & ~running).any())

    _, state, report = lax.while_loop(goes_on, step, (jnp.int32(0), state, _empty_report(state)))
    done = before & (state.rows.status != RUNNING)
    caches = _emptied(state.caches, done)
    rows = _cleared(state.rows, done)
    report = dataclasses.replace(
        report, status=rows.status, num_new=rows.num_new, matched=rows.matched, tally=state.tally.digits()
    )
    return dataclasses.replace(state, caches=caches, rows=rows), report


def _advance(forward: Forward, state: State, report: Report) -> tuple[State, Report]:
    """One token more for every running row."""
    rows = state.rows
    newest = jnp.maximum(rows.length - 1, 0)[:, None]
    tokens = jnp.take_along_axis(rows.tokens, newest, axis=1)
    # A row that is not running feeds padding, so its cache stays as it is and its list of blocks is empty.
    positions = jnp.where((rows.status == RUNNING)[:, None], newest, -1)
    state, hidden = forward(tokens, positions, state)
    return _drawn(state, report, forward.model.logits(hidden)[:, 0])


def _speculate(
    forwards: Sequence[Forward], speculation: Speculation, state: State, report: Report
) -> tuple[State, Report]:
    """As many tokens more for every running row as its drafts are right, and one."""
    state, drafts, found = speculation.draft(state, speculated_rows(state.rows, speculation), _feed(forwards[-1]))
    forward, before = forwards[0], state.rows
    running, leader = before.status == RUNNING, before.request.leader
    wanted = (len(running), speculation.num_candidates, speculation.length)
    if (drafts.shape, drafts.dtype, found.shape, found.dtype) != (wanted, jnp.int32, running.shape, jnp.bool_):
        got = f"{drafts.dtype} {list(drafts.shape)} and {found.dtype} {list(found.shape)}"
        raise ValueError(f"speculation.draft: expected int32 {list(wanted)} and bool {list(running.shape)}, got {got}")
    # Rows of a guided pair check the same drafts.
    drafts, found = drafts[leader], found[leader] & running

    last = jnp.maximum(before.length - 1, 0)[:, None]
    tokens = jnp.concatenate(
        [jnp.take_along_axis(before.tokens, last, axis=1), drafts.reshape(len(drafts), -1)], axis=1
    )
    depth = depths(speculation)[None]
    positions = jnp.where(running[:, None] & ((depth == 0) | found[:, None]), last + depth, -1)
    state, hidden = forward(jnp.maximum(tokens, 0), positions, state, tree=ancestors(speculation))
    logits = forward.model.logits(hidden)

    def deeper(carry: tuple[Walk, State, Report]) -> tuple[Walk, State, Report]:
        walk, state, report = carry
        node = walk.node(speculation)[:, None, None]
        state, report = _drawn(state, report, jnp.take_along_axis(logits, node, axis=1)[:, 0], walk.going)
        newest = jnp.take_along_axis(state.rows.tokens, jnp.maximum(state.rows.length - 1, 0)[:, None], axis=1)[:, 0]
        return walk.after(drafts, newest, state.rows.status == RUNNING), state, report

    right = jnp.broadcast_to(found[:, None], drafts.shape[:2])
    start = Walk(jnp.int32(0), right, running & (state.rows.status == RUNNING)), state, report
    walk, state, report = lax.while_loop(lambda carry: carry[0].going.any(), deeper, start)

    # Masked keys have probability 0, but 0 times NaN is NaN: a wrong draft may have spoiled what is right. The next
    # step, without drafts, will tell.
    doubtful = found & (state.rows.status == INVALID)
    rows = dataclasses.replace(state.rows, status=jnp.where(doubtful, RUNNING, state.rows.status), alone=doubtful)
    state = dataclasses.replace(state, rows=rows)
    new = state.rows.length - before.length
    caches = _kept(state.caches, speculation, walk, before.length - 1, jnp.where(running, new, 0), running)
    tally = state.tally.plus(
        drafted=found.sum(dtype=jnp.int32) * speculation.length,
        accepted=jnp.maximum(new - 1, 0).sum(dtype=jnp.int32),
    )
    return dataclasses.replace(state, caches=caches, tally=tally), report


def _feed(forward: Forward) -> Callable[[Array, Array, State], tuple[State, Array]]:
    """How a draft model is run; see :class:`~pallas_attn_models.generation.speculation.Speculation`."""

    def feed(tokens: Array, positions: Array, state: State) -> tuple[State, Array]:
        state, hidden = forward(tokens, positions, state)
        return state, forward.model.logits(hidden[:, -1:])[:, 0]

    return feed


def _kept(caches: tuple, speculation: Speculation, walk: Walk, first: Array, new: Array, running: Array) -> tuple:
    """The caches without the drafts that were wrong: ``new`` tokens stay, from number ``first`` on, int32 ``[B]``."""
    if speculation.num_candidates == 1:
        return tuple(cache.truncate(jnp.where(running, first + new, cache.lengths)) for cache in caches)
    path = jnp.arange(speculation.length + 1, dtype=jnp.int32)[None]
    candidate = lax.argmax(walk.right, 1, jnp.int32)[:, None]
    path = jnp.where(path == 0, 0, path + candidate * speculation.length)
    return tuple(cache.keep(jnp.where(running, first, cache.lengths), path, new) for cache in caches)


def _drawn(state: State, report: Report, logits: Array, live: Array | None = None) -> tuple[State, Report]:
    """The state after a draw, and the report with it."""
    before = state.rows
    rows, token, drawn = draw(before, logits, live)
    report = _noted(report, drawn, token, rows.length > before.length, before.num_new)
    return dataclasses.replace(state, rows=rows), report


def _empty_report(state: State) -> Report:
    rows = state.rows
    batch_size, vocab_size = rows.counts.shape
    shape = jax.ShapeDtypeStruct((batch_size, vocab_size), jnp.float32)
    drawn = jax.eval_shape(sample, shape, rows.request.sampling, rows.counts, rows.num_new)

    def wide(x: jax.ShapeDtypeStruct) -> Array:
        return jnp.zeros((batch_size, REPORT_WIDTH, *x.shape[1:]), x.dtype)

    return Report(
        status=rows.status,
        num_new=rows.num_new,
        matched=rows.matched,
        first=rows.num_new,
        tokens=wide(drawn.tokens),
        logprobs=wide(drawn.logprobs),
        top_tokens=wide(drawn.top_tokens),
        top_logprobs=wide(drawn.top_logprobs),
        tally=state.tally.digits(),
    )


def _noted(report: Report, drawn: Drawn, token: Array, running: Array, number: Array) -> Report:
    """The report with what was drawn as new token ``number`` int32 ``[B]`` of the running rows."""
    row = jnp.arange(token.shape[0], dtype=jnp.int32)
    place = jnp.where(running, number - report.first, REPORT_WIDTH)

    def put(into: Array, x: Array) -> Array:
        return into.at[row, place].set(x, mode="drop")

    return dataclasses.replace(
        report,
        tokens=put(report.tokens, token),
        logprobs=put(report.logprobs, drawn.logprobs),
        top_tokens=put(report.top_tokens, drawn.top_tokens),
        top_logprobs=put(report.top_logprobs, drawn.top_logprobs),
    )


# --- caches ---


def _cleared(rows: Rows, done: Array) -> Rows:
    """The rows, of which those that are done ask for nothing and belong to nobody."""
    request, own = rows.request, jnp.arange(done.shape[0], dtype=jnp.int32)
    request = dataclasses.replace(
        request,
        leader=jnp.where(done, own, request.leader),
        partner=jnp.where(done, own, request.partner),
        sampling=request.sampling.cleared(done),
    )
    return dataclasses.replace(rows, request=request)


def _emptied(caches: tuple, rows: Array) -> tuple:
    """The caches without what is in ``rows`` bool ``[B]``; most calls have none, and touch nothing."""
    turns = rows.any().astype(jnp.int32)
    return lax.fori_loop(0, turns, lambda _, caches: tuple(cache.reset(rows) for cache in caches), caches)


def _with_output(state: State, caches: tuple, out: DecoderOutput) -> State:
    """The state after a call of a model: the caches, and the KV blocks of its layers counted.

    A row for which a cache had no room is done: what it would see from now on is not what it should.
    """
    tally = state.tally
    for mask in out.block_masks:
        live = (mask.q_positions >= 0).any(-1).sum(dtype=jnp.int32)
        tally = tally.plus(
            kv_blocks_visited=mask.num_active.sum(dtype=jnp.int32),
            kv_blocks_total=live * (mask.num_active.shape[1] * math.prod(mask.grid)),
        )
    rows, request = state.rows, state.rows.request
    overflowed = functools.reduce(jnp.logical_or, (cache.overflowed for cache in caches))
    overflowed = (overflowed | overflowed[request.partner])[request.leader]
    ends = overflowed & ((rows.status == READING) | (rows.status == RUNNING))
    rows = dataclasses.replace(rows, status=jnp.where(ends, CAPACITY, rows.status))
    return State(caches, rows, tally)
