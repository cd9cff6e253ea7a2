"""Files of a run: writes are atomic, and a damaged file gives a one-line error."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.common import devices

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
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without a last line that a kill has truncated."""
    if not path.exists():
        return []
    metrics = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            metrics.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}, is damaged.") from None
    return metrics


def plain(value):
    """Converts NumPy and JAX numbers and arrays to types of JSON."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return np.asarray(value).tolist()
    return value
