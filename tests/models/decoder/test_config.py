"""DecoderConfig: every field of a config.json is used, known to be irrelevant, or an error."""

import dataclasses
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from pallas_attn_models.checkpoints.families import FAMILIES
from pallas_attn_models.checkpoints.hf_config import config_from_hf, config_to_hf
from pallas_attn_models.checkpoints.irrelevant import IRRELEVANT, SUPPORTED
from pallas_attn_models.checks import shown
from pallas_attn_models.decoder.config import DecoderConfig, ExpertsConfig, LayerSizes
from pallas_attn_models.decoder.rope import RopeConfig, inverse_frequencies

FIXTURES = Path(__file__).parents[1] / "fixtures"

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


def id_of(value) -> str:
    """A short representation, even of an int of any length."""
    return shown(value, 12)


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
    assert config_from_hf(fields) == DecoderConfig(
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
    config = config_from_hf(SMALL)
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
    assert config_from_hf({**SMALL, **spelling}).rope == expected


def test_llama3_without_an_original_length_takes_the_context_length():
    scaling = {**LLAMA3_SCALING, "rope_type": "llama3", "original_max_position_embeddings": None}
    config = config_from_hf({**SMALL, "rope_scaling": scaling, "max_position_embeddings": 4096})
    assert config.rope.original_max_position_embeddings == 4096


@pytest.mark.parametrize("directory", sorted(path.parent.name for path in FIXTURES.glob("*/config.json")))
def test_to_hf_reads_back_equal(directory):
    config = config_from_hf(json.loads((FIXTURES / directory / "config.json").read_text()))
    written = json.loads(json.dumps(config_to_hf(config)))
    assert config_from_hf(written) == config


@pytest.mark.parametrize("eos_token_ids", [(), (7,), (7, 9)])
def test_to_hf_keeps_the_end_of_text_tokens(eos_token_ids):
    config = dataclasses.replace(config_from_hf(SMALL), eos_token_ids=eos_token_ids)
    assert config_from_hf(config_to_hf(config)) == config


def test_an_unknown_field_is_refused_by_name():
    with pytest.raises(ValueError, match="expected only known fields, got logit_softcap"):
        config_from_hf({**SMALL, "logit_softcap": 30.0})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "gemma9"),
        ("architectures", ["LlamaForSequenceClassification"]),
        ("hidden_act", "mish"),
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
        config_from_hf({**SMALL, field: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": {"rope_type": "axial", "factor": 4.0}}, "rope type: expected one of .* got 'axial'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_theta": 1.0}, "rope theta: expected more than 1"),
        ({"rope_scaling": {"rope_type": "longrope"}}, r"expected the fields .*long_factor.*, got \['factor', 'orig"),
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
        ({"eos_token_id": [2, -1]}, "eos_token_ids: expected ids in .*, got -1"),
    ],
)
def test_wrong_values_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**SMALL, **fields})


