"""Decoder: the logits of transformers for any padding, packing, chunking or cache."""

import dataclasses
import functools
import itertools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pallas_attn as pa
from pallas_attn_models.checkpoints.hf import load_hf, save_hf
from pallas_attn_models.decoder.config import DecoderConfig
from pallas_attn_models.decoder.decoder import Decoder
from pallas_attn_models.decoder.rope import RopeConfig, RotaryTables, inverse_frequencies, rotary_tables, rotate
from tests import tolerances

FIXTURES = Path(__file__).parents[1] / "fixtures"
CHECKPOINTS = sorted(path.parent.name for path in FIXTURES.glob("*/config.json"))
IMPLEMENTATIONS = ("reference", "xla")
SMALL = DecoderConfig(
    vocab_size=40, hidden_size=24, intermediate_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8
)


@pytest.fixture(autouse=True)
def _exact_products():
    """Otherwise float32 products on a GPU have the ten bits of TensorFloat-32."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def model() -> Decoder:
    """A checkpoint with wide weights, whose attention is far from uniform."""
    return load_hf(FIXTURES / "gqa_llama3_tied", dtype=jnp.float32)


def expected_logits(name: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """``(tokens [T], logits [T, V])`` of every prompt of a fixture."""
    with np.load(FIXTURES / name / "expected.npz") as arrays:
        return [(arrays[f"tokens_{i}"], arrays[f"logits_{i}"]) for i in range(len(arrays.files) // 2)]


def compiled(model: Decoder):
    """``model(...)`` under jit, with the weights as an argument: much faster than one operation at a time."""
    graph, state = nnx.split(model)
    run = jax.jit(lambda state, *arguments, **keywords: nnx.merge(graph, state)(*arguments, **keywords))
    return functools.partial(run, state)


def random_tokens(seed: int, *shape: int, vocab_size: int = 96) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, shape, dtype=np.int32)


def assert_close(actual, expected, tolerance: float) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=tolerance)


def test_the_fixtures_cover_what_they_are_for():
    configs = [load_hf(FIXTURES / name).config for name in CHECKPOINTS]
    assert {config.num_heads // config.num_kv_heads for config in configs} >= {1, 2, 4}
    assert {config.rope.type for config in configs} == {"default", "linear", "llama3"}
    assert {config.tie_word_embeddings for config in configs} == {True, False}
    assert any(config.num_heads * config.head_dim != config.hidden_size for config in configs)


@pytest.mark.parametrize(("name", "implementation"), [*((name, "xla") for name in CHECKPOINTS), ("gqa", "reference")])
def test_logits_are_those_of_transformers(name, implementation):
    model = load_hf(FIXTURES / name, dtype=jnp.float32, implementation=implementation)
    prompts = expected_logits(name)
    width = max(len(tokens) for tokens, _ in prompts)
    tokens = np.zeros((len(prompts), width), np.int32)
    positions = np.full_like(tokens, -1)
    for row, (prompt, _) in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        positions[row, : len(prompt)] = np.arange(len(prompt))
    out = compiled(model)(tokens, positions)
    assert out.logits.dtype == jnp.float32
    for row, (prompt, logits) in enumerate(prompts):
        assert_close(out.logits[row, : len(prompt)], logits, tolerances.LOGITS_TRANSFORMERS)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("seed", range(3))
def test_logits_are_those_of_transformers_live(seed, tmp_path):
    torch = pytest.importorskip("torch", reason="computes the logits with PyTorch")
    transformers = pytest.importorskip("transformers", reason="computes the logits with transformers")
    config = dataclasses.replace(
        SMALL,
        num_kv_heads=(1, 2, 4)[seed],
        tie_word_embeddings=seed == 1,
        max_position_embeddings=256,
        rope=RopeConfig(5e5, "llama3", factor=4.0, original_max_position_embeddings=32),
    )
    ours = Decoder(config, rngs=nnx.Rngs(seed))
    widen(ours, seed)
    save_hf(ours, tmp_path)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = random_tokens(seed, 2, 50, vocab_size=config.vocab_size)
    with torch.no_grad():
        logits = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    assert_close(compiled(ours)(tokens).logits, logits, tolerances.LOGITS_TRANSFORMERS)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_logits_are_those_of_mistral_with_a_sliding_window(tmp_path):
    torch = pytest.importorskip("torch", reason="computes the logits with PyTorch")
    transformers = pytest.importorskip("transformers", reason="computes the logits with transformers")
    ours = Decoder(dataclasses.replace(SMALL, sliding_windows=(16, 16)), rngs=nnx.Rngs(0))
    widen(ours, 0)
    save_hf(ours, tmp_path)
    theirs = transformers.MistralForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    tokens = random_tokens(0, 2, 50, vocab_size=SMALL.vocab_size)
    with torch.no_grad():
        logits = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    assert_close(compiled(load_hf(tmp_path, dtype=jnp.float32))(tokens).logits, logits, tolerances.LOGITS_TRANSFORMERS)
    whole = Decoder(SMALL, rngs=nnx.Rngs(0))
    widen(whole, 0)
    assert np.abs(compiled(whole)(tokens).logits - logits).max() > 0.1, "the window shows"


def widen(model: Decoder, seed: int) -> None:
    """Replaces every weight by a wide random one, so that every part of the model affects the logits."""
    generator = np.random.default_rng(seed)
    state = nnx.state(model)
    nnx.update(model, jax.tree.map(lambda x: jnp.asarray(generator.normal(x.ndim == 1, 0.3, x.shape), x.dtype), state))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_changes_nothing_at_real_tokens(implementation):
    model = load_hf(FIXTURES / "gqa_llama3_tied", dtype=jnp.float32, implementation=implementation)
    lengths, width = (3, 11, 1, 3), 11
    rows = [random_tokens(seed, length) for seed, length in enumerate(lengths)]
    tokens = np.full((len(rows), width), 2**31 - 1, np.int32)  # outside any vocabulary and any memory
    positions = np.full_like(tokens, -1)
    for row, real in enumerate(rows):
        where = slice(0, len(real)) if row == 3 else slice(width - len(real), width)  # one row is padded on the right
        tokens[row, where] = real
        positions[row, where] = np.arange(len(real))
    run = compiled(model)
    out = run(tokens, positions)
    assert np.isfinite(out.logits).all()
    for row, real in enumerate(rows):
        alone = run(real[None])
        assert_close(out.logits[row, positions[row] >= 0], alone.logits[0], tolerances.PADDED_LOGITS)
        assert_close(out.hidden[row, positions[row] >= 0], alone.hidden[0], tolerances.PADDED_LOGITS)


def test_a_token_outside_the_vocabulary_gives_nan(model):
    run = compiled(model)
    for token in (-1, model.config.vocab_size):
        assert np.isnan(run(jnp.full((1, 1), token, jnp.int32)).logits).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_chunks_through_caches_equal_one_uncached_call(implementation):
    model = load_hf(FIXTURES / "gqa_llama3_tied", dtype=jnp.float32, implementation=implementation)
    run = compiled(model)
    tokens = random_tokens(0, 2, 12)
    uncached = run(tokens).logits
    for chunks in ((6, 6), (6, 1, 1, 4)):
        caches = model.init_caches(batch_size=2, capacity=16)
        logits = []
        for chunk in np.split(tokens, np.cumsum(chunks)[:-1], axis=1):
            out = run(chunk, caches=caches)  # positions continue after the cached tokens
            caches = out.caches
            logits.append(out.logits)
        assert len(caches) == model.config.num_layers
        np.testing.assert_array_equal(caches[0].lengths, [12, 12])
        assert_close(jnp.concatenate(logits, 1), uncached, tolerances.CACHED_LOGITS)


def test_rows_of_unequal_length_share_caches(model):
    """Left-padded prompts, then one token per row."""
    run = compiled(model)
    rows = [random_tokens(seed, length) for seed, length in enumerate((9, 2, 9))]
    tokens, positions = np.zeros((3, 8), np.int32), np.full((3, 8), -1, np.int32)
    for row, real in enumerate(rows):
        prompt = real[:-1]
        tokens[row, 8 - len(prompt) :] = prompt
        positions[row, 8 - len(prompt) :] = np.arange(len(prompt))
    caches = run(tokens, positions, model.init_caches(batch_size=3, capacity=12)).caches
    np.testing.assert_array_equal(caches[0].lengths, [8, 1, 8])
    out = run(np.stack([real[-1:] for real in rows]), caches[0].lengths[:, None], caches)
    for cache in out.caches:
        np.testing.assert_array_equal(cache.lengths, [9, 2, 9])
    for row, real in enumerate(rows):
        assert_close(out.logits[row, 0], run(real[None]).logits[0, -1], tolerances.CACHED_LOGITS)


def test_packed_documents_equal_documents_alone(model):
    documents = [random_tokens(seed, length) for seed, length in enumerate((3, 8, 3))]
    run = compiled(model)
    alone = np.concatenate([run(one[None]).logits[0] for one in documents])
    tokens = np.concatenate(documents)[None]
    segment_ids = np.repeat(np.arange(3, dtype=np.int32), [3, 8, 3])[None]
    restarting = np.concatenate([np.arange(len(one), dtype=np.int32) for one in documents])[None]
    for positions in (restarting, np.arange(14, dtype=np.int32)[None]):
        packed = run(tokens, positions, segment_ids=segment_ids)
        assert_close(packed.logits[0], alone, tolerances.PADDED_LOGITS)


def test_one_row_of_positions_serves_all(model):
    tokens = random_tokens(0, 3, 6)
    positions = np.arange(4, 10, dtype=np.int32)[None]
    run = compiled(model)
    one = run(tokens, positions)
    assert_close(one.logits, run(tokens, positions.repeat(3, 0)).logits, tolerances.PADDED_LOGITS)
    cached = run(tokens, positions, model.init_caches(batch_size=3, capacity=8))
    assert_close(one.logits, cached.logits, tolerances.CACHED_LOGITS)


def test_the_block_mask_says_what_was_visited(model):
    sizes = pa.BlockSizes(q=4, kv=4)
    small = load_hf(FIXTURES / "gqa_llama3_tied", dtype=jnp.float32)
    small.block_sizes = sizes
    tokens = random_tokens(0, 1, 12)
    run = compiled(small)
    out = run(tokens)
    np.testing.assert_array_equal(out.block_masks[0].num_active, [[[1, 2, 3]]])
    assert_close(out.logits, compiled(model)(tokens).logits, tolerances.PADDED_LOGITS)
    cached = run(tokens, caches=small.init_caches(batch_size=1, capacity=400))
    assert cached.block_masks[0].num_active.sum() == 6  # of 300: empty slots are not read


def test_layer_hooks_come_before_each_layer(model):
    seen = []

    def silence_before_last(index, hidden):
        seen.append((index, hidden.shape))
        return hidden if index == 0 else jnp.zeros_like(hidden)

    tokens = random_tokens(0, 2, 5)
    graph, state = nnx.split(model)

    @jax.jit
    def run(state):
        return nnx.merge(graph, state)(tokens, layer_hook=silence_before_last)

    hooked = run(state)
    assert seen == [(0, (2, 5, 32)), (1, (2, 5, 32))]
    # A residual stream of zeros stays one: RMSNorm, attention and MLP have no bias.
    np.testing.assert_array_equal(hooked.logits, 0)
    assert compiled(model)(tokens).logits.std() > 1


@pytest.mark.parametrize("name", ["gqa", "mqa_tied"])
def test_the_head_can_be_applied_later(name):
    model = load_hf(FIXTURES / name, dtype=jnp.float32)
    tokens = random_tokens(0, 2, 5)
    out = jax.jit(lambda tokens: model(tokens, apply_head=False))(tokens)
    assert out.logits is None
    assert out.hidden.shape == (2, 5, model.config.hidden_size)
    assert_close(model.logits(out.hidden[:, -1:]), compiled(model)(tokens).logits[:, -1:], tolerances.PADDED_LOGITS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near_float32(dtype):
    name = {"bfloat16": "gqa_llama3_tied", "float16": "mha_llama3_sharded"}[dtype]  # whose weights are of that dtype
    half = load_hf(FIXTURES / name, dtype=dtype)
    tokens, logits = expected_logits(name)[2]
    run = compiled(half)
    cached = run(tokens[None], caches=half.init_caches(batch_size=1, capacity=48))
    assert cached.caches[0].view().key.dtype == jnp.dtype(dtype)
    for out in (run(tokens[None]), cached):
        assert (out.hidden.dtype, out.logits.dtype) == (jnp.dtype(dtype), jnp.float32)
        error = np.sqrt(np.mean(np.square(out.logits[0] - logits)) / np.mean(np.square(logits)))
        assert error < tolerances.HALF_LOGITS_RELATIVE[dtype]


def test_weights_can_be_held_in_a_wider_dtype_than_activations():
    model = Decoder(SMALL, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.float32)}
    out = compiled(model)(random_tokens(0, 1, 4, vocab_size=40))
    assert (out.hidden.dtype, out.logits.dtype) == (jnp.bfloat16, jnp.float32)


def test_every_weight_has_a_gradient_and_padding_gives_none():
    model = Decoder(SMALL, rngs=nnx.Rngs(0), implementation="reference")
    widen(model, 0)
    real = random_tokens(1, 1, 6, vocab_size=40)

    def gradients(tokens, positions):
        def loss(model):
            log_probs = jax.nn.log_softmax(model(tokens, positions).logits)[:, :-1]
            chosen = jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]
            return -jnp.sum(jnp.where(positions[:, :-1] >= 0, chosen, jnp.float32(0)))

        return nnx.jit(nnx.grad(loss))(model)

    alone = gradients(jnp.asarray(real), jnp.arange(6, dtype=jnp.int32)[None])
    padded = gradients(
        jnp.pad(real, ((0, 0), (3, 0)), constant_values=39),
        jnp.pad(jnp.arange(6, dtype=jnp.int32)[None], ((0, 0), (3, 0)), constant_values=-1),
    )
    for (path, a), (_, b) in zip(jax.tree.leaves_with_path(alone), jax.tree.leaves_with_path(padded), strict=True):
        assert np.abs(a).max() > 0, path
        np.testing.assert_allclose(a, b, rtol=tolerances.GRADIENTS_RTOL, atol=tolerances.PADDED_LOGITS)


def test_large_models_can_be_described_without_memory():
    config = DecoderConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_layers=8,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
    )
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    leaves = jax.tree.leaves(nnx.state(model))
    assert sum(leaf.size for leaf in leaves) == 2 * 128256 * 8192 + 8192 + 8 * 855_654_400
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def zeros(*shape: int) -> jax.Array:
    return jnp.zeros(shape, jnp.int32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": [[1.0]]}, r"tokens: expected int32 \[B, T\], .* got float64 \[1, 1\]"),
        ({"tokens": zeros(4)}, r"tokens: .* got int32 \[4\]"),
        ({"tokens": zeros(2, 0)}, r"tokens: .* got int32 \[2, 0\]"),
        ({"positions": zeros(2, 3)}, r"positions: .* \[2\|1, 4\], got \[2, 3\]"),
        ({"positions": zeros(3, 4)}, r"positions: .* got \[3, 4\]"),
        ({"positions": jnp.zeros((2, 4))}, r"positions: expected int32 .* got float32"),
        ({"segment_ids": zeros(2, 5)}, r"segment_ids: .* got \[2, 5\]"),
    ],
)
def test_wrong_arguments_are_named(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(**{"tokens": zeros(2, 4), **arguments})


def test_caches_that_do_not_fit_are_named(model):
    caches = model.init_caches(batch_size=2, capacity=8)
    with pytest.raises(ValueError, match="caches: expected one per layer, 2, got 1"):
        model(zeros(2, 4), caches=caches[:1])
    with pytest.raises(ValueError, match=r"caches\[0\]: expected the batch size of tokens, 3, got 2"):
        model(zeros(3, 4), caches=caches)
    with pytest.raises(ValueError, match="segment_ids: expected None together with caches"):
        model(zeros(2, 4), caches=caches, segment_ids=zeros(2, 4))


def test_a_dtype_that_activations_cannot_have():
    with pytest.raises(ValueError, match="dtype: expected one of float32, bfloat16, float16, got int32"):
        Decoder(SMALL, rngs=nnx.Rngs(0), dtype=jnp.int32)


@pytest.mark.parametrize(
    ("option", "value", "kind", "message"),
    [
        ("config", None, TypeError, "config: expected a DecoderConfig, got NoneType"),
        ("config", {"vocab_size": 40}, TypeError, "config: expected a DecoderConfig, got dict"),
        ("config", DecoderConfig, TypeError, "config: expected a DecoderConfig, got type"),
        ("rngs", None, TypeError, r"rngs: expected an nnx\.Rngs, got NoneType"),
        ("rngs", 0, TypeError, r"rngs: expected an nnx\.Rngs, got int"),
        ("rngs", jax.random.key(0), TypeError, r"rngs: expected an nnx\.Rngs, got PRNGKeyArray"),
        ("rngs", nnx.Rngs(dropout=0), ValueError, r"rngs: expected a stream 'params' or 'default', got \['dropout'\]"),
        ("dtype", None, TypeError, "dtype: expected one of float32, bfloat16, float16, got None"),
        ("dtype", "tf32", ValueError, "dtype: expected one of float32, bfloat16, float16, got 'tf32'"),
        ("param_dtype", jnp.float64, ValueError, "param_dtype: expected one of .*, got float64"),
        ("param_dtype", 16, TypeError, "param_dtype: expected one of .*, got 16"),
        ("implementation", "cuda", ValueError, "implementation: expected one of .*, got 'cuda'"),
        ("implementation", ["xla"], TypeError, "implementation: expected one of .*, got list"),
        ("block_sizes", (64, 64), TypeError, "block_sizes: expected a BlockSizes or None, got tuple"),
    ],
)
def test_wrong_kinds_of_objects_are_refused_at_once(option, value, kind, message):
    arguments = {"config": SMALL, "rngs": nnx.Rngs(0), option: value}
    with pytest.raises(kind, match=message):
        Decoder(**arguments)


def test_weights_use_the_keys_of_the_stream():
    rngs, other = nnx.Rngs(7, params=3), nnx.Rngs(7, params=3)
    models = [Decoder(SMALL, rngs=rngs) for _ in range(2)]
    for model in models:
        for kernel in (
            model.embedding.table,
            *(
                linear.kernel
                for layer in model.layers
                for part in (layer.attention, layer.mlp)
                for linear in vars(part).values()
                if isinstance(linear, nnx.Linear)
            ),
            model.head.kernel,
        ):
            expected = nnx.initializers.normal(0.02)(other.params(), kernel.shape, kernel.dtype)
            np.testing.assert_array_equal(kernel[...], expected)
    assert rngs.params.count[...] == other.params.count[...] == 2 * (2 + 7 * SMALL.num_layers)
    assert rngs.default.count[...] == 0


def test_a_decoder_is_described_in_time_linear_in_its_layers():
    """Counts Python function calls, which do not depend on the load of the machine."""

    def calls(num_layers: int) -> int:
        config, count = dataclasses.replace(SMALL, num_layers=num_layers), itertools.count()
        sys.setprofile(lambda _, event, __: next(count) if event == "call" else None)
        try:
            nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
        finally:
            sys.setprofile(None)
        return next(count)

    calls(1)
    one, few, many = calls(1), calls(11), calls(41)
    assert many - one == pytest.approx(4 * (few - one), rel=0.05)


def test_llama3_scaling_keeps_short_waves_stretches_long_ones_and_joins_smoothly():
    rope = RopeConfig(5e5, "llama3", factor=8.0, original_max_position_embeddings=8192)
    plain, scaled = inverse_frequencies(128, RopeConfig(5e5)), inverse_frequencies(128, rope)
    wavelength = 2 * np.pi / plain
    short, long = wavelength < 8192 / 4, wavelength > 8192 / 1
    np.testing.assert_array_equal(scaled[short], plain[short])
    np.testing.assert_array_equal(scaled[long], plain[long] / 8)
    between = scaled[~short & ~long] / plain[~short & ~long]
    assert len(between) > 2
    assert (np.diff(between) < 0).all()
    assert between.max() < 1
    assert between.min() > 1 / 8


def test_rotation_knows_only_distances():
    generator = np.random.default_rng(0)
    query, key = (jnp.asarray(generator.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))

    def logit(q_position, kv_position):
        cos, sin, _ = rotary_tables(jnp.asarray([[q_position, kv_position]], jnp.int32), 16, RopeConfig())
        return jnp.sum(
            rotate(query, RotaryTables(cos[:, :1], sin[:, :1], False))
            * rotate(key, RotaryTables(cos[:, 1:], sin[:, 1:], False))
        )

    assert_close(logit(30, 10), logit(220, 200), tolerances.ROTATION)
    assert abs(logit(30, 10) - logit(31, 10)) > 0.01
    np.testing.assert_array_equal(rotate(query, rotary_tables(jnp.zeros((1, 1), jnp.int32), 16, RopeConfig())), query)
