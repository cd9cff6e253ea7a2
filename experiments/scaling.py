"""Measures the start-up time, the scaling over devices and the memory of processes.

    python -m experiments.scaling --config=experiments/configs/scaling.py:cpu

Each number is measured in a separate process. Virtual devices share the same cores.
They show the overhead of dividing the work, not a speed-up.
"""

import concurrent.futures
import multiprocessing
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import functa
from experiments.common import devices, launch, runs, settings
from experiments.configs import meta_learn as meta_configs
from experiments.configs import scaling as configs
from experiments.drawing import figures
from experiments.training import encoding, meta

_PACKAGES = ("functa", "vit", "landscape", "lbi")


def train_and_evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs all measurements; returns the summary."""
    settings.check(config, configs.RULES)

    def measure(run):
        _check_devices(config.num_devices, jax.devices())
        summary = {}
        for package in _PACKAGES:
            times = [_time_import(package) for _ in range(config.num_starts)]
            summary[f"import_{package}_seconds"] = float(np.median(times))
        with tempfile.TemporaryDirectory() as folder:
            starts = []
            for number in range(1 + config.num_starts):
                starts.append(_time_first_step(Path(folder) / f"run{number}"))
                run.say(f"first step of digits after {starts[-1]:.1f} s")
        summary["first_step_nothing_compiled_seconds"] = starts[0]
        summary["first_step_seconds"] = float(np.median(starts[1:]))
        rates, encoded = [], []
        for num_devices in config.num_devices:
            rates.append(_in_process(_time_meta_step, config, num_devices=num_devices))
            run.say(f"{num_devices} devices: {rates[-1]:.4g} images/s")
        for num_images in config.num_images:
            encoded.append(_in_process(_encode, config, num_images))
            run.say(
                "{:,} images encoded: {:.4g} images/s, {:.0f} MiB".format(
                    num_images, *encoded[-1]
                )
            )
        per_second, peak = zip(*encoded, strict=True)
        summary |= {
            "num_devices": config.num_devices,
            "images_per_second": rates,
            "num_images": config.num_images,
            "encoded_per_second": per_second,
            "peak_mebibytes": peak,
        }
        figures.draw(run.workdir, summary)
        return summary

    return runs.run_once(workdir, config, measure)


def _check_devices(num_devices, found):
    """Only a CPU can be divided into virtual devices; other processes find them all."""
    if found[0].platform != "cpu" and set(num_devices) != {len(found)}:
        raise ValueError(
            f"num_devices must be {len(found)}, the devices of {found[0].platform}; "
            f"got {num_devices}. For virtual devices set JAX_PLATFORMS=cpu."
        )


def _time_import(package):
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {package}"], check=True)
    return time.perf_counter() - started


def _time_first_step(workdir):
    """Seconds from the start of `meta_learn` to the line of its first step."""
    options = [f"--config.{name}=1" for name in ("num_steps", "log_every")]
    command = [
        sys.executable,
        "-m",
        "experiments.meta_learn",
        f"--workdir={workdir}",
        *options,
        "--config.checkpoint_every=1",
    ]
    env = os.environ.copy()
    # This variable names a cache that other runs have filled.
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    started = time.perf_counter()
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith("step 1/1"):
                break
        else:
            raise ValueError(
                f"{shlex.join(command)} ended before its first step; its error is "
                "above."
            )
        seconds = time.perf_counter() - started
        process.kill()
    return seconds


def _in_process(function, *args, num_devices=1):
    """Runs a function in a new process with `num_devices` virtual CPU devices."""
    before = os.environ.get("JAX_NUM_CPU_DEVICES")
    os.environ["JAX_NUM_CPU_DEVICES"] = str(num_devices)
    try:
        with concurrent.futures.ProcessPoolExecutor(
            1, mp_context=multiprocessing.get_context("spawn")
        ) as executor:
            return executor.submit(function, *args).result()
    finally:
        del os.environ["JAX_NUM_CPU_DEVICES"]
        if before is not None:
            os.environ["JAX_NUM_CPU_DEVICES"] = before


def _time_meta_step(config):
    """Images per second of the outer step of meta_learn's cifar10_cpu variant."""
    meta_config = meta_configs.get_config("cifar10_cpu")
    meta_config.model.out_channels = 3
    meta_config.batch_size = config.images_per_device * jax.device_count()
    model = functa.make_model(meta_config.model.to_dict())
    optimizer = meta.make_optimizer(meta_config)
    state = meta.init_state(meta_config, model, optimizer)
    update = meta.make_update(meta_config, model, optimizer)
    rng = np.random.default_rng(config.seed)
    shape = (meta_config.batch_size, 32, 32, 3)
    images = rng.integers(0, 256, shape, dtype=np.uint8)
    coords, targets = meta.make_batch(meta_config, images, 10**6)
    targets = devices.divide(targets)
    times = []
    for number in range(1 + config.num_rounds):
        started = time.perf_counter()
        state, *_ = update(state, coords, targets, jax.random.key(number))
        jax.block_until_ready(state)
        times.append(time.perf_counter() - started)
    return meta_config.batch_size / float(np.median(times[1:]))


class _Synthetic:
    """Images generated on access, so that the data set takes no memory."""

    def __init__(self, num_images):
        self.shape = (num_images, 8, 8, 1)
        self.dtype = np.dtype(np.uint8)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, part):
        start, stop, _ = part.indices(len(self))
        rng = np.random.default_rng(start)
        return rng.integers(0, 256, (stop - start, *self.shape[1:]), dtype=np.uint8)


def _encode(config, num_images):
    """Encodes synthetic images; returns images per second and the peak MiB."""
    meta_config = meta_configs.get_config("smoke")
    meta_config.model.out_channels = 1
    model = functa.make_model(meta_config.model.to_dict())
    optimizer = meta.make_optimizer(meta_config)
    state = meta.init_state(meta_config, model, optimizer)
    learner = encoding.make_learner(meta_config, vars(state))
    labels = np.zeros(num_images, np.int32)
    dataset = {"train": {"image": _Synthetic(num_images), "label": labels}}
    with tempfile.TemporaryDirectory() as folder:
        written = encoding.write_functaset(
            Path(folder) / "functaset.npz",
            learner,
            dataset,
            config={"dataset": "synthetic"},
            batch_size=config.encode_batch_size,
        )
    # Kilobytes on Linux, bytes on macOS.
    unit = 2**20 if sys.platform == "darwin" else 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return written["images_per_second"], peak


if __name__ == "__main__":
    launch.launch("scaling", train_and_evaluate)
