"""The comparison with ``jax.nn`` and Flax: it passes, and it detects planted differences."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn as pa
from bench.semantics import flax, jax_nn, run
from bench.semantics.judge import Compared, Row, assert_rejected, compare_gradients, judge
from tests import tolerances

XLA = ["--implementation", "xla"]


def behaviors(only: str) -> dict:
    return {one.name: one for one in run._SUITES[only]()}


def judged(only: str, *names: str) -> list[Row]:
    found = behaviors(only)
    return [judge(found[name], {"implementation": "xla"}) for name in names]


# --- no difference ---


@pytest.mark.parametrize(
    "name",
    [
        "both lengths, causal",
        "differs: a key length of 0",
        "differs: a traced scale",
        *(f"both reject: {what}" for what in ("another dtype", "a mask of floats", "a bias of another shape")),
    ],
)
def test_like_jax_nn(name):
    (row,) = judged("jax.nn", name)
    assert row.correct, row


@pytest.mark.parametrize(
    "name",
    [
        "linen function, bias and mask",
        "nnx: decodes, grouped heads",
        *(f"linen: ours rejects {option}" for option in ("dropout_rate", "module", "qk_attn_weights_einsum")),
        "function: ours rejects mask",
    ],
)
def test_like_flax(name):
    (row,) = judged("flax", name)
    assert row.correct, row


@pytest.mark.slow
@pytest.mark.parametrize("how", [XLA, ["--interpret"]], ids=["xla", "interpreted"])
@pytest.mark.parametrize("only", ["jax.nn", "flax"])
def test_all_behaviors(only, how, capsys):
    assert run.main(["--only", only, *how]) == 0, capsys.readouterr().out


# --- planted differences ---


def test_another_convention_is_found(monkeypatch):
    """A window that counts the query's own position as ``jax.nn`` does is one key too short."""
    right = pa.masks.sliding_window
    monkeypatch.setattr(jax_nn.pa.masks, "sliding_window", lambda left, right_: right(left - 1, right_))
    (row,) = judged("jax.nn", "window (7, 0)")
    assert not row.correct
    assert row.note == "ours is wrong"
    assert row.error > row.limit


def test_a_wrong_gradient_is_found(monkeypatch):
    right = pa.attention

    def wrong(query, *rest, **options):
        # The same output, with a query gradient 0.1 % too large.
        return right(query + 1e-3 * (query - jax.lax.stop_gradient(query)), *rest, **options)

    monkeypatch.setattr(jax_nn.pa, "attention", wrong)
    (row,) = judged("jax.nn", "window (7, 0)")
    assert not row.correct
    assert row.what == "gradients"


def test_an_ignored_mask_of_flax_is_found(monkeypatch):
    right = pa.flax.attention_fn

    def forgetful(**options):
        ours = right(**options)
        return lambda query, key, value, mask=None, deterministic=True: ours(query, key, value)

    monkeypatch.setattr(flax.pa.flax, "attention_fn", forgetful)
    (row,) = judged("flax", "linen function, bias and mask")
    assert not row.correct


def test_a_missing_intended_difference_is_found(monkeypatch):
    """If ``jax.nn`` starts to return 0, the documentation is wrong."""
    monkeypatch.setattr(jax.nn, "dot_product_attention", jax_nn.attend)
    (row,) = judged("jax.nn", "differs: a bias of -inf for all keys")
    assert not row.correct
    assert row.note == "theirs is not what was expected"


def test_another_dtype_or_shape_is_found():
    x = np.ones((2, 3), np.float32)
    for ours in (x.astype(np.float16), x[:1]):
        one = run.Behavior("", lambda _, ours=ours: [Compared("out", ours, x, x)])
        assert "theirs ('float32', (2, 3))" in judge(one, {}).note
    with pytest.raises(AssertionError, match="theirs"):
        compare_gradients([x], [x.astype(np.float16)], [x], np.float32)


def test_nan_is_found():
    x = np.ones(3, np.float32)
    one = run.Behavior("", lambda _: [Compared("out", x * np.nan, x, x)])
    row = judge(one, {})
    assert (row.correct, row.error) == (False, np.inf)


def test_the_other_must_be_about_right():
    """Otherwise twice its error would be no limit."""
    x = np.ones(3, np.float32)
    off = tolerances.BENCH_PEER * tolerances.attention_limit(0.0, 1.0, np.float32)
    for factor, correct in ((0.5, True), (2, False)):
        theirs = (x + factor * off).astype(np.float32)
        one = run.Behavior("", lambda _, theirs=theirs: [Compared("out", x, theirs, x)])
        assert judge(one, {}).correct == correct


def test_an_accepted_wrong_call_is_an_error():
    with pytest.raises(AssertionError, match="ours does not reject it"):
        assert_rejected("ours", ValueError, lambda: None)
    with pytest.raises(AssertionError, match="without mentioning mask"):
        assert_rejected("ours", ValueError, lambda: int("x"), "mask")


# --- the command ---


def test_a_table_and_exit_code_0(capsys):
    assert run.main([*XLA, "--only", "jax.nn", "--match", "both reject: a mask of"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"jax.nn: both reject: a mask of floats +│ rejected +│ .* ok", printed)
    assert "2 of 2 behaviors are right." in printed


def test_exit_code_1_if_one_fails(monkeypatch, capsys):
    taken = pa.AttentionOutput(jnp.zeros((2, 3, 4, 5)), jnp.zeros((2, 4, 3)))
    monkeypatch.setattr(jax_nn.pa, "attention", lambda *_, **__: taken)
    assert run.main([*XLA, "--match", "both reject: another dtype"]) == 1
    printed = capsys.readouterr().out
    assert "WRONG: AssertionError" in printed
    assert "0 of 1 behaviors are right." in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--implementation", "xla", "--interpret"], "--interpret: expected --implementation triton"),
        (["--match", "no such thing"], "--match: no behavior has 'no such thing' in its name"),
    ],
)
def test_wrong_calls(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(run, "judge", lambda *_: pytest.fail("something ran"))
    assert run.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_kernels_without_a_gpu_are_refused_with_the_reason(capsys, monkeypatch):
    monkeypatch.setattr(pa, "implementations", lambda: {"triton": "JAX sees no GPU", "xla": None})
    assert run.main(["--implementation", "triton"]) == 2
    assert "JAX sees no GPU; --interpret runs it anywhere" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--only", "torch"], ["--implementation", "cuda"], ["--toy"]])
def test_argparse_refuses_the_rest(arguments):
    with pytest.raises(SystemExit) as stop:
        run.main(arguments)
    assert stop.value.code == 2
