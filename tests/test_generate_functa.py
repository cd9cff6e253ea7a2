"""generate_functa: the smoke run on a field of random weights, and bad inputs."""

import shutil

import jax
import numpy as np
import pytest
from functa_runs import copy_at_first_save, make_runs

import functa
from experiments import generate_functa
from experiments.common import data, files, runs
from experiments.configs import generate_functa as configs
from experiments.drawing import figures
from experiments.training import flow
from functa import functaset, generation

pytestmark = pytest.mark.usefixtures("unoptimized")

NUM = {"train": 64, "test": 24}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return make_runs(tmp_path_factory.mktemp("runs"), NUM)


def smoke(folder, **changes):
    config = configs.get_config("smoke")
    config.run = str(folder / "meta")
    config.functaset = str(folder / "functaset.npz")
    config.classifier = str(folder / "classify")
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in changes.items()}
    )
    return config


@pytest.mark.slow
def test_smoke_run_stopped_and_resumed_ends_as_one_left_alone(
    trained, tmp_path, monkeypatch
):
    config = smoke(trained.folder, sampling__classes=(3, 1))
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    with monkeypatch.context() as patch:
        copy_at_first_save(patch, whole, stopped)
        summary = generate_functa.train_and_evaluate(config, whole)
    assert [m["step"] for m in files.read_metrics(stopped / "metrics.jsonl")] == [5, 10]
    resumed = generate_functa.train_and_evaluate(config, stopped)
    assert resumed | {"seconds": 0} == summary | {"seconds": 0}
    first, second = (
        files.read_npz(folder / "arrays.npz") for folder in (whole, stopped)
    )
    assert first.keys() == second.keys()
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name])
    assert generate_functa.train_and_evaluate(config, whole) == summary

    # A source that was measured is not measured again, and nothing is drawn again.
    (stopped / "summary.json").unlink()
    measured = files.read_json(stopped / "measures.json")
    measured["train"]["accuracy_score"] = 2.0
    del measured["samples"]
    files.write_json(stopped / "measures.json", measured)
    with monkeypatch.context() as patch:
        patch.setattr(generate_functa.flow, "draw", None)
        again = generate_functa.train_and_evaluate(config, stopped)
    assert again["train"]["accuracy_score"] == 2.0
    assert again["samples"] == summary["samples"]

    # The samples are a functaset of the same field, which renders them at any size.
    samples = functa.load_functaset(whole / "samples.npz")
    params = generate_functa.load_signals(config, 0).learner.params
    assert samples.latent.shape == (64, 2, 2, 3)
    counts = np.bincount(trained.whole.label[:64], minlength=10)
    np.testing.assert_array_equal(np.bincount(samples.label, minlength=10), counts)
    assert functa.reconstruct(samples, params, 12).shape == (64, 12, 12, 1)
    # The images in the figures are the samples, rounded to 8 bits.
    exact = np.clip(255 * functa.reconstruct(samples, params, 8)[:12], 0, 255)
    assert np.abs(exact - first["samples"]).max() < 0.51
    assert first["rows"].shape == (20, 8, 8, 1)
    assert first["row_labels"].tolist() == [3, 1]
    assert first["large"].shape[1:] == (32, 32, 1)

    assert (summary["num_train"], summary["num_compared"]) == (64, 24)
    assert summary["compared_with"] == "test"
    assert summary["classifier_sha256"] == functaset.hash_params(trained.params)
    for source in ("train", "reconstructions", "samples", "gaussian"):
        for extractor in ("classifier", "random"):
            found = summary[source][extractor]
            assert found["frechet_distance"] > 0 and 0 <= found["coverage"] <= 1
        assert 0 <= summary[source]["accuracy_score"] <= 1
    # The measures of the training images follow from the files alone.
    images = data.load_dataset("digits").splits
    fake = np.random.default_rng(0).permutation(64)[:24]
    fake = images["train"]["image"][:64][fake]
    real = images["test"]["image"][:24]
    fake, real = map(generate_functa.make_random_network((8, 8, 1)), (fake, real))
    found = summary["train"]["random"]
    distance = generation.frechet_distance(fake, real)
    assert found["frechet_distance"] == pytest.approx(distance, rel=1e-3)
    _, coverage = generation.density_and_coverage(real, fake)
    assert found["coverage"] == pytest.approx(coverage, abs=0.05)
    for name in ("training", "samples", "sources", "large", "nearest", "measures"):
        path = whole / "figures" / f"{name}.png"
        path.unlink()
        figures.draw(whole)
        assert path.stat().st_size > 0


