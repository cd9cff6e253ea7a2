"""What every parameter of a network is, read from the traced network.

Names and ranks do not tell a kernel from a bias: the bias of attention has rank 2, its
kernel rank 3, a scanned kernel one axis more, and Equinox stores a convolution as
(out, in, kh, kw). The equations that use a parameter do tell.
"""

from collections.abc import Callable
from typing import Any

from lbi.dataflow import Flow
from lbi.penalty import Layer, Layers

# A parameter with several uses, for example a tied embedding, is the first of these.
_KINDS = ("convolution", "embedding", "product", "scale", "bias")


def groups(apply_fn: Callable[..., Any], params: Any, *inputs: Any) -> Layers:
    """Finds what each parameter is: a kernel with the roles of its axes, a bias, ...

    The result can be given wherever a penalty is expected. It then means "auto" with
    the layers known: a group lasso on the filters of each convolution, a lasso on the
    kernel of each product (Dense, attention), and nothing on other parameters.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> import lbi
      >>> model, x = nn.Conv(8, (3,)), jnp.ones((2, 6, 4))  # a convolution in time
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> layers = lbi.groups(lambda p, x: model.apply({"params": p}, x), params, x)
      >>> layers["kernel"].kind, layers["kernel"].output, layers["bias"].kind
      ('convolution', (2,), 'bias')
      >>> optimizer = lbi.dessilbi(0.1, penalty=layers)

    Args:
      apply_fn: the network, `apply_fn(params, *inputs)`; it is traced, not run.
      params: a tree of arrays or of jax.ShapeDtypeStruct, for Linen, NNX, Haiku,
        Equinox or a plain function. Its paths are the paths of the result.
      *inputs: arrays or jax.ShapeDtypeStruct. Keep what is not an array out of them
        with a lambda. Statistics are no input: give them with `params`, or close over
        them. A kernel that is divided by an input, as spectral normalization does with
        its statistics, is not seen as a kernel.

    Returns:
      {path: Layer}, one for each parameter.

    Raises:
      ValueError: if the function cannot be traced, or no parameter is a kernel.
    """
    flow = Flow(apply_fn, params, inputs)
    found = {path: _layer(flow, path) for path in flow.shapes}
    if not any(layer.kind in ("convolution", "product") for layer in found.values()):
        paths = ", ".join(f"{path} ({layer.kind})" for path, layer in found.items())
        raise ValueError(
            "no parameter is the kernel of a convolution or product with an input: "
            f"{paths or 'there are no parameters'}."
        )
    return Layers(found)


def _layer(flow, path):
    uses = [use for use in flow.uses.found if use.path == path]
    kinds = {use.kind for use in uses}
    kind = next((kind for kind in _KINDS if kind in kinds), "other")
    if kind not in ("convolution", "product", "embedding"):
        return Layer(kind)
    roles = {}
    for use in uses:
        if use.kind in (kind, "stacked"):
            roles = use.roles | roles if use.kind == kind else roles | use.roles
    heads = []
    for axis in range(len(flow.shapes[path])):
        is_head, is_stacked = flow.marked(path, axis)
        if is_head and roles.get(axis) != "stacked":
            heads.append(axis)
            if roles.get(axis) == "window":  # flattened together with their entries
                roles[axis] = "input"
        elif is_stacked:
            roles[axis] = "stacked"
        elif axis not in roles and kind == "product":
            # Entries that are added before the product are taps of a convolution;
            # entries that are not are several kernels in one array.
            roles[axis] = "window" if flow.is_mixed(path) else "stacked"
    if kind == "product" and "window" in roles.values():
        kind = "convolution"
    by_role = {
        role: tuple(sorted(axis for axis, r in roles.items() if r == role))
        for role in ("output", "input", "window", "stacked")
    }
    return Layer(kind, heads=tuple(heads), **by_role)
