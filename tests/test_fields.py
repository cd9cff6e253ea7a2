"""Weighted losses, data sets of fields, and their controls, against other oracles."""

import wave
import zipfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.io import netcdf_file

import functa
from experiments.common import data, fields
from experiments.training import controls, encoding
from functa import inner_loop, linear, metrics

WEIGHT = np.array([0.5, 2.0, 1.0], np.float32)


def affine(key, shape=(3, 2), size=4):
    """A field that is affine in its latent (size,), and its matrix."""
    matrix = jax.random.normal(key, (*shape, size))
    return (lambda z: matrix @ z + 0.3), np.asarray(matrix, np.float64)


# --- the weighted loss ---


def test_weighted_loss_is_that_of_numpy():
    field, matrix = affine(jax.random.key(0))
    target = jax.random.normal(jax.random.key(1), (3, 2))
    z = jnp.array([1.0, -1.0, 0.5, 2.0])
    loss, mse = functa.reconstruction_loss(
        field, z, target, l2_weight=0.1, weight=WEIGHT
    )
    error = matrix @ np.asarray(z) + 0.3 - np.asarray(target)
    expected = np.average(np.square(error).mean(1), weights=WEIGHT)
    chex.assert_trees_all_close(mse, expected, rtol=1e-5)
    chex.assert_trees_all_close(loss, expected + 0.1 * 6.25, rtol=1e-5)


def test_one_weighted_step_is_the_closed_form():
    field, matrix = affine(jax.random.key(0))
    target = jax.random.normal(jax.random.key(1), (3, 2))
    z, info = jax.jit(
        lambda z: functa.fit_latent(
            field, z, target, num_steps=1, learning_rate=0.1, weight=WEIGHT
        )
    )(jnp.zeros(4))
    share = (WEIGHT / (2 * WEIGHT.sum()))[:, None]  # two channels
    error = share * (0.3 - np.asarray(target))
    expected = -0.1 * 2 * np.einsum("ncz,nc->z", matrix, error)
    chex.assert_trees_all_close(z, expected, rtol=1e-4)
    _, last = functa.reconstruction_loss(field, z, target, weight=WEIGHT)
    assert info.mse[-1] == pytest.approx(float(last), rel=1e-6)


def test_equal_weights_are_no_weights_and_none_is_the_same_program():
    field, _ = affine(jax.random.key(0))
    target = jnp.ones((3, 2))

    def fit(**options):
        return jax.jit(
            lambda z: functa.fit_latent(
                field, z, target, num_steps=2, learning_rate=0.1, **options
            )
        )

    z = jnp.zeros(4)
    chex.assert_trees_all_close(
        fit(weight=jnp.full(3, 7.0))(z), fit()(z), rtol=1e-6, atol=1e-7
    )
    programs = [str(jax.make_jaxpr(fit(**w))(z)) for w in ({}, {"weight": None})]
    assert programs[0] == programs[1]


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ([0.0, 0.0, 0.0], "at least one point"),
        ([1.0, -0.5, 1.0], ">= 0"),
        ([1.0, np.nan, 1.0], "finite"),
        ([1.0, 2.0], "shape"),
    ],
)
def test_weights_that_weigh_nothing_are_refused(weight, message):
    weight, target = jnp.array(weight), jnp.ones((3, 2))
    for compiled in (lambda f: f, jax.jit):
        loss = compiled(
            lambda z: functa.reconstruction_loss(
                lambda z: z * target, z, target, weight=weight
            )
        )
        with pytest.raises(ValueError, match=message):
            loss(jnp.ones(()))
    with pytest.raises(ValueError, match=message):
        inner_loop.largest_eigenvalue(lambda z: z * target, jnp.ones(()), weight=weight)


def test_points_of_weight_zero_have_no_influence():
    field, _ = affine(jax.random.key(0))
    target = jax.random.normal(jax.random.key(1), (3, 2))
    options = {"num_steps": 3, "learning_rate": 0.1}
    weight = jnp.array([1.0, 0.0, 1.0])
    kept = jnp.array([0, 2])

    @jax.jit
    def fits(z):
        whole, _ = functa.fit_latent(field, z, target, weight=weight, **options)
        part, _ = functa.fit_latent(
            lambda z: field(z)[kept], z, target[kept], **options
        )
        return whole, part

    z, part = fits(jnp.zeros(4))
    chex.assert_trees_all_close(z, part, rtol=1e-5, atol=1e-6)


