"""Renders one chat template in its own process: ``python template_process.py CPU_SECONDS BYTES < JSON > JSON``.

A template is an untrusted program. Jinja's sandbox blocks files and modules, but not ``range(10**9)``, ``"x" * 10**10``
or a regular expression that never ends; limits on a process bound all of these. Imports only Jinja and the standard
library, and therefore starts in a tenth of a second.

Input: ``{"source": .., "variables": {..} or null}``; with null, the template is compiled but not rendered. Output:
``{"text": ..}``, or ``{"error": .., "line": .. or null}``.
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
_FILE = "<template>"  # Jinja's file name for an unnamed template


def render(source: str, variables: dict[str, Any] | None) -> str:
    """Renders a template in transformers' Jinja environment; "" without variables."""
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
            raise jinja2.TemplateError(f"expected at most {_MAX_OUTPUT} characters of output")
    return "".join(pieces)


def _assigned(tree: jinja2.nodes.Template) -> set[str]:
    """All names that the template assigns."""
    names = {node.name for node in tree.find_all(jinja2.nodes.Name) if node.ctx != "load"}
    names |= {node.name for node in tree.find_all(jinja2.nodes.Macro)}
    for node in tree.find_all(jinja2.nodes.FromImport):
        names |= {name if isinstance(name, str) else name[1] for name in node.names}
    return names


def _undefined(assigned: set[str]) -> type[jinja2.Undefined]:
    """A type for undefined values, which render as "", as in transformers, unless the name is never defined at all.

    Templates may test such names (``is defined``, ``if``, ``default``), but not write them: a prompt without its BOS is
    wrong.
    """

    class Undefined(jinja2.Undefined):
        def __str__(self) -> str:
            if self._undefined_obj is jinja2.utils.missing and self._undefined_name not in assigned:
                self._fail_with_undefined_error()
            return ""

    return Undefined


class _Generation(jinja2.ext.Extension):
    """``{% generation %} .. {% endgeneration %}`` marks assistant messages for training; renders its body."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's declaration)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A scope of its own, as in transformers: assignments inside end with the block.
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Replaces Jinja's filter, which escapes HTML characters.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Rejected(Exception):
    """A call of ``raise_exception`` in the template."""


def _raise(message: str) -> NoReturn:
    raise _Rejected(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _limit(cpu_seconds: int, num_bytes: int) -> None:
    with contextlib.suppress(ImportError):  # on Windows, only the parent's timeout applies
        import resource

        limits = {
            resource.RLIMIT_CPU: (cpu_seconds, cpu_seconds + 1),  # SIGXCPU, which identifies the cause, before SIGKILL
            resource.RLIMIT_AS: (num_bytes, num_bytes),
            resource.RLIMIT_CORE: (0, 0),
        }
        for kind, limit in limits.items():
            with contextlib.suppress(ValueError, OSError):  # a lower limit applies already, or the system has none
                resource.setrlimit(kind, limit)


def _respond(request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"text": render(request["source"], request["variables"])}
    except _Rejected as error:
        return {"error": str(error) or "it rejects the conversation", "line": None}
    except jinja2.TemplateSyntaxError as error:
        return {"error": error.message, "line": error.lineno}
    except jinja2.TemplateError as error:
        return {"error": error.message or type(error).__name__, "line": _line(error)}
    except MemoryError:
        return {"error": "it takes too much memory", "line": None}
    except RecursionError as error:
        return {"error": "it is nested too deeply, or recurses without end", "line": _line(error)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "line": _line(error)}


def _line(error: Exception) -> int | None:
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == _FILE]
    return lines[-1] if lines else None


if __name__ == "__main__":
    request = json.load(sys.stdin.buffer)
    _limit(*map(int, sys.argv[1:]))
    response = _respond(request)
    if "error" in response:
        response["error"] = response["error"][:_MAX_ERROR]
    json.dump(response, sys.stdout)
