"""DeepMind's Haiku parameter trees and released files <-> ours.

google-deepmind/functa (Dupont et al. 2022, arXiv 2201.12204) keeps one signal as one
Haiku tree, {module: {name: array}}: the weights, the signal's latent vector and, with
Meta-SGD, the learned inner rates. It releases checkpoints and sets of fitted latents as
dill pickles that end in .npz. `load_checkpoint` and `load_modulations` read them
without Haiku, dill or ml_collections, and without running anything that a file asks
for; `from_haiku` and `to_haiku` convert the trees.

Both sides store weights input by output, so that nothing is transposed. The one change
of layout is in the direct variant, `ModulatedSiren`: the original flattens its scales
and shifts by sorted module name, which puts layer 10 before layer 2; ours are in
numeric order.

Axes: N signals, d coordinates of a point, C channels, W width, L latent size,
M modulations of all layers.
"""

import io
import numbers
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from functa.siren import LatentModulatedSiren, ModulatedSiren, num_modulations

HaikuTree = Mapping[str, Mapping[str, Any]]


class Imported(NamedTuple):
    """A Haiku tree in our terms: `model.apply({"params": params}, coords, latent)`.

    Attributes:
      model: LatentModulatedSiren, or ModulatedSiren for the direct variant.
      params: the weights, nested dicts.
      latent: the stored latent vector (L,), where the inner loop starts; for the direct
        variant the stored modulation (M,), in the layout of `ModulatedSiren`.
      learning_rate: the learned inner rates, laid out like `latent`; None without
        Meta-SGD. Not clipped: the original defines a clip and never applies it.
    """

    model: LatentModulatedSiren | ModulatedSiren
    params: dict
    latent: jax.Array
    learning_rate: jax.Array | None


class HaikuCheckpoint(NamedTuple):
    """A released checkpoint: the network, and how its latents are fitted.

    Attributes:
      imported: the converted tree.
      resolution: rows, and columns, of the images.
      num_steps: inner steps.
      learning_rate: of the inner loop: the learned rates, laid out like the latent, or
        one number without Meta-SGD.
      l2_weight: weight of the inner loss's penalty on the latent.
      noise_std: deviation of the noise added to a fitted latent.
    """

    imported: Imported
    resolution: int
    num_steps: int
    learning_rate: jax.Array | float
    l2_weight: float
    noise_std: float


def from_haiku(
    tree: HaikuTree,
    *,
    omega_0: float,
    modulate_scale: bool = False,
    modulate_shift: bool = True,
) -> Imported:
    """Converts a Haiku tree of google-deepmind/functa; the inverse of `to_haiku`.

    Modules are found by the end of their names, whatever the root module is called, and
    every size is read from the shapes. What shapes cannot tell is an argument.

    Args:
      tree: {module: {name: array}}, arrays of floats.
      omega_0: frequency factor inside every sine, `w0` of the original.
      modulate_scale: whether the latent is mapped to scales. The direct variant ignores
        both flags: its tree names its scales and shifts.
      modulate_shift: whether the latent is mapped to shifts.

    Returns:
      The model, its weights, the stored latent and the inner rates.

    Raises:
      ValueError: if modules are missing, unknown or double, if shapes do not fit each
        other, or if the flags do not fit the number of modulations.
    """
    modules = {name: dict(module) for name, module in tree.items()}
    layers = _take(modules, r"modulated_siren_layer(?:_(\d+))?/linear")
    films = _take(modules, r"modulated_siren_layer(?:_(\d+))?/fi_lm")
    maps = _take(modules, r"mlp/~/linear_(\d+)")
    latents = _take(modules, r"latent_vector(?:_(\d+))?")
    rates = _take(modules, r"meta_sgd_lrs(?:_(\d+))?")
    if modules:
        raise ValueError(f"unknown modules in the tree: {sorted(modules)}.")
    if len(layers) < 2:
        raise ValueError(
            "the tree needs modulated_siren_layer/linear and at least _1/linear, "
            f"has {[name for name, _ in layers]}."
        )
    if len(latents) > 1 or len(rates) > 1:
        names = [name for name, _ in latents + rates]
        raise ValueError(f"a tree holds one latent and its rates, this one: {names}.")
    if bool(latents) == bool(films) or bool(latents) != bool(maps):
        raise ValueError(
            "a tree has either one latent_vector and its mlp/~/linear_0, ..., or one "
            f"fi_lm per sine layer; this one has {len(latents)} latent_vector, "
            f"{len(maps)} mlp/~/linear and {len(films)} fi_lm."
        )

    depth = len(layers)
    num_coords, width = _shape(*layers[0], "w", rank=2)
    out_channels = _shape(*layers[-1], "w", rank=2)[1]
    params = _from_linears(
        layers, [num_coords, *[width] * (depth - 1), out_channels], "layer"
    )
    sizes = {
        "width": width,
        "depth": depth,
        "out_channels": out_channels,
        "omega_0": omega_0,
    }
    if latents:
        widths = [
            *_shape(*latents[0], "latent_vector", rank=1),
            *(_shape(*linear, "w", rank=2)[1] for linear in maps),
        ]
        model = LatentModulatedSiren(
            latent_dim=widths[0],
            layer_sizes=tuple(widths[1:-1]),
            modulate_scale=modulate_scale,
            modulate_shift=modulate_shift,
            **sizes,
        )
        if widths[-1] != num_modulations(model):
            raise ValueError(
                f"{maps[-1][0]} gives {widths[-1]} modulations; depth {depth} and "
                f"width {width} with modulate_scale={modulate_scale}, "
                f"modulate_shift={modulate_shift} need {num_modulations(model)}."
            )
        params["latent_to_modulation"] = _from_linears(maps, widths, "linear")
        latent = _arrays(*latents[0], latent_vector=(widths[0],))["latent_vector"]
    else:
        parts = films[0][1].keys() & {"scale", "shift"}
        model = ModulatedSiren(
            modulate_scale="scale" in parts, modulate_shift="shift" in parts, **sizes
        )
        num_modulations(model)  # Refuses a tree with neither.
        if len(films) != depth - 1:
            raise ValueError(
                f"{depth - 1} sine layers need as many fi_lm, found {len(films)}."
            )
        films = [_arrays(*film, **dict.fromkeys(parts, (width,))) for film in films]
        latent = jnp.concatenate(
            [film[part] for film in films for part in sorted(parts)]  # Scale, shift.
        )
    learning_rate = None
    if rates:
        learning_rate = _arrays(*rates[0], meta_sgd_lrs=latent.shape)["meta_sgd_lrs"]
        if films:
            by_name = learning_rate.reshape(depth - 1, -1)  # (depth - 1, parts * W)
            learning_rate = by_name[np.argsort(_name_order(depth - 1))].reshape(-1)
    return Imported(model, params, latent, learning_rate)


