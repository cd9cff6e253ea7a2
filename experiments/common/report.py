"""The tables and figures of the student report in its order, with ours.

`ENTRIES` is the table of all of them: which runs give which numbers and figures. It is
shown with the runs of results/ (docs/report.md) or with those of a user.
"""

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.common import evidence, page, settings

PUBLISHED = "published"


class Column(NamedTuple):
    """A column of numbers.

    Attributes:
      run: COMMAND/VARIANT, or `published` for the numbers of the report.
      key: dotted path into its summary; {0}, {1} are the names of a row.
      form: format of a number; see `experiments/results.py`.
    """

    run: str
    key: str
    form: str


class Entry(NamedTuple):
    """A table or figure of the report, or several that belong together.

    Attributes:
      name: as the report calls it, for example "Table 1" or "Figures 3 to 6".
      title: what it shows.
      note: a paragraph: the unit of the numbers, and what differs from the report.
      rows: {words: names of the row in the keys of the columns}; None for a name that
        a column does not have.
      columns: {heading: column}.
      figures: {caption: (run, name of the figure)}.
    """

    name: str
    title: str
    note: str = ""
    rows: Mapping[str, Sequence[str | None]] = {}
    columns: Mapping[str, Column] = {}
    figures: Mapping[str, tuple[str, str]] = {}

    def runs(self) -> dict[str, list[str]]:
        """{run: headings of its columns}, in order."""
        headings = {}
        for heading, column in self.columns.items():
            if column.run != PUBLISHED:
                headings.setdefault(column.run, []).append(heading)
        for run, _ in self.figures.values():
            headings.setdefault(run, [])
        return headings


def list_runs() -> dict[str, dict[str, tuple[str, str]]]:
    """The runs of all entries and those that they read, in an order to run them.

    Returns:
      {run: {field: (run, file)}}: the fields of a configuration that name a file of
      another run, or with "" its folder.
    """
    found = {}

    def add(run):
        command, variant = run.split("/")
        module = importlib.import_module(f"experiments.configs.{command}")
        fields = settings.flatten(module.get_config(variant).to_dict())
        paths = {
            k: re.fullmatch(r"runs/(\w+/\w+)/?(.*)", str(fields[k])) for k in fields
        }
        inputs = {field: path.groups() for field, path in paths.items() if path}
        for needed, _ in inputs.values():
            add(needed)
        found.setdefault(run, inputs)

    for entry in ENTRIES:
        for run in entry.runs():
            add(run)
    return found


def describe(
    entries: Sequence[Entry], find: Callable[[str], Path | None]
) -> list[page.Part]:
    """The content of a page.

    Args:
      entries: tables and figures.
      find: run, or `published`, -> its folder; None if the run is not finished.
    """
    return [part for entry in entries for part in _describe(entry, find)]


def _describe(entry, find):
    yield page.Heading(f"{entry.name}: {entry.title}")
    if entry.note:
        yield page.Text(entry.note)
    if entry.rows:
        rows = [
            [words, *(_number(c, names, find) for c in entry.columns.values())]
            for words, names in entry.rows.items()
        ]
        yield page.Table("", ("", *entry.columns), rows)
    for caption, (run, name) in entry.figures.items():
        folder = find(run)
        picture = folder and folder / "figures" / f"{name}.png"
        if picture and picture.exists():
            yield page.Figure(picture, caption)
        elif picture:
            yield page.Text(f"{caption}: not in `results/`; a new run draws it.")
        else:
            yield page.Text(f"{caption}: {evidence.NOT_RUN}.")
    rows = [
        ["; ".join(headings) or "figure", *_origin(run, find(run))]
        for run, headings in entry.runs().items()
    ]
    if rows:
        yield page.Table("", ("", *evidence.ORIGIN), rows)


def _number(column, names, find):
    key = column.key.format(*names)
    if "None" in key:
        return "-"
    folder = find(column.run)
    return evidence.render(folder, key, column.form) if folder else evidence.NOT_RUN


def _origin(run, folder):
    if folder:
        return evidence.provenance(folder).values()
    command = ", ".join(f"`{part}`" for part in run.split("/"))
    return [command, *[""] * (len(evidence.ORIGIN) - 1)]


def find_result(run: str, root: Path = evidence.ROOT) -> Path | None:
    """The folder of a run in results/, or None if there is none."""
    folder = root / "results" / run.replace("/", "_")
    return folder if folder.exists() else None


