"""What every command prints alike: status on stderr, and text from outside without its control characters."""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator

# Characters that act on a terminal instead of being seen: controls (C0, DEL, C1), embeddings, overrides and isolates of
# the writing direction; and half characters, which cannot be written. All else is text, spaces and joiners included.
_ACTS = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def status(message: str) -> None:
    """A line on stderr, for the user and not for a pipe."""
    print(printable(message), file=sys.stderr, flush=True)


def printable(text: str, keep: str = "") -> str:
    """Control characters as escapes, so that no text can play with the terminal; but not those of ``keep``."""
    return _ACTS.sub(lambda match: match[0] if match[0] in keep else repr(match[0])[1:-1], text)


def one_line(message: str, longest: int = 1000) -> str:
    """A message of any length, from anywhere, as a line that can be printed: a long one without its middle."""
    line = printable(" ".join(message.split()))
    half = longest // 2
    return line if len(line) <= longest else f"{line[:half]} .. {len(line)} characters .. {line[-half:]}"


@contextlib.contextmanager
def quiet_failures() -> Iterator[None]:
    """What libraries write to stderr meanwhile waits, and is dropped if an error comes: that says it better."""
    sys.stderr.flush()
    try:
        stderr = os.dup(2)
    except OSError:  # there is none
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        held.seek(0)
        os.write(2, held.read())