def to_haiku(imported: Imported) -> dict[str, dict[str, jax.Array]]:
    """Converts to the Haiku tree of google-deepmind/functa, under its own names.

    Args:
      imported: from `from_haiku`, or made of one's own model, weights and latent.

    Returns:
      {module: {name: array}}, equal to the tree that `from_haiku` was given if that had
      the original's root module.

    Raises:
      ValueError: if latent or rates do not have the shape that the model needs. Rates
        per step have no place in a Haiku tree.
    """
    model, params, latent, learning_rate = imported
    for name, value in (("latent", latent), ("learning_rate", learning_rate)):
        if value is not None and np.shape(value) != model.latent_shape:
            raise ValueError(
                f"{name} has shape {np.shape(value)}, needs {model.latent_shape}."
            )
    direct = isinstance(model, ModulatedSiren)
    root = "modulated_siren" if direct else "latent_modulated_siren"
    tree = {
        f"{root}/{_layer_name(i)}/linear": _to_linear(params[f"layer_{i}"])
        for i in range(model.depth)
    }
    if direct:
        parts = ["scale"] * model.modulate_scale + ["shift"] * model.modulate_shift
        films = latent.reshape(model.depth - 1, len(parts), model.width)
        for i, film in enumerate(films):
            name = f"{root}/{_layer_name(i)}/fi_lm"
            tree[name] = dict(zip(parts, film, strict=True))
    else:
        tree[f"{root}/~/latent_vector"] = {"latent_vector": latent}
        for name, dense in params["latent_to_modulation"].items():
            linear = f"{root}/~/latent_to_modulation/~/mlp/~/{name}"
            tree[linear] = _to_linear(dense)
    if learning_rate is not None:
        if direct:
            by_layer = learning_rate.reshape(model.depth - 1, -1)
            learning_rate = by_layer[np.array(_name_order(model.depth - 1))].reshape(-1)
        tree[f"{root}/~/meta_sgd_lrs"] = {"meta_sgd_lrs": learning_rate}
    return tree


