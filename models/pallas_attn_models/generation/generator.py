"""Prompts in, tokens out, with two executables for life, whatever is asked and whenever it comes.

The Generator checks what it is given and hands it to the scheduler, which decides who has which row; the engine runs
the executables (``steps.py``) on the state that the device holds (``rows.py``).
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

import pallas_attn as pa
from pallas_attn import bits, checks
from pallas_attn_models.checks import require_positive_int, require_size, shown
from pallas_attn_models.decoder import Decoder, whole_pages
from pallas_attn_models.generation.asked import Asked, Bounds, Tokens, check_asked, check_one, check_prompts
from pallas_attn_models.generation.engine import Engine
from pallas_attn_models.generation.requests import Handle, Job, ScoreJob, TopLogprobs
from pallas_attn_models.generation.sampling import SEEDS, Limits, Sampling, Stop
from pallas_attn_models.generation.scheduler import Scheduler
from pallas_attn_models.generation.speculation import Speculation, check_speculation, num_nodes
from pallas_attn_models.generation.stats import GenerationStats, Spent
from pallas_attn_models.generation.steps import REPORT_WIDTH
from pallas_attn_models.generation.turns import Turns

_GREEDY = Sampling()


@dataclasses.dataclass(frozen=True)
class GenerationResult:
    """What :meth:`Generator.generate` gives back: one entry per prompt, or per sample, prompt after prompt.

    Attributes:
      tokens, logprobs, finish_reasons, top_logprobs: see :class:`~pallas_attn_models.generation.Completion`.
      stats: what the run took.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    finish_reasons: list[str]
    top_logprobs: list[list[TopLogprobs]]
    stats: GenerationStats


class StreamEvent(NamedTuple):
    """A token of a prompt's continuation, or its end, or both.

    Attributes:
      row: which entry it would be in a :class:`GenerationResult`.
      token: the token; None if only the end is to be told.
      finish_reason: None, or with the last event of a row why there is no more.
    """

    row: int
    token: int | None
    finish_reason: str | None


@dataclasses.dataclass(frozen=True)
class PromptScore:
    """How likely a model finds a prompt.

    Attributes:
      logprobs: of each token but the first, given those before it. NaN where the model's logits are no numbers; this
        can reach a few tokens before the one that caused it, but no other prompt.
      logits: float32 ``[tokens, V]``, after each token, or None if they were not asked for.
    """

    logprobs: list[float]
    logits: np.ndarray | None

    @property
    def total(self) -> float:
        """The log-probability of the prompt, given its first token."""
        return float(np.sum(self.logprobs, dtype=np.float64))


