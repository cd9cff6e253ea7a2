"""The examples in the docstrings of the cores give the results that they show."""

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
LONG = ("functa.inner_loop", "functa.joint", "landscape.curvature", "vit.cascade")
LONG += ("vit.checkpoint", "vit.model", "vit.slicing")
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
