"""Continuous batching: assigns rows to queued requests and runs rounds of prefill and decode.

Reads downwards: a round is admit, prefill, decode.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

import pallas_attn as pa
from pallas_attn_models.generation.engine import Engine
from pallas_attn_models.generation.requests import Handle, PrefillProgress, RequestGroup, ScoreRequest
from pallas_attn_models.generation.state import FINISH_REASONS, DecodeOutput, PrefillBatch
from pallas_attn_models.generation.steps import OUTPUT_WIDTH


class QueueFull(RuntimeError):
    """The request queue is full."""


class Scheduler:
    """Continuous batching (Orca, Yu et al., OSDI 2022): a finished row goes to the oldest queued request.

    The queue is strictly first come, first served. Every round advances each unfinished prompt by one chunk and each
    running row by at least one token, so no request starves. A request starts when enough rows are free and, with
    paged caches, enough pages for its maximum length.

    Args:
      engine: runs the executables.
      max_queue: capacity of the queue.
      spare: tokens beyond its own that a row may hold temporarily (unchecked drafts).
    """

    def __init__(self, engine: Engine, max_queue: int, spare: int = 0) -> None:
        self._engine = engine
        self._max_queue = max_queue
        self._spare = spare
        self._queue: collections.deque[RequestGroup] = collections.deque()
        self._active: list[RequestGroup] = []
        self._free_rows = list(range(engine.batch_size))
        self._to_release: list[int] = []  # free rows whose cache entries are not cleared yet
        self._abandoned: collections.deque[RequestGroup] = collections.deque()
        self._pools = [_Pool.of(cache) for cache in engine.abstract_state().caches if cache.pages is not None]

    @property
    def idle(self) -> bool:
        """Whether no work is left."""
        return not (self._queue or self._active or self._to_release or self._abandoned)

    @property
    def queue_full(self) -> bool:
        """Whether :meth:`submit` would raise."""
        return len(self._queue) >= self._max_queue

    def submit(self, group: RequestGroup) -> None:
        """Appends a request to the queue.

        Raises:
          QueueFull: the queue has no room.
        """
        self.sweep()
        if self.queue_full:
            raise QueueFull(f"max_queue: {self._max_queue} requests are queued already; let some finish or cancel some")
        self._queue.append(group)

    def cancel(self, handle: Handle) -> None:
        """Stops a continuation unless it is done.

        Its row is freed at once, or when the prefill that it shares is finished.
        """
        if handle.done:
            return
        handle.finish("cancelled")
        for group in [*self._queue, *self._active]:
            if handle not in group.handles:
                continue
            if group in self._queue:
                if group.done:
                    self._queue.remove(group)
            elif not group.prefills:
                self._release_continuation(group, group.handles.index(handle))
            elif group.done:
                group.prefills = []
                for index in range(len(group.handles)):
                    self._release_continuation(group, index)
            self._active = [group for group in self._active if not group.done]
            return

    def drop(self, group: RequestGroup) -> None:
        """Removes a request from the queue or from its rows."""
        if group in self._queue:
            self._queue.remove(group)
        elif group in self._active:
            self._active.remove(group)
            self._release([*group.rows, *group.partners])

    def abandon(self, groups: Sequence[RequestGroup]) -> None:
        """Marks requests for the next :meth:`sweep` to end.

        Safe at any time, even when the garbage collector runs in the middle of another method.
        """
        self._abandoned.extend(groups)

    def sweep(self) -> None:
        """Ends the abandoned requests that are not done."""
        while self._abandoned:
            group = self._abandoned[0]
            for handle in group.handles:
                self.cancel(handle)
            if not group.done:
                self.drop(group)
            self._abandoned.popleft()

    def step(self, num_steps: int = OUTPUT_WIDTH) -> None:
        """Runs one round: up to ``num_steps`` decode steps per running row, or one while any prompt is unfinished.

        If an executable raises, requests with rows are lost; queued requests are kept.
        """
        try:
            self.sweep()
            admitted = self._admit()
            self._prefill(admitted)
            running = any(not group.prefills for group in self._active)
            if running:
                prefilling = any(group.prefills for group in self._active)
                output = self._engine.decode(1 if prefilling else num_steps, eager=bool(self._queue))
                self._deliver(output)
        except BaseException as error:
            self._fail(error)
            raise

    def compile(self, progress: Callable[[str], None] | None = None) -> float:
        """As :meth:`Engine.compile`; errors as in :meth:`step`."""
        try:
            return self._engine.compile(progress)
        except BaseException as error:
            self._fail(error)
            raise

    # --- admit ---

    def _admit(self) -> list[RequestGroup]:
        """Assigns rows to the oldest queued requests, in order."""
        admitted = []
        while self._queue and self._has_room(self._queue[0]):
            if not self._active:
                self._engine.refresh_weights()  # a run starts
            group = self._queue[0]
            self._active.append(group)  # before popleft, so that an interrupt in between does not lose the request
            self._queue.popleft()
            rows = [self._free_rows.pop(0) for _ in range(group.num_rows)]
            group.rows, group.partners = rows[: len(group.handles) or 1], rows[len(group.handles) or 1 :]
            left = 0 if isinstance(group, ScoreRequest) else 1  # decode feeds the last token
            firsts = [group.rows[0], *group.partners[:1]]
            group.prefills = [
                PrefillProgress(row, prompt, len(prompt) - left)
                for row, prompt in zip(firsts, group.prompts, strict=True)
            ]
            admitted.append(group)
        return admitted

    def _has_room(self, group: RequestGroup) -> bool:
        if group.num_rows > len(self._free_rows):
            return False
        # A request alone may start anyway: its rows report "capacity" if the pool runs out.
        return not self._active or all(
            sum(pool.pages_of(other, self._engine.max_length, self._spare) for other in (*self._active, group))
            <= pool.num_pages
            for pool in self._pools
        )

    # --- prefill ---

    def _prefill(self, admitted: list[RequestGroup]) -> None:
        """Prefills one chunk of every unfinished prompt."""
        for scored in (True, False):  # scoring has an executable of its own
            groups = [group for group in self._active if group.prefills and isinstance(group, ScoreRequest) == scored]
            prefills = [(group, progress) for group in groups for progress in group.prefills or ()]
            for first in range(0, len(prefills), self._engine.chunk_rows):
                batch = self._new_batch(admitted)
                admitted = []
                self._prefill_chunk(batch, prefills[first : first + self._engine.chunk_rows], scored)
        if admitted or self._to_release:
            self._engine.prefill(self._new_batch(admitted))

    def _new_batch(self, admitted: list[RequestGroup]) -> PrefillBatch:
        """A batch that releases and admits rows, without tokens yet."""
        batch = self._engine.empty_batch()
        batch.released[self._to_release] = True
        self._to_release = []
        for group in admitted:
            samplings = [handle.sampling for handle in group.handles]
            for rows, prompt in zip((group.rows, group.partners), group.prompts, strict=False):
                batch.admitted[rows] = True
                batch.request.prompt_length[rows] = len(prompt)
                if samplings:
                    batch.request.leader[rows] = group.rows
                    arrays = self._engine.stack(samplings)
                    jax.tree.map(lambda into, x, rows=rows: into.__setitem__(rows, x), batch.request.sampling, arrays)
            batch.request.partner[group.rows] = group.partners or group.rows
            batch.request.guidance[group.rows] = group.guidance_scale
        return batch

    def _prefill_chunk(
        self, batch: PrefillBatch, prefills: list[tuple[RequestGroup, PrefillProgress]], scored: bool
    ) -> None:
        """Adds the next chunk of each prompt to the batch and runs it."""
        for index, (_, progress) in enumerate(prefills):
            piece = progress.prompt[progress.done : min(progress.done + self._engine.chunk, progress.total)]
            progress.done += len(piece)
            batch.rows[index] = progress.row
            batch.tokens[index, : len(piece)] = piece
            batch.count[index] = len(piece)
            if progress.done < len(progress.prompt):
                batch.next_token[index] = progress.prompt[progress.done]
        finished = []
        for group, progress in prefills:
            if progress.done == progress.total and group.prefills:
                group.prefills.remove(progress)
                finished += [] if group.prefills else [group]
        if scored:
            logits, logprobs = self._engine.score(batch)
            for index, (group, _) in enumerate(prefills):
                assert isinstance(group, ScoreRequest)
                count = int(batch.count[index])
                group.pieces.append(logprobs[index, :count])
                if group.logits is not None:
                    group.logits.append(np.asarray(logits)[index, :count])
            for group in finished:
                group.finished = True
                self.drop(group)
        else:
            self._engine.prefill(self._with_starts(batch, finished))

    def _with_starts(self, batch: PrefillBatch, groups: list[RequestGroup]) -> PrefillBatch:
        """Makes the batch copy prefilled rows to the groups' other continuations, and start all of them."""
        copies = []
        for group in groups:
            for rows in (group.rows, group.partners):
                copies += [(rows[0], row) for row in rows[1:]]
            for index, handle in enumerate(group.handles):
                if handle.done:
                    self._release_continuation(group, index)
                else:
                    batch.started[[group.rows[index], *group.partners[index : index + 1]]] = True
        for number, (source, target) in enumerate(copies):
            batch.sources[number], batch.targets[number] = source, target
        return dataclasses.replace(batch, num_copies=np.array(len(copies), np.int32))

    # --- decode ---

    def _deliver(self, output: DecodeOutput) -> None:
        """Passes the new tokens to their handles."""
        for group in self._active:
            if group.prefills:
                continue
            for index, (row, handle) in enumerate(zip(group.rows, group.handles, strict=True)):
                if handle.done:
                    continue
                count = int(output.num_new[row] - output.first[row])
                handle.extend(
                    output.tokens[row, :count].tolist(),
                    output.logprobs[row, :count].tolist(),
                    list(_top(output, row, count, handle.sampling.top_logprobs)),
                )
                reason = FINISH_REASONS.get(int(output.status[row]))
                if reason is not None:
                    handle.finish(reason, int(output.matched[row]))
                    rows = [row, *group.partners[index : index + 1]]
                    self._free_rows += rows
                    # Decode clears the rows that end in it; if the pool runs out, a row can end during prefill.
                    self._to_release += [] if count else rows
        self._active = [group for group in self._active if not group.done]

    # --- endings ---

    def _release_continuation(self, group: RequestGroup, index: int) -> None:
        self._release([group.rows[index], *group.partners[index : index + 1]])

    def _release(self, rows: list[int]) -> None:
        self._to_release += rows
        self._free_rows += rows

    def _fail(self, error: BaseException) -> None:
        """Fails every request that has rows, and frees all rows."""
        for group in self._active:
            for handle in group.handles:
                handle.error = None if handle.done else error
            if isinstance(group, ScoreRequest):
                group.error = error
        self._queue = collections.deque(group for group in self._queue if not group.done)
        self._active, self._to_release = [], []
        self._free_rows = list(range(self._engine.batch_size))
        self._engine.reset()


