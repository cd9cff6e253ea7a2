"""VGG-A with and without batch normalization, for 32x32 images.

Simonyan & Zisserman 2014 (arXiv 1409.1556), configuration A, with the classifier of
512 units that is usual for CIFAR-10. It has 9,750,922 parameters, and 9,756,426 with
batch normalization.
"""

from collections.abc import Callable

from flax import linen as nn
from jax import Array

from experiments.networks import convolution

# Output channels of the convolutions; a maximum over 2x2 pixels ends each stage.
STAGES = ((64,), (128,), (256, 256), (512, 512), (512, 512))


class VGG(nn.Module):
    """VGG-A; narrower with other `stages` and `hidden`.

    Attributes:
      stages: output channels of the convolutions, stage by stage.
      hidden: units of the two hidden fully connected layers.
      num_classes: number of logits.
      batch_norm: whether batch normalization follows each convolution. With a
        sharded batch the statistics are those of the whole batch.
      bn_momentum: share of the old value in the running statistics; 0 replaces them.
      conv: replaces `jax.lax.conv_general_dilated`; None chooses by backend.
    """

    stages: tuple[tuple[int, ...], ...] = STAGES
    hidden: tuple[int, int] = (512, 512)
    num_classes: int = 10
    batch_norm: bool = True
    bn_momentum: float = 0.9
    conv: Callable[..., Array] | None = None

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        """Images (B, H, W, C) -> logits (B, num_classes).

        H and W must be divisible by 2 ** number of stages.

        With `train` the statistics of the batch are used, and the running statistics
        (collection `batch_stats`) are updated.
        """
        side = 2 ** len(self.stages)
        if images.ndim != 4 or images.shape[1] % side or images.shape[2] % side:
            raise ValueError(
                f"images must be (B, H, W, C) with sides divisible by {side}, got "
                f"{images.shape}."
            )
        x, number = images, 0
        for stage in self.stages:
            for channels in stage:
                number += 1
                x = nn.Conv(
                    channels,
                    (3, 3),
                    padding=1,
                    kernel_init=nn.initializers.xavier_normal(),
                    conv_general_dilated=self.conv or convolution.fastest(),
                    name=f"conv{number}",
                )(x)
                if self.batch_norm:
                    x = nn.BatchNorm(
                        use_running_average=not train,
                        momentum=self.bn_momentum,
                        name=f"bn{number}",
                    )(x)
                x = nn.relu(x)
            x = convolution.max_pool(x)
        x = x.reshape(x.shape[0], -1)
        for number, units in enumerate((*self.hidden, self.num_classes), start=1):
            x = nn.Dense(
                units, kernel_init=nn.initializers.xavier_normal(), name=f"fc{number}"
            )(x)
            if number <= len(self.hidden):
                x = nn.relu(x)
        return x
