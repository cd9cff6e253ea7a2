"""Cascade pruning against NumPy loops; masked against compact; old names; errors."""

import functools
import itertools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vit_oracle
from numerics import assert_close, compiled, run

from vit import attention as attentions
from vit import cascade as cascades
from vit import schedules, tokens
from vit.cascade import Cascade
from vit.model import ViT

pytestmark = [
    pytest.mark.usefixtures("unoptimized", "highest_precision"),
    # Many cascades here prune in the first layer, where the first patches are kept.
    pytest.mark.filterwarnings("ignore:the attention of layer"),
]

# All axes differ: 2 images of 15 x 20, 12 patches of 5 x 5, D 10, H 4, d 6, M 14, K 7.
SIZES = {
    "num_classes": 7,
    "patch_size": 5,
    "hidden_size": 10,
    "num_heads": 4,
    "head_dim": 6,
    "mlp_dim": 14,
}
IMAGES = (2, 15, 20, 1)
NUM_TOKENS = 13

# Under skip and zero the counts rise and fall, so that tokens come back.
COUNTS = {
    "drop": {"keep": (10, 6), "keep_mlp": (9, 4)},
    "skip": {"keep": (9, 8), "keep_mlp": (4, 6)},
    "zero": {"keep": (9, 8), "keep_mlp": (4, 6)},
}
HEADS = (3, 1)


def make(cascade, **options):
    sizes = SIZES | {"num_layers": len(cascade.keep)} | options
    return ViT(**sizes, cascade=cascade)


def in_modes(cascade, modes=cascades.MODES):
    options = {field: getattr(cascade, field) for field in cascade.__dataclass_fields__}
    return [Cascade(**(options | {"mode": mode})) for mode in modes]


def random_scores(cascade, image_shape=IMAGES):
    if cascade.score != "random":
        return None
    shape = image_shape[0], NUM_TOKENS
    return jax.random.uniform(jax.random.key(cascade.seed), shape)


def oracle(cascade, params, images):
    trace = vit_oracle.forward(
        params,
        images,
        cascade=cascade,
        random_scores=random_scores(cascade, images.shape),
    )
    # Scores in float32 are good to some 1e-6.
    assert trace.margin > 1e-5, "a near tie: this case needs another seed"
    return trace


def check_against_oracle(cascade, modes=cascades.MODES, *, seed=0, **options):
    models = [make(cascade, **options) for cascade in in_modes(cascade, modes)]
    params = vit_oracle.random_params(models[0], IMAGES, seed)
    images = vit_oracle.random_images(IMAGES, seed)
    logits = run(lambda p: [m.apply({"params": p}, images) for m in models], params)
    trace = oracle(cascade, params, images)
    for actual in logits:
        assert_close(actual, trace.logits)
    return trace


# Against the oracle.


