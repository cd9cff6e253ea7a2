"""Measures paths in rounds, in which they take turns with each other and with peers."""

import contextlib
import time
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from experiments.common import devices
from experiments.common.runs import Run
from experiments.timing import peers
from experiments.timing.hot_path import HotPath

# The paths whose best rate is the ceiling of all paths of the same dtype.
CEILINGS = {dtype: f"product_{dtype}" for dtype in ("float32", "bfloat16")}


def measure(
    run: Run, named_paths: Iterable[tuple[str, HotPath]]
) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Compiles the paths and times them, as the config of the run says.

    Returns:
      {name: measurements of the path}, and the operations per second of matrix products
      of each dtype.
    """
    config = run.config
    paths, compiled, table = {}, {}, {}
    with _nothing_kept():
        for name, path in named_paths:
            paths[name] = path
            run.say(f"compiling {name} ...")
            compiled[name], table[name] = _compile(path)
        times, peer_rates = _take_turns(run, paths, compiled)
    ceilings = {
        dtype: paths[name].flops / min(times[name]) for dtype, name in CEILINGS.items()
    }
    for name, path in paths.items():
        row = table[name]
        row |= _summarize(path, times[name], ceilings[path.dtype])
        reference = config.sizes[name].get("reference")
        if reference in paths:
            # Ratios within a round: other load on the machine affects both.
            ratios = np.divide(times[name], times[reference])
            row |= {
                "reference": reference,
                "time_over_reference": np.median(ratios),
                "arithmetic_over_reference": path.flops / paths[reference].flops,
            }
        rates = peer_rates.get(path.peer)
        if rates:
            row |= {
                "peer_per_second": np.median(rates),
                "over_peer": row["per_second"] / np.median(rates),
                "peer_rounds": rates,
            }
    return table, ceilings


@contextlib.contextmanager
def _nothing_kept():
    """Disables the compilation cache, so that compile times are measured."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def _compile(path):
    """Compiles the call; also returns the compile time and the memory needed."""
    if not path.jitted:
        return path.step, {}
    outputs = (devices.replicated(), None)
    function = jax.jit(path.step, donate_argnums=0, out_shardings=outputs)
    started = time.perf_counter()
    compiled = function.lower(path.state, *path.inputs).compile()
    seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    num_bytes = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes  # outputs in the buffers of donated arguments
    )
    return compiled, {"compile_seconds": seconds, "mebibytes": num_bytes / 2**20}


def _take_turns(run, paths, compiled):
    """Per round: seconds per step of each path, items per second of each peer."""
    config = run.config
    states = {name: path.state for name, path in paths.items()}

    def call(name, at_least):
        """Repeats the call for `at_least` seconds; returns the seconds per step."""
        path, calls = paths[name], 0
        started = time.perf_counter()
        while calls == 0 or time.perf_counter() - started < at_least:
            result = compiled[name](states[name], *path.inputs)
            states[name] = jax.block_until_ready(result)[0]
            calls += 1
        return (time.perf_counter() - started) / (calls * path.num_steps)

    for name in paths:
        call(name, 0.0)  # warms up
    times, peer_rates, programs = {name: [] for name in paths}, {}, {}
    for path in paths.values():
        if config.peer_python is not None and path.peer:
            program, measurement = path.peer
            programs.setdefault(program, {})[measurement] = True
    for number in range(config.num_rounds):
        started = time.monotonic()
        if number % config.peer_every == 0:
            for program, names in programs.items():
                run.say(f"{program} ...")
                rates = peers.run_peer(config.peer_python, program, list(names))
                for name, rate in rates.items():
                    peer_rates.setdefault((program, name), []).append(rate)
        for name in paths:
            times[name].append(call(name, config.seconds_per_turn))
        seconds = time.monotonic() - started
        run.say(f"round {number + 1}/{config.num_rounds}: {seconds:.1f} s")
    return times, peer_rates


def _summarize(path, times, ceiling):
    """Measurements of a path from its seconds per step in each round."""
    low, seconds, high = np.quantile(times, (0.25, 0.5, 0.75))
    return {
        "milliseconds": 1000 * seconds,
        "milliseconds_quartiles": [1000 * low, 1000 * high],
        "unit": path.unit,
        "per_second": path.units / seconds,
        "dtype": path.dtype,
        "gflops_per_second": path.flops / seconds / 1e9,
        "share_of_product": path.flops / seconds / ceiling,
        **path.further,
        "rounds": [1000 * t for t in times],
    }
