import collections
import functools
import itertools
import json
import os
import pickle
import tracemalloc
from pathlib import Path

import chex
import functa_oracle
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functa_oracle import HaikuLatentSiren, HaikuSiren, random_tree
from jax.flatten_util import ravel_pytree
from numerics import assert_close, compiled, random_like

from functa import deepmind as convert
from functa.inner_loop import fit_latent
from functa.metrics import psnr
from functa.siren import LatentModulatedSiren, ModulatedSiren, coordinate_grid

pytestmark = pytest.mark.usefixtures("unoptimized", "highest_precision")

HERE = Path(__file__).resolve().parent
# Numbers of tests/goldens/make_functa_goldens.py, and DeepMind's own where they are
# present.
OWN_GOLDENS = sorted((HERE / "goldens").glob("functa_*.npz"))
DEEPMIND_GOLDENS = sorted((HERE.parents[1] / "shared" / "goldens").glob("functa_*.npz"))


# Numbers of the Haiku program.


def load_golden(path):
    """Returns the file's arrays, its config, its Haiku tree and the imported model."""
    golden = dict(np.load(path))
    config = json.loads(str(golden["config"]))
    tree = functa_oracle.nested(golden, "params/")
    imported = convert.from_haiku(
        tree,
        omega_0=config["w0"],
        modulate_scale=config["modulate_scale"],
        modulate_shift=config["modulate_shift"],
    )
    return golden, config, tree, imported


ABSENT = pytest.param(
    None,
    marks=pytest.mark.skip(reason="DeepMind's numbers (functa_*.npz) are not present"),
    id="deepmind",
)
each_golden = pytest.mark.parametrize(
    "path",
    [*OWN_GOLDENS, *(DEEPMIND_GOLDENS or [ABSENT])],
    ids=lambda path: f"{path.parents[1].name}_{path.stem}",
)


def test_goldens_are_of_two_kinds():
    for paths in filter(None, (OWN_GOLDENS, DEEPMIND_GOLDENS)):
        assert {"functa_film_sgd", "functa_shift_metasgd"} <= {p.stem for p in paths}
    assert OWN_GOLDENS


@pytest.mark.slow_after(1)
@each_golden
def test_haiku_network_gives_the_golden_numbers(path):
    golden = dict(np.load(path))
    numbers = functa_oracle.golden_numbers(
        json.loads(str(golden["config"])),
        functa_oracle.nested(golden, "params/"),
        golden["coords"],
        golden["images"],
    )
    inputs = {"config", "coords", "images"}
    assert numbers.keys() == {
        key for key in golden if key not in inputs and not key.startswith("params/")
    }
    for key, actual in numbers.items():
        # Measured: at most 9.3e-7 on DeepMind's files, whose arithmetic is float32, and
        # 4.9e-8, the rounding of the stored numbers, on our own.
        assert_close(actual, golden[key], 3e-6, key)


@pytest.mark.slow_after(1)
@each_golden
def test_forward_matches_golden(path):
    golden, config, tree, imported = load_golden(path)
    assert imported.model == LatentModulatedSiren(
        width=config["width"],
        depth=config["depth"],
        latent_dim=config["latent_dim"],
        out_channels=config["out_channels"],
        omega_0=config["w0"],
        layer_sizes=tuple(config["layer_sizes"]),
        modulate_scale=config["modulate_scale"],
        modulate_shift=config["modulate_shift"],
    )
    chex.assert_trees_all_equal(convert.to_haiku(imported), tree)
    variables = {"params": imported.params}
    apply = jax.jit(imported.model.apply)
    forward = apply(variables, golden["coords"], imported.latent)
    assert_close(forward, golden["forward"], 1e-5)


