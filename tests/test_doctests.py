"""Docstrings of the cores: examples give what they show, arguments are described."""

import ast
import doctest
import importlib
import io
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("unoptimized")

ROOT = Path(__file__).resolve().parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): text.count(">>> ")
    for package in ("functa", "vit", "landscape", "lbi")
    for path in sorted((ROOT / package).rglob("*.py"))
    if ">>> " in (text := path.read_text(encoding="utf-8"))
}


def run_examples(module):
    """Runs a module's examples: their number, and the report of those that fail."""
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    runner = doctest.DocTestRunner(optionflags=flags, verbose=False)
    report = io.StringIO()
    for test in doctest.DocTestFinder().find(module):
        runner.run(test, out=report.write)
    return runner.summarize(verbose=False).attempted, report.getvalue()


# The longest examples; each takes several seconds.
LONG = {
    "functa.inner_loop",
    "functa.joint",
    "landscape.curvature",
    "vit.cascade",
    "vit.checkpoint",
    "vit.model",
    "vit.slicing",
}
NAMES = [
    pytest.param(name, marks=pytest.mark.slow if name in LONG else ())
    for name in MODULES
]


@pytest.mark.parametrize("name", NAMES)
def test_examples_give_what_they_show(name):
    attempted, report = run_examples(importlib.import_module(name))
    assert not report, report
    assert attempted == MODULES[name], "an example is in no docstring that is found."


def test_a_wrong_example_is_reported():
    def function():
        """>>> 1 + 1
        3
        """

    runner = doctest.DocTestRunner(verbose=False)
    (test,) = doctest.DocTestFinder().find(function, globs={})
    assert runner.run(test, out=lambda _: None).failed == 1


def public_functions(tree):
    """The functions and methods of a module that are not private."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node)
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node


def own_nodes(function):
    """The nodes of a function without those of functions inside it."""
    for node in ast.iter_child_nodes(function):
        if not isinstance(node, ast.FunctionDef | ast.Lambda):
            yield node
            yield from own_nodes(node)


def undescribed(function):
    """Sections that the docstring of a function lacks; ruff reads those it has."""
    text = ast.get_docstring(function) or ""
    if text.startswith("Old form of"):
        return []
    args = function.args
    names = [arg.arg for arg in args.posonlyargs + args.args + args.kwonlyargs]
    # One line may say what one or two arguments are.
    missing = ["Args"] * (len({*names} - {"self", "cls"}) > 2 and "Args:" not in text)
    is_raised = any(isinstance(node, ast.Raise) for node in own_nodes(function))
    missing += ["Raises"] * (is_raised and "Raises" not in text)
    return missing if text else ["docstring"]


@pytest.mark.parametrize("package", ["functa", "vit", "landscape", "lbi"])
def test_docstrings_describe_arguments_and_errors(package):
    found = {
        f"{path.name} {function.name}": missing
        for path in sorted((ROOT / package).rglob("*.py"))
        for function in public_functions(ast.parse(path.read_text(encoding="utf-8")))
        if (missing := undescribed(function))
    }
    assert not found


def test_missing_descriptions_are_noticed():
    [function] = ast.parse(
        'def f(a, b, *, c):\n  """Sum."""\n  if c: raise ValueError\n'
    ).body
    assert undescribed(function) == ["Args", "Raises"]
