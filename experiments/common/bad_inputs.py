"""Inputs that a command must refuse, and some that it must accept; for stress.

A case is a command, its arguments, and words of which the answer must contain one.
`{NAME}` in an argument is a file or folder that `make_files` wrote, or a run that
`stress` trained. The cases of single fields are derived from the configurations.
"""

import importlib
import io
import json
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.common import settings

COMMANDS = (
    *("meta_learn", "make_functaset", "classify_functa", "fit_image", "train_lbi"),
    *("prune_lbi", "probe_landscape", "train_vit", "prune_vit", "scaling"),
    "latent_controls",
)
# Runs that cases and kills start from: command and the options beyond `smoke`.
RUNS = {
    "meta_learn": (),
    "make_functaset": ("--config.run={meta_learn}",),
    "classify_functa": ("--config.functaset={meta_learn}/functaset.npz",),
    "fit_image": (),
    "train_lbi": (),
    "prune_lbi": ("--config.run={train_lbi}",),
    "probe_landscape": (),
    "train_vit": (),
    "prune_vit": ("--config.checkpoint={train_vit}/model.npz",),
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


# Fields that may be negative, and an entry that is not read with a checkpoint.
_SIGNED = ("coord_range",)
_NOT_READ = ("prune_vit", "model")


def _of_fields() -> Iterator[Case]:
    """For every field of every command: text, NaN, infinity, a negative number."""
    for command in COMMANDS:
        module = importlib.import_module(f"experiments.configs.{command}")
        for field, value in settings.flatten(module.get_config("smoke")).items():
            *entry, last = field.split(".")
            is_read = (command, *entry) != _NOT_READ
            if field in ("experiment", "variant") or not is_read:
                continue
            # An open entry, such as `model`, is named as a whole.
            is_open = settings.find_field(field, module.BASE) is None
            words = (field, f"{entry[0]}:") if is_open and entry else (field,)
            sample = value[0] if isinstance(value, tuple) and value else value
            bad = []
            if isinstance(value, bool):
                bad = ["maybe", "2"]
            elif isinstance(sample, int | float):
                bad = ["many", "nan", "1e999", "(1", "", "None"]
                bad += ["-1"] if field not in _SIGNED else []
                bad += ["0.5", str(2**64)] if isinstance(sample, int) else []
            elif isinstance(value, tuple):
                bad = ["(1"]
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
            (("--config.tensorboard=1", "--config.tensorboard=0"), "twice"),
        ):
            name = f"{command} {' '.join(arguments)}"
            yield Case(name, command, arguments, (word,))


