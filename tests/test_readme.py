"""The README promises nothing that is not there."""

import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = sorted({m.split("/")[0] for m in re.findall(r"results/([\w/.-]+)", README)})


def test_variants_in_the_table_of_commands():
    rows = re.findall(r"^\| `(\w+)` \|.*\| (`\w+`(?:, `\w+`)*) \|$", README, re.M)
    assert len(rows) >= 4
    for name, variants in rows:
        module = importlib.import_module(f"experiments.configs.{name}")
        assert re.findall(r"\w+", variants) == list(module.VARIANTS), name


def test_commands_name_existing_modules_and_variants():
    for name in re.findall(r"-m experiments\.([a-z]\w+)", README):
        importlib.import_module(f"experiments.{name}")
    for name, variant in re.findall(r"configs/([a-z]\w+)\.py:(\w+)", README):
        module = importlib.import_module(f"experiments.configs.{name}")
        module.get_config(variant)


@pytest.mark.parametrize("name", RESULTS)
def test_numbers_have_evidence(name):
    folder = ROOT / "results" / name
    for file in ("config.json", "environment.json", "summary.json"):
        json.loads((folder / file).read_text())


def test_pictures_and_linked_files_exist():
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / target).exists(), target


EXAMPLES = re.findall(r"```python\n(import jax\n.*?)```", README, re.S)


def run_example(package, capsys):
    """What the one script that imports `package` prints."""
    imported = re.compile(rf"^(import|from) {package}\b", re.M)
    [code] = [code for code in EXAMPLES if imported.search(code)]
    exec(compile(code, "README.md", "exec"), {"__name__": "example"})
    return capsys.readouterr().out


def test_functa_example_runs(capsys):
    assert len(run_example("functa", capsys).split()) >= 4


def test_vit_example_prints_what_it_says(capsys):
    assert run_example("vit", capsys) in README


def test_dessilbi_example_runs(capsys):
    dense, _, thin = run_example("lbi", capsys).splitlines()
    # 96.7 and 96.0 % on the machine of the README; another may round otherwise.
    for line in (dense, thin):
        assert float(re.search(r"([\d.]+) %", line)[1]) > 93


def test_landscape_example_runs(capsys):
    plain, normalised = run_example("landscape", capsys).splitlines()
    for line, name in ((plain, "False"), (normalised, "True")):
        assert line.startswith(f"batch norm {name}")
        low, high, beta, sharpness = map(float, re.findall(r"\d+\.\d+", line))
        # The gradient moves more the further one goes; all four are positive.
        assert 0 < low < high and beta > 0 and sharpness > 0
