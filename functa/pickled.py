"""Reads the pickles of google-deepmind/functa without running anything in them.

Its checkpoints and modulation sets are dill pickles that end in .npz. A pickle may name
any function and have it called, so a downloaded one is a program; this reader knows a
fixed table of names, each of which stands for an inert record.
"""

import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np


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
