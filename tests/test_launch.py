"""The command line: options, errors of a user and errors of ours, --help."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments.common import launch, settings
from experiments.configs import meta_learn as configs
from experiments.training import optimizers

ROOT = Path(__file__).parents[1]
FILE = str(ROOT / "experiments/configs/meta_learn.py")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (f"--config={FILE}:digit", "'digit' must be one of digits, smoke"),
        ("--config=cifar10_cpu", "cifar10_cpu does not exist.* variants are digits, "),
        ("--config=/dev/zero", "/dev/zero is not a file"),
        ("--config=", "--config=:  is not a file"),
        ("--config.init_from=", "init_from must be a string that is not empty"),
        (f"--config={ROOT}/experiments/configs/fit_image.py", "got one of fit_image"),
        (f"--config={ROOT}/README.md", "README.md: SyntaxError"),
        ("--confg=x", "Unknown command line flag 'confg'. Did you mean: config"),
        ("stray", "unexpected arguments: stray"),
        ("--process_id=1", "need --multihost"),
        ("--config.num_stepz=3", r"no field num_stepz. Did you mean num_steps\?"),
        ("--config.inner.num_stps=3", "Did you mean num_steps.* inner has num_steps, "),
        ("--config.num_steps.x=3", "num_steps is no entry"),
        ("--config.num_steps=many", "num_steps must be an integer, got 'many'"),
        ("--config.num_steps", "num_steps must be an integer, got 'True'"),
        ("--config.seeds=(1.5,)", r"seeds must be a tuple of integers, got '\(1.5,\)'"),
        ("--config.write_functaset=maybe", "write_functaset must be true or false"),
        ("--config.optimizer=3", "optimizer must be a dict"),
        ("--config.optimizer={'name': 'sgd'}", "has no field optimizer.options"),
    ],
)
def test_mistakes_are_named(argument, message):
    with pytest.raises(ValueError, match=message) as caught:
        launch.parse("meta_learn", [argument])
    assert launch.is_of_user(caught.value)  # one line, without a traceback


def test_options_set_fields():
    config, options = launch.parse(
        "meta_learn",
        [
            *(f"--config={FILE}:smoke", "--workdir=x", "--noconfig.write_functaset"),
            *("--config.seeds=3", "--config.optimizer.options.b2=0.9"),
            *("--config.num_steps", "7", "--config.inner.rate_clip=(0, 1)"),
            *("--config.init_from=run", "--config.tensorboard"),
        ],
    )
    assert (config.variant, options.workdir, config.seeds) == ("smoke", "x", (3,))
    assert config.optimizer.options.b2 == 0.9 and config.num_steps == 7
    assert config.inner.rate_clip == (0, 1) and config.init_from == "run"
    assert config.tensorboard and not config.write_functaset
    assert launch.parse("meta_learn", ["--config.init_from=None"])[0].init_from is None
    with pytest.raises(ValueError, match="seeds is given twice"):
        launch.parse("meta_learn", ["--config.seeds=1", "--config.seeds=2"])


def test_help_lists_variants_and_fields():
    text = launch.describe("meta_learn")
    for variant in configs.VARIANTS:
        assert f"  {variant}:" in text
    for field in settings.flatten(configs.get_config().to_dict()):
        if field not in ("experiment", "variant"):
            assert f"--config.{field}=" in text
    assert "--config.optimizer.ema_decay=0.0  (in [0, 1))" in text


def test_workdir_is_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    assert launch.find_workdir(tmp_path / "x") == tmp_path / "x"
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="file is a file, not a folder"):
            launch.find_workdir(path)
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match="link is a link to .*gone, which does not"):
        launch.find_workdir(tmp_path / "link" / "below")
    with pytest.raises(ValueError, match="--workdir must name a folder"):
        launch.find_workdir("")


@pytest.mark.parametrize(
    ("cause", "is_of_user"),
    [
        (lambda: settings.build("x", {}, {"a": {}}, "b"), True),  # a check of ours
        (lambda: np.zeros(3).reshape(2), False),  # a check that we lack
        (lambda: list(zip([1], [], strict=True)), False),
        (lambda: {}["a"], False),
        (lambda: open("/nowhere"), True),
        (lambda: np.empty(10**15), True),
    ],
)
def test_errors_are_told_apart_by_where_they_are_raised(cause, is_of_user):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        cause()
    assert launch.is_of_user(caught.value) == is_of_user
    assert "\n" not in launch.one_line(caught.value)


def test_interrupt_during_imports_is_one_line():
    # As `python -m experiments.NAME` imports the package.
    script = "import sys; sys.argv = ['-m']; import experiments; raise {}"
    for error, lines in (("KeyboardInterrupt", 1), ("RuntimeError", 4)):
        command = [sys.executable, "-c", script.format(error)]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert ended.returncode != 0
        assert len(ended.stderr.splitlines()) <= lines
        assert ("interrupted" in ended.stderr) == (lines == 1)


@pytest.mark.slow
def test_closed_output_and_devices_that_are_not_there_are_one_line():
    script = (
        "from experiments.common import launch\n"
        "launch.launch('scaling', lambda config, workdir: print('x' * 2**20))"
    )
    for head, changes, message in (
        ("| true", {}, "nobody reads the output"),
        ("", {"JAX_PLATFORMS": "nosuch"}, "JAX_PLATFORMS or the devices: .*nosuch"),
    ):
        ended = subprocess.run(
            ["bash", "-c", f'{sys.executable} -c "$SCRIPT" {head}'],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=os.environ | {"SCRIPT": script} | changes,
        )
        [line] = ended.stderr.splitlines()
        assert re.match(f"error: {message}", line)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "nosuch"}, "optimizer.name: optax has no optimizer 'nosuch'"),
        ({"name": "chain"}, "optimizer.name: "),
        ({"name": "cosine_decay_schedule"}, "optimizer.name: .*decay_steps"),
        ({"name": "lbfgs"}, "optimizer.name: .*value"),  # needs more than gradients
        ({"options": {"b2": 1.0}}, r"optimizer.options.b2 must be in \[0, 1\), got 1"),
        ({"options": {"eps": -1}}, "optimizer.options.eps must be at least 0"),
        ({"options": {"nosuch": 1}}, "optimizer.options: .*nosuch"),
    ],
)
def test_optimizers_are_checked_before_use(changes, message):
    config = ConfigDict(
        {
            "name": "adam",
            "options": {},
            "learning_rate": 0.1,
            "schedule": "constant",
            "warmup_steps": 0,
        }
        | changes
    )
    with pytest.raises(ValueError, match=message) as caught:
        optimizers.make_optimizer(config, 3)
    assert launch.is_of_user(caught.value)


def test_out_of_memory_of_jax_is_of_the_machine():
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 8 TB")
    assert launch.is_of_user(error)
    assert launch.one_line(error).startswith("out of memory: ")
