"""Runs of an experiment over seeds and other axes, and means over the seeds."""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments.common import runs

Summary = dict[str, Any]
Inputs = Mapping[str, str | None]
_OVER_SEEDS = {"seeds": "seed{}"}


def sweep(
    config: ConfigDict,
    workdir: Path,
    experiment: Callable[[runs.Run], Summary],
    *,
    axes: Mapping[str, str] = _OVER_SEEDS,
    nested: bool = False,
    inputs: Inputs | Callable[[ConfigDict], Inputs] = lambda config: {},
    finish: Callable[[runs.Run, dict[str, Summary]], Summary] | None = None,
) -> Summary:
    """Runs an experiment for all combinations of the values of some fields.

    A single combination runs in `workdir` itself. With several combinations each has
    its own run folder inside `workdir`, named by the axes (`adam_seed0`), and the outer
    folder has the summary of all runs. Each run resumes separately.

    Args:
      config: the configuration; its fields in `axes` are tuples of values.
      workdir: the run folder.
      experiment: open run -> summary; the config of the run has one value per axis.
      axes: {field: format of its value in the name of a run}.
      nested: whether a single combination also has its own folder.
      inputs: digests of the input files, see `runs.open_run`; a function of the config
        of one run if they differ.
      finish: (outer run, {name: summary}) -> outer summary; the default computes mean
        and deviation over all runs.

    Returns:
      The summary. With several runs it contains their summaries under "runs".

    Raises:
      ValueError: if two combinations have the same name.
    """
    combinations = list(itertools.product(*(config[field] for field in axes)))
    names = [
        "_".join(map(str.format, axes.values(), values)) for values in combinations
    ]
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(
                f"{count} runs would have the name {name}; choose values of "
                f"{', '.join(axes)} that differ more."
            )
    singles = {}
    for name, values in zip(names, combinations, strict=True):
        singles[name] = ConfigDict(config)
        singles[name].update(dict(zip(axes, zip(values), strict=True)))
    inputs_of = inputs if callable(inputs) else lambda config: inputs
    if len(combinations) == 1 and not nested:
        return runs.run_once(workdir, config, experiment, inputs=inputs_of(config))

    def run_all(run):
        summaries = {}
        for name, single in singles.items():
            run.say(f"--- {name}")
            summaries[name] = runs.run_once(
                run.workdir / name, single, experiment, inputs=inputs_of(single)
            )
        if finish is None:
            table = mean_and_std(list(summaries.values()))
            table.pop("seconds_std", None)
        else:
            table = finish(run, summaries)
        seconds = sum(summary["seconds"] for summary in summaries.values())
        return {**table, "seconds": seconds, "runs": summaries}

    of_all = {
        f"{key} of {name}": digest
        for name, single in singles.items()
        for key, digest in inputs_of(single).items()
    }
    return runs.run_once(workdir, config, run_all, inputs=of_all)


def mean_and_std(rows: Sequence[Mapping[str, Any]]) -> Summary:
    """Mean of every number over the rows and, for two or more, the deviation (n - 1).

    Args:
      rows: nested dicts of numbers or lists of numbers, all of the same structure.
        Other values are kept if they are the same in all rows.

    Returns:
      A flat dict {"accuracy": mean, "accuracy_std": deviation, "layer.conv1": ...}.
    """
    table = {}
    for name, value in rows[0].items():
        values = [row.get(name) for row in rows]
        if isinstance(value, Mapping):
            inner = mean_and_std(values)
            table |= {f"{name}.{key}": number for key, number in inner.items()}
        elif type(value) is int and all(other == value for other in values):
            table[name] = value  # a count
        elif _are_numbers(values):
            numbers = np.array(values, np.float64)
            table[name] = numbers.mean(0)
            if len(rows) > 1:
                table[f"{name}_std"] = numbers.std(0, ddof=1)
        elif all(other == value for other in values):
            table[name] = value
    return table


def _are_numbers(values):
    """Whether the values are numbers, or lists of numbers of one length."""
    try:
        return np.array(values).dtype.kind in "iuf"
    except ValueError:
        return False
