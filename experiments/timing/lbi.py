"""Paths of structured sparsity: training steps, and the tracing of a network."""

import jax
import jax.numpy as jnp
import optax

import lbi
import vit
from experiments.common import devices
from experiments.configs import train_lbi as train_lbi_configs
from experiments.timing.hot_path import (
    NUM_CLASSES,
    HotPath,
    count_gradient,
    image_classifier,
)
from experiments.training import classifier
from experiments.training import lbi as lbi_training


def _train(*, variant, method, batch_size, num_steps):
    config = train_lbi_configs.get_config(variant)
    images, model, variables = image_classifier(
        config.model.to_dict(), batch_size * num_steps, config.image_size
    )
    # Copies: the buffers of the state are donated.
    variables = jax.tree.map(jnp.copy, variables)
    optimizer = optax.sgd(0.01)  # the peer's
    if method != "sgd":
        # The schedules are those of a run of 20 epochs of 60,000 images.
        config.methods = (method,)
        optimizer = lbi_training.make_optimizer(
            config, variables["params"], 20 * 60_000 // batch_size
        )
    update = classifier.make_update(
        model, images, optimizer, batch_size=batch_size, augmented=False, seed=0
    )
    state = classifier.init_state(variables, optimizer, num_steps)
    sizes = [
        sum(x.nbytes for x in jax.tree.leaves(tree))
        for tree in (state.opt_state, state.params)
    ]
    is_peers = method == "sgd" and variant == "cifar10"
    return HotPath(
        lambda state: (update(state, 0, num_steps), ()),
        devices.replicate(state),
        (),
        unit="images",
        units=batch_size,
        flops=count_gradient(model, variables, images.train[0][:batch_size]),
        num_steps=num_steps,
        peer=("torch_vgg.py", f"B={batch_size}") if is_peers else None,
        further={"state_over_params": sizes[0] / sizes[1]},
    )


def _trace(*, function, variant, patch_size, image_size, **model):
    """The graph of the channels of a ViT, or what its parameters are."""
    network = vit.make(variant, NUM_CLASSES, patch_size, **model)
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    params = jax.eval_shape(network.init, jax.random.key(0), images)["params"]
    trace = {"channels": lbi.channels.trace, "groups": lbi.groups}[function]

    def step(state):
        # A new function in each call: JAX remembers the jaxprs of known ones.
        trace(lambda params, x: network.apply({"params": params}, x), params, images)
        return state, ()

    return HotPath(step, (), (), unit="networks", units=1, flops=0, jitted=False)


KINDS = {"train": _train, "trace": _trace}
