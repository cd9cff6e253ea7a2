"""Weight files of other programs: each network gives the logits of its equations."""

import json
import math
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from vit_files import (
    EPSILON,
    GOOGLE,
    POSITIONS,
    TORCH,
    apply,
    big_vision,
    big_vision_stacked,
    flat,
    forward,
    forward_one,
    hugging_face,
    hugging_face_encoder,
    images_of,
    linen,
    load,
    network,
    pre_linen,
    random,
    timm,
    timm_average,
    timm_without_cls_row,
    write,
)

from vit.checkpoint import (
    load_checkpoint,
    resize_positions,
    save_checkpoint,
)
from vit.model import ViT, make

pytestmark = pytest.mark.usefixtures("unoptimized")

HERE = Path(__file__).resolve().parent
# Numbers of tests/goldens/make_vit_goldens.py, and the reference program's own where
# they are present: (parameters, logits).
GOLDENS = [
    (folder / f"{name}_layout.npz", folder / f"{name}_logits.npz")
    for folder, name in (
        (HERE / "goldens", "vit"),
        (HERE.parents[1] / "shared" / "goldens", "vit_official"),
    )
]


# Numbers of an independent program, and of the reference program.


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(("layout", "logits"), GOLDENS, ids=lambda path: path.stem)
def test_model_gives_the_golden_logits(layout, logits):
    if "official" in layout.stem and not layout.exists():
        pytest.skip(f"{layout.name}, of the reference program, is not present")
    golden = np.load(logits)
    config = json.loads(str(golden["config"]))
    image_size = config.pop("image_size")
    model, params = load_checkpoint(layout)
    grid = (image_size // config["patch_size"],) * 2
    assert model == ViT(**config, grid=grid)
    assert flat(params).keys() == set(np.load(layout).files)
    found = apply(model, params, golden["images"])
    np.testing.assert_allclose(found, golden["logits"], rtol=0, atol=1e-4)
    chex.assert_trees_all_equal(load_checkpoint(layout, image_size)[1], params)


# The files of others.


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("layout", [*GOOGLE, *TORCH])
def test_logits_are_those_of_the_equations(tmp_path, layout):
    has_head = layout is not hugging_face_encoder
    net = network(classes=5 if has_head else 0)
    model, params = load(write(tmp_path, layout, net), layout, net)
    gelu, other = ("erf", "tanh") if layout in TORCH else ("tanh", "erf")
    assert model == ViT(
        num_classes=5 if has_head else 0,
        patch_size=3,
        hidden_size=12,
        num_layers=2,
        num_heads=3,
        mlp_dim=20,
        gelu=gelu,
        ln_eps=EPSILON.get(layout, 1e-6),
        pool="mean_before_norm" if layout is timm_average else "cls",
        grid=(4, 4),
    )
    images = images_of(net)
    logits = apply(model, params, images)
    expected = forward(net, images, gelu, 1e-6, model.pool)
    # float32 against float64: 1e-6 each for a few dozen operations in a row.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)
    different = forward(net, images, other, 1e-6, model.pool)
    assert np.max(np.abs(different - expected)) > 4e-5


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("layout", [pre_linen, big_vision_stacked, timm])
def test_layer_before_the_head_belongs_to_it(tmp_path, layout):
    sizes = dict(size=2, channels=1, width=10, heads=2, hidden=7, layers=1, grid=3)
    net = network(1, **sizes, classes=4, representation=6)
    path = write(tmp_path, layout, net)
    model, params = load(path, layout, net)
    assert model.representation_size == 6 and model.num_layers == 1
    images = images_of(net, grid=3)
    expected = forward(net, images, model.gelu, 1e-6)
    np.testing.assert_allclose(apply(model, params, images), expected, atol=2e-5)

    same, kept = load(path, layout, net, num_classes=4)
    assert same == model
    chex.assert_trees_all_equal(kept, params)

    tuned, reset = load(path, layout, net, num_classes=8)
    assert tuned == model.clone(num_classes=8, representation_size=None)
    head = reset.pop("head")
    chex.assert_trees_all_equal(
        head, {"kernel": np.zeros((10, 8), np.float32), "bias": np.zeros(8, np.float32)}
    )
    chex.assert_trees_all_equal_dtypes(head, kept["head"])
    body = {k: v for k, v in params.items() if k not in ("head", "pre_logits")}
    chex.assert_trees_all_equal(reset, body)
    bare, without = load(path, layout, net, num_classes=0)
    assert bare == tuned.clone(num_classes=0)
    chex.assert_trees_all_equal(without, body)


@pytest.mark.parametrize("layout", [linen, timm, hugging_face])
def test_headless_file(tmp_path, layout):
    net = network(classes=0)
    if layout is not hugging_face:  # Without a head its layer is of no use.
        net["pre_logits"] = np.ones((6, 12), np.float32), np.ones(6, np.float32)
    path = write(tmp_path, layout, net)
    model, params = load(path, layout, net)
    assert model.num_classes == 0 and model.representation_size is None
    assert params.keys() == {"cls", "embedding", "Transformer"}
    images = images_of(net, num=1)
    expected = forward_one(
        {k: v for k, v in net.items() if k != "pre_logits"},
        images[0],
        model.gelu,
        1e-6,
    )
    np.testing.assert_allclose(apply(model, params, images)[0], expected, atol=2e-5)
    tuned, params = load(path, layout, net, num_classes=3)
    assert tuned == model.clone(num_classes=3)
    assert params["head"]["kernel"].shape == (12, 3)


@pytest.mark.parametrize("layout", [*GOOGLE, *TORCH[:4]])
def test_layouts_of_one_network_give_the_same_bits(tmp_path, layout):
    net = network(2)
    expected = linen(net)
    _, params = load(write(tmp_path, layout, net), layout, net)
    params = flat(params)
    if layout in (big_vision, big_vision_stacked, timm_without_cls_row):
        row = expected[POSITIONS][:, :1]
        expected["cls"] = expected["cls"] + row
        expected[POSITIONS] = np.concatenate([0 * row, expected[POSITIONS][:, 1:]], 1)
    chex.assert_trees_all_equal(params, expected)
    assert all(isinstance(v, jax.Array) for v in params.values())
    assert {v.dtype.name for v in params.values()} == {"float32"}


def test_more_than_ten_layers_stay_in_order(tmp_path):
    net = network(3, layers=11, hidden=4, width=2, heads=1)
    for layout in (timm, big_vision_stacked):
        _, params = load(write(tmp_path, layout, net), layout, net)
        for i, block in enumerate(net["blocks"]):
            bias = params["Transformer"][f"encoderblock_{i}"]["LayerNorm_1"]["bias"]
            np.testing.assert_array_equal(bias, block["norm2"][1])


def test_parameters_carry_the_names_of_the_reference_program(tmp_path):
    net = network(layers=1, representation=6)
    _, params = load_checkpoint(write(tmp_path, pre_linen, net))
    block = "Transformer/encoderblock_0"
    attention = f"{block}/MultiHeadDotProductAttention_0"
    shapes = {name: value.shape for name, value in flat(params).items()}
    assert shapes == {
        "cls": (1, 1, 12),
        "embedding/kernel": (3, 3, 2, 12),
        "embedding/bias": (12,),
        "Transformer/posembed_input/pos_embedding": (1, 17, 12),
        f"{block}/LayerNorm_0/scale": (12,),
        f"{block}/LayerNorm_0/bias": (12,),
        f"{attention}/query/kernel": (12, 3, 4),
        f"{attention}/query/bias": (3, 4),
        f"{attention}/key/kernel": (12, 3, 4),
        f"{attention}/key/bias": (3, 4),
        f"{attention}/value/kernel": (12, 3, 4),
        f"{attention}/value/bias": (3, 4),
        f"{attention}/out/kernel": (3, 4, 12),
        f"{attention}/out/bias": (12,),
        f"{block}/LayerNorm_1/scale": (12,),
        f"{block}/LayerNorm_1/bias": (12,),
        f"{block}/MlpBlock_0/Dense_0/kernel": (12, 20),
        f"{block}/MlpBlock_0/Dense_0/bias": (20,),
        f"{block}/MlpBlock_0/Dense_1/kernel": (20, 12),
        f"{block}/MlpBlock_0/Dense_1/bias": (12,),
        "Transformer/encoder_norm/scale": (12,),
        "Transformer/encoder_norm/bias": (12,),
        "pre_logits/kernel": (12, 6),
        "pre_logits/bias": (6,),
        "head/kernel": (6, 5),
        "head/bias": (5,),
    }


# More tokens, scales and files than the original network has.


def grown(registers=0, scaled=False):
    """A network with registers, whose positions are zero, and LayerScale."""
    net = network(hidden=24)
    if registers:
        net["registers"] = random(registers, 12)
        rows = net["positions"]
        absent = np.zeros((registers, 12), np.float32)
        net["positions"] = np.concatenate([rows[:1], absent, rows[1:]])
    if scaled:
        for block in net["blocks"]:
            block["scale1"], block["scale2"] = random(2, 12)
    return net


def timm_of_today(net):
    """Registers and CLS without positions; factors; no bias of query, key and value."""
    count = 1 + len(net["registers"])
    net["cls"] = net["cls"] + net["positions"][0]
    net["positions"][0] = 0
    arrays = timm({k: v for k, v in net.items() if k != "registers"})
    arrays["pos_embed"] = net["positions"][None, count:]
    arrays["reg_token"] = net["registers"][None]
    for i, block in enumerate(net["blocks"]):
        arrays[f"blocks.{i}.ls1.gamma"] = block["scale1"]
        arrays[f"blocks.{i}.ls2.gamma"] = block["scale2"]
        del arrays[f"blocks.{i}.attn.qkv.bias"]
        for name in ("query", "key", "value"):
            block[name] = block[name][0], np.zeros(12, np.float32)
    return {f"model.{name}": value for name, value in arrays.items()}


def dino_of_hugging_face(net):
    names = {
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "intermediate.dense": "mlp.fc1",
    }
    arrays = {}
    for name, value in hugging_face(net, "dinov2_with_registers.").items():
        for old, new in names.items():
            name = name.replace(old, new)
        if ".attention.output" not in name:
            name = name.replace("output.dense", "mlp.fc2")
        arrays[name] = value
    start = "dinov2_with_registers."
    positions = f"{start}embeddings.position_embeddings"
    arrays[positions] = np.delete(arrays[positions], np.s_[1:4], axis=1)
    arrays[f"{start}embeddings.register_tokens"] = net["registers"][None]
    arrays[f"{start}embeddings.mask_token"] = random(1, 12)
    for i, block in enumerate(net["blocks"]):
        for k in (1, 2):
            name = f"{start}encoder.layer.{i}.layer_scale{k}.lambda1"
            arrays[name] = block[f"scale{k}"]
    return arrays


def deit_of_hugging_face(net):
    plain = {k: v for k, v in net.items() if k not in ("registers", "head_dist")}
    arrays = {
        name.replace("vit.", "deit.").replace("classifier", "cls_classifier"): value
        for name, value in hugging_face(plain).items()
    }
    for leaf, value in zip(("weight", "bias"), net["head_dist"], strict=True):
        arrays[f"distillation_classifier.{leaf}"] = value
    token = net["registers"][None]
    return arrays | {"deit.embeddings.distillation_token": token}


def big_vision_average(net):
    arrays = big_vision(net | {"cls": np.zeros(12, np.float32)})
    del arrays["params/cls"]
    return arrays


def i_jepa_of_hugging_face(net):
    arrays = hugging_face(net | {"cls": np.zeros(12, np.float32)})
    del arrays["vit.embeddings.cls_token"]
    return {name.replace("vit.", "ijepa."): value for name, value in arrays.items()}


WITHOUT_CLS = (big_vision_average, i_jepa_of_hugging_face)


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    ("layout", "pool", "registers"),
    [
        (timm_of_today, "cls", 3),
        (dino_of_hugging_face, "cls_and_mean", 3),
        (deit_of_hugging_face, "cls", 1),
        (big_vision_average, "mean", 0),
        (i_jepa_of_hugging_face, "mean", 0),
    ],
)
def test_more_networks_are_those_of_the_equations(tmp_path, layout, pool, registers):
    net = grown(registers, scaled=registers == 3)
    if pool == "cls_and_mean":
        net["head"] = random(5, 24), random(5)
    if layout is deit_of_hugging_face:
        net["head_dist"] = random(5, 12), random(5)
        net["positions"][1] = random(12)
    kind = linen if layout is big_vision_average else timm  # The kind of the file.
    if layout is i_jepa_of_hugging_face:
        net["positions"] = net["positions"][1:]
    arrays = {k: np.ascontiguousarray(v) for k, v in layout(net).items()}
    path = write(tmp_path, kind, net, arrays)
    if layout is big_vision_average:
        net["positions"] = net["positions"][1:]
    if layout in WITHOUT_CLS:
        del net["cls"]
    model, params = load(path, kind, net)
    assert (model.pool, model.num_registers) == (pool, registers)
    assert model.distilled == (layout is deit_of_hugging_face)
    images = images_of(net)
    expected = forward(net, images, model.gelu, 1e-6, pool)
    np.testing.assert_allclose(apply(model, params, images), expected, atol=5e-5)
    resized, more = load(path, kind, net, image_size=18, resize="timm", num_classes=2)
    assert apply(resized, more, images_of(net, grid=6)).shape == (2, 2)

    # And back: our own format, and those that can express it.
    targets = {"google": "mine.npz", "timm": "timm", "huggingface": "hf"}
    if layout in (dino_of_hugging_face, deit_of_hugging_face, i_jepa_of_hugging_face):
        del targets["timm"]  # It has no such head, or its epsilon is 1e-6.
    if layout in (timm_of_today, *WITHOUT_CLS):
        del targets["huggingface"]
    for names, name in targets.items():
        save_checkpoint(tmp_path / name, model, params, names=names)
        same, restored = load_checkpoint(tmp_path / name)
        assert (same.num_registers, same.pool) == (registers, pool)
        assert (same.gelu, same.num_heads) == (model.gelu, 3)
        found = apply(same, restored, images)
        np.testing.assert_allclose(found, expected, atol=5e-5)
    for names in {"timm", "huggingface"} - targets.keys():
        with pytest.raises(ValueError, match=f"names '{names}' cannot express"):
            save_checkpoint(tmp_path / "other", model, params, names=names)


