"""Converts a checkpoint of google-deepmind/functa to a run.

    python -m experiments.import_functa celeba_params_128_latents.npz

The run folder (runs/import_functa/<name of the file>, or --workdir) is accepted by
make_functaset (--config.run) and by meta_learn (--config.init_from). meta_learn starts
the training from the weights or, with --config.num_steps=0, only evaluates them.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import functa
from experiments.common import launch, runs


def import_checkpoint(path: Path, workdir: Path) -> dict[str, Any]:
    """Writes the run; returns its summary.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if it is not a checkpoint of google-deepmind/functa.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    checkpoint = functa.deepmind.load_checkpoint(path)
    imported = checkpoint.imported
    model = {
        field.name: getattr(imported.model, field.name)
        for field in dataclasses.fields(imported.model)
        if field.name not in ("parent", "name", "dtype")
    }
    config = ConfigDict(
        {
            "experiment": "import_functa",
            "variant": path.stem,
            "model": {"type": type(imported.model).__name__, **model},
            "inner": {
                "num_steps": checkpoint.num_steps,
                "l2_weight": checkpoint.l2_weight,
                "unroll": True,
                "noise_std": checkpoint.noise_std,
            },
            "resolution": checkpoint.resolution,
        }
    )
    weights = {"params": imported.params, "learning_rate": checkpoint.learning_rate}
    digest = functa.functaset.hash_params([weights, imported.latent])
    with runs.open_run(workdir, config, inputs={"checkpoint": digest}) as run:
        if run.summary is None:
            run.save(0, {"weights": weights, "latent": imported.latent})
            sizes = {
                "resolution": checkpoint.resolution,
                "latent": imported.latent.size,
            }
            run.finish({"model": type(imported.model).__name__, **sizes})
        return run.summary


def parse(arguments: Sequence[str]) -> tuple[Path, str]:
    """The file and the run folder of a command line.

    Raises:
      ValueError: if there is not one file, or an option that has no effect.
    """
    options, paths = launch.parse_flags(arguments)
    if len(paths) != 1:
        raise ValueError("usage: python -m experiments.import_functa PATH")
    for option in options:
        if options[option].present and option not in ("workdir", "debug"):
            raise ValueError(
                f"import_functa does not use --{option}: the configuration is that of "
                "the checkpoint."
            )
    path = Path(paths[0])
    if options.workdir is None:
        return path, f"runs/import_functa/{path.stem}"
    return path, options.workdir


def main() -> None:
    with launch.one_line_errors(debug="--debug" in sys.argv):
        launch.expand_home()
        arguments = sys.argv[1:]
        if {"-h", "-help", "--help"} & set(arguments):
            print(__doc__)
            return
        path, workdir = parse(arguments)
        launch.silence_libraries()
        import_checkpoint(path, launch.find_workdir(workdir))


if __name__ == "__main__":
    main()
