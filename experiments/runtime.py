"""What a run is: its folder, its exact resume, its log, and how a command starts.

A run folder holds `config.json`, `environment.json`, `metrics.jsonl`, `checkpoints/`,
`figures/`, `arrays.npz` (what the figures are drawn from) and `summary.json`. Files are
written under a temporary name and moved into place: a kill leaves the old one whole.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from experiments import devices

_PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "chex", "orbax-checkpoint", "numpy"),
    *("ml_collections", "tensorflow-datasets", "scikit-learn", "matplotlib"),
)


def launch(
    name: str, train_and_evaluate: Callable[[ConfigDict, Path], dict[str, Any]]
) -> None:
    """Runs `python -m experiments.<name> --config=...` from the command line.

    Whatever a user can cause (a misspelt option, missing or damaged files, a full
    disk, a diverged run) ends with one line and exit status 1; --debug shows where.
    """
    # ml_collections reads the options of --config when the flag is defined.
    with _command_line_errors():
        config_flag = config_flags.DEFINE_config_file(
            "config",
            str(Path(__file__).parent / "configs" / f"{name}.py"),
            "config file, with :variant behind it",
        )
    workdir_flag = flags.DEFINE_string(
        "workdir", None, f"run folder; runs/{name}/<variant> if not given"
    )
    debug_flag = flags.DEFINE_bool("debug", False, "show the traceback of an error")
    multihost_flag = flags.DEFINE_bool(
        "multihost", False, "be one of several processes, found by the cluster's means"
    )
    coordinator_flag = flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0, where they are not found"
    )
    num_processes_flag = flags.DEFINE_integer("num_processes", None, "how many")
    process_id_flag = flags.DEFINE_integer("process_id", None, "which one, from 0")

    def main(argv):
        silence_libraries(debug=debug_flag.value)
        if len(argv) > 1:
            _fail(f"there are arguments that no option takes: {' '.join(argv[1:])}")
        config = config_flag.value
        workdir = Path(workdir_flag.value or f"runs/{name}/{config.variant}")
        with one_line_errors(debug=debug_flag.value):
            cluster = (
                coordinator_flag.value,
                num_processes_flag.value,
                process_id_flag.value,
            )
            if multihost_flag.value:
                devices.initialize(*cluster)
            elif cluster != (None, None, None):
                raise ValueError(
                    "--coordinator, --num_processes and --process_id need --multihost."
                )
            keep_compiled(workdir)
            train_and_evaluate(config, workdir)

    def parse_flags(argv):
        with _command_line_errors():
            return flags.FLAGS(argv)

    app.run(main, flags_parser=parse_flags)


def silence_libraries(*, debug: bool = False) -> None:
    """Leaves the terminal to the run's own lines.

    Orbax reports every file that it writes, and each of its threads the same error.
    """
    logging.set_verbosity(logging.INFO if debug else logging.FATAL)


def keep_compiled(workdir: Path) -> None:
    """Has JAX keep what it compiles beside the run folder, for later starts.

    JAX_COMPILATION_CACHE_DIR names another place.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder = Path(workdir).absolute().parent / "compilation_cache"
        jax.config.update("jax_compilation_cache_dir", str(folder))
    # Most of what a command compiles takes less than JAX's own limit of a second.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    # What a full disk cut short is compiled again, and no matter for the user.
    warnings.filterwarnings("ignore", message="Error .* persistent compilation cache")


@contextlib.contextmanager
def one_line_errors(*, debug: bool = False) -> Iterator[None]:
    """Ends the process with one line and status 1 on an error that a user can mend."""
    try:
        yield
    except (ValueError, OSError) as error:
        if debug:
            raise
        _fail(_one_line(error))
    except KeyboardInterrupt:
        _fail("interrupted; the same command resumes from the last checkpoint.")


@contextlib.contextmanager
def _command_line_errors():
    """Turns what absl and ml_collections raise on bad options into one line."""
    try:
        yield
    except (flags.Error, ValueError, AttributeError, LookupError, TypeError) as error:
        _fail(_one_line(error))
    except (OSError, SyntaxError) as error:
        _fail(f"the config file cannot be read: {_one_line(error)}")


