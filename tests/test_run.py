"""Runs: atomic files, exact logs, and one line for every mistake of a user."""

import contextlib
import io
import json
import os
import pickle
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from ml_collections import ConfigDict

import functa
import vit
from experiments.common import data, files, launch, runs
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


@pytest.mark.slow
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


def save_steps(workdir, *steps):
    with runs.open_run(workdir, ConfigDict(CONFIG)) as run:
        run.restore({"w": jnp.zeros(100)})
        for step in steps:
            run.save(step, {"w": jnp.arange(100.0) + step})


def restored(workdir):
    with runs.open_run(workdir, ConfigDict(CONFIG)) as run:
        step, state = run.restore({"w": jnp.zeros(100)})
    return step, float(state["w"][0])


def test_damaged_checkpoint_is_named(tmp_path):
    save_steps(tmp_path, 5)
    for path in (tmp_path / "checkpoints" / "5" / "state").rglob("*"):
        if path.is_file() and "metadata" not in path.name.lower():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="5 is damaged .*, and there is no other"):
        restored(tmp_path)
    # As a run of an earlier version, whose checkpoints have no checksums.
    (tmp_path / "checkpoints" / "5" / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match="checkpoint .*/5 cannot be read"):
        restored(tmp_path)


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_every_flipped_bit_of_a_checkpoint_is_noticed(tmp_path, capsys):
    save_steps(tmp_path, 1, 2)
    folder = tmp_path / "checkpoints" / "2"
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
    assert {"_METADATA", "SHA256SUMS", "manifest.ocdbt"} <= {p.name for p in paths}
    rng = np.random.default_rng(0)
    for i in range(30):
        path = paths[i % len(paths)]
        bit = int(rng.integers(8 * path.stat().st_size))
        flip(path, bit)
        _, state = runs.load_checkpoint(tmp_path)
        assert state["w"][0] == 1, path
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 1 and "2 is damaged (" in lines[0]
        assert lines[0].endswith("using that of step 1.")
        flip(path, bit)
    assert runs.load_checkpoint(tmp_path)[1]["w"][0] == 2
    flip(paths[0], 9)
    assert restored(tmp_path) == (1, 1.0)
    # The damaged one is out of the way of a new one.
    save_steps(tmp_path, 2)
    assert restored(tmp_path) == (2, 2.0)


def test_checkpoints_of_earlier_versions_load(tmp_path):
    save_steps(tmp_path, 3)
    (tmp_path / "checkpoints" / "3" / "SHA256SUMS").unlink()
    assert restored(tmp_path) == (3, 3.0)


