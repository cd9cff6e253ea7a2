"""scaling: the measurements of processes are consistent."""

import sys
from types import SimpleNamespace

import pytest

from experiments import scaling
from experiments.configs import scaling as configs


@pytest.mark.slow
def test_smoke_run(tmp_path):
    config = configs.get_config("smoke")
    summary = scaling.train_and_evaluate(config, tmp_path)
    assert all(summary[f"import_{name}_seconds"] > 0 for name in ("functa", "lbi"))
    assert summary["first_step_nothing_compiled_seconds"] > 0
    for name in "images_per_second", "encoded_per_second", "peak_mebibytes":
        assert len(summary[name]) == 1 and min(summary[name]) > 0
    assert summary["num_images"] == [100]
    assert (tmp_path / "figures" / "scaling.png").exists()
    assert scaling.train_and_evaluate(config, tmp_path) == summary


def test_a_start_that_fails_has_no_time(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(ValueError, match="experiments.meta_learn .* ended before"):
        scaling._time_first_step(tmp_path / "run")


def test_only_a_cpu_has_virtual_devices():
    one_gpu, one_cpu = ([SimpleNamespace(platform=name)] for name in ("gpu", "cpu"))
    scaling._check_devices((1, 2), one_cpu)
    scaling._check_devices((1,), one_gpu)
    for num_devices in ((1, 2), (2,)):
        with pytest.raises(ValueError, match="num_devices must be 1, .* of gpu; got"):
            scaling._check_devices(num_devices, one_gpu)


def test_numbers_below_one_are_refused(tmp_path):
    config = configs.get_config("smoke")
    config.num_rounds = 0
    with pytest.raises(ValueError, match="num_rounds must be at least 1 .*, got 0"):
        scaling.train_and_evaluate(config, tmp_path)
