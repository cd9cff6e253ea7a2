"""Conversion of the Haiku parameters and released files of google-deepmind/functa.

google-deepmind/functa (Dupont et al. 2022, arXiv 2201.12204) stores one signal as one
Haiku tree, {module: {name: array}}. The tree holds the weights, the signal's latent
vector and, with Meta-SGD, the learned inner rates. The authors release checkpoints and
sets of fitted latents as dill pickles whose names end in .npz. `load_checkpoint` and
`load_modulations` read these files. They need neither Haiku, dill nor ml_collections,
and they execute no code from a file. `from_haiku` and `to_haiku` convert the trees.

Both programs store a kernel as (inputs, outputs), so no kernel is transposed. Only the
layout of the direct variant, `ModulatedSiren`, differs. The original orders its scales
and shifts by the name of their module, which puts layer 10 before layer 2. Here they
are in numeric order.

Axes: N signals, d coordinates of a point, C channels, W width, L latent size,
M modulations of all layers.
"""

import io
import math
import numbers
import pickle
import pickletools
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
    """A converted Haiku tree: `model.apply({"params": params}, coords, latent)`.

    Attributes:
      model: LatentModulatedSiren, or ModulatedSiren for the direct variant.
      params: the weights, as nested dicts.
      latent: the stored latent vector (L,), the start point of the inner loop. For the
        direct variant, the stored modulation (M,) in the layout of `ModulatedSiren`.
      learning_rate: the learned inner rates, in the layout of `latent`; None without
        Meta-SGD. They are not clipped: the original defines a clip but never applies
        it.
    """

    model: LatentModulatedSiren | ModulatedSiren
    params: dict
    latent: jax.Array
    learning_rate: jax.Array | None