def test_weighted_meta_gradient_is_that_of_the_whole_loss():
    def apply_fn(variables, coords, latent):
        params = variables["params"]
        return jnp.sin(coords @ params["a"] + jnp.expand_dims(latent @ params["b"], 0))

    coords = fields.sphere(np.array([-40.0, 10.0, 70.0]), np.array([0.0, 90.0, 200.0]))
    latent = jnp.zeros(2)
    params = {"a": jnp.arange(6.0).reshape(3, 2), "b": jnp.array([[1.0, 2], [3, -1]])}
    targets = jax.random.normal(jax.random.key(1), (4, 3, 2))
    options = {"num_steps": 2, "weight": jnp.array(WEIGHT)}

    def outer(params, rate):
        _, info = functa.fit_batch(
            apply_fn,
            params,
            latent,
            coords,
            targets,
            learning_rate=rate,
            **options,
        )
        return info.loss[:, -1].mean()

    def grouped(params, rate):
        grads, _ = functa.meta_gradient(
            apply_fn,
            params,
            latent,
            coords,
            targets,
            learning_rate=rate,
            num_groups=2,
            **options,
        )
        return grads

    rate = jnp.array([0.1, 0.2])
    grads = jax.jit(grouped)(params, rate)
    expected = jax.jit(jax.grad(outer, argnums=(0, 1)))(params, rate)
    chex.assert_trees_all_close(grads, expected, rtol=2e-4, atol=1e-6)


def test_weighted_eigenvalue_is_that_of_the_matrix():
    field, matrix = affine(jax.random.key(2))
    value = inner_loop.largest_eigenvalue(field, jnp.zeros(4), weight=WEIGHT)
    share = WEIGHT / (2 * WEIGHT.sum())
    gauss_newton = 2 * np.einsum("ncy,n,ncz->yz", matrix, share, matrix)
    assert value == pytest.approx(np.linalg.eigvalsh(gauss_newton)[-1], rel=1e-4)


# --- the sphere ---


def test_areas_of_bands_are_those_of_quadrature():
    latitude = np.linspace(-90, 90, 13)
    fine = (np.arange(180_000) + 0.5) / 1000 - 90
    nearest = np.abs(fine[:, None] - latitude).argmin(1)
    areas = np.bincount(nearest, np.cos(np.deg2rad(fine)))
    assert fields.band_areas(latitude) == pytest.approx(areas / areas.mean(), rel=1e-4)
    # Between the poles they are proportional to the cosine.
    inner = fields.band_areas(latitude)[1:-1] / np.cos(np.deg2rad(latitude[1:-1]))
    assert inner == pytest.approx(inner[0])


def test_weights_integrate_over_the_sphere():
    latitude, longitude = np.linspace(-90, 90, 73), np.arange(0, 360, 2.5)
    points = fields.sphere(*np.meshgrid(latitude, longitude, indexing="ij"))
    assert np.linalg.norm(points, axis=-1) == pytest.approx(1, abs=1e-6)
    weight = fields.band_areas(latitude)[:, None]
    # The mean of each squared coordinate over the sphere is 1/3, that of z^4 is 1/5.
    means = (weight[..., None] * np.square(points)).mean((0, 1))
    assert means == pytest.approx(1 / 3, abs=1e-3)
    assert (weight * points[..., 2] ** 4).mean() == pytest.approx(1 / 5, abs=1e-3)


# --- the controls ---


def test_few_cells_have_the_components_of_the_covariance():
    signals = np.random.default_rng(0).normal(size=(6, 5, 4, 1))
    few, whole = linear.fit_pca(signals, 3), linear.fit_pca(signals)
    assert few.variance == pytest.approx(whole.variance[:3], rel=1e-6)
    assert few.components == pytest.approx(whole.components[:3], abs=1e-6)
    assert linear.truncation_mse(few, signals) == pytest.approx(
        linear.truncation_mse(whole, signals)[:, :4], abs=1e-9
    )


