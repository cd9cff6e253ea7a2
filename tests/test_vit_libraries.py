"""Checkpoints of the real timm and transformers, in both directions.

The tests are skipped where PyTorch and the library are not installed.
"""

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy

import vit
from vit.checkpoint import load_checkpoint, load_normalization, save_checkpoint

torch = pytest.importorskip("torch", reason="needs PyTorch")
# Warnings of these libraries are not ours.
pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {"img_size": 12, "patch_size": 3, "embed_dim": 16, "depth": 2, "num_heads": 2}
TIMM = {
    "vit": ("vit_tiny_patch16_224", {}),
    "average": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "average-norm": ("vit_tiny_patch16_224", {"global_pool": "avg", "fc_norm": False}),
    "token-norm": ("vit_tiny_patch16_224", {"fc_norm": True}),
    "no-bias": ("vit_tiny_patch16_224", {"qkv_bias": False}),
    "oblong": ("vit_tiny_patch16_224", {"img_size": (9, 15)}),
    "deit": ("deit_tiny_distilled_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {}),
    "dinov2": ("vit_small_patch14_dinov2", {}),
    "dinov2-registers": ("vit_small_patch14_reg4_dinov2", {}),
    "siglip-gap": ("vit_base_patch16_siglip_gap_224", {}),
    "siglip-gap-tanh": ("vit_base_patch32_siglip_gap_256", {}),
}
CONFIG = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 3,
    "num_labels": 5,
}
HUGGING_FACE = {
    "vit": ("ViTForImageClassification", "ViTConfig", {"intermediate_size": 20}),
    "tanh": (
        "ViTForImageClassification",
        "ViTConfig",
        {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-2},
    ),
    "deit": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", {}),
    "deit-alone": ("DeiTForImageClassification", "DeiTConfig", {}),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", {"mlp_ratio": 2}),
    "dinov2-registers": (
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        {"mlp_ratio": 2},
    ),
}


def randomized(network):
    """Every parameter of order 1; what starts at zero or one would hide errors."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return network.eval()


def images_of(height=12, width=12):
    images = np.random.default_rng(0).normal(size=(2, height, width, 3))
    return images.astype(np.float32)


def logits_of_torch(network, images):
    with torch.no_grad():
        found = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    return np.asarray(getattr(found, "logits", found))


def check(loaded, images, expected):
    model, params = loaded
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(model.apply)({"params": params}, images)
    assert np.std(expected) > 0.1
    # The two forms of GELU differ by 6e-5 here.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("architecture", "options"), TIMM.values(), ids=TIMM)
def test_timm(tmp_path, architecture, options):
    timm = pytest.importorskip("timm", reason="needs timm")
    options = SIZES | options | {"num_classes": 5}
    network = randomized(timm.create_model(architecture, **options))
    timm.models.save_for_hf(
        network, tmp_path / "theirs", model_args=options, safe_serialization=True
    )
    images = images_of(*np.broadcast_to(options["img_size"], 2))
    expected = logits_of_torch(network, images)
    loaded = load_checkpoint(tmp_path / "theirs")
    check(loaded, images, expected)

    grid = tuple(side // 3 for side in images.shape[1:3])
    save_checkpoint(tmp_path / "ours", *loaded, names="timm", grid=grid)
    read = timm.create_model(f"local-dir:{tmp_path / 'ours'}", pretrained=True).eval()
    np.testing.assert_allclose(logits_of_torch(read, images), expected, atol=1e-4)


def test_timm_resizes_positions_as_its_rule(tmp_path):
    timm = pytest.importorskip("timm", reason="needs timm")
    options = SIZES | {"num_classes": 5, "dynamic_img_size": True}
    network = randomized(timm.create_model("vit_tiny_patch16_224", **options))
    timm.models.save_for_hf(
        network, tmp_path, model_args=options, safe_serialization=True
    )
    for height, width in ((21, 15), (6, 9)):
        images = images_of(height, width)
        loaded = load_checkpoint(tmp_path, image_size=(height, width))
        check(loaded, images, logits_of_torch(network, images))


@pytest.mark.parametrize(
    ("name", "config", "options"), HUGGING_FACE.values(), ids=HUGGING_FACE
)
def test_transformers(tmp_path, name, config, options):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = getattr(transformers, config)(**(CONFIG | options))
    network = randomized(getattr(transformers, name)(config))
    # Several files and an index.
    network.save_pretrained(tmp_path / "theirs", max_shard_size="5KB")
    images = images_of()
    expected = logits_of_torch(network, images)
    loaded = load_checkpoint(tmp_path / "theirs")
    check(loaded, images, expected)
    # transformers 5 has other names in memory than in the files that it saves.
    path = tmp_path / "theirs" / "model.safetensors"
    safetensors.numpy.save_file(
        {name: value.numpy() for name, value in network.state_dict().items()}, path
    )
    chex.assert_trees_all_equal(load_checkpoint(path), loaded)
    if name == "DeiTForImageClassification":
        return  # Its second token is read by no head: neither library writes that.
    save_checkpoint(tmp_path / "ours", *loaded, names="huggingface")
    read = getattr(transformers, name).from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_allclose(logits_of_torch(read, images), expected, atol=1e-4)


def test_timm_in_transformers(tmp_path):
    """Hugging Face's file of a network of timm, with both kinds of configuration."""
    pytest.importorskip("timm", reason="needs timm")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    options = SIZES | {"global_pool": "avg", "fc_norm": False}
    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", model_args=options, num_labels=5
    )
    network = transformers.TimmWrapperForImageClassification(config)
    randomized(network).save_pretrained(tmp_path)
    images = images_of()
    check(load_checkpoint(tmp_path), images, logits_of_torch(network, images))


