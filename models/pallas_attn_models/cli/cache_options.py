"""Policies and storages of caches in words: ``"window(1024, sinks=4)"``, ``"paged(64, 512, int8)"``.

A word is the name of a class, in lower case, with its arguments as Python would take them. It is read as a syntax tree,
never evaluated.
"""

import ast
import inspect
from typing import Any

import pallas_attn as pa

_LONGEST = 1000  # characters
POLICIES = {
    kind.__name__.lower(): kind for kind in (pa.caches.Dense, pa.caches.Window, pa.caches.H2O, pa.caches.QHitter)
}
STORAGES = {
    kind.__name__.lower(): kind
    for kind in (pa.caches.Plain, pa.caches.Int8, pa.caches.Int4, pa.caches.Float8, pa.caches.Paged)
}


def forms(kinds: dict[str, type]) -> list[str]:
    """What can be said, with arguments and defaults."""
    return [f"{name}{inspect.signature(kind)}".split(" ->")[0].removesuffix("()") for name, kind in kinds.items()]


def policy(text: str) -> pa.caches.Policy:
    """The policy of these words.

    Raises:
      ValueError: words that say none; names what can be said.
    """
    return _read("cache", text, POLICIES)


def storage(text: str) -> pa.caches.Storage:
    """The storage of these words; raises as :func:`policy` does."""
    return _read("storage", text, STORAGES)


def _read(option: str, text: str, kinds: dict[str, type]) -> Any:
    if len(text) > _LONGEST:  # Python's parser has no good answer to a deep nesting
        raise ValueError(f"{option}: expected one of {', '.join(forms(kinds))}; got {len(text)} characters")
    try:
        return _value(ast.parse(text.strip(), mode="eval").body, kinds, outermost=True)
    except (SyntaxError, TypeError, UnicodeError, RecursionError, MemoryError) as error:
        raise ValueError(f"{option}: expected one of {', '.join(forms(kinds))}; got {text!r} ({error})") from error


def _value(node: ast.expr, kinds: dict[str, type], outermost: bool = False) -> Any:
    match node:
        case ast.Name(id=name) if name.lower() in kinds:
            return kinds[name.lower()]()
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if name.lower() in kinds:
            named = {keyword.arg: _value(keyword.value, kinds) for keyword in keywords if keyword.arg is not None}
            if len(named) != len(keywords):
                raise TypeError("** is not understood")
            return kinds[name.lower()](*(_value(arg, kinds) for arg in args), **named)
        case ast.Constant(value=bool() | int() | float() as value) if not outermost:
            return value
    raise TypeError(f"{ast.unparse(node)!r} is not understood")
