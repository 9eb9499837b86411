"""The device mesh, the rules from a tensor's dims to mesh axes, and how a sharded weight becomes usable."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import jax
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mosaicjax.adapters import RANK, Adapted, Adapter
from mosaicjax.errors import InputError
from mosaicjax.spec import Dtypes, Param, Spec

REST = -1
"""As many devices as the other axes leave."""

GATHERED = "gathered"
"""What a remat policy may call the weights that `gather` made whole."""

LENGTH = "length"
"""The logical axis of a row's tokens, where each is worked on alone: sharded over tensor shards."""

BATCH = "batch"
"""The logical axis of rows: sharded over every axis that holds other data."""

Rules = Mapping[str, Literal["fsdp", "tensor", "none"]]

WEIGHT_RULES: Rules = {
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "buckets": "tensor",
    "head_dim": "none",
    "length": "tensor",
    "position": "none",
    "experts": "none",
    RANK: "none",
    "layers": "none",
    "sharded": "fsdp",
    "whole": "none",
}
"""Where named dims go. A name such as `sharded/768`, unless it has a rule, goes where its first part does."""


@dataclass(frozen=True)
class Mesh:
    """How devices are laid out, as a recipe says it.

    `data` copies the model; `fsdp` shards weights and optimizer state and also splits the batch (several
    numbers lay it over several mesh axes, to follow a torus); `tensor` splits heads, MLP and vocabulary, and
    the residual stream along its rows where their length divides (`rules={"length": "none"}`: it does not).
    One of them may be `REST`. `gather` says who makes a sharded weight whole: the `compiler`, from a
    sharding constraint, or an `explicit` all-gather forward and reduce-scatter backward, whose `sums` go
    over the links in the reduce dtype or, in half the bytes, in the compute dtype (which the compiler
    chooses anyway). `rules` overrides where a named dim of the weights goes (e.g. `{"kv_heads": "none"}`
    for fewer key heads than tensor shards).
    """

    data: int = 1
    fsdp: tuple[int, ...] = (REST,)
    tensor: int = 1
    gather: Literal["compiler", "explicit"] = "compiler"
    rules: Mapping[str, Literal["fsdp", "tensor", "none"]] = field(default_factory=dict)
    sums: Literal["reduce", "compute"] = "reduce"

    def axes(self, devices: int) -> dict[str, int]:
        """Mesh axis names and sizes for a number of devices.

        Raises:
            InputError: the sizes do not multiply to the number of devices.
        """
        if not self.fsdp:
            raise InputError(
                "mesh.fsdp is empty", expected="at least one size", fix="fsdp=(1,) shards nothing"
            )
        names = ["fsdp"] if len(self.fsdp) == 1 else [f"fsdp{i}" for i in range(len(self.fsdp))]
        sizes = dict(zip(["data", *names, "tensor"], [self.data, *self.fsdp, self.tensor], strict=True))
        wrong = {name: size for name, size in sizes.items() if size < 1 and size != REST}
        if wrong or list(sizes.values()).count(REST) > 1:
            raise InputError("mesh sizes", expected="positive numbers, at most one REST (-1)", got=sizes)
        known = math.prod(size for size in sizes.values() if size != REST)
        sizes = {name: devices // known if size == REST else size for name, size in sizes.items()}
        if math.prod(sizes.values()) != devices:
            raise InputError(
                "the mesh does not match the devices",
                expected=f"axes that multiply to {devices}",
                got=" x ".join(f"{name} {size}" for name, size in sizes.items()),
                fix="set mesh.data, mesh.fsdp and mesh.tensor, one of them -1 (the rest)",
            )
        return sizes

    def build(self, devices: Sequence[jax.Device]) -> Layout:
        """Lay the devices out, in the order that suits their links."""
        sizes = self.axes(len(devices))
        mesh = jax.make_mesh(
            tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices
        )
        return self.layout(mesh)

    def layout(self, mesh: Any) -> Layout:
        """What goes where on devices that are laid out already, or on an abstract mesh."""
        return Layout(mesh, self.all_rules(), explicit=self.gather == "explicit", sums=self.sums)

    def all_rules(self) -> Rules:
        """The rules of weights with this mesh's own over them."""
        return {**WEIGHT_RULES, **self.rules}


def fsdp(**others: Any) -> Mesh:
    """All devices shard weights and batch."""
    return Mesh(fsdp=(REST,), **others)


@dataclass(frozen=True)
class Layout:
    """A mesh of real (or described) devices and what goes where on it.

    `manual` is true inside `shard_map` over the batch axes, where arrays are this shard's.
    """

    mesh: jax.sharding.Mesh
    rules: Rules
    explicit: bool
    manual: bool = False
    sums: Literal["reduce", "compute"] = "reduce"

    @property
    def fsdp_axes(self) -> tuple[str, ...]:
        """Mesh axes that weights are sharded over, major first."""
        return tuple(name for name in self.mesh.axis_names if name.startswith("fsdp"))

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """Mesh axes that rows are split over, major first."""
        return ("data", *self.fsdp_axes)

    @property
    def batch_shards(self) -> int:
        """Into how many parts a batch is split."""
        return math.prod(self.mesh.shape[name] for name in self.batch_axes)

    @property
    def weight_shards(self) -> int:
        """Into how many parts the weights are split."""
        return math.prod(self.mesh.shape[name] for name in (*self.fsdp_axes, "tensor"))

    def dim(self, axis: str | None, skip: tuple[str, ...] = ()) -> tuple[str, ...]:
        """Mesh axes of one named dim; `skip` leaves mesh axes out."""
        if axis is None:
            names: tuple[str, ...] = ()
        elif axis == BATCH:
            names = self.batch_axes
        else:
            rule = self.rules.get(axis) or self.rules.get(axis.partition("/")[0])
            if rule is None:
                raise InputError(
                    f"no rule says where the dim {axis!r} goes",
                    expected=sorted(self.rules),
                    fix=f"mesh.rules {{{axis!r}: 'none'}} (or 'fsdp', 'tensor')",
                )
            names = {"fsdp": self.fsdp_axes, "tensor": ("tensor",), "none": ()}[rule]
        return tuple(name for name in names if name not in skip)

    def partition(self, axes: Sequence[str | None], skip: tuple[str, ...] = ()) -> P:
        """The partition of a tensor whose dims are named.

        Raises:
            InputError: two dims want one mesh axis.
        """
        dims = [self.dim(axis, skip) for axis in axes]
        used = [name for names in dims for name in names]
        if len(used) != len(set(used)):
            raise InputError(f"two dims of {tuple(axes)} want the same mesh axis", got=dims)
        return P(*(names if len(names) > 1 else (names[0] if names else None) for names in dims))

    def weight_partition(self, param: Param, skip: tuple[str, ...] = ()) -> P:
        """The partition of a weight at rest; the layers' dimension is never sharded."""
        return self.partition(((None,) if param.layers else ()) + param.axes, skip)

    def weight_sharding(self, param: Param) -> NamedSharding:
        """Where a weight rests."""
        return NamedSharding(self.mesh, self.weight_partition(param))

    def sharding(self, *axes: str | None) -> NamedSharding:
        """Where a tensor with named dims lies."""
        return NamedSharding(self.mesh, self.partition(axes))

    def constrain(self, x: Array, *axes: str | None) -> Array:
        """Ask the compiler to keep an activation split so.

        Shapes: one name (or None) a dimension of `x`.
        """
        if self.manual:
            return jax.lax.with_sharding_constraint(x, self.partition(axes, skip=self.batch_axes))
        return jax.lax.with_sharding_constraint(x, self.sharding(*axes))

    def inside(self) -> Layout:
        """This layout as seen from within `shard_map` over the batch axes."""
        return replace(self, manual=True)

    def check(self, spec: Spec) -> None:
        """Refuse weights that do not divide, before anything is allocated.

        Raises:
            InputError: with the weight, its dim and the mesh axes.
        """
        for name, param in spec.items():
            for axis in param.axes:
                shards = math.prod(self.mesh.shape[mesh_axis] for mesh_axis in self.dim(axis))
                if spec.dims[axis] % shards:
                    raise InputError(
                        f"{name}: the dim {axis!r} does not divide over the mesh",
                        expected=f"a multiple of {shards} ({' x '.join(self.dim(axis))})",
                        got=spec.dims[axis],
                        fix=f"another size or mesh, or mesh.rules {{{axis!r}: 'none'}} to copy it",
                    )


def shardings(spec: Spec, layout: Layout) -> Any:
    """A tree like the spec's, of where each weight rests."""
    return spec.map(layout.weight_sharding)


def gather(weight: Array, param: Param, layout: Layout, dtypes: Dtypes) -> Array:
    """A weight ready for use: cast to the compute dtype, then whole along the fsdp axes.

    Backward, its gradient is cast to the reduce dtype (or what `Mesh.sums` says), summed over the devices
    that saw other rows and left where the weight rests, in the param dtype. The compiler may put its own
    sum before that cast, in the compute dtype; the explicit form does not. Within `shard_map` the sum over
    `data` is the caller's, once for all microbatches.

    Shapes: `weight` is one layer's (no layers' dimension), as is the result.
    """
    if param.wide:
        dtypes = replace(dtypes, compute=dtypes.reduce)
    return _gather(weight, Use(param.axes, layout, dtypes))


@dataclass(frozen=True, eq=False)
class Use:
    """What `gather` must know of a weight."""

    axes: tuple[str, ...]
    layout: Layout
    dtypes: Dtypes


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(weight: Array, use: Use) -> Array:
    layout = use.layout
    whole = weight.astype(use.dtypes.compute)
    if not layout.manual:
        # Held in place first: else the compiler gathers before the cast, and moves twice the bytes.
        whole = jax.lax.with_sharding_constraint(whole, layout.sharding(*use.axes))
        partition = layout.partition(use.axes, skip=layout.fsdp_axes)
        whole = jax.lax.with_sharding_constraint(whole, NamedSharding(layout.mesh, partition))
        return checkpoint_name(whole, GATHERED)

    def collect(whole: Array) -> Array:
        for dim, axis in enumerate(use.axes):
            for name in reversed(layout.dim(axis)):
                if name in layout.fsdp_axes:
                    whole = jax.lax.all_gather(whole, name, axis=dim, tiled=True)
        return whole

    return checkpoint_name(_on_tensor_shards(collect, whole, use), GATHERED)


def _on_tensor_shards(function: Callable[[Array], Array], x: Array, use: Use) -> Array:
    """Collectives over the fsdp axes, each tensor shard for itself.

    XLA cannot partition a collective within `shard_map` over an axis that is left to the compiler: it would
    copy the weight to all tensor shards first.
    """
    layout = use.layout
    if layout.mesh.shape["tensor"] == 1:
        return function(x)
    split = layout.partition(use.axes, skip=layout.batch_axes)
    on_shards = jax.shard_map(
        function, in_specs=split, out_specs=split, axis_names={"tensor"}, check_vma=False
    )
    return on_shards(x)


def _gather_forward(weight: Array, use: Use) -> tuple[Array, None]:
    return _gather(weight, use), None


def _gather_backward(use: Use, _: None, grad: Array) -> tuple[Array]:
    layout, dtypes = use.layout, use.dtypes
    grad = grad.astype(dtypes.compute if layout.manual and layout.sums == "compute" else dtypes.reduce)
    if not layout.manual:
        grad = jax.lax.with_sharding_constraint(grad, NamedSharding(layout.mesh, layout.partition(use.axes)))
        return (grad.astype(use.dtypes.param),)

    def collect(grad: Array) -> Array:
        left = list(layout.fsdp_axes)
        for dim, axis in enumerate(use.axes):
            for name in layout.dim(axis):
                if name in left:
                    grad = jax.lax.psum_scatter(grad, name, scatter_dimension=dim, tiled=True)
                    left.remove(name)
        return jax.lax.psum(grad, tuple(left)) if left else grad

    return (_on_tensor_shards(collect, grad, use).astype(use.dtypes.param),)


_gather.defvjp(_gather_forward, _gather_backward)


def gather_tree(weights: Any, params: Any, layout: Layout, dtypes: Dtypes) -> Any:
    """`gather` over a tree of weights, which may be wrapped each, and the tree of their declarations."""

    def whole(param: Param, weight: Any) -> Any:
        if isinstance(weight, Adapted):
            return Adapted(whole(param, weight.weight), beside(param, weight.adapter))
        return jax.tree.map(lambda leaf: gather(leaf, param, layout, dtypes), weight)

    def beside(param: Param, adapter: Adapter) -> Adapter:
        into, out = param.axes[: adapter.summed], param.axes[adapter.summed :]
        a = gather(adapter.a, replace(param, axes=(*into, RANK)), layout, dtypes)
        b = gather(adapter.b, replace(param, axes=(RANK, *out)), layout, dtypes)
        return replace(adapter, a=a, b=b)

    return jax.tree.map(whole, params, weights, is_leaf=lambda leaf: isinstance(leaf, Param))


def local_rows(layout: Layout, rows: int) -> list[int]:
    """Which of a batch's `rows` this process must read, in ascending order."""
    wanted: set[int] = set()
    for index in layout.sharding(BATCH).addressable_devices_indices_map((rows,)).values():
        assert index is not None, "an addressable device has a part"
        wanted.update(range(*index[0].indices(rows)))
    return sorted(wanted)


def global_array(layout: Layout, shape: tuple[int, ...], axes: Sequence[str | None], value: Any) -> Array:
    """A global array from a function of index slices, each process giving its own part."""
    return jax.make_array_from_callback(shape, layout.sharding(*axes), lambda index: np.asarray(value(index)))
