"""compress_functa: the smoke run on a field of random weights, and bad inputs."""

import shutil

import jax
import numpy as np
import pytest
from functa_runs import make_runs

import functa
from experiments import compress_functa
from experiments.common import data, files, streams
from experiments.configs import compress_functa as configs
from experiments.drawing import figures
from experiments.training import controls, encoding, latent_classifier

pytestmark = pytest.mark.usefixtures("unoptimized")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return make_runs(tmp_path_factory.mktemp("runs"), {"train": 64, "test": 16})


def smoke(folder, **changes):
    config = configs.get_config("smoke")
    config.run = str(folder / "meta")
    config.functaset = str(folder / "functaset.npz")
    for name, value in changes.items():
        config[name] = value
    return config


@pytest.mark.slow
def test_smoke_run(trained, tmp_path):
    folder, whole, head, params = trained
    config = smoke(
        folder,
        classifier=str(folder / "classify"),
        steps=(0.3, 4e-3),
        target_psnr=0.0,
        accuracy_bits=4.0,
    )
    summary = compress_functa.train_and_evaluate(config, tmp_path)
    assert summary["num_train_images"] == 64 and summary["num_test_images"] == 16
    assert summary["curves"].keys() == {"field", "klt_2x2", "jpeg"}
    field = summary["curves"]["field"]
    # The summary follows from the files and the weights alone.
    test = whole.select("test")
    images = data.load_dataset("digits").splits["test"]["image"][:16]
    learner = encoding.load_learner(folder / "meta")
    for number in range(2):
        path = tmp_path / "compressed" / f"field_{number}_test.functaz"
        codec = streams.load_codec(
            tmp_path / "compressed" / f"field_{number}_codec.npz"
        )
        assert str(codec.params_sha256) == whole.params_sha256
        encoded = streams.read_streams(path, codec)
        bits = 8 * sum(map(len, encoded)) / (16 * 64)
        assert field["bpp"][number] == pytest.approx(bits)
        decoded = streams.decode(codec, encoded)
        # The tables of 64 training latents do not reach every test latent.
        assert np.mean(np.abs(decoded - test.latent) <= codec.steps + 1e-6) > 0.95
        values = functa.reconstruct(
            test._replace(latent=decoded), learner.params, (8, 8)
        )
        exact = np.clip(np.round(255 * values), 0, 255)
        mse = np.square((exact - images) / 255).mean((1, 2, 3))
        # Values halfway between two gray levels may round otherwise.
        assert field["psnr"][number] == pytest.approx(
            np.mean(-10 * np.log10(mse)), abs=1e-3
        )
        logits = head.apply(params, (decoded - whole.mean) / whole.std)
        accuracy = np.mean(np.argmax(logits, -1) == test.label)
        assert field["accuracy"][number] == pytest.approx(accuracy)
    assert field["bpp"][0] > field["bpp"][1]
    # With fine steps the latents are those of the functaset.
    assert field["psnr"][0] == pytest.approx(summary["psnr_not_quantized"], abs=0.05)
    assert 0 < summary["excess_over_ideal"] < 0.5
    klt, jpeg = summary["curves"]["klt_2x2"], summary["curves"]["jpeg"]
    assert klt["psnr"][0] > 45 and klt["psnr"][0] > klt["psnr"][1]
    assert jpeg["psnr"][1] > jpeg["psnr"][0] and jpeg["bpp"][1] > jpeg["bpp"][0]
    for name in ("psnr_against_bits", "accuracy_against_bits"):
        path = tmp_path / "figures" / f"{name}.png"
        path.unlink()
        figures.draw(tmp_path)
        assert path.stat().st_size > 0
    assert compress_functa.train_and_evaluate(config, tmp_path) == summary
    # The accuracies of one classifier are not shown for another one at its place.
    known = files.read_json(tmp_path / "inputs.json")
    files.write_json(tmp_path / "inputs.json", known | {"classifier": "0" * 64})
    with pytest.raises(ValueError, match="the classifier of .* has changed since"):
        compress_functa.train_and_evaluate(config, tmp_path)
    assert files.read_json(tmp_path / "summary.json")["dataset"] == "digits"


@pytest.mark.slow
def test_further_steps_improve_the_latents(trained):
    folder, whole, *_ = trained
    config = smoke(folder, further_steps=5, batch_size=6)
    learner = encoding.load_learner(folder / "meta")
    images = data.load_dataset("digits").splits["test"]["image"][:16]
    field, split = encoding.make_field(learner, (8, 8))
    latents = whole.select("test").latent
    fitted = compress_functa.fit_further(
        field, latents, split(data.to_float(images)), config
    )
    render = encoding.make_render(field, 6)
    error = [
        np.square(render(x) - images / 255).mean((1, 2, 3)) for x in (latents, fitted)
    ]
    assert np.all(error[1] < error[0])


