"""Public plot functions draw the data that they are given."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import chex  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

import functa.plots  # noqa: E402
import landscape.plots  # noqa: E402
import lbi.plots  # noqa: E402
import vit.plots  # noqa: E402
from experiments.common import files  # noqa: E402
from experiments.drawing import compression, figures  # noqa: E402
from experiments.drawing.run import describe, read_run  # noqa: E402
from experiments.training.landscape import read_arrays  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


X = np.array([1.0, 2.0, 5.0])
RUNS = np.array([[10.0, 20.0, 30.0], [14.0, 26.0, 38.0]])  # (R, K)
ENTRY = np.array([3, -1, 7, 12])
SURFACE = 1 + np.arange(20.0).reshape(4, 5)

# {name: draws into the Axes that it is given, or into its own}.
SINGLE = {
    "functa.psnr_curves": lambda ax: functa.plots.psnr_curves(
        {"a": (X, RUNS)}, points={"a": (X, RUNS[0], RUNS[1])}, marks={"m": 2}, ax=ax
    ),
    "functa.accuracy_curves": lambda ax: functa.plots.accuracy_curves(
        {"a": (X, RUNS), "b": (X, RUNS[1])}, ax=ax
    ),
    "functa.confusion_matrix": lambda ax: functa.plots.confusion_matrix(
        np.array([[3, 1], [0, 2]]), class_names=["cat", "dog"], ax=ax
    ),
    "functa.against_num_values": lambda ax: functa.plots.against_num_values(
        {"PCA": (X, RUNS[0])}, {"functa": (X[:1], X[:1], X[:1])}, ax=ax
    ),
    "functa.rate_curves": lambda ax: functa.plots.rate_curves(
        {"a": (X, RUNS[0]), "b": (X[::-1], RUNS[1])}, level=0.5, ax=ax
    ),
    "vit.training_curves": lambda ax: vit.plots.training_curves(
        {"a": (X, RUNS)}, y_label="loss (nats)", marks={"stage": 2}, ax=ax
    ),
    "vit.accuracy_against_cost": lambda ax: vit.plots.accuracy_against_cost(
        {"a": (X[::-1], RUNS[0], RUNS[1]), "b": (X[:1], X[:1])}, ax=ax
    ),
    "vit.speedup": lambda ax: vit.plots.speedup({"a": (X, RUNS[0], RUNS.T)}, ax=ax),
    "vit.head_scores": lambda ax: vit.plots.head_scores(RUNS, ax=ax),
    "vit.attention_range": lambda ax: vit.plots.attention_range(X / 10, ax=ax),
    "lbi.accuracy_curves": lambda ax: lbi.plots.accuracy_curves(
        {"a": (X, RUNS)}, ax=ax
    ),
    "lbi.entry_path": lambda ax: lbi.plots.entry_path(
        {"conv": ENTRY}, num_steps=20, ax=ax
    ),
    "lbi.accuracy_against_sparsity": lambda ax: lbi.plots.accuracy_against_sparsity(
        X, {"a": RUNS, "b": RUNS[0]}, ax=ax
    ),
    "landscape.envelope": lambda ax: landscape.plots.envelope(
        {"a": (X, RUNS)}, y_label="loss (nats)", log=True, ax=ax
    ),
    "landscape.curves": lambda ax: landscape.plots.curves(
        {"a": (X, RUNS)}, y_label="loss (nats)", ax=ax
    ),
    "landscape.step_profile": lambda ax: landscape.plots.step_profile(
        X, {"a": RUNS}, ax=ax
    ),
    "landscape.eigenvalues": lambda ax: landscape.plots.eigenvalues(
        {"a": (X, RUNS.T)}, ax=ax
    ),
    "landscape.stability": lambda ax: landscape.plots.stability(
        {"a": (X, RUNS)}, ax=ax
    ),
    "landscape.spectral_density": lambda ax: landscape.plots.spectral_density(
        {"a": (X, RUNS[0])}, ax=ax
    ),
    "landscape.surface_contours": lambda ax: landscape.plots.surface_contours(
        SURFACE, np.linspace(-1, 1, 4), np.linspace(-2, 2, 5), ax=ax
    ),
}


@pytest.mark.slow_after(3)
@pytest.mark.parametrize("name", SINGLE)
def test_single_panel_returns_labeled_axes(name):
    own = SINGLE[name](None)
    _, given = plt.subplots()
    assert SINGLE[name](given) is given
    for ax in (own, given):
        assert ax.get_xlabel() and ax.get_ylabel()
        assert ax.has_data()
        ax.figure.canvas.draw()


@pytest.mark.slow_after(11)
@pytest.mark.parametrize("name", SINGLE)
def test_legend_lies_right_of_the_panel(name):
    ax = SINGLE[name](None)
    if ax.get_legend():
        ax.figure.canvas.draw()
        assert ax.get_legend().get_window_extent().x0 >= ax.get_window_extent().x1


@pytest.mark.parametrize("name", ["functa", "vit", "lbi", "landscape"])
def test_every_public_function_of_one_panel_is_tested(name):
    module = {"functa": functa, "vit": vit, "lbi": lbi, "landscape": landscape}[name]
    public = {
        key
        for key, value in vars(module.plots).items()
        if callable(value)
        and getattr(value, "__module__", "") == f"{name}.plots"
        and not key.startswith("_")
    }
    tested = {key.partition(".")[2] for key in SINGLE if key.startswith(f"{name}.")}
    # Multi-panel functions, images without axes and three dimensions are tested below.
    others = {
        *("image_grid", "field_and_gradient", "show_image", "kept_patches"),
        *("latent_channels", "reconstructions", "over_inner_steps"),
        *("super_resolution", "measures"),
        *("globe", "globes", "waveforms", "voxels", "voxel_grid"),
        *("attention_maps", "informativeness", "filter_norms", "pruned_layer"),
        *("surface_3d", "robust_limits", "segments"),
    }
    assert public - others == tested


def test_lines_are_the_data():
    ax = functa.plots.psnr_curves({"a": (X, RUNS)})
    np.testing.assert_allclose(ax.lines[0].get_data(), [X, RUNS.mean(0)])
    band = ax.collections[0].get_paths()[0].vertices
    deviation = RUNS.std(0, ddof=1)
    assert np.isclose(band[:, 1].max(), (RUNS.mean(0) + deviation).max())
    ax = lbi.plots.accuracy_curves({"a": (X, RUNS)})
    band = ax.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (RUNS.min(), RUNS.max())
    ax = vit.plots.accuracy_against_cost({"a": (X[::-1], RUNS[0])})
    # Cheapest first.
    np.testing.assert_allclose(ax.lines[0].get_data(), [X, RUNS[0][::-1]])
    ax = landscape.plots.eigenvalues({"a": (X, RUNS.T)})
    np.testing.assert_allclose([line.get_ydata() for line in ax.lines], RUNS)
    ax = landscape.plots.step_profile(X, {"a": RUNS})
    np.testing.assert_allclose(ax.lines[0].get_ydata(), np.median(RUNS, 0))
    # Labels of a short axis are numbers and do not touch.
    ax.figure.canvas.draw()
    labels = ax.get_xticklabels(minor=True) + ax.get_xticklabels()
    boxes = sorted(
        (text.get_window_extent().x0, text.get_window_extent().x1)
        for text in labels
        if text.get_text() and X.min() <= text.get_position()[0] <= X.max()
    )
    assert len(boxes) == 3  # 1, 2 and 5
    assert all(left[1] < right[0] for left, right in itertools.pairwise(boxes))


def test_entry_path_counts_what_has_entered():
    ax = lbi.plots.entry_path({"conv": ENTRY}, num_steps=20, steps_per_epoch=2)
    np.testing.assert_allclose(
        ax.lines[0].get_data(), [[0, 1.5, 3.5, 6, 10], [0, 25, 50, 75, 75]]
    )
    assert ax.get_xlabel() == "epoch"


def test_psnr_line_where_8_bits_are_exact():
    # Rounding to 255 levels has mean squared error 1 / (12 * 255^2).
    rng = np.random.default_rng(0)
    values = rng.random(100_000)
    error = np.mean(np.square(np.round(255 * values) / 255 - values))
    assert np.isclose(functa.plots.EXACT_TO_8_BITS, -10 * np.log10(error), atol=0.05)
    ax = functa.plots.psnr_curves({"a": (X, np.array([20.0, 40.0, 110.0]))})
    assert ax.get_ylim()[1] > 110  # the measured values are in the figure
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["a", "exact to 8 bits"]
    ax = functa.plots.psnr_curves({"a": (X, np.array([20.0, 40.0, 50.0]))})
    assert len(ax.get_legend().get_texts()) == 1


def test_a_single_measurement_is_not_a_line():
    ax = vit.plots.accuracy_against_cost({"a": (X[:1], X[:1]), "b": (X, X)})
    assert [line.get_linestyle() for line in ax.lines] == ["None", "--"]


def test_curves_differ_in_more_than_color():
    ax = functa.plots.psnr_curves({str(i): (X, RUNS[0] + i) for i in range(5)})
    markers = {line.get_marker() for line in ax.lines}
    assert len(markers) == 5


def test_confusion_matrix_is_in_percent_of_the_true_class():
    ax = functa.plots.confusion_matrix(
        np.array([[3, 1], [0, 2]]), class_names=["cat", "dog"]
    )
    np.testing.assert_allclose(ax.images[0].get_array(), [[75, 25], [0, 100]])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["cat", "dog"]
    assert "83.33" in ax.get_title()


def test_classes_without_examples_may_have_names():
    # The last class is in none of the images; the names are an array of a file.
    names = np.array(["cat", "dog", "emu"])
    ax = functa.plots.confusion_matrix(np.eye(2), class_names=names)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["cat", "dog"]
    with pytest.raises(ValueError, match="2 classes need names, got 1"):
        functa.plots.confusion_matrix(np.eye(2), class_names=["cat"])


def test_a_few_confused_examples_are_not_written_as_zero():
    # 0.5 %, which rounds to zero, and no example.
    ax = functa.plots.confusion_matrix(np.array([[199, 1], [0, 200]]))
    assert [text.get_text() for text in ax.texts] == ["100", "<1", "100"]


def test_image_functions_show_the_images():
    rng = np.random.default_rng(0)
    images = rng.random((2, 4, 6, 3))
    figure = functa.plots.image_grid(
        [images, images[:1, ..., :1]], row_labels=["a", "b"], column_titles=["c", "d"]
    )
    axes = figure.axes
    np.testing.assert_allclose(axes[1].images[0].get_array(), images[1])
    np.testing.assert_allclose(axes[2].images[0].get_array(), images[0, ..., 0])
    assert [ax.get_ylabel() for ax in axes[::2]] == ["a", "b"]
    gradient = rng.random((1, 4, 6))
    figure = functa.plots.field_and_gradient(images, images[:1], gradient)
    np.testing.assert_allclose(
        figure.axes[2].images[0].get_array(), np.sqrt(gradient[0])
    )
    _, given = plt.subplots()
    assert functa.plots.show_image(images[0], ax=given) is given


def test_images_of_8_bits_are_shown_like_fractions_of_255():
    images = np.random.default_rng(0).integers(256, size=(2, 4, 4, 3), dtype=np.uint8)
    changed = images[::-1]  # Differences in uint8 would wrap around.
    kept = np.array([[[True, False, True, True]] * 2])
    segments = np.array([[0, 1, 2, 2]])

    def shown(scale):
        image, other = scale(images), scale(changed)
        figures = (
            functa.plots.reconstructions(image, {"a": other}),
            functa.plots.over_inner_steps(other[None], image),
            functa.plots.super_resolution({"a": image}),
            vit.plots.kept_patches(image, kept),
            vit.plots.segments(image[0], segments),
        )
        for figure in figures:
            for ax in figure.axes:
                yield (
                    ax.get_title(),
                    ax.get_xlabel(),
                    [np.asarray(one.get_array()) for one in ax.images],
                )

    for ours, expected in zip(
        shown(lambda x: x), shown(lambda x: x / 255), strict=True
    ):
        chex.assert_trees_all_close(ours[2], expected[2], atol=1e-12)
        assert ours[:2] == expected[:2]


def test_channels_of_a_latent_grid_share_a_symmetric_scale():
    latent = np.random.default_rng(0).normal(size=(2, 3, 10))
    figure = functa.plots.latent_channels(latent)
    shown = [ax.images[0] for ax in figure.axes if ax.get_title()]
    assert len(shown) == 10
    for number, image in enumerate(shown):
        np.testing.assert_allclose(image.get_array(), latent[..., number])
        low, high = image.get_clim()
        assert -low == high == np.abs(latent).max()
    figure.canvas.draw()
    assert len(functa.plots.latent_channels(latent, num_channels=3).axes) == 4


def test_reconstructions_show_psnr_and_error():
    images = np.random.default_rng(0).random((2, 4, 6, 3))
    codes = {"a": images + 0.1, "b": images.copy()}
    codes["b"][1] -= [0.3, 0.0, 0.0]
    figure = functa.plots.reconstructions(images, codes)
    axes = np.reshape(figure.axes[:-1], (5, 2))
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["image", "a", "error"] + [
        "b",
        "error",
    ]
    # MSE 0.01, and 0.09 in one of three channels.
    titles = [ax.get_title() for ax in axes[1::2].flat]
    assert titles == ["20.0 dB", "20.0 dB", "exact", "15.2 dB"]
    for row, expected in ((2, (0.1, 0.1)), (4, (0.0, 0.1))):
        for ax, error in zip(axes[row], expected, strict=True):
            [image] = ax.images
            np.testing.assert_allclose(image.get_array(), error, atol=1e-12)
            assert image.get_clim() == pytest.approx((0, 0.1))
    figure.canvas.draw()


def test_inner_steps_are_columns_with_their_psnr():
    image = np.full((1, 3, 4, 1), 0.5)
    figure = functa.plots.over_inner_steps(
        np.stack([image - 0.1, image - 0.01]), image, row_labels=["test 0"]
    )
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["inner step 0", "inner step 1", "image"]
    assert [ax.get_xlabel() for ax in figure.axes] == ["20.0 dB", "40.0 dB", ""]
    assert figure.axes[0].get_ylabel() == "test 0"
    np.testing.assert_allclose(figure.axes[1].images[0].get_array(), 0.49)


def test_measures_of_each_source_are_at_its_place():
    figure = functa.plots.measures(
        {
            "distance": {"flow": (2.0, 0.5), "Gaussian": (3.0, 0.25)},
            "ratio": {"Gaussian": 0.9},
        },
        levels={"ratio": 1.0},
        level_label="ideal",
        num_columns=1,
    )
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ideal"]
    first, second = figure.axes
    names = [label.get_text() for label in first.get_yticklabels()]
    assert names == ["flow", "Gaussian"] and first.get_title() == "distance"
    points = [container.lines[0].get_xydata() for container in first.containers]
    np.testing.assert_allclose(np.concatenate(points), [[2, 0], [3, 1]])
    [bar] = first.containers[0].lines[2][0].get_segments()
    np.testing.assert_allclose(bar[:, 0], [1.5, 2.5])
    # One source, without an error, and the level.
    [container] = second.containers
    np.testing.assert_allclose(container.lines[0].get_xydata(), [[0.9, 1]])
    np.testing.assert_allclose(second.lines[-1].get_xdata(), [1, 1])
    figure.canvas.draw()


def test_super_resolution_enlarges_the_same_window():
    image = np.random.default_rng(0).random((1, 4, 8, 3))
    large = image.repeat(2, 1).repeat(2, 2)
    figure = functa.plots.super_resolution(
        {"original": image, "field": large}, window=(0.5, 0.25, 0.5, 0.5)
    )
    whole, wholes, part, parts = figure.axes
    assert whole.get_title() == "original\n4 x 8"
    assert wholes.get_title() == "field\n8 x 16"
    for ax, expected in ((part, image[0, 2:, 2:6]), (parts, large[0, 4:, 4:12])):
        np.testing.assert_allclose(ax.images[0].get_array(), expected)
    [frame] = whole.patches
    assert (*frame.get_xy(), frame.get_width(), frame.get_height()) == (1.5, 1.5, 4, 2)
    figure.canvas.draw()


def sphere(latitude, longitude):
    """Points (H, W, 3) of the unit sphere, from angles in degrees."""
    a, b = np.meshgrid(np.deg2rad(latitude), np.deg2rad(longitude), indexing="ij")
    return np.stack([np.cos(a) * np.cos(b), np.cos(a) * np.sin(b), np.sin(a)], -1)


def test_globe_shows_the_place_that_it_faces():
    latitude, longitude = np.linspace(-90, 90, 13), np.arange(0, 360, 15)
    values = latitude[:, None] + 1000.0 * longitude
    coords = sphere(latitude, longitude)
    _, ax = plt.subplots()
    assert functa.plots.globe(values, coords, center=(30, 90), ax=ax) is ax
    picture = ax.images[0].get_array()
    size = len(picture)
    assert picture[size // 2, size // 2] == 30 + 1000 * 90
    assert picture.mask[0, 0]
    # North is at the top, east at the right: here the place 30 degrees from the middle.
    north = picture[round(size * (0.5 + 0.25)), size // 2]
    assert north == 60 + 1000 * 90
    functa.plots.globe(values, coords, center=(0, 90), ax=ax)
    picture = ax.images[-1].get_array()
    assert picture[size // 2, round(size * 0.75)] == 1000 * 120


def test_globes_have_rows_of_data_codes_and_errors():
    coords = sphere(np.linspace(-90, 90, 7), np.arange(0, 360, 45))
    data = np.random.default_rng(0).normal(size=(2, 7, 8, 2))
    figure = functa.plots.globes(data, {"a": data + [3, 4]}, coords)
    panels = figure.axes[:6]
    lengths = panels[2].images[0].get_array().compressed()
    np.testing.assert_allclose(lengths, 5)  # The error is (3, 4) everywhere.
    assert [ax.get_xlabel() for ax in figure.axes[6:]] == [
        *("speed (m/s)", "speed (m/s)", "length of the error (m/s)")
    ]


def test_waveforms_show_the_loudest_part():
    sounds = np.zeros((2, 1000))
    sounds[:, 700] = 0.5
    codes = {"field": sounds / 2, "other": 0 * sounds}
    figure = functa.plots.waveforms(sounds, codes, sample_rate=1000.0, window=0.1)
    whole, part = figure.axes[:2]
    assert whole.get_ylabel().startswith("pressure")
    data, field, _ = part.lines
    np.testing.assert_array_equal(data.get_ydata(), sounds[0, 650:750])
    np.testing.assert_array_equal(field.get_ydata(), sounds[0, 650:750] / 2)
    assert figure.axes[-1].get_xlabel() == "time (ms)"


def test_voxels_above_the_threshold_are_drawn():
    shape = np.zeros((3, 4, 5))
    shape[1, 2, 3] = 0.6
    ax = functa.plots.voxels(shape)
    [box] = ax.collections
    assert len(box.get_facecolor()) == 6  # the faces of one cube
    figure = functa.plots.voxel_grid({"a": [shape, shape], "b": [shape, 0 * shape]})
    assert [len(ax.collections) for ax in figure.axes] == [1, 1, 1, 0]


def test_sizes_are_on_a_logarithmic_axis():
    ax = functa.plots.against_num_values(
        {"PCA": (X, RUNS[0])}, {"functa": (X[1:], RUNS[1][1:])}, y_label="accuracy (%)"
    )
    assert ax.get_xscale() == "log" and ax.get_ylabel() == "accuracy (%)"
    np.testing.assert_allclose(ax.lines[0].get_data(), [X, RUNS[0]])
    np.testing.assert_allclose(ax.lines[1].get_data(), [X[1:], RUNS[1][1:]])
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["PCA", "functa"]


def test_the_level_of_rate_curves_has_a_name():
    ax = functa.plots.rate_curves({"a": (X, RUNS[0])}, level=20, level_label="target")
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["a", "target"]
    np.testing.assert_allclose(ax.lines[1].get_ydata(), 20)


def test_error_bars_of_pruning_stand_apart_and_stay_in_percent():
    values = np.array([[50.0, 0.0, 100.0], [90.0, 100.0, 100.0]])  # (R, K)
    ax = lbi.plots.accuracy_against_sparsity(100 * X, {"a": values, "b": values})
    first, second = (
        container.lines[2][0].get_segments() for container in ax.containers
    )
    for one, other in zip(first, second, strict=True):
        assert one[0, 0] < other[0, 0] and abs(one[0, 0] - other[0, 0]) < 5
        np.testing.assert_allclose(one[:, 1], other[:, 1])
    deviation = np.sqrt(800)  # of 50 and 90
    expected = [[70 - deviation, 70 + deviation], [0, 100], [100, 100]]
    np.testing.assert_allclose([bar[:, 1] for bar in first], expected)
    # A single network has no error bar and lies at its sparsity.
    ax = lbi.plots.accuracy_against_sparsity(X, {"a": RUNS[0], "b": RUNS[1]})
    for container in ax.containers:
        np.testing.assert_allclose(container.lines[0].get_xdata(), X)


def test_kept_patches_fades_what_is_pruned():
    image = np.zeros((1, 4, 4, 3))
    kept = np.ones((3, 1, 4), bool)
    kept[2, 0, 1] = False  # the upper right quarter
    figure = vit.plots.kept_patches(image, kept)
    shown = figure.axes[3].images[0].get_array()
    assert np.all(shown[:2, 2:] == [0.15, 0.5, 0.75])
    assert np.sum(shown) == pytest.approx(4 * 1.4)
    assert "75 %" in figure.axes[3].get_title()
    # In a gray image only pruned patches have a color, whatever their pixels are.
    image = np.linspace(0, 1, 16).reshape(1, 4, 4, 1)
    figure = vit.plots.kept_patches(image, kept)
    shown = figure.axes[3].images[0].get_array()
    pruned = np.ptp(shown, axis=-1) > 0.3
    assert pruned[:2, 2:].all() and pruned.sum() == 4
    with pytest.raises(ValueError, match="square"):
        vit.plots.kept_patches(image, np.ones((3, 1, 5), bool))


def test_segments_are_lighter_the_more_they_are_attended():
    segments = np.array([[0, 1, 2, 2], [2, 1, 0, 0]])
    # On a black image, too.
    for image in (np.ones((4, 4, 3)), np.zeros((4, 4, 1))):
        figure = vit.plots.segments(image, segments)
        for head in range(2):
            shown = figure.axes[head + 1].images[0].get_array()[::2, ::2].mean(-1)
            values, ranks = np.unique(shown, return_inverse=True)
            np.testing.assert_array_equal(ranks.ravel(), segments[head])
            assert np.diff(values).min() > 0.05
        names = [text.get_text() for text in figure.legends[0].get_texts()]
        least, most = "segment 1: least attended", "segment 3: most attended"
        assert names == [least, "segment 2", most]
    with pytest.raises(ValueError, match="square; give grid"):
        vit.plots.segments(np.ones((4, 4, 3)), segments[:, :3])


def test_patches_of_oblong_images_lie_in_their_rows():
    # 2 x 3 patches of an image of 4 x 6 pixels; the last of the first row is pruned.
    kept = np.array([[[1, 1, 0, 1, 1, 1]]], bool)
    for image, grid in (
        (np.zeros((1, 4, 6, 3)), None),
        (np.zeros((1, 6, 6, 3)), (2, 3)),
    ):
        figure = vit.plots.kept_patches(image, kept, grid=grid)
        shown = figure.axes[1].images[0].get_array()
        expected = np.zeros(image.shape[1:])
        expected[: image.shape[1] // 2, 4:] = [0.15, 0.5, 0.75]
        np.testing.assert_array_equal(shown, expected)
    figure = vit.plots.segments(np.ones((4, 6, 3)), np.arange(6)[None] // 2)
    shown = figure.axes[1].images[0].get_array()[::2, ::2].mean(-1)
    _, ranks = np.unique(shown, return_inverse=True)
    np.testing.assert_array_equal(ranks.reshape(2, 3), [[0, 0, 1], [1, 2, 2]])
    for grid, message in ((None, "6x6 pixels are not square"), ((2, 2), "6 patches")):
        with pytest.raises(ValueError, match=message):
            vit.plots.kept_patches(np.zeros((1, 6, 6, 1)), kept, grid=grid)


def test_attention_and_informativeness():
    rng = np.random.default_rng(0)
    attention = rng.random((3, 5, 5))
    figure = vit.plots.attention_maps(attention, ranges=np.array([0.1, 0.2, 0.3]))
    np.testing.assert_allclose(
        figure.axes[1].images[0].get_array(), 100 * attention[1, 1:, 1:]
    )
    assert figure.axes[1].get_title() == "layer 1, attention range 0.20"
    # Registers, DeiT, or patches alone; a cascade leaves other sizes in other layers.
    for num_prefix in (0, 2):
        figure = vit.plots.attention_maps(
            [attention[0], attention[1, :4, :4]], num_prefix=num_prefix
        )
        np.testing.assert_allclose(
            figure.axes[1].images[0].get_array(),
            100 * attention[1, num_prefix:4, num_prefix:4],
        )
    with pytest.raises(ValueError, match=r"more than num_prefix = 5 tokens, .* \(5, 5"):
        vit.plots.attention_maps(attention, num_prefix=5)
    figure = vit.plots.informativeness(rng.random((3, 2, 4)))
    assert len(figure.axes[1].lines) == 3
    for ax in figure.axes:
        assert ax.get_xlabel() and ax.get_ylabel()


def test_filters_and_pruned_layer():
    norms = np.array([1.0, 4.0, 2.0, 3.0])
    figure = lbi.plots.filter_norms({"conv1": (norms, ENTRY)})
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == sorted(norms, reverse=True)
    assert figure.axes[0].patches[0].get_hatch()  # the largest never entered
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 2, 4))
    kept = np.array([True, False, True, True])
    figure = lbi.plots.pruned_layer(kernel, kept, name="conv1")
    before, after = (ax.images[0].get_array() for ax in figure.axes[:2])
    assert after.mask[:, 3].all() and not after.mask[:, :3].any()
    lengths = np.linalg.norm(before, axis=0)
    expected = np.linalg.norm(kernel.reshape(6, 4), axis=0)
    np.testing.assert_allclose(lengths[3], expected[1])
    np.testing.assert_allclose(lengths[:3], np.sort(expected[kept])[::-1])
    assert "1 of 4" in figure.axes[1].get_title()
    figure = lbi.plots.pruned_layer(kernel, kept.astype(int), name="conv1")
    np.testing.assert_array_equal(figure.axes[1].images[0].get_array().mask, after.mask)
    with pytest.raises(ValueError, match="no layer to draw"):
        lbi.plots.filter_norms({})


def test_surface_3d_has_three_named_axes():
    ax = landscape.plots.surface_3d(SURFACE, np.arange(4), np.arange(5))
    assert ax.get_xlabel() and ax.get_ylabel() and ax.get_zlabel()
    given = plt.figure().add_subplot(projection="3d")
    points = np.arange(4), np.arange(5)
    assert landscape.plots.surface_3d(SURFACE, *points, ax=given) is given


def test_robust_limits_ignore_infinity():
    low, high = landscape.plots.robust_limits(np.array([1.0, 2.0, np.inf]))
    assert low == 1 and 1.9 < high <= 2


def test_negative_losses_have_a_linear_scale():
    losses = np.array([[-5.0, -4.0, np.inf], [-3.0, -2.0, 3.0], [0.0, 1.0, 900.0]])
    low, high = landscape.plots.robust_limits(losses)
    # The median of the finite ones, -1, is 4 above the smallest.
    assert (low, high) == (-5, -5 + 30 * 4)
    ax = landscape.plots.surface_contours(losses, np.arange(3))
    assert ax.collections[0].norm.vmin == -5 and ax.collections[0].norm(55) == 0.5
    ax.figure.draw_without_rendering()
    ticks = ax.figure.axes[1].get_yticks()
    np.testing.assert_array_equal(ticks[(ticks > -5) & (ticks < 110)] % 10, 0)
    ax = landscape.plots.surface_3d(losses, np.arange(3), loss_label="reward")
    assert ax.get_zlim() == (-5, 115) and ax.get_zlabel() == "reward"
    with pytest.raises(ValueError, match="no loss is finite"):
        landscape.plots.robust_limits(np.full((2, 2), np.nan))


def test_probes_that_are_not_finite_leave_the_others_in_the_profile():
    betas = np.array([[1.0, 2.0], [3.0, 4.0], [np.inf, np.nan]])
    draw = landscape.plots.step_profile
    ax = draw(np.array([0.1, 0.2]), {"a": betas, "b": betas[2:]})
    first, second = ax.lines
    np.testing.assert_allclose(first.get_ydata(), [2, 3])
    assert np.isnan(second.get_ydata()).all()
    ax.figure.canvas.draw()
    draw(np.array([0.1, 0.2]), {"a": betas[2:]}).figure.canvas.draw()


def test_densities_that_are_not_finite_leave_the_others():
    densities = {"a": (X, np.full(len(X), np.nan)), "b": (X, np.ones(len(X)))}
    ax = landscape.plots.spectral_density(densities)
    assert ax.get_ylim() == (1e-7, 2)
    landscape.plots.spectral_density({}).figure.canvas.draw()


def test_plots_import_no_matplotlib():
    script = (
        "import sys, functa.plots, vit.plots, lbi.plots, landscape.plots;"
        "sys.exit('matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


def write_run(folder, config, metrics=(), summary=None, arrays=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    text = "".join(json.dumps(line) + "\n" for line in metrics)
    (folder / "metrics.jsonl").write_text(text)
    if summary:
        files.write_json(folder / "summary.json", summary)
    if arrays:
        files.write_npz(folder / "arrays.npz", arrays)


def drawn(folder):
    return {path.stem for path in (folder / "figures").glob("*.png")}


def meta_learn_run(folder, arrays=None):
    config = {
        "experiment": "meta_learn",
        "variant": "tiny",
        "dataset": {"name": "digits"},
        "seeds": [3, 4],
        "num_steps": 4,
        "coarse_steps": 2,
        "coarse_factor": 2,
        "inner": {"num_steps": 2},
        "model": {"type": "SpatialSiren"},
    }
    metrics = [{"step": s, "psnr_per_step": [9.0, 12.0 + s, 14.0]} for s in (2, 4)]
    summary = {"test_psnr_per_step": [9.0, 13.0, 15.0]}
    write_run(folder, config, metrics, summary, arrays)


def test_a_run_without_arrays_draws_what_it_can(tmp_path, capsys):
    meta_learn_run(tmp_path)
    figures.draw(tmp_path)
    assert drawn(tmp_path) == {"psnr"}
    [line] = capsys.readouterr().out.splitlines()
    assert "over_steps" in line and "interpolation" in line
    title = describe(read_run(tmp_path))
    assert title == "meta_learn tiny, digits, seeds 3, 4, 4 steps"


@pytest.mark.slow
def test_a_run_with_arrays_draws_everything(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "further_psnr": np.array([9.0, 13.0, 15.0, 70.0]),
        "over_steps": rng.random((4, 2, 3, 5, 1)),
        "interpolation": rng.random((3, 3, 5, 1)),
        "super_resolved": rng.random((2, 12, 20, 1)),
        "latents": rng.normal(size=(2, 3, 5, 9)),
    }
    for name in ("train_best", "train_worst", "test_best", "test_worst"):
        arrays[name] = rng.random((2, 2, 3, 5, 1))
        arrays[f"{name}_psnr"] = np.array([20.0, 30.0])
    meta_learn_run(tmp_path, arrays)
    figures.draw(tmp_path)
    names = {"psnr", "best_and_worst", "over_inner_steps", "interpolation"}
    names |= {"super_resolution", "reconstructions", "latent_channels"}
    assert drawn(tmp_path) == names


def test_two_runs_are_compared(tmp_path):
    rng = np.random.default_rng(0)
    steps = rng.random((3, 2, 4, 4, 1))
    for name, images in (
        ("a", steps),
        ("b", steps),
        ("other", 1 - steps),
        ("none", None),
    ):
        arrays = {"over_steps": images, "super_resolved": rng.random((2, 16, 16, 1))}
        meta_learn_run(tmp_path / name, images is not None and arrays)
    figures.compare(tmp_path / "a", tmp_path / "b")
    assert drawn(tmp_path / "a") == {"super_resolution_compared"}
    with pytest.raises(ValueError, match="other test images"):
        figures.compare(tmp_path / "a", tmp_path / "other")
    with pytest.raises(ValueError, match="none has no enlarged images"):
        figures.compare(tmp_path / "none", tmp_path / "a")


@pytest.mark.parametrize(
    "changes",
    [
        {"over_steps": np.float32(1)},
        {"super_resolved": np.ones((1, 8, 8, 1))},
        {"super_resolved": np.ones((2, 8))},
        {"super_resolved": np.array(["a", "b"])},
    ],
)
def test_other_arrays_are_not_compared(tmp_path, changes):
    images = {"over_steps": np.ones((3, 2, 4, 4, 1))}
    arrays = images | {"super_resolved": np.ones((2, 8, 8, 1))} | changes
    meta_learn_run(tmp_path / "a", arrays)
    with pytest.raises(ValueError, match="a has no enlarged images"):
        figures.compare(tmp_path / "a", tmp_path / "a")


def test_fields_of_the_data_set_stand_with_the_controls(tmp_path, monkeypatch):
    grid = {"type": "SpatialSiren", "grid": [2, 4], "channels": 3}
    for name, model, psnr, num_images in (
        ("digits", {"type": "LatentModulatedSiren", "latent_dim": 5}, 30.0, 10),
        ("digits_spatial", grid, 40.0, 10),
        ("digits_few", grid, 50.0, 9),  # of other test images
        ("digits100", grid, 60.0, 10),  # another data set
    ):
        summary = {"test_psnr": psnr, "num_test_images": num_images}
        folder = tmp_path / f"meta_learn_{name}"
        write_run(folder, {"model": model}, summary=summary | {"test_psnr_std": 0.5})
    monkeypatch.setattr(compression, "_RESULTS", tmp_path)
    points = compression._fields_in_results("digits", {"num_test_images": 10})
    assert {label: np.ravel(rows).tolist() for label, rows in points.items()} == {
        "field, one latent": [5, 30, 0.5],
        "field, grid of 2x4": [24, 40, 0.5],
    }


def test_a_broken_figure_costs_a_warning(tmp_path, capsys):
    # The images are of another number than the figure expects.
    meta_learn_run(tmp_path, {"over_steps": np.zeros((2, 2)), "interpolation": X})
    figures.draw(tmp_path)
    assert "warning: figure interpolation is not drawn" in capsys.readouterr().out
    assert "psnr" in drawn(tmp_path)


def test_prune_vit_is_rebuilt_from_its_summary(tmp_path):
    def row(method, ratio, cost, accuracy, **more):
        own = {"method": method, "ratio": ratio, "multiply_adds": cost}
        return own | {"accuracy": accuracy, "predicted_speedup": 10 / cost} | more

    rows = [
        row("dense", 0.0, 10, 0.9, speedup_2=1.0),
        row("max", 0.2, 8, 0.8, speedup_2=1.2),
        row("max", 0.4, 6, 0.7, speedup_2=1.4),
        row("random", 0.4, 6, 0.5),
    ]
    config = {
        "experiment": "prune_vit",
        "dataset": {"name": "digits"},
        "seed": 0,
        "tuning": {"training": {"batch_size": 8}},
    }
    write_run(
        tmp_path, config, summary={"rows": {str(i): r for i, r in enumerate(rows)}}
    )
    figures.draw(tmp_path)
    assert drawn(tmp_path) == {"accuracy_and_cost", "speed"}


@pytest.mark.slow
def test_probe_landscape_is_rebuilt_from_its_logs(tmp_path):
    config = {
        "experiment": "probe_landscape",
        "dataset": {"name": "digits"},
        "seeds": [0],
        "networks": ["bn", "plain"],
        "learning_rates": [0.1, 0.2],
        "step_sizes": [0.5, 1.0, 2.0],
        "num_epochs": 2,
        "sharpness": {"every": 4},
        "surface": {"size": 0},
        "optimizer": {"name": "sgd", "options": {}},
    }
    write_run(tmp_path, config)
    probe = {"losses": [1.0, 2.0, 3.0], "grad_distances": [1.0, 2.0, 3.0]}
    probe |= {"relative_grad_distances": [1.0, 2.0, 3.0], "betas": [3.0, 2.0, 1.0]}
    for network in config["networks"]:
        for number, rate in enumerate(config["learning_rates"]):
            lines = [
                {"step": s, "probe": probe, "loss": number + 1 / (1 + s)}
                | ({} if s == 2 else {"eigenvalues": [3.0, 1.0, -1.0]})
                for s in (0, 2, 4)
            ]
            del lines[0]["loss"]
            write_run(tmp_path / f"{network}_rate{rate:g}_seed0", config, lines)
    figures.draw(tmp_path)
    names = {"loss_envelope", "along_the_gradient", "beta_profile", "eigenvalues"}
    assert drawn(tmp_path) == names
    rebuilt = read_arrays(tmp_path, config)
    assert rebuilt["bn/logged_loss"].shape == (2, 1, 2)
    np.testing.assert_allclose(rebuilt["bn/loss_step"][0, 0], [1, 3])
    assert rebuilt["steps_per_epoch"] == 2


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        figures.draw(tmp_path)


@pytest.mark.parametrize(
    ("config", "title"),
    [
        (
            {"experiment": "classify_functa", "features": "patches"},
            "classify_functa, functaset meta_learn/a, features patches",
        ),
        (
            {"experiment": "compress_functa", "run": "runs/meta_learn/a"},
            "compress_functa, functaset meta_learn/a",
        ),
        (
            {
                "experiment": "train_vit",
                "variant": "cifar10_cpu",
                "dataset": {"name": "cifar10"},
            },
            "train_vit cifar10_cpu, functaset meta_learn/a",
        ),
    ],
)
def test_titles_name_what_a_run_reads_once(tmp_path, config, title):
    config = config | {"functaset": "runs/meta_learn/a/functaset.npz"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert describe(read_run(tmp_path)) == title


def test_lists_and_matrices_of_weights_are_drawn():
    values = [[90.0, 80.0], [91.0, 82.0]]
    ax = lbi.plots.accuracy_against_sparsity([0, 50], {"a": values, "b": values})
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [90.5, 81.0])
    # Every weight of a matrix is a group of its own.
    layers = {"fc": ([[3.0, 1.0], [2.0, 4.0]], [[1, -1], [2, 5]])}
    ax = lbi.plots.filter_norms(layers).axes[0]
    assert [bar.get_height() for bar in ax.patches] == [4.0, 3.0, 2.0, 1.0]
    assert "75 % entered" in ax.get_title()


def test_a_mask_of_another_layer_is_not_drawn():
    with pytest.raises(
        ValueError, match=r"fc: the mask must have shape \(4,\), got .3"
    ):
        lbi.plots.pruned_layer(np.ones((3, 4)), np.ones(3, bool), name="fc")


def test_a_single_run_needs_no_axis_of_repeats():
    y = np.array([3.0, 1.0, 2.0])
    band = landscape.plots.envelope({"a": (X, y.tolist())}, y_label="loss")
    profile = landscape.plots.step_profile(X.tolist(), {"a": y.tolist()})
    tracked = landscape.plots.eigenvalues({"a": (X, y.tolist())})
    for ax in (band, profile, tracked):
        np.testing.assert_array_equal(ax.lines[0].get_ydata(), y)


def test_legends_of_many_curves_leave_room_for_the_panel():
    for module, draw in (
        (landscape, landscape.plots.curves),
        (vit, vit.plots.training_curves),
    ):
        values = {f"layer {i}": (X, X + i) for i in range(48)}
        ax = draw(values, y_label="loss")
        ax.figure.draw_without_rendering()
        legend = ax.get_legend().get_window_extent()
        assert legend.y0 > 0, module.__name__
        assert ax.get_position().height > 0.6, module.__name__


@pytest.mark.parametrize(
    "draw", [landscape.plots.surface_contours, landscape.plots.surface_3d]
)
def test_surfaces_that_do_not_fit_their_coordinates_are_refused(draw):
    first, second = [-1, 0, 1, 2], [0, 1, 2, 3, 4]
    draw(SURFACE.tolist(), first, second, limits=np.array([1.0, 20.0]))
    for losses, x, y in (
        (SURFACE.ravel(), first, second),
        (SURFACE, second, first),
        (np.ones((1, 1)), [0], None),
    ):
        with pytest.raises(ValueError, match=r"losses must be \(A, B\), .* got \("):
            draw(losses, x, y)


def test_arrays_that_would_be_drawn_as_colors_are_refused():
    image, kept = np.ones((2, 4, 4, 3)), np.ones((3, 2, 4), bool)
    for draw, message in (
        # Three or four heads would be red, green, blue and alpha.
        (lambda: vit.plots.head_scores(np.ones((2, 5, 3))), "layers, heads"),
        (lambda: vit.plots.attention_maps(np.ones((2, 3, 4, 4))), "mean over the head"),
        (lambda: vit.plots.attention_maps(np.ones((5, 5))), r"\(T, T\), got \(5,\)"),
        (lambda: vit.plots.informativeness(np.ones((2, 4))), "layers, images, patches"),
        (lambda: vit.plots.segments(image[0], kept), "segments of one image"),
        (lambda: vit.plots.segments(image[0, ..., 0], kept[0] * 1), "an image must be"),
        (lambda: vit.plots.kept_patches(image[..., 0], kept), "an image must be"),
        (lambda: vit.plots.kept_patches(image[..., :2], kept), "1 or 3 channels"),
        (lambda: vit.plots.kept_patches(image[:1], kept), "2 images, but there are 1"),
    ):
        with pytest.raises(ValueError, match=message):
            draw()