def document(root: Path = evidence.ROOT) -> str:
    """The text of docs/report.md."""
    parts = [page.Text(INTRODUCTION), page.Text(_DOCUMENT)]
    parts += describe(ENTRIES, lambda run: find_result(run, root))
    return page.to_markdown(root / "docs", TITLE, parts)


TITLE = "The student report, table by table"
INTRODUCTION = (
    "Each table and figure of the student report in its order, theirs and ours. A "
    "second table says how ours were made."
)
_DOCUMENT = (
    "`python -m experiments.report` writes this page and one with your own runs. "
    "Accuracies that are missing here need a GPU; `results/` does not keep all figures."
)


def _accuracies(table, run, epochs):
    """Rows and columns of a table of accuracies over the epochs."""
    rows = {f"epoch {epoch}": (f"{i}",) for i, epoch in enumerate(epochs)}
    columns = {}
    for split in ("test", "train"):
        theirs = Column(PUBLISHED, f"table_{table}.{split}.{{0}}", ".2f")
        ours = Column(run, f"{split}_accuracy_per_epoch.{{0}}", "%.2f")
        columns |= {f"{split}, report": theirs, f"{split}, ours": ours}
    return {"rows": rows, "columns": columns}


def _against_published(table, form, rows, key, runs):
    """Rows and columns of accuracies of the report and of some runs of ours."""
    columns = {"report": Column(PUBLISHED, f"table_{table}.{{0}}", form)}
    columns |= {name: Column(run, key, "%.2f") for name, run in runs.items()}
    return {"rows": rows, "columns": columns}


def _landscape(measure):
    """Rows and columns of a measure without and with batch normalization."""
    return {
        "rows": {
            f"learning rate {rate}": (rate,)
            for rate in ("0.0001", "0.0005", "0.001", "0.002")
        },
        "columns": {
            name: Column(_LANDSCAPE, f"{network}.rate{{0}}.{measure}", ".1f")
            for name, network in (
                ("without batch normalization", "plain"),
                ("with batch normalization", "bn"),
            )
        },
    }


def _layers(*names):
    return {name: (name,) for name in names}


_IMAGES = "fit_image/report"
_FUNCTA = "meta_learn/cifar10_cpu"
_SEGMENTS = "prune_vit/cifar10_cpu_segments"
_LANDSCAPE = "probe_landscape/cifar10_cpu"
_RATIOS = {"ratio 0": ("0", "dense_0")} | {
    f"ratio {ratio}": (ratio, f"max_{ratio}") for ratio in ("0.2", "0.3", "0.4")
}
_CASCADES = {
    "ours, small ViT": "prune_vit/cifar10_cpu",
    "ours, ViT-B/16": "prune_vit/b16",
}
_METHODS = {
    "Adam": ("adam",),
    "DessiLBI": ("dessilbi",),
    "DessiLBI+Adam": ("dessilbi_adam",),
}
_REMOVED = {f"{20 * i} % of conv3 removed": (f"{20 * i}", f"{i}") for i in range(5)}
_LENET = {
    "ours, report's settings": "prune_lbi/mnist_report",
    "ours, our settings": "prune_lbi/mnist",
}
_VGG = {"ours, 20 epochs": "prune_lbi/cifar10"}

