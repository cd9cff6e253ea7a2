"""Saved Vision Transformers: what is stored, and what is refused."""

import json
import os

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from numerics import random_like
from vit_files import (
    linen,
    network,
    write,
)

from vit import exports
from vit.attention import Segment
from vit.cascade import Cascade
from vit.checkpoint import load_checkpoint, load_normalization, save_checkpoint
from vit.model import ViT

pytestmark = pytest.mark.usefixtures("unoptimized")


def random_params(model, images_shape=(1, 12, 12, 2)):
    shapes = jax.eval_shape(
        model.clone(cascade=None).init, jax.random.key(0), jnp.zeros(images_shape)
    )
    return random_like(shapes["params"])


SIZES = dict(patch_size=3, hidden_size=12, num_layers=2, num_heads=3, mlp_dim=20)


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"gelu": "erf", "ln_eps": 1e-3},
        {"num_heads": (3, 1), "mlp_dim": (20, 7), "head_dim": 4},
        {"num_heads": 2, "head_dim": 4},
        {"representation_size": 6},
        {"num_classes": 0},
        {"num_classes": 0, "representation_size": 6},
        {"cascade": Cascade(keep=(4, 2), keep_mlp=(3, 2), fuse="sum", resets=(1,))},
    ],
    ids=str,
)
def test_saved_file_loads_bitwise(tmp_path, fields):
    model = ViT(**{"num_classes": 5, **SIZES, **fields})
    params = random_params(model)
    path = tmp_path / "mine.npz"
    save_checkpoint(path, model, params)
    loaded, restored = load_checkpoint(str(path))
    assert loaded == model
    chex.assert_trees_all_equal(restored, params)
    assert os.listdir(tmp_path) == ["mine.npz"]

    save_checkpoint(path, model, params, dtype="float16")
    loaded, restored = load_checkpoint(path)
    assert loaded == model
    rounded = jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), params)
    chex.assert_trees_all_equal(restored, rounded)
    chex.assert_trees_all_equal_dtypes(restored, params)
    with np.load(path) as file:
        assert {file[name].dtype.name for name in file.files if name != "meta"} == {
            "float16"
        }


def test_oblong_grid_survives_and_is_resized_if_told(tmp_path):
    model = ViT(num_classes=5, **SIZES)
    params = random_params(model, (1, 9, 15, 2))  # 15 patches, with CLS a square.
    save_checkpoint(tmp_path / "mine.npz", model, params)
    loaded, restored = load_checkpoint(tmp_path / "mine.npz")
    assert loaded == model
    chex.assert_trees_all_equal(restored, params)
    with pytest.raises(ValueError, match="a square .* got 15; set grid"):
        load_checkpoint(tmp_path / "mine.npz", image_size=12)
    with pytest.raises(ValueError, match=r"a grid of \(5, 2\) after .* got 15"):
        load_checkpoint(tmp_path / "mine.npz", grid=(5, 2))
    sizes = {"image_size": (12, 9), "grid": (3, 5)}
    _, resized = load_checkpoint(tmp_path / "mine.npz", **sizes)
    rows = params["Transformer"]["posembed_input"]["pos_embedding"][0, 1:]
    expected = scipy.ndimage.zoom(rows.reshape(3, 5, 12), (4 / 3, 3 / 5, 1), order=1)
    found = resized["Transformer"]["posembed_input"]["pos_embedding"][0, 1:]
    np.testing.assert_allclose(found.reshape(4, 3, 12), expected, atol=1e-6)


def test_a_cascade_does_not_fit_other_numbers_of_patches(tmp_path):
    cascade = Cascade(keep=(15, 8))
    model = ViT(num_classes=5, **SIZES, cascade=cascade)
    params = random_params(model, (1, 9, 15, 2))
    path = tmp_path / "mine.npz"
    save_checkpoint(path, model, params, grid=(3, 5))
    for size in ((9, 15), (15, 9)):
        assert load_checkpoint(path, image_size=size)[0].cascade == cascade
    # More patches would fit, and the first layer would keep the first 15 of them.
    for size, number in (((12, 15), 20), ((6, 6), 4)):
        with pytest.raises(ValueError, match=f"for 15 patches, .* have {number}; load"):
            load_checkpoint(path, image_size=size)