FULL = config_from_hf(SMALL)
WRONG_KINDS = [
    None,
    "7",
    [7],
    {"a": 7},
    7j,
    True,
    False,
    float("nan"),
    float("inf"),
    -float("inf"),
    10**400,
    -(10**400),
]
FLOATS = ("rms_norm_eps", "embedding_scale", "residual_scale", "logit_scale")
OPTIONAL_FLOATS = ("qkv_clip", "attention_scale", "attention_softcap", "alibi", "logit_softcap")
ROPE_FLOATS = ("theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
SIZES = ("vocab_size", "hidden_size", "num_layers", "max_position_embeddings")
LAYER_SIZES = ("intermediate_size", "num_heads", "num_kv_heads", "head_dim")
FLAGS = ("qkv_bias", "output_bias", "mlp_bias", "head_bias", "scale_by_layer", "attention_sinks", "mlp_gated")
NAMES = ("norm", "norm_position", "qk_norm", "qk_norm_kind", "activation")
BEYOND_FLOAT32 = [1e-300, 1e-46, 1e-40, 5e-324, 1e39, 1e308, 2**128, 10**400]
BEYOND_INT32 = [2**31, 2**32 + 1, 2**63, 2**64, 10**400, 10**5000]


def test_the_tables_have_all_fields():
    others = {"rope", "tie_word_embeddings", "eos_token_ids", "sliding_windows", "layer_ropes", "family"}
    others |= {"latent", "layer_sizes", "query_temperature", "experts", "dense_layers", "learned_positions"}
    tables = {*FLOATS, *OPTIONAL_FLOATS, *SIZES, *LAYER_SIZES, *FLAGS, *NAMES}
    assert tables | others == {field.name for field in dataclasses.fields(DecoderConfig)}
    others = {"type", "original_max_position_embeddings", "partial_rotary_factor", "interleaved", "truncate"}
    others |= {"attention_factor", "short_factor", "long_factor"}
    assert {*ROPE_FLOATS, *others} == {field.name for field in dataclasses.fields(RopeConfig)}


@pytest.mark.parametrize("value", [*WRONG_KINDS, 0, -1, 1.5, *BEYOND_INT32], ids=id_of)
@pytest.mark.parametrize("field", [*SIZES, *LAYER_SIZES])
def test_a_size_is_a_positive_int_of_32_bits(field, value):
    with pytest.raises(ValueError, match=f"^{field}: expected an int of at (least|most) .*, got ") as error:
        dataclasses.replace(FULL, **{field: value})
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("value", [*WRONG_KINDS, 0, 0.0, -1.0, *BEYOND_FLOAT32], ids=id_of)
@pytest.mark.parametrize("field", FLOATS)
def test_a_constant_is_a_positive_number_of_float32(field, value):
    with pytest.raises(ValueError, match=f"^{field}: expected a positive number") as error:
        dataclasses.replace(FULL, **{field: value})
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("value", [*WRONG_KINDS, 0, 0.0, -1.0, *BEYOND_FLOAT32], ids=id_of)
@pytest.mark.parametrize("field", ROPE_FLOATS)
@pytest.mark.parametrize("kind", ["default", "linear", "llama3"])
def test_rotary_settings_are_positive_numbers_of_float32(kind, field, value):
    settings = {"linear": {"factor": 2.0}, "llama3": LLAMA3_SCALING}.get(kind, {})
    with pytest.raises(ValueError, match=f"^rope {field}: expected a positive number"):
        RopeConfig(**{**settings, "type": kind, field: value})


@pytest.mark.parametrize("value", [*WRONG_KINDS, 0, -1, 1.5, *BEYOND_INT32], ids=id_of)
def test_the_original_length_is_a_positive_int_of_32_bits(value):
    with pytest.raises(
        ValueError, match=r"^rope original_max_position_embeddings: expected an int of at (least|most) "
    ):
        dataclasses.replace(LLAMA3_ROPE, original_max_position_embeddings=value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("rope", value) for value in ("default", {"theta": 1e4}, RopeConfig)),
        *((flag, value) for flag in ("tie_word_embeddings", *FLAGS) for value in (None, 0, 1, "true", [])),
        *((name, value) for name in NAMES for value in (0, True, "", "rms ", ["rms"], "silu_")),
        *((name, None) for name in ("norm", "norm_position", "activation")),
        *(("layer_sizes", value) for value in (None, 4, [LayerSizes(4, 2, 8, 16)] * 2, (LayerSizes(4, 2, 8, 16),))),
        *(("layer_sizes", value) for value in (((4, 2, 8, 16),) * 2, (None, None), ("4", "4"))),
        *((name, value) for name in OPTIONAL_FLOATS for value in (0.0, -1.0, "1", True, float("nan"), [2.0], 1e39)),
        *(("query_temperature", value) for value in (0.1, (0.1,), [0.1, 8], (0.0, 8), (0.1, 0), (0.1, 8.0))),
        *(("learned_positions", value) for value in (0, -1, 2.0, True, "8", 2**31)),
        *(("experts", value) for value in (4, {}, "4", ExpertsConfig)),
        *(("dense_layers", value) for value in (None, [0], (0,), (2,), ("0",))),
        *(("layer_ropes", value) for value in (None, [None], (None,), (None, "default"))),
        *(("family", value) for value in (None, 0, ["llama"])),
        *(("eos_token_ids", value) for value in (None, 2, [2], (2.0,), (True,), (None,), (-1,), (96,), (2**32 + 2,))),
        *(("eos_token_ids", value) for value in ((10**400,), ((2,),), "2")),
        *(("sliding_windows", value) for value in (None, 8, [8, 8], (8,), (0, 8), (8.0, 8), (2**31, 8), ("8", None))),
    ],
    ids=id_of,
)
def test_other_fields_of_the_wrong_kind(field, value):
    with pytest.raises(ValueError, match=f"^{field}( beta| length)?: expected "):
        dataclasses.replace(FULL, **{field: value})


