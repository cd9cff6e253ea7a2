"""Writes the files and folders that cases name."""

import io
import json
import math
import os
import pickle
import shutil
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.common.bad_inputs import tables


class Evil:
    """A pickle of it makes a folder when it is loaded; a refused file does not."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return os.makedirs, (self.marker,)


def make_files(folder: Path, marker: Path, references: Mapping[str, Path]) -> None:
    """Writes all files and folders of the cases.

    Args:
      folder: where to write.
      marker: a folder that the malicious files make if they are executed.
      references: {command: a finished run of its smoke variant}; files that are copies
        of a run that is not there are not written.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (24, 8, 8, 3), np.uint8)
    evil = pickle.dumps(Evil(marker / "file"))
    evil_array = np.empty(24, object)
    evil_array[:] = [Evil(marker / "array") for _ in evil_array]

    def path(name):
        made = folder / name
        made.parent.mkdir(parents=True, exist_ok=True)
        return made

    def picture(name, array):
        Image.fromarray(array).save(path(name))

    def pictures(name, numbers, **changes):
        for number in numbers:
            picture(f"{name}/{number:02d}.png", images[number])

    def truncate(source, name):
        data = path(source).read_bytes()
        path(name).write_bytes(data[: len(data) // 2])

    def flip(source, name):
        data = bytearray(path(source).read_bytes())
        data[len(data) // 2] ^= 4
        path(name).write_bytes(data)

    os.mkfifo(path("fifo"))
    # Configurations.
    path("not_python").write_text("{no python")
    path("no_get_config").write_text("x = 1\n")
    path("raises").write_text("def get_config(variant=None):\n    return 1 / 0\n")
    path("returns_none").write_text("def get_config(variant=None):\n    pass\n")
    path("wrong_kind").write_text(
        "import importlib, inspect\n"
        "def get_config(variant=None):\n"
        "    name = [f.frame.f_locals.get('name') for f in inspect.stack()]\n"
        "    name = next(n for n in name if isinstance(n, str))\n"
        "    module = importlib.import_module(f'experiments.configs.{name}')\n"
        "    config = module.get_config('smoke')\n"
        "    field = next(iter(module.BASE))\n"
        "    with config.ignore_type():\n"
        "        config[field] = {1.5}\n"
        "    return config\n"
    )
    path("lacks_fields").write_text(
        "import inspect, ml_collections\n"
        "def get_config(variant=None):\n"
        "    name = [f.frame.f_locals.get('name') for f in inspect.stack()]\n"
        "    name = next(n for n in name if isinstance(n, str))\n"
        "    return ml_collections.ConfigDict({'experiment': name, 'variant': 'x'})\n"
    )
    # Images and folders of images.
    picture("rgb.png", images[0])
    picture("grey.png", images[0, ..., 0])
    path("text.png").write_text("no image")
    path("empty.png").write_bytes(b"")
    truncate("rgb.png", "truncated.png")
    path("folder.png").mkdir()
    _write_huge_png(path("huge.png"))
    Image.fromarray(np.float32(images[0, ..., 0])).save(path("float.tif"))
    deep = Image.fromarray(np.uint16(images[0, ..., 0]) * 257)
    deep.save(path("gray16.png"))
    deep.save(path("gray16.tif"))
    path("loop.png").symlink_to(path("loop.png"))
    data = path("rgb.png").read_bytes()
    text = b"x\0\0" + zlib.compress(bytes(2**27))
    path("text_bomb.png").write_bytes(data[:33] + _chunk(b"zTXt", text) + data[33:])
    # Images that are unusual and good.
    frames = [Image.fromarray(image) for image in images[:3]]
    frames[0].save(path("animated.gif"), save_all=True, append_images=frames[1:])
    frames[0].save(path("animated.webp"), save_all=True, append_images=frames[1:])
    frames[0].convert("CMYK").save(path("cmyk.jpg"))
    frames[0].convert("P").save(path("palette.png"), transparency=0)
    frames[0].convert("RGBA").save(path("rgba.png"))
    frames[0].convert("LA").save(path("la.png"))
    frames[0].crop((0, 0, 1, 1)).save(path("one_pixel.png"))
    exif = Image.Exif()
    exif[0x0112] = 6
    frames[0].save(path("exif.jpg"), exif=exif)
    path("empty_folder").mkdir()
    path("a_file.txt").write_text("x")
    pictures("flat", range(24))
    pictures("one_image", [0])
    for name in ("two_classes", "class_missing_in_test", "class_empty_in_test"):
        prefix = "" if name == "two_classes" else "train/"
        pictures(f"{name}/{prefix}cat", range(12))
        pictures(f"{name}/{prefix}dog", range(12, 24))
    pictures("class_missing_in_test/test/dog", range(12, 16))
    pictures("class_empty_in_test/test/dog", range(12, 16))
    path("class_empty_in_test/test/cat").mkdir()
    path("text_only/a.txt").write_text("x")
    for name in ("mixed_sizes", "zero_bytes", "truncated", "not_images", "broken_link"):
        pictures(f"{name}/cat", range(6))
        pictures(f"{name}/dog", range(6, 12))
    picture("mixed_sizes/cat/zz.png", images[0, :5])
    path("zero_bytes/cat/zz.png").write_bytes(b"")
    truncate("rgb.png", "truncated/cat/zz.png")
    path("not_images/cat/zz.png").write_text("no image")
    path("broken_link/cat/zz.png").symlink_to("/nowhere/x.png")
    for name in ("links", "gray16"):
        pictures(f"{name}/cat", range(12))
        pictures(f"{name}/dog", range(12, 24))
    path("links/cat/up").symlink_to(path("links"))
    path("links/dog/self.png").symlink_to(path("links/dog/self.png"))
    deep.save(path("gray16/cat/zz.png"))
    path("links_only/self").mkdir(parents=True)
    path("links_only/self/self").symlink_to(path("links_only"))
    pictures("split_in_class/cat/train", range(6))
    pictures("split_in_class/dog/train", range(6, 12))
    for split in ("train", "test", "testing"):
        pictures(f"two_tests/{split}/cat", range(4))
        pictures(f"two_tests/{split}/dog", range(4, 8))
    pictures("no_common_class/train/cat", range(4))
    pictures("no_common_class/test/dog", range(4, 8))
    pictures("two_images", range(2))
    pictures("mixed_levels", range(6))
    pictures("mixed_levels/cat", range(6, 12))
    # .npz data sets.
    labels = np.arange(24) % 3
    good = {"image": images, "label": labels}

    def both(name, test=None, **changes):
        for split in ("train", "test"):
            arrays = good | changes | ((test or {}) if split == "test" else {})
            np.savez(path(f"{name}/{split}.npz"), **arrays)

    both("npz_good")
    np.savez(path("npz_no_test/train.npz"), **good)
    for name in (
        "text",
        "truncated",
        "flipped",
        "is_folder",
        "fifo",
        "loop",
        "lzma",
        "huge_header",
        "other_names",
    ):
        both(f"npz_{name}")
    path("npz_text/train.npz").write_text("x")
    truncate("npz_good/train.npz", "npz_truncated/train.npz")
    flip("npz_good/train.npz", "npz_flipped/train.npz")
    path("npz_is_folder/test.npz").unlink()
    path("npz_is_folder/test.npz").mkdir()
    for name in ("fifo", "loop", "lzma"):
        path(f"npz_{name}/train.npz").unlink()
    os.mkfifo(path("npz_fifo/train.npz"))
    path("npz_loop/train.npz").symlink_to(path("npz_loop/train.npz"))
    with zipfile.ZipFile(path("npz_good/train.npz")) as archive:
        data = archive.read("image.npy")
    with zipfile.ZipFile(path("npz_lzma/train.npz"), "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("image.npy", data)
    _write_huge_npz(path("npz_huge_header/train.npz"), "image", "|u1", labels=labels)
    np.savez(path("npz_other_names/train.npz"), images=images, labels=labels)
    both("npz_pickle", image=evil_array)
    both("npz_float", image=np.float32(images) + 0.5)
    hole = np.float32(images) / 255
    hole[3, 1, 2, 0] = math.nan
    both("npz_nan", image=hole)
    both("npz_negative", image=np.int64(images) - 1)
    both("npz_above_255", image=np.int64(images) + 1)
    both("npz_complex", image=images * 1j)
    both("npz_records", image=images.view([("r", "u1")]))
    both("npz_two_channels", image=images[..., :2])
    both("npz_channels_first", image=images.transpose(0, 3, 1, 2))
    both("npz_label_objects", label=evil_array)
    both("npz_label_dates", label=labels.astype("M8[s]"))
    both("npz_3d", image=images[..., 0])
    both("npz_label_strings", label=labels.astype(str))
    both("npz_label_onehot", label=np.eye(3)[labels])
    both("npz_label_short", label=labels[:5])
    both("npz_label_float", label=labels + 0.5)
    both("npz_label_wraps", label=np.uint32(labels) + np.uint32(2**32 - 3))
    both("npz_label_negative", label=labels - 7)
    both("npz_label_2e9", label=labels + 2_000_000_000)
    both("npz_empty", image=images[:0], label=labels[:0])
    both("npz_sizes_differ", {"image": images[:, :5]})
    both("npz_channels_differ", {"image": images[..., :1]})
    _make_functasets(path, labels, evil_array, truncate, flip)
    # Checkpoint files.
    path("evil.pt").write_bytes(evil)
    for name, header in (
        ("huge", b"\xff" * 8),
        ("text", struct.pack("<Q", 6) + b"{no js"),
    ):
        path(f"header_{name}.safetensors").write_bytes(header)
    for name, tensor in (
        ("dtype", {"dtype": "X99", "shape": [1], "data_offsets": [0, 4]}),
        ("offsets", {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}),
        ("negative", {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}),
    ):
        header = json.dumps({"x": tensor}).encode()
        data = struct.pack("<Q", len(header)) + header + bytes(4)
        path(f"header_{name}.safetensors").write_bytes(data)
    path("hf_empty").mkdir()
    index = {"weight_map": {"x": "../evil.pt"}}
    path("hf_escapes/model.safetensors.index.json").write_text(json.dumps(index))
    # Runs.
    for name in (*tables.BAD_RUNS, *tables.BAD_LBI_RUNS, *tables.BAD_STATES):
        kind, _, damage = name.partition(" ")[0].partition("_")
        command = {"run": "meta_learn", "state": "meta_learn", "lbi": "train_lbi"}
        if command.get(kind) in references:
            copy = folder / f"{kind}_{damage}"
            shutil.copytree(references[command[kind]], copy)
            _damage(copy, damage)
    if "train_vit" in references:
        _make_weights(folder, references["train_vit"] / "model.npz")


def _make_weights(folder, model):
    """Writes damaged copies of a file that train_vit wrote."""
    with np.load(model) as file:
        arrays = dict(file)
    data = model.read_bytes()
    (folder / "truncated_vit.npz").write_bytes(data[: len(data) // 2])
    name = max(arrays, key=lambda name: arrays[name].size)
    values = arrays[name]
    for change, changed in (
        ("nan", {name: np.full_like(values, np.nan)}),
        ("other_rank", {name: values.ravel()}),
        ("strings", {name: values.astype(str)}),
    ):
        np.savez(folder / f"vit_{change}.npz", **(arrays | changed))
    np.savez(folder / "vit_lacks.npz", **{k: v for k, v in arrays.items() if k != name})


def _make_functasets(path, labels, evil_array, truncate, flip):
    rng = np.random.default_rng(1)
    num, size = len(labels), 8
    latent = np.float32(rng.normal(size=(num, size)))
    model = {"type": "LatentModulatedSiren", "width": 4, "depth": 2, "latent_dim": size}
    split = np.where(np.arange(num) < 16, "train", "test")
    good = {
        "latent": latent,
        "label": np.int32(labels),
        "psnr": np.full(num, 30, np.float32),
        "split": split,
        "mean": latent.mean(0),
        "std": latent.std(0),
        "config": np.array(json.dumps({"model": model})),
        "params_sha256": np.array("0" * 64),
    }

    def save(name, **changes):
        arrays = {k: v for k, v in (good | changes).items() if v is not None}
        np.savez(path(f"{name}.npz"), **arrays)

    save("functaset_good")
    np.save(path("array.npy"), latent)
    path("text.npz").write_text("x")
    path("empty.npz").write_bytes(b"")
    path("folder.npz").mkdir()
    truncate("functaset_good.npz", "truncated.npz")
    flip("functaset_good.npz", "flipped.npz")
    zeros = np.zeros(2, np.float32)
    hole = latent.copy()
    hole[3, 1] = math.nan
    bad_std = good["std"].copy()
    bad_std[0] = -1
    save("lacks_split", split=None)
    save("rank_1", latent=latent[:, 0])
    save("latent_strings", latent=latent.astype(str))
    save("latent_nan", latent=hole)
    save("latent_inf", latent=np.where(np.isnan(hole), np.inf, hole))
    save("latent_pickle", latent=evil_array)
    save("label_float", label=labels + 0.5)
    save("label_2e9", label=np.where(labels == 0, 2_000_000_000, labels))
    save("label_negative", label=labels - 1)
    save("label_one_class", label=0 * labels)
    save("label_short", label=labels[:5])
    save("split_unknown", split=np.full(num, "val"))
    save("split_no_test", split=np.full(num, "train"))
    save("split_bytes", split=np.arange(num))
    save("mean_nan", mean=np.full(size, np.nan, np.float32))
    save("std_nan", std=np.full(size, np.nan, np.float32))
    save("std_negative", std=bad_std)
    save("config_list", config=np.array("[1]"))
    save("config_bad", config=np.array("{no"))
    save("config_deep", config=np.array("[" * 100_000))
    save("copies_7", config=np.array(json.dumps({"model": model, "copies": 7})))
    save("copies_text", config=np.array(json.dumps({"model": model, "copies": "2"})))
    for name, names in ("number", 5), ("short", ["cat"]), ("dict", {"0": "cat"}):
        config = json.dumps({"model": model, "class_names": names})
        save(f"class_names_{name}", config=np.array(config))
    save("grid", latent=latent.reshape(num, 2, 2, 2), mean=zeros, std=zeros)
    save("no_rows", **{k: good[k][:0] for k in ("latent", "label", "psnr", "split")})
    others = {k: v for k, v in good.items() if k != "latent"}
    _write_huge_npz(path("huge_header.npz"), "latent", "<f4", **others)


def _write_huge_npz(path, name, dtype, **arrays):
    """An .npz with one member whose header claims 10**12 rows."""
    np.savez(path, **arrays)
    header = io.BytesIO()
    shape = (10**12, 8)
    np.lib.format.write_array_header_1_0(
        header, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{name}.npy", header.getvalue())


def _write_huge_png(path):
    """A black and white image of 400 million pixels in a small file."""
    side = 20_000
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((1 + side // 8) * side), 1)
    chunks = _chunk(b"IHDR", header), _chunk(b"IDAT", rows), _chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def _chunk(kind, data):
    crc = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + crc


def _damage(run, name):
    """Damages a copy of a run as its name says."""
    kind, _, how = name.partition("_")
    texts = {"text": "{no", "list": "[1]", "deep": "[" * 100_000, "empty": ""}
    files = {
        "config": "config.json",
        "summary": "summary.json",
        "inputs": "inputs.json",
    }
    if kind in files and how in texts:
        (run / files[kind]).write_text(texts[how])
    elif name == "config_latin1":
        (run / "config.json").write_bytes(b'{"a": "\xff"}')
    elif name == "no_config":
        (run / "config.json").unlink()
    elif name == "no_checkpoints":
        shutil.rmtree(run / "checkpoints")
    elif kind == "checkpoint":
        for path in sorted(run.rglob("checkpoints/**/*")):
            if path.is_file() and path.stat().st_size > 0:
                size = path.stat().st_size // 2 if how == "truncated" else 0
                os.truncate(path, size)
    elif name == "arrays_text":
        (run / "arrays.npz").write_text("x")
    elif name in tables.CHANGES:
        field, value = tables.CHANGES[name]
        entry, _, last = field.rpartition(".")
        for path in run.rglob("config.json"):
            config = json.loads(path.read_text())
            (config[entry] if entry else config)[last] = value
            path.write_text(json.dumps(config))
    elif kind == "metrics":
        (run / "summary.json").unlink()
        lines = (run / "metrics.jsonl").read_text().splitlines()
        lines[0] = "{no" if how == "middle" else "[1]"
        (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
