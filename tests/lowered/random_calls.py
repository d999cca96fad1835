"""A hypothesis strategy for calls in every form that the kernels serve."""

import numpy as np
from hypothesis import strategies as st

from tests import strategies
from tests.lowered.calls import Case

_KINDS = st.sampled_from([None, "int8", "int4", "float8_e4m3fn"])
_FORMS = st.sampled_from(["gradients", "gradients", "plain", "quantized", "pages", "quantized pages"])


@st.composite
def calls(draw) -> Case:
    """Prefill and decode; gradients, or key weights, quantized keys and pages."""
    form = draw(_FORMS)
    batch, kv_heads, group = (draw(st.integers(1, 3)) for _ in range(3))
    q_heads = kv_heads * group
    q_len = draw(st.integers(1, 16) | st.integers(17, 70))
    page = draw(st.sampled_from([16, 32, 48]))
    kv_len = page * draw(st.integers(1, 4)) if "pages" in form else draw(st.integers(1, 80))
    fields = {"batch": batch, "q_len": q_len, "kv_len": kv_len, "q_heads": q_heads, "kv_heads": kv_heads}
    if "pages" in form:
        fields |= {"page": page, "page_table": draw(_page_tables(batch, kv_len // page))}
    head_dims = [8, 16, 24, 32, 80]
    if "quantized" in form:
        head_dims = [32, 48, 64, 96]
        fields |= {"key_kind": draw(_KINDS), "value_kind": draw(_KINDS), "group": draw(st.sampled_from([1, 4, 8]))}
    return Case(
        draw(strategies.masks(batch, q_heads, kv_heads, q_len, kv_len)),
        draw(strategies.q_positions(batch, q_len)),
        draw(strategies.kv_positions(batch, kv_heads, kv_len)),
        **fields,
        head_dim=draw(st.sampled_from(head_dims)),
        value_dim=draw(st.sampled_from([None, None, 32, 48])),
        dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        scale=draw(st.sampled_from([None, -0.3])),
        block_sizes=draw(st.sampled_from([(16, 16), (16, 32), (32, 16), (32, 64)])),
        scores=draw(strategies.scores(batch, q_heads, q_len, kv_len)),
        sinks=draw(st.none() | strategies.generators.map(lambda rng: rng.standard_normal(q_heads).astype(np.float32))),
        gradients=form == "gradients",
        key_weights=form != "gradients" and draw(st.booleans()),
        chunk=draw(st.sampled_from([None, None, 1, 2])),
        shares=draw(st.sampled_from([1, 3, 128])),
    )


@st.composite
def _page_tables(draw, batch: int, pages: int) -> np.ndarray:
    """Pages in any order, some shared by rows, and some that the pool does not have."""
    rng = draw(strategies.generators)
    table = rng.permutation(batch * pages + 2)[: batch * pages].reshape(batch, pages)
    if draw(st.booleans()):
        table[-1, 0] = table[0, 0]
    table[rng.random(table.shape) < draw(st.sampled_from([0.0, 0.3]))] = draw(st.sampled_from([-1, 999, 2**31 - 1]))
    return table.astype(np.int32)