def test_folders_shards_and_prefixes_are_read(tmp_path):
    net = network()
    expected = linen(net)
    arrays = {f"module.model.{k}": v for k, v in timm(net).items()}
    names = sorted(arrays)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, inside in shards.items():
        part = {name: arrays[name] for name in inside}
        write(tmp_path, timm, net, part).rename(tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    where = {name: file for file, inside in shards.items() for name in inside}
    index.write_text(json.dumps({"weight_map": where}))
    (tmp_path / "config.json").write_text('{"model_args": {"num_heads": 3}}')
    for path in (tmp_path, index):
        _, params = load_checkpoint(path)
        chex.assert_trees_all_equal(flat(params), expected)
    twice = arrays | {"model.cls_token": arrays["module.model.cls_token"]}
    with pytest.raises(ValueError, match="the file holds several networks"):
        load_checkpoint(write(tmp_path, timm, net, twice))
    (tmp_path / "model.safetensors").unlink()
    for entry in ("../a.safetensors", ["a.safetensors"]):
        index.write_text(json.dumps({"weight_map": {"x": entry}}))
        with pytest.raises(ValueError, match="weight_map must map each parameter to"):
            load_checkpoint(tmp_path)
    (tmp_path / "c.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes())
    twice = {"x": "a.safetensors", "y": "c.safetensors"}
    index.write_text(json.dumps({"weight_map": twice}))
    with pytest.raises(ValueError, match=r"c\.safetensors: .* is in two files"):
        load_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {"x": "absent.safetensors"}}))
    with pytest.raises(FileNotFoundError, match="absent.safetensors"):
        load_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": where | {"x": "a.safetensors"}}))
    with pytest.raises(ValueError, match="weight_map names x, in no file"):
        load_checkpoint(tmp_path)
    index.unlink()
    with pytest.raises(ValueError, match="or one file .* got a.safetensors, b.saf"):
        load_checkpoint(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    with pytest.raises(ValueError, match="or one file .* got a.bin, b.bin, c.bin"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(("old", "new"), [((4, 6), (7, 3)), ((5, 5), (9, 9))])
def test_positions_are_resized_by_the_rules_of_pytorch(old, new):
    positions = random(1, 2 + old[0] * old[1], 3)
    options = {"grid": old, "num_prefix": 2}
    resized = resize_positions(positions, new, rule="timm", **options)
    grid = positions[0, 2:].reshape(*old, 3)
    expected = jax.image.resize(jnp.asarray(grid), (*new, 3), "cubic", antialias=True)
    np.testing.assert_array_equal(resized[:, :2], positions[:, :2])
    np.testing.assert_allclose(resized[0, 2:].reshape(*new, 3), expected, atol=1e-5)

    # Not widened, a = -3/4, and the border is repeated.
    resized = resize_positions(positions, new, rule="huggingface", **options)

    def kernel(x):
        x = abs(x)
        if x < 1:
            return 1.25 * x**3 - 2.25 * x**2 + 1
        return max(2 - x, 0) and -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)

    for row in range(new[0]):
        for column in range(new[1]):
            y, x = (
                (i + 0.5) * o / n - 0.5
                for i, o, n in zip((row, column), old, new, strict=True)
            )
            value = 0
            for i in range(math.floor(y) - 1, math.floor(y) + 3):
                for j in range(math.floor(x) - 1, math.floor(x) + 3):
                    inside = np.clip(i, 0, old[0] - 1), np.clip(j, 0, old[1] - 1)
                    value = value + kernel(y - i) * kernel(x - j) * grid[inside]
            found = resized[0, 2 + row * new[1] + column]
            np.testing.assert_allclose(found, value, atol=1e-5)
    with pytest.raises(ValueError, match="one of google, timm, huggingface; got 'x'"):
        resize_positions(positions, new, rule="x", **options)


@pytest.mark.parametrize(
    ("layout", "rule"),
    [
        (linen, "google"),
        (big_vision, "google"),
        (timm, "timm"),
        (hugging_face, "huggingface"),
        (dino_of_hugging_face, "timm"),  # Of DINOv2 with registers alone.
    ],
)
def test_positions_are_resized_by_the_rule_of_the_library(tmp_path, layout, rule):
    net = grown(3, scaled=True) if layout is dino_of_hugging_face else network()
    kind = timm if layout is dino_of_hugging_face else layout
    arrays = {k: np.ascontiguousarray(v) for k, v in layout(net).items()}
    path = write(tmp_path, kind, net, arrays)
    model, whole = load(path, kind, net)
    _, params = load(path, kind, net, image_size=6)  # Narrower: the rules differ.
    old, new = flat(whole)[POSITIONS], flat(params)[POSITIONS]
    options = {"num_prefix": model.num_prefix}
    expected = resize_positions(np.asarray(old), 2, rule=rule, **options)
    np.testing.assert_array_equal(new, expected)


# The position embedding.


@pytest.mark.parametrize(
    ("old", "new"), [(3, 5), (5, 3), (4, 7), (7, 4), (3, 1), (1, 4), (6, 6), (14, 24)]
)
def test_positions_are_resized_as_by_scipy(old, new):
    rng = np.random.default_rng(old)
    positions = rng.normal(size=(1, 1 + old**2, 5)).astype(np.float32)
    grid = positions[0, 1:].reshape(old, old, 5)
    expected = scipy.ndimage.zoom(grid, (new / old, new / old, 1), order=1)
    resized = resize_positions(positions, new)
    chex.assert_shape(resized, (1, 1 + new**2, 5))
    assert resized.dtype == np.float32
    np.testing.assert_array_equal(resized[:, :1], positions[:, :1])
    # One unit in the last place: both compute in float64.
    np.testing.assert_allclose(
        resized[0, 1:].reshape(new, new, 5), expected, rtol=2e-7, atol=1e-7
    )
    if old == new:
        np.testing.assert_array_equal(resized, positions)


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("layout", [pre_linen, big_vision, timm])
def test_other_image_size(tmp_path, layout):
    net = network()  # 4 x 4 patches of 3 pixels
    path = write(tmp_path, layout, net)
    model, params = load(path, layout, net, image_size=21, resize="google")
    images = images_of(net, grid=7)
    grid = net["positions"][1:].reshape(4, 4, 12)
    grid = scipy.ndimage.zoom(grid, (7 / 4, 7 / 4, 1), order=1)
    positions = np.concatenate([net["positions"][:1], grid.reshape(49, 12)])
    expected = forward(net | {"positions": positions}, images, model.gelu, 1e-6)
    np.testing.assert_allclose(apply(model, params, images), expected, atol=2e-5)
    same = load(path, layout, net, image_size=12)
    chex.assert_trees_all_equal(same, load(path, layout, net))


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"image_size": 10}, "image_size must be a multiple of .* 3, got 10"),
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"num_classes": -1}, "num_classes must be at least 0, got -1"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"num_heads": 4}, "num_heads must be 3 for this file, got 4"),
        ({"num_heads": "three"}, "num_heads must be a whole number, got 'three'"),
        ({"num_heads": True}, "num_heads must be a whole number, got True"),
        ({"num_heads": (3, 3)}, r"num_heads must be a whole number, got \(3, 3\)"),
        ({"num_classes": 2.0}, "num_classes must be a whole number, got 2.0"),
        ({"image_size": (9, 9, 2)}, "image_size must be a whole number or two, got"),
        ({"grid": 4}, "grid must be two whole numbers, got 4"),
        ({"image_size": 21, "resize": ["timm"]}, "resize must be one of google, "),
    ],
)
def test_arguments_that_do_not_fit_are_refused(tmp_path, kwargs, match):
    path = write(tmp_path, linen, network())
    with pytest.raises(ValueError, match=f"model.npz: {match}"):
        load_checkpoint(path, **kwargs)


