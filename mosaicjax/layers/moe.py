"""A mixture of experts: each token goes through a few of many MLPs, and none is ever dropped."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from mosaicjax.errors import InputError
from mosaicjax.kernels.grouped import Grouped, grouped
from mosaicjax.layers.context import Context
from mosaicjax.layers.inits import InitRule
from mosaicjax.layers.mlp import Activation, Glu, Mlp
from mosaicjax.layers.routing import RouterSums, router_sums
from mosaicjax.mesh import BATCH, Layout
from mosaicjax.spec import Dims, Param, at_least_float32


@dataclass(frozen=True)
class Moe(Mlp):
    """A router and the dim `experts` of MLPs, of which each token takes the `top_k` likeliest.

    The output is the sum of theirs, weighted by the softmax over all experts, with `renormalise` divided by
    what the taken ones have of it. With `gated` each expert is a `Glu`, else an `Mlp`. There is no capacity:
    tokens are sorted by expert and multiplied group by group, by what `grouped` names. Router weights, logits
    and softmax are float32 or wider. `aux_loss` and `z_loss` are the coefficients with which the objective
    holds the losses of `Routing.losses`.

    Source: Shazeer et al. 2017, arXiv 1701.06538; Mixtral, arXiv 2401.04088; no capacity: MegaBlocks, arXiv
    2211.15841.
    """

    activation: Activation = Activation.SILU
    gated: bool = True
    top_k: int = 2
    renormalise: bool = True
    grouped: Grouped = Grouped.RAGGED_DOT
    aux_loss: float = 0.0
    z_loss: float = 0.0

    @property
    def inputs(self) -> tuple[str, ...]:
        """See `Mlp.inputs`."""
        return self._expert().inputs

    @property
    def read_by_stream(self) -> tuple[str, ...]:
        """None: the gradient of an expert's part needs what the expert gave."""
        return ()

    def combine(self, read: dict[str, Array]) -> Array:
        """See `Mlp.combine`."""
        return self._expert().combine(read)

    def _expert(self) -> Mlp:
        return Glu(self.activation) if self.gated else Mlp(self.activation)

    def check(self, dims: Dims) -> None:
        """See `Mlp.check`."""
        if "experts" not in dims:
            raise InputError(
                "a Moe layer in a model without experts", fix="give the model's experts a number"
            )
        if not 1 <= self.top_k <= dims["experts"]:
            raise InputError("top_k", expected=f"1 to the {dims['experts']} experts", got=self.top_k)
        for name in ("aux_loss", "z_loss"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} of the router", expected="0 or more", got=getattr(self, name))

    def active(self, dims: Dims) -> float:
        """See `Mlp.active`."""
        return self.top_k / dims["experts"]

    def params(self, init: InitRule, layers: int) -> dict[str, Any]:
        """See `Mlp.params`; every expert has the init of an MLP alone."""
        tree = {
            name: replace(param, axes=("experts", *param.axes))
            for name, param in super().params(init, layers).items()
        }
        tree["router"] = Param(("embed", "experts"), init.matrix(("embed",)), wide=True)
        return tree

    def apply(self, weights: dict[str, Any], x_BLD: Array, context: Context) -> Array:
        """See `Mlp.apply`."""
        return self.routed(weights, x_BLD, context)[0]

    def routed(
        self, weights: dict[str, Any], x_BLD: Array, context: Context
    ) -> tuple[Array, RouterSums | None]:
        """See `Mlp.routed`.

        Raises:
            InputError: devices that `grouped` does not run on.
        """
        _check_devices(self.grouped, context.layout)
        router_DE = weights["router"].astype(at_least_float32(weights["router"].dtype))
        with jax.named_scope("router"):
            # At its default precision a TPU would multiply float32 in bfloat16.
            logits_BLE = jnp.einsum(
                "BLD,DE->BLE", x_BLD.astype(router_DE.dtype), router_DE, precision=jax.lax.Precision.HIGHEST
            )
            logits_BLE = context.layout.constrain(logits_BLE, BATCH, None, None)
            shares_BLE = jax.nn.softmax(logits_BLE, axis=-1)
        with jax.named_scope("experts"):
            out_BLD, part_BLK, expert_BLK = self._on_shards(weights, x_BLD, shares_BLE, context)
        numbers_E = jnp.arange(shares_BLE.shape[-1], dtype=jnp.int32)
        taken_BLKE = expert_BLK[..., None] == numbers_E[None, None, None]
        if self.bias:
            part_BLE = jnp.sum(part_BLK[..., None] * taken_BLKE.astype(part_BLK.dtype), axis=2)
            bias_ED = weights["down_bias"].astype(part_BLE.dtype)
            out_BLD = out_BLD + jnp.einsum("BLE,ED->BLD", part_BLE, bias_ED).astype(out_BLD.dtype)
        return out_BLD, router_sums(logits_BLE, shares_BLE, jnp.any(taken_BLKE, axis=2), context)

    def _on_shards(
        self, weights: dict[str, Any], x_BLD: Array, shares_BLE: Array, context: Context
    ) -> tuple[Array, Array, Array]:
        """`_experts` by each batch shard on its tokens, and each tensor shard on its part of the mlp dim."""
        layout = context.layout
        names = [*self.inputs, "down", *(f"{name}_bias" for name in self.inputs if self.bias)]
        mine = {name: weights[name] for name in names}
        if layout.mesh.size == 1 and not layout.manual:
            return self._experts(mine, x_BLD, shares_BLE)
        # All axes that are left, of size 1 too: a kernel cannot be split by the compiler.
        manual = {"tensor"} if layout.manual else set(layout.mesh.axis_names)
        outside = tuple(name for name in layout.mesh.axis_names if name not in manual)
        axes = {"up": (None, None, "mlp"), "down": (None, "mlp", None), "up_bias": (None, "mlp")}
        axes |= {"gate": axes["up"], "gate_bias": axes["up_bias"]}
        split = layout.dim("mlp", skip=layout.batch_axes)
        places = {name: layout.partition(axes[name], skip=layout.batch_axes) for name in mine}
        rows = layout.partition((BATCH, None, None), skip=outside)

        def shard(mine: dict[str, Any], x_BLD: Array, shares_BLE: Array) -> tuple[Array, Array, Array]:
            out_BLD, part_BLK, expert_BLK = self._experts(mine, x_BLD, shares_BLE)
            return out_BLD[None], part_BLK, expert_BLK

        # Tensor shards give their parts side by side, and the sum over them is the compiler's: a sum in here
        # would be summed over them once more in the backward pass.
        run = jax.shard_map(
            shard,
            mesh=None if layout.manual else layout.mesh,
            in_specs=(places, rows, rows),
            out_specs=(P(split or None, *rows), rows, rows),
            axis_names=manual,
            check_vma=False,
        )
        parts_SBLD, part_BLK, expert_BLK = run(mine, x_BLD, shares_BLE)
        # jnp.sum would widen the parts, and with them what moves between the shards, forward and backward.
        out_BLD = parts_SBLD[0] if parts_SBLD.shape[0] == 1 else jax.lax.reduce_sum(parts_SBLD, axes=(0,))
        return context.constrain(out_BLD), part_BLK, expert_BLK

    def _experts(self, mine: dict[str, Any], x_BLD: Array, shares_BLE: Array) -> tuple[Array, Array, Array]:
        """What the experts give for these tokens, and which experts have which part of it, [B, L, K]."""
        experts, count = shares_BLE.shape[-1], math.prod(x_BLD.shape[:2])
        part_TK, expert_TK = jax.lax.top_k(shares_BLE.reshape(count, experts), self.top_k)
        if self.renormalise:
            part_TK = part_TK / jnp.sum(part_TK, axis=-1, keepdims=True)
        order = sorted_by(expert_TK.reshape(-1), experts)
        rows_RD = dispatch(x_BLD.reshape(count, -1), order, self.top_k)

        def read(name: str) -> Array:
            y_RF = grouped(rows_RD, mine[name], order.sizes_E, self.grouped)
            if self.bias:
                y_RF = y_RF + jnp.take(mine[f"{name}_bias"], order.group_R, axis=0)
            return checkpoint_name(y_RF, "mlp")

        hidden_RF = self.combine({name: read(name) for name in self.inputs})
        out_RD = grouped(hidden_RF, mine["down"], order.sizes_E, self.grouped)
        out_TKD = collect(out_RD, order).reshape(count, self.top_k, -1)
        out_TD = jnp.sum(out_TKD.astype(part_TK.dtype) * part_TK[..., None], axis=1)
        rows = (*x_BLD.shape[:2], self.top_k)
        return out_TD.astype(x_BLD.dtype).reshape(x_BLD.shape), part_TK.reshape(rows), expert_TK.reshape(rows)


