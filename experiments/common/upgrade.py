"""Brings a config.json that an older version stored to the fields of today.

`upgrade` follows three tables. `ADDED` holds the fields that a command gained, with the
value that means what was done before. `REMOVED` holds the fields that it lost, with the
only value that still means the same. `RENAMED` holds the fields that changed name or
form. Field names are dotted. A field that is already there keeps its value.
"""

import copy
from collections.abc import Mapping
from typing import Any

# command: {field: the value that means what was done before the field existed}.
ADDED: dict[str, dict[str, Any]] = {
    "meta_learn": {"model.dtype": "float32"},
    "train_vit": {"stages": []},
    "prune_vit": {
        "timing.gradient_batch_size": 0,
        "tuning.teacher_weight": 0.0,
        "tuning.training.stages": [],
    },
}

# command: {field: the value with which a run means the same without the field}.
REMOVED: dict[str, dict[str, Any]] = {"meta_learn": {"exact_steps": 0}}


def _one_seed(seed):
    return [seed]


def _constant(schedule):
    """A schedule [[0, value]] of one entry is its value."""
    if isinstance(schedule, list) and len(schedule) == 1:
        [[start, value]] = schedule
        return value if start == 0 else schedule
    return schedule


# command: {old field: (new field, function of the value)}.
RENAMED: dict[str, dict[str, tuple[str, Any]]] = {
    "train_vit": {"patch_dropout": ("patch_dropout", _constant)},
    "prune_vit": {
        "tuning.training.patch_dropout": ("tuning.training.patch_dropout", _constant)
    },
}

# A rename that today's configuration does not have is left out, so that the entries
# hold before and after `seed` becomes `seeds`.
RENAMED_WHEN_PRESENT = {"seed": ("seeds", _one_seed)}

# Fields that a run fills from its data; they are not settings.
FILLED = ("model.out_channels", "params_sha256")


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted names."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    flat = {}
    for name, inner in value.items():
        flat.update(flatten(inner, f"{prefix}.{name}" if prefix else name))
    return flat


def upgrade(
    stored: Mapping[str, Any], fields: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The stored configuration with the fields of today.

    Args:
      stored: what config.json holds; it is not changed.
      fields: today's configuration of the same command, nested; it decides whether a
        rename such as `seed` to `seeds` has happened. None renames nothing of the kind.

    Returns:
      A new nested dict.
    """
    config = copy.deepcopy(dict(stored))
    command = config.get("experiment", "")
    present = flatten(fields or {})
    renamed = dict(RENAMED.get(command, {}))
    for old, (new, function) in RENAMED_WHEN_PRESENT.items():
        if new in present and old not in present:
            renamed[old] = (new, function)
    for old, (new, function) in renamed.items():
        if _has(config, old):
            _set(config, new, function(_pop(config, old)))
    for name, value in ADDED.get(command, {}).items():
        if not _has(config, name) and (fields is None or name in present):
            _set(config, name, copy.deepcopy(value))
    for name, value in REMOVED.get(command, {}).items():
        if name not in present and _has(config, name):
            found = _pop(config, name)
            if found != value:
                _set(config, name, found)
    return config


def upgrade_override(command: str, name: str, value: Any, fields) -> tuple[str, Any]:
    """Today's name and value of an override that a recorded command gave."""
    present = flatten(fields)
    if name in present:
        return name, value
    new, function = {
        **RENAMED.get(command, {}),
        **RENAMED_WHEN_PRESENT,
    }.get(name, (name, lambda value: value))
    return new, function(value)


def _has(config, name):
    for part in name.split("."):
        if not isinstance(config, dict) or part not in config:
            return False
        config = config[part]
    return True


def _pop(config, name):
    *parents, last = name.split(".")
    for part in parents:
        config = config[part]
    return config.pop(last)


def _set(config, name, value):
    *parents, last = name.split(".")
    for part in parents:
        config = config.setdefault(part, {})
    config[last] = value
