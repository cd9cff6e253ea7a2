"""Programs in torch that do the work of a path."""

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "peers"


def run_peer(python: str, program: str, names: Sequence[str]) -> dict[str, float]:
    """Runs a program of experiments/peers; returns {name: items per second}.

    Args:
      python: a Python that has torch.
      program: the name of the file.
      names: what it measures. A name ends with the number of items, as in "B=16".

    Raises:
      ValueError: if it fails, or if its output cannot be parsed.
    """
    path = FOLDER / program
    text = _run(python, path, *names)
    found = re.findall(r"^(.*\bB=(\d+)): (\d+\.\d+)s", text, re.M)
    rates = {name: int(items) / float(seconds) for name, items, seconds in found}
    if missing := set(names) - set(rates):
        raise ValueError(f"the output of {path} has no time of {missing.pop()!r}.")
    return rates


def check(python: str) -> None:
    """Raises ValueError if this Python cannot be run or has no torch."""
    _run(python, "-c", "import torch")


def _run(python, *arguments):
    try:
        done = subprocess.run([python, *arguments], capture_output=True, text=True)
    except OSError as error:
        raise ValueError(f"peer_python {python} cannot be run: {error}") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"peer_python {python} failed with {arguments[0]}: {last}")
    return done.stdout