def _one_line(error):
    message = str(error)
    if "Traceback" in message:
        # ml_collections puts the whole traceback of a config file into the message.
        message = message.strip().splitlines()[-1].partition(": ")[2]
    # ConfigDict reports an unknown option as the repr of a KeyError's message.
    message = message.replace("\\n", " ").replace("\\'", "'")
    return " ".join(message.split()).strip("'") or type(error).__name__


def _fail(message):
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    # Not sys.exit: Orbax's threads, if its writers failed, would print tracebacks.
    os._exit(1)


def write_atomic(
    path: Path,
    write: Callable[[Any], None],
    mode: str = "w",
    *,
    every_process: bool = False,
) -> None:
    """Calls `write(file)` on a temporary neighbour of `path`, then moves it there.

    Of several processes only the main one does, unless `every_process` has a path of
    its own.
    """
    if not (every_process or devices.is_main()):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, mode) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error}. {_GO_ON}") from error
    finally:
        temporary.unlink(missing_ok=True)


_GO_ON = "Mend that and run the same command again: it resumes."


def write_json(path: Path, value: Any) -> None:
    """Writes readable JSON atomically; NumPy and JAX numbers become plain ones."""
    text = json.dumps(_plain(value), indent=2)
    write_atomic(path, lambda file: file.write(text + "\n"))


def write_npz(
    path: Path, arrays: Mapping[str, np.ndarray], *, every_process: bool = False
) -> None:
    """Writes a compressed .npz atomically; see `write_atomic`."""
    write_atomic(
        path,
        lambda file: np.savez_compressed(file, **arrays),
        mode="wb",
        every_process=every_process,
    )


def read_json(path: Path) -> Any:
    """Reads JSON; ValueError names the file if it is damaged."""
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


