"""Start of a command: options, devices, the compilation cache, one-line errors."""

import contextlib
import dis
import importlib
import os
import re
import runpy
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags, logging
from ml_collections import ConfigDict

from experiments.common import devices, settings

_ROOT = Path(__file__).parents[2]
_PACKAGES = ("experiments", "functa", "vit", "landscape", "lbi")
_BUG = (
    "This is an error of functa-jax, not of your input. Please report it with the "
    "command and these lines."
)


def launch(
    name: str, train_and_evaluate: Callable[[ConfigDict, Path], dict[str, Any]]
) -> None:
    """Runs `python -m experiments.<name> --config=...` from the command line.

    An error that a user can fix (a misspelled option, missing or damaged files, a full
    disk, a diverged run) ends with one line and exit status 1; --debug shows its
    traceback. An error of this project keeps its traceback.
    """
    with one_line_errors(debug="--debug" in sys.argv):
        expand_home()
        arguments = sys.argv[1:]
        if {"-h", "-help", "--help", "--helpshort", "--helpfull"} & set(arguments):
            print(describe(name))
            return
        config, options = parse(name, arguments)
        flags.FLAGS(sys.argv[:1])  # before it, absl's log prints a warning
        silence_libraries(debug=options.debug)
        devices.keep_freed_memory()
        if options.multihost:
            devices.initialize(*_cluster(options))
        # What JAX cannot start, such as a GPU, the user asked for.
        with settings.blamed_on("JAX_PLATFORMS or the devices"):
            jax.devices()
        if options.workdir is None:
            options.workdir = f"runs/{name}/{config.variant}"
        workdir = find_workdir(options.workdir)
        keep_compiled(workdir)
        train_and_evaluate(config, workdir)


def run_command(
    command: str, config: ConfigDict, workdir: Path, title: str
) -> dict[str, Any]:
    """Runs or resumes a command as a part of another one; returns its summary.

    Args:
      command: its name.
      config: its configuration.
      workdir: its run folder.
      title: what is printed before it starts.
    """
    devices.say(f"=== {title}")
    module = importlib.import_module(f"experiments.{command}")
    return module.train_and_evaluate(config, workdir)


def parse(name: str, arguments: Sequence[str]) -> tuple[ConfigDict, flags.FlagValues]:
    """The configuration and the other options of a command line.

    Args:
      name: the command.
      arguments: --config=FILE.py:VARIANT, --config.FIELD=VALUE, --workdir=DIR, ...

    Raises:
      ValueError: if an option is unknown or its value is of the wrong kind; names the
        option and what there is.
    """
    base = importlib.import_module(f"experiments.configs.{name}").BASE
    overrides, others = {}, []
    for argument in _joined(arguments):
        option, equals, value = argument.partition("=")
        negated, found, field = option.lstrip("-").partition("config.")
        if not found or negated not in ("", "no"):
            others.append(argument)
            continue
        if field in overrides:
            raise ValueError(f"--config.{field} is given twice.")
        overrides[field] = value if equals else str(negated != "no")
    options, unexpected = parse_flags(others)
    if unexpected:
        raise ValueError(f"unexpected arguments: {' '.join(unexpected)}")
    if not options.multihost and _cluster(options) != (None, None, None):
        raise ValueError(
            "--coordinator, --num_processes and --process_id need --multihost."
        )
    config = load_config(name, options.config)
    settings.check_fields(config, base)
    for field, text in overrides.items():
        settings.set_field(config, field, text, base)
    settings.check_fields(config, base)  # an override may have replaced an entry
    return config, options


def _cluster(options):
    return options.coordinator, options.num_processes, options.process_id


def parse_flags(arguments: Sequence[str]) -> tuple[flags.FlagValues, list[str]]:
    """The options that do not set a field, and the arguments that are not options."""
    options = _make_flags()
    try:
        return options, options(["", *arguments])[1:]
    except flags.Error as error:
        raise ValueError(one_line(error)) from None


def _joined(arguments):
    """Joins `--config.field value` to one argument, `--config.field=value`."""
    arguments = list(arguments)
    while arguments:
        argument = arguments.pop(0)
        is_field = argument.startswith(("--config.", "-config."))
        if is_field and "=" not in argument and arguments:
            if not arguments[0].startswith("--"):
                argument += f"={arguments.pop(0)}"
        yield argument


def _make_flags():
    options = flags.FlagValues()
    for define, option, default, text in (
        (flags.DEFINE_string, "config", None, "config file, followed by :VARIANT"),
        (flags.DEFINE_string, "workdir", None, "run folder"),
        (flags.DEFINE_bool, "debug", False, "show the traceback of every error"),
        (flags.DEFINE_bool, "multihost", False, "run as one process of a cluster"),
        (flags.DEFINE_string, "coordinator", None, "HOST:PORT of process 0"),
        (flags.DEFINE_integer, "num_processes", None, "number of processes"),
        (flags.DEFINE_integer, "process_id", None, "index of this process, from 0"),
    ):
        define(option, default, text, flag_values=options)
    return options


