"""Draws the figures of a run from its files: python -m experiments.figures WORKDIR.

A figure is a function of `metrics.jsonl`, `arrays.npz` and `summary.json`. No network
is trained. With a second folder the images of two runs of meta_learn are drawn side by
side, four times enlarged: python -m experiments.figures WORKDIR OTHER.
"""

import sys
from pathlib import Path

from experiments.common import launch
from experiments.drawing import figures


def main() -> None:
    with launch.one_line_errors():
        if {"-h", "--help"} & set(sys.argv[1:]):
            print(__doc__)
            return
        launch.expand_home()
        if len(sys.argv) not in (2, 3):
            raise ValueError("usage: python -m experiments.figures WORKDIR [OTHER]")
        draw = figures.draw if len(sys.argv) == 2 else figures.compare
        draw(*map(Path, sys.argv[1:]))


if __name__ == "__main__":
    main()