@pytest.mark.slow_after(1)
@each_golden
def test_inner_loop_and_outer_gradient_match_golden(path):
    golden, config, _, imported = load_golden(path)
    rates = imported.learning_rate
    assert (rates is not None) == config["use_meta_sgd"]

    def outer_loss(params, rates):
        def fit(image):
            return fit_latent(
                lambda z: imported.model.apply({"params": params}, golden["coords"], z),
                imported.latent,
                image,
                num_steps=config["inner_steps"],
                learning_rate=config["inner_lr"] if rates is None else rates,
                l2_weight=config["l2_weight"],
            )

        latents, info = jax.vmap(fit)(golden["images"])
        return jnp.mean(info.loss[:, -1]), (latents, info)

    value_and_grad = compiled(jax.value_and_grad(outer_loss, (0, 1), has_aux=True))
    (loss, (latents, info)), (grads, rate_grads) = value_and_grad(
        imported.params, rates
    )
    assert_close(latents, golden["fitted_latents"], 1e-4, "fitted_latents")
    assert_close(info.loss, golden["loss_per_step"], 1e-4, "loss_per_step")
    assert_close(psnr(info.mse), golden["psnr_per_step"], 1e-4, "psnr_per_step")
    assert_close(loss, golden["outer_loss"], 1e-4, "outer_loss")
    expected = functa_oracle.nested(golden, "outer_grad/")
    actual = convert.to_haiku(imported._replace(params=grads, learning_rate=rate_grads))
    # The latent is no weight: it has no outer gradient.
    del actual["latent_modulated_siren/~/latent_vector"]
    assert actual.keys() == expected.keys()
    for module, arrays in expected.items():
        for name, array in arrays.items():
            assert_close(actual[module][name], array, 1e-4, f"{module}/{name}")


# The independent networks in Haiku, whose modules Haiku itself names.


def assert_inner_step_matches(apply, tree, imported, coords, rates):
    """Compares the forward pass and one step of the inner loop with Haiku's."""
    target = np.random.default_rng(1).uniform(size=(*coords.shape[:-1], 3))
    target = target.astype(np.float32)

    def field(latent):
        return imported.model.apply({"params": imported.params}, coords, latent)

    assert_close(jax.jit(field)(imported.latent), apply(tree, coords), 1e-5)

    adapted = {k: v for k, v in tree.items() if "fi_lm" in k or "latent_vector" in k}
    # Sorts the modules by name, as the original does before it applies its rates.
    flat, unravel = ravel_pytree(adapted)

    def loss_fn(flat):
        return jnp.mean(jnp.square(apply(tree | unravel(flat), coords) - target))

    step = unravel(flat - rates * jax.jit(jax.grad(loss_fn))(flat))
    fit = jax.jit(
        functools.partial(
            fit_latent, field, num_steps=1, learning_rate=imported.learning_rate
        )
    )
    fitted, _ = fit(imported.latent, target)
    expected = convert.from_haiku(
        tree | step,
        omega_0=imported.model.omega_0,
        modulate_scale=imported.model.modulate_scale,
        modulate_shift=imported.model.modulate_shift,
    ).latent
    # The gradient alone: the start is common to both and would hide its errors.
    assert_close(fitted - imported.latent, expected - imported.latent, 1e-4)


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    ("parts", "layer_sizes"),
    [(["shift"], ()), (["scale", "shift"], ()), (["scale"], (5, 6))],
    ids=["shift", "scale_shift", "scale_mlp"],
)
def test_latent_siren_matches_haiku(parts, layer_sizes):
    coords = coordinate_grid((5, 6))
    apply, tree = random_tree(
        HaikuLatentSiren,
        coords,
        parts=parts,
        depth=4,
        width=8,
        latent_dim=7,
        layer_sizes=layer_sizes,
        out_channels=3,
        omega_0=3.0,
        name="latent_modulated_siren",
    )
    imported = convert.from_haiku(
        tree,
        omega_0=3.0,
        modulate_scale="scale" in parts,
        modulate_shift="shift" in parts,
    )
    assert imported.model.layer_sizes == layer_sizes
    chex.assert_trees_all_equal(convert.to_haiku(imported), tree)
    rates = tree["latent_modulated_siren/~/meta_sgd_lrs"]["meta_sgd_lrs"]
    assert_inner_step_matches(apply, tree, imported, coords, rates)


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("parts", [["shift"], ["scale", "shift"]], ids="_".join)
def test_direct_siren_matches_haiku_beyond_ten_layers(parts):
    coords = coordinate_grid((4, 5))
    apply, tree = random_tree(
        HaikuSiren,
        coords,
        parts=parts,
        depth=13,
        width=3,
        out_channels=3,
        omega_0=2.0,
    )
    imported = convert.from_haiku(tree, omega_0=2.0)
    assert imported.model == ModulatedSiren(
        width=3,
        depth=13,
        omega_0=2.0,
        modulate_scale="scale" in parts,
        modulate_shift=True,
    )
    chex.assert_trees_all_equal(convert.to_haiku(imported), tree)
    layers = imported.latent.reshape(12, len(parts), 3)
    for i in range(1, 12):
        film = tree[f"modulated_siren/modulated_siren_layer_{i}/fi_lm"]
        np.testing.assert_array_equal(layers[i], [film[part] for part in parts])
    rates = tree["modulated_siren/~/meta_sgd_lrs"]["meta_sgd_lrs"]
    assert_inner_step_matches(apply, tree, imported, coords, rates)


