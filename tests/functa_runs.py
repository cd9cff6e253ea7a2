"""Finished runs of meta_learn and classify_functa on digits, with random weights."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import functa
from experiments import classify_functa
from experiments.common import data, runs
from experiments.configs import classify_functa as classify_configs
from experiments.configs import meta_learn as meta_configs
from experiments.networks import heads
from experiments.training import encoding
from functa import functaset


class Runs(NamedTuple):
    """The folder with meta/, classify/ and functaset.npz, and what they hold."""

    folder: Path
    whole: functa.Functaset
    head: heads.Head
    params: Any


def make_runs(folder: Path, num: dict[str, int]) -> Runs:
    """Writes the runs; `num` is {split: number of latents}."""
    config = meta_configs.get_config("smoke_spatial")
    config.model.update({"out_channels": 1, "kernel_size": 3})
    config.cell = (4, 4)
    model = functaset.make_model(config.model.to_dict())
    latent = model.initial_latent()
    coords = functa.coordinate_grid((8, 8))
    params = jax.jit(model.init)(jax.random.key(0), coords, latent)["params"]
    weights = {"params": params, "learning_rate": np.full((3, 3), 0.1, np.float32)}
    with runs.open_run(folder / "meta", config) as run:
        run.save(1, {"weights": weights, "latent": latent})
        run.finish({"test_psnr": 0.0})
    params = encoding.load_learner(folder / "meta").params
    digits = data.load_dataset("digits").splits
    rng = np.random.default_rng(0)
    latents = rng.normal(0, 0.4, (sum(num.values()), *model.latent_shape))
    train = latents[: num["train"]]
    whole = functa.Functaset(
        latent=np.float32(latents),
        label=np.concatenate([digits[k]["label"][:n] for k, n in num.items()]),
        psnr=np.zeros(len(latents), np.float32),
        split=np.repeat(list(num), list(num.values())),
        mean=np.float32(train.mean((0, 1, 2))),
        std=np.float32(train.std((0, 1, 2))),
        config={"model": config.model.to_dict(), "dataset": "digits"},
        params_sha256=functaset.hash_params(params),
    )
    functa.save_functaset(folder / "functaset.npz", whole)
    config = classify_configs.get_config("smoke")
    config.functaset = str(folder / "functaset.npz")
    config.batch_size = 8
    head = heads.make_head(config.model.to_dict(), 10, model.latent_shape)
    best = jax.tree.map(
        lambda x: np.stack([0 * x, x]), jax.jit(head.init)(jax.random.key(1))
    )
    inputs = classify_functa.load_signals(config, config.functaset).digests
    with runs.open_run(folder / "classify", config, inputs=inputs) as run:
        run.save(
            4, {"best": {"params": best, "accuracy": np.array([0.1, 0.2], np.float32)}}
        )
        run.finish({"test_accuracy": 0.1})
    return Runs(folder, whole, head, jax.tree.map(lambda x: x[1], best))


def copy_at_first_save(monkeypatch, workdir: Path, copy: Path) -> None:
    """Copies `workdir` when it is first saved, as a kill at this moment leaves it."""
    save = runs.Run.save

    def save_and_copy(self, step, state):
        save(self, step, state)
        if not copy.exists():
            shutil.copytree(workdir, copy)

    monkeypatch.setattr(runs.Run, "save", save_and_copy)