def options_of(case):
    """Every score takes its turn at each of the remaining options, heads included."""
    index, (semantics, score) = case
    return COUNTS[semantics] | {
        "semantics": semantics,
        "score": score,
        "keep_heads": HEADS if index % 2 else None,
        "head_score": ("max", "confidence")[index // 2 % 2],
        "cumulative": index % 3 != 2,
        "alpha": (0.0, 0.7)[index % 2],
        "beta": (1.0, 1.3)[index % 2],
        "seed": index,
    }


CASES = [
    Cascade(**options_of(case))
    for case in enumerate(itertools.product(cascades.SEMANTICS, cascades.SCORES[:-1]))
]


def name_of(cascade):
    heads = "heads" if cascade.keep_heads else "all"
    return f"{cascade.semantics}-{cascade.score}-{heads}"


# Each score once, with heads and without in turn.
DIFFERENTIATED = CASES[1::3]


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(
    "cascade", [case for case in CASES if case not in DIFFERENTIATED], ids=name_of
)
def test_both_modes_match_numpy(cascade):
    check_counts(cascade, check_against_oracle(cascade, seed=cascade.seed))


def check_counts(cascade, trace):
    for layer, (attention, mlp) in enumerate(cascade.counts):
        for image in range(2):
            assert len(trace.attention[layer][image]) == attention + 1
            assert len(trace.mlp[layer][image]) == mlp + 1


DROP = COUNTS["drop"]
SKIP = COUNTS["skip"] | {"semantics": "skip"}
ZERO = COUNTS["zero"] | {"semantics": "zero"}
DEEP = {"keep": (12, 3, 8, 4), "keep_mlp": (5, 7, 4, 11), "cumulative": False}
STALE = ZERO | {"stale_threshold": True, "mode": "masked"}
PER_IMAGE = {"keep_heads": HEADS, "head_scope": "image", "mode": "masked"}
COMPACT, MASKED = ("compact",), ("masked",)
SPECIAL = {
    "everything": ({"keep": (12, 12)}, cascades.MODES),
    "everything-zero": ({"keep": (12, 12), "semantics": "zero"}, cascades.MODES),
    "cls-alone": ({"keep": (8, 0), "keep_mlp": (3, 0)}, cascades.MODES),
    "cls-alone-zero": ({"keep": (0, 5), "semantics": "zero"}, cascades.MODES),
    "deep-drop": (
        {"keep": (12, 10, 7, 4), "keep_mlp": (11, 8, 7, 2), "alpha": 0.7},
        cascades.MODES,
    ),
    "deep-skip": (DEEP | {"semantics": "skip"}, cascades.MODES),
    "deep-zero": (DEEP | {"semantics": "zero"}, cascades.MODES),
    # No layer has all tokens, but each can have others.
    "same-counts-skip": ({"keep": (5, 5), "semantics": "skip"}, cascades.MODES),
    "same-counts-zero": ({"keep": (5, 5), "semantics": "zero"}, cascades.MODES),
    "cls-competes-skip": (SKIP | {"keep_cls": False}, cascades.MODES),
    "cls-competes-zero": (ZERO | {"keep_cls": False}, cascades.MODES),
    "reset-drop": (
        {"keep": (11, 8), "keep_mlp": (9, 5), "resets": (1,)},
        cascades.MODES,
    ),
    "reset-zero": (ZERO | {"resets": (1,), "score": "sum"}, cascades.MODES),
    "stale": (STALE | {"keep_cls": False}, MASKED),
    "stale-with-cls": (STALE, MASKED),
    "heads-of-images": (DROP | PER_IMAGE, MASKED),
    "heads-of-images-zero": (ZERO | PER_IMAGE | {"head_score": "confidence"}, MASKED),
    "fuse": (DROP | {"fuse": "sum", "keep": (12, 6)}, COMPACT),
    "fuse-mean": (DROP | {"fuse": "mean", "keep": (12, 6)}, COMPACT),
    "fuse-norm": (DROP | {"fuse": "mean", "score": "norm"}, COMPACT),
    "evit": (
        vars(schedules.evit(0.5, num_layers=3, num_patches=12)),
        COMPACT,
    ),
    "merge": (
        vars(schedules.token_merging(3, num_layers=3, num_patches=12)),
        COMPACT,
    ),
    "merge-decreasing": (
        vars(
            schedules.token_merging(
                3, num_layers=3, num_patches=12, schedule="decreasing"
            )
        ),
        COMPACT,
    ),
    "merge-and-heads": (
        vars(schedules.token_merging(5, num_layers=3, num_patches=12))
        | {"keep_heads": (2, 1, 3), "head_score": "confidence"},
        COMPACT,
    ),
    "released-schedule": (
        vars(
            schedules.released_code(
                num_layers=6, num_patches=12, plateau=0.9, stale_threshold=False
            )
        ),
        cascades.MODES,
    ),
    "released-code": (
        vars(schedules.released_code(num_layers=6, num_patches=12, plateau=0.9)),
        MASKED,
    ),
}


@pytest.mark.slow_after(6)
@pytest.mark.parametrize(("options", "modes"), SPECIAL.values(), ids=SPECIAL.keys())
def test_further_options_match_numpy(options, modes):
    check_against_oracle(Cascade(**options), modes, seed=50)


def test_uneven_heads_and_widths_match_numpy():
    cascade = Cascade(**DROP, keep_heads=(1, 2))
    check_against_oracle(cascade, num_heads=(1, 3), mlp_dim=(5, 9))


def test_cases_let_tokens_come_back_and_images_differ():
    """What the cases above are there for does happen in them."""
    for semantics in ("skip", "zero"):
        cascade = Cascade(**DEEP, semantics=semantics)
        params = vit_oracle.random_params(make(cascade), IMAGES, 50)
        trace = oracle(cascade, params, vit_oracle.random_images(IMAGES, 50))
        sets = [[set(kept[i]) for kept in trace.attention] for i in range(2)]
        for _, second, third, fourth in sets:
            assert third - second and fourth - second and second - fourth
        assert sets[0][1] != sets[1][1]


# Masked against compact.


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("cascade", DIFFERENTIATED, ids=name_of)
def test_both_modes_match_numpy_and_their_gradients_are_equal(cascade):
    models = [make(cascade) for cascade in in_modes(cascade)]
    params = vit_oracle.random_params(models[0], IMAGES, cascade.seed)
    images = vit_oracle.random_images(IMAGES, cascade.seed)
    # Any combination of the logits.
    direction = jnp.arange(14.0).reshape(2, 7) - 5

    def loss_fn(params, images, model):
        logits = model.apply({"params": params}, images)
        return jnp.sum(direction * logits), logits

    def both(params, images):
        gradient = jax.grad(loss_fn, (0, 1), has_aux=True)
        return [gradient(params, images, model) for model in models]

    (grads, compact), (others, masked) = run(both, params, images)
    trace = oracle(cascade, params, images)
    check_counts(cascade, trace)
    for logits in (compact, masked):
        assert_close(logits, trace.logits)
    largest = max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(grads))
    for leaf, same in zip(jax.tree.leaves(grads), jax.tree.leaves(others), strict=True):
        # The keys' biases have none: what is there is rounding.
        scale = np.max(np.abs(leaf)) + 1e-2 * largest
        np.testing.assert_allclose(leaf, same, rtol=0, atol=1e-4 * scale)


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("semantics", cascades.SEMANTICS)
def test_bfloat16_modes_keep_the_same_tokens(semantics):
    cascade = Cascade(**COUNTS[semantics], semantics=semantics)
    shape = (8, *IMAGES[1:])
    models = [make(c, dtype=jnp.bfloat16) for c in in_modes(cascade)]
    params = vit_oracle.random_params(models[0], shape)
    images = vit_oracle.random_images(shape)
    compact, masked = run(
        lambda p: [
            m.apply({"params": p}, images, mutable=["intermediates"])[1] for m in models
        ],
        params,
    )
    same = []
    for layer in range(2):
        sets = []
        for captured in (compact, masked):
            block = captured["intermediates"]["Transformer"][f"encoderblock_{layer}"]
            score = np.asarray(block["score"][0], np.float64)
            if score.shape[1] < NUM_TOKENS:
                full = np.full((8, NUM_TOKENS), -np.inf)
                np.put_along_axis(full, np.asarray(block["tokens"][0]), score, axis=1)
                score = full
            elif semantics == "drop":
                # The hidden ones' scores stay behind.
                score = np.where(attended_to(block), score, -np.inf)
            score[:, 0] = np.inf
            order = np.argsort(-score, axis=1, kind="stable")
            kept = cascade.counts[layer][1] + 1
            sets.append([set(row) for row in order[:, :kept].tolist()])
        same += [len(a & b) / len(a) for a, b in zip(*sets, strict=True)]
    # A near tie may fall either way.
    assert np.mean(same) >= 0.99