def test_scales_give_the_same_error_in_the_linear_part(trained):
    folder, whole, *_ = trained
    learner = encoding.load_learner(folder / "meta")
    field, _ = encoding.make_field(learner, (8, 8))
    fields = jax.jit(jax.vmap(field))
    latents = whole.select("train").latent
    scales = {
        kind: compress_functa.find_scales(field, latents, kind)
        for kind in ("slopes", "deviation")
    }
    deviation = latents.reshape(-1, latents.shape[-1]).std(0)
    np.testing.assert_allclose(
        scales["deviation"] / scales["deviation"][0],
        deviation / deviation[0],
        rtol=1e-4,
    )
    rng = np.random.default_rng(0)
    for scale in scales.values():
        noise = 1e-2 * scale * rng.choice([-1.0, 1.0], latents.shape)
        change = fields(np.float32(latents + noise)) - fields(latents)
        error = np.square(change).sum() / len(latents)
        # The variance of the noise times the 12 numbers of a latent.
        assert error == pytest.approx(latents[0].size * 1e-4, rel=0.15)
    with pytest.raises(ValueError, match="latents that differ; use scales=slopes"):
        compress_functa.find_scales(field, 0 * latents, "deviation")
    with pytest.raises(ValueError, match="field does not depend on the training"):
        compress_functa.find_scales(lambda latent: 0 * latent, latents, "slopes")


def refused(config, workdir, message, error=ValueError):
    with pytest.raises(error, match=message) as caught:
        compress_functa.train_and_evaluate(config, workdir)
    assert "\n" not in str(caught.value)
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", (0.1, 0.0), "steps must be .* each value above 0"),
        ("steps", (), "steps must be a non-empty tuple"),
        ("scales", "equal", "scales must be one of slopes, deviation, got 'equal'"),
        ("klt_grids", ((3, 2),), r"klt_grids: a grid of \(3, 2\) cells does not"),
        ("klt_grids", ((2,),), r"klt_grids must be .* \(h, w\) with integers"),
        ("model.family", "cauchy", "model.family must be one of histogram"),
        ("model.num_groups", 0, "model.num_groups must be at least 1"),
        ("codecs.jpeg", (0,), "codecs.jpeg must be .* at least 1 and at most 100"),
        ("codecs.webp", (101,), r"codecs.webp must be .* in \[0, 100\]"),
        ("batch_size", 0, "batch_size must be at least 1"),
    ],
)
def test_bad_fields_are_refused(trained, tmp_path, field, value, message):
    config = smoke(trained[0])
    *entry, last = field.split(".")
    (config[entry[0]] if entry else config)[last] = value
    refused(config, tmp_path / "run", message)


def test_components_of_large_cells_are_refused(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(controls, "MAX_VALUES", 63)
    config = smoke(trained[0], klt_grids=((2, 2), (1, 1)))
    message = r"klt_grids: a cell of the grid \(1, 1\) has 64 values; at most 63"
    refused(config, tmp_path / "run", message)


def test_a_trained_head_takes_no_other_grid(trained):
    folder, whole, *_ = trained
    with pytest.raises(ValueError, match=r"grids \(2, 2\), and the .* are \(4, 4\)"):
        latent_classifier.load(
            folder / "classify",
            num_classes=10,
            latent_shape=(4, 4, 3),
            dataset="digits",
            params_sha256=whole.params_sha256,
        )


def test_other_latents_and_runs_are_refused(trained, tmp_path):
    folder, whole, *_ = trained
    path, workdir = tmp_path / "functaset.npz", tmp_path / "run"

    def with_functaset(message, error=ValueError, **changes):
        functa.save_functaset(path, whole._replace(**changes))
        refused(smoke(folder, functaset=str(path)), workdir, message, error)

    with_functaset(
        r"has latents \(4, 4, 3\), but those of the field are \(2, 2, 3\)",
        latent=np.zeros((len(whole.latent), 4, 4, 3), np.float32),
    )
    with_functaset("were fitted with other weights", params_sha256="0" * 64)
    padded = whole.config | {"padding": 1}
    with_functaset("has the latents of padded images", config=padded)
    with_functaset("does not name the data set", config={})
    with_functaset("labels differ", label=whole.label[::-1].copy())
    with_functaset("has no test split", split=np.full(len(whole.split), "train"))
    missing = smoke(folder, functaset=str(tmp_path / "no.npz"))
    refused(missing, workdir, "there is no functaset", FileNotFoundError)
    refused(
        smoke(folder, run=str(folder / "classify")), workdir, "is not a run of meta"
    )
    # The classifier saw latents with another mean.
    functa.save_functaset(path, whole._replace(mean=whole.mean + 1))
    shutil.copytree(folder / "classify", tmp_path / "classify")
    stored = tmp_path / "classify" / "config.json"
    changed = files.read_json(stored) | {"functaset": str(path)}
    files.write_json(stored, changed)
    refused(
        smoke(folder, classifier=str(tmp_path / "classify")),
        workdir,
        "classify was trained on another version of the functaset .*functaset.npz",
    )
    for name, error, message in (
        ("meta", ValueError, "is not a run of classify_functa on latents"),
        ("nowhere", FileNotFoundError, "is not finished"),
    ):
        config = smoke(folder, classifier=str(folder / name))
        refused(config, workdir, message, error)