def test_summary_belongs_to_its_configuration(tmp_path):
    config, other = (ConfigDict({**CONFIG, "seed": seed}) for seed in (0, 1))

    def open_and_finish(config):
        with runs.open_run(tmp_path, config) as run:
            if run.summary is None:
                run.save(1, {"w": jnp.zeros(2)})
                run.finish({"seed": config.seed})
            return run.summary["seed"]

    assert open_and_finish(config) == 0
    stored = tmp_path / "config.json"
    text = stored.read_text()
    stored.unlink()
    with pytest.raises(ValueError, match="no config.json, so their configuration is"):
        open_and_finish(other)
    assert open_and_finish(config) == 0 and stored.read_text() == text
    stored.write_text(text.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(ValueError, match="was not written with the configuration"):
        open_and_finish(other)
    # A summary of an earlier version has no hash.
    stored.write_text(text)
    summary = files.read_json(tmp_path / "summary.json")
    del summary["config_sha256"]
    files.write_json(tmp_path / "summary.json", summary)
    assert open_and_finish(config) == 0
    stored.unlink()
    with pytest.raises(ValueError, match="no config.json"):
        open_and_finish(config)


def test_folder_without_results_takes_another_config(tmp_path):
    """Neither runs that only started nor metrics of step 0 are results."""
    inner = tmp_path / "seed0"
    for seed in (0, 1):
        config = ConfigDict({**CONFIG, "seed": seed})
        with runs.open_run(tmp_path, config), runs.open_run(inner, config) as run:
            run.restore({"w": jnp.zeros(2)})
            run.log(0, {"loss": 1.0}, num_steps=2)
    assert runs.load_config(tmp_path).seed == runs.load_config(inner).seed == 1
    with runs.open_run(inner, config) as run:
        run.log(1, {"loss": 1.0}, num_steps=2)
    with (
        pytest.raises(ValueError, match="seed is 1 there and 0 here"),
        runs.open_run(tmp_path, ConfigDict({**CONFIG, "seed": 0})),
    ):
        pass


HOLD = """
import fcntl, os, sys, time
with open(sys.argv[1] + "/.lock", "a+") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write(f"process {os.getpid()} on another host")
    file.flush()
    print("held", flush=True)
    time.sleep(60)
"""


def test_second_process_is_refused_and_a_killed_one_replaced(tmp_path, capsys):
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, cwd=ROOT
    )
    with first:
        assert first.stdout.readline() == b"held\n"
        with (
            pytest.raises(
                ValueError, match=f"in use by process {first.pid} on another host"
            ),
            runs.open_run(tmp_path, ConfigDict(CONFIG)),
        ):
            pass
        first.kill()
    with runs.open_run(tmp_path, ConfigDict(CONFIG)):
        assert f"from process {first.pid} on" in capsys.readouterr().out
        with (
            pytest.raises(ValueError, match=f"in use by process {os.getpid()} on "),
            runs.open_run(tmp_path, ConfigDict(CONFIG)),
        ):
            pass
    with runs.open_run(tmp_path, ConfigDict(CONFIG)):
        assert not capsys.readouterr().out


class Touch:
    """Makes a folder when pickle loads it."""

    def __reduce__(self):
        return os.mkdir, ("marker",)


OBJECTS = np.empty(2, object)
OBJECTS[0] = Touch()
PICKLE = pickle.dumps(Touch())
YAML = b"!!python/object/apply:os.mkdir ['marker']\n"
JSON = b'{"py/reduce": [{"py/function": "os.mkdir"}, {"py/tuple": ["marker"]}]}'
PYTHON = b"import os; os.mkdir('marker')\n"


def hostile_files():
    """{name: contents} of files that make a folder if their reader is naive."""
    npz, npy = io.BytesIO(), io.BytesIO()
    np.savez(npz, latent=OBJECTS, image=OBJECTS, cls=OBJECTS, w=OBJECTS)
    np.save(npy, OBJECTS)
    kinds = {
        "pickle": PICKLE,
        "old_pickle": pickle.dumps(Touch(), 0),
        "objects": npz.getvalue(),
        "array": npy.getvalue(),
        "yaml": YAML,
        "json": JSON,
        "python": PYTHON,
    }
    suffixes = (".npz", ".safetensors", ".json", ".jsonl", ".png")
    return {kind + suffix: kinds[kind] for kind in kinds for suffix in suffixes}


READERS = {
    ".npz": (
        functa.load_functaset,
        functa.deepmind.load_checkpoint,
        vit.load_checkpoint,
        files.read_npz,
    ),
    ".safetensors": (vit.load_checkpoint,),
    ".json": (files.read_json,),
    ".jsonl": (files.read_metrics,),
    ".png": (data.read_image,),
}


def test_hostile_files_execute_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hostile = hostile_files()
    assert len(hostile) >= 20
    for name, contents in hostile.items():
        path = Path(name)
        path.write_bytes(contents)
        for read in READERS[path.suffix]:
            with contextlib.suppress(ValueError):
                value = read(path)
                # JSON is data, and a last line that is cut is dropped.
                assert value == [] or path.name == "json.json"
        assert not Path("marker").exists(), name
    # The attacks are real.
    np.load("objects.npz", allow_pickle=True)["w"]
    Path("marker").rmdir()
    yaml.unsafe_load(YAML)
    assert Path("marker").exists()


