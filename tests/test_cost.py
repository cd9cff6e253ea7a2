"""Counts of multiply-adds and parameters: published numbers, XLA's, real trees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vit_oracle

from vit import cost, schedules
from vit import model as models
from vit.cascade import MODES, Cascade
from vit.model import ViT

pytestmark = [
    pytest.mark.usefixtures("unoptimized"),
    # Some cascades here prune in the first layer, where the first patches are kept.
    pytest.mark.filterwarnings("ignore:the attention of layer"),
]

SIZES = {"num_layers": 12, "num_patches": 196}


def saved(model, cascade, image_size=224):
    dense = cost.count(model, image_size).total
    return 1 - cost.count(model.clone(cascade=cascade), image_size).total / dense


# Published numbers, at 224 pixels in patches of 16.


@pytest.mark.parametrize(("variant", "giga"), [("Ti", 1.25), ("S", 4.60), ("B", 17.56)])
def test_dense_networks_cost_what_is_published(variant, giga):
    # Without a head, as in the literature's count; it is 0.0002 to 0.0008 here.
    model = models.make(variant, 0, 16)
    assert round(cost.count(model, 224).total / 1e9, 2) == giga


@pytest.mark.parametrize(
    ("ratio", "percent"),
    [(0.2, 11.0), (0.3, 16.5), (0.4, 21.9), (0.5, 27.4), (0.6, 32.8)],
)
def test_plateaus_of_the_ramp_save_what_is_computed_for_vit_b(ratio, percent):
    model = models.make("B", 0, 16)
    share = saved(model, schedules.cp_vit(ratio, **SIZES))
    # There the pruned tokens are not floored.
    assert 0 <= percent - 100 * share < 0.25


@pytest.mark.parametrize(("keep_rate", "giga"), [(0.7, 3.00), (0.5, 2.28)])
def test_evit_costs_what_is_published(keep_rate, giga):
    model = models.make("S", 0, 16)
    cascade = schedules.evit(keep_rate, **SIZES, fuse=None)
    assert abs(cost.count(model.clone(cascade=cascade), 224).total / 1e9 - giga) < 0.01


@pytest.mark.parametrize(("num_merged", "percent"), [(8, 25.4), (13, 41.0), (16, 50.1)])
def test_merging_saves_what_is_computed_for_vit_b(num_merged, percent):
    model = models.make("B", 0, 16)
    share = saved(model, schedules.token_merging(num_merged, **SIZES))
    # The matching itself is counted here, and there it is not.
    assert 0 <= percent - 100 * share < 1


@pytest.mark.parametrize(("gone", "percent"), [(1, 3.0), (3, 9.0), (6, 17.9)])
def test_removed_heads_save_what_is_computed_for_vit_b(gone, percent):
    model = models.make("B", 0, 16)
    fewer = model.clone(num_heads=12 - gone, head_dim=64)
    share = 1 - cost.count(fewer, 224).total / cost.count(model, 224).total
    assert abs(100 * share - percent) < 0.1


@pytest.mark.parametrize(
    ("side", "percent"), [(192, 27.2), (176, 39.0), (160, 49.8), (128, 67.9)]
)
def test_smaller_images_save_what_is_computed_for_vit_b(side, percent):
    model = models.make("B", 0, 16)
    share = 1 - cost.count(model, side).total / cost.count(model, 224).total
    assert abs(100 * share - percent) < 0.1


# By hand.


def test_cost_by_hand():
    # 6 x 8 pixels of 2 channels in 12 patches of 2 x 2; D 10, H * d 12, M 14 and 5.
    model = ViT(
        num_classes=7,
        patch_size=2,
        hidden_size=10,
        num_layers=2,
        num_heads=(3, 2),
        head_dim=4,
        mlp_dim=(14, 5),
        representation_size=9,
        cascade=Cascade(keep=(12, 8), keep_mlp=(10, 3)),
    )
    assert cost.count(model, (6, 8), channels=2) == cost.Cost(
        total=960 + (6240 + 4056) + 3080 + (2880 + 1296) + 400 + 153,
        embedding=12 * 4 * 2 * 10,
        attention=(4 * 13 * 10 * 12 + 2 * 13**2 * 12, 4 * 9 * 10 * 8 + 2 * 9**2 * 8),
        mlp=(2 * 11 * 10 * 14, 2 * 4 * 10 * 5),
        head=10 * 9 + 9 * 7,
        attention_tokens=(13, 9),
        mlp_tokens=(11, 4),
    )


def test_zeroed_tokens_are_one_row_and_masked_ones_cost_all():
    options = {"keep": (12, 5, 0), "keep_mlp": (7, 12, 3)}
    counts = {
        (semantics, mode): cost.token_counts(
            Cascade(**options, semantics=semantics, mode=mode), 12, 3
        )
        for semantics in ("skip", "zero")
        for mode in MODES
    }
    assert counts["skip", "compact"] == ((13, 8), (6, 13), (1, 4))
    # One row more, unless nothing is zeroed.
    assert counts["zero", "compact"] == ((13, 9), (7, 13), (2, 5))
    everything = ((13, 13),) * 3
    assert counts["skip", "masked"] == counts["zero", "masked"] == everything
    assert cost.token_counts(None, 12, 3) == everything


# Against XLA's count of the traced program.

SMALL = {
    "num_classes": 10,
    "patch_size": 4,
    "hidden_size": 256,
    "num_layers": 3,
    "num_heads": 8,
    "mlp_dim": 512,
}
CASCADES = {
    "dense": None,
    "masked": Cascade(keep=(64, 40, 20), mode="masked"),
    "drop": Cascade(keep=(64, 40, 20), keep_mlp=(50, 30, 20)),
    "skip": Cascade(keep=(50, 20, 40), semantics="skip"),
    "zero": Cascade(keep=(50, 20, 64), keep_mlp=(30, 64, 10), semantics="zero"),
    "heads": Cascade(keep=(64, 30, 30), keep_heads=(2, 8, 5)),
    "heads-masked": Cascade(keep=(64,) * 3, keep_heads=(2, 8, 5), mode="masked"),
    "norm": Cascade(keep=(30, 20, 10), score="norm"),
}


def forward_of(model):
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    return lambda p, x: model.apply({"params": p}, x), (params, images)


def check_against_xla(model, *, uncounted=0):
    """The products exactly, and XLA's count, with all else, within 2 %."""
    forward, arguments = forward_of(model)
    expected = cost.count(model, 32).total
    assert sum(n for n, _ in vit_oracle.products(forward, *arguments)) == (
        expected + uncounted
    )
    analysis = jax.jit(forward).lower(*arguments).cost_analysis()
    assert abs(analysis["flops"] / 2 / expected - 1) < 0.02


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("cascade", CASCADES.values(), ids=CASCADES.keys())
def test_products_are_those_of_the_program(cascade):
    check_against_xla(ViT(**SMALL, cascade=cascade))


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    "options",
    [
        {"stem": (24, 48), "representation_size": 100},
        {"num_heads": (8, 3, 1), "head_dim": 32, "mlp_dim": (512, 300, 77)},
        {"num_registers": 3, "cascade": CASCADES["zero"], "pool": "cls_and_mean"},
    ],
    ids=["stem", "uneven", "registers"],
)
def test_products_of_other_networks(options):
    check_against_xla(ViT(**(SMALL | options)))


