"""New tokens as text while they come."""

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class Detokenizer:
    """Text of one row of new tokens, piece by piece; special tokens have none.

    A token may be part of a character, or have other text beside other neighbours: text comes when it is certain. All
    pieces together are ``tokenizer.decode`` of the tokens, unless later tokens change what earlier ones mean, as bytes
    that are no UTF-8 do with some tokenizers: what has been given stays, and the rest is decoded by itself.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._pending: list[int] = []  # tokens whose text has not been given

    def push(self, token: int) -> str:
        """The text that this token makes certain; often none."""
        self._pending.append(token)
        try:
            text = self._stream.step(self._tokenizer, token)
        except Exception:  # an invalid prefix; the library raises nothing more special
            self._stream = DecodeStream(skip_special_tokens=True)
            text = "".join(self._stream.step(self._tokenizer, token) or "" for token in self._pending)
        if text:
            self._pending.clear()
        return text or ""

    def flush(self) -> str:
        """The text of the last tokens, which no other will complete."""
        text = self._tokenizer.decode(self._pending)
        self._pending.clear()
        return text
