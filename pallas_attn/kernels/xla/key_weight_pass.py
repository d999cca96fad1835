"""How much probability every key got: a second walk over the lists, with ``lse`` known, that reads keys alone."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_attn.kernels.call import Call
from pallas_attn.kernels.lse import Lse
from pallas_attn.kernels.xla.softmax import probabilities
from pallas_attn.kernels.xla.tiles import Cut, Keys, Program


@functools.partial(jax.jit, static_argnames=("scale",))
def key_weights(call: Call, lse: Lse, *, scale: float) -> Array:
    """Same contract as :func:`pallas_attn.kernels.reference.key_weights`."""
    query, key, _, block_mask, scores, *_ = call
    cut = Cut.of(query, key, block_mask)
    lse = jax.tree.map(lambda x: x.swapaxes(1, 2), lse)  # [B, T, N], as the queries

    def run(sums: Array, at: tuple[Array, ...]) -> tuple[Array, None]:
        program = Program(cut, block_mask, scores, at)
        q = program.queries(query).astype(jnp.float32).reshape(cut.heads, cut.group * cut.q_block, -1)
        row_lse = jax.tree.map(lambda x: program.queries(x)[..., None], lse)
        counts = program.is_own[..., None] & (row_lse.peak != -jnp.inf)  # not >: what is not a number shows

        def add(sums: Array, keys: Keys) -> Array:
            logits = program.logits(q, key, keys, scale)
            seen = counts if keys.allowed is None else counts & keys.allowed
            weights = jnp.where(seen, probabilities(logits, row_lse), 0.0)
            return program.add_to_keys(sums, keys.start, weights.sum((1, 2))[..., None])

        return program.walk(add, sums), None

    zeros = jnp.zeros((cut.batch, cut.kv_len, cut.kv_heads, 1), jnp.float32)
    sums, _ = lax.scan(run, zeros, cut.programs())
    return sums[..., 0].swapaxes(1, 2) / (cut.q_heads // cut.kv_heads)
