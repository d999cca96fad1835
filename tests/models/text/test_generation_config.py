"""``generation_config.json``: settings that are used, and fields that are not."""

import json

import pytest

from pallas_attn_models.text.generation_config import GenerationDefaults

LLAMA3 = {
    "bos_token_id": 128000,
    "do_sample": True,
    "eos_token_id": [128001, 128008, 128009],
    "temperature": 0.6,
    "top_p": 0.9,
    "transformers_version": "4.45.0.dev0",
}


@pytest.fixture
def read(tmp_path):
    def read(content: object) -> GenerationDefaults:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "generation_config.json").write_text(text)
        return GenerationDefaults.read(tmp_path)

    return read


def test_without_the_file_there_are_no_settings(tmp_path):
    assert GenerationDefaults.read(tmp_path) == GenerationDefaults({}, (), ())


def test_as_an_instruct_model_is_published(read):
    found = read(LLAMA3)
    assert found == GenerationDefaults({"temperature": 0.6, "top_p": 0.9}, (128001, 128008, 128009), ())
    assert str(found) == "generation_config.json: temperature 0.6, top_p 0.9, end tokens 128001 128008 128009"


@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": None}, {"temperature": 1.0}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        ({"temperature": 0.6, "top_k": 20}, {"temperature": 0.0, "top_k": 20}),
        ({"do_sample": True, "min_p": 0.1, "top_k": 5}, {"temperature": 1.0, "min_p": 0.1, "top_k": 5}),
        ({"repetition_penalty": 1.1}, {"temperature": 0.0, "repetition_penalty": 1.1}),
        ({"do_sample": True, "top_k": -1}, {"temperature": 1.0, "top_k": 0}),
        ({"do_sample": True, "top_k": 50.0}, {"temperature": 1.0, "top_k": 50}),
        ({"do_sample": True, "top_p": 0}, {"temperature": 1.0, "top_p": 2.0**-126}),
        ({"do_sample": True, "temperature": 0}, {"temperature": 0}),
        ({"do_sample": None, "min_p": None}, {"temperature": 0.0}),
        ({"do_sample": False, "top_p": 2, "min_p": -1, "temperature": -3, "top_k": -7}, {"temperature": 0.0}),
    ],
    ids=str,
)
def test_it_samples_only_if_it_says_so(read, fields, settings):
    assert read(fields).settings == settings


def test_one_end_token_and_unused_fields(read):
    found = read({"eos_token_id": 2, "num_beams": 4, "penalty_alpha": 0.6, "pad_token_id": 0, "typical_p": None})
    assert found.eos_token_ids == (2,)
    assert found.unused == ("num_beams", "penalty_alpha")
    assert str(found).endswith("end tokens 2, not used: num_beams penalty_alpha")


def test_fields_without_effect_are_not_reported(read):
    found = read({"typical_p": 1.0, "num_beams": 1, "early_stopping": False, "length_penalty": 1, "pad_token_id": -1})
    assert found.unused == ()
    assert read({"typical_p": 0.9, "early_stopping": True, "top_p": 7}).unused == (
        "early_stopping",
        "top_p",
        "typical_p",
    )


def test_end_tokens_outside_the_vocabulary(read):
    assert read({"eos_token_id": [-1, 4]}).eos_token_ids == (4,)
    assert read({"eos_token_id": None}).eos_token_ids == read({"eos_token_id": []}).eos_token_ids == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "generation_config.json: expected JSON, got"),
        ("[]", "generation_config.json: expected a JSON object, got list"),
        ({"top_p": "0.9"}, "top_p: expected a number, got '0.9'"),
        ({"top_k": True}, "top_k: expected a number, got True"),
        ({"eos_token_id": ["a"]}, "eos_token_id: expected token ids, got"),
        ({"eos_token_id": 2**31}, "eos_token_id: expected token ids, got"),
        ({"eos_token_id": {}}, "eos_token_id: expected token ids, got"),
        ({"do_sample": "true"}, "do_sample: expected true or false, got 'true'"),
        ({"top_k": 10**400}, "top_k: expected a finite number that fits float32"),
        ({"top_k": 2**31, "do_sample": True}, "top_k: expected an int in"),
        ({"top_k": 50.5, "do_sample": True}, "top_k: expected an int in"),
        ({"top_k": []}, r"top_k: expected a number, got \[\]"),
        ('{"temperature": 1e400}', "temperature: expected a finite number that fits float32, got inf"),
        ('{"temperature": NaN}', "temperature: expected a finite number that fits float32, got nan"),
        ({"temperature": 1e39}, "temperature: expected a finite number that fits float32"),
        ({"top_p": 1.5, "do_sample": True}, "generation_config.json: top_p: expected a number in"),
        ({"repetition_penalty": -1}, "generation_config.json: repetition_penalty: expected a finite number above 0"),
    ],
    ids=str,
)
def test_unreadable_fields(read, content, message):
    with pytest.raises(ValueError, match=message):
        read(content)
