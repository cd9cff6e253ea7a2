"""Encodes a data set into a functaset with the weights of a finished run.

    python -m experiments.make_functaset \\
        --config=experiments/configs/make_functaset.py:digits

Writes <workdir>/functaset.npz; its fields are listed in `functa.functaset`. The memory
does not grow with the number of copies. A run that was killed resumes where it stopped.
"""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments.common import data, devices, launch, runs, settings
from experiments.configs import make_functaset as configs
from experiments.training import encoding
from functa import functaset


def train_and_evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Writes the functaset or resumes it; returns the summary."""
    settings.check(config, configs.RULES)
    learner = encoding.load_learner(config.run)
    if config.inner.num_steps is not None:
        learner = learner.with_steps(config.inner.num_steps)
    dataset = load_dataset(config, learner.model_config["out_channels"])
    devices.say(dataset.found)
    signals = data.signals(next(iter(dataset.splits.values())))
    learner.for_padded(signals.shape[1:-1], config.padding)
    encoding.check_coords(learner, dataset, config.run)
    coords, weight = encoding.points_of(learner.model, dataset)
    learner = learner._replace(coords=coords, weight=weight)

    def experiment(run):
        run.say("compiling the inner loop ...")
        return encoding.write_functaset(
            run.workdir / "functaset.npz",
            learner,
            dataset.splits,
            config=data.describe_source(config.dataset, dataset),
            batch_size=config.batch_size,
            copies=config.copies,
            flip=config.flip,
            padding=config.padding,
            seed=config.seed,
        )

    digests = data.digests(dataset.splits)
    inputs = {"weights": functaset.hash_params(learner.params), **digests}
    return runs.run_once(workdir, config, experiment, inputs=inputs)


def load_dataset(config: ConfigDict, out_channels: int) -> data.Dataset:
    """The first config.num_images signals and labels of each split of config.splits.

    Without a name in config.dataset, its fields that are not set become those of
    config.run.

    Raises:
      FileNotFoundError, ValueError: as `data.load_dataset`, and if the number of
        channels of the images differs from that of the model.
    """
    _adopt_dataset(config)
    dataset = data.load_dataset(
        splits=config.splits, with_fields=True, **config.dataset
    )
    for split, arrays in dataset.splits.items():
        channels = data.signals(arrays).shape[-1]
        if channels != out_channels:
            raise ValueError(
                f"the signals of {config.dataset.name} have {channels} channels, but "
                f"the fields of {config.run} have {out_channels}."
            )
        stop = config.num_images or len(arrays["label"])
        dataset.splits[split] = {name: array[:stop] for name, array in arrays.items()}
    return dataset


def _adopt_dataset(config):
    if config.dataset.name is not None:
        return
    theirs = runs.load_config(config.run).get("dataset")
    if theirs is None:
        raise ValueError(
            f"the run {config.run} does not name a data set; set "
            "--config.dataset.name=NAME."
        )
    for name, value in theirs.items():
        if config.dataset[name] is None:
            config.dataset[name] = value


if __name__ == "__main__":
    launch.launch("make_functaset", train_and_evaluate)
