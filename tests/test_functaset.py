"""Functaset files by other hands: damage, hostile contents, odd arrays."""

import io
import json
import os
import struct
import tracemalloc
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functa
from functa import functaset, npz

N, L = 6, 4


def make_arrays():
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(N, L)).astype(np.float32)
    return {
        "latent": latent,
        "label": np.arange(N, dtype=np.int32) % 3,
        "psnr": np.full(N, 30, np.float32),
        "split": np.where(np.arange(N) < 4, "train", "test"),
        "mean": latent[:4].mean(0),
        "std": latent[:4].std(0),
        "config": np.array(json.dumps({"dataset": "none"})),
        "params_sha256": np.array("a" * 64),
    }


def make():
    arrays = make_arrays()
    return functa.Functaset(
        **arrays
        | {"config": json.loads(str(arrays["config"])), "params_sha256": "a" * 64}
    )


def test_every_flipped_bit_is_noticed_or_changes_nothing(tmp_path):
    path, flipped = tmp_path / "whole.npz", tmp_path / "flipped.npz"
    functa.save_functaset(path, make())
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        # The members themselves; between them there are dates and other fields.
        inside = np.zeros(len(whole), bool)
        for info in archive.infolist():
            start = info.header_offset + 30
            start += sum(struct.unpack("<HH", whole[start - 4 : start]))
            assert whole[start : start + 6] == b"\x93NUMPY"
            inside[start : start + info.file_size] = True
    expected = functa.load_functaset(path)
    rng = np.random.default_rng(1)
    for bit in rng.choice(8 * len(whole), 400, replace=False):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        flipped.write_bytes(data)
        try:
            loaded = functa.load_functaset(flipped)
        except ValueError as error:
            assert "flipped.npz" in str(error) and "\n" not in str(error)
            continue
        assert not inside[bit // 8]
        for name, ours, theirs in zip(expected._fields, expected, loaded, strict=True):
            np.testing.assert_array_equal(ours, theirs, err_msg=name)


def test_checksum_covers_every_member_and_is_optional(tmp_path):
    path = tmp_path / "a.npz"
    functa.save_functaset(path, make())
    with np.load(path) as file:
        arrays = dict(file)
    for name in functa.Functaset._fields:
        changed = dict(arrays)
        if changed[name].dtype.kind == "U":
            changed[name] = np.char.upper(changed[name])
        else:
            changed[name] = changed[name] + 1
        np.savez(path, **changed)
        with pytest.raises(ValueError, match="a.npz is damaged: its checksum"):
            functa.load_functaset(path)
    del changed["sha256"]
    np.savez_compressed(path, **changed)  # as an earlier version or another program
    assert functa.load_functaset(path).params_sha256 == "A" * 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": np.zeros(N)}, "`label` must hold integers, got float64"),
        (
            {"label": np.array([0, 1, 2, 0, 1, 2_000_000_000])},
            "`label` must be from -1 to 65535, got 0 t",
        ),
        ({"label": np.full(N, 2**32)}, "`label` must be from -1 to 65535"),
        ({"label": np.full(N, -2)}, "`label` must be .*, got -2 to -2"),
        ({"label": np.zeros((N, 1), np.int32)}, "`label` must have shape"),
        ({"label": np.zeros(N - 1, np.int32)}, "`label` must have shape"),
        ({"latent": np.zeros(N, np.float32)}, "`latent` must be"),
        ({"latent": np.zeros((0, L), np.float32)}, "`latent` must be"),
        ({"latent": np.zeros((N, L), np.int32)}, "`latent` must hold floats, got int"),
        ({"latent": np.zeros((N, L), "<U3")}, "`latent` must hold floats"),
        ({"latent": np.zeros((N, L), complex)}, "`latent` must hold floats"),
        ({"latent": np.full((N, L), 1e300)}, "`latent` must be finite, got inf"),
        ({"mean": np.zeros((L, 1), np.float32)}, "`mean` must have shape"),
        (
            {"std": np.array([1, 1, np.nan, 1])},
            r"`std` must be finite, got nan at \(2,",
        ),
        ({"std": -np.ones(L)}, "`std` must not be negative"),
        ({"psnr": np.full(N, np.nan)}, "`psnr` must be finite"),
        ({"split": np.full(N, b"train")}, "`split` must hold strings"),
        ({"split": np.full(N, "x" * 99)}, "`split` must hold at most 64 char"),
        ({"config": np.array("{no")}, "`config` is not valid JSON"),
        ({"config": np.array("[1]")}, r"`config` must be a JSON object, got \[1\]"),
        ({"config": np.array("[" * 10**5)}, "`config` is not valid JSON"),
        ({"config": np.array(["{}"])}, "`config` must have shape"),
        ({"params_sha256": np.array(5)}, "`params_sha256` must hold strings"),
    ],
)
def test_arrays_that_are_no_functaset_are_named(tmp_path, changes, message):
    path = tmp_path / "odd.npz"
    np.savez(path, **make_arrays() | changes)
    with pytest.raises(ValueError, match=f"odd.npz: {message}") as error:
        functa.load_functaset(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_saving_refuses_what_loading_refuses(tmp_path):
    for changes in ({"std": np.full(L, np.nan)}, {"label": np.full(N, 2**32)}):
        with pytest.raises(ValueError, match="the functaset: `(std|label)` must be"):
            functa.save_functaset(tmp_path / "a.npz", make()._replace(**changes))
    assert not (tmp_path / "a.npz").exists()


def test_numbers_of_any_size_and_byte_order_are_read(tmp_path):
    arrays = make_arrays()
    other = {
        "latent": np.asfortranarray(arrays["latent"].astype(">f8")),
        "label": arrays["label"].astype(">u2"),
        "psnr": np.full(N, np.inf, "f2"),
        "split": arrays["split"].astype(">U9"),
    }
    np.savez(tmp_path / "a.npz", **arrays | other)
    loaded = functa.load_functaset(tmp_path / "a.npz")
    np.testing.assert_array_equal(loaded.latent, arrays["latent"])
    np.testing.assert_array_equal(loaded.label, arrays["label"])
    assert loaded.select("test").latent.shape == (2, L)
    assert (loaded.latent.dtype, loaded.label.dtype) == (np.float32, np.int32)
    assert loaded.latent.dtype.isnative and loaded.label.dtype.isnative


def test_damaged_and_foreign_files_are_named(tmp_path):
    path = tmp_path / "a.npz"
    functa.save_functaset(path, make())
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="a.npz is not a readable .npz file"):
            functa.load_functaset(path)
    np.savez(path, latent=np.zeros((2, 3)), label=np.zeros(2))
    with pytest.raises(ValueError, match="not a functaset: it lacks psnr, split, mean"):
        functa.load_functaset(path)
    np.save(tmp_path / "plain.npy", np.zeros(3))
    with pytest.raises(ValueError, match="plain.npy is not a readable .npz file"):
        functa.load_functaset(tmp_path / "plain.npy")
    with pytest.raises(FileNotFoundError, match="functaset .*absent.npz does not ex"):
        functa.load_functaset(tmp_path / "absent.npz")
    os.mkfifo(tmp_path / "pipe.npz")
    for odd in (tmp_path / "pipe.npz", "/dev/zero", tmp_path):
        with pytest.raises(ValueError, match="is not a regular file"):
            functa.load_functaset(odd)


