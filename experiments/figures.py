"""Draws the figures of a run from its files: python -m experiments.figures WORKDIR.

A figure is a function of `metrics.jsonl`, `arrays.npz` and `summary.json`. No network
is trained.
"""

import sys
from pathlib import Path

from experiments.common import figures, launch


def main() -> None:
    launch.expand_home()
    if len(sys.argv) != 2:
        sys.exit("usage: python -m experiments.figures WORKDIR")
    try:
        figures.draw(Path(sys.argv[1]))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
