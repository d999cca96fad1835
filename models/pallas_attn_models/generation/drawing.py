"""A new token for every row: guided, drawn, written down, and seen to be the last or not."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_attn_models.generation.rows import CAPACITY, INVALID, LENGTH, RUNNING, STOP, Request, Rows
from pallas_attn_models.generation.sampling import Drawn, bounded, count_new, sample
from pallas_attn_models.generation.stopping import matched


def draw(rows: Rows, logits: Array, live: Array | None = None) -> tuple[Rows, Array, Drawn]:
    """Draws the next token of the rows.

    Args:
      rows: only those that are running draw.
      logits: float32 ``[B, V]``, after their newest tokens.
      live: bool ``[B]``: of these, only those that are; default all.

    Returns:
      The rows with it, the token int32 ``[B]``, and what else is known of it. A row for which there is none is done.
    """
    request = rows.request
    draws = rows.status == RUNNING
    draws = draws if live is None else draws & live
    batch_size, max_length = rows.tokens.shape
    drawn = sample(_guided(logits, request), request.sampling, rows.counts, rows.num_new)
    token, valid = drawn.tokens[request.leader], drawn.valid[request.leader]
    running = draws & valid

    row = jnp.arange(batch_size, dtype=jnp.int32)
    after = dataclasses.replace(
        rows,
        tokens=rows.tokens.at[row, jnp.where(running, rows.length, max_length)].set(token, mode="drop"),
        length=rows.length + running.astype(jnp.int32),
        counts=count_new(rows.counts, token, running),
    )
    stop = matched(_tail(after, request.sampling.stop_tokens.shape[-1]), request.sampling, after.num_new)
    full = after.length >= max_length
    status = jnp.full_like(rows.status, RUNNING)
    for ends, why in (  # of several, the last
        ((full | full[request.partner])[request.leader], CAPACITY),
        (after.num_new >= request.sampling.max_new_tokens, LENGTH),
        (stop > 0, STOP),
        (~valid, INVALID),
    ):
        status = jnp.where(ends, why, status)
    status = jnp.where(draws, status, rows.status)
    after = dataclasses.replace(after, status=status, matched=jnp.where(running, stop, rows.matched))
    return after, token, drawn


def _guided(logits: Array, request: Request) -> Array:
    """Classifier-free guidance: from what the partner's prompt makes likely to what one's own does, and beyond.

    Equation 7 of arXiv:2306.17806, in log-probabilities. A row without a partner keeps its logits, to the bit.
    """
    partner, guidance = jnp.asarray(request.partner), jnp.asarray(request.guidance)
    guided = partner != jnp.arange(partner.shape[0], dtype=jnp.int32)

    def guide() -> Array:
        # Where the probability is 0 a finite number stands for the logarithm, as inf - inf would be NaN.
        logprobs = jnp.maximum(jax.nn.log_softmax(logits, axis=-1), jnp.finfo(jnp.float32).min)
        away = logprobs[partner]
        moved = away + guidance[:, None] * (logprobs - away)
        return jnp.where(guided[:, None], bounded(moved, logprobs), logits)

    return lax.cond(guided.any(), guide, lambda: logits)


def _tail(rows: Rows, length: int) -> Array:
    """int32 ``[B, length]``: the last tokens of each row, the newest last."""
    at = rows.length[:, None] - length + jnp.arange(length, dtype=jnp.int32)[None]
    return jnp.take_along_axis(rows.tokens, jnp.maximum(at, 0), axis=1)
