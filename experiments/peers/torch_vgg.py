"""A training step of VGG-A with batch normalization in torch; prints its speed.

    python experiments/peers/torch_vgg.py "B=128"

It is what a user of torch would write, and it needs only torch to run.
`experiments.benchmark` compares the project's own step, of the network of
`experiments.networks.vgg` on images of 32x32 pixels, with it.
"""

import sys
import time

# Channels of the convolutions before each max-pooling (Simonyan and Zisserman 2015).
STAGES = ((64,), (128,), (256, 256), (512, 512), (512, 512))


def make_model(num_classes=10):
    """VGG-A for images of 32x32 pixels, with two hidden layers of 512."""
    from torch import nn

    layers, channels = [], 3
    for stage in STAGES:
        for width in stage:
            layers += [
                nn.Conv2d(channels, width, 3, padding=1),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            channels = width
        layers.append(nn.MaxPool2d(2))
    layers.append(nn.Flatten())
    for _ in range(2):
        layers += [nn.Linear(512, 512), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(512, num_classes))


def measure(name, *, num_repeats=3):
    """Prints the median time of a step of SGD at the batch size in the name."""
    import torch

    batch_size = int(name.removeprefix("B="))
    torch.manual_seed(0)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    images = torch.randn(batch_size, 3, 32, 32)
    labels = torch.randint(10, (batch_size,))
    times = []
    for _ in range(1 + num_repeats):
        started = time.perf_counter()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        times.append(time.perf_counter() - started)
    # The first one warms up.
    print(f"{name}: {sorted(times[1:])[num_repeats // 2]:.4f}s")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        measure(name)