def test_images_without_labels_need_a_flow_without_classes(trained, tmp_path):
    digits, images = data.load_dataset("digits").splits, tmp_path / "images"
    images.mkdir()
    for split, num in NUM.items():
        np.savez(images / f"{split}.npz", image=digits[split]["image"][:num])
    path = tmp_path / "functaset.npz"
    functa.save_functaset(
        path,
        trained.whole._replace(
            label=np.full(88, -1), config=trained.whole.config | {"dataset": "npz"}
        ),
    )
    config = smoke(
        trained.folder, functaset=str(path), classifier=None, data_dir=str(images)
    )
    refused(config, tmp_path / "run", "without a label .-1.; set conditional=False")
    config.conditional = False
    signals = generate_functa.load_signals(config, 0)
    assert signals.classes == () and signals.num_classes == 0


def test_other_labels_are_another_functaset(trained, tmp_path):
    config = smoke(trained.folder)
    label = "labels or normalization of the functaset"
    with runs.open_run(tmp_path, config, inputs={label: "0" * 64}) as run:
        run.save(1, {"params": np.zeros(1)})
    with pytest.raises(ValueError, match=f"the {label} of .* has changed"):
        generate_functa.train_and_evaluate(config, tmp_path)


@pytest.mark.slow
def test_flow_without_classes_compared_with_held_out_images(trained, tmp_path):
    config = smoke(
        trained.folder,
        conditional=False,
        classifier=None,
        num_validation=24,
        num_images=0,
        seeds=(0, 1),
    )
    summary = generate_functa.train_and_evaluate(config, tmp_path / "run")
    assert summary["compared_with"] == "validation"
    assert (summary["num_train"], summary["num_compared"]) == (40, 24)
    assert summary["samples.random.frechet_distance_std"] > 0
    inner = summary["runs"]["seed0"]
    assert "classifier" not in inner["samples"]
    assert "accuracy_score" not in inner["samples"]
    metrics = files.read_metrics(tmp_path / "run" / "seed0" / "metrics.jsonl")
    assert all("held_out_loss" in line for line in metrics)
    samples = functa.load_functaset(tmp_path / "run" / "seed0" / "samples.npz")
    assert set(samples.label) == {-1}


@pytest.mark.slow
def test_a_sample_does_not_depend_on_the_others(trained):
    config = smoke(trained.folder, sampling__batch_size=4)
    model = flow.make_model(config, 10)
    rng = np.random.default_rng(0)
    latents = np.float32(rng.normal(size=(40, 2, 2, 3)))
    part = flow.Part(latents, np.arange(40, dtype=np.int32) % 10)
    params, gaussians = flow.init_state(config, model, part).sampled
    params = jax.tree.map(lambda x: np.float32(0.2 * rng.normal(size=x.shape)), params)
    labels = np.arange(6, dtype=np.int32)
    six = flow.draw(config, model, (params, gaussians), labels, (2, 2, 3))
    five = flow.draw(config, model, (params, gaussians), labels[:5], (2, 2, 3))
    assert six.shape == (6, 2, 2, 3) and np.isfinite(six).all()
    np.testing.assert_allclose(six[:5], five, rtol=1e-4, atol=1e-5)
    assert np.abs(six[0] - six[1]).max() > 1e-3


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("shape", [(3, 7, 12, 3), (6, 8, 8, 1)])
def test_random_features_of_images_of_any_size(shape):
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    network = generate_functa.make_random_network(shape[1:])
    features = network(images)
    assert features.shape == (len(images), 128)
    assert np.linalg.norm(features[0] - features[1]) > 1e-3
    np.testing.assert_allclose(features[:2], network(images[:2]), atol=1e-4)


