"""JAX settings of every test: two devices, and two kinds of silent mistake raise."""

import os

import jax

os.environ["MPLBACKEND"] = "Agg"
jax.config.update("jax_num_cpu_devices", 2)  # before the first computation
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
