"""Several devices and processes: the results of one device; kills and resumption."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from experiments import meta_learn
from experiments.common import devices, files, runs
from experiments.configs import meta_learn as configs

ROOT = Path(__file__).parents[1]


def start(command, num_devices=1, **kwargs):
    """Starts `python ...` with so many virtual devices."""
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(num_devices)}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **kwargs,
    )


def finish(*processes):
    for process in processes:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output


# One step or more of every trainer, each with a batch of 16 that devices share.
EVERY_TRAINER = """
import sys
import jax, numpy as np, optax
import functa
from experiments.common import devices
from experiments.configs import fit_image as fit_configs
from experiments.configs import meta_learn as meta_configs
from experiments.networks.vgg import VGG
from experiments.training import classifier, encoding, meta, siren

rng = np.random.default_rng(0)
results = {"num_devices": np.array(jax.device_count())}

config = meta_configs.get_config("smoke")
config.model.out_channels = 1
config.points_per_group = 64
# Adam would turn the rounding of a gradient near zero into a step.
config.optimizer.update({"name": "sgd", "schedule": "constant", "warmup_steps": 0})
model = functa.make_model(config.model.to_dict())
optimizer = meta.make_optimizer(config)
state = meta.init_state(config, model, optimizer)
update = meta.make_update(config, model, optimizer)
images = rng.integers(0, 256, (19, 8, 8, 1), dtype=np.uint8)
for step in range(2):
    coords, targets = meta.make_batch(config, images, step)
    targets = devices.divide(targets)
    state, *info = update(state, coords, targets, jax.random.key(step))
results["meta_learn"] = state.weights, info
learner = encoding.make_learner(config, vars(state))
encoded = zip(*encoding.encode(learner, images, batch_size=5), strict=True)
results["encode"] = [np.concatenate(parts) for parts in encoded]

pixels = rng.integers(0, 256, (48, 8, 8, 3), dtype=np.uint8)
labels = rng.integers(0, 10, 48).astype(np.int32)
scale = np.full((1, 1, 1, 3), 0.5, np.float32)
images = classifier.Images((pixels, labels), (pixels, labels), scale, scale, 10)
model = VGG(stages=((4,), (6,)), hidden=(5, 5), num_classes=10, batch_norm=True)
optimizer = optax.sgd(0.1)
variables = classifier.init_variables(model, images, 0)
state = classifier.init_state(variables, optimizer, 3)
update = classifier.make_update(
    model, images, optimizer, batch_size=16, augmented=True, seed=0
)
state = update(state, 0, 3)
results["classifier"] = state.params, state.batch_stats, state.loss
results["logits"] = classifier.make_predict(model, images)(
    state.variables, pixels[:13]
)

config = fit_configs.get_config("smoke")
config.model.out_channels = 3
config.optimizer.name, config.optimizer.options = "sgd", {}
task = siren.Task("task", pixels[:2], labels[:2], 10, (10,))
model = functa.Siren(**{k: v for k, v in config.model.items() if k != "type"})
state = siren.init_state(config, model, task)
update = siren.make_update(config, model, task)
results["fit_image"] = update(state, 0, 2).loss[:2]

