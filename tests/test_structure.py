"""Layers found by tracing, and the optimizer with them in every library."""

import equinox as eqx
import flax.serialization
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import lbi
import vit
from lbi import L1, GroupL2, pruning
from lbi.penalty import Layer, named_leaves

pytestmark = pytest.mark.usefixtures("unoptimized")

RNG = np.random.default_rng(0)
BIAS, SCALE = Layer("bias"), Layer("scale")


def linen(module, *inputs):
    """Layers of a Linen module, and its parameters as shapes."""
    params = jax.eval_shape(module.init, key(), *inputs)["params"]
    return lbi.groups(lambda p, *x: module.apply({"params": p}, *x), params, *inputs)


def key():
    return jax.random.key(0)


def draw(*sizes):
    return jnp.asarray(RNG.normal(size=sizes), jnp.float32)


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


# Which parameter is what. Layouts as the documentation of each library gives them.


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolutions_of_any_rank(rank):
    window = (3, 2, 4)[:rank]
    layers = linen(nn.Conv(5, window), shape(2, *(6, 7, 8)[:rank], 3))
    places = tuple(range(rank))
    kernel = Layer("convolution", output=(rank + 1,), input=(rank,), window=places)
    assert dict(layers) == {"bias": BIAS, "kernel": kernel}
    assert layers["kernel"].penalty() == GroupL2(group_axes=(rank + 1,))


def test_one_channel_and_a_window_of_one():
    kernel = Layer("convolution", output=(3,), input=(2,), window=(0, 1))
    assert linen(nn.Conv(1, (1, 1)), shape(2, 4, 4, 1))["kernel"] == kernel


def test_depthwise_grouped_and_transposed_convolutions():
    kernel = Layer("convolution", output=(3,), input=(2,), window=(0, 1))
    for module in (
        nn.Conv(4, (3, 3), feature_group_count=4),
        nn.Conv(8, (3, 3), feature_group_count=2),
        nn.ConvTranspose(6, (3, 3), strides=(2, 2)),
    ):
        assert linen(module, shape(2, 6, 6, 4))["kernel"] == kernel


