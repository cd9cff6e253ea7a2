"""DessiLBI as an optax transformation: with optax, jit, vmap, devices, checkpoints.

The tests compare two runs of this code; tests/test_dessilbi.py has the oracles.
"""

import math
import re
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dessilbi_runs import CURVATURE, coupling_of, quadratic, run, tensors
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lbi
from lbi import L1, GroupL2

pytestmark = pytest.mark.usefixtures("unoptimized")

ROOT = Path(__file__).resolve().parents[1]


def jit_once(function):
    """jax.jit that fails when it compiles for a second time."""
    traced = []

    def counted(*args):
        traced.append(None)
        assert len(traced) == 1, "compiled again"
        return function(*args)

    return jax.jit(counted)


def test_bfloat16_weights_have_a_float32_dual():
    params = {"kernel": jnp.full((2, 3), 0.75, jnp.bfloat16)}
    grads = jax.tree.map(jnp.ones_like, params)
    optimizer = lbi.dessilbi(1e-3, nu=10.0, momentum=0)
    opt_state = optimizer.init(params)

    @jax.jit
    def freeze(opt_state):
        def step(opt_state, _):
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return opt_state, updates

        return jax.lax.scan(step, opt_state, length=2000)

    opt_state, updates = freeze(opt_state)
    assert updates["kernel"].dtype == jnp.bfloat16
    # -alpha (g + W / nu), to the three digits of bfloat16.
    np.testing.assert_allclose(np.float32(updates["kernel"]), -1.075e-3, rtol=1e-2)
    dual = coupling_of(opt_state).dual["kernel"]
    assert dual.dtype == jnp.float32
    # In bfloat16 it would stop after some 256 of the 2,000 increments. A thousandth
    # of an increment is lost at each addition in float32.
    np.testing.assert_allclose(dual, 2000 * 1e-3 / 10 * 0.75, rtol=1e-4)


def chain_with(record_entry=True, **settings):
    settings = {"penalty": {"conv": GroupL2(0.4), "fc": L1(0.2)}} | settings
    return lbi.dessilbi(0.1, nu=1.0, record_entry=record_entry, **settings)


def test_unknown_extra_arguments_are_accepted():
    optimizer, params = chain_with(), tensors()
    opt_state = optimizer.init(params)
    plain = optimizer.update(params, opt_state, params)
    extra = optimizer.update(params, opt_state, params, value=1.0, unknown=None)
    chex.assert_trees_all_equal(extra, plain)


