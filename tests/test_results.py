"""No number can drift: markers and configurations agree with results/."""

import ast
import importlib
import json
import re
import shutil
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from experiments import figures, results
from experiments.common import evidence
from experiments.common.settings import flatten
from experiments.common.upgrade import FILLED, upgrade, upgrade_override

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(p.parent.name for p in (ROOT / "results").glob("*/config.json"))
DOCS = ROOT / "docs"
# report.md has no markers: it is generated as a whole.
GENERATED = {DOCS / "report.md", *DOCS.glob("api/*")}
PAGES = [ROOT / "README.md", *sorted(set(DOCS.rglob("*.md")) - GENERATED)]
# A number and a unit of measurement.
MEASURED = re.compile(
    r"\d[\d.,]*(?:\s*±\s*[\d.]+)?\s?"
    r"(?:%|dB\b|ms\b|s\b|min\b|"
    r"minutes\b|h\b|hours\b|times\b|x\b(?! \d)|bpp\b|images/s|MiB\b)"
    # A cell of a table that holds a number alone.
    r"|(?<=\|)\s*\d[\d.,]*(?:\s*±\s*[\d.]+)?\s*(?=\|)"
)
# Statements that no run measured, as they are written: definitions, arithmetic, the
# share of a layer or of the patches that a setting removes, and a column of ratios.
NOT_MEASURED = re.compile(
    r"100 %|changes the accuracy by 5 %|80 % of the filters\.|"
    r"[2468]0 % of [\w' ]+ (?:pruned|removed)\b|(?<=\| )0\.(?:[246]|25)(?= \| M)"
)


