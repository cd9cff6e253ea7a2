"""Methods that prune a trained Vision Transformer, for prune_vit.

A method maps (problem, ratio, scores, seed) to the pruned network. `METHODS` names them
all. Axes: L layers, H heads, M neurons of an MLP.
"""

import functools
import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

import lbi
from experiments.training import classifier, optimizers
from experiments.training.vit import Problem, make_predict
from vit import Cascade, checkpoint, importance, schedules, slicing
from vit.attention import Segment
from vit.model import one_or_each

Scores = Mapping[str, np.ndarray]
Heads = frozenset[tuple[int, int]]  # of (layer, head)
# Training images and networks that a search over heads evaluates.
_NUM_SEARCHED, _MOST_EVALUATIONS = 512, 600


def prune(
    method: str, ratio: float, problem: Problem, scores: Scores | None = None, seed=0
) -> Problem:
    """`network` pruned by one of METHODS.

    Args:
      method: its name.
      ratio: plateau of the ramp over the layers; for "constant" and "range" the mean
        over all layers except the first; for heads and neurons the share per layer; for
        segments always a third. The cost of "evit", "merge", "merge_decreasing" and
        "resolution" is as close as possible to that of "max". Ratio 0 is the network
        itself.
      problem: the dense network.
      scores: {method: scores} for the methods that need them: attention ranges (L,) for
        "range", scores of each layer's heads or neurons for "heads", "heads_lbi" and
        "neurons_lbi"; "structure_lbi" needs the last two. See `attention_scores` and
        `entry_scores`.
      seed: for "random", "heads_random" and "neurons_random".
    """
    return METHODS[method](problem, ratio, scores, seed) if ratio else problem


def ratio_for_budget(
    method: str,
    fits: Callable[[Problem], bool],
    problem: Problem,
    scores: Scores | None = None,
    seed: int = 0,
) -> float:
    """The smallest ratio, in steps of 0.001, whose network fits a budget.

    Args:
      method: one of METHODS.
      fits: whether a pruned network is within the budget.
      problem: the dense network.
      scores: see `prune`.
      seed: see `prune`.

    Raises:
      ValueError: if no network of the method fits.
    """
    # Mean ratios by range end at 0.9.
    end = 901 if method == "range" else 1000
    low, high = 0, end
    while low < high:
        middle = (low + high) // 2
        if fits(prune(method, middle / 1000, problem, scores, seed)):
            high = middle
        else:
            low = middle + 1
    if low == end:
        raise ValueError(f"no ratio of the method {method} is within it.")
    return low / 1000


def with_cascade(
    problem: Problem, make: Callable[..., Cascade], *args: Any, **options: Any
) -> Problem:
    """`network` with the cascade make(*args, num_layers=, num_patches=, **options)."""
    cascade = make(
        *args,
        num_layers=problem.model.num_layers,
        num_patches=problem.num_patches,
        **options,
    )
    return problem._replace(model=problem.model.clone(cascade=cascade))


def _by_score(problem, ratio, scores, seed, **options):
    return with_cascade(problem, schedules.cp_vit, ratio, seed=seed, **options)


def _constant(problem, ratio, scores, seed):
    ratios = schedules.constant_ratios(ratio, problem.model.num_layers)
    return _with_ratios(problem, ratios)


def _by_range(problem, ratio, scores, seed):
    return _with_ratios(problem, schedules.range_ratios(ratio, scores["range"]))


def _with_ratios(problem, ratios):
    cascade = schedules.from_ratios(ratios, problem.num_patches)
    return problem._replace(model=problem.model.clone(cascade=cascade))


def _released_code(problem, ratio, scores, seed):
    return with_cascade(problem, schedules.released_code, plateau=ratio)


def _at_equal_cost(variants):
    """A method: the variant of a network whose cost is closest to that of "max"."""

    def prune_at_equal_cost(problem, ratio, scores, seed):
        target = with_cascade(problem, schedules.cp_vit, ratio).cost.total
        return min(variants(problem), key=lambda p: abs(p.cost.total - target))

    return prune_at_equal_cost


def _keep_rates(problem):
    for rate in np.linspace(0.2, 1, 161):
        yield with_cascade(problem, schedules.evit, rate)