def test_own_model_survives_a_round_trip():
    model = LatentModulatedSiren(width=4, depth=3, latent_dim=5, omega_0=7.0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones(2), jnp.ones(5))
    params = random_like(shapes["params"])
    latent = np.arange(5, dtype=np.float32)
    imported = convert.Imported(model, params, latent, None)
    restored = convert.from_haiku(convert.to_haiku(imported), omega_0=7.0)
    assert restored.model == model and restored.learning_rate is None
    chex.assert_trees_all_equal(restored[1:], imported[1:])


@pytest.fixture
def small_tree():
    _, tree = random_tree(
        HaikuLatentSiren,
        np.zeros((1, 2), np.float32),
        parts=["shift"],
        depth=3,
        width=4,
        latent_dim=5,
        layer_sizes=(),
        out_channels=3,
        omega_0=1.0,
        name="my_field",
    )
    return tree


def test_root_module_may_have_any_name(small_tree):
    assert "my_field/~/latent_vector" in small_tree
    standard = convert.to_haiku(convert.from_haiku(small_tree, omega_0=1.0))
    renamed = {
        name.replace("latent_modulated_siren/", "my_field/"): module
        for name, module in standard.items()
    }
    chex.assert_trees_all_equal(renamed, small_tree)


@pytest.mark.parametrize(
    ("module", "change", "match"),
    [
        ("~/latent_vector", None, "0 latent_vector"),
        ("~/latent_to_modulation/~/mlp/~/linear_0", None, "0 mlp"),
        ("modulated_siren_layer_1/linear", None, "number 1 is missing"),
        ("~/latent_vector_1", {"latent_vector": np.ones(5)}, "one latent"),
        ("~/latent_vector", {"latent_vector": "text"}, "must hold .* got shape"),
        ("~/batch_norm", {"scale": np.ones(4)}, "unknown modules.*batch_norm"),
        ("~/latent_vector", {"latent_vector": np.ones(6)}, "linear_0 must have shapes"),
        ("~/latent_vector", {"latent_vector": np.ones((5, 1))}, "rank 1"),
        ("~/meta_sgd_lrs", {"meta_sgd_lrs": np.ones(4)}, "must have.*5"),
        ("modulated_siren_layer_1/linear", {"w": np.ones((4, 4))}, "must have.*'b'"),
        ("modulated_siren_layer_2/fi_lm", {"shift": np.ones(4)}, "number 0"),
        (
            "modulated_siren_layer_1/linear",
            {"w": np.ones((4, 6)), "b": np.ones(6)},
            r"layer_1/linear must have shapes.*\(4, 6\)",
        ),
    ],
)
def test_tree_that_does_not_fit_is_refused(small_tree, module, change, match):
    if change is None:
        del small_tree[f"my_field/{module}"]
    else:
        small_tree[f"my_field/{module}"] = change
    with pytest.raises(ValueError, match=match):
        convert.from_haiku(small_tree, omega_0=1.0)


def test_flags_that_do_not_fit_are_refused(small_tree):
    with pytest.raises(ValueError, match="8 modulations.*require 16"):
        convert.from_haiku(small_tree, omega_0=1.0, modulate_scale=True)
    with pytest.raises(ValueError, match="set at least one"):
        convert.from_haiku(small_tree, omega_0=1.0, modulate_shift=False)
    imported = convert.from_haiku(small_tree, omega_0=1.0)
    with pytest.raises(ValueError, match=r"learning_rate must have .* got \(3, 1\)"):
        convert.to_haiku(imported._replace(learning_rate=jnp.ones((3, 1))))