def test_eof_are_those_of_the_weighted_singular_vectors():
    rng = np.random.default_rng(0)
    train, test = (rng.normal(size=(n, 5, 4, 2)).astype(np.float32) for n in (9, 3))
    weight = rng.uniform(0.2, 2, (5, 4))
    root = np.repeat(np.sqrt(weight).ravel(), 2)
    scaled = [x.reshape(len(x), -1) * root for x in (train, test)]
    mean = scaled[0].mean(0)
    _, _, vectors = np.linalg.svd(scaled[0] - mean, full_matrices=False)
    kept = vectors[:3]
    expected = (mean + (scaled[1] - mean) @ kept.T @ kept) / root
    found = controls.linear_code(train, test, 3, weight=weight)
    assert found.reshape(3, -1) == pytest.approx(expected, abs=1e-5)


def test_quality_of_a_code():
    train = np.zeros((2, 3, 1), np.float32)
    test = np.array([[[1.0], [0.0], [1.0]], [[0.0], [0.0], [1.0]]], np.float32)
    code = test + np.array([[0.1], [0.2], [0.0]], np.float32)
    weight = np.array([1.5, 0.5, 1.0], np.float32)
    found = controls.measure(train, test, code, weight)
    mse = (1.5 * 0.01 + 0.5 * 0.04) / 3
    powers = np.array([2.5, 1.0]) / 3
    assert found["psnr"] == pytest.approx(-10 * np.log10(mse), rel=1e-5)
    assert found["snr"] == pytest.approx(10 * np.log10(powers.mean() / mse), rel=1e-5)
    assert found["iou"] == 1
    assert metrics.iou(np.array([[0.6, 0.6, 0.0]]), np.array([[0.0, 1, 1]])) == 1 / 3
    assert metrics.iou(np.zeros((1, 3)), np.zeros((1, 3))) == 1


# --- files ---


def write_winds(
    path,
    *,
    num_months=132,
    value=3.0,
    latitude=(-90, 0, 90),
    longitude=(0, 90, 180, 270),
    scale=1,
    packed=None,
    missing=None,
):
    with netcdf_file(path, "w") as file:
        sizes = {"TIME": num_months, "FNOCY": 3, "FNOCX": 4}
        axes = np.arange(num_months), latitude, longitude
        for (name, size), values in zip(sizes.items(), axes, strict=True):
            file.createDimension(name, size)
            file.createVariable(name, "f8", (name,))[:] = values
        rng = np.random.default_rng(0)
        for name in ("UWND", "VWND"):
            variable = file.createVariable(
                name, "f4" if packed is None else "i2", tuple(sizes)
            )
            values = scale * rng.normal(size=tuple(sizes.values()))
            values[0, 0, 0] = scale * value
            if packed is not None:
                variable.scale_factor, variable.add_offset = packed
                values = np.rint((values - packed[1]) / packed[0])
            if missing is not None:
                variable.missing_value = np.float32(missing)
            variable[:] = values