def attended_to(block):
    """Tokens (B, N) that have any attention at all."""
    return np.max(np.asarray(block["attention"][0]), axis=(1, 2)) > 0


@pytest.mark.parametrize("mode", cascades.MODES)
def test_images_share_one_compilation(mode):
    model = make(Cascade(**COUNTS["drop"], mode=mode))
    params = vit_oracle.random_params(model, IMAGES)
    traces = []

    @compiled
    def forward(params, images):
        traces.append(images.shape)
        return model.apply({"params": params}, images)

    logits = [
        forward(params, vit_oracle.random_images(IMAGES, seed)) for seed in range(3)
    ]
    assert len(traces) == 1
    for seed, actual in enumerate(logits):
        images = vit_oracle.random_images(IMAGES, seed)
        assert_close(actual, oracle(model.cascade, params, images).logits)


# Which tokens.


def captured_blocks(cascade, params, images):
    model = make(cascade)
    _, captured = run(
        lambda p: model.apply({"params": p}, images, mutable=["intermediates"]), params
    )
    encoder = captured["intermediates"]["Transformer"]
    return [encoder[f"encoderblock_{layer}"] for layer in range(len(cascade.keep))]


@pytest.mark.parametrize("score", ["max", "cls", "random"])
def test_compact_drop_works_on_nested_sets_of_the_asked_size(score):
    cascade = Cascade(**COUNTS["drop"], score=score)
    params = vit_oracle.random_params(make(cascade), IMAGES)
    images = vit_oracle.random_images(IMAGES)
    trace = oracle(cascade, params, images)
    before = [set(range(NUM_TOKENS))] * 2
    for layer, block in enumerate(captured_blocks(cascade, params, images)):
        tokens = np.asarray(block["tokens"][0])
        assert tokens.shape == (2, cascade.keep[layer] + 1)
        np.testing.assert_array_equal(tokens, trace.attention[layer])
        np.testing.assert_array_equal(tokens[:, 0], 0)
        np.testing.assert_allclose(block["attention"][0], trace.probs[layer], atol=1e-5)
        for image, kept in enumerate(tokens.tolist()):
            assert set(kept) <= before[image]
            before[image] = set(kept)


