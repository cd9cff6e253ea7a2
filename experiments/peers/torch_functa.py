"""The meta-step of a functa in torch; prints its speed.

    python experiments/peers/torch_functa.py "width=128 depth=5 latent=128 side=32 B=16"

It is what a user of torch would write, and it needs only torch to run.
`experiments.benchmark` compares the project's own step with it. The equations are those
of Dupont et al. 2022 (arXiv 2201.12204) and Bauer et al. 2023 (arXiv 2302.03130):

  M = z K + b                                   modulations of all sine layers
  h = x,  h <- sin(omega (h W_l + b_l + M_l))   for every sine layer l
  y = h W + b + 0.5
  z <- z - rate_s * d/dz mean((y - target)^2)   three steps s, from z = 0

The outer loss is the mean squared error after the last step; it is differentiated
through all steps. A signal is an image or, in a spatial functa with nearest-neighbor
interpolation, a cell of an image; its coordinates lie in [0, 1]^2.

Axes: B signals, N pixels of a signal, L numbers of the latent, D layers, W width.
"""

import math
import sys
import time


def init_params(*, width, depth, latent_dim, out_channels=3, omega=10.0):
    """The weights, named and shaped as those of `functa.SpatialSiren`."""
    import torch

    def uniform(rows, columns, bound):
        return bound * (2 * torch.rand(rows, columns) - 1)

    hidden = math.sqrt(6 / width) / omega
    sizes = [2] + [width] * (depth - 1) + [out_channels]
    layers = {}
    for i, (rows, columns) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        kernel = uniform(rows, columns, hidden if i else 1 / rows)
        layers[f"layer_{i}"] = {"kernel": kernel, "bias": torch.zeros(columns)}
    shifts = (depth - 1) * width
    kernel = torch.nn.init.trunc_normal_(torch.empty(latent_dim, shifts))
    kernel /= math.sqrt(latent_dim)
    linear = {"kernel": kernel, "bias": torch.zeros(shifts)}
    return layers | {"latent_to_modulation": {"linear_0": linear}}


def apply_field(params, coords, latents, *, omega=10.0):
    """Values (B, N, 3) of the fields of latents (B, L) at coords (N, 2)."""
    linear = params["latent_to_modulation"]["linear_0"]
    depth = len(params) - 1
    modulation = latents @ linear["kernel"] + linear["bias"]
    modulation = modulation.reshape(len(latents), depth - 1, 1, -1)
    x = coords
    for i in range(depth - 1):
        layer = params[f"layer_{i}"]
        x = x @ layer["kernel"] + layer["bias"] + modulation[:, i]
        x = (omega * x).sin()
    layer = params[f"layer_{depth - 1}"]
    return x @ layer["kernel"] + layer["bias"] + 0.5


def meta_loss(params, rates, coords, targets, *, omega=10.0):
    """The outer loss of targets (B, N, 3), with one row of rates (S, L) per step."""
    import torch

    latents = torch.zeros(len(targets), rates.shape[1], dtype=targets.dtype)
    latents.requires_grad_()
    for rate in rates:
        error = apply_field(params, coords, latents, omega=omega) - targets
        # The sum over signals of their mean losses: each has its own gradient.
        loss = error.square().mean((1, 2)).sum()
        [gradient] = torch.autograd.grad(loss, latents, create_graph=True)
        latents = latents - rate * gradient
    error = apply_field(params, coords, latents, omega=omega) - targets
    return error.square().mean()


def pixel_centers(side):
    """Coordinates (side^2, 2) of the pixels of a square in [0, 1]^2."""
    import torch

    centers = (torch.arange(side) + 0.5) / side
    return torch.cartesian_prod(centers, centers)


def leaves(tree):
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in leaves(value)]
    return [tree]


def measure(name, *, num_steps=3, num_repeats=3):
    """Prints the median time of a step with the sizes in the name."""
    import torch

    sizes = {k: int(v) for k, v in (part.split("=") for part in name.split())}
    torch.manual_seed(0)
    params = init_params(
        width=sizes["width"], depth=sizes["depth"], latent_dim=sizes["latent"]
    )
    rates = torch.full((num_steps, sizes["latent"]), 0.05)
    trained = [leaf.requires_grad_() for leaf in (*leaves(params), rates)]
    optimizer = torch.optim.Adam(trained, 1e-5)
    coords = pixel_centers(sizes["side"])
    targets = torch.rand(sizes["B"], sizes["side"] ** 2, 3)
    times = []
    for _ in range(1 + num_repeats):
        started = time.perf_counter()
        optimizer.zero_grad()
        meta_loss(params, rates, coords, targets).backward()
        optimizer.step()
        times.append(time.perf_counter() - started)
    # The first one warms up.
    print(f"{name}: {sorted(times[1:])[num_repeats // 2]:.4f}s")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        measure(name)
