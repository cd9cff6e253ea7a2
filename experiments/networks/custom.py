"""Networks and losses from a Python file of the user, for the commands of this project.

    PATH.py:make_network

names a function. It is called with the number of classes, with config.network_options
as keywords, and with `seed` if it has such an argument. It returns one of

* a module of Flax Linen, called with images (B, H, W, C), and with train=True or False
  if its `__call__` has such an argument or passes keywords on, as nn.Sequential;
* a module of Flax NNX, whose parameters are the initial ones;
* hk.transform(f) of Haiku with f(images), or hk.transform_with_state(f) with
  f(images, train), also in hk.without_apply_rng;
* a pair of functions: init(key, images) -> params, apply(params, images) -> logits,
  with params of any structure.

The outputs are logits (B, num_classes). Parameters of 16 bits become float32. Besides
parameters a network may have running statistics of batch normalization, which change in
training and in training alone, and no other state and no dropout.

The file is executed as a module, and it can import other files of its folder.
"""

import ast
import contextlib
import functools
import hashlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import errors, nnx, traverse_util
from flax import linen as nn
from jax.interpreters import partial_eval

from experiments.common import settings
from landscape.checks import check_floating, check_scalar
from landscape.norms import widen
from lbi.penalty import path_name


class Network(NamedTuple):
    """A network with the interface of a Linen module.

    Attributes:
      init: (key, images) -> {"params": ..., "batch_stats": ...}, nested dicts.
      apply: (variables, images, train=False, mutable=()) -> logits, or with `mutable`
        the logits and {"batch_stats": ...}.
    """

    init: Callable[..., dict[str, Any]]
    apply: Callable[..., Any]


def split_names(network: str) -> tuple[str, ...]:
    """The functions in "PATH.py:first,second"; each makes a network."""
    return tuple(name.strip() for name in network.rpartition(":")[2].split(","))


def load_functions(chosen: str, field: str) -> dict[str, Callable[..., Any]]:
    """The functions of "PATH.py:first,second", by name.

    Raises:
      ValueError: if there is no such file or function, or if the file fails; names
        `field`.
    """
    path, colon, _ = chosen.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise ValueError(f"{field} must be PATH.py:FUNCTION, got {chosen!r}.")
    if not Path(path).is_file():
        raise ValueError(f"{field}={chosen}: there is no file {path}.")
    try:
        found = vars(_execute(Path(path).resolve()))
    # The file is code of the user, who has to correct it whatever it raises.
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{field}={chosen}: {reason}") from error
    names = split_names(chosen)
    for name in names:
        if not callable(found.get(name)):
            known = ", ".join(
                key
                for key, value in found.items()
                if inspect.isfunction(value) and not key.startswith("_")
            )
            raise ValueError(
                f"{field}={chosen}: {path} has no function {name!r}; it has "
                f"{known or 'none'}."
            )
    return {name: found[name] for name in names}


def _execute(path):
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    name = str(path.with_suffix("")).replace(".", "_")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up to read annotations that are strings.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def digest(chosen: str) -> str:
    """Digest of the file in "PATH.py:FUNCTION" and of what it imports from its folder.

    Imports inside functions, and those of the imported files, count too. They are read
    off the source, so they do not depend on what was imported before.
    """
    path = Path(chosen.rpartition(":")[0]).resolve()
    sources = [path]
    for source in sources:  # grows
        for file in _imported(source, path.parent):
            if file not in sources:
                sources.append(file)
    found = hashlib.sha256(path.read_bytes())
    for source in sorted(sources[1:]):
        found.update(source.read_bytes())
    return found.hexdigest()


