"""The networks of google-deepmind/functa in Haiku, and what they give, in float64.

Haiku names the modules, and plain JAX autodiff differentiates through the inner loop.
Nothing of functa/ is used. The architecture follows Dupont et al. 2022 (arXiv
2201.12204) and the names of the released parameters.

Axes: B images, R rows and columns, C channels, N points, W width, L latent size,
S inner steps.
"""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

ROOT = "latent_modulated_siren"
LATENT = f"{ROOT}/~/latent_vector"
RATES = f"{ROOT}/~/meta_sgd_lrs"


class FiLM(hk.Module):
    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def __call__(self, x):
        return modulate(
            {
                part: hk.get_parameter(part, x.shape[-1:], init=jnp.zeros)
                for part in self.parts
            },
            x,
        )


def modulate(values, x):
    """scale * x + shift with what is present of the two, (W,) each; x is (N, W)."""
    scale, shift = values.get("scale"), values.get("shift")
    x = x if scale is None else jnp.einsum("w,nw->nw", scale, x)
    return x if shift is None else x + shift[None]


class ModulatedSirenLayer(hk.Module):
    def __call__(self, x, size, modulate, omega_0):
        z = hk.Linear(size)(x)
        return z + 0.5 if modulate is None else jnp.sin(omega_0 * modulate(z))


class LatentVector(hk.Module):
    def __init__(self, size):
        super().__init__()
        self.value = hk.get_parameter("latent_vector", (size,), init=jnp.zeros)


class MetaSGDLrs(hk.Module):
    def __init__(self, size):
        super().__init__()
        hk.get_parameter("meta_sgd_lrs", (size,), init=jnp.zeros)


class LatentToModulation(hk.Module):
    def __init__(self, sizes):
        super().__init__()
        self.mlp = hk.nets.MLP(sizes, activation=jax.nn.relu)


def siren_body(coords, modulates, *, width, out_channels, omega_0):
    x = coords.reshape(-1, coords.shape[-1])
    for modulate in modulates:
        x = ModulatedSirenLayer()(x, width, modulate, omega_0)
    x = ModulatedSirenLayer()(x, out_channels, None, omega_0)
    return x.reshape(*coords.shape[:-1], out_channels)


class HaikuSiren(hk.Module):
    """The direct variant: each layer's scale and shift are parameters."""

    def __init__(self, parts, depth, width, **sizes):
        super().__init__(name="modulated_siren")
        self.parts, self.depth, self.sizes = parts, depth, dict(sizes, width=width)
        MetaSGDLrs((depth - 1) * width * len(parts))

    def __call__(self, coords):
        # Each layer calls it within itself, so that Haiku names the FiLM after it.
        modulates = [lambda z: FiLM(self.parts)(z)] * (self.depth - 1)
        return siren_body(coords, modulates, **self.sizes)


class HaikuLatentSiren(hk.Module):
    """Every layer's scale and shift are computed from a latent vector."""

    def __init__(
        self,
        parts,
        depth,
        width,
        latent_dim,
        layer_sizes,
        name=ROOT,
        use_meta_sgd=True,
        **sizes,
    ):
        super().__init__(name=name)
        self.parts, self.depth, self.sizes = parts, depth, dict(sizes, width=width)
        if use_meta_sgd:
            MetaSGDLrs(latent_dim)
        self.latent = LatentVector(latent_dim)
        out = (depth - 1) * width * len(parts)
        self.map = LatentToModulation((*layer_sizes, out))

    def __call__(self, coords):
        modulation = self.map.mlp(self.latent.value)
        chunks = iter(jnp.split(modulation, (self.depth - 1) * len(self.parts)))
        layers = [
            {part: next(chunks) + (part == "scale") for part in self.parts}
            for _ in range(self.depth - 1)
        ]
        modulates = [functools.partial(modulate, values) for values in layers]
        return siren_body(coords, modulates, **self.sizes)


