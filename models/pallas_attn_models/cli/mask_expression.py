"""Parses mask expressions such as ``causal & sliding_window(256) | sink(4)``, without evaluating them.

Python's parser builds the tree and defines the precedence (``~`` before ``&`` before ``|``). The expression may contain
only the names below, calls of these with integers and lists of integers, and the three operators.
"""

import ast
import difflib
import inspect
import re
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from pallas_attn import masks

# The syntax of every mask that integers and lists can describe. Without arguments, parentheses are optional.
FORMS = {
    "full": "full",
    "causal": "causal",
    "sliding_window": "sliding_window(left, right=0)",
    "prefix": "prefix(n)",
    "sink": "sink(n)",
    "chunked": "chunked(size)",
    "segments": "segments([length, ...])",
}
_EXPECTED = "expected a mask such as causal & sliding_window(256) | sink(4)"
_NEED_ARRAYS = ("dense", "tree", "custom")
_MAX_DEPTH = 100


class MaskExpressionError(ValueError):
    """An error message, followed by the expression and carets that mark the location."""

    def __init__(self, message: str, expression: str, start: int, end: int):
        carets = " " * start + "^" * max(1, end - start)
        super().__init__(f"{message}\n  {expression}\n  {carets}")


def parse(expression: str, q_positions: np.ndarray, kv_positions: np.ndarray) -> masks.Mask:
    """Parses an expression to a mask for a batch of one.

    ``full``, ``causal``, ``sliding_window(left, right=0)``, ``sink(n)`` and ``chunked(size)`` are those of
    :mod:`pallas_attn.masks`; ``prefix(n)`` shows keys at positions below ``n``; ``segments([a, b, ...])`` packs
    documents of ``a``, ``b``, ... tokens from position 0 on, and the remaining tokens form one more document.

    Args:
      expression: ASCII text.
      q_positions: int32 ``[T]``, -1 is padding. Only ``segments`` uses positions.
      kv_positions: int32 ``[S]``, -1 is an empty slot.

    Raises:
      MaskExpressionError: invalid syntax; states what was expected, and where.
    """
    return _Reader(expression, q_positions, kv_positions).read()


class _Reader:
    def __init__(self, expression: str, q_positions: np.ndarray, kv_positions: np.ndarray):
        self.text = " ".join(expression.split())  # one line, for carets to point at
        self.q_positions, self.kv_positions = q_positions, kv_positions
        self.masks: dict[str, Callable[..., masks.Mask]] = {
            "full": masks.full,
            "causal": masks.causal,
            "sliding_window": masks.sliding_window,
            "prefix": _prefix,
            "sink": masks.sink,
            "chunked": masks.chunked,
            "segments": self.segments,
        }

    def read(self) -> masks.Mask:
        if strange := re.search(r"[^\w\s&|~()\[\],=.+-]", self.text, re.ASCII):
            raise MaskExpressionError(f"unexpected {strange.group()!r}: {_EXPECTED}", self.text, *strange.span())
        try:
            tree = ast.parse(self.text, mode="eval")
        except SyntaxError as error:
            # Python reports no column for errors at the end.
            start = min(error.offset - 1 if error.offset else len(self.text), len(self.text))
            raise MaskExpressionError(f"{error.msg}: {_EXPECTED}", self.text, start, start + 1) from None
        except (RecursionError, MemoryError):
            raise MaskExpressionError("nested too deeply", self.text, 0, 1) from None
        return self.mask(tree.body, _MAX_DEPTH)

    def mask(self, node: ast.expr, depth: int) -> masks.Mask:
        if depth == 0:
            raise self.error(node, f"nested too deeply: expected at most {_MAX_DEPTH} levels")
        match node:
            case ast.BinOp(left, ast.BitAnd(), right):
                return self.mask(left, depth - 1) & self.mask(right, depth - 1)
            case ast.BinOp(left, ast.BitOr(), right):
                return self.mask(left, depth - 1) | self.mask(right, depth - 1)
            case ast.UnaryOp(ast.Invert(), operand):
                return ~self.mask(operand, depth - 1)
            case ast.Name(name):
                return self.primitive(node, name, node, [], [])
            case ast.Call(ast.Name(name) as function, arguments, keywords):
                return self.primitive(function, name, node, arguments, keywords)
            case ast.BoolOp(ast.And()):
                raise self.error(node, "expected & instead of 'and'")
            case ast.BoolOp(ast.Or()):
                raise self.error(node, "expected | instead of 'or'")
            case ast.UnaryOp(ast.Not()):
                raise self.error(node, "expected ~ instead of 'not'")
        raise self.error(node, _EXPECTED)

    def primitive(
        self, at: ast.expr, name: str, call: ast.expr, arguments: list[ast.expr], keywords: list[ast.keyword]
    ) -> masks.Mask:
        if name in _NEED_ARRAYS:
            raise self.error(at, f"{name!r} needs an array, which an expression cannot contain; {_EXPECTED}")
        if name not in self.masks:
            near = difflib.get_close_matches(name, FORMS, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(FORMS)}"
            raise self.error(at, f"unknown mask {name!r}: {hint}")
        positional = [self.argument(node) for node in arguments]
        named = {str(keyword.arg): self.argument(keyword.value) for keyword in keywords}
        try:
            if len(named) < len(keywords):
                raise TypeError("an argument is given twice")
            bound = inspect.signature(self.masks[name]).bind(*positional, **named)
            return self.masks[name](*bound.args, **bound.kwargs)
        except (TypeError, ValueError) as error:
            message = str(error).removeprefix(f"{name}: ")
            raise self.error(call, f"{name}: {message} (expected {FORMS[name]})") from None

    def argument(self, node: ast.expr) -> int | list[int]:
        return [self.number(element) for element in node.elts] if isinstance(node, ast.List) else self.number(node)

    def number(self, node: ast.expr) -> int:
        match node:
            case ast.Constant(value) if type(value) is int:
                return value
            case ast.UnaryOp(ast.USub(), ast.Constant(value)) if type(value) is int:
                return -value
        raise self.error(node, "expected an integer")

    def segments(self, lengths: list[int]) -> masks.Mask:
        if not isinstance(lengths, list) or not lengths:
            raise ValueError("expected a list of at least one length")
        tokens = int(self.kv_positions.max(initial=-1)) + 1
        if min(lengths) < 1 or sum(lengths) > tokens:
            raise ValueError(f"expected lengths of at least 1 that sum to at most {tokens}, the number of tokens")
        ends = np.cumsum(lengths)
        q_ids, kv_ids = (np.searchsorted(ends, x, side="right") for x in (self.q_positions, self.kv_positions))
        return masks.segments(jnp.asarray(q_ids[None], jnp.int32), jnp.asarray(kv_ids[None], jnp.int32))

    def error(self, node: ast.expr, message: str) -> MaskExpressionError:
        # The text is ASCII, so Python's byte offsets are character offsets.
        end = len(self.text) if node.end_col_offset is None else node.end_col_offset
        return MaskExpressionError(message, self.text, node.col_offset, end)


def _prefix(n: int) -> masks.Mask:
    if not isinstance(n, int) or not 0 <= n < 2**31:
        raise ValueError(f"n: expected an integer in [0, 2^31), got {n}")
    return masks.prefix(jnp.array([n], jnp.int32))
