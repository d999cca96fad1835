"""The text of new tokens as they come."""

from collections.abc import Callable, Iterator, Sequence

from tokenizers import Tokenizer

from pallas_attn_models.generation import Generator, Handle, StopStrings
from pallas_attn_models.text import Detokenizer


class Answer:
    """The text of a request's new tokens, up to the first stop string.

    Args:
      handle: of the request. It is cancelled when a stop string comes.
      tokenizer: makes text of its tokens.
      stop: the stop strings, which may begin and end inside tokens.

    Attributes:
      handle: the same.
      text: what is certain so far.
      tokens: those that were looked at; with a stop string, up to the one that completes it.
      finish_reason: None until the end; ``"stop"`` if it was a stop string, too.
    """

    def __init__(self, handle: Handle, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.handle = handle
        self.text = ""
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = StopStrings(stop)

    def read(self) -> str:
        """The text that became certain since it was last asked for; often none."""
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


def follow(
    generator: Generator, answers: Sequence[Answer], interrupted: Callable[[], bool] = lambda: False
) -> Iterator[tuple[int, str]]:
    """Lets the generator work, token by token, until all answers are done: ``(index of the answer, new text)``.

    Args:
      generator: has their requests.
      answers: not read yet.
      interrupted: asked after each token; true cancels all that is not done.
    """
    try:
        while True:
            if interrupted():
                for answer in answers:
                    answer.handle.cancel()
            for index, answer in enumerate(answers):
                if answer.finish_reason is None:
                    yield index, answer.read()
            if all(answer.finish_reason is not None for answer in answers):
                return
            generator.step(interval=1)
    finally:
        for answer in answers:
            answer.handle.cancel()
