"""What the shapes of a file do not tell: heads, config.json, normalization."""

import json

import chex
import numpy as np
import pytest
from vit_files import (
    GOOGLE,
    apply,
    flat,
    forward,
    hugging_face,
    images_of,
    linen,
    network,
    timm,
    timm_average,
    write,
)

from vit.checkpoint import (
    load_checkpoint,
    load_normalization,
    save_checkpoint,
)
from vit.model import POOLS

pytestmark = pytest.mark.usefixtures("unoptimized")


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(("width", "hidden", "heads"), [(192, 768, 3), (256, 1280, 4)])
def test_heads_of_published_networks_are_known(tmp_path, width, hidden, heads):
    sizes = dict(layers=1, size=1, channels=1, grid=1)
    net = network(width=width, heads=heads, hidden=hidden, **sizes)
    for layout in (timm, hugging_face):
        path = write(tmp_path, layout, net)
        model, params = load_checkpoint(path)
        assert model.num_heads == heads and model.head_dim is None
        chex.assert_trees_all_equal(flat(params), linen(net))
        assert load_checkpoint(path, num_heads=2)[0].num_heads == 2


def test_heads_of_other_networks_are_asked_for(tmp_path):
    # Two heads of 64 would be a guess.
    net = network(width=128, heads=2, hidden=3, layers=1, size=1, channels=1, grid=1)
    for layout in (timm, hugging_face):
        path = write(tmp_path, layout, net)
        with pytest.raises(
            ValueError, match="128 with an MLP of 3 is not .*set num_he"
        ):
            load_checkpoint(path)


@pytest.mark.parametrize(
    ("width", "heads", "where", "usual"),
    [
        (192, 12, "MAE-Lite", 3),
        (384, 12, "MoCo v3", 6),
        (768, 16, "vit_base_.*gap", 12),
    ],
)
def test_two_published_numbers_of_heads_are_asked_for(
    tmp_path, width, heads, where, usual
):
    sizes = {"width": width, "hidden": 4 * width, "layers": 1, "size": 1, "channels": 1}
    net = network(heads=heads, grid=2, **sizes)
    net["positions"][0] = 0  # As before sines and cosines.
    arrays = timm(net)
    name = {192: "tiny", 384: "small", 768: "base"}[width]
    architecture = f"vit_{name}_patch1_2"
    if width == 768:
        del arrays["cls_token"]
        arrays["pos_embed"] = arrays["pos_embed"][:, 1:].copy()
        architecture = "vit_base_patch16_siglip_gap_224"
    path = write(tmp_path, timm, net, arrays)
    match = f"{heads} heads in {where}.* and {usual} in others; set num_heads"
    with pytest.raises(ValueError, match=match):
        load_checkpoint(path)
    assert load_checkpoint(path, num_heads=heads)[0].num_heads == heads
    config = {"architecture": architecture}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_checkpoint(path)[0].num_heads == usual


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    ("layout", "config", "fields"),
    [
        (
            timm,
            {
                "architecture": "vit_tiny_patch16_224",
                "global_pool": "avg",
                "model_args": {"num_heads": 3, "act_layer": "gelu_tanh"},
            },
            {"pool": "mean", "gelu": "tanh", "num_heads": 3},
        ),
        (
            timm,
            {"architecture": "vit_base_patch16_siglip_gap_224", "model_args": None},
            {"gelu": "erf"},
        ),
        (
            timm,
            {"architecture": "vit_so400m_patch16_siglip_gap_256"},
            {"gelu": "tanh"},
        ),
        (
            timm_average,  # Of one token, fc_norm is the last normalization.
            {"global_pool": "token", "model_args": {"num_heads": 6}},
            {"pool": "cls", "num_heads": 6},
        ),
        (
            timm_average,
            {"global_pool": "avg", "model_args": {"num_heads": 6}},
            {"pool": "mean_before_norm", "num_heads": 6},
        ),
        (hugging_face, {"num_attention_heads": 6, "hidden_act": "gelu_new"}, {}),
    ],
    ids=["timm", "siglip", "siglip-tanh", "fc_norm", "fc_norm-cls", "hugging_face"],
)
def test_config_tells_what_shapes_do_not(tmp_path, layout, config, fields):
    net = network()
    path = write(tmp_path, layout, net)
    (tmp_path / "config.json").write_text(json.dumps(config))
    told = (
        {} if "num_heads" in str(config) or layout is hugging_face else {"num_heads": 3}
    )
    model, params = load_checkpoint(path, **told)
    if layout is hugging_face:
        fields = {"gelu": "tanh", "num_heads": 6, "ln_eps": 1e-12}
    for name, value in fields.items():
        assert getattr(model, name) == value
    images = images_of(net)
    expected = forward(
        net | {"heads": model.num_heads}, images, model.gelu, 1e-6, model.pool
    )
    np.testing.assert_allclose(apply(model, params, images), expected, atol=2e-5)
    # An argument counts more.
    other = {"gelu": "erf", "ln_eps": 0.1, "pool": "cls", "num_heads": 2}
    model, _ = load_checkpoint(path, **other)
    assert {name: getattr(model, name) for name in other} == other


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"global_pool": "map"}, "global_pool of .* one of token, avg; got 'map'"),
        ({"global_pool": ["avg"]}, "global_pool of .*; got .'avg'."),
        ({"model_args": {"act_layer": "quick_gelu"}}, "act_layer .*got 'quick_gelu'"),
        ({"model_args": {"norm_layer": "rmsnorm"}}, "norm_layer .*; got 'rmsnorm'"),
        ({"model_args": {"num_heads": 0}}, "the invalid value 0 for num_heads"),
        ({"architecture": "vit_base_patch16_gap_224"}, "must divide .* 12, got 16"),
        ({"architecture": "vit_base_patch16_rpn_224"}, "res-post-norm"),
        ({"architecture": "vit_small_patch16_rope_ape_224"}, "rotary positions"),
        (
            {"global_pool": "avg", "model_args": {"pool_include_prefix": True}},
            "not supported: pool_include_prefix",
        ),
        ({"model_args": [1]}, "model_args of config.json must be an object"),
    ],
)
def test_timm_config_that_does_not_fit_is_refused(tmp_path, config, match):
    path = write(tmp_path, timm, network())
    (tmp_path / "config.json").write_text(json.dumps(config))
    num_heads = None if "got 16" in match else 3
    with pytest.raises(ValueError, match=f"model.safetensors: .*{match}"):
        load_checkpoint(path, num_heads=num_heads)