@pytest.mark.parametrize("semantics", ["drop", "skip"])
def test_masked_attention_looks_at_the_kept_alone(semantics):
    cascade = Cascade(**COUNTS[semantics], semantics=semantics, mode="masked")
    params = vit_oracle.random_params(make(cascade), IMAGES)
    images = vit_oracle.random_images(IMAGES)
    trace = oracle(cascade, params, images)
    for layer, block in enumerate(captured_blocks(cascade, params, images)):
        for image, row in enumerate(attended_to(block)):
            assert np.flatnonzero(row).tolist() == trace.attention[layer][image]


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("semantics", cascades.SEMANTICS)
def test_cls_is_kept_though_it_scores_lowest(semantics):
    cascade = Cascade(keep=(3, 3), semantics=semantics, score="norm")
    models = [make(cascade) for cascade in in_modes(cascade)]
    params = vit_oracle.random_params(models[0], IMAGES)
    params["cls"] = jnp.zeros_like(params["cls"])
    positions = params["Transformer"]["posembed_input"]
    positions["pos_embedding"] = positions["pos_embedding"].at[:, 0].set(0)
    images = vit_oracle.random_images(IMAGES)
    trace = oracle(cascade, params, images)
    assert all(kept[0] == 0 for kept in trace.attention[0] + trace.mlp[0])
    logits = run(lambda p: [m.apply({"params": p}, images) for m in models], params)
    for actual in logits:
        assert_close(actual, trace.logits)
    if semantics != "drop":
        free = Cascade(keep=(3, 3), semantics=semantics, score="norm", keep_cls=False)
        trace = oracle(free, params, images)
        assert all(0 not in kept for kept in trace.attention[0])


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("mode", cascades.MODES)
@pytest.mark.parametrize("semantics", cascades.SEMANTICS)
def test_what_is_pruned_everywhere_has_no_effect_and_no_gradient(semantics, mode):
    # Random scores and one count: the same tokens in every layer, from the first.
    cascade = Cascade(keep=(4, 4), semantics=semantics, mode=mode, score="random")
    model = make(cascade)
    params = vit_oracle.random_params(model, IMAGES)
    images = vit_oracle.random_images(IMAGES)
    scores = np.asarray(random_scores(cascade))[:, 1:]
    pruned = np.argsort(np.argsort(-scores)).reshape(2, 3, 4) >= 4
    pixels = pruned.repeat(5, axis=1).repeat(5, axis=2)[..., None]  # (2, 15, 20, 1)
    direction = jnp.arange(14.0).reshape(2, 7) - 5

    @jax.value_and_grad
    def loss_fn(images, params):
        return jnp.sum(direction * model.apply({"params": params}, images))

    @compiled
    def evaluate(images):
        return loss_fn(images, params)

    loss, grad = evaluate(images)
    assert not np.any(np.where(pixels, grad, 0))
    assert np.all(np.where(pixels, 1, grad))
    changed, _ = evaluate(jnp.where(pixels, 3 - images, images))
    assert loss == changed
    changed, _ = evaluate(jnp.where(pixels, images, 3 - images))
    assert loss != changed