def test_stored_grid_is_known_again(tmp_path):
    model = ViT(num_classes=5, **SIZES)
    params = random_params(model, (1, 6, 24, 2))  # 2 x 8 patches: also 4 x 4.
    path = tmp_path / "mine.npz"
    save_checkpoint(path, model, params)
    with pytest.raises(ValueError, match=r"a square or a grid of \(2, 8\); set grid"):
        load_checkpoint(path, image_size=(6, 24))
    with pytest.raises(ValueError, match=r"a grid of \(2, 4\) after .* got 16"):
        save_checkpoint(path, model, params, grid=(2, 4))
    save_checkpoint(path, model, params, grid=np.array((2, 8)))
    for kwargs in ({}, {"image_size": (6, 24)}):
        loaded, restored = load_checkpoint(path, **kwargs)
        assert loaded == model.clone(grid=(2, 8))
        chex.assert_trees_all_equal(restored, params)
    save_checkpoint(tmp_path / "told.npz", model, params)
    _, expected = load_checkpoint(tmp_path / "told.npz", image_size=12, grid=(2, 8))
    square, resized = load_checkpoint(path, image_size=12)
    chex.assert_trees_all_equal(resized, expected)

    def apply(model, shape):
        images = jax.ShapeDtypeStruct((1, *shape, 2), jnp.float32)
        return jax.eval_shape(model.apply, {"params": params}, images)

    # 2 x 8 positions have the shape of 4 x 4 positions.
    with pytest.raises(ValueError, match="for 2 x 8 patches, the images have 4 x 4"):
        apply(loaded, (12, 12))
    with pytest.raises(ValueError, match="for 4 x 4 patches, the images have 2 x 8"):
        apply(square, (6, 24))
    with pytest.raises(ValueError, match="is for 17 tokens, the images have 21; resi"):
        apply(loaded, (15, 12))
    for one, shape in ((loaded, (6, 24)), (square, (12, 12)), (model, (12, 12))):
        assert apply(one, shape).shape == (1, 5)
    save_checkpoint(path, square, resized)
    assert load_checkpoint(path)[0] == square
    with pytest.raises(ValueError, match="grid must be two whole numbers, got 4"):
        apply(model.clone(grid=4), (12, 12))


