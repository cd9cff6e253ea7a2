"""Numbers of finished runs as text: their values, and how they were made.

A folder is one of results/ or a run folder, with `config.json`, `environment.json` and
`summary.json`. Markers of documents are described in `experiments/results.py`.
"""

import functools
import importlib
import math
import re
import shlex
import statistics
from pathlib import Path

from experiments.common import files
from experiments.common.settings import flatten
from experiments.common.upgrade import FILLED, upgrade, upgrade_override

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
MARKER = re.compile(r"<!--= (\S+) (\S+)(?: (\S+))? -->(.*?)<!--/-->", re.S)
NOT_RUN = "not run yet"
# The columns that say how the numbers of a folder were made.
ORIGIN = ("command", "seeds", "time", "machine", "commit", "evidence")
_HEADING = "## "
_PARTS = re.compile(rf"^```.*?^```|`[^`\n]*`|^{_HEADING}|{MARKER.pattern}", re.S | re.M)
# seconds_until(METRIC,LEVEL): a number of metrics.jsonl, not of summary.json.
_UNTIL = re.compile(r"seconds_until\((\w+),([\d.]+)\)")
_SCALES = {"%": 100.0, "min": 1 / 60, "M": 1e-6, "": 1.0}
# Settings in which the members of a group may differ: the seed and what comes of it.
_SEED_FIELDS = ("seed", "seeds", "functaset", "init_from", "run", *FILLED)


@functools.cache
def read(folder: Path, file: str = "summary.json") -> dict:
    """One JSON file of a folder."""
    return files.read_json(folder / file)


def lookup(tree, key: str):
    """The entry of a nested summary at a dotted key; names may hold dots themselves.

    Raises:
      KeyError: if there is none.
    """
    if not key:
        return tree
    parts = key.split(".")
    if isinstance(tree, list) and parts[0] in map(str, range(len(tree))):
        return lookup(tree[int(parts[0])], ".".join(parts[1:]))
    if isinstance(tree, dict):
        for end in range(len(parts), 0, -1):
            if ".".join(parts[:end]) in tree:
                return lookup(tree[".".join(parts[:end])], ".".join(parts[end:]))
    raise KeyError(key)


def members(folder: Path) -> list[Path]:
    """The folders of a group, checked to agree in all but the seed.

    Raises:
      ValueError: naming the settings that differ.
    """
    if not folder.name.endswith("*"):
        return [folder]
    base = folder.with_name(folder.name[:-1])
    folders = [base, *sorted(base.parent.glob(f"{base.name}_seed[0-9]*"))]
    settings = []
    for member in folders:
        flat = flatten(upgrade(read(member, "config.json")))
        settings.append({k: v for k, v in flat.items() if k not in _SEED_FIELDS})
    for member, other in zip(folders[1:], settings[1:], strict=True):
        keys = settings[0].keys() | other.keys()
        differ = sorted(k for k in keys if settings[0].get(k) != other.get(k))
        if differ:
            names = f"{base.name} and {member.name}"
            raise ValueError(f"{names} differ in {', '.join(differ)}.")
    return folders


def num_seeds(folder: Path) -> int:
    """How many seeds the numbers of a folder or group are the mean of."""
    folders = members(folder)
    if len(folders) > 1:
        return len(folders)
    seeds = read(folders[0], "config.json").get("seeds", [0])
    return max(len(seeds), read(folders[0]).get("num_runs", 1))


def measure(folder: Path, key: str) -> tuple[float, float | None]:
    """Mean, and deviation over seeds or None for one seed."""
    folders = members(folder)
    values = [_value(member, key) for member in folders]
    if len(values) > 1:
        return statistics.mean(values), statistics.stdev(values)
    stem, index = re.fullmatch(r"(.*?)((?:\.\d+)?)", key).groups()
    try:
        deviation = lookup(read(folders[0]), f"{stem}_std{index}")
    except KeyError:
        return values[0], None
    return values[0], deviation if num_seeds(folder) > 1 else None


def seconds_until(folder: Path, metric: str, level: float) -> float:
    """Seconds from the start of a run until a logged metric is at least at a level.

    Args:
      folder: one of results/ or a run folder, with `metrics.jsonl`.
      metric: a number of the log; it counts at the end of its interval.
      level: the smallest value that counts.

    Raises:
      KeyError: if no line of the log reaches the level.
    """
    for line in files.read_metrics(folder / "metrics.jsonl"):
        if line.get(metric, -math.inf) >= level:
            return line["seconds"]
    raise KeyError(f"{metric} >= {level:g}")


def _value(folder, key):
    if "+" in key:
        return sum(_value(folder, term) for term in key.split("+"))
    name, _, key = key.rpartition("/")
    folder = folder.with_name(name) if name else folder
    if match := _UNTIL.fullmatch(key):
        return seconds_until(folder, match[1], float(match[2]))
    summary = read(folder)
    first, operator, second = re.fullmatch(r"([^:-]*)([:-]?)(.*)", key).groups()
    value = lookup(summary, first)
    if not operator:
        return value
    other = lookup(summary, second)
    return value / other if operator == ":" else value - other


