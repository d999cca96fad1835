"""Stop strings in text that arrives token by token, and the requests that they cancel."""

from collections.abc import Sequence

import pytest

from pallas_attn_models.cli.completions import print_in_turn
from pallas_attn_models.cli.text_stream import TextStream, read_streams
from pallas_attn_models.generation.sampling import Sampling
from tests.models.scripted import ScriptedGenerator, byte_tokenizer

TOKENIZER = byte_tokenizer()


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text).ids


def answers(scripts: Sequence[Sequence[int]], stop: Sequence[str] = (), burst: int = 1, **settings: int):
    generator = ScriptedGenerator(scripts, burst=burst)
    sampling = Sampling(**settings)
    return generator, [TextStream(generator.submit([0], sampling), TOKENIZER, stop) for _ in scripts]


def pieces(script: Sequence[int], stop: Sequence[str] = (), **settings: int) -> tuple[list[str], TextStream]:
    generator, (answer,) = answers([script], stop, **settings)
    return [text for _, text in read_streams(generator, [answer])], answer


@pytest.mark.parametrize("text", ["hello", "\u00e9\u4e2d\U0001f9e0"])
def test_the_text_is_streamed_as_it_becomes_final(text):
    shown, answer = pieces(encode(text))
    assert "".join(shown) == answer.text == text
    assert [piece for piece in shown if piece] == [*text], "no character waits for the next"
    assert answer.finish_reason == "stop"


def test_a_stop_string_ends_the_work_with_the_token_that_completes_it():
    script = encode("say: no more, please")
    shown, answer = pieces(script, ["never", "no more"])
    assert "".join(shown) == answer.text == "say: "
    assert answer.tokens == encode("say: no more")
    assert answer.finish_reason == "stop"
    assert answer.handle.tokens == answer.tokens, "none was drawn after it"


def test_a_stop_string_within_a_character_of_many_bytes():
    shown, answer = pieces(encode("a\u4e2d\u6587b"), ["\u6587"])
    assert "".join(shown) == "a\u4e2d"
    assert answer.finish_reason == "stop"


def test_a_possible_stop_string_is_returned_at_the_end():
    shown, answer = pieces(encode("say wor"), ["world"])
    assert shown[-1] == "wor"
    assert answer.text == "say wor"


def test_an_unfinished_character_after_an_unfinished_stop_string():
    script = encode("ab\u4e2d")[:-1]
    _, answer = pieces(script, ["b\u00e9"])
    assert answer.text == TOKENIZER.decode(script)


def test_a_budget_can_end_with_a_stop_string_or_within_it():
    assert pieces(encode("a stop"), ["stop"], max_new_tokens=6)[1].finish_reason == "stop"
    _, answer = pieces(encode("a stop"), ["stop"], max_new_tokens=5)
    assert (answer.text, answer.finish_reason) == ("a sto", "length")


def test_the_first_tokens_cannot_be_stopped():
    assert pieces(encode("abab"), ["b"])[1].text == "a"
    assert pieces(encode("abab"), ["b"], min_new_tokens=2)[1].text == "aba"


def test_each_ends_by_itself():
    generator, both = answers([encode("a. no"), encode("much longer. no")], ["."])
    for _ in read_streams(generator, both):
        pass
    assert [one.text for one in both] == ["a", "much longer"]
    assert [len(one.handle.tokens) for one in both] == [2, 12]
    assert generator.rounds == 12


def test_tokens_after_a_stop_string_are_dropped():
    generator, both = answers([encode("a. no more"), encode("much longer. no")], ["."], burst=4)
    for _ in read_streams(generator, both):
        pass
    assert [one.tokens for one in both] == [encode("a."), encode("much longer.")]


def test_an_interrupt_keeps_the_text():
    generator, (answer,) = answers([encode("on and on")])
    for _ in read_streams(generator, [answer], interrupted=lambda: len(answer.tokens) == 2):
        pass
    assert (answer.text, answer.finish_reason) == ("on ", "cancelled"), "what was drawn by then is kept"


def test_leaving_a_stream_cancels():
    generator, both = answers([encode("one"), encode("two")])
    events = read_streams(generator, both)
    next(events)
    events.close()
    assert all(one.handle.finish_reason == "cancelled" for one in both)


# --- several streams ---


def test_completions_are_printed_in_turn_each_as_it_comes(capsys):
    steps = [
        ((0, "a", False), "a"),
        ((1, "X", False), ""),
        ((0, "b", False), "b"),
        ((0, "", True), "\n\n[2] q\\x1b\nX"),
        ((2, "w", True), ""),
        ((1, "Z", False), "Z"),
        ((1, "", True), "\n\n[3] r\nw\n"),
    ]

    def events():
        assert capsys.readouterr().out == "[1] p\n"
        for event, expected in steps:
            yield event
            assert capsys.readouterr().out == expected

    print_in_turn(events(), ["p", "q\x1b", "r"])


def test_a_single_completion_has_no_heading(capsys):
    print_in_turn([(0, "a\tb\x1b[2J", False), (0, "\nc", True)], ["prompt"])
    assert capsys.readouterr().out == "a\tb\\x1b[2J\nc\n"