class Generator:
    """Generates for any number of requests, ``batch_size`` rows at a time, with two executables for life.

    A request has a row while it is served. :meth:`generate` and :meth:`stream` make requests of a list of prompts;
    :meth:`submit` makes one at any time, and whoever waits for a result keeps all of them going. The tokens of a
    request do not depend on what else is going on.

    Holds the KV caches. The weights are those that the model has when a run starts, from a state without requests.

    Several threads may share one, and call any method at any time, those of its handles too. One thread works at a
    time, a round of :meth:`step` each, for the requests of all; the others get their turns in the order in which they
    came. An error that breaks off a round is raised in the thread that worked; who had a row then gets it as the cause
    of a RuntimeError. An iterator of :meth:`stream` is for one thread. No method may be called by a layer hook.

    Args:
      model: the decoder.
      batch_size: rows.
      capacity: how many tokens the cache of a row holds, rounded up to a multiple of 16; for all layers, or one each.
      prefill_chunk: prompts are read in pieces of this many tokens, between the steps of those that are continued.
      policy, storage: of the caches; default ``pa.caches.Dense()`` and ``pa.caches.Plain()``; or one for each layer.
        Layers with a sliding window hold no more than that takes, in any case.
      max_length: how many tokens a row can have, prompt and new ones together; default: capacity. It may be larger if
        the policy lets old tokens go.
      limits: how much of some sampling settings a request may have.
      max_queue: so many requests can wait for a row.
      layer_hook: ``layer_hook(layer_index, hidden) -> hidden``, ``[R|B, T, E]``, called before each layer of the model,
        not of a draft model. It is traced into the executables once.
      prefill_rows: so many prompts are read at a time.
      speculation: a ``PromptLookup`` or ``DraftModel``: decode drafts tokens and checks several in one step. Results do
        not change, nor does the number of executables; but a request that is too long for the whole pool of a paged
        cache may end a few tokens earlier, as drafts are stored until they are checked. Policies must be able to take
        tokens back: ``Dense``, or ``Window`` with as many spare slots as a step feeds tokens.

    Raises:
      ValueError: a size below 1 or beyond 32 bits, or one that the policy cannot work with.
      TypeError: another kind of model, policy, storage, limits, layer hook or speculation.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        batch_size: int,
        capacity: int | Sequence[int],
        prefill_chunk: int = 128,
        policy: pa.caches.Policy | Sequence[pa.caches.Policy] | None = None,
        storage: pa.caches.Storage | Sequence[pa.caches.Storage] | None = None,
        max_length: int | None = None,
        limits: Limits | None = None,
        max_queue: int = 1024,
        layer_hook: Callable[[int, Array], Array] | None = None,
        prefill_rows: int = 1,
        speculation: Speculation | None = None,
    ) -> None:
        if not isinstance(model, Decoder):
            raise TypeError(f"model: expected a Decoder, got {type(model).__name__}")
        if not isinstance(limits, Limits | None):
            raise TypeError(f"limits: expected a Limits or None, got {type(limits).__name__}")
        if layer_hook is not None and not callable(layer_hook):
            raise TypeError(f"layer_hook: expected a function or None, got {type(layer_hook).__name__}")
        if speculation is not None:
            check_speculation(speculation)
        capacities = [*capacity] if isinstance(capacity, Sequence) else [capacity]
        if not capacities:
            raise ValueError("capacity: expected an int of at least 1, or one per layer, got none")
        sizes = [("batch_size", batch_size), *(("capacity", size) for size in capacities)]
        sizes += [] if max_length is None else [("max_length", max_length)]
        for name, size in sizes:
            require_size(name, size, checks.LONGEST_AXIS)
        # What is more than there is to read, or to wait for, asks for all of it.
        for name, size in (("prefill_chunk", prefill_chunk), ("max_queue", max_queue), ("prefill_rows", prefill_rows)):
            require_positive_int(name, size)
        self.model = model
        self.batch_size = batch_size
        self.capacity = capacity
        self.max_length = max(capacities) if max_length is None else max_length
        self.prefill_chunk = min(prefill_chunk, max(capacities))
        self.policy = policy
        self.storage = storage
        self.limits = Limits() if limits is None else limits
        self.speculation = speculation
        self._check_caches()
        self._engine = Engine(
            model,
            speculation,
            self._new_caches,
            batch_size=batch_size,
            max_length=self.max_length,
            chunk=self.prefill_chunk,
            chunk_rows=min(prefill_rows, batch_size),
            limits=self.limits,
            layer_hook=layer_hook,
        )
        self._scheduler = Scheduler(self._engine, max_queue, spare=num_nodes(speculation) - 1)
        self._turns = Turns()

    @property
    def compile_counts(self) -> dict[str, int]:
        """How many executables each function has: 0 before the first run, 1 ever after; ``score`` if it was used."""
        return self._engine.compile_counts

    @property
    def spent(self) -> Spent:
        """What all requests so far took."""
        return self._engine.spent

    @property
    def cache_nbytes(self) -> int:
        """Bytes of the caches of all layers."""
        return sum(cache.nbytes for cache in jax.eval_shape(self._new_caches))

    def warmup(self, progress: Callable[[str], None] | None = None) -> float:
        """Compiles both executables, unless that is done, and returns the seconds it took. A first run does it, too.

        Where ``jax_compilation_cache_dir`` is set before anything is compiled, a later process finds them there.

        Args:
          progress: called with the name of each executable before it is compiled.

        Raises:
          TypeError: ``progress`` is no function.
        """
        if progress is not None and not callable(progress):
            raise TypeError(f"progress: expected a function or None, got {type(progress).__name__}")
        with self._turns.take():
            return self._scheduler.compile(progress)

    def generate(
        self,
        prompts: Sequence[Tokens],
        sampling: Sampling | Sequence[Sampling] = _GREEDY,
        stop: Stop = (),
        negative_prompts: Sequence[Tokens] | None = None,
        guidance_scale: float | Sequence[float] = 1.0,
        num_samples: int = 1,
    ) -> GenerationResult:
        """Continues every prompt until it ends, its budget is spent, or its row is full.

        Args:
          prompts: token ids: any number of prompts of 1 to ``max_length - 1`` tokens each, of any lengths.
          sampling: one for all prompts, or one for each.
          stop: a token, or tokens and sequences of tokens, which end any row, besides those of its sampling and the
            ``eos_token_ids`` of the model's config.
          negative_prompts: one for each prompt, for classifier-free guidance (arXiv:2306.17806): what is drawn is moved
            away from what this prompt makes likely. A guided request takes two rows.
          guidance_scale: how far; 1 is not at all, 0 is the negative prompt itself; for all prompts, or one for each.
          num_samples: continuations of each prompt, which is read once; sample i has the seed of the sampling plus i.

        Raises:
          ValueError: a prompt, a token, a number of samplings or rows that does not fit, before anything is compiled.
          TypeError: the wrong kind of object.
        """
        self._check_samples(num_samples, negative_prompts)
        asked = check_asked(prompts, sampling, stop, negative_prompts, guidance_scale, self._bounds)
        jobs = self._jobs(asked, num_samples)
        compile_seconds = self.warmup()
        before = self.spent
        for _ in self._run(jobs, REPORT_WIDTH):
            pass
        spent = self.spent.since(before)
        completions = [handle.result() for job in jobs for handle in job.handles]
        return GenerationResult(
            tokens=[one.tokens for one in completions],
            logprobs=[one.logprobs for one in completions],
            finish_reasons=[one.finish_reason for one in completions],
            top_logprobs=[one.top_logprobs for one in completions],
            stats=GenerationStats(
                prompt_tokens=sum(len(prompt) for job in jobs for prompt in job.prompts),
                new_tokens=sum(len(one.tokens) for one in completions),
                compile_seconds=compile_seconds,
                executables=sum(self.compile_counts.values()),
                **spent._asdict(),
            ),
        )

    def stream(
        self,
        prompts: Sequence[Tokens],
        sampling: Sampling | Sequence[Sampling] = _GREEDY,
        stop: Stop = (),
        negative_prompts: Sequence[Tokens] | None = None,
        guidance_scale: float | Sequence[float] = 1.0,
        num_samples: int = 1,
        interval: int = 1,
    ) -> Iterator[StreamEvent]:
        """The tokens of :meth:`generate` as they come, ``interval`` steps at a time.

        A token is told when it is certain to be part of the result. Leaving the iteration early cancels the rest.

        Args and errors are those of :meth:`generate`.
        """
        require_positive_int("interval", interval)
        self._check_samples(num_samples, negative_prompts)
        asked = check_asked(prompts, sampling, stop, negative_prompts, guidance_scale, self._bounds)
        jobs = self._jobs(asked, num_samples)
        return self._events(jobs, interval)

    def submit(
        self,
        prompt: Tokens,
        sampling: Sampling = _GREEDY,
        stop: Stop = (),
        negative_prompt: Tokens | None = None,
        guidance_scale: float = 1.0,
    ) -> Handle:
        """Asks for a continuation of one prompt, which begins as soon as there is a row for it; see :meth:`generate`.

        Raises:
          QueueFull: ``max_queue`` requests wait already.
        """
        (handle,) = self.submit_samples(prompt, 1, sampling, stop, negative_prompt, guidance_scale)
        return handle

    def submit_samples(
        self,
        prompt: Tokens,
        num_samples: int,
        sampling: Sampling = _GREEDY,
        stop: Stop = (),
        negative_prompt: Tokens | None = None,
        guidance_scale: float = 1.0,
    ) -> list[Handle]:
        """Asks for several continuations of one prompt, which is read once; see :meth:`submit`.

        They begin when there are rows for all of them. With pages they share those of the prompt.
        """
        self._check_samples(num_samples, negative_prompt)
        asked = check_one(prompt, sampling, stop, negative_prompt, guidance_scale, self._bounds)
        (job,) = self._jobs([asked], num_samples)
        with self._turns.take():
            self._scheduler.submit(job)
        return job.handles

    def step(self, interval: int = REPORT_WIDTH) -> bool:
        """One round of work for all requests, up to ``interval`` steps each; False if there was nothing to do."""
        require_positive_int("interval", interval)
        with self._turns.take():
            if self._scheduler.idle:
                return False
            self.warmup()
            self._scheduler.step(min(interval, REPORT_WIDTH))
            return True

    def run(self) -> None:
        """Works until no request is left."""
        while self.step():
            pass

    def score(self, prompts: Sequence[Tokens], logits: bool = False) -> list[PromptScore]:
        """How likely the model finds each prompt, with one more executable, which is compiled when it is first needed.

        Args:
          prompts: as for :meth:`generate`, of up to ``max_length`` tokens.
          logits: also gives those of all positions: ``4 * tokens * V`` bytes for each prompt.

        Raises as :meth:`generate`.
        """
        if not isinstance(logits, bool):
            raise TypeError(f"logits: expected a bool, got {type(logits).__name__}")
        vocab_size = self.model.config.vocab_size
        checked = check_prompts(prompts, max_length=self.max_length, vocab_size=vocab_size, room=0)
        jobs = [ScoreJob(prompt, [], logits=[] if logits else None) for prompt in checked]
        for _ in self._run(jobs, REPORT_WIDTH):
            pass
        for job in jobs:
            if not job.finished:
                raise RuntimeError("the run was broken off before all prompts were read") from job.error
        return [
            PromptScore(
                logprobs=np.concatenate(job.pieces)[:-1].tolist(),
                logits=None if job.logits is None else np.concatenate(job.logits),
            )
            for job in jobs
        ]

    def _run(self, jobs: Sequence[Job], interval: int) -> Iterator[None]:
        """Submits the jobs as the queue has room, and works until they are done; stops after each round."""
        waiting = collections.deque(jobs)
        try:
            while not all(job.done for job in jobs):
                with self._turns.take():
                    while waiting and not self._scheduler.queue_full:
                        self._scheduler.submit(waiting.popleft())
                    if not all(job.done for job in jobs):  # another thread may have brought them to their end
                        self._scheduler.step(min(interval, REPORT_WIDTH))
                yield
        finally:
            self._scheduler.give_up(jobs)
            # Now, or when whoever has a turn begins another round: a thread that collects garbage must not wait.
            with self._turns.take_if_free() as has_turn:
                if has_turn:
                    self._scheduler.sweep()

    def _events(self, jobs: Sequence[Job], interval: int) -> Iterator[StreamEvent]:
        self.warmup()
        handles = [handle for job in jobs for handle in job.handles]
        told = [0] * len(handles)
        ended = [False] * len(handles)

        def news() -> list[StreamEvent]:
            events = []
            with self._turns.take():
                for row, handle in enumerate(handles):
                    new: list[int | None] = [*handle.tokens[told[row] : handle.num_certain]]
                    told[row] = handle.num_certain
                    reason = None if ended[row] else handle.finish_reason
                    ended[row] = handle.done
                    if reason is not None and not new:
                        new = [None]
                    events += [StreamEvent(row, token, None) for token in new[:-1]]
                    events += [StreamEvent(row, token, reason) for token in new[-1:]]
            return events

        for _ in self._run(jobs, interval):
            yield from news()
        # Others, too, keep these going while this waits at a yield.
        yield from news()
        for handle in handles:
            handle.result()  # raises what broke it off

    @property
    def _bounds(self) -> Bounds:
        config = self.model.config
        return Bounds(self.max_length, config.vocab_size, config.eos_token_ids, self.limits)

    def _check_samples(self, num_samples: int, negative: object) -> None:
        """Raises a ValueError unless there are rows for so many samples, two for each if there is a negative prompt."""
        require_positive_int("num_samples", num_samples)
        num_rows = num_samples * (1 if negative is None else 2)
        if num_rows > self.batch_size:
            wanted = f"at most batch_size={self.batch_size} rows for a prompt"
            raise ValueError(f"num_samples: expected {wanted}, got {shown(num_rows)} (two for a guided sample)")

    def _jobs(self, asked: Sequence[Asked], num_samples: int) -> list[Job]:
        """The requests."""
        jobs = []
        for prompt, settings, negative_prompt, scale in asked:
            seeds = ((settings.seed + index) % SEEDS for index in range(num_samples))
            samplings = (dataclasses.replace(settings, seed=seed) for seed in seeds)
            handles = [Handle(one, self.step, self._scheduler.cancel, self._turns) for one in samplings]
            jobs.append(Job(prompt, handles, negative_prompt, scale))
        return jobs

    def _check_caches(self) -> None:
        nodes = num_nodes(self.speculation)
        chain = self.speculation is None or self.speculation.num_candidates == 1
        draft = None if self.speculation is None else self.speculation.draft_model
        if draft is not None and draft.config.vocab_size != self.model.config.vocab_size:
            wanted = f"a draft model with vocab_size={self.model.config.vocab_size}"
            raise ValueError(f"speculation: expected {wanted}, got {draft.config.vocab_size}")
        for layer, cache in enumerate(jax.eval_shape(self._new_caches)):
            policy, where = cache.policy, f"{cache.policy} of capacity={cache.capacity} in layer {layer}"
            longest = policy.longest_append(cache.capacity)
            if self.max_length > cache.capacity and not policy.bounded:
                wanted = f"at most capacity={cache.capacity}, as layer {layer} keeps every token"
                raise ValueError(f"max_length: expected {wanted}, got {self.max_length}")
            if self.max_length > cache.capacity and self.prefill_chunk > longest:
                raise ValueError(f"prefill_chunk: expected at most {longest}, for {where}, got {self.prefill_chunk}")
            takes_back = isinstance(policy, pa.caches.Dense) or (
                chain
                and isinstance(policy, pa.caches.Window)
                and (nodes <= longest or self.max_length <= cache.capacity)
            )
            if self.speculation is not None and not takes_back:
                wanted = f"caches that can take {nodes} tokens back" + ("" if chain else ", from a tree: Dense")
                raise ValueError(f"speculation: expected {wanted}, got {where}")

    def _new_caches(self) -> tuple[pa.caches.KVCache, ...]:
        capacity, chunk = self.capacity, max(self.prefill_chunk, num_nodes(self.speculation))
        caches = self.model.init_caches(
            batch_size=self.batch_size,
            capacity=[*map(whole_pages, capacity)] if isinstance(capacity, Sequence) else whole_pages(capacity),
            policy=self.policy,
            storage=self.storage,
            chunk=chunk,
        )
        draft = None if self.speculation is None else self.speculation.draft_model
        if draft is not None:
            size = whole_pages(self.max_length)
            caches += draft.init_caches(batch_size=self.batch_size, capacity=size, chunk=chunk)
        return bits.pack(caches)  # nothing here needs a gradient