# command: {field=value and more: a word of the answer}.
_VALUES = {
    "meta_learn": {
        "optimizer.name=nosuch": "nosuch",
        "optimizer.name=chain": "optimizer.name",
        "optimizer.name=global_norm": "optimizer.name",
        "optimizer.name=cosine_decay_schedule": "optimizer.name",
        "optimizer.name=lbfgs": "optimizer.name",
        "optimizer.name=__doc__": "optimizer.name",
        "optimizer.name=": "optimizer.name",
        "optimizer.options.b2=2.0": "optimizer.options.b2",
        "optimizer.options.b2=1": "optimizer.options.b2",
        "optimizer.options.b1=-0.5": "optimizer.options.b1",
        "optimizer.options.eps=-1": "optimizer.options.eps",
        "optimizer.options.eps=nan": "optimizer.options.eps",
        "optimizer.options.b3=0.5": "optimizer.options",
        "optimizer.options.b2=text": "optimizer.options",
        "optimizer.options={'q': 1}": "optimizer.options",
        "optimizer.options=3": "optimizer.options",
        "optimizer=3": "optimizer",
        "optimizer.schedule=linear": "optimizer.schedule",
        "optimizer.ema_decay=2": "optimizer.ema_decay",
        "optimizer.ema_decay=1": "optimizer.ema_decay",
        "optimizer.learning_rate=-0.001": "optimizer.learning_rate",
        "inner.rate_clip=(1,0)": "inner.rate_clip",
        "inner.rate_clip=(0,0)": "inner.rate_clip",
        "inner.rate_clip=(-1,1)": "inner.rate_clip",
        "inner.rate_clip=(0,nan)": "inner.rate_clip",
        "inner.rate_clip=(1,)": "inner.rate_clip",
        "inner.rate_clip=3": "inner.rate_clip",
        "inner.rate_range=(0.4,0.2)": "inner.rate_range",
        "inner.rate_range=(0.1,0.2,0.3)": "inner.rate_range",
        "inner.num_steps=0": "inner.num_steps",
        "seeds=()": "seeds",
        "seeds=(0,0)": "seeds",
        "seeds=(1.5,)": "seeds",
        f"seeds=({2**32},)": "seeds",
        "seeds=('a',)": "seeds",
        "batch_size=0": "batch_size",
        "batch_size=100000": "batch_size",
        "num_pixels=65": "num_pixels",
        "coarse_factor=0": "coarse_factor",
        "coarse_factor=3 coarse_steps=2": "coarse_factor",
        "model.type=Siren": "model.type",
        "model.type=siren": "model.type",
        "model.depth=1": "model.depth",
        "model.latent_dim=0": "model.latent_dim",
        "model.layer_sizes=(0,)": "model.layer_sizes",
        "model.layer_sizes=('a',)": "model.layer_sizes",
        "model.modulate_shift=False": "modulate",
        "model.out_channels=3": "out_channels",
        "model.derivative_dtype=int8": "derivative_dtype",
        "eval.optimizer=adam": "eval.optimizer",
        "eval.optimizer=nosuch": "eval.optimizer",
        "eval.optimizer=chain": "eval.optimizer",
        "eval.optimizer=clip": "eval.optimizer",
        "eval.more_images=0": "eval.more_images",
        "eval.batch_size=0": "eval.batch_size",
        "eval.num_images=-1": "eval.num_images",
        "eval.more_steps=-1": "eval.more_steps",
        "dataset.name=nosuch": "nosuch",
        "dataset.name=": "data",
        "dataset.name=folder": "data_dir",
        "dataset.name=npz": "data_dir",
        "dataset.name=cifar10 dataset.data_dir=/nowhere": "/nowhere",
        "dataset.name=folder dataset.data_dir=/nowhere": "/nowhere",
        "dataset.data_dir=/nowhere": "data_dir",
        "init_from=/nowhere": "/nowhere",
        "tensorboard=3": "tensorboard",
    },
    "fit_image": {
        "image=/nowhere.png": "/nowhere.png",
        "resolution=(1e9,)": "resolution",
        "resolution=(1000000000,)": "resolution",
        "resolution=(0,)": "resolution",
        "resolution=(8,8) num_steps=(1,2,3)": "resolution",
        "resolution=(16,16)": "size",
        "resolution=()": "resolution",
        "num_images=(2,)": "images",
        "mosaic=(2,)": "images",
        "snapshot_steps=(3,2)": "snapshot_steps",
        "snapshot_steps=(0,)": "snapshot_steps",
        "coord_range=(1,0)": "coord_range",
        "coord_range=(0,1,2)": "coord_range",
        "coord_range=(0,inf)": "coord_range",
        "model.type=LatentModulatedSiren": "model.type",
        "model.omega_0=0": "model.omega_0",
        "model.out_channels=7": "out_channels",
        "optimizer.name=lbfgs": "optimizer.options",
        "optimizer.options.b2=1.5": "optimizer.options.b2",
        "optimizer.options.momentum=0.9": "optimizer.options",
        "dataset.name=nosuch": "nosuch",
        "dataset.data_dir=/nowhere": "data_dir",
    },
    "make_functaset": {
        "splits=('val',)": "splits",
        "splits=()": "splits",
        "splits=('train','train')": "splits",
        "run=/nowhere": "/nowhere",
        "run={empty_folder}": "empty_folder",
        "run={train_lbi}": "train_lbi",
        "dataset.name=cifar10 dataset.data_dir=/nowhere": "/nowhere",
        "dataset.name=nosuch": "nosuch",
        "dataset.data_dir=/nowhere": "data_dir",
        f"seed={2**32}": "seed",
    },
    "classify_functa": {
        "functaset=/nowhere.npz": "/nowhere.npz",
        "functaset=": "functaset",
        "model.activation=nosuch": "activation",
        "model.activation=Dense": "model",
        "model.hidden_sizes=(0,)": "model.hidden_sizes",
        "model.hidden_sizes=('a',)": "model.hidden_sizes",
        "candidates.dropout_rate=(1.0,)": "candidates.dropout_rate",
        "candidates.mixup=(2,)": "candidates.mixup",
        "candidates.ema_decay=(1,)": "candidates.ema_decay",
        "candidates.label_smoothing=(1,)": "candidates.label_smoothing",
        "candidates.learning_rate=()": "candidates.learning_rate",
        "validation_fraction=1": "validation_fraction",
        "validation_fraction=0": "validation",
        "batch_size=100000": "batch_size",
        "schedule=linear": "schedule",
        "weight_decay_type=l1": "weight_decay_type",
    },
    "train_lbi": {
        "methods=('sgd',)": "methods",
        "methods=('adam','adam')": "methods",
        "methods=()": "methods",
        "optimizer.adam.name=adamw": "optimizer.adam.name",
        "optimizer.adam.name=dessilbi": "optimizer.adam.options",
        "optimizer.dessilbi.name=sgd": "optimizer.dessilbi.name",
        "optimizer.dessilbi.options.nu=0": "optimizer.dessilbi.options.nu",
        "optimizer.dessilbi.options.kappa=-1": "optimizer.dessilbi.options.kappa",
        "optimizer.dessilbi.options.momentum=1": "optimizer.dessilbi.options.momentum",
        "optimizer.dessilbi.options.nosuch=1": "optimizer.dessilbi.options",
        "optimizer.dessilbi_adam.options.b2=1": "optimizer.dessilbi_adam.options.b2",
        "optimizer.dessilbi.schedule=linear": "optimizer.dessilbi.schedule",
        "penalty=l1": "penalty",
        "enter_at=0": "enter_at",
        "model.type=ResNet": "model.type",
        "model.nosuch=1": "model",
        "model.features=3": "model",
        "model.hidden=0": "model",
        "model.type=VGG": "model",
        "image_size=4": "8x8",
        "batch_size=257": "batch_size",
        "dataset.name=nosuch": "nosuch",
        "dataset.name=folder": "data_dir",
    },
    "prune_lbi": {
        "run=/nowhere": "/nowhere",
        "run={meta_learn}": "meta_learn",
        "method=adam": "adam",
        "method=nosuch": "nosuch",
        "layer=conv9": "conv9",
        "sparsities=(1.0,)": "sparsities",
        "sparsities=()": "sparsities",
        "curve_sparsities=(2,)": "curve_sparsities",
        "compress.conv9=0.5": "conv9",
        "compress.conv1=0": "compress.conv1",
        "finetune.name=nosuch": "finetune.name",
        "finetune.options.momentum=2": "finetune.options.momentum",
        "finetune.options.nosuch=2": "finetune.options",
    },
    "probe_landscape": {
        "last_layer=^fc9/kernel$": "last_layer",
        "last_layer=(": "last_layer",
        "networks=('bm',)": "networks",
        "learning_rates=(0,)": "learning_rates",
        "learning_rates=(0.001,0.001)": "learning_rates",
        "surface.learning_rate=0.5": "surface.learning_rate",
        "surface.chunk_size=65": "surface.chunk_size",
        "step_sizes=()": "step_sizes",
        "bn_mode=none": "bn_mode",
        "network=/nowhere.py:make": "network",
        "network=experiments/networks/examples.py:nosuch": "nosuch",
        "network=experiments/networks/examples.py:Residual": "Residual",
        "network_options={'width':8}": "network_options",
        "loss=experiments/networks/examples.py:make_vit": "loss",
        "surface.span=0": "surface.span",
        "sharpness.num_steps=1000000": "sharpness.num_steps",
        "sharpness.num_eigenvalues=4": "sharpness.num_eigenvalues",
        "optimizer.name=nosuch": "optimizer.name",
        "optimizer.name=chain": "optimizer.name",
        "optimizer.options.b2=1": "optimizer.options.b2",
        "optimizer.options.nosuch=1": "optimizer.options",
        "model.type=ResNet": "model.type",
        "model.stages=3": "model",
        "model.nosuch=1": "model",
        "image_size=4": "8x8",
        "image_size=15": "model",
        "batch_size=129": "batch_size",
    },
    "train_vit": {
        "model.variant=Q": "variant",
        "model.patch_size=3": "patch",
        "model.nosuch=1": "model",
        "model.hidden_size=63": "model",
        "model.num_layers=0": "model",
        "model.dtype=int8": "model.dtype",
        "model.dropout_rate=1.0": "model",
        "image_size=7": "patch",
        "normalisation=none": "normalisation",
        "checkpoint=/nowhere.npz": "/nowhere.npz",
        "stages=((0.5, {'nosuch': 1}),)": "stages",
        "stages=((2, {'patch_dropout': 1.0}),)": "stages",
        "stages=((0.5, {'patch_dropout': 0.0}),)": "patch_dropout",
        "stages=((0.5, {'augment.mixup': -1.0}),)": "augment.mixup",
        "stages=3": "stages",
        "patch_dropout=0": "patch_dropout",
        "augment.magnitude=2": "augment.magnitude",
        "augment.min_area=0": "augment.min_area",
        "label_smoothing=1": "label_smoothing",
        "average_decay=1": "average_decay",
        "optimizer.name=nosuch": "optimizer.name",
        "optimizer.name=lbfgs": "optimizer.options",
        "optimizer.options.weight_decay=-1": "optimizer.options.weight_decay",
        "optimizer.options.nosuch=1": "optimizer.options",
        "optimizer.clip_norm=0": "optimizer.clip_norm",
        "batch_size=257": "batch_size",
        "dataset.name=folder": "data_dir",
    },
    "prune_vit": {
        "methods.nosuch=(0.5,)": "nosuch",
        "methods.max=(1.0,)": "methods.max",
        "methods.max=()": "methods.max",
        "methods={'dense': (0.5,)}": "methods",
        "tuning.methods.nosuch=(0.5,)": "nosuch",
        "tuning.methods.max=(1.5,)": "tuning.methods.max",
        "timing.methods=('nosuch',)": "timing.methods",
        "timing.batch_sizes=(0,)": "timing.batch_sizes",
        "tuning.teacher_weight=2": "tuning.teacher_weight",
        "tuning.training.optimizer.name=nosuch": "optimizer.name",
        "tuning.training.optimizer.options.b1=1": "optimizer.options.b1",
        "tuning.training.batch_size=257": "batch_size",
        "tuning.training.stages=((0.5, {'nosuch': 1}),)": "stages",
        "structure.nu=0": "structure.nu",
        "structure.enter_at=2": "structure.enter_at",
        "checkpoint=/nowhere.npz": "/nowhere.npz",
        "checkpoint=None": "checkpoint",
        "dataset.name=None": "data set",
        "dtype=int8": "dtype",
        "attention_implementation=nosuch": "attention_implementation",
        "attention_implementation=cudnn": "attention_implementation",
        "parity_ratio=1": "parity_ratio",
        "image_size=7": "7",
    },
    "scaling": {
        "num_devices=(0,)": "num_devices",
        "num_images=()": "num_images",
        f"seed={2**64}": "seed",
    },
}
# Good inputs, which must pass all checks.
_GOOD = {
    "meta_learn": (
        "",
        "optimizer.options.b2=0.9",
        "optimizer.name=adabelief",
        "inner.rate_clip=(0,1)",
        "seeds=3",
        "eval.optimizer=adam eval.learning_rate=0.01",
        "eval.more_images=100000",
        "model.modulate_scale=True",
        "init_from={meta_learn}",
        "dataset.name=folder dataset.data_dir={flat}",
        "dataset.name=folder dataset.data_dir={two_classes}",
        "dataset.name=npz dataset.data_dir={npz_good}",
    ),
    "fit_image": ("", "optimizer.name=radam", "image={rgb.png}", "image={grey.png}"),
    "make_functaset": ("", "splits=test", "dataset.name=digits"),
    "classify_functa": (
        "",
        "functaset={functaset_good.npz} batch_size=8",
        "model.activation=gelu",
    ),
    "train_lbi": (
        "",
        "methods=dessilbi",
        "model.hidden=32",
        "optimizer.dessilbi.options.nesterov=True",
        "dataset.name=folder dataset.data_dir={two_classes} batch_size=8",
    ),
    "prune_lbi": ("", "method=dessilbi_adam"),
    "probe_landscape": ("", "networks=bn", "optimizer.name=sgd"),
    "train_vit": (
        "",
        "optimizer.name=muon",
        "stages=((0.5,{'patch_dropout':0.5}),)",
        "checkpoint={train_vit}/model.npz",
    ),
    "prune_vit": ("", "methods.max=(0.3,)"),
    "scaling": ("",),
}


