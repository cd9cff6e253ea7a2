"""Data sets of fields: winds on the sphere, speech, and furniture as voxels.

* `winds`: monthly means of the wind over the oceans and the land, 1982 to 1992, from
  the Debian package `ferret-datasets` (U.S. Navy FNOC; NOAA-PMEL). Two channels,
  eastward and northward, at 73 x 144 points of the sphere. The first 100 months are for
  training, the last 32 for the test.
* `speech`: one second of speech, 8,000 samples at 8 kHz, from the Debian packages
  `asterisk-core-sounds-LANGUAGE-wav` (CC BY-SA and CC BY). The label is the language.
  Each language has one speaker. The windows of a clip are all in one split.
* `furniture`: the surfaces of 3-D models as 16 x 16 x 16 voxels, from the Debian
  package `sweethome3d-furniture` (CC BY and CC0). The label is the category.

Each has a synthetic twin (`synthetic_winds`, ...) of the same kind, which needs no
download: random smooth winds, two kinds of tones, boxes and balls.

The values are scaled to [0, 1], the range to which the PSNR refers. For winds its ends
are the smallest and the largest value of the training months, for speech those of the
full scale.
"""

import io
import re
import time
import warnings
import wave
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import functa
from experiments.common import files

# Where the Debian packages put their files.
WINDS = Path("/usr/share/ferret-vis/data")
SPEECH = Path("/usr/share/asterisk/sounds")
FURNITURE = Path("/usr/share/sweethome3d/furniture")

NUM_TRAIN_MONTHS, NUM_MONTHS = 100, 132
SAMPLE_RATE = 8000
LANGUAGES = ("en", "es", "fr", "it", "ru")
NUM_VOXELS = 16
_UNKNOWN_SIZE = b"\xff" * 4
# Programs write 2^31 or 2^32 less a few bytes for a size that they do not know.
_LONGEST_CLIP = 2**31 - 2**16
# Points on the surface of a model. Its faces have at most 6 x 16^2 voxels in a box.
_NUM_SURFACE_POINTS = 60_000
# What `zipfile` raises on damaged and on encrypted files.
_BROKEN_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    KeyError,
    OSError,
    EOFError,
    RuntimeError,
)
# A number that no corner of a face has; those of vertices start at 1.
_END_OF_FACE = -(2**62)
# Bytes of a 3-D model as text; the largest of the package has 9 MB.
_MAX_MODEL_BYTES = 2**27


class Fields(NamedTuple):
    """A data set of fields.

    Attributes:
      splits: {split: {"value": float32 (N, *grid, C), "label": int32 (N,)}}; without
        labels they are -1.
      class_names: the name of each label, or None.
      coords: positions of the points, float32 (*grid, d).
      weight: weights of the points with the mean 1, float32 (*grid); None weighs all
        equally.
      bounds: the physical values of 0 and 1.
      notes: what the user should know about the reading.
    """

    splits: dict[str, dict[str, np.ndarray]]
    class_names: list[str] | None
    coords: np.ndarray
    weight: np.ndarray | None
    bounds: tuple[float, float]
    notes: list[str]


def load_fields(
    name: str, data_dir: Path | None = None, *, say: Callable[[str], None] = print
) -> Fields:
    """Loads both splits of a data set of fields.

    Args:
      name: one of NAMES.
      data_dir: directory of the files; None is where the Debian package puts them.
      say: prints progress.

    Raises:
      FileNotFoundError: if the files are missing; the message states how to get them.
      ValueError: if a file is damaged or holds other data.
    """
    if name in _SYNTHETIC:
        return _SYNTHETIC[name]()
    load, root = _LOADERS[name]
    return load(data_dir or root, say)


def _missing(what: str, packages: Sequence[str], root: Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"there is no {what} in {root}; to get it: apt-get install "
        f"{' '.join(packages)}. For files that are elsewhere, set "
        "--config.dataset.data_dir=PATH."
    )


def _split(values, labels, is_test):
    """{split: {"value", "label"}} of values (N, ...) and labels (N,)."""
    values, labels = np.asarray(values), np.asarray(labels, np.int32)
    rows = {"train": ~is_test, "test": is_test}
    return {
        split: {"value": values[kept], "label": labels[kept]}
        for split, kept in rows.items()
    }


# --- winds ---