@pytest.mark.parametrize("kind", [None, 3, ["linear"], {"type": "linear"}, "ntk", ("default",)])
def test_a_rope_type_of_the_wrong_kind(kind):
    with pytest.raises(ValueError, match=r"^rope type: expected one of "):
        RopeConfig(type=kind)


@pytest.mark.parametrize(
    ("kind", "theta", "factor"), [("default", 1e-30, 1.0), ("linear", 1e4, 1e-30), ("linear", 1e-16, 1e-16)]
)
def test_angles_beyond_float32(kind, theta, factor):
    with pytest.raises(ValueError, match="rope theta, factor: expected angles within float32"):
        RopeConfig(theta, kind, factor)


def test_heads_together_are_a_size():
    with pytest.raises(ValueError, match=r"num_heads \* head_dim: expected an int of at most 2147483647"):
        dataclasses.replace(FULL, num_heads=2**16, num_kv_heads=1, head_dim=2**16)


def test_extreme_numbers_within_range_are_accepted():
    config = dataclasses.replace(FULL, rms_norm_eps=1.2e-38, vocab_size=2**31 - 1, rope=RopeConfig(theta=3e38))
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config
    assert np.isfinite(np.float32(inverse_frequencies(config.head_dim, config.rope))).all()


# Numbers in config.json can be anything in JSON; Python's json reads 1e999 as infinity.
FROM_JSON = [
    "1e-300",
    "1e308",
    "1e999",
    "-1e999",
    "NaN",
    "1" + 400 * "0",
    "true",
    '"1"',
    "[]",
    "{}",
    "0",
    "-1",
    "1e-45",
]
NUMBERS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope theta",
    "eos_token_id": "eos_token_ids",
}


# Token 0 and a list of tokens are valid.
RIGHT = {("eos_token_id", "0"), ("eos_token_id", "[]")}
WRONG = [case for case in itertools.product(NUMBERS, FROM_JSON) if case not in RIGHT]


@pytest.mark.parametrize(("field", "text"), WRONG, ids=id_of)
def test_numbers_of_a_file_are_refused_by_the_name_of_their_field(field, text):
    fields = json.loads(f'{{"{field}": {text}}}')
    with pytest.raises(ValueError, match=f"^{NUMBERS[field]}: expected "):
        config_from_hf({**SMALL, **fields})


@pytest.mark.parametrize("text", FROM_JSON, ids=id_of)
@pytest.mark.parametrize("field", LLAMA3_SCALING)
def test_rotary_numbers_of_a_file_are_refused_by_the_name_of_their_field(field, text):
    scaling = {**LLAMA3_SCALING, "rope_type": "llama3", field: json.loads(text)}
    with pytest.raises(ValueError, match=f"^rope {field}: expected "):
        config_from_hf({**SMALL, "rope_scaling": scaling})


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("value", [[], "", 0, False, [1], "linear", True])
def test_rotary_settings_are_an_object_or_nothing(field, value):
    with pytest.raises(ValueError, match=f"^{field}: expected an object, got {re.escape(repr(value))}"):
        config_from_hf({**SMALL, field: value})


@pytest.mark.parametrize("fields", [None, 3, "config.json", [("vocab_size", 3)], DecoderConfig])
def test_fields_that_are_not_a_mapping(fields):
    with pytest.raises(TypeError, match=f"fields: expected the mapping .*, got {type(fields).__name__}"):
        config_from_hf(fields)