def load_checkpoint(path: str | Path) -> HaikuCheckpoint:
    """Reads a released checkpoint, such as celeba_params_128_latents.npz.

    Args:
      path: a dill pickle of dict(params=..., config=...), whatever its name ends in.

    Returns:
      The network and the settings of its inner loop.

    Raises:
      ValueError: if the file cannot be read (see `load_haiku_file`), or holds something
        else, or a config that does not fit.
    """
    contents = load_haiku_file(path)
    try:
        return _checkpoint(contents)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_modulations(path: str | Path) -> dict[str, dict[str, np.ndarray]]:
    """Reads a released set of fitted latents, celeba_modulations_128_latents.npz.

    Args:
      path: a dill pickle, whatever its name ends in.

    Returns:
      {"train": {"modulation": (N, L), "psnr": (N,)}, "test": {...}}, PSNR per image in
      dB, as stored: without labels, in the order of the original's data set.

    Raises:
      ValueError: if the file cannot be read (see `load_haiku_file`) or holds something
        else.
    """
    contents = load_haiku_file(path)
    splits = {}
    for split in ("train", "test"):
        arrays = {
            name: _entry(contents, split, name) for name in ("modulation", "psnr")
        }
        shapes = [getattr(array, "shape", ()) for array in arrays.values()]
        if len(shapes[0]) != 2 or shapes[1] != shapes[0][:1]:
            raise ValueError(
                f"{path}: a set of modulations holds {split!r} with 'modulation' "
                f"(N, L) and 'psnr' (N,), got shapes {shapes} in {_summary(contents)}."
            )
        splits[split] = arrays
    return splits


def load_haiku_file(path: str | Path) -> Any:
    """Reads a pickle of arrays, configs and plain containers; runs nothing from it.

    A pickle may name any function and have it called. Here a name is looked up in a
    fixed table and stands for an inert record of its arguments; a name outside the
    table ends the reading. Afterwards the records of arrays, configs and mappings of
    NumPy, JAX, Haiku, ml_collections and dill, as of 2022 and of today, become arrays
    and dicts.

    Args:
      path: a pickle, whatever its name ends in.

    Returns:
      Nested dict, list, tuple and set of NumPy arrays of numbers, Python and NumPy
      numbers, strings, bytes and None.

    Raises:
      ValueError: if the file is truncated or no pickle, or asks for anything else.
    """
    data = Path(path).read_bytes()
    if data.startswith(b"PK\x03\x04"):
        raise ValueError(
            f"{path} is a true .npz archive, which numpy.load reads; the files of "
            "google-deepmind/functa are pickles of that name."
        )
    try:
        return _plain(_Unpickler(io.BytesIO(data)).load(), {})
    except _RefusedError as error:
        raise ValueError(f"{path} is refused: {error}.") from None
    # Damaged bytes may raise anything inside pickle, as its manual warns.
    except Exception as error:
        raise ValueError(
            f"{path} is truncated, or not a pickle of google-deepmind/functa "
            f"({type(error).__name__}: {error})."
        ) from error


# Trees.


def _take(modules, pattern):
    """Moves the modules whose names end in `pattern`, numbered 0, 1, ..., to a list.

    Args:
      modules: {name: module}; loses what is found.
      pattern: with one group, the number; empty is 0.

    Returns:
      [(name, module)] by number.
    """
    found = {}
    for name in sorted(modules):
        if match := re.fullmatch(f"(?:.*/)?{pattern}", name):
            number = int(match[1] or 0)
            if number in found:
                raise ValueError(
                    f"{name} and {found[number][0]} are the same part of a network."
                )
            found[number] = name, modules.pop(name)
    if missing := set(range(len(found))) - found.keys():
        names = sorted(name for name, _ in found.values())
        raise ValueError(f"number {min(missing)} is missing among {names}.")
    return [found[number] for number in range(len(found))]


def _shape(name, module, key, *, rank):
    shape = np.shape(module[key]) if key in module else None
    if shape is None or len(shape) != rank or 0 in shape:
        raise ValueError(f"{name} needs {key} of rank {rank}, has shape {shape}.")
    return shape


def _arrays(name, module, **shapes):
    """The module's arrays, if these are its names and shapes."""
    actual = {key: np.shape(value) for key, value in module.items()}
    if actual != shapes:
        raise ValueError(f"{name} has shapes {actual}, needs {shapes}.")
    return {key: jnp.asarray(value) for key, value in module.items()}


def _from_linears(linears, sizes, prefix):
    """Haiku linears in a row, of these in- and output sizes -> params of `nn.Dense`."""
    params = {}
    for i, linear in enumerate(linears):
        arrays = _arrays(*linear, w=(sizes[i], sizes[i + 1]), b=(sizes[i + 1],))
        params[f"{prefix}_{i}"] = {"kernel": arrays["w"], "bias": arrays["b"]}
    return params


def _to_linear(dense):
    return {"w": dense["kernel"], "b": dense["bias"]}