class Run:
    """An open run folder. `with open_run(workdir, config) as run:` makes one.

    Attributes:
      workdir: the folder.
      config: the configuration.
      summary: what a finished run recorded, or None.
    """

    def __init__(self, workdir: Path, config: ConfigDict):
        self.workdir = Path(workdir)
        self.config = config
        self.summary = None
        self._checkpointer = None
        self._seconds_before = 0.0
        self._started = time.monotonic()
        self._last = None
        self._tensorboard = None
        stored = self.workdir / "config.json"
        ours = json.loads(config.to_json_best_effort())
        if stored.exists():
            _check_same_config(read_json(stored), ours, self.workdir)
        else:
            write_json(stored, ours)
        if (self.workdir / "summary.json").exists():
            self.summary = read_json(self.workdir / "summary.json")
        else:
            write_json(self.workdir / "environment.json", environment())

    @property
    def seconds(self) -> float:
        """Wall-clock seconds spent on this run, earlier sittings included."""
        return self._seconds_before + time.monotonic() - self._started

    @property
    def checkpoints(self) -> Path:
        return self.workdir / "checkpoints"

    def say(self, message: str) -> None:
        """Prints one line of progress, from the main process."""
        if devices.is_main():
            print(message, flush=True)

    def restore(self, state: Any) -> tuple[int, Any]:
        """The newest checkpoint: (step, state) like `state`, or (0, state) if none.

        The state lies on every device, whatever those were that it was saved from.
        Drops the metrics that were logged after it, so that they are not there twice.

        Raises:
          ValueError: if the checkpoint is damaged or of another shape.
        """
        step = 0
        latest = self._open_checkpointer().latest
        if latest is not None:
            step = latest.step
            state = _load(self._checkpointer, step, state, self.checkpoints)
            self.say(f"resuming at step {step} from {self.checkpoints}")
        metrics = self.workdir / "metrics.jsonl"
        kept = [m for m in read_metrics(metrics) if m["step"] <= step]
        text = "".join(json.dumps(m) + "\n" for m in kept)
        write_atomic(metrics, lambda file: file.write(text))
        self._seconds_before = kept[-1]["seconds"] if kept else 0.0
        self._started = time.monotonic()
        return step, devices.replicate(state)

    def save(self, step: int, state: Any) -> None:
        """Writes a checkpoint and keeps the two newest ones."""
        checkpointer = self._open_checkpointer()
        if checkpointer.latest is not None and checkpointer.latest.step == step:
            return
        # Asked before: when Orbax's writers meet a full disk, each prints a traceback.
        needed = 2**20 + sum(x.nbytes for x in jax.tree.leaves(state))
        free = shutil.disk_usage(self.workdir).free
        if free < needed:
            raise OSError(
                f"the checkpoint of step {step} needs {needed / 2**20:.1f} MiB in "
                f"{self.checkpoints}, where {free / 2**20:.1f} are free. {_GO_ON}"
            )
        try:
            checkpointer.save(step, state, force=True)
        # What a full disk raises depends on which of Orbax's writers meets it.
        except (OSError, ValueError, RuntimeError) as error:
            raise OSError(
                f"the checkpoint of step {step} cannot be written to "
                f"{self.checkpoints}: {_one_line(error)}. {_GO_ON}"
            ) from error

    def log(self, step: int, metrics: Mapping[str, Any], *, num_steps: int) -> None:
        """Appends to metrics.jsonl and prints a line: metrics, rate, time left."""
        metrics = {k: _plain(v) for k, v in metrics.items()}
        seconds = self.seconds
        line = json.dumps({"step": step, "seconds": round(seconds, 3), **metrics})
        path = self.workdir / "metrics.jsonl"
        if devices.is_main():
            try:
                with open(path, "a") as file:
                    file.write(line + "\n")
            except OSError as error:
                raise OSError(f"{path} cannot be written: {error}. {_GO_ON}") from error
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
        """Writes summary.json, which marks the run as finished, and shows it."""
        self.summary = _plain({**summary, "seconds": round(self.seconds, 1)})
        write_json(self.workdir / "summary.json", self.summary)
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
        if self._checkpointer is not None:
            self._checkpointer.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

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
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise ValueError(
                    "--config.tensorboard needs: pip install tensorboardX"
                ) from None
            self._tensorboard = SummaryWriter(str(self.workdir / "tensorboard"))
        for name, value in metrics.items():
            if isinstance(value, float):
                self._tensorboard.add_scalar(name, value, step)


@contextlib.contextmanager
def open_run(workdir: Path, config: ConfigDict) -> Iterator[Run]:
    """Opens or resumes the run in `workdir`.

    Raises:
      ValueError: if the folder holds a run of another configuration.
    """
    run = Run(workdir, config)
    if run.summary is not None:
        run.say(f"{workdir} is finished; delete it or choose another --workdir.")
    try:
        yield run
    except BaseException:
        # What went wrong first is what is reported.
        with contextlib.suppress(Exception):
            run.close()
        raise
    run.close()


def load_config(workdir: Path) -> ConfigDict:
    """The configuration of a run.

    Raises:
      FileNotFoundError: if `workdir` holds no run.
      ValueError: if its config.json is damaged.
    """
    path = Path(workdir) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{workdir} holds no run (there is no config.json).")
    return ConfigDict(read_json(path))


def load_checkpoint(workdir: Path, state: Any = None) -> tuple[ConfigDict, Any]:
    """The configuration and the newest checkpoint of a run, as NumPy arrays.

    Args:
      workdir: the run folder.
      state: what the checkpoint is like; None gives plain nested dicts.

    Raises:
      FileNotFoundError: if `workdir` holds no run or no checkpoint.
      ValueError: if either is damaged.
    """
    from orbax.checkpoint import v1 as ocp

    config = load_config(workdir)
    folder = Path(workdir) / "checkpoints"
    if not folder.is_dir():
        raise FileNotFoundError(f"the run {workdir} has no checkpoints.")
    with ocp.training.Checkpointer(folder.absolute()) as checkpointer:
        if checkpointer.latest is None:
            raise FileNotFoundError(f"{folder} holds no complete checkpoint.")
        state = _load(checkpointer, checkpointer.latest.step, state, folder)
    return config, jax.device_get(state)


