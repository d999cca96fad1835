"""Who has which row when: a bounded queue, and rounds in which prompts are read and tokens drawn.

Reads downwards: a round is admit, read, decode.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

import pallas_attn as pa
from pallas_attn_models.generation.engine import Engine
from pallas_attn_models.generation.requests import Handle, Job, Reading, ScoreJob
from pallas_attn_models.generation.rows import FINISH_REASONS, Report, Work
from pallas_attn_models.generation.steps import REPORT_WIDTH


class QueueFull(RuntimeError):
    """No more requests can wait: let some finish first."""


class Scheduler:
    """Continuous batching (Orca, Yu et al., OSDI 2022): a row that is done makes room for who has waited longest.

    No request overtakes another in the queue, and in every round each prompt that is being read gets one chunk further
    and each row that is running at least one token, so nobody starves, whatever the others ask for. A request begins
    when there are rows for it, and, with paged caches, pages for all that it may become.

    Args:
      engine: does the work.
      max_queue: so many requests can wait.
      spare: tokens that a row may hold for a while beyond what it was asked for.
    """

    def __init__(self, engine: Engine, max_queue: int, spare: int = 0) -> None:
        self._engine = engine
        self._max_queue = max_queue
        self._spare = spare
        self._queue: collections.deque[Job] = collections.deque()
        self._active: list[Job] = []
        self._free_rows = list(range(engine.batch_size))
        self._to_release: list[int] = []  # rows that still hold what nobody waits for
        self._given_up: collections.deque[Job] = collections.deque()
        self._pools = [_Pool.of(cache) for cache in engine.abstract_state().caches if cache.pages is not None]

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._queue or self._active or self._to_release or self._given_up)

    @property
    def queue_full(self) -> bool:
        """Whether :meth:`submit` would refuse."""
        return len(self._queue) >= self._max_queue

    def submit(self, job: Job) -> None:
        """Puts a request at the end of the queue.

        Raises:
          QueueFull: it has no place.
        """
        self.sweep()
        if self.queue_full:
            raise QueueFull(f"max_queue: {self._max_queue} requests wait already; let some finish or cancel some")
        self._queue.append(job)

    def cancel(self, handle: Handle) -> None:
        """Ends a continuation where it is, unless it is done.

        Its row is free at once, or when the prompt that it shares is read.
        """
        if handle.done:
            return
        handle.finish("cancelled")
        for job in [*self._queue, *self._active]:
            if handle not in job.handles:
                continue
            if job in self._queue:
                if job.done:
                    self._queue.remove(job)
            elif not job.readings:
                self._give_back(job, job.handles.index(handle))
            elif job.done:
                job.readings = []
                for index in range(len(job.handles)):
                    self._give_back(job, index)
            self._active = [job for job in self._active if not job.done]
            return

    def drop(self, job: Job) -> None:
        """Ends a request, wherever it is."""
        if job in self._queue:
            self._queue.remove(job)
        elif job in self._active:
            self._active.remove(job)
            self._release([*job.rows, *job.partners])

    def give_up(self, jobs: Sequence[Job]) -> None:
        """Lets the next :meth:`sweep` end these requests.

        It may be called at any time, even where the garbage collector has stopped a thread in the middle of another
        method.
        """
        self._given_up.extend(jobs)

    def sweep(self) -> None:
        """Ends the requests that were given up, if they are not done."""
        while self._given_up:
            job = self._given_up[0]
            for handle in job.handles:
                self.cancel(handle)
            if not job.done:
                self.drop(job)
            self._given_up.popleft()

    def step(self, num_steps: int = REPORT_WIDTH) -> None:
        """One round; each running row takes up to ``num_steps`` steps, but one if there are prompts to be read on.

        Raises what the executables raise. Requests that had rows are lost then; those in the queue are not.
        """
        try:
            self.sweep()
            admitted = self._admit()
            self._read(admitted)
            running = any(not job.readings for job in self._active)
            if running:
                reading = any(job.readings for job in self._active)
                report = self._engine.decode(1 if reading else num_steps, eager=bool(self._queue))
                self._take(report)
        except BaseException as error:
            self._abandon(error)
            raise

    def compile(self, progress: Callable[[str], None] | None = None) -> float:
        """As :meth:`Engine.compile`; raises as :meth:`step`."""
        try:
            return self._engine.compile(progress)
        except BaseException as error:
            self._abandon(error)
            raise

    # --- admit ---

    def _admit(self) -> list[Job]:
        """Gives rows to those who have waited longest, in their order."""
        admitted = []
        while self._queue and self._has_room(self._queue[0]):
            if not self._active:
                self._engine.take_weights()  # a run begins
            job = self._queue[0]
            self._active.append(job)  # first, as an interrupt between the two must not lose it
            self._queue.popleft()
            take = [self._free_rows.pop(0) for _ in range(job.num_rows)]
            job.rows, job.partners = take[: len(job.handles) or 1], take[len(job.handles) or 1 :]
            unread = 0 if isinstance(job, ScoreJob) else 1  # decode feeds the last token
            firsts = [job.rows[0], *job.partners[:1]]
            job.readings = [
                Reading(row, prompt, len(prompt) - unread) for row, prompt in zip(firsts, job.prompts, strict=True)
            ]
            admitted.append(job)
        return admitted

    def _has_room(self, job: Job) -> bool:
        if job.num_rows > len(self._free_rows):
            return False
        # Who is alone may try: its rows say so when the pool is spent.
        return not self._active or all(
            sum(pool.pages_of(one, self._engine.max_length, self._spare) for one in (*self._active, job))
            <= pool.num_pages
            for pool in self._pools
        )

    # --- read ---

    def _read(self, admitted: list[Job]) -> None:
        """One more chunk of every prompt that is not read yet."""
        kinds = [True, False]  # those that are scored have an executable of their own
        for scored in kinds:
            jobs = [job for job in self._active if job.readings and isinstance(job, ScoreJob) == scored]
            readings = [(job, reading) for job in jobs for reading in job.readings or ()]
            for first in range(0, len(readings), self._engine.chunk_rows):
                work = self._begin(admitted)
                admitted = []
                self._read_chunks(work, readings[first : first + self._engine.chunk_rows], scored)
        if admitted or self._to_release:
            self._engine.prefill(self._begin(admitted))

    def _begin(self, admitted: list[Job]) -> Work:
        """Work that begins with what has changed hands."""
        work = self._engine.no_work()
        work.released[self._to_release] = True
        self._to_release = []
        for job in admitted:
            samplings = [handle.sampling for handle in job.handles]
            for rows, prompt in zip((job.rows, job.partners), job.prompts, strict=False):
                work.admitted[rows] = True
                work.request.prompt_length[rows] = len(prompt)
                if samplings:
                    work.request.leader[rows] = job.rows
                    arrays = self._engine.stack(samplings)
                    jax.tree.map(lambda into, x, rows=rows: into.__setitem__(rows, x), work.request.sampling, arrays)
            work.request.partner[job.rows] = job.partners or job.rows
            work.request.guidance[job.rows] = job.guidance_scale
        return work

    def _read_chunks(self, work: Work, readings: list[tuple[Job, Reading]], scored: bool) -> None:
        for index, (_, reading) in enumerate(readings):
            piece = reading.prompt[reading.done : min(reading.done + self._engine.chunk, reading.wanted)]
            reading.done += len(piece)
            work.rows[index] = reading.row
            work.tokens[index, : len(piece)] = piece
            work.count[index] = len(piece)
            if reading.done < len(reading.prompt):
                work.following[index] = reading.prompt[reading.done]
        finished = []
        for job, reading in readings:
            if reading.done == reading.wanted and job.readings:
                job.readings.remove(reading)
                finished += [] if job.readings else [job]
        if scored:
            logits, logprobs = self._engine.score(work)
            for index, (job, _) in enumerate(readings):
                assert isinstance(job, ScoreJob)
                count = int(work.count[index])
                job.pieces.append(logprobs[index, :count])
                if job.logits is not None:
                    job.logits.append(np.asarray(logits)[index, :count])
            for job in finished:
                job.finished = True
                self.drop(job)
        else:
            work = self._with_starts(work, finished)
            self._engine.prefill(work)

    def _with_starts(self, work: Work, jobs: list[Job]) -> Work:
        """Also copies what is read to the other continuations of these requests, and lets all of them draw."""
        copies = []
        for job in jobs:
            for rows in (job.rows, job.partners):
                copies += [(rows[0], row) for row in rows[1:]]
            for index, handle in enumerate(job.handles):
                if handle.done:
                    self._give_back(job, index)
                else:
                    work.started[[job.rows[index], *job.partners[index : index + 1]]] = True
        for number, (source, target) in enumerate(copies):
            work.sources[number], work.targets[number] = source, target
        return dataclasses.replace(work, num_copies=np.array(len(copies), np.int32))

    # --- decode ---

    def _take(self, report: Report) -> None:
        """Hands the new tokens to those who wait for them."""
        for job in self._active:
            if job.readings:
                continue
            for index, (row, handle) in enumerate(zip(job.rows, job.handles, strict=True)):
                if handle.done:
                    continue
                count = int(report.num_new[row] - report.first[row])
                handle.extend(
                    report.tokens[row, :count].tolist(),
                    report.logprobs[row, :count].tolist(),
                    list(_top(report, row, count, handle.sampling.top_logprobs)),
                )
                reason = FINISH_REASONS.get(int(report.status[row]))
                if reason is not None:
                    handle.finish(reason, int(report.matched[row]))
                    rows = [row, *job.partners[index : index + 1]]
                    self._free_rows += rows
                    # What runs is emptied when it ends; where the pool is spent, a prompt can end before it runs.
                    self._to_release += [] if count else rows
        self._active = [job for job in self._active if not job.done]

    # --- endings ---

    def _give_back(self, job: Job, index: int) -> None:
        self._release([job.rows[index], *job.partners[index : index + 1]])

    def _release(self, rows: list[int]) -> None:
        self._to_release += rows
        self._free_rows += rows

    def _abandon(self, error: BaseException) -> None:
        """Whoever had rows has lost them, and all rows are free."""
        for job in self._active:
            for handle in job.handles:
                handle.error = None if handle.done else error
            if isinstance(job, ScoreJob):
                job.error = error
        self._queue = collections.deque(job for job in self._queue if not job.done)
        self._active, self._to_release = [], []
        self._free_rows = list(range(self._engine.batch_size))
        self._engine.forget()


def _top(report: Report, row: int, count: int, number: int) -> Iterator[list[tuple[int, float]]]:
    tokens = report.top_tokens[row, :count, :number].tolist()
    logprobs = report.top_logprobs[row, :count, :number].tolist()
    return (list(zip(*one, strict=True)) for one in zip(tokens, logprobs, strict=True))


@dataclasses.dataclass(frozen=True)
class _Pool:
    """The pages of a layer."""

    page_size: int
    num_pages: int
    capacity: int
    keeps_all: bool

    @staticmethod
    def of(cache: pa.caches.KVCache) -> "_Pool":
        num_pages, page_size = jax.tree.leaves(cache.key)[0].shape[:2]
        return _Pool(page_size, num_pages, cache.capacity, not cache.policy.bounded)

    def pages_of(self, job: Job, max_length: int, spare: int) -> int:
        """What a request can come to hold, ``spare`` tokens more in each row than it asks for."""
        total = 0
        for prompt in job.prompts:
            most = [min(len(prompt) + handle.sampling.max_new_tokens, max_length) for handle in job.handles]
            most = [tokens + spare for tokens in most] or [len(prompt)]
            # Continuations share the pages that the prompt fills, as nobody writes to them again.
            shared = (len(prompt) - 1) // self.page_size if self.keeps_all else 0
            own = sum(-(-min(tokens, self.capacity) // self.page_size) - shared for tokens in most)
            # The page that it fills in part is there, too, until each of them has a copy to write to.
            total += shared + max(own, len(most) + (len(most) > 1))
        return total