def typed_numbers(text):
    """Measured numbers of a text that no marker holds."""
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.S | re.M)
    # What stays of a marker carries no digit, and keeps its unit apart.
    text = evidence.MARKER.sub("M", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return [found.strip() for found in MEASURED.findall(NOT_MEASURED.sub("", text))]


def test_committed_markers_are_up_to_date():
    assert not results.outdated(), "run python -m experiments.results"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_no_typed_measurement(path):
    assert not typed_numbers(path.read_text())


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_every_changed_number_is_noticed(path):
    text = path.read_text()

    def change(match):
        start = match.start(4) - match.start()
        return match[0][:start] + re.sub(r"\d", "7", match[0][start:])

    changed = evidence.MARKER.sub(change, text)
    assert evidence.fill(changed) == evidence.fill(text) == text


# The list that an index of a key counts through: of the summary or of the
# configuration, and how its values are written in the row or the column.
AXES = (
    (r"(\d+x\d+)_psnr(_min)?$", lambda s, c, m: s[f"{m[1]}_steps"], "{1} steps"),
    (r"one_layer\.\w+$", lambda s, c, m: [100 * x for x in c["sparsities"]], "{1:g} %"),
    (
        r"(weights|filters|rows|kernels)\.\w+\.(before|after)$",
        lambda s, c, m: c["sparsities"][m[1]],
        "{0[1]} at {1}",
    ),
    (
        r"test_accuracy_per_epoch$",
        lambda s, c, m: range(c["log_every"], c["num_epochs"] + 1, c["log_every"]),
        "epoch {1}",
    ),
)


def indexed_cells(text):
    """Folder, key, index and the label, row and column, of each indexed marker."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    header = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            header = []
            continue
        if not header:
            header = cells
        for column, cell in zip(header, cells, strict=False):
            for found in evidence.MARKER.finditer(cell):
                key, _, index = found[2].rpartition(".")
                if index.isdigit() and found[1] != "published":
                    yield found[1], key, int(index), f"{cells[0]} | {column}"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_an_index_is_that_of_the_label(path):
    for name, key, index, label in indexed_cells(path.read_text()):
        folder = ROOT / "results" / name
        if not folder.exists():
            continue
        summary, config = evidence.read(folder), evidence.read(folder, "config.json")
        for pattern, axis, form in AXES:
            if match := re.match(pattern, key):
                value = axis(summary, config, match)[index]
                written = form.format(match, value)
                assert written in label.replace(",", ""), (name, key, index, label)


def test_a_wrong_index_is_noticed():
    row = "| after 100 steps | <!--= fit_image_best 32x32_psnr.0 .2f -->32.16<!--/--> |"
    assert list(indexed_cells(f"| PSNR | dB |\n| --- | --- |\n{row}\n")) == [
        ("fit_image_best", "32x32_psnr", 0, "after 100 steps | dB")
    ]


def test_typed_measurements_are_found_outside_of_markers_only():
    marked = "<!--= folder key %.2f -->88.14<!--/--> %"
    assert typed_numbers(f"it reaches {marked} in `3 s` with 3 inner steps") == []
    for text in ("88.14 %", "27 dB", "3.76 times", "15 MiB", "0.9 s", "4 min"):
        assert typed_numbers(f"it is {text}, {marked}") == [text]
    row = "| psnr | 88.14 | <!--= folder key .2f -->7.00<!--/--> | 1.5 ± 0.25 |"
    assert typed_numbers(row) == ["88.14", "1.5 ± 0.25"]
    assert typed_numbers("| 80 % of conv3's filters removed | reaches 80 % |") == [
        "80 %"
    ]


def test_a_changed_number_is_noticed():
    text = "<!--= train_vit_cifar10_cpu test_accuracy %.2f -->99.99<!--/--> %"
    value = json.loads(
        (ROOT / "results/train_vit_cifar10_cpu/summary.json").read_text()
    )["test_accuracy"]
    assert f">{100 * value:.2f}<" in evidence.fill(text)
    assert evidence.fill(f"`{text}`") == f"`{text}`"


@pytest.mark.parametrize("marker", ["absent key d", "train_vit_digits absent d"])
def test_a_marker_without_evidence_is_an_error(marker):
    with pytest.raises(ValueError, match="absent"):
        evidence.fill(f"<!--= {marker} -->1<!--/-->")


def make_run(root, name, summary, **config):
    folder = root / "results" / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "summary.json").write_text(json.dumps(summary))


def test_a_group_is_mean_and_deviation_over_seeds(tmp_path):
    values = [0.5, 0.75, 0.7]
    for seed, value in enumerate(values):
        name = f"run_seed{seed}" if seed else "run"
        summary = {"a.b": [0, value], "seconds": 10.0}
        make_run(tmp_path, name, summary, seed=seed, rate=1.0)
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    expected = f"{100 * mean:.1f} ± {100 * deviation:.1f}"
    assert evidence.render(tmp_path / "results/run*", "a.b.1", "%.1f") == expected
    assert evidence.num_seeds(tmp_path / "results/run*") == 3
    assert evidence.seconds(tmp_path / "results/run*") == 30
    make_run(tmp_path, "run_seed3", {"a.b": [0, 1]}, seed=3, rate=2.0)
    with pytest.raises(ValueError, match="rate"):
        evidence.render(tmp_path / "results/run*", "a.b.1", "%.1f")


def test_a_sweep_has_its_own_deviation(tmp_path):
    summary = {"psnr": [40.0, 42.0], "psnr_std": [1.0, 0.25]}
    make_run(tmp_path, "sweep", summary, seeds=[0, 1, 2])
    sweep, single = (tmp_path / "results" / name for name in ("sweep*", "single"))
    assert evidence.render(sweep, "psnr.1", ".2f") == "42.00 ± 0.25"
    # With one seed the deviation is of something else, such as the images.
    make_run(tmp_path, "single", summary, seeds=[0])
    assert evidence.render(single, "psnr.1", ".2f") == "42.00"
    assert evidence.render(single, "psnr.1:psnr.0", ".2f") == "1.05"
    assert evidence.render(single, "psnr.1-psnr.0", "d") == "2"


def test_columns_say_how_a_number_was_made(tmp_path):
    environment = {"backend": "cpu", "cpu_count": 2, "machine": "x86_64"}
    environment |= {"devices": ["cpu"], "versions": {"jax": "0.1"}, "commit": "abc"}
    command = "experiments/meta_learn.py --config=c.py:mnist --config.seeds=(0,1)"
    # A folder of the machine is no setting; a field is called what it is called today.
    command += " --config.dataset.data_dir=/data --config.model.dtype=bfloat16"
    environment["command"] = command
    config = {"experiment": "meta_learn", "variant": "mnist", "seeds": [0, 1]}
    for name in ("run", "other"):
        make_run(tmp_path, name, {"seconds": 90.0}, **config)
        folder = tmp_path / "results" / name
        (folder / "environment.json").write_text(json.dumps(environment))
    (tmp_path / "results/published").symlink_to(ROOT / "results/published")
    row = "| `run` | `meta_learn`, `mnist`, `model.derivative_dtype=bfloat16` | 2 | "
    row += "1.5 min | 2 CPU cores, x86_64, JAX 0.1 | `abc` |"
    table = f"""
| run | command | seeds | time | machine | commit |
| --- | --- | --- | --- | --- | --- |
{row}
"""
    # Each run once; those of another section, and published numbers, are not listed.
    text = "<!--= other @run -->`other`<!--/-->\n## A section\n"
    text += "<!--= run @run -->{}<!--/--> <!--= run @seeds -->{}<!--/-->"
    text += "<!--= published table_1.100 d -->16<!--/-->"
    text += "<!--= section @runs -->{}<!--/-->"
    filled = evidence.fill(text.format("`x`", 1, ""), tmp_path)
    assert filled == text.format("`run`", 2, table)


def test_times_until_a_level_and_sums_over_folders(tmp_path):
    make_run(tmp_path, "field", {"seconds": 90.0}, seeds=[0])
    make_run(tmp_path, "head", {"seconds": 30.0}, seeds=[0])
    lines = [(0, None), (10, 35.5), (20, 34.0), (30, 37.0)]  # without the first PSNR
    log = [
        {"step": 2 * s, "seconds": s} | ({} if psnr is None else {"psnr": psnr})
        for s, psnr in lines
    ]
    field = tmp_path / "results" / "field"
    (field / "metrics.jsonl").write_text("\n".join(map(json.dumps, log)) + "\n")
    assert evidence.render(field, "seconds_until(psnr,35)", "d") == "10"
    assert evidence.render(field, "seconds_until(psnr,36)", "min.1f") == "0.5"
    assert evidence.render(field, "seconds_until(step,40)+head/seconds", "d") == "50"
    with pytest.raises(ValueError, match=r"no number 'seconds_until\(psnr,38\)'"):
        evidence.render(field, "seconds_until(psnr,38)", "d")


def test_a_variant_without_a_folder_is_not_run_yet(tmp_path):
    (tmp_path / "results").mkdir()
    folder = tmp_path / "results" / "fit_image_report"
    assert evidence.render(folder, "32x32_psnr.0", ".2f") == "not run yet"
    assert evidence.render(folder, "@command") == "`fit_image`, `report`"
    assert evidence.render(folder, "@run") == "`fit_image_report`"


def differences(name):
    """Fields in which a stored configuration is not its variant and overrides."""
    stored = evidence.read(evidence.RESULTS / name, "config.json")
    command = evidence.read(evidence.RESULTS / name, "environment.json")["command"]
    variant, overrides = evidence.recorded_overrides(command)
    module = importlib.import_module(f"experiments.configs.{stored['experiment']}")
    config = module.get_config(variant) if variant else module.get_config()
    today = json.loads(config.to_json_best_effort())
    expected = flatten(today)
    for field, text in overrides.items():
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            value = text
        field, value = upgrade_override(stored["experiment"], field, value)
        replaced = {x for x in expected if x == field or x.startswith(f"{field}.")}
        assert replaced, f"{name}: no field {field}"
        expected = {x: expected[x] for x in expected.keys() - replaced}
        expected |= flatten(json.loads(json.dumps({field: value})))
    found = flatten(upgrade(stored))
    absent = object()
    return {
        field
        for field in found.keys() | expected.keys()
        if field not in FILLED
        # make_functaset adopts the data set of its run.
        and not (field.startswith("dataset.") and expected.get(field, 0) is None)
        and found.get(field, absent) != expected.get(field, absent)
    }


@pytest.mark.parametrize("name", FOLDERS)
def test_stored_configuration_is_its_variant_and_overrides(name):
    assert not differences(name)


TIME = re.compile(
    r"(\d+) (minutes?|seconds)( a seed)?(?: for both methods)? on "
    r"(?:two (?:busy )?cores|one H200)[^.;()]*\(results/(\w+)\)"
)


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "experiments" / "configs").glob("*.py")),
    ids=lambda p: p.stem,
)
def test_times_of_variants_are_those_of_their_runs(path):
    text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split())
    for number, unit, a_seed, name in TIME.findall(text):
        taken = evidence.seconds(ROOT / "results" / name)
        taken /= evidence.num_seeds(ROOT / "results" / name) if a_seed else 1
        taken /= 60 if unit.startswith("minute") else 1
        assert taken == pytest.approx(int(number), rel=0.1, abs=0.6), name


def test_upgrade_renames_adds_and_removes():
    old = {"experiment": "meta_learn", "seed": 2, "model": {}, "exact_steps": 0}
    new = upgrade(old)
    assert new["seeds"] == [2]
    assert new["model"] == {"derivative_dtype": "float32"}
    assert new["by_cells"] is False
    assert new.keys().isdisjoint({"seed", "exact_steps"})
    assert old["seed"] == 2
    # A field that meant something else then stays, and so is seen to differ.
    assert upgrade(old | {"exact_steps": 5})["exact_steps"] == 5
    assert upgrade_override("meta_learn", "seed", 1) == ("seeds", [1])
    assert upgrade(new) == new
    # Fields may be renamed inside of stages too, and in a command.
    stages = [[0.5, {"patch_dropout": 1.0, "augment.flip": False}]]
    old = {"experiment": "train_vit", "patch_dropout": 0.5, "stages": stages}
    new = upgrade(old)
    assert new["patch_keep_rate"] == 0.5 and "patch_dropout" not in new
    assert new["stages"] == [[0.5, {"patch_keep_rate": 1.0, "augment.flip": False}]]
    override = upgrade_override("train_vit", "stages", "((0.5, {'patch_dropout': 1}),)")
    assert override == ("stages", "((0.5, {'patch_keep_rate': 1}),)")


DRAWN = {
    folder.parent.relative_to(ROOT / "results").as_posix()
    for folder in (ROOT / "results").rglob("figures")
}


def drawable(folder, monkeypatch, capsys):
    """The figures of a folder for which the drawing gets to the first panel."""

    def stop(*args, **options):
        raise RuntimeError("panel")

    monkeypatch.setattr(plt, "subplots", stop)
    monkeypatch.setattr(plt, "figure", stop)
    figures.figures.draw(folder)
    printed = capsys.readouterr().out
    return set(re.findall(r"figure (\w+) is not drawn: RuntimeError\('panel'", printed))


@pytest.mark.parametrize("name", sorted(DRAWN))
def test_committed_figures_can_be_drawn_again(name, monkeypatch, capsys):
    folder = ROOT / "results" / name
    committed = {path.stem for path in (folder / "figures").glob("*.png")}
    assert committed <= drawable(folder, monkeypatch, capsys)


def test_a_figure_without_its_arrays_is_noticed(tmp_path, monkeypatch, capsys):
    folder = ROOT / "results" / "latent_controls_digits"
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    name = "psnr_against_size"
    assert name in drawable(tmp_path, monkeypatch, capsys)
    (tmp_path / "arrays.npz").unlink()
    assert name not in drawable(tmp_path, monkeypatch, capsys)


def test_every_committed_weight_file_has_a_model_card():
    for path in (ROOT / "results").glob("*/model.npz"):
        card = (path.parent / "model_card.md").read_text()
        for heading in ("Data", "Training compute", "Evaluation", "Limitations"):
            assert f"## {heading}" in card
        assert not typed_numbers(card)


def test_outdated_names_a_page_whose_number_was_changed(tmp_path):
    for part in ("results", "docs"):
        shutil.copytree(
            ROOT / part,
            tmp_path / part,
            ignore=shutil.ignore_patterns("*.npz", "api"),
        )
    shutil.copy(ROOT / "README.md", tmp_path)
    number = evidence.render(evidence.RESULTS / "published", "table_3.test.2", ".2f")
    pages = [page for page in tmp_path.rglob("*.md") if number in page.read_text()]
    for page in pages:
        page.write_text(page.read_text().replace(number, "1.00"))
    assert {page.name for page in pages} >= {"report.md", "results.md"}
    assert set(results.outdated(tmp_path)) == set(pages)