leaves = jax.tree_util.tree_leaves_with_path(results)
np.savez(sys.argv[1], **{jax.tree_util.keystr(k): np.asarray(v) for k, v in leaves})
"""


@pytest.mark.slow
def test_eight_devices_give_the_numbers_of_one(tmp_path):
    paths = {num_devices: tmp_path / f"{num_devices}.npz" for num_devices in (1, 8)}
    finish(*(start(["-c", EVERY_TRAINER, str(paths[n])], n) for n in paths))
    one, eight = (dict(np.load(path)) for path in paths.values())
    assert one.pop("['num_devices']") == 1 and eight.pop("['num_devices']") == 8
    assert one.keys() == eight.keys() and len(one) > 30
    for name in one:
        np.testing.assert_allclose(
            one[name], eight[name], rtol=1e-5, atol=1e-6, err_msg=name
        )


def test_batch_that_devices_do_not_divide_is_refused(tmp_path):
    assert jax.device_count() == 2
    with pytest.raises(ValueError, match="batch of 3 cannot be split over 2 devices"):
        devices.divide(np.zeros((3, 4)))
    config = configs.get_config("smoke")
    config.batch_size = 15
    with pytest.raises(ValueError, match="batch of 15 cannot be split"):
        meta_learn.train_and_evaluate(config, tmp_path)


def test_number_of_a_process_is_checked_before_connecting():
    with pytest.raises(ValueError, match="--process_id must be from 0 to 1, .*got 2"):
        devices.initialize("localhost:1", 2, 2)


def test_arrays_lie_where_they_should():
    x = np.arange(12.0).reshape(4, 3)
    parts = devices.divide({"x": x})["x"]
    assert [shard.data.shape for shard in parts.addressable_shards] == [(2, 3)] * 2
    copies = devices.replicate([x, None])[0]
    assert [shard.data.shape for shard in copies.addressable_shards] == [(4, 3)] * 2
    chex.assert_trees_all_equal(np.asarray(parts), np.asarray(copies), x)
    assert devices.replicate(copies) is copies


OPTIONS = {"num_steps": 200, "checkpoint_every": 10, "log_every": 10}


def start_two_processes(name, workdir, *options):
    """The processes 0 and 1 of a run of experiments.<name>, on loopback."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    return [
        start(
            [
                *("-m", f"experiments.{name}", f"--workdir={workdir}", *options),
                *("--multihost", f"--coordinator=localhost:{port}"),
                *("--num_processes=2", f"--process_id={i}"),
            ]
        )
        for i in range(2)
    ]


@pytest.mark.slow
def test_two_processes_are_killed_resume_and_write_what_one_writes(tmp_path):
    options = [
        "--config=experiments/configs/meta_learn.py:smoke",
        *(f"--config.{name}={value}" for name, value in OPTIONS.items()),
        "--config.write_functaset=False",
    ]
    log = tmp_path / "two" / "metrics.jsonl"
    killed, other = start_two_processes("meta_learn", tmp_path / "two", *options)[::-1]
    while len(files.read_metrics(log)) < 3 and killed.poll() is None:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    output, _ = other.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert other.returncode == 1
    assert "Traceback" not in output
    assert output.splitlines()[-1].startswith("error: process 1 of this run has ended")
    assert 3 <= len(files.read_metrics(log)) < 20
    finish(*start_two_processes("meta_learn", tmp_path / "two", *options))
    environment = files.read_json(tmp_path / "two" / "environment.json")
    assert environment["num_processes"] == 2
    assert [m["step"] for m in files.read_metrics(log)] == [*range(10, 201, 10)]

    config = configs.get_config("smoke")
    config.update(OPTIONS | {"write_functaset": False})
    expected = meta_learn.train_and_evaluate(config, tmp_path / "one")
    resumed = runs.load_summary(tmp_path / "two")
    assert resumed.keys() == expected.keys()
    for name in expected.keys() - {"seconds"}:
        np.testing.assert_allclose(resumed[name], expected[name], rtol=1e-4)

    # The functaset: 1,797 images in three shards.
    options = [
        "--config=experiments/configs/make_functaset.py:digits",
        f"--config.run={tmp_path / 'two'}",
    ]
    one = ["-m", "experiments.make_functaset", f"--workdir={tmp_path / 'f1'}", *options]
    finish(*start_two_processes("make_functaset", tmp_path / "f2", *options))
    finish(start(one))
    with (
        np.load(tmp_path / "f1" / "functaset.npz") as expected,
        np.load(tmp_path / "f2" / "functaset.npz") as actual,
    ):
        assert set(actual.files) == set(expected.files)
        for name in expected.files:
            assert actual[name].dtype == expected[name].dtype
            assert actual[name].tobytes() == expected[name].tobytes(), name
    assert not list((tmp_path / "f2").glob("*.parts"))
