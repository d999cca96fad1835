"""Links, paths and anchors in every Markdown file lead somewhere, and the API pages hold the public names."""

import functools
import html
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pallas_attn as pa

ROOT = Path(__file__).parents[1]
_FOLDERS = {".ci", "bench", "docs", "models", "pallas_attn", "tests"}


def markdown_files() -> list[Path]:
    """Every tracked file; in a copy without git, every file of the repository's folders."""
    found = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode == 0 and found.stdout:
        return [path for name in found.stdout.split() if (path := ROOT / name).exists()]
    folders = [ROOT / name for name in sorted(_FOLDERS)]
    return [*ROOT.glob("*.md"), *(path for folder in folders for path in folder.rglob("*.md"))]


EVERY_FILE = pytest.mark.parametrize("path", markdown_files(), ids=lambda path: str(path.relative_to(ROOT)))


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """The anchors of a file's headings, by GitHub's rule."""
    titles = re.findall(r"^#+ (.*)$", without_code(path.read_text()), re.MULTILINE)
    found: dict[str, int] = {}
    for title in titles:
        anchor = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower()).replace(" ", "-")
        found[anchor if anchor not in found else f"{anchor}-{found[anchor]}"] = 1
    return set(found)


@EVERY_FILE
def test_relative_links_resolve(path):
    broken = []
    for link in re.findall(r"\[[^]]*\]\(([^)\s]+)\)", without_code(path.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


_SUFFIXES = (".py", ".md", ".json", ".png", ".toml")
# Files of checkpoints, and files that the commands in the text write.
_ELSEWHERE = {
    *("config.json", "generation_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"),
    *("cpu.json", "gpu.json", "mask.png", "serving.json", "sweep.json", "training.json"),
}


def paths_in_backticks(text: str) -> list[str]:
    """What looks like a path of the repository: below one of its folders, or a source file by its name."""
    found = re.findall(r"`([\w.-]+(?:/[\w.-]+)*/?)(?:: [\w.]+)?`", without_code(text))
    below = [code for code in found if "/" in code and code.partition("/")[0] in _FOLDERS]
    files = [code for code in found if code.endswith(_SUFFIXES) and code not in _ELSEWHERE]
    return list(dict.fromkeys(below + files))


@EVERY_FILE
def test_paths_in_backticks_exist(path):
    """A path begins at the root, at the file's folder, or at a folder that the text has just named."""
    missing = []
    for code in paths_in_backticks(path.read_text()):
        parts = Path(code).parts
        named_before = any(found.parts[-len(parts) :] == parts for found in source_files())
        if not (named_before or (ROOT / code).exists() or (path.parent / code).exists()):
            missing.append(code)
    assert missing == []


@functools.cache
def source_files() -> list[Path]:
    return [path for folder in _FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in _SUFFIXES]


def test_the_path_check_finds_a_wrong_path():
    text = "`bench/none.py` `tests/` `x/y` `none.py` `triton/none.py: walk` `config.json`"
    assert paths_in_backticks(text) == ["bench/none.py", "tests/", "none.py", "triton/none.py"]


@pytest.fixture(scope="module")
def api_pages(tmp_path_factory) -> Path:
    pytest.importorskip("pdoc", reason="pdoc (extra docs) is not installed")
    out = tmp_path_factory.mktemp("api")
    command = [sys.executable, str(ROOT / "docs" / "build.py"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return out


def public(package: str) -> list[tuple[str, object]]:
    """Classes and functions of a module: those that it re-exports, or its own."""
    members = vars(importlib.import_module(package)).items()
    found = [(name, x) for name, x in members if inspect.isclass(x) or inspect.isfunction(x)]
    return [(name, x) for name, x in found if not name.startswith("_") and x.__module__.startswith(package)]


def first_words(name: str, member: object) -> str:
    """The beginning of a docstring, without markup; a dataclass without one has its signature, which no page shows."""
    doc = inspect.getdoc(member) or ""
    line = "" if doc.startswith(f"{name}(") else re.sub(r":\w+:`~?([^`]*)`", r"\1", doc.partition("\n")[0])
    return " ".join(re.findall(r"\w+", line)[:4])


@pytest.mark.parametrize(
    "package", ["pallas_attn", "pallas_attn.masks", "pallas_attn.scores", "pallas_attn.caches", "pallas_attn_models"]
)
def test_public_names_and_docstrings_are_on_the_api_pages(package, api_pages):
    source = (api_pages / f"{package.replace('.', '/')}.html").read_text()
    words = " ".join(re.findall(r"\w+", html.unescape(re.sub(r"<[^>]+>", " ", source))))
    members = public(package)
    assert len(members) > 5
    assert [name for name, _ in members if f'id="{name}"' not in source] == []
    assert [name for name, member in members if first_words(name, member) not in words] == []


def test_citation_has_the_version_of_the_package():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {pa.__version__}\n" in citation
    assert citation.startswith("cff-version: 1.2.0\n")
    assert "\nlicense: Apache-2.0\n" in citation
