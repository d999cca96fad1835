"""A re-entrant lock that serves threads first come, first served."""

import collections
import contextlib
import threading
from collections.abc import Iterator


class FairLock:
    """``with lock.hold():`` excludes other threads; blocks of one thread may nest.

    A ``threading`` lock goes to any thread that asks at the right moment, usually the one that just released it. Here,
    a thread that releases the lock and takes it again queues behind all waiting threads.
    """

    def __init__(self) -> None:
        self._guard = threading.RLock()  # protects the fields below
        self._changed = threading.Condition(self._guard)
        self._queue: collections.deque[int] = collections.deque()  # thread ids; the first holds the lock

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Waits for the lock and holds it until the block ends."""
        thread = threading.get_ident()
        if self._holds(thread):
            yield
            return
        try:
            with self._guard:
                self._queue.append(thread)
                self._changed.wait_for(lambda: self._holds(thread))
            yield
        finally:  # also reached when the wait is interrupted
            with self._guard:
                if thread in self._queue:
                    self._queue.remove(thread)
                self._changed.notify_all()

    @contextlib.contextmanager
    def hold_if_free(self) -> Iterator[bool]:
        """Never waits. Yields whether it took the lock: False if any thread holds it, even this one."""
        with self._guard:
            if self._queue:
                yield False
                return
            with self.hold():
                yield True

    def _holds(self, thread: int) -> bool:
        with self._guard:
            return len(self._queue) > 0 and self._queue[0] == thread
