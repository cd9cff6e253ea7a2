"""A Vision Transformer and its cascade from their definitions, in float64.

NumPy loops over images, layers, heads and queries. Of vit/ only the names of the
parameters and of the fields of `vit.Cascade` are used: a dropped or merged token is
removed from a list, a skipped one is not processed, a zeroed one gets a row of zeros.
Other code that the tests of vit/ share follows.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass
class Token:
    """x (D,), its number (0 for CLS, -1 for a fused one), score and group size."""

    x: np.ndarray
    position: int
    score: float = 0.0
    size: int = 1


@dataclasses.dataclass
class Trace:
    """What a forward pass gives and did, by layer and image where it is a list.

    Attributes:
      logits: (B, K).
      attention: numbers of the tokens that the attention worked on.
      mlp: likewise of the MLP.
      at_hand: numbers of the tokens that were there, as the intermediates have them.
      probs: of the attention over the rows at hand, (H, n, n).
      heads: of each layer, which were used, (B, H).
      margin: the smallest relative gap between the last token that was chosen and the
        first that was not; exact ties, decided by the order, are none.
    """

    logits: np.ndarray = None
    attention: list = dataclasses.field(default_factory=list)
    mlp: list = dataclasses.field(default_factory=list)
    at_hand: list = dataclasses.field(default_factory=list)
    probs: list = dataclasses.field(default_factory=list)
    heads: list = dataclasses.field(default_factory=list)
    margin: float = math.inf


def forward(
    params, images, *, cascade=None, gelu="tanh", epsilon=1e-6, random_scores=None
):
    """The `Trace` of images (B, H, W, C); random_scores (B, N) are for "random"."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    batch = [
        [Token(x, position) for position, x in enumerate(embed(params, image, epsilon))]
        for image in np.asarray(images, np.float64)
    ]
    if random_scores is not None:
        for tokens, scores in zip(batch, np.asarray(random_scores), strict=True):
            for token, score in zip(tokens, scores, strict=True):
                token.score = float(score)
    trace = Trace()
    encoder = params["Transformer"]
    num_layers = sum(name.startswith("encoderblock") for name in encoder)
    for layer in range(num_layers):
        block = encoder[f"encoderblock_{layer}"]
        before = [[token.score for token in tokens] for tokens in batch]
        if cascade is not None and layer in cascade.resets:
            for tokens in batch:
                for token in tokens:
                    token.score = 0.0
            before = [[0.0] * len(tokens) for tokens in batch]
        batch = attention_half(trace, cascade, layer, block, batch, epsilon)
        batch = mlp_half(trace, cascade, layer, block, batch, before, gelu, epsilon)
    outputs = []
    for tokens in batch:
        y = layer_norm(tokens[0].x, encoder["encoder_norm"], epsilon)
        if "pre_logits" in params:
            y = np.tanh(affine(y, params["pre_logits"]))
        outputs.append(affine(y, params["head"]) if "head" in params else y)
    trace.logits = np.stack(outputs)
    return trace


def embed(params, image, epsilon):
    """CLS and the patches of one image (H, W, C) with their positions, (N, D)."""
    for i in range(sum(name.startswith("stem_") for name in params)):
        image = stem(image, params[f"stem_{i}"], epsilon)
    kernel, bias = params["embedding"]["kernel"], params["embedding"]["bias"]
    size = kernel.shape[0]
    rows = [params["cls"][0, 0]]
    for top in range(0, image.shape[0], size):
        for left in range(0, image.shape[1], size):
            patch = image[top : top + size, left : left + size]
            rows.append(np.tensordot(patch, kernel, axes=3) + bias)
    return np.stack(rows) + params["Transformer"]["posembed_input"]["pos_embedding"][0]


