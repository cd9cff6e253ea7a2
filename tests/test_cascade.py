"""Cascade pruning against NumPy loops; masked against compact; presets and errors."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vit_oracle
from vit_oracle import compiled, run

from vit import cascade as cascades
from vit.cascade import Cascade, Tokens
from vit.model import Attended, ViT

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


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


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


def assert_close(actual, expected, tolerance=1e-5):
    """Up to rounding of float32 over a few layers, relative to the largest entry."""
    scale = np.max(np.abs(expected))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


# Against the oracle.


def options_of(case):
    """Every score takes its turn at each of the remaining options."""
    index, (semantics, score, heads) = case
    return COUNTS[semantics] | {
        "semantics": semantics,
        "score": score,
        "keep_heads": HEADS if heads else None,
        "head_score": ("max", "confidence")[index // 2 % 2],
        "cumulative": index % 3 != 2,
        "alpha": (0.0, 0.7)[index % 2],
        "beta": (1.0, 1.3)[index % 2],
        "seed": index,
    }


CASES = [
    Cascade(**options_of(case))
    for case in enumerate(
        itertools.product(cascades.SEMANTICS, cascades.SCORES[:-1], (False, True))
    )
]


def name_of(cascade):
    heads = "heads" if cascade.keep_heads else "all"
    return f"{cascade.semantics}-{cascade.score}-{heads}"


@pytest.mark.parametrize("cascade", CASES, ids=name_of)
def test_both_modes_match_numpy(cascade):
    trace = check_against_oracle(cascade, seed=cascade.seed)
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
    "fuse": (DROP | {"fuse": True, "keep": (12, 6)}, COMPACT),
    "fuse-norm": (DROP | {"fuse": True, "score": "norm"}, COMPACT),
    "evit": (
        vars(cascades.evit(0.5, num_layers=3, num_patches=12)),
        COMPACT,
    ),
    "merge": (
        vars(cascades.token_merging(3, num_layers=3, num_patches=12)),
        COMPACT,
    ),
    "merge-and-heads": (
        vars(cascades.token_merging(5, num_layers=3, num_patches=12))
        | {"keep_heads": (2, 1, 3), "head_score": "confidence"},
        COMPACT,
    ),
    "released-schedule": (
        vars(
            cascades.released_code(
                num_layers=6, num_patches=12, plateau=0.9, stale_threshold=False
            )
        ),
        cascades.MODES,
    ),
    "released-code": (
        vars(cascades.released_code(num_layers=6, num_patches=12, plateau=0.9)),
        MASKED,
    ),
}


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


# Each score twice, with heads and without in turn.
@pytest.mark.parametrize("cascade", CASES[::3], ids=name_of)
def test_gradients_of_both_modes_are_equal(cascade):
    models = [make(cascade) for cascade in in_modes(cascade)]
    params = vit_oracle.random_params(models[0], IMAGES, seed=20)
    images = vit_oracle.random_images(IMAGES)
    # Any combination of the logits.
    direction = jnp.arange(14.0).reshape(2, 7) - 5

    def loss_fn(params, images, model):
        return jnp.sum(direction * model.apply({"params": params}, images))

    def both(params, images):
        gradient = jax.value_and_grad(loss_fn, (0, 1))
        return [gradient(params, images, model) for model in models]

    (value, grads), (other, others) = run(both, params, images)
    np.testing.assert_allclose(value, other, rtol=1e-4)
    largest = max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(grads))
    for leaf, same in zip(jax.tree.leaves(grads), jax.tree.leaves(others), strict=True):
        # The keys' biases have none: what is there is rounding.
        scale = np.max(np.abs(leaf)) + 1e-2 * largest
        np.testing.assert_allclose(leaf, same, rtol=0, atol=1e-4 * scale)


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


# By hand.


def tokens_of(x, scores):
    x = jnp.asarray(x, jnp.float32)
    position = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    return Tokens(x, position, jnp.asarray(scores, jnp.float32))


def test_fused_token_is_the_mean_weighted_by_the_scores():
    x = np.random.default_rng(0).normal(size=(1, 6, 3))
    scores = np.array([[9.0, 0.1, 0.5, 0.3, 0.2, 0.6]])
    cascade = Cascade(keep=(5,), keep_mlp=(3,), fuse=True)
    tokens = run(
        lambda tokens: cascades.mlp_layer(
            cascade, 0, tokens, lambda x: x, lambda x: 0 * x
        ),
        tokens_of(x, scores),
    )
    # CLS, the two best and the mean of numbers 1, 3 and 4 by 1/6, 3/6 and 2/6.
    np.testing.assert_array_equal(tokens.position, [[0, 2, 5, -1]])
    np.testing.assert_allclose(tokens.x[:, :3], x[:, [0, 2, 5]], rtol=1e-6)
    mean = (x[0, 1] + 3 * x[0, 3] + 2 * x[0, 4]) / 6
    np.testing.assert_allclose(tokens.x[0, 3], mean, rtol=1e-5)
    mean = (0.1 + 3 * 0.3 + 2 * 0.2) / 6
    np.testing.assert_allclose(tokens.score, [[9, 0.5, 0.6, mean]], rtol=1e-5)


def test_merging_by_hand():
    # Angles of the keys: 2 is like 1, 4 is like 5 but less so, 6 is like 5 and not by
    # much; CLS is exactly like 3 and stays.
    degrees = np.radians([90, 0, 4, 90, 180, 190, 220])
    keys = np.stack([np.cos(degrees), np.sin(degrees)], axis=1)[None]
    x = np.arange(14.0).reshape(1, 7, 2) ** 2
    sizes = jnp.array([[1.0, 1.0, 2.0, 1.0, 1.0, 3.0, 1.0]])
    tokens = tokens_of(x, np.zeros((1, 7)))._replace(weights=sizes)
    cascade = Cascade(keep=(6,), keep_mlp=(4,), score="merge")

    def half_layer(tokens):
        def attend(x, weights):
            assert weights is tokens.weights
            return Attended(0 * x, None, jnp.asarray(keys, jnp.float32))

        return cascades.attention_layer(cascade, 0, tokens, lambda x: x, attend)

    tokens = run(half_layer, tokens)
    np.testing.assert_array_equal(tokens.position, [[0, 6, 1, 3, 5]])
    np.testing.assert_array_equal(tokens.weights, [[1, 1, 3, 1, 4]])
    expected = [
        x[0, 0],
        x[0, 6],
        (x[0, 1] + 2 * x[0, 2]) / 3,
        x[0, 3],
        (x[0, 4] + 3 * x[0, 5]) / 4,
    ]
    np.testing.assert_allclose(tokens.x[0], expected, rtol=1e-6)


@pytest.mark.parametrize("num_tokens", [9, 10])
@pytest.mark.parametrize("num_merged", [1, 3, 4])
def test_merging_matches_numpy(num_tokens, num_merged):
    rng = np.random.default_rng(num_tokens + num_merged)
    x, keys = rng.normal(size=(2, 2, num_tokens, 3))
    sizes = rng.integers(1, 5, (2, num_tokens))
    tokens = tokens_of(x, np.zeros((2, num_tokens)))
    tokens = tokens._replace(weights=jnp.asarray(sizes, jnp.float32))
    before = num_tokens - 1
    cascade = Cascade(keep=(before,), keep_mlp=(before - num_merged,), score="merge")
    merged = run(
        lambda tokens: cascades.attention_layer(
            cascade,
            0,
            tokens,
            lambda x: x,
            lambda x, _: Attended(0 * x, None, jnp.asarray(keys, jnp.float32)),
        ),
        tokens,
    )
    for image in range(2):
        expected = vit_oracle.merge(
            [
                vit_oracle.Token(x[image, i], i, size=int(sizes[image, i]))
                for i in range(num_tokens)
            ],
            keys[image],
            num_merged,
        )
        positions = [token.position for token in expected]
        assert merged.position[image].tolist() == positions
        assert merged.weights[image].tolist() == [token.size for token in expected]
        x_expected = np.stack([token.x for token in expected])
        np.testing.assert_allclose(merged.x[image], x_expected, rtol=0, atol=1e-6)


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


def test_top_mask_and_indices_match_loops_and_ties_go_to_the_first():
    rng = np.random.default_rng(0)
    score = rng.integers(0, 4, (5, 11)).astype(np.float32)
    score[0, 3], score[1, 4], score[2] = np.inf, -np.inf, 1.0
    values = rng.normal(size=(5, 11, 2)).astype(np.float32)

    def choose(score, values, count):
        mask = cascades.top_mask(score, count)
        indices = cascades.mask_to_indices(mask, count)
        return mask, indices, cascades.take(values, indices)

    counts = 0, 1, 4, 10, 11
    chosen = run(lambda *x: [choose(*x, count) for count in counts], score, values)
    for count, (mask, indices, taken) in zip(counts, chosen, strict=True):
        for row in range(5):
            order = sorted(range(11), key=lambda i: (-score[row, i], i))
            kept = sorted(order[:count])
            assert np.flatnonzero(mask[row]).tolist() == kept
            assert indices[row].tolist() == kept
            np.testing.assert_array_equal(taken[row], values[row][kept])


def test_heads_are_chosen_by_batch_or_image_and_ties_go_to_the_first():
    scores = jnp.array([[3.0, 1.0, 2.0, 2.0], [0.0, 6.0, 1.0, 1.0]])
    heads = cascades.Heads(keep=2, score="max", scope="image", mode="masked")
    mask = cascades.choose_heads(heads, scores)
    np.testing.assert_array_equal(mask, [[1, 0, 1, 0], [0, 1, 1, 0]])
    # Means 1.5, 3.5, 1.5, 1.5.
    mask = cascades.choose_heads(heads._replace(scope="batch"), scores)
    np.testing.assert_array_equal(mask, [[1, 1, 0, 0]] * 2)


def test_attention_is_asked_for_where_a_later_choice_needs_it():
    def queries(num_patches=9, **options):
        cascade = Cascade(**options)
        layers = range(len(cascade.keep))
        return [cascades.scored_query(cascade, i, num_patches) for i in layers]

    # The MLP of layer 1 drops: layers 0 and 1 are scored, the last two run fused.
    drop = {"keep": (9, 9, 5, 5), "keep_mlp": (9, 5, 5, 5)}
    assert queries(**drop) == ["all", "all", None, None]
    assert queries(**drop, score="cls") == ["cls", "cls", None, None]
    assert queries(**drop, score="norm") == [None] * 4
    assert queries(**drop, resets=(1,)) == [None, "all", None, None]
    # Tokens may return: every layer that leaves some out chooses anew.
    skip = {"semantics": "skip", "keep": (5, 5, 9)}
    assert queries(**skip) == ["all", "all", None]
    assert queries(semantics="zero", keep=(5, 5)) == ["all", "all"]
    assert cascades.scored_query(None, 0, 9) is None


# Presets.


def test_ratios_become_counts_by_flooring_what_is_pruned():
    # 0.29 * 100 is 28.999999999999996 and 0.57 * 100 is 56.99999999999999.
    assert cascades.keep_counts([0.29, 0.57, 0.0, 0.999], 100) == [71, 43, 100, 1]
    # 19.6, 9.9 and 130.666.. pruned of 196, 99 and 196.
    assert cascades.keep_counts([0.1], 196) == [177]
    assert cascades.keep_counts([0.1], 99) == [90]
    assert cascades.keep_counts([2 / 3], 196) == [66]
    for num_patches in (7, 64, 100, 196):
        for pruned in range(num_patches):
            kept = cascades.keep_counts([pruned / num_patches], num_patches)
            assert kept == [num_patches - pruned]


def test_dropped_counts_never_grow_and_others_do():
    ratios, mlp_ratios = [0.5, 0.1, 0.6], [0.2, 0.55, 0.0]
    cascade = cascades.from_ratios(ratios, 20, mlp_ratios)
    assert cascade.counts == ((10, 10), (10, 9), (8, 8))
    cascade = cascades.from_ratios(
        ratios, 20, mlp_ratios, semantics="skip", score="sum"
    )
    assert cascade.counts == ((10, 16), (18, 9), (8, 20))
    assert (cascade.semantics, cascade.score) == ("skip", "sum")
    assert cascades.from_ratios([0.1, 0.5], 20).counts == ((18, 18), (10, 10))


@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_ramp_is_the_released_codes_for_12_layers(ratio):
    # 0 for layers 0 to 2, a sixth more each, the plateau from layer 8 on.
    sixths = [0, 0, 0, 1, 2, 3, 4, 5, 6, 6, 6, 6]
    expected = [ratio * sixth / 6 for sixth in sixths]
    np.testing.assert_allclose(cascades.ramp_ratios(ratio, 12), expected, rtol=1e-12)
    cascade = cascades.report(ratio, num_layers=12, num_patches=196, score="sum")
    pruned = [int(ratio * sixth * 196 / 6 + 1e-9) for sixth in sixths]
    assert cascade == Cascade(
        keep=tuple(196 - p for p in pruned),
        keep_mlp=tuple(196 - p for p in pruned),
        score="sum",
    )


def test_ramp_in_proportion_and_by_hand():
    expected = [0, 0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4]
    np.testing.assert_allclose(cascades.ramp_ratios(0.4, 8), expected, rtol=1e-12)
    np.testing.assert_allclose(
        cascades.ramp_ratios(0.6, 4, start=1, length=2), [0, 0.3, 0.6, 0.6], rtol=1e-12
    )
    assert cascades.ramp_ratios(0.5, 1) == [0.5]


def test_constant_ratios_spare_the_first_layers():
    assert cascades.constant_ratios(0.3, 4) == [0.0, 0.3, 0.3, 0.3]
    assert cascades.constant_ratios(0.3, 3, start=0) == [0.3, 0.3, 0.3]


def test_range_ratios_by_hand():
    # Deviations -.2, 0, .2 over the largest: -1, 0, 1.
    ratios = cascades.range_ratios(0.4, [0.9, 0.1, 0.3, 0.5])
    np.testing.assert_allclose(ratios, [0, 0.2, 0.4, 0.6], rtol=1e-12)
    ratios = cascades.range_ratios(0.4, [0.1, 0.3, 0.5], gamma=0.25, start=0)
    np.testing.assert_allclose(ratios, [0.3, 0.4, 0.5], rtol=1e-12)
    # Nothing to follow.
    ratios = cascades.range_ratios(0.4, [0.5] * 3)
    np.testing.assert_allclose(ratios, [0, 0.4, 0.4], rtol=1e-12)
    assert cascades.range_ratios(0.0, [0.1, 0.2, 0.7]) == [0, 0, 0]


@pytest.mark.parametrize(
    ("ratio", "gamma"),
    [(0.1, 0.5), (0.1, 3), (0.5, 1), (0.5, 3), (0.7, 0.9), (0.85, 0.5), (0.9, -0.9)],
)
def test_range_ratios_keep_their_mean_and_bounds(ratio, gamma):
    ranges = np.random.default_rng(1).uniform(size=12)
    ratios = cascades.range_ratios(ratio, ranges, gamma=gamma, start=2)
    assert ratios[:2] == [0, 0] and len(ratios) == 12
    assert 0 <= min(ratios) and max(ratios) <= 0.9
    np.testing.assert_allclose(np.mean(ratios[2:]), ratio, rtol=1e-9)
    # A longer range never prunes less.
    steps = np.diff(np.array(ratios[2:])[np.argsort(ranges[2:])])
    assert np.all(np.sign(gamma) * steps >= -1e-12)


@pytest.mark.parametrize("double_counter", [True, False])
def test_released_code_zeroes_the_documented_counts(double_counter):
    attention = [0, 0, 0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.3, 0.3, 0.3]
    mlp = [0.04 * layer for layer in range(12)]
    schedule = [0, 2, 4, 6, 8, 10] * 2 if double_counter else range(12)
    cascade = cascades.released_code(double_counter=double_counter)
    # 197 tokens compete, CLS among them.
    pruned = [(196 - keep, 196 - keep_mlp) for keep, keep_mlp in cascade.counts]
    assert pruned == [(int(attention[i] * 197), int(mlp[i] * 197)) for i in schedule]
    assert cascade.resets == ((6,) if double_counter else ())
    assert (cascade.semantics, cascade.mode, cascade.score) == ("zero", "masked", "max")
    assert cascade.cumulative and cascade.stale_threshold and not cascade.keep_cls
    assert (cascade.alpha, cascade.beta) == (0.0, 1.0)


def test_stale_thresholds_prune_fewer_than_asked():
    """Scores grow in each layer, so that few are below a threshold of the old ones."""
    options = {"num_layers": 6, "num_patches": 12, "plateau": 0.9}
    stale, fresh = (
        cascades.released_code(**options, stale_threshold=flag)
        for flag in (True, False)
    )
    params = vit_oracle.random_params(make(stale), IMAGES)
    images = vit_oracle.random_images(IMAGES)
    few, asked = (
        sum(NUM_TOKENS - len(kept) for layer in trace.mlp for kept in layer)
        for trace in (oracle(cascade, params, images) for cascade in (stale, fresh))
    )
    assert asked == 2 * sum(12 - keep for keep in fresh.keep_mlp) > 2 * few


def test_evit_has_the_published_counts():
    cascade = cascades.evit(0.7, num_layers=12, num_patches=196, fuse=False)
    # ceil(.7 * 196) = 138, ceil(.7 * 138) = 97, ceil(.7 * 97) = 68.
    assert cascade.keep == (196,) * 4 + (138,) * 3 + (97,) * 3 + (68,) * 2
    assert cascade.keep_mlp == (196,) * 3 + (138,) * 3 + (97,) * 3 + (68,) * 3
    assert (cascade.score, cascade.cumulative, cascade.fuse) == ("cls", False, False)
    cascade = cascades.evit(0.7, num_layers=12, num_patches=196)
    # With a fused one: 139, ceil(.7 * 139) + 1 = 99, ceil(.7 * 99) + 1 = 71.
    assert cascade.keep_mlp == (196,) * 3 + (139,) * 3 + (99,) * 3 + (71,) * 3
    assert cascade.fuse
    cascade = cascades.evit(0.5, num_layers=4, num_patches=10, layers=[2], fuse=False)
    assert cascade.counts == ((10, 10), (10, 10), (10, 5), (5, 5))
    cascade = cascades.evit(1.0, num_layers=4, num_patches=10)
    assert cascade.counts == ((10, 10),) * 4


def test_fused_token_stands_at_the_end_of_evits_tokens():
    cascade = cascades.evit(0.5, num_layers=3, num_patches=12)
    params = vit_oracle.random_params(make(cascade), IMAGES)
    images = vit_oracle.random_images(IMAGES)
    trace = oracle(cascade, params, images)
    blocks = captured_blocks(cascade, params, images)
    for block, expected in zip(blocks, trace.at_hand, strict=True):
        np.testing.assert_array_equal(block["tokens"][0], expected)
    assert all(row[-1] == -1 for row in trace.at_hand[-1])


@pytest.mark.parametrize(
    ("num_merged", "after"),
    [
        (13, [184, 171, 158, 145, 132, 119, 106, 93, 80, 67, 54, 41]),
        # The last has 21 tokens, of which half of 20 can go.
        (16, [181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21, 11]),
    ],
)
def test_merging_has_the_published_token_counts(num_merged, after):
    cascade = cascades.token_merging(num_merged, num_layers=12, num_patches=196)
    assert [keep + 1 for keep in cascade.keep_mlp] == after
    assert [keep + 1 for keep in cascade.keep] == [197, *after[:-1]]


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"semantics": "forget"}, "semantics 'forget' is none of drop, skip, zero"),
        ({"mode": "fast"}, "mode 'fast' is none of compact, masked"),
        ({"score": "min"}, "score 'min' is none of max, sum, cls, norm, random, merge"),
        ({"head_score": "sum"}, "head_score 'sum' is none of max, confidence"),
        ({"head_scope": "layer"}, "head_scope 'layer' is none of batch, image"),
        ({"keep": (3, -1)}, r"keep must be one count of at least 0 .* got \(3, -1\)"),
        ({"keep_mlp": (3,)}, r"keep_mlp must be .* each of the 2 layers, got \(3,\)"),
        ({"keep_heads": (2, 0)}, r"keep_heads must .* at least 1 .* got \(2, 0\)"),
        ({"keep_heads": (2, 1, 1)}, "keep_heads must be one count"),
        ({"keep": (3, 4)}, r"must not grow from layer .* got \[3, 3, 4, 4\]"),
        ({"keep_mlp": (6, 4)}, r"must not grow from layer .* got \[5, 6, 3, 4\]"),
        ({"keep_cls": False}, "keep_cls=False is for semantics 'skip' and 'zero'"),
        (
            {"keep_cls": False, "semantics": "zero", "score": "cls"},
            "not for score 'cls'",
        ),
        ({"score": "merge"}, "must be the `keep_mlp` of the layer before"),
        (
            {"score": "merge", "keep_mlp": (3, 2), "mode": "masked"},
            "merging is compact drop without fuse",
        ),
        (
            {"score": "merge", "keep_mlp": (3, 2), "semantics": "skip"},
            "merging is compact drop without fuse",
        ),
        (
            {"score": "merge", "keep_mlp": (3, 2), "fuse": True},
            "merging is compact drop without fuse",
        ),
        (
            {"score": "merge", "keep_mlp": (3, 1)},
            r"can merge at most half of its patches, got \[5, 3, 3, 1\]",
        ),
        ({"fuse": True, "semantics": "skip"}, "fuse is for compact drop only"),
        ({"fuse": True, "mode": "masked"}, "fuse is for compact drop only"),
        ({"fuse": True, "keep": (5, 0)}, "fuse is for compact drop only, with a patch"),
        (
            {"keep_heads": (2, 1), "head_scope": "image"},
            "head_scope='image'.* save nothing; take mode='masked'",
        ),
        ({"stale_threshold": True}, "semantics='zero', mode='masked' only"),
        (
            {"stale_threshold": True, "semantics": "zero"},
            "semantics='zero', mode='masked' only",
        ),
    ],
)
def test_cascades_that_do_not_fit_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Cascade(**({"keep": (5, 3)} | options))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: cascades.from_ratios([0.1, 1.0], 9), r"lie in \[0, 1\), got 1.0"),
        (lambda: cascades.from_ratios([-0.1], 9), r"lie in \[0, 1\), got -0.1"),
        (lambda: cascades.from_ratios([0.1], 9, [1.5]), r"lie in \[0, 1\), got 1.5"),
        (lambda: cascades.from_ratios([float("nan")], 9), r"lie in \[0, 1\), got nan"),
        (
            lambda: cascades.from_ratios([0.1, 0.2], 9, [0.1]),
            "2 ratios do not go with 1 mlp_ratios",
        ),
        (
            lambda: cascades.report(1.0, num_layers=4, num_patches=9),
            r"lie in \[0, 1\), got 1.0",
        ),
        (
            lambda: cascades.evit(0.0, num_layers=4, num_patches=9),
            r"keep_rate must lie in \(0, 1\], got 0.0",
        ),
        (
            lambda: cascades.evit(1.1, num_layers=4, num_patches=9),
            r"keep_rate must lie in \(0, 1\], got 1.1",
        ),
        (
            lambda: cascades.token_merging(-1, num_layers=4, num_patches=9),
            "num_merged must be at least 0, got -1",
        ),
        (
            lambda: cascades.range_ratios(0.95, [0.1, 0.2]),
            r"ratio must lie in \[0, 0.9\] .* got 0.95 and 1",
        ),
        (lambda: cascades.range_ratios(-0.1, [0.1, 0.2]), r"got -0.1 and 1"),
        (
            lambda: cascades.range_ratios(0.5, [0.1, 0.2], start=2),
            "start below 2, got 0.5 and 2",
        ),
        (lambda: cascades.range_ratios(0.5, [0.1, 0.2], largest=1.0), "got 0.5 and 1"),
        (
            # One layer prunes nothing, the others at most 0.9.
            lambda: cascades.range_ratios(0.7, [0.1, 0.2, 0.3], gamma=3, start=0),
            "mean of 0.7 is out of reach with gamma 3",
        ),
    ],
)
def test_wrong_ratios_are_refused(function, message):
    with pytest.raises(ValueError, match=message):
        function()
