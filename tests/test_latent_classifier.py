"""experiments.training.latent_classifier: features, batches and new classifiers."""

import jax
import numpy as np
import pytest

from experiments.common import devices
from experiments.networks import heads
from experiments.training import latent_classifier

pytestmark = pytest.mark.usefixtures("unoptimized")

RNG = np.random.default_rng(0)
VIT = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "mlp_dim": 12}
HEADS = {
    "mlp": ({"hidden_sizes": (6, 5)}, "linear_2"),
    "vit": (VIT, "head"),
    "convnext": ({"widths": (8,), "depths": (1,)}, "head"),
}


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("name", HEADS)
def test_last_layer_maps_features_to_outputs(name):
    fields, last = HEADS[name]
    head = heads.make_head({"type": name, **fields}, 3, (2, 2, 4))
    params = jax.jit(head.init)(jax.random.key(0))
    kernel = np.float32(RNG.normal(size=params[last]["kernel"].shape))
    params = dict(params, **{last: dict(params[last], kernel=kernel)})
    x = np.float32(RNG.normal(size=(7, 2, 2, 4)))
    logits, features = heads.with_features(lambda x: head.apply(params, x), x)
    assert features.shape == (7, len(kernel)) and np.std(features) > 0
    np.testing.assert_array_equal(logits, head.apply(params, x))
    np.testing.assert_allclose(
        features @ kernel + np.asarray(params[last]["bias"])[None], logits, atol=1e-5
    )


@pytest.mark.parametrize("num", [3, 4, 8, 10])
def test_batches_are_of_one_size_and_cover_all_rows(num):
    sizes, values = [], np.arange(num)

    def double(batch):
        sizes.append(len(batch))
        return 2 * batch

    doubled = devices.in_batches(double, values, batch_size=4)
    np.testing.assert_array_equal(doubled, 2 * values)
    assert set(sizes) == {min(num, 4)}


def test_fitted_classifier_separates_what_can_be_separated():
    labels = np.arange(60) % 3
    latents = np.float32(RNG.normal(size=(60, 2, 2, 4)))
    latents[np.arange(60), 0, 0, labels] += 8
    head = heads.make_head({"type": "mlp", "hidden_sizes": (8,)}, 3, (2, 2, 4))
    params = latent_classifier.fit(
        jax.random.key(0),
        head,
        latents,
        labels,
        num_steps=200,
        batch_size=16,
        learning_rate=1e-2,
    )
    mean, std = np.full(4, 0.5, np.float32), np.full(4, 2.0, np.float32)
    fitted = latent_classifier.LatentClassifier(head, params, mean, std)
    # It reads normalized latents.
    assert np.mean(fitted.predict(latents * std + mean) == labels) > 0.95
    other = fitted._replace(params=jax.tree.map(lambda x: x + 0.1, params))
    assert fitted.sha256 != other.sha256