def _top(output: DecodeOutput, row: int, count: int, number: int) -> Iterator[list[tuple[int, float]]]:
    tokens = output.top_tokens[row, :count, :number].tolist()
    logprobs = output.top_logprobs[row, :count, :number].tolist()
    return (list(zip(*one, strict=True)) for one in zip(tokens, logprobs, strict=True))


@dataclasses.dataclass(frozen=True)
class _Pool:
    """The page pool of a layer."""

    page_size: int
    num_pages: int
    capacity: int
    keeps_all: bool

    @staticmethod
    def of(cache: pa.caches.KVCache) -> "_Pool":
        num_pages, page_size = jax.tree.leaves(cache.key)[0].shape[:2]
        return _Pool(page_size, num_pages, cache.capacity, not cache.policy.bounded)

    def pages_of(self, group: RequestGroup, max_length: int, spare: int) -> int:
        """Pages that a request may need at most, with ``spare`` extra tokens per row."""
        total = 0
        for prompt in group.prompts:
            most = [min(len(prompt) + handle.sampling.max_new_tokens, max_length) for handle in group.handles]
            most = [tokens + spare for tokens in most] or [len(prompt)]
            # Continuations share the pages that the prompt fills, because these are never written again.
            shared = (len(prompt) - 1) // self.page_size if self.keeps_all else 0
            own = sum(-(-min(tokens, self.capacity) // self.page_size) - shared for tokens in most)
            # They also share the partly filled page until each of them has its own copy to write to.
            total += shared + max(own, len(most) + (len(most) > 1))
        return total