def test_long_values_and_many_fields_are_shown_in_part():
    deep = json.loads("[" * 900 + "]" * 900)
    for fields in ({"hidden_act": "x" * 10**6}, {"mlp_bias": deep}, {f"field{n}": n for n in range(10**4)}):
        with pytest.raises(ValueError, match="expected") as error:
            config_from_hf({**SMALL, **fields})
        assert len(str(error.value)) < 300


@pytest.mark.parametrize("field", SMALL)
def test_sizes_must_be_there(field):
    fields = {name: value for name, value in SMALL.items() if name != field}
    with pytest.raises(ValueError, match=f"{field}: expected"):
        config_from_hf(fields)


def test_an_unused_rope_factor_is_refused():
    with pytest.raises(ValueError, match="rope factor: expected no value"):
        RopeConfig(type="default", factor=2.0)


def test_no_field_is_both_irrelevant_and_read():
    assert not SUPPORTED.keys() & IRRELEVANT.keys()
    for family in FAMILIES.values():
        read = {name for setting in family.settings for name in getattr(setting, "name", "").split()}
        assert not read & (SUPPORTED.keys() | IRRELEVANT.keys() | family.irrelevant.keys()), family.name
        assert not family.supported.keys() & (read | IRRELEVANT.keys() | family.irrelevant.keys()), family.name


def test_every_field_that_transformers_writes_is_handled():
    transformers = pytest.importorskip("transformers", reason="compares with transformers' own LlamaConfig")
    fields = transformers.LlamaConfig(num_key_value_heads=8).to_dict()
    config = config_from_hf(fields)
    assert (config.hidden_size, config.num_kv_heads) == (fields["hidden_size"], 8)
    reread = transformers.LlamaConfig(**config_to_hf(config))
    assert reread.rope_parameters == fields["rope_parameters"]


MISTRAL = {**SMALL, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "num_attention_heads": 8}


def test_mistral_has_a_window_in_every_layer():
    config = config_from_hf({**MISTRAL, "sliding_window": 16})
    layers = SMALL["num_hidden_layers"]
    assert config.sliding_windows == (16,) * layers
    assert [config.sliding_window(layer) for layer in range(layers)] == [16] * layers
    assert config_from_hf(config_to_hf(config)) == config
    assert config_from_hf({**MISTRAL, "sliding_window": None}).sliding_windows == ()


def test_absent_fields_of_mistral_have_its_own_defaults():
    transformers = pytest.importorskip("transformers", reason="compares with transformers' own MistralConfig")
    config, theirs = config_from_hf(MISTRAL), transformers.MistralConfig(**MISTRAL)
    assert config.num_kv_heads == theirs.num_key_value_heads
    assert config.max_position_embeddings == theirs.max_position_embeddings
    assert set(config.sliding_windows) == {theirs.sliding_window}
    assert transformers.MistralConfig(**config_to_hf(config)).sliding_window == theirs.sliding_window


@pytest.mark.parametrize("windows", [(8,), (8, None, 8), (0, 8), [8, 8], (True, 8)])
def test_windows_are_one_for_each_layer(windows):
    config = config_from_hf({**SMALL, "num_hidden_layers": 2})
    with pytest.raises(ValueError, match="sliding_windows: expected"):
        dataclasses.replace(config, sliding_windows=windows)


def test_a_llama_has_no_window_and_a_file_at_most_one():
    with pytest.raises(ValueError, match="sliding_window: expected None, got 16"):
        config_from_hf({**SMALL, "sliding_window": 16})
    config = config_from_hf({**SMALL, "num_hidden_layers": 2})
    some = dataclasses.replace(config, sliding_windows=(8, None))
    assert config_to_hf(some)["model_type"] == "ministral", "the first family that can have windows in some layers"
    assert config_from_hf(config_to_hf(some)) == some
    with pytest.raises(ValueError, match=r"config: expected what a model family can express, got .*sliding_windows"):
        config_to_hf(dataclasses.replace(config, sliding_windows=(8, 16)))


def test_end_tokens_beyond_the_vocabulary_are_ignored_with_a_warning(caplog):
    assert config_from_hf({**SMALL, "eos_token_id": [2, 96, 50256]}).eos_token_ids == (2,)
    assert "eos_token_id: [96, 50256] ignored, beyond the vocabulary of 96 tokens" in caplog.text
