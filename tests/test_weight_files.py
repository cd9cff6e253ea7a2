"""Files of weights: damaged, foreign and hostile ones give one clear error."""

import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from vit_files import (
    big_vision,
    flat,
    linen,
    load,
    network,
    pre_linen,
    timm,
    write,
)

from vit.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("unoptimized")


def test_other_contents_are_refused(tmp_path):
    net = network()
    resnet = {"layer1.0.conv1.weight": np.ones(3, np.float32)}
    with pytest.raises(ValueError, match="must contain a Vision .* got layer1.0.conv"):
        load_checkpoint(write(tmp_path, timm, net, resnet))
    with pytest.raises(ValueError, match="must contain a Vision"):
        load_checkpoint(write(tmp_path, linen, net, {}))
    with pytest.raises(ValueError, match="must contain a Vision .* got cls"):
        load_checkpoint(write(tmp_path, linen, net, {"cls": np.ones(3)}))
    twice = linen(net) | pre_linen(net)
    with pytest.raises(ValueError, match=r"\S+ and \S+ name the same parameter"):
        load_checkpoint(write(tmp_path, linen, net, twice))
    integers = linen(net) | {"embedding/bias": np.arange(12)}
    with pytest.raises(ValueError, match="floating-point dtype, got int64"):
        load_checkpoint(write(tmp_path, linen, net, integers))
    text = linen(net) | {"embedding/bias": np.array(["x"] * 12)}
    with pytest.raises(ValueError, match="floating-point dtype, got <U1"):
        load_checkpoint(write(tmp_path, linen, net, text))


def test_paths_that_are_no_checkpoint_are_refused(tmp_path):
    allowed = "ends in .npz or .safetensors, got"
    (tmp_path / "x.npz").mkdir()
    for name in (".", "x.npz"):
        with pytest.raises(ValueError, match="must hold model.safetensors, .* got "):
            load_checkpoint(tmp_path / name)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(ValueError, match=rf"{allowed} .*model\.bin.*save_file"):
        load_checkpoint(tmp_path / "pytorch_model.bin")
    for name in ("absent.npz", "absent.safetensors", "absent.bin"):
        with pytest.raises(FileNotFoundError, match=name):
            load_checkpoint(tmp_path / name)
    for name in ("pipe.npz", "pipe.safetensors"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} is not a regular file"):
            load_checkpoint(tmp_path / name)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float64, ">f4"])
def test_every_precision_is_read(tmp_path, dtype):
    net = network()
    expected = {
        name: value.astype(dtype).astype(np.float32)
        for name, value in linen(net).items()
    }
    for layout in (timm, linen, big_vision):
        if layout is timm and dtype == ">f4":
            continue  # That format is little-endian.
        # NumPy writes bfloat16 as two bytes of no type, as big_vision's files have it.
        arrays = {k: v.astype(dtype) for k, v in layout(net).items()}
        _, params = load(write(tmp_path, layout, net, arrays), layout, net)
        params = flat(params)
        assert {v.dtype.name for v in params.values()} == {"float32"}
        if layout is not big_vision:
            chex.assert_trees_all_equal(params, expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_weights_that_are_not_finite_are_refused(tmp_path, bad):
    net = network()
    arrays = {name: value.astype(np.float64) for name, value in linen(net).items()}
    arrays["cls"][0, 0, 1] = bad
    with pytest.raises(ValueError, match="cls has values that are not finite"):
        load_checkpoint(write(tmp_path, linen, net, arrays))
    model, params = load_checkpoint(write(tmp_path, linen, net))
    params["cls"] = params["cls"].at[0, 0, 1].set(bad)
    with pytest.raises(ValueError, match="cls contains (nan|inf), too large"):
        save_checkpoint(tmp_path / "new.npz", model, params)
    assert not (tmp_path / "new.npz").exists()


def test_sizes_are_checked_before_memory_is_allocated(tmp_path):
    path = tmp_path / "bomb.npz"
    huge = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        huge, {"descr": "<f4", "fortran_order": False, "shape": (10**12,)}
    )
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("cls.npy", huge.getvalue())
    with pytest.raises(ValueError, match="bomb.npz is damaged .*cls.npy has 128 byt"):
        load_checkpoint(path)
    np.savez_compressed(path, cls=np.zeros(10**7, np.float32))
    with pytest.raises(ValueError, match="arrays would be far larger than the file"):
        load_checkpoint(path)