@pytest.mark.parametrize("layout", GOOGLE)
def test_networks_of_google_expect_images_between_minus_one_and_one(tmp_path, layout):
    mean, std = load_normalization(write(tmp_path, layout, network()))
    np.testing.assert_array_equal((np.array([0, 1]) - mean) / std, [-1, 1])


@pytest.mark.parametrize(
    ("layout", "name", "config", "expected"),
    [
        (timm, "config.json", None, None),
        (timm, "config.json", {"pretrained_cfg": {"input_size": [2, 4, 4]}}, None),
        (
            timm,
            "config.json",
            {"mean": [9, 9], "pretrained_cfg": {"mean": [0.1, 0.2], "std": [0.3, 0.4]}},
            lambda x: (x - [0.1, 0.2]) / [0.3, 0.4],
        ),
        (  # As timm wrote it before 2023.
            timm,
            "config.json",
            {"architecture": "vit_tiny_patch3_12", "mean": [0.1, 0.2], "std": [1, 2]},
            lambda x: (x - [0.1, 0.2]) / [1, 2],
        ),
        (  # timm keeps three numbers for networks of other channels.
            timm,
            "config.json",
            {"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}},
            None,
        ),
        (hugging_face, "preprocessor_config.json", None, None),
        (hugging_face, "preprocessor_config.json", {"do_resize": True}, None),
        (
            hugging_face,
            "preprocessor_config.json",
            {"do_normalize": True, "image_mean": [0.1, 0.2], "image_std": [0.3, 0.4]},
            lambda x: (x - [0.1, 0.2]) / [0.3, 0.4],
        ),
        (
            hugging_face,
            "preprocessor_config.json",
            {"do_normalize": False, "image_mean": [0.1, 0.2], "image_std": [0.3, 0.4]},
            lambda x: x,
        ),
        (
            hugging_face,
            "preprocessor_config.json",
            {"do_rescale": False, "image_mean": [10, 20], "image_std": [30, 40]},
            lambda x: (255 * x - [10, 20]) / [30, 40],
        ),
        (
            hugging_face,
            "preprocessor_config.json",
            {"rescale_factor": 1 / 100, "image_mean": 0.5, "image_std": 0.25},
            lambda x: (255 * x / 100 - 0.5) / 0.25,
        ),
    ],
    ids=range(11),
)
def test_normalization_is_that_of_the_library(tmp_path, layout, name, config, expected):
    path = write(tmp_path, layout, network())
    if config is not None:
        (tmp_path / name).write_text(json.dumps(config))
    images = np.random.default_rng(0).uniform(size=(3, 4, 4, 2))
    for place in (path, tmp_path):
        stated = load_normalization(place)
        if expected is None:
            assert stated is None
        else:
            mean, std = stated
            np.testing.assert_allclose(
                (images - mean) / std, expected(images), rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ("{", "preprocessor_config.json is not valid JSON"),
        ('{"rescale_factor": 0}', "rescale_factor .* must be positive, got 0"),
        (
            '{"image_mean": [0, 0], "image_std": [1, 0]}',
            "preprocessor_config.json: std must be a positive number",
        ),
        (
            '{"image_mean": {}, "image_std": 1}',
            "preprocessor_config.json: mean must be .* got {}",
        ),
    ],
)
def test_damaged_normalization_is_refused(tmp_path, config, match):
    path = write(tmp_path, hugging_face, network())
    (tmp_path / "preprocessor_config.json").write_text(config)
    with pytest.raises(ValueError, match=f"model.safetensors: {match}"):
        load_normalization(path)