def _of_values() -> Iterator[Case]:
    for command, values in _VALUES.items():
        for text, word in values.items():
            yield Case(
                f"{command} {text}",
                command,
                _smoke(command, *_options(text)),
                (word,),
            )
    for command, texts in _GOOD.items():
        for text in texts:
            arguments = _smoke(command, *_options(text))
            yield Case(f"{command} good {text}", command, arguments, ())


def _options(text):
    """--config.X=... for each "X=..." of a text with one space between them."""
    parts = text.split(" ") if "{'" not in text else [text]
    return tuple(f"--config.{part}" for part in parts if part)


_BAD_FOLDERS = (
    *("empty_folder", "one_image", "text_only", "mixed_sizes", "zero_bytes"),
    *("truncated", "not_images", "broken_link", "a_file.txt", "fifo"),
    *("class_missing_in_test", "class_empty_in_test", "mixed_levels"),
)
_BAD_NPZ = (
    *("npz_no_test", "npz_text", "npz_truncated", "npz_pickle", "npz_float"),
    *("npz_3d", "npz_label_strings", "npz_label_onehot", "npz_label_short"),
    *("npz_label_float", "npz_label_wraps", "npz_label_negative", "npz_empty"),
    *("npz_huge_header", "npz_other_names", "npz_sizes_differ", "npz_channels_differ"),
    *("npz_flipped", "npz_is_folder", "npz_label_2e9"),
)
_BAD_IMAGES = (
    *("text.png", "empty.png", "truncated.png", "folder.png", "huge.png"),
    *("float.tif", "array.npy", "fifo"),
)
_BAD_FUNCTASETS = (
    *("array.npy", "text.npz", "empty.npz", "truncated.npz", "flipped.npz"),
    *("lacks_split.npz", "rank_1.npz", "latent_strings.npz", "latent_nan.npz"),
    *("latent_inf.npz", "latent_pickle.npz", "label_float.npz", "label_2e9.npz"),
    *("label_negative.npz", "label_one_class.npz", "label_short.npz"),
    *("split_unknown.npz", "split_no_test.npz", "split_bytes.npz", "mean_nan.npz"),
    *("std_nan.npz", "std_negative.npz", "config_list.npz", "config_bad.npz"),
    *("config_deep.npz", "no_rows.npz", "huge_header.npz", "folder.npz", "fifo"),
)
_BAD_RUNS = (
    *("run_no_config", "run_config_text", "run_config_list", "run_config_deep"),
    *("run_config_empty", "run_config_latin1", "run_no_checkpoints"),
    *("run_checkpoint_truncated", "run_checkpoint_emptied", "run_other_experiment"),
    *("rgb.png", "fifo"),
)
_BAD_WEIGHTS = (
    *("text.npz", "empty.npz", "array.npy", "truncated_vit.npz", "latent_pickle.npz"),
    *("vit_nan.npz", "vit_lacks.npz", "vit_other_rank.npz", "vit_strings.npz"),
    *("huge_header.npz", "header_huge.safetensors", "header_text.safetensors"),
    *("evil.pt", "folder.npz", "fifo", "functaset_good.npz"),
)
_BAD_HAIKU = (
    *("text.npz", "empty.npz", "evil.pt", "latent_pickle.npz", "functaset_good.npz"),
    *("array.npy", "folder.npz", "absent.npz", "fifo"),
)
_BAD_FIGURES = (
    "empty_folder",
    "absent",
    "run_config_text",
    "run_config_list",
    "rgb.png",
)


