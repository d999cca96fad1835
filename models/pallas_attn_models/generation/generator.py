"""The Generator: prompts in, tokens out, with exactly two executables, whatever the requests.

The Generator validates requests and passes them to the scheduler, which assigns rows; the engine runs the executables
(``steps.py``) on the device state (``state.py``).
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

import pallas_attn as pa
from pallas_attn import bits, checks
from pallas_attn_models.checks import require_positive_int, require_size, shown
from pallas_attn_models.decoder import Decoder, LayerCaches, whole_pages
from pallas_attn_models.generation.engine import Engine
from pallas_attn_models.generation.fair_lock import FairLock
from pallas_attn_models.generation.prefill_sizes import default_chunk, default_rows, multiprocessors
from pallas_attn_models.generation.requests import Handle, RequestGroup, ScoreRequest, TopLogprobs
from pallas_attn_models.generation.sampling import SEEDS, Limits, Sampling, Stop
from pallas_attn_models.generation.scheduler import Scheduler
from pallas_attn_models.generation.speculation import Speculation, check_speculation, num_nodes
from pallas_attn_models.generation.stats import GenerationStats, UsageStats
from pallas_attn_models.generation.steps import OUTPUT_WIDTH
from pallas_attn_models.generation.validation import (
    Bounds,
    GenerationRequest,
    Tokens,
    check_prompts,
    validate_request,
    validate_requests,
)

_GREEDY = Sampling()


@dataclasses.dataclass(frozen=True)
class GenerationResult:
    """The result of :meth:`Generator.generate`: one entry per prompt, or per sample, grouped by prompt.

    Attributes:
      tokens, logprobs, finish_reasons, top_logprobs: see :class:`~pallas_attn_models.generation.Completion`.
      stats: resources that the run used.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    finish_reasons: list[str]
    top_logprobs: list[list[TopLogprobs]]
    stats: GenerationStats


class StreamEvent(NamedTuple):
    """A new token of a continuation, or its finish reason, or both.

    Attributes:
      row: index of the continuation, as in a :class:`GenerationResult`.
      token: the token; None if the event carries only the finish reason.
      finish_reason: set in the last event of a row, else None.
    """

    row: int
    token: int | None
    finish_reason: str | None


@dataclasses.dataclass(frozen=True)
class PromptScore:
    """Log-probabilities of a prompt's tokens.

    Attributes:
      logprobs: log-probability of each token but the first, given the tokens before it. NaN where logits are NaN or
        ``+inf``; this can affect a few tokens before the one that caused it, but no other prompt.
      logits: float32 ``[tokens, V]``, after each token, or None if not requested.
    """

    logprobs: list[float]
    logits: np.ndarray | None

    @property
    def total(self) -> float:
        """The log-probability of the prompt, given its first token."""
        return float(np.sum(self.logprobs, dtype=np.float64))


