"""Takes one data set through all four packages and writes one page about it.

    python -m experiments.story --config=experiments/configs/story.py:digits

The steps are other commands, each in a folder inside the run folder, and resume like
them. The images become a spatial functa. A Vision Transformer classifies the latents. A
cascade prunes its tokens to a budget of multiply-adds. The heads and neurons that
DessiLBI ranks last are removed. The landscape is measured before and after.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments.common import data, launch, page, runs, settings
from experiments.common.sweep import sweep
from experiments.configs import story as configs
from experiments.training import features

# {prefix of the keys of the summary: name in the table}.
_NETWORKS = {
    "dense": "dense",
    "cascade": "with the cascade",
    "structure": "and without some heads and neurons",
}
# {column: (key, format)}.
_COSTS = {
    "accuracy": ("accuracy", "{:.2%}"),
    "before fine-tuning": ("untuned_accuracy", "{:.2%}"),
    "multiply-adds": ("multiply_adds", "{:,.0f}"),
    "parameters": ("params", "{:,.0f}"),
    "milliseconds": ("milliseconds", "{:.2f}"),
    "faster by": ("speedup", "{:.2f}"),
}
_MEASURES = {
    "largest eigenvalue": ("largest_eigenvalue_at_the_end", "{:.4g}"),
    "trace of the Hessian": ("hessian_trace", "{:.4g}"),
    "gradient norm": ("grad_norm", "{:.4g}"),
    "effective beta": ("effective_beta", "{:.4g}"),
}
# {step: its figure}.
_FIGURES = {
    "functa": "best_and_worst",
    "classify": "accuracy",
    "landscape_before": "surfaces",
    "landscape_after": "surfaces",
}


def train_and_evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs or resumes one experiment; returns its summary."""
    settings.check(config, configs.RULES)
    steps = plan(config, workdir)  # refuses wrong fields of any step
    if not (workdir / "summary.json").exists():
        _check_images(config, {step: fields for step, (_, fields) in steps.items()})
    return sweep(config, workdir, tell)


def plan(config: ConfigDict, workdir: Path) -> dict[str, tuple[str, ConfigDict]]:
    """{step: (command, configuration)}; raises ValueError if a field is wrong."""
    functaset = str(workdir / "functa" / "functaset.npz")
    dense = str(workdir / "classify" / "model.npz")
    cascade = str(workdir / "cascade" / "networks" / "max.npz")
    cut = str(workdir / "structure" / "networks" / "structure_lbi.npz")
    grids = {"dataset.name": "functaset", "dataset.data_dir": functaset}
    images = {f"dataset.{name}": value for name, value in config.dataset.items()}

    def step(command, fields):
        own = settings.flatten(config[command])
        fields = {**fields, "seeds": config.seeds}
        if "variant" not in own:
            raise ValueError(f"{command} must name a variant of that command.")
        for field in own:
            if any(f"{field}.".startswith(f"{fixed}.") for fixed in fields):
                raise ValueError(f"{command}.{field} is set by the story itself.")
        return command, settings.derive(command, own.pop("variant"), {**own, **fields})

    def prune(method, checkpoint, budget):
        fields = {"methods": {method: (0.5,)}, "tuning.methods": {method: (0.5,)}}
        fields |= {"timing.methods": (method,), "save_networks": True}
        fields |= {"checkpoint": checkpoint, "budget": budget, "image_size": side}
        return step("prune_vit", grids | fields)

    def probe(checkpoint):
        options = {"network_options": {"checkpoint": checkpoint}}
        return step("probe_landscape", grids | options)

    functa = step("meta_learn", images)
    side, *others = functa[1].model.grid
    if others != [side]:
        raise ValueError("meta_learn.model.grid must be square.")
    steps = {
        "functa": functa,
        "classify": step("classify_functa", {"functaset": functaset}),
        "cascade": prune("max", dense, config.cascade_budget),
        "structure": prune("structure_lbi", cascade, config.structure_budget),
        "landscape_before": probe(dense),
        "landscape_after": probe(cut),
    }
    _check_measures(config, steps["cascade"][1], steps["landscape_before"][1])
    return steps


