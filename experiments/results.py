"""Fills in every measured number of README.md, docs/ and the model cards.

    python -m experiments.results            # rewrites the values of the markers
    python -m experiments.results --check    # exit status 1 if anything would change

A number is a marker, `<!--= FOLDER KEY FORMAT -->value<!--/-->`:

* FOLDER is a folder of results/. `NAME*` stands for NAME and all NAME_seedN. They must
  agree in all settings but the seed; the value is then `mean ± deviation` (ddof 1).
  A folder COMMAND_VARIANT that does not exist gives "not run yet". The numbers that the
  student report states are in results/published.
* KEY is a dotted path into summary.json, with indices into lists. `A:B` is the ratio of
  two keys and `A-B` their difference. Where the run itself went over several seeds,
  KEY_std is its deviation.
* FORMAT is `d`, `.Nf` or `.Ng`, with a prefix for the unit: `%` times 100, `min`
  seconds to minutes, `M` millions.

How a number was made is a marker `<!--= FOLDER @COLUMN -->value<!--/-->`. COLUMN is
`command`, `seeds`, `time`, `machine`, `commit` or `evidence`; `row` is all six as the
cells of a table.
"""

import argparse
import functools
import importlib
import re
import shlex
import statistics
import sys
from pathlib import Path

from experiments.common import files
from experiments.common.settings import flatten
from experiments.common.upgrade import FILLED, upgrade

ROOT = Path(__file__).parents[1]
MARKER = re.compile(r"<!--= (\S+) (\S+)(?: (\S+))? -->(.*?)<!--/-->", re.S)
_CODE_OR_MARKER = re.compile(rf"^```.*?^```|`[^`\n]*`|{MARKER.pattern}", re.S | re.M)
_SCALES = {"%": 100.0, "min": 1 / 60, "M": 1e-6, "": 1.0}
# Settings in which the members of a group may differ: the seed and what comes of it.
_SEED_FIELDS = ("seed", "seeds", "functaset", "init_from", "run", *FILLED)


@functools.cache
def read(name: str, file: str = "summary.json", root: Path = ROOT) -> dict:
    """One JSON file of a folder of results/."""
    return files.read_json(root / "results" / name / file)


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


def members(folder: str, root: Path = ROOT) -> list[str]:
    """The folders of a group, checked to agree in all but the seed.

    Raises:
      ValueError: naming the settings that differ.
    """
    if not folder.endswith("*"):
        return [folder]
    base = folder[:-1]
    found = sorted(p.name for p in (root / "results").glob(f"{base}_seed[0-9]*"))
    names = [base, *found]
    settings = []
    for name in names:
        flat = flatten(upgrade(read(name, "config.json", root)))
        settings.append({k: v for k, v in flat.items() if k not in _SEED_FIELDS})
    for name, other in zip(names[1:], settings[1:], strict=True):
        keys = settings[0].keys() | other.keys()
        differ = sorted(k for k in keys if settings[0].get(k) != other.get(k))
        if differ:
            raise ValueError(f"{base} and {name} differ in {', '.join(differ)}.")
    return names


def num_seeds(folder: str, root: Path = ROOT) -> int:
    """How many seeds the numbers of a folder or group are the mean of."""
    names = members(folder, root)
    if len(names) > 1:
        return len(names)
    seeds = read(names[0], "config.json", root).get("seeds", [0])
    return max(len(seeds), read(names[0], root=root).get("num_runs", 1))


def measure(folder: str, key: str, root: Path = ROOT) -> tuple[float, float | None]:
    """Mean, and deviation over seeds or None for one seed."""
    names = members(folder, root)
    values = [_value(read(name, root=root), key) for name in names]
    if len(values) > 1:
        return statistics.mean(values), statistics.stdev(values)
    stem, index = re.fullmatch(r"(.*?)((?:\.\d+)?)", key).groups()
    try:
        deviation = lookup(read(names[0], root=root), f"{stem}_std{index}")
    except KeyError:
        return values[0], None
    return values[0], deviation if num_seeds(folder, root) > 1 else None


def _value(summary, key):
    first, operator, second = re.fullmatch(r"([^:-]*)([:-]?)(.*)", key).groups()
    value = lookup(summary, first)
    if not operator:
        return value
    other = lookup(summary, second)
    return value / other if operator == ":" else value - other


