"""What a Generator is asked for, on the host: the continuations of a prompt, and what has come of them so far."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from pallas_attn_models.generation.sampling import Sampling, stop_sequences
from pallas_attn_models.generation.stopping import held_back
from pallas_attn_models.generation.turns import Turns

TopLogprobs = list[tuple[int, float]]  # tokens and log-probabilities, the likeliest first


@dataclasses.dataclass(frozen=True)
class Completion:
    """How a prompt goes on.

    Attributes:
      tokens: the new tokens, without those that ended the row.
      logprobs: of each, under the model's own distribution; see :func:`~pallas_attn_models.generation.sampling.sample`.
      top_logprobs: for each, the ``Sampling.top_logprobs`` likeliest tokens in its place, and their log-probabilities.
      finish_reason: ``"stop"``: an end token or a stop sequence; ``"length"``: ``max_new_tokens`` spent;
        ``"capacity"``: prompt and new tokens have ``max_length``, or the pool of a paged cache is spent;
        ``"cancelled"``: nobody waits for more; ``"invalid"``: no token could be drawn, as the model's logits were NaN
        or ``+inf``, or every token was excluded.
    """

    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[TopLogprobs]
    finish_reason: str


class Handle:
    """One continuation on its way. Iterating over it gives its tokens as they come.

    A Generator has no thread of its own: it works while somebody waits for one of its handles. Several threads may wait
    for the same or for different handles, and cancel them; iterators are for one thread each.

    Attributes:
      sampling: how its tokens are chosen.
      tokens, logprobs, top_logprobs, finish_reason: as in :class:`Completion`, so far; the reason is None at first.
      num_certain: so many of the tokens are part of the result; the newer ones may yet begin a stop sequence.
      error: what broke the run off, if anything did.
    """

    def __init__(
        self,
        sampling: Sampling,
        drive: Callable[..., object],
        cancel: Callable[["Handle"], None],
        turns: Turns | None = None,
    ) -> None:
        self.sampling = sampling
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[TopLogprobs] = []
        self.finish_reason: str | None = None
        self.error: BaseException | None = None
        self.num_certain = 0
        self._stops = stop_sequences(sampling.stop)
        self._drive, self._cancel = drive, cancel
        self._turns = Turns() if turns is None else turns

    @property
    def done(self) -> bool:
        """Whether there is no more to come."""
        return self.finish_reason is not None or self.error is not None

    def result(self) -> Completion:
        """Works until this continuation is done.

        Raises:
          RuntimeError: the run was broken off by an error, which is its cause.
        """
        while not self.done:
            with self._turns.take():
                if not self.done:  # another thread may have brought it to its end meanwhile
                    self._work()
        if self.finish_reason is None:
            raise RuntimeError("the run was broken off before this continuation was done") from self.error
        return Completion(self.tokens, self.logprobs, self.top_logprobs, self.finish_reason)

    def cancel(self) -> None:
        """Gives up what is not done yet; the tokens so far stay. A queued one is not begun."""
        with self._turns.take():
            if not self.done:
                self._cancel(self)

    def __iter__(self) -> Iterator[int]:
        seen, done = 0, False
        while not done:
            with self._turns.take():
                if seen == self.num_certain and not self.done:
                    self._work(interval=1)
                new, done = self.tokens[seen : self.num_certain], self.done
            yield from new
            seen += len(new)
        self.result()  # raises what broke it off

    def _work(self, **options: int) -> None:
        """A round for all requests."""
        if self._drive(**options) is False and not self.done:
            self.error = RuntimeError("an interrupt lost the request")

    def extend(self, tokens: list[int], logprobs: list[float], top_logprobs: Sequence[TopLogprobs]) -> None:
        """For the scheduler: more tokens came."""
        self.tokens += tokens
        self.logprobs += logprobs
        self.top_logprobs += top_logprobs
        longest = max(map(len, self._stops), default=1)
        newest = tuple(self.tokens[max(self.sampling.min_new_tokens, len(self.tokens) - longest + 1) :])
        self.num_certain = max(self.num_certain, len(self.tokens) - held_back(newest, self._stops))

    def finish(self, reason: str, num_ending: int = 0) -> None:
        """For the scheduler: that was all, and the last ``num_ending`` tokens are no part of it."""
        kept = len(self.tokens) - num_ending
        self.tokens, self.logprobs, self.top_logprobs = (
            self.tokens[:kept],
            self.logprobs[:kept],
            self.top_logprobs[:kept],
        )
        self.finish_reason, self.num_certain = reason, kept


@dataclasses.dataclass(eq=False)
class Reading:
    """A prompt that is being read into a row: ``wanted`` tokens of it, ``done`` so far."""

    row: int
    prompt: Sequence[int]
    wanted: int
    done: int = 0


@dataclasses.dataclass(eq=False)
class Job:
    """A prompt and its continuations, which share it: they begin together, and each has rows of its own.

    Attributes:
      prompt: token ids.
      handles: one for each continuation.
      negative_prompt: token ids, read into a second row for each continuation, or None.
      guidance_scale: see :class:`~pallas_attn_models.generation.rows.Request`.
      rows, partners: that it has, one for each continuation; partners only with a negative prompt.
      readings: prompts that are not read yet; None before it has rows.
    """

    prompt: Sequence[int]
    handles: list[Handle]
    negative_prompt: Sequence[int] | None = None
    guidance_scale: float = 1.0
    rows: list[int] = dataclasses.field(default_factory=list)
    partners: list[int] = dataclasses.field(default_factory=list)
    readings: list[Reading] | None = None

    @property
    def prompts(self) -> list[Sequence[int]]:
        """Its prompt, and its negative prompt if there is one."""
        return [self.prompt] if self.negative_prompt is None else [self.prompt, self.negative_prompt]

    @property
    def num_rows(self) -> int:
        """How many rows it needs."""
        return len(self.handles) * len(self.prompts)

    @property
    def done(self) -> bool:
        """Whether all continuations are."""
        return all(handle.done for handle in self.handles)


@dataclasses.dataclass(eq=False)
class ScoreJob(Job):
    """A prompt that is read for the probabilities of its own tokens.

    Attributes:
      pieces: log-probabilities of its tokens but the first, in pieces.
      logits: None, or those after each of its tokens, in pieces ``[n, V]``.
      finished: whether all of it is read.
      error: what broke the run off, if anything did.
    """

    pieces: list[np.ndarray] = dataclasses.field(default_factory=list)
    logits: list[np.ndarray] | None = None
    finished: bool = False
    error: BaseException | None = None

    @property
    def num_rows(self) -> int:
        return 1

    @property
    def done(self) -> bool:
        return self.finished or self.error is not None
