"""The training loop: exact resume, stops, and losses that are not finite."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments.common import runs
from experiments.training import loop

pytestmark = pytest.mark.usefixtures("unoptimized")

CONFIG = ConfigDict({"experiment": "none", "variant": "x"})


def advance(state, start, stop):
    """x -> 3 x + step (mod 1), a chain in which any missed or doubled step shows."""
    losses = []
    for step in range(start, stop):
        losses.append(float(state["x"]))
        state = {"x": (3 * state["x"] + 0.1 * step) % 1}
    return state, losses, {"stop": float(stop)}


def train(workdir, advance=advance, **options):
    with runs.open_run(workdir, CONFIG) as run:
        state = loop.train(
            run,
            {"x": jnp.float32(0.7)},
            advance,
            **{"stops": STOPS, "saves": SAVES} | options,
        )
        return float(state["x"]), run.metrics()


STOPS = loop.every(20, 3, 7)
SAVES = loop.every(20, 5)


def without_time(metrics):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in metrics]


def test_every():
    assert loop.every(10, 4, 5) == {4, 5, 8, 10}
    assert loop.every(3, 100) == {3}
    assert loop.every(0, 2) == set()


def test_matches_a_plain_loop(tmp_path):
    x, losses = np.float32(0.7), []
    for step in range(20):
        losses.append(x)
        x = np.float32((3 * x + np.float32(0.1 * step)) % 1)
    value, metrics = train(tmp_path)
    assert value == pytest.approx(float(x), abs=1e-5)
    stops = sorted(STOPS | SAVES)
    assert [line["step"] for line in metrics] == stops
    first = 0
    for line in metrics:
        assert line["loss"] == pytest.approx(
            np.mean(losses[first : line["step"]]), abs=1e-5
        )
        first = line["step"]


@pytest.mark.slow_after(4)
@pytest.mark.parametrize("killed_at", sorted(STOPS | SAVES))
def test_resumed_run_ends_like_an_uninterrupted_one(tmp_path, killed_at):
    whole = train(tmp_path / "whole")

    def killed(state, start, stop):
        if stop == killed_at:
            raise KeyboardInterrupt
        return advance(state, start, stop)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", killed)
    steps = []

    def counted(state, start, stop):
        steps.extend(range(start, stop))
        return advance(state, start, stop)

    value, metrics = train(tmp_path / "killed", counted)
    assert value == whole[0]
    assert without_time(metrics) == without_time(whole[1])
    # It goes on from the last checkpoint, and no step is done twice after it.
    last_save = max((s for s in SAVES if s < killed_at), default=0)
    assert steps == list(range(last_save, 20))


def test_finished_training_is_not_repeated(tmp_path):
    whole = train(tmp_path)

    def never(state, start, stop):
        raise AssertionError("the training is finished.")

    assert train(tmp_path, never)[0] == whole[0]


def test_measures_before_the_first_step_once(tmp_path):
    def measured(state, start, stop):
        if start == stop:
            return state, [], {"stop": 0.0}
        if stop == 3 and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            raise KeyboardInterrupt
        return advance(state, start, stop)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", measured, stops={0} | STOPS)
    _, metrics = train(tmp_path / "run", measured, stops={0} | STOPS)
    assert [line["step"] for line in metrics] == sorted({0} | STOPS | SAVES)


def test_no_steps_leave_the_state_alone(tmp_path):
    assert train(tmp_path, stops=(), saves=())[0] == pytest.approx(0.7)


def test_loss_that_is_not_finite_names_its_step(tmp_path):
    def diverges(state, start, stop):
        losses = np.arange(start, stop, dtype=np.float32)
        losses[losses == 8] = np.nan
        return state, losses, {}

    with pytest.raises(ValueError, match="the loss is nan at step 9"):
        train(tmp_path / "a", diverges)
    # Nothing of what followed the last finite loss is kept.
    lines = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] < 9
    _, metrics = train(tmp_path / "b", diverges, may_diverge=True)
    assert metrics[-1]["step"] == 20