def render(folder: Path, key: str, form: str | None = None) -> str:
    """The text of one number, or of how the numbers of a folder were made.

    Raises:
      ValueError: if the folder, the key or the format does not exist.
    """
    if key.startswith("@"):
        columns = provenance(folder) | {"run": f"`{folder.name}`"}
        if form or key[1:] not in columns:
            names = ", ".join(f"@{name}" for name in columns)
            raise ValueError(f"{key!r} must be one of {names}, without a format.")
        return columns[key[1:]]
    match = re.fullmatch(r"(%|min|M|)(\.\d+[fge]|d)", form or "")
    if not match:
        raise ValueError(f"{form!r} is not a format: one of d, .Nf, .Ng, %.Nf, min.Nf.")
    if _planned(folder):
        return NOT_RUN
    scale, spec = _SCALES[match[1]], match[2].replace("d", ",.0f")
    try:
        values = measure(folder, key)
    except (KeyError, FileNotFoundError):
        raise ValueError(f"{show(folder)} has no number {key!r}.") from None
    if isinstance(values[0], (str, list, dict)):
        raise ValueError(f"{key!r} of {show(folder)} is not one number.")
    return " ± ".join(format(v * scale, spec) for v in values if v is not None)


def fill(text: str, root: Path = ROOT) -> str:
    """Rewrites every marker outside of code."""
    above = {}  # the folders since the heading or the last list of runs, in order

    def replace(match):
        name, key, form, value = match.groups()
        if not name:  # a heading or code
            if match[0] == _HEADING:
                above.clear()
            return match[0]
        opening = match[0].removesuffix(f"{value}<!--/-->")
        if key == "@runs":
            folders = [root / "results" / name for name in above]
            above.clear()
            return f"{opening}\n{_list_runs(folders)}\n<!--/-->"
        if name != "published":
            above[name] = True
        return f"{opening}{render(root / 'results' / name, key, form)}<!--/-->"

    return _PARTS.sub(replace, text)


def _list_runs(folders):
    """A Markdown table of how the numbers of each folder were made."""
    columns = [name for name in ORIGIN if name != "evidence"]
    rows = [("run", *columns), ("---",) * (1 + len(columns))]
    for folder in folders:
        origin = provenance(folder)
        rows.append((f"`{folder.name}`", *(origin[name] for name in columns)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _planned(folder):
    """Command and variant of a folder that does not exist yet, otherwise None."""
    name = folder.name.removesuffix("*")
    if folder.with_name(name).exists():
        return None
    for path in (ROOT / "experiments" / "configs").glob("[a-z]*.py"):
        if name.startswith(f"{path.stem}_"):
            module = importlib.import_module(f"experiments.configs.{path.stem}")
            variant = name.removeprefix(f"{path.stem}_")
            if variant in module.VARIANTS:
                return path.stem, variant
    raise ValueError(f"{show(folder)} does not exist, and no variant has its name.")


def provenance(folder: Path) -> dict[str, str]:
    """The columns that say how the numbers of a folder or group were made."""
    planned = _planned(folder)
    if planned:
        command = ", ".join(f"`{name}`" for name in planned)
        return dict.fromkeys(ORIGIN, "") | {"command": command}
    folders = members(folder)
    config = read(folders[0], "config.json")
    environments = [read(member, "environment.json") for member in folders]
    environment = environments[0]
    time = seconds(folder)
    device = environment["devices"][0]
    if environment["backend"] == "cpu":
        device = f"{environment['cpu_count']} CPU cores, {environment['machine']}"
    command = [config["experiment"], config.get("variant", "")]
    options = [_options(command[0], e["command"]) for e in environments]
    for name, value in options[0].items():
        is_common = all(other.get(name) == value for other in options)
        of_seed = name in ("seed", "seeds", *FILLED)
        if is_common and not of_seed and not name.endswith("data_dir"):
            command.append(f"{name}={value}")
    commits = {e["commit"] and f"`{e['commit']}`" for e in environments}
    values = (
        ", ".join(f"`{part}`" for part in command),
        str(num_seeds(folder)),
        f"{time / 60:.1f} min" if time else "",
        f"{device}, JAX {environment['versions']['jax']}",
        ", ".join(sorted(commit or "not recorded" for commit in commits)),
        ", ".join(f"`{show(member)}`" for member in folders),
    )
    return dict(zip(ORIGIN, values, strict=True))


def _options(experiment, line):
    """The fields that a command line changes, by their names of today."""
    # `story` and `report` run other commands; the options are their own.
    if not re.search(rf"experiments[./]{experiment}\b", line):
        return {}
    _, overrides = recorded_overrides(line)
    return dict(
        upgrade_override(experiment, name, value) for name, value in overrides.items()
    )


def seconds(folder: Path) -> float | None:
    """How long a run or all runs of a group took; None if it is not recorded."""
    values = [_seconds(read(member)) for member in members(folder)]
    return sum(values) if all(values) else None


def show(folder: Path) -> str:
    """The path of a folder as it is written in a document."""
    is_result = folder.parent.name == "results"
    return f"results/{folder.name}" if is_result else folder.as_posix()


def _seconds(summary):
    """Of all runs of a sweep; a resumed sweep's own clock misses the earlier ones."""
    runs = summary.get("runs", {}).values()
    return max(summary.get("seconds", 0), sum(run.get("seconds", 0) for run in runs))


def recorded_overrides(command: str) -> tuple[str | None, dict[str, str]]:
    """Variant and --config.FIELD=VALUE overrides of a recorded command line."""
    variant, overrides = None, {}
    for argument in shlex.split(command):
        name, _, value = argument.partition("=")
        if name == "--config":
            variant = value.partition(":")[2] or None
        elif name.startswith("--config."):
            overrides[name.removeprefix("--config.")] = value
    return variant, overrides
