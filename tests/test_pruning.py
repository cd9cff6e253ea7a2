"""Pruning against brute force and the authors' own scores."""

import collections
import itertools
import math
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from numerics import run

import lbi
from lbi import penalty, pruning

pytestmark = pytest.mark.usefixtures("unoptimized", "highest_precision")

HERE = Path(__file__).resolve().parent
# Of the NumPy program in goldens/make_dessilbi_goldens.py, and, where they are present,
# of the authors' own program.
GOLDENS = [
    path
    for folder in (HERE / "goldens", HERE.parents[1] / "shared" / "goldens")
    for path in sorted(folder.glob("dessilbi_*.npz"))
]
# Updates between two of the authors' scores, which they call an epoch.
EPOCH = 50
NEVER = 2000


def random_params(seed=0):
    """A convolution of 5 filters, a dense layer of 6 weights, two biases."""
    rng = np.random.default_rng(seed)
    shapes = {
        "conv": {"kernel": (3, 2, 4, 5), "bias": (5,)},
        "dense": {"kernel": (3, 2), "bias": (2,)},
    }
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def with_entry_steps(params, conv, dense):
    """A state in which the groups entered at these steps."""
    state = lbi.structural_coupling(0.1, 10.0, record_entry=True).init(params)
    first_entry = {
        "conv": state.first_entry["conv"] | {"kernel": jnp.asarray(conv, jnp.int32)},
        "dense": state.first_entry["dense"] | {"kernel": jnp.asarray(dense, jnp.int32)},
    }
    return state._replace(first_entry=first_entry)


# How many are kept.

SPARSITIES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.999)
COUNTS = {
    6: (6, 5, 4, 2, 1, 0),
    16: (16, 13, 10, 6, 3, 0),
    64: (64, 51, 38, 26, 13, 0),
    120: (120, 96, 72, 48, 24, 0),
    512: (512, 410, 307, 205, 102, 1),
}


@pytest.mark.parametrize(("num_groups", "counts"), COUNTS.items(), ids=str)
@pytest.mark.parametrize("min_keep", [0, 1, 4, 9])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_counts_are_exact(num_groups, counts, min_keep, scope):
    importance = {"layer": np.random.default_rng(0).normal(size=num_groups)}
    for sparsity, count in zip(SPARSITIES, counts, strict=True):
        masks = pruning.keep_masks(importance, sparsity, scope=scope, min_keep=min_keep)
        assert masks["layer"].dtype == bool
        expected = max(count, min(min_keep, num_groups))
        assert masks["layer"].sum() == expected
        kept, removed = (
            importance["layer"][m] for m in (masks["layer"], ~masks["layer"])
        )
        assert not len(kept) or not len(removed) or kept.min() > removed.max()


def best_left(importance, masks, names):
    """The largest that is not kept yet, the first among equals; one by one."""
    best = None
    for name in names:
        for index in np.ndindex(importance[name].shape):
            value = importance[name][index]
            if not masks[name][index] and (best is None or value > best[0]):
                best = value, name, index
    return best[1:]


def brute_force_masks(importance, sparsity, scope, min_keep):
    masks = {name: np.zeros(values.shape, bool) for name, values in importance.items()}
    for name, values in importance.items():
        count = min(min_keep, values.size)
        if scope == "layer":
            count = max(count, round((1 - sparsity) * values.size))
        for _ in range(count):
            _, index = best_left(importance, masks, [name])
            masks[name][index] = True
    if scope == "global":
        target = round((1 - sparsity) * sum(v.size for v in importance.values()))
        while sum(mask.sum() for mask in masks.values()) < target:
            name, index = best_left(importance, masks, importance)
            masks[name][index] = True
    return masks


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("min_keep", [0, 1, 3])
@pytest.mark.parametrize("num_values", [1, 3, 1000], ids=["equal", "ties", "distinct"])
def test_masks_match_brute_force(scope, min_keep, num_values):
    rng = np.random.default_rng(0)
    shapes = {"a": (6,), "b": (4, 5), "c": (2,), "d": (16,)}
    importance = {
        name: rng.integers(num_values, size=shape) - 0.5
        for name, shape in shapes.items()
    }
    importance["c"] -= 2000.0  # without a guard it would go as a whole
    for sparsity in (0.0, 0.15, 0.4, 0.5, 0.8, 0.95, 0.99):
        masks = pruning.keep_masks(importance, sparsity, scope=scope, min_keep=min_keep)
        expected = brute_force_masks(importance, sparsity, scope, min_keep)
        chex.assert_trees_all_equal(masks, expected)


