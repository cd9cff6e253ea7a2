"""Files of weights, .npz and .safetensors, as dictionaries of arrays.

Names, shapes and sizes are checked before memory is allocated. Nothing in a file is
executed: neither format needs pickle, and pickled content is rejected.
"""

import io
import json
import math
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

Arrays = dict[str, np.ndarray]


def find_files(path: str | Path) -> tuple[Path, ...]:
    """The files that hold the arrays of a checkpoint.

    Args:
      path: a file; a model.safetensors.index.json, which names several; or a folder
        with one of model.safetensors, such an index, or a single file.

    Returns:
      Their paths.

    Raises:
      FileNotFoundError: if the path does not exist.
      ValueError: if a folder holds no or several checkpoints, or an index is damaged.
    """
    return _locate(Path(path))[0]


def _locate(path):
    """The files of a checkpoint, and the names that an index promises."""
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} does not exist.")
    if path.is_dir():
        names = "model.safetensors", f"model{_INDEX}"
        files = [path / name for name in names if (path / name).is_file()]
        if not files:
            files = [one for one in path.iterdir() if one.suffix in _READERS]
            files = sorted(one for one in files if one.is_file())
        if not files or (len(files) > 1 and files[0].name != names[0]):
            found = sorted(one.name for one in files or path.iterdir())
            raise ValueError(
                f"the folder {path} must hold {', '.join(names)} or one file that ends "
                f"in {' or '.join(_READERS)}, got {some_names(found) or 'nothing'}."
            )
        path = files[0]
    if not path.name.endswith(_INDEX):
        return (path,), ()
    weight_map = json_object(path.name, path.read_bytes()).get("weight_map")
    files = weight_map.values() if isinstance(weight_map, dict) else ()
    if not files or not all(
        isinstance(name, str) and Path(name).name == name for name in files
    ):
        raise ValueError(
            f"{path}: weight_map must map each parameter to a file in the same folder."
        )
    return tuple(path.with_name(name) for name in sorted(set(files))), weight_map


_INDEX = ".safetensors.index.json"


def read_arrays(path: Path) -> Arrays:
    """Every array of a checkpoint, by its name in the file.

    Args:
      path: what `find_files` takes.

    Raises:
      FileNotFoundError: if a file does not exist.
      ValueError: if a file is of another kind or damaged, two files hold an array of
        the same name, or none holds one that an index names.
    """
    arrays = {}
    files, promised = _locate(Path(path))
    for file in files:
        found = _read_file(file)
        if twice := arrays.keys() & found.keys():
            raise ValueError(f"{file}: {some_names(sorted(twice))} is in two files.")
        arrays |= found
    if absent := [name for name in promised if name not in arrays]:
        raise ValueError(f"{path}: weight_map names {some_names(absent)}, in no file.")
    return arrays


def _read_file(path):
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} does not exist.")
    kind = path.suffix.lower()
    if kind not in _READERS:
        raise ValueError(
            f"a checkpoint must be a file that ends in {' or '.join(_READERS)}, got "
            f"{path}. PyTorch writes its weights as one with "
            'safetensors.torch.save_file(model.state_dict(), "model.safetensors").'
        )
    if not path.is_file():  # A pipe would block, and a device may never end.
        raise ValueError(f"{path} is not a regular file.")
    with path.open("rb") as file:
        try:
            return _READERS[kind](file)
        # zipfile, NumPy and json may raise any exception on damaged bytes.
        except Exception as error:
            raise ValueError(
                f"{path} is damaged or is not a {kind} file of arrays "
                f"({type(error).__name__}: {error})."
            ) from error


def _read_npz(file):
    if not zipfile.is_zipfile(file):
        raise ValueError("it is truncated or is not a zip archive")
    file_size = file.seek(0, os.SEEK_END)
    file.seek(0)
    with np.load(file, allow_pickle=False) as npz:
        members = [(info.filename, info.file_size) for info in npz.zip.infolist()]
        if sum(size for _, size in members) > _LARGEST_RATIO * file_size + 2**20:
            raise ValueError("its arrays would be far larger than the file")
        for name, size in members:
            if name.endswith(".npy"):
                _check_size(npz.zip, name, size)
        arrays = {name: npz[name] for name in npz.files}
    for name, value in arrays.items():
        if not isinstance(value, np.ndarray):
            raise ValueError(f"{name} is not an array")
    return arrays


# Weights hardly compress, unless most of them are zero.
_LARGEST_RATIO = 32


