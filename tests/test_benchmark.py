"""The benchmark: consistent numbers, and the operation counts of XLA."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import benchmark
from experiments.common import devices
from experiments.configs import benchmark as configs
from experiments.configs import generate_functa as generate_configs
from experiments.networks import convnext, registry
from experiments.networks.dit import DiT
from experiments.timing import functa, lbi, peers, rounds
from experiments.training import encoding
from functa import flow

pytestmark = pytest.mark.usefixtures("unoptimized")

PEER = """
import sys
for name in sys.argv[1:]:
    print(f"{name}: 0.002s, further numbers")
"""


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A finished run beside a peer that always takes two milliseconds."""
    folder = tmp_path_factory.mktemp("benchmark")
    config = configs.get_config("smoke")
    config.peer_python, config.peer_every = sys.executable, 2
    (folder / "torch_functa.py").write_text(PEER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "FOLDER", folder)
        patch.setattr(peers, "check", lambda python: None)
        summary = benchmark.train_and_evaluate(config, folder / "run")
    return config, folder / "run", summary


@pytest.mark.slow
def test_numbers_of_a_run_are_consistent(smoke):
    config, workdir, summary = smoke
    names = ("product_float32", "product_bfloat16", *config.paths)
    rows = {name: summary[name] for name in names}
    for row in rows.values():
        rounds = np.array(row["rounds"])
        assert len(rounds) == config.num_rounds and min(rounds) > 0
        low, high = row["milliseconds_quartiles"]
        assert min(rounds) <= low <= row["milliseconds"] <= high <= max(rounds)
        np.testing.assert_allclose(row["milliseconds"], np.median(rounds))
        assert row["mebibytes"] > 0 and row["compile_seconds"] > 0
        ceiling = summary[f"{row['dtype']}_product_gflops_per_second"]
        share = row["gflops_per_second"] / ceiling
        np.testing.assert_allclose(row["share_of_product"], share)
        if "reference" in row:
            ratios = rounds / rows[row["reference"]]["rounds"]
            np.testing.assert_allclose(row["time_over_reference"], np.median(ratios))
    for dtype in ("float32", "bfloat16"):
        # The ceiling is the best round.
        assert rows[f"product_{dtype}"]["share_of_product"] <= 1
    assert rows["probe"]["arithmetic_over_reference"] == 3  # two step sizes
    assert rows["vit_cascade"]["arithmetic_over_reference"] < 1
    # Adam keeps two trees like the parameters, DessiLBI+Adam three. The rest is
    # counters and entry steps.
    for method, trees in (("adam", 2), ("dessilbi_adam", 3)):
        state = rows[f"lenet_{method}"]["state_over_params"]
        assert trees <= state < trees + 0.25
    table = (workdir / "table.md").read_text()
    assert len(table.splitlines()) == len(names) + 2


@pytest.mark.slow
def test_peers_are_measured_in_between(smoke):
    _, _, summary = smoke
    for name in ("meta", "meta_bfloat16"):
        row = summary[name]
        # Four images in two milliseconds, in rounds 0 and 2.
        assert row["peer_rounds"] == [2000.0, 2000.0]
        assert row["over_peer"] == row["per_second"] / 2000
    assert "over_peer" not in summary["encode"]


@pytest.mark.slow
def test_a_finished_run_shows_its_table(smoke, capsys):
    config, workdir, summary = smoke
    assert benchmark.train_and_evaluate(config, workdir) == summary
    assert (workdir / "table.md").read_text() in capsys.readouterr().out


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("num_steps", [1, 2])
def test_arithmetic_of_a_meta_step_is_what_xla_counts(num_steps):
    config = configs.get_config("smoke")
    # One group: of a loop XLA counts the body once, and here that is all of it.
    config.sizes.meta.update(
        {"width": 96, "depth": 4, "batch_size": 2, "image_size": 8}
        | {"num_steps": num_steps, "points_per_group": 0, "fast_sine": False}
    )
    path = benchmark.make_path(config, "meta")
    # Whole on every device: of a divided batch each would count its part.
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=devices.replicated()),
        (path.state, *path.inputs),
    )
    counted = jax.jit(path.step).lower(*shapes).compile().cost_analysis()["flops"]
    # XLA also counts what is done element by element, but for jnp.sin: a few in a
    # hundred at this width.
    assert 1 <= counted / path.flops < 1.06


def test_arithmetic_of_a_convnext():
    model = convnext.ConvNeXt(5, widths=(6, 10), depths=(2, 1))
    shape = (4, 8, 3)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)))
    # Stem, blocks of 8 D^2 at each cell, the merging of 2x2 cells, and the classes.
    expected = 32 * (3 * 6 + 2 * 8 * 6**2) + 8 * (4 * 6 * 10 + 8 * 10**2) + 10 * 5
    assert registry.count_multiply_adds(model, variables, shape) == expected


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("name", ["encode_grids", "head"])
def test_paths_of_grids_run(name):
    path = benchmark.make_path(configs.get_config("smoke"), name)
    compiled = jax.jit(path.step).lower(path.state, *path.inputs).compile()
    state, outputs = compiled(path.state, *path.inputs)
    for array in jax.tree.leaves((state, outputs)):
        assert np.isfinite(array).all()
    shapes = {"encode_grids": [(4, 2, 2, 3), (4, 4)], "head": []}
    assert [x.shape for x in jax.tree.leaves(outputs)] == shapes[name]