def test_guards_of_a_global_count_are_paid_by_the_other_layers():
    importance = {"weak": np.array([1.0, 3.0, 2.0]), "strong": np.arange(10.0, 17.0)}
    free = pruning.keep_masks(importance, 0.5, scope="global", min_keep=0)
    assert not free["weak"].any() and free["strong"].sum() == 5
    guarded = pruning.keep_masks(importance, 0.5, scope="global", min_keep=2)
    np.testing.assert_array_equal(guarded["weak"], [False, True, True])
    np.testing.assert_array_equal(guarded["strong"], np.arange(7) >= 4)
    # More guards than the share allows: they stay all the same.
    guarded = pruning.keep_masks(importance, 0.9, scope="global", min_keep=2)
    assert [mask.sum() for mask in guarded.values()] == [2, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": -0.1}, r"sparsity must be in \[0, 1\), got -0.1"),
        ({"sparsity": 1}, r"sparsity must be in \[0, 1\), got 1"),
        ({"sparsity": 80}, r"sparsity must be in \[0, 1\), got 80"),
        ({"sparsity": float("nan")}, r"sparsity must be in \[0, 1\), got nan"),
        ({"sparsity": 0.5, "min_keep": -1}, "min_keep must be >= 0, got -1"),
        ({"sparsity": 0.5, "scope": "network"}, "scope must be .* got 'network'"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        pruning.keep_masks({"a": np.arange(3.0)}, **arguments)


def test_importance_that_is_nan_is_refused():
    importance = {"a": np.arange(3.0), "b": np.array([1, np.nan])}
    for scope in ("layer", "global"):
        with pytest.raises(ValueError, match="b: the importance of a group is NaN"):
            pruning.keep_masks(importance, 0.5, scope=scope)


# What is important.


def test_order_of_entry_comes_before_any_norm():
    params = random_params()
    # Norms far beyond 1, the largest ones last in the order of entry or never in.
    factors = np.float32([1, 5e3, 30, 1, 1e4])
    params["conv"]["kernel"] = np.asarray(params["conv"]["kernel"]) * factors
    steps = {
        "conv/kernel": np.array([3, 1201, 7, 3, -1]),
        "dense/kernel": np.array([[7, 1], [-1, 3], [1200, -1]]),
    }
    state = with_entry_steps(params, *steps.values())
    importance = pruning.entry_importance(params, state)

    groups = []
    for name, entered in steps.items():
        kernel = np.float64(penalty.named_leaves(params)[name])
        for index in np.ndindex(entered.shape):
            norm = math.sqrt(np.sum(kernel[(..., *index)] ** 2))
            step = entered[index] if entered[index] > 0 else math.inf
            groups.append(((step, -norm), name, index))
    ordered = sorted(groups)
    assert len({key for key, *_ in groups}) == len(groups) == 11
    places = [importance[name][index] for _, name, index in ordered]
    # From the most important to the least, without equals.
    assert all(earlier > later for earlier, later in itertools.pairwise(places))
    assert ordered[0][1:] == ("dense/kernel", (0, 1))
    # The authors' score would move the filter of norm 5e3 up by epochs.
    released = pruning.released_code_importance(params, state, 10)["conv/kernel"]
    assert released[1] > released[2] > released[0]
    assert importance["conv/kernel"][1] < importance["conv/kernel"][2]


def test_equals_in_entry_and_norm_stand_in_their_order():
    params = jax.tree.map(jnp.ones_like, random_params())
    # A filter of 24 ones has the norm of a weight of sqrt(24).
    params["dense"]["kernel"] = jnp.full((3, 2), jnp.sqrt(24.0))
    state = with_entry_steps(params, np.full(5, 4), np.full((3, 2), 4))
    importance = pruning.entry_importance(params, state)
    flat = np.concatenate([values.ravel() for values in importance.values()])
    assert list(importance) == ["conv/kernel", "dense/kernel"]
    assert np.all(np.diff(flat) < 0)


def test_magnitude_is_the_norm_of_each_group():
    params = random_params()
    importance = pruning.magnitude_importance(params)
    kernels = {name: np.float64(layer["kernel"]) for name, layer in params.items()}
    expected = {
        "conv/kernel": [
            math.sqrt(sum(w**2 for w in kernels["conv"][..., i].ravel()))
            for i in range(5)
        ],
        "dense/kernel": np.abs(kernels["dense"]),
    }
    chex.assert_trees_all_close(
        importance, jax.tree.map(np.asarray, expected, is_leaf=is_list), rtol=1e-6
    )
    columns = pruning.magnitude_importance(params, lbi.GroupL2(group_axes=-1))
    expected = np.sqrt(np.sum(kernels["dense"] ** 2, axis=0))
    np.testing.assert_allclose(columns["dense/kernel"], expected, rtol=1e-6)


def test_first_order_importance_by_hand():
    params, rng = random_params(), np.random.default_rng(1)
    grads = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=(3, *leaf.shape)), jnp.float32), params
    )
    importance = pruning.taylor_importance(params, grads)
    assert list(importance) == ["conv/kernel", "dense/kernel"]
    effects = {
        name: np.float64(params[name]["kernel"]) * np.float64(grads[name]["kernel"])
        for name in params
    }
    for i in range(5):
        squares = [np.sum(batch[..., i] ** 2) for batch in effects["conv"]]
        expected = math.sqrt(sum(squares) / 3)
        assert importance["conv/kernel"][i] == pytest.approx(expected, rel=1e-5)
    expected = np.sqrt(np.mean(effects["dense"] ** 2, axis=0))
    np.testing.assert_allclose(importance["dense/kernel"], expected, rtol=1e-5)