# Files.


def checkpoint_config(**model):
    return {
        "model": {
            "type": "latent_modulated_siren",
            "w0": 30,
            "width": 4,
            "depth": 3,
            "modulate_scale": False,
            "modulate_shift": True,
            "l2_weight": 0.5,
            "noise_std": 0.25,
            "latent_dim": 5,
            "layer_sizes": (),
            "latent_init_scale": 0.01,
            "use_meta_sgd": True,
            "meta_sgd_init_range": (0.005, 0.1),
            **model,
        },
        "dataset": {"num_channels": 3, "resolution": 64, "type": "image"},
        "training": {"inner_steps": 3, "per_device_batch_size": 16},
        "opt_inner": {"lr": 0.01},
    }


def write(path, contents):
    path.write_bytes(contents)
    return path


@pytest.mark.parametrize("kind", ["plain", "dill"])
def test_checkpoint_loads(tmp_path, small_tree, kind):
    params, config, dumps = small_tree, checkpoint_config(), pickle.dumps
    if kind == "dill":
        dill = pytest.importorskip("dill")
        ml_collections = pytest.importorskip("ml_collections")
        params = hk.data_structures.to_immutable_dict(jax.tree.map(jnp.asarray, params))
        config = ml_collections.ConfigDict(config)
        steps = ml_collections.FieldReference(3)
        config.training.inner_steps = steps
        config.training.name = ml_collections.config_dict.placeholder(str)
        config.lock()
        dumps = dill.dumps
    path = write(tmp_path / "p.npz", dumps({"params": params, "config": config}))
    checkpoint = convert.load_checkpoint(path)
    expected = convert.from_haiku(small_tree, omega_0=30.0)
    assert checkpoint.imported.model == expected.model
    chex.assert_trees_all_equal(checkpoint.imported[1:], expected[1:])
    chex.assert_trees_all_equal(checkpoint.learning_rate, expected.learning_rate)
    assert checkpoint.resolution == 64 and checkpoint.num_steps == 3
    assert checkpoint.l2_weight == 0.5 and checkpoint.noise_std == 0.25


def test_checkpoint_without_meta_sgd_has_the_rate_of_its_config(tmp_path, small_tree):
    del small_tree["my_field/~/meta_sgd_lrs"]
    config = checkpoint_config()
    del config["model"]["l2_weight"], config["model"]["noise_std"]
    contents = {"params": small_tree, "config": config}
    checkpoint = convert.load_checkpoint(
        write(tmp_path / "p.npz", pickle.dumps(contents))
    )
    assert checkpoint.imported.learning_rate is None
    assert checkpoint.learning_rate == 0.01
    assert checkpoint.l2_weight == checkpoint.noise_std == 0.0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"w0": "30"}, "p.npz: config must hold model.w0, a Real; got '30'"),
        ({"modulate_scale": True}, "p.npz: .* modulations"),
        ({"modulate_shift": None}, "config must hold model.modulate_shift"),
        ({"w0": np.nan}, "config.model.w0 must be finite, got nan"),
        ({"l2_weight": np.inf}, "config.model.l2_weight must be finite"),
    ],
)
def test_config_that_does_not_fit_is_refused(tmp_path, small_tree, change, match):
    contents = {"params": small_tree, "config": checkpoint_config(**change)}
    path = write(tmp_path / "p.npz", pickle.dumps(contents))
    with pytest.raises(ValueError, match=match):
        convert.load_checkpoint(path)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("dataset", "resolution", 0),
        ("dataset", "resolution", 10**9),
        ("training", "inner_steps", -1),
    ],
)
def test_counts_out_of_range_are_refused(tmp_path, small_tree, section, name, value):
    config = checkpoint_config()
    config[section][name] = value
    contents = {"params": small_tree, "config": config}
    path = write(tmp_path / "p.npz", pickle.dumps(contents))
    with pytest.raises(ValueError, match=f"{section}.{name} must be from .* got"):
        convert.load_checkpoint(path)