def test_saved_file_is_one_of_the_reference_program(tmp_path):
    net = network(4)
    model, params = load_checkpoint(write(tmp_path, linen, net))
    save_checkpoint(tmp_path / "mine.npz", model, params)
    with np.load(tmp_path / "mine.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    meta = {"gelu": "tanh", "ln_eps": 1e-6, "pool": "cls", "distilled": False}
    meta["grid"] = [4, 4]
    assert json.loads(str(arrays.pop("meta"))) == meta
    chex.assert_trees_all_equal(arrays, linen(net))


@pytest.mark.parametrize("names", ["google", "timm", "huggingface"])
def test_normalization_is_stored(tmp_path, names):
    path = tmp_path / ("mine.npz" if names == "google" else "mine")
    stem = (4,) if names == "google" else ()
    model = ViT(num_classes=5, stem=stem, **SIZES | {"patch_size": 4 if stem else 3})
    params = random_params(model)
    save_checkpoint(path, model, params, names=names)
    assert load_normalization(path) is None
    # The shape that training computes, and numbers that float32 cannot hold exactly.
    mean = np.float32([0.49140, -0.1]).reshape(1, 1, 1, 2)
    std = np.float32([0.2470, 1e-6]).reshape(1, 1, 1, 2)
    save_checkpoint(path, model, params, names=names, mean=mean, std=std)
    stated = load_normalization(path)
    chex.assert_trees_all_equal(stated, (mean.ravel(), std.ravel()))
    assert stated[0].dtype == stated[1].dtype == np.float32
    chex.assert_trees_all_equal(load_checkpoint(path, num_heads=3)[1], params)
    save_checkpoint(path, model, params, names=names, mean=0.5, std=[0.5, 0.25])
    chex.assert_trees_all_equal(
        load_normalization(path), (np.float32([0.5, 0.5]), np.float32([0.5, 0.25]))
    )


@pytest.mark.parametrize(
    ("mean", "std", "match"),
    [
        ([0.5, 0.5], None, "std must be a positive number, or one for each of 2"),
        (None, [0.5, 0.5], "mean must be a finite number, .* got None"),
        ([0.5] * 3, [0.5] * 3, r"mean .* each of 2 channels, got \[0.5, 0.5, 0.5\]"),
        ([0.5, 0.5], [0.5, 0.0], "std must be a positive number"),
        ([0.5, np.nan], [0.5, 0.5], "mean must be a finite number"),
        ("x", 0.5, "mean must be a finite number, .* got 'x'"),
    ],
)
def test_normalization_that_is_not_valid_is_refused(tmp_path, mean, std, match):
    model = ViT(num_classes=5, **SIZES)
    params, path = random_params(model), tmp_path / "mine.npz"
    with pytest.raises(ValueError, match=match):
        save_checkpoint(path, model, params, mean=mean, std=std)
    assert not path.exists()
    meta = {"gelu": "erf", "ln_eps": 0.1} | {
        name: value
        for name, value in (("mean", mean), ("std", std))
        if value is not None
    }
    write(tmp_path, linen, None, linen(network()) | {"meta": json.dumps(meta)})
    with pytest.raises(ValueError, match=f"model.npz: {match}"):
        load_normalization(tmp_path / "model.npz")


def test_settings_of_a_run_are_not_saved(tmp_path):
    model = ViT(num_classes=5, dropout_rate=0.1, dtype=jnp.bfloat16, **SIZES)
    params = random_params(model)
    halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    save_checkpoint(tmp_path / "mine.npz", model, halves)
    loaded, restored = load_checkpoint(tmp_path / "mine.npz")
    assert loaded == ViT(num_classes=5, **SIZES)
    chex.assert_trees_all_equal(
        restored, jax.tree.map(lambda x: x.astype(np.float32), halves)
    )


@pytest.mark.parametrize(("width", "hidden"), [(12, 20), (112, 230), (1152, 4304)])
def test_timm_rounds_the_mlp_ratio_to_the_width_of_the_mlp(width, hidden):
    model = ViT(num_classes=5, **SIZES | {"hidden_size": width, "mlp_dim": hidden})
    assert int(width * exports._mlp_ratio(model)) == hidden


def test_what_can_not_be_saved_is_refused(tmp_path):
    model = ViT(num_classes=5, **SIZES)
    params = random_params(model)
    path = tmp_path / "mine.npz"
    with pytest.raises(ValueError, match=r"must end in .npz, got .*mine\.ckpt"):
        save_checkpoint(tmp_path / "mine.ckpt", model, params)
    with pytest.raises(ValueError, match=r"must be a folder, got .*mine\.npz"):
        save_checkpoint(path, model, params, names="timm")
    with pytest.raises(ValueError, match="google, timm, huggingface; got 'keras'"):
        save_checkpoint(path, model, params, names="keras")
    uneven = model.clone(mlp_dim=(20, 20), ln_eps=0.1)
    with pytest.raises(ValueError, match="layers of different .*, an epsilon other"):
        save_checkpoint(tmp_path / "x", uneven, params, names="timm")
    with pytest.raises(ValueError, match="one of float32, float16; got 'bfloat16'"):
        save_checkpoint(path, model, params, dtype="bfloat16")
    with pytest.raises(ValueError, match="2 missing: head/bias, head/kernel"):
        save_checkpoint(path, model, {k: v for k, v in params.items() if k != "head"})
    with pytest.raises(ValueError, match=r"1 misshapen: cls \(3,\) instead of"):
        save_checkpoint(path, model, params | {"cls": np.ones(3)})
    with pytest.raises(ValueError, match="1 missing: embedding/kernel; 1 unexpected"):
        save_checkpoint(
            path, model, params | {"embedding": {"bias": np.ones(12), "x": np.ones(1)}}
        )
    with pytest.raises(ValueError, match="a file cannot leave out a segment"):
        save_checkpoint(path, model.clone(segment=Segment(0)), params)
    large = params | {"cls": np.full((1, 1, 12), -7e4)}
    with pytest.raises(ValueError, match="cls contains 70000.0, too large for float16"):
        save_checkpoint(path, model, large, dtype="float16")
    with pytest.raises(ValueError, match="floating-point dtype, got int32"):
        save_checkpoint(path, model, params | {"cls": np.ones((1, 1, 12), np.int32)})
    assert not os.listdir(tmp_path)


def test_failed_save_leaves_the_older_file_whole(tmp_path, monkeypatch):
    model = ViT(num_classes=5, **SIZES)
    params = random_params(model)
    path = tmp_path / "mine.npz"
    save_checkpoint(path, model, params)

    def savez(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", savez)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, model, jax.tree.map(np.zeros_like, params))
    assert os.listdir(tmp_path) == ["mine.npz"]
    chex.assert_trees_all_equal(load_checkpoint(path)[1], params)


@pytest.mark.parametrize(
    ("meta", "match"),
    [
        ("{", "meta is not valid JSON"),
        ("[" * 100_000, "meta is not valid JSON"),
        ("3", "meta must hold a JSON object, got 3"),
        ("{}", "meta has .* value None for gelu"),
        (
            '{"gelu": "relu", "ln_eps": 1e-6}',
            "meta has .* value 'relu' for gelu",
        ),
        ('{"gelu": "erf", "ln_eps": "x"}', "meta has .* value 'x' for ln_eps"),
        *(
            (
                f'{{"gelu": "erf", "ln_eps": 0.1, "cascade": {cascade}}}',
                "meta has an invalid cascade",
            )
            for cascade in ("3", "[1]", '{"keep": 3}', '{"keep": ["a"]}')
        ),
    ],
    ids=range(10),
)
def test_damaged_settings_are_refused(tmp_path, meta, match):
    path = write(tmp_path, linen, None, linen(network()) | {"meta": meta})
    with pytest.raises(ValueError, match=f"model.npz: {match}"):
        load_checkpoint(path)
