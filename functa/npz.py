"""Reads .npz files of unknown origin.

`numpy.load` trusts the sizes that a file declares, and it reads every kind of file.
These functions execute nothing, do not open pipes or devices, read only the members
that are asked for, and allocate an array only if the file can contain it. A member is
read to its end, so that zipfile compares its CRC-32.
"""

import io
import math
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np


def read_names(path: str | Path) -> list[str]:
    """Names of the arrays of a file, sorted; errors are those of `read_headers`."""
    return sorted(_read(path, None, lambda archive, info: None))


def read_headers(
    path: str | Path, names: Collection[str] | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the arrays of a file; reads no values.

    Args:
      path: an .npz file.
      names: names of the arrays; None means all. Names that the file lacks are left
        out.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if it is not a readable .npz file.
    """
    return _read(path, names, _header)


def read_arrays(
    path: str | Path, names: Collection[str] | None = None
) -> dict[str, np.ndarray]:
    """Reads arrays of a file.

    Args:
      path: an .npz file.
      names: as in `read_headers`.

    Returns:
      {name: array}.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if it is not a readable .npz file.
    """
    return _read(path, names, _array)


_READ_HEADER = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_LONGEST_HEADER = 10_000  # NumPy's own limit.
# How many bytes can come from one stored byte; zlib.net states the ratio of Deflate.
_LARGEST_RATIO = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1032}


def _read(
    path: str | Path,
    names: Collection[str] | None,
    read_member: Callable[[zipfile.ZipFile, zipfile.ZipInfo], Any],
) -> dict[str, Any]:
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}.")
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file.")
    try:
        with zipfile.ZipFile(path) as archive:
            members = {
                info.filename.removesuffix(".npy"): info
                for info in archive.infolist()
                if info.filename.endswith(".npy")
            }
            return {
                name: read_member(archive, info)
                for name, info in members.items()
                if names is None or name in names
            }
    # On damaged bytes zipfile and NumPy may raise any exception.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is not a readable .npz file: {reason}") from None


def _header(archive, info):
    """Shape and dtype of a member; raises if its size contradicts them."""
    ratio = _LARGEST_RATIO.get(info.compress_type)
    if ratio is None:
        raise ValueError(f"{info.filename} is neither stored nor deflated")
    # No member is larger than the part of the file before the central directory.
    if info.file_size > ratio * min(info.compress_size, archive.start_dir):
        raise ValueError(f"{info.filename} cannot have {info.file_size} bytes")
    with archive.open(info) as member:
        start = io.BytesIO(member.read(_LONGEST_HEADER))
    shape, _, dtype = _READ_HEADER[np.lib.format.read_magic(start)](start)
    size = math.prod(shape) * dtype.itemsize
    if dtype.hasobject:
        raise ValueError(f"{info.filename} holds Python objects, not numbers")
    # An empty string takes no bytes in the file, but a place in memory.
    plausible = min(shape, default=0) >= 0 and (dtype.itemsize or shape == ())
    if not plausible or start.tell() + size != info.file_size:
        raise ValueError(
            f"{info.filename} has {info.file_size} bytes, which do not hold an array "
            f"of type {dtype} and shape {shape}"
        )
    return jax.ShapeDtypeStruct(shape, dtype)


def _array(archive, info):
    _header(archive, info)
    with archive.open(info) as member:
        return np.lib.format.read_array(member, allow_pickle=False)
