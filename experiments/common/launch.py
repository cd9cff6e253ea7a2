"""Start of a command: flags, devices, the compilation cache, one-line errors."""

import contextlib
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from experiments.common import devices


def launch(
    name: str, train_and_evaluate: Callable[[ConfigDict, Path], dict[str, Any]]
) -> None:
    """Runs `python -m experiments.<name> --config=...` from the command line.

    An error that a user can cause (a misspelled option, missing or damaged files, a
    full disk, a diverged run) ends with one line and exit status 1. --debug shows the
    traceback.
    """
    # ml_collections parses the options of --config when the flag is defined.
    expand_home()
    with _command_line_errors():
        config_flag = config_flags.DEFINE_config_file(
            "config",
            str(Path(__file__).parents[1] / "configs" / f"{name}.py"),
            "config file, followed by :VARIANT",
        )
    workdir_flag = flags.DEFINE_string(
        "workdir", None, f"run folder (default: runs/{name}/<variant>)"
    )
    debug_flag = flags.DEFINE_bool("debug", False, "show the traceback of an error")
    multihost_flag = flags.DEFINE_bool(
        "multihost", False, "run as one of several processes of a cluster"
    )
    coordinator_flag = flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0, if it is not detected"
    )
    num_processes_flag = flags.DEFINE_integer(
        "num_processes", None, "number of processes"
    )
    process_id_flag = flags.DEFINE_integer(
        "process_id", None, "index of this process, from 0"
    )

    def main(argv):
        silence_libraries(debug=debug_flag.value)
        if len(argv) > 1:
            _fail(f"unexpected arguments: {' '.join(argv[1:])}")
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


def expand_home() -> None:
    """Expands ~ at the start of every argument and option value in sys.argv.

    A shell leaves --option=~/path as it is.
    """
    for i, argument in enumerate(sys.argv[1:], start=1):
        option, value = re.fullmatch(r"(-[^=]*=)?(.*)", argument, re.DOTALL).groups("")
        if value.startswith("~"):
            expanded = os.path.expanduser(value)
            if expanded == value:
                _fail(f"{argument}: there is no such home directory.")
            sys.argv[i] = option + expanded


def silence_libraries(*, debug: bool = False) -> None:
    """Suppresses the log of Orbax.

    Orbax reports every file that it writes, and repeats an error in each thread.
    """
    logging.set_verbosity(logging.INFO if debug else logging.FATAL)


def keep_compiled(workdir: Path) -> None:
    """Stores compiled functions next to the run folder, for later starts.

    JAX_COMPILATION_CACHE_DIR sets another directory.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder = Path(workdir).absolute().parent / "compilation_cache"
        jax.config.update("jax_compilation_cache_dir", str(folder))
    # Most functions compile in less than a second, JAX's default limit.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    # If a full disk truncates a cache file, the function is compiled again.
    warnings.filterwarnings("ignore", message="Error .* persistent compilation cache")


@contextlib.contextmanager
def one_line_errors(*, debug: bool = False) -> Iterator[None]:
    """Ends the process with one line and status 1 on an error that a user can fix."""
    try:
        yield
    except (ValueError, OSError) as error:
        if debug:
            raise
        _fail(one_line(error))
    except KeyboardInterrupt:
        _fail("interrupted; the same command resumes from the last checkpoint.")


@contextlib.contextmanager
def _command_line_errors():
    """Converts the errors of absl and ml_collections for bad options to one line."""
    try:
        yield
    except (flags.Error, ValueError, AttributeError, LookupError, TypeError) as error:
        _fail(one_line(error))
    except (OSError, SyntaxError) as error:
        _fail(f"the config file cannot be read: {one_line(error)}")


def one_line(error):
    message = str(error)
    if "Traceback" in message:
        # The message of ml_collections contains the whole traceback of a config file.
        message = message.strip().splitlines()[-1].partition(": ")[2]
    # ConfigDict reports an unknown option as the repr of a KeyError's message.
    message = message.replace("\\n", " ").replace("\\'", "'")
    return " ".join(message.split()).strip("'") or type(error).__name__


def _fail(message):
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    # Not sys.exit: Orbax's threads, if its writers failed, would print tracebacks.
    os._exit(1)
