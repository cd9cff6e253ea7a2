"""The deep linear network of Santurkar et al. 2018 (arXiv 1805.11604).

The network is linear in its inputs, with or without batch normalization between the
layers, but the loss is far from convex in the weights. It shows the effect of
normalization on a landscape without rectifiers or convolutions.
"""

from flax import linen as nn
from jax import Array


class DeepLinear(nn.Module):
    """Dense layers without nonlinearities.

    Attributes:
      depth: number of layers, at least 1; 25 in the paper.
      width: units of each hidden layer.
      num_classes: outputs.
      batch_norm: whether batch normalization follows each hidden layer.
      bn_momentum: share of the old value in the running statistics; 0 replaces them.
    """

    depth: int = 25
    width: int = 64
    num_classes: int = 10
    batch_norm: bool = True
    bn_momentum: float = 0.9

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool = False) -> Array:
        """Inputs (B, ...), flattened -> outputs (B, num_classes).

        With `train` the statistics of the batch are used, and the running statistics
        (collection `batch_stats`) are updated.
        """
        if self.depth < 1:
            raise ValueError(f"depth must be at least 1, got {self.depth}.")
        x = inputs.reshape(inputs.shape[0], -1)
        for number in range(1, self.depth + 1):
            is_last = number == self.depth
            x = nn.Dense(
                self.num_classes if is_last else self.width,
                kernel_init=nn.initializers.xavier_normal(),
                name=f"fc{number}",
            )(x)
            if self.batch_norm and not is_last:
                x = nn.BatchNorm(
                    use_running_average=not train,
                    momentum=self.bn_momentum,
                    name=f"bn{number}",
                )(x)
        return x