def _load(checkpointer, step, state, folder):
    try:
        if state is None:
            state = checkpointer.metadata(step).metadata
        everywhere = devices.replicated()
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), state
        )
        return checkpointer.load(step, abstract)
    # Orbax reports a damaged or foreign checkpoint by whatever its reader raised.
    except Exception as error:
        raise ValueError(
            f"the checkpoint of step {step} in {folder} cannot be read "
            f"({type(error).__name__}: {_one_line(error)[:200]}). Delete it to go on "
            "from the one before."
        ) from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    metrics = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            metrics.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}, is damaged.") from None
    return metrics


def make_schedule(settings: ConfigDict, num_steps: int) -> optax.Schedule:
    """A linear warm-up, then a constant or a cosine rate.

    Raises:
      ValueError: if the schedule is unknown.
    """
    rate, warmup_steps = settings.learning_rate, settings.warmup_steps
    if settings.schedule == "cosine":
        decay = optax.cosine_decay_schedule(rate, max(num_steps - warmup_steps, 1))
    elif settings.schedule == "constant":
        decay = optax.constant_schedule(rate)
    else:
        raise ValueError(
            f"optimizer.schedule {settings.schedule!r} is neither constant nor cosine."
        )
    warmup = optax.linear_schedule(rate / (warmup_steps + 1), rate, warmup_steps)
    return optax.join_schedules([warmup, decay], [warmup_steps])


def make_optimizer(
    settings: ConfigDict, num_steps: int
) -> optax.GradientTransformation:
    """Any optimizer of optax under the schedule of `make_schedule`.

    Raises:
      ValueError: if the optimizer, one of its options or the schedule is unknown.
    """
    schedule = make_schedule(settings, num_steps)
    make = getattr(optax, settings.name, getattr(optax.contrib, settings.name, None))
    if not callable(make):
        raise ValueError(f"optax has no optimizer {settings.name!r}.")
    try:
        return make(schedule, **settings.options.to_dict())
    except TypeError as error:
        raise ValueError(f"optimizer.options: {error}") from None


def check_finite(losses: np.ndarray, *, first_step: int) -> None:
    """Raises ValueError that names the first step whose loss is not finite.

    Args:
      losses: (S,), of consecutive steps.
      first_step: the number of the step of losses[0].
    """
    bad = np.flatnonzero(~np.isfinite(losses))
    if bad.size:
        raise ValueError(
            f"the loss is {losses[bad[0]]} at step {first_step + bad[0]}; the last "
            "checkpoint is from before. Lower the learning rate or clip the gradient."
        )


def environment() -> dict[str, Any]:
    """Versions, devices, commit and command that a run's numbers come from."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    module = Path(sys.argv[0]).stem
    return {
        "command": " ".join(["python -m", f"experiments.{module}", *sys.argv[1:]]),
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


def _check_same_config(stored, ours, workdir):
    stored, ours = _flatten(stored), _flatten(ours)
    absent = object()
    differ = [
        f"{name} is {stored.get(name)!r} there and {ours.get(name)!r} here"
        for name in sorted(stored.keys() | ours.keys())
        if stored.get(name, absent) != ours.get(name, absent)
    ]
    if differ:
        raise ValueError(
            f"{workdir} holds a run of another configuration: {'; '.join(differ)}. "
            "Choose another --workdir."
        )


def _flatten(value, prefix=""):
    if not isinstance(value, dict):
        return {prefix: value}
    flat = {}
    for name, inner in value.items():
        flat.update(_flatten(inner, f"{prefix}.{name}" if prefix else name))
    return flat


def _plain(value):
    """NumPy and JAX numbers and arrays -> what JSON can hold."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return np.asarray(value).tolist()
    return value


def _format(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)