def random_tree(module, coords, **kwargs):
    """Returns the Haiku apply function and a tree with no entry at zero."""

    def network(x):
        return module(**kwargs)(x)

    transformed = hk.without_apply_rng(hk.transform(network))
    shapes = jax.eval_shape(transformed.init, jax.random.key(0), coords)
    rng = np.random.default_rng(0)
    tree = {
        module: {
            name: rng.normal(0, 0.3, array.shape).astype(np.float32)
            for name, array in arrays.items()
        }
        for module, arrays in shapes.items()
    }
    return jax.jit(transformed.apply), tree


def latent_siren(config):
    """Returns the Haiku init and apply functions of a golden file's config."""
    parts = [part for part in ("scale", "shift") if config[f"modulate_{part}"]]
    names = ("width", "depth", "out_channels", "latent_dim", "layer_sizes")

    def network(coords):
        return HaikuLatentSiren(
            parts,
            omega_0=config["w0"],
            use_meta_sgd=config["use_meta_sgd"],
            **{name: config[name] for name in names},
        )(coords)

    return hk.without_apply_rng(hk.transform(network))


def golden_numbers(config, params, coords, images):
    """Computes all outputs of a golden file from its inputs, in float64.

    Args:
      config: the keywords of the network and of the inner loop.
      params: {module: {name: array}}, the latent and the rates among them.
      coords: (R, R, 2).
      images: (B, R, R, C).

    Returns:
      {key of the file: array}: forward (R, R, C), fitted_latents (B, L), psnr_per_step
      and loss_per_step (B, S + 1), outer_loss (), and outer_grad/<module>/<name> for
      every weight and rate.
    """
    apply = jax.jit(latent_siren(config).apply)

    def fit(weights, latent, coords, image):
        """Returns the fitted latent, and loss and error (S + 1,) on the way to it."""

        def loss_fn(latent):
            tree = weights | {LATENT: {"latent_vector": latent}}
            mse = jnp.mean(jnp.square(apply(tree, coords) - image))
            return mse + config["l2_weight"] * jnp.sum(jnp.square(latent)), mse

        rates = config["inner_lr"]
        if config["use_meta_sgd"]:
            rates = weights[RATES]["meta_sgd_lrs"]
        history = []
        for _ in range(config["inner_steps"]):
            values, grad = jax.value_and_grad(loss_fn, has_aux=True)(latent)
            history.append(values)
            latent = latent - rates * grad
        history.append(loss_fn(latent))
        losses, mses = (jnp.stack(values) for values in zip(*history, strict=True))
        return latent, losses, mses

    def outer_loss(weights, latent, coords, images):
        fits = jax.vmap(fit, (None, None, None, 0))(weights, latent, coords, images)
        latents, losses, mses = fits
        return jnp.mean(losses[:, -1]), (latents, losses, mses)

    with jax.enable_x64(True):
        inputs = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.float64), (params, coords, images)
        )
        params, coords, images = inputs
        weights = {name: params[name] for name in params if name != LATENT}
        (loss, (latents, losses, mses)), grads = jax.jit(
            jax.value_and_grad(outer_loss, has_aux=True)
        )(weights, params[LATENT]["latent_vector"], coords, images)
        numbers = {
            "forward": apply(params, coords),
            "fitted_latents": latents,
            "psnr_per_step": -10 * jnp.log10(mses),
            "loss_per_step": losses,
            "outer_loss": loss,
            **flat(grads, "outer_grad/"),
        }
        return jax.tree.map(np.asarray, numbers)


def flat(tree, prefix):
    """{module: {name: array}} -> {<prefix><module>/<name>: array}, as in the files."""
    return {
        f"{prefix}{module}/{name}": array
        for module, arrays in tree.items()
        for name, array in arrays.items()
    }


def nested(golden, prefix):
    """The inverse of `flat`; other keys of the file are left out."""
    tree = {}
    for key, array in golden.items():
        if key.startswith(prefix):
            module, name = key.removeprefix(prefix).rsplit("/", 1)
            tree.setdefault(module, {})[name] = array
    return tree
