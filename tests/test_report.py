"""The report: its table is complete, its runs exist, its page says what there is."""

import json
import re

import pytest
from test_results import typed_numbers

from experiments import report as command
from experiments.common import evidence, page, report, settings
from experiments.configs import report as configs

RUNS = report.list_runs()


def numbers(kind):
    """The numbers of the tables or figures in the names of all entries, in order."""
    found = []
    for entry in report.ENTRIES:
        match = re.fullmatch(rf"{kind}s? (\d+)(?: (?:to|and) (\d+))?", entry.name)
        if match:
            first, last = int(match[1]), int(match[2] or match[1])
            found += range(first, last + 1)
    return found


def test_every_table_and_figure_has_an_entry_in_order():
    assert numbers("Table") == list(range(1, 14))
    assert numbers("Figure") == list(range(1, 30))
    for entry in report.ENTRIES:
        # What is not run says why.
        assert entry.runs() or entry.note
        assert bool(entry.rows) == bool(entry.columns)
        assert not typed_numbers(entry.note)


def test_every_number_of_the_report_is_shown():
    published = evidence.read(evidence.RESULTS / report.PUBLISHED)
    stated = {
        f"{table}.{name}".rstrip(".")
        for table in published
        if table.startswith(("table_", "section_"))
        for name in flatten(published[table])
    }
    shown = {
        column.key.format(*names)
        for entry in report.ENTRIES
        for names in entry.rows.values()
        for column in entry.columns.values()
        if column.run == report.PUBLISHED
    }
    assert {name for name in shown if "None" not in name} == stated


def flatten(tree):
    """The dotted keys of nested dicts and lists."""
    if isinstance(tree, list):
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict):
        return [""]
    return [f"{k}.{n}".rstrip(".") for k in tree for n in flatten(tree[k])]


@pytest.mark.parametrize("variant", configs.VARIANTS)
def test_every_run_has_a_configuration(variant):
    for run in RUNS:
        made = command.make_config(configs.get_config(variant), run, {})
        assert run.startswith(f"{made.experiment}/")
        assert set(RUNS[run]) <= settings.flatten(made).keys()
    assert configs.SMOKE.keys() <= {*RUNS, *(name.split("/")[0] for name in RUNS)}


def test_runs_follow_what_they_read():
    assert RUNS["prune_lbi/mnist"] == {"run": ("train_lbi/mnist", "")}
    name = "meta_learn/cifar10_cpu"
    assert RUNS["classify_functa/report_mlp2"] == {"functaset": (name, "functaset.npz")}
    order = list(RUNS)
    for run, inputs in RUNS.items():
        for needed, _ in inputs.values():
            assert order.index(needed) < order.index(run)


def make_report(folder, **changes):
    config = configs.get_config()
    config.folder = str(folder)
    config.update(changes)
    return config


def make_run(config, folder, run, *, summary=None, fields=()):
    """The files of a run; with a summary it is finished."""
    made = command.make_config(config, run, dict(fields))
    (folder / run).mkdir(parents=True)
    (folder / run / "config.json").write_text(made.to_json_best_effort())
    if summary is not None:
        (folder / run / "summary.json").write_text(json.dumps(summary))


def test_states(tmp_path):
    config = make_report(tmp_path, evidence=False)
    make_run(config, tmp_path, "train_lbi/mnist", summary={})
    make_run(config, tmp_path, "train_lbi/mnist_report")
    make_run(config, tmp_path, "fit_image/report", summary={}, fields={"log_every": 7})
    # Another file of the same kind is no other setting.
    make_run(
        config, tmp_path, "prune_lbi/mnist", summary={}, fields={"run": "elsewhere"}
    )
    # Nor is what a run fills in after the first look at its data.
    filled = {"model.out_channels": 3}
    make_run(config, tmp_path, "meta_learn/cifar10_cpu", summary={}, fields=filled)
    states = command.look(config, tmp_path, RUNS)
    finished = {run for run, state in states.items() if state.folder}
    assert finished == {"train_lbi/mnist", "prune_lbi/mnist", "meta_learn/cifar10_cpu"}
    lines = "\n".join(command.tell(config, states))
    for words in (
        f"Table 8           train_lbi/mnist                   finished in {tmp_path}",
        f"train_lbi/mnist_report            unfinished in {tmp_path}",
        f"in {tmp_path}/fit_image/report with other settings (log_every); 60",
        "Table 3           classify_functa/report_mlp1       missing; 4.4 min on 2 CPU",
        "Table 6           prune_vit/b16                     missing\n",
        "Figures 8 to 12   nothing to run",
    ):
        assert words in lines
    assert lines.count("\nMissing: ") == 1


def test_finished_runs_of_the_user_come_before_results(tmp_path):
    config = make_report(tmp_path)
    make_run(config, tmp_path, "train_lbi/mnist", summary={})
    states = command.look(config, tmp_path, RUNS)
    assert states["train_lbi/mnist"].folder == tmp_path / "train_lbi/mnist"
    assert states["prune_lbi/mnist"].words == "finished in results/prune_lbi_mnist"


def plan(config, folder):
    states = command.look(config, folder, RUNS)
    return command.plan(config, folder, RUNS, states)


def test_all_is_what_results_lack(tmp_path):
    config = make_report(tmp_path, run=("all",))
    lacking = [run for run in RUNS if report.find_result(run) is None]
    assert list(plan(config, tmp_path)) == lacking


