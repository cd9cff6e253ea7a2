"""The encoding of data sets, make_functaset, and the files of functa.functaset."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import functa
from experiments import make_functaset
from experiments.common import data, runs
from experiments.configs import make_functaset as make_functaset_config
from experiments.configs import meta_learn as meta_learn_config
from experiments.training import encoding, meta
from functa import functaset

pytestmark = pytest.mark.usefixtures("unoptimized")

SHAPE = (6, 4, 3)
MODEL = {
    "type": "LatentModulatedSiren",
    "width": 7,
    "depth": 3,
    "latent_dim": 5,
    "layer_sizes": [],
    "omega_0": 10.0,
    "out_channels": 3,
}


@pytest.fixture(scope="module")
def learner():
    model = functaset.make_model(MODEL)
    latent = model.initial_latent()
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2)), latent)["params"]
    inner = {"num_steps": 2, "l2_weight": 0.0, "unroll": True}
    return encoding.Learner(MODEL, params, latent, jnp.full(5, 0.05), inner)


@pytest.fixture(scope="module")
def dataset():
    rng = np.random.default_rng(0)

    def split(num):
        image = rng.integers(0, 256, (num, *SHAPE), dtype=np.uint8)
        return {"image": image, "label": np.arange(num, dtype=np.int32)}

    return {"train": split(8), "test": split(4)}


def write(path, learner, dataset, **options):
    return encoding.write_functaset(
        path,
        learner,
        dataset,
        config={"dataset": "random"},
        batch_size=2,
        **options,
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory, learner, dataset):
    path = tmp_path_factory.mktemp("functaset") / "functaset.npz"
    write(path, learner, dataset)
    return path


def test_file_is_what_its_documentation_says(path, learner, dataset):
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    assert {k: (v.dtype.str, v.shape) for k, v in arrays.items()} == {
        "latent": ("<f4", (12, 5)),
        "label": ("<i4", (12,)),
        "psnr": ("<f4", (12,)),
        "split": ("<U5", (12,)),
        "mean": ("<f4", (5,)),
        "std": ("<f4", (5,)),
        "config": (arrays["config"].dtype.str, ()),
        "params_sha256": ("<U64", ()),
        "sha256": ("<U64", ()),
    }
    assert arrays["split"].tolist() == ["train"] * 8 + ["test"] * 4
    assert arrays["label"].tolist() == [*range(8), *range(4)]
    train = arrays["latent"][:8]
    np.testing.assert_allclose(arrays["mean"], train.mean(0), rtol=1e-5, atol=1e-7)
    # The variance is summed as mean of squares less square of mean, in float64.
    np.testing.assert_allclose(arrays["std"], train.std(0), rtol=1e-4)
    config = json.loads(str(arrays["config"]))
    assert config["model"] == MODEL and config["inner"]["num_steps"] == 2
    assert config["dataset"] == "random" and config["copies"] == 1
    assert str(arrays["params_sha256"]) == functaset.hash_params(learner.params)


def test_save_and_load_keep_everything(path, tmp_path):
    loaded = functa.load_functaset(path)
    functa.save_functaset(tmp_path / "copy.npz", loaded)
    copy = functa.load_functaset(tmp_path / "copy.npz")
    for name, ours, theirs in zip(loaded._fields, loaded, copy, strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
    normalized = loaded.select("train").normalized()
    np.testing.assert_allclose(normalized.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(normalized.std(0), 1, rtol=1e-4)


def test_grids_of_latents_are_joined_saved_and_loaded(tmp_path):
    rng = np.random.default_rng(0)
    latent = rng.normal(2.0, 3.0, (7, 2, 3, 4)).astype(np.float32)
    labels, psnr = np.arange(7, dtype=np.int32), rng.normal(size=7).astype(np.float32)
    shards = []
    for split, start, stop in (("train", 0, 3), ("train", 3, 5), ("test", 5, 7)):
        shard = tmp_path / f"{start}.npz"
        rows = slice(start, stop)
        np.savez(shard, latent=latent[rows], label=labels[rows], psnr=psnr[rows])
        shards.append((shard, split, 0, stop - start))
    path = tmp_path / "grids.npz"
    encoding._join(path, shards, config={}, params_sha256="")
    loaded = functa.load_functaset(path)
    np.testing.assert_array_equal(loaded.latent, latent)
    # One mean and deviation per channel, over training signals and positions.
    train = np.float64(latent[:5]).reshape(-1, 4)
    np.testing.assert_allclose(loaded.mean, train.mean(0), rtol=1e-6)
    np.testing.assert_allclose(loaded.std, train.std(0), rtol=1e-6)
    test = loaded.select("test").normalized()
    np.testing.assert_allclose(
        test, (latent[5:] - train.mean(0)) / train.std(0), rtol=1e-4, atol=1e-5
    )
    functa.save_functaset(tmp_path / "copy.npz", loaded)
    np.testing.assert_array_equal(
        functa.load_functaset(tmp_path / "copy.npz").latent, latent
    )


class GridField(nn.Module):
    """A latent grid (2, 3, 4): each channel's mean plus the coordinates' product."""

    @nn.compact
    def __call__(self, coords, latent):
        scale = self.param("scale", nn.initializers.constant(0.5), (4,))
        values = scale * latent.mean((0, 1))  # (4,)
        return jnp.prod(coords, axis=-1, keepdims=True) + jnp.expand_dims(
            values, range(coords.ndim - 1)
        )


def test_grids_of_latents_are_encoded_and_rendered():
    images = np.random.default_rng(0).integers(0, 256, (3, 6, 5, 4), dtype=np.uint8)
    latent = np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 3, 4)
    params = {"scale": np.full(4, 0.5, np.float32)}
    rate = np.float32(2.0)
    latents, mse = encoding.fit_batch(
        params,
        latent,
        rate,
        images,
        model=GridField(),
        inner=(("num_steps", 1),),
    )
    product = np.prod(np.float64(functa.coordinate_grid((6, 5))), -1, keepdims=True)
    before = product + 0.5 * latent.mean((0, 1)) - images / 255  # (B, H, W, C)
    # All entries of a channel have one gradient: 2 sum(error) * 0.5 / (6 HWC).
    grad = before.sum((1, 2)) / (6 * 120)
    expected = latent - rate * grad[:, None, None, :]
    np.testing.assert_allclose(latents, expected, rtol=1e-5, atol=1e-6)
    rendered = functa.render(GridField(), params, latents, (6, 5), batch_size=2)
    fields = product + 0.5 * expected.mean((1, 2))[:, None, None, :]
    np.testing.assert_allclose(rendered, fields, rtol=1e-5, atol=1e-6)
    after = np.mean((fields - images / 255) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(np.asarray(mse)[:, 1], after, rtol=1e-5)


def test_two_sittings_write_the_same_file(tmp_path, monkeypatch, learner, dataset):
    monkeypatch.setattr(encoding, "SHARD_SIZE", 3)
    whole, resumed = tmp_path / "whole.npz", tmp_path / "resumed.npz"
    write(whole, learner, dataset, copies=2, flip=True)
    encode, calls = encoding.encode, []

    def encode_once(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(*args, **kwargs)

    monkeypatch.setattr(encoding, "encode", encode_once)
    with pytest.raises(KeyboardInterrupt):
        write(resumed, learner, dataset, copies=2, flip=True)
    assert not resumed.exists()
    assert len(list(tmp_path.glob("resumed.npz.parts/*.npz"))) == 1
    write(resumed, learner, dataset, copies=2, flip=True)
    # Two copies of 8 and 4 others, in shards of 3: of 3 + 3 + 2 shards, one was there.
    assert len(calls) == 2 + 7
    assert sorted(os.listdir(tmp_path)) == ["resumed.npz", "whole.npz"]
    with np.load(whole) as first, np.load(resumed) as second:
        assert first.files == second.files
        for name in first.files:
            assert first[name].tobytes() == second[name].tobytes(), name


def test_damaged_parts_and_parts_of_other_rows_are_encoded_again(
    tmp_path, monkeypatch, learner, dataset, path, capsys
):
    monkeypatch.setattr(encoding, "SHARD_SIZE", 4)
    with monkeypatch.context() as patch:
        patch.setattr(encoding, "_join", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write(tmp_path / "a.npz", learner, dataset)
    first, second, third = sorted((tmp_path / "a.npz.parts").glob("*.npz"))
    third.write_bytes(first.read_bytes())
    first.write_bytes(second.read_bytes())
    second.write_bytes(second.read_bytes()[:-30])
    capsys.readouterr()
    write(tmp_path / "a.npz", learner, dataset)
    *lines, _ = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "test-000" in lines[2]
    for line in lines:
        assert line.endswith("is damaged or has other rows; it is encoded again.")
    for ours, theirs in zip(
        functa.load_functaset(path),
        functa.load_functaset(tmp_path / "a.npz"),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_latent_that_is_not_finite_stops_the_encoding(tmp_path, learner, dataset):
    wild = learner._replace(learning_rate=jnp.full(5, jnp.nan))
    with pytest.raises(ValueError, match="latent of train image 0 is not finite"):
        write(tmp_path / "a.npz", wild, dataset)


def test_parts_of_other_latents_are_not_used(tmp_path, monkeypatch, learner, dataset):
    monkeypatch.setattr(encoding, "SHARD_SIZE", 3)
    encode = encoding.encode
    with monkeypatch.context() as patch:
        patch.setattr(encoding, "_join", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write(tmp_path / "a.npz", learner, dataset)
    # Each part tells by itself what it was made of; other files may be gone.
    for file in (tmp_path / "a.npz.parts").iterdir():
        if file.suffix != ".npz":
            file.unlink()
    calls = []
    monkeypatch.setattr(
        encoding, "encode", lambda *a, **k: calls.append(a) or encode(*a, **k)
    )
    other = learner._replace(params=jax.tree.map(lambda x: 1.5 * x, learner.params))
    write(tmp_path / "a.npz", other, dataset)
    assert len(calls) == 5


def test_copies_are_of_the_training_split_only(tmp_path, learner, dataset, path):
    summary = write(tmp_path / "a.npz", learner, dataset, copies=3)
    copied, plain = (
        functa.load_functaset(tmp_path / "a.npz"),
        functa.load_functaset(path),
    )
    assert summary["num_signals"] == 3 * 8 + 4
    assert copied.config["copies"] == 3
    train = copied.select("train")
    assert train.label.tolist() == [*range(8)] * 3
    # Crops are easier to reconstruct; test images have none.
    assert summary["train_psnr"] == pytest.approx(train.psnr[:8].mean(), rel=1e-6)
    assert summary["train_psnr"] != pytest.approx(train.psnr.mean(), rel=1e-3)
    # The first copy is the images themselves.
    np.testing.assert_array_equal(train.latent[:8], plain.select("train").latent)
    # Images this small have four crops, so that single ones may coincide.
    assert not (train.latent[:8] == train.latent[8:16]).any()
    assert not np.array_equal(train.latent[8:16], train.latent[16:])
    np.testing.assert_array_equal(
        copied.select("test").latent, plain.select("test").latent
    )


def test_augment_crops_the_enlarged_image_and_mirrors_it(dataset):
    images = np.repeat(dataset["train"]["image"], 4, axis=0)
    height, width, channels = SHAPE
    large = np.asarray(
        jax.image.resize(
            jnp.float32(images),
            (len(images), height + height // 4, width + width // 4, channels),
            "bilinear",
        )
    )

    def kinds(augmented):
        """Which (row, column, mirrored) each image is, by trying all of them."""
        found = set()
        for image, source in zip(augmented, large, strict=True):
            matches = [
                (row, column, mirrored)
                for row in range(height // 4 + 1)
                for column in range(width // 4 + 1)
                for mirrored in (False, True)
                if np.abs(
                    np.float32(image[:, ::-1] if mirrored else image)
                    - source[row : row + height, column : column + width]
                ).max()
                # Rounding to whole numbers.
                <= 0.51
            ]
            assert len(matches) == 1
            found.add(matches[0])
        return found

    key = jax.random.key(1)
    augmented = encoding.augment(key, images, flip=True)
    assert augmented.dtype == np.uint8 and augmented.shape == images.shape
    # 32 images, 8 equally likely kinds: all appear.
    assert len(kinds(augmented)) == 8
    unflipped = kinds(encoding.augment(jax.random.clone(key), images, flip=False))
    assert {mirrored for *_, mirrored in unflipped} == {False}
    flat = np.full((2, *SHAPE), 77, np.uint8)
    same = encoding.augment(jax.random.key(2), flat, flip=True)
    np.testing.assert_array_equal(same, flat)


def test_reconstruct_at_the_resolution_of_the_images_has_the_stated_psnr(
    path, learner, dataset
):
    loaded = functa.load_functaset(path)
    for split in data.SPLITS:
        part = loaded.select(split)
        images = functa.reconstruct(part, learner.params, SHAPE[:2], batch_size=3)
        assert images.shape == (len(part.label), *SHAPE)
        assert images.dtype == np.float32
        error = images - data.to_float(dataset[split]["image"])
        psnr = -10 * np.log10(np.square(error).mean((1, 2, 3)))
        # The file's are measured inside the inner loop, in another order of sums.
        np.testing.assert_allclose(part.psnr, psnr, atol=1e-3)


def test_reconstruct_at_any_resolution(path, learner):
    part = functa.load_functaset(path).select("test")
    images = functa.reconstruct(part, learner.params, 9)
    assert images.shape == (4, 9, 9, 3)
    # The cell centres of 27 cells contain those of 9: the same field at the same place.
    large = functa.reconstruct(part, learner.params, 27)
    np.testing.assert_allclose(large[:, 1::3, 1::3], images, atol=1e-4)


def test_reconstruct_refuses_other_weights(path, learner):
    other = jax.tree.map(lambda x: x + 1e-3, learner.params)
    with pytest.raises(ValueError, match="fitted with other weights"):
        functa.reconstruct(functa.load_functaset(path), other, 8)


@pytest.fixture(scope="module")
def meta_run(tmp_path_factory):
    """A run of meta_learn before its first step: a config and a checkpoint."""
    workdir = tmp_path_factory.mktemp("meta_learn")
    config = meta_learn_config.get_config("smoke")
    config.model.out_channels = 1
    model = functaset.make_model(config.model.to_dict())
    state = meta.init_state(config, model, meta.make_optimizer(config))
    with runs.open_run(workdir, config) as run:
        run.save(1, state)
    return workdir


def smoke_config(meta_run):
    config = make_functaset_config.get_config("smoke")
    config.run = str(meta_run)
    config.num_images = 6
    return config


def test_fewer_inner_steps_are_the_first_ones(learner, dataset):
    rates = np.linspace(0.05, 0.2, 10, dtype=np.float32).reshape(2, 5)
    per_step = learner._replace(learning_rate=rates)
    images = dataset["test"]["image"]
    fits = [
        list(encoding.encode(which, images, batch_size=4))[0]
        for which in (per_step, per_step.with_steps(1), learner.with_steps(1))
    ]
    np.testing.assert_array_equal(fits[1][1], fits[0][1][:, :2])
    np.testing.assert_allclose(  # Steps from zero are proportional to their rates.
        fits[1][0] / rates[0], fits[2][0] / 0.05, rtol=1e-4, atol=1e-6
    )
    with pytest.raises(ValueError, match="inner.num_steps is 3, but the run has"):
        per_step.with_steps(3)


def test_command_writes_the_functaset_of_a_run(meta_run, tmp_path, capsys):
    summary = make_functaset.train_and_evaluate(smoke_config(meta_run), tmp_path)
    assert summary["num_signals"] == 2 * 6 + 6
    written = functa.load_functaset(tmp_path / "functaset.npz")
    assert written.config["dataset"] == "digits"
    assert written.config["class_names"] == list("0123456789")
    digits = data.load_dataset("digits").splits["train"]["label"][:6]
    assert written.select("train").label.tolist() == [*digits, *digits]
    params = encoding.load_learner(meta_run).params
    assert functa.reconstruct(written, params, 12).shape == (18, 12, 12, 1)
    again = make_functaset.train_and_evaluate(smoke_config(meta_run), tmp_path)
    assert again == summary
    assert "is not finished; its newest checkpoint" in capsys.readouterr().out
    done = shutil.copytree(meta_run, tmp_path / "done")
    (done / "summary.json").write_text("{}")
    encoding.load_learner(done)
    assert "is not finished" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [
        {"experiment": "nosuch"},
        {"model": 3},
        {"model.width": 17},
        {"model.nosuch": 1},
        {"inner": None},
        {"inner.num_steps": 99},
        {"inner.num_steps": "x"},
    ],
)
def test_stored_configuration_must_describe_the_weights(meta_run, tmp_path, changes):
    run = shutil.copytree(meta_run, tmp_path / "run")
    config = runs.load_config(run)
    with config.ignore_type():
        config.update_from_flattened_dict(changes)
    (run / "config.json").write_text(config.to_json_best_effort())
    with pytest.raises(ValueError, match=r"run/config\.json|run is not a run of"):
        encoding.load_learner(run)


def test_more_latents_than_the_disk_are_not_begun(
    tmp_path, monkeypatch, learner, dataset
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=400))
    # 4 * 8 + 4 latents of 5 numbers.
    with pytest.raises(OSError, match=r"needs .* for 36 latents"):
        write(tmp_path / "a.npz", learner, dataset, copies=4)
    assert list(tmp_path.iterdir()) == []


def test_batch_is_not_padded_beyond_a_shard(learner, dataset):
    images = dataset["train"]["image"]
    [(latents, _)] = encoding.encode(learner, images, batch_size=2**31 - 1)
    assert latents.shape == (8, 5)


def test_only_fields_that_are_not_set_come_from_the_run(tmp_path):
    for number, folder in enumerate(("old", "new")):
        (tmp_path / folder).mkdir()
        pixels = np.full((3, 6, 5, 1), 100 * number, np.uint8)
        for split in data.SPLITS:
            np.savez(tmp_path / folder / f"{split}.npz", image=pixels)
    stored = meta_learn_config.get_config("smoke")
    old = {"name": "npz", "data_dir": str(tmp_path / "old"), "image_size": 4}
    stored.dataset.update(old)
    (tmp_path / "config.json").write_text(stored.to_json_best_effort())
    config = smoke_config(tmp_path)
    config.dataset.data_dir = str(tmp_path / "new")
    found = make_functaset.load_dataset(config, 1).splits["train"]["image"]
    assert (found == 100).all() and found.shape == (3, 4, 4, 1)
    assert config.dataset.name == "npz" and config.dataset.image_size == 4
    loaded = data.load_dataset(**config.dataset)
    assert data.describe_source(config.dataset, loaded) == {
        "dataset": "npz",
        "class_names": None,
        "image_size": 4,
        "train_split": None,
        "test_split": None,
    }


def test_command_names_the_mistake(meta_run, tmp_path, dataset):
    def run(**changes):
        config = smoke_config(meta_run)
        config.update(changes)
        make_functaset.train_and_evaluate(config, tmp_path / "out")

    for split in data.SPLITS:
        np.savez(tmp_path / f"{split}.npz", **dataset[split])
    with pytest.raises(ValueError, match="npz have 3 channels, but .* have 1"):
        run(dataset={"name": "npz", "data_dir": str(tmp_path)})
    with pytest.raises(ValueError, match="have 3 coordinates, but the fields of .* 2"):
        run(dataset={"name": "synthetic_furniture"})
    with pytest.raises(FileNotFoundError, match="absent holds no run"):
        run(run=str(tmp_path / "absent"))
    with pytest.raises(
        ValueError, match="splits must be .* each value one of train, test"
    ):
        run(splits=("train", "valid"))
    # The run's data set is the digits, which are in no directory.
    with pytest.raises(ValueError, match="dataset.data_dir=.* is not read"):
        run(dataset={"data_dir": str(tmp_path)})
    with pytest.raises(ValueError, match="copies must be at least 1 .*, got 0"):
        run(copies=0)
    assert not (tmp_path / "out").exists()
