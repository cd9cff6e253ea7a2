"""Networks for --config.network of probe_landscape, as examples to copy.

    python -m experiments.probe_landscape \\
        --config=experiments/configs/probe_landscape.py:own
"""

import jax.numpy as jnp
from flax import linen as nn

import vit


class Residual(nn.Module):
    """Convolutions with batch normalization between sums, then a mean over pixels."""

    num_classes: int
    width: int = 16
    num_blocks: int = 2

    @nn.compact
    def __call__(self, x, train=False):
        def normalize(x):
            return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)

        x = nn.Conv(self.width, (3, 3))(x)
        for _ in range(self.num_blocks):
            inner = nn.Conv(self.width, (3, 3))(nn.relu(normalize(x)))
            inner = nn.Conv(self.width, (3, 3))(nn.relu(normalize(inner)))
            x = x + inner
        return nn.Dense(self.num_classes)(jnp.mean(nn.relu(x), axis=(1, 2)))


def make_residual(num_classes, **fields):
    return Residual(num_classes, **fields)


def make_vit(num_classes, **fields):
    """A Vision Transformer, which normalizes by layer normalization."""
    fields = {"num_layers": 2, "hidden_size": 32, "mlp_dim": 64} | fields
    fields = {"patch_size": 2} | fields
    return vit.make("cifar_128", num_classes=num_classes, **fields)


def make_trained_vit(num_classes, *, checkpoint):
    """The network of a file of `vit.save_checkpoint`, with its trained weights."""
    model, params = vit.load_checkpoint(checkpoint, num_classes=num_classes)
    return lambda key, x: params, lambda params, x: model.apply({"params": params}, x)
