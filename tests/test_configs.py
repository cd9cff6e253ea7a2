"""Every command's configuration: all variants load, and `smoke` needs no download."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = sorted(
    path.stem
    for path in (ROOT / "experiments" / "configs").glob("*.py")
    if path.stem != "__init__"
)


@pytest.mark.parametrize("name", NAMES)
def test_variants(name):
    module = importlib.import_module(f"experiments.configs.{name}")
    for variant in module.VARIANTS:
        config = module.get_config(variant)
        assert (config.experiment, config.variant) == (name, variant)
        # Documented, and what a run folder can keep.
        assert f"{variant}" in module.get_config.__doc__
        json.loads(config.to_json_best_effort())
    with pytest.raises(ValueError, match="variant 'nothing' is none of"):
        module.get_config("nothing")
    smoke = module.get_config("smoke")
    assert smoke.get("dataset", {}).get("name") in (None, "digits", "photograph")


@pytest.mark.parametrize("name", NAMES)
def test_command_exists(name):
    assert callable(importlib.import_module(f"experiments.{name}").train_and_evaluate)
