"""A run: its folder, its log, and its exact resumption.

A run folder holds `config.json`, `environment.json`, `metrics.jsonl`, `checkpoints/`,
`figures/`, `arrays.npz` (the arrays of the figures) and `summary.json`. Files are
written under a temporary name and then moved: a kill never leaves a damaged file.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from experiments.common import devices, files, partners
from experiments.common.image_folder import some
from experiments.common.launch import one_line
from experiments.common.settings import flatten
from experiments.common.upgrade import read_config, upgrade

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "chex",
    "orbax-checkpoint",
    "numpy",
    "ml_collections",
    "tensorflow-datasets",
    "scikit-learn",
    "matplotlib",
)


class Run:
    """An open run folder; `open_run` makes one.

    Attributes:
      workdir: the folder.
      config: the configuration.
      summary: the summary of a finished run, or None.
    """

    def __init__(
        self,
        workdir: Path,
        config: ConfigDict,
        inputs: Mapping[str, str | None],
    ):
        self.workdir = Path(workdir)
        self.config = config
        self.summary = None
        self._checkpointer = None
        self._seconds_before = 0.0
        self._started = time.monotonic()
        self._last = None
        self._tensorboard = None
        self._lock = contextlib.ExitStack()
        try:
            # The other processes read what the main process has written.
            if devices.is_main():
                self.workdir.mkdir(parents=True, exist_ok=True)
                self._lock.enter_context(files.lock(self.workdir, self.say))
                self._open(inputs)
            devices.wait_for_all("the run folder is written")
            if not devices.is_main():
                self._open(inputs)
            devices.wait_for_all("the run folder is read")
        except BaseException:
            self._lock.close()
            raise

    @property
    def seconds(self) -> float:
        """Wall-clock seconds spent on this run, including earlier sessions."""
        return self._seconds_before + time.monotonic() - self._started

    def metrics(self) -> list[dict[str, Any]]:
        """The logged lines, oldest first."""
        return files.read_metrics(self.workdir / "metrics.jsonl")

    @property
    def checkpoints(self) -> Path:
        return self.workdir / "checkpoints"

    def say(self, message: str) -> None:
        """Prints one line of progress, from the main process."""
        devices.say(message)

    def restore(self, state: Any) -> tuple[int, Any]:
        """Restores the newest checkpoint: (step, state), or (0, `state`) without one.

        A checkpoint that differs from its checksums is deleted and the one before it
        is restored; a line says so.

        The state is placed on every device, independent of the devices that saved it.
        Metrics that were logged after the checkpoint are dropped, so that they are not
        logged twice.

        Raises:
          ValueError: if no checkpoint is intact, or if it has other shapes.
        """
        newest, damaged = _find_checkpoint(self.checkpoints)
        devices.wait_for_all("the checkpoints are verified")
        if devices.is_main():
            for path in damaged:
                shutil.rmtree(path)
        step = 0
        if newest is not None:
            step = int(newest.name)
            state = _load(newest, state)
            self.say(f"resuming at step {step} from {self.checkpoints}")
        metrics = self.workdir / "metrics.jsonl"
        kept = [m for m in files.read_metrics(metrics) if m["step"] <= step]
        text = "".join(json.dumps(m) + "\n" for m in kept)
        files.write_atomic(metrics, lambda file: file.write(text))
        self._seconds_before = kept[-1]["seconds"] if kept else 0.0
        self._started = time.monotonic()
        return step, devices.replicate(state)

    def save(self, step: int, state: Any) -> None:
        """Writes a checkpoint, and keeps only the two newest ones."""
        checkpointer = self._open_checkpointer()
        if checkpointer.latest is not None and checkpointer.latest.step == step:
            return
        # Check first: on a full disk every writer of Orbax prints a traceback.
        needed = 2**20 + sum(x.nbytes for x in jax.tree.leaves(state))
        free = shutil.disk_usage(self.workdir).free
        if free < needed:
            raise OSError(
                f"the checkpoint of step {step} needs {needed / 2**20:.1f} MiB in "
                f"{self.checkpoints}, where {free / 2**20:.1f} are free. "
                f"{files.RESUME_HINT}"
            )
        try:
            checkpointer.save(step, state, force=True)
            if devices.is_main():
                files.write_checksums(self.checkpoints / str(step))
        # The exception for a full disk depends on the writer of Orbax that fails.
        except (OSError, ValueError, RuntimeError) as error:
            raise OSError(
                f"the checkpoint of step {step} cannot be written to "
                f"{self.checkpoints}: {one_line(error)}. {files.RESUME_HINT}"
            ) from error

    def log(self, step: int, metrics: Mapping[str, Any], *, num_steps: int) -> None:
        """Appends to metrics.jsonl; prints the metrics, the rate and the time left."""
        metrics = {k: files.plain(v) for k, v in metrics.items()}
        seconds = self.seconds
        line = json.dumps({"step": step, "seconds": round(seconds, 3), **metrics})
        path = self.workdir / "metrics.jsonl"
        if devices.is_main():
            try:
                with open(path, "a") as file:
                    file.write(line + "\n")
            except OSError as error:
                raise OSError(
                    f"{path} cannot be written: {error}. {files.RESUME_HINT}"
                ) from error
        if self.config.get("tensorboard", False) and devices.is_main():
            self._write_tensorboard(step, metrics)
        parts = [f"step {step:>{len(str(num_steps))}}/{num_steps}"]
        parts += [f"{k} {v:.4g}" for k, v in metrics.items() if isinstance(v, float)]
        if self._last is not None:
            last_step, last_seconds = self._last
            rate = (step - last_step) / max(seconds - last_seconds, 1e-9)
            parts.append(f"{rate:.3g} steps/s")
            left = (num_steps - step) / max(rate, 1e-9)
            parts.append(f"{left / 60:.1f} min left")
        self._last = step, seconds
        self.say("  ".join(parts))

    def finish(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Writes summary.json, which marks the run as finished, and prints it."""
        self.summary = files.plain({"seconds": round(self.seconds, 1), **summary})
        path = self.workdir / "summary.json"
        files.write_json(path, self.summary | {_CONFIG_HASH: self._config_hash})
        self.show_summary()
        return self.summary

    def show_summary(self) -> dict[str, Any]:
        """Prints the final table; returns the summary."""
        rows = [(k, v) for k, v in self.summary.items() if not isinstance(v, dict)]
        width = max(len(k) for k, _ in rows)
        self.say(f"\n{self.workdir}")
        for name, value in rows:
            if isinstance(value, list):
                value = "  ".join(_format(v) for v in value)
            self.say(f"  {name:<{width}}  {_format(value)}")
        return self.summary

    def close(self) -> None:
        with self._lock:
            if self._checkpointer is not None:
                self._checkpointer.close()
            if self._tensorboard is not None:
                self._tensorboard.close()

    def _open(self, inputs):
        """Compares the files of the folder with the configuration, or writes them."""
        path = self.workdir / "config.json"
        ours = json.loads(self.config.to_json_best_effort())
        summary = _read_if_there(self.workdir / "summary.json")
        if not _has_results(self.workdir):
            # Where nothing was done yet, a corrected configuration is welcome.
            (self.workdir / "inputs.json").unlink(missing_ok=True)
            files.write_json(path, ours)
        elif path.exists():
            _check_same_config(read_config(path), upgrade(ours), self.workdir)
            ours = _read_dict(path)
        elif summary.get(_CONFIG_HASH) == _hash(ours) or not _is_run(self.workdir):
            files.write_json(path, ours)
        else:
            raise ValueError(
                f"{self.workdir} holds results of a run but no config.json, so their "
                "configuration is unknown. Delete the folder or choose another "
                "--workdir."
            )
        self._config_hash = _hash(ours)
        self._check_inputs(inputs)
        if summary:
            # Runs of earlier versions have no hash.
            if summary.pop(_CONFIG_HASH, self._config_hash) != self._config_hash:
                raise ValueError(
                    f"the summary.json of {self.workdir} was not written with the "
                    "configuration in its config.json. Delete the folder or choose "
                    "another --workdir."
                )
            self.summary = summary
        else:
            files.write_json(self.workdir / "environment.json", environment())

    def _check_inputs(self, inputs):
        """Stores the digests of the inputs; raises ValueError if they have changed."""
        path = self.workdir / "inputs.json"
        known = load_inputs(self.workdir)
        stored = dict(known)
        for name, digest in inputs.items():
            if known.setdefault(name, digest) != digest:
                raise ValueError(
                    f"the {name} of {self.workdir} has changed since that run was "
                    "started. Delete the folder or choose another --workdir."
                )
        if known != stored:
            files.write_json(path, known)

    def _open_checkpointer(self):
        if self._checkpointer is None:
            from orbax.checkpoint import v1 as ocp

            policies = ocp.training.preservation_policies
            self._checkpointer = ocp.training.Checkpointer(
                self.checkpoints.absolute(),
                preservation_policy=policies.LatestN(2),
                cleanup_tmp_directories=True,
            )
        return self._checkpointer

    def _write_tensorboard(self, step, metrics):
        if self._tensorboard is None:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(self.workdir / "tensorboard"))
        for name, value in metrics.items():
            if isinstance(value, float):
                self._tensorboard.add_scalar(name, value, step)