def load_config(name: str, chosen: str | None) -> ConfigDict:
    """The configuration that --config=FILE.py:VARIANT chooses.

    The file is executed. None chooses the first variant of experiments/configs/NAME.py.

    Raises:
      ValueError: if there is no such file or variant, if the file fails, or if it is of
        another command.
    """
    module = importlib.import_module(f"experiments.configs.{name}")
    if chosen is None:
        return module.get_config()
    path, _, variant = chosen.partition(":")
    if not Path(path).is_file():
        example = (
            f"--config=experiments/configs/{name}.py:{next(iter(module.VARIANTS))}"
        )
        what = "is not a file" if Path(path).exists() else "does not exist"
        raise ValueError(
            f"--config={chosen}: {path} {what}. To choose a variant write "
            f"{example}; the variants are {', '.join(module.VARIANTS)}."
        )
    try:
        make = runpy.run_path(path)["get_config"]
        config = make(variant) if variant else make()
    # The file is code of the user, who has to correct it whatever it raises.
    except Exception as error:  # noqa: BLE001
        where = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"--config={chosen}: {where}{one_line(error)}") from error
    if not isinstance(config, ConfigDict) or config.get("experiment") != name:
        of = config.get("experiment") if isinstance(config, ConfigDict) else "nothing"
        raise ValueError(
            f"--config={chosen} must be a configuration of {name}, got one of {of}."
        )
    return config


def find_workdir(path: str | Path) -> Path:
    """The run folder; raises ValueError if it is empty, or a file or broken link."""
    if not path:
        raise ValueError("--workdir must name a folder, got an empty string.")
    workdir = Path(path)
    for folder in (workdir, *workdir.parents):
        if folder.is_symlink() and not folder.exists():
            raise ValueError(
                f"--workdir={path}: {folder} is a link to {folder.readlink()}, which "
                "does not exist."
            )
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--workdir={path}: {folder} is a file, not a folder.")
    return workdir


def describe(name: str) -> str:
    """The text of --help: the command, its variants and its fields."""
    module = importlib.import_module(f"experiments.configs.{name}")
    lines = [module.__doc__.strip(), "", "Options:"]
    options = _make_flags()
    lines += [f"  --{option}: {options[option].help}" for option in options]
    lines += [
        "  --config.FIELD=VALUE: changes a field of the variant",
        "",
        f"Fields of {next(iter(module.VARIANTS))}, the default variant "
        f"(explained in experiments/configs/{name}.py):",
    ]
    rules = settings.COMMON_RULES | module.RULES
    words_of = {name.replace("?", ""): f"  ({r.words})" for name, r in rules.items()}
    for field, value in settings.flatten(module.get_config().to_dict()).items():
        if field in ("experiment", "variant"):
            continue
        lines.append(f"  --config.{field}={value!r}{words_of.get(field, '')}")
    return "\n".join(lines)


def expand_home() -> None:
    """Expands ~ at the start of every argument and option value in sys.argv.

    A shell leaves --option=~/path as it is.
    """
    for i, argument in enumerate(sys.argv[1:], start=1):
        option, value = re.fullmatch(r"(-[^=]*=)?(.*)", argument, re.DOTALL).groups("")
        if value.startswith("~"):
            expanded = os.path.expanduser(value)
            if expanded == value:
                raise ValueError(f"{argument}: there is no such home directory.")
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
        sys.stdout.flush()
    except BrokenPipeError:
        _fail("nobody reads the output; rerun the command to resume.")
    except KeyboardInterrupt:
        _fail("interrupted; the same command resumes from the last checkpoint.")
    except Exception as error:
        if not is_of_user(error):
            error.add_note(_BUG)
        elif not debug:
            _fail(one_line(error))
        raise


def is_of_user(error: BaseException) -> bool:
    """Whether the input or the machine caused an error, rather than a bug of ours.

    These are: an error of the operating system, a lack of memory, and a ValueError
    from a `raise` statement of this project, which is a check with a message. A
    ValueError that a library raises means that such a check is missing.
    """
    if isinstance(error, OSError | MemoryError) or _is_out_of_memory(error):
        return True
    trace = error.__traceback__
    if not isinstance(error, ValueError) or trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    try:
        package = Path(code.co_filename).resolve().relative_to(_ROOT).parts[0]
    except ValueError:
        return False
    is_raise = dis.opname[code.co_code[trace.tb_lasti]] in ("RAISE_VARARGS", "RERAISE")
    return package in _PACKAGES and is_raise


def _is_out_of_memory(error):
    is_of_jax = isinstance(error, jax.errors.JaxRuntimeError)
    return is_of_jax and "RESOURCE_EXHAUSTED" in str(error)


def one_line(error: BaseException) -> str:
    """The message of an error as one line."""
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        return f"out of memory: {message[:300]}. Use smaller sizes or batches."
    return message


def _fail(message):
    print(f"error: {message}", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):  # a closed pipe, a full disk
        sys.stdout.flush()
    # Not sys.exit: Orbax's threads, if its writers failed, would print tracebacks.
    os._exit(1)
