"""Tokenizers of every kind and the files beside them: the behavior of transformers."""

import inspect
import json
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from pallas_attn_models.text.chat_template import ChatTemplate
from pallas_attn_models.text.detokenizer import Detokenizer
from pallas_attn_models.text.tokenizer import encode, load_tokenizer
from pallas_attn_models.text.tokenizer_config import CLASS_TOKENS, TokenizerConfig

TEXTS = [
    *(
        "Hello world",
        "  two  spaces ",
        "don't, it 's 12345!",
        "caf\u00e9 \u4e2d\u6587 \U0001f469\u200d\U0001f52c\u00a0x",
    ),
    *("\n a\n\tb\r\n", "<s>[INST] Hi [/INST] ok </s>a", "<s> x</s> y <unk>z", "a<extra> b", "", " ", "\u2581a \u2581"),
]
CORPUS = [
    "Hello world, hello words",
    "it is 1234 and 5678",
    "don't [INST] Hi [/INST] ok",
    "two  spaces",
    "x y z caf\u00e9",
]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(["<s>", "</s>", "<|endoftext|>"])
    return tokenizer


def split_digits() -> Tokenizer:
    tokenizer = byte_level()
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte])
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def qwen() -> Tokenizer:
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    split = pre_tokenizers.Split(Regex(rf"{words}|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated")
    tokenizer = byte_level()
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte])
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def byte_fallback(*, legacy: bool) -> Tokenizer:
    """Llama 2: SentencePiece's BPE, as it was once converted (by a normalizer), or as it is now (by Metaspace)."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(model["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=70, unk_token="<unk>", special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


def word_piece() -> Tokenizer:
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return tokenizer


def word_level() -> Tokenizer:
    words = ["<unk>", "<s>", "</s>", "Hello", "world", "a", "x", "y", "don", "'", "t", ",", "it", "s", "!", "ok", "Hi"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def left_by_training() -> Tokenizer:
    tokenizer = word_level()
    tokenizer.enable_truncation(3, direction="left")
    tokenizer.enable_padding(length=5, pad_id=0, pad_token="<unk>", direction="left")
    return tokenizer


TOKENIZERS = {
    "byte level": byte_level,
    "split digits": split_digits,
    "qwen": qwen,
    "legacy byte fallback": lambda: byte_fallback(legacy=True),
    "byte fallback": lambda: byte_fallback(legacy=False),
    "unigram": unigram,
    "word piece": word_piece,
    "word level": word_level,
    "truncated and padded": left_by_training,
}
ADDED = {"content": "<extra>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
ADDED |= {"special": True}
# Fields of tokenizer_config.json, and other files, for every tokenizer.
FILES = {
    "nothing": {},
    "general": {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": False}},
    "add bos": {"tokenizer_config.json": {"add_bos_token": True, "add_eos_token": True, "bos_token": "<s>"}},
    "cleaned up": {"tokenizer_config.json": {"clean_up_tokenization_spaces": True}},
    "special tokens are text": {"tokenizer_config.json": {"split_special_tokens": True, "bos_token": "<s>"}},
    "own names": {
        "tokenizer_config.json": {
            "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False},
            "image_token": "<image>",
            "extra_special_tokens": {"audio_token": "<extra>"},
            "pad_token": None,
            "add_bos_token": False,
        }
    },
    "a list": {"tokenizer_config.json": {"extra_special_tokens": ["<extra>", "<more>"], "eos_token": "</s>"}},
    "an old list": {"tokenizer_config.json": {"additional_special_tokens": ["<extra>"], "unk_token": "<unk>"}},
    "added tokens": {
        "tokenizer_config.json": {"added_tokens_decoder": {"900": ADDED}, "eos_token": "<extra>"},
        "special_tokens_map.json": {"bos_token": "not this one"},
    },
    "a map": {
        "tokenizer_config.json": {"bos_token": "not this one", "eos_token": "</s>"},
        "special_tokens_map.json": {"bos_token": {"content": "<s>", "rstrip": True}, "sep_token": "<extra>"},
    },
    "a map alone": {"special_tokens_map.json": {"bos_token": "<s>", "additional_special_tokens": ["<extra>"]}},
    "old added tokens": {
        "tokenizer_config.json": {"pad_token": "<extra>"},
        "added_tokens.json": {"<extra>": 950, "<more>": 951},
    },
}
CLASSES = {
    "byte level": ["GPT2TokenizerFast", "GPTNeoXTokenizerFast", "LlamaTokenizerFast"],
    "qwen": ["Qwen2Tokenizer"],
    "legacy byte fallback": ["LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer"],
    "byte fallback": ["LlamaTokenizer", "LlamaTokenizerFast"],
}
CLASS_FIELDS = [
    {},
    {"add_prefix_space": False},
    {"add_prefix_space": True},
    {"legacy": True},
    {"legacy": False, "add_prefix_space": False, "bos_token": None},
    {"eos_token": "</s>", "add_bos_token": True, "add_eos_token": True},
]


def save(directory: Path, tokenizer: Tokenizer, files: dict[str, dict], model_type: str = "llama") -> Path:
    tokenizer.save(str(directory / "tokenizer.json"))
    for name, fields in {"config.json": {"model_type": model_type}, **files}.items():
        (directory / name).write_text(json.dumps(fields))
    return directory


def compare(directory: Path, *, pieces_fit: bool = True) -> None:
    """Tokens, text, names and vocabulary equal those of transformers."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    ours = load_tokenizer(directory)
    for text in TEXTS:
        for special in (True, False):
            expected = theirs(text, add_special_tokens=special)["input_ids"]
            assert ours.encode(text, add_special_tokens=special).ids == expected, text
            decoded = theirs.decode(expected, skip_special_tokens=True)
            assert ours.decode(expected) == decoded
            detokenizer = Detokenizer(ours)
            pieces = [*map(detokenizer.push, expected), detokenizer.flush()]
            if pieces_fit:
                assert "".join(pieces) == decoded, "in pieces as at once"
            assert "".join(pieces).replace(" ", "") == decoded.replace(" ", "")
    named = {name: token.content for name, token in TokenizerConfig.read(directory).named.items()}
    assert named == theirs.special_tokens_map
    assert ours.get_vocab() == theirs.get_vocab()