def test_values_that_are_not_finite_floats_are_refused(tmp_path, small_tree):
    linear = small_tree["my_field/modulated_siren_layer/linear"]
    for bad in (np.full_like(linear["w"], np.nan), linear["w"] > 0, "text", [1.0]):
        tree = small_tree | {
            "my_field/modulated_siren_layer/linear": linear | {"w": bad}
        }
        contents = {"params": tree, "config": checkpoint_config()}
        path = write(tmp_path / "p.npz", pickle.dumps(contents))
        with pytest.raises(ValueError, match="linear/w must be an array of finite"):
            convert.load_checkpoint(path)
    sets = {"modulation": np.full((2, 3), np.inf), "psnr": np.zeros(2)}
    path = write(tmp_path / "m.npz", pickle.dumps({"train": sets, "test": sets}))
    with pytest.raises(ValueError, match="modulation of 'train' must be an array of f"):
        convert.load_modulations(path)


def test_memory_is_bounded_by_the_size_of_the_file(tmp_path):
    data = bytes(10**6)
    array = np.frombuffer(data, ">f4")
    reconstruct, args, (version, shape, dtype, order, _) = array.__reduce__()
    state = (version, shape, dtype, order, data)
    copies = [Call(reconstruct, *args, state=state) for _ in range(100)]
    tracemalloc.start()
    try:
        for hostile, match in (
            (pickle.dumps(copies), "its arrays are larger than the file"),
            (b"Nr\xff\xff\xff\x0f.", "it stores a value at position 268435455"),
            (b"\x96" + (10**9).to_bytes(8, "little") + b".", "is not a pickle"),
            (b"\x8e" + (10**9).to_bytes(8, "little") + b".", "is not a pickle"),
        ):
            path = write(tmp_path / "bomb.npz", hostile)
            with pytest.raises(ValueError, match=f"bomb.npz .*{match}"):
                convert.load_haiku_file(path)
        assert tracemalloc.get_traced_memory()[1] < 2e7
    finally:
        tracemalloc.stop()


def test_pipes_and_devices_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    for path in (tmp_path / "pipe.npz", "/dev/zero"):
        with pytest.raises(ValueError, match="is not a regular file"):
            convert.load_haiku_file(path)


def test_modulation_set_loads(tmp_path):
    dill = pytest.importorskip("dill")
    rng = np.random.default_rng(0)
    sets = {
        split: {
            "modulation": rng.normal(size=(n, 3)).astype(np.float32),
            "psnr": rng.normal(size=n).astype(np.float32),
        }
        for split, n in (("train", 5), ("test", 2))
    }
    path = write(tmp_path / "celeba_modulations.npz", dill.dumps(sets))
    loaded = convert.load_modulations(path)
    chex.assert_trees_all_equal(loaded, sets)
    chex.assert_trees_all_equal_dtypes(loaded, sets)
    with pytest.raises(ValueError, match="params and config; got dict with.*'train'"):
        convert.load_checkpoint(path)
    sets["test"]["psnr"] = sets["test"]["psnr"][:1]
    path = write(tmp_path / "celeba_modulations.npz", dill.dumps(sets))
    with pytest.raises(ValueError, match="must hold 'test' with"):
        convert.load_modulations(path)


def reconstruct_device_array():
    """Stands for the function of that name in the JAX of 2022."""


