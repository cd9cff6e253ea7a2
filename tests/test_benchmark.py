"""The benchmark: its numbers are consistent with each other, and bad settings named."""

import pytest

from experiments import benchmark
from experiments.configs import benchmark as configs


def test_smoke_run(tmp_path):
    config = configs.get_config("smoke")
    summary = benchmark.train_and_evaluate(config, tmp_path)
    rounds = summary["rounds"]
    assert set(rounds) == set(config.methods)
    for method, times in rounds.items():
        assert len(times) == config.num_rounds and min(times) > 0
        assert min(times) <= summary[f"{method}_milliseconds"] <= max(times)
    assert summary["adam_over_adam"] == 1
    # Adam keeps two trees like the parameters; DessiLBI with momentum two, its
    # dual among them; DessiLBI+Adam three. The rest is counters and entry steps.
    for method, trees in (("adam", 2), ("dessilbi", 2), ("dessilbi_adam", 3)):
        assert trees <= summary[f"{method}_state_over_params"] < trees + 0.25
    assert benchmark.train_and_evaluate(config, tmp_path) == summary


@pytest.mark.parametrize("name", ["batch_size", "num_rounds", "steps_per_round"])
def test_numbers_below_one_are_refused(tmp_path, name):
    config = configs.get_config("smoke")
    config[name] = 0
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        benchmark.train_and_evaluate(config, tmp_path)
