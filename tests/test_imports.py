"""Allowed imports: the cores do not depend on files, data sets or plots."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORES = [
    name for name in ("functa", "vit", "landscape", "lbi") if (ROOT / name).is_dir()
]
CORE_DEPENDENCIES = {"jax", "flax", "optax", "chex", "numpy"}
# What the commands share: they never import each other.
SHARED_BY_EXPERIMENTS = {
    *("common", "configs", "drawing", "networks", "peers", "timing", "training"),
}
# Old names that warn and lead elsewhere, for one version.
MOVED = {
    *("functa.convert", "functa.pickled", "functa.product"),
    *("lbi.support", "lbi.lenet"),
    *("landscape.vgg", "landscape.deep_linear", "landscape.convolution"),
}
# absl is missing here because chex and flax load it; the source check below forbids it.
NEVER_LOADED_BY_CORES = {
    "ml_collections",
    "tensorflow",
    "tensorflow_datasets",
    "orbax",
    "matplotlib",
    "sklearn",
    "PIL",
}


def imports_of(source: str, package: str = "") -> set[str]:
    """Dotted names imported anywhere in `source`; `from a import b` counts as a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: -(node.level - 1) or None]
            module = ".".join(parents) if node.level else ""
            module = ".".join(filter(None, [module, node.module]))
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def project_imports(package: str) -> list[tuple[str, str]]:
    """(file, imported name) of every import in a package, as paths from the root."""
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"{package} has no modules: nothing would be checked."
    return [
        (str(path.relative_to(ROOT)), name)
        for path in files
        for name in imports_of(
            path.read_text(encoding="utf-8"),
            ".".join(path.relative_to(ROOT).parent.parts),
        )
    ]


def test_imports_of_reads_every_form():
    source = """
import a.b as c, d
from e.f import g, h
from . import i
from .j import k
from ..l import m
def function():
    from n import o
"""
    expected = {"a.b", "d", "e.f.g", "e.f.h", "p.q.i", "p.q.j.k", "p.l.m", "n.o"}
    assert imports_of(source, package="p.q") == expected


@pytest.mark.parametrize("package", CORES)
def test_core_imports_only_its_dependencies(package):
    allowed = CORE_DEPENDENCIES | {package} | sys.stdlib_module_names
    wrong = [
        f"{path} imports {name}"
        for path, name in project_imports(package)
        if name.split(".")[0]
        # Inside its functions: importing a core loads no matplotlib, see below.
        not in allowed | ({"matplotlib"} if Path(path).name == "plots.py" else set())
    ]
    assert not wrong, wrong


@pytest.mark.parametrize("name", sorted(MOVED))
def test_old_names_work_and_warn(name):
    sys.modules.pop(name, None)
    with pytest.warns(DeprecationWarning, match=f"{name} is now"):
        module = importlib.import_module(name)
    package, _, attribute = name.partition(".")
    assert getattr(importlib.import_module(package), attribute) is module


@pytest.mark.skipif(not (ROOT / "experiments").is_dir(), reason="no experiments yet")
def test_no_module_imports_an_entry_point():
    wrong = [
        f"{path} imports {name}"
        for path, name in project_imports("experiments")
        if name.startswith("experiments.")
        and name.split(".")[1] not in SHARED_BY_EXPERIMENTS
    ]
    assert not wrong, wrong


def test_cores_load_nothing_beyond_their_dependencies():
    script = f"""
import importlib, json, pkgutil, sys
for package in {CORES}:
    package = importlib.import_module(package)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if module.name not in {MOVED}:
            importlib.import_module(module.name)
print(json.dumps(sorted({{name.split(".")[0] for name in sys.modules}})))
"""
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    loaded = set(json.loads(run.stdout))
    assert set(CORES) <= loaded
    assert not loaded & NEVER_LOADED_BY_CORES


@pytest.mark.parametrize("core", CORES)
def test_help_shows_all_that_a_package_exports(core):
    """pydoc lists what is imported from other modules only if `__all__` names it."""
    package = importlib.import_module(core)
    exported = {
        name
        for name, value in vars(package).items()
        if str(getattr(value, "__module__", None)).startswith(f"{core}.")
        and not name.startswith("_")
    }
    assert exported <= set(package.__all__) <= set(dir(package))