class OldJaxArray:
    def __init__(self, array):
        self.array = array

    def __reduce__(self):
        aval = {"weak_type": False, "named_shape": {}}
        return reconstruct_device_array, (*self.array.__reduce__(), aval)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_values_are_read_in_every_format(tmp_path, protocol):
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    shared = [1, (2.5, None, b"x")] if protocol > 2 else ["x"]
    contents = {
        "c": array,
        "fortran": array.T,
        "strided": array.transpose(2, 0, 1)[::2],
        "big_endian": array.astype(">f4"),
        "bool": array > 3,
        "empty": array[:, :0],
        "scalar": np.float64(0.1),
        "jax": jnp.asarray(array),
        "flat": hk.data_structures.to_immutable_dict({"m": {"w": array}}),
        "ordered": collections.OrderedDict(b=1, a="two"),
        "shared": [shared, shared],
    }
    if protocol == 2:
        del contents["empty"]  # Python 3 pickles b"" there in a way of its own.
    if protocol < 4:
        contents["old_jax"] = OldJaxArray(array)
    data = pickle.dumps(contents, protocol)
    if protocol < 4:  # Names are lines of text, and may change their length.
        data = data.replace(b"cnumpy._core.", b"cnumpy.core.")
        data = data.replace(f"c{__name__}\n".encode(), b"cjax._src.device_array\n")
    loaded = convert.load_haiku_file(write(tmp_path / "x.npz", data))
    assert loaded.keys() == contents.keys()
    for name in loaded.keys() & {"c", "fortran", "strided", "big_endian", "bool"}:
        np.testing.assert_array_equal(loaded[name], contents[name])
        assert type(loaded[name]) is np.ndarray and loaded[name].dtype.isnative
    for name in loaded.keys() & {"jax", "old_jax"}:
        np.testing.assert_array_equal(loaded[name], array)
    np.testing.assert_array_equal(loaded["flat"]["m"]["w"], array)
    assert loaded["scalar"] == 0.1 and type(loaded["scalar"]) is np.float64
    assert loaded["ordered"] == {"b": 1, "a": "two"}
    assert loaded["shared"] == [shared, shared]
    assert loaded["shared"][0] is loaded["shared"][1]


class Call:
    """Pickles as function(*args)."""

    def __init__(self, function, *args, state=None):
        self.reduced = function, args, state

    def __reduce__(self):
        return self.reduced


class OddArray(np.ndarray):
    """Makes a file as soon as NumPy makes the array."""

    def __array_finalize__(self, obj):
        Path(os.environ["FUNCTA_TEST_MARKER"]).touch()