@pytest.mark.parametrize("num_heads", [5, 24])
def test_heads_that_do_not_divide_the_width_are_refused(tmp_path, num_heads):
    path = write(tmp_path, timm, network())
    with pytest.raises(ValueError, match=f"must divide .* 12, got {num_heads}"):
        load_checkpoint(path, num_heads=num_heads)


@pytest.mark.parametrize(
    ("layout", "name", "num_positions"),
    [(linen, POSITIONS, 16), (linen, POSITIONS, 15)]
    + [(timm, "pos_embed", 18), (big_vision, "params/pos_embedding", 6)]
    + [(hugging_face, "vit.embeddings.position_embeddings", 9)],
)
def test_positions_that_form_no_square_are_refused(
    tmp_path, layout, name, num_positions
):
    net = network()
    arrays = layout(net) | {name: np.ones((1, num_positions, 12), np.float32)}
    path = write(tmp_path, layout, net, arrays)
    for image_size in (None, 12):
        with pytest.raises(ValueError, match=r"a square number of positions \(1, 4, 9"):
            load(path, layout, net, image_size=image_size)
    with pytest.raises(ValueError, match=r"a square number of positions \(1, 4, 9"):
        resize_positions(np.ones((1, 6, 2)), 3)


# Our own files.


def test_rows_that_fit_two_squares_are_asked_about(tmp_path):
    # 2 x 2 patches after CLS and four registers, or 3 x 3 patches alone.
    net = network(layers=1)
    net["positions"] = net["positions"][:9]
    arrays = timm(net) | {"reg_token": np.ones((1, 4, 12), np.float32)}
    path = write(tmp_path, timm, net, arrays)
    with pytest.raises(ValueError, match="9 rows, a grid .* after 5 and after 0 tok"):
        load_checkpoint(path, num_heads=3)
    for side, num_rows in ((2, 9), (3, 14)):
        _, params = load_checkpoint(path, num_heads=3, grid=(side, side))
        positions = params["Transformer"]["posembed_input"]["pos_embedding"]
        np.testing.assert_array_equal(positions[0, -9:], net["positions"])
        assert positions.shape == (1, num_rows, 12)


