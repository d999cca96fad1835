"""DecoderConfig: every field of a config.json is used, known to be irrelevant, or refused by name."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from pallas_attn_models.config import IRRELEVANT, SUPPORTED, DecoderConfig, RopeConfig

FIXTURES = Path(__file__).parent / "fixtures"

SMALL = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA3_ROPE = RopeConfig(theta=500000.0, type="llama3", **LLAMA3_SCALING)


def test_a_published_config_is_read_in_full():
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {**LLAMA3_SCALING, "rope_type": "llama3"},
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.0",
        "use_cache": True,
        "vocab_size": 128256,
    }
    assert DecoderConfig.from_hf(fields) == DecoderConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope=LLAMA3_ROPE,
        tie_word_embeddings=False,
        max_position_embeddings=131072,
        eos_token_ids=(128001, 128008, 128009),
    )


def test_absent_fields_have_the_defaults_of_transformers():
    config = DecoderConfig.from_hf(SMALL)
    assert (config.num_kv_heads, config.head_dim, config.rms_norm_eps) == (4, 8, 1e-6)
    assert (config.rope, config.tie_word_embeddings, config.eos_token_ids) == (RopeConfig(), False, (2,))


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ({"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3_SCALING}}, LLAMA3_ROPE),
        ({"rope_theta": 500000.0, "rope_scaling": {"type": "llama3", **LLAMA3_SCALING}}, LLAMA3_ROPE),
        (
            {"rope_parameters": {"rope_theta": 500000.0, "type": "llama3", "rope_type": "llama3", **LLAMA3_SCALING}},
            LLAMA3_ROPE,
        ),
        ({"rope_theta": 1e6, "rope_scaling": None}, RopeConfig(theta=1e6)),
        ({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, RopeConfig(theta=1e6)),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, RopeConfig(type="linear", factor=4.0)),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}}, RopeConfig()),
    ],
)
def test_both_spellings_of_rotary_settings(spelling, expected):
    assert DecoderConfig.from_hf({**SMALL, **spelling}).rope == expected


def test_llama3_without_an_original_length_takes_the_context_length():
    scaling = {**LLAMA3_SCALING, "rope_type": "llama3", "original_max_position_embeddings": None}
    config = DecoderConfig.from_hf({**SMALL, "rope_scaling": scaling, "max_position_embeddings": 4096})
    assert config.rope.original_max_position_embeddings == 4096


@pytest.mark.parametrize("directory", sorted(path.parent.name for path in FIXTURES.glob("*/config.json")))
def test_to_hf_reads_back_equal(directory):
    config = DecoderConfig.from_hf(json.loads((FIXTURES / directory / "config.json").read_text()))
    written = json.loads(json.dumps(config.to_hf()))
    assert DecoderConfig.from_hf(written) == config


@pytest.mark.parametrize("eos_token_ids", [(), (7,), (7, 9)])
def test_to_hf_keeps_the_end_of_text_tokens(eos_token_ids):
    config = dataclasses.replace(DecoderConfig.from_hf(SMALL), eos_token_ids=eos_token_ids)
    assert DecoderConfig.from_hf(config.to_hf()) == config


def test_an_unknown_field_is_refused_by_name():
    with pytest.raises(ValueError, match="expected only known fields, got logit_softcap"):
        DecoderConfig.from_hf({**SMALL, "logit_softcap": 30.0})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "gemma"),
        ("architectures", ["LlamaForSequenceClassification"]),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("attention_dropout", 0.1),
        ("pretraining_tp", 2),
        ("sliding_window", 4096),
        ("quantization_config", {"quant_method": "gptq"}),
        ("partial_rotary_factor", 0.5),
        ("rope_interleaved", True),
        ("is_encoder_decoder", True),
    ],
)
def test_a_known_field_with_another_value_is_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}: expected .*, got {re.escape(repr(value))}"):
        DecoderConfig.from_hf({**SMALL, field: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type: expected one of .* got 'yarn'"),
        ({"rope_scaling": {"type": "linear", "rope_type": "llama3"}}, "rope_scaling: expected type='linear'"),
        ({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4}}, "rope_theta: expected theta=10000.0"),
        ({"rope_scaling": {"type": "linear"}}, r"expected the fields \['factor'\], got \[\]"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 32}}, "got .*beta_fast"),
        ({"rope_scaling": {"type": "linear", "factor": 0.0}}, "rope factor: expected a positive number"),
        ({"rope_scaling": {"type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor: expected 1.0"),
        ({"rope_scaling": "linear"}, "rope_scaling: expected an object"),
        (
            {"rope_scaling": {**LLAMA3_SCALING, "type": "llama3", "high_freq_factor": 1.0}},
            "high_freq_factor: expected more than",
        ),
        ({"num_key_value_heads": 3}, "num_kv_heads: expected a divisor of num_heads=4, got 3"),
        ({"head_dim": 7}, "head_dim: expected an even number"),
        ({"num_attention_heads": 5}, "head_dim: expected a value"),
        ({"hidden_size": 0}, "hidden_size: expected an int of at least 1, got 0"),
        ({"vocab_size": "96"}, "vocab_size: expected an int"),
        ({"num_hidden_layers": True}, "num_layers: expected an int"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps: expected a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a positive number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: expected a bool"),
        ({"eos_token_id": [2, 96]}, "eos_token_ids: expected ids in .*, got 96"),
    ],
)
def test_wrong_values_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_hf({**SMALL, **fields})


@pytest.mark.parametrize("field", SMALL)
def test_sizes_must_be_there(field):
    fields = {name: value for name, value in SMALL.items() if name != field}
    with pytest.raises(ValueError, match=f"{field}: expected"):
        DecoderConfig.from_hf(fields)


def test_a_rope_factor_that_nothing_reads_is_refused():
    with pytest.raises(ValueError, match="rope factor: expected no value"):
        RopeConfig(type="default", factor=2.0)


def test_no_field_is_both_irrelevant_and_read():
    assert not SUPPORTED.keys() & IRRELEVANT.keys()
    assert not IRRELEVANT.keys() & DecoderConfig.from_hf(SMALL).to_hf().keys() - {"bos_token_id"}


def test_every_field_that_transformers_writes_is_handled():
    transformers = pytest.importorskip("transformers", reason="compares with transformers' own LlamaConfig")
    fields = transformers.LlamaConfig(num_key_value_heads=8).to_dict()
    config = DecoderConfig.from_hf(fields)
    assert (config.hidden_size, config.num_kv_heads) == (fields["hidden_size"], 8)
    reread = transformers.LlamaConfig(**config.to_hf())
    assert reread.rope_parameters == fields["rope_parameters"]


MISTRAL = {**SMALL, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "num_attention_heads": 8}


def test_mistral_has_a_window_in_every_layer():
    config = DecoderConfig.from_hf({**MISTRAL, "sliding_window": 16})
    layers = SMALL["num_hidden_layers"]
    assert config.sliding_windows == (16,) * layers
    assert [config.sliding_window(layer) for layer in range(layers)] == [16] * layers
    assert DecoderConfig.from_hf(config.to_hf()) == config
    assert DecoderConfig.from_hf({**MISTRAL, "sliding_window": None}).sliding_windows == ()


def test_absent_fields_of_mistral_have_its_own_defaults():
    transformers = pytest.importorskip("transformers", reason="compares with transformers' own MistralConfig")
    config, theirs = DecoderConfig.from_hf(MISTRAL), transformers.MistralConfig(**MISTRAL)
    assert config.num_kv_heads == theirs.num_key_value_heads
    assert config.max_position_embeddings == theirs.max_position_embeddings
    assert set(config.sliding_windows) == {theirs.sliding_window}
    assert transformers.MistralConfig(**config.to_hf()).sliding_window == theirs.sliding_window


@pytest.mark.parametrize("windows", [(8,), (8, None, 8), (0, 8), [8, 8], (True, 8)])
def test_windows_are_one_for_each_layer(windows):
    config = DecoderConfig.from_hf({**SMALL, "num_hidden_layers": 2})
    with pytest.raises(ValueError, match="sliding_windows: expected"):
        dataclasses.replace(config, sliding_windows=windows)


def test_a_llama_has_no_window_and_a_file_only_one():
    with pytest.raises(ValueError, match="sliding_window: expected None for a Llama, got 16"):
        DecoderConfig.from_hf({**SMALL, "sliding_window": 16})
    config = DecoderConfig.from_hf({**SMALL, "num_hidden_layers": 2})
    with pytest.raises(ValueError, match="sliding_windows: expected the same for all layers of a file"):
        dataclasses.replace(config, sliding_windows=(8, None)).to_hf()
