"""A GPT of stock Flax NNX modules with optax; its settings as `cost_per_token.py` gives them.

    python benchmarks/peers/flax_gpt.py WORK SETTINGS      # WORK/shape.json, weights.npz, rows.npy

Prints one JSON object a line: the count of parameters, then each step's loss and seconds.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array


class Block(nnx.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, embed: int, heads: int, mlp: int, rngs: nnx.Rngs, fused: bool) -> None:
        self.attention_norm = nnx.LayerNorm(embed, epsilon=1e-5, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(embed, epsilon=1e-5, rngs=rngs)
        extra: dict[str, Any] = {"attention_fn": fused_attention} if fused else {}
        self.attention = nnx.MultiHeadAttention(heads, embed, decode=False, rngs=rngs, **extra)
        self.up, self.down = nnx.Linear(embed, mlp, rngs=rngs), nnx.Linear(mlp, embed, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Shapes: x and the result [B, L, D]."""
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.attention_norm(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x)), approximate=False))


def fused_attention(query: Array, key: Array, value: Array, mask: Array | None = None, **_: Any) -> Array:
    """jax's own `dot_product_attention` in place of Flax's."""
    return jax.nn.dot_product_attention(query, key, value, is_causal=True)


class Gpt(nnx.Module):
    """Learned positions, biases, tied embeddings; gives the logits."""

    def __init__(self, shape: dict[str, int], settings: dict[str, Any]) -> None:
        rngs = nnx.Rngs(0)
        embed = shape["embed"]
        self.tokens = nnx.Embed(shape["vocab"], embed, rngs=rngs)
        self.positions = nnx.Embed(shape["positions"], embed, rngs=rngs)
        fused = settings["attention"] == "jax.nn"
        sizes = (embed, shape["heads"], shape["mlp"])
        self.scan = settings["layers"] == "scan"
        if self.scan:

            @nnx.split_rngs(splits=shape["layers"])
            @nnx.vmap(in_axes=(0,), out_axes=0)
            def make(rngs: nnx.Rngs) -> Block:
                return Block(*sizes, rngs, fused)

            self.blocks: Any = make(rngs)
        else:
            self.blocks = nnx.List([Block(*sizes, rngs, fused) for _ in range(shape["layers"])])
        self.norm = nnx.LayerNorm(embed, epsilon=1e-5, rngs=rngs)

    def __call__(self, tokens: Array) -> Array:
        """Shapes: tokens [B, L]; the result is [B, L, V]."""
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1])[None])
        if self.scan:

            @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            def layer(block: Block, x: Array) -> Array:
                return block(x)

            x = layer(self.blocks, x)
        else:
            for block in self.blocks:
                x = block(x)
        return self.tokens.attend(self.norm(x))


def fill(model: Gpt, shape: dict[str, int], weights: dict[str, np.ndarray]) -> None:
    """Give every parameter its array."""
    model.tokens.embedding[...] = jnp.asarray(weights["tokens"])
    model.positions.embedding[...] = jnp.asarray(weights["positions"])
    norm: Any = model.norm
    norm.scale[...], norm.bias[...] = weights["norm/scale"], weights["norm/bias"]
    heads, embed = shape["heads"], shape["embed"]
    wide, count = embed // heads, shape["layers"]

    def put(blocks: Any, at: dict[str, Array], lead: tuple[int, ...]) -> None:
        for name in ("attention_norm", "mlp_norm"):
            getattr(blocks, name).scale[...] = at[f"{name}/scale"]
            getattr(blocks, name).bias[...] = at[f"{name}/bias"]
        for part in ("query", "key", "value"):
            layer = getattr(blocks.attention, part)
            layer.kernel[...] = at[part].reshape(*lead, embed, heads, wide)
            layer.bias[...] = at[f"{part}_bias"].reshape(*lead, heads, wide)
        blocks.attention.out.kernel[...] = at["out"].reshape(*lead, heads, wide, embed)
        blocks.attention.out.bias[...] = at["out_bias"]
        for part in ("up", "down"):
            getattr(blocks, part).kernel[...], getattr(blocks, part).bias[...] = at[part], at[f"{part}_bias"]

    named = {
        name.removeprefix("layers/"): jnp.asarray(x)
        for name, x in weights.items()
        if name.startswith("layers/")
    }
    if model.scan:
        put(model.blocks, named, (count,))
    else:
        for n, block in enumerate(model.blocks):
            put(block, {name: x[n] for name, x in named.items()}, ())


def main() -> None:
    """Train on the rows, a step a row of the file."""
    work, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    shape = json.loads((work / "shape.json").read_text())
    model = Gpt(shape, settings)
    with np.load(work / "weights.npz") as weights:
        fill(model, shape, dict(weights))
    chain = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(shape["lr"], b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0),
    )
    optimizer = nnx.Optimizer(model, chain, wrt=nnx.Param)
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    print(json.dumps({"parameters": count}), flush=True)

    def loss_of(model: Gpt, rows: Array) -> Array:
        logits = model(rows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()

    def of_modules(model: Gpt, optimizer: nnx.Optimizer, rows: Array) -> Array:
        loss, grads = nnx.value_and_grad(loss_of)(model, rows)
        optimizer.update(model, grads)
        return loss

    rows = jnp.asarray(np.load(work / "rows.npy"))
    if settings["jit"] == "nnx.jit":
        jitted = nnx.jit(of_modules, donate_argnums=(0, 1) if settings["donate"] else ())

        def step(batch: Array) -> Array:
            return jitted(model, optimizer, batch)
    else:
        definition, state = nnx.split((model, optimizer))

        def of_state(state: Any, batch: Array) -> tuple[Any, Array]:
            mine, rule = nnx.merge(definition, state)
            loss = of_modules(mine, rule, batch)
            return nnx.state((mine, rule)), loss

        pure = jax.jit(of_state, donate_argnums=(0,) if settings["donate"] else ())
        held = [state]
        # The modules hold what is donated below.
        del model, optimizer, state

        def step(batch: Array) -> Array:
            held[0], loss = pure(held[0], batch)
            return loss

    for n in range(shape["steps"]):
        began = time.perf_counter()
        loss = float(step(rows[n]))
        print(json.dumps({"loss": loss, "seconds": time.perf_counter() - began}), flush=True)


if __name__ == "__main__":
    main()
