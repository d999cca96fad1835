"""Reads the files beside ``tokenizer.json``: the tokenizer's class, special tokens and added tokens.

There are three generations of files, with the precedence of transformers 5. ``tokenizer_config.json`` comes first. If
it lists ``added_tokens_decoder``, the others are ignored; otherwise ``special_tokens_map.json`` overrides it, and
``added_tokens.json`` and the tokens of ``tokenizer.json`` are added. Fields still absent, not even null, get the
defaults of the tokenizer's class (:data:`CLASS_TOKENS`).
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from pallas_attn_models.text_files import parse_json, read_json, read_text

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_SPECIAL_TOKENS_MAP, _ADDED_TOKENS, _MODEL_CONFIG = "special_tokens_map.json", "added_tokens.json", "config.json"
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# Models for which transformers ignores the tokenizer class and uses tokenizer.json alone.
_MISTRALS = {"mistral", "mistral3", "mixtral", "ministral", "ministral3", "pixtral", "voxtral"}


def _tokens(*values: str | None, names: tuple[str, ...] = _NAMES) -> dict[str, str | None]:
    return dict(zip(names, values, strict=False))


_BART = _tokens("<s>", "</s>", "<unk>", "</s>", "<pad>", "<s>", "<mask>")
_BERT = _tokens("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]", names=_NAMES[2:])
_LLAMA = _tokens("<s>", "</s>", "<unk>")
_QWEN = {"bos_token": None, **dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")}
_INFILLING = {"prefix": "\u2581<PRE>", "middle": "\u2581<MID>", "suffix": "\u2581<SUF>", "eot": "\u2581<EOT>"}
_INFILLING |= {"fill": "<FILL_ME>"}

# Default special tokens of each class; None: a name without a default token.
CLASS_TOKENS: dict[str, dict[str, str | None]] = {
    "AlbertTokenizer": _tokens("[CLS]", "[SEP]", "<unk>", "[SEP]", "<pad>", "[CLS]", "[MASK]"),
    "BarthezTokenizer": _BART,
    "BertTokenizer": _BERT,
    "BigBirdTokenizer": _tokens("<s>", "</s>", "<unk>", "[SEP]", "<pad>", "[CLS]", "[MASK]"),
    "BlenderbotTokenizer": _BART,
    "CLIPTokenizer": _tokens("<|startoftext|>", "<|endoftext|>", "<|endoftext|>") | {"pad_token": "<|endoftext|>"},
    "CamembertTokenizer": _BART,
    "CodeGenTokenizer": _tokens(*["<|endoftext|>"] * 3) | {"pad_token": None},
    "CodeLlamaTokenizer": _LLAMA | {f"{name}_token": text for name, text in _INFILLING.items()},
    "CohereTokenizer": _tokens(
        *("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<UNK>", "<SEP>", "<PAD>", "<CLS>", "<MASK_TOKEN>")
    ),
    "ConvBertTokenizer": _BERT,
    "DebertaTokenizer": _tokens("[CLS]", "[SEP]", "[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"),
    "DebertaV2Tokenizer": _tokens("[CLS]", "[SEP]", "[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"),
    "DistilBertTokenizer": _BERT,
    "FNetTokenizer": _tokens("[CLS]", "[SEP]", "<unk>", "[SEP]", "<pad>", "[CLS]", "[MASK]"),
    "FunnelTokenizer": _tokens("<s>", "</s>", "<unk>", "<sep>", "<pad>", "<cls>", "<mask>"),
    "GPT2Tokenizer": _tokens(*["<|endoftext|>"] * 3) | {"pad_token": None},
    "GPTNeoXTokenizer": _tokens(*["<|endoftext|>"] * 3) | {"pad_token": "<|padding|>"},
    "GemmaTokenizer": _tokens("<bos>", "<eos>", "<unk>") | {"pad_token": "<pad>", "mask_token": "<mask>"},
    "LlamaTokenizer": _LLAMA,
    "MBart50Tokenizer": {name: text for name, text in _BART.items() if name != "bos_token"},
    "MBartTokenizer": _BART,
    "MPNetTokenizer": _BART | {"unk_token": "[UNK]"},
    "NllbTokenizer": _BART,
    "PegasusTokenizer": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask_2>"},
    "Qwen2Tokenizer": _QWEN,
    "Qwen3_5Tokenizer": _QWEN,
    "ReformerTokenizer": {"eos_token": "</s>", "unk_token": "<unk>"},
    "RemBertTokenizer": _tokens("[CLS]", "[SEP]", "<unk>", "[SEP]", "<pad>", "[CLS]", "[MASK]"),
    "RobertaTokenizer": _BART,
    "T5Tokenizer": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "WhisperTokenizer": _tokens(*["<|endoftext|>"] * 3),
    "XGLMTokenizer": {name: text for name, text in _BART.items() if name != "mask_token"},
    "XLMRobertaTokenizer": _BART,
    "XLNetTokenizer": _tokens("<s>", "</s>", "<unk>", "<sep>", "<pad>", "<cls>", "<mask>"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizerConfig:
    """The merged files of a tokenizer.

    Attributes:
      directory: of the files.
      definition: content of ``tokenizer.json``; empty without the file.
      fields: content of ``tokenizer_config.json``; empty without the file.
      class_name: class in transformers, without "Fast"; "" for the generic one, which has no defaults.
      named: special tokens by name, such as ``"bos_token"`` or a model's own ``"image_token"``.
      extra: special tokens without a name.
      added: tokens outside the vocabulary, by id.
    """

    directory: Path
    definition: Mapping[str, Any]
    fields: Mapping[str, Any]
    class_name: str
    named: Mapping[str, AddedToken]
    extra: tuple[AddedToken, ...]
    added: Mapping[int, AddedToken]

    @staticmethod
    def read(directory: str | os.PathLike[str]) -> "TokenizerConfig":
        """Reads the files of a directory; any of them may be missing.

        Raises:
          ValueError: an unreadable file, or a field of the wrong kind; names the file.
        """
        directory = Path(directory)
        fields = _read_if_any(directory / TOKENIZER_CONFIG)
        path = directory / TOKENIZER
        text = read_text(path) if path.exists() else "{}"
        definition = parse_json(path, text)
        class_name = _class_name(directory, fields, text)

        special, sources = _special_tokens(directory, fields)
        padding = definition.get("padding")
        for name, default in CLASS_TOKENS.get(class_name, {}).items():
            special.setdefault(name, default)
        if isinstance(padding, dict):
            special.setdefault("pad_token", padding.get("pad_token"))
        config = directory / TOKENIZER_CONFIG
        added = _added_tokens(directory, fields, definition, special)
        by_text = {token.content: token for token in added.values()}
        named = {}
        for name, value in special.items():
            if value is not None and name != "extra_special_tokens":
                token = as_token(sources.get(name, config), name, value)
                named[name] = by_text.get(token.content, token)
        extra = special.get("extra_special_tokens") or ()
        tokens = tuple(as_token(config, "extra_special_tokens", value) for value in extra)
        return TokenizerConfig(directory, definition, fields, class_name, named, tokens, added)


def as_token(path: Path, name: str, value: Any) -> AddedToken:
    """Parses a token: its text, or an object with its text as ``"content"`` and matching flags.

    Raises:
      ValueError: neither of these; names the file and the field.
    """
    flags = {"special": True}
    if isinstance(value, dict):
        flags |= {flag: value[flag] for flag in _FLAGS if value.get(flag) is not None}
        value = value.get("content")
    if not isinstance(value, str) or not all(isinstance(flag, bool) for flag in flags.values()):
        raise ValueError(f"{path}: {name}: expected the text of a token or an object with its content, got {value!r}")
    return AddedToken(value, **flags)


def _read_if_any(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _class_name(directory: Path, fields: Mapping[str, Any], definition: str) -> str:
    model = _read_if_any(directory / _MODEL_CONFIG)
    name = fields.get("tokenizer_class") or model.get("tokenizer_class") or ""
    if not isinstance(name, str):
        raise ValueError(f"{directory / TOKENIZER_CONFIG}: tokenizer_class: expected a name, got {name!r}")
    name = name.removesuffix("Fast")
    # Llama 3 files wrongly name the tokenizer class of Llama 2.
    misnamed = name == "LlamaTokenizer" and '"ByteLevel"' in definition
    return "" if misnamed or str(model.get("model_type")) in _MISTRALS or name not in CLASS_TOKENS else name


def _special_tokens(directory: Path, fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Path]]:
    """Values by name, including the list ``"extra_special_tokens"``, and the file that each name comes from."""
    path = directory / _SPECIAL_TOKENS_MAP
    overriding = {} if "added_tokens_decoder" in fields else _read_if_any(path)
    special: dict[str, Any] = {}
    sources = {}
    for source, values in ((directory / TOKENIZER_CONFIG, fields), (path, overriding)):
        extra = values.get("extra_special_tokens") or values.get("additional_special_tokens") or []
        if not isinstance(extra, list | dict):
            raise ValueError(f"{source}: extra_special_tokens: expected a list or an object, got {extra!r}")
        own = {name: value for name, value in values.items() if _is_token(name, value)}
        own |= extra if isinstance(extra, dict) else {}
        special |= own
        sources |= dict.fromkeys(own, source)
        if isinstance(extra, list) and extra:
            before = special.get("extra_special_tokens", [])
            special["extra_special_tokens"] = before + [one for one in extra if one not in before]
    return special, sources


def _is_token(name: str, value: Any) -> bool:
    """Whether a field holds a token. Not every name in ``_token`` does: ``add_bos_token`` is a bool."""
    return name in _NAMES or (name.endswith("_token") and isinstance(value, str | dict))


def _added_tokens(
    directory: Path, fields: Mapping[str, Any], definition: Mapping[str, Any], special: Mapping[str, Any]
) -> dict[int, AddedToken]:
    config = directory / TOKENIZER_CONFIG
    if "added_tokens_decoder" in fields:
        listed = fields["added_tokens_decoder"]
        if not isinstance(listed, dict) or not all(id.isdecimal() and len(id) < 10 for id in listed):
            raise ValueError(f"{config}: added_tokens_decoder: expected an object from token ids to tokens")
        return {int(id): _plain_token(config, "added_tokens_decoder", token) for id, token in listed.items()}
    added = {}
    path = directory / _ADDED_TOKENS
    texts = _texts(special)
    for text, id in _read_if_any(path).items():
        if not isinstance(id, int) or isinstance(id, bool):
            raise ValueError(f"{path}: {text}: expected a token id, got {id!r}")
        added[id] = AddedToken(text, special=text in texts, normalized=text not in texts)
    path = directory / TOKENIZER
    listed = definition.get("added_tokens") or []
    for token in listed if isinstance(listed, list) else [listed]:
        if not isinstance(token, dict) or not isinstance(token.get("id"), int):
            raise ValueError(f"{path}: added_tokens: expected objects with an id, got {token!r}")
        added[token["id"]] = _plain_token(path, "added_tokens", token)
    return added


def _plain_token(path: Path, name: str, value: Any) -> AddedToken:
    """Parses a token that is special only if flagged so."""
    return as_token(path, name, {"special": False} | value if isinstance(value, dict) else value)


def _texts(special: Mapping[str, Any]) -> set[str]:
    named = [value for name, value in special.items() if name != "extra_special_tokens"]
    texts = (v.get("content") if isinstance(v, dict) else v for v in named + special.get("extra_special_tokens", []))
    return {text for text in texts if isinstance(text, str)}