def _layer_name(i):
    return f"modulated_siren_layer_{i}" if i else "modulated_siren_layer"


def _name_order(num_layers):
    """Numbers of the sine layers in the order of their modules' names: 0, 1, 10, 2."""
    return sorted(range(num_layers), key=lambda i: f"{_layer_name(i)}/fi_lm")


# Files.


def _checkpoint(contents):
    if not isinstance(contents, dict) or not {"params", "config"} <= contents.keys():
        raise ValueError(
            f"a checkpoint is a dict of params and config, got {_summary(contents)}."
        )
    tree, config = contents["params"], contents["config"]
    if not isinstance(tree, dict) or not all(
        isinstance(m, dict) for m in tree.values()
    ):
        raise ValueError(f"params need to be a tree of Haiku, got {_summary(tree)}.")
    imported = from_haiku(
        tree,
        omega_0=float(_setting(config, "model", "w0", numbers.Real)),
        modulate_scale=_setting(config, "model", "modulate_scale", bool),
        modulate_shift=_setting(config, "model", "modulate_shift", bool),
    )
    learning_rate = imported.learning_rate
    if learning_rate is None:
        learning_rate = float(_setting(config, "opt_inner", "lr", numbers.Real))
    # The original's readers allow for configs whose model section was already stripped
    # of what is no argument of the network.
    l2_weight = _setting(config, "model", "l2_weight", numbers.Real, default=0.0)
    noise_std = _setting(config, "model", "noise_std", numbers.Real, default=0.0)
    return HaikuCheckpoint(
        imported,
        resolution=int(_setting(config, "dataset", "resolution", numbers.Integral)),
        num_steps=int(_setting(config, "training", "inner_steps", numbers.Integral)),
        learning_rate=learning_rate,
        l2_weight=float(l2_weight),
        noise_std=float(noise_std),
    )


def _setting(config, section, name, kind, default=None):
    value = _entry(config, section, name)
    value = default if value is None else value
    if not isinstance(value, kind):
        raise ValueError(
            f"config needs {section}.{name}, of type {kind.__name__}, got {value!r}."
        )
    return value


def _entry(value, *keys):
    """value[key][key]...; None where there is no such entry."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _summary(value):
    """A short account of a file's contents, for errors."""
    keys = f" with {sorted(map(str, value))[:8]}" if isinstance(value, dict) else ""
    return type(value).__name__ + keys


# Unpickling. A pickle may name any function and have it called, so a downloaded file
# is a program. This reader knows a fixed table of names only, and each of them stands
# for an inert record.


class _RefusedError(Exception):
    """The file asks for something that arrays and configs do not need."""


class _Unpickler(pickle.Unpickler):
    """Knows the names of `_ADMITTED` only, none of which does anything."""

    def find_class(self, module, name):
        if (module, name) not in _ADMITTED:
            raise _RefusedError(
                f"it asks for {module}.{name}, which arrays, configs and plain "
                "containers do not need"
            )
        return _ADMITTED[module, name]


class _StandIn:
    """Keeps what a pickle gives to build an object: arguments, then perhaps a state.

    Pickle can call, instantiate or set the state of what it finds by name. It finds the
    subclasses below, for which all three do no more than keep the values; the class
    itself has no state to set, as `__setstate__` then lacks an argument.
    """

    __slots__ = ("args", "state")

    def __new__(cls, *args):
        self = super().__new__(cls)
        self.args, self.state = args, None
        return self

    def __setstate__(self, state):
        self.state = state

    def build(self, plain):
        """The plain value; `plain` converts parts of it."""
        raise _RefusedError("it holds a type or dtype where a value belongs")


class _Type(_StandIn):
    """The type of a config field, or what dill makes of it; never needed."""

    __slots__ = ()


class _NumpyArrayType(_StandIn):
    """numpy.ndarray, as the argument of others."""

    __slots__ = ()


class _NumpyDtype(_StandIn):
    """A dtype: args (code, align, copy), state (version, byte order, ...)."""

    __slots__ = ()


class _NumpyArray(_StandIn):
    """An array: args (class, shape, code), all ignored but the class, and the state."""

    __slots__ = ()

    def build(self, plain):
        del plain
        if not self.args or self.args[0] is not _NumpyArrayType:
            raise _RefusedError("it makes an array of a class other than numpy.ndarray")
        *_, shape, dtype, fortran, data = self.state
        return _numbers(data, dtype).reshape(shape, order="F" if fortran else "C")