def touches(marker):
    """Pickles of all kinds that make the file `marker` when pickle loads them."""
    touch = Call(os.mkdir, marker)
    reconstruct, (_, *args), state = np.ones(1).__reduce__()
    jax_reconstruct, (_, _, *jax_state) = jnp.ones(1).__reduce__()
    objects = np.empty(2, object)
    objects[0] = touch
    contents = {
        "mkdir": touch,
        "system": Call(os.system, f"mkdir {marker}"),
        "eval": Call(eval, f"__import__('os').mkdir({marker!r})"),
        "exec": Call(exec, f"import os; os.mkdir({marker!r})"),
        "open": Call(open, marker, "w"),
        "object_array": objects,
        "odd_array": Call(reconstruct, OddArray, *args),
        "array_state": Call(reconstruct, np.ndarray, *args, state=(*state[:-1], touch)),
        "array_shape": Call(reconstruct, np.ndarray, touch, b"b"),
        "dtype_state": Call(np.dtype, "f4", False, True, state=touch),
        "jax_function": Call(jax_reconstruct, os.mkdir, (marker,), *jax_state),
        "ordered_dict": collections.OrderedDict(params=touch),
        "in_params": {"params": {"m": {"w": [1, ({"x": touch},)]}}, "config": {}},
    }
    pickles = {name: pickle.dumps(value) for name, value in contents.items()}
    quoted = repr(marker).encode()
    pickles["getattr"] = (
        b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(S'os'\ntRS'mkdir'\ntR"
        b"(S" + quoted + b"\ntR."
    )
    pickles["instance"] = b"(S" + quoted + b"\nios\nmkdir\n."
    pickles["dotted_name"] = (
        b"\x80\x04\x8c\x06shutil\x8c\x08os.mkdir\x93(S" + quoted + b"\ntR."
    )
    return pickles


TOUCHES = touches("marker")


@pytest.mark.parametrize("name", TOUCHES)
def test_nothing_that_a_file_asks_for_runs(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FUNCTA_TEST_MARKER", "marker")
    marker, path = Path("marker"), write(Path("attack.npz"), TOUCHES[name])
    with pytest.raises(ValueError, match="attack.npz is refused: it asks for"):
        convert.load_haiku_file(path)
    with pytest.raises(ValueError, match="attack.npz is refused"):
        convert.load_checkpoint(path)
    assert not marker.exists()
    # The attack is real: a reader that admits everything falls for it.
    try:
        result = pickle.loads(TOUCHES[name])
        if name == "open":
            result.close()
    except Exception:
        pass
    assert marker.exists()


DTYPE = b"cnumpy\ndtype\n(S'f4'\nI00\nI01\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"
ARRAY = b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"cposix\nsystem\n.", "asks for posix.system,"),
        (b"cbuiltins\neval\n.", "asks for builtins.eval,"),
        (b"cnumpy\nload\n.", "asks for numpy.load,"),
        (b"ccollections\nOrderedDict.fromkeys\n.", "OrderedDict.fromkeys,"),
        (b"cdill._dill\n_create_type\n.", "_create_type,"),
        (b"cdill._dill\n_load_type\n(S'CodeType'\ntR(tR.", "not callable"),
        (b"cfunctools\npartial\n.", "asks for functools.partial,"),
        (b"cnumpy\nndarray\n.", "holds a type"),
        (ARRAY + b"(I1\n(I1\nt" + DTYPE + b"I00\n(lNatb.", "than plain numbers"),
        (ARRAY.replace(b"numpy\nndarray", b"builtins\nlist") + b".", "numpy.ndarray"),
        (DTYPE.replace(b"f4", b"O8") + b".", "holds a type or dtype"),
        (
            b"cnumpy._core.multiarray\nscalar\n("
            + DTYPE.replace(b"f4", b"O8")
            + b"C\x04aaaatR.",
            "type <O8, not of numbers",
        ),
        # States of what is found by name: nothing can be altered for later readers.
        (b"cnumpy\nndarray\n}S'build'\nNsb.", "TypeError"),
        (b"cnumpy\nndarray\n(N}S'build'\nNstb.", "TypeError"),
        (b"ccollections\nOrderedDict\n(N}S'get'\nNstb.", "TypeError"),
        (b"cml_collections.config_dict.config_dict\nConfigDict\n)\x81.", "TypeError"),
        (b"(lp0\ng0\na.", "RecursionError"),
        (b"Pname\n.", "persistent"),
        (b"\x82\x01.", "extension"),
    ],
    ids=itertools.count(),
)
def test_odd_pickles_are_refused(tmp_path, data, match):
    before = {cls: dict(vars(cls)) for cls in set(convert._ADMITTED.values())}
    with pytest.raises(ValueError, match=f"odd.npz.*{match}"):
        convert.load_haiku_file(write(tmp_path / "odd.npz", data))
    assert before == {cls: dict(vars(cls)) for cls in before}


def test_functions_that_dill_writes_are_refused(tmp_path):
    dill = pytest.importorskip("dill")
    data = dill.dumps({"params": lambda: None})
    with pytest.raises(ValueError, match="asks for dill._dill._create_function"):
        convert.load_haiku_file(write(tmp_path / "x.npz", data))


def test_shared_parts_are_read_once(tmp_path):
    nested = []
    for _ in range(60):  # 2^60 items if each occurrence were built anew.
        nested = [nested, nested]
    path = write(tmp_path / "x.npz", pickle.dumps(nested))
    assert len(convert.load_haiku_file(path)) == 2


def test_damaged_file_gives_one_clear_error(tmp_path):
    whole = pickle.dumps({"params": {"m": {"w": np.ones(300)}}, "config": {}})
    for size in (0, 1, 2, 20, len(whole) // 2, len(whole) - 1):
        with pytest.raises(ValueError, match="cut.npz is truncated or is not a pickle"):
            convert.load_checkpoint(write(tmp_path / "cut.npz", whole[:size]))
    with pytest.raises(ValueError, match="page.npz is truncated or is not a pickle"):
        convert.load_checkpoint(write(tmp_path / "page.npz", b"<!doctype html>"))
    with pytest.raises(FileNotFoundError):
        convert.load_checkpoint(tmp_path / "absent.npz")


def test_true_npz_is_named_as_such(tmp_path):
    np.savez(tmp_path / "x.npz", modulation=np.ones(3))
    with pytest.raises(ValueError, match="x.npz is a real .npz archive"):
        convert.load_modulations(tmp_path / "x.npz")