def test_merged_tokens_have_the_attention_of_all_their_members():
    """Merging equal tokens changes nothing: a key of size m counts m times."""
    model = make(Cascade(keep=(12, 10), keep_mlp=(10, 10), score="merge"))
    params = vit_oracle.random_params(model, IMAGES)
    images = np.array(vit_oracle.random_images(IMAGES))
    positions = np.array(params["Transformer"]["posembed_input"]["pos_embedding"])
    # Tokens 1 and 2 are one, and 5 and 6: their keys are most alike.
    for token, twin in ((1, 2), (5, 6)):
        positions[:, twin] = positions[:, token]
        patches = images.reshape(2, 3, 5, 4, 5, 1)
        row, column = divmod(token - 1, 4)
        twin_row, twin_column = divmod(twin - 1, 4)
        patches[:, twin_row, :, twin_column] = patches[:, row, :, column]
    params["Transformer"]["posembed_input"]["pos_embedding"] = jnp.asarray(positions)
    dense = model.clone(cascade=None)
    merged, expected = run(
        lambda p: [m.apply({"params": p}, jnp.asarray(images)) for m in (model, dense)],
        params,
    )
    assert_close(merged, expected)


def test_attention_is_asked_for_where_a_later_choice_needs_it():
    def queries(num_patches=9, **options):
        cascade = Cascade(**options)
        layers = range(len(cascade.keep))
        names = [cascades.needed_statistics(cascade, i, num_patches) for i in layers]
        old = {(): None, ("cls",): "cls"}
        with pytest.warns(DeprecationWarning, match="is now .*needed_statistics"):
            assert [old.get(one, "all") for one in names] == [
                cascades.scored_query(cascade, i, num_patches) for i in layers
            ]
        return names

    # The MLP of layer 1 drops: layers 0 and 1 are scored, the last two run fused.
    drop = {"keep": (9, 9, 5, 5), "keep_mlp": (9, 5, 5, 5)}
    maxima = ("column_max",)
    assert queries(**drop) == [maxima, maxima, (), ()]
    assert queries(**drop, alpha=0.5)[0] == ("column_max", "row_max")
    assert queries(**drop, alpha=0.5, beta=0.0)[0] == ("row_max",)
    assert queries(**drop, score="sum", alpha=0.5)[0] == ("column_sum",)
    assert queries(**drop, score="cls") == [("cls",), ("cls",), (), ()]
    assert queries(**drop, score="norm") == [()] * 4
    assert queries(**drop, resets=(1,)) == [(), maxima, (), ()]
    # Tokens may return: every layer that leaves some out chooses again.
    skip = {"semantics": "skip", "keep": (5, 5, 9)}
    assert queries(**skip) == [maxima, maxima, ()]
    assert queries(semantics="zero", keep=(5, 5)) == [maxima, maxima]
    assert cascades.needed_statistics(None, 0, 9) == ()


