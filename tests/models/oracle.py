"""MPT from its definition: float64 numpy, one row, head and position at a time; no code of the package."""

import math

import numpy as np

from mosaicjax.layers.norm import RmsNorm
from mosaicjax.layers.position import (
    Alibi,
    DynamicScaling,
    Learned,
    LinearScaling,
    Llama3Scaling,
    Rotary,
)


def logits(config, weights, tokens, positions=None, segments=None):
    """Scores of the next token for rows of tokens; `weights` is the package's tree, as numpy arrays."""
    rows = []
    for b, row in enumerate(tokens):
        where = np.arange(len(row)) if positions is None else positions[b]
        document = np.ones(len(row), int) if segments is None else segments[b]
        rows.append(row_logits(config, weights, row, where, document))
    return np.stack(rows)


def row_logits(config, weights, row, positions, segments):
    table = np.asarray(weights["embed"]["tokens"], np.float64)
    x = with_inputs(config, weights["embed"], table, row, positions)
    if isinstance(config.position, Learned):
        x = x + np.asarray(weights["embed"]["positions"], np.float64)[positions]
    first = x
    turn = len(weights["stacks"][0])
    for n in range(config.layers):
        window = config.windows[n % len(config.windows)]
        layer = take_layer(weights["stacks"][0][n % turn]["layer"], n // turn)
        if config.block.scales is not None:
            x = layer["scales"]["keep"] * x + layer["scales"]["first"] * first
        extra = None
        if config.value_tables:
            entries = np.asarray(weights["embed"][f"values{n % config.value_tables}"], np.float64)[row]
            mix = layer["attention"]["value_mix"]
            extra = mix[:, None] * entries.reshape(len(row), len(mix), -1)
        normed = norm(config.norm, layer["attention_norm"], x)
        x = x + attend(config, layer["attention"], normed, positions, segments, window, extra)
        x = x + feed_forward(config, layer["mlp"], norm(config.norm, layer["mlp_norm"], x))
    x = norm(config.norm, weights["norm"], x)
    table = weights["embed"]["tokens"] if config.tied else weights["head"]
    scores = x @ np.asarray(table, np.float64).T * config.logit_scale
    return config.logit_softcap * np.tanh(scores / config.logit_softcap) if config.logit_softcap else scores


def with_inputs(config, weights, table, row, positions):
    """The embeddings of a row, with what pairs of neighbours add."""
    made = [table[token].copy() for token in row]
    kinds = [type(part).__name__ for part in config.inputs]
    for kind in kinds:
        for at, token in enumerate(row):
            before = int(row[at - 1]) if positions[at] > 0 else None
            if kind == "Smear" and before is not None:
                gate = 1 / (1 + math.exp(-float(made[at] @ weights["smear"]["gate"].astype(np.float64))))
                made[at] = made[at] + weights["smear"]["scale"].astype(np.float64) * gate * table[before]
            if kind == "Bigram":
                buckets = config.inputs[kinds.index(kind)].buckets
                pair = bucket(0 if before is None else before + 1, int(token), buckets)
                made[at] = made[at] + weights["bigram"]["table"][pair].astype(np.float64)
    return np.array(made)


def bucket(before, token, buckets):
    mixed = (before * 0x85EBCA6B ^ token * 0xC2B2AE35) % 2**32
    mixed = (mixed ^ mixed >> 15) * 0x85EBCA6B % 2**32
    return (mixed ^ mixed >> 13) % buckets


def take_layer(tree, n):
    if isinstance(tree, dict):
        return {name: take_layer(part, n) for name, part in tree.items()}
    return np.asarray(tree[n], np.float64)


def norm(kind, weights, x, dims=1):
    """Normalises the last `dims` dims together."""
    scale = np.asarray(weights["scale"], np.float64)
    flat = x.reshape(*x.shape[: x.ndim - dims], -1)
    if isinstance(kind, RmsNorm):
        out = flat / np.sqrt((flat**2).mean(-1, keepdims=True) + kind.eps)
    else:
        out = (flat - flat.mean(-1, keepdims=True)) / np.sqrt(flat.var(-1, keepdims=True) + kind.eps)
    out = out.reshape(x.shape) * scale
    return out + np.asarray(weights["bias"], np.float64) if "bias" in weights else out


def project(config, weights, name, x, extra=None):
    out = np.tensordot(x, weights[name], axes=1)
    if config.bias:
        out = out + weights[f"{name}_bias"]
    if extra is not None:
        out = out + extra
    if config.clip_qkv:
        out = np.minimum(np.maximum(out, -config.clip_qkv), config.clip_qkv)
    if config.qk_norm is not None and name != "value":
        out = norm(
            config.qk_norm.norm, weights[f"{name}_norm"], out, dims=1 if config.qk_norm.per_head else 2
        )
    return out


def attend(config, weights, x, positions, segments, window, extra):
    queries, keys, values = (
        project(config, weights, name, x, extra if name == "value" else None)
        for name in ("query", "key", "value")
    )
    heads, size = queries.shape[1:]
    group = heads // keys.shape[1]
    if isinstance(config.position, Rotary):
        lengths = [
            max(p for p, s in zip(positions, segments, strict=True) if s == mine) + 1 for mine in segments
        ]
        queries = turned(config.position, queries, positions, lengths)
        keys = turned(config.position, keys, positions, lengths)
    scale = config.softmax_scale or 1 / math.sqrt(size)
    mixed = np.zeros((len(x), heads, size))
    for h in range(heads):
        for at in range(len(x)):
            seen, scores = [], []
            for other in range(len(x)):
                distance = positions[at] - positions[other]
                if distance < 0 or segments[at] != segments[other] or segments[other] == 0:
                    continue
                if window and distance >= window:
                    continue
                score = queries[at, h] @ keys[other, h // group] * scale
                if config.attention_softcap:
                    score = config.attention_softcap * math.tanh(score / config.attention_softcap)
                if isinstance(config.position, Alibi):
                    score -= slope(h, heads, config.position.max_bias) * distance
                seen.append(other)
                scores.append(score)
            if seen:
                shares = np.exp(np.array(scores) - max(scores))
                sink = math.exp(float(weights["sinks"][h]) - max(scores)) if config.attention.sinks else 0.0
                mixed[at, h] = shares / (shares.sum() + sink) @ values[seen, h // group]
    out = np.tensordot(mixed, weights["out"], axes=2)
    return out + weights["out_bias"] if config.bias else out


def slope(head, heads, max_bias):
    """Press et al.'s slopes; between powers of two, the odd ones of the next power come first, as in MPT."""
    power = 1
    while power < heads:
        power *= 2
    if power == heads:
        order = list(range(1, power + 1))
    else:
        order = list(range(2, power + 1, 2)) + list(range(1, power + 1, 2))
    return 2.0 ** (-max_bias * order[head] / power)


def turned(rotary, x, positions, lengths):
    """Pairs (i, i + dim / 2) as complex numbers, times e^(i angle)."""
    dim = round(x.shape[-1] * rotary.fraction)
    out = x.copy()
    for at, (position, length) in enumerate(zip(positions, lengths, strict=True)):
        for i in range(dim // 2):
            angle = position * frequency(rotary, i, dim, length)
            pair = (x[at, :, i] + 1j * x[at, :, i + dim // 2]) * complex(math.cos(angle), math.sin(angle))
            out[at, :, i], out[at, :, i + dim // 2] = pair.real, pair.imag
    return out


def frequency(rotary, i, dim, length):
    theta, scaling = rotary.theta, rotary.scaling
    if isinstance(scaling, DynamicScaling) and length > scaling.original:
        theta *= (scaling.factor * length / scaling.original - (scaling.factor - 1)) ** (dim / (dim - 2))
    plain = 1 / theta ** (2 * i / dim)
    if isinstance(scaling, LinearScaling):
        return plain / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        wavelength = 2 * math.pi / plain
        if wavelength < scaling.original / scaling.high:
            return plain
        if wavelength > scaling.original / scaling.low:
            return plain / scaling.factor
        smooth = (scaling.original / wavelength - scaling.low) / (scaling.high - scaling.low)
        return (1 - smooth) * plain / scaling.factor + smooth * plain
    return plain


ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.where(x > 0, x, 0),
    "relu_squared": lambda x: np.where(x > 0, x, 0) ** 2,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}


def feed_forward(config, weights, x):
    bias = config.bias or config.ffn.bias

    def read(name):
        return x @ weights[name] + (weights[f"{name}_bias"] if bias else 0)

    bend = ACTIVATIONS[config.ffn.activation.value]
    hidden = bend(read("gate")) * read("up") if "gate" in weights else bend(read("up"))
    return hidden @ weights["down"] + (weights["down_bias"] if bias else 0)
