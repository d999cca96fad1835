"""The tokenizer of a checkpoint, as transformers 5 loads it: ``tokenizer.json``, and what the files beside it change.

Where a class of transformers would build another pipeline than ``tokenizer.json`` has, this follows the class for the
tokenizers of Llama 2, whose published files are of two kinds, and for the prefix space of byte-level ones. Everything
else is as ``tokenizer.json`` says.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import AddedToken, Tokenizer, decoders, models, processors

from pallas_attn_models.text.tokenizer_config import TOKENIZER, TOKENIZER_CONFIG, TokenizerConfig

_T = TypeVar("_T")
_SPACE = "\u2581"  # SentencePiece's mark
_BYTE_LEVEL = {
    *("BarthezTokenizer", "BlenderbotTokenizer", "CodeGenTokenizer", "GPT2Tokenizer", "GPTNeoXTokenizer"),
    *("Qwen2Tokenizer", "Qwen3_5Tokenizer", "RobertaTokenizer", "WhisperTokenizer"),
}
# clean_up_tokenization_spaces undoes what splits at spaces and punctuation do to English.
_CLEAN_UP = [(f" {mark}", mark) for mark in ".?!,"] + [(" ' ", "'")]
_CLEAN_UP += [(f" {ending}", ending) for ending in ("n't", "'m", "'s", "'ve", "'re")]


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a directory: what it makes of a text is what the model was trained with.

    Truncation, padding and BPE dropout that a training run left in ``tokenizer.json`` are off. A post-processor writes
    the tokens before and after a text, a BOS for instance, as ``tokenizer.json`` has it.

    Raises:
      FileNotFoundError: there is no ``tokenizer.json``.
      ValueError: a file that is not what it should be; named.
    """
    path = Path(directory) / TOKENIZER
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the tokenizer of the model, found none")
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
    """The tokens of a text.

    Args:
      path: of the tokenizer, for messages.
      tokenizer: of :func:`load_tokenizer`.
      text: any.
      add_special_tokens: whether the post-processor writes its own.

    Raises:
      ValueError: a text that is no Unicode, or that the tokenizer fails at.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"expected text in UTF-8, got {text[error.start : error.end]!r} in it") from error
    encoding = guarded(path, "failed at a text", lambda: tokenizer.encode(text, add_special_tokens=add_special_tokens))
    return encoding.ids


def guarded(path: Path, what: str, call: Callable[[], _T]) -> _T:
    """What the library gives, or a ValueError with the path: it raises nothing more special, and it panics."""
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
    """Those that the files beside ``tokenizer.json`` list, by id; then special ones that are not there yet."""
    there = {repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
    new = [token for _, token in sorted(config.added.items()) if repr(token) not in there]
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
    """SentencePiece's BPE. A text begins with the mark of a space, unless it says otherwise.

    So does, in a "legacy" tokenizer, what comes after a special token.
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
    """A text begins with a space only if ``tokenizer_config.json`` says so."""
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
    # Without a decoder tokens are joined by spaces; a WordPiece decoder joins so all that have not its prefix.
    joined = tokenizer.decoder or decoders.WordPiece(prefix="\0", cleanup=False)
    replacements = [decoders.Replace(old, new) for old, new in _CLEAN_UP]
    tokenizer.decoder = decoders.Sequence([joined, decoders.Fuse(), *replacements])