def refused(config, workdir, message, error=ValueError):
    with pytest.raises(error, match=message) as caught:
        generate_functa.train_and_evaluate(config, workdir)
    assert "\n" not in str(caught.value)
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("sampling__classes", (10,), "class 10 is not trained; .* has the classes 0, "),
        ("sampling__num_steps", 0, "sampling.num_steps must be at least 1"),
        ("sampling__guidance", -1.0, "sampling.guidance must be at least 0"),
        ("label_dropout", 1.5, r"label_dropout must be in \[0, 1\]"),
        ("model__num_heads", 3, "model.hidden_size 16 must be a multiple of"),
        ("model__mlp_dim", 0, "model.mlp_dim must be at least 1"),
        ("batch_size", 15, "a batch of 15 cannot be split over 2 devices"),
        ("num_validation", 64, "num_validation must be below the 64 training images"),
        ("num_validation", 19, "needs 20 training images.* got 45, 19 and 64"),
        ("num_images", 19, "needs 20 training images.* got 64, 24 and 19"),
        ("num_validation", 63, "needs 20 training images.* got 1, 63 and 64"),
        ("optimizer__name", "adman", "optax has no optimizer 'adman'"),
    ],
)
def test_bad_fields_are_refused(trained, tmp_path, field, value, message):
    refused(smoke(trained.folder, **{field: value}), tmp_path / "run", message)


def test_a_class_of_one_image_is_refused(trained):
    with pytest.raises(ValueError, match="class 1 has one training image"):
        generate_functa._check_classes(
            smoke(trained.folder), "functaset.npz", np.array([0, 0, 1])
        )


def test_classes_need_a_flow_with_classes(trained, tmp_path):
    for changes in {"sampling__classes": (1,)}, {"sampling__guidance": 2.0}:
        config = smoke(trained.folder, conditional=False, **changes)
        refused(config, tmp_path / "run", "need conditional=True")


def test_guidance_needs_signals_of_no_class(trained, tmp_path):
    config = smoke(trained.folder, label_dropout=0.0, sampling__guidance=2.0)
    refused(config, tmp_path / "run", "sampling.guidance needs label_dropout above 0")


def test_samples_are_fitted_with_the_steps_of_the_functaset(trained, tmp_path):
    folder, whole, *_ = trained
    path = tmp_path / "functaset.npz"
    config = smoke(folder, functaset=str(path))
    for num_steps in (2, 3):  # The run itself has 3.
        inner = {"num_steps": num_steps}
        functa.save_functaset(
            path, whole._replace(config=whole.config | {"inner": inner})
        )
        learner = generate_functa.load_signals(config, 0).learner
        assert learner.inner["num_steps"] == num_steps
        assert len(learner.learning_rate) == num_steps
    for inner in ({"num_steps": 1.5}, 3, {"num_steps": -1}):
        functa.save_functaset(
            path, whole._replace(config=whole.config | {"inner": inner})
        )
        refused(config, tmp_path / "run", "inner must hold num_steps")


def test_other_latents_and_runs_are_refused(trained, tmp_path):
    folder, whole, *_ = trained
    path, workdir = tmp_path / "functaset.npz", tmp_path / "run"

    def with_functaset(message, **changes):
        functa.save_functaset(path, whole._replace(**changes))
        refused(smoke(folder, functaset=str(path)), workdir, message)

    with_functaset("were fitted with other weights", params_sha256="0" * 64)
    with_functaset("has the latents of padded images", config={"padding": 1})
    with_functaset("does not name the data set", config={})
    names = whole.config | {"class_names": {"0": "zero"}}
    with_functaset("class_names must be a list of at least 10 names", config=names)
    copies = whole.config | {"copies": 7}
    with_functaset("64 training signals are not 7 copies", config=copies)
    with_functaset("has no test split", split=np.full(len(whole.split), "train"))
    with_functaset("labels differ", label=whole.label[::-1].copy())
    for name, field, error, message in (
        ("no.npz", "functaset", FileNotFoundError, "there is no functaset"),
        ("classify", "run", ValueError, "is not a run of meta_learn"),
        ("meta", "classifier", ValueError, "is not a run of classify_functa on"),
        ("nowhere", "classifier", FileNotFoundError, "is not finished"),
    ):
        refused(smoke(folder, **{field: str(folder / name)}), workdir, message, error)
    functa.save_functaset(
        folder / "other.npz", whole._replace(config={"dataset": "letters"})
    )
    classifier = tmp_path / "classify"
    shutil.copytree(folder / "classify", classifier)
    config = files.read_json(classifier / "config.json")
    files.write_json(
        classifier / "config.json", config | {"functaset": str(folder / "other.npz")}
    )
    refused(
        smoke(folder, classifier=str(classifier)),
        workdir,
        "classifies letters, and the latents here are those of digits",
    )
