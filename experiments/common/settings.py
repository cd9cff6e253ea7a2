"""Configurations as data: a base, overrides for each variant, and rules for fields.

A file of `experiments/configs` holds three tables and one line:

    BASE = {...}       nested dicts of all fields and their defaults
    VARIANTS = {...}   variant -> {dotted field: value}; the first one is the default
    RULES = {...}      dotted field -> `Rule`, checked at the start of a command
    get_config = functools.partial(settings.build, NAME, BASE, VARIANTS)
"""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict, config_dict


class Optional(NamedTuple):
    """A field that may be None; `kind` is the type of its other values."""

    kind: type
    value: Any = None


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


def _with_references(value):
    """Converts optional fields to those of ml_collections."""
    if isinstance(value, Optional):
        return config_dict.FieldReference(value.value, field_type=value.kind)
    if isinstance(value, dict):
        return {name: _with_references(inner) for name, inner in value.items()}
    return value


def check(config: ConfigDict, rules: Mapping[str, Rule]) -> None:
    """Checks every field that has a rule; `entry.*` stands for all fields of an entry.

    Raises:
      ValueError: if a field breaks its rule; names the field, the rule and the value.
    """
    for name, rule in rules.items():
        for field, value in _lookup(config, name.split("."), ""):
            try:
                holds = rule.holds(value)
            except TypeError:  # the type of the value cannot be compared
                holds = False
            if not holds:
                raise ValueError(f"{field} must be {rule.words}, got {value!r}.")


def _lookup(entry, names, prefix):
    if not names:
        yield prefix, entry
        return
    for name in entry if names[0] == "*" else names[:1]:
        field = f"{prefix}.{name}" if prefix else name
        yield from _lookup(entry[name], names[1:], field)


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


DATASET_RULES = {
    "dataset.image_size": optional(
        Rule("an integer of at least 1", lambda v: type(v) is int and v >= 1)
    )
}
INTEGER = Rule("an integer", lambda v: type(v) is int)
SEEDS = each(Rule("an integer from 0 to 2**32 - 1", lambda v: 0 <= v < 2**32))


def optimizer_rules(entry: str = "optimizer") -> dict[str, Rule]:
    """Rules for the fields that every optimizer of a config has."""
    return {
        f"{entry}.learning_rate": at_least(0),
        f"{entry}.schedule": one_of("constant", "cosine"),
        f"{entry}.warmup_steps": at_least(0),
    }
