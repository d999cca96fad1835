"""Stop sequences: matched as soon as they are complete, and never delivered in part."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_attn_models.generation.sampling import Limits, Sampling, SamplingArrays
from pallas_attn_models.generation.stopping import StopStrings, match_stop_sequences, num_withheld

LIMITS = Limits(stop_sequences=3, stop_length=4)
END = 2

run = jax.jit(match_stop_sequences)
# Two or three tokens, so that there are matches and near matches.
tokens = st.lists(st.integers(0, 2), max_size=12).map(tuple)
sequences = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=4).map(tuple), max_size=3).map(tuple)


def arrays(samplings: list[Sampling]) -> SamplingArrays:
    return SamplingArrays.stack(samplings, limits=LIMITS, vocab_size=3, eos_token_ids=[END])


def tail(history: tuple[int, ...]) -> list[int]:
    """The last tokens of a row; before its first, values that resemble tokens."""
    return [*[0] * LIMITS.stop_length, *history][-LIMITS.stop_length :]


def longest_match(new: tuple[int, ...], stops: tuple[tuple[int, ...], ...], least: int) -> int:
    ends = (len(stop) for stop in stops if new[len(new) - len(stop) :] == stop)
    return max((length for length in ends if len(new) - length >= least), default=0)


@settings(max_examples=100)
@given(st.lists(st.tuples(tokens, tokens, sequences, st.integers(0, 6)), min_size=4, max_size=4))
def test_matches_are_those_of_brute_force(rows):
    settings = arrays([Sampling(stop=stops, min_new_tokens=least) for _, _, stops, least in rows])
    tails = np.array([tail(prompt + new) for prompt, new, _, _ in rows], np.int32)
    lengths = run(tails, settings, np.array([len(new) for _, new, _, _ in rows], np.int32))
    assert lengths.dtype == np.int32
    assert lengths.tolist() == [longest_match(new, (*stops, (END,)), least) for _, new, stops, least in rows]


@pytest.mark.parametrize(
    ("history", "count", "sampling", "length"),
    [
        ((0, 1), 2, Sampling(stop=[(0, 1)]), 2),
        ((0, 1), 1, Sampling(stop=[(0, 1)]), 0),  # its first token is the prompt's last
        ((0, 0, 1), 3, Sampling(stop=[(0, 1), (0, 0, 1), 1]), 3),
        ((0, 0, 1), 2, Sampling(stop=[(0, 1), (0, 0, 1), 1]), 2),
        ((0, 0, 1), 3, Sampling(stop=[(0, 1), 1], min_new_tokens=1), 2),
        ((0, 0, 1), 3, Sampling(stop=[(0, 1), 1], min_new_tokens=2), 1),  # fewer than two would be left
        ((0, 0, 1), 3, Sampling(stop=[(0, 1), 1], min_new_tokens=3), 0),
        ((0, END), 1, Sampling(), 1),
        ((0, END), 1, Sampling(min_new_tokens=1), 0),
        ((0, 0, 0, 0), 0, Sampling(stop=0), 0),
    ],
)
def test_matches_by_hand(history, count, sampling, length):
    settings = arrays([sampling])
    assert run(np.array([tail(history)], np.int32), settings, np.array([count], np.int32)).tolist() == [length]


def test_without_stop_sequences_nothing_matches():
    limits = Limits(stop_sequences=0, stop_length=1)
    settings = SamplingArrays.stack([Sampling()], limits=limits, vocab_size=3)
    assert run(np.zeros((1, 1), np.int32), settings, np.ones(1, np.int32)).tolist() == [0]


def stream(new: tuple[int, ...], stops: tuple[tuple[int, ...], ...], least: int) -> tuple[list[list[int]], list[int]]:
    """The tokens delivered after each step, and the rest at the end of the row."""
    passed, steps = 0, []
    for count in range(1, len(new) + 1):
        if length := longest_match(new[:count], stops, least):
            return steps, list(new[passed : count - length])
        certain = count - num_withheld(new[least:count], stops)
        steps.append(list(new[passed:certain]))
        passed = max(passed, certain)
    return steps, list(new[passed:])


@settings(max_examples=300)
@given(tokens, sequences, st.integers(0, 6))
def test_delivered_tokens_are_final_and_withheld_ones_are_not(new, stops, least):
    steps, rest = stream(new, stops, least)
    ends = [count for count in range(1, len(new) + 1) if longest_match(new[:count], stops, least)]
    expected = new[: ends[0] - longest_match(new[: ends[0]], stops, least)] if ends else new
    # Nothing is lost, duplicated, or part of the match.
    assert [token for step in [*steps, rest] for token in step] == list(expected)
    # Nothing is withheld needlessly: some continuation completes a stop sequence from it.
    for count in range(1, len(steps) + 1):
        held = new[count - num_withheld(new[least:count], stops) : count]
        assert not held or any(stop[: len(held)] == held and len(stop) > len(held) for stop in stops)


@pytest.mark.parametrize(
    ("new", "stops", "held"),
    [
        ((5, 1), [(1, 2)], 1),
        ((1, 1), [(1, 1, 2)], 2),
        ((1, 1, 1), [(1, 1, 2)], 2),
        ((1,), [(1,), (2, 1)], 0),  # already a stop sequence: no reason to wait
        ((), [(1, 2)], 0),
        ((1,), [], 0),
        ("un ", [" bon"], 1),
    ],
)
def test_num_withheld(new, stops, held):
    assert num_withheld(new, stops) == held


def first_stop(text: str, strings: list[str]) -> str | None:
    """The text before the first stop string, one character at a time; None without one."""
    for end in range(1, len(text) + 1):
        if found := [one for one in strings if text[:end].endswith(one)]:
            return text[: end - max(map(len, found))]
    return None


@settings(max_examples=300)
@given(st.lists(st.text("ab", max_size=5), max_size=6), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_text_stops_at_the_same_place_wherever_it_is_cut(pieces, strings):
    stops, passed = StopStrings(strings), ""
    for piece in pieces:
        passed += stops.feed(piece)
    passed += stops.finish()
    expected = first_stop("".join(pieces), strings)
    assert stops.stopped == (expected is not None)
    assert passed == ("".join(pieces) if expected is None else expected)


def test_text_is_returned_as_soon_as_it_is_final():
    stops = StopStrings(["</end>", "STOP"])
    assert [stops.feed(piece) for piece in ("one <", "/en", "</end", "ing S", "TO", "P two", "x")] == [
        *("one ", "", "</en", "</ending ", "", "", ""),
    ]
    assert stops.stopped
    assert stops.finish() == ""


@pytest.mark.parametrize("strings", ["abc", ["a", ""], [1]])
def test_stop_strings_are_non_empty_strings(strings):
    with pytest.raises(ValueError, match="strings: expected a sequence of non-empty strings, got"):
        StopStrings(strings)