def safetensors_bytes(header, buffer=b""):
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + buffer


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "JSONDecodeError"),
        (b"\x02\0\0", "JSONDecodeError"),
        (b"version https://git-lfs.github.com/spec/v1\n", "header would have .* bytes"),
        (b"\xff" * 40, "header would have 18446744073709551615 bytes"),
        (safetensors_bytes(b'{"x": '), "JSONDecodeError"),
        (safetensors_bytes(b"\xff{}"), "UnicodeDecodeError"),
        (safetensors_bytes(b"[" * 100_000), "RecursionError"),
        (safetensors_bytes([1]), "TypeError"),
        (safetensors_bytes({"x": 3}), "TypeError"),
        (safetensors_bytes({"x": {"dtype": "F32"}}), "KeyError: 'shape'"),
        (
            safetensors_bytes(entry("F8_E4M3"), bytes(8)),
            "F16, BF16, F64, .*; got F8_E4M3",
        ),
        (safetensors_bytes(entry(["F32"]), bytes(8)), "TypeError"),
        (
            safetensors_bytes(entry(), bytes(7)),
            ".2. does not fit bytes 0 to 8 of 7",
        ),
        (safetensors_bytes(entry(offsets=(4, 12)), bytes(8)), "4 to 12 of 8"),
        (safetensors_bytes(entry(offsets=(-8, 0)), bytes(8)), "-8 to 0 of 8"),
        (safetensors_bytes(entry(offsets=(8, 0)), bytes(8)), "8 to 0 of 8"),
        (safetensors_bytes(entry(shape=(3,)), bytes(8)), "x of shape .3. does not"),
        (safetensors_bytes(entry(shape=(-1, -2)), bytes(8)), "ValueError"),
        (safetensors_bytes(entry(shape=("2",)), bytes(8)), "Error"),
        (safetensors_bytes(entry(offsets=(0, 8, 9)), bytes(8)), "ValueError"),
        ((10**7).to_bytes(8, "little") + b"{}", "would exceed it"),
        (safetensors_bytes(entry() | {"y": entry()["x"]}, bytes(8)), "overlap"),
    ],
    ids=range(22),
)
def test_damaged_safetensors_gives_one_clear_error(tmp_path, data, match):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    start = r"x.safetensors is damaged or is not a .safetensors file of arrays \("
    with pytest.raises(ValueError, match=f"{start}.*{match}"):
        load_checkpoint(path)


@pytest.mark.parametrize("layout", [linen, timm])
def test_truncated_file_gives_one_clear_error(tmp_path, layout):
    path = write(tmp_path, layout, network(layers=1))
    whole = path.read_bytes()
    for size in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="is damaged or is not a "):
            load_checkpoint(path)


def test_damaged_npz_gives_one_clear_error(tmp_path):
    net = network(layers=1)
    path = write(tmp_path, linen, net)
    whole = bytearray(path.read_bytes())
    whole[whole.index(net["cls"].tobytes())] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="model.npz is damaged.*CRC"):
        load_checkpoint(path)
    path.write_text("<!doctype html>")
    with pytest.raises(ValueError, match="model.npz is damaged.*not a zip archive"):
        load_checkpoint(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"not an array")
    with pytest.raises(ValueError, match="is damaged.*data.pkl is not an array"):
        load_checkpoint(path)


class Touch:
    def __reduce__(self):
        return os.mkdir, ("marker",)


def test_nothing_in_a_file_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    objects = np.empty(1, object)
    objects[0] = Touch()
    np.savez("objects.npz", cls=objects)
    Path("pickle.npz").write_bytes(pickle.dumps(Touch()))
    Path("pickle.safetensors").write_bytes(pickle.dumps(Touch()))
    for name in ("objects.npz", "pickle.npz", "pickle.safetensors"):
        with pytest.raises(ValueError, match=f"{name} is damaged or is not a"):
            load_checkpoint(name)
    assert not Path("marker").exists()
    np.load("objects.npz", allow_pickle=True)["cls"]
    assert Path("marker").exists()  # The attack is real.
