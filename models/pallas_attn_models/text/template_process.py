"""Renders one chat template, as a program of its own: ``python template_process.py CPU_SECONDS BYTES < JSON > JSON``.

A template is someone's program. Jinja's sandbox keeps it from files and modules, and not from ``range(10**9)``, from
``"x" * 10**10`` or from a regular expression that never ends; a process can be given a bound for all of these. Only
Jinja and the standard library are imported here, so that it starts in a tenth of a second.

Input: ``{"source": .., "variables": {..} or null, "known": [..]}``; without variables the template is compiled and not
rendered. Output: ``{"text": ..}``, or ``{"error": .., "line": .. or null}``.
"""

import contextlib
import datetime
import json
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

_MAX_OUTPUT = 2**24  # characters
_MAX_ERROR = 1000  # characters
_FILE = "<template>"  # what Jinja calls a template without a name


def render(source: str, variables: dict[str, Any] | None) -> str:
    """The text of a template, with Jinja as transformers sets it up; "" without variables."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.undefined = _undefined(_assigned(environment.parse(source)))
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
    template = environment.from_string(source)
    if variables is None:
        return ""
    pieces, length = [], 0
    for piece in template.generate(**variables):
        pieces.append(piece)
        length += len(piece)
        if length > _MAX_OUTPUT:
            raise jinja2.TemplateError(f"expected to write at most {_MAX_OUTPUT} characters")
    return "".join(pieces)


def _assigned(tree: jinja2.nodes.Template) -> set[str]:
    """The names that a template gives a value to, somewhere."""
    names = {node.name for node in tree.find_all(jinja2.nodes.Name) if node.ctx != "load"}
    names |= {node.name for node in tree.find_all(jinja2.nodes.Macro)}
    for node in tree.find_all(jinja2.nodes.FromImport):
        names |= {name if isinstance(name, str) else name[1] for name in node.names}
    return names


def _undefined(assigned: set[str]) -> type[jinja2.Undefined]:
    """What has no value is "", as in transformers, except for names that neither the caller nor the template defines.

    These can be asked for (``is defined``, ``if``, ``default``), and not written: a prompt without its BOS is wrong.
    """

    class Undefined(jinja2.Undefined):
        def __str__(self) -> str:
            if self._undefined_obj is jinja2.utils.missing and self._undefined_name not in assigned:
                self._fail_with_undefined_error()
            return ""

    return Undefined


class _Generation(jinja2.ext.Extension):
    """``{% generation %} .. {% endgeneration %}`` marks what the assistant said, for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A block of its own, as in transformers: what is set in it is not seen after it.
        return jinja2.nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: Callable[[], str]) -> str:
        return caller()


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes what HTML would misread.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Refused(Exception):
    """The template's own words."""


def _raise(message: str) -> NoReturn:
    raise _Refused(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _limit(cpu_seconds: int, num_bytes: int) -> None:
    with contextlib.suppress(ImportError):  # Windows has only the time that the parent waits
        import resource

        limits = {
            resource.RLIMIT_CPU: (cpu_seconds, cpu_seconds + 1),  # a signal first, which says what it was
            resource.RLIMIT_AS: (num_bytes, num_bytes),
            resource.RLIMIT_CORE: (0, 0),
        }
        for kind, limit in limits.items():
            with contextlib.suppress(ValueError, OSError):  # a lower limit holds already, or the system has none
                resource.setrlimit(kind, limit)


def _answer(asked: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"text": render(asked["source"], asked["variables"])}
    except _Refused as error:
        return {"error": str(error) or "it refuses the conversation", "line": None}
    except jinja2.TemplateSyntaxError as error:
        return {"error": error.message, "line": error.lineno}
    except jinja2.TemplateError as error:
        return {"error": error.message or type(error).__name__, "line": _line(error)}
    except MemoryError:
        return {"error": "it takes too much memory", "line": None}
    except RecursionError as error:
        return {"error": "it is nested too deeply, or calls itself without end", "line": _line(error)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "line": _line(error)}


def _line(error: Exception) -> int | None:
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == _FILE]
    return lines[-1] if lines else None


if __name__ == "__main__":
    asked = json.load(sys.stdin.buffer)
    _limit(*map(int, sys.argv[1:]))
    answer = _answer(asked)
    if "error" in answer:
        answer["error"] = answer["error"][:_MAX_ERROR]
    json.dump(answer, sys.stdout)
