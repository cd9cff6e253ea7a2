"""The stress command: its inputs, how it judges answers, runs and flipped bits."""

import collections
import json
import pickle
import shutil

import numpy as np
import pytest

from experiments import stress
from experiments.common import bad_inputs
from experiments.configs import stress as configs

CASES = {case.name: case for case in bad_inputs.make_cases()}


def test_inputs_are_many_and_of_every_command():
    bad = [case for case in CASES.values() if case.words]
    counts = collections.Counter(case.command for case in bad)
    assert len(bad) >= 500 and len(CASES) - len(bad) >= 20
    assert {*bad_inputs.COMMANDS, "import_functa", "figures"} <= counts.keys()
    for case in CASES.values():
        # What braces name is a run, the folder of the inputs, or written into it.
        for name in stress.NAME.findall(" ".join(case.arguments)):
            assert name and "/" not in name


def test_every_command_that_is_killed_has_a_run_to_start():
    commands = configs.BASE["commands"]
    assert len(set(commands)) == len(commands)
    assert set(commands) <= bad_inputs.RUNS.keys()


@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        ("meta_learn optimizer.ema_decay=2", "refused"),
        ("fit_image image=/nowhere.png", "refused"),
        ("prune_vit tuning.teacher_weight=2", "refused"),
        ("scaling --workdir=rgb.png", "refused"),
        ("scaling good ", "accepted"),
    ],
)
def test_answers(tmp_path, name, outcome):
    (tmp_path / "a_file.txt").write_text("")
    (tmp_path / "rgb.png").write_text("")
    references = dict.fromkeys(bad_inputs.RUNS, tmp_path)
    assert stress.answer(CASES[name], references, tmp_path)["outcome"] == outcome


def test_answers_without_the_field_or_from_a_library_do_not_count(tmp_path):
    case = CASES["meta_learn optimizer.ema_decay=2"]
    vague = stress.answer(case._replace(words=("width",)), {}, tmp_path)
    assert vague["outcome"] == "vague" and "ema_decay" in vague["line"]
    wrong = stress.answer(case._replace(command="results"), {}, tmp_path)
    assert wrong["outcome"] == "traceback"


def test_malicious_files_are_noticed_if_executed(tmp_path):
    marker = tmp_path / "executed"
    data = pickle.dumps(bad_inputs.Evil(marker / "file"))
    (tmp_path / "evil.pt").write_bytes(data)
    found = stress.answer(CASES["import_functa evil.pt"], {}, tmp_path)
    assert found["outcome"] == "refused" and not marker.exists()
    pickle.loads(data)
    assert len(list(marker.iterdir())) == 1


def test_runs_are_compared_without_times(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    (first / "inner").mkdir(parents=True)
    np.savez(first / "inner" / "a.npz", x=np.arange(3.0), row_milliseconds=np.ones(1))
    (first / "summary.json").write_text(json.dumps({"a": 1.0, "seconds": 2.0}))
    (first / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5, "seconds": 1}\n')
    shutil.copytree(first, second)
    np.savez(second / "inner" / "a.npz", x=np.arange(3.0), row_milliseconds=np.zeros(1))
    (second / "summary.json").write_text(json.dumps({"a": 1.0, "seconds": 3.0}))
    assert stress.find_differences(first, second) == []
    np.savez(second / "inner" / "a.npz", x=np.arange(3.0) + 1e-7)
    (second / "metrics.jsonl").write_text('{"step": 1, "loss": 0.6, "seconds": 1}\n')
    (second / "summary.json").unlink()
    names = ["inner/a.npz", "metrics.jsonl", "summary.json"]
    assert stress.find_differences(first, second) == names


def test_one_bit_is_flipped(tmp_path):
    data = bytes(range(100))
    (tmp_path / "functaset.npz").write_bytes(data)
    assert stress.flip(tmp_path, "functaset", 0.5, 3) == "functaset.npz byte 50"
    flipped = (tmp_path / "functaset.npz").read_bytes()
    assert [a ^ b for a, b in zip(data, flipped, strict=True)] == [
        8 * (i == 50) for i in range(100)
    ]


@pytest.mark.slow
def test_smoke(tmp_path):
    config = configs.get_config("smoke")
    summary = stress.train_and_evaluate(config, tmp_path)
    assert summary["num_executed"] == summary["num_silent"] == 0
    assert summary["num_hangs"] == summary["num_tracebacks"] == 0
    assert summary["num_inputs"] >= 10
    assert summary["num_killed_runs_equal"] == summary["num_killed_runs"] == 1
    assert summary["num_flips"] == 2
