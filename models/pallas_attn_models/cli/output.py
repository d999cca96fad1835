"""What every command prints alike: status on stderr, and text from outside without its control characters."""

import sys


def status(message: str) -> None:
    """A line on stderr, for the user and not for a pipe."""
    print(message, file=sys.stderr, flush=True)


def printable(text: str, keep: str = "") -> str:
    """Control characters as escapes, so that no text can play with the terminal; but not those of ``keep``."""
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)