def test_first_order_importance_of_half_precision_does_not_vanish():
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(0.05 * rng.normal(size=(8, 8)), jnp.float16)}
    grads = {"kernel": jnp.asarray(1e-3 * rng.normal(size=(2, 8, 8)), jnp.float16)}
    effects = np.float64(params["kernel"]) * np.float64(grads["kernel"])
    found = pruning.taylor_importance(params, grads)["kernel"]
    expected = np.sqrt(np.mean(effects**2, axis=0))
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def is_list(node):
    return isinstance(node, list)


def test_random_orders_are_uniform():
    params = {"a": jnp.ones((1, 2)), "w": jnp.ones((1, 1, 1, 1))}
    num_draws = 120
    counts = collections.Counter()
    for key in jax.random.split(jax.random.key(0), num_draws):
        importance = pruning.random_importance(key, params)
        assert [values.shape for values in importance.values()] == [(1, 2), (1,)]
        counts[tuple(np.concatenate([v.ravel() for v in importance.values()]))] += 1
    orders = set(itertools.permutations(range(3)))
    assert set(counts) <= orders
    # Chi-square with 5 degrees of freedom: above 20.5 once in a thousand.
    expected = num_draws / len(orders)
    assert sum((counts[o] - expected) ** 2 / expected for o in orders) < 20.5