class HaikuCheckpoint(NamedTuple):
    """A released checkpoint: the network and the settings of its inner loop.

    Attributes:
      imported: the converted tree.
      resolution: number of rows and of columns of the images.
      num_steps: number of inner steps.
      learning_rate: rates of the inner loop: the learned rates, in the layout of the
        latent, or one number without Meta-SGD.
      l2_weight: weight of the penalty on the latent in the inner loss.
      noise_std: standard deviation of the noise added to a fitted latent.
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

    The function finds modules by the end of their names; the root module may have any
    name. It reads all sizes from the shapes of the arrays. The arguments state what the
    shapes do not determine.

    Args:
      tree: {module: {name: array}}, arrays of floats.
      omega_0: frequency factor inside every sine, `w0` in the original.
      modulate_scale: whether the latent is mapped to scales. The direct variant ignores
        this flag and the next, because its tree names its scales and shifts.
      modulate_shift: whether the latent is mapped to shifts.

    Returns:
      The model, its weights, the stored latent and the inner rates.

    Raises:
      ValueError: if modules are missing, unknown or duplicated, if shapes are
        inconsistent, or if the flags contradict the number of modulations.
    """
    modules = {name: dict(module) for name, module in tree.items()}
    layers = _take(modules, r"modulated_siren_layer(?:_(\d+))?/linear")
    films = _take(modules, r"modulated_siren_layer(?:_(\d+))?/fi_lm")
    maps = _take(modules, r"mlp/~/linear_(\d+)")
    latents = _take(modules, r"latent_vector(?:_(\d+))?")
    rates = _take(modules, r"meta_sgd_lrs(?:_(\d+))?")
    if modules:
        raise ValueError(f"the tree holds unknown modules: {sorted(modules)}.")
    if len(layers) < 2:
        raise ValueError(
            "the tree must hold modulated_siren_layer/linear and at least "
            "modulated_siren_layer_1/linear; "
            f"it holds {[name for name, _ in layers]}."
        )
    if len(latents) > 1 or len(rates) > 1:
        names = [name for name, _ in latents + rates]
        raise ValueError(
            f"the tree must hold at most one latent and its rates; got {names}."
        )
    if bool(latents) == bool(films) or bool(latents) != bool(maps):
        raise ValueError(
            "the tree must hold either one latent_vector and its mlp/~/linear_0, ..., "
            f"or one fi_lm per sine layer; it holds {len(latents)} latent_vector, "
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
                f"modulate_shift={modulate_shift} require {num_modulations(model)}."
            )
        params["latent_to_modulation"] = _from_linears(maps, widths, "linear")
        latent = _arrays(*latents[0], latent_vector=(widths[0],))["latent_vector"]
    else:
        parts = films[0][1].keys() & {"scale", "shift"}
        model = ModulatedSiren(
            modulate_scale="scale" in parts, modulate_shift="shift" in parts, **sizes
        )
        num_modulations(model)  # Raises if the tree has neither.
        if len(films) != depth - 1:
            raise ValueError(
                f"{depth - 1} sine layers require as many fi_lm; got {len(films)}."
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
    """Converts a model to a Haiku tree of google-deepmind/functa.

    Args:
      imported: the result of `from_haiku`, or an `Imported` made from a model, its
        weights and a latent.

    Returns:
      {module: {name: array}}, with the names of the original. It equals the tree that
      `from_haiku` received, if that tree had the original's root module.

    Raises:
      ValueError: if the latent or the rates do not have the shape of the model's
        latent. A Haiku tree cannot store different rates for each step.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from functa import LatentModulatedSiren
      >>> from functa.deepmind import Imported, from_haiku, to_haiku
      >>> model = LatentModulatedSiren(width=4, depth=3, latent_dim=2)
      >>> latent = model.initial_latent()
      >>> params = model.init(jax.random.key(0), jnp.zeros(2), latent)["params"]
      >>> tree = to_haiku(Imported(model, params, latent, learning_rate=None))
      >>> tree["latent_modulated_siren/modulated_siren_layer_1/linear"]["w"].shape
      (4, 4)
      >>> from_haiku(tree, omega_0=30.0).model == model
      True
    """
    model, params, latent, learning_rate = imported
    for name, value in (("latent", latent), ("learning_rate", learning_rate)):
        if value is not None and np.shape(value) != model.latent_shape:
            raise ValueError(
                f"{name} must have shape {model.latent_shape}; got {np.shape(value)}."
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
    """Reads a released checkpoint, for example celeba_params_128_latents.npz.

    Args:
      path: a dill pickle of dict(params=..., config=...), with any suffix.

    Returns:
      The network and the settings of its inner loop.

    Raises:
      ValueError: if the file cannot be read (see `load_haiku_file`), if it is not a
        checkpoint, or if its config contradicts its parameters.
    """
    contents = load_haiku_file(path)
    try:
        return _checkpoint(contents)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_modulations(path: str | Path) -> dict[str, dict[str, np.ndarray]]:
    """Reads a set of fitted latents, for example celeba_modulations_128_latents.npz.

    Args:
      path: a dill pickle, with any suffix.

    Returns:
      {"train": {"modulation": (N, L), "psnr": (N,)}, "test": {...}}, with the PSNR of
      each image in dB. The file has no labels; its order is that of the original's data
      set.

    Raises:
      ValueError: if the file cannot be read (see `load_haiku_file`) or is not a set of
        latents.
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
                f"{path}: a set of modulations must hold {split!r} with 'modulation' "
                f"(N, L) and 'psnr' (N,); got shapes {shapes} in {_summary(contents)}."
            )
        _check_numbers(f"{path}: modulation of {split!r}", arrays["modulation"])
        splits[split] = arrays
    return splits


def load_haiku_file(path: str | Path) -> Any:
    """Reads a pickle of arrays, configs and plain containers without executing it.

    A pickle can name any function and have it called. This reader accepts only the
    names in a fixed table and refuses a file that uses another name. A name in the
    table stands for a record that stores its arguments and does nothing. After reading,
    the records become arrays and dicts. The table covers arrays, configs and mappings
    of NumPy, JAX, Haiku, ml_collections and dill, in their versions of 2022 and of
    today.

    Args:
      path: a pickle, with any suffix.

    Returns:
      Nested dicts, lists, tuples and sets of numeric NumPy arrays, Python and NumPy
      numbers, strings, bytes and None.

    Raises:
      ValueError: if the file is truncated, is not a pickle, uses another name, or
        would need more memory than its own size explains.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"{path} is not a regular file.")
    data = Path(path).read_bytes()
    if data.startswith(b"PK\x03\x04"):
        raise ValueError(
            f"{path} is a real .npz archive, which numpy.load reads; the files of "
            "google-deepmind/functa are pickles with that suffix."
        )
    try:
        _check_sizes(data)
        return _plain(_Unpickler(io.BytesIO(data)).load(), {_BUDGET: len(data)})
    except _RefusedError as error:
        raise ValueError(f"{path} is refused: {error}.") from None
    # On damaged data pickle may raise any exception, as its documentation warns.
    except Exception as error:
        raise ValueError(
            f"{path} is truncated or is not a pickle of google-deepmind/functa "
            f"({type(error).__name__}: {error})."
        ) from error


# Trees.


def _take(modules, pattern):
    """Moves the modules whose names end in `pattern`, numbered 0, 1, ..., to a list.

    Args:
      modules: {name: module}. The function removes the modules that it returns.
      pattern: a regular expression. Its one group is the number, 0 if empty.

    Returns:
      [(name, module)], ordered by number.
    """
    found = {}
    for name in sorted(modules):
        if match := re.fullmatch(f"(?:.*/)?{pattern}", name):
            number = int(match[1] or 0)
            if number in found:
                raise ValueError(
                    f"{name} and {found[number][0]} name the same part of the network."
                )
            found[number] = name, modules.pop(name)
    if missing := set(range(len(found))) - found.keys():
        names = sorted(name for name, _ in found.values())
        raise ValueError(f"module number {min(missing)} is missing; got {names}.")
    return [found[number] for number in range(len(found))]


def _shape(name, module, key, *, rank):
    shape = np.shape(module[key]) if key in module else None
    if shape is None or len(shape) != rank or 0 in shape:
        raise ValueError(f"{name} must hold {key} of rank {rank}; got shape {shape}.")
    return shape


def _arrays(name, module, **shapes):
    """Returns the module's arrays after a check of their names and shapes."""
    actual = {key: np.shape(value) for key, value in module.items()}
    if actual != shapes:
        raise ValueError(f"{name} must have shapes {shapes}; got {actual}.")
    return {key: jnp.asarray(value) for key, value in module.items()}


def _from_linears(linears, sizes, prefix):
    """Converts consecutive Haiku linears of the given sizes to params of `nn.Dense`."""
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
    """Sorts the sine layers by module name: 0, 1, 10, 2, ..."""
    return sorted(range(num_layers), key=lambda i: f"{_layer_name(i)}/fi_lm")


# Files.


def _checkpoint(contents):
    if not isinstance(contents, dict) or not {"params", "config"} <= contents.keys():
        raise ValueError(
            f"a checkpoint must hold params and config; got {_summary(contents)}."
        )
    tree, config = contents["params"], contents["config"]
    if not isinstance(tree, dict) or not all(
        isinstance(m, dict) for m in tree.values()
    ):
        raise ValueError(f"params must be a Haiku tree; got {_summary(tree)}.")
    for name, module in tree.items():
        for key, value in module.items():
            _check_numbers(f"{name}/{key}", value)
    imported = from_haiku(
        tree,
        omega_0=_number(config, "model", "w0"),
        modulate_scale=_setting(config, "model", "modulate_scale", bool),
        modulate_shift=_setting(config, "model", "modulate_shift", bool),
    )
    learning_rate = imported.learning_rate
    if learning_rate is None:
        learning_rate = _number(config, "opt_inner", "lr")
    # The original also reads configs whose model section holds only the arguments of
    # the network, without these two.
    return HaikuCheckpoint(
        imported,
        resolution=_count(config, "dataset", "resolution", least=1, most=2**14),
        num_steps=_count(config, "training", "inner_steps", least=0, most=10**4),
        learning_rate=learning_rate,
        l2_weight=_number(config, "model", "l2_weight", default=0.0),
        noise_std=_number(config, "model", "noise_std", default=0.0),
    )


def _number(config, section, name, default=None):
    value = float(_setting(config, section, name, numbers.Real, default))
    if not math.isfinite(value):
        raise ValueError(f"config.{section}.{name} must be finite, got {value}.")
    return value


def _count(config, section, name, *, least, most):
    value = int(_setting(config, section, name, numbers.Integral))
    if not least <= value <= most:
        raise ValueError(
            f"config.{section}.{name} must be from {least} to {most}, got {value}."
        )
    return value


def _check_numbers(name, value):
    """Raises ValueError unless the value is an array of finite floats."""
    dtype = getattr(value, "dtype", np.dtype(object))
    if dtype.kind != "f" or not np.isfinite(value).all():
        found = dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(f"{name} must be an array of finite floats, got {found}.")


def _setting(config, section, name, kind, default=None):
    value = _entry(config, section, name)
    value = default if value is None else value
    if not isinstance(value, kind):
        raise ValueError(
            f"config must hold {section}.{name}, a {kind.__name__}; got {value!r}."
        )
    return value


def _entry(value, *keys):
    """Returns value[key][key]..., or None if there is no such entry."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _summary(value):
    """Describes the contents of a file for an error message."""
    keys = f" with {sorted(map(str, value))[:8]}" if isinstance(value, dict) else ""
    return type(value).__name__ + keys


# Unpickling. A pickle can name any function and have it called, so a downloaded file
# is a program. This reader accepts only the names in a fixed table. Each name stands
# for a record that does nothing.


class _RefusedError(Exception):
    """The file contains something other than arrays, configs and containers."""


class _Unpickler(pickle.Unpickler):
    """Accepts only the names in `_ADMITTED`; none of them executes code."""

    def find_class(self, module, name):
        if (module, name) not in _ADMITTED:
            raise _RefusedError(
                f"it asks for {module}.{name}, which is not in the table of names for "
                "arrays, configs and plain containers"
            )
        return _ADMITTED[module, name]


_BUDGET = "bytes of arrays that may still be built"


def _check_sizes(data):
    """Refuses sizes and positions that exceed the file, which pickle would allocate."""
    for opcode, value, _ in pickletools.genops(data):
        if "PUT" in opcode.name and int(value) > len(data):
            raise _RefusedError(f"it stores a value at position {value}")


class _StandIn:
    """Stores the arguments, and the state if any, from which pickle builds an object.

    Pickle can call a class that it finds by name, instantiate it and set its state. For
    the subclasses below, these operations only store the values. Pickle cannot set the
    state of the class itself, because `__setstate__` then lacks an argument.
    """

    __slots__ = ("args", "state")

    def __new__(cls, *args):
        self = super().__new__(cls)
        self.args, self.state = args, None
        return self

    def __setstate__(self, state):
        self.state = state

    def build(self, plain):
        """Returns the plain value; `plain` converts its parts."""
        raise _RefusedError("it holds a type or dtype in place of a value")


class _Type(_StandIn):
    """The type of a config field, or dill's replacement for it. It is never used."""

    __slots__ = ()


class _NumpyArrayType(_StandIn):
    """The class numpy.ndarray, which other records take as an argument."""

    __slots__ = ()


class _NumpyDtype(_StandIn):
    """A dtype: args (code, align, copy), state (version, byte order, ...)."""

    __slots__ = ()


class _NumpyArray(_StandIn):
    """An array: args (class, shape, code), where only the class is used, and state."""

    __slots__ = ()

    def build(self, plain):
        del plain
        if not self.args or self.args[0] is not _NumpyArrayType:
            raise _RefusedError(
                "it builds an array of a class other than numpy.ndarray"
            )
        *_, shape, dtype, fortran, data = self.state
        return _numbers(data, dtype).reshape(shape, order="F" if fortran else "C")


class _NumpyBuffer(_StandIn):
    """An array in protocol 5: args (data, dtype, shape, order[, axis order])."""

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
    """An array written by JAX or dill: args (function, its args, state, ignored)."""

    __slots__ = ()

    def build(self, plain):
        function, args, state, *_ = self.args
        if function is not _NumpyArray:
            raise _RefusedError("it builds an array from something other than an array")
        array = _NumpyArray(*args)
        array.state = state
        return array.build(plain)


class _Latin1(_StandIn):
    """Bytes in protocols 0 to 2: args (text, encoding)."""

    __slots__ = ()


class _ConfigDict(_StandIn):
    """An ml_collections.ConfigDict, read from its state."""

    __slots__ = ()

    def build(self, plain):
        return plain(self.state["_fields"])


class _FieldReference(_StandIn):
    """An ml_collections.FieldReference, read from its state."""

    __slots__ = ()

    def build(self, plain):
        if self.state["_ops"]:
            raise _RefusedError("it holds a config field that is not yet computed")
        return plain(self.state["_value"])


# `dict` is the only real class here. Calling it on records and plain values executes no
# code from the file.
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
    """Copies bytes of the recorded dtype to a flat array in native byte order."""
    if isinstance(data, _Latin1) and data.args[1:] == ("latin1",):
        data = data.args[0].encode("latin1")
    if not isinstance(data, bytes | bytearray) or not isinstance(dtype, _NumpyDtype):
        raise _RefusedError("it holds an array of something other than plain numbers")
    code, order = dtype.args[0], dtype.state[1] if dtype.state else "="
    if not re.fullmatch(r"[biuf][1248]", code) or order not in ("<", ">", "|", "="):
        raise _RefusedError(f"it holds an array of type {order}{code}, not of numbers")
    stored = np.dtype(code).newbyteorder(order)
    return np.frombuffer(data, stored).astype(stored.newbyteorder("="))


def _plain(value, done):
    """Replaces all records in `value`; a part that occurs twice is built once.

    Args:
      value: the result of the unpickler.
      done: {id of a part: its plain form}, to which the function adds the parts that it
        builds, and the budget of bytes under `_BUDGET`.

    Returns:
      The value without records.
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
            # Many arrays of one buffer would each be a copy of it.
            done[_BUDGET] -= getattr(plain, "nbytes", 0)
            if done[_BUDGET] < 0:
                raise _RefusedError("its arrays are larger than the file")
        else:
            name = "type" if isinstance(value, type) else type(value).__name__
            raise _RefusedError(f"it holds a {name} in place of a value")
        done[id(value)] = plain
    return done[id(value)]
