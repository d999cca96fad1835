"""One sampling step for every row: guidance, sampling, bookkeeping, stop conditions."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_attn_models.generation.sampling import bounded, count_new, most_likely, sample
from pallas_attn_models.generation.state import CAPACITY, INVALID, LENGTH, RUNNING, STOP, Request, RowState
from pallas_attn_models.generation.stopping import match_stop_sequences
from pallas_attn_models.generation.token_log import entry


@jax.named_scope("sampler")
def sample_step(rows: RowState, logits: Array, live: Array | None = None) -> tuple[RowState, Array, Array]:
    """Samples the next token of the running rows.

    Args:
      rows: rows that are not running stay unchanged.
      logits: float32 ``[B, V]``, after each row's newest token.
      live: bool ``[B]``: restricts the step to these rows; default: all.

    Returns:
      The updated rows; their :func:`entries <pallas_attn_models.generation.token_log.entry>` for the log; and bool
      ``[B]``: rows that got a token. A running row without a valid one is finished.
    """
    request = rows.request
    steps = rows.status == RUNNING
    steps = steps if live is None else steps & live
    batch_size, max_length = rows.tokens.shape
    settings, guided = request.sampling, jnp.asarray(request.partner) != jnp.arange(batch_size, dtype=jnp.int32)
    # A setting that is skipped costs a copy of the logits. If no row here has one, all are skipped at once.
    entries = lax.cond(
        (steps & (guided | settings.in_use(rows.num_new, logits.shape[1]))).any(),
        lambda: entry(sample(_guided(logits, request), settings, rows.counts, rows.num_new)),
        lambda: entry(most_likely(logits, settings)),
    )
    token = entries[:, 0][request.leader]
    valid = token >= 0
    entries = jnp.concatenate([token[:, None], entries[:, 1:]], axis=1)
    running = steps & valid

    # In terms of the new length, because XLA copies a value that is read after its update.
    row, length = jnp.arange(batch_size, dtype=jnp.int32), rows.length + running.astype(jnp.int32)
    after = dataclasses.replace(
        rows,
        tokens=rows.tokens.at[row, jnp.where(running, length - 1, max_length)].set(token, mode="drop"),
        length=length,
        counts=count_new(rows.counts, token, running),
    )
    tail = _tail(after, request.sampling.stop_tokens.shape[-1])
    stop = match_stop_sequences(tail, request.sampling, after.num_new)
    full = after.length >= max_length
    status = jnp.full_like(rows.status, RUNNING)
    for ends, why in (  # the last condition that holds decides
        ((full | full[request.partner])[request.leader], CAPACITY),
        (after.num_new >= request.sampling.max_new_tokens, LENGTH),
        (stop > 0, STOP),
        (~valid, INVALID),
    ):
        status = jnp.where(ends, why, status)
    status = jnp.where(steps, status, rows.status)
    after = dataclasses.replace(after, status=status, matched=jnp.where(running, stop, rows.matched))
    return after, entries, running


def _guided(logits: Array, request: Request) -> Array:
    """Classifier-free guidance: extrapolates from the partner's log-probabilities through the row's own.

    Equation 7 of arXiv:2306.17806. Rows without a partner keep their logits bit for bit.
    """
    partner, guidance = jnp.asarray(request.partner), jnp.asarray(request.guidance)
    guided = partner != jnp.arange(partner.shape[0], dtype=jnp.int32)

    def guide() -> Array:
        # Clamp log 0 to a finite number, because inf - inf would be NaN.
        logprobs = jnp.maximum(jax.nn.log_softmax(logits, axis=-1), jnp.finfo(jnp.float32).min)
        away = logprobs[partner]
        moved = away + guidance[:, None] * (logprobs - away)
        return jnp.where(guided[:, None], bounded(moved, logprobs), logits)

    return lax.cond(guided.any(), guide, lambda: logits)


def _tail(rows: RowState, length: int) -> Array:
    """int32 ``[B, length]``: the last tokens of each row, newest last."""
    at = rows.length[:, None] - length + jnp.arange(length, dtype=jnp.int32)[None]
    return jnp.take_along_axis(rows.tokens, jnp.maximum(at, 0), axis=1)
