"""Configurations as data: a base, overrides for each variant, and rules for fields.

A file of `experiments/configs` holds three tables and one line:

    BASE = {...}       nested dicts of all fields and their defaults; `Optional` marks
                       a field that may be None, `Open` an entry that takes more fields
    VARIANTS = {...}   variant -> {dotted field: value}; the first one is the default
    RULES = {...}      dotted field -> `Rule`, checked at the start of a command
    get_config = functools.partial(settings.build, NAME, BASE, VARIANTS)
"""

import ast
import contextlib
import copy
import difflib
import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict, config_dict


class Optional(NamedTuple):
    """A field that may be None; `kind` is the type of its other values."""

    kind: type
    value: Any = None


class Open(dict):
    """An entry that takes more fields than its own, such as optimizer keywords."""


class Rule(NamedTuple):
    """A condition on a field: in words, for the error message, and as a function."""

    words: str
    holds: Callable[[Any], bool]


def build(
    experiment: str,
    base: Mapping[str, Any],
    variants: Mapping[str, Mapping[str, Any]],
    variant: str | None = None,
) -> ConfigDict:
    """The configuration of one variant.

    Args:
      experiment: the name of the command.
      base: the fields and their defaults; `Optional` marks fields that may be None.
      variants: the overrides of each variant. A dict replaces a whole entry; a dotted
        name changes one field of an entry.
      variant: the name of the variant; None is the first one.

    Raises:
      ValueError: if the variant does not exist.
    """
    variant = next(iter(variants)) if variant is None else variant
    if variant not in variants:
        raise ValueError(
            f"variant {variant!r} must be one of {', '.join(variants)} "
            f"(--config=experiments/configs/{experiment}.py:VARIANT)."
        )
    fields = {"experiment": experiment, "variant": variant, **copy.deepcopy(base)}
    for name, value in variants[variant].items():
        *parents, last = name.split(".")
        entry = fields
        for parent in parents:
            entry = entry[parent]
        if last not in entry:
            raise ValueError(f"variant {variant!r} sets an unknown field {name!r}.")
        if isinstance(entry[last], Optional) and not isinstance(value, Optional):
            value = entry[last]._replace(value=value)
        entry[last] = copy.deepcopy(value)
    return ConfigDict(_with_references(fields))


def derive(command: str, variant: str, overrides: Mapping[str, Any]) -> ConfigDict:
    """The configuration of a command's variant with other values of some fields.

    Args:
      command: the name of the command.
      variant: the name of one of its variants.
      overrides: {dotted field: value}.

    Raises:
      ValueError: if the variant or a field does not exist, or a value breaks its rule;
        names the command.
    """
    module = importlib.import_module(f"experiments.configs.{command}")
    with blamed_on(command):
        build(command, module.BASE, module.VARIANTS, variant)
        changed = {variant: {**module.VARIANTS[variant], **overrides}}
        config = build(command, module.BASE, changed, variant)
        check(config, module.RULES)
    return config


def _with_references(value):
    """Converts optional fields to those of ml_collections."""
    if isinstance(value, Optional):
        return config_dict.FieldReference(value.value, field_type=value.kind)
    if isinstance(value, dict):
        return {name: _with_references(inner) for name, inner in value.items()}
    return value


def find_field(name: str, base: Mapping[str, Any]) -> Any:
    """The default of a dotted field; None within an `Open` entry.

    Raises:
      ValueError: if there is no such field; names the fields that there are.
    """
    entry, path = base, "The configuration"
    for part in name.split("."):
        if isinstance(entry, Open):
            return None
        if not isinstance(entry, dict) or part not in entry:
            fields = list(entry) if isinstance(entry, dict) else []
            close = difflib.get_close_matches(part, fields, 1)
            guess = f" Did you mean {close[0]}?" if close else ""
            found = f"has {', '.join(fields)}" if fields else "is no entry"
            raise ValueError(f"there is no field {name}.{guess} {path} {found}.")
        entry, path = entry[part], part if entry is base else f"{path}.{part}"
    return entry


def set_field(
    config: ConfigDict, name: str, text: str, base: Mapping[str, Any]
) -> None:
    """Sets a dotted field to the value that `text` writes.

    The value has the kind of the field in `base`; a tuple of one value needs no
    parentheses. A new field of an `Open` entry takes a Python literal or a string.

    Raises:
      ValueError: if there is no such field, or if the text is not of its kind.
    """
    default = find_field(name, base)
    *parents, last = name.split(".")
    entry = config
    for parent in parents:
        entry = entry.get(parent) if isinstance(entry, ConfigDict) else None
    if not isinstance(entry, ConfigDict):
        raise ValueError(f"there is no field {name}: {'.'.join(parents)} is no entry.")
    if isinstance(default, Optional) and text in ("None", "none"):
        entry[last] = None
        return
    if default is None:  # in an open entry
        default = entry.get(last)
    try:
        value = _read(text, _kind_of(default))
        if not _is_of_kind(value, default):
            raise ValueError
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError):
        raise ValueError(
            f"{name} must be {_describe(default)}, got {text!r}."
        ) from None
    with entry.ignore_type():
        entry[last] = value


