"""Sphinx configuration. The API pages are written from the packages at each build."""

import importlib
import inspect
import pkgutil
import re
import sys
import warnings
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

import functa  # noqa: E402

project = "functa-jax"
author = "The functa-jax developers"
copyright = author
version = release = functa.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"functa-jax {release}"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
# Single backticks in a docstring mark code.
default_role = "code"

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_default_options = {"members": True, "special-members": "__call__"}
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

PACKAGES = ("functa", "vit", "landscape", "lbi")
_SECTION = re.compile(r"^(\s*)[A-Z][a-z]+s?:$")
_BULLET = re.compile(r"^\s*([*+-]|\d+\.) ")


def _public_modules(package):
    """Modules of a package that are not old names of moved modules."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        names = [m.name for m in pkgutil.iter_modules(package.__path__)]
        modules = {
            name: importlib.import_module(f"{package.__name__}.{name}")
            for name in names
            if not name.startswith("_")
        }
    return [m for n, m in modules.items() if m.__name__ == f"{package.__name__}.{n}"]


def _reexported(package):
    """Pairs of a package's name and the module member it stands for."""
    for name, value in sorted(vars(package).items()):
        home = getattr(value, "__module__", None)
        if not name.startswith("_") and str(home).startswith(f"{package.__name__}."):
            yield name, f"{home}.{value.__name__}"


def _api_page(package):
    name = package.__name__
    lines = [f"# {name}", "", "```{eval-rst}", f".. automodule:: {name}"]
    lines += ["   :no-members:", "```", ""]
    names = list(_reexported(package))
    if names:
        lines += [f"`import {name}` gives these names directly:", ""]
        lines += [f"* {{py:obj}}`{name}.{n} <{target}>`" for n, target in names]
        lines += [""]
    for module in _public_modules(package):
        lines += [f"## {module.__name__}", "", "```{eval-rst}"]
        lines += [f".. automodule:: {module.__name__}", "```", ""]
    return "\n".join(lines)


def _write_api_pages(app):
    del app
    (DOCS / "api").mkdir(exist_ok=True)
    for name in PACKAGES:
        page = DOCS / "api" / f"{name}.md"
        text = _api_page(importlib.import_module(name))
        if not page.exists() or page.read_text() != text:
            page.write_text(text)


def _escape(line):
    """A line of plain text, with what reStructuredText would read as markup escaped."""
    bullet = _BULLET.match(line)
    start = bullet.end() if bullet else 0
    parts = re.split(r"(`+[^`]+`+)", line[start:])
    parts[::2] = [re.sub(r"([*|\\]|_(?=\W|$))", r"\\\1", text) for text in parts[::2]]
    return line[:start] + "".join(parts)


def _plain_text(app, what, name, obj, options, lines):
    """Turns a plain docstring into reStructuredText: text escaped, equations literal.

    A block that is indented more than the text before it is an equation or a table and
    is shown as it stands. In a section such as `Args:` the entries are indented too,
    and deeper lines continue the text of their entry. Tables and doctests stay as they
    are.
    """
    del app, what, name, obj, options
    text, literal, section = [], None, None
    code, before, gap = False, 0, True
    for line in lines:
        if not line.strip():
            text.append(line)
            code, gap = False, True
            continue
        indent = len(line) - len(line.lstrip())
        bullet = _BULLET.match(line)
        if literal is not None and indent < literal:
            literal = None
            text.append("")
        if indent == 0:
            section = 2 if _SECTION.match(line) else None
        code = code or line.lstrip().startswith((">>>", "==="))
        if literal is not None or code:
            text.append(line)
        elif section is not None:
            if indent > max(section + 2, before) and not bullet:
                line = " " * max(section + 2, before) + line.lstrip()
            text.append(_escape(line))
            before = bullet.end() if bullet else 0 if gap else min(before, indent)
        elif indent > before and not bullet:
            literal = indent
            previous = next((t for t in reversed(text) if t.strip()), "")
            if not previous.endswith("::"):
                text += ["", " " * before + "::"]
            text += ["", line]
        else:
            text.append(_escape(line))
            before = bullet.end() if bullet else indent
        gap = False
    # A literal block ends with an empty line, and so does a docstring.
    lines[:] = [*text, ""]


def _skip_fields(app, what, name, obj, skip, options):
    """Leaves out fields of named tuples, which the class docstring describes."""
    del app, what, name, options
    return skip or str(getattr(obj, "__doc__", "")).startswith("Alias for field")


def _clean_signature(app, what, name, obj, options, signature, returns):
    """Leaves out the two arguments that every Flax module has."""
    del app, what, name, options
    if signature and inspect.isclass(obj):
        signature = re.sub(r", parent=[^,]*, name=None(?=[,)])", "", signature)
        signature = re.sub(r"<factory>", "...", signature)
    return signature, returns


def setup(app):
    app.connect("builder-inited", _write_api_pages)
    # Before napoleon, which reads the sections.
    app.connect("autodoc-process-docstring", _plain_text, priority=400)
    app.connect("autodoc-process-signature", _clean_signature)
    app.connect("autodoc-skip-member", _skip_fields)