ENTRIES = (
    Entry(
        "Table 1",
        "PSNR at different training steps",
        "PSNR in dB at 32x32 pixels. Theirs is one image, ours the mean of 8. Images "
        "that are fitted almost to the precision of float32 dominate the mean. Both "
        "have three hidden layers of 256 units and Adam at the rate 1e-4. The report "
        "does not state omega_0, the range of the coordinates, or how many pixels a "
        "step uses (ours: 30, [-1, 1], all), so the difference is not explained.",
        rows={
            f"{step} steps": (f"{step}", f"{i}")
            for i, step in enumerate((100, 200, 400, 800, 2000))
        },
        columns={
            "report": Column(PUBLISHED, "table_1.{0}", ".2f"),
            "ours": Column(_IMAGES, "32x32_psnr.{1}", ".2f"),
            "ours, worst image": Column(_IMAGES, "32x32_psnr_min.{1}", ".2f"),
        },
    ),
    Entry(
        "Figures 1 and 2",
        "reconstructions at different training steps",
        figures={"Reconstructions at 32x32": (_IMAGES, "reconstructions_32x32")},
    ),
    Entry(
        "Table 2",
        "PSNR at different image sizes",
        "PSNR in dB. At 32x32 ours is the mean of 8 images.",
        rows={size: (size,) for size in ("32x32", "64x64", "96x96", "128x128")},
        columns={
            "800 steps, report": Column(PUBLISHED, "table_2.800.{0}", ".2f"),
            "800 steps, ours": Column(_IMAGES, "{0}_psnr.3", ".2f"),
            "2000 steps, report": Column(PUBLISHED, "table_2.2000.{0}", ".2f"),
            "2000 steps, ours": Column(_IMAGES, "{0}_psnr.4", ".2f"),
        },
    ),
    Entry(
        "Section 1.2",
        "shared parameters",
        "PSNR in dB on test images. The report has a latent of 512 numbers and states "
        "about the same PSNR for training and test images; ours has 256 numbers.",
        rows={
            "3 inner steps, all 10,000": (None, "test_psnr"),
            "3 inner steps, first 64": (None, "further_psnr_start"),
            "200 inner steps (report: 5,000), first 64": ("psnr", "further_psnr"),
        },
        columns={
            "report, about": Column(PUBLISHED, "section_1_2.{0}", "d"),
            "ours": Column(_FUNCTA, "{1}", ".2f"),
        },
    ),
    Entry(
        "Figures 3 to 6",
        "reconstructions with shared parameters",
        "Test images.",
        figures={"Best and worst reconstructions": (_FUNCTA, "best_and_worst")},
    ),
    Entry(
        "Figure 7",
        "reconstructions with different inner steps",
        "Test images.",
        figures={"After 0, 1, 2 and 3 inner steps": (_FUNCTA, "over_inner_steps")},
    ),
    Entry(
        "Table 3",
        "accuracy using MLP1",
        "Accuracy in percent, without weight decay.",
        **_accuracies(3, "classify_functa/report_mlp1", range(100, 601, 100)),
    ),
    Entry(
        "Table 4",
        "accuracy using MLP2",
        "Accuracy in percent, without weight decay.",
        **_accuracies(4, "classify_functa/report_mlp2", range(100, 601, 100)),
    ),
    Entry(
        "Table 5",
        "accuracy using MLP1 with weight decay",
        "Accuracy in percent, weight decay 1e-4.",
        **_accuracies(5, "classify_functa/report_mlp1_decay", range(100, 501, 100)),
    ),
    Entry(
        "Figures 8 to 12",
        "Transformer, LassoNet, pruning pipeline, ViT, CP-ViT",
        "These figures show methods; there is nothing to measure.",
    ),
    Entry(
        "Section 2.3.1",
        "informative regions",
        "Test accuracy in percent. The report prunes each of three segments of the "
        "attention alone and prints no numbers. A region is a patch in a head; it is "
        "ranked by its average attention probability. Theirs is ViT-B/16, ours the "
        "small ViT on CIFAR-10.",
        rows={"the whole network": ("dense_0",)}
        | {
            f"without the {rank} third of the {units}": (f"{prefix}segment_{i}_0.333",)
            for prefix, units, ranks in (
                ("", "regions", ("least attended", "second", "most attended")),
                ("heads_", "heads", ("least important", "second", "most important")),
            )
            for i, rank in enumerate(ranks, start=1)
        },
        columns={"ours": Column(_SEGMENTS, "rows.{0}.accuracy", "%.2f")},
        figures={"The segments of the first layer": (_SEGMENTS, "segments")},
    ),
    Entry(
        "Figure 13",
        "distribution of the informativeness of patches",
        "Theirs is ViT-B/16, ours the small ViT on CIFAR-10.",
        figures={"Informativeness of the patches": (_SEGMENTS, "informativeness")},
    ),
    Entry(
        "Figure 14",
        "attention probabilities",
        "Theirs is ViT-B/16, ours the small ViT on CIFAR-10.",
        figures={"Attention of each layer": (_SEGMENTS, "attention")},
    ),
    Entry(
        "Table 6",
        "CP-ViT without fine-tuning",
        "Test accuracy in percent. Theirs is ViT-B/16 at 224 pixels, pre-trained. The "
        "small ViT is trained from scratch on CIFAR-10.",
        **_against_published(6, ".1f", _RATIOS, "rows.{1}.accuracy", _CASCADES),
    ),
    Entry(
        "Table 7",
        "CP-ViT with fine-tuning",
        "Test accuracy in percent. Ours is fine-tuned for one epoch.",
        **_against_published(7, ".1f", _RATIOS, "rows.{1}.tuned_accuracy", _CASCADES),
    ),
    Entry(
        "Figure 15",
        "gradient predictiveness",
        "Largest distance of the gradients along the gradient. The report gives curves "
        "and compares consecutive steps on different batches (first figure). Santurkar "
        "et al. compare along one gradient (table and second figure).",
        **_landscape("gradient_predictiveness"),
        figures={
            "Gradients of consecutive steps": (_LANDSCAPE, "consecutive_steps"),
            "Loss, distance of the gradients and beta along the gradient, against the "
            "epoch": (_LANDSCAPE, "along_the_gradient"),
        },
    ),
    Entry(
        "Figure 16",
        "effective beta-smoothness",
        "Effective beta. The report gives curves.",
        **_landscape("effective_beta"),
        figures={"Beta against the step size": (_LANDSCAPE, "beta_profile")},
    ),
    Entry(
        "Table 8",
        "test accuracy of the optimizers on MNIST",
        "Test accuracy in percent of LeNet after 20 epochs.",
        **_against_published(
            8,
            ".2f",
            _METHODS,
            "{0}_test_accuracy",
            {
                "ours, report's settings": "train_lbi/mnist_report",
                "ours, our settings": "train_lbi/mnist",
            },
        ),
    ),
    Entry(
        "Figure 17",
        "training and test accuracy on MNIST",
        "The report's settings.",
        figures={"Accuracy over the epochs": ("train_lbi/mnist_report", "accuracy")},
    ),
    Entry(
        "Table 9",
        "test accuracy of the optimizers on CIFAR-10",
        "Test accuracy in percent. Theirs is VGG-A after 20 epochs. The narrow network "
        "has a quarter of the channels.",
        **_against_published(
            9,
            ".2f",
            _METHODS,
            "{0}_test_accuracy",
            {
                "ours, narrow, 10 epochs": "train_lbi/cifar10_narrow",
                "ours, as in the report": "train_lbi/cifar10_report",
            },
        ),
    ),
    Entry(
        "Figure 18",
        "training and test accuracy on CIFAR-10",
        "The narrow network.",
        figures={"Accuracy over the epochs": ("train_lbi/cifar10_narrow", "accuracy")},
    ),
    Entry(
        "Table 10",
        "LeNet, conv3 pruned",
        "Test accuracy in percent, trained with DessiLBI. Filters are removed by the "
        "rule of DessiLBI's authors.",
        **_against_published(10, ".4g", _REMOVED, "one_layer.official.{1}", _LENET),
    ),
    Entry(
        "Table 11",
        "LeNet, 80 % of one layer pruned",
        "As Table 10.",
        **_against_published(
            11,
            ".2f",
            _layers("conv1", "conv2", "conv3", "fc1", "fc2"),
            "each_layer.{0}.official",
            _LENET,
        ),
    ),
    Entry(
        "Figure 19",
        "conv3 of LeNet before and after pruning",
        "80 % of the filters are removed.",
        figures={
            "conv3 of LeNet": ("prune_lbi/mnist_report", "layer_before_and_after")
        },
    ),
    Entry(
        "Table 12",
        "VGG-A, conv3 pruned",
        "As Table 10. Theirs is trained for 20 epochs.",
        **_against_published(12, ".4g", _REMOVED, "one_layer.official.{1}", _VGG),
    ),
    Entry(
        "Table 13",
        "VGG-A, 80 % of one layer pruned",
        "As Table 12. The report calls fc1, fc2 and fc3 classifier.0, classifier.3 and "
        "classifier.6.",
        **_against_published(
            13,
            ".2f",
            _layers("conv1", "conv2", "conv3", "conv4", "conv5", "fc1", "fc2", "fc3"),
            "each_layer.{0}.official",
            _VGG,
        ),
    ),
    Entry(
        "Figure 20",
        "conv3 of VGG-A before and after pruning",
        "80 % of the filters are removed.",
        figures={"conv3 of VGG-A": ("prune_lbi/cifar10", "layer_before_and_after")},
    ),
    Entry(
        "Figures 21 to 24",
        "images of 32x32 to 128x128",
        "The report's settings.",
        figures={
            size: (_IMAGES, f"reconstructions_{size}")
            for size in ("32x32", "64x64", "96x96", "128x128")
        },
    ),
    Entry(
        "Figure 25",
        "nine images in one",
        "A mosaic of 96x96 pixels.",
        figures={"Mosaic": (_IMAGES, "field_96x96_mosaic")},
    ),
    Entry(
        "Figures 26 and 27",
        "structure of the classifiers",
        "The variants `report_mlp1` and `report_mlp2` of `classify_functa` have these "
        "layers.",
    ),
    Entry(
        "Figures 28 and 29",
        "structure of LeNet and VGG-A",
        "`experiments/networks/lenet.py` and `experiments/networks/vgg.py` have these "
        "layers.",
    ),
)