class Generator:
    """Serves any number of requests in ``batch_size`` rows and compiles exactly two executables.

    A request occupies a row while it is served. :meth:`generate` and :meth:`stream` turn a list of prompts into
    requests; :meth:`submit` adds one at any time, and waiting for any result advances every request. The tokens of a
    request do not depend on the other requests.

    Holds the KV caches. Reads the model's weights whenever a run starts, that is, when no request has a row.

    Threads may share a Generator and call any of its methods, and those of its handles, at any time. One thread at a
    time runs a round of :meth:`step` for all requests; waiting threads follow in the order of their calls. An error
    that interrupts a round is raised in the thread that ran it, and becomes the cause of a RuntimeError for every
    request that had a row. An iterator of :meth:`stream` belongs to one thread. A layer hook must not call any method.

    Args:
      model: the decoder.
      batch_size: rows.
      capacity: tokens per row that a cache can hold, rounded up to a multiple of 16; one number, or one per layer.
      prefill_chunk: prompts are prefilled in chunks of this many tokens, between decode steps of other rows; default
        128, or on a GPU up to 512, so that attention has a program for each multiprocessor.
      policy, storage: of the caches; default ``pa.caches.Dense()`` and ``pa.caches.Plain()``; or one per layer.
        Layers with a sliding window never allocate more than the window needs.
      max_length: tokens per row, prompt and new tokens together; default: capacity. May exceed the capacity if the
        policy evicts old tokens.
      limits: bounds on the sampling settings of a request.
      max_queue: requests that can wait for a row.
      layer_hook: ``layer_hook(layer_index, hidden) -> hidden``, ``[R|B, T, E]``, called before each layer of the model,
        not of a draft model. The executables trace it once.
      prefill_rows: prompts prefilled in one call; default 1, or on a GPU as many as it has multiprocessors for.
      speculation: a ``PromptLookup`` or ``DraftModel``: decode drafts tokens and verifies several per step. Neither
        results nor the number of executables change; but a request too long for the whole pool of a paged cache may end
        a few tokens earlier, because drafts occupy slots until they are verified. Policies must be able to truncate:
        ``Dense``, or ``Window`` with as many spare slots as a step feeds tokens.
      graph_loops: on an NVIDIA GPU, lets XLA put all steps of a decode call in one CUDA graph, so that the host does
        not wait for each. Off by default, because it has been compiled but not yet run.

    Raises:
      ValueError: a size below 1 or beyond 32 bits, or one that the policy does not support.
      TypeError: a model, policy, storage, limits, layer hook or speculation of the wrong kind.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        batch_size: int,
        capacity: int | Sequence[int],
        prefill_chunk: int | None = None,
        policy: pa.caches.Policy | Sequence[pa.caches.Policy] | None = None,
        storage: pa.caches.Storage | Sequence[pa.caches.Storage] | None = None,
        max_length: int | None = None,
        limits: Limits | None = None,
        max_queue: int = 1024,
        layer_hook: Callable[[int, Array], Array] | None = None,
        prefill_rows: int | None = None,
        speculation: Speculation | None = None,
        graph_loops: bool = False,
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
        # No upper bound here: larger values act like the largest useful one.
        for name, size in (("prefill_chunk", prefill_chunk), ("max_queue", max_queue), ("prefill_rows", prefill_rows)):
            if size is not None or name == "max_queue":
                require_positive_int(name, size)
        self.model = model
        self.batch_size = batch_size
        self.capacity = capacity
        self.max_length = max(capacities) if max_length is None else max_length
        heads, cores = model.config.layer(0).num_heads, multiprocessors(_device(model))
        # A policy may have room for no more than a tile.
        bounded = self.max_length > min(capacities)
        chunk = prefill_chunk or default_chunk(heads, None if bounded else cores)
        self.prefill_chunk = min(chunk, max(capacities))
        prefill_rows = prefill_rows or default_rows(self.prefill_chunk, heads, cores)
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
            graph_loops=checks.boolean("graph_loops", graph_loops),
        )
        self._scheduler = Scheduler(self._engine, max_queue, spare=num_nodes(speculation) - 1)
        self._lock = FairLock()

    @property
    def compile_counts(self) -> dict[str, int]:
        """Executables compiled per function: 0 before the first run, 1 after it; ``score`` appears once it is used."""
        return self._engine.compile_counts

    @property
    def spent(self) -> UsageStats:
        """Totals over all requests so far."""
        return self._engine.usage

    @property
    def cache_nbytes(self) -> int:
        """Bytes that the caches of all layers occupy; layers with the same kind of cache share its index."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(self._new_caches)))

    def warmup(self, progress: Callable[[str], None] | None = None) -> float:
        """Compiles both executables unless they are compiled already; returns the seconds spent.

        The first run does this implicitly. If ``jax_compilation_cache_dir`` is set before anything is compiled, later
        processes load the executables from that directory.

        Args:
          progress: called with the name of each executable before it is compiled.

        Raises:
          TypeError: ``progress`` is not callable.
        """
        if progress is not None and not callable(progress):
            raise TypeError(f"progress: expected a function or None, got {type(progress).__name__}")
        with self._lock.hold():
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
        """Continues every prompt until a stop condition, its token budget, or the end of its row.

        Args:
          prompts: token ids; any number of prompts of 1 to ``max_length - 1`` tokens, of different lengths.
          sampling: one for all prompts, or one per prompt.
          stop: a token, or a sequence of tokens and token sequences, that end any row, in addition to those of its
            sampling settings and the ``eos_token_ids`` of the model's config.
          negative_prompts: one per prompt, for classifier-free guidance (arXiv:2306.17806), which steers away from the
            tokens that the negative prompt makes likely. A guided request takes two rows.
          guidance_scale: strength of guidance; 1 disables it, 0 follows the negative prompt alone; one number, or one
            per prompt.
          num_samples: continuations of each prompt, which is prefilled once; sample i uses the sampling's seed plus i.

        Raises:
          ValueError: an invalid prompt, token, or number of samplings or rows; nothing has been compiled then.
          TypeError: an argument of the wrong kind.
        """
        self._check_samples(num_samples, negative_prompts)
        requests = validate_requests(prompts, sampling, stop, negative_prompts, guidance_scale, self._bounds)
        groups = self._groups(requests, num_samples)
        compile_seconds = self.warmup()
        before = self.spent
        for _ in self._run(groups, OUTPUT_WIDTH):
            pass
        usage = self.spent.since(before)
        completions = [handle.result() for group in groups for handle in group.handles]
        return GenerationResult(
            tokens=[one.tokens for one in completions],
            logprobs=[one.logprobs for one in completions],
            finish_reasons=[one.finish_reason for one in completions],
            top_logprobs=[one.top_logprobs for one in completions],
            stats=usage.of_run(
                prompt_tokens=sum(len(prompt) for group in groups for prompt in group.prompts),
                new_tokens=sum(len(one.tokens) for one in completions),
                compile_seconds=compile_seconds,
                executables=sum(self.compile_counts.values()),
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
        """Yields the tokens of :meth:`generate` as they are generated, every ``interval`` steps.

        Tokens that may begin a stop sequence are withheld until decided. Leaving the iteration early cancels the rest.

        Arguments and errors as in :meth:`generate`.
        """
        require_positive_int("interval", interval)
        self._check_samples(num_samples, negative_prompts)
        requests = validate_requests(prompts, sampling, stop, negative_prompts, guidance_scale, self._bounds)
        groups = self._groups(requests, num_samples)
        return self._events(groups, interval)

    def submit(
        self,
        prompt: Tokens,
        sampling: Sampling = _GREEDY,
        stop: Stop = (),
        negative_prompt: Tokens | None = None,
        guidance_scale: float = 1.0,
    ) -> Handle:
        """Queues a request to continue one prompt, which starts as soon as a row is free; see :meth:`generate`.

        Raises:
          QueueFull: ``max_queue`` requests are queued already.
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
        """Queues several continuations of one prompt, which is prefilled once; see :meth:`submit`.

        They start together, when enough rows are free. In a paged cache they share the prompt's pages.
        """
        self._check_samples(num_samples, negative_prompt)
        request = validate_request(prompt, sampling, stop, negative_prompt, guidance_scale, self._bounds)
        (group,) = self._groups([request], num_samples)
        with self._lock.hold():
            self._scheduler.submit(group)
        return group.handles

    def step(self, interval: int = OUTPUT_WIDTH) -> bool:
        """Runs one round for all requests, up to ``interval`` decode steps; returns False if no work is left."""
        require_positive_int("interval", interval)
        with self._lock.hold():
            if self._scheduler.idle:
                return False
            self.warmup()
            self._scheduler.step(min(interval, OUTPUT_WIDTH))
            return True

    def run(self) -> None:
        """Runs rounds until no request is left."""
        while self.step():
            pass

    def score(self, prompts: Sequence[Tokens], logits: bool = False) -> list[PromptScore]:
        """Returns the log-probability of each prompt token; nothing is sampled. The first call compiles one executable.

        Args:
          prompts: as in :meth:`generate`, but of up to ``max_length`` tokens.
          logits: whether to return the logits of all positions, too: ``4 * tokens * V`` bytes per prompt.

        Errors as in :meth:`generate`.
        """
        if not isinstance(logits, bool):
            raise TypeError(f"logits: expected a bool, got {type(logits).__name__}")
        vocab_size = self.model.config.vocab_size
        checked = check_prompts(prompts, max_length=self.max_length, vocab_size=vocab_size, room=0)
        groups = [ScoreRequest(prompt, [], logits=[] if logits else None) for prompt in checked]
        for _ in self._run(groups, OUTPUT_WIDTH):
            pass
        for group in groups:
            if not group.finished:
                raise RuntimeError("the run was interrupted before all prompts were scored") from group.error
        return [
            PromptScore(
                logprobs=np.concatenate(group.pieces)[:-1].tolist(),
                logits=None if group.logits is None else np.concatenate(group.logits),
            )
            for group in groups
        ]

    def _run(self, groups: Sequence[RequestGroup], interval: int) -> Iterator[None]:
        """Submits the groups as the queue has room and runs rounds until they are done; yields after each round."""
        waiting = collections.deque(groups)
        try:
            while not all(group.done for group in groups):
                with self._lock.hold():
                    while waiting and not self._scheduler.queue_full:
                        self._scheduler.submit(waiting.popleft())
                    if not all(group.done for group in groups):  # another thread may have finished them
                        self._scheduler.step(min(interval, OUTPUT_WIDTH))
                yield
        finally:
            self._scheduler.abandon(groups)
            # Sweep now, or leave it to the next round: the garbage collector may run this, and must not wait.
            with self._lock.hold_if_free() as held:
                if held:
                    self._scheduler.sweep()

    def _events(self, groups: Sequence[RequestGroup], interval: int) -> Iterator[StreamEvent]:
        self.warmup()
        handles = [handle for group in groups for handle in group.handles]
        sent = [0] * len(handles)
        ended = [False] * len(handles)

        def new_events() -> list[StreamEvent]:
            events = []
            with self._lock.hold():
                for row, handle in enumerate(handles):
                    new: list[int | None] = [*handle.tokens[sent[row] : handle.num_certain]]
                    sent[row] = handle.num_certain
                    reason = None if ended[row] else handle.finish_reason
                    ended[row] = handle.done
                    if reason is not None and not new:
                        new = [None]
                    events += [StreamEvent(row, token, None) for token in new[:-1]]
                    events += [StreamEvent(row, token, reason) for token in new[-1:]]
            return events

        for _ in self._run(groups, interval):
            yield from new_events()
        # Other threads may have finished these requests while this one was suspended in a yield.
        yield from new_events()
        for handle in handles:
            handle.result()  # raises if the run was interrupted

    @property
    def _bounds(self) -> Bounds:
        config = self.model.config
        return Bounds(self.max_length, config.vocab_size, config.eos_token_ids, self.limits)

    def _check_samples(self, num_samples: int, negative: object) -> None:
        """Raises ValueError unless the batch has rows for the samples, two for each with a negative prompt."""
        require_positive_int("num_samples", num_samples)
        num_rows = num_samples * (1 if negative is None else 2)
        if num_rows > self.batch_size:
            expected = f"at most batch_size={self.batch_size} rows for a prompt"
            raise ValueError(f"num_samples: expected {expected}, got {shown(num_rows)} (two for a guided sample)")

    def _groups(self, requests: Sequence[GenerationRequest], num_samples: int) -> list[RequestGroup]:
        """Request groups with handles for ``num_samples`` continuations each."""
        groups = []
        for prompt, settings, negative_prompt, scale in requests:
            seeds = ((settings.seed + index) % SEEDS for index in range(num_samples))
            samplings = (dataclasses.replace(settings, seed=seed) for seed in seeds)
            handles = [Handle(one, self.step, self._scheduler.cancel, self._lock) for one in samplings]
            groups.append(RequestGroup(prompt, handles, negative_prompt, scale))
        return groups

    def _check_caches(self) -> None:
        nodes = num_nodes(self.speculation)
        chain = self.speculation is None or self.speculation.num_candidates == 1
        draft = None if self.speculation is None else self.speculation.draft_model
        if draft is not None and draft.config.vocab_size != self.model.config.vocab_size:
            expected = f"a draft model with vocab_size={self.model.config.vocab_size}"
            raise ValueError(f"speculation: expected {expected}, got {draft.config.vocab_size}")
        for layer, cache in enumerate(jax.eval_shape(self._new_caches)):
            policy, where = cache.policy, f"{cache.policy} of capacity={cache.capacity} in layer {layer}"
            longest = policy.longest_append(cache.capacity)
            if self.max_length > cache.capacity and not policy.bounded:
                expected = f"at most capacity={cache.capacity}, because layer {layer} keeps every token"
                raise ValueError(f"max_length: expected {expected}, got {self.max_length}")
            if self.max_length > cache.capacity and self.prefill_chunk > longest:
                raise ValueError(f"prefill_chunk: expected at most {longest}, for {where}, got {self.prefill_chunk}")
            can_truncate = isinstance(policy, pa.caches.Dense) or (
                chain
                and isinstance(policy, pa.caches.Window)
                and (nodes <= longest or self.max_length <= cache.capacity)
            )
            if self.speculation is not None and not can_truncate:
                expected = f"caches that can truncate {nodes} tokens" + ("" if chain else ", from a tree: Dense")
                raise ValueError(f"speculation: expected {expected}, got {where}")

    def _new_caches(self) -> LayerCaches:
        capacity, chunk = self.capacity, max(self.prefill_chunk, num_nodes(self.speculation))
        caches = self.model.init_caches(
            batch_size=self.batch_size,
            capacity=[*map(whole_pages, capacity)] if isinstance(capacity, Sequence) else whole_pages(capacity),
            policy=self.policy,
            storage=self.storage,
            chunk=chunk,
        )
        models = [caches]
        draft = None if self.speculation is None else self.speculation.draft_model
        if draft is not None:
            size = whole_pages(self.max_length)
            models.append(draft.init_caches(batch_size=self.batch_size, capacity=size, chunk=chunk))
        return bits.pack(LayerCaches(*models))  # generation needs no gradients


def _device(model: Decoder) -> Any:
    """One of the devices that hold the model; the default device if it is abstract."""
    sharding = getattr(model.embedding.table.get_value(), "sharding", None)
    return jax.devices()[0] if sharding is None else min(sharding.device_set, key=lambda device: device.id)