def sphere(latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    """Points (..., 3) of the unit sphere; the angles (...) are in degrees."""
    latitude, longitude = np.deg2rad(latitude), np.deg2rad(longitude)
    return np.stack(
        [
            np.cos(latitude) * np.cos(longitude),
            np.cos(latitude) * np.sin(longitude),
            np.sin(latitude) * np.ones_like(longitude),
        ],
        axis=-1,
    ).astype(np.float32)


def band_areas(latitude: np.ndarray) -> np.ndarray:
    """Areas (N,) of the bands around N rising latitudes in degrees, with the mean 1.

    A band reaches half-way to its neighbors, or to the pole. On a regular grid its area
    is proportional to cos(latitude), except that the bands at the poles are not empty.
    """
    middles = (latitude[1:] + latitude[:-1]) / 2
    edges = np.sin(np.deg2rad(np.concatenate([[-90], middles, [90]])))
    areas = np.diff(edges)
    return areas / areas.mean()


def _make_winds(values, latitude, longitude, num_train):
    """Fields of winds (N, lat, lon, 2) in m/s; the first num_train are for training."""
    low, high = float(values[:num_train].min()), float(values[:num_train].max())
    values = np.float32((values - low) / (high - low))
    weight = np.repeat(band_areas(latitude)[:, None], len(longitude), axis=1)
    coords = sphere(*np.meshgrid(latitude, longitude, indexing="ij"))
    is_test = np.arange(len(values)) >= num_train
    splits = _split(values, np.full(len(values), -1), is_test)
    notes = [f"0 is {low:.1f} m/s and 1 is {high:.1f} m/s"]
    return Fields(splits, None, coords, np.float32(weight), (low, high), notes)


def _load_winds(root, say):
    del say
    path = root / "monthly_navy_winds.cdf"
    if not path.exists():
        raise _missing(path.name, ["ferret-datasets"], root)
    names = {"time": "TIME", "latitude": "FNOCY", "longitude": "FNOCX"}
    names |= {"eastward": "UWND", "northward": "VWND"}
    from scipy.io import netcdf_file

    try:
        # Values may be stored as integers with a scale, or be marked as missing.
        with netcdf_file(path, mmap=False, maskandscale=True) as file:
            arrays = {
                key: np.ma.filled(file.variables[name][:].astype(np.float64), np.nan)
                for key, name in names.items()
            }
    # scipy has no error of its own: what it raises depends on where the file breaks.
    except Exception as error:  # noqa: BLE001
        raise ValueError(
            f"{path} is not a readable NetCDF file of monthly winds: {error!r:.120}"
        ) from None
    latitude, longitude = arrays["latitude"], arrays["longitude"]
    shape = (NUM_MONTHS, len(latitude), len(longitude))
    winds = [arrays["eastward"], arrays["northward"]]
    if any(wind.shape != shape or not np.all(np.abs(wind) < 99) for wind in winds):
        raise ValueError(
            f"{path} must hold winds below 99 m/s {shape} (month, latitude, longitude) "
            f"without missing values, found {winds[0].shape} and {winds[1].shape}."
        )
    # The areas of the bands need rising latitudes.
    if not (
        np.all(np.diff(latitude) > 0)
        and np.all(np.abs(latitude) <= 90)
        and np.all(np.abs(longitude) <= 720)
    ):
        raise ValueError(
            f"{path} must have rising latitudes from -90 to 90 degrees, and longitudes."
        )
    # A meridian that is given twice, at 0 and 360 degrees, would have twice its weight.
    if not np.allclose(np.diff(longitude), 360 / len(longitude), atol=1e-3):
        raise ValueError(
            f"{path} must have rising longitudes that divide the circle evenly, each "
            f"meridian once; got {len(longitude)} from {longitude[0]:g} to "
            f"{longitude[-1]:g}."
        )
    values = np.stack(winds, -1)
    if not np.ptp(values[:NUM_TRAIN_MONTHS]) > 0:
        raise ValueError(f"{path} has the same wind everywhere.")
    return _make_winds(values, latitude, longitude, NUM_TRAIN_MONTHS)


def _make_synthetic_winds():
    """A zonal wind, and random vortices that differ from month to month."""
    rng = np.random.default_rng(0)
    latitude, longitude = np.linspace(-90, 90, 13), np.arange(0, 360, 15.0)
    points = sphere(*np.meshgrid(latitude, longitude, indexing="ij"))
    mean = np.stack([np.cos(3 * np.pi * points[..., 2]), 0 * points[..., 2]], -1)
    directions = rng.normal(size=(40, 6, 3))
    phases = np.einsum("hwd,nkd->nhwk", points, directions)
    strengths = rng.normal(size=(40, 6, 2))
    values = 5 * mean + np.einsum("nhwk,nkc->nhwc", np.sin(2 * phases), strengths)
    return _make_winds(values, latitude, longitude, 32)


# --- speech ---


def _read_clip(path):
    """The samples of a clip, int16 (T,).

    A program that writes into a pipe cannot return to the header. It leaves 0 or the
    largest size there, and the samples then reach to the end of the file.
    """
    content = path.read_bytes()
    # The size of the whole is not needed, and `wave` would stop at a size of 0.
    stream = io.BytesIO(content[:4] + _UNKNOWN_SIZE + content[8:])
    try:
        with wave.open(stream) as file:
            found = file.getframerate(), file.getnchannels(), 8 * file.getsampwidth()
            if found == (SAMPLE_RATE, 1, 16):
                start, size = stream.tell(), 2 * file.getnframes()
                if size == 0 or size >= _LONGEST_CLIP:
                    size = (len(content) - start) // 2 * 2
                if start + size > len(content):
                    raise EOFError
                return np.frombuffer(content, "<i2", size // 2, offset=start)
    # A chunk that ends after the file is a RuntimeError.
    except (wave.Error, EOFError, RuntimeError) as error:
        raise ValueError(
            f"{path} is not a readable WAV file: {str(error) or 'it ends too early'}."
        ) from None
    raise ValueError(
        f"{path} must have {SAMPLE_RATE} Hz, 1 channel and 16 bits; it has "
        f"{found[0]} Hz, {found[1]} channels and {found[2]} bits."
    )


def _make_speech(clips, class_names, notes):
    """Fields of the windows of clips, pairs of a label and int16 samples (T,)."""
    windows, labels, is_test = [], [], []
    seen = Counter()
    order = np.random.default_rng(0).permutation(len(clips))
    test = set(order[: round(0.2 * len(clips))].tolist())
    for number, (label, samples) in enumerate(clips):
        whole = samples[: len(samples) // SAMPLE_RATE * SAMPLE_RATE]
        cut = whole.reshape(-1, SAMPLE_RATE)
        seen[f"clips shorter than {SAMPLE_RATE} samples are not read"] += not len(cut)
        sounding = cut[(cut != cut[:, :1]).any(axis=1)]
        seen["silent windows are not read"] += len(cut) - len(sounding)
        windows.append(sounding)
        labels += [label] * len(sounding)
        is_test += [number in test] * len(sounding)
    nothing = np.zeros((0, SAMPLE_RATE), np.int16)
    windows, is_test = np.concatenate([nothing, *windows]), np.array(is_test, bool)
    for label, name in enumerate(class_names):
        for split, kept in ("test", is_test), ("training", ~is_test):
            if not (np.array(labels)[kept] == label).any():
                raise ValueError(
                    f"there is no {split} window of {name}: clips must have at least "
                    f"{SAMPLE_RATE} samples that are not silent."
                )
    # In place, because the windows are the largest arrays here.
    values = windows[..., None].astype(np.float32)
    values /= 2**16
    values += 0.5
    coords = functa.coordinate_grid((SAMPLE_RATE,))
    notes = [*notes, *(f"{num} {what}" for what, num in seen.items() if num)]
    splits = _split(values, labels, is_test)
    return Fields(splits, list(class_names), coords, None, (-1.0, 1.0), notes)


def _load_speech(root, say):
    folders = {language: sorted(root.glob(f"{language}_*")) for language in LANGUAGES}
    missing = [language for language, found in folders.items() if not found]
    if missing:
        packages = [f"asterisk-core-sounds-{language}-wav" for language in missing]
        raise _missing(f"speech in {', '.join(missing)}", packages, root)
    clips, num_clips = [], 0
    for label, (language, found) in enumerate(folders.items()):
        paths = [path for folder in found for path in sorted(folder.rglob("*.wav"))]
        say(f"reading {len(paths)} clips of {language} ...")
        clips += [(label, _read_clip(path)) for path in paths]
        num_clips += len(paths)
    return _make_speech(clips, LANGUAGES, [f"{num_clips} clips"])


def _make_synthetic_speech():
    """Two languages: one of low and one of high tones that rise and fall."""
    rng = np.random.default_rng(0)
    clips = []
    for number in range(24):
        times = np.arange((1 + number % 2) * SAMPLE_RATE) / SAMPLE_RATE
        pitch = (150, 400)[number % 3 == 0] * (1 + 0.2 * rng.random())
        phase = pitch * times + 3 * np.sin(2 * np.pi * 3 * times + number)
        loudness = np.square(np.sin(2 * np.pi * times + number))
        tones = sum(np.sin(2 * np.pi * k * phase) / k for k in (1, 2, 3))
        clips.append((int(number % 3 == 0), np.int16(9000 * loudness * tones)))
    return _make_speech(clips, ("low", "high"), [])


def write_wav(path: Path, samples: np.ndarray) -> None:
    """Writes samples (T,) in [-1, 1] as a WAV file; larger ones are clipped."""
    content = np.int16(np.rint(np.clip(samples, -1, 1) * (2**15 - 1))).astype("<i2")

    def write(file):
        with wave.open(file, "wb") as sound:
            sound.setnchannels(1)
            sound.setsampwidth(2)
            sound.setframerate(SAMPLE_RATE)
            sound.writeframes(content.tobytes())

    files.write_atomic(path, write, mode="wb")


# --- furniture ---


def read_obj(text: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (V, 3) and triangles (T, 3) of a model in the OBJ format.

    Polygons are divided into fans of triangles.

    Raises:
      ValueError: if the text is not such a model.
    """
    of_vertices, of_faces = (
        re.findall(rb"^[ \t]*%c[ \t](.*)$" % kind, text, re.MULTILINE) for kind in b"vf"
    )
    # The first three numbers are the position.
    counts = {len(line.split()) for line in of_vertices} or {3}
    if len(counts) > 1 or min(counts) < 3:
        raise ValueError(
            f"a vertex has {' or '.join(map(str, sorted(counts)))} numbers, not the "
            "same three or more"
        )
    vertices = _numbers(b" ".join(of_vertices), np.float64)
    vertices = vertices.reshape(len(of_vertices), *counts)[:, :3]
    # Only the first number of a corner counts.
    end = b" %d " % _END_OF_FACE
    corners = re.sub(rb"/\S*", b"", end.join(of_faces) + end)
    corners = _numbers(corners, np.int64)
    is_end = corners == _END_OF_FACE
    starts = np.concatenate([[0], np.flatnonzero(is_end)[:-1] + 1])
    first = starts[np.cumsum(is_end) - is_end]
    [third] = np.nonzero((np.arange(len(corners)) >= first + 2) & ~is_end)
    triangles = corners[np.stack([first[third], third - 1, third], 1)] - 1
    if triangles.size and not 0 <= triangles.min() <= triangles.max() < len(vertices):
        raise ValueError("a face has a vertex that does not exist")
    return vertices, triangles


def _numbers(text, dtype):
    with warnings.catch_warnings():
        # NumPy warns of text that is not a number, and stops reading there.
        warnings.simplefilter("error", DeprecationWarning)
        try:
            return np.fromstring(text, dtype, sep=" ")
        except DeprecationWarning as warning:
            raise ValueError(str(warning)) from None


def voxelize(
    vertices: np.ndarray, triangles: np.ndarray, *, num_points: int, seed: int = 0
) -> np.ndarray:
    """Voxels that the surface of a model passes through.

    Points are drawn on the triangles, in proportion to their area. The longest side of
    the bounding box of the model fills the cube, and the model is in its center.

    Args:
      vertices: (V, 3).
      triangles: (T, 3), rows of `vertices`.
      num_points: number of points.
      seed: seed of the points.

    Returns:
      float32 (16, 16, 16), 0 or 1, with the axes of the vertices.

    Raises:
      ValueError: if the model has no surface.
    """
    corners = vertices[triangles]  # (T, 3, 3)
    edges = corners[:, 1:] - corners[:, :1]
    with np.errstate(over="ignore", invalid="ignore"):  # The result is refused.
        areas = np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=-1)
    if not (np.isfinite(areas).all() and areas.sum() > 0):
        raise ValueError("the model has no surface")
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(areas), num_points, p=areas / areas.sum())
    shares = rng.random((num_points, 2, 1))
    # A point beyond the diagonal of the parallelogram is mirrored into the triangle.
    shares = np.where(shares.sum(1, keepdims=True) > 1, 1 - shares, shares)
    points = corners[chosen, 0] + (shares * edges[chosen]).sum(1)
    used = corners.reshape(-1, 3)
    low, high = used.min(0), used.max(0)
    position = (points - (low + high) / 2) / (high - low).max() + 0.5
    index = np.clip((position * NUM_VOXELS).astype(int), 0, NUM_VOXELS - 1)
    voxels = np.zeros((NUM_VOXELS,) * 3, np.float32)
    voxels[tuple(index.T)] = 1
    return voxels


def _make_furniture(models, class_names, notes):
    """Fields of pairs of a label and voxels (16, 16, 16)."""
    labels, voxels = zip(*models, strict=True)
    is_test = np.zeros(len(models), bool)
    order = np.random.default_rng(0).permutation(len(models))
    is_test[order[: round(0.2 * len(models))]] = True
    splits = _split(np.stack(voxels)[..., None], labels, is_test)
    coords = functa.coordinate_grid((NUM_VOXELS,) * 3)
    return Fields(splits, list(class_names), coords, None, (0.0, 1.0), notes)


def _read_catalog(file):
    """The entries of a library of furniture: {number: {key: value}}."""
    entries = defaultdict(dict)
    for line in file.read("PluginFurnitureCatalog.properties").split(b"\n"):
        key, found, value = line.decode("latin-1").partition("=")
        name, numbered, number = key.strip().partition("#")
        if found and numbered and number.isdigit():
            entries[int(number)][name] = value.strip()
    return entries


def _read_model(file, entry):
    """Voxels of an entry of a catalog, with the axes x, depth and height."""
    member = entry["model"].lstrip("/")
    if file.getinfo(member).file_size > _MAX_MODEL_BYTES:
        raise ValueError(f"it has more than {_MAX_MODEL_BYTES} bytes")
    vertices, triangles = read_obj(file.read(member))
    if "modelRotation" in entry:
        rotation = np.array(entry["modelRotation"].split(), np.float64)
        vertices = vertices @ rotation.reshape(3, 3).T
    # The models have y upward and z to the front.
    return voxelize(vertices[:, [0, 2, 1]], triangles, num_points=_NUM_SURFACE_POINTS)


def _load_furniture(root, say):
    paths = sorted(root.glob("*.sh3f"))
    if not paths:
        raise _missing("file *.sh3f", ["sweethome3d-furniture"], root)
    found, num_unread = [], 0
    for path in paths:
        try:
            with zipfile.ZipFile(path) as file:
                last = time.monotonic()
                entries = _read_catalog(file)
                say(f"reading {len(entries)} models of {path.name} ...")
                for number, entry in entries.items():
                    if not {"model", "category"} <= entry.keys():
                        continue
                    try:
                        found.append((entry["category"], _read_model(file, entry)))
                    # A model that is not as expected does not stop the others.
                    except (ValueError, KeyError, TypeError, IndexError):
                        num_unread += 1
                    if time.monotonic() - last > 10:
                        say(f"{path.name}: model {number} of {len(entries)}")
                        last = time.monotonic()
        except _BROKEN_ZIP as error:
            raise ValueError(
                f"{path} is not a readable library of furniture: {error}"
            ) from None
    class_names = sorted({category for category, _ in found})
    if len(class_names) < 2 or len(found) < 10:
        raise ValueError(
            f"{root} must have at least 10 readable models in 2 categories, found "
            f"{len(found)} in {len(class_names)}."
        )
    models = [(class_names.index(category), voxels) for category, voxels in found]
    notes = [f"{num_unread} models cannot be read"] * bool(num_unread)
    return _make_furniture(models, class_names, notes)


def _make_synthetic_furniture():
    """Boxes and balls of random sizes."""
    rng = np.random.default_rng(0)
    points = functa.coordinate_grid((NUM_VOXELS,) * 3) - 0.5
    models = []
    for number in range(30):
        scaled = np.abs(points) / rng.uniform(0.15, 0.5, 3)
        ball = number % 2
        size = np.linalg.norm(scaled, axis=-1) if ball else scaled.max(-1)
        models.append((ball, np.float32(size < 1)))
    return _make_furniture(models, ("box", "ball"), [])


_LOADERS = {
    "winds": (_load_winds, WINDS),
    "speech": (_load_speech, SPEECH),
    "furniture": (_load_furniture, FURNITURE),
}
_SYNTHETIC = {
    "synthetic_winds": _make_synthetic_winds,
    "synthetic_speech": _make_synthetic_speech,
    "synthetic_furniture": _make_synthetic_furniture,
}
NAMES = (*_LOADERS, *_SYNTHETIC)