def _merged_tokens(problem, schedule="constant"):
    for num_merged in range(problem.num_patches // 2 + 1):
        yield with_cascade(
            problem, schedules.token_merging, num_merged, schedule=schedule
        )


def _resolutions(problem):
    patch = problem.model.patch_size
    encoder = problem.params["Transformer"]
    positions = np.asarray(encoder["posembed_input"]["pos_embedding"])
    for side in range(1, problem.image_size // patch):
        resized = checkpoint.resize_positions(
            positions, side, num_prefix=problem.model.num_prefix
        )
        resized = encoder | {"posembed_input": {"pos_embedding": resized}}
        params = problem.params | {"Transformer": resized}
        model = problem.model.clone(grid=(side, side))
        yield problem._replace(model=model, params=params, image_size=side * patch)


def _slices(cut, name):
    """A method: cuts units of low score out of the weights of every layer."""

    def prune_weights(problem, ratio, scores, seed):
        model = problem.model
        total = model.num_heads if cut is slicing.keep_heads else model.mlp_dim
        if name.endswith("_random"):
            rng = np.random.default_rng(seed)
            chosen = [rng.random(total) for _ in range(model.num_layers)]
        else:
            chosen = scores[name]
        count = max(schedules.keep_counts([ratio], total)[0], 1)
        kept = slicing.largest(chosen, [count] * model.num_layers)
        model, params = cut(model, problem.params, kept)
        return problem._replace(model=model, params=params)

    return prune_weights


def search_heads(
    loss_fn: Callable[[Heads], float],
    num_heads: Sequence[int],
    num_removed: int,
    *,
    max_evaluations: int,
) -> Heads:
    """The heads whose removal raises a loss the least, by A* search over sets of heads.

    Parnami et al. 2021 (arXiv 2110.15225) prune the heads of BERT by A* search; the
    bound here is our own. The cost of a set is the rise of the loss without its heads.
    What is still to come is at least the sum of the smallest rises of single heads, if
    heads never hurt less together than one by one. Then the result is optimal, unless
    the evaluations are used up first. It is never worse than that of a greedy search,
    which is done first, whatever it takes.

    Args:
      loss_fn: the loss without some heads.
      num_heads: heads of each layer, (L,); every layer keeps at least one.
      num_removed: number of heads to remove.
      max_evaluations: evaluations of `loss_fn` after which the search ends.

    Raises:
      ValueError: if so many heads cannot be removed.
    """
    if not 0 <= num_removed <= sum(num_heads) - len(num_heads):
        raise ValueError(
            f"num_removed must be between 0 and {sum(num_heads) - len(num_heads)}, got "
            f"{num_removed}."
        )
    heads = [(i, head) for i, total in enumerate(num_heads) for head in range(total)]
    losses = {}

    def rise(removed):
        for one in (removed, frozenset()):
            if one not in losses:
                losses[one] = loss_fn(one)
        return losses[removed] - losses[frozenset()]

    def children(removed):
        for layer, head in heads:
            left = num_heads[layer] - sum(layer == i for i, _ in removed)
            if (layer, head) not in removed and left > 1:
                yield removed | {(layer, head)}

    def bound(removed):
        single = sorted(rise(frozenset({h})) for h in heads if h not in removed)
        return rise(removed) + sum(single[: num_removed - len(removed)])

    best = frozenset()
    for _ in range(num_removed):
        best = min(children(best), key=rise)
    number = itertools.count()  # sets of equal bounds are visited in turn
    seen, queue = set(), [(bound(frozenset()), next(number), frozenset())]
    while queue and queue[0][0] < rise(best) and len(losses) < max_evaluations:
        *_, removed = heapq.heappop(queue)
        for child in set(children(removed)) - seen:
            seen.add(child)
            if len(child) == num_removed:
                best = min(best, child, key=rise)
            else:
                heapq.heappush(queue, (bound(child), next(number), child))
    return best


def _by_search(problem, ratio, scores, seed):
    """Cuts as many heads as the other methods, of any layer, by their loss."""
    model = problem.model
    total, layers = model.num_heads, range(model.num_layers)
    count = max(schedules.keep_counts([ratio], total)[0], 1)
    pixels, labels = (values[:_NUM_SEARCHED] for values in problem.images.train)
    predict = make_predict(problem)

    def kept(removed):
        return [[h for h in range(total) if (i, h) not in removed] for i in layers]

    def loss_fn(removed):
        params = slicing.mask_heads(model, problem.params, kept(removed))
        return float(classifier.cross_entropy(predict(params, pixels), labels))

    removed = search_heads(
        loss_fn,
        [total] * model.num_layers,
        model.num_layers * (total - count),
        max_evaluations=_MOST_EVALUATIONS,
    )
    model, params = slicing.keep_heads(model, problem.params, kept(removed))
    return problem._replace(model=model, params=params)


def _by_structure(problem, ratio, scores, seed):
    """Cuts heads and neurons of every layer that entered last out of all layers."""
    model = problem.model
    graph = _channel_graph(model.clone(cascade=None), problem.input_shape)
    counts, keep = {}, {}
    for name, kernel in _STRUCTURES.items():
        counts[name] = []
        for layer, score in enumerate(scores[name]):
            count = max(schedules.keep_counts([ratio], len(score))[0], 1)
            [kept] = slicing.largest([score], [count])
            counts[name].append(count)
            # The only head of a layer is no axis of channels.
            if count < len(score):
                keep[kernel.format(layer)] = np.isin(np.arange(len(score)), kept)
    smaller = model.clone(
        num_heads=one_or_each(counts["heads_lbi"]),
        mlp_dim=one_or_each(counts["neurons_lbi"]),
        head_dim=model.head_dim or model.hidden_size // len(scores["heads_lbi"][0]),
    )
    params = lbi.channels.thin(problem.params, keep, graph)
    return problem._replace(model=smaller, params=params)


# The kernels whose outputs are the heads and the neurons of a layer.
_STRUCTURES = {
    "heads_lbi": "Transformer/encoderblock_{}/MultiHeadDotProductAttention_0/query"
    "/kernel",
    "neurons_lbi": "Transformer/encoderblock_{}/MlpBlock_0/Dense_0/kernel",
}


@functools.lru_cache(maxsize=2)
def _channel_graph(model, input_shape):
    images = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    return lbi.channels.trace(
        lambda params, x: model.apply({"params": params}, x), params, images
    )


_HEADS = ("heads", "heads_random", "heads_lbi")
_NEURONS = ("neurons_random", "neurons_lbi")


def _without_segment(problem, ratio, scores, seed, *, number, of):
    model = problem.model.clone(segment=Segment(number, of))
    return problem._replace(model=model)


# The ratio of a segment is fixed: a third. They are numbered as in the report.
_SEGMENTS = {
    f"{prefix}segment_{number + 1}": functools.partial(
        _without_segment, number=number, of=of
    )
    for of, prefix in (("regions", ""), ("heads", "heads_"))
    for number in range(3)
}

# name -> (problem, ratio, scores, seed) -> the pruned network.
METHODS = {
    "max": _by_score,
    "sum": functools.partial(_by_score, score="sum"),
    "cls": functools.partial(_by_score, score="cls", cumulative=False),
    "norm": functools.partial(_by_score, score="norm", cumulative=False),
    "random": functools.partial(_by_score, score="random"),
    "constant": _constant,
    "range": _by_range,
    "skip": functools.partial(_by_score, semantics="skip"),
    "zero": functools.partial(_by_score, semantics="zero"),
    "released_code": _released_code,
    "evit": _at_equal_cost(_keep_rates),
    "merge": _at_equal_cost(_merged_tokens),
    "merge_decreasing": _at_equal_cost(
        functools.partial(_merged_tokens, schedule="decreasing")
    ),
    "resolution": _at_equal_cost(_resolutions),
    **_SEGMENTS,
    **{name: _slices(slicing.keep_heads, name) for name in _HEADS},
    **{name: _slices(slicing.keep_neurons, name) for name in _NEURONS},
    "heads_search": _by_search,
    "structure_lbi": _by_structure,
}
# Methods that do all the work, for study; no budget is within their reach.
SAVE_NOTHING = ("released_code", *_SEGMENTS)
# Methods that need images, for their scores.
NEED_IMAGES = (
    *("range", "heads", "heads_lbi", "heads_search", "neurons_lbi", "structure_lbi"),
)
# Methods that rank patches by the attention of CLS.
NEED_CLS = ("cls", "evit")


def attention_scores(problem: Problem, num_images: int) -> dict[str, np.ndarray]:
    """Scores of the heads (L, H) and attention ranges (L,) on training images."""
    grid = (problem.image_size // problem.model.patch_size,) * 2
    problem = problem._replace(model=problem.model.clone(cascade=None))

    @jax.jit
    def observe(params, pixels):
        probs = problem.observe(params, pixels).attention
        return {
            "heads": jnp.stack([importance.head_scores(p).mean(0) for p in probs]),
            "range": jnp.stack(
                [
                    importance.attention_range(
                        p, grid, num_prefix=problem.model.num_prefix
                    )
                    for p in probs
                ]
            ),
        }

    pixels = problem.images.train[0][:num_images]
    parts = np.array_split(pixels, -(-len(pixels) // 64))
    sizes = [len(part) for part in parts]
    means = [observe(problem.params, part) for part in parts]
    return jax.tree.map(
        lambda *values: np.average(np.stack(values), axis=0, weights=sizes), *means
    )


def entry_optimizer(
    problem: Problem, settings: ConfigDict, num_steps: int
) -> optax.GradientTransformation:
    """DessiLBI+Adam with group penalties on heads and hidden neurons.

    A head's group is its rows of the output projection, a neuron's group its column.
    """
    schedule = optimizers.make_schedule(settings, num_steps)
    penalty = lbi.suggest_lambda(
        problem.params,
        schedule,
        settings.nu,
        num_steps,
        {
            "/out/kernel$": lbi.GroupL2(group_axes=0),
            "/Dense_0/kernel$": lbi.GroupL2(group_axes=-1),
        },
        enter_at=settings.enter_at,
    )
    return lbi.dessilbi_adam(schedule, settings.nu, penalty=penalty, record_entry=True)


def entry_scores(state: Any, num_layers: int) -> dict[str, list[np.ndarray]]:
    """Scores after a training with `entry_optimizer`: higher for earlier entry.

    Groups that never enter come last, ordered by their norm.
    """
    places = lbi.pruning.entry_importance(state.params, state.opt_state)
    kernels = {
        "heads_lbi": "Transformer/encoderblock_{}/MultiHeadDotProductAttention_0/out",
        "neurons_lbi": "Transformer/encoderblock_{}/MlpBlock_0/Dense_0",
    }
    return {
        method: [places[f"{name.format(i)}/kernel"] for i in range(num_layers)]
        for method, name in kernels.items()
    }
