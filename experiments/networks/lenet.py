"""LeNet of the student report, for 28x28 images: three convolutions, two dense layers.

LeCun et al. 1998 with ReLU and maximum pooling: 61,706 parameters for one channel.
"""

from collections.abc import Callable

from flax import linen as nn
from jax import Array

from experiments.networks import convolution

# Default of torch for kernels: uniform in +-1 / sqrt(fan-in).
_UNIFORM = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class LeNet(nn.Module):
    """LeNet; narrower with other `features` and `hidden`.

    Attributes:
      features: output channels of the three convolutions.
      hidden: units of the hidden dense layer.
      num_classes: number of logits.
      conv: replaces `jax.lax.conv_general_dilated`; None chooses by backend.
    """

    features: tuple[int, int, int] = (6, 16, 120)
    hidden: int = 84
    num_classes: int = 10
    conv: Callable[..., Array] | None = None

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        """Images (B, 28, 28, C) -> logits (B, num_classes); `train` has no effect."""
        del train
        if images.ndim != 4 or images.shape[1:3] != (28, 28):
            raise ValueError(f"images must be (B, 28, 28, C), got {images.shape}.")
        x = images
        for number, channels in enumerate(self.features, start=1):
            x = nn.Conv(
                channels,
                (5, 5),
                padding=2 if number == 1 else 0,
                kernel_init=_UNIFORM,
                conv_general_dilated=self.conv or convolution.fastest(),
                name=f"conv{number}",
            )(x)
            x = nn.relu(x)
            if number < 3:
                x = convolution.max_pool(x)
        x = x.reshape(x.shape[0], -1)  # (B, features[2]): the image is one pixel
        x = nn.relu(nn.Dense(self.hidden, kernel_init=_UNIFORM, name="fc1")(x))
        return nn.Dense(self.num_classes, kernel_init=_UNIFORM, name="fc2")(x)
