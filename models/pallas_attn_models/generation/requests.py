"""Requests on the host: the continuations of a prompt and their results so far."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from pallas_attn_models.generation.fair_lock import FairLock
from pallas_attn_models.generation.sampling import Sampling, stop_sequences
from pallas_attn_models.generation.stopping import num_withheld

TopLogprobs = list[tuple[int, float]]  # tokens and log-probabilities, most likely first


@dataclasses.dataclass(frozen=True)
class Completion:
    """The result of one continuation.

    Attributes:
      tokens: the new tokens, without the stop sequence.
      logprobs: their log-probabilities under the model's unmodified distribution; see
        :func:`~pallas_attn_models.generation.sampling.sample`.
      top_logprobs: for each new token, the ``Sampling.top_logprobs`` most likely tokens at its index, with their
        log-probabilities.
      finish_reason: ``"stop"``: an end token or a stop sequence; ``"length"``: ``max_new_tokens`` reached;
        ``"capacity"``: prompt and new tokens reached ``max_length``, or the pool of a paged cache ran out of pages;
        ``"cancelled"``; ``"invalid"``: no token could be sampled, because the logits were NaN or ``+inf`` or every
        token was excluded.
    """

    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[TopLogprobs]
    finish_reason: str


class Handle:
    """One continuation in progress. Iterating over the handle yields its tokens as they are generated.

    A Generator runs no background thread: waiting for any handle advances every request. Several threads may wait for
    the same or different handles, and cancel them; an iterator belongs to one thread.

    Attributes:
      sampling: the sampling settings.
      tokens, logprobs, top_logprobs, finish_reason: as in :class:`Completion`, so far; the reason is None until then.
      num_certain: how many of the tokens are final; later ones may begin a stop sequence.
      error: the exception that interrupted the run, or None.
    """

    def __init__(
        self,
        sampling: Sampling,
        drive: Callable[..., object],
        cancel: Callable[["Handle"], None],
        turns: FairLock | None = None,
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
        self._lock = FairLock() if turns is None else turns

    @property
    def done(self) -> bool:
        """Whether the continuation is finished or failed."""
        return self.finish_reason is not None or self.error is not None

    def result(self) -> Completion:
        """Advances the Generator until this continuation is finished.

        Raises:
          RuntimeError: an error interrupted the run; it is the cause.
        """
        while not self.done:
            with self._lock.hold():
                if not self.done:  # another thread may have finished it
                    self._advance()
        if self.finish_reason is None:
            raise RuntimeError("the run was interrupted before this continuation finished") from self.error
        return Completion(self.tokens, self.logprobs, self.top_logprobs, self.finish_reason)

    def cancel(self) -> None:
        """Stops the continuation and keeps its tokens so far. A queued one never starts."""
        with self._lock.hold():
            if not self.done:
                self._cancel(self)

    def __iter__(self) -> Iterator[int]:
        seen, done = 0, False
        while not done:
            with self._lock.hold():
                if seen == self.num_certain and not self.done:
                    self._advance(interval=1)
                new, done = self.tokens[seen : self.num_certain], self.done
            yield from new
            seen += len(new)
        self.result()  # raises if the run was interrupted

    def _advance(self, **options: int) -> None:
        """Runs one round for all requests."""
        if self._drive(**options) is False and not self.done:
            self.error = RuntimeError("the request was lost in an interrupt")

    def extend(self, tokens: list[int], logprobs: list[float], top_logprobs: Sequence[TopLogprobs]) -> None:
        """Called by the scheduler with new tokens."""
        self.tokens += tokens
        self.logprobs += logprobs
        self.top_logprobs += top_logprobs
        longest = max(map(len, self._stops), default=1)
        newest = tuple(self.tokens[max(self.sampling.min_new_tokens, len(self.tokens) - longest + 1) :])
        self.num_certain = max(self.num_certain, len(self.tokens) - num_withheld(newest, self._stops))

    def finish(self, reason: str, num_ending: int = 0) -> None:
        """Called by the scheduler at the end; drops the last ``num_ending`` tokens, the stop sequence."""
        kept = len(self.tokens) - num_ending
        self.tokens, self.logprobs, self.top_logprobs = (
            self.tokens[:kept],
            self.logprobs[:kept],
            self.top_logprobs[:kept],
        )
        self.finish_reason, self.num_certain = reason, kept


@dataclasses.dataclass(eq=False)
class PrefillProgress:
    """Prefill of a prompt into ``row``: ``done`` of ``total`` tokens so far."""

    row: int
    prompt: Sequence[int]
    total: int
    done: int = 0


@dataclasses.dataclass(eq=False)
class RequestGroup:
    """The continuations of one prompt: they share its prefill, start together, and occupy one row each.

    Attributes:
      prompt: token ids.
      handles: one per continuation.
      negative_prompt: token ids, prefilled into a second row per continuation, or None.
      guidance_scale: see :class:`~pallas_attn_models.generation.state.Request`.
      rows, partners: assigned rows, one per continuation; partners hold the negative prompt.
      prefills: unfinished prefills; None before rows are assigned.
    """

    prompt: Sequence[int]
    handles: list[Handle]
    negative_prompt: Sequence[int] | None = None
    guidance_scale: float = 1.0
    rows: list[int] = dataclasses.field(default_factory=list)
    partners: list[int] = dataclasses.field(default_factory=list)
    prefills: list[PrefillProgress] | None = None

    @property
    def prompts(self) -> list[Sequence[int]]:
        """The prompt, and the negative prompt if present."""
        return [self.prompt] if self.negative_prompt is None else [self.prompt, self.negative_prompt]

    @property
    def num_rows(self) -> int:
        """Rows that the group needs."""
        return len(self.handles) * len(self.prompts)

    @property
    def done(self) -> bool:
        """Whether every continuation is done."""
        return all(handle.done for handle in self.handles)


@dataclasses.dataclass(eq=False)
class ScoreRequest(RequestGroup):
    """A prompt to score instead of continue.

    Attributes:
      pieces: log-probabilities of all tokens but the first, one array per chunk.
      logits: logits after each token, one array ``[n, V]`` per chunk; None if not requested.
      finished: whether the whole prompt is scored.
      error: the exception that interrupted the run, or None.
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