def test_winds_of_a_file(tmp_path):
    path = tmp_path / "monthly_navy_winds.cdf"
    write_winds(path)
    found = data.load_dataset("winds", data_dir=str(tmp_path), with_fields=True)
    assert found.splits["train"]["value"].shape == (100, 3, 4, 2)
    assert found.splits["test"]["value"].shape == (32, 3, 4, 2)
    assert found.coords.shape == (3, 4, 3)
    assert found.weight.shape == (3, 4)
    assert found.found.startswith(
        f"winds {tmp_path}: 100 train + 32 test fields of 3x4"
    )
    low, high = found.bounds
    with netcdf_file(path, mmap=False) as file:
        eastward = file.variables["UWND"][:]
    values = found.splits["train"]["value"]
    assert (values.min(), values.max()) == (0, 1)
    assert low + (high - low) * values[..., 0] == pytest.approx(
        eastward[:100], abs=1e-5
    )
    whole = path.read_bytes()
    for damaged in (whole[:200], whole[: len(whole) // 2], b"no winds"):
        path.write_bytes(damaged)
        with pytest.raises(
            ValueError, match="monthly_navy_winds.cdf is not a readable"
        ):
            fields.load_fields("winds", tmp_path)
    for options in ({"num_months": 5}, {"value": -99.9}):
        write_winds(path, **options)
        with pytest.raises(ValueError, match="without missing values"):
            fields.load_fields("winds", tmp_path)
    # Integers with a scale and an offset.
    write_winds(path, packed=(0.1, 3.0))
    packed = fields.load_fields("winds", tmp_path)
    assert packed.bounds == pytest.approx((low, high), abs=0.051)
    restored = low + (high - low) * values
    ours = packed.splits["train"]["value"] * np.ptp(packed.bounds) + packed.bounds[0]
    assert ours == pytest.approx(restored, abs=0.051)
    # A value that the file declares missing is not a wind.
    write_winds(path, value=-9.99, missing=-9.99)
    with pytest.raises(ValueError, match="without missing values"):
        fields.load_fields("winds", tmp_path)
    # A file in the other order would weigh the bands by negative areas.
    for latitude in ((90, 0, -90), (-90, np.nan, 90), (-180, 0, 180)):
        write_winds(path, latitude=latitude)
        with pytest.raises(ValueError, match="must have rising latitudes from -90"):
            fields.load_fields("winds", tmp_path)
    for longitude in ((0, 120, 240, 360), (0, 10, 20, 30), (0, 90, 200, 270)):
        write_winds(path, longitude=longitude)
        with pytest.raises(ValueError, match="longitudes that divide the circle"):
            fields.load_fields("winds", tmp_path)
    write_winds(path, scale=0)
    with pytest.raises(ValueError, match="the same wind everywhere"):
        fields.load_fields("winds", tmp_path)


@pytest.mark.parametrize(
    "name, package",
    [
        ("winds", "ferret-datasets"),
        ("speech", "asterisk-core-sounds-en-wav .*asterisk-core-sounds-ru-wav"),
        ("furniture", "sweethome3d-furniture"),
    ],
)
def test_absent_data_name_their_package(tmp_path, name, package):
    with pytest.raises(FileNotFoundError, match=f"apt-get install {package}"):
        fields.load_fields(name, tmp_path / "absent")


def write_clip(path, samples, *, rate=8000):
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.int16(samples).astype("<i2").tobytes())


def write_speech(root, num_clips=5):
    """Clips of two and a half seconds; every sample names its clip and its second."""
    for number, language in enumerate(fields.LANGUAGES):
        for clip in range(num_clips):
            seconds = np.arange(20000) // 8000
            samples = 1 + 1000 * number + 10 * clip + seconds
            samples[::2] *= -1
            write_clip(root / f"{language}_X_f_A" / "digits" / f"{clip}.wav", samples)
    write_clip(root / "en_X_f_A" / "short.wav", np.ones(7999))
    write_clip(root / "en_X_f_A" / "silent.wav", np.zeros(8000))


def test_windows_of_speech_are_split_by_clip(tmp_path):
    write_speech(tmp_path, num_clips=20)
    found = fields.load_fields("speech", tmp_path, say=lambda line: None)
    assert found.class_names == list(fields.LANGUAGES)
    clips = {}
    for split, arrays in found.splits.items():
        assert arrays["value"].shape[1:] == (8000, 1)
        heights = np.rint((arrays["value"][:, 1, 0] - 0.5) * 2**16) - 1
        assert (heights // 1000 == arrays["label"]).all()
        clips[split] = set(heights // 10)
        assert len(heights) == 2 * len(clips[split])  # two windows of each clip
    assert not clips["train"] & clips["test"]
    assert len(clips["train"] | clips["test"]) == 100
    notes = "; ".join(found.notes)
    assert "1 clips shorter than 8000" in notes
    assert "1 silent" in notes


def test_clips_that_cannot_be_used(tmp_path):
    write_speech(tmp_path)
    bad = tmp_path / "it_X_f_A" / "bad.wav"
    write_clip(bad, np.ones(8000), rate=16000)
    with pytest.raises(ValueError, match="bad.wav must have 8000 Hz.* it has 16000 Hz"):
        fields.load_fields("speech", tmp_path, say=lambda line: None)
    write_clip(bad, np.arange(16000))
    whole = bad.read_bytes()
    chunk_beyond_the_end = whole[:16] + b"\xff\xff\xff\x0f" + whole[20:]
    for content in (
        *(b"", b"RIFF", b"no sound at all", whole[:-1], whole[:20000]),
        chunk_beyond_the_end,
    ):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match="bad.wav is not a readable WAV file"):
            fields.load_fields("speech", tmp_path, say=lambda line: None)
    bad.unlink()
    for path in (tmp_path / "it_X_f_A").rglob("*.wav"):
        write_clip(path, np.ones(100))
    with pytest.raises(ValueError, match="there is no .* window of"):
        fields.load_fields("speech", tmp_path, say=lambda line: None)
    for path in tmp_path.rglob("*.wav"):
        path.unlink()
    with pytest.raises(ValueError, match="there is no test window of en"):
        fields.load_fields("speech", tmp_path, say=lambda line: None)


def test_a_written_sound_is_read_again(tmp_path):
    samples = np.random.default_rng(0).integers(-(2**15) + 1, 2**15, 8000)
    fields.write_wav(tmp_path / "a.wav", samples / (2**15 - 1))
    assert (fields._read_clip(tmp_path / "a.wav") == samples).all()


@pytest.mark.parametrize(
    ("of_file", "of_data"),
    [
        (0xFFFFFFFF, 0xFFFFFFFF),  # ffmpeg
        (0x7FFFF024, 0x7FFFF000),  # SoX
        (0, 0),
        (0xFFFFFFFF, None),
    ],
)
def test_clips_that_a_pipe_has_written_reach_to_the_end(tmp_path, of_file, of_data):
    samples = np.random.default_rng(0).integers(-(2**15), 2**15, 8000)
    path = tmp_path / "a.wav"
    write_clip(path, samples)
    header, content = path.read_bytes()[:44], path.read_bytes()[44:]
    fmt = header[8:36]
    note = b"LIST\x04\x00\x00\x00INFO"  # ffmpeg writes one before the samples.
    of_data = len(content) if of_data is None else of_data
    sizes = [np.uint32(size).astype("<u4").tobytes() for size in (of_file, of_data)]
    whole = b"RIFF" + sizes[0] + fmt + note + b"data" + sizes[1] + content
    path.write_bytes(whole)
    assert (fields._read_clip(path) == samples).all()
    path.write_bytes(whole[:-1])
    if of_data == len(content):
        with pytest.raises(ValueError, match="a.wav is not .*: it ends too early"):
            fields._read_clip(path)
    else:
        assert (fields._read_clip(path) == samples[:-1]).all()


CUBE = b"""# a unit cube, one side at a time
v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nv 0 0 1\nv 1 0 1\nv 1 1 1\nv 0 1 1 0.5 0.5 0.5
f 1 2 3 4\nf 5/1/1 6/1/1 7/2/2 8/2/2\nf 1//1 2//1 6//2 5//2
f 4 3 7 8\nf 1 4 8 5\nf 2 3 7\nf 2 7 6\r
""".replace(b" 0.5 0.5 0.5", b"")


def test_a_cube_has_its_surface_as_voxels():
    vertices, triangles = fields.read_obj(CUBE)
    assert vertices.shape == (8, 3)
    assert triangles.shape == (12, 3)
    corners = vertices[triangles]
    edges = corners[:, 1:] - corners[:, :1]
    areas = np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=-1) / 2
    assert areas == pytest.approx(0.5)
    voxels = fields.voxelize(vertices, triangles, num_points=60_000)
    expected = np.ones((16, 16, 16))
    expected[1:-1, 1:-1, 1:-1] = 0
    assert (voxels == expected).all()
    # A flat box keeps its proportions and lies in the middle.
    flat = fields.voxelize(vertices * [1, 1, 0.25], triangles, num_points=60_000)
    assert np.flatnonzero(flat.any((0, 1))).tolist() in ([6, 7, 8, 9], [*range(6, 11)])


def test_white_space_before_and_after_a_keyword_is_not_read():
    text = CUBE.replace(b"\nf ", b"\n\tf\t", 2).replace(b"v ", b" v  ")
    for found, expected in zip(*map(fields.read_obj, (text, CUBE)), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "text, message",
    [
        (b"v 0 0 0\nf 1 2 3\n", "vertex that does not exist"),
        # Vertices are counted from 1.
        (b"v 0 0 0\nv 1 0 0\nv 1 1 0\nf 0 1 2 3\n", "vertex that does not exist"),
        (b"v 0 0 0\nv 1 0 0\nv 1 1 0\nf 1 x 3\n", "."),
        (b"v 0 0 zero\n", "."),
        # The second vertex has a weight, so all numbers after it would be shifted.
        (b"v 5 5 5\nv 1 0 0 1\nv 0 1\nf 1 2 3\n", "vertex has 2 or 3 or 4 numbers"),
    ],
)
def test_models_that_are_no_models(text, message):
    with pytest.raises(ValueError, match=message):
        fields.read_obj(text)


def test_an_empty_model_has_no_surface():
    for text in (b"", b"v 0 0 0\nv 1 0 0\nv 2 0 0\n", b"v 1 1 1\nf 1 1 1\n"):
        with pytest.raises(ValueError, match="no surface"):
            fields.voxelize(*fields.read_obj(text), num_points=10)
    with pytest.raises(ValueError, match="a vertex has 2 numbers"):
        fields.read_obj(b"v 1 2\nv 3 4\n")


def write_library(path, num_models):
    with zipfile.ZipFile(path, "w") as file:
        lines = ["id=Test", "name=Test"]
        for number in range(1, num_models + 1):
            lines += [
                f"name#{number}=Thing",
                f"category#{number}={'Bedroom' if number % 2 else 'Office'}",
                f"model#{number}=/a/{number}.obj",
            ]
            file.writestr(f"a/{number}.obj", b"" if number == 1 else CUBE)
        file.writestr("PluginFurnitureCatalog.properties", "\n".join(lines))


def test_a_library_of_furniture(tmp_path):
    path = tmp_path / "test.sh3f"
    write_library(path, 12)
    found = fields.load_fields("furniture", tmp_path, say=lambda line: None)
    assert found.class_names == ["Bedroom", "Office"]
    assert found.notes == ["1 models cannot be read"]
    sizes = {k: arrays["value"].shape for k, arrays in found.splits.items()}
    assert sizes == {"train": (9, 16, 16, 16, 1), "test": (2, 16, 16, 16, 1)}
    labels = np.concatenate([a["label"] for a in found.splits.values()])
    assert np.bincount(labels).tolist() == [5, 6]
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="test.sh3f is not a readable library"):
        fields.load_fields("furniture", tmp_path, say=lambda line: None)