def _check_measures(config, pruning, landscape):
    """Raises ValueError if the steps do not measure what the summary states."""
    sizes = pruning.timing.batch_sizes
    if config.timed_batch_size not in sizes:
        raise ValueError(
            f"timed_batch_size must be one of prune_vit.timing.batch_sizes {sizes}; "
            f"got {config.timed_batch_size}."
        )
    if not landscape.network or len(landscape.learning_rates) > 1:
        raise ValueError(
            "probe_landscape must measure one network of its field network with one of "
            f"learning_rates, got {landscape.network} and {landscape.learning_rates}."
        )
    for field in ("sharpness.every", "spectrum.num_samples"):
        entry, name = field.split(".")
        if not landscape[entry][name]:
            raise ValueError(f"probe_landscape.{field} must be at least 1, got 0.")


def _check_images(config, steps):
    """Raises ValueError if a later step could not use the images."""
    splits = data.load_dataset(**config.dataset).splits
    source = f"the data set {config.dataset.name}"
    labels = {split: arrays["label"] for split, arrays in splits.items()}
    features.check_labels(source, labels["train"], labels["test"])
    num_images = len(labels["train"])
    held_out = round(steps["classify"].validation_fraction * num_images)
    pruning, landscape = steps["cascade"], steps["landscape_before"]
    limited = min(pruning.num_train or num_images, num_images)
    for field, size, count in (
        ("classify_functa.", steps["classify"].batch_size, num_images - held_out),
        (
            "prune_vit.tuning.training.",
            pruning.tuning.training.batch_size,
            limited - pruning.num_validation,
        ),
        (
            "probe_landscape.",
            landscape.batch_size,
            min(landscape.num_train or num_images, num_images),
        ),
    ):
        if size > count:
            raise ValueError(
                f"{field}batch_size must be at most {count}, the training images of "
                f"{source} that it uses; got {size}."
            )


def tell(run: runs.Run) -> dict[str, Any]:
    """Runs the steps of one seed; writes the page and returns the summary."""
    found = {}
    for step, (command, config) in plan(run.config, run.workdir).items():
        folder, title = run.workdir / step, f"{step} ({command})"
        found[step] = launch.run_command(command, config, folder, title)
    summary = summarize(found, run.config.timed_batch_size)
    page.write_page(run.workdir, "story", "One story", describe(run, summary))
    return summary


def summarize(found: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
    """What the steps cost and save, from their summaries."""
    summary, speedup = {"test_psnr": found["functa"]["test_psnr"]}, 1.0
    for name, method in zip(_NETWORKS, ("dense", "max", "structure_lbi"), strict=True):
        step = found["structure" if name == "structure" else "cascade"]
        [row] = [row for row in step["rows"].values() if row["method"] == method]
        speedup *= 1.0 if name == "dense" else row[f"speedup_{batch_size}"]
        summary |= {
            f"{name}_accuracy": row.get("tuned_accuracy", row["accuracy"]),
            f"{name}_untuned_accuracy": row["accuracy"],
            f"{name}_multiply_adds": row["multiply_adds"],
            f"{name}_params": row["num_params"],
            f"{name}_milliseconds": row[f"milliseconds_{batch_size}"],
            f"{name}_speedup": speedup,
        }
    for moment in ("landscape_before", "landscape_after"):
        values = {k.rpartition(".")[2]: v for k, v in found[moment].items()}
        [inner] = found[moment]["runs"].values()
        for key, _ in _MEASURES.values():
            summary[f"{moment}_{key}"] = (values | inner)[key]
    return summary | {f"{step}_seconds": s["seconds"] for step, s in found.items()}


def describe(run: runs.Run, summary: Mapping[str, Any]) -> list[page.Part]:
    """The content of the page."""
    config, steps = run.config, plan(run.config, run.workdir)
    times = {step: f"{step} ({command})" for step, (command, _) in steps.items()}
    moments = {moment: moment.replace("_", " ") for moment in steps if "_" in moment}
    costs = f"Test accuracy and cost; time of {config.timed_batch_size} images."
    return [
        page.Text(configs.TEXT.format(config=config, **summary)),
        page.table(costs, summary, _NETWORKS, _COSTS),
        page.table("On training latents.", summary, moments, _MEASURES),
        page.table("Time.", summary, times, {"seconds": ("seconds", "{:.0f}")}),
        *(
            page.Figure(run.workdir / step / "figures" / f"{name}.png", step)
            for step, name in _FIGURES.items()
        ),
    ]


if __name__ == "__main__":
    launch.launch("story", train_and_evaluate)
