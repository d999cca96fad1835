"""Streams the text of new tokens."""

from collections.abc import Callable, Iterator, Sequence

from tokenizers import Tokenizer

from pallas_attn_models.generation import Generator, Handle, StopStrings
from pallas_attn_models.text import Detokenizer


class TextStream:
    """The text of a request's new tokens, up to the first stop string.

    Args:
      handle: of the request; a stop string cancels it.
      tokenizer: decodes the tokens.
      stop: stop strings, which may begin and end inside tokens.

    Attributes:
      handle: as given.
      text: the final text so far.
      tokens: tokens processed so far, at most up to the one that completes a stop string.
      finish_reason: None until the end; ``"stop"`` for stop strings, too.
    """

    def __init__(self, handle: Handle, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.handle = handle
        self.text = ""
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = StopStrings(stop)

    def read(self) -> str:
        """The text that became final since the last call; often empty."""
        piece = ""
        for token in self.handle.tokens[len(self.tokens) : self.handle.num_certain]:
            self.tokens.append(token)
            text = self._detokenizer.push(token)
            early = len(self.tokens) <= self.handle.sampling.min_new_tokens
            piece += text if early else self._stop.feed(text)
            if self._stop.stopped:
                self.handle.cancel()
                self.finish_reason = "stop"
                break
        if self.finish_reason is None and self.handle.done:
            piece += self._stop.feed(self._detokenizer.flush()) + self._stop.finish()
            self.finish_reason = "stop" if self._stop.stopped else self.handle.result().finish_reason
        self.text += piece
        return piece


def read_streams(
    generator: Generator, streams: Sequence[TextStream], interrupted: Callable[[], bool] = lambda: False
) -> Iterator[tuple[int, str]]:
    """Runs the generator, token by token, until all streams are done; yields ``(index of the stream, new text)``.

    Args:
      generator: serves the requests of the streams.
      streams: unread streams.
      interrupted: called after each token; True cancels every unfinished stream.
    """
    try:
        while True:
            if interrupted():
                for stream in streams:
                    stream.handle.cancel()
            for index, stream in enumerate(streams):
                if stream.finish_reason is None:
                    yield index, stream.read()
            if all(stream.finish_reason is not None for stream in streams):
                return
            generator.step(interval=1)
    finally:
        for stream in streams:
            stream.handle.cancel()