class _NumpyBuffer(_StandIn):
    """An array of protocol 5: args (data, dtype, shape, order[, axis order])."""

    __slots__ = ()

    def build(self, plain):
        del plain
        data, dtype, shape, order, *axes = self.args
        array = _numbers(data, dtype)
        if order == "K":
            return array.reshape(shape).transpose(*axes)
        return array.reshape(shape, order=order)


class _NumpyScalar(_StandIn):
    """A NumPy number: args (dtype, data)."""

    __slots__ = ()

    def build(self, plain):
        del plain
        dtype, data = self.args
        return _numbers(data, dtype).reshape(())[()]


class _WrappedArray(_StandIn):
    """An array of JAX or through dill: args (function, its args, state, ignored)."""

    __slots__ = ()

    def build(self, plain):
        function, args, state, *_ = self.args
        if function is not _NumpyArray:
            raise _RefusedError("it makes an array of something else than an array")
        array = _NumpyArray(*args)
        array.state = state
        return array.build(plain)


class _Latin1(_StandIn):
    """Bytes of protocols 0 to 2: args (text, encoding)."""

    __slots__ = ()


class _ConfigDict(_StandIn):
    """An ml_collections.ConfigDict, known by its state."""

    __slots__ = ()

    def build(self, plain):
        return plain(self.state["_fields"])


class _FieldReference(_StandIn):
    """An ml_collections.FieldReference, known by its state."""

    __slots__ = ()

    def build(self, plain):
        if self.state["_ops"]:
            raise _RefusedError("it holds a config field that is still to be computed")
        return plain(self.state["_value"])


# Calling `dict`, the one real object here, on what a pickle can build runs nothing.
_ADMITTED = {
    ("numpy", "ndarray"): _NumpyArrayType,
    ("numpy", "dtype"): _NumpyDtype,
    ("_codecs", "encode"): _Latin1,
    ("jax._src.array", "_reconstruct_array"): _WrappedArray,
    ("jax._src.device_array", "reconstruct_device_array"): _WrappedArray,
    ("collections", "OrderedDict"): dict,
    ("ml_collections.config_dict.config_dict", "ConfigDict"): _ConfigDict,
    ("ml_collections.config_dict.config_dict", "FieldReference"): _FieldReference,
}
for _core in ("numpy.core", "numpy._core"):  # Before and since NumPy 2.
    _ADMITTED[f"{_core}.multiarray", "_reconstruct"] = _NumpyArray
    _ADMITTED[f"{_core}.multiarray", "scalar"] = _NumpyScalar
    _ADMITTED[f"{_core}.numeric", "_frombuffer"] = _NumpyBuffer
for _dill in ("dill.dill", "dill._dill"):
    _ADMITTED[_dill, "_create_array"] = _WrappedArray
    _ADMITTED[_dill, "_load_type"] = _Type
for _name in ("FlatMap", "FlatMapping", "frozendict"):
    _ADMITTED["haiku._src.data_structures", _name] = dict
for _name in ("bool", "int", "float", "str", "bytes", "tuple", "list", "dict"):
    _ADMITTED["builtins", _name] = _Type


def _numbers(data, dtype):
    """Bytes and the stand-in of their dtype -> a flat array of its own, native."""
    if isinstance(data, _Latin1) and data.args[1:] == ("latin1",):
        data = data.args[0].encode("latin1")
    if not isinstance(data, bytes | bytearray) or not isinstance(dtype, _NumpyDtype):
        raise _RefusedError("it holds an array of something else than plain numbers")
    code, order = dtype.args[0], dtype.state[1] if dtype.state else "="
    if not re.fullmatch(r"[biuf][1248]", code) or order not in ("<", ">", "|", "="):
        raise _RefusedError(f"it holds an array of type {order}{code}, not of numbers")
    stored = np.dtype(code).newbyteorder(order)
    return np.frombuffer(data, stored).astype(stored.newbyteorder("="))


def _plain(value, done):
    """Replaces all stand-ins within `value`; a part that occurs twice is built once.

    Args:
      value: what the unpickler made.
      done: {id of a part: its plain form}, filled on the way.

    Returns:
      The same without stand-ins.
    """
    if type(value) in (type(None), bool, int, float, str, bytes):
        return value
    if id(value) not in done:
        if type(value) is dict:
            plain = {_plain(k, done): _plain(v, done) for k, v in value.items()}
        elif type(value) in (list, tuple, set, frozenset):
            plain = type(value)(_plain(item, done) for item in value)
        elif isinstance(value, _StandIn):
            plain = value.build(lambda part: _plain(part, done))
        else:
            name = "type" if isinstance(value, type) else type(value).__name__
            raise _RefusedError(f"it holds a {name} where a value belongs")
        done[id(value)] = plain
    return done[id(value)]
