"""Cache policies and storages as text: ``"window(1024, sinks=4)"``, ``"paged(64, 512, int8)"``.

The text is the lower-case name of a class with its Python arguments. It is parsed, never evaluated.
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
    """The accepted forms, with arguments and defaults."""
    return [f"{name}{inspect.signature(kind)}".split(" ->")[0].removesuffix("()") for name, kind in kinds.items()]


def policy(text: str) -> pa.caches.Policy:
    """Parses a policy.

    Raises:
      ValueError: invalid text; lists the accepted forms.
    """
    return _read("cache", text, POLICIES)


def storage(text: str) -> pa.caches.Storage:
    """Parses a storage; errors as in :func:`policy`."""
    return _read("storage", text, STORAGES)


def _read(option: str, text: str, kinds: dict[str, type]) -> Any:
    if len(text) > _LONGEST:  # Python's parser can crash on deep nesting
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
                raise TypeError("** is not supported")
            return kinds[name.lower()](*(_value(arg, kinds) for arg in args), **named)
        case ast.Constant(value=bool() | int() | float() as value) if not outermost:
            return value
    raise TypeError(f"{ast.unparse(node)!r} is not supported")
