"""import_functa: other commands accept the run made from an original checkpoint."""

import pickle
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import functa
from experiments import import_functa, meta_learn
from experiments.configs import meta_learn as meta_learn_config
from experiments.training import encoding


@pytest.fixture
def checkpoint(tmp_path):
    """A file as the original writes it, of a network for grey images."""
    model = functa.LatentModulatedSiren(8, 3, latent_dim=4, out_channels=1)
    latent = jnp.full(4, 0.01)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2)), latent)["params"]
    rates = jnp.linspace(0.01, 0.1, 4)
    tree = functa.deepmind.to_haiku(
        functa.deepmind.Imported(model, params, latent, rates)
    )
    config = {
        "model": {"w0": 30.0, "modulate_scale": False, "modulate_shift": True},
        "dataset": {"num_channels": 1, "resolution": 8},
        "training": {"inner_steps": 2},
        "opt_inner": {"lr": 0.01},
    }
    path = tmp_path / "digits_params_4_latents.npz"
    tree = jax.tree.map(np.asarray, tree)
    path.write_bytes(pickle.dumps({"params": tree, "config": config}))
    return path, params, latent, rates


@pytest.mark.slow
def test_imported_run_is_evaluated_and_encoded(checkpoint, tmp_path):
    path, params, latent, rates = checkpoint
    summary = import_functa.import_checkpoint(path, tmp_path / "run")
    assert summary["resolution"] == 8

    # Another file of the same name is not taken for the one that was imported.
    stored = pickle.loads(path.read_bytes())
    stored["params"] = jax.tree.map(lambda x: 2 * x, stored["params"])
    other = tmp_path / "other" / path.name
    other.parent.mkdir()
    other.write_bytes(pickle.dumps(stored))
    with pytest.raises(ValueError, match="the checkpoint of .*run has changed"):
        import_functa.import_checkpoint(other, tmp_path / "run")

    learner = encoding.load_learner(tmp_path / "run")
    assert learner.inner["num_steps"] == 2
    np.testing.assert_array_equal(learner.latent, latent)
    np.testing.assert_array_equal(learner.learning_rate, rates)
    jax.tree.map(np.testing.assert_array_equal, learner.params, params)

    config = meta_learn_config.get_config("smoke")
    config.init_from = str(tmp_path / "run")
    config.num_steps = 0
    summary = meta_learn.train_and_evaluate(config, tmp_path / "evaluation")
    # The inner loop by hand, on the images that the evaluation used.
    from experiments.common import data

    images = data.load_dataset("digits").splits["test"]["image"][
        : config.eval.num_images
    ]
    model = learner.model
    coords = functa.coordinate_grid((8, 8))
    with jax.default_matmul_precision("highest"):
        _, info = functa.fit_batch(
            model.apply,
            params,
            latent,
            coords,
            data.to_float(images),
            num_steps=2,
            learning_rate=rates,
        )
    expected = functa.mean_psnr(info.mse[:, -1])
    np.testing.assert_allclose(summary["test_psnr"], expected, rtol=1e-5)

    # The results of one network are not shown for another one at its place.
    shutil.rmtree(tmp_path / "run")
    import_functa.import_checkpoint(other, tmp_path / "run")
    with pytest.raises(ValueError, match="the network of init_from of .* has changed"):
        meta_learn.train_and_evaluate(config, tmp_path / "evaluation")


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        import_functa.import_checkpoint(tmp_path / "absent.npz", tmp_path / "run")
    (tmp_path / "x.npz").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="params and config"):
        import_functa.import_checkpoint(tmp_path / "x.npz", tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="holds no run"):
        encoding.load_learner(tmp_path / "run")
    assert isinstance(meta_learn_config.get_config("smoke"), ConfigDict)


@pytest.mark.parametrize("option", ["--config=a.py:b", "--multihost", "--process_id=0"])
def test_options_that_have_no_effect_are_refused(option):
    paths = import_functa.parse(["a/b.npz", "--workdir=c", "--debug"])
    assert list(map(str, paths)) == ["a/b.npz", "c"]
    assert import_functa.parse(["a/b.npz"])[1] == "runs/import_functa/b"
    name = option.split("=")[0]
    with pytest.raises(ValueError, match=f"import_functa does not use {name}: "):
        import_functa.parse(["a/b.npz", option])
