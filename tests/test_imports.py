"""Imports point in one direction only; the tests parse the source and execute nothing."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module may import modules of lower layers, and neighbors in its package. The first matching prefix counts.
LAYERS = {
    "pallas_attn.pytrees": -1,
    "pallas_attn.pointwise": -1,
    "pallas_attn.checks": -1,
    "pallas_attn.refusal": -1,
    "pallas_attn.bits": 0,
    "pallas_attn.masks": 0,
    "pallas_attn.scores": 0,
    "pallas_attn.quantized": 0,
    "pallas_attn.schedule": 0,
    "pallas_attn.tuning": 0,
    "pallas_attn.grids": 1,
    "pallas_attn.block_mask": 2,
    "pallas_attn.picture": 3,
    "pallas_attn.caches": 3,
    "pallas_attn.kernels": 3,
    "pallas_attn.arguments": 4,
    "pallas_attn.dispatch": 5,
    "pallas_attn.attention": 6,
    "pallas_attn.flax": 7,
    "pallas_attn": 8,
}
OUTSIDE = {"jax", "numpy"}  # and the standard library

# The same for the packages of the models.
MODEL_LAYERS = {
    "pallas_attn_models.checks": 0,
    "pallas_attn_models.text_files": 0,
    "pallas_attn_models.weights": 0,
    "pallas_attn_models.decoder": 1,
    "pallas_attn_models.checkpoints": 2,
    "pallas_attn_models.generation": 3,
    "pallas_attn_models.text": 4,
    "pallas_attn_models.training": 4,
    "pallas_attn_models.cli": 5,
    "pallas_attn_models": 6,
}

# And for the modules of bench/.
BENCH_LAYERS = {
    "bench.results_file": 0,
    "bench.machine": 1,
    "bench.semantics": 2,
    "bench.times": 2,
    "bench.machine_code": 3,
    "bench.gpu_day": 4,
    "bench.cache_quality": 4,
    "bench": 5,
}


def modules(package: Path) -> dict[str, Path]:
    found = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


CORE = modules(ROOT / "pallas_attn")
MODELS = modules(ROOT / "models" / "pallas_attn_models")
BENCH = modules(ROOT / "bench")
MODULES = CORE | MODELS | BENCH


def imports(source: str) -> set[str]:
    """The full names of everything that a module imports, at any level."""
    found = set()

    def visit(node: ast.AST) -> None:
        match node:
            case ast.Import(names=names):
                found.update(alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=0):
                found.update(f"{module}.{alias.name}" for alias in names)
            case ast.ImportFrom():
                raise AssertionError(f"line {node.lineno}: a relative import")
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found


def own(name: str) -> str | None:
    """The module of this project that an imported name is, or is in; None for other names."""
    while name not in MODULES:
        name, _, last = name.rpartition(".")
        if not last:
            return None
    return name


def imports_of(module: str) -> set[str]:
    return {x for x in map(own, imports(MODULES[module].read_text())) if x is not None} - {module}


def layer(module: str, layers: dict[str, int] = LAYERS) -> int:
    return next(level for prefix, level in layers.items() if f"{module}.".startswith(f"{prefix}."))


def test_the_parser_sees_every_way_to_import():
    source = """
import a.b, c as d
from e.f import g as h
if TYPE_CHECKING:
    from only.types import T
def later():
    from i import j
"""
    assert imports(source) == {"a.b", "c", "e.f.g", "only.types.T", "i.j"}
    assert own("pallas_attn.masks.causal") == own("pallas_attn.masks") == "pallas_attn.masks"
    assert own("jax.numpy") is None
    assert "pallas_attn.masks" in imports_of("pallas_attn.block_mask")


@pytest.mark.parametrize("module", CORE)
def test_imports_point_one_way_only(module):
    package = ".".join(module.split(".")[:2])
    for other in imports_of(module):
        neighbors = f"{other}.".startswith(f"{package}.") and package != "pallas_attn"
        assert neighbors or layer(other) < layer(module), f"{module} imports {other}"


@pytest.mark.parametrize("module", [name for name in CORE if name.startswith("pallas_attn.caches")])
def test_caches_know_nothing_above_masks(module):
    for other in imports_of(module):
        assert other.startswith("pallas_attn.caches") or layer(other) <= 0, f"{module} imports {other}"


@pytest.mark.parametrize("module", [name for name in CORE if name.startswith("pallas_attn.kernels")])
def test_kernels_know_neither_attention_nor_caches(module):
    assert not [x for x in imports_of(module) if x.startswith(("pallas_attn.attention", "pallas_attn.caches"))]


def test_only_the_triton_kernels_know_pallas():
    """Its Triton lowering is deprecated upstream, so nothing else may depend on it."""
    users = {
        name
        for name, path in CORE.items()
        if any("pallas" in x for x in imports(path.read_text()) if x.startswith("jax"))
    }
    assert users
    assert all(name.startswith("pallas_attn.kernels.triton") for name in users), users


@pytest.mark.parametrize(
    ("modules", "layers"), [(MODELS, MODEL_LAYERS), (BENCH, BENCH_LAYERS)], ids=["models", "bench"]
)
def test_packages_import_lower_layers_only(modules, layers):
    """A module imports from its own package and from lower layers; of their packages only the exported names."""
    for module in modules:
        package = ".".join(module.split(".")[:2])
        for other in imports_of(module) & modules.keys():
            if other == package or other.startswith(f"{package}."):
                continue
            assert layer(other, layers) < layer(module, layers), f"{module} imports {other}"
            public = layers is BENCH_LAYERS or other.count(".") < 2 or module == "pallas_attn_models.train"
            assert public, f"{module} imports {other}, not the names that its package exports"


def test_no_import_cycles():
    """Among modules, not only packages; imports inside functions count too."""
    below: dict[str, set[str]] = {}
    left = {name: imports_of(name) for name in MODULES}
    while ready := [name for name, others in left.items() if others <= below.keys()]:
        below |= {name: left.pop(name) for name in ready}
    assert not left


@pytest.mark.parametrize("module", CORE)
def test_needs_jax_and_numpy_only(module):
    """In particular neither Flax nor the models."""
    for name in imports(MODULES[module].read_text()):
        top = name.partition(".")[0]
        allowed = OUTSIDE | {"pallas_attn"} | ({"matplotlib"} if module == "pallas_attn.picture" else set())
        assert top in allowed or top in sys.stdlib_module_names, f"{module} imports {name}"