@pytest.mark.parametrize("told_by", ["argument", "timm", "hugging_face"])
def test_oblong_grid_of_a_square_number_with_cls(tmp_path, told_by):
    # 15 patches and CLS: without the grid, 16 rows look like 4 x 4 without CLS.
    net = network(layers=1)
    net["positions"] = net["positions"][:16]
    layout = hugging_face if told_by == "hugging_face" else timm
    path = write(tmp_path, layout, net)
    config = {
        "argument": {},
        "timm": {"model_args": {"img_size": [9, 15], "patch_size": 3}},
        "hugging_face": {"image_size": [9, 15], "patch_size": 3},
    }[told_by]
    (tmp_path / "config.json").write_text(json.dumps(config))
    grid = (3, 5) if told_by == "argument" else None
    model, params = load_checkpoint(path, num_heads=3, grid=grid)
    images = np.random.default_rng(9).uniform(-1, 1, (2, 9, 15, 2)).astype(np.float32)
    expected = forward(net, images, "erf", 1e-6)
    np.testing.assert_allclose(apply(model, params, images), expected, atol=2e-5)
    if told_by == "argument":
        with pytest.raises(ValueError, match="16 rows, a grid .* after 1 and after 0"):
            load_checkpoint(path, image_size=(9, 15), num_heads=3)


