"""Residual network for small images, with and without batch normalization.

He et al. 2015 (arXiv 1512.03385), section 4.2: a convolution, three stages of blocks of
two convolutions, the mean over the image, one dense layer; 6 blocks + 2 layers. Where a
block changes the size, its shortcut is a convolution of one pixel (their option B).
One block a stage is ResNet-8, with 78,042 parameters for ten classes.
"""

from collections.abc import Callable

from flax import linen as nn
from jax import Array

from experiments.networks import convolution


class ResNet(nn.Module):
    """ResNet of CIFAR-10; deeper with more `blocks`, narrower with other `widths`.

    Attributes:
      widths: channels of the stages; each stage after the first halves the image.
      blocks: blocks of a stage.
      num_classes: number of logits.
      batch_norm: whether batch normalization follows each convolution.
      bn_momentum: share of the old value in the running statistics; 0 replaces them.
      conv: replaces `jax.lax.conv_general_dilated`; None chooses by backend.
    """

    widths: tuple[int, ...] = (16, 32, 64)
    blocks: int = 1
    num_classes: int = 10
    batch_norm: bool = True
    bn_momentum: float = 0.9
    conv: Callable[..., Array] | None = None

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        """Images (B, H, W, C) -> logits (B, num_classes).

        With `train` the statistics of the batch are used, and the running statistics
        (collection `batch_stats`) are updated.
        """
        if images.ndim != 4:
            raise ValueError(f"images must be (B, H, W, C), got {images.shape}.")

        def conv(x, width, name, *, size=3, stride=1):
            x = nn.Conv(
                width,
                (size, size),
                strides=stride,
                padding=size // 2,
                use_bias=not self.batch_norm,
                kernel_init=nn.initializers.he_normal(),
                conv_general_dilated=self.conv or convolution.fastest(),
                name=name,
            )(x)
            if not self.batch_norm:
                return x
            return nn.BatchNorm(
                use_running_average=not train,
                momentum=self.bn_momentum,
                name=f"{name}_bn",
            )(x)

        x = nn.relu(conv(images, self.widths[0], "conv"))
        for stage, width in enumerate(self.widths, start=1):
            for number in range(1, self.blocks + 1):
                block = f"block{stage}_{number}"
                stride = 2 if stage > 1 and number == 1 else 1
                y = nn.relu(conv(x, width, f"{block}_conv1", stride=stride))
                y = conv(y, width, f"{block}_conv2")
                if x.shape != y.shape:
                    x = conv(x, width, f"{block}_shortcut", size=1, stride=stride)
                x = nn.relu(x + y)
        x = x.mean((1, 2))
        return nn.Dense(self.num_classes, name="fc")(x)
