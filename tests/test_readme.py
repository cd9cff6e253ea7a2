"""Every command, file and link of the README and the guides exists."""

import importlib
import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "api" not in page.relative_to(ROOT).parts]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
# Code, and its output in the comment lines that end it.
EXAMPLES = re.findall(r"```python\n(.*?)((?:^# [^\n]*\n)+)```", README, re.S | re.M)
GUIDES = ("functa", "vit", "lbi", "landscape")


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150
    assert len(README.encode()) <= 9 * 1024


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_name_existing_modules_and_variants(page):
    text = page.read_text()
    for name in re.findall(r"-m experiments\.([a-z]\w+)", text):
        assert importlib.util.find_spec(f"experiments.{name}"), name
    for name, variant in re.findall(r"configs/([a-z]\w+)\.py:([a-z]\w+)", text):
        importlib.import_module(f"experiments.configs.{name}").get_config(variant)


def test_variants_in_the_table_of_commands():
    text = (ROOT / "docs/guides/running.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|.*\| (`\w+`(?:, `\w+`)*) \|$", text, re.M)
    assert len(rows) >= 10
    for name, variants in rows:
        module = importlib.import_module(f"experiments.configs.{name}")
        assert re.findall(r"\w+", variants) == list(module.VARIANTS), name


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_pictures_and_linked_files_exist(page):
    for target in re.findall(r"\]\(((?!https?:)[^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_numbers_have_evidence(page):
    for folder in re.findall(r"results/(\w+)", page.read_text()):
        json.loads((ROOT / "results" / folder / "summary.json").read_text())


def numbers_and_words(text):
    return re.findall(r"\d+\.?\d*", text), re.sub(r"\d+\.?\d*", "N", text).split()


@pytest.mark.parametrize("example", range(len(EXAMPLES)))
def test_readme_examples_print_what_they_show(example, capsys, tmp_path, monkeypatch):
    code, shown = EXAMPLES[example]
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "example"})
    numbers, words = numbers_and_words(capsys.readouterr().out)
    expected, expected_words = numbers_and_words(re.sub("^# ", "", shown, flags=re.M))
    assert words == expected_words
    # Other versions and machines round otherwise.
    assert list(map(float, numbers)) == pytest.approx(
        list(map(float, expected)), rel=0.1, abs=0.005
    )


def test_there_are_four_examples():
    assert len(EXAMPLES) == 4


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES)
def test_guide_examples_run(guide, capsys, tmp_path, monkeypatch):
    text = (ROOT / f"docs/guides/{guide}.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    # Later blocks use names of earlier ones; those that read a run need one.
    code = "\n".join(block for block in blocks if '"runs/' not in block)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, f"{guide}.md", "exec"), {"__name__": "example"})
    assert re.search(r"\d", capsys.readouterr().out)
