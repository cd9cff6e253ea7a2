"""Paths of loss landscapes: probes along the gradient, and measures of the Hessian."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import devices
from experiments.configs import probe_landscape as probe_landscape_configs
from experiments.peers import pyhessian_curvature as pyhessian
from experiments.timing.hot_path import HotPath, count_gradient, image_classifier
from experiments.training import classifier
from landscape import curvature, probes


def _probe(*, variant, batch_size, num_step_sizes, **model):
    """A gradient, or with step sizes the loss profile along the gradient."""
    config = probe_landscape_configs.get_config(variant)
    fields = config.model.to_dict() | {"batch_norm": True, **model}
    images, model, variables = image_classifier(fields, batch_size, config.image_size)
    pixels, labels = images.train
    loss_fn = classifier.make_loss(model, config.bn_mode)
    batch = {
        "inputs": devices.divide(np.asarray(classifier.normalize(images, pixels))),
        "labels": devices.divide(labels),
        "batch_stats": devices.replicate(variables["batch_stats"]),
    }
    step_sizes = np.float32(0.4 / 2.0 ** np.arange(num_step_sizes)[::-1])

    def step(state, params, batch):
        if num_step_sizes:
            return state, probes.probe_gradient(loss_fn, params, batch, step_sizes)
        with jax.default_matmul_precision("highest"):  # as in the probe
            return state, jax.value_and_grad(loss_fn)(params, batch)

    return HotPath(
        step,
        (),
        (devices.replicate(variables["params"]), batch),
        unit="images",
        units=batch_size,
        flops=(1 + num_step_sizes) * count_gradient(model, variables, pixels),
    )


def _curvature(*, measure, width, depth, batch_size, num, num_steps, tolerance):
    """A measure of the Hessian of an MLP, as in experiments/peers.

    eigenvalues: the `num` largest, with their residual; trace: the mean over `num`
    vectors; density: the quadrature of `num` vectors of `num_steps` products each.
    """
    weights, inputs, labels = pyhessian.make_problem(
        width=width, depth=depth, batch_size=batch_size
    )

    def loss_fn(weights, batch):
        x = batch["inputs"]
        for kernel in weights[:-1]:
            x = jnp.tanh(x @ kernel)
        return classifier.cross_entropy(x @ weights[-1], batch["labels"])

    measures = {
        "eigenvalues": functools.partial(
            curvature.leading_eigenvalues, num=num, num_steps=num_steps
        ),
        "trace": functools.partial(curvature.trace, num_matvecs=num),
        "density": functools.partial(
            curvature.lanczos_quadrature, num_samples=num, num_steps=num_steps
        ),
    }
    num_products = {"eigenvalues": num_steps, "trace": num, "density": num * num_steps}

    def step(state, weights, batch):
        matvec = functools.partial(
            curvature.hessian_vector_product, loss_fn, weights, batch
        )
        return state, measures[measure](jax.random.key(0), matvec, weights)

    batch = {"inputs": inputs, "labels": labels}
    _, found = jax.jit(step)((), weights, batch)
    further = {}
    if measure == "eigenvalues":
        residual = float(jnp.max(found.residuals) / found.values[0])
        if residual > tolerance:
            raise ValueError(
                f"num_steps must be larger: the residual is {residual:.1e}, above "
                f"{tolerance}."
            )
        further = {"residual": residual}
    elif measure == "trace":
        further = {"trace": float(found.mean), "error": float(found.standard_error)}
    products = 2 * batch_size * sum(kernel.size for kernel in weights)
    peer = None
    if measure in pyhessian.MEASURES:
        name = f"{measure} width={width} depth={depth} B={batch_size}"
        peer = ("pyhessian_curvature.py", name)
    return HotPath(
        step,
        (),
        devices.replicate((weights, batch)),
        unit="images",
        units=batch_size,
        # A gradient is three forward passes, a Hessian product two gradients.
        flops=num_products[measure] * 6 * products,
        peer=peer,
        further=further,
    )


KINDS = {"probe": _probe, "curvature": _curvature}