def _check_size(archive, name, size):
    """Raises if the header of a member demands more than it has; NumPy would allocate.

    `functa.npz` does the same for other files.
    """
    with archive.open(name) as member:
        start = io.BytesIO(member.read(10_000))  # NumPy's limit of a header
    version = np.lib.format.read_magic(start)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    shape, _, dtype = readers[version](start)
    if start.tell() + math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"{name} has {size} bytes, not an array {dtype} {shape}")


def _read_safetensors(file):
    """Reads the length of the header (uint64), the header (JSON) and the arrays.

    The header is {name: {"dtype", "shape", "data_offsets": [begin, end]}}, with offsets
    from its end, and may have a text under "__metadata__". Arrays are in C order, all
    numbers are little-endian.
    """
    length = int.from_bytes(file.read(8), "little")
    if length > _MAX_HEADER:
        raise ValueError(f"its header would have {length} bytes")
    if length > os.fstat(file.fileno()).st_size:
        raise ValueError(f"its header of {length} bytes would exceed it")
    header = json.loads(file.read(length))
    buffer = file.read()
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise ValueError(
                f"the dtype of {name} must be one of {', '.join(_DTYPES)}; got "
                f"{entry['dtype']}"
            )
        dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), entry["shape"]
        begin, end = entry["data_offsets"]
        size = math.prod(shape)
        if not 0 <= begin <= end <= len(buffer) or end - begin != size * dtype.itemsize:
            raise ValueError(
                f"{name} of shape {shape} does not fit bytes {begin} to {end} of "
                f"{len(buffer)}"
            )
        array = np.frombuffer(buffer, dtype, count=size, offset=begin)
        arrays[name] = array.reshape(shape)
    if sum(array.nbytes for array in arrays.values()) > len(buffer):
        raise ValueError("its arrays overlap")
    return arrays


_MAX_HEADER = 100_000_000  # The format's own limit.
_DTYPES = {
    **{"F32": "<f4", "F16": "<f2", "BF16": jnp.bfloat16, "F64": "<f8"},
    # Counters and indices of networks that are refused by the names of these arrays.
    **{"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?"},
}
_READERS = {".npz": _read_npz, ".safetensors": _read_safetensors}


def json_object(name: str, text: str | bytes) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
      name: names the text in the message of an error.
      text: what to read.

    Raises:
      ValueError: if the text is not valid JSON, or not an object.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} must hold a JSON object, got {value!r}.")
    return value


def some_names(names: Iterable[str], limit: int = 5) -> str:
    """The first names, for error messages."""
    names = list(names)
    return ", ".join(names[:limit] + ["..."] * (len(names) > limit))


def shape_of(arrays: Arrays, name: str, axes: str) -> tuple[int, ...]:
    """The shape of a parameter.

    Args:
      arrays: the parameters.
      name: its name.
      axes: its axes, for example "(D, M)".

    Raises:
      ValueError: if it is missing or has another number of axes.
    """
    if name not in arrays:
        raise ValueError(
            f"{name} {axes} is missing; the file contains {some_names(arrays)}."
        )
    shape = arrays[name].shape
    if len(shape) != axes.count(",") + 1:
        raise ValueError(f"{name} must have shape {axes}, got {shape}.")
    return shape


def to_float32(name: str, value: np.ndarray) -> np.ndarray:
    """A parameter in float32.

    Raises:
      ValueError: if its dtype is not one of floating-point numbers.
    """
    if value.dtype.kind == "V" and value.dtype.itemsize == 2:
        value = value.view(jnp.bfloat16)  # How NumPy stores it.
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"{name} must have a floating-point dtype, got {value.dtype}.")
    with np.errstate(over="ignore"):  # It gives infinity, which is refused.
        return np.asarray(value, np.float32)


def to_safetensors(arrays: Arrays) -> bytes:
    """The bytes of a .safetensors file of float32 or float16 arrays."""
    header, parts, end = {"__metadata__": {"format": "pt"}}, [], 0
    kinds = {"float32": "F32", "float16": "F16"}
    for name, value in sorted(arrays.items()):
        value = np.ascontiguousarray(value)
        start, end = end, end + value.nbytes
        header[name] = {
            "dtype": kinds[value.dtype.name],
            "shape": value.shape,
            "data_offsets": [start, end],
        }
        parts.append(value.astype(value.dtype.newbyteorder("<")).tobytes())
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # Arrays are aligned.
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])
