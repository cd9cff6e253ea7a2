"""Sweeps over seeds: folders, resumption, mean and deviation."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments.common.sweep import mean_and_std, sweep


def config(**fields):
    return ConfigDict({"experiment": "none", "variant": "x", "seeds": (0,), **fields})


def experiment(run):
    [seed] = run.config.seeds
    return {"score": 2.0 * seed, "curve": [seed, 1.0], "count": 7, "name": "same"}


def test_one_seed_runs_in_the_folder_itself(tmp_path):
    summary = sweep(config(seeds=(3,)), tmp_path, experiment)
    assert summary["score"] == 6.0 and "runs" not in summary
    assert (tmp_path / "summary.json").exists()


def test_mean_and_deviation_over_the_seeds(tmp_path):
    summary = sweep(config(seeds=(0, 1, 5)), tmp_path, experiment)
    scores = np.array([0.0, 2.0, 10.0])
    assert summary["score"] == pytest.approx(scores.mean())
    assert summary["score_std"] == pytest.approx(scores.std(ddof=1))
    assert summary["curve"] == pytest.approx([2.0, 1.0])
    assert summary["curve_std"] == pytest.approx([np.std([0, 1, 5], ddof=1), 0])
    assert summary["count"] == 7 and "count_std" not in summary
    assert summary["name"] == "same"
    assert sorted(summary["runs"]) == ["seed0", "seed1", "seed5"]
    inner = json.loads((tmp_path / "seed5" / "config.json").read_text())
    assert inner["seeds"] == [5]


def test_axes_name_the_runs_and_each_has_its_own_values(tmp_path):
    seen = []

    def record(run):
        seen.append((run.workdir.name, *run.config.methods, *run.config.seeds))
        return {"score": 1.0}

    axes = {"methods": "{}", "seeds": "seed{}"}
    sweep(config(methods=("a", "b"), seeds=(0, 1)), tmp_path, record, axes=axes)
    assert seen == [
        ("a_seed0", "a", 0),
        ("a_seed1", "a", 1),
        ("b_seed0", "b", 0),
        ("b_seed1", "b", 1),
    ]


def test_values_that_give_the_same_name_are_refused(tmp_path):
    axes = {"learning_rates": "rate{:g}", "seeds": "seed{}"}
    rates = config(learning_rates=(0.1, 0.10000001))
    with pytest.raises(ValueError, match="2 runs would have the name rate0.1_seed0"):
        sweep(rates, tmp_path / "run", experiment, axes=axes)
    assert not (tmp_path / "run").exists()


def test_resumed_sweep_repeats_no_finished_run(tmp_path):
    seen = []

    def fails_once(run):
        [seed] = run.config.seeds
        seen.append(seed)
        if seed == 1 and seen.count(1) == 1:
            raise KeyboardInterrupt
        return {"score": float(seed)}

    with pytest.raises(KeyboardInterrupt):
        sweep(config(seeds=(0, 1, 2)), tmp_path, fails_once)
    summary = sweep(config(seeds=(0, 1, 2)), tmp_path, fails_once)
    assert seen == [0, 1, 1, 2] and summary["score"] == 1.0


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_changed_input_is_refused(tmp_path, seeds):
    def run(digest):
        one = config(seeds=seeds)
        return sweep(one, tmp_path, experiment, inputs=lambda config: digest)

    summary = run({"weights": "a"})
    assert run({"weights": "a"}) == summary
    with pytest.raises(ValueError, match="the weights of .* has changed"):
        run({"weights": "b"})


def test_mean_and_std_of_nested_rows():
    rows = [{"a": {"x": 1.0, "y": [1, 2]}}, {"a": {"x": 3.0, "y": [3, 6]}}]
    table = mean_and_std(rows)
    assert table["a.x"] == 2.0 and table["a.x_std"] == pytest.approx(np.sqrt(2))
    np.testing.assert_allclose(table["a.y"], [2, 4])
    assert "a.x_std" not in mean_and_std(rows[:1])
