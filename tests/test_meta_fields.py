"""meta_learn on fields over the sphere, over time and over voxels."""

import ml_collections
import numpy as np
import pytest

import functa
from experiments import meta_learn
from experiments.common import data, fields
from experiments.configs import meta_learn as configs
from experiments.training import controls, encoding
from functa import plots

pytestmark = pytest.mark.usefixtures("unoptimized")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, shape",
    [
        ("winds", (8,)),
        ("speech", (40, 6)),
        ("furniture", (4, 4, 4, 4)),
    ],
)
def test_smoke_runs(tmp_path, name, shape):
    config = configs.get_config(f"smoke_{name}")
    summary = meta_learn.train_and_evaluate(config, tmp_path)
    whole = functa.load_functaset(tmp_path / "functaset.npz")
    loaded = data.load_dataset(f"synthetic_{name}", with_fields=True)
    num = {split: len(arrays["value"]) for split, arrays in loaded.splits.items()}
    assert whole.latent.shape == (num["train"] + num["test"], *shape)
    assert whole.config["class_names"] == loaded.class_names
    test = loaded.splits["test"]["value"][: summary["num_test_images"]]
    # The exported latents give the fields whose quality the summary states.
    learner = encoding.load_learner(tmp_path)
    coords, weight = encoding.points_of(learner.model, loaded)
    latents = whole.latent[whole.split == "test"][: len(test)]
    code = functa.functaset.render(
        learner.model, learner.params, latents, test.shape[1:-1], coords=coords
    )
    quality = controls.measure(
        loaded.splits["train"]["value"], test, code, loaded.weight
    )
    assert quality["psnr"] == pytest.approx(summary["test_psnr"], abs=0.01)
    assert quality["snr"] == pytest.approx(summary["test_snr"], abs=0.01)
    assert ("test_iou" in summary) == (name == "furniture")
    assert summary["pca_snr"] > 0
    assert (tmp_path / "figures" / "fields.png").exists()
    sizes = np.load(tmp_path / "arrays.npz")["code_sizes"]
    assert sizes.tolist() == [shape[-1]] * 2
    if name == "speech":
        samples = fields._read_clip(tmp_path / "sounds" / "0_signal.wav")
        shown = np.load(tmp_path / "arrays.npz")["signals"][0, :, 0]
        assert samples / 2**15 == pytest.approx(shown, abs=1e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"coarse_steps": 5}, "coarse_steps is for images"),
        ({"num_pixels": 313}, "num_pixels must be at most 312"),
        ({"by_cells": True}, "by_cells needs model.type SpatialSiren"),
    ],
)
def test_bad_settings(tmp_path, changes, message):
    config = configs.get_config("smoke_winds")
    config.update(changes)
    with pytest.raises(ValueError, match=message):
        meta_learn.train_and_evaluate(config, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "plot", "label"),
    [
        # 32 training months differ from their mean in 31 directions, 29 sounds in 28.
        ("winds", "globes", "EOF, 31 numbers"),
        ("speech", "waveforms", "principal components, 28 numbers"),
    ],
)
def test_one_latent_for_a_signal(tmp_path, monkeypatch, name, plot, label):
    config = configs.get_config(f"smoke_{name}")
    config.model = ml_collections.ConfigDict(
        {"type": "ModulatedSiren", "width": 16, "depth": 3, "out_channels": None}
    )
    config.update({"num_steps": 1, "write_functaset": False, "warm_start_steps": 0})
    config.by_cells = False
    labels = []
    draw = getattr(plots, plot)

    def record(signals, codes, *args, **options):
        labels.extend(codes)
        return draw(signals, codes, *args, **options)

    monkeypatch.setattr(plots, plot, record)
    meta_learn.train_and_evaluate(config, tmp_path)
    assert labels == ["field, 32 numbers", label]
    assert (tmp_path / "sounds" / "3_control.wav").exists() == (name == "speech")