def member(shape, dtype="<f4", data=b""):
    """An .npy file whose header may lie."""
    file = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + data


def write_zip(path, members, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)


LIES = {
    "huge": member((10**12,)),
    "negative": member((-1, -4), data=b"a" * 16),
    "empty_strings": member((10**12,), "<U0"),
    "objects": member((1,), "|O", b"cos\nsystem\n."),
    "short": member((5,), data=b"a" * 16),
    "long": member((3,), data=b"a" * 16),
    "other": b"PK",
    "header": b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 10**7,
}


@pytest.mark.parametrize("name", LIES)
def test_sizes_are_checked_before_memory_is_allocated(tmp_path, name):
    path = tmp_path / "lie.npz"
    write_zip(path, {"x": LIES[name]})
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="lie.npz is not a readable .npz file"):
            npz.read_arrays(path)
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


def test_directory_of_the_archive_that_lies_about_sizes(tmp_path):
    path = tmp_path / "lie.npz"
    write_zip(path, {"x": member((2**28,), "|u1", b"")}, zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    place = data.index(b"PK\x01\x02")
    size = 2**28 + 128
    data[place + 20 : place + 28] = struct.pack("<II", size, size)
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"x.npy cannot have {size} bytes"):
            npz.read_arrays(path)
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


def test_unused_members_are_not_read(tmp_path):
    path = tmp_path / "bomb.npz"
    members = {}
    for name, array in make_arrays().items():
        file = io.BytesIO()
        np.save(file, array)
        members[name] = file.getvalue()
    write_zip(path, {**members, "bomb": member((10**7,), "|u1", bytes(10**7))})
    tracemalloc.start()
    try:
        assert functa.load_functaset(path).latent.shape == (N, L)
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


