"""The story: how its steps are linked, what its summary and its page say."""

import re

import numpy as np
import pytest

from experiments import story
from experiments.common import page, runs
from experiments.configs import story as configs


def test_every_step_reads_what_the_steps_before_write(tmp_path):
    config = configs.get_config("smoke")
    steps = story.plan(config, tmp_path)
    commands = [command for command, _ in steps.values()]
    assert commands == [
        *("meta_learn", "classify_functa", "prune_vit", "prune_vit"),
        *("probe_landscape", "probe_landscape"),
    ]
    made = {step: one for step, (_, one) in steps.items()}
    functaset = str(tmp_path / "functa" / "functaset.npz")
    model = str(tmp_path / "classify" / "model.npz")
    assert made["classify"].functaset == functaset
    assert made["cascade"].checkpoint == model
    assert made["structure"].checkpoint == str(tmp_path / "cascade/networks/max.npz")
    assert made["landscape_before"].network_options.checkpoint == model
    cut = str(tmp_path / "structure/networks/structure_lbi.npz")
    assert made["landscape_after"].network_options.checkpoint == cut
    for step in ("cascade", "structure", "landscape_before", "landscape_after"):
        assert made[step].dataset.name == "functaset"
        assert made[step].dataset.data_dir == functaset
    assert made["cascade"].budget == config.cascade_budget
    assert made["cascade"].image_size == made["functa"].model.grid[0] == 2


@pytest.mark.parametrize("variant", configs.VARIANTS)
def test_variants_of_the_steps_exist(variant, tmp_path):
    assert len(story.plan(configs.get_config(variant), tmp_path)) == 6


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("meta_learn.nosuch", 1, "meta_learn: .* unknown field 'nosuch'"),
        ("meta_learn.num_steps", -1, "meta_learn: num_steps must be at least"),
        ("prune_vit.variant", "no", "prune_vit: variant 'no' must be one of"),
        ("meta_learn.model", {"grid": (2, 4)}, "model.grid must be square"),
        ("cascade_budget", 1.5, "cascade_budget must be in"),
        ("timed_batch_size", 7, r"timed_batch_size must be one of .* \(1, 32\); got 7"),
        ("meta_learn", {}, "meta_learn must name a variant"),
        ("prune_vit.methods", {"max": (0.3,)}, "prune_vit.methods.max is set by the"),
        ("classify_functa.functaset", "x.npz", "functaset is set by the story"),
        ("classify_functa.seeds", (1,), "classify_functa.seeds is set by the story"),
        ("probe_landscape.learning_rates", (0.1, 0.2), "with one of learning_rates"),
        (
            "classify_functa.batch_size",
            5000,
            "classify_functa.batch_size must be at most",
        ),
        (
            "probe_landscape.batch_size",
            5000,
            "must be at most 1438, the training images",
        ),
        (
            "prune_vit.tuning",
            {"training": {"batch_size": 257}},
            "prune_vit.tuning.training.batch_size must be at most 256, .* got 257",
        ),
        ("probe_landscape.network", None, "of its field network .* got None"),
        ("probe_landscape.sharpness", {"every": 0}, "sharpness.every must be at least"),
        (
            "probe_landscape.spectrum",
            {"num_samples": 0},
            "num_samples must be at least",
        ),
    ],
)
def test_wrong_fields_of_a_step_are_refused_before_the_first(
    field, value, message, tmp_path
):
    config = configs.get_config("smoke")
    *parents, last = field.split(".")
    entry = config
    for parent in parents:
        entry = entry[parent]
    entry[last] = value
    with pytest.raises(ValueError, match=message):
        story.train_and_evaluate(config, tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "the data set npz has signals without a label"),
        ([2, 2, 2, 2], "the data set npz has signals of one class only"),
        ([0, 1, 0, 1], "the test split of the data set npz has signals of class 2"),
    ],
)
def test_images_that_cannot_be_classified_are_refused_before_the_first(
    labels, message, tmp_path
):
    for split in ("train", "test"):
        arrays = {"image": np.zeros((4, 8, 8, 1), np.uint8)}
        if labels is not None:
            arrays["label"] = np.array(labels if split == "train" else [2] * 4)
        np.savez(tmp_path / f"{split}.npz", **arrays)
    config = configs.get_config("smoke")
    config.dataset.update(name="npz", data_dir=str(tmp_path))
    with pytest.raises(ValueError, match=message):
        story.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_page_has_the_numbers_and_the_pictures(tmp_path):
    (tmp_path / "a.png").write_bytes(b"picture")
    values = {"x_share": 0.125, "y_share": 0.5}
    parts = [
        page.Text("less than 1 < 2"),
        page.table(
            "Shares.", values, {"x": "first", "y": "<y>"}, {"s": ("share", "{:.1%}")}
        ),
        page.Figure(tmp_path / "a.png", "there"),
        page.Figure(tmp_path / "b.png", "missing"),
    ]
    page.write_page(tmp_path, "out", "Title", parts)
    assert (tmp_path / "out.md").read_text() == (
        "# Title\n\nless than 1 < 2\n\nShares.\n\n|  | s |\n| --- | --: |\n"
        "| first | 12.5% |\n| <y> | 50.0% |\n\n![there](a.png)\n"
    )
    text = (tmp_path / "out.html").read_text()
    assert "1 &lt; 2" in text and "<td>&lt;y&gt;</td><td>50.0%</td>" in text
    assert "data:image/png;base64,cGljdHVyZQ==" in text and "missing" not in text


@pytest.mark.slow
def test_story_of_the_digits(tmp_path):
    config = configs.get_config("smoke")
    summary = story.train_and_evaluate(config, tmp_path)
    assert summary["cascade_multiply_adds"] <= 0.75 * summary["dense_multiply_adds"]
    assert summary["structure_multiply_adds"] <= 0.75 * summary["cascade_multiply_adds"]
    assert summary["structure_params"] < summary["cascade_params"]
    # The second pruning starts from the network that the first one has written.
    first, second = (runs.load_summary(tmp_path / n) for n in ("cascade", "structure"))
    assert second["dense_accuracy"] == pytest.approx(summary["cascade_accuracy"])
    classified = runs.load_summary(tmp_path / "classify")
    # A part of the test images.
    assert abs(first["dense_accuracy"] - classified["test_accuracy"]) < 0.3
    text = (tmp_path / "story.md").read_text()
    assert f"heads and neurons | {summary['structure_accuracy']:.2%} |" in text
    assert len(re.findall("data:image/png", (tmp_path / "story.html").read_text())) == 4
    # A killed story goes on with what is finished.
    (tmp_path / "summary.json").unlink()
    before = (tmp_path / "classify" / "model.npz").stat().st_mtime_ns
    again = story.train_and_evaluate(config, tmp_path)
    assert {k: v for k, v in again.items() if k != "seconds"} == {
        k: v for k, v in summary.items() if k != "seconds"
    }
    assert (tmp_path / "classify" / "model.npz").stat().st_mtime_ns == before
