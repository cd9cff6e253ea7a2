"""Figure of benchmark's `scaling` variant, a function of the run's arrays."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

_LABELS = {
    "batch_size": "images of a batch",
    "image_size": "side of an image (pixels)",
    "latent_dim": "size of the latent",
    "num_steps": "inner steps",
}


def draw_benchmark(folder, arrays, metrics):
    """Time and memory along each axis, one panel for each."""
    del metrics
    axes = [name.partition("/")[0] for name in arrays if name.endswith("/value")]
    figure, panels = plt.subplots(
        1, len(axes), figsize=(3.4 * len(axes), 3), layout="constrained", squeeze=False
    )
    for panel, axis in zip(panels[0], axes, strict=True):
        values = arrays[f"{axis}/value"]
        quartiles = arrays[f"{axis}/milliseconds_quartiles"]
        panel.fill_between(values, *quartiles.T, color="tab:blue", alpha=0.3, lw=0)
        panel.plot(values, arrays[f"{axis}/milliseconds"], "o-", color="tab:blue")
        panel.set_ylabel("milliseconds of a step", color="tab:blue")
        memory = panel.twinx()
        memory.plot(values, arrays[f"{axis}/mebibytes"], "s--", color="tab:orange")
        memory.set_ylabel("memory (MiB)", color="tab:orange")
        panel.set_xlabel(_LABELS.get(axis, axis))
        # From zero: what is in proportion is a line through the origin.
        for one in (panel, memory):
            one.set_ylim(0, 1.05 * one.dataLim.ymax)
        panel.set_xlim(left=0)
        panel.grid(alpha=0.3)
    figure.savefig(folder / "scaling.png", dpi=150, bbox_inches="tight")
    plt.close(figure)
