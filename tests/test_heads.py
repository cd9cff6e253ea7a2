"""Heads on grids of latents: networks, windows of the grids, controls."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from numerics import random_like

import vit
from experiments import classify_functa
from experiments.common import augmentation, data, files
from experiments.configs import classify_functa as configs
from experiments.configs import train_lbi as train_lbi_configs
from experiments.configs import train_vit as train_vit_configs
from experiments.networks import convnext, heads
from experiments.training import classifier, features, loop
from experiments.training import lbi as lbi_training
from experiments.training import vit as vit_training
from functa import functaset

pytestmark = pytest.mark.usefixtures("unoptimized")

VIT = {"type": "vit", "hidden_size": 8, "num_layers": 2, "num_heads": 2, "mlp_dim": 12}
CONVNEXT = {"type": "convnext", "widths": (6, 8), "depths": (1, 2)}


def make_params(head):
    return random_like(jax.eval_shape(head.init, jax.random.key(0)))


def test_depthwise_convolution_against_xla():
    x, kernel, weights = random_like(
        [jnp.zeros((2, 4, 5, 3)), jnp.zeros((3, 3, 3)), jnp.zeros((2, 4, 5, 3))]
    )

    def oracle(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel[:, :, None],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=3,
        )

    outputs, vjp = jax.vjp(convnext.depthwise_conv, x, kernel)
    expected, expected_vjp = jax.vjp(oracle, x, kernel)
    chex.assert_trees_all_close(outputs, expected, atol=1e-5)
    chex.assert_trees_all_close(vjp(weights), expected_vjp(weights), atol=1e-5)


def test_merged_cells_are_a_convolution_of_stride_two():
    x, kernel = random_like([jnp.zeros((2, 4, 6, 3)), jnp.zeros((2, 2, 3, 5))])
    expected = jax.lax.conv_general_dilated(
        x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    merged = convnext._merge_cells(jnp.asarray(x)) @ kernel.reshape(-1, 5)
    chex.assert_trees_all_close(merged, expected, atol=1e-5)


def test_number_of_parameters():
    # Stem 3 * 6 + 6; head 8 * 4 + 4; merging 4 * 6 * 8 + 8; normalizations 12 + 12 +
    # 16. A block of width D has 9 D + 2 D (depthwise and norm), 8 D^2 + 5 D, and D.
    blocks = sum(8 * d * d + 18 * d for d in (6, 8, 8))
    expected = 24 + 36 + 200 + 12 + 12 + 16 + blocks
    head = heads.make_head(CONVNEXT, 4, (4, 6, 3))
    params = jax.eval_shape(head.init, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(params)) == expected


def test_rounded_products_of_a_convnext():
    latents = random_like(jnp.zeros((3, 4, 4, 5)))
    exact = heads.make_head(CONVNEXT, 4, (4, 4, 5))
    rounded = heads.make_head(CONVNEXT | {"product_dtype": "bfloat16"}, 4, (4, 4, 5))
    params = make_params(exact)

    expected = jax.jit(exact.apply)(params, latents)
    lowered = jax.jit(rounded.apply).lower(params, latents)
    actual = lowered.compile()(params, latents)
    error = jnp.abs(actual - expected).max() / jnp.abs(expected).max()
    # A number in bfloat16 has an error of up to 2^-9.
    assert 1e-4 < error < 0.03
    products = [x for x in lowered.as_text().splitlines() if "dot_general" in x]
    # The stem, the merging and two products of each of the three blocks; the last
    # layer is exact.
    assert sum("bf16" in x for x in products) == 8
    assert len(products) == 9


@pytest.mark.parametrize("settings", [VIT, CONVNEXT], ids=["vit", "convnext"])
def test_token_drop(settings):
    latents = random_like(jnp.zeros((3, 4, 4, 5)))
    plain = heads.make_head(settings | {"token_drop": 0.0}, 4, (4, 4, 5))
    thinned = heads.make_head(settings | {"token_drop": 0.5}, 4, (4, 4, 5))
    params = make_params(plain)

    @jax.jit
    def logits(key):
        keys = jax.random.split(key)
        # Without a key nothing is dropped.
        evaluated = thinned.apply(params, latents)
        at_rate_0 = plain.apply(params, latents, key=keys[0])
        return evaluated, at_rate_0, thinned.apply(params, latents, key=keys[1])

    evaluated, at_rate_0, dropped = logits(jax.random.key(1))
    assert evaluated.shape == (3, 4)
    chex.assert_trees_all_close(at_rate_0, evaluated, atol=1e-4)
    for other in (evaluated, logits(jax.random.key(2))[2]):
        assert not np.allclose(dropped, other, atol=1e-3)


def test_vit_takes_grids_of_any_rank_and_the_mlp_any_latent():
    for shape in ((6, 5), (2, 3, 5), (1, 2, 3, 5)):
        for settings in (VIT, {"type": "mlp", "hidden_sizes": (4,)}):
            head = heads.make_head(settings, 3, shape)
            params = jax.eval_shape(head.init, jax.random.key(0))
            latents = jnp.zeros((2, *shape))
            assert jax.eval_shape(head.apply, params, latents).shape == (2, 3)


@pytest.mark.parametrize(
    "settings, shape, message",
    [
        (VIT, (16,), "the head vit needs grids"),
        (CONVNEXT, (16,), "the head convnext needs grids"),
        (CONVNEXT, (6, 5), "needs grids \\(h, w\\)"),
        (CONVNEXT, (3, 4, 5), "multiples of 2, got \\(3, 4\\)"),
        (CONVNEXT | {"depths": (1,)}, (4, 4, 5), "one positive integer per"),
        (CONVNEXT | {"drop_path_rate": 1.0}, (4, 4, 5), "drop_path_rate must be in"),
        (CONVNEXT | {"product_dtype": "float16"}, (4, 4, 5), "product_dtype must be"),
        ({"type": "mlp", "hidden_sizes": (0,)}, (5,), "positive integers, got \\(0,"),
        (VIT | {"num_heads": 3}, (4, 4, 5), "not divisible by num_heads"),
        (VIT | {"token_drop": 1.0}, (4, 4, 5), "token_drop must be in"),
        (VIT | {"hight": 1}, (4, 4, 5), "config.model: .*hight"),
        ({"type": "lenet"}, (4, 4, 5), "must be one of mlp, vit, convnext"),
    ],
)
def test_heads_that_can_not_be_made(settings, shape, message):
    with pytest.raises(ValueError, match=message):
        heads.make_head(settings, 4, shape)


def test_windows():
    grids = np.float32(np.arange(2 * 4 * 5).reshape(1, 2, 4, 5).transpose(0, 2, 3, 1))
    every = {
        grids[0, i : i + 3, j : j + 2].tobytes() for i in range(2) for j in range(4)
    }
    batch = np.repeat(grids, 200, axis=0)
    windows = augmentation.random_window(jax.random.key(0), batch, (3, 2))
    # Exactly the windows inside of the grid, and all eight of them.
    assert {window.tobytes() for window in np.asarray(windows)} == every
    center = augmentation.center_window(grids, (2, 3))
    np.testing.assert_array_equal(center, grids[:, 1:3, 1:4])
    assert augmentation.center_window(grids[:, 0], (3,)).shape == (1, 3, 2)


def make_grids(*, copies=1, padded=False):
    """A functaset of the first digits whose latents are means of 2x2 pixels."""
    latents, labels, splits = [], [], []
    for split, num in (("train", 24), ("test", 10)):
        arrays = data.load_dataset("digits").splits[split]
        images = np.float32(arrays["image"][:num])
        grid = images.reshape(num, 4, 2, 4, 2).mean((2, 4))[..., None]
        grid = np.concatenate([grid, 2 * grid + 1, 0 * grid + 7], -1)
        if padded:
            grid = np.pad(grid, ((0, 0), (1, 1), (1, 1), (0, 0)))
        repeats = copies if split == "train" else 1
        latents.append(np.tile(grid, (repeats, 1, 1, 1)))
        labels.append(np.tile(arrays["label"][:num], repeats))
        splits += [split] * (num * repeats)
    axes = (0, 1, 2)
    return functaset.Functaset(
        latent=np.concatenate(latents),
        label=np.concatenate(labels),
        psnr=np.zeros(len(splits), np.float32),
        split=np.array(splits),
        mean=latents[0].mean(axes),
        std=latents[0].std(axes),
        config={
            "copies": copies,
            "dataset": "digits",
            "model": {"type": "SpatialSiren", "grid": [4, 4], "channels": 3},
            "class_names": [f"digit {i}" for i in range(10)],
        },
        params_sha256="0" * 64,
    )


def make_config(tmp_path, made, **changes):
    path = tmp_path / "functaset.npz"
    functaset.save_functaset(path, made)
    config = configs.get_config("smoke_spatial")
    config.functaset = str(path)
    config.batch_size = 8
    config.model.update({"hidden_size": 8, "num_layers": 1, "num_heads": 2})
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.slow
def test_the_saved_transformer_reads_the_grids_as_images(tmp_path):
    config = make_config(tmp_path, make_grids(copies=2))
    summary = classify_functa.train_and_evaluate(config, tmp_path / "run")
    source = ConfigDict(
        {
            "dataset": {"name": "functaset", "data_dir": str(tmp_path)},
            **{"image_size": 0, "num_train": 0, "num_test": 0},
        }
    )
    images = classifier.load_images(source)
    assert len(images.train[0]) == 24 and images.num_classes == 10
    problem = vit_training.load_problem(str(tmp_path / "run/model.npz"), 4, images, {})
    accuracy = problem.test_accuracy(problem.params)
    assert accuracy == pytest.approx(summary["test_accuracy"])
    # What the head saw: (latent - mean) / std, and zero for a constant channel.
    inputs = classifier.normalize(images, images.train[0])
    np.testing.assert_allclose(inputs.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(inputs.std((0, 1, 2)), [1, 1, 0], atol=1e-5)
    mean, std = vit.load_normalization(tmp_path / "run/model.npz")
    np.testing.assert_array_equal(mean, images.mean.ravel())
    np.testing.assert_array_equal(std, np.where(images.std > 0, images.std, 1).ravel())


@pytest.mark.parametrize(
    ("made", "fields", "message"),
    [
        (lambda f: f._replace(latent=f.latent[:, 0, 0]), {}, "must be grids"),
        (lambda f: f._replace(label=f.label - 1), {}, "no labeled train split"),
        (lambda f: f, {"image_size": 8}, "image_size must be 0"),
        (lambda f: f, {"dataset.image_size": 8}, "dataset.image_size=8 is not read"),
        (lambda f: f, {"dataset.data_dir": "/nowhere.npz"}, "no functaset /nowhere"),
        (lambda f: f, {"dataset.data_dir": None}, "needs a file"),
    ],
)
def test_grids_that_are_no_images(tmp_path, made, fields, message):
    functaset.save_functaset(tmp_path / "functaset.npz", made(make_grids()))
    dataset = {"name": "functaset", "data_dir": str(tmp_path), "image_size": None}
    config = ConfigDict(
        {"dataset": dataset, "image_size": 0, "num_train": 0, "num_test": 0}
    )
    with config.dataset.ignore_type():
        config.update_from_flattened_dict(fields)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        classifier.load_images(config)


def test_grids_are_not_augmented_like_pixels(tmp_path):
    """The latent of a mirrored image is not the mirrored grid."""
    functaset.save_functaset(tmp_path / "functaset.npz", make_grids())
    dataset = {"name": "functaset", "data_dir": str(tmp_path)}
    sizes = {"image_size": 0, "num_train": 0, "num_test": 0}
    images = classifier.load_images(ConfigDict({"dataset": dataset, **sizes}))
    config = train_vit_configs.get_config("smoke")
    config.batch_size = 8
    vit_training.check(config, images)
    config.augment.flip = True
    config.stages = ((0.5, {"augment.num_ops": 2}),)
    with pytest.raises(ValueError, match=r"tuning.augment.num_ops=0, .*flip=False:"):
        vit_training.check(config, images, parent="tuning.")
    pixels = images._replace(train=(np.uint8(images.train[0]), images.train[1]))
    vit_training.check(config, pixels)
    config = train_lbi_configs.get_config("smoke")
    config.augment = True
    with pytest.raises(ValueError, match="need augment=False:"):
        lbi_training.check(config, images)


def test_controls_of_a_functaset():
    made = make_grids(copies=2)
    patches, mean, std = features.load_features("patches", made)
    train = made.split == "train"
    images = np.float32(data.load_dataset("digits").splits["test"]["image"][:10]) / 255
    cell = images[3, 2:4, 4:6].ravel()
    np.testing.assert_allclose(patches[~train][3, 1, 2], cell, atol=1e-6)
    # The second copy is augmented, the first one is not.
    first, second = patches[train][:24], patches[train][24:]
    np.testing.assert_allclose(first.mean(-1), made.latent[:24, ..., 0] / 255, 1e-5)
    assert np.any(np.abs(first - second) > 0.1)
    np.testing.assert_allclose(mean, first.mean((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(std, first.std((0, 1, 2), ddof=1), rtol=1e-2)
    projected, mean, std = features.load_features("patch_pca", made)
    assert projected.shape == (58, 4, 4, 3)
    np.testing.assert_allclose(projected[:24].mean((0, 1, 2)), mean, atol=1e-5)
    np.testing.assert_allclose(projected[:24].std((0, 1, 2)), std, rtol=1e-2)
    # An orthogonal projection keeps distances that lie in its plane, and only those.
    distances, originals = (np.linalg.norm(x[3] - x[5]) for x in (projected, patches))
    assert 0.8 * originals < distances < originals


def test_controls_of_padded_images():
    made = make_grids(padded=True)
    made = made._replace(config=made.config | {"padding": 2})
    padded, _, _ = features.load_features("patches", made)
    inner, _, _ = features.load_features("patches", make_grids())
    np.testing.assert_array_equal(padded[:, 1:5, 1:5], inner)
    # Reflection: one cell beyond the border lies what is behind the border's pixel.
    np.testing.assert_array_equal(padded[:, 1, 0, 1], inner[:, 0, 0, 1])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: f._replace(label=f.label[::-1]), "their labels differ"),
        (
            lambda f: f._replace(config=f.config | {"signals_sha256": {"train": "0"}}),
            "the train images of .* their values differ",
        ),
        (lambda f: f._replace(latent=f.latent[:, 0, 0]), "need a functaset of grids"),
        (lambda f: f._replace(latent=f.latent[:, :3]), "does not divide signals"),
    ],
)
def test_controls_that_can_not_be_had(change, message):
    with pytest.raises(ValueError, match=message):
        features.load_features("patches", change(make_grids()))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"crop": (5, 4)}, "crop \\(5, 4\\) does not fit into the grid \\(4, 4\\)"),
        ({"crop": (4,)}, "does not fit"),
        ({"images_per_group": 5}, "images_per_group must divide batch_size"),
        ({"candidates.dropout_rate": (0.1,)}, "set model.dropout_rate"),
        ({"stages": ((0.5, {"batch_size": 4}),)}, "stages can change cutmix, model"),
        ({"stages": ((0.5, {"model.token_drop": 1.0}),)}, "token_drop must be in"),
    ],
)
def test_config_mistakes_are_named(tmp_path, changes, message):
    config = make_config(tmp_path, make_grids(), **changes)
    with pytest.raises(ValueError, match=message):
        classify_functa.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_cutmix_of_global_latents_is_named(tmp_path):
    made = make_grids()
    made = made._replace(latent=made.latent[:, 0, 0])
    config = make_config(tmp_path, made, cutmix=0.5)
    config.model = {"type": "mlp", "hidden_sizes": (4,), "activation": "relu"}
    with pytest.raises(ValueError, match="cutmix needs grids"):
        classify_functa.train_and_evaluate(config, tmp_path / "run")


@pytest.mark.slow
def test_run_on_windows_of_copies(tmp_path):
    config = make_config(
        tmp_path,
        make_grids(copies=2, padded=True),
        crop=(4, 4),
        num_measured=5,
        validation_fraction=0.25,
    )
    config.model = {"type": "mlp", "hidden_sizes": (4,), "activation": "relu"}
    summary = classify_functa.train_and_evaluate(config, tmp_path / "run")
    assert (summary["num_train"], summary["num_validation"]) == (2 * 18, 6)
    assert 0 <= summary["linear_probe_test_accuracy"] <= 1
    assert summary["num_params"] == 4 * 4 * 3 * 4 + 4 + 4 * 10 + 10
    signals = classify_functa.load_signals(config, config.functaset)
    latents, labels = classify_functa.evaluated_part(config, signals, "train")
    assert latents.shape == (18, 4, 4, 3) and labels.shape == (18,)
    with np.load(tmp_path / "run" / "arrays.npz") as arrays:
        assert arrays["class_names"][3] == "digit 3"
        assert arrays["confusion"].sum() == 10
    assert len(files.read_metrics(tmp_path / "run" / "metrics.jsonl")) == 2


def all_zero(candidates):
    return {f"candidates.{name}": (0.0,) for name in candidates}


@pytest.mark.slow
@pytest.mark.parametrize("settings", [VIT, CONVNEXT], ids=["vit", "convnext"])
def test_epoch_of_every_option_can_be_traced(tmp_path, settings):
    config = make_config(
        tmp_path,
        make_grids(copies=2, padded=True),
        crop=(4, 4),
        cutmix=0.5,
        optimizer="muon",
        clip_norm=1.0,
        stages=((0.5, {"model.token_drop": 0.0, "cutmix": 0.0}),),
    )
    config.model = settings | {"token_drop": 0.25}
    candidates = classify_functa.make_candidates(config)
    signals = classify_functa.load_signals(config, config.functaset)
    for stage in range(2):
        changed = loop.in_stage(config, stage)
        head = classify_functa.make_head(changed, signals)
        state = jax.eval_shape(
            lambda head=head: classify_functa.init_state(config, head, candidates)
        )
        epoch = classify_functa.make_epoch(
            changed, head, candidates, num_images=signals.num_images
        )
        args = (*signals.splits["train"], jax.random.key(0))
        trained, losses = jax.eval_shape(epoch, state, *args)
        chex.assert_trees_all_equal_shapes_and_dtypes(trained, state)
        assert losses.shape == (1,)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [VIT, CONVNEXT], ids=["vit", "convnext"])
def test_heads_learn(tmp_path, settings):
    config = make_config(tmp_path, make_grids(), num_epochs=40, log_every=40)
    config.update_from_flattened_dict(all_zero(config.candidates))
    config.update({"checkpoint_every": 40, "validation_fraction": 0.0})
    config.candidates.learning_rate = (3e-3,)
    config.model = settings
    classify_functa.train_and_evaluate(config, tmp_path / "run")
    [metrics] = files.read_metrics(tmp_path / "run" / "metrics.jsonl")
    # The last layer starts at zero, so the loss starts at the entropy of ten classes.
    assert metrics["loss"] < np.log(10) - 0.02


def test_epoch_takes_each_image_once_in_a_random_copy():
    # Latent and label are the numbers of image and copy; a linear model's gradient
    # with respect to its kernel sums what it saw.
    config = configs.get_config("digits")
    config.update_from_flattened_dict(all_zero(config.candidates))
    config.candidates.learning_rate = (1.0,)
    config.update({"batch_size": 6, "schedule": "constant", "crop": (1, 1)})
    rows = np.stack([np.arange(18) % 6, np.arange(18) // 6], 1)
    grids = np.broadcast_to(np.float32(np.eye(6)[rows[:, 0]])[:, None, None],
                            (18, 2, 2, 6))  # fmt: skip
    seen = []

    def apply(params, latents, *, key=None):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), latents)
        return latents[:, 0, 0, :2] + params["bias"][None]

    head = heads.Head(2, None, lambda key: {"bias": jnp.zeros(2)}, apply)
    settings = classify_functa.make_candidates(config)
    state = classify_functa.init_state(config, head, settings)
    epoch = classify_functa.make_epoch(config, head, settings, num_images=6)
    labels = jnp.zeros(18, jnp.int32)
    # The copies of an image differ in scale.
    latents = jnp.asarray(grids) * (1.0 + rows[:, 1])[:, None, None, None]
    jax.block_until_ready(epoch(state, latents, labels, jax.random.key(3)))
    jax.effects_barrier()
    [batch] = seen
    batch = batch.reshape(6, 6)
    assert sorted(batch.argmax(1)) == list(range(6))
    assert len(set(batch.max(1))) > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"copies": 0}, "copies must be an integer of at least 1, got 0"),
        ({"copies": 7}, "24 training signals are not 7 copies"),
        ("one class", "functaset.npz' has one class; a classifier needs two"),
    ],
)
def test_grids_that_are_no_labeled_images_are_refused(tmp_path, changes, message):
    made = make_grids()
    if changes == "one class":
        made = made._replace(label=0 * made.label)
    else:
        made = made._replace(config=made.config | changes)
    path = tmp_path / "functaset.npz"
    functaset.save_functaset(path, made)
    dataset = {"name": "functaset", "data_dir": str(path)}
    config = ConfigDict(
        {"dataset": dataset, "image_size": 0, "num_train": 0, "num_test": 0}
    )
    with pytest.raises(ValueError, match=message):
        classifier.load_images(config)


def test_images_of_one_class_are_refused(tmp_path):
    images = np.zeros((4, 8, 8, 1), np.uint8)
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", image=images, label=np.zeros(4, int))
    dataset = {"name": "npz", "data_dir": str(tmp_path)}
    config = ConfigDict(
        {"dataset": dataset, "image_size": 0, "num_train": 0, "num_test": 0}
    )
    with pytest.raises(ValueError, match="'npz' has one class; a classifier needs two"):
        classifier.load_images(config)


def test_controls_need_to_know_the_images(tmp_path):
    made = make_grids()
    del made.config["dataset"]
    config = make_config(tmp_path, made, features="patches")
    with pytest.raises(ValueError, match="does not name the data set of its images"):
        classify_functa.load_signals(config, config.functaset)
    made.config["dataset"] = "folder"
    config = make_config(tmp_path, made, features="patches")
    with pytest.raises(ValueError, match="set 'folder'; .*: --config.data_dir=PATH"):
        classify_functa.load_signals(config, config.functaset)
