"""The text and JSON files of a checkpoint. They may hold anything; an error names the file."""

import codecs
import json
from pathlib import Path
from typing import Any

_MAX_BYTES = 10**8


def read_text(path: Path) -> str:
    """The text of a file: UTF-8, or UTF-16 if it begins with a byte order mark, which is no part of the text.

    Line ends become ``"\\n"``, as in every text file that Python opens.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: bytes that are no text, or too many.
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
    """The object in ``text``, which is that of ``path``.

    Raises:
      ValueError: it is no JSON object, or one that Python cannot hold.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"{path}: expected JSON, got objects or arrays that are nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it holds no JSON object.
      OSError: the file cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a JSON file, found {'a directory' if path.is_dir() else 'none'}")
    return parse_json(path, read_text(path))