@pytest.mark.parametrize("files", FILES)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_loads_like_transformers(tmp_path, name, files):
    # Clean-up removes spaces that were returned before the next word was known.
    compare(save(tmp_path, TOKENIZERS[name](), FILES[files]), pieces_fit=files != "cleaned up")


@pytest.mark.parametrize("fields", CLASS_FIELDS, ids=str)
@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kinds in CLASSES.items() for kind in kinds])
def test_with_a_class_of_transformers(tmp_path, name, kind, fields):
    config = {"tokenizer_class": kind, **fields}
    compare(save(tmp_path, TOKENIZERS[name](), {"tokenizer_config.json": config}))


@pytest.mark.parametrize("name", ["legacy byte fallback", "byte level"])
def test_a_mistral_has_the_tokenizer_of_its_file(tmp_path, name):
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_prefix_space": False}
    compare(save(tmp_path, TOKENIZERS[name](), {"tokenizer_config.json": config}, "mistral"))


@pytest.mark.parametrize("name", sorted(CLASS_TOKENS))
def test_the_tokens_of_a_class(name):
    transformers = pytest.importorskip("transformers")
    known = {}
    for kind in reversed(getattr(transformers, name).__mro__):
        for parameter in inspect.signature(kind.__init__).parameters.values():
            default = parameter.default
            if parameter.name.endswith("_token") and not isinstance(default, bool):
                known[parameter.name] = None if default is None else str(default)
    assert known == CLASS_TOKENS[name]


# --- independent of transformers ---


def test_settings_left_by_training_are_off(tmp_path):
    tokenizer = left_by_training()
    assert len(tokenizer.encode("a x y a x y").ids) == 5
    ours = load_tokenizer(save(tmp_path, tokenizer, {}))
    assert ours.encode("a x y a x y").ids == [5, 6, 7, 5, 6, 7]
    assert ours.encode("x").ids == [6]


def test_dropout_is_off_unlike_in_transformers(tmp_path):
    tokenizer = byte_level()
    tokenizer.model.dropout = 0.5
    ours = load_tokenizer(save(tmp_path, tokenizer, {}))
    assert len({tuple(ours.encode("Hello world, hello words").ids) for _ in range(20)}) == 1


@pytest.mark.parametrize("prefix", [True, False])
def test_a_class_sets_only_the_prefix_space(tmp_path, prefix):
    """transformers 5 would split digits and words as GPT-2 does, whatever ``tokenizer.json`` says."""
    fields = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": prefix}
    ours = load_tokenizer(save(tmp_path, split_digits(), {"tokenizer_config.json": fields}))
    # Digits come first, and each piece gets a prefix: the order is that of tokenizer.json.
    expected = split_digits()
    steps = [pre_tokenizers.Digits(individual_digits=True)]
    steps += [pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)]
    expected.pre_tokenizer = pre_tokenizers.Sequence(steps)
    for text in TEXTS:
        assert ours.encode(text).ids == expected.encode(text).ids


