"""Links, paths and anchors in every Markdown file lead somewhere, and the API pages hold the public names."""

import html
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def markdown_files() -> list[Path]:
    """Every tracked file; in a copy without git, every file outside hidden directories."""
    found = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode == 0 and found.stdout:
        return [path for name in found.stdout.split() if (path := ROOT / name).exists()]
    relative = (path.relative_to(ROOT) for path in ROOT.rglob("*.md"))
    return [ROOT / path for path in relative if not any(part.startswith(".") or part == "shared" for part in path.parts)]


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


# A name with a slash, or one that ends as source does; neither a pattern nor a placeholder.
_PATH = re.compile(r"[\w.-]+(?:/[\w.-]+)*/?")
_SUFFIXES = (".py", ".md", ".json", ".png", ".toml")
# Files of checkpoints, and names that commands of the text write.
_ELSEWHERE = {
    "tokenizer.json", "config.json", "generation_config.json", "special_tokens_map.json", "tokenizer_config.json",
    "cpu.json", "gpu.json", "sweep.json", "training.json", "serving.json", "mask.png",
}  # fmt: skip
_ROOTS = {".ci", "bench", "docs", "models", "pallas_attn", "tests"}


def paths_in_backticks(text: str) -> list[str]:
    """What looks like a path of the repository: below one of its folders, or a source file by its name."""
    found = [code for code in re.findall(r"`([^`\n]+)`", without_code(text)) if _PATH.fullmatch(code)]
    below = [code for code in found if "/" in code and code.partition("/")[0] in _ROOTS]
    files = [code for code in found if code.endswith(_SUFFIXES) and code not in _ELSEWHERE]
    return list(dict.fromkeys(below + files))


@EVERY_FILE
def test_paths_in_backticks_exist(path):
    """A path is relative to the root, to the file's folder, or to a folder in it (a reading order names a folder first)."""
    missing = []
    for code in paths_in_backticks(path.read_text()):
        if not ((ROOT / code).exists() or (path.parent / code).exists() or list(path.parent.glob(f"**/{code}"))):
            missing.append(code)
    assert missing == []


def test_the_path_check_finds_a_wrong_path():
    text = "`bench/none.py` `tests/` `x/y` `none.py` `config.json`"
    assert paths_in_backticks(text) == ["bench/none.py", "tests/", "none.py"]


@pytest.fixture(scope="module")
def api_pages(tmp_path_factory) -> Path:
    pytest.importorskip("pdoc", reason="pdoc (extra docs) is not installed")
    out = tmp_path_factory.mktemp("api")
    command = [sys.executable, str(ROOT / "docs" / "build.py"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return out


def public(package: str) -> list[tuple[str, object]]:
    """Classes and functions that a module makes public: those that it re-exports, or else its own."""
    module = importlib.import_module(package)
    own = [(name, x) for name, x in vars(module).items() if inspect.isclass(x) or inspect.isfunction(x)]
    return [(name, x) for name, x in own if not name.startswith("_") and x.__module__.startswith(package)]


@pytest.mark.parametrize(
    "package", ["pallas_attn", "pallas_attn.masks", "pallas_attn.scores", "pallas_attn.caches", "pallas_attn_models"]
)
def test_public_names_and_docstrings_are_on_the_api_pages(package, api_pages):
    page = html.unescape(re.sub(r"<[^>]+>", " ", (api_pages / f"{package.replace('.', '/')}.html").read_text()))
    source = (api_pages / f"{package.replace('.', '/')}.html").read_text()
    names = public(package)
    assert len(names) > 5
    words = " ".join(re.findall(r"\w+", page))
    for name, member in names:
        assert f'id="{name}"' in source, name
        first = (inspect.getdoc(member) or "").partition("\n\n")[0].splitlines()[:1]
        start = " ".join(re.findall(r"\w+", re.sub(r":\w+:`~?([^`]*)`", r"\1", first[0]) if first else "")[:4])
        assert start in words, f"{name}: {start}"