@pytest.mark.parametrize("pool", POOLS)
def test_every_pooling_is_that_of_the_equations(tmp_path, pool):
    net = network(layers=1)
    if pool == "cls_and_mean":
        net["head"] = np.random.default_rng(1).normal(size=(5, 24)), net["head"][1]
    path = write(tmp_path, linen, net, linen(net))
    model, params = load_checkpoint(path, pool=pool)
    images = images_of(net)
    expected = forward(net, images, "tanh", 1e-6, pool)
    np.testing.assert_allclose(apply(model, params, images), expected, atol=2e-5)
    save_checkpoint(tmp_path / "mine.npz", model, params)
    assert load_checkpoint(tmp_path / "mine.npz")[0] == model


def test_hugging_face_config_is_read(tmp_path):
    net = network()
    path = write(tmp_path, hugging_face, net)
    config = {
        "num_attention_heads": 3,
        "layer_norm_eps": 0.05,
        "hidden_act": "gelu_new",
        "hidden_size": 12,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, params = load_checkpoint(path)
    assert (model.num_heads, model.ln_eps, model.gelu) == (3, 0.05, "tanh")
    images = images_of(net)
    expected = forward(net, images, "tanh", 0.05)
    np.testing.assert_allclose(apply(model, params, images), expected, atol=2e-5)
    assert load_checkpoint(path, num_heads=6)[0].num_heads == 6
    (tmp_path / "config.json").write_text('{"hidden_act": "gelu"}')
    model, _ = load_checkpoint(path, num_heads=3)
    assert (model.ln_eps, model.gelu) == (1e-12, "erf")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"num_attention_heads":', "config.json is not valid JSON"),
        ("\xff", "config.json is not valid JSON"),
        ("[1]", r"got \[1\]"),
        ('{"hidden_act": "relu"}', "one of gelu, gelu_new.*; got 'relu'"),
        ('{"hidden_act": "tanh"}', "config.json must be one of .*; got 'tanh'"),
        ('{"hidden_act": ["gelu"]}', "must be one of"),
        (
            '{"num_attention_heads": "3"}',
            "config.json has .* value '3' for num_heads",
        ),
        (
            '{"num_attention_heads": 0}',
            "config.json has .* value 0 for num_heads",
        ),
        ('{"num_attention_heads": 5}', "num_heads must divide .* 12, got 5"),
        (
            '{"layer_norm_eps": null}',
            "config.json has .* value None for ln_eps",
        ),
        ('{"layer_norm_eps": NaN}', "config.json has .* value nan for ln_eps"),
        ('{"layer_norm_eps": true}', "config.json has .* value True for ln_eps"),
        (
            '{"model_type": "audio-spectrogram-transformer"}',
            r"not supported: overlapping patches \(AST\), audio-spectrogram",
        ),
        ('{"hidden_size": 24}', "another network: hidden_size is 24, .* weights is 12"),
        ('{"num_hidden_layers": 7}', "another network: num_hidden_layers is 7"),
        ('{"model_args": {"embed_dim": 24}}', "another network: embed_dim is 24"),
        ('{"intermediate_size": 48}', "another network: intermediate_size is 48"),
        ('{"patch_size": 16}', "another network: patch_size is 16"),
        ("{}", "width 12 with an MLP of 20 is not .*; set num_heads"),
    ],
)
def test_config_that_does_not_fit_is_refused(tmp_path, text, match):
    path = write(tmp_path, hugging_face, network())
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"model.safetensors: .*{match}"):
        load_checkpoint(path)
