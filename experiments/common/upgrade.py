"""Brings a config.json that an older version stored to the fields of today.

`upgrade` follows three tables. `RENAMED` holds the fields that changed name or form,
`ADDED` those that a command gained, with the value that means what was done before, and
`REMOVED` those that it lost, with the only value that still means the same. Field names
are dotted. A field that is already there keeps its value.
"""

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments.common import files


def _one_seed(seed):
    return [seed]


def _same(value):
    return value


def _constant(schedule):
    """A schedule [[0, value]] of one entry is its value."""
    if isinstance(schedule, list) and len(schedule) == 1:
        [[start, value]] = schedule
        return value if start == 0 else schedule
    return schedule


def _rename_in_stages(stages):
    # An override is text.
    text = stages if isinstance(stages, str) else json.dumps(stages)
    text = text.replace("patch_dropout", "patch_keep_rate")
    return text if isinstance(stages, str) else json.loads(text)


def _gradient_batch_size(config):
    """Gradients were timed at the batch of fine-tuning, where there were images."""
    training = config["tuning"]["training"]
    return training["batch_size"] if config["dataset"]["name"] else 0


_SEED = {"seed": ("seeds", _one_seed)}
_NORMALIZATION = {"normalisation": ("normalization", _same)}

# command: {old field: (new field, function of the value)}.
RENAMED: dict[str, dict[str, tuple[str, Callable[[Any], Any]]]] = {
    "meta_learn": {**_SEED, "model.dtype": ("model.derivative_dtype", _same)},
    "classify_functa": _SEED,
    "fit_image": _SEED,
    "train_vit": {
        **_SEED,
        **_NORMALIZATION,
        "patch_dropout": ("patch_keep_rate", _constant),
        "stages": ("stages", _rename_in_stages),
    },
    "prune_vit": {
        **_SEED,
        **_NORMALIZATION,
        "tuning.training.patch_dropout": ("tuning.training.patch_keep_rate", _constant),
    },
}

# command: {field: the value that means what was done before, or a function of the
# stored configuration that gives it}.
ADDED: dict[str, dict[str, Any]] = {
    "meta_learn": {
        "mix_signals": False,
        "model.derivative_dtype": "float32",
        "inner.calibration": None,
        "warm_start_steps": 0,
        "by_cells": False,
        "cell": None,
        "max_drop": 0.0,
    },
    "classify_functa": {
        "model.type": "mlp",
        "features": "latents",
        "data_dir": None,
        "crop": [],
        "cutmix": 0.0,
        "images_per_group": 0,
        "optimizer": "adam",
        "clip_norm": 0.0,
        "warmup_epochs": 0.0,
        "stages": [],
        "num_measured": 0,
    },
    "probe_landscape": {
        "network": None,
        "network_options": {},
        "loss": None,
        "sharpness.preconditioned": False,
        "spectrum.num_samples": 0,
        "spectrum.num_steps": 40,
    },
    "make_functaset": {"padding": 0, "inner.num_steps": None},
    "train_lbi": {"label_smoothing": 0.0},
    "train_vit": {"stages": [], "checkpoint_options": {}},
    "prune_vit": {
        "num_validation": 0,
        "budget": None,
        "latency": None,
        "save_networks": False,
        "checkpoint_options": {},
        "timing.gradient_batch_size": _gradient_batch_size,
        "tuning.teacher_weight": 0.0,
        "tuning.training.stages": [],
    },
}

# Fields that the data set of every command gained; None means what was done before.
ADDED_TO_DATASET = ("image_size", "train_split", "test_split")

# command: {field: the value with which a run means the same without the field}.
REMOVED: dict[str, dict[str, Any]] = {
    "meta_learn": {"exact_steps": 0},
    # The torch programs were in a folder of the user's.
    "benchmark": {"tensorboard": False, "peers": None},
    # Nothing read it in commands that train nothing, or only in inner runs.
    **dict.fromkeys(
        ("latent_controls", "prune_vit", "scaling", "stress"),
        {"tensorboard": False},
    ),
}

# Fields that a run filled from its data; they are not settings.
FILLED = ("model.out_channels", "cell", "params_sha256")


def upgrade(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The stored configuration, nested, with the fields of today; a new dict."""
    config = copy.deepcopy(dict(stored))
    command = config.get("experiment")
    config.pop("params_sha256", None)
    for old, (new, function) in RENAMED.get(command, {}).items():
        if _has(config, old):
            _set(config, new, function(_pop(config, old)))
    for name, value in ADDED.get(command, {}).items():
        if not _has(config, name):
            value = value(config) if callable(value) else copy.deepcopy(value)
            _set(config, name, value)
    if isinstance(dataset := config.get("dataset"), dict):
        for name in ADDED_TO_DATASET:
            dataset.setdefault(name, None)
    for name, value in REMOVED.get(command, {}).items():
        if _has(config, name) and (found := _pop(config, name)) != value:
            _set(config, name, found)
    return config


def read_config(path: Path) -> dict[str, Any]:
    """The configuration in a config.json, with the fields of today.

    Raises:
      ValueError: naming the file, if it holds no configuration.
    """
    stored = files.read_json(path)
    if not isinstance(stored, dict):
        raise ValueError(f"{path} must hold a JSON object, got {stored!r:.80}.")
    try:
        return upgrade(stored)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a configuration of this version: {error!r}."
        ) from None


def upgrade_override(command: str, name: str, value: Any) -> tuple[str, Any]:
    """Today's name and value of an override that a recorded command gave."""
    unchanged = name, _same
    new, function = RENAMED.get(command, {}).get(name, unchanged)
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