def test_random_order_depends_on_the_key_alone():
    params = random_params()
    first, again, other = (
        pruning.random_importance(jax.random.key(seed), values)["conv/kernel"]
        for seed, values in [(0, params), (0, random_params(seed=5)), (1, params)]
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_an_order_that_was_not_recorded_is_refused():
    params = random_params()
    state = lbi.structural_coupling(0.1, 10.0).init(params)
    with pytest.raises(ValueError, match="record_entry=True"):
        pruning.entry_importance(params, state)
    with pytest.raises(ValueError, match="record_entry=True"):
        pruning.released_code_importance(params, state, 10)


# The authors' own rules.


@pytest.mark.parametrize(("num_groups", "num_removed"), [(6, 4), (16, 12), (120, 96)])
def test_counts_of_the_authors_at_80_percent(num_groups, num_removed):
    scores = {"conv": np.random.default_rng(0).normal(size=num_groups)}
    mask = pruning.percentile_masks(scores, 80, {"conv": 4})["conv"]
    assert np.sum(~mask) == num_removed
    assert scores["conv"][mask].min() > scores["conv"][~mask].max()


def linear_percentile(values, percent):
    ordered = sorted(values.ravel().tolist())
    position = percent / 100 * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


@pytest.mark.parametrize("percent", [0, 20, 50, 80, 100])
def test_percentile_masks_keep_the_threshold_in_convolutions_only(percent):
    rng = np.random.default_rng(0)
    # Integers, among them ties: the threshold is often one of them.
    scores = {
        "conv": rng.integers(4, size=21) - 0.0,
        "dense": rng.integers(4, size=(3, 7)),
    }
    masks = pruning.percentile_masks(scores, percent, {"conv": 4, "dense": 2})
    for name, values in scores.items():
        threshold = linear_percentile(values, percent)
        for index in np.ndindex(values.shape):
            above = values[index] > threshold
            kept = above or (name == "conv" and values[index] == threshold)
            assert masks[name][index] == kept


@pytest.mark.parametrize("percent", [-1, 101])
def test_percent_out_of_range_is_refused(percent):
    with pytest.raises(ValueError, match=rf"percent .* \[0, 100\], got {percent}"):
        pruning.percentile_masks({"conv": np.arange(3.0)}, percent, {"conv": 4})


def to_flax(name, array):
    """From torch's layout, over any leading axes."""
    if name == "conv":
        return np.moveaxis(array, (-4, -3, -2, -1), (-1, -2, -4, -3))
    return np.swapaxes(array, -1, -2) if name == "fc" else array


def replay(golden):
    """Params and state after each of the golden steps, along the golden gradients."""
    meta = dict(zip(golden["meta_names"], golden["meta"], strict=True))
    drop = int(meta["lr_divided_by_10_at_step"])
    rate = meta["learning_rate"]
    optimizer = lbi.dessilbi(
        optax.piecewise_constant_schedule(rate, {drop: 0.1}) if drop else rate,
        nu=meta["mu"],
        kappa=meta["kappa"],
        momentum=meta["momentum"],
        weight_decay=meta["weight_decay"],
        record_entry=True,
    )
    names = ("conv", "conv_bias", "fc", "fc_bias")
    params = {
        name: jnp.asarray(to_flax(name, golden[f"init/{name}"])) for name in names
    }
    grads = {
        name: jnp.asarray(to_flax(name, golden[f"grads/{name}"])) for name in names
    }

    def step(carry, grads):
        params, state = carry
        updates, state = optimizer.update(grads, state, params)
        carry = optax.apply_updates(params, updates), state
        return carry, carry

    carry = params, optimizer.init(params)
    return run(lambda carry, grads: lax.scan(step, carry, grads)[1], carry, grads)


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    "path", GOLDENS, ids=lambda path: f"{path.parents[1].name}_{path.stem}"
)
def test_scores_match_the_golden(path):
    golden = dict(np.load(path))
    states = replay(golden)
    for name in ("conv", "fc"):
        params = to_flax(name, golden[f"params/{name}"])
        # Rounding of 300 float32 steps; without the right rule they part at once.
        np.testing.assert_allclose(states[0][name], params, rtol=1e-4, atol=1e-4)
        gamma = to_flax(name, golden[f"gamma/{name}"])
        inside = np.any(gamma != 0, axis=(1, 2, 3)) if name == "conv" else gamma != 0
        entered = np.where(inside.any(0), inside.argmax(0) + 1, -1)
        last = jax.tree.map(lambda x: x[-1], states[1])
        np.testing.assert_array_equal(lbi.entry_steps(last)[name], entered)
        for epoch, scores in enumerate(golden[f"prune_order/{name}"]):
            at_end = slice(EPOCH - 1, EPOCH * (epoch + 1), EPOCH)
            seen = inside[at_end]
            first_seen = np.where(seen.any(0), seen.argmax(0), NEVER)
            during = inside[: EPOCH * (epoch + 1)]
            first = np.where(during.any(0), during.argmax(0) // EPOCH, NEVER)
            # Where a group left again before the end of an epoch, theirs saw nothing.
            same = first == first_seen
            assert np.mean(same) > 0.9
            now = jax.tree.map(lambda x, t=EPOCH * (epoch + 1) - 1: x[t], states)
            ours = pruning.released_code_importance(*now, EPOCH)[name]
            assert ours.dtype == np.float32
            scores = scores.T
            # Beyond 1024 float32 has steps of 1.2e-4, and norms are rounded to one.
            tolerance = np.where(first == NEVER, 1.3e-4, 2e-5)
            assert np.all((np.abs(ours - scores) < tolerance)[same])


def test_epochs_end_with_their_last_step():
    params = random_params()
    conv, dense = [1, 10, 11, 20, 21], [[-1, 1], [10, 11], [2001, -1]]
    state = with_entry_steps(params, conv, dense)
    scores = pruning.released_code_importance(params, state, 10)
    norms = pruning.magnitude_importance(params)
    expected = {
        "conv/kernel": [0, 0, 1, 1, 2],
        "dense/kernel": [[2000, 0], [0, 1], [200, 2000]],
    }
    for name, epochs in expected.items():
        np.testing.assert_allclose(norms[name] - scores[name], epochs, atol=1.3e-4)


# Masks of parameters.


def test_spread_masks_fill_the_parameters():
    params = random_params()
    masks = {
        "conv/kernel": np.array([True, False, True, True, False]),
        "dense/kernel": np.array([[True, False], [False, True], [True, True]]),
    }
    spread = pruning.spread_masks(masks, params)
    chex.assert_trees_all_equal_shapes(spread, params)
    for index in np.ndindex(3, 2, 4, 5):
        assert spread["conv"]["kernel"][index] == masks["conv/kernel"][index[-1]]
    np.testing.assert_array_equal(spread["dense"]["kernel"], masks["dense/kernel"])
    assert spread["conv"]["bias"].all() and spread["dense"]["bias"].all()

    masked = pruning.apply_masks(params, spread)
    expected = jax.tree.map(lambda p, m: np.asarray(p) * np.asarray(m), params, spread)
    chex.assert_trees_all_equal(masked, expected)

    some = pruning.spread_masks({"conv/kernel": masks["conv/kernel"]}, params)
    assert some["dense"]["kernel"].all()
    chex.assert_trees_all_equal(some["conv"], spread["conv"])


def test_spread_masks_follow_the_penalty():
    params = random_params()
    rules = {
        "conv/kernel": lbi.GroupL2(group_axes=2),
        "dense/kernel": lbi.GroupL2(group_axes=0),
    }
    conv, dense = np.array([True, False, False, True]), np.array([False, True, True])
    masks = {"conv/kernel": conv, "dense/kernel": dense}
    spread = pruning.spread_masks(masks, params, rules)
    for index in np.ndindex(3, 2, 4, 5):
        assert spread["conv"]["kernel"][index] == conv[index[2]]
    for index in np.ndindex(3, 2):
        assert spread["dense"]["kernel"][index] == dense[index[0]]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_apply_masks_removes_what_is_not_finite_too(dtype):
    tree = {"a": jnp.array([1.5, jnp.inf, jnp.nan, -2.0], dtype)}
    masked = pruning.apply_masks(tree, {"a": np.array([True, False, False, True])})
    assert masked["a"].dtype == dtype
    np.testing.assert_array_equal(np.float32(masked["a"]), [1.5, 0, 0, -2])


@pytest.mark.parametrize("layer", ["conv/bias", "conv3/kernel"])
def test_spread_masks_of_an_unknown_layer_are_refused(layer):
    message = f"unknown layer {layer}; the layers are conv/kernel, dense/kernel"
    with pytest.raises(ValueError, match=message):
        pruning.spread_masks({layer: np.ones(5, bool)}, random_params())


def test_scores_in_place_of_masks_are_refused():
    params = random_params()
    scores = pruning.magnitude_importance(params)
    with pytest.raises(
        ValueError, match="conv/kernel: the mask must be bool .*float64"
    ):
        pruning.spread_masks(scores, params)


@pytest.mark.parametrize("layer", ["conv/kernel", "dense/kernel"])
def test_spread_masks_of_another_shape_are_refused(layer):
    # (2,) would broadcast over the dense kernel, (1,) over the filters.
    mask = np.ones(1 if layer == "conv/kernel" else 2, bool)
    with pytest.raises(ValueError, match=layer):
        pruning.spread_masks({layer: mask}, random_params())


DECAY = 0.1
OPTIMIZERS = {
    "sgd": [optax.add_decayed_weights(DECAY), optax.sgd(0.05)],
    "momentum": [
        optax.add_decayed_weights(DECAY),
        optax.sgd(0.05, momentum=0.9, nesterov=True),
    ],
    "adam": [optax.adamw(0.05, weight_decay=DECAY)],
    "dessilbi": [lbi.dessilbi(0.05, nu=2.0, weight_decay=DECAY)],
}


@pytest.mark.parametrize("links", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_removed_parameters_stay_zero_in_training(links):
    rng = np.random.default_rng(0)
    start = {"kernel": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)}
    start["bias"] = jnp.asarray(rng.normal(size=3), jnp.float32)
    masks = {"kernel": rng.uniform(size=(4, 3)) < 0.5, "bias": np.array([1, 0, 1]) > 0}
    inputs = jnp.asarray(rng.normal(size=(7, 4)), jnp.float32)

    def loss_fn(params):
        outputs = inputs @ params["kernel"] + params["bias"][None]
        return jnp.mean(jnp.square(outputs - 3))

    def train(optimizer):
        def step(carry, _):
            params, state = carry
            grads = jax.grad(loss_fn)(params)
            updates, state = optimizer.update(grads, state, params)
            carry = optax.apply_updates(params, updates), state
            return carry, carry[0]

        params = pruning.apply_masks(start, masks)
        carry = params, optimizer.init(params)
        path = run(lambda carry: lax.scan(step, carry, length=5)[1], carry)
        return jax.tree.map(lambda p, ps: np.stack([p, *ps]), params, path)

    masked = train(optax.chain(*links, pruning.keep_zero(masks)))
    for name, path in masked.items():
        assert np.all(path[:, ~masks[name]] == 0)
        assert np.all(np.diff(path, axis=0)[:, masks[name]] != 0)
    # Without it they leave zero at once.
    for name, path in train(optax.chain(*links)).items():
        assert np.all(path[1:, ~masks[name]] != 0)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, bool, np.float16])
def test_scores_of_any_type_are_ordered_as_numbers(dtype):
    scores = np.array([0, 1, 1, 0], dtype)
    masks = pruning.keep_masks({"a": scores}, 0.5)
    assert masks["a"].tolist() == [False, True, True, False]
    least = np.array([np.iinfo(np.int8).min, 0, 1], np.int8)
    assert pruning.keep_masks({"a": least}, 0.6)["a"].tolist() == [False, False, True]


def test_infinite_scores_keep_the_count():
    scores = {"a": np.full(3, np.inf), "b": np.array([2.0])}
    masks = pruning.keep_masks(scores, 0.5, scope="global")
    assert {k: v.tolist() for k, v in masks.items()} == {
        "a": [True, False, False],
        "b": [True],
    }
