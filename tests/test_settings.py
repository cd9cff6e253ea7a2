"""Configurations as data: variants, optional fields, rules."""

import importlib
from pathlib import Path

import pytest

from experiments.common import settings
from experiments.configs import report

BASE = {
    "rate": 0.1,
    "sizes": (1, 2),
    "path": settings.Optional(str),
    "model": {"type": "A", "width": 3},
}
VARIANTS = {
    "first": {},
    "second": {"model.width": 5, "path": "x"},
    "third": {"model": {"type": "B", "depth": 7}},
}


def build(variant=None):
    return settings.build("none", BASE, VARIANTS, variant)


def test_variants():
    assert build().variant == "first" and build().path is None
    second, third = build("second"), build("third")
    assert second.model.to_dict() == {"type": "A", "width": 5} and second.path == "x"
    assert third.model.to_dict() == {"type": "B", "depth": 7}
    # A field that may be None takes only values of its type.
    second.path = None
    second.path = "y"
    with pytest.raises(TypeError):
        second.path = 3


def test_configs_share_nothing():
    one, two = build(), build()
    one.model.width, one.path = 9, "z"
    assert two.model.width == 3 and two.path is None and BASE["model"]["width"] == 3


def test_unknown_variant_and_field():
    with pytest.raises(
        ValueError, match="'fourth' must be one of first, second, third"
    ):
        build("fourth")
    with pytest.raises(ValueError, match="unknown field 'model.hight'"):
        settings.build("none", BASE, {"x": {"model.hight": 1}})


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        (settings.at_least(1), (1, 2.5), (0, float("nan"), float("inf"), "1")),
        (settings.above(0), (0.1,), (0, -1)),
        (settings.within("[0, 1)"), (0, 0.5), (1, -0.1, None)),
        (settings.within("(0, 1]"), (1,), (0, 1.1)),
        (settings.one_of("a", "b"), ("a",), ("c", None)),
        (settings.each(settings.at_least(1)), ((1, 2),), ((), (0,), 3)),
        (settings.each(settings.at_least(1), empty=True), ((),), ((0,),)),
        (settings.optional(settings.at_least(1)), (None, 2), (0,)),
        (settings.SEEDS, ((0, 7),), ((), (-1,), (2**64,), 3, (1, 1), (0.5,))),
        (settings.whole(1), (1, 2**31 - 1), (0, 1.0, True, "1", 2**31)),
        (settings.whole(1, 9), (9,), (10,)),
        (settings.pair(settings.at_least(0)), ((0, 1),), ((1, 0), (0, 0), (-1, 1), 3)),
        (settings.pair(settings.FINITE, equal=True), ((-1, -1),), ((0, float("nan")),)),
        (settings.distinct(settings.one_of("a", "b")), (("b", "a"),), (("a", "a"), ())),
        (report.RULES["run"], (("all",), ()), ((1,), ("nosuch",))),
    ],
)
def test_rules(rule, good, bad):
    for value, is_good in [(v, True) for v in good] + [(v, False) for v in bad]:
        config = {"a": {"b": value}}
        if is_good:
            settings.check(config, {"a.b": rule})
        else:
            with pytest.raises(ValueError, match="a.b must be .* got"):
                settings.check(config, {"a.b": rule})


def test_star_checks_every_field():
    rules = {"a.*.x": settings.at_least(1)}
    settings.check({"a": {"p": {"x": 1}, "q": {"x": 2}}}, rules)
    with pytest.raises(ValueError, match=r"a.q.x must be at least 1, got 0\."):
        settings.check({"a": {"p": {"x": 1}, "q": {"x": 0}}}, rules)


def test_every_number_is_finite_without_a_rule():
    for bad in (float("nan"), -float("inf"), 2**64):
        for value in (bad, (1.0, bad)):
            with pytest.raises(ValueError, match="a.b must be finite and below"):
                settings.check({"a": {"b": value}}, {})


def test_tensorboard_needs_its_package(monkeypatch):
    settings.check({"tensorboard": False}, {})
    monkeypatch.setattr(settings.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install tensorboardX"):
        settings.check({"tensorboard": True}, {})


def test_missing_fields_are_named():
    with pytest.raises(ValueError, match="has no field a.c"):
        settings.check({"a": {"b": 1}}, {"a.c": settings.at_least(0)})
    base = {"a": {"b": 1, "c": 2}, "options": settings.Open(x=1)}
    settings.check_fields({"a": {"b": 3, "c": 4}, "options": {"y": 1}}, base)
    with pytest.raises(ValueError, match="has no field a.c"):
        settings.check_fields({"a": {"b": 3}, "options": {}}, base)
    with pytest.raises(ValueError, match="no field a.d"):
        settings.check_fields({"a": {"b": 3, "c": 4, "d": 5}, "options": {}}, base)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("count", (2,), (2.0, True, "2", None)),
        ("rate", (2, 0.5), ("2", None)),
        ("flag", (True,), (1, "yes", None)),
        ("name", ("x",), ("", 3, None)),
        ("path", ("x", None), ("", 3)),
        ("sizes", ((3,), [3], ()), (3, (3.5,), ("a",), None)),
        ("model.width", (3,), ({"a": 1}, "3")),
        ("options.x", (None, (1,), "a"), ("",)),
    ],
)
def test_fields_have_the_kind_of_their_default(name, good, bad):
    base = {
        **{"count": 1, "rate": 0.1, "flag": False, "name": "a", "sizes": (1, 2)},
        **{"path": settings.Optional(str), "model": {"width": 1}},
        "options": settings.Open(),
    }
    for value, is_good in [(v, True) for v in good] + [(v, False) for v in bad]:
        config = settings.build("none", base, {"first": {}})
        with config.ignore_type():
            config.update_from_flattened_dict({name: value})
        if is_good:
            settings.check_fields(config, base)
        else:
            with pytest.raises(ValueError, match=name):
                settings.check_fields(config, base)


def test_no_field_is_within_a_value():
    base = {"options": settings.Open(x=1)}
    config = settings.build("none", base, {"first": {}})
    for name in ("options.x.y", "options.a.b"):
        with pytest.raises(ValueError, match=f"no field {name}: .* is no entry"):
            settings.set_field(config, name, "1", base)


def test_variants_have_fields_of_the_right_kinds():
    for path in (Path(__file__).parents[1] / "experiments/configs").glob("[!_]*.py"):
        module = importlib.import_module(f"experiments.configs.{path.stem}")
        for variant in module.VARIANTS:
            settings.check_fields(module.get_config(variant), module.BASE)


def test_errors_of_a_library_name_the_field():
    with (
        pytest.raises(ValueError, match=r"model: .*unexpected keyword argument 'y'"),
        settings.blamed_on("model"),
    ):
        (lambda x: x)(y=1)
    with pytest.raises(FileNotFoundError), settings.blamed_on("model"):
        open("/nowhere")


def test_names_of_fields_are_strings():
    with pytest.raises(ValueError, match="entry: 1 is not the name of a field"):
        settings.flatten({"entry": {1: 2}})