def _of_files() -> Iterator[Case]:
    """Files and folders that are damaged, malicious, or of another kind."""

    def case(command, field, name, words=None):
        words = (name, *(words or ()))
        option = f"--config.{field}={{{name}}}"
        return Case(
            f"{command} {field}={name}", command, _smoke(command, option), words
        )

    for name in _BAD_FOLDERS + _BAD_NPZ:
        kind = "npz" if name.startswith("npz") else "folder"
        for command in ("meta_learn", "train_lbi"):
            if command == "meta_learn" and ("label_" in name or "class_" in name):
                continue  # it does not use labels
            made = case(command, "dataset.data_dir", name)
            options = f"--config.dataset.name={kind}", "--config.batch_size=2"
            yield made._replace(arguments=made.arguments + options)
    made = case("train_lbi", "dataset.data_dir", "flat", ("label",))
    yield made._replace(arguments=(*made.arguments, "--config.dataset.name=folder"))
    for name in _BAD_IMAGES:
        yield case("fit_image", "image", name)
    for name in _BAD_FUNCTASETS:
        yield case("classify_functa", "functaset", name)
    for name in _BAD_RUNS:
        yield case("make_functaset", "run", name)
        yield case("prune_lbi", "run", name)
        yield case("meta_learn", "init_from", name)
    for name in _BAD_WEIGHTS:
        yield case("train_vit", "checkpoint", name)
        yield case("prune_vit", "checkpoint", name)
    for name in _BAD_HAIKU:
        yield Case(f"import_functa {name}", "import_functa", (f"{{{name}}}",), (name,))
    for name in _BAD_FIGURES:
        yield Case(f"figures {name}", "figures", (f"{{{name}}}",), (name,))