@pytest.mark.parametrize(
    "contents", [PICKLE, YAML, JSON, PYTHON], ids=["pickle", "yaml", "json", "python"]
)
def test_hostile_run_folders_execute_nothing(tmp_path, monkeypatch, contents):
    monkeypatch.chdir(tmp_path)
    save_steps(tmp_path / "run", 1)
    step = tmp_path / "run" / "checkpoints" / "1"
    (step / "SHA256SUMS").unlink()
    for path in [p for p in step.rglob("*") if p.is_file()]:
        whole = path.read_bytes()
        path.write_bytes(contents)
        with contextlib.suppress(ValueError):
            # Not every file is needed.
            assert runs.load_checkpoint(tmp_path / "run")[1]["w"][0] == 1
        path.write_bytes(whole)
    for name in ("config.json", "summary.json", "inputs.json", "metrics.jsonl"):
        path = tmp_path / "run" / name
        whole = path.read_bytes() if path.exists() else None
        path.write_bytes(contents)
        with contextlib.suppress(ValueError):
            restored(tmp_path / "run")
        path.unlink() if whole is None else path.write_bytes(whole)
    assert not Path("marker").exists()


def test_files_that_are_no_files_do_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        for read in (files.read_json, files.read_metrics, files.read_npz):
            with pytest.raises(ValueError, match=f"{path} is not a regular file"):
                read(path)
    for name, text in (("deep", "[" * 100_000), ("bytes", "\udcff"), ("half", "{")):
        path = tmp_path / name
        path.write_text(text, errors="surrogateescape")
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            files.read_json(path)
    (tmp_path / "list.jsonl").write_text('[1]\n{"step": 1}\n')
    with pytest.raises(ValueError, match="list.jsonl, line 1, is damaged"):
        files.read_metrics(tmp_path / "list.jsonl")


def test_no_run_and_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        runs.load_checkpoint(tmp_path)
    with runs.open_run(tmp_path, ConfigDict(CONFIG)):
        pass
    with pytest.raises(FileNotFoundError, match="has no checkpoints.$"):
        runs.load_checkpoint(tmp_path)
    for seed in (1, 0):
        (tmp_path / f"seed{seed}" / "checkpoints").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="one of .* seed0, seed1: .*/seed0$"):
        runs.load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"a"')
    with pytest.raises(ValueError, match="config.json is damaged"):
        runs.load_checkpoint(tmp_path)
    for text, message in (
        ("[1]", r"must hold a JSON object, got \[1\]"),
        ('{"experiment": []}', "is not a configuration of this version"),
        ('{"experiment": "prune_vit"}', "is not a configuration of this version"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=f"config.json {message}"):
            runs.load_checkpoint(tmp_path)


def test_check_finite_names_the_step():
    loop.check_finite(np.array([1.0, 2.0]), first_step=8)
    with pytest.raises(ValueError, match="loss is nan at step 9"):
        loop.check_finite(np.array([1.0, np.nan, np.inf]), first_step=8)


def test_home_directory_is_expanded_in_every_option(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of me")
    given = ["~/a", "--workdir=~", "--config.dataset.data_dir=~/b=c", "--x=a~b", "-y"]
    monkeypatch.setattr(sys, "argv", ["command", *given])
    launch.expand_home()
    home = "/home/of me"
    assert sys.argv[1:] == [
        f"{home}/a",
        f"--workdir={home}",
        f"--config.dataset.data_dir={home}/b=c",
        "--x=a~b",
        "-y",
    ]
    monkeypatch.setattr(sys, "argv", ["command", "--workdir=~no-such-user/runs"])
    with pytest.raises(ValueError, match="there is no such home directory") as caught:
        launch.expand_home()
    assert launch.is_of_user(caught.value)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--config.dataset.name=folder", "needs a directory"),
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
