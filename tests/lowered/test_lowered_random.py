"""Random calls, executed, equal the oracle: 30 parts of 10."""

import pytest
from hypothesis import Phase, given, seed, settings

from tests.lowered.calls import check
from tests.lowered.random_calls import calls

EXAMPLES = 10


@pytest.mark.slow
@pytest.mark.parametrize("part", range(30))
def test_random_calls_equal_the_oracle(part, watch):
    @seed(part)
    @settings(max_examples=EXAMPLES, phases=[Phase.generate])
    @given(calls())
    def check_one(case):
        check(case)
        watch.assert_clean()

    check_one()
