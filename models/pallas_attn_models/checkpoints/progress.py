"""Progress of loading: a function that is called with bytes, or a bar in the terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int], object]


def check_progress(progress: Progress | bool | None) -> None:
    """Raises TypeError unless a function, a bool or None."""
    if not (progress is None or isinstance(progress, bool) or callable(progress)):
        raise TypeError(f"progress: expected a function, a bool or None, got {type(progress).__name__}")


@contextmanager
def reporting(progress: Progress | bool | None) -> Iterator[Progress]:
    """Yields a function of the bytes that are done and their total; for True, it draws a bar on stderr."""
    if progress is None or progress is False:
        yield lambda done, total: None
    elif progress is True:
        with _bar() as report:
            yield report
    else:
        yield progress


@contextmanager
def _bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")
        yield lambda done, total: bar.update(task, completed=done, total=total)