def render(folder: str, key: str, form: str | None, root: Path = ROOT) -> str:
    """The text of one marker.

    Raises:
      ValueError: if the folder, the key or the format does not exist.
    """
    if key.startswith("@"):
        columns = provenance(folder, root)
        columns["row"] = " | ".join(columns.values())
        if form or key[1:] not in columns:
            names = ", ".join(f"@{name}" for name in columns)
            raise ValueError(f"{key!r} must be one of {names}, without a format.")
        return columns[key[1:]]
    match = re.fullmatch(r"(%|min|M|)(\.\d+[fge]|d)", form or "")
    if not match:
        raise ValueError(f"{form!r} is not a format: one of d, .Nf, .Ng, %.Nf, min.Nf.")
    if _planned(folder, root):
        return "not run yet"
    scale, spec = _SCALES[match[1]], match[2].replace("d", ",.0f")
    try:
        values = measure(folder, key, root)
    except (KeyError, FileNotFoundError):
        raise ValueError(f"results/{folder} has no number {key!r}.") from None
    if isinstance(values[0], (str, list, dict)):
        raise ValueError(f"{key!r} of results/{folder} is not one number.")
    return " ± ".join(format(v * scale, spec) for v in values if v is not None)


def fill(text: str, root: Path = ROOT) -> str:
    """Rewrites every marker outside of code."""

    def replace(match):
        folder, key, form, value = match.groups()
        if not folder:  # code
            return match[0]
        opening = match[0].removesuffix(f"{value}<!--/-->")
        return f"{opening}{render(folder, key, form, root)}<!--/-->"

    return _CODE_OR_MARKER.sub(replace, text)


def _planned(folder, root):
    """Command and variant of a folder that does not exist yet, otherwise None."""
    if (root / "results" / folder.removesuffix("*")).exists():
        return None
    for path in (ROOT / "experiments" / "configs").glob("[a-z]*.py"):
        if folder.startswith(f"{path.stem}_"):
            module = importlib.import_module(f"experiments.configs.{path.stem}")
            variant = folder.removeprefix(f"{path.stem}_")
            if variant in module.VARIANTS:
                return path.stem, variant
    raise ValueError(f"results/{folder} does not exist, and no variant has its name.")


def provenance(folder: str, root: Path = ROOT) -> dict[str, str]:
    """The columns that say how the numbers of a folder or group were made."""
    names = ("command", "seeds", "time", "machine", "commit", "evidence")
    planned = _planned(folder, root)
    if planned:
        command = ", ".join(f"`{name}`" for name in planned)
        return dict.fromkeys(names, "") | {"command": command}
    folders = members(folder, root)
    config = read(folders[0], "config.json", root)
    environments = [read(name, "environment.json", root) for name in folders]
    environment = environments[0]
    seconds = [_seconds(read(name, root=root)) for name in folders]
    device = environment["devices"][0]
    if environment["backend"] == "cpu":
        device = f"{environment['cpu_count']} CPU cores, {environment['machine']}"
    _, overrides = recorded_overrides(environment["command"])
    command = [config["experiment"], config.get("variant", "")]
    command += [f"{k}={v}" for k, v in overrides.items() if k not in _SEED_FIELDS]
    commits = {e["commit"] and f"`{e['commit']}`" for e in environments}
    values = (
        ", ".join(f"`{part}`" for part in command),
        str(num_seeds(folder, root)),
        f"{statistics.mean(seconds) / 60:.1f} min" if all(seconds) else "",
        f"{device}, JAX {environment['versions']['jax']}",
        ", ".join(sorted(commit or "not recorded" for commit in commits)),
        ", ".join(f"`results/{name}`" for name in folders),
    )
    return dict(zip(names, values, strict=True))


def _seconds(summary):
    """Of all runs of a sweep; a resumed sweep's own clock misses the earlier ones."""
    runs = summary.get("runs", {}).values()
    return max(summary.get("seconds", 0), sum(run.get("seconds", 0) for run in runs))


def outdated(root: Path = ROOT) -> dict[Path, str]:
    """The files whose markers are not up to date, with the text they should hold."""
    pages = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    pages += sorted((root / "results").glob("*/model_card.md"))
    texts = {page: page.read_text() for page in pages}
    filled = {page: fill(text, root) for page, text in texts.items()}
    return {page: text for page, text in filled.items() if text != texts[page]}


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


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args(argv)
    try:
        stale = outdated()
        for path, text in stale.items():
            print(f"{'outdated' if arguments.check else 'wrote'}: {path}")
            if not arguments.check:
                files.write_atomic(path, lambda file, text=text: file.write(text))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 1 if arguments.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
