"""Takes one data set through all four packages and writes one page about it.

    python -m experiments.story --config=experiments/configs/story.py:VARIANT

The steps are other commands, each with a folder inside the run folder: meta_learn
(spatial functa), classify_functa (a Vision Transformer on the grids of latents),
prune_vit (a cascade for a budget of multiply-adds), prune_vit (removes the heads and
neurons that DessiLBI ranks last), probe_landscape (before and after). story.md and
story.html say what each step costs in accuracy and saves in time.

Variants:
  digits: the digits of scikit-learn with a 4x4 grid of latents; no download; some
    minutes on two cores (results/story_digits).
  smoke: the same with tiny networks and few steps, to check that the command runs; no
    download; under a minute on two cores.
  cifar10: CIFAR-10 with an 8x8 grid of latents; hours on two cores; results/ has no run
    of it.
"""

import functools

from experiments.common import settings

BASE = {
    "tensorboard": False,
    "seeds": (0,),
    # The arguments of experiments.common.data.load_dataset.
    "dataset": settings.dataset("digits"),
    # Share of the multiply-adds that the cascade keeps, and share of these that is left
    # after heads and neurons are removed.
    "cascade_budget": 0.75,
    "structure_budget": 0.75,
    # Batch size whose time is compared, one of prune_vit's timing.batch_sizes.
    "timed_batch_size": 32,
    # The variant of each command, and fields that differ from it.
    "meta_learn": settings.Open(
        variant="digits_spatial", model={"grid": (4, 4), "channels": 4}
    ),
    "classify_functa": settings.Open(variant="digits_spatial_vit"),
    "prune_vit": settings.Open(variant="story"),
    "probe_landscape": settings.Open(variant="story"),
}
VARIANTS = {
    "digits": {},
    "smoke": {
        "meta_learn": {"variant": "smoke_spatial", "model": {"grid": (2, 2)}},
        "classify_functa": {"variant": "smoke_spatial"},
        "prune_vit": {"variant": "smoke_story"},
        "probe_landscape": {
            "variant": "story",
            "sharpness": {"num_images": 64, "num_steps": 4},
            "spectrum": {"num_samples": 1, "num_steps": 4},
            "surface": {"num_images": 64, "chunk_size": 64, "size": 3},
        },
    },
    "cifar10": {
        "dataset.name": "cifar10",
        "meta_learn": {"variant": "cifar10_spatial_cpu"},
        "classify_functa": {"variant": "cifar10_spatial_cpu_vit", "crop": ()},
        "probe_landscape": {
            "variant": "story",
            "surface": {"num_images": 1024, "chunk_size": 256, "size": 25},
        },
    },
}
RULES = {
    "cascade_budget": settings.within("(0, 1)"),
    "structure_budget": settings.within("(0, 1)"),
    "timed_batch_size": settings.whole(1),
}

# The first paragraph of the page.
TEXT = (
    "A spatial functa stores every image of the data set {config.dataset.name} as a "
    "grid of latents, from which it is drawn at {test_psnr:.1f} dB (test images). A "
    "Vision Transformer classifies the grids. A cascade prunes its tokens to "
    "{config.cascade_budget:.0%} of the multiply-adds, and the network is fine-tuned. "
    "DessiLBI then ranks heads and neurons by the order in which they enter its path. "
    "Those that enter last are removed until {config.structure_budget:.0%} of the "
    "remaining multiply-adds are left, and the network is fine-tuned again."
)

get_config = functools.partial(settings.build, "story", BASE, VARIANTS)