def test_what_a_run_reads_is_taken_from_results_or_run_first(tmp_path):
    config = make_report(tmp_path, run=("prune_vit/cifar10_cpu,prune_lbi/mnist",))
    jobs = plan(config, tmp_path)
    # The folder in results/ holds the weights of the one, but no checkpoint of the
    # other.
    assert list(jobs) == ["prune_vit/cifar10_cpu", "train_lbi/mnist", "prune_lbi/mnist"]
    checkpoint = jobs["prune_vit/cifar10_cpu"].checkpoint
    assert checkpoint == "results/train_vit_cifar10_cpu_long/model.npz"
    assert jobs["prune_lbi/mnist"].run == str(tmp_path / "train_lbi/mnist")
    config.evidence = False
    jobs = plan(config, tmp_path)
    assert "train_vit/cifar10_cpu_long" in jobs
    checkpoint = jobs["prune_vit/cifar10_cpu"].checkpoint
    assert checkpoint == str(tmp_path / "train_vit/cifar10_cpu_long/model.npz")
    # A finished run is not run again.
    make_run(config, tmp_path, "train_lbi/mnist", summary={})
    make_run(config, tmp_path, "prune_vit/cifar10_cpu", summary={})
    assert list(plan(config, tmp_path)) == ["prune_lbi/mnist"]


@pytest.mark.parametrize("names", [("train_lbi/nothing",), ("all, table 1",), ("",)])
def test_bad_names_are_refused_with_one_line(names, tmp_path):
    config = make_report(tmp_path, run=names)
    with pytest.raises(ValueError, match="run must be all or names of .*b16") as error:
        command.train_and_evaluate(config, tmp_path)
    assert "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())


def test_page_without_runs(tmp_path, capsys):
    config = make_report(tmp_path / "absent", evidence=False)
    found = command.train_and_evaluate(config, tmp_path)
    assert found == {"finished": [], "missing": list(RUNS)}
    text = (tmp_path / "report.html").read_text()
    assert "<td>37.99</td><td>not run yet</td>" in text
    assert "Mosaic: not run yet." in text and "<img" not in text
    assert f"of these {len(RUNS)} were recorded" in capsys.readouterr().out
    assert not (tmp_path / "absent").exists()


def test_page_of_results_contains_its_figures(tmp_path):
    parts = report.describe(report.ENTRIES, report.find_result)
    page.write_page(tmp_path, "report", "Report", parts)
    text = (tmp_path / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{21})', text)
    assert len(sources) >= 8
    assert set(sources) == {"data:image/png;base64"}
    for part in parts:
        if isinstance(part, page.Table):
            assert {len(row) for row in part.rows} == {len(part.columns)}


def test_numbers_of_an_entry(tmp_path):
    folder = tmp_path / "run"
    (folder / "figures").mkdir(parents=True)
    (folder / "figures" / "there.png").touch()
    files = {
        "summary": {"psnr": [40.0, 42.0], "psnr_std": [0.5, 0.25], "seconds": 90.0},
        "config": {"experiment": "fit_image", "variant": "report", "seeds": [0, 1]},
        "environment": {
            "command": "python -m experiments.report --config.run=fit_image/report",
            "backend": "cpu",
            "cpu_count": 2,
            "machine": "x86_64",
            "devices": ["cpu"],
            "versions": {"jax": "0.1"},
            "commit": "abc",
        },
    }
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    entry = report.Entry(
        "Table 1",
        "steps",
        "A note.",
        rows={"first": (None, "0"), "second": ("100", "1")},
        columns={
            "report": report.Column(report.PUBLISHED, "table_1.{0}", ".2f"),
            "ours": report.Column("fit_image/report", "psnr.{1}", ".1f"),
            "more": report.Column("prune_vit/b16", "psnr.{1}", ".1f"),
        },
        figures={
            "One": ("fit_image/report", "there"),
            "Two": ("fit_image/report", "absent"),
        },
    )
    folders = {"fit_image/report": folder}
    folders["published"] = evidence.RESULTS / "published"
    parts = report.describe([entry], folders.get)
    origin = ["`fit_image`, `report`", "2", "1.5 min", "2 CPU cores, x86_64, JAX 0.1"]
    assert parts == [
        page.Heading("Table 1: steps"),
        page.Text("A note."),
        page.Table(
            "",
            ("", "report", "ours", "more"),
            [
                ["first", "-", "40.0 ± 0.5", "not run yet"],
                ["second", "15.68", "42.0 ± 0.2", "not run yet"],
            ],
        ),
        page.Figure(folder / "figures" / "there.png", "One"),
        page.Text("Two: not in `results/`; a new run draws it."),
        page.Table(
            "",
            ("", *evidence.ORIGIN),
            [
                ["ours", *origin, "`abc`", f"`{folder}`"],
                ["more", "`prune_vit`, `b16`", "", "", "", "", ""],
            ],
        ),
    ]


def test_a_run_that_fails_is_named_and_the_page_is_written(tmp_path):
    config = configs.get_config("smoke")
    config.run = ("prune_vit/b16",)
    # Finished, but without the file of its weights.
    make_run(config, tmp_path, "train_vit/finetune_b16", summary={})
    message = "^1 of 1 runs failed: prune_vit/b16: .*finetune_b16/model.npz"
    with pytest.raises(ValueError, match=message):
        command.train_and_evaluate(config, tmp_path)
    assert "A smoke run" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_smoke_runs_everything_and_resumes(tmp_path):
    config = configs.get_config("smoke")
    found = command.train_and_evaluate(config, tmp_path)
    assert found == {"finished": list(RUNS), "missing": []}
    text = (tmp_path / "report.html").read_text()
    assert "not run yet" not in text and "a new run only" not in text
    pictures = sum(len(entry.figures) for entry in report.ENTRIES)
    assert text.count('src="data:image/png;base64') == pictures
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("summary.json")}
    assert len(times) >= len(RUNS)
    assert command.train_and_evaluate(config, tmp_path) == found
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
