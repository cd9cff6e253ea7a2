"""Runs: atomic files, exact logs, and one line for every mistake of a user."""

import contextlib
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments.common import files, runs
from experiments.training import loop

ROOT = Path(__file__).parents[1]
CONFIG = {"experiment": "none", "variant": "x", "a": {"b": 1}, "c": (2.0, None)}


def test_files_are_whole_or_not_there(tmp_path):
    path = tmp_path / "folder" / "a.json"
    files.write_json(path, {"x": np.float32(1.5), "y": jnp.arange(3)})
    assert files.read_json(path) == {"x": 1.5, "y": [0, 1, 2]}

    def fail(file):
        file.write("half of")
        raise OSError("disk full")

    with pytest.raises(OSError, match="a.json cannot be written: disk full"):
        files.write_atomic(path, fail)
    assert files.read_json(path) == {"x": 1.5, "y": [0, 1, 2]}
    assert os.listdir(path.parent) == ["a.json"]


@contextlib.contextmanager
def full_disk(size):
    """The kernel refuses to grow a file beyond `size`, as it does on a full disk.

    Python ignores the signal that goes with it and sees an OSError.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_write_beyond_the_disk_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.npz"
    files.write_npz(path, {"x": np.arange(3)})
    noise = np.random.default_rng(0).normal(size=10_000)
    with full_disk(4096), pytest.raises(OSError, match="a.npz cannot be written"):
        files.write_npz(path, {"x": noise})
    np.testing.assert_array_equal(np.load(path)["x"], np.arange(3))


def test_run_on_a_full_disk_says_so(tmp_path):
    command = [
        *(sys.executable, "-m", "experiments.meta_learn"),
        "--config=experiments/configs/meta_learn.py:smoke",
        f"--workdir={tmp_path}",
    ]
    ended = subprocess.run(
        ["bash", "-c", "ulimit -f 4; exec " + shlex.join(command)],  # KiB
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert ended.returncode == 1
    # Orbax's own threads print around it.
    assert "error: the checkpoint of step 10 cannot be written to" in ended.stderr
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        runs.load_checkpoint(tmp_path)


def test_checkpoint_that_does_not_fit_is_not_begun(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=500_000))
    with (
        pytest.raises(OSError, match=r"step 3 needs 1\.0 MiB in .* 0\.5 are free"),
        runs.open_run(tmp_path, ConfigDict(CONFIG)) as run,
    ):
        run.save(3, {"w": jnp.zeros(3)})


def test_run_resumes_state_and_metrics(tmp_path):
    config = ConfigDict(CONFIG)
    state = {"w": jnp.zeros(3), "none": None}
    with runs.open_run(tmp_path, config) as run:
        assert run.restore(state)[0] == 0
        for step in (1, 2, 3):
            run.log(step, {"loss": 1.0 / step}, num_steps=4)
            if step < 3:
                run.save(step, {**state, "w": jnp.full(3, float(step))})
    # As a kill leaves it: a line after the last checkpoint, and half a line.
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    with runs.open_run(tmp_path, config) as run:
        step, restored = run.restore(state)
        assert step == 2 and restored["w"].tolist() == [2, 2, 2]
        assert restored["none"] is None
        assert run.seconds > 0
        run.finish({"loss": jnp.float32(0.25), "list": [1.0, 2.0]})
    lines = files.read_metrics(tmp_path / "metrics.jsonl")
    assert [m["step"] for m in lines] == [1, 2]
    with runs.open_run(tmp_path, config) as run:
        assert run.summary["loss"] == 0.25
    assert json.loads((tmp_path / "environment.json").read_text())["versions"]["jax"]


def test_another_config_names_the_fields(tmp_path):
    with runs.open_run(tmp_path, ConfigDict(CONFIG)) as run:
        run.log(1, {"loss": 0.5}, num_steps=2)
    other = ConfigDict({**CONFIG, "a": {"b": 2}})
    with (
        pytest.raises(ValueError, match="a.b is 1 there and 2 here. Choose another"),
        runs.open_run(tmp_path, other),
    ):
        pass


def test_corrected_config_is_taken_where_nothing_was_done(tmp_path):
    with runs.open_run(tmp_path, ConfigDict(CONFIG), inputs={"weights": "a"}):
        pass
    other = ConfigDict({**CONFIG, "a": {"b": 2}})
    with runs.open_run(tmp_path, other, inputs={"weights": "b"}) as run:
        run.log(1, {"loss": 0.5}, num_steps=2)
    assert runs.load_config(tmp_path).a.b == 2
    with (
        pytest.raises(ValueError, match="the weights of .* has changed"),
        runs.open_run(tmp_path, other, inputs={"weights": "a"}),
    ):
        pass


def test_damaged_checkpoint_is_named(tmp_path):
    config, state = ConfigDict(CONFIG), {"w": jnp.arange(100.0)}
    with runs.open_run(tmp_path, config) as run:
        run.restore(state)
        run.save(5, state)
    for path in (tmp_path / "checkpoints" / "5" / "state").rglob("*"):
        if path.is_file() and "metadata" not in path.name.lower():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with (
        pytest.raises(ValueError, match="checkpoint of step 5 .* cannot be read"),
        runs.open_run(tmp_path, config) as run,
    ):
        run.restore(state)


def test_no_run_and_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        runs.load_checkpoint(tmp_path)
    with runs.open_run(tmp_path, ConfigDict(CONFIG)):
        pass
    with pytest.raises(FileNotFoundError, match="has no checkpoints"):
        runs.load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"a"')
    with pytest.raises(ValueError, match="config.json is damaged"):
        runs.load_checkpoint(tmp_path)


def test_check_finite_names_the_step():
    loop.check_finite(np.array([1.0, 2.0]), first_step=8)
    with pytest.raises(ValueError, match="loss is nan at step 9"):
        loop.check_finite(np.array([1.0, np.nan, np.inf]), first_step=8)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--config.num_stepz=3", "Did you mean num_steps?"),
        ("--config.dataset.name=folder", "needs a directory"),
        ("--process_id=1", "need --multihost"),
        ("--multihost", "coordinator_address"),
    ],
)
def test_a_mistake_costs_one_line_and_status_1(tmp_path, option, message):
    command = [sys.executable, "-m", "experiments.meta_learn", option]
    ended = subprocess.run(
        [*command, f"--workdir={tmp_path}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert ended.returncode == 1
    lines = ended.stderr.splitlines()
    assert len(lines) == 1, ended.stderr
    assert lines[0].startswith("error: ") and message in lines[0]
