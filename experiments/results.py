"""Writes every measured number of the README and of docs/ from the files in results/.

    python -m experiments.results            # rewrites the pages and the markers
    python -m experiments.results --check    # exit status 1 if anything would change

A number in prose is a marker, `<!--= FOLDER KEY FORMAT -->value<!--/-->`:

* FOLDER is a folder of results/. `NAME*` stands for NAME and all NAME_seedN. They must
  agree in all settings but the seed; the value is then `mean ± deviation` (ddof 1).
* KEY is a dotted path into summary.json, with indices into lists; `A:B` is the ratio of
  two keys. Where the run itself went over several seeds, KEY_std is its deviation.
* FORMAT is `d`, `.Nf` or `.Ng`, with a prefix for the unit: `%` times 100, `min`
  seconds to minutes, `M` millions.

The tables, and the published numbers in them, are in
`experiments/common/results_tables.py`.
"""

import argparse
import re
import shlex
import statistics
import sys
import tomllib
from pathlib import Path

from experiments.common import files
from experiments.common.results_tables import BENCHMARKS, PAGES, PLANNED, README_ROWS
from experiments.common.upgrade import FILLED, flatten, upgrade

ROOT = Path(__file__).parents[1]
MARKER = re.compile(r"<!--= (\S+) (\S+) (\S+) -->(.*?)<!--/-->", re.S)
_SCALES = {"%": 100.0, "min": 1 / 60, "M": 1e-6, "": 1.0}
# Settings in which the members of a group may differ: the seed and what comes of it.
_SEED_FIELDS = ("seed", "seeds", "functaset", "init_from", "run", *FILLED)
_GENERATED = "<!-- Written by `python -m experiments.results`; do not edit. -->\n"


def read(name: str, file: str = "summary.json", root: Path = ROOT) -> dict:
    """One JSON file of a folder of results/."""
    return files.read_json(root / "results" / name / file)


def lookup(tree, key: str):
    """The entry of a nested summary at a dotted key; names may hold dots themselves.

    Raises:
      KeyError: if there is none.
    """
    parts = key.split(".")
    if isinstance(tree, list):
        try:
            tree, rest = tree[int(parts[0])], parts[1:]
        except (ValueError, IndexError):
            raise KeyError(key) from None
        return lookup(tree, ".".join(rest)) if rest else tree
    if isinstance(tree, dict):
        for end in range(len(parts), 0, -1):
            name = ".".join(parts[:end])
            if name in tree:
                if end == len(parts):
                    return tree[name]
                return lookup(tree[name], ".".join(parts[end:]))
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
    deviation = None
    if num_seeds(folder, root) > 1 and ":" not in key:
        stem, index = re.fullmatch(r"(.*?)((?:\.\d+)?)", key).groups()
        try:
            deviation = lookup(read(names[0], root=root), f"{stem}_std{index}")
        except KeyError:
            pass
    return values[0], deviation


def _value(summary, key):
    over, _, under = key.partition(":")
    value = lookup(summary, over)
    return value / lookup(summary, under) if under else value


def render(folder: str, key: str, form: str, root: Path = ROOT) -> str:
    """The text of one number.

    Raises:
      ValueError: if the folder, the key or the format does not exist.
    """
    match = re.fullmatch(r"(%|min|M|)(\.\d+[fge]|d)", form)
    if not match:
        raise ValueError(f"{form!r} is not a format: one of d, .Nf, .Ng, %.Nf, min.Nf.")
    scale, spec = _SCALES[match[1]], match[2]
    try:
        mean, deviation = measure(folder, key, root)
    except (KeyError, FileNotFoundError):
        raise ValueError(f"results/{folder} has no number {key!r}.") from None
    if isinstance(mean, (str, list, dict)):
        raise ValueError(f"{key!r} of results/{folder} is not one number.")
    texts = []
    for value in (mean, deviation):
        if value is not None:
            texts.append(f"{round(value * scale):,}" if spec == "d" else None)
            texts[-1] = texts[-1] or format(value * scale, spec)
    return " ± ".join(texts)


def fill(text: str, root: Path = ROOT) -> str:
    """Rewrites every marker outside of code."""
    parts = re.split(r"(^```.*?^```|`[^`\n]*`)", text, flags=re.S | re.M)

    def replace(match):
        folder, key, form, _ = match.groups()
        value = render(folder, key, form, root)
        return f"<!--= {folder} {key} {form} -->{value}<!--/-->"

    return "".join(p if i % 2 else MARKER.sub(replace, p) for i, p in enumerate(parts))


def base_url() -> str | None:
    """The address under which the repository's files are read, from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    urls = {k.lower(): v for k, v in project.get("urls", {}).items()}
    url = urls.get("repository") or urls.get("source")
    return f"{url.rstrip('/')}/blob/main" if url else None


def link(path: str) -> str:
    url = base_url()
    return f"[{path}]({url}/{path})" if url else f"`{path}`"


def provenance(folder: str, root: Path = ROOT) -> list[str]:
    """Command, seeds, time, machine, commit, evidence of a folder or group."""
    if folder in PLANNED:
        return [PLANNED[folder], "", "", "", "", ""]
    names = members(folder, root)
    config = read(names[0], "config.json", root)
    environment = read(names[0], "environment.json", root)
    seconds = [_seconds(read(name, root=root)) for name in names]
    minutes = f"{statistics.mean(seconds) / 60:.1f} min" if all(seconds) else ""
    device = environment["devices"][0]
    if environment["backend"] == "cpu":
        device = f"{environment['cpu_count']} CPU cores, {environment['machine']}"
    jax = environment["versions"]["jax"]
    _, overrides = recorded_overrides(environment["command"])
    settings = [f"`{k}={v}`" for k, v in overrides.items() if k not in _SEED_FIELDS]
    command = [f"`{config['experiment']}`", f"`{config.get('variant', '')}`", *settings]
    commits = {read(n, "environment.json", root)["commit"] for n in names}
    return [
        ", ".join(command),
        str(num_seeds(folder, root)),
        minutes,
        f"{device}, JAX {jax}",
        ", ".join(f"`{c}`" if c else "not recorded" for c in sorted(commits, key=str)),
        ", ".join(link(f"results/{name}") for name in names),
    ]


def _seconds(summary):
    """Of all runs of a sweep; a resumed sweep's own clock misses the earlier ones."""
    runs = summary.get("runs", {}).values()
    return max(summary.get("seconds", 0), sum(run.get("seconds", 0) for run in runs))


