"""The mixture of experts: against NumPy, and that a decode step touches only the experts that it uses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_attn_models.decoder.config import DecoderConfig, ExpertsConfig
from pallas_attn_models.decoder.experts import Experts
from tests import tolerances

WIDTH = 16
CONFIG = DecoderConfig(
    vocab_size=8, hidden_size=WIDTH, intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=16
)
SOFTMAX = ExpertsConfig(num_experts=6, experts_per_token=2, intermediate_size=12)
CASES = {
    "normalized": SOFTMAX,
    "not normalized, scaled": dataclasses.replace(SOFTMAX, normalize=False, scale=1.5),
    "one of three": dataclasses.replace(SOFTMAX, num_experts=3, experts_per_token=1),
    "all": dataclasses.replace(SOFTMAX, experts_per_token=6),
    "shared": dataclasses.replace(SOFTMAX, shared_size=10),
    "shared, with a gate": dataclasses.replace(SOFTMAX, shared_size=10, shared_gate=True),
    "clamped, biases": dataclasses.replace(SOFTMAX, clamp=0.5, alpha=1.3, bias=True, router_bias=True),
    "groups": dataclasses.replace(SOFTMAX, num_groups=3, groups_per_token=2),
    "sigmoid": dataclasses.replace(SOFTMAX, score="sigmoid", correction=True),
    "sigmoid, groups": dataclasses.replace(
        SOFTMAX, num_experts=8, experts_per_token=3, score="sigmoid", correction=True, num_groups=4, groups_per_token=2
    ),
}


def make(config: ExpertsConfig) -> Experts:
    module = Experts(CONFIG, config, rngs=nnx.Rngs(0), dtype=jnp.float32, param_dtype=jnp.float32)
    keys = iter(jax.random.split(jax.random.key(1), 32))
    nnx.update(module, jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape) * 0.5, nnx.state(module)))
    return module


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def oracle(module: Experts, x: np.ndarray) -> np.ndarray:
    """One token after the other, in float64."""
    config = module.config
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.state(module)))

    def linear(name: str, x: np.ndarray, expert: int | None = None) -> np.ndarray:
        values = weights
        for part in name.split("."):
            values = values[part]
        pick = (lambda value: value) if expert is None else (lambda value: value[expert])
        return x @ pick(values["kernel"]) + (pick(values["bias"]) if "bias" in values else 0)

    out = np.zeros(x.shape)
    for index, token in enumerate(x.astype(np.float64)):
        logits = linear("router", token)
        scores = np.exp(logits) / np.exp(logits).sum() if config.score == "softmax" else sigmoid(logits)
        ranks = scores + weights["correction"] if config.correction else scores.copy()
        groups = ranks.reshape(config.num_groups, -1)
        best = -np.sort(-groups)[:, : 1 if config.score == "softmax" else 2].sum(-1)
        groups[np.argsort(-best)[config.groups_per_token :]] = -np.inf
        chosen = np.argsort(-groups.reshape(-1))[: config.experts_per_token]
        shares = scores[chosen] / (scores[chosen].sum() if config.normalize else 1) * config.scale
        for expert, share in zip(chosen, shares, strict=True):
            gate, up = (linear(name, token, expert) for name in ("expert_gate", "expert_up"))
            if config.clamp is None:
                hidden = gate * sigmoid(gate) * up
            else:
                gate, up = np.minimum(gate, config.clamp), np.clip(up, -config.clamp, config.clamp)
                hidden = (up + 1) * gate * sigmoid(config.alpha * gate)
            out[index] += share * linear("expert_down", hidden, expert)
        if config.shared_size is not None:
            gate = linear("shared.gate", token)
            shared = linear("shared.down", gate * sigmoid(gate) * linear("shared.up", token))
            out[index] += shared * (sigmoid(linear("shared_gate", token)) if config.shared_gate else 1)
    return out


@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize("name", CASES)
def test_against_numpy(name, tokens):
    """One token gathers its experts' weights; 17 tokens are sorted by expert."""
    module = make(CASES[name])
    x = np.random.default_rng(tokens).standard_normal((1, tokens, WIDTH)).astype(np.float32)
    out = nnx.jit(lambda module, x: module(x))(module, x)
    expected = oracle(module, x[0])
    np.testing.assert_allclose(out[0], expected, rtol=0, atol=tolerances.EXPERTS_RELATIVE * np.abs(expected).max())


@pytest.mark.parametrize("batch", [1, 8])
def test_a_decode_step_touches_only_the_experts_that_it_uses(batch):
    """All other experts are NaN, and no operation has all experts among its operands but the gathers."""
    module = make(dataclasses.replace(SOFTMAX, num_experts=64))
    x = np.random.default_rng(batch).standard_normal((batch, 1, WIDTH)).astype(np.float32)
    expected = module(x)
    _, chosen = module._route(jnp.asarray(x[:, 0]))
    used = np.isin(np.arange(64), np.asarray(chosen))
    assert 2 <= used.sum() <= 2 * batch
    for linear in (module.expert_gate, module.expert_up, module.expert_down):
        linear.kernel.set_value(jnp.where(used[:, None, None], linear.kernel[...], jnp.nan))
    np.testing.assert_array_equal(module(x), expected)

    jaxpr = jax.make_jaxpr(lambda x: module(x))(x)
    readers = {
        equation.primitive.name
        for equation in equations(jaxpr.jaxpr)
        if any(getattr(x.aval, "shape", ())[:1] == (64,) and x.aval.ndim == 3 for x in equation.invars)
    }
    assert "gather" in readers
    assert readers <= {"gather", "pjit", "jit"}, readers


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr")):
            if hasattr(inner, "jaxpr"):
                yield from equations(inner.jaxpr)


def test_gradients_reach_router_and_experts():
    module = make(CASES["shared, with a gate"])
    x = np.random.default_rng(0).standard_normal((1, 17, WIDTH)).astype(np.float32)
    gradients = nnx.grad(lambda module: (module(x) ** 2).sum())(module)
    for path, gradient in nnx.to_flat_state(gradients):
        assert np.abs(gradient[...]).max() > tolerances.LOGPROBS, path


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, value) for name in ("num_experts", "experts_per_token") for value in (0, 2.0, None)),
        *(("intermediate_size", value) for value in (0, 2.0, None)),
        *((name, value) for name in ("num_groups", "groups_per_token") for value in (0, "1", 2**31)),
        *(("shared_size", value) for value in (0, -1, True, 2.0)),
        *((name, value) for name in ("normalize", "correction", "router_bias", "bias") for value in (0, None, "no")),
        ("shared_gate", True),
        *(("score", value) for value in (None, "softmax ", 1)),
        *((name, value) for name in ("scale", "alpha", "clamp") for value in (0.0, -1.0, "1", float("nan"))),
        ("num_groups", 4),
        ("experts_per_token", 7),
    ],
)
def test_wrong_fields(field, value):
    with pytest.raises(ValueError, match=f"^experts {field}: expected "):
        dataclasses.replace(SOFTMAX, **{field: value})