def test_arithmetic_of_a_siren():
    # 2 -> 7 -> 7 -> 3 at each of 5 points, and 11 -> 14 once.
    multiply_adds = 5 * (2 * 7 + 7 * 7 + 7 * 3) + 11 * 14
    sizes = {"width": 7, "depth": 3, "channels": 3, "num_points": 5, "latent_dim": 11}
    assert functa.count_siren(**sizes) == multiply_adds
    assert functa.count_meta_passes(3, batch_size=1) == 21


def test_arithmetic_of_a_sample_is_what_xla_counts():
    sizes, shape = {"hidden_size": 96, "num_layers": 2, "mlp_dim": 128}, (2, 3, 5)
    path = functa._sample(
        variant="smoke", batch_size=2, shape=shape, num_heads=4, **sizes
    )
    model = DiT(10, num_heads=4, **sizes)

    def velocity(params, gaussians, x, time, labels):
        learned = model.apply({"params": params}, x, time, labels)
        return learned + flow.gaussian_velocity(gaussians, labels)(x, time)

    counted = jax.jit(velocity).lower(
        *path.inputs[0], np.zeros((2, *shape)), np.zeros(2), np.zeros(2, np.int32)
    )
    counted = counted.compile().cost_analysis()["flops"]
    multiply_adds = functa.count_dit(num_tokens=6, channels=5, **sizes)
    multiply_adds += 2 * 11 * 30**2  # to the axes of ten classes and of all, and back
    # XLA also counts normalization, activations and the waves.
    assert 1 <= counted / (2 * 2 * multiply_adds) < 1.1
    steps = generate_configs.get_config("smoke").sampling.num_steps
    assert path.flops == 2 * steps * 2 * 2 * multiply_adds


def test_bytes_become_the_pixels_of_the_fitted_latents():
    there, back = (
        functa._compress(
            variant="smoke_spatial",
            direction=direction,
            batch_size=3,
            image_size=8,
            step=0.01,
        )
        for direction in ("encode", "decode")
    )
    _, encoded = there.step((), *there.inputs)
    assert encoded == back.inputs[0]
    assert there.further["bits_per_pixel"] == 8 * sum(map(len, encoded)) / (3 * 64)
    _, pixels = back.step((), encoded)
    assert pixels.shape == (3, 8, 8, 3)
    # What the fitted latents give, up to the small steps of the quantizer.
    learner = functa._make_learner("smoke_spatial", {})
    [(latents, mse)] = encoding.encode(learner, there.inputs[0], batch_size=3)
    error = np.square(pixels - there.inputs[0] / 255).mean((1, 2, 3))
    np.testing.assert_allclose(error, mse[:, -1], rtol=1e-2)


@pytest.mark.parametrize("function", ["channels", "groups"])
def test_tracing_is_measured_without_compiling(function):
    sizes = {"num_layers": 1, "hidden_size": 8, "num_heads": 2, "mlp_dim": 8}
    path = lbi._trace(
        function=function, variant="B", patch_size=16, image_size=32, **sizes
    )
    compiled, measured = rounds._compile(path)
    assert compiled is path.step and measured == {}
    assert compiled(path.state, *path.inputs) == ((), ())


def test_dessilbi_is_compared_with_the_optimizer_that_it_extends():
    sizes = configs.get_config("optimizers").sizes
    assert sizes.vgg_dessilbi.reference == "vgg_sgd"
    assert sizes.vgg_dessilbi_adam.reference == "vgg_adam"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("print('hello')", "output of .*peer.py has no time of 'width=3 B=4'"),
        ("import no_torch", "peer_python .* failed with .*peer.py: ModuleNotFoundErr"),
    ],
)
def test_a_peer_that_cannot_be_used_is_named(tmp_path, program, message, monkeypatch):
    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    (tmp_path / "peer.py").write_text(program)
    with pytest.raises(ValueError, match=message):
        peers.run_peer(sys.executable, "peer.py", ["width=3 B=4"])


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("num_rounds", 0, "num_rounds must be at least 1 .*, got 0"),
        ("peer_every", 0, "peer_every must be at least 1 .*, got 0"),
        ("sizes.meta.batch_size", 0, "sizes.meta.batch_size must be at least 1, got 0"),
        ("sizes.meta.kind", "mota", "sizes.meta.kind must be one of product, "),
        ("paths", ("mota",), "must be some of .*meta"),
        ("paths", (), "must be some of"),
        ("sizes.product_float32.sise", 3, "float32: .* unexpected keyword .*'sise'"),
        ("peer_python", "nowhere", "peer_python nowhere cannot be run"),
    ],
)
def test_bad_settings_are_refused(tmp_path, path, value, message):
    config = configs.get_config("smoke")
    config.update_from_flattened_dict({path: value})
    with pytest.raises(ValueError, match=message):
        benchmark.train_and_evaluate(config, tmp_path)


@pytest.mark.slow
def test_what_grows_along_an_axis_is_drawn(smoke):
    _, workdir, _ = smoke
    assert (workdir / "figures" / "scaling.png").stat().st_size > 0


def test_axes_are_of_paths():
    for variant in ("scaling", "smoke"):
        config = configs.get_config(variant)
        for axis, values in config.axes.items():
            for value in values:
                assert f"{axis}_{value}" in config.paths
                assert config.sizes[f"{axis}_{value}"][axis] == value