# --- what uses them ---


def test_commands_of_images_refuse_fields():
    with pytest.raises(ValueError, match="holds fields that are not images"):
        data.load_dataset("synthetic_winds")
    with pytest.raises(ValueError, match="dataset.image_size=8 is not read"):
        data.load_dataset("synthetic_winds", image_size=8, with_fields=True)


def test_a_grid_of_latents_needs_a_regular_grid_of_points():
    winds = data.load_dataset("synthetic_winds", with_fields=True)
    grid = functa.SpatialSiren(width=4, depth=3, grid=(1, 2), channels=2)
    with pytest.raises(ValueError, match="needs points on a regular grid"):
        encoding.points_of(grid, winds)
    vector = functa.LatentModulatedSiren(width=4, depth=3, latent_dim=2)
    assert encoding.points_of(vector, winds) == (winds.coords, winds.weight)


def test_scaled_coordinates_are_those_of_a_larger_first_layer():
    model = functa.SpatialSiren(
        width=5, depth=3, grid=(4,), channels=2, coord_scale=5.0, out_channels=1
    )
    coords = functa.coordinate_grid((12,))
    latent = jax.random.normal(jax.random.key(1), (4, 2))
    params = jax.jit(model.init)(jax.random.key(0), coords, latent)["params"]
    values = jax.jit(model.apply)({"params": params}, coords, latent)
    larger = {"kernel": 5 * params["layer_0"]["kernel"]}
    plain = jax.jit(model.clone(coord_scale=1.0).apply)(
        {"params": params | {"layer_0": params["layer_0"] | larger}}, coords, latent
    )
    chex.assert_trees_all_close(values, plain, atol=1e-5)
    view = functa.spatial.layout(model, (12,), separate=False)
    by_cells = jax.jit(view.apply_fn)({"params": params}, view.coords, latent)
    chex.assert_trees_all_close(by_cells.reshape(values.shape), values, atol=1e-5)