class _Kind(NamedTuple):
    """How a type of fields is called, and the types that its values may have."""

    one: str
    many: str
    types: tuple[type, ...]


_KINDS = {
    int: _Kind("an integer", "integers", (int,)),
    float: _Kind("a number", "numbers", (int, float)),
    str: _Kind("a string that is not empty", "strings", (str,)),
    bool: _Kind("true or false", "", (bool,)),
    tuple: _Kind("a tuple", "", (tuple, list)),
    dict: _Kind("a dict", "", (dict, ConfigDict)),
}


def _kind_of(default):
    kind = default.kind if isinstance(default, Optional) else type(default)
    return dict if kind in (Open, ConfigDict) else kind


def _values_of(default):
    """The kind of the values of a tuple, or None if the default does not tell it."""
    kinds = {type(v) for v in default} if type(default) is tuple else set()
    kind = kinds.pop() if len(kinds) == 1 else None
    return _KINDS[kind] if kind in (int, float, str) else None


def _is_of_kind(value, default):
    if default is None:  # a new field of an open entry
        return value != ""
    if value is None:
        return isinstance(default, Optional)
    kind, inner = _KINDS.get(_kind_of(default)), _values_of(default)
    return (
        (kind is None or type(value) in kind.types)
        and (inner is None or all(type(v) in inner.types for v in value))
        and value != ""
    )


def _describe(default):
    kind, inner = _KINDS.get(_kind_of(default)), _values_of(default)
    words = kind.one if kind else "a Python literal"
    return f"{words} of {inner.many}" if inner else words


def _read(text, kind):
    if kind is str:
        return text
    if kind in (int, float):
        return kind(text)
    if kind is bool:
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        if text[:1] in "([{":
            raise
        value = text  # a string without quotes
    if kind is tuple:
        return tuple(value) if isinstance(value, list | tuple) else (value,)
    if kind is dict:
        return ConfigDict(dict(value))
    return value


def check_fields(config: ConfigDict, base: Mapping[str, Any]) -> None:
    """Compares a configuration with a base: names of fields and kinds of values.

    Raises:
      ValueError: if `config` lacks a field of `base`, has an unknown one, or has a
        value of another kind.
    """
    given = flatten(config)
    for name, value in given.items():
        if name in ("experiment", "variant"):
            continue
        default = find_field(name, base)
        if not _is_of_kind(value, default):
            raise ValueError(f"{name} must be {_describe(default)}, got {value!r}.")
    for name in flatten(base):
        if not any(f"{field}.".startswith(f"{name}.") for field in given):
            raise ValueError(f"the configuration has no field {name}.")


def flatten(entry: Any, prefix: str = "") -> dict[str, Any]:
    """Nested entries as one dict with dotted names; an empty or `Open` one is kept.

    Raises:
      ValueError: if a name is not a string.
    """
    is_entry = isinstance(entry, Mapping | ConfigDict) and not isinstance(entry, Open)
    if not is_entry or not len(entry):
        return {prefix: entry}
    flat = {}
    for name in entry:
        if not isinstance(name, str):
            raise ValueError(f"{prefix}: {name!r} is not the name of a field.")
        flat |= flatten(entry[name], f"{prefix}.{name}" if prefix else name)
    return flat


def check(config: ConfigDict, rules: Mapping[str, Rule]) -> None:
    """Checks every field that has a rule, here or in `COMMON_RULES`.

    In the names of rules `entry.*` stands for all fields of an entry, and `field?` for
    a field that may be missing. All numbers must be finite and below 2**62, also those
    of fields without a rule.

    Raises:
      ValueError: if a field is missing or breaks its rule; names the field, the rule
        and the value.
    """
    for name, rule in {**COMMON_RULES, **rules}.items():
        for field, value in _lookup(config, name.split("."), ""):
            check_value(field, value, rule)
    for field, value in flatten(config).items():
        numbers = value if isinstance(value, tuple | list) else [value]
        for number in numbers:
            if isinstance(number, int | float) and not abs(number) < 2**62:
                raise ValueError(
                    f"{field} must be finite and below 2**62, got {value!r}."
                )


def check_value(field: str, value: Any, rule: Rule) -> None:
    """Raises ValueError if the value of a field breaks the rule."""
    try:
        holds = rule.holds(value)
    except (TypeError, AttributeError, OverflowError):  # not a value of this kind
        holds = False
    if not holds:
        raise ValueError(f"{field} must be {rule.words}, got {value!r}.")


