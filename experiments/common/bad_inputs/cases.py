"""The cases: those of fields are derived, the others come from the tables."""

import importlib
from collections.abc import Iterator
from typing import NamedTuple

from experiments.common import settings
from experiments.common.bad_inputs import tables

COMMANDS = (
    *("meta_learn", "make_functaset", "classify_functa", "fit_image", "train_lbi"),
    *("prune_lbi", "probe_landscape", "train_vit", "prune_vit", "scaling"),
    *("latent_controls", "compare_pruning", "compress_functa", "generate_functa"),
    "meta_classify",
)
# Runs that cases and kills start from: command and the options beyond `smoke`.
RUNS = {
    "meta_learn": (),
    "make_functaset": ("--config.run={meta_learn}",),
    "classify_functa": ("--config.functaset={meta_learn}/functaset.npz",),
    "compress_functa": (
        "--config.run={meta_learn}",
        "--config.functaset={meta_learn}/functaset.npz",
    ),
    "generate_functa": (
        "--config.run={meta_learn}",
        "--config.functaset={meta_learn}/functaset.npz",
        "--config.classifier=None",
    ),
    "fit_image": (),
    "train_lbi": (),
    "prune_lbi": ("--config.run={train_lbi}",),
    "probe_landscape": (),
    "train_vit": (),
    "prune_vit": ("--config.checkpoint={train_vit}/model.npz",),
    "compare_pruning": (),
}


class Case(NamedTuple):
    """An input and the answer to it.

    Attributes:
      name: unique.
      command: the command.
      arguments: behind `python -m experiments.COMMAND`.
      words: one of them must be in the line; () means that the input is good.
      workdir: name of a run folder; None: a folder that cannot be made, so that an
        input that passes all checks ends there, before anything is trained.
    """

    name: str
    command: str
    arguments: tuple[str, ...]
    words: tuple[str, ...]
    workdir: str | None = None


def make_cases() -> list[Case]:
    """All cases."""
    cases = [*_of_fields(), *_of_lines(), *_of_values(), *_of_files(), *_of_folders()]
    return list({case.name: case for case in cases}.values())


def _smoke(command: str, *options: str) -> tuple[str, ...]:
    """Arguments of the smoke variant with options, which replace those of `RUNS`."""
    given = {option.partition("=")[0] for option in options}
    needed = [o for o in RUNS.get(command, ()) if o.partition("=")[0] not in given]
    return f"--config=experiments/configs/{command}.py:smoke", *needed, *options


# Texts that no field of a type takes.
_BAD = {
    bool: ("maybe", "2"),
    int: ("many", "nan", "1e999", "(1", "", "-1", "0.5", str(2**64)),
    float: ("many", "nan", "1e999", "(1", "", "-1"),
    str: ("",),
    tuple: ("(1",),
}
# Fields that may be negative, and an entry that is not read with a checkpoint.
_SIGNED = ("coord_range",)
_NOT_READ = ("prune_vit", "model")


def _of_fields() -> Iterator[Case]:
    """For every field of every command: texts of `_BAD`, and a misspelled name."""
    for command in COMMANDS:
        module = importlib.import_module(f"experiments.configs.{command}")
        for field, value in settings.flatten(module.get_config("smoke")).items():
            *entry, last = field.split(".")
            is_read = (command, *entry) != _NOT_READ
            if field in ("experiment", "variant") or not is_read:
                continue
            default = settings.find_field(field, module.BASE)
            # An open entry, such as `model`, is named as a whole.
            is_open = default is None and entry
            words = (field, f"{entry[0]}:") if is_open else (field,)
            sample = value[0] if isinstance(value, tuple) and value else value
            is_optional = isinstance(default, settings.Optional)
            kind = default.kind if is_optional else type(sample)
            bad = list(_BAD.get(kind, ()))
            if kind in (int, float) and not is_optional:
                bad.append("None")
            if field in _SIGNED:
                bad.remove("-1")
            for text in bad:
                if isinstance(value, tuple) and text in ("nan", "1e999", "-1", "0.5"):
                    text = f"({text},)"
                yield Case(
                    f"{command} {field}={text}",
                    command,
                    _smoke(command, f"--config.{field}={text}"),
                    words,
                )
            if "options" not in entry:
                wrong = ".".join([*entry, last + "x"])
                yield Case(
                    f"{command} {wrong}",
                    command,
                    _smoke(command, f"--config.{wrong}=1"),
                    (wrong, f"{last}x"),
                )