@contextlib.contextmanager
def open_run(
    workdir: Path,
    config: ConfigDict,
    *,
    inputs: Mapping[str, str | None] | None = None,
) -> Iterator[Run]:
    """Opens or resumes the run in `workdir`.

    Args:
      workdir: the run folder.
      config: the configuration.
      inputs: digests of the input files of the run. A resumed run must have the same
        digests.

    Raises:
      ValueError: if the folder contains a run with another configuration or with other
        inputs.
    """
    run = Run(workdir, config, inputs or {})
    if run.summary is not None:
        run.say(f"{workdir} is finished; delete it or choose another --workdir.")
    try:
        yield run
    except BaseException as error:
        # An error of JAX may be the end of a partner, which is reported in its place.
        if jax.process_count() > 1 and not isinstance(
            error.__cause__ or error, ValueError | OSError
        ):
            partners.wait_for_news()
        # Report the first error.
        with contextlib.suppress(Exception):
            run.close()
        raise
    run.close()


def run_once(
    workdir: Path,
    config: ConfigDict,
    experiment: Callable[[Run], Mapping[str, Any]],
    *,
    inputs: Mapping[str, str | None] | None = None,
) -> dict[str, Any]:
    """Runs or resumes `experiment` in `workdir`; a finished run prints its summary.

    Args:
      workdir: the run folder.
      config: the configuration.
      experiment: open run -> summary.
      inputs: see `open_run`.

    Returns:
      The summary.
    """
    with open_run(workdir, config, inputs=inputs) as run:
        if run.summary is not None:
            return run.show_summary()
        return run.finish(experiment(run))