def test_stale_thresholds_prune_fewer_than_asked():
    """Scores grow in each layer, so that few are below a threshold of the old ones."""
    options = {"num_layers": 6, "num_patches": 12, "plateau": 0.9}
    stale, fresh = (
        schedules.released_code(**options, stale_threshold=flag)
        for flag in (True, False)
    )
    params = vit_oracle.random_params(make(stale), IMAGES)
    images = vit_oracle.random_images(IMAGES)
    few, asked = (
        sum(NUM_TOKENS - len(kept) for layer in trace.mlp for kept in layer)
        for trace in (oracle(cascade, params, images) for cascade in (stale, fresh))
    )
    assert asked == 2 * sum(12 - keep for keep in fresh.keep_mlp) > 2 * few


def test_fused_token_stands_at_the_end_of_evits_tokens():
    cascade = schedules.evit(0.5, num_layers=3, num_patches=12)
    params = vit_oracle.random_params(make(cascade), IMAGES)
    images = vit_oracle.random_images(IMAGES)
    trace = oracle(cascade, params, images)
    blocks = captured_blocks(cascade, params, images)
    for block, expected in zip(blocks, trace.at_hand, strict=True):
        np.testing.assert_array_equal(block["tokens"][0], expected)
    assert all(row[-1] == -1 for row in trace.at_hand[-1])


# Old names, for one version.


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mlp_layer", cascades.pruned_mlp),
        ("report", schedules.cp_vit),
        ("start", cascades.initial_tokens),
    ],
)
def test_renamed_functions_work_and_warn(old, new):
    with pytest.warns(DeprecationWarning, match=f"vit.cascade.{old} is now vit."):
        assert getattr(cascades, old) is new


