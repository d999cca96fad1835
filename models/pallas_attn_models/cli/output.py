"""Output helpers: status lines on stderr, and escaping of control characters in untrusted text."""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator

# Characters that control a terminal instead of being shown: C0, DEL, C1, bidirectional embeddings, overrides and
# isolates; and surrogates, which cannot be encoded. All others are text, including spaces and joiners.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def status(message: str) -> None:
    """Prints a line to stderr, which a pipe does not receive."""
    print(printable(message), file=sys.stderr, flush=True)


def printable(text: str, keep: str = "") -> str:
    """Escapes control characters except those in ``keep``, so that text cannot manipulate the terminal."""
    return _CONTROLS.sub(lambda match: match[0] if match[0] in keep else repr(match[0])[1:-1], text)


def one_line(message: str, longest: int = 1000) -> str:
    """A message as one printable line; omits the middle of a long one."""
    line = printable(" ".join(message.split()))
    half = longest // 2
    return line if len(line) <= longest else f"{line[:half]} .. {len(line)} characters .. {line[-half:]}"


@contextlib.contextmanager
def quiet_failures() -> Iterator[None]:
    """Buffers what libraries write to stderr, and drops it if an error occurs, whose message is clearer."""
    sys.stderr.flush()
    try:
        stderr = os.dup(2)
    except OSError:  # no stderr
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