def load_config(workdir: Path) -> ConfigDict:
    """The configuration of a run.

    Raises:
      FileNotFoundError: if `workdir` does not contain a run.
      ValueError: if its config.json is damaged.
    """
    path = Path(workdir) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{workdir} holds no run (there is no config.json).")
    return ConfigDict(read_config(path))


def load_summary(workdir: Path) -> dict[str, Any]:
    """The results of a finished run.

    Raises:
      FileNotFoundError: if the run is not finished.
      ValueError: if its summary.json is damaged.
    """
    path = Path(workdir) / "summary.json"
    if not path.exists():
        raise FileNotFoundError(f"the run {workdir} is not finished (no summary.json).")
    summary = _read_dict(path)
    summary.pop(_CONFIG_HASH, None)
    return summary


def load_inputs(workdir: Path) -> dict[str, str]:
    """The digests of the inputs of a run; {} if it recorded none."""
    return _read_if_there(Path(workdir) / "inputs.json")


def load_checkpoint(workdir: Path, state: Any = None) -> tuple[ConfigDict, Any]:
    """The configuration and the newest intact checkpoint of a run, as NumPy arrays.

    A line says which checkpoints were damaged.

    Args:
      workdir: the run folder.
      state: a pytree of the structure of the checkpoint; None gives nested dicts.

    Raises:
      FileNotFoundError: if `workdir` does not contain a run or a checkpoint.
      ValueError: if the configuration or every checkpoint is damaged.
    """
    config = load_config(workdir)
    folder = Path(workdir) / "checkpoints"
    if not folder.is_dir():
        inner = sorted(path.parent for path in Path(workdir).glob("*/checkpoints"))
        names = some(path.name for path in inner)
        raise FileNotFoundError(
            f"the run {workdir} has no checkpoints."
            + (f" Choose one of its runs, {names}: {inner[0]}" if inner else "")
        )
    newest, _ = _find_checkpoint(folder)
    if newest is None:
        raise FileNotFoundError(f"{folder} holds no complete checkpoint.")
    return config, jax.device_get(_load(newest, state))


