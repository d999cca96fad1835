"""Turns: a re-entrant lock that threads get in the order in which they ask for it."""

import collections
import contextlib
import threading
from collections.abc import Iterator


class Turns:
    """``with turns.take():`` runs its block while no other thread is in such a block; a thread may nest them.

    A lock of ``threading`` goes to whoever asks at the right moment, most often to the thread that has just released
    it. Here a thread that takes turn after turn lets in all others that wait.
    """

    def __init__(self) -> None:
        self._guard = threading.RLock()  # of what follows
        self._changed = threading.Condition(self._guard)
        self._queue: collections.deque[int] = collections.deque()  # threads, of which the first has its turn

    @contextlib.contextmanager
    def take(self) -> Iterator[None]:
        """Waits for the turn of this thread, which ends with the block."""
        thread = threading.get_ident()
        if self._has_turn(thread):
            yield
            return
        try:
            with self._guard:
                self._queue.append(thread)
                self._changed.wait_for(lambda: self._has_turn(thread))
            yield
        finally:  # an interrupted wait ends here, too
            with self._guard:
                if thread in self._queue:
                    self._queue.remove(thread)
                self._changed.notify_all()

    @contextlib.contextmanager
    def take_if_free(self) -> Iterator[bool]:
        """Never waits. Yields whether the block has a turn of its own: not if any thread has one, even this one."""
        with self._guard:
            if self._queue:
                yield False
                return
            with self.take():
                yield True

    def _has_turn(self, thread: int) -> bool:
        with self._guard:
            return len(self._queue) > 0 and self._queue[0] == thread
