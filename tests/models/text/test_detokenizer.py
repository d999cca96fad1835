"""Incremental decoding: the pieces concatenate to the tokenizer's text of all tokens."""

import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from pallas_attn_models.text.detokenizer import Detokenizer

TEXTS = ["hello world", " a  b\n", "\u00e9\u4e2d\U0001f9e0 \U0001f468\u200d\U0001f469", "", "caf\u00e9"]


def byte_level() -> Tokenizer:
    """Like Llama 3: one token per byte, and a few longer ones, one of which splits a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("h", "e"), ("l", "l"), ("\u0120", "w"), ("\u00c3", "\u00a9"), ("\u0120", "\u00f0")]
    vocabulary = {token: index for index, token in enumerate([*alphabet, *("".join(pair) for pair in pairs)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Like Llama 2: words with a space marker, and bytes for everything else."""
    words = ["\u2581", "\u2581a", "\u2581hello", "\u2581world", "b", "\n"]
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {w: 256 + i for i, w in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


TOKENIZERS = {"byte level": byte_level(), "byte fallback": byte_fallback()}


def pieces(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*map(detokenizer.push, tokens), detokenizer.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_of_byte_level_tokens_are_the_text(text):
    tokenizer = TOKENIZERS["byte level"]
    found = pieces(tokenizer, tokenizer.encode(text).ids)
    assert "".join(found) == text
    assert not any("\ufffd" in piece for piece in found)


def test_words_keep_the_spaces_between_them():
    tokenizer = TOKENIZERS["byte fallback"]
    tokens = [tokenizer.token_to_id(token) for token in ("\u2581hello", "\u2581world", "b", "\u2581a")]
    assert pieces(tokenizer, tokens) == ["hello", " world", "b", " a", ""]


def test_a_character_comes_whole():
    tokenizer = TOKENIZERS["byte fallback"]
    tokens = [*"\u4e2d".encode(), tokenizer.token_to_id("b")]
    assert pieces(tokenizer, tokens) == ["", "", "\u4e2d", "b", ""]


def test_invalid_utf8_is_returned_at_the_end():
    tokenizer = TOKENIZERS["byte fallback"]
    assert pieces(tokenizer, [tokenizer.token_to_id("b"), 0xE4, 0xB8]) == ["b", "", "", "\ufffd\ufffd"]


def test_special_tokens_have_no_text():
    tokenizer = TOKENIZERS["byte level"]
    tokens = [*tokenizer.encode("he").ids, tokenizer.token_to_id("<end>"), *tokenizer.encode("ll").ids]
    assert "".join(pieces(tokenizer, tokens)) == "hell"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_random_tokens_lose_no_text_and_break_nothing(name):
    """Invalid UTF-8 among words: exact at byte level; with byte fallback all words survive."""
    tokenizer = TOKENIZERS[name]
    rng = random.Random(0)
    broken = 0
    for _ in range(300):
        tokens = [rng.choice([rng.randrange(256), 256 + rng.randrange(5)]) for _ in range(12)]
        found, text = "".join(pieces(tokenizer, tokens)), tokenizer.decode(tokens)
        if name == "byte level":
            assert found == text
        else:
            broken += found != text
            for word in ("hello", "world"):
                assert found.count(word) == text.count(word)
    assert broken > 10 or name == "byte level", "some change their minds about bytes that were given"