def test_model_of_a_functaset_that_names_none():
    for config in ({}, {"model": 3}):
        signals = make()._replace(
            config=config, params_sha256=functaset.hash_params({})
        )
        with pytest.raises(ValueError, match="config must hold a model"):
            functa.reconstruct(signals, {}, 4)
    with pytest.raises(ValueError, match=r"model type \('Siren',\) is not one of"):
        functa.make_model({"type": ["Siren"]})


@pytest.mark.parametrize("num_coords", [1, 3])
def test_one_number_is_the_resolution_of_every_axis(num_coords):
    config = {"type": "LatentModulatedSiren", "width": 8, "depth": 3, "latent_dim": 4}
    model = functa.make_model(config)
    params = model.init(
        jax.random.key(0), jnp.zeros(num_coords), model.initial_latent()
    )["params"]
    signals = make()._replace(
        config={"model": config}, params_sha256=functaset.hash_params(params)
    )
    signals = signals._replace(latent=np.ones((2, 4), np.float32))
    values = functa.reconstruct(signals, params, np.int64(5))
    assert values.shape == (2, *(5,) * num_coords, 3)
    with pytest.raises(ValueError, match=f"have {num_coords} coordinates, .* coords"):
        functa.reconstruct(signals, params, (5, 6))


@pytest.mark.parametrize("interpolation", functa.spatial.INTERPOLATIONS)
def test_large_images_are_computed_in_parts(monkeypatch, interpolation):
    model = functa.SpatialSiren(8, 3, (2, 3), 4, interpolation=interpolation)
    latents = np.random.default_rng(0).normal(size=(2, 2, 3, 4)).astype(np.float32)
    coords = functa.coordinate_grid((10, 9))
    params = model.init(jax.random.key(0), coords, latents[0])["params"]
    whole = functa.render(model, params, latents, (10, 9))
    siren = functa.Siren(8, 3)
    weights = siren.init(jax.random.key(0), coords)["params"]
    flat = np.asarray(jax.flatten_util.ravel_pytree(weights)[0])[None]
    assert functa.render(model, params, latents[:0], (10, 9)).shape[:3] == (0, 10, 9)
    plain = functa.render(siren, {}, flat, (10, 9))
    monkeypatch.setattr(functaset, "_POINTS_AT_ONCE", 13)
    parts = functa.render(model, params, latents, (10, 9))
    assert parts.shape == whole.shape == (2, 10, 9, 3)
    np.testing.assert_allclose(parts, whole, atol=1e-6)
    np.testing.assert_allclose(
        functa.render(siren, {}, flat, (10, 9)), plain, atol=1e-6
    )


def test_a_functaset_without_its_signals(tmp_path):
    rng = np.random.default_rng(0)
    whole = functa.Functaset(
        latent=np.float32(rng.normal(size=(5, 2, 2, 3))),
        label=np.arange(5, dtype=np.int32),
        psnr=np.full(5, 30, np.float32),
        split=np.array(["train"] * 4 + ["test"]),
        mean=np.ones(3, np.float32),
        std=np.full(3, 2, np.float32),
        config={"dataset": "digits"},
        params_sha256="a",
    )
    path = tmp_path / "functaset.npz"
    functa.save_functaset(path, whole)
    found = functa.load_functaset(path, with_signals=False)
    assert found.latent.shape == (0, 2, 2, 3) and found.label.shape == (0,)
    np.testing.assert_array_equal(found.mean, whole.mean)
    np.testing.assert_array_equal(found.std, whole.std)
    assert (found.config, found.params_sha256) == (whole.config, "a")
