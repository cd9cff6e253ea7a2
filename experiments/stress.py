"""Counts what bad inputs, kills and flipped bits do to the commands.

    python -m experiments.stress --config=experiments/configs/stress.py:inputs

An input is answered if one line names its field or file before anything is trained. A
killed run is resumed until it finishes, and must equal one that was not killed. A
flipped bit must be noticed when the file is loaded. A run of this command that stops
resumes at the first input, run or bit that is missing.
"""

import collections
import concurrent.futures
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments.common import bad_inputs, files, launch, runs, settings
from experiments.common.bad_inputs import RUNS, Case
from experiments.configs import stress as configs
from functa import functaset

# What stands for a path in the arguments of a case.
NAME = re.compile(r"\{(\w[\w.]*)\}")
_ROOT = Path(__file__).parents[1]
_TIMES = re.compile("second|speedup|efficiency|faster")
_TEMPORARY = re.compile(r"^\..*\.tmp$|orbax-checkpoint-tmp")
_NOTICED = re.compile("damaged|checksum|cannot be read|not a readable", re.IGNORECASE)
# More than any input needs, and less than what the inputs that claim to be huge need.
_MEMORY = 64 * 2**30


def train_and_evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs or resumes the chosen parts; returns the counts."""
    settings.check(config, configs.RULES)
    return runs.run_once(workdir, config, _run_parts)


def _run_parts(run):
    config, summary = run.config, {}
    references = _make_references(run)
    if config.inputs.every:
        summary |= _try_inputs(run, references)
    if config.kills.num_runs:
        summary |= _kill_runs(run, references)
    if config.num_flips:
        summary |= _flip_bits(run, references)
    return summary


def _make_references(run) -> dict[str, Path]:
    """Trains the smoke variants that the chosen parts start from, once."""
    config = run.config
    needed = set()
    if config.inputs.every:
        needed |= {"meta_learn"} | {"train_lbi", "train_vit"} & set(config.commands)
    if config.kills.num_runs:
        needed |= set(config.commands)
    if config.num_flips:
        needed |= set(_FLIPPED) & set(config.commands)
    for command in reversed(RUNS):
        for option in RUNS[command] if command in needed else ():
            needed |= set(NAME.findall(option))
    folders = {
        name: run.workdir / "reference" / name for name in RUNS if name in needed
    }
    for command, folder in folders.items():
        if not (folder / "summary.json").exists():
            run.say(f"{command} without a kill ...")
            with _start(run, command, folder, folders) as process:
                if process.wait():
                    log = folder.with_suffix(".log").read_text()
                    raise ValueError(f"{command} ended with an error: {log[-500:]}")
    return folders


@contextlib.contextmanager
def _start(run, command, folder, references):
    """A process of the smoke variant of a command; its output is in FOLDER.log."""
    options = (_fill(option, references, None) for option in RUNS[command])
    folder.parent.mkdir(parents=True, exist_ok=True)
    compiled = str(run.workdir.absolute() / "compiled")
    with open(folder.with_suffix(".log"), "ab") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", f"experiments.{command}"),
                f"--config=experiments/configs/{command}.py:smoke",
                *options,
                f"--workdir={folder.absolute()}",
            ],
            cwd=_ROOT,
            stdout=log,
            stderr=log,
            env=os.environ | {"JAX_COMPILATION_CACHE_DIR": compiled},
            start_new_session=True,
        )
    try:
        yield process
    finally:
        # The kill reaches the processes that the command started, too.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _fill(argument, references, made):
    """Replaces {NAME} by the run or the made file of this name."""

    def find(match):
        name = match[1]
        path = references[name] if name in references else made / name
        return str(path.absolute()) if name != "folder" else str(made.absolute())

    return NAME.sub(find, argument)


# Inputs.

# Commands whose inputs are always tried, because they start from no run.
_UNTRAINED = (
    *("scaling", "latent_controls", "compare_pruning", "benchmark"),
    *("import_functa", "figures"),
)


def _try_inputs(run, references):
    config = run.config.inputs
    made, marker = run.workdir / "made", run.workdir / "executed"
    cases = [
        case
        for case in bad_inputs.make_cases()
        if case.command in {*run.config.commands, *_UNTRAINED}
        and _runs_of(case) <= references.keys()
    ][:: config.every]
    path = run.workdir / "inputs.jsonl"
    answers = {line["name"]: line for line in _read_lines(path)}
    left = [case for case in cases if case.name not in answers]
    if left:
        run.say("writing the inputs ...")
        bad_inputs.make_files(made, marker.absolute(), references)
    queue, lock = collections.deque(left), threading.Lock()

    def serve():
        worker = None
        while True:
            try:
                case = queue.popleft()
            except IndexError:
                break
            worker = worker or _Worker(references, made)
            found = worker.ask(case, config.timeout)
            if found["outcome"] in ("hang", "died"):
                worker.kill()
                worker = None
            with lock:
                line = {"name": case.name, "is_good": not case.words, **found}
                answers[case.name] = line
                _append_line(path, line)
                if len(answers) % 50 == 0:
                    run.say(f"{len(answers)} of {len(cases)} inputs tried")
        if worker is not None:
            worker.kill()

    with concurrent.futures.ThreadPoolExecutor(config.num_processes) as executor:
        for future in [executor.submit(serve) for _ in range(config.num_processes)]:
            future.result()
    lines = [answers[case.name] for case in cases]
    bad = [line for line in lines if not line["is_good"]]
    good = [line for line in lines if line["is_good"]]
    counts = collections.Counter(line["outcome"] for line in bad)
    return {
        "num_inputs": len(bad),
        "num_executed": len(list(marker.iterdir())) if marker.exists() else 0,
        "num_silent": counts["accepted"],
        "num_one_line": counts["refused"],
        "one_line_share": counts["refused"] / max(len(bad), 1),
        "num_vague": counts["vague"],
        "num_tracebacks": counts["traceback"],
        "num_hangs": counts["hang"] + counts["died"],
        "num_good_inputs": len(good),
        "num_good_accepted": sum(line["outcome"] == "accepted" for line in good),
        "inputs_not_answered": {
            line["name"]: f"{line['outcome']}: {line['line'][:200]}"
            for line in lines
            if line["outcome"] != ("accepted" if line["is_good"] else "refused")
        },
    }


def _runs_of(case):
    """The runs that the arguments of a case name."""
    return RUNS.keys() & set(NAME.findall(" ".join(case.arguments)))


class _Worker:
    """A process that answers cases; an input can kill or hang it."""

    def __init__(self, references, made):
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(other, references, made), daemon=True
        )
        self._process.start()
        other.close()

    def ask(self, case: Case, timeout: float) -> dict[str, str]:
        try:
            self._connection.send(case)
            if not self._connection.poll(timeout):
                return {"outcome": "hang", "line": f"no answer in {timeout} s"}
            return self._connection.recv()
        except (EOFError, OSError):
            self._process.join(10)
            return {"outcome": "died", "line": f"exit {self._process.exitcode}"}

    def kill(self):
        self._process.kill()
        self._process.join()


def _serve(connection, references, made):
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.RLIM_INFINITY))
    launch.silence_libraries()
    with contextlib.suppress(EOFError):
        while True:
            connection.send(answer(connection.recv(), references, made))


def answer(case: Case, references: dict[str, Path], made: Path) -> dict[str, str]:
    """Tries one case in this process: {"outcome", "line"}.

    The outcome is "refused" (one line, with one of the words), "vague" (without them),
    "traceback", or "accepted": nothing was refused before the run folder was made.
    """
    arguments = [_fill(argument, references, made) for argument in case.arguments]
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            _execute(case, arguments, made)
    except Exception as error:  # noqa: BLE001
        line = launch.one_line(error)
        if _UNMADE in line:
            return {"outcome": "accepted", "line": ""}
        if not launch.is_of_user(error):
            return {"outcome": "traceback", "line": f"{type(error).__name__}: {line}"}
        is_named = any(word in line for word in case.words)
        return {"outcome": "refused" if is_named else "vague", "line": line}
    return {"outcome": "accepted", "line": "finished"}


# A folder that cannot be made, because it is in a file.
_UNMADE = "a_file.txt/accepted"


def _execute(case, arguments, made):
    unmade = made / _UNMADE
    module = importlib.import_module(f"experiments.{case.command}")
    if case.command == "import_functa":
        module.import_checkpoint(Path(arguments[0]), unmade)
    elif case.command == "figures":
        module.figures.draw(Path(arguments[0]))
    else:
        config, options = launch.parse(case.command, arguments)
        workdir = made / case.workdir if case.workdir else unmade
        if options.workdir is not None:
            workdir = launch.find_workdir(options.workdir)
        module.train_and_evaluate(config, workdir)


# Kills.


def _kill_runs(run, references):
    path = run.workdir / "kills.jsonl"
    done = {(line["command"], line["number"]): line for line in _read_lines(path)}
    for number in range(run.config.kills.num_runs):
        for index, command in enumerate(run.config.commands):
            if (command, number) in done:
                continue
            rng = np.random.default_rng((run.config.seed, number, index))
            line = _kill_run(run, command, number, references, rng)
            done[command, number] = line
            _append_line(path, line)
            run.say(f"{command}: {line}")
    lines = list(done.values())
    return {
        "num_kills": sum(len(line["kills"]) for line in lines),
        "num_kills_in_writing": sum(line["kills"].count("writing") for line in lines),
        "num_killed_runs": len(lines),
        "num_killed_runs_equal": sum(not line["differs"] for line in lines),
        "killed_runs_that_differ": {
            f"{line['command']}_{line['number']}": line["differs"]
            for line in lines
            if line["differs"]
        },
    }


def _kill_run(run, command, number, references, rng):
    """Kills a run several times, lets it finish, and compares it."""
    folder = run.workdir / "killed" / f"{command}_{number}"
    shutil.rmtree(folder, ignore_errors=True)
    log = folder.with_suffix(".log")
    log.unlink(missing_ok=True)
    num_per_run = run.config.kills.num_per_run
    num_lines = _count_lines(references[command].with_suffix(".log"))
    kills = []
    for attempt in range(num_per_run):
        kind = "writing" if (attempt + number) % 2 else "training"
        most = 6 if kind == "writing" else 1 + num_lines // num_per_run
        wanted = int(rng.integers(1, most + 1))
        with _start(run, command, folder, references) as process:
            if not _wait_for(kind, wanted, folder, log, process):
                break
        kills.append(kind)
    with _start(run, command, folder, references) as process:
        status = process.wait()
    differs = find_differences(references[command], folder)
    if status:
        differs = [f"exit {status}: {log.read_text()[-300:]}"]
    return {"command": command, "number": number, "kills": kills, "differs": differs}


def _wait_for(kind, wanted, folder, log, process):
    """Waits for lines of output, or for temporary files; False if the process ends."""
    before = _count_lines(log)
    seen = set()
    while process.poll() is None:
        if kind == "training":
            found = _count_lines(log) - before
        else:
            for top, inner, names in os.walk(folder):
                seen |= {(top, n) for n in (*inner, *names) if _TEMPORARY.search(n)}
            found = len(seen)
        if found >= wanted:
            return True
        time.sleep(0.001)
    return False


def find_differences(first: Path, second: Path) -> list[str]:
    """Names of the files of two run folders that differ, except in times.

    Compared are the arrays of .npz files, .json files and the lines of metrics.jsonl,
    also in the folders of inner runs; checkpoints are not.
    """
    names = {
        path.relative_to(folder)
        for folder in (first, second)
        for path in folder.rglob("*")
        if path.suffix in (".npz", ".json", ".jsonl", ".png")
        and path.name not in ("config.json", "environment.json", "inputs.json")
        and "checkpoints" not in path.relative_to(folder).parts
    }
    return sorted(
        str(name)
        for name in names
        if _contents(first / name) != _contents(second / name)
    )


def _contents(path):
    if not path.exists() or path.suffix == ".png":
        return path.exists()
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return {
                name: (file[name].dtype.str, file[name].shape, file[name].tobytes())
                for name in file.files
                if not _TIMES.search(name)
            }
    if path.suffix == ".jsonl":
        return repr([_without_times(line) for line in files.read_metrics(path)])
    return repr(_without_times(files.read_json(path)))


def _without_times(value):
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if not _TIMES.search(k)}
    return value


# Flipped bits.


_FLIPPED = {
    "meta_learn": ("checkpoint", "functaset"),
    "make_functaset": ("functaset",),
    "train_vit": ("checkpoint",),
}


def _flip_bits(run, references):
    """Flips bits in the newest checkpoints and in functasets, and loads them."""
    rng = np.random.default_rng(run.config.seed)
    path = run.workdir / "flips.jsonl"
    done = _read_lines(path)
    targets = [
        (references[name], kind)
        for name, kinds in _FLIPPED.items()
        if name in references
        for kind in kinds
    ]
    for number in range(run.config.num_flips):
        reference, kind = targets[number % len(targets)]
        place = rng.random()
        bit = int(rng.integers(8))
        if number < len(done):
            continue
        folder = run.workdir / "flipped" / str(number)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(reference, folder)
        where = flip(folder, kind, place, bit)
        outcome = _load_flipped(reference, folder, kind)
        line = {"file": where, "outcome": outcome}
        done.append(line)
        _append_line(path, line)
        shutil.rmtree(folder)
    counts = collections.Counter(line["outcome"] for line in done)
    return {
        "num_flips": len(done),
        "num_flips_noticed": counts["noticed"],
        "num_flips_harmless": counts["equal"],
        "flips_not_noticed": [
            line["file"] for line in done if line["outcome"] == "different"
        ],
    }


def flip(folder: Path, kind: str, place: float, bit: int) -> str:
    """Flips one bit at the share `place` of all bytes; returns its file and byte."""
    top = folder / "functaset.npz"
    if kind == "checkpoint":
        steps = [p for p in (folder / "checkpoints").iterdir() if p.name.isdigit()]
        top = max(steps, key=lambda p: int(p.name))
    inside = sorted(p for p in top.rglob("*") if p.is_file()) if top.is_dir() else [top]
    offset = int(place * sum(p.stat().st_size for p in inside))
    for path in inside:
        size = path.stat().st_size
        if offset < size:
            data = bytearray(path.read_bytes())
            data[offset] ^= 1 << bit
            path.write_bytes(data)
            return f"{path.relative_to(folder)} byte {offset}"
        offset -= size
    raise AssertionError("the place is beyond the last file.")


def _load_flipped(reference, folder, kind):
    """ "noticed", "equal" or "different"."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            found = _load(folder, kind)
    except Exception as error:
        if not launch.is_of_user(error):
            raise
        return "noticed"
    if _NOTICED.search(output.getvalue()):
        return "noticed"
    expected = _load(reference, kind)
    same = jax.tree.map(
        lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), expected, found
    )
    return "equal" if all(jax.tree.leaves(same)) else "different"


def _load(folder, kind):
    if kind == "checkpoint":
        return runs.load_checkpoint(folder)[1]
    return functaset.load_functaset(folder / "functaset.npz")._asdict()


def _read_lines(path):
    """The lines of a record; a kill may have cut the last one."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def _append_line(path, line):
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def _count_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


if __name__ == "__main__":
    launch.launch("stress", train_and_evaluate)
