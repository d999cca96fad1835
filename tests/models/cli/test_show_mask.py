"""Mask expressions, and the command that shows them."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_attn as pa
from pallas_attn_models import cli
from pallas_attn_models.cli.mask_expression import FORMS, MaskExpressionError, parse
from tests import oracle
from tests.oracle import positions

LENGTH = 12
KEYS = positions(LENGTH, left=2)
QUERIES = KEYS[-7:]
TOKENS = LENGTH - 2


def meaning(expression: str) -> np.ndarray:
    """The mask, bool ``[T, S]``."""
    mask = parse(expression, QUERIES, KEYS)
    return np.asarray(mask.dense_array(jnp.asarray(QUERIES)[None], jnp.asarray(KEYS)[None]))[0, 0]


def expected(mask: oracle.Mask) -> np.ndarray:
    return oracle.visible(mask, QUERIES[None], KEYS[None], 1, 1)[0, 0]


# --- the parser ---


def segments(lengths: list[int]) -> oracle.Mask:
    """Packed documents from position 0 on, by counting."""
    document = [number for number, length in enumerate(lengths) for _ in range(length)]
    document += [len(lengths)] * (TOKENS - len(document))
    q_ids, kv_ids = ([document[at] if at >= 0 else 99 for at in x] for x in (QUERIES, KEYS))
    return oracle.segments(np.array([q_ids]), np.array([kv_ids]))


def calls(name: str, primitive, *arguments) -> st.SearchStrategy:
    """A primitive in one of its spellings, with its meaning."""

    def build(drawn):
        values, style, keyword = drawn
        names = re.findall(r"([a-z]+)(?=[,)=])", FORMS[name])
        written = [f"{names[-1]}={values[-1]}" if keyword and len(values) > 1 else f"{values[-1]}"] if values else []
        written = [*map(str, values[:-1]), *written]
        text = f"{name}({style.join(written)})" if values else name + ("()" if style == ", " else "")
        return text, primitive(*values), 4

    return st.tuples(st.tuples(*arguments), st.sampled_from([", ", ","]), st.booleans()).map(build)


small = st.integers(0, LENGTH)
LEAVES = st.one_of(
    calls("full", oracle.full),
    calls("causal", oracle.causal),
    calls("sliding_window", oracle.sliding_window, st.integers(1, 9)),
    calls("sliding_window", oracle.sliding_window, st.integers(1, 9), small),
    calls("prefix", lambda n: oracle.prefix(np.array([n])), small),
    calls("sink", oracle.sink, small),
    calls("chunked", oracle.chunked, st.integers(1, 9)),
    calls("segments", segments, st.lists(st.integers(1, 5), min_size=1, max_size=2)),
)


def in_parentheses(part: tuple[str, oracle.Mask, int], least: int, more: bool) -> str:
    """Adds parentheses if the operator binds less than ``least``, or always if ``more``."""
    text, _, strength = part
    return f"({text})" if strength < least or more else text


def combined(parts: st.SearchStrategy) -> st.SearchStrategy:
    """Operators with the parentheses that Python needs, or with extra ones."""

    def pair(symbol: str, strength: int, operator):
        def build(left, right, space, more):
            # The right side of an operator of equal strength needs parentheses; the left side does not.
            texts = in_parentheses(left, strength, more), in_parentheses(right, strength + 1, False)
            return f"{space}{symbol}{space}".join(texts), operator(left[1], right[1]), strength

        return st.builds(build, parts, parts, st.sampled_from([" ", "", "\n  "]), st.booleans())

    return st.one_of(
        pair("|", 1, oracle.Mask.__or__),
        pair("&", 2, oracle.Mask.__and__),
        st.builds(lambda part, more: (f"~{in_parentheses(part, 3, more)}", ~part[1], 3), parts, st.booleans()),
    )


def test_random_expressions_printed_and_read_mean_the_same():
    seen = []

    @settings(max_examples=300)
    @given(st.recursive(LEAVES, combined, max_leaves=8))
    def check(written):
        text, mask, _ = written
        seen.append(text)
        np.testing.assert_array_equal(meaning(text), expected(mask), text)

    check()
    for name in FORMS:
        assert any(name in text for text in seen)
    assert any(re.search(r"\| ?~?\(?[a-z_]+[^|]*&", text) for text in seen), "precedence is put to the test"
    assert any("right=" in text for text in seen)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("causal & sink(2) | sink(4)", "(causal & sink(2)) | sink(4)"),
        ("sink(4) | causal & sink(2)", "sink(4) | (causal & sink(2))"),
        ("~causal & sink(2)", "(~causal) & sink(2)"),
        ("~~causal", "causal()"),
        ("sliding_window(left=3, right=2)", "sliding_window(3, 2)"),
        ("  causal\n&sink(n = 1_0)\t", "causal & sink(10)"),
    ],
)
def test_precedence_and_spelling(text, same):
    np.testing.assert_array_equal(meaning(text), meaning(same))
    assert (meaning("causal & sink(2) | sink(8)") != meaning("causal & (sink(2) | sink(8))")).any()


@pytest.mark.parametrize(
    ("text", "message", "place"),
    [
        ("", "expected a mask such as causal & sliding_window(256) | sink(4)", ""),
        ("casual & sink(4)", "unknown mask 'casual': did you mean causal?", "casual"),
        ("causal & window(4)", "unknown mask 'window': did you mean sliding_window?", "window"),
        ("causal & foo(3)", "unknown mask 'foo': expected one of full, causal, sliding_window, prefix", "foo"),
        ("sink(4) & dense(3)", "'dense' needs an array, which an expression cannot contain", "dense"),
        ("causal & sliding_window", "missing a required argument: 'left' (expected sliding_win", "sliding_window"),
        ("causal(3)", "causal: too many positional arguments (expected causal)", "causal(3)"),
        ("full & sink(m=3)", "sink: missing a required argument: 'n' (expected sink(n))", "sink(m=3)"),
        ("sliding_window(left=1, left=2)", "given twice", "sliding_window(left=1, left=2)"),
        ("full & sink(-4)", "sink: n: expected at least 0, got -4 (int) (expected sink(n))", "sink(-4)"),
        ("prefix(99999999999)", "prefix: n: expected an integer in [0, 2^31)", "prefix(99"),
        ("sink(2.5)", "expected an integer", "2.5"),
        ("sink(True)", "expected an integer", "True"),
        ("sink(sink)", "expected an integer", "sink)"),
        ("sink([4])", "sink: n: expected an int, got list", "sink([4])"),
        ("chunked(0)", "chunked: size: expected at least 1", "chunked(0)"),
        ("sliding_window(0)", "sliding_window: expected left + right >= 1", "sliding_window(0)"),
        ("segments(5)", "segments: expected a list of at least one length", "segments(5)"),
        ("segments([])", "segments: expected a list of at least one length", "segments([])"),
        ("segments([5, 0])", "segments: expected lengths of at least 1 that sum to at most 10", "segments([5, 0])"),
        ("segments([5, 6])", "that sum to at most 10, the number of tokens", "segments([5, 6])"),
        ("segments([5, [1]])", "expected an integer", "[1]"),
        ("causal and full", "expected & instead of 'and'", "causal and full"),
        ("causal or full", "expected | instead of 'or'", "causal or full"),
        ("full & (not causal)", "expected ~ instead of 'not'", "not causal"),
        ("full - causal", "expected a mask such as", "full - causal"),
        ("full & 4", "expected a mask such as", "4"),
        ("full & [causal]", "expected a mask such as", "[causal]"),
        ("causal.allowed", "expected a mask such as", "causal.allowed"),
        ("sink(4)(5)", "expected a mask such as", "sink(4)(5)"),
        ("causal if full else sink(1)", "expected a mask such as", "causal if"),
        ("full & lambda: causal", "unexpected ':'", ": causal"),
        ("full & __import__('os')", 'unexpected "\'"', "'os"),
        ("causal # & sink(4)", "unexpected '#'", "#"),
        ("causal; full", "unexpected ';'", ";"),
        ("causal & \uff46ull", "unexpected '\uff46'", "\uff46ull"),
        ("causal && full", "expected a mask such as", "& full"),
        ("causal full", "expected a mask such as", None),
        ("causal & (full", "expected a mask such as", None),
        ("causal &", "expected a mask such as", None),
        ("~" * 10_000 + "full", "nested too deeply", None),
        ("~" * 101 + "full", "nested too deeply: expected at most 100 levels", "~full"),
        ("(" * 1000 + "full" + ")" * 1000, "parentheses", None),
    ],
)
def test_errors_say_what_was_expected_and_point_at_the_place(text, message, place):
    with pytest.raises(MaskExpressionError) as caught:
        parse(text, QUERIES, KEYS)
    told, shown, carets = str(caught.value).split("\n")
    assert message in told
    assert shown == f"  {text}"
    assert re.fullmatch(r"   *\^+", carets), "some carets, below the expression"
    assert len(carets) <= len(shown) + 1
    if place is not None:
        assert shown[carets.index("^") :].startswith(place)


def test_nesting_within_the_limit():
    np.testing.assert_array_equal(meaning("~" * 98 + "causal"), meaning("causal"))
    np.testing.assert_array_equal(meaning(" & ".join(["causal"] * 99)), meaning("causal"))


# --- the command ---


@pytest.fixture
def run(capsys):
    """Runs ``show-mask``: ``(exit code, stdout, stderr)``."""

    def run(*argv: object) -> tuple[int, str, str]:
        code = cli.main(["show-mask", *map(str, argv)])
        return code, *capsys.readouterr()

    return run


def test_prints_the_block_mask(run):
    code, out, err = run(
        "causal & sliding_window(20) | sink(4)", "--q", 96, "--left-pad", 24, "--block-q", 16, "--block-kv", 8
    )
    assert (code, err) == (0, "")
    p = jnp.maximum(jnp.arange(96, dtype=jnp.int32)[None] - 24, -1)
    mask = pa.masks.causal() & pa.masks.sliding_window(20) | pa.masks.sink(4)
    assert out == f"{pa.BlockMask.from_mask(mask, p, p, pa.BlockSizes(16, 8))}\n"
    assert "padding 24 of 96 queries, 24 of 96 keys" in out


def test_queries_are_the_last_of_the_keys(run):
    code, out, _ = run("causal", "--q", 4, "--kv", 64, "--block-q", 4, "--block-kv", 16)
    assert code == 0
    assert "T=4, S=64" in out
    assert "0 ███▒\n" in out
    _, default, _ = run("causal", "--q", 512)
    sizes = pa.BlockMask.from_mask(pa.masks.causal(), 512, 512).block_sizes
    assert f"blocks of {sizes.q}x{sizes.kv}" in default, "by default the blocks are those of the kernels here"
    _, mixed, _ = run("causal", "--q", 512, "--block-kv", 8)
    assert f"blocks of {sizes.q}x8" in mixed


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_draws_into_a_file(run, tmp_path, suffix):
    file = tmp_path / f"mask.{suffix}"
    expression = "causal & ~sink(4)"
    code, out, err = run(expression, "--q", 40, "--left-pad", 5, "--block-q", 8, "--block-kv", 8, "--out", file)
    assert (code, out, err) == (0, "", f"wrote {file}\n")
    p = jnp.maximum(jnp.arange(40, dtype=jnp.int32)[None] - 5, -1)
    mask = pa.masks.causal() & ~pa.masks.sink(4)
    expected = tmp_path / f"expected.{suffix}"
    pa.save_picture(pa.BlockMask.from_mask(mask, p, p, pa.BlockSizes(8, 8)), expected, title=expression)
    assert file.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["causal"], "the following arguments are required: --q (see pallas-attn show-mask --help)"),
        (["--q", "8"], "the following arguments are required: MASK"),
        (["causal", "--q", "0"], "--q: expected at least 1, got 0"),
        (["causal", "--q", "many"], "--q: invalid int value: 'many'"),
        (["causal", "--q", "8", "--kv", "7"], "--kv: expected at least as many keys as queries (8), got 7"),
        (["causal", "--q", "8", "--left-pad", "8"], "--left-pad: expected at least 0 and less than the 8 keys, got 8"),
        (["causal", "--q", "8", "--left-pad", "-1"], "--left-pad: expected at least 0"),
        (["causal", "--q", "8", "--block-q", "0"], "BlockSizes.q: expected at least 1, got 0"),
        (["causal", "--q", "8", "--out", "mask.gif"], "expected a file that ends in .png or .svg, got 'mask.gif'"),
        (["causal", "--q", "8", "--out", "nowhere/mask.png"], "expected a directory that exists, got 'nowhere'"),
    ],
    ids=" ".join,
)
def test_errors_are_one_line(run, argv, message):
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_an_error_in_the_expression_is_shown_with_a_caret(run):
    code, out, err = run("causal & window(256)", "--q", 8)
    assert (code, out) == (2, "")
    assert err == (
        "error: unknown mask 'window': did you mean sliding_window?\n  causal & window(256)\n           ^^^^^^\n"
    )


def test_help_describes_the_expressions_and_its_examples_run(run, capsys, tmp_path, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        cli.main(["show-mask", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for form in FORMS.values():
        assert form in text
    examples = re.findall(r'^  pallas-attn show-mask "(.*?)" (.*)$', text, re.MULTILINE)
    assert len(examples) >= 3
    monkeypatch.chdir(tmp_path)
    for expression, options in examples:
        code, _, err = run(expression, *options.split())
        assert code == 0, err
    assert (tmp_path / "mask.png").stat().st_size > 1000
