"""Programs in torch that do the work of a path."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict


def run_peer(config: ConfigDict, program: str) -> dict[str, float]:
    """Runs a program of config.peers; returns {name: images per second}.

    Raises:
      ValueError: if it fails, or if its output cannot be parsed.
    """
    path = find_peer(config, program)
    python = config.peer_python or sys.executable
    try:
        done = subprocess.run([python, path], capture_output=True, text=True)
    except OSError as error:
        raise ValueError(f"peer_python {python} cannot be run: {error}") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"{path} failed under {python}: {last}")
    rates = _READERS[program](done.stdout)
    if not rates:
        raise ValueError(f"the output of {path} contains no times.")
    return rates


def find_peer(config: ConfigDict, program: str) -> Path:
    """The path of a program, of this project or of the folder config.peers."""
    for folder in (Path(__file__).parents[1] / "peers", Path(config.peers)):
        if (folder / program).is_file():
            return folder / program
    raise ValueError(f"peers: there is no {program} in {config.peers}.")


def read_steps(text: str) -> dict[str, float]:
    """Parses lines "torch NAME B=16: step 1.639s ..."; returns items per second.

    The name ends with the number of items, B or patches. "step" may be absent.
    """
    pattern = r"torch ([^:\n]+ (?:B|patches)=(\d+)): (?:step )?(\d+\.\d+)s"
    found = re.findall(pattern, text)
    return {name: int(n) / float(s) for name, n, s in found if float(s)}


def read_torch_vgg(text: str) -> dict[str, float]:
    """Parses "torch 0.58 torch 0.57 ...", seconds per step; drops the warm-up."""
    seconds = [float(s) for s in re.findall(r"torch (\d+\.\d+)", text)][1:]
    return {"B=128": 128 / np.median(seconds)} if any(seconds) else {}


_READERS = {
    "pyhessian_curvature.py": read_steps,
    "torch_functa.py": read_steps,
    "torch_spatial.py": read_steps,
    "torch_vgg.py": read_torch_vgg,
}
