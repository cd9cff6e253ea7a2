"""The channels that Torch-Pruning removes from the same networks in PyTorch.

Torch-Pruning (Fang et al. 2023, arXiv 2301.12900) finds its groups from the graph of
autograd and ranks them with its own code. The tests are skipped where it or PyTorch is
not installed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.networks import registry
from experiments.networks.lenet import LeNet
from experiments.networks.vgg import VGG
from lbi import GroupL2, channels, pruning

torch = pytest.importorskip("torch", reason="needs PyTorch")
tp = pytest.importorskip("torch_pruning", reason="needs torch_pruning")
# Warnings of these libraries are not ours.
pytestmark = pytest.mark.filterwarnings("ignore")
nn = torch.nn

NUMBERS = np.random.default_rng(0)
VGG_FIELDS = {"stages": ((6,), (8, 5)), "hidden": (9, 7), "num_classes": 4}
NETWORKS = {
    "lenet": (LeNet(features=(6, 8, 10), hidden=12), (28, 28, 1)),
    # Eight pixels are left to flatten.
    "vgg": (VGG(**VGG_FIELDS, batch_norm=False), (8, 16, 3)),
    "vgg-bn": (VGG(**VGG_FIELDS), (8, 16, 3)),
}


class TorchNet(nn.Module):
    """LeNet or VGG in PyTorch, with the names of the layers of ours."""

    def __init__(self, model, variables, shape):
        super().__init__()
        self.is_lenet = isinstance(model, LeNet)
        stages = [(n,) for n in model.features] if self.is_lenet else list(model.stages)
        number, before = 0, shape[-1]
        self.stages = []
        for stage in stages:
            names = []
            for width in stage:
                number += 1
                size, pad = (5, 2 * (number == 1)) if self.is_lenet else (3, 1)
                conv = nn.Conv2d(before, width, size, padding=pad)
                setattr(self, f"conv{number}", conv)
                if not self.is_lenet and model.batch_norm:
                    setattr(self, f"bn{number}", nn.BatchNorm2d(width))
                names.append(number)
                before = width
            self.stages.append(names)
        hidden = (model.hidden,) if self.is_lenet else model.hidden
        first = variables["params"]["fc1"]["kernel"].shape[0]
        sizes = (first, *hidden, model.num_classes)
        self.pixels = first // before
        self.num_dense = len(sizes) - 1
        for i in range(self.num_dense):
            setattr(self, f"fc{i + 1}", nn.Linear(sizes[i], sizes[i + 1]))
        self.load_state_dict(as_torch(variables, self.pixels), strict=False)
        self.eval()

    def forward(self, x):
        for stage in self.stages:
            for number in stage:
                x = getattr(self, f"conv{number}")(x)
                if hasattr(self, f"bn{number}"):
                    x = getattr(self, f"bn{number}")(x)
                x = torch.relu(x)
            if not self.is_lenet or stage != self.stages[-1]:
                x = nn.functional.max_pool2d(x, 2)
        x = x.flatten(1)
        for i in range(1, self.num_dense + 1):
            x = getattr(self, f"fc{i}")(x)
            x = torch.relu(x) if i < self.num_dense else x
        return x


def as_torch(variables, pixels):
    """Our variables as a state_dict: (out, in, ...), and channels before pixels."""
    state = {}
    for layer, leaves in variables["params"].items():
        for name, leaf in leaves.items():
            leaf = np.asarray(leaf)
            if name == "kernel" and leaf.ndim == 4:
                leaf = leaf.transpose(3, 2, 0, 1)
            elif name == "kernel":
                if layer == "fc1":
                    leaf = leaf.reshape(pixels, -1, leaf.shape[1]).swapaxes(0, 1)
                    leaf = leaf.reshape(-1, leaf.shape[-1])
                leaf = leaf.T
            key = "bias" if name == "bias" else "weight"
            state[f"{layer}.{key}"] = torch.tensor(leaf.copy())
    for layer, leaves in variables.get("batch_stats", {}).items():
        for name, leaf in leaves.items():
            state[f"{layer}.running_{name}"] = torch.tensor(np.array(leaf))
    return state


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS.keys())
def networks(request):
    """Our network with its variables and graph, and the same in PyTorch."""
    model, shape = request.param
    images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    variables = jax.tree.map(
        lambda leaf: (
            jnp.asarray(NUMBERS.uniform(0.2, 1, leaf.shape), jnp.float32)
            * NUMBERS.choice([-1, 1], leaf.shape if leaf.ndim > 1 else ())
        ),
        jax.eval_shape(model.init, jax.random.key(0), images),
    )
    variables = variables | {
        "batch_stats": jax.tree.map(jnp.abs, variables.get("batch_stats", {}))
    }
    graph = channels.trace(model.apply, variables, images)
    return model, variables, graph, TorchNet(model, variables, shape), shape


def check_equal(network, variables):
    expected = as_torch(variables, network.pixels)
    state = network.state_dict()
    assert expected
    for name, leaf in expected.items():
        torch.testing.assert_close(state[name], leaf, rtol=0, atol=0)


def test_it_cuts_the_same_entries(networks):
    model, variables, graph, network, shape = networks
    example = torch.zeros(1, shape[-1], *shape[:2])
    for name, size in graph.removable().items():
        layer = name.split("/")[1]
        removed = [0, size - 2]
        cut = TorchNet(model, variables, shape)
        dependencies = tp.DependencyGraph().build_dependency(cut, example)
        prune = (
            tp.prune_conv_out_channels
            if layer.startswith("conv")
            else tp.prune_linear_out_channels
        )
        group = dependencies.get_pruning_group(getattr(cut, layer), prune, removed)
        group.prune()
        keep = ~np.isin(np.arange(size), removed)
        check_equal(cut, channels.thin(variables, {name: keep}, graph))


def test_it_chooses_the_same_channels(networks):
    model, variables, graph, network, shape = networks
    sparsity = 0.5
    outputs = {name: name.removeprefix("params/") for name in graph.removable()}
    norms = pruning.magnitude_importance(
        variables["params"],
        {f"^{path}$": GroupL2() for path in outputs.values()},
    )
    keep = {}
    for name, path in outputs.items():
        size = norms[path].size
        # Torch-Pruning keeps int(size * (1 - sparsity)).
        removed = 1 - int(size * (1 - sparsity)) / size
        keep |= pruning.keep_masks({name: norms[path]}, removed)
    pruner = tp.pruner.MagnitudePruner(
        network,
        torch.zeros(1, shape[-1], *shape[:2]),
        importance=tp.importance.MagnitudeImportance(
            p=2, group_reduction="first", normalizer=None
        ),
        pruning_ratio=sparsity,
        ignored_layers=[getattr(network, f"fc{network.num_dense}")],
    )
    pruner.step()
    smaller = channels.thin(variables, keep, graph)
    check_equal(network, smaller)
    # Both smaller networks run, and agree.
    model = registry.thin_model(model, {n.split("/")[1]: k for n, k in keep.items()})
    images = NUMBERS.uniform(-1, 1, (2, *shape)).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        logits = model.apply(smaller, jnp.asarray(images))
    theirs = network(torch.tensor(images.transpose(0, 3, 1, 2)))
    np.testing.assert_allclose(logits, theirs.detach(), rtol=1e-3, atol=1e-3)