def _check_devices(how: Grouped, layout: Layout) -> None:
    """A mesh that is only described has no devices to look at."""
    if isinstance(layout.mesh, jax.sharding.Mesh):
        how.check(layout.mesh.devices.flat[0].platform)


class Order(NamedTuple):
    """Rows sorted by group.

    `place_R` says which row stands at each place, `where_R` at which place each row stands, `group_R` the
    group of each place.

    Shapes: int32 [R], `sizes_E` int32 [E].
    """

    place_R: Array
    where_R: Array
    group_R: Array
    sizes_E: Array


def sorted_by(group_R: Array, groups: int) -> Order:
    """The rows of each group together, otherwise in the order they have."""
    rows = jnp.arange(group_R.shape[0], dtype=jnp.int32)
    group_R, place_R = jax.lax.sort((group_R.astype(jnp.int32), rows), num_keys=1, is_stable=True)
    _, where_R = jax.lax.sort((place_R, rows), num_keys=1)
    numbers_E = jnp.arange(groups, dtype=jnp.int32)
    sizes_E = jnp.sum(group_R[:, None] == numbers_E[None], axis=0, dtype=jnp.int32)
    return Order(place_R, where_R, group_R, sizes_E)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def dispatch(x_TD: Array, order: Order, copies: int) -> Array:
    """Tokens' rows in sorted order, `copies` of each token, [R, D].

    Either of this and `collect` is the other's transpose: gathers both ways, where the derivative of a gather
    would be a scatter.
    """
    return jnp.take(x_TD, order.place_R // copies, axis=0)


def _dispatch_forward(x_TD: Array, order: Order, copies: int) -> tuple[Array, Order]:
    return dispatch(x_TD, order, copies), order


def _dispatch_backward(copies: int, order: Order, grad_RD: Array) -> tuple[Array, None]:
    back_RD = jnp.take(grad_RD, order.where_R, axis=0)
    return jnp.sum(back_RD.reshape(-1, copies, grad_RD.shape[1]), axis=1), None


dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def collect(y_RD: Array, order: Order) -> Array:
    """Sorted rows back in tokens' order, each token's rows one after the other, [R, D]."""
    return jnp.take(y_RD, order.where_R, axis=0)


def _collect_forward(y_RD: Array, order: Order) -> tuple[Array, Order]:
    return collect(y_RD, order), order


def _collect_backward(order: Order, grad_RD: Array) -> tuple[Array, None]:
    return jnp.take(grad_RD, order.place_R, axis=0), None


collect.defvjp(_collect_forward, _collect_backward)
