"""Curvature of an MLP with PyHessian: eigenvalues and trace; prints its speed.

    python experiments/peers/pyhessian_curvature.py "trace width=128 depth=3 B=512"

It needs torch and PyHessian (Yao et al. 2020, arXiv 1912.07145; pip install pyhessian).
`experiments.benchmark` measures `landscape.curvature` on the same weights and the same
batch. PyHessian stops when two estimates of an eigenvalue agree. Here it gets the
loosest of these tolerances at which all eigenvectors have the residual

  |H v - (v . H v) v| <= tolerance |lambda_1|

that the benchmark asks of both. The trace takes equally many random vectors in both.
PyHessian 0.1 estimates the density with torch.eig, which torch no longer has.

Axes: B images, N inputs, W width, K classes.
"""

import sys
import time

import numpy as np

# The number of eigenvalues and their relative residual.
EIGENVALUES = {"num": 5, "tolerance": 1e-2}
# The number of random vectors.
TRACE = {"num": 100}
NUM_INPUTS, NUM_CLASSES = 64, 10


def make_problem(*, width, depth, batch_size, seed=0):
    """Weights [(rows, columns), ...], inputs (B, N) and labels (B,), as NumPy arrays.

    The classes are clusters, so that a few eigenvalues stand out as in training.
    """
    rng = np.random.default_rng(seed)
    sizes = [NUM_INPUTS] + [width] * (depth - 1) + [NUM_CLASSES]
    weights = [
        np.float32(rng.normal(size=(rows, columns)) * np.sqrt(1.5 / rows))
        for rows, columns in zip(sizes[:-1], sizes[1:], strict=True)
    ]
    labels = rng.integers(NUM_CLASSES, size=batch_size)
    centers = rng.normal(size=(NUM_CLASSES, NUM_INPUTS))
    inputs = centers[labels] + rng.normal(size=(batch_size, NUM_INPUTS))
    return weights, np.float32(inputs), labels


def make_model(weights):
    """The MLP with tanh between the weights, without biases."""
    import torch

    layers = []
    for kernel in weights:
        layer = torch.nn.Linear(*kernel.shape, bias=False)
        layer.weight.data = torch.tensor(kernel.T.copy())
        layers += [layer, torch.nn.Tanh()]
    return torch.nn.Sequential(*layers[:-1])


def find_eigenvalues(weights, inputs, labels, *, num, tolerance):
    """Seconds, eigenvalues and the largest relative residual of the first good run."""
    import torch
    from pyhessian import hessian
    from pyhessian.utils import group_product, hessian_vector_product

    torch.manual_seed(0)
    data = torch.tensor(inputs), torch.tensor(labels)
    for stop_at in 10.0 ** -np.arange(2, 8):
        model = make_model(weights)
        started = time.perf_counter()
        found = hessian(model, torch.nn.CrossEntropyLoss(), data=data, cuda=False)
        values, vectors = found.eigenvalues(maxIter=2000, tol=stop_at, top_n=num)
        seconds = time.perf_counter() - started
        residuals = []
        for vector in vectors:
            image = hessian_vector_product(found.gradsH, found.params, vector)
            value = group_product(image, vector)
            rest = [a - value * b for a, b in zip(image, vector, strict=True)]
            residuals.append(float(group_product(rest, rest).sqrt()))
        if max(residuals) <= tolerance * abs(values[0]):
            return seconds, values, max(residuals) / abs(values[0])
    raise SystemExit(f"PyHessian does not reach the residual {tolerance}.")


def estimate_trace(weights, inputs, labels, *, num):
    """Seconds, the trace and its standard error."""
    import torch
    from pyhessian import hessian

    torch.manual_seed(0)
    data, model = (torch.tensor(inputs), torch.tensor(labels)), make_model(weights)
    started = time.perf_counter()
    found = hessian(model, torch.nn.CrossEntropyLoss(), data=data, cuda=False)
    # Its test divides by the trace, which may be negative; nothing is below -inf.
    samples = np.array(found.trace(maxIter=num, tol=-np.inf))
    seconds = time.perf_counter() - started
    return seconds, samples.mean(), samples.std(ddof=1) / np.sqrt(len(samples))


MEASURES = {
    "eigenvalues": (find_eigenvalues, EIGENVALUES),
    "trace": (estimate_trace, TRACE),
}


def measure(name, *, num_repeats=3):
    """Prints the median time of the measure, at the sizes in the name."""
    kind, *sizes = name.split()
    width, depth, batch_size = (int(part.split("=")[1]) for part in sizes)
    problem = make_problem(width=width, depth=depth, batch_size=batch_size)
    function, options = MEASURES[kind]
    runs = [function(*problem, **options) for _ in range(1 + num_repeats)]
    seconds = sorted(run[0] for run in runs[1:])[num_repeats // 2]
    print(f"{name}: {seconds:.4f}s, {np.round(runs[-1][1], 4)}")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        measure(name)