def test_both_libraries_normalize_as_is_stored(tmp_path):
    timm = pytest.importorskip("timm", reason="needs timm")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    model = vit.make(
        "Ti", num_classes=5, patch_size=3, num_layers=1, hidden_size=12, mlp_dim=24
    )
    inputs = jax.ShapeDtypeStruct((1, 12, 12, 3), "float32")
    shapes = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    for names in ("timm", "huggingface"):
        save_checkpoint(
            tmp_path / names, model, params, names=names, mean=mean, std=std
        )
    network = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    config = timm.data.resolve_model_data_config(network)
    np.testing.assert_allclose(config["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(config["std"], std, rtol=1e-6)
    options = {"model_args": {"num_heads": 3}, "safe_serialization": True}
    timm.models.save_for_hf(network, tmp_path / "theirs", **options)
    np.testing.assert_allclose(
        load_normalization(tmp_path / "theirs"), (mean, std), rtol=1e-6
    )

    processor = transformers.AutoImageProcessor.from_pretrained(
        tmp_path / "huggingface"
    )
    image = np.random.default_rng(0).integers(0, 256, (12, 12, 3)).astype(np.uint8)
    [found] = processor(image, return_tensors="np")["pixel_values"]
    expected = (image / 255 - mean) / std
    np.testing.assert_allclose(found.transpose(1, 2, 0), expected, atol=1e-5)
    processor.save_pretrained(tmp_path / "huggingface")
    np.testing.assert_allclose(
        load_normalization(tmp_path / "huggingface"), (mean, std), rtol=1e-6
    )


@pytest.mark.parametrize("kind", ["vit", "dinov2", "dinov2-registers"])
def test_transformers_resize_positions_as_their_rule(tmp_path, kind):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    name, config, options = HUGGING_FACE[kind]
    config = getattr(transformers, config)(**(CONFIG | options))
    network = randomized(getattr(transformers, name)(config))
    network.save_pretrained(tmp_path)
    # DINOv2 does it by itself.
    asked = {"interpolate_pos_encoding": True} if kind == "vit" else {}
    for height, width in ((21, 15), (6, 9)):
        images = images_of(height, width)
        pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        with torch.no_grad():
            expected = network(pixels, **asked).logits.numpy()
        loaded = load_checkpoint(tmp_path, image_size=(height, width))
        check(loaded, images, expected)
