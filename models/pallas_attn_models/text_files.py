"""Reads a checkpoint's text and JSON files. The content is untrusted; every error names the file."""

import codecs
import json
from pathlib import Path
from typing import Any

_MAX_BYTES = 10**8


def read_text(path: Path) -> str:
    """Reads a UTF-8 file, or UTF-16 if it starts with that byte order mark; the mark is removed.

    Line endings become ``"\\n"``, as in Python's text mode.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: not valid text, or too large.
      OSError: the file cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a file, found {'a directory' if path.is_dir() else 'none'}")
    if (size := path.stat().st_size) > _MAX_BYTES:
        raise ValueError(f"{path}: expected at most {_MAX_BYTES} bytes of text, got {size}")
    content = path.read_bytes()
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8, got: {error}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_json(path: Path, text: str) -> dict[str, Any]:
    """Parses ``text``, read from ``path``, as a JSON object.

    Raises:
      ValueError: not a JSON object, or one that Python cannot represent.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"{path}: expected JSON, got objects or arrays nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file does not hold a JSON object.
      OSError: the file cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a JSON file, found {'a directory' if path.is_dir() else 'none'}")
    return parse_json(path, read_text(path))
