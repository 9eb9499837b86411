"""Products with a weight, and functions of single entries: what their gradients are computed from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from mosaicjax.adapters import Adapted
from mosaicjax.kernels.grouped import PRODUCT


class Product(Protocol):
    """How a matrix of rows and a weight are multiplied, forward and backward.

    Shapes: x [R, I], weight [I, O], the gradient of their product [R, O].
    """

    def forward(self, x_RI: Array, weight_IO: Array) -> Array:
        """The product, [R, O]; `linear` casts it to what was asked for."""
        ...

    def backward(self, x_RI: Array, weight_IO: Array, grad_RO: Array) -> tuple[Array, Array]:
        """The gradients of x and of the weight; `linear` casts them to the dtypes of these."""
        ...


@dataclass(frozen=True)
class Plain:
    """Products in the operands' own dtype.

    The gradients are written as products of matrices over all rows at once. Derived by transposition they
    reach XLA's CPU backend with the larger operand transposed element by element, at twice the time.
    """

    def forward(self, x_RI: Array, weight_IO: Array) -> Array:
        """See `Product.forward`."""
        return x_RI @ weight_IO

    def backward(self, x_RI: Array, weight_IO: Array, grad_RO: Array) -> tuple[Array, Array]:
        """See `Product.backward`."""
        x_grad = jax.lax.dot_general(grad_RO, weight_IO, (((1,), (1,)), ((), ())))
        weight_grad = jax.lax.dot_general(x_RI, grad_RO, (((0,), (0,)), ((), ())))
        return x_grad, weight_grad


@dataclass(frozen=True)
class Unkept(Plain):
    """Plain products that no remat policy keeps, since they are cheap to make again."""


PLAIN = Plain()
UNKEPT = Unkept()


@partial(jax.tree_util.register_dataclass, data_fields=("array",), meta_fields=("product",))
@dataclass(frozen=True)
class Multiplied:
    """A weight with a product of its own. `linear` and `scores_of` take it; nothing else does."""

    array: Array
    product: Product


def linear(x: Array, weight: Array | Multiplied | Adapted, summed: int = 1) -> Array:
    """Sum over the last `summed` dims of x and the first of the weight, and of its adapter if it has one.

    Shapes: x [..., *in], weight [*in, *out]; the result is [..., *out].
    """
    if isinstance(weight, Adapted):
        adapter = weight.adapter
        assert adapter.summed == summed, "an adapter is declared as its weight is used"
        added = _linear(linear(x, adapter.a, summed), adapter.b, 1, UNKEPT, x.dtype.name)
        return linear(x, weight.weight, summed) + added * jnp.asarray(adapter.scale, added.dtype)
    if isinstance(weight, Multiplied):
        return _linear(x, weight.array, summed, weight.product, x.dtype.name)
    return _linear(x, weight, summed, PLAIN, x.dtype.name)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _linear(x: Array, weight: Array, summed: int, product: Product, dtype: str) -> Array:
    rows, inner = x.shape[: x.ndim - summed], weight.shape[:summed]
    out = weight.shape[summed:]
    flat = product.forward(
        x.reshape(math.prod(rows), math.prod(inner)), weight.reshape(math.prod(inner), math.prod(out))
    )
    made = flat.astype(dtype).reshape(*rows, *out)
    return made if isinstance(product, Unkept) else checkpoint_name(made, PRODUCT)


def _forward(
    x: Array, weight: Array, summed: int, product: Product, dtype: str
) -> tuple[Array, tuple[Array, Array]]:
    return _linear(x, weight, summed, product, dtype), (x, weight)


def _backward(
    summed: int, product: Product, dtype: str, saved: tuple[Array, Array], grad: Array
) -> tuple[Array, Array]:
    x, weight = saved
    inner = math.prod(weight.shape[:summed])
    x_RI = x.reshape(-1, inner)
    grad_RO = grad.astype(x.dtype).reshape(x_RI.shape[0], -1)
    x_grad, weight_grad = product.backward(x_RI, weight.reshape(inner, -1), grad_RO)
    return (
        x_grad.astype(x.dtype).reshape(x.shape),
        weight_grad.astype(weight.dtype).reshape(weight.shape),
    )


_linear.defvjp(_forward, _backward)


def scores_of(x: Array, table: Array | Multiplied, dtype: str) -> Array:
    """The product of every row with every entry of a table, accumulated and returned in `dtype`.

    Backward, the gradient is cast to x's dtype before it is multiplied.

    Shapes: x [..., D], table [V, D]; the result is [..., V].
    """
    if isinstance(table, Multiplied):
        return _linear(x, table.array.T, 1, table.product, dtype)
    return _scores_of(x, table, dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _scores_of(x: Array, table: Array, dtype: str) -> Array:
    flat = jax.lax.dot_general(
        x.reshape(-1, x.shape[-1]), table, (((1,), (1,)), ((), ())), preferred_element_type=dtype
    )
    return flat.reshape(*x.shape[:-1], table.shape[0])


def _scores_forward(x: Array, table: Array, dtype: str) -> tuple[Array, tuple[Array, Array]]:
    return _scores_of(x, table, dtype), (x, table)


def _scores_backward(dtype: str, saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, table = saved
    grad_RV = grad.astype(x.dtype).reshape(-1, table.shape[0])
    x_RD = x.reshape(-1, x.shape[-1])
    table_grad = jax.lax.dot_general(grad_RV, x_RD, (((0,), (0,)), ((), ())))
    return (grad_RV @ table).reshape(x.shape), table_grad


_scores_of.defvjp(_scores_forward, _scores_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def from_inputs(function: Callable[..., Array], *inputs: Any) -> Array:
    """`function(*inputs)`, whose gradient is computed from the inputs alone.

    For functions that are cheaper to compute again than to hold the insides of: an exact GELU alone would
    keep two more arrays of its input's size for the backward pass.
    """
    return function(*inputs)


def _from_inputs_forward(function: Callable[..., Array], *inputs: Any) -> tuple[Array, tuple[Any, ...]]:
    return from_inputs(function, *inputs), inputs


def _from_inputs_backward(function: Callable[..., Array], inputs: tuple[Any, ...], grad: Array) -> Any:
    return jax.vjp(function, *inputs)[1](grad)


from_inputs.defvjp(_from_inputs_forward, _from_inputs_backward)