def stem(image, params, epsilon):
    """3x3 convolution, stride 2, zeros around; normalization; GELU."""
    height, width, _ = image.shape
    out = np.zeros((height // 2, width // 2, params["kernel"].shape[-1]))
    for row in range(height // 2):
        for column in range(width // 2):
            for i in range(3):
                for j in range(3):
                    y, x = 2 * row + i - 1, 2 * column + j - 1
                    if 0 <= y < height and 0 <= x < width:
                        out[row, column] += image[y, x] @ params["kernel"][i, j]
    return gelu_of(layer_norm(out, params["LayerNorm_0"], epsilon), "tanh")


def attention_half(trace, cascade, layer, block, batch, epsilon):
    keep = None if cascade is None else cascade.keep[layer]
    worked = [choose(trace, cascade, keep, tokens) for tokens in batch]
    batch = [tokens for tokens, _ in worked]
    # What the attention sees: numbers in the list and their normalized rows.
    inputs = [rows_of(cascade, block["LayerNorm_0"], *pair, epsilon) for pair in worked]
    params = block["MultiHeadDotProductAttention_0"]
    sizes = [
        np.array([tokens[row].size for row in rows])
        for tokens, (rows, _) in zip(batch, inputs, strict=True)
    ]
    maps = [
        [attend(y, size, params, head) for head in heads_in(params)]
        for (_, y), size in zip(inputs, sizes, strict=True)
    ]
    probs = [np.stack([probs for probs, _ in heads]) for heads in maps]
    used = used_heads(cascade, layer, probs, sizes)
    at_hand = []
    for image, (tokens, (rows, y)) in enumerate(zip(batch, inputs, strict=True)):
        update = np.zeros((len(rows), tokens[0].x.shape[0])) + params["out"]["bias"]
        for head, (_, values) in enumerate(maps[image]):
            if used[image, head]:
                update += values @ params["out"]["kernel"][head]
        gained = score_gains(cascade, probs[image])
        for i, row in enumerate(rows):
            token = tokens[row]
            token.x = token.x + update[i]
            if gained is not None:
                token.score = gained[i] + (token.score if cascade.cumulative else 0.0)
        if cascade is not None and cascade.score == "merge":
            keys = np.mean([project(y, params["key"], h) for h in heads_in(params)], 0)
            count = len(tokens) - 1 - cascade.counts[layer][1]
            batch[image] = merge(tokens, keys, count)
        at_hand.append([token.position for token in batch[image]])
    numbers = [[tokens[i].position for i in kept] for tokens, kept in worked]
    trace.attention.append(numbers)
    trace.at_hand.append(at_hand)
    trace.probs.append(probs)
    trace.heads.append(used)
    return batch


def mlp_half(trace, cascade, layer, block, batch, before, gelu, epsilon):
    keep = None if cascade is None else cascade.counts[layer][1]
    numbers = []
    for image, tokens in enumerate(batch):
        if cascade is not None and cascade.stale_threshold:
            # The place of the threshold is that of the old scores in rising order.
            first = [math.inf] * cascade.keep_cls
            old = first + before[image][len(first) :]
            new = first + [token.score for token in tokens][len(first) :]
            threshold = sorted(old)[len(tokens) - 1 - keep]
            kept = [i for i, score in enumerate(new) if score >= threshold]
        else:
            tokens, kept = choose(trace, cascade, keep, tokens)
        rows, y = rows_of(cascade, block["LayerNorm_1"], tokens, kept, epsilon)
        hidden = gelu_of(affine(y, block["MlpBlock_0"]["Dense_0"]), gelu)
        update = affine(hidden, block["MlpBlock_0"]["Dense_1"])
        for i, row in enumerate(rows):
            tokens[row].x = tokens[row].x + update[i]
        batch[image] = tokens
        numbers.append([tokens[i].position for i in kept])
    trace.mlp.append(numbers)
    return batch


def choose(trace, cascade, keep, tokens):
    """The tokens that are left and which of them, by number in the list, are kept."""
    if cascade is None or keep + 1 >= len(tokens):
        return tokens, list(range(len(tokens)))
    values = [token.score for token in tokens]
    if cascade.score == "norm":
        values = [float(np.sqrt(np.sum(token.x**2))) for token in tokens]
    count = keep + 1 - bool(cascade.fuse)

    def rank(i):
        return (not (cascade.keep_cls and i == 0), -values[i], i)

    order = sorted(range(len(tokens)), key=rank)
    last, first = values[order[count - 1]], values[order[count]]
    if last != first and not (cascade.keep_cls and order[count - 1] == 0):
        trace.margin = min(trace.margin, (last - first) / max(abs(last), abs(first)))
    kept = sorted(order[:count])
    if cascade.semantics != "drop":
        return tokens, kept
    left = [tokens[i] for i in kept]
    if cascade.fuse:
        gone = order[count:]
        total = sum(values[i] for i in gone)
        x = sum(values[i] * tokens[i].x for i in gone)
        if cascade.fuse == "mean":
            x = x / total
        score = sum(values[i] * tokens[i].score for i in gone) / total
        left.append(Token(x, -1, score))
    return left, list(range(len(left)))


def rows_of(cascade, norm, tokens, kept, epsilon):
    """Which tokens are rows of the next product, and the rows (n, D)."""
    if cascade is None or cascade.semantics != "zero":
        return kept, np.stack([layer_norm(tokens[i].x, norm, epsilon) for i in kept])
    rows = [
        layer_norm(token.x, norm, epsilon) * (i in kept)
        for i, token in enumerate(tokens)
    ]
    return list(range(len(tokens))), np.stack(rows)


def attend(y, sizes, params, head):
    """Probabilities (n, n) and outputs (n, d) of a head; a key counts `size` times."""
    query, key, value = (
        project(y, params[name], head) for name in ("query", "key", "value")
    )
    probs = np.zeros((len(y), len(y)))
    for i in range(len(y)):
        likeness = np.exp(key @ query[i] / math.sqrt(query.shape[1]))
        probs[i] = sizes * likeness / np.sum(sizes * likeness)
    return probs, probs @ value


def used_heads(cascade, layer, probs, sizes):
    """Which heads' values are used, (B, H)."""
    num_heads = probs[0].shape[0]
    if cascade is None or cascade.keep_heads is None:
        return np.ones((len(probs), num_heads), bool)
    scores = np.array(
        [
            head_scores(members(*pair), cascade.head_score)
            for pair in zip(probs, sizes, strict=True)
        ]
    )
    if cascade.head_scope == "batch":
        scores[:] = scores.mean(0)
    used = np.zeros(scores.shape, bool)
    for image, row in enumerate(scores):
        order = sorted(range(num_heads), key=lambda head: (-row[head], head))
        used[image, order[: cascade.keep_heads[layer]]] = True
    return used


def members(probs, sizes):
    """Attention among the members of groups: each has its share, and a vote."""
    shares = probs / np.asarray(sizes)
    return np.repeat(np.repeat(shares, sizes, axis=-1), sizes, axis=-2)


def head_scores(probs, form):
    """Of probs (H, n, n): the sum of the maxima of columns ("max") or of rows."""
    scores = np.zeros(len(probs))
    for head, matrix in enumerate(probs):
        for i in range(len(matrix)):
            scores[head] += np.max(matrix[:, i] if form == "max" else matrix[i])
    return scores


def score_gains(cascade, probs):
    """What one layer adds to the scores of its rows, (n,), of probs (H, n, n)."""
    if cascade is None or cascade.score in ("norm", "random", "merge"):
        return None
    if cascade.score == "cls":
        return probs[:, 0].mean(0)
    return patch_scores(probs, cascade.score, cascade.alpha, cascade.beta)


def patch_scores(probs, form, alpha, beta):
    reduce = {"max": np.max, "sum": np.sum}[form]
    scores = np.zeros(probs.shape[1])
    for matrix in probs:
        for j in range(len(matrix)):
            scores[j] += alpha * reduce(matrix[j]) + beta * reduce(matrix[:, j])
    return scores


def merge(tokens, keys, count):
    """Bipartite soft matching (Bolya et al. 2023, section 3), `count` tokens fewer.

    Even places (CLS among them, which stays) each look for the most similar odd place;
    the `count` most similar pairs become one token.
    """
    keys = [key / np.sqrt(np.sum(key**2)) for key in keys]
    edges = []
    for a in range(2, len(tokens), 2):
        partner = max(range(1, len(tokens), 2), key=lambda b: (keys[a] @ keys[b], -b))
        edges.append((keys[a] @ keys[partner], a, partner))
    edges = sorted(edges, key=lambda edge: (-edge[0], edge[1]))[:count]
    result = {
        i: Token(token.x * token.size, token.position, token.score, token.size)
        for i, token in enumerate(tokens)
    }
    for _, a, partner in edges:
        gone = result.pop(a)
        result[partner].x = result[partner].x + gone.x
        result[partner].size += gone.size
    for token in result.values():
        token.x = token.x / token.size
    # What is left of the one side, then the other.
    return [result[i] for i in sorted(result, key=lambda i: (i % 2, i))]


def project(y, params, head):
    return y @ params["kernel"][:, head] + params["bias"][head]


def heads_in(params):
    return range(params["query"]["bias"].shape[0])


def affine(x, params):
    return x @ params["kernel"] + params["bias"]


def layer_norm(x, params, epsilon):
    mean = x.mean(-1, keepdims=True)
    variance = np.mean((x - mean) ** 2, -1, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon) * params["scale"] + params["bias"]


def gelu_of(x, form):
    if form == "erf":
        return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


# Networks, images and programs.


def random_params(model, image_shape, seed=0):
    """Activations of order 1; nothing is at its usual start."""
    shapes = param_shapes(model.clone(cascade=None), image_shape)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        module, name = path[-2].key if len(path) > 1 else "", path[-1].key
        if name == "scale":
            value = rng.uniform(0.5, 1.5, leaf.shape)
        elif name == "kernel":
            # A projection to heads is (D, H, d), one from heads (H, d, D).
            to_heads = module in ("query", "key", "value")
            num_inputs = leaf.shape[0] if to_heads else math.prod(leaf.shape[:-1])
            # Attention far from uniform, and hidden numbers where the GELUs differ.
            gain = {"query": 1.4, "key": 1.4, "Dense_0": 2.0}.get(module, 1.0)
            value = rng.normal(0, gain / num_inputs**0.5, leaf.shape)
        else:
            value = rng.normal(0, 0.5, leaf.shape)
        return jnp.asarray(value, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def param_shapes(model, image_shape):
    images = jax.ShapeDtypeStruct(image_shape, jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)["params"]


def random_images(image_shape, seed=9):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.uniform(-1.5, 1.5, image_shape), jnp.float32)


def products(function, *arguments):
    """Each matrix product of a traced function: (multiply-adds, types of operands)."""
    return list(_products(jax.make_jaxpr(function)(*arguments).jaxpr))


def _products(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            left, right = (operand.aval for operand in equation.invars)
            (contracted, _), (shared, _) = equation.params["dimension_numbers"]
            summed = math.prod(left.shape[axis] for axis in contracted)
            batch = math.prod(left.shape[axis] for axis in shared)
            count = left.size * right.size // (summed * batch)
            yield count, {left.dtype.name, right.dtype.name}
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _products(inner)
