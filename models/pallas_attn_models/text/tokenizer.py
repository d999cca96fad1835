"""Loads the tokenizer of a checkpoint like transformers 5: ``tokenizer.json``, modified by the files beside it.

If a class of transformers builds another pipeline than ``tokenizer.json`` describes, this follows the class for the
tokenizers of Llama 2, whose published files are of two kinds, and for the prefix space of byte-level ones. In all other
cases ``tokenizer.json`` decides.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import AddedToken, Tokenizer, decoders, models, processors

from pallas_attn_models.text.tokenizer_config import TOKENIZER, TOKENIZER_CONFIG, TokenizerConfig

_T = TypeVar("_T")
_SPACE = "\u2581"  # SentencePiece's space marker
_BYTE_LEVEL = {
    *("BarthezTokenizer", "BlenderbotTokenizer", "CodeGenTokenizer", "GPT2Tokenizer", "GPTNeoXTokenizer"),
    *("Qwen2Tokenizer", "Qwen3_5Tokenizer", "RobertaTokenizer", "WhisperTokenizer"),
}
# clean_up_tokenization_spaces removes the spaces that word-level splits leave in English text.
_CLEAN_UP = [(f" {mark}", mark) for mark in ".?!,"] + [(" ' ", "'")]
_CLEAN_UP += [(f" {ending}", ending) for ending in ("n't", "'m", "'s", "'ve", "'re")]


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """Loads the tokenizer of a directory so that it tokenizes text as in training.

    Disables truncation, padding and BPE dropout that a training run left in ``tokenizer.json``. Its post-processor adds
    tokens around a text, such as a BOS.

    Raises:
      FileNotFoundError: no ``tokenizer.json``.
      ValueError: an invalid file; named.
    """
    path = Path(directory) / TOKENIZER
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the model's tokenizer, found none")
    config = TokenizerConfig.read(directory)
    tokenizer = guarded(path, "expected a file of the tokenizers library", lambda: _build(path, config))
    if config.class_name == "CodeLlamaTokenizer":
        bos = [config.named["bos_token"].content] if "bos_token" in config.named else []
        tokenizer.post_processor = processors.TemplateProcessing(
            [*bos, "$A"], special_tokens=[(one, tokenizer.token_to_id(one)) for one in bos]
        )
    tokenizer.encode_special_tokens = _flag(config, "split_special_tokens")
    if _flag(config, "clean_up_tokenization_spaces") and not isinstance(tokenizer.model, models.BPE):
        _clean_up(tokenizer)
    return tokenizer


def encode(path: Path, tokenizer: Tokenizer, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Tokenizes a text.

    Args:
      path: of the tokenizer, for messages.
      tokenizer: from :func:`load_tokenizer`.
      text: any text.
      add_special_tokens: whether the post-processor adds its tokens.

    Raises:
      ValueError: the text is not valid Unicode, or the tokenizer fails.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"expected text in UTF-8, got {text[error.start : error.end]!r} in it") from error
    encoding = guarded(
        path, "expected to tokenize the text", lambda: tokenizer.encode(text, add_special_tokens=add_special_tokens)
    )
    return encoding.ids


def guarded(path: Path, what: str, call: Callable[[], _T]) -> _T:
    """Calls the tokenizers library; turns its errors, plain Exceptions and panics, into ValueErrors with the path."""
    try:
        return call()
    except Exception as error:
        raise ValueError(f"{path}: {what}, got: {error}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{path}: {what}, got: {str(error).partition(chr(10))[0]}") from error


def _build(path: Path, config: TokenizerConfig) -> Tokenizer:
    change, model = _PIPELINES.get(config.class_name), config.definition.get("model")
    if change is not None and isinstance(model, dict) and model.get("type") == "BPE":
        tokenizer = Tokenizer.from_str(json.dumps({**config.definition, **change(config)}))
    else:
        tokenizer = Tokenizer.from_file(str(path))
    _add_tokens(tokenizer, config)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if isinstance(tokenizer.model, models.BPE):
        tokenizer.model.dropout = None
    return tokenizer


def _flag(config: TokenizerConfig, name: str) -> bool:
    value = config.fields.get(name)
    if not isinstance(value, bool | None):
        raise ValueError(f"{config.directory / TOKENIZER_CONFIG}: {name}: expected true or false, got {value!r}")
    return bool(value)


def _add_tokens(tokenizer: Tokenizer, config: TokenizerConfig) -> None:
    """Adds the tokens listed in the files beside ``tokenizer.json``, by id, then missing special tokens."""
    present = {repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
    new = [token for _, token in sorted(config.added.items()) if repr(token) not in present]
    known = {token.content for token in (*tokenizer.get_added_tokens_decoder().values(), *new)}
    special = {token.content for token in config.named.values()}
    for token in new:
        token.special = token.special or token.content in special
    for token in (*config.named.values(), *config.extra):
        if token.content not in known:
            known.add(token.content)
            new.append(token)
    tokenizer.add_tokens(new)
    if config.class_name == "Qwen2Tokenizer":
        tokenizer.add_tokens([AddedToken(token.content, special=True) for token in config.named.values()])


def _llama(config: TokenizerConfig) -> dict[str, Any]:
    """SentencePiece's BPE. A space marker precedes the text, unless ``add_prefix_space`` is false.

    In a "legacy" tokenizer it also precedes the text after each special token.
    """
    prefix = config.fields.get("add_prefix_space") is None or _flag(config, "add_prefix_space")
    code = config.class_name == "CodeLlamaTokenizer"
    scheme = "never" if not prefix else "always" if _flag(config, "legacy") and not code else "first"
    decoder = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix or code else []),
    ]
    model = {**config.definition["model"], "fuse_unk": True, "byte_fallback": True, "ignore_merges": False}
    model["unk_token"] = config.named["unk_token"].content if code and "unk_token" in config.named else None
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": scheme, "split": False},
        "decoder": {"type": "Sequence", "decoders": decoder},
        "model": model,
    }


def _byte_level(config: TokenizerConfig) -> dict[str, Any]:
    """Byte-level BPE. A space precedes the text only if ``tokenizer_config.json`` sets ``add_prefix_space``."""
    prefix = _flag(config, "add_prefix_space")

    def changed(step: Any) -> Any:
        if isinstance(step, dict) and step.get("type") == "ByteLevel":
            return {**step, "add_prefix_space": prefix}
        if isinstance(step, dict) and isinstance(step.get("pretokenizers"), list):
            return {**step, "pretokenizers": [changed(one) for one in step["pretokenizers"]]}
        return step

    return {"pre_tokenizer": changed(config.definition.get("pre_tokenizer"))}


_PIPELINES = {
    **dict.fromkeys(_BYTE_LEVEL, _byte_level),
    **dict.fromkeys(("LlamaTokenizer", "CodeLlamaTokenizer"), _llama),
}


def _clean_up(tokenizer: Tokenizer) -> None:
    # Without a decoder, spaces join the tokens; a WordPiece decoder does the same for tokens without its prefix.
    joined = tokenizer.decoder or decoders.WordPiece(prefix="\0", cleanup=False)
    replacements = [decoders.Replace(old, new) for old, new in _CLEAN_UP]
    tokenizer.decoder = decoders.Sequence([joined, decoders.Fuse(), *replacements])