def _of_lines() -> Iterator[Case]:
    """Command lines that are wrong for every command."""
    for number, command in enumerate(COMMANDS):
        path = f"experiments/configs/{command}.py"
        other = COMMANDS[number - 1]
        module = importlib.import_module(f"experiments.configs.{command}")
        first = next(iter(settings.flatten(module.BASE)))
        for arguments, word in (
            (("--config=bad",), "smoke"),
            (("--config=smoke",), "smoke"),
            ((f"--config={path}:smok",), "smoke"),
            ((f"--config={path}:1",), "smoke"),
            ((f"--config={path}x:smoke",), path),
            (("--config=experiments",), "experiments"),
            (("--config=/dev/zero",), "/dev/zero"),
            (("--config={fifo}",), "fifo"),
            (("--config={not_python}",), "not_python"),
            (("--config={no_get_config}",), "get_config"),
            (("--config={raises}",), "ZeroDivisionError"),
            (("--config={returns_none}",), command),
            (("--config={lacks_fields}",), "no field"),
            ((f"--config=experiments/configs/{other}.py:smoke",), command),
            (("--confg=x",), "confg"),
            (("stray",), "stray"),
            (("--process_id=1",), "--multihost"),
            (("--num_processes=x",), "num_processes"),
            (("--debug=maybe",), "debug"),
            (("--config.=1",), "field"),
            (("--config.a.b.c=1",), "a.b.c"),
            ((f"--config.{first}=1", f"--config.{first}=0"), "twice"),
            (("--config={wrong_kind}",), "must be"),
            (("--config=",), "--config"),
            (("--workdir=",), "--workdir"),
        ):
            name = f"{command} {' '.join(arguments)}"
            yield Case(name, command, arguments, (word,))


def _of_values() -> Iterator[Case]:
    for command, values in tables.VALUES.items():
        for text, word in values.items():
            yield Case(
                f"{command} {text}",
                command,
                _smoke(command, *_options(text)),
                (word,),
            )
    for command, texts in tables.GOOD.items():
        for text in texts:
            arguments = _smoke(command, *_options(text))
            yield Case(f"{command} good {text}", command, arguments, ())


def _options(text):
    """--config.X=... for each "X=..." of a text with one space between them."""
    parts = text.split(" ") if "{'" not in text else [text]
    return tuple(f"--config.{part}" for part in parts if part)


def _of_files() -> Iterator[Case]:
    """Files and folders that are damaged, malicious, or of another kind."""

    def case(command, field, name, words=None):
        words = (name, *(words or ()))
        option = f"--config.{field}={{{name}}}"
        return Case(
            f"{command} {field}={name}", command, _smoke(command, option), words
        )

    for name in tables.BAD_FOLDERS + tables.BAD_NPZ:
        kind = "npz" if name.startswith("npz") else "folder"
        for command in ("meta_learn", "train_lbi"):
            made = case(command, "dataset.data_dir", name)
            options = f"--config.dataset.name={kind}", "--config.batch_size=2"
            yield made._replace(arguments=made.arguments + options)
    for command in ("train_lbi", "meta_classify"):
        made = case(command, "dataset.data_dir", "flat", ("label",))
        yield made._replace(arguments=(*made.arguments, "--config.dataset.name=folder"))
    for name in tables.BAD_IMAGES:
        yield case("fit_image", "image", name)
    for name in tables.BAD_FUNCTASETS:
        yield case("classify_functa", "functaset", name)
        yield case("compress_functa", "functaset", name)
        yield case("generate_functa", "functaset", name)
    for name in tables.BAD_RUNS:
        yield case("compress_functa", "run", name)
        yield case("generate_functa", "run", name)
        yield case("generate_functa", "classifier", name)
        yield case("make_functaset", "run", name)
        yield case("prune_lbi", "run", name)
        yield case("meta_learn", "init_from", name)
    for name in tables.BAD_LBI_RUNS:
        yield case("prune_lbi", "run", name)
    for name in tables.BAD_WEIGHTS:
        yield case("train_vit", "checkpoint", name)
        yield case("prune_vit", "checkpoint", name)
    for name in tables.BAD_HAIKU:
        yield Case(f"import_functa {name}", "import_functa", (f"{{{name}}}",), (name,))
    for name in tables.BAD_FIGURES:
        yield Case(f"figures {name}", "figures", (f"{{{name}}}",), (name,))


def _of_folders() -> Iterator[Case]:
    """Run folders with which a run cannot go on."""
    for text, word in tables.BAD_STATES.items():
        name, *options = text.split(" ")
        arguments = _smoke("meta_learn", *_options(" ".join(options)))
        yield Case(f"meta_learn {text}", "meta_learn", arguments, (word,), name)
    for command in COMMANDS:
        for name in ("rgb.png", "rgb.png/below"):
            yield Case(
                f"{command} --workdir={name}",
                command,
                _smoke(command, f"--workdir={{folder}}/{name}"),
                ("--workdir",),
            )