# Files that are something else.


def test_misfits_are_listed_by_name(tmp_path):
    arrays = linen(network())
    block = "Transformer/encoderblock_1"
    del arrays["embedding/bias"], arrays[f"{block}/LayerNorm_0/bias"]
    arrays["extra/kernel"] = np.ones(3, np.float32)
    key = f"{block}/MultiHeadDotProductAttention_0/key/bias"
    arrays[key] = np.ones((4, 3), np.float32)
    path = write(tmp_path, linen, None, arrays)
    with pytest.raises(ValueError) as error:
        load_checkpoint(path)
    assert str(error.value) == (
        f"{path}: the parameters do not fit a ViT: "
        f"2 missing: {block}/LayerNorm_0/bias, embedding/bias; "
        "1 unexpected: extra/kernel; "
        f"1 misshapen: {key} (4, 3) instead of (3, 4)."
    )


def test_long_lists_are_cut(tmp_path):
    arrays = linen(network(layers=3))
    gap = {k: v for k, v in arrays.items() if "encoderblock_1/" not in k}
    with pytest.raises(ValueError, match=r"16 missing: (\S+, ){5}\.\.\.; 16 unexpect"):
        load_checkpoint(write(tmp_path, linen, None, gap))


@pytest.mark.parametrize(
    ("layout", "name", "value", "match"),
    [
        (
            linen,
            "embedding/kernel",
            None,
            r"embedding/kernel \(p, p, C, D\) is missing",
        ),
        (linen, "embedding/kernel", (3, 2, 12), r"\(p, p, C, D\), got \(3, 2, 12\)"),
        (linen, "embedding/kernel", (3, 4, 2, 12), r"1 misshapen: embedding/kernel"),
        (linen, "embedding/kernel", (0, 0, 2, 12), r"0, 2, 12\) has no entries"),
        (linen, "embedding/kernel", (), r"\(p, p, C, D\), got \(\)"),
        (linen, "head/kernel", None, "head/kernel .* is missing"),
        (linen, "head/bias", None, "1 missing: head/bias"),
        (linen, "head/bias", (), r"misshapen: head/bias \(\) instead of \(5,\)"),
        (linen, POSITIONS, None, "1 missing: .*pos_embedding"),
        (linen, POSITIONS, (17, 12), r"\(1, 1 \+ P, D\), got \(17, 12\)"),
        (linen, POSITIONS, (2, 17, 12), "1 misshapen"),
        (linen, POSITIONS, (1, 1, 12), r"\(1, 1, 12\) instead of \(1, 2, 12\)"),
        (linen, "Transformer/encoderblock_7/LayerNorm_9/scale", (2,), "1 unexpected"),
        (linen, "MAPHead_0/probe", (1, 1, 12), r"pooling by attention \(MAP\)"),
        (linen, "conv_root/kernel", (7, 7, 3, 12), "convolutional stem"),
        (big_vision_stacked, "params/Transformer/encoderblock/x", (), "1 unexpected"),
        (timm, "cls_token", None, "a square number .* after 0 of CLS .* 17"),
        (timm, "patch_embed.proj.weight", (12, 18), r"\(p, p, C, D\), got \(18, 12\)"),
        (timm, "patch_embed.proj.weight", (12,), r"\(p, p, C, D\), got \(12,\)"),
        (timm, "patch_embed.proj.weight", (12, 0, 3, 3), "has no entries"),
        (timm, "blocks.0.attn.qkv.weight", (0, 12), r"\(0, 12\) has no entries"),
        (timm, "blocks.0.attn.qkv.weight", (37, 12), "query/kernel .* is missing"),
        (timm, "blocks.1.attn.qkv.bias", (37,), "3 missing.*unexpected: blocks.1.attn"),
        (timm, "blocks.1.attn.qkv.bias", (), "3 missing.*1 unexpected"),
        (timm, "blocks.1.attn.qkv.bias", None, "3 missing"),
        (timm, "blocks.1.attn.proj.weight", (12, 13), r"misshapen: .*out/kernel"),
        (timm, "blocks.1.attn.proj.weight", (), r"misshapen: .*out/kernel \(\)"),
        (timm, "blocks.1.mlp.fc1.weight", (40, 12), "misshapen"),
        (timm, "dist_token", (1, 1, 12), "2 missing: head_dist/bias, head_dist/kern"),
        (timm, "head_dist.weight", (5, 12), "1 unexpected: head_dist/kernel"),
        (timm, "blocks.0.ls1.gamma", (11,), "LayerScale_0 .11,. does not fit"),
        (timm, "blocks.0.gamma_1", (12,), "BEiT, .* blocks.0.gamma_1"),
        (timm, "blocks.0.attn.q_bias", (12,), "BEiT, .* blocks.0.attn.q_bias"),
        (timm, "blocks.0.attn.rope.freqs", (12,), "rotary positions"),
        (timm, "blocks.0.attn.q_norm.weight", (4,), "qk-norm"),
        (timm, "reg_token", (1, 4, 12), "after 5 of CLS and registers, got 12"),
        (timm, "blocks.0.mlp.fc1_g.weight", (20, 12), "SwiGLU"),
        (timm, "blocks.0.mlp.w12.weight", (40, 12), "SwiGLU"),
        (timm, "fc_norm.weight", (12,), "name the same parameter"),
        (timm, "norm_pre.weight", (12,), "a normalization before the blocks"),
        (timm, "n_averaged", np.array(3), "1 unexpected: n_averaged"),
        (timm, "patch_embed.backbone.bn.num", np.array(3), "a convolutional stem"),
        (
            timm,
            "head.bias",
            np.ones(5, np.int64),
            "head/bias .* floating-point .*int64",
        ),
        (hugging_face, "classifier.bias", (6,), r"misshapen: head/bias \(6,\)"),
        (
            *(hugging_face, "deit.embeddings.distillation_token", (1, 1, 12)),
            "after 2 of CLS and registers, got 15",
        ),
        (
            *(hugging_face, "vit.encoder.layer.0.layer_scale1.lambda1", (12,)),
            "1 unexpected: encoder.layer.0.layer_scale1.lambda1",
        ),
        (
            *(hugging_face, "vit.encoder.layer.0.mlp.weights_in.weight", (40, 12)),
            "SwiGLU",
        ),
    ],
)
def test_file_that_is_no_such_network_is_refused(tmp_path, layout, name, value, match):
    net = network()
    arrays = layout(net)
    if value is None:
        del arrays[name]
    else:
        is_shape = isinstance(value, tuple)
        arrays[name] = np.ones(value, np.float32) if is_shape else value
    path = write(tmp_path, layout, net, arrays)
    with pytest.raises(ValueError, match=f"{path.name}: .*{match}"):
        load(path, layout, net)


