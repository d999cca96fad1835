"""Decode: few queries, so one row of the batch does not keep a machine busy, and several lanes run side by side.

The live blocks of all rows make one long list, of which every lane walks an equal stretch, one block per step: products
are then large enough to share out over the cores. Where a lane comes to a new row it starts a new softmax; what the
lanes that a row is cut over have of it is merged at the end (Flash-Decoding, Dao et al. 2023,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html).
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_attn.block_mask import BlockMask
from pallas_attn.kernels.xla.softmax import Softmax
from pallas_attn.kernels.xla.tiles import Cut, Program, as_it_is
from pallas_attn.schedule import Schedule
from pallas_attn.scores import Scores

# KV heads that a step works on, in all lanes together; and how many lanes there are at most, each compiled in full.
_HEADS = 16
_LANES = 4


@functools.partial(jax.jit, static_argnames=("scale",))
def decode(
    query: Array,
    key: Array,
    value: Array,
    block_mask: BlockMask,
    scores: Scores = (),
    sinks: Array | None = None,
    *,
    scale: float,
) -> tuple[Array, Array]:
    """Same contract as :func:`pallas_attn.kernels.reference.forward`, for a single block of queries.

    With ``block_sizes.chunk`` there is one lane, which cuts no row: a row's bits do not depend on the other rows.
    """
    cut = Cut.of(query, key, block_mask)
    precision = lax.Precision.HIGHEST if query.dtype == jnp.float32 else lax.Precision.DEFAULT
    tile = (cut.heads, cut.group, cut.q_block)
    rows = cut.batch * cut.list_heads
    num_active = jnp.broadcast_to(block_mask.num_active[..., 0], (cut.batch, cut.list_heads)).reshape(-1)
    blocks = Schedule.fixed(num_active, block_mask.indices.shape[-1], chunk=1)  # every program is a block
    most = blocks.row.shape[0]
    lanes = 1 if block_mask.block_sizes.chunk else min(max(1, _HEADS // cut.heads), _LANES, most)
    stretch = -(-blocks.total // lanes)
    q_of_rows = _queries_of_rows(query, cut) * scale

    def step(n: Array, carry: tuple[Softmax, Softmax]) -> tuple[Softmax, Softmax]:
        state, parts = carry
        q, k, v, seen, begins, places = [], [], [], [], [], []
        for lane in range(lanes):
            at = lane * stretch + n
            live = at < blocks.total
            at = jnp.minimum(at, most - 1)
            row, slot = blocks.row[at], blocks.first[at]
            program = Program(cut, block_mask, scores, (row // cut.list_heads, row % cut.list_heads, jnp.int32(0)))
            start, kv_positions, real = program.keys_at(program.first_key(slot))
            real = real & live
            q.append(q_of_rows[row])
            k.append(program.keys(key, start))
            # An empty slot may hold anything, NaN included, and 0 * NaN is NaN.
            v.append(jnp.where(real[:, None], program.keys(value, start), 0.0))
            seen.append((program, start, kv_positions, program.allowed(start, kv_positions, real)))
            begins.append((slot == 0) | (n == 0))
            # Lanes and their rows ascend together, so this place is theirs alone; the last one takes what is not live.
            places.append(jnp.where(live, row + lane, rows + lanes - 1))
        logits = jnp.einsum("phrd,phkd->phrk", jnp.stack(q), as_it_is(jnp.stack(k)), precision=precision)
        logits = logits.reshape(lanes, *tile, -1)
        if scores:
            scored = [
                program.score(x, kv_positions, program.score_operands(start))
                for x, (program, start, kv_positions, _) in zip(logits, seen, strict=True)
            ]
            logits = jnp.stack(scored)
        logits = jnp.where(jnp.stack([allowed for *_, allowed in seen]), logits, -jnp.inf)
        state = state.where(~jnp.stack(begins).reshape(-1, 1, 1, 1))
        peak, decay, weights = state.weigh(logits)
        total = state.total * decay + weights.sum(-1)
        weights = weights.reshape(lanes, cut.heads, -1, cut.kv_block)
        update = jnp.einsum("phrk,phkd->phrd", weights, jnp.stack(v), precision=precision)
        state = Softmax(peak, total, state.acc * decay[..., None] + update.reshape(state.acc.shape))
        for lane, place in enumerate(places):
            parts = jax.tree.map(lambda x, y, i=place, n=lane: x.at[i].set(y[n]), parts, state)
        return state, parts

    value_dim = value.shape[-1]
    carry = Softmax.empty((lanes, *tile), value_dim), Softmax.empty((rows + lanes, *tile), value_dim)
    _, parts = lax.fori_loop(0, stretch, step, carry)

    end = blocks.begin + blocks.count
    row, state = jnp.arange(rows), Softmax.empty((rows, *tile), value_dim)
    for lane in range(lanes):
        has_part = (blocks.begin < (lane + 1) * stretch) & (end > lane * stretch) & (blocks.count > 0)
        state = state.merge(parts.at(row + lane).where(has_part[:, None, None, None]))
    is_token = jnp.repeat(block_mask.q_positions >= 0, cut.list_heads, axis=0)[:, None, None]
    sink = None
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(cut.list_heads, cut.heads, cut.group, 1)
        sink = jnp.tile(sink, (cut.batch, 1, 1, 1))
    out, lse = state.finish(jnp.tile(is_token, (rows // is_token.shape[0], 1, 1, 1)), sink)
    return cut.join_queries(out.astype(query.dtype)), cut.join_queries(lse).swapaxes(1, 2)


def _queries_of_rows(query: Array, cut: Cut) -> Array:
    """``[B, T, N, D]`` to float32 ``[rows, heads, group * T, D]``."""
    q = query.astype(jnp.float32)
    q = q.reshape(cut.batch, cut.q_len, cut.list_heads, cut.heads, cut.group, -1)
    return jnp.moveaxis(q, 1, 4).reshape(cut.batch * cut.list_heads, cut.heads, cut.group * cut.q_len, -1)
