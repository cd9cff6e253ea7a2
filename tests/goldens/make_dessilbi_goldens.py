"""Writes dessilbi_*.npz: trajectories of DessiLBI by an independent NumPy program.

    python tests/goldens/make_dessilbi_goldens.py

`replay` restates the update of the authors' optimizer (Fu et al. 2020, arXiv
2007.02010) from its equations, in their tensor layout and with their pruning score. It
uses nothing of lbi/ and no JAX. Where files printed by the authors' own program are
present, a test feeds their gradients to `replay` and compares every array.

Each step maps the gradient g, the weights W, the momentum buffer b, the dual V and
Gamma, where alpha is the learning rate, m the momentum and nu is `mu` in their code:

    b     <- m b + g                                  (b = g in the first step)
    b     <- b + weight_decay W                       (not for biases)
    V     <- V + (alpha / nu) (W - Gamma)             (old W and old Gamma)
    W     <- W - kappa alpha b - kappa alpha (W - Gamma) / nu
    Gamma <- kappa shrink(V, 1)

Biases have no Gamma. `shrink` thresholds the norm of each output channel of `conv`
(out, in, h, w) and each entry of `fc` (out, in).
"""

from pathlib import Path

import numpy as np

EPOCH = 50  # Steps between two pruning scores.
NEVER = 2000  # The epoch of a group that has not entered the support yet.
SHAPES = {"conv": (4, 2, 2, 2), "conv_bias": (4,), "fc": (3, 5), "fc_bias": (3,)}
META_NAMES = (
    "learning_rate",
    "kappa",
    "mu",
    "weight_decay",
    "momentum",
    "lr_divided_by_10_at_step",
    "steps",
)
# name: (values in the order of META_NAMES, seed)
SETTINGS = {
    "dessilbi_plain": ((0.05, 1.0, 2.0, 0.0, 0.0, 0, 150), 0),
    "dessilbi_momentum_wd": ((0.02, 1.5, 1.0, 5e-3, 0.9, 100, 150), 1),
}


def shrink(dual, lam=1.0):
    """Proximal map: groups of rank 4 are the first axis, of rank 2 single entries."""
    if dual.ndim == 2:
        return np.sign(dual) * np.maximum(np.abs(dual) - lam, 0)
    result = np.zeros_like(dual)
    for channel, values in enumerate(dual):
        norm = np.sqrt(np.sum(values * values))
        if norm > lam:
            result[channel] = values * (1 - lam / norm)
    return result


def channel_norms(weights):
    """The Euclidean norm of each output channel, or the size of each entry."""
    if weights.ndim == 2:
        return np.abs(weights)
    return np.array([np.sqrt(np.sum(w * w)) for w in weights], weights.dtype)


def replay(meta, init, gradient, dtype=np.float64):
    """Trains along given gradients.

    Args:
      meta: values by META_NAMES.
      init: the initial tensors by name.
      gradient: maps (name, weights, step) to the gradient at that step.
      dtype: of all arithmetic.

    Returns:
      {"grads/conv": (steps, ...), ...}: all recorded arrays of a golden file, in
      `dtype`, without `meta` and `init`.
    """
    weights = {name: np.array(value, dtype) for name, value in init.items()}
    duals = {name: np.zeros_like(w) for name, w in weights.items() if w.ndim > 1}
    gammas = {name: np.zeros_like(dual) for name, dual in duals.items()}
    first_epoch = {
        name: np.full(channel_norms(weights[name]).shape, NEVER) for name in duals
    }
    buffers, records = {}, {}
    # Python floats keep the dtype of the arrays that they multiply.
    kappa, nu, decay, momentum = (
        float(meta[name]) for name in ("kappa", "mu", "weight_decay", "momentum")
    )
    drop = int(meta["lr_divided_by_10_at_step"])
    for step in range(int(meta["steps"])):
        rate = float(meta["learning_rate"])
        if drop and step >= drop:
            rate /= 10
        for name, old in weights.items():
            grad = np.asarray(gradient(name, old, step), dtype)
            records.setdefault(f"grads/{name}", []).append(grad)
            buffer = momentum * buffers[name] + grad if step else grad
            if old.ndim > 1:
                buffer = buffer + decay * old
            buffers[name] = buffer
            weights[name] = old - rate * kappa * buffer
            if name in duals:
                gap = old - gammas[name]
                weights[name] = weights[name] - rate * kappa / nu * gap
                duals[name] = duals[name] + rate / nu * gap
                gammas[name] = kappa * shrink(duals[name])
                records.setdefault(f"z/{name}", []).append(duals[name])
                records.setdefault(f"gamma/{name}", []).append(gammas[name])
            records.setdefault(f"params/{name}", []).append(weights[name])
        if (step + 1) % EPOCH == 0:
            for name, gamma in gammas.items():
                epoch = np.where(channel_norms(gamma) > 0, step // EPOCH, NEVER)
                first_epoch[name] = np.minimum(first_epoch[name], epoch)
                # In float32 as in the authors' program, whose scores tie near -2000.
                score = np.float32(channel_norms(weights[name]))
                score = score - np.float32(first_epoch[name])
                records.setdefault(f"prune_order/{name}", []).append(score)
    return {name: np.stack(values) for name, values in records.items()}


def make_golden(values, seed):
    """All arrays of one file.

    The gradients are those of a quadratic loss with noise. They are rounded to
    multiples of 2^-12, which float32 holds exactly: a program that is fed the recorded
    gradients sees the same numbers as this one.
    """
    rng = np.random.default_rng(seed)
    init = {name: np.float32(rng.normal(0, 0.5, s)) for name, s in SHAPES.items()}
    target = {name: rng.normal(0, 1, shape) for name, shape in SHAPES.items()}
    # Some channels and some weights are unimportant, so that they enter late or never.
    target["conv"] *= np.array([1.5, 0.05, 0.7, 0.3]).reshape(4, 1, 1, 1)
    target["fc"] *= np.array([2.0, 0.1, 1.0]).reshape(3, 1)

    def gradient(name, weights, step):
        noise = rng.normal(0, 0.3, weights.shape)
        return np.round((weights - target[name] + noise) * 4096) / 4096

    meta = dict(zip(META_NAMES, values, strict=True))
    golden = {f"init/{name}": value for name, value in init.items()}
    golden |= replay(meta, init, gradient)
    golden = {name: np.float32(value) for name, value in golden.items()}
    golden["meta"] = np.array(values, np.float64)
    golden["meta_names"] = np.array(META_NAMES)
    return golden


def main():
    for name, (values, seed) in SETTINGS.items():
        path = Path(__file__).parent / f"{name}.npz"
        np.savez_compressed(path, **make_golden(values, seed))
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