def test_products_of_merging_and_of_fusing():
    merging = schedules.token_merging(12, num_layers=3, num_patches=64)
    # Sums of sizes: the two sides of 65, 53 and 41 tokens.
    check_against_xla(
        ViT(**SMALL, cascade=merging), uncounted=33 * 32 + 27 * 26 + 21 * 20
    )
    evit = schedules.evit(0.6, num_layers=3, num_patches=64)
    # A sum over the 65, 41 and 26 tokens makes the fused token.
    assert evit.counts == ((64, 40), (40, 25), (25, 16))
    check_against_xla(ViT(**SMALL, cascade=evit), uncounted=(65 + 41 + 26) * 256)


# Parameters.


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    ("variant", "count"),
    [("Ti", 5_717_416), ("S", 22_050_664), ("B", 86_567_656), ("L", 304_326_632)],
)
def test_variants_have_the_published_parameters(variant, count):
    model = models.make(variant, 1000, 16)
    assert cost.count_params(model, 224) == count
    assert real_count(model, 224) == count


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("variant", [name for name in models.VARIANTS if "_" in name])
@pytest.mark.parametrize("stem", [(), (48, 96)])
def test_small_variants_have_the_counted_parameters(variant, stem):
    model = models.make(variant, 10, 4, stem=stem)
    assert cost.count_params(model, 32) == real_count(model, 32)


@pytest.mark.slow_after(3)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_classes": 0},
        {"representation_size": 9},
        {"representation_size": 9, "num_classes": 0},
        {"stem": (3,)},
        {"stem": (3, 5)},
        {"head_dim": 6},
        {"num_heads": (5, 1, 2), "head_dim": 6},
        {"mlp_dim": (3, 14, 1)},
        {"num_registers": 4, "pool": "cls_and_mean", "representation_size": 9},
        {"num_registers": 1, "distilled": True},
        {"num_registers": 1, "distilled": True, "num_classes": 0},
        {"class_token": False, "pool": "mean_before_norm"},
        {"cascade": Cascade(keep=(9, 5, 5), keep_heads=(1, 2, 3))},
    ],
)
def test_parameters_are_those_of_the_tree(options):
    sizes = {
        "num_classes": 7,
        "patch_size": 4,
        "hidden_size": 10,
        "num_layers": 3,
        "num_heads": 5,
        "mlp_dim": 14,
    }
    model = ViT(**(sizes | options))
    assert cost.count_params(model, 12, channels=2) == real_count(model, 12, channels=2)


def real_count(model, image_size, channels=3):
    images = jax.ShapeDtypeStruct((1, image_size, image_size, channels), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes["params"]))


def test_sides_of_few_bits_do_not_wrap():
    model = ViT(**SMALL)
    side = 4096
    expected = cost.count(model, side)
    assert cost.count(model, np.array([side, side], np.int16)) == expected
    assert cost.count(model, np.int32(side)) == expected


# Errors.


def test_what_does_not_fit_is_refused():
    model = ViT(**SMALL)
    with pytest.raises(ValueError, match="30x30 .* multiples of 4"):
        cost.count(model, 30)
    with pytest.raises(ValueError, match="33x33 .* multiples of 4"):
        cost.count_params(model, 33)
    with pytest.raises(ValueError, match=r"must be of whole numbers, got \(32.0, 32\)"):
        cost.count(model, (32.0, 32))
    with pytest.raises(ValueError, match="gelu must be one of tanh, erf; got 'relu'"):
        cost.count(model.clone(gelu="relu"), 32)
    with pytest.raises(
        ValueError, match="cascade is for 2 layers and at least 9 patch"
    ):
        cost.count(model.clone(cascade=Cascade(keep=(9, 9))), 32)
    with pytest.raises(
        ValueError, match="at least 64 patches; the network has 3 and 16"
    ):
        cost.count(model.clone(cascade=Cascade(keep=(64, 9, 9))), 16)
    cascade = Cascade(keep=(64,) * 3, keep_heads=(2, 9, 5))
    with pytest.raises(ValueError, match="keep_heads must be at most 8 in layer 1, go"):
        cost.count(model.clone(cascade=cascade), 32)