def test_the_old_attention_layer_works_and_warns():
    cascade = schedules.token_merging(2, num_layers=2, num_patches=6)
    x = jax.random.normal(jax.random.key(0), (2, 7, 4))
    start = cascades.initial_tokens(cascade, x)

    def old(x, weights):
        heads = x[:, :, None]
        values, found = attentions.attend(heads, heads, heads, weights)
        return attentions.Attended(values[:, :, 0], found, x)

    def attention(x, attend):
        heads = x[:, :, None]
        return attend(heads, heads, heads)[:, :, 0]

    with pytest.warns(DeprecationWarning, match="is now .*pruned_attention"):
        found = run(
            lambda x: cascades.attention_layer(cascade, 0, x, jnp.tanh, old), start
        )
    expected = run(
        lambda x: cascades.pruned_attention(cascade, 0, x, jnp.tanh, attention), start
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(("old", "new"), [(True, "mean"), (False, None)])
def test_fuse_was_a_flag(old, new):
    with pytest.warns(DeprecationWarning, match="own is fuse='sum'"):
        assert Cascade(keep=(5, 3), fuse=old).fuse == new
    with pytest.warns(DeprecationWarning, match=f"is now fuse={new!r}"):
        cascade = schedules.evit(0.5, num_layers=4, num_patches=10, fuse=old)
    assert cascade == schedules.evit(0.5, num_layers=4, num_patches=10, fuse=new)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (
            schedules,
            "constant_ratios evit from_ratios keep_counts ramp_ratios range_ratios "
            "released_code token_merging",
        ),
        (attentions, "Heads choose_heads"),
        (tokens, "Tokens mask_to_indices take top_mask"),
    ],
)
def test_moved_functions_are_found_in_cascade(module, names):
    for name in names.split():
        assert getattr(cascades, name) is getattr(module, name)
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        cascades.absent  # noqa: B018


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"semantics": "forget"},
            "must be one of drop, skip, zero; got 'forget'",
        ),
        ({"mode": "fast"}, "mode must be one of compact, masked; got 'fast'"),
        ({"score": "min"}, "one of max, sum, cls, norm, random, merge; got 'min'"),
        ({"head_score": "sum"}, "head_score must be one of max, confidence; got 'sum'"),
        (
            {"head_scope": "layer"},
            "must be one of batch, image; got 'layer'",
        ),
        ({"keep": (3, -1)}, r"keep must have one count of at least 0 .* got \(3, -1\)"),
        ({"keep_mlp": (3,)}, r"keep_mlp must have .* each of the 2 layers, got \(3,\)"),
        ({"keep_heads": (2, 0)}, r"keep_heads must .* at least 1 .* got \(2, 0\)"),
        ({"keep_heads": (2, 1, 1)}, "keep_heads must have one count"),
        ({"keep": (3, 4)}, r"must not grow from layer .* got \[3, 3, 4, 4\]"),
        ({"keep_mlp": (6, 4)}, r"must not grow from layer .* got \[5, 6, 3, 4\]"),
        ({"keep_cls": False}, "keep_cls=False requires semantics 'skip' or 'zero'"),
        (
            {"keep_cls": False, "semantics": "zero", "score": "cls"},
            "a score other than 'cls'",
        ),
        ({"score": "merge"}, "must equal the `keep_mlp` of the layer before"),
        (
            {"score": "merge", "keep_mlp": (3, 2), "mode": "masked"},
            "'merge' requires semantics 'drop', mode 'compact' and fuse=N",
        ),
        (
            {"score": "merge", "keep_mlp": (3, 2), "semantics": "skip"},
            "'merge' requires semantics 'drop', mode 'compact' and fuse=N",
        ),
        (
            {"score": "merge", "keep_mlp": (3, 2), "fuse": "sum"},
            "'merge' requires semantics 'drop', mode 'compact' and fuse=N",
        ),
        ({"fuse": "max"}, "fuse must be one of None, sum, mean; got 'max'"),
        (
            {"score": "merge", "keep_mlp": (3, 1)},
            r"can merge at most half of its patches, got \[5, 3, 3, 1\]",
        ),
        (
            {"fuse": "sum", "semantics": "skip"},
            "fuse requires semantics 'drop'",
        ),
        (
            {"fuse": "mean", "mode": "masked"},
            "fuse requires semantics 'drop'",
        ),
        ({"fuse": "sum", "keep": (5, 0)}, "mode 'compact' and at least one patch"),
        (
            {"keep_heads": (2, 1), "head_scope": "image"},
            "head_scope='image' cannot save work .* use mode='masked'",
        ),
        ({"resets": (1, 2)}, r"among the layers 0 to 1, got \(1, 2\)"),
        ({"stale_threshold": True}, "requires semantics='zero' and mode='masked'"),
        (
            {"stale_threshold": True, "semantics": "zero"},
            "requires semantics='zero' and mode='masked'",
        ),
    ],
)
def test_cascades_that_do_not_fit_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Cascade(**({"keep": (5, 3)} | options))


def test_numbers_of_numpy_become_those_of_python():
    """JSON, in which a file keeps its cascade, knows no others."""
    made = Cascade(keep=list(np.array([5, 3])), alpha=np.float32(0.5), seed=np.int64(3))
    assert made == Cascade(keep=(5, 3), alpha=0.5, seed=3)
    assert type(made.keep[0]) is type(made.seed) is int and type(made.alpha) is float
    for wrong in ((5.5, 3), (float("nan"), 3)):
        with pytest.raises(ValueError, match="keep must be whole numbers"):
            Cascade(keep=wrong)
    with pytest.raises(ValueError, match="seed must be whole numbers, got 2.5"):
        Cascade(keep=(5, 3), seed=2.5)
    with pytest.raises(ValueError, match="keep must have one count"):
        Cascade(keep=())