def test_names_of_other_networks_are_told(tmp_path):
    # densenet121 of timm, BEiT of Hugging Face: some names are also those of a ViT.
    for names in (
        ("features.conv0.weight", "norm.weight", "classifier.weight"),
        ("beit.encoder.layer.0.attention.attention.query.weight", "classifier.weight"),
    ):
        arrays = {name: random(2, 2) for name in names}
        path = write(tmp_path, hugging_face, None, arrays)
        with pytest.raises(ValueError, match=f"must contain a Vision .*{names[0]}"):
            load_checkpoint(path)


def test_packed_gated_mlp_is_refused(tmp_path):
    net = network()
    for block in net["blocks"]:
        block["fc1"] = np.ones((40, 12), np.float32), np.ones(40, np.float32)
    with pytest.raises(ValueError, match="SwiGLU"):
        load(write(tmp_path, timm, net), timm, net)


def test_blocks_that_normalize_their_updates_are_asked_about(tmp_path):
    # The names of timm's vit_base_patch16_rpn_224, in fewer and narrower layers.
    sizes = {"width": 768, "heads": 12, "hidden": 3, "layers": 1}
    net = network(grid=2, size=1, channels=1, **sizes)
    del net["cls"]
    net["positions"] = net["positions"][1:]
    arrays = timm_average(net | {"cls": np.zeros(768, np.float32)})
    del arrays["cls_token"]
    path = write(tmp_path, timm, net, arrays)
    assert load_checkpoint(path, num_heads=12)[0].pool == "mean_before_norm"
    del arrays["blocks.0.attn.qkv.bias"]
    write(tmp_path, timm, net, arrays)
    with pytest.raises(ValueError, match="vit_base_patch16_rpn_224, .* config.json"):
        load_checkpoint(path, num_heads=12)
    (tmp_path / "config.json").write_text('{"architecture": "vit_base_patch1_gap_2"}')
    assert load_checkpoint(path, num_heads=12)[0].class_token is False
    (tmp_path / "config.json").write_text('{"architecture": "vit_base_patch1_rpn_2"}')
    with pytest.raises(ValueError, match="not supported: normalizing the updates"):
        load_checkpoint(path, num_heads=12)


# The formats.


def test_stem_is_read_from_the_shapes(tmp_path):
    model = make("cifar_128", 5, 4, stem=(6, 8), num_layers=1, mlp_dim=12)
    images = jax.random.normal(jax.random.key(0), (2, 12, 12, 2))
    params = jax.jit(model.init)(jax.random.key(1), images)["params"]
    save_checkpoint(tmp_path / "stem.npz", model, params)
    loaded, same = load_checkpoint(tmp_path / "stem.npz")
    assert (loaded.stem, loaded.patch_size) == ((6, 8), 4)
    chex.assert_trees_all_equal(same, params)
    # One shape fewer: the second convolution is not the first's.
    del params["stem_0"]
    with pytest.raises(ValueError, match="do not fit a ViT"):
        save_checkpoint(tmp_path / "stem.npz", model, params)