def _find_checkpoint(folder):
    """The newest checkpoint whose files have their checksums, and damaged newer ones.

    Checkpoints of earlier versions have no checksums and count as intact.

    Raises:
      ValueError: if all checkpoints are damaged.
    """
    # Orbax gives a folder its number when all files are written.
    steps = [path for path in folder.glob("*") if path.name.isdecimal()]
    damaged, reasons = [], []
    for path in sorted(steps, key=lambda path: int(path.name), reverse=True):
        damage = files.find_damage(path)
        if damage is None:
            for reason in reasons:
                devices.say(f"{reason}; using that of step {path.name}.")
            return path, damaged
        damaged.append(path)
        reasons.append(f"the checkpoint {path} is damaged ({damage} has changed)")
    if damaged:
        raise ValueError(f"{reasons[0]}, and there is no other. Delete {folder}.")
    return None, []


def _load(path, state):
    from orbax.checkpoint import v1 as ocp

    path = path.absolute()
    try:
        if state is None:
            state = ocp.metadata(path).metadata
        everywhere = devices.replicated()
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), state
        )
        return ocp.load(path, abstract)
    # For a damaged or incompatible checkpoint Orbax raises the error of its reader.
    except Exception as error:
        raise ValueError(
            f"the checkpoint {path} cannot be read ({type(error).__name__}: "
            f"{one_line(error)[:200]}). Delete it to use the previous one."
        ) from error


def _read_dict(path):
    value = files.read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {value!r:.80}.")
    return value


def _read_if_there(path):
    return _read_dict(path) if path.exists() else {}


def _hash(config):
    """SHA-256 of a configuration as it is stored in config.json."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


_CONFIG_HASH = "config_sha256"
_START = {"config.json", "environment.json", "inputs.json"}


def _has_results(folder):
    """Whether a folder holds more than the start of a run, or of runs within it."""
    for path in folder.iterdir():
        if path.name in _START or path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():
            if _has_results(path):
                return True
        elif path.name == "metrics.jsonl":
            # The line of step 0 is written before the training.
            if any(line["step"] > 0 for line in files.read_metrics(path)):
                return True
        elif path.lstat().st_size:
            return True
    return False


def _is_run(folder):
    """Whether a folder without config.json was the folder of a run."""
    names = ("environment.json", "metrics.jsonl", "checkpoints", "summary.json")
    return any((folder / name).exists() for name in names)


def environment() -> dict[str, Any]:
    """Versions, devices, commit and command of a run."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    module = Path(sys.argv[0]).stem
    return {
        "command": shlex.join(["python", "-m", f"experiments.{module}", *sys.argv[1:]]),
        "commit": _git_commit(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "num_processes": jax.process_count(),
        "matmul_precision": str(jax.config.jax_default_matmul_precision),
        "versions": versions,
    }


def _git_commit():
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip()


def differences(workdir: Path, config: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """{field: (value of the run in `workdir`, value in `config`)} where they differ.

    Raises:
      ValueError: if the config.json of `workdir` is damaged.
    """
    ours = upgrade(json.loads(config.to_json_best_effort()))
    return _differences(read_config(Path(workdir) / "config.json"), ours)


def _differences(stored, ours):
    stored, ours = flatten(stored), flatten(ours)
    absent = object()
    return {
        name: (stored.get(name), ours.get(name))
        for name in sorted(stored.keys() | ours.keys())
        if stored.get(name, absent) != ours.get(name, absent)
    }


def _check_same_config(stored, ours, workdir):
    differ = "; ".join(
        f"{name} is {there!r} there and {here!r} here"
        for name, (there, here) in _differences(stored, ours).items()
    )
    if differ:
        raise ValueError(
            f"{workdir} holds a run with another configuration: {differ}. "
            "Choose another --workdir."
        )


def _format(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)