def _imported(source, folder):
    """Files below `folder` that a source file imports; a package has several."""
    try:
        nodes = list(ast.walk(ast.parse(source.read_bytes())))
    except (SyntaxError, ValueError):  # whoever imports it must expect that
        return
    for node in nodes:
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        place, names = folder, [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            if node.level:
                place = source.parents[min(node.level, len(source.parents)) - 1]
            names = [f"{node.module or ''}.{name}".lstrip(".") for name in names]
        for name in names:
            parts = name.split(".")
            for number in range(1, len(parts) + 1):
                module = place.joinpath(*parts[:number])
                for file in (Path(f"{module}.py"), module / "__init__.py"):
                    if file.is_file():
                        yield file


def load_network(
    chosen: str,
    name: str,
    images: jax.Array | jax.ShapeDtypeStruct,
    *,
    num_classes: int,
    options: Mapping[str, Any],
    seed: int = 0,
) -> Network:
    """The network that a function of a file makes.

    Args:
      chosen: "PATH.py:first,second".
      name: the function.
      images: inputs (B, H, W, C) of the network; only the shape is used.
      num_classes: K.
      options: keywords of the function.
      seed: its argument `seed`, if it has one.

    Raises:
      ValueError: if the function fails, its result is not a network, the parameters are
        not floating point, the outputs are not (B, K), or it has state other than
        batch normalization.
    """
    make = load_functions(chosen, "network")[name]
    options = dict(options)
    if "seed" in inspect.signature(make).parameters:
        options = {"seed": seed} | options
    images = jax.ShapeDtypeStruct(images.shape, jnp.float32)
    with _blamed_on(f"network {name}"):
        create, run = _adapt(make(num_classes, **options))
        check_floating(jax.eval_shape(create, jax.random.key(0), images)[0])
        create = _widened(create)
        shapes = jax.eval_shape(create, jax.random.key(0), images)
        for train in (False, True):
            with _explain_random_numbers():
                outputs, _ = jax.eval_shape(
                    functools.partial(run, train=train), *shapes, images
                )
            _check_logits(outputs, (images.shape[0], num_classes))
            _check_statistics(run, shapes, images, train)
        to_dicts, from_dicts = zip(*map(_renaming, shapes), strict=True)

    def init(key, images):
        params, stats = create(key, images)
        return {"params": to_dicts[0](params), "batch_stats": to_dicts[1](stats)}

    def apply(variables, images, train=False, mutable=()):
        params = from_dicts[0](variables["params"])
        stats = from_dicts[1](variables.get("batch_stats", {}))
        logits, stats = run(params, stats, images, train)
        return (logits, {"batch_stats": to_dicts[1](stats)}) if mutable else logits

    return Network(init, apply)


def _check_logits(outputs, shape):
    found = getattr(outputs, "shape", type(outputs).__name__)
    if found != shape:
        raise ValueError(f"the outputs must be logits {shape}, got {found}.")
    if not jnp.issubdtype(outputs.dtype, jnp.floating):
        raise ValueError(f"the outputs must be floating point, got {outputs.dtype}.")


def _check_statistics(run, shapes, images, train):
    """A module inside of another may not get `train`."""
    if not jax.tree.leaves(shapes[1]):
        return
    jaxpr = jax.make_jaxpr(lambda *args: run(*args, train)[1])(*shapes, images).jaxpr
    _, is_used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    if is_used[-1] != train:  # the images
        raise ValueError(
            f"with train={train} the running statistics of batch normalization "
            f"{'stay as they are' if train else 'change'}: pass train on to the layers."
        )


def load_loss(chosen: str, num_classes: int) -> Callable[..., jax.Array]:
    """The function of "PATH.py:loss", loss(logits (B, K), labels (B,)) -> scalar.

    Raises:
      ValueError: if there is no such function, it fails, or it gives no scalar.
    """
    [loss] = load_functions(chosen, "loss").values()
    with _blamed_on(f"loss {chosen}"):
        check_scalar(
            jax.eval_shape(
                loss,
                jax.ShapeDtypeStruct((2, num_classes), jnp.float32),
                jax.ShapeDtypeStruct((2,), jnp.int32),
            )
        )
    return loss


_VALUE_NEEDED = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


@contextlib.contextmanager
def _blamed_on(field):
    """`settings.blamed_on`, with the line of the user that cannot be traced."""
    libraries = Path(jax.__file__).parents[1]
    with settings.blamed_on(field):
        try:
            yield
        except _VALUE_NEEDED as error:
            frames = traceback.extract_tb(error.__traceback__)
            *_, frame = (f for f in frames if libraries not in Path(f.filename).parents)
            raise ValueError(
                f"line {frame.lineno} of {frame.filename} needs the value of an array, "
                f"which is not known under jax.jit ({frame.line}). Write jnp.where or "
                "jax.lax.cond for if, and jax.numpy for NumPy and float."
            ) from error


@contextlib.contextmanager
def _explain_random_numbers():
    """Flax and Haiku ask for a key, which no field of the configuration passes."""
    try:
        yield
    except (errors.InvalidRngError, ValueError) as error:
        if "PRNG" not in str(error):
            raise
        raise ValueError(
            f"{error} The network is called without random keys, so that all points of "
            "the landscape have the same loss: leave out dropout."
        ) from error


def _adapt(made):
    """create: (key, images) -> (params, stats); run: (params, stats, images, train)."""
    if isinstance(made, nn.Module):
        return _linen(made)
    if isinstance(made, nnx.Module):
        return _nnx(made)
    parts = [getattr(made, name, None) for name in ("init", "apply")]
    if all(map(callable, parts)):  # Haiku's Transformed or TransformedWithState
        return _haiku(*parts)
    if isinstance(made, Sequence) and len(made) == 2 and all(map(callable, made)):
        return _functions(*made)
    raise ValueError(
        "the function must return a module of Flax, a transformed function of Haiku or "
        f"a pair (init, apply), got {type(made).__name__}."
    )


def _widened(create):
    """Optimizers of optax do not train in 16 bits: there Adam's b2 rounds to 1."""

    def create_widened(key, images):
        params, stats = create(key, images)
        return jax.tree.map(widen, params), stats

    return create_widened


def _linen(module):
    _refuse_modes(module, allowed={"train"})

    def options(train, images):
        return {"train": train} if _takes_train(module, images) else {}

    def create(key, images):
        variables = dict(module.init(key, images, **options(False, images)))
        params, stats = (variables.pop(k, {}) for k in ("params", "batch_stats"))
        _refuse_state(variables)
        return params, stats

    def run(params, stats, images, train):
        logits, updated = module.apply(
            {"params": params, "batch_stats": stats},
            images,
            mutable=["batch_stats"],
            **options(train, images),
        )
        return logits, updated.get("batch_stats", {})

    return create, run


def _takes_train(module, images):
    """Whether the module has the argument; **kwargs may pass it to another module."""
    arguments = inspect.signature(type(module).__call__).parameters
    if "train" in arguments:
        return True
    if all(a.kind != inspect.Parameter.VAR_KEYWORD for a in arguments.values()):
        return False
    init = functools.partial(module.init, train=False)
    try:
        jax.eval_shape(init, jax.random.key(0), images)
    except TypeError:  # An unexpected keyword.
        return False
    return True


def _nnx(module):
    _refuse_modes(module, allowed=set())
    graph, params, stats, other = nnx.split(module, nnx.Param, nnx.BatchStat, ...)
    _refuse_state(_names(other))

    def run(params, stats, images, train):
        merged = nnx.merge(graph, params, stats)
        (merged.train if train else merged.eval)()
        logits = merged(images)
        return logits, nnx.state(merged, nnx.BatchStat)

    return lambda key, images: (params, stats), run


_AVERAGES = re.compile(r"(mean|var)_ema/(counter|hidden|average)$")


def _haiku(init, apply):
    arguments = inspect.signature(apply).parameters
    has_state = "state" in arguments
    rng = (None,) if "rng" in arguments else ()  # hk.without_apply_rng takes none

    def create(key, images):
        if not has_state:
            return init(key, images), {}
        params, state = init(key, images, True)
        _refuse_state([name for name in _names(state) if not _AVERAGES.search(name)])
        return params, state

    def run(params, state, images, train):
        if not has_state:
            return apply(params, *rng, images), state
        return apply(params, state, *rng, images, train)

    return create, run


def _functions(init, apply):
    return (
        lambda key, images: (init(key, images), {}),
        lambda params, stats, images, train: (apply(params, images), stats),
    )


def _names(tree):
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


_MODE = re.compile(
    r"(is_)?(train(ing)?|test(ing)?|eval(uation)?)|deterministic|use_running_average"
)


def _refuse_modes(module, allowed):
    """An argument that is not passed would keep its default in training and tests."""
    for name in inspect.signature(type(module).__call__).parameters:
        if _MODE.fullmatch(name) and name not in allowed:
            raise ValueError(
                f"the argument {name!r} of __call__ would not be passed. A module of "
                "Linen is called with train=True or False; one of NNX is switched by "
                "its methods train() and eval()."
            )


def _refuse_state(names):
    if names:
        raise ValueError(
            "the network has state other than that of batch normalization: "
            f"{', '.join(names)}. Leave out dropout and caches."
        )


def _renaming(tree):
    """Functions from trees like `tree` to nested dicts of strings, and back."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    paths = [tuple((path_name(path) or "value").split("/")) for path, _ in leaves]
    for path in paths:
        below = [other for other in paths if other[: len(path)] == path]
        if len(below) > 1:
            raise ValueError(
                f"two parameters have the path {'/'.join(path)!r}, or one is inside of "
                "the other; rename one."
            )

    def to_dicts(tree):
        return traverse_util.unflatten_dict(
            dict(zip(paths, jax.tree.leaves(tree), strict=True))
        )

    def from_dicts(dicts):
        flat = traverse_util.flatten_dict(dicts)
        return jax.tree.unflatten(structure, [flat[path] for path in paths])

    return to_dicts, from_dicts