class Everything(nn.Module):
    """Lookup, attention, two normalizations and a tied output."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 6, name="embed")
        positions = self.param("positions", nn.initializers.normal(), (1, 5, 6))
        x = embed(tokens) + positions
        x = nn.LayerNorm(name="norm")(x)
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(x)
        x = nn.GroupNorm(3, name="group_norm")(x)
        return embed.attend(nn.Dense(6, use_bias=False, name="dense")(x))


def test_embedding_attention_and_normalization():
    product = Layer("product", output=(1,), input=(0,))
    head = Layer("product", output=(1, 2), input=(0,), heads=(1,))
    out = Layer("product", output=(2,), input=(0, 1), heads=(0,))
    expected = {
        "attention/key/bias": BIAS,
        "attention/key/kernel": head,
        "attention/out/bias": BIAS,
        "attention/out/kernel": out,
        "attention/query/bias": BIAS,
        "attention/query/kernel": head,
        "attention/value/bias": BIAS,
        "attention/value/kernel": head,
        "dense/kernel": product,
        "embed/embedding": Layer("embedding", output=(1,)),
        "group_norm/bias": BIAS,
        "group_norm/scale": SCALE,
        "norm/bias": BIAS,
        "norm/scale": SCALE,
        "positions": BIAS,
    }
    layers = linen(Everything(), shape(2, 5, dtype=jnp.int32))
    assert dict(layers) == expected
    kernels = [path for path in expected if path.endswith("kernel")]
    assigned = lbi.penalty.assign(
        layers, {path: np.zeros((2, 2, 2)) for path in expected}
    )
    assert assigned == dict.fromkeys(kernels, L1())


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(x)
        return nn.relu(nn.Conv(6, (3,), name="conv")(x)), None


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_layers(remat):
    block = nn.remat(Block) if remat else Block
    stack = nn.scan(
        block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    )()
    layers = linen(stack, shape(2, 5, 6), None)
    assert layers["attention/query/kernel"] == Layer(
        "product", output=(2, 3), input=(1,), stacked=(0,), heads=(2,)
    )
    assert layers["attention/out/kernel"] == Layer(
        "product", output=(3,), input=(1, 2), stacked=(0,), heads=(1,)
    )
    assert layers["conv/kernel"] == Layer(
        "convolution", output=(3,), input=(2,), window=(1,), stacked=(0,)
    )
    assert layers["attention/query/bias"] == BIAS
    # Filters of each layer on their own.
    assert layers["conv/kernel"].penalty() == GroupL2(group_axes=(0, 3))


@pytest.mark.parametrize("axis", [0, -1])
def test_vmapped_layers_and_seeds(axis):
    def network(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            x, p["conv"], (1, 1), "SAME", dimension_numbers=numbers
        )
        x = jax.lax.conv_general_dilated(
            jax.nn.relu(x), p["next"], (1, 1), "SAME", dimension_numbers=numbers
        )
        return x.mean((1, 2)) @ p["dense"]

    sizes = {"conv": [3, 3, 2, 4], "next": [3, 3, 4, 5], "dense": [5, 6]}
    for size in sizes.values():
        size.insert(0 if axis == 0 else len(size), 7)
    params = {name: shape(*size) for name, size in sizes.items()}
    layers = lbi.groups(
        jax.vmap(network, in_axes=(axis, None)), params, shape(2, 4, 5, 2)
    )
    first = int(axis == 0)
    seeds = 0 if first else 4
    assert layers["next"].stacked == (seeds,)
    assert layers["next"].output == (first + 3,)
    assert layers["next"].input == (first + 2,)
    for name, layer in layers.items():
        axes = (seeds, first + 3) if name != "dense" else (seeds and 2, first + 1)
        assert sorted(layer.stacked + layer.output) == sorted(axes), name


def test_nnx_haiku_and_equinox():
    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(2, 4, (3,), rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)

        def __call__(self, x):
            return self.attention(self.conv(x))

    model = nnx.eval_shape(lambda: Nnx(nnx.Rngs(0)))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    layers = lbi.groups(
        lambda p, x: nnx.merge(graph, p, rest)(x), params, shape(2, 5, 2)
    )
    assert layers["conv/kernel"].output == (2,)
    assert layers["attention/query/kernel"].heads == (1,)

    def haiku_network(x):
        x = hk.Conv2D(4, 3, data_format="NCHW", name="conv")(x)
        return hk.Linear(3, name="out")(hk.Flatten()(x))

    network = hk.without_apply_rng(hk.transform(haiku_network))
    params = jax.eval_shape(network.init, key(), shape(1, 2, 4, 4))
    layers = lbi.groups(network.apply, params, shape(1, 2, 4, 4))
    assert layers["conv/w"].output == (3,) and layers["conv/w"].input == (2,)
    assert layers["out/w"] == Layer("product", output=(1,), input=(0,))

    def equinox_network():
        keys = jax.random.split(key())
        convolution = eqx.nn.Conv2d(2, 4, 3, key=keys[0])
        linear = eqx.nn.Linear(16, 3, key=keys[1])
        return eqx.nn.Sequential([convolution, eqx.nn.Lambda(jnp.ravel), linear])

    network, static = eqx.partition(
        eqx.filter_eval_shape(equinox_network), lambda leaf: hasattr(leaf, "shape")
    )
    layers = lbi.groups(
        lambda p, x: jax.vmap(eqx.combine(p, static))(x), network, shape(5, 2, 4, 4)
    )
    assert layers["layers/0/weight"] == Layer(
        "convolution", output=(0,), input=(1,), window=(2, 3)
    )
    assert layers["layers/2/weight"] == Layer("product", output=(0,), input=(1,))
    assert layers["layers/0/bias"] == BIAS


def test_low_rank_factors_and_a_fused_kernel():
    def network(p, x):
        fused = jnp.einsum("bi,kio->kbo", x, p["fused"])
        return x @ (p["w"] + p["a"] @ p["b"]) + fused[0] * p["gain"][None] * fused[1]

    params = {
        "w": shape(4, 5),
        "a": shape(4, 2),
        "b": shape(2, 5),
        "fused": shape(2, 4, 5),
        "gain": shape(5),
        "unused": shape(3, 3),
    }
    layers = lbi.groups(network, params, shape(3, 4))
    assert layers["w"] == Layer("product", output=(1,), input=(0,))
    assert layers["a"].input == (0,) and layers["b"].output == (1,)
    assert layers["a"].kind == layers["b"].kind == "product"
    assert layers["gain"] == SCALE and layers["unused"] == Layer("other")
    assert layers["fused"].input == (1,) and 2 in layers["fused"].output


@pytest.mark.parametrize("cell", [nn.OptimizedLSTMCell, nn.GRUCell])
def test_cells_that_join_kernels_and_start_from_zeros(cell):
    layers = linen(nn.RNN(cell(5, name="cell")), shape(2, 6, 3))
    kernel = Layer("product", output=(1,), input=(0,))
    assert {layer for path, layer in layers.items() if "kernel" in path} == {kernel}
    # Scaled by a gate together with its kernel, the bias of a GRU is still a bias.
    assert {layer for path, layer in layers.items() if "bias" in path} == {BIAS}


def test_gains_of_a_kernel_are_scales():
    """Weight normalization, scaled standardization, a gate, the factor of low ranks."""

    def network(p, x):
        norms = jax.lax.rsqrt(jnp.square(p["v"]).sum(0, keepdims=True) + 1e-6)
        x = x @ (p["g"][None] * p["v"] * norms)
        gain = jax.lax.rsqrt(p["w"].var(0) + 1e-6) * p["gain"]
        x = x @ (p["w"] * gain[None] - (p["w"].mean(0) * gain)[None])
        x = x @ (p["gated"] * jax.nn.sigmoid(p["gate"])[:, None])
        return x @ (p["base"] + p["alpha"] * (p["a"] @ p["b"]))

    sizes = {"v": (3, 4), "w": (4, 5), "gated": (5, 6), "base": (6, 7)}
    low_rank = {"a": (6, 2), "b": (2, 7)}
    gains = {"g": (4,), "gain": (5,), "gate": (5,), "alpha": ()}
    params = {k: shape(*n) for k, n in (sizes | low_rank | gains).items()}
    layers = lbi.groups(network, params, shape(2, 3))
    kernel = Layer("product", output=(1,), input=(0,))
    assert {path: layers[path] for path in gains} == dict.fromkeys(gains, SCALE)
    assert {path: layers[path] for path in sizes} == dict.fromkeys(sizes, kernel)
    assert layers["a"].input == (0,) and layers["b"].output == (1,)
    assert layers["a"].kind == layers["b"].kind == "product"


class Queries(nn.Module):
    """Attention from a learned query, looked-up queries, a network of positions."""

    @nn.compact
    def __call__(self, x):
        probe = self.param("probe", nn.initializers.normal(), (1, 1, 4))
        probe = jnp.tile(probe, (len(x), 1, 1))
        pooled = nn.MultiHeadDotProductAttention(2, name="attention")(probe, x)
        queries = nn.Embed(3, 4, name="queries")(jnp.arange(3))
        queries = nn.Dense(5, name="hidden")(queries)
        grid = jnp.linspace(-1, 1, 10).reshape(5, 2)
        places = jnp.sin(nn.Dense(6, name="first")(grid))
        places = nn.Dense(4, use_bias=False, name="second")(places)
        x = nn.Dense(5, name="keys")(pooled + x + places[None])
        return jnp.einsum("bnd,qd->bqn", x, queries)


@pytest.mark.parametrize("batch", [1, 2])
def test_activations_that_no_input_reaches(batch):
    layers = linen(Queries(), shape(batch, 5, 4))
    head = Layer("product", output=(1, 2), input=(0,), heads=(1,))
    assert layers["attention/query/kernel"] == layers["attention/key/kernel"] == head
    for name in ("hidden", "first", "second", "keys"):
        kernel = Layer("product", output=(1,), input=(0,))
        assert (name, layers[f"{name}/kernel"]) == (name, kernel)
    assert layers["probe"].kind == layers["queries/embedding"].kind == "embedding"
    biases = {layer for path, layer in layers.items() if path.endswith("bias")}
    assert biases == {BIAS}


def test_an_image_of_parameters_is_no_kernel():
    def network(p, style):
        x = jax.lax.conv(p["image"], p["kernel"], (1, 1), "SAME")
        return x * (style @ p["style"])[:, :, None, None]

    sizes = {"image": (1, 3, 4, 4), "kernel": (5, 3, 3, 3), "style": (2, 5)}
    params = {name: shape(*size) for name, size in sizes.items()}
    layers = lbi.groups(network, params, shape(1, 2))
    assert layers["image"].kind == "embedding"
    assert layers["kernel"].output == (0,)


def test_a_gate_by_einsum_has_no_heads():
    def network(p, x):
        gate = jax.nn.sigmoid(x.mean(1) @ p["gate"])
        return jnp.einsum("bnd,bd->bnd", x @ p["w"], gate) @ p["out"]

    params = {"gate": shape(3, 5), "w": shape(3, 5), "out": shape(5, 2)}
    kernel = Layer("product", output=(1,), input=(0,))
    layers = lbi.groups(network, params, shape(2, 4, 3))
    assert dict(layers) == dict.fromkeys(params, kernel)


def test_experts_of_ragged_products():
    def network(p, x, sizes):
        return jax.lax.ragged_dot(
            jax.lax.ragged_dot(x, p["up"], sizes), p["down"], sizes
        )

    params = {"up": shape(3, 4, 6), "down": shape(3, 6, 4)}
    layers = lbi.groups(network, params, shape(7, 4), shape(3, dtype=jnp.int32))
    expert = Layer("product", output=(2,), input=(1,), stacked=(0,))
    assert dict(layers) == dict.fromkeys(params, expert)


def test_updates_at_an_index():
    """A kernel with entries at some places, and parameters at some rows of images."""

    def network(p, x):
        x = x @ jnp.zeros((4, 6)).at[jnp.arange(4), jnp.array([5, 0, 2, 1])].set(p["w"])
        x = x.at[:, 0].set(p["token"]).at[:, 1].multiply(p["scale"])
        return x.at[:, 2].add(p["bias"]) @ p["out"]

    params = {
        "w": shape(4),
        "token": shape(6),
        "scale": shape(6),
        "bias": shape(6),
        "out": shape(6, 2),
    }
    layers = lbi.groups(network, params, shape(2, 3, 4))
    kinds = ["product", "embedding", "scale", "bias", "product"]
    assert [layers[path].kind for path in params] == kinds


def test_output_axes_are_what_the_outputs_depend_on():
    """An oracle that knows no layouts: entry k of the output axis moves channel k."""
    x = draw(2, 5, 4)
    module = nn.Conv(3, (3,))
    params = module.init(key(), x)["params"]
    (axis,) = linen(module, x)["kernel"].output
    for channel in range(3):
        index = (slice(None),) * axis + (channel,)
        moved = params | {"kernel": params["kernel"].at[index].add(1.0)}
        change = module.apply({"params": moved}, x) - module.apply(
            {"params": params}, x
        )
        changed = np.abs(change).max((0, 1)) > 1e-6
        assert changed.tolist() == [k == channel for k in range(3)]


def test_functions_that_cannot_be_traced_or_have_no_kernel_are_refused():
    with pytest.raises(
        ValueError, match="the function cannot be traced: .*boolean conversion"
    ):
        lbi.groups(lambda p, x: x if p.sum() > 0 else -x, jnp.ones(2), jnp.ones(2))
    with pytest.raises(ValueError, match=r"no parameter is the kernel .*: b \(bias\)"):
        lbi.groups(lambda p, x: x + p["b"], {"b": jnp.ones(2)}, jnp.ones(2))
    layers = lbi.groups(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 2))}, jnp.ones(2))
    with pytest.raises(ValueError, match="params/w: the traced layers do not contain"):
        lbi.dessilbi(0.1, penalty=layers).init({"params": {"w": jnp.ones((2, 2))}})


# Silent faults of rules by rank and by path.


def step(optimizer, params, state, num_steps=1):
    """Updates with a gradient of zero: weights decay until their group enters."""
    for _ in range(num_steps):
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, state = optimizer.update(zeros, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_parameters_with_other_paths_are_refused():
    params = {"dense": {"kernel": jnp.ones((2, 3))}}
    optimizer = lbi.dessilbi(0.1, nu=1.0, record_entry=True)
    params, state = step(optimizer, params, optimizer.init(params))
    message = "lack dense/kernel, .*; their paths are params/dense/kernel"
    for function in (lbi.sparse_params, pruning.entry_importance):
        with pytest.raises(ValueError, match=message):
            function({"params": params}, state)
        with pytest.raises(ValueError, match=r"dense/kernel has shape \(1, 2, 3\)"):
            function(jax.tree.map(lambda p: p[None], params), state)


@pytest.mark.slow
def test_stacked_states_need_vmap():
    params = {"kernel": draw(3, 4, 5)}  # three seeds
    optimizer = lbi.dessilbi(0.5, 1.0, penalty=GroupL2(0.5), record_entry=True)
    state = jax.vmap(optimizer.init)(params)
    params, state = jax.vmap(lambda p, s: step(optimizer, p, s, 3))(params, state)
    for function in (lbi.sparse_params, pruning.entry_importance):
        with pytest.raises(ValueError, match=r"stacked \(3,\): use jax.vmap"):
            function(params, state)
        stacked = jax.vmap(function)(params, state)
        for seed in range(3):
            alone = function(*jax.tree.map(lambda x: x[seed], (params, state)))  # noqa: B023
            np.testing.assert_allclose(stacked["kernel"][seed], alone["kernel"])
    with pytest.raises(ValueError, match="stacked"):
        lbi.density(state)


class NnxDense(nnx.Module):
    def __init__(self):
        self.c0 = nnx.Linear(3, 4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.c0(x)


def test_nnx_optimizer_trains_the_same_gamma_as_a_loop_of_optax():
    x = draw(5, 3)
    model = NnxDense()
    graph, params = nnx.split(model)
    penalty = lbi.suggest_lambda(params, 0.1, 1.0, 10, enter_at=0.3)
    chain = lbi.dessilbi(0.1, 1.0, penalty=penalty)
    optimizer = nnx.Optimizer(model, chain, wrt=nnx.Param)
    pure = nnx.to_pure_dict(params)
    state = chain.init(pure)
    for _ in range(10):
        optimizer.update(model, nnx.grad(lambda m: jnp.square(m(x)).mean())(model))
        grads = jax.grad(lambda p: jnp.square(nnx.merge(graph, p)(x)).mean())(pure)
        updates, state = chain.update(grads, state, pure)
        pure = optax.apply_updates(pure, updates)
    gamma = lbi.gamma(state)["c0"]["kernel"]
    assert np.any(gamma != 0) and np.any(gamma == 0)
    assert f"{lbi.clock(optimizer.opt_state):.3f}" == f"{lbi.clock(state):.3f}"
    coupled = nnx.to_pure_dict(nnx.state(optimizer))["opt_state"]
    found = [v for path, v in named_leaves(coupled).items() if "dual/c0/kernel" in path]
    np.testing.assert_allclose(found[0], lbi.find_states(state)[0].dual["c0"]["kernel"])


def test_a_path_that_init_had_and_update_lacks_is_an_error():
    optimizer = lbi.structural_coupling(0.1, 1.0, penalty={"kernel": L1()})
    state = optimizer.init({"kernel": jnp.ones((2, 3))})
    with pytest.raises(ValueError, match="no parameter matches the pattern kernel"):
        optimizer.update({"w": jnp.ones((2, 3))}, state, {"w": jnp.ones((2, 3))})


def test_every_pattern_must_match():
    params = {"conv": {"kernel": jnp.ones((3, 3, 2, 4))}, "fc": jnp.ones((2, 3))}
    for penalty, message in [
        ({"conv": "auto", "dense": L1()}, "matches the pattern dense of the penalty"),
        ({"Conv": "auto"}, "the pattern Conv .* the paths are conv/kernel, fc"),
        ({"conv": {"kernal": L1()}, "fc": L1()}, "kernal .* the paths are conv/kernel"),
    ]:
        for function in (
            lbi.dessilbi(0.1, penalty=penalty).init,
            lambda p, penalty=penalty: lbi.suggest_lambda(p, 0.1, 1.0, 9, penalty),
            lambda p, penalty=penalty: pruning.magnitude_importance(p, penalty),
        ):
            with pytest.raises(ValueError, match=message):
                function(params)
    with pytest.raises(ValueError, match="'auto' applies to none of the parameters b"):
        lbi.dessilbi(0.1).init({"b": jnp.ones(3)})
    # A parameter that a mask hides is known all the same.
    masked = optax.masked(
        lbi.structural_coupling(0.1, 1.0, penalty={"conv": "auto", "fc": L1()}),
        {"conv": True, "fc": False},
    )
    assert list(lbi.density(masked.init(params))) == ["conv/kernel"]


def test_auto_refuses_what_names_cannot_tell():
    model = vit.make("cifar_128", num_classes=3, patch_size=4, num_layers=1)
    images = jnp.zeros((1, 8, 8, 3))
    params = jax.eval_shape(model.init, key(), images)["params"]
    with pytest.raises(ValueError, match=r'key/kernel: "auto" .*lbi.groups\(apply_fn'):
        lbi.penalty.assign("auto", params)
    refused = {
        "conv/weight": (4, 2, 3, 3),
        "conv/kernel": (3, 2, 4),
        "ConvTranspose_0/kernel": (3, 3, 4, 2),
        "conv2_d_transpose/w": (3, 3, 4, 2),
    }
    for path, size in refused.items():
        with pytest.raises(ValueError, match=f'{{"{path}": lbi.GroupL2'):
            lbi.penalty.assign("auto", {path: np.zeros(size)})
    layers = lbi.groups(lambda p, x: model.apply({"params": p}, x), params, images)
    assigned = lbi.penalty.assign(layers, params)
    assert set(assigned) == {p for p in named_leaves(params) if p.endswith("kernel")}
    # In Haiku "b" is a bias, (C,) or (C, 1, 1); a matrix may have this name too.
    named = {"b": np.zeros((3, 4)), "conv": {"b": np.zeros((3, 1, 1))}}
    assert lbi.penalty.assign("auto", named) == {"b": L1()}
    # A bare penalty is for kernels too.
    assert set(lbi.penalty.assign(L1(), params)) == set(assigned)


@pytest.mark.parametrize("penalty", ["auto", L1()], ids=str)
def test_kernels_are_not_taken_for_statistics_or_embeddings_by_name(penalty):
    matrix, vector = np.zeros((3, 4)), np.zeros((1, 1, 1, 4))
    kernels = dict.fromkeys(["hidden", "mean", "cls", "compose", "post", "w"], matrix)
    others = dict.fromkeys(["pos_embedding", "cls_token", "token_embed"], matrix)
    others |= {"cls": np.zeros((1, 1, 4)), "mean_ema": {"hidden": vector}}
    others |= {"batch_stats": {"mean": matrix}, "pos": matrix, "embeddings": matrix}
    params = {"kernels": kernels, "others": others}
    found = lbi.penalty.assign(penalty, params)
    assert set(found) == {f"kernels/{name}" for name in kernels}


def test_a_kernel_without_an_output_axis_needs_a_penalty_of_its_own():
    """After an operation that is not followed, one group would hold all filters."""

    def network(params, x):
        kernel = jnp.linalg.qr(params["w"])[0].reshape(3, 3, 3, 4)
        axes = ("NHWC", "HWIO", "NHWC")
        hidden = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=axes
        )
        return hidden @ params["out"]

    params = {"w": jnp.ones((27, 4)), "out": jnp.ones((4, 2))}
    layers = lbi.groups(network, params, jnp.ones((1, 4, 4, 3)))
    with pytest.raises(ValueError, match="^w: its output axis was lost.*GroupL2"):
        lbi.penalty.assign(layers, params)
    own = GroupL2(group_axes=-1)
    found = lbi.penalty.assign({"^w$": own, ".": layers}, params)
    assert found == {"w": own, "out": L1()}


def test_filters_are_the_outputs_of_every_kernel():
    model = vit.make("cifar_128", num_classes=3, patch_size=4, num_layers=1)
    images = jnp.zeros((1, 8, 8, 3))
    params = jax.eval_shape(model.init, key(), images)["params"]
    layers = lbi.groups(lambda p, x: model.apply({"params": p}, x), params, images)
    block = "Transformer/encoderblock_0/"
    attention = block + "MultiHeadDotProductAttention_0/"
    assert layers.filters() == {
        "embedding/kernel": (3,),
        **{f"{attention}{name}/kernel": (1, 2) for name in ("query", "key", "value")},
        f"{attention}out/kernel": (2,),
        block + "MlpBlock_0/Dense_0/kernel": (1,),
        block + "MlpBlock_0/Dense_1/kernel": (1,),
        "head/kernel": (1,),
    }


def test_default_weight_decay_spares_biases_of_attention():
    params = {"query": {"kernel": jnp.ones((4, 2, 3)), "bias": jnp.ones((2, 3))}}
    optimizer = lbi.dessilbi(1.0, 1e9, weight_decay=0.1, momentum=0.0, penalty=None)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert not np.any(updates["query"]["bias"])
    np.testing.assert_allclose(updates["query"]["kernel"], -0.1, rtol=1e-6)


def test_complex_parameters_are_pairs_of_real_ones():
    pair = draw(2, 4, 3)
    values = {"kernel": pair[0] + 1j * pair[1]}
    squares = np.sum(np.abs(np.asarray(values["kernel"])) ** 2, axis=0)
    # V = (1 - 0.8^8) W after 8 steps: two of the three columns enter.
    lam = (1 - 0.8**8) * float(np.sqrt(squares[np.argsort(squares)[:2]]).mean())
    runs = []
    for params in (values, {"kernel": pair}):
        optimizer = lbi.dessilbi(0.2, 1.0, penalty=GroupL2(lam), record_entry=True)
        params, state = step(optimizer, params, optimizer.init(params), 8)
        runs.append((params["kernel"], lbi.gamma(state)["kernel"], state))
    for ours, pairs in zip(runs[0][:2], runs[1][:2], strict=True):
        np.testing.assert_allclose(ours.real, pairs[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(ours.imag, pairs[1], rtol=1e-5, atol=1e-6)
    inside = lbi.in_support(runs[0][2])["kernel"]
    np.testing.assert_array_equal(inside, lbi.in_support(runs[1][2])["kernel"])
    assert inside.sum() == 2 and np.any(runs[0][1] != 0)
    np.testing.assert_allclose(GroupL2().norms(values["kernel"]) ** 2, squares, 1e-5)
    shrunk = L1(0.5).prox(values["kernel"])
    expected = np.maximum(np.abs(values["kernel"]) - 0.5, 0)
    np.testing.assert_allclose(np.abs(shrunk), expected, atol=1e-6)


def test_layers_as_penalty_are_static_and_can_be_stored():
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}
    layers = lbi.groups(lambda p, x: x @ p["a"] + p["b"], params, jnp.ones(2))
    optimizer = lbi.dessilbi(0.1, 1.0, penalty=layers, record_entry=True)
    state = jax.jit(optimizer.init)(params)
    _, state = jax.jit(lambda p, s: step(optimizer, p, s, 2))(params, state)
    stored = flax.serialization.to_bytes(state)
    restored = flax.serialization.from_bytes(optimizer.init(params), stored)
    np.testing.assert_array_equal(
        lbi.find_states(restored)[0].dual["a"], lbi.find_states(state)[0].dual["a"]
    )
    assert list(lbi.density(restored)) == ["a"]


def test_parameters_with_nan_are_named():
    params = {"a": jnp.full((2, 3), jnp.nan)}
    for function in (
        pruning.magnitude_importance,
        lambda p: lbi.suggest_lambda(p, 0.1, 1.0, 9),
    ):
        with pytest.raises(ValueError, match="^a contains NaN"):
            function(params)
