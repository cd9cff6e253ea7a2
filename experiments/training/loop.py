"""The training loop."""

import numpy as np


def check_finite(losses: np.ndarray, *, first_step: int) -> None:
    """Raises ValueError that names the first step whose loss is not finite.

    Args:
      losses: (S,), of consecutive steps.
      first_step: the number of the step of losses[0].
    """
    bad = np.flatnonzero(~np.isfinite(losses))
    if bad.size:
        raise ValueError(
            f"the loss is {losses[bad[0]]} at step {first_step + bad[0]}; the last "
            "checkpoint is from before. Lower the learning rate or clip the gradient."
        )
