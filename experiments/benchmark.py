"""Measures the time and memory of every hot path of the project in one run.

    python -m experiments.benchmark --config=experiments/configs/benchmark.py:all

The paths take turns in each round, so that other load on the machine affects all of
them. Medians over the rounds are reported. Square matrix products also take turns.
Their best rate is the ceiling of the machine, and the rate of each path is given
relative to it. With --config.peer_python, a Python that has torch, the programs of
experiments/peers that do the same work in torch run between the rounds.

Operations are counted in closed form: two for each multiply-add of a matrix product,
and none for anything else. XLA's own count is not used, because it counts the body of a
loop only once. A convolution is counted by its definition. An algorithm with fewer
products (Winograd's) can therefore exceed the ceiling.
"""

import inspect
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments.common import files, launch, runs, settings
from experiments.configs import benchmark as configs
from experiments.drawing import figures
from experiments.timing import functa, hot_path, landscape, lbi, peers, rounds, vit

_MODULES = (hot_path, functa, vit, landscape, lbi)
_KINDS = {kind: make for module in _MODULES for kind, make in module.KINDS.items()}


def train_and_evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs one benchmark; returns its summary."""
    settings.check(config, configs.RULES)
    names = _check_paths(config)
    with runs.open_run(workdir, config) as run:
        if run.summary is not None:
            run.say((run.workdir / "table.md").read_text())
            return run.show_summary()
        if config.peer_python is not None:
            peers.check(config.peer_python)
        paths = ((name, make_path(config, name)) for name in names)
        summary, ceilings = rounds.measure(run, paths)
        text = _make_table(summary)
        files.write_atomic(run.workdir / "table.md", lambda file: file.write(text))
        run.say(text)
        figures.draw(run.workdir, summary)
        totals = {
            f"{dtype}_product_gflops_per_second": ceiling / 1e9
            for dtype, ceiling in ceilings.items()
        }
        return run.finish(totals | summary)


def make_path(config: ConfigDict, name: str) -> hot_path.HotPath:
    """Makes the path `name` of config.sizes."""
    sizes = config.sizes[name].to_dict()
    sizes.pop("reference", None)
    return _KINDS[sizes.pop("kind")](**sizes)


def _make_table(summary):
    """The results as a Markdown table."""
    with_peers = any("over_peer" in row for row in summary.values())
    columns = ["path", "ms (quartiles)", "per second", "GFLOP/s", "share of products"]
    columns += ["MiB", "compile s", "time (arithmetic) over"]
    columns += ["over torch in float32"] * with_peers
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name, row in summary.items():
        low, high = row["milliseconds_quartiles"]
        cells = [
            name,
            f"{row['milliseconds']:.4g} ({low:.4g} to {high:.4g})",
            f"{row['per_second']:.4g} {row['unit']}",
            f"{row['gflops_per_second']:.3g}",
            f"{100 * row['share_of_product']:.0f} %",
            f"{row['mebibytes']:.3g}" if "mebibytes" in row else "",
            f"{row['compile_seconds']:.1f}" if "mebibytes" in row else "",
            f"{row['time_over_reference']:.3g} "
            f"({row['arithmetic_over_reference']:.3g}) {row['reference']}"
            if "reference" in row
            else "",
        ]
        if with_peers:
            cells.append(f"{row['over_peer']:.2f}" if "over_peer" in row else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _check_paths(config):
    """Names of all paths, those of the ceilings first."""
    unknown = [name for name in config.paths if name not in config.sizes]
    if unknown or not config.paths:
        raise ValueError(
            f"paths {tuple(config.paths)} must be some of {', '.join(config.sizes)}."
        )
    missing = [name for name in rounds.CEILINGS.values() if name not in config.sizes]
    if missing:
        raise ValueError(f"sizes must have {', '.join(missing)}.")
    names = list(dict.fromkeys((*rounds.CEILINGS.values(), *config.paths)))
    for name in names:
        sizes = config.sizes[name]
        if sizes.kind not in _KINDS:
            raise ValueError(
                f"sizes.{name}.kind must be one of {', '.join(_KINDS)}; got "
                f"{sizes.kind!r}."
            )
        for field, value in sizes.items():
            smallest = field not in ("points_per_group", "num_step_sizes")
            if type(value) is int and value < smallest:
                raise ValueError(
                    f"sizes.{name}.{field} must be at least {smallest:d}, got {value}."
                )
        fields = {k: v for k, v in sizes.items() if k not in ("kind", "reference")}
        with settings.blamed_on(f"sizes.{name}"):
            inspect.signature(_KINDS[sizes.kind]).bind(**fields)
    return names


if __name__ == "__main__":
    launch.launch("benchmark", train_and_evaluate)
