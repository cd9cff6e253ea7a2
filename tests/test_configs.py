"""Configurations of all commands: all variants load; `smoke` needs no download."""

import importlib
import json
from pathlib import Path

import pytest

from experiments.common import settings

ROOT = Path(__file__).parents[1]
NAMES = sorted(
    path.stem
    for path in (ROOT / "experiments" / "configs").glob("*.py")
    if path.stem != "__init__"
)


@pytest.mark.parametrize("name", NAMES)
def test_variants(name):
    module = importlib.import_module(f"experiments.configs.{name}")
    assert module.get_config().variant == next(iter(module.VARIANTS))
    for variant in module.VARIANTS:
        config = module.get_config(variant)
        assert (config.experiment, config.variant) == (name, variant)
        # Documented, within the rules, and what a run folder can keep.
        assert variant in module.__doc__
        settings.check(config, module.RULES)
        settings.check_fields(config, module.BASE)
        json.loads(config.to_json_best_effort())
    with pytest.raises(ValueError, match="variant 'nothing' must be one of"):
        module.get_config("nothing")
    smoke = module.get_config("smoke")
    assert smoke.get("dataset", {}).get("name") in (None, "digits", "photograph")


@pytest.mark.parametrize("name", NAMES)
def test_rules_are_of_fields(name):
    module = importlib.import_module(f"experiments.configs.{name}")
    configs = [module.get_config(), *map(module.get_config, module.VARIANTS)]
    for field, rule in module.RULES.items():
        # Nothing obeys the rule of a field that is not there; only some variants have
        # an optional one.
        never = {field: rule._replace(holds=lambda value: False)}
        with pytest.raises(ValueError, match="must be"):
            for config in configs:
                settings.check(config, never)


@pytest.mark.parametrize("name", NAMES)
def test_command_exists(name):
    assert callable(importlib.import_module(f"experiments.{name}").train_and_evaluate)