_BAD_STATES = {
    "state_other_config": "width",
    "state_config_text": "config.json",
    "state_config_deep": "config.json",
    "state_summary_text": "summary.json",
    "state_summary_list": "summary.json",
    "state_metrics_middle": "metrics.jsonl",
    "state_metrics_list": "metrics.jsonl",
    "state_inputs_list": "inputs.json",
    "state_no_config": "config.json",
}


def _of_folders() -> Iterator[Case]:
    """Run folders with which a run cannot go on."""
    for name, word in _BAD_STATES.items():
        yield Case(
            f"meta_learn {name}", "meta_learn", _smoke("meta_learn"), (word,), name
        )
    for command in COMMANDS:
        for name in ("rgb.png", "rgb.png/below"):
            yield Case(
                f"{command} --workdir={name}",
                command,
                _smoke(command, f"--workdir={{folder}}/{name}"),
                ("--workdir",),
            )


class Evil:
    """A pickle of it makes a folder when it is loaded; a refused file does not."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return os.makedirs, (self.marker,)


def make_files(folder: Path, marker: Path, run: Path) -> None:
    """Writes all files and folders of the cases.

    Args:
      folder: where to write.
      marker: a folder that the malicious files make if they are executed.
      run: a finished run of meta_learn's smoke variant.
    """
    import pickle
    import shutil

    from PIL import Image

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (24, 8, 8, 3), np.uint8)
    evil = pickle.dumps(Evil(marker / "file"))
    evil_array = np.empty(24, object)
    evil_array[:] = [Evil(marker / "array") for _ in evil_array]

    def path(name):
        made = folder / name
        made.parent.mkdir(parents=True, exist_ok=True)
        return made

    def picture(name, array):
        Image.fromarray(array).save(path(name))

    def pictures(name, numbers, **changes):
        for number in numbers:
            picture(f"{name}/{number:02d}.png", images[number])

    def truncate(source, name):
        data = path(source).read_bytes()
        path(name).write_bytes(data[: len(data) // 2])

    def flip(source, name):
        data = bytearray(path(source).read_bytes())
        data[len(data) // 2] ^= 4
        path(name).write_bytes(data)

    os.mkfifo(path("fifo"))
    # Configurations.
    path("not_python").write_text("{no python")
    path("no_get_config").write_text("x = 1\n")
    path("raises").write_text("def get_config(variant=None):\n    return 1 / 0\n")
    path("returns_none").write_text("def get_config(variant=None):\n    pass\n")
    path("lacks_fields").write_text(
        "import inspect, ml_collections\n"
        "def get_config(variant=None):\n"
        "    name = [f.frame.f_locals.get('name') for f in inspect.stack()]\n"
        "    name = next(n for n in name if isinstance(n, str))\n"
        "    return ml_collections.ConfigDict({'experiment': name, 'variant': 'x'})\n"
    )
    # Images and folders of images.
    picture("rgb.png", images[0])
    picture("grey.png", images[0, ..., 0])
    path("text.png").write_text("no image")
    path("empty.png").write_bytes(b"")
    truncate("rgb.png", "truncated.png")
    path("folder.png").mkdir()
    _write_huge_png(path("huge.png"))
    Image.fromarray(np.float32(images[0, ..., 0])).save(path("float.tif"))
    path("empty_folder").mkdir()
    path("a_file.txt").write_text("x")
    pictures("flat", range(24))
    pictures("one_image", [0])
    for name in ("two_classes", "class_missing_in_test", "class_empty_in_test"):
        prefix = "" if name == "two_classes" else "train/"
        pictures(f"{name}/{prefix}cat", range(12))
        pictures(f"{name}/{prefix}dog", range(12, 24))
    pictures("class_missing_in_test/test/dog", range(12, 16))
    pictures("class_empty_in_test/test/dog", range(12, 16))
    path("class_empty_in_test/test/cat").mkdir()
    path("text_only/a.txt").write_text("x")
    for name in ("mixed_sizes", "zero_bytes", "truncated", "not_images", "broken_link"):
        pictures(f"{name}/cat", range(6))
        pictures(f"{name}/dog", range(6, 12))
    picture("mixed_sizes/cat/zz.png", images[0, :5])
    path("zero_bytes/cat/zz.png").write_bytes(b"")
    truncate("rgb.png", "truncated/cat/zz.png")
    path("not_images/cat/zz.png").write_text("no image")
    path("broken_link/cat/zz.png").symlink_to("/nowhere/x.png")
    pictures("mixed_levels", range(6))
    pictures("mixed_levels/cat", range(6, 12))
    # .npz data sets.
    labels = np.arange(24) % 3
    good = {"image": images, "label": labels}

    def both(name, test=None, **changes):
        for split in ("train", "test"):
            arrays = good | changes | ((test or {}) if split == "test" else {})
            np.savez(path(f"{name}/{split}.npz"), **arrays)

    both("npz_good")
    np.savez(path("npz_no_test/train.npz"), **good)
    for name in (
        "text",
        "truncated",
        "flipped",
        "is_folder",
        "huge_header",
        "other_names",
    ):
        both(f"npz_{name}")
    path("npz_text/train.npz").write_text("x")
    truncate("npz_good/train.npz", "npz_truncated/train.npz")
    flip("npz_good/train.npz", "npz_flipped/train.npz")
    path("npz_is_folder/test.npz").unlink()
    path("npz_is_folder/test.npz").mkdir()
    _write_huge_npz(path("npz_huge_header/train.npz"), "image", "|u1", labels=labels)
    np.savez(path("npz_other_names/train.npz"), images=images, labels=labels)
    both("npz_pickle", image=evil_array)
    both("npz_float", image=np.float32(images))
    both("npz_3d", image=images[..., 0])
    both("npz_label_strings", label=labels.astype(str))
    both("npz_label_onehot", label=np.eye(3)[labels])
    both("npz_label_short", label=labels[:5])
    both("npz_label_float", label=labels + 0.5)
    both("npz_label_wraps", label=np.uint32(labels) + np.uint32(2**32 - 3))
    both("npz_label_negative", label=labels - 7)
    both("npz_label_2e9", label=labels + 2_000_000_000)
    both("npz_empty", image=images[:0], label=labels[:0])
    both("npz_sizes_differ", {"image": images[:, :5]})
    both("npz_channels_differ", {"image": images[..., :1]})
    _make_functasets(path, labels, evil_array, truncate, flip)
    # Checkpoint files.
    path("evil.pt").write_bytes(evil)
    for name, header in (
        ("huge", b"\xff" * 8),
        ("text", struct.pack("<Q", 6) + b"{no js"),
    ):
        path(f"header_{name}.safetensors").write_bytes(header)
    # Runs.
    for name in (*_BAD_RUNS, *_BAD_STATES):
        if name.startswith(("run_", "state_")):
            shutil.copytree(run, folder / name)
            _damage(folder / name, name.partition("_")[2])


def make_weights(folder: Path, model: Path) -> None:
    """Writes damaged copies of a file that train_vit wrote."""
    with np.load(model) as file:
        arrays = dict(file)
    data = model.read_bytes()
    (folder / "truncated_vit.npz").write_bytes(data[: len(data) // 2])
    name = max(arrays, key=lambda name: arrays[name].size)
    values = arrays[name]
    for change, changed in (
        ("nan", {name: np.full_like(values, np.nan)}),
        ("other_rank", {name: values.ravel()}),
        ("strings", {name: values.astype(str)}),
    ):
        np.savez(folder / f"vit_{change}.npz", **(arrays | changed))
    np.savez(folder / "vit_lacks.npz", **{k: v for k, v in arrays.items() if k != name})


def _make_functasets(path, labels, evil_array, truncate, flip):
    rng = np.random.default_rng(1)
    num, size = len(labels), 8
    latent = np.float32(rng.normal(size=(num, size)))
    model = {"type": "LatentModulatedSiren", "width": 4, "depth": 2, "latent_dim": size}
    split = np.where(np.arange(num) < 16, "train", "test")
    good = {
        "latent": latent,
        "label": np.int32(labels),
        "psnr": np.full(num, 30, np.float32),
        "split": split,
        "mean": latent.mean(0),
        "std": latent.std(0),
        "config": np.array(json.dumps({"model": model})),
        "params_sha256": np.array("0" * 64),
    }

    def save(name, **changes):
        arrays = {k: v for k, v in (good | changes).items() if v is not None}
        np.savez(path(f"{name}.npz"), **arrays)

    save("functaset_good")
    np.save(path("array.npy"), latent)
    path("text.npz").write_text("x")
    path("empty.npz").write_bytes(b"")
    path("folder.npz").mkdir()
    truncate("functaset_good.npz", "truncated.npz")
    flip("functaset_good.npz", "flipped.npz")
    hole = latent.copy()
    hole[3, 1] = math.nan
    bad_std = good["std"].copy()
    bad_std[0] = -1
    save("lacks_split", split=None)
    save("rank_1", latent=latent[:, 0])
    save("latent_strings", latent=latent.astype(str))
    save("latent_nan", latent=hole)
    save("latent_inf", latent=np.where(np.isnan(hole), np.inf, hole))
    save("latent_pickle", latent=evil_array)
    save("label_float", label=labels + 0.5)
    save("label_2e9", label=np.where(labels == 0, 2_000_000_000, labels))
    save("label_negative", label=labels - 1)
    save("label_one_class", label=0 * labels)
    save("label_short", label=labels[:5])
    save("split_unknown", split=np.full(num, "val"))
    save("split_no_test", split=np.full(num, "train"))
    save("split_bytes", split=np.arange(num))
    save("mean_nan", mean=np.full(size, np.nan, np.float32))
    save("std_nan", std=np.full(size, np.nan, np.float32))
    save("std_negative", std=bad_std)
    save("config_list", config=np.array("[1]"))
    save("config_bad", config=np.array("{no"))
    save("config_deep", config=np.array("[" * 100_000))
    save("no_rows", **{k: good[k][:0] for k in ("latent", "label", "psnr", "split")})
    others = {k: v for k, v in good.items() if k != "latent"}
    _write_huge_npz(path("huge_header.npz"), "latent", "<f4", **others)


def _write_huge_npz(path, name, dtype, **arrays):
    """An .npz with one member whose header claims 10**12 rows."""
    np.savez(path, **arrays)
    header = io.BytesIO()
    shape = (10**12, 8)
    np.lib.format.write_array_header_1_0(
        header, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{name}.npy", header.getvalue())


def _write_huge_png(path):
    """A black and white image of 400 million pixels in a small file."""

    def chunk(kind, data):
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    side = 20_000
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((1 + side // 8) * side), 1)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", rows)
        + chunk(b"IEND", b"")
    )


def _damage(run, name):
    """Damages a copy of a run as its name says."""
    import shutil

    config = json.loads((run / "config.json").read_text())
    kind, _, how = name.partition("_")
    texts = {"text": "{no", "list": "[1]", "deep": "[" * 100_000, "empty": ""}
    files = {
        "config": "config.json",
        "summary": "summary.json",
        "inputs": "inputs.json",
    }
    if kind in files and how in texts:
        (run / files[kind]).write_text(texts[how])
    elif name == "config_latin1":
        (run / "config.json").write_bytes(b'{"a": "\xff"}')
    elif name == "no_config":
        (run / "config.json").unlink()
    elif name == "no_checkpoints":
        shutil.rmtree(run / "checkpoints")
    elif kind == "checkpoint":
        for path in sorted((run / "checkpoints").rglob("*")):
            if path.is_file() and path.stat().st_size > 0:
                size = path.stat().st_size // 2 if how == "truncated" else 0
                os.truncate(path, size)
    elif name == "other_experiment":
        changed = config | {"experiment": "nosuch"}
        (run / "config.json").write_text(json.dumps(changed))
    elif name == "other_config":
        config["model"]["width"] = 17
        (run / "config.json").write_text(json.dumps(config))
    elif kind == "metrics":
        (run / "summary.json").unlink()
        lines = (run / "metrics.jsonl").read_text().splitlines()
        lines[0] = "{no" if how == "middle" else "[1]"
        (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