def table(head, rows) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def result_table(rows, published="published", root: Path = ROOT) -> str:
    head = ["quantity", published, "ours", "command, variant", "seeds", "time"]
    head += ["machine", "commit", "evidence"]
    lines = []
    for label, theirs, folder, key, form in rows:
        planned = folder in PLANNED
        ours = "not run yet" if planned else render(folder, key, form, root)
        lines.append([label, theirs or "-", ours, *provenance(folder, root)])
    return table(head, lines)


def readme_rows(root: Path = ROOT) -> str:
    lines = []
    for label, theirs, folder, key, form in README_ROWS:
        planned = folder in PLANNED
        ours = "not run yet" if planned else render(folder, key, form, root)
        command, _, minutes, _, _, _ = provenance(folder, root)
        evidence = ", ".join(
            f"[{name}](results/{name})"
            for name in ([] if planned else members(folder, root))
        )
        lines.append([label, theirs or "-", ours, command, minutes, evidence])
    head = ["experiment", "published", "ours", "command, variant", "time", "evidence"]
    return table(head, lines)


def records_table(folder, prefix, columns, root: Path = ROOT) -> str:
    """One row per record of a summary, one column per (head, key, format)."""
    summary = read(folder, root=root)
    records = lookup(summary, prefix) if prefix else summary
    lines = []
    for name, record in records.items():
        if not isinstance(record, dict) or not any(k in record for _, k, _ in columns):
            continue
        line = [f"`{name}`"]
        for _, key, form in columns:
            path = f"{prefix}.{name}.{key}" if prefix else f"{name}.{key}"
            if key not in record:
                line.append("")
            elif isinstance(record[key], str):
                line.append(record[key])
            else:
                line.append(render(folder, path, form, root))
        lines.append(line)
    return table(["row", *(head for head, _, _ in columns)], lines)


def picture(alt: str, path: str, root: Path = ROOT) -> str:
    """A committed figure, or a line that says that a new run draws it."""
    if (root / "results" / path).exists():
        return f"![{alt}](../results/{path})\n"
    name = Path(path).name
    return f"{alt}: the evidence holds no arrays for `{name}`; a new run draws it.\n"


def page(title, intro, sections, root: Path = ROOT) -> str:
    parts = [_GENERATED, f"# {title}\n", f"{intro}\n"]
    for heading, caption, rows, figures in sections:
        parts += [f"## {heading}\n", f"{caption}\n"]
        if rows:
            parts.append(
                result_table(rows, "report" if "report" in title else "published", root)
            )
        parts += [picture(alt, path, root) for alt, path in figures]
    return "\n".join(parts)


def benchmarks_page(root: Path = ROOT) -> str:
    title, intro, sections = BENCHMARKS
    parts = [_GENERATED, f"# {title}\n", f"{intro}\n"]
    for heading, caption, folder, prefix, columns, figures in sections:
        command, _, minutes, machine, commit, evidence = provenance(folder, root)
        parts += [f"## {heading}\n", f"{caption}\n"]
        parts.append(f"{command}; {minutes}; {machine}; commit {commit}; {evidence}.\n")
        if isinstance(columns, tuple):
            parts.append(records_table(folder, prefix, columns, root))
        else:
            lines = [[label, render(folder, k, f, root)] for label, k, f in columns]
            parts.append(table(["quantity", "value"], lines))
        parts += [picture(alt, path, root) for alt, path in figures]
    return "\n".join(parts)


def generate(root: Path = ROOT) -> dict[Path, str]:
    """What every written file should hold, by path."""
    pages = {root / "docs" / f"{name}.md": page(*PAGES[name], root) for name in PAGES}
    pages[root / "docs" / "benchmarks.md"] = benchmarks_page(root)
    filled = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    filled += sorted((root / "results").glob("*/model_card.md"))
    for path in filled:
        if path in pages or not path.exists():
            continue
        text = fill(path.read_text(), root)
        if path.name == "README.md" and path.parent == root:
            text = re.sub(
                r"(<!-- results -->\n).*?(<!-- /results -->)",
                lambda m: m[1] + readme_rows(root) + m[2],
                text,
                flags=re.S,
            )
        pages[path] = text
    return pages


def outdated(root: Path = ROOT) -> list[Path]:
    """The files that `generate` would change."""
    return [
        path
        for path, text in generate(root).items()
        if not path.exists() or path.read_text() != text
    ]


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
        for path in stale:
            print(f"{'outdated' if arguments.check else 'wrote'}: {path}")
            if not arguments.check:
                text = generate()[path]
                files.write_atomic(path, lambda file, text=text: file.write(text))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 1 if arguments.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
