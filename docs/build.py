"""Builds API pages from docstrings: ``python docs/build.py --out api`` (extra ``docs``)."""

import argparse
import ast
import importlib
import inspect
from pathlib import Path
from types import ModuleType

import pdoc.render

PACKAGES = ("pallas_attn", "pallas_attn_models")
REEXPORTING = (*PACKAGES, "pallas_attn.caches")


def exported(package: ModuleType) -> list[str]:
    """Names that a package re-exports: ``from module import name as name``."""
    body = ast.parse(inspect.getsource(package)).body
    return [alias.asname for node in body if isinstance(node, ast.ImportFrom) for alias in node.names if alias.asname]


def build(directory: Path) -> None:
    """Writes a page for each package and public submodule."""
    for name in REEXPORTING:
        package = importlib.import_module(name)
        # pdoc leaves out imported names that ``__all__`` does not list.
        package.__all__ = exported(package)  # type: ignore[attr-defined]
    pdoc.render.configure(docformat="google", show_source=False)
    pdoc.pdoc(*PACKAGES, output_directory=directory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python docs/build.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write the pages")
    build(parser.parse_args().out)
