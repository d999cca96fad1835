"""Incremental decoding of new tokens to text."""

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class Detokenizer:
    """Decodes the new tokens of one row piece by piece, without special tokens.

    A token may be part of a character, or decode differently next to other tokens, so text is returned once it is
    final. The pieces concatenate to ``tokenizer.decode`` of the tokens, unless later tokens change the text of earlier
    ones, as invalid UTF-8 does with some tokenizers; then returned text stays, and the rest is decoded separately.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._pending: list[int] = []  # tokens whose text has not been returned

    def push(self, token: int) -> str:
        """The text that this token makes final; often empty."""
        self._pending.append(token)
        try:
            text = self._stream.step(self._tokenizer, token)
        except Exception:  # an invalid prefix; the library raises no specific type
            self._stream = DecodeStream(skip_special_tokens=True)
            text = "".join(self._stream.step(self._tokenizer, token) or "" for token in self._pending)
        if text:
            self._pending.clear()
        return text or ""

    def flush(self) -> str:
        """The text of the remaining tokens, at the end of the input."""
        text = self._tokenizer.decode(self._pending)
        self._pending.clear()
        return text