def test_state_is_stable_and_compiled_once():
    optimizer, params = chain_with(), tensors()
    step = jit_once(optimizer.update)
    opt_state = first = optimizer.init(params)
    for _ in range(3):
        updates, opt_state = step(params, opt_state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(opt_state, first)
    chex.assert_trees_all_equal_structs(opt_state, first)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    state = coupling_of(opt_state)
    assert state.count == 3 and state.count.dtype == jnp.int32
    assert state.clock.dtype == state.kappa.dtype == jnp.float32
    chex.assert_trees_all_equal_shapes_and_dtypes(state.dual, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        state.first_entry,
        {
            "bias": jnp.zeros((), jnp.int32),
            "conv": jnp.zeros(4, jnp.int32),
            "fc": jnp.zeros((5, 6), jnp.int32),
        },
    )
    assert coupling_of(chain_with(False).init(params)).first_entry == ()
    # What the rules are is part of the structure, whether or not two were made alike.
    again = chain_with().init(params)
    assert jax.tree.structure(again) == jax.tree.structure(first)
    other = chain_with(penalty="auto").init(params)
    assert jax.tree.structure(other) != jax.tree.structure(first)


def test_map_params_finds_the_dual():
    optimizer, params = chain_with(False), tensors()
    opt_state = optimizer.init(params)
    names = {name: name for name in params}
    mapped = optax.tree.map_params(
        optimizer,
        lambda _, name: name,
        opt_state,
        names,
        transform_non_params=lambda _: None,
    )
    state = coupling_of(mapped)
    assert state.dual == names
    assert state.count is state.clock is state.kappa is None
    assert optax.tree.get(mapped, "trace") == names
    chex.assert_trees_all_equal(
        optax.tree.get(opt_state, "dual"), jax.tree.map(jnp.zeros_like, params)
    )


def test_masked_leaves_the_others_alone():
    params, grads = tensors(), tensors(1)
    mask = {"conv": True, "fc": False, "bias": False}
    optimizer = optax.masked(lbi.structural_coupling(1.0, 2.0), mask)
    opt_state = optimizer.init(params)
    for _ in range(3):
        updates, opt_state = optimizer.update(grads, opt_state, params)
    alone = lbi.structural_coupling(1.0, 2.0)
    conv, state = {"conv": params["conv"]}, alone.init({"conv": params["conv"]})
    for _ in range(3):
        expected, state = alone.update({"conv": grads["conv"]}, state, conv)
    chex.assert_trees_all_equal(updates, grads | expected)
    masked = optax.MaskedNode()
    chex.assert_trees_all_equal(
        lbi.gamma(opt_state), lbi.gamma(state) | {"fc": masked, "bias": masked}
    )


def test_partition_takes_two_couplings():
    params = tensors()
    labels = {"conv": "filters", "fc": "weights", "bias": "rest"}
    filters = lbi.dessilbi(0.5, nu=1.0, penalty=GroupL2(3.0))
    weights = lbi.dessilbi_adam(0.3, nu=2.0, penalty=L1(0.1))
    rest = optax.sgd(0.1)
    optimizer = optax.partition(
        {"filters": filters, "weights": weights, "rest": rest}, labels
    )
    opt_state = optimizer.init(params)
    step = jax.jit(optimizer.update)
    for _ in range(3):
        updates, opt_state = step(params, opt_state, params)
    gamma = lbi.gamma(opt_state)
    for name, alone in (("conv", filters), ("fc", weights)):
        one = {name: params[name]}
        state = alone.init(one)
        for _ in range(3):
            expected, state = jax.jit(alone.update)(one, state, one)
        chex.assert_trees_all_close(updates[name], expected[name], rtol=1e-6)
        assert 0 < np.count_nonzero(gamma[name]) < gamma[name].size
        chex.assert_trees_all_close(gamma[name], lbi.gamma(state)[name], rtol=1e-6)
    chex.assert_trees_all_equal(updates["bias"], -0.1 * params["bias"])
    assert gamma["bias"] == optax.MaskedNode()


INJECTED = {
    "structural_coupling": (lbi.structural_coupling, "dual_learning_rate"),
    "dessilbi": (lbi.dessilbi, "learning_rate"),
    "dessilbi_adam": (lbi.dessilbi_adam, "learning_rate"),
}


@pytest.mark.parametrize(("make", "rate"), INJECTED.values(), ids=INJECTED.keys())
def test_hyperparameters_may_be_injected(make, rate):
    params, grads = tensors(), tensors(1)
    settings = {"penalty": {"conv": GroupL2(0.4), "fc": L1(0.2)}}
    before, after = {rate: 0.5, "nu": 1.0}, {rate: 0.25, "nu": 4.0}
    optimizer = optax.inject_hyperparams(make)(**before, **settings)
    step = jit_once(optimizer.update)
    opt_state = optimizer.init(params)
    _, opt_state = step(grads, opt_state, params)
    opt_state.hyperparams.update({k: jnp.float32(v) for k, v in after.items()})
    updates, opt_state = step(grads, opt_state, params)

    _, expected = make(**before, **settings).update(
        grads, make(**before, **settings).init(params), params
    )
    state = coupling_of(expected)
    coupling = lbi.structural_coupling(0.25, 4.0, **settings)
    pull, state = coupling.update(jax.tree.map(jnp.zeros_like, grads), state, params)
    chex.assert_trees_all_close(coupling_of(opt_state).dual, state.dual, rtol=1e-6)
    assert coupling_of(opt_state).clock == 0.5 / 1 + 0.25 / 4
    assert any(np.any(leaf) for leaf in jax.tree.leaves(lbi.gamma(state)))
    # W's step at the second update, from the pull and the base alone.
    if make is lbi.structural_coupling:
        direction, size = grads, 1.0
    elif make is lbi.dessilbi:
        direction, size = jax.tree.map(lambda g: 1.9 * g, grads), -0.25
    else:
        # A constant gradient is what Adam divides by its size.
        direction, size = jax.tree.map(jnp.sign, grads), -0.25
    chex.assert_trees_all_close(
        updates,
        jax.tree.map(lambda d, p: size * (d + p), direction, pull),
        rtol=1e-5,
        atol=1e-6,
    )


def test_injected_hyperparameters_may_be_donated():
    params = {"kernel": jnp.ones((2, 3))}
    optimizer = optax.inject_hyperparams(lbi.dessilbi)(0.1, 1.0, kappa=2.0)
    step = jax.jit(optimizer.update, donate_argnums=1)
    _, state = step(params, optimizer.init(params), params)
    assert coupling_of(state).kappa == 2


def test_accumulated_gradients_equal_the_large_batch():
    rng = np.random.default_rng(0)
    params = tensors()
    micro = [
        jax.tree.map(
            lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params
        )
        for _ in range(6)
    ]
    inner = chain_with(penalty={"conv": GroupL2(0.3), "fc": L1(0.1)})
    optimizer = optax.MultiSteps(inner, 3)
    step, big_step = jax.jit(optimizer.update), jax.jit(inner.update)
    small, opt_state = params, optimizer.init(params)
    large, expected = params, inner.init(params)
    for start in (0, 3):
        for grads in micro[start : start + 3]:
            before = coupling_of(opt_state)
            updates, opt_state = step(grads, opt_state, small)
            small = optax.apply_updates(small, updates)
            if grads is not micro[start + 2]:
                # The dual waits for the real update.
                chex.assert_trees_all_equal(coupling_of(opt_state), before)
        mean = jax.tree.map(lambda *g: sum(g) / 3, *micro[start : start + 3])
        updates, expected = big_step(mean, expected, large)
        large = optax.apply_updates(large, updates)
    # Means of three in another order.
    chex.assert_trees_all_close(small, large, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(
        coupling_of(opt_state), coupling_of(expected), rtol=1e-5, atol=1e-6
    )
    assert coupling_of(opt_state).count == 2


def test_dual_pauses_with_an_update_that_is_not_finite():
    params, grads = tensors(), tensors(1)
    bad = grads | {"bias": grads["bias"].at[0].set(jnp.nan)}
    optimizer = optax.apply_if_finite(chain_with(), max_consecutive_errors=5)
    step = jax.jit(optimizer.update)
    _, once = step(grads, optimizer.init(params), params)
    updates, paused = step(bad, once, params)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
    chex.assert_trees_all_equal(coupling_of(paused), coupling_of(once))
    _, resumed = step(grads, paused, params)
    _, twice = step(grads, once, params)
    chex.assert_trees_all_equal(coupling_of(resumed), coupling_of(twice))
    assert coupling_of(twice).count == 2


def test_seeds_run_side_by_side():
    starts = [tensors(seed) for seed in range(3)]
    optimizer, target = chain_with(), tensors(9)

    @jax.jit
    def train(params):
        (_, opt_state), _ = run(optimizer, params, quadratic(CURVATURE, target), 8)
        return opt_state, lbi.gamma(opt_state), lbi.density(opt_state)

    together = jax.vmap(train)(jax.tree.map(lambda *x: jnp.stack(x), *starts))
    alone = [train(start) for start in starts]
    densities = [float(each[2]["fc"]) for each in alone]
    assert len(set(densities)) > 1 and 0 < min(densities)
    expected = jax.tree.map(lambda *x: jnp.stack(x), *alone)
    chex.assert_trees_all_close(together, expected, rtol=1e-5, atol=1e-6)


def check_sharded_equals_one_device(num_devices):
    """On the axis of the input channels and on that of the groups.

    Also run on its own in another process.
    """
    assert len(jax.devices()) == num_devices
    mesh = jax.make_mesh((num_devices,), ("x",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)
    start, target = (
        {
            "conv": jnp.asarray(rng.normal(size=(2, 3, 16, 8)), jnp.float32),
            "fc": jnp.asarray(rng.normal(size=(8, 16)), jnp.float32),
        }
        for _ in range(2)
    )
    penalty = {"conv": GroupL2(3.0), "fc": GroupL2(0.8, size_scaled=True)}
    optimizer = lbi.dessilbi(0.1, nu=1.0, penalty=penalty, record_entry=True)

    def train(start, target):
        def step(params, opt_state):
            grads = quadratic({"conv": 0.5, "fc": 1.0}, target)(params, 0)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        params, opt_state = start, optimizer.init(start)
        step = jax.jit(step)
        for _ in range(10):
            params, opt_state = step(params, opt_state)
        return params, opt_state

    params, opt_state = train(start, target)
    steps = lbi.entry_steps(opt_state)
    assert all(len(set(each)) > 1 for each in steps.values())
    layouts = {
        "input channels": {"conv": P(None, None, "x"), "fc": P("x")},
        "groups": {"conv": P(None, None, None, "x"), "fc": P(None, "x")},
    }
    for layout in layouts.values():
        placed = [
            {k: jax.device_put(v, NamedSharding(mesh, layout[k])) for k, v in x.items()}
            for x in (start, target)
        ]
        sharded_params, sharded_state = train(*placed)
        dual = coupling_of(sharded_state).dual
        for name, leaf in dual.items():
            shard = leaf.sharding.shard_shape(leaf.shape)
            assert math.prod(shard) == leaf.size // num_devices
            assert leaf.sharding.is_equivalent_to(placed[0][name].sharding, leaf.ndim)
        # Norms are summed device by device: float32 rounding.
        chex.assert_trees_all_close(sharded_params, params, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(
            coupling_of(sharded_state).dual,
            coupling_of(opt_state).dual,
            rtol=1e-5,
            atol=1e-6,
        )
        chex.assert_trees_all_equal(lbi.entry_steps(sharded_state), steps)


def check_explicit_equals_one_device(num_devices):
    """With the sharding in the types: whole scans, which need equal types of a carry.

    Also run on its own in another process.
    """
    assert len(jax.devices()) == num_devices
    mesh = jax.make_mesh(
        (2, num_devices // 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2
    )
    rng = np.random.default_rng(0)
    shapes = {"conv": (2, 3, 16, 8), "fc": (8, 16), "bias": (8,)}
    start, target = (
        {name: np.float32(rng.normal(size=shape)) for name, shape in shapes.items()}
        for _ in range(2)
    )
    layout = {"conv": P(None, None, "x", "y"), "fc": P("y", "x"), "bias": P("x")}
    penalty = {"conv": GroupL2(3.0), "fc": GroupL2(0.8, size_scaled=True)}
    once = lbi.dessilbi(0.1, nu=1.0, penalty=penalty, record_entry=True)
    for optimizer in (once, optax.MultiSteps(once, 2)):

        def train(start, target, optimizer=optimizer):
            def step(carry, _):
                params, opt_state = carry
                grads = jax.tree.map(jnp.subtract, params, target)
                updates, opt_state = optimizer.update(grads, opt_state, params)
                params = optax.apply_updates(params, updates)
                return (params, opt_state), lbi.density(opt_state)

            carry = start, optimizer.init(start)
            return jax.lax.scan(step, carry, length=20)

        (params, opt_state), densities = jax.jit(train)(start, target)
        steps = lbi.entry_steps(opt_state)
        assert all(len(set(each)) > 1 for each in steps.values())
        with jax.set_mesh(mesh):
            placed = [
                {k: jax.device_put(v, layout[k]) for k, v in x.items()}
                for x in (start, target)
            ]
            found, found_densities = jax.jit(train)(*placed)
        sharded_params, sharded_state = found
        for tree in (sharded_params, coupling_of(sharded_state).dual):
            for name, leaf in tree.items():
                spec = jax.typeof(leaf).sharding.spec
                assert spec == layout[name]
        # Norms are summed device by device: float32 rounding.
        chex.assert_trees_all_close(
            (sharded_params, lbi.gamma(sharded_state), found_densities),
            (params, lbi.gamma(opt_state), densities),
            rtol=1e-5,
            atol=1e-6,
        )
        chex.assert_trees_all_equal(lbi.entry_steps(sharded_state), steps)


def test_two_devices_equal_one():
    check_sharded_equals_one_device(2)


@pytest.mark.slow
def test_two_devices_in_the_types_equal_one():
    check_explicit_equals_one_device(2)


@pytest.mark.slow
def test_eight_devices_equal_one():
    script = (
        "import jax; jax.config.update('jax_num_cpu_devices', 8); import sys; "
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]; "
        "import test_dessilbi_optax as own; own.check_sharded_equals_one_device(8); "
        "own.check_explicit_equals_one_device(8)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr


def test_state_survives_a_checkpoint(tmp_path):
    from orbax.checkpoint import v1 as ocp

    optimizer, params = chain_with(), tensors()
    step = jax.jit(optimizer.update)
    opt_state = optimizer.init(params)
    for _ in range(4):
        _, opt_state = step(params, opt_state, params)
    ocp.save(tmp_path / "state", opt_state)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        optimizer.init(params),
    )
    restored = ocp.load(tmp_path / "state", abstract)
    assert jax.tree.structure(restored) == jax.tree.structure(opt_state)
    chex.assert_trees_all_equal(restored, opt_state)
    # And goes on as if nothing had been.
    chex.assert_trees_all_equal(
        step(params, restored, params), step(params, opt_state, params)
    )
    chex.assert_trees_all_equal(lbi.gamma(restored), lbi.gamma(opt_state))


# Errors.


def test_missing_params_are_refused():
    optimizer, params = chain_with(), tensors()
    with pytest.raises(ValueError, match=r"needs the parameters: call update\(grads"):
        optimizer.update(params, optimizer.init(params))


MAKERS = {
    "structural_coupling": lbi.structural_coupling,
    "dessilbi": lbi.dessilbi,
    "dessilbi_adam": lbi.dessilbi_adam,
}
every_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


@every_maker
@pytest.mark.parametrize("name", ["nu", "kappa"])
@pytest.mark.parametrize("value", [0, -1.5, math.nan])
def test_numbers_that_are_not_positive_are_refused(make, name, value):
    with pytest.raises(ValueError, match=f"{name} must be > 0, got {value}"):
        make(0.1, **{"nu": 2.0, name: value})


@pytest.mark.parametrize(
    "make, name, value, wanted",
    [
        (lbi.dessilbi, "momentum", 1.5, r"in \[0, 1\)"),
        (lbi.dessilbi, "weight_decay", -1.0, "at least 0"),
        (lbi.dessilbi_adam, "b1", 1.0, r"in \[0, 1\)"),
        (lbi.dessilbi_adam, "b2", -0.1, r"in \[0, 1\)"),
        (lbi.dessilbi_adam, "eps", math.nan, "at least 0"),
        (lbi.dessilbi_adam, "weight_decay", -1.0, "at least 0"),
    ],
)
def test_numbers_of_the_base_optimizer_are_checked(make, name, value, wanted):
    with pytest.raises(ValueError, match=f"{name} must be {wanted}, got {value}"):
        make(0.1, 2.0, **{name: value})


@every_maker
def test_negative_rate_of_the_dual_is_refused(make):
    with pytest.raises(ValueError, match="dual_learning_rate must be >= 0, got -0.1"):
        make(-0.1, 2.0)


@every_maker
def test_group_axis_out_of_range_names_the_layer(make):
    optimizer = make(0.1, 2.0, penalty={"conv": GroupL2(), "fc": GroupL2(1.0, 2)})
    message = re.escape("fc: group_axes 2 does not fit a parameter of shape (5, 6)")
    with pytest.raises(ValueError, match=message):
        optimizer.init(tensors())


@every_maker
def test_unknown_penalty_is_refused(make):
    with pytest.raises(ValueError, match="a penalty must be \"auto\", .*, got 'lasso'"):
        make(0.1, 2.0, penalty="lasso").init(tensors())


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match='"decoupled" or "coupled", got \'both\''):
        lbi.dessilbi_adam(0.1, mode="both")


def test_patterns_that_find_nothing_are_refused():
    params = {"conv": {"kernel": jnp.ones((2, 3))}}
    optimizer = lbi.structural_coupling(0.1, 2.0, penalty={"kernl": L1()})
    message = "matches the pattern kernl .* the paths are conv/kernel"
    with pytest.raises(ValueError, match=message):
        optimizer.init(params)
    # A mask may leave nothing to a coupling.
    optimizer = lbi.structural_coupling(0.1, 2.0, penalty={"kernel": L1()})
    masked = optax.masked(optimizer, {"conv": {"kernel": False}})
    assert lbi.find_states(masked.init(params))


def test_several_penalties_without_patterns_are_refused():
    with pytest.raises(ValueError, match="must be given as a mapping of patterns"):
        lbi.structural_coupling(0.1, 2.0, penalty=(L1(),))


def test_parameters_without_a_gradient_are_left_alone():
    params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    optimizer = lbi.dessilbi(0.1, nu=2.0, penalty={"kernel": lbi.L1(0.1)})
    grads = {"kernel": jnp.zeros((2, 3)), "bias": None}
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    assert updates["bias"] is None
    # -alpha W / nu, because Gamma is zero.
    np.testing.assert_allclose(updates["kernel"], jnp.full((2, 3), -0.05))


def test_python_numbers_among_the_parameters():
    params = {"kernel": jnp.ones((2, 3)), "temperature": 1.0}
    optimizer = lbi.dessilbi(0.1, 2.0, momentum=0.0, weight_decay=0.5, penalty=L1(9.0))
    grads = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    # Both decay; the coupling, W / nu, acts on the kernel only.
    np.testing.assert_allclose(updates["temperature"], -0.1 * 0.5, rtol=1e-6)
    np.testing.assert_allclose(updates["kernel"], -0.1 * (0.5 + 1 / 2), rtol=1e-6)


def test_what_must_be_known_before_tracing_is_named():
    with pytest.raises(ValueError, match="lam must be a known number"):
        jax.vmap(lambda lam: L1(lam).prox(jnp.ones(2)))(jnp.ones(3))
    params = {"kernel": jnp.ones((2, 3))}
    for read in (lbi.suggest_lambda, lbi.forecast_entries):
        with pytest.raises(ValueError, match="kernel is traced, but its values must"):
            jax.jit(lambda p, read=read: read(p, 0.1, 2.0, 10))(params)
