"""Figures of the scaling command."""

import matplotlib.pyplot as plt


def draw_scaling(folder, arrays, metrics):
    """Images per second over devices; rate and memory over the size of a data set."""
    del metrics
    figure, (over_devices, over_images) = plt.subplots(1, 2, figsize=(8, 3))
    over_devices.plot(arrays["num_devices"], arrays["images_per_second"], "o-")
    over_devices.set_xlabel("virtual devices on the same cores")
    over_devices.set_ylabel("images/s of a meta-learning step")
    over_devices.set_xticks(arrays["num_devices"])
    over_devices.set_ylim(0, 1.1 * arrays["images_per_second"].max())
    over_images.plot(arrays["num_images"], arrays["peak_mebibytes"], "o-")
    over_images.set_xscale("log")
    over_images.set_xlabel("images encoded into one functaset")
    over_images.set_ylabel("peak memory of the process (MiB)")
    over_images.set_ylim(0, 1.1 * arrays["peak_mebibytes"].max())
    for axis in over_devices, over_images:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(folder / "scaling.png", dpi=150)
    plt.close(figure)
