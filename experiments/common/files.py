"""Files of a run: writes are atomic, and a damaged file gives a one-line error.

A folder of files gets checksums in the format of `sha256sum`, so that a flipped bit is
noticed. A folder in use has a lock, which the kernel releases when its process ends.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.common import devices
from functa import npz

RESUME_HINT = "Fix this and rerun the command to resume."


def write_atomic(
    path: Path,
    write: Callable[[Any], None],
    mode: str = "w",
    *,
    every_process: bool = False,
) -> None:
    """Calls `write(file)` on a temporary file next to `path`, then moves it to `path`.

    Only the main process writes, unless `every_process` is set and each process has its
    own path.
    """
    if not (every_process or devices.is_main()):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, mode) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error}. {RESUME_HINT}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes readable JSON atomically; NumPy and JAX numbers become Python numbers."""
    text = json.dumps(plain(value), indent=2)
    write_atomic(path, lambda file: file.write(text + "\n"))


def write_npz(
    path: Path, arrays: Mapping[str, np.ndarray], *, every_process: bool = False
) -> None:
    """Writes a compressed .npz atomically; see `write_atomic`."""
    write_atomic(
        path,
        lambda file: np.savez_compressed(file, **arrays),
        mode="wb",
        every_process=every_process,
    )


def read_json(path: Path) -> Any:
    """Reads JSON; raises a ValueError that names the file if it is damaged."""
    try:
        return json.loads(_read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def read_npz(path: Path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """Reads the arrays of these names, or all; see `functa.npz.read_arrays`."""
    return npz.read_arrays(path, names)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without a last line that a kill has truncated."""
    if not path.exists():
        return []
    metrics = []
    lines = _read_bytes(path).splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            line = json.loads(line)
            metrics.append(line | {"step": int(line["step"])})
        except (ValueError, TypeError, KeyError, RecursionError):
            if number < len(lines):
                raise ValueError(f"{path}, line {number}, is damaged.") from None
    return metrics


def logged(
    metrics: Iterable[Mapping[str, Any]], key: str
) -> tuple[np.ndarray, np.ndarray]:
    """Steps (K,) and values (K, ...) of the lines of a log that have an entry."""
    lines = [line for line in metrics if key in line]
    return np.array([m["step"] for m in lines]), np.array([m[key] for m in lines])


def _read_bytes(path):
    # A pipe would block, and a device may never end.
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file.")
    return path.read_bytes()


_CHECKSUMS = "SHA256SUMS"


def write_checksums(folder: Path) -> None:
    """Writes the checksums of all files of a folder, as `sha256sum` does."""
    lines = [
        f"{_sha256(path)}  {path.relative_to(folder)}\n"
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != _CHECKSUMS
    ]
    write_atomic(folder / _CHECKSUMS, lambda file: file.writelines(lines))


def find_damage(folder: Path) -> str | None:
    """The first file that differs from its checksum; None if all agree.

    Folders of earlier versions have no checksums, so nothing is known about them.
    """
    path = folder / _CHECKSUMS
    if not path.exists():
        return None
    for line in _read_bytes(path).decode(errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        file = folder / name
        if not name or not file.is_file() or _sha256(file) != digest:
            return name or _CHECKSUMS
    return None


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def lock(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Keeps a folder for this process; the file `.lock` has its pid and host.

    The kernel holds the lock (flock) and releases it when the process ends, however it
    ends. What then remains is only the text, which the next process replaces.

    Args:
      folder: the folder.
      say: prints a message.

    Raises:
      ValueError: if another process has the folder.
    """
    try:
        file = open(folder / ".lock", "a+b", buffering=0)
    except OSError as error:
        # Nobody can change a folder that cannot be written.
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        yield
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder} is in use by {_owner(file) or 'another process'}. Wait for "
                "it or choose another --workdir."
            ) from None
        except OSError as error:
            say(f"{folder} cannot be locked ({error}); start no second process in it.")
            yield
            return
        if owner := _owner(file):
            say(f"taking over {folder} from {owner}, which did not finish.")
        file.truncate(0)
        with contextlib.suppress(OSError):  # On a full disk the lock still holds.
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        try:
            yield
        finally:
            file.truncate(0)


def _owner(file):
    file.seek(0)
    return file.read(200).decode(errors="replace").strip()


def plain(value):
    """Converts NumPy and JAX numbers and arrays to types of JSON."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return np.asarray(value).tolist()
    return value
