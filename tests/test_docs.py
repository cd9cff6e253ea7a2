"""The navigation of the documentation reaches every page."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_every_page_is_in_the_navigation():
    index = (DOCS / "index.md").read_text()
    listed = set()
    for block in re.findall(r"```\{toctree\}\n(.*?)```", index, re.S):
        listed |= {line for line in block.split() if not line.startswith(":")}
    pages = {
        str(page.relative_to(DOCS).with_suffix(""))
        for page in [*DOCS.glob("*.md"), *DOCS.glob("guides/*.md")]
    }
    assert pages - {"index"} <= listed


def test_every_reference_page_is_written():
    index = (DOCS / "index.md").read_text()
    packages = re.search(r"^PACKAGES = \((.*)\)$", (DOCS / "conf.py").read_text(), re.M)
    for name in re.findall(r"\w+", packages[1]):
        assert f"\napi/{name}\n" in index