def _lookup(entry, names, prefix):
    if not names:
        yield prefix, entry
        return
    first, *rest = names
    known = entry if isinstance(entry, Mapping | ConfigDict) else ()
    for name in known if first == "*" else [first.removesuffix("?")]:
        field = f"{prefix}.{name}" if prefix else name
        if name in known:
            yield from _lookup(entry[name], rest, field)
        elif not first.endswith("?"):
            raise ValueError(f"the configuration has no field {field}.")


@contextlib.contextmanager
def blamed_on(field: str) -> Iterator[None]:
    """Turns an error of code that a config chooses into one that names the field.

    For what a config passes on to a library: keywords of an optimizer, fields of a
    module. Whatever the library raises is about these values.
    """
    try:
        yield
    except (OSError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{field}: {reason}") from error


def at_least(low: float) -> Rule:
    """A finite number of at least `low`."""
    return Rule(f"at least {low}", lambda value: low <= value < math.inf)


def above(low: float) -> Rule:
    """A finite number above `low`."""
    return Rule(f"above {low}", lambda value: low < value < math.inf)


def within(interval: str) -> Rule:
    """A number within an interval such as "[0, 1)"."""
    low, high = (float(end) for end in interval[1:-1].split(","))

    def holds(value):
        from_low = low <= value if interval[0] == "[" else low < value
        to_high = value <= high if interval[-1] == "]" else value < high
        return from_low and to_high

    return Rule(f"in {interval}", holds)


def one_of(*allowed: Any) -> Rule:
    """One of these values."""
    return Rule(f"one of {', '.join(map(str, allowed))}", lambda v: v in allowed)


def each(rule: Rule, *, empty: bool = False) -> Rule:
    """A tuple whose values each satisfy a rule."""
    return Rule(
        f"a {'' if empty else 'non-empty '}tuple, each value {rule.words}",
        lambda values: (empty or len(values) > 0) and all(map(rule.holds, values)),
    )


def distinct(rule: Rule) -> Rule:
    """A non-empty tuple of different values that each satisfy a rule."""
    return Rule(
        f"a non-empty tuple without repetitions, each value {rule.words}",
        lambda v: 0 < len(v) == len(set(v)) and all(map(rule.holds, v)),
    )


def optional(rule: Rule) -> Rule:
    """None, or a value that satisfies a rule."""
    return Rule(f"None or {rule.words}", lambda v: v is None or rule.holds(v))


def dataset(name: Any) -> dict[str, Any]:
    """The fields of a data set: the arguments of `data.load_dataset`."""
    return {
        # digits, folder, npz, or an image data set of TFDS.
        "name": name,
        # The directory of the images, of the .npz files or of TFDS.
        "data_dir": Optional(str),
        # If set, images are resized on their shorter side and cropped to a square.
        "image_size": Optional(int),
        # The names of the splits in the source, if not train and test (or val).
        "train_split": Optional(str),
        "test_split": Optional(str),
    }


def whole(low: int, high: int = 2**31 - 1) -> Rule:
    """An integer of at least `low` that a counter of 32 bits can hold."""
    above = "below 2**31" if high == 2**31 - 1 else f"at most {high}"
    words = f"at least {low} and {above}"
    return Rule(words, lambda v: type(v) is int and low <= v <= high)


def pair(rule: Rule, *, equal: bool = False) -> Rule:
    """A tuple (low, high) of two values that satisfy a rule, low < high."""
    return Rule(
        f"(low, high) with low {'<=' if equal else '<'} high, each {rule.words}",
        lambda v: (
            len(v) == 2
            and all(map(rule.holds, v))
            and (v[0] < v[1] or (equal and v[0] == v[1]))
        ),
    )


FINITE = Rule("finite", math.isfinite)
SEED = Rule(
    "an integer from 0 to 2**32 - 1", lambda v: type(v) is int and 0 <= v < 2**32
)
SEEDS = distinct(SEED)
TENSORBOARD = Rule(
    "False without tensorboardX (pip install tensorboardX)",
    lambda v: not v or importlib.util.find_spec("tensorboardX") is not None,
)

# Rules of the fields that mean the same in every configuration that has them.
COMMON_RULES = {
    "tensorboard?": TENSORBOARD,
    "dataset?.image_size?": optional(whole(1, 2**14)),
    "seed?": SEED,
    "seeds?": SEEDS,
    "num_train?": whole(0),
    "num_test?": whole(0),
    "batch_size?": whole(1),
    "log_every?": whole(1),
    "checkpoint_every?": whole(1),
    "label_smoothing?": within("[0, 1)"),
}


def optimizer_rules(entry: str = "optimizer") -> dict[str, Rule]:
    """Rules for the fields that every optimizer of a config has."""
    return {
        f"{entry}.learning_rate": at_least(0),
        f"{entry}.schedule": one_of("constant", "cosine"),
        f"{entry}.warmup_steps": whole(0),
    }
