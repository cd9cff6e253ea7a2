"""Writes one page with every table and figure of the student report, theirs and ours.

    python -m experiments.report                     # what is finished, and the page
    python -m experiments.report --config.run=all    # runs what is missing

The tables and figures, and the runs that they show, are listed in
experiments/common/report.py. The runs are those of other commands, in the folders of
these commands, and resume like them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from experiments.common import (
    devices,
    evidence,
    files,
    launch,
    page,
    report,
    runs,
    settings,
    upgrade,
)
from experiments.configs import report as configs


class State(NamedTuple):
    """State of a run.

    Attributes:
      words: whether it is finished, and where.
      folder: the folder of its results, which may be in results/, or None.
    """

    words: str
    folder: Path | None = None


def train_and_evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs what config.run names and writes the page; returns the names of the runs."""
    settings.check(config, configs.RULES)
    folder = Path(workdir if config.folder is None else config.folder)
    inputs = report.list_runs()
    states = look(config, folder, inputs)
    for line in tell(config, states):
        devices.say(line)
    jobs = plan(config, folder, inputs, states)
    failed = _run(jobs, folder)
    states = look(config, folder, inputs)
    _write(config, workdir, states)
    if failed:
        words = "; ".join(f"{run}: {message}" for run, message in failed.items())
        raise ValueError(f"{len(failed)} of {len(jobs)} runs failed: {words}")
    missing = [run for run, state in states.items() if state.folder is None]
    return {
        "finished": [run for run in states if run not in missing],
        "missing": missing,
    }


def _run(jobs, folder):
    """Runs or resumes all jobs; returns {run: message} of those that failed."""
    failed = {}
    for run, config in jobs.items():
        try:
            launch.run_command(config.experiment, config, folder / run, run)
        except (ValueError, OSError) as error:
            # The other runs do not depend on what a user has to correct here.
            if not launch.is_of_user(error):
                raise
            failed[run] = launch.one_line(error)
            devices.say(f"{run} failed: {failed[run]}")
    return failed


def make_config(config: ConfigDict, run: str, fields: Mapping[str, Any]) -> ConfigDict:
    """The configuration of a run, or in a smoke run its substitute."""
    command, variant = run.split("/")
    if config.smoke:
        smoke = {**configs.SMOKE.get(command, {}), **configs.SMOKE.get(run, {})}
        variant, fields = "smoke", {**smoke, **fields}
    return settings.derive(command, variant, fields)


def look(
    config: ConfigDict, folder: Path, inputs: Mapping[str, Mapping[str, Any]]
) -> dict[str, State]:
    """{run: its state}.

    Args:
      config: the configuration.
      folder: the folder of the runs.
      inputs: {run: {field: its input}}; see `report.list_runs`.

    Raises:
      ValueError: if the configuration of a run is damaged.
    """
    return {run: _look(config, folder / run, run, inputs[run]) for run in inputs}


def _look(config, folder, run, inputs):
    state = State("missing")
    if (folder / "config.json").exists():
        differ = runs.differences(folder, make_config(config, run, {})).keys()
        differ -= {*inputs, *upgrade.FILLED}
        if differ:
            words = ", ".join(sorted(differ))
            state = State(f"in {folder} with other settings ({words})")
        elif (folder / "summary.json").exists():
            return State(f"finished in {folder}", folder)
        else:
            state = State(f"unfinished in {folder}")
    result = report.find_result(run) if config.evidence else None
    return State(f"finished in {evidence.show(result)}", result) if result else state


def plan(
    config: ConfigDict,
    folder: Path,
    inputs: Mapping[str, Mapping[str, tuple[str, str]]],
    states: Mapping[str, State],
) -> dict[str, ConfigDict]:
    """{run: configuration} of what config.run names and what that reads, in order.

    Args:
      config: the configuration.
      folder: the folder of the runs.
      inputs: see `report.list_runs`.
      states: see `look`.

    Raises:
      ValueError: if a field of a configuration is wrong.
    """
    chosen = set()

    def choose(run):
        if run in chosen or states[run].folder == folder / run:
            return
        chosen.add(run)
        for needed, file in inputs[run].values():
            if _find(folder, states, needed, file) is None:
                choose(needed)

    for name in configs.split(config.run):
        shown = [run for entry in report.ENTRIES for run in entry.runs()]
        missing = [run for run in shown if states[run].folder is None]
        for run in missing if name == "all" else [name]:
            choose(run)

    jobs = {}
    for run in filter(chosen.__contains__, inputs):
        fields = {}
        for field, (needed, file) in inputs[run].items():
            found = None if needed in chosen else _find(folder, states, needed, file)
            fields[field] = str(found or folder / needed / file)
        jobs[run] = make_config(config, run, fields)
    return jobs


def _find(folder, states, run, file):
    """A file of a finished run, or None. A run in results/ lacks its checkpoints."""
    found = states[run].folder
    if found is None or found == folder / run:
        return found and found / file
    path = found / file
    if not (file and path.exists()):
        return None
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def tell(config: ConfigDict, states: Mapping[str, State]) -> list[str]:
    """Lines that say for each table and figure what is finished and what it takes."""
    lines = []
    for entry in report.ENTRIES:
        for run in entry.runs():
            time, machine = _recorded(config, run)
            took = f"; {time} on {machine}" if time else ""
            lines.append(f"{entry.name:<17} {run:<33} {states[run].words}{took}")
        if not entry.runs():
            lines.append(f"{entry.name:<17} nothing to run")
    missing = [run for run, state in states.items() if not state.folder]
    if missing:
        lines.append(f"Missing: {', '.join(missing)}.")
        known = [run for run in missing if _recorded(config, run)[0]]
        total = sum(evidence.seconds(report.find_result(run)) for run in known)
        lines.append(
            f"{len(known)} of these {len(missing)} were recorded; they take "
            f"{total / 60:.0f} min. --config.run=all runs what the page lacks."
        )
    return lines


def _recorded(config, run):
    """The time of the run in results/ and its machine; "" if there is none."""
    result = None if config.smoke else report.find_result(run)
    origin = evidence.provenance(result) if result else {}
    return origin.get("time", ""), origin.get("machine", "")


def _write(config, workdir, states):
    parts = [page.Text(report.INTRODUCTION)]
    if config.smoke:
        parts.append(page.Text(configs.SMOKE_TEXT))
    rows = [
        [f"`{run}`", state.words, *_recorded(config, run)]
        for run, state in states.items()
    ]
    parts += [
        page.Heading("Runs"),
        page.Table("", ("run", "state", "time in results/", "machine"), rows),
        *report.describe(report.ENTRIES, lambda run: _folder(states, run)),
    ]
    page.write_page(workdir, "report", report.TITLE, parts)
    devices.say(f"wrote {workdir / 'report.html'}")
    document = evidence.ROOT / "docs" / "report.md"
    if config.evidence and document.read_text() != (text := report.document()):
        files.write_atomic(document, lambda file: file.write(text))
        devices.say(f"wrote {document}")


def _folder(states, run):
    return report.find_result(run) if run == report.PUBLISHED else states[run].folder


if __name__ == "__main__":
    launch.launch("report", train_and_evaluate)
