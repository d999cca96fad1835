"""PromptLookup: its drafts equal those of a sequential search."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_attn_models.generation.speculation import PromptLookup
from tests.models.speculations import looked_up

look_up = {
    speculation: jax.jit(speculation.look_up)
    for speculation in (PromptLookup(5, 1), PromptLookup(7, 3), PromptLookup(3, 2, 4), PromptLookup(2, 4, 7))
}


@settings(max_examples=60)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=17), min_size=3, max_size=3))
def test_look_up_finds_the_longest_agreement_then_the_latest(rows):
    tokens = np.full((3, 17), 2, np.int32)  # earlier content of a row is irrelevant
    for row, known in enumerate(rows):
        tokens[row, : len(known)] = known
    for speculation, run in look_up.items():
        drafts, found = run(tokens, np.array([len(known) for known in rows], np.int32))
        assert drafts.dtype == jnp.int32
        for row, known in enumerate(rows):
            expected = looked_up(known, speculation)
            assert bool(found[row]) == bool(expected)
            expected += [[-1] * speculation.length] * (speculation.num_candidates - len(expected))
            assert drafts[row].tolist() == expected