def test_the_names_of_a_template_come_from_all_files(tmp_path):
    template = "{{ bos_token }}{{ eos_token }}{{ image_token }}{{ unk_token }}"
    config = {"chat_template": template, "extra_special_tokens": {"image_token": "<i>"}, "bos_token": "b"}
    config["tokenizer_class"] = "LlamaTokenizer"
    files = {"tokenizer_config.json": config, "special_tokens_map.json": {"bos_token": "<s>", "eos_token": None}}
    files["special_tokens_map.json"]["eos_token"] = {"content": "</end>"}
    save(tmp_path, byte_fallback(legacy=False), files)
    assert ChatTemplate.read(tmp_path).render([{"role": "user", "content": "x"}]) == "<s></end><i><unk>"


# --- invalid files ---


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "[" * 100000, "nested too deeply"),
        ("tokenizer.json", "[]", "expected a JSON object, got list"),
        ("tokenizer.json", "{}", "expected a file of the tokenizers library, got: "),
        ("tokenizer.json", '{"model": 1, "added_tokens": 7}', "expected"),
        ("tokenizer.json", '{"added_tokens": [{"id": "x"}]}', "added_tokens: expected objects with an id"),
        (
            "tokenizer.json",
            '{"pre_tokenizer": {"type": "ByteLevel"}, "model": {"type": "BPE", "vocab": 3}}',
            "expected",
        ),
        ("tokenizer_config.json", b"\xff\xfe\xfd", "expected text in UTF-8"),
        ("tokenizer_config.json", '{"bos_token": 1}', "bos_token: expected the text of a token or an object"),
        ("tokenizer_config.json", '{"bos_token": {"content": "a", "lstrip": 3}}', "bos_token: expected the text"),
        ("tokenizer_config.json", '{"bos_token": {}}', "bos_token: expected the text"),
        ("tokenizer_config.json", '{"extra_special_tokens": 4}', "extra_special_tokens: expected a list or an object"),
        ("tokenizer_config.json", '{"extra_special_tokens": [4]}', "extra_special_tokens: expected the text"),
        ("tokenizer_config.json", '{"extra_special_tokens": [[]]}', "extra_special_tokens: expected the text"),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}', "added_tokens_decoder: expected an object from"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": "a"}}', "added_tokens_decoder: expected an object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": 2}}', "added_tokens_decoder: expected the text"),
        ("tokenizer_config.json", '{"split_special_tokens": "no"}', "split_special_tokens: expected true or false"),
        ("tokenizer_config.json", '{"tokenizer_class": ["a"]}', "tokenizer_class: expected a name"),
        ("tokenizer_config.json", '{"model_max_length": 1' + "0" * 5000 + "}", "expected JSON, got: Exceeds the limit"),
        ("special_tokens_map.json", '"x"', "expected a JSON object, got str"),
        ("special_tokens_map.json", '{"eos_token": ["x"]}', "eos_token: expected the text of a token"),
        ("added_tokens.json", '{"<x>": "7"}', "<x>: expected a token id, got '7'"),
        ("config.json", '{"model_type": ["x"]}', None),
    ],
    ids=str,
)
def test_unreadable_files_are_named(tmp_path, name, content, message):
    save(tmp_path, byte_level(), {"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}})
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if message is None:
        load_tokenizer(tmp_path)
        return
    with pytest.raises(ValueError, match=f"/{name}: .*{message}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
def test_a_directory_in_place_of_a_file(tmp_path, name):
    save(tmp_path, byte_level(), {})
    (tmp_path / name).mkdir()
    with pytest.raises(FileNotFoundError, match=f"/{name}: expected a JSON file, found a directory"):
        load_tokenizer(tmp_path)


def test_a_byte_order_mark_before_json(tmp_path):
    save(tmp_path, word_level(), {})
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}', encoding=encoding)
        assert TokenizerConfig.read(tmp_path).named["bos_token"].content == "<s>"


def test_a_regular_expression_that_panics(tmp_path, capfd):
    tokenizer = word_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    ours = load_tokenizer(save(tmp_path, tokenizer, {}))
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ValueError, match=r"tokenizer.json: expected to tokenize the text, got: .*retry-limit"):
        encode(path, ours, "a" * 50 + "!")
    assert encode(path, ours, "x") == [6], "it still works"


def test_a_surrogate_is_not_text(tmp_path):
    with pytest.raises(ValueError, match=r"expected text in UTF-8, got '\\udcff' in it"):
        encode(tmp_path, word_level(), "a\udcff")
