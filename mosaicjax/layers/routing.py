"""What routers did with the tokens of a microbatch: losses that keep them in balance, and experts' loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mosaicjax.layers.context import Context
from mosaicjax.mesh import Layout


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RouterSums:
    """Sums over the tokens that count, at one router or, with a dim in front, at several.

    `chosen_E` says how many tokens took each expert, `shares_E` is the sum of the router's softmax and
    `square_lse` that of its squared log-partition. Within `shard_map` over the batch axes all are this
    shard's.

    Shapes: `tokens` and `square_lse` [], the others [E].
    """

    tokens: Array
    chosen_E: Array
    shares_E: Array
    square_lse: Array


def router_sums(logits_BLE: Array, shares_BLE: Array, chosen_BLE: Array, context: Context) -> RouterSums:
    """The sums over a router's logits, their softmax, and the experts that each token took."""
    counted_BL = context.counted(logits_BLE.shape[:2])
    weight_BL = counted_BL.astype(logits_BLE.dtype)
    lse_BL = jax.nn.logsumexp(logits_BLE, axis=-1)
    return RouterSums(
        tokens=jnp.sum(weight_BL),
        chosen_E=jnp.sum((chosen_BLE & counted_BL[..., None]).astype(logits_BLE.dtype), axis=(0, 1)),
        shares_E=jnp.sum(shares_BLE * weight_BL[..., None], axis=(0, 1)),
        square_lse=jnp.sum(jnp.square(lse_BL) * weight_BL),
    )


@dataclass(frozen=True)
class Routing:
    """All routers of a model on one microbatch, or on one shard of it.

    `layers` are the numbers of the layers that have experts, and the coefficients those of their losses.

    Shapes: the sums with the routers' dim in front, in the order of `layers`.
    """

    layers: tuple[int, ...]
    balance: tuple[float, ...]
    z_loss: tuple[float, ...]
    sums: RouterSums

    def losses(self, weight: Array, layout: Layout) -> tuple[Array, dict[str, Array]]:
        """What is to be added to the objective of a microbatch of this weight, and metrics as weighted sums.

        Both losses are means over the tokens of the whole microbatch, all devices', that are neither padding
        nor in rows without weight, and then over the routers; so neither the mesh nor what fills up the last
        microbatch changes them. A step of several microbatches takes their mean by weight. `balance_loss` is
        E x the sum over experts of (tokens that took it / tokens) x (mean share), so k for k experts a token
        in perfect balance; `router_z_loss` the mean of the squared log-partition. Metrics hold both without
        their coefficients, and for each layer with experts `expert_load/LAYER`, each expert's part of all
        choices.

        Within `shard_map` the objective is this shard's part of it, which is to be summed over shards.

        Source: Fedus et al. 2021, arXiv 2101.03961, eq. 4 to 6, with choices counted over the k experts of
        each token as Transformers' Mixtral does (which however takes its means over the tokens of all layers
        at once); Zoph et al. 2022, arXiv 2202.08906, eq. 5.
        """

        def over_devices(part: Array) -> Array:
            return jax.lax.psum(part, layout.batch_axes) if layout.manual else part

        sums = self.sums
        chosen_ME = over_devices(sums.chosen_E)
        tokens_M = jnp.maximum(over_devices(sums.tokens), 1)
        whole = over_devices(weight).astype(tokens_M.dtype)
        experts = chosen_ME.shape[-1]
        balance_M = experts * jnp.sum(chosen_ME * sums.shares_E, axis=-1) / jnp.square(tokens_M)
        square_M = sums.square_lse / tokens_M
        routers = len(self.layers)
        total = jnp.zeros((), tokens_M.dtype)
        for terms_M, coefficients in ((balance_M, self.balance), (square_M, self.z_loss)):
            if any(coefficients):
                total = total + jnp.sum(terms_M * jnp.asarray(coefficients, terms_M.dtype))
        metrics = {
            "balance_loss": jnp.mean(balance_M) * whole,
            "router_z_loss": jnp.mean(square_M) * whole,
        }
        load_ME = chosen_ME / jnp.maximum(jnp.sum(chosen_ME, axis=-1, keepdims=True), 1)
        load_ME = load_ME * weight.astype(load_ME.dtype)
        metrics |= {f"expert_load/{layer}": load_ME[m] for m, layer in enumerate(self.layers)}
        metrics = jax.tree.map(jax.lax.stop_gradient, metrics)
        return (total * whole / routers).astype(weight.dtype), metrics


def joined(parts: Sequence[tuple[int, Any, RouterSums]]) -> Routing | None:
    """One record of routers given one by one, in the order of their layers; None where there are none.

    Each comes as the number of its layer, the `Moe` that it belongs to, and its sums.
    """
    if not parts:
        return None
    return Routing(
        layers=tuple(layer for layer, _, _ in parts),
        balance=tuple(moe.aux_loss for _, moe, _ in parts),
        z_loss=tuple(moe.z_loss for _, moe, _ in parts),
        sums=jax.tree.map(lambda *each: jnp.stack(each), *(sums for _, _, sums in parts)),
    )