@pytest.mark.parametrize(
    ("class_token", "semantics"), [(True, "drop"), (False, "zero")], ids=str
)
def test_registers_are_always_kept(class_token, semantics):
    """Both modes agree, and the tokens before the patches are never pruned."""
    cascade = Cascade(**COUNTS[semantics], semantics=semantics)
    models = [
        make(c, class_token=class_token, num_registers=2, pool="mean")
        for c in in_modes(cascade)
    ]
    params = vit_oracle.random_params(models[0], IMAGES)
    images = vit_oracle.random_images(IMAGES)
    num_prefix = 2 + class_token
    assert models[0].num_prefix == num_prefix
    (compact, captured), masked = run(
        lambda p: (
            models[0].apply({"params": p}, images, mutable=["intermediates"]),
            models[1].apply({"params": p}, images),
        ),
        params,
    )
    assert_close(masked, compact, tolerance=2e-5)
    if semantics == "drop":
        for layer, keep in enumerate(cascade.keep):
            block = captured["intermediates"]["Transformer"][f"encoderblock_{layer}"]
            tokens = np.asarray(block["tokens"][0])
            assert tokens.shape == (2, keep + num_prefix)
            np.testing.assert_array_equal(tokens[:, :num_prefix], [[0, 1, 2]] * 2)


# What would be decided by nothing.


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({"keep": (10, 6)}, [0]),
        ({"keep": (10, 6), "score": "cls"}, [0]),
        ({"keep": (10, 6), "score": "random"}, []),
        ({"keep": (10, 6), "score": "norm", "resets": (1,)}, []),
        ({"keep": (12, 6)}, []),
        ({"keep": (12, 6), "keep_mlp": (10, 4)}, []),
        ({"keep": (12, 6), "resets": (1,)}, [1]),
        ({"keep": (12, 6), "score": "random", "resets": (1,)}, [1]),
        ({"keep": (12, 6), "keep_mlp": (6, 6), "resets": (1,)}, []),
        ({"keep": (12, 6), "keep_mlp": (6, 6), "resets": (1,), "mode": "masked"}, []),
        (
            {"keep": (12, 12), "keep_mlp": (6, 6), "resets": (1,), "semantics": "skip"},
            [],
        ),
        ({"keep": (10, 11), "resets": (1,), "semantics": "skip"}, [0, 1]),
    ],
    ids=str,
)
def test_pruning_without_scores_warns(options, layers):
    model = make(Cascade(**options))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(IMAGES))
    pattern = "the attention of layer (.) keeps .* the first ones are kept"
    assert [int(re.match(pattern, str(w.message))[1]) for w in caught] == layers


@pytest.mark.parametrize("mode", cascades.MODES)
def test_a_layer_without_any_token_is_refused(mode):
    cascade = Cascade(keep=(12, 0), semantics="skip", mode=mode)
    for class_token in (True, False):
        model = make(cascade, class_token=class_token, pool="mean")
        init = functools.partial(model.init, jax.random.key(0))
        if class_token:
            jax.eval_shape(init, jnp.zeros(IMAGES))
        else:
            with pytest.raises(ValueError, match="must keep at least one token"):
                jax.eval_shape(init, jnp.zeros(IMAGES))


def test_scores_of_cls_need_cls():
    cascade = Cascade(keep=(4, 2), score="cls")
    tokens = cascades.initial_tokens(cascade, jnp.zeros((1, 4, 3)))
    with pytest.raises(ValueError, match="'cls' requires a CLS token; num_prefix is 0"):
        cascades.pruned_attention(cascade, 0, tokens, abs, abs, num_prefix=0)


def test_random_scores_are_the_same_in_double_precision():
    cascade = Cascade(keep=(3, 2), score="random", seed=5)
    x = np.zeros((2, 5, 3), np.float32)
    expected = cascades.initial_tokens(cascade, x).score
    with jax.enable_x64(True):
        found = cascades.initial_tokens(cascade, x).score
    assert found.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
