"""A run as its figures see it: the files of its folder, and a title."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.common import files
from experiments.common.upgrade import read_config


class Run(NamedTuple):
    """The files of a run, or of its folder in `results/`.

    Attributes:
      workdir: the folder.
      config: `config.json`, with the fields of today.
      environment: `environment.json`.
      summary: `summary.json`; empty if the run is not finished.
      metrics: the lines of `metrics.jsonl`.
      arrays: `arrays.npz`; empty if the file does not exist.
    """

    workdir: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    arrays: dict[str, np.ndarray]

    def need(self, name: str) -> np.ndarray:
        """An array of `arrays.npz`; raises MissingError if it does not exist."""
        if name not in self.arrays:
            raise MissingError(name)
        return self.arrays[name]


class MissingError(Exception):
    """A figure needs an array that the folder of the run does not contain."""


def read_run(workdir: Path) -> Run:
    """Reads the files of the folder; only `config.json` is required."""
    if not (workdir / "config.json").exists():
        raise FileNotFoundError(f"{workdir} has no config.json: it holds no run.")
    jsons = {"config": read_config(workdir / "config.json")}
    for name in ("environment", "summary"):
        path = workdir / f"{name}.json"
        jsons[name] = files.read_json(path) if path.exists() else {}
    metrics = files.read_metrics(workdir / "metrics.jsonl")
    path = workdir / "arrays.npz"
    arrays = files.read_npz(path) if path.exists() else {}
    return Run(workdir, **jsons, metrics=metrics, arrays=arrays)


def describe(run: Run) -> str:
    """Title of the figures of a run: command, data set, seeds, length of training."""
    config, environment = run.config, run.environment
    parts = [f"{config['experiment']} {config.get('variant', '')}".strip()]
    if config["experiment"] in ("benchmark", "scaling"):
        backend = environment.get("backend", "")
        cores = f" with {environment.get('cpu_count')} cores"
        parts.append(backend + cores if backend == "cpu" else backend)
    else:
        # Many variants are named after their data set.
        name = (config.get("dataset") or {}).get("name")
        if name and not config.get("variant", "").startswith(name):
            parts.append(name)
        for source in ("functaset", "run", "checkpoint"):
            # runs/meta_learn/digits/functaset.npz -> meta_learn/digits
            path = Path((config.get(source) or "").replace("/seed{seed}", ""))
            folder = path.parent if path.suffix == ".npz" else path
            names = [name for name in folder.parts if name not in ("runs", "/")]
            name = "/".join(names[-2:])
            # The functaset of a run is named with the run.
            if name and not any(part.endswith(f" {name}") for part in parts):
                parts.append(f"{source} {name}")
        if config.get("features", "latents") != "latents":
            parts.append(f"features {config['features']}")
        if config["experiment"] == "prune_vit" and len(parts) == 1:
            parts.append("random weights")
    seeds = config.get("seeds", [])
    num_runs = run.summary.get("num_runs", 1)
    if num_runs > 1:
        parts.append(f"{num_runs} trained seeds")
    elif seeds:
        words = "seed" if len(seeds) == 1 else "seeds"
        parts.append(f"{words} {', '.join(map(str, seeds))}")
    for key, unit in (("num_epochs", "epochs"), ("num_steps", "steps")):
        if isinstance(config.get(key), int):
            parts.append(f"{config[key]} {unit}")
    if "epoch" in run.summary:
        parts.append(f"weights of epoch {run.summary['epoch']}")
    return ", ".join(part for part in parts if part)


def bind(figures: Mapping[str, Callable[..., Any]], *args: Any) -> dict[str, Any]:
    """{name: figure(*args)} without the arguments."""
    return {name: functools.partial(make, *args) for name, make in figures.items()}
