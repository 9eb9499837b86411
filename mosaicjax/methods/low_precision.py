"""Matrix products of 8-bit numbers in training, by qwix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array

from mosaicjax.adapters import Adapted
from mosaicjax.errors import InputError
from mosaicjax.layers.context import Context
from mosaicjax.layers.linear import PLAIN, Multiplied
from mosaicjax.models.decoder import Decoder, Head, Output
from mosaicjax.program import DecoderLoss, Method, Program
from mosaicjax.spec import Dims, Spec, at_least_float32, is_param, path_name

HEAD = "head"
"""The product that gives logits, whatever its weight is called: a tied one is the embedding table."""

Backward = Literal["compute", "inputs", "all"]
OPERANDS = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
GRADIENTS = {"int8": jnp.int8, "fp8": jnp.float8_e5m2}
LARGEST = {"int8": f"absmax,{127.5 / 127}", "fp8": "absmax"}
"""What qwix makes a scale of. By itself it maps the largest of integers to 127.5, from where the last bit of
the scale says whether -127 or -128 comes of it: here to 127."""


@dataclass(frozen=True)
class LowPrecision(Method):
    """Multiply 8-bit numbers with 8-bit numbers in the model's layers, and add up in 32 bits.

    Each row of activations and each column of a weight is divided by a scale of its own, which maps its
    largest entry to the largest number of the format, and rounded to the nearest; the product is multiplied
    by both scales. `dtype` is `int8`, or `fp8`: e4m3, and e5m2 for gradients. Rounding has the derivative 1.

    `backward` says which products of the backward pass are made so too: none (`compute`: all in the compute
    dtype, of operands that were never rounded), those that give the gradient of the layer's `inputs`, or
    `all`, those for the gradients of weights as well. Where it is so, the operand from the forward pass comes
    as it was rounded there.

    `only` are patterns of names of weights, as `mosaicjax show` lists them (`stacks/*/mlp/*`), or `head`, for
    the logits; all products of all layers by default. Norms, biases, embeddings, a router and attention's own
    products stay as they are. So do weights at rest, optimizer and checkpoints, and evaluation and
    generation, which are those of the model that is exported.

    With `all`, a weight's gradient depends in its rounding on which rows are together: on the microbatch, and
    with explicit gathers on the devices.

    Products take less time on chips with a higher peak for 8-bit numbers; rounding moves more over HBM. Which
    is more, `mosaicjax plan` says: of a 1.1B on v5e the rounding, or with the MLP's products alone neither
    (`benchmarks/low_precision.json`).

    Source: Jacob et al. 2018, arXiv 1712.05877 (straight through); Wortsman et al. 2023, arXiv 2304.13013
    (`inputs`); Micikevicius et al. 2022, arXiv 2209.05433 (formats of fp8).
    """

    dtype: Literal["int8", "fp8"] = "int8"
    backward: Backward = "inputs"
    only: tuple[str, ...] = ("stacks/*",)

    def __call__(self, program: Program) -> Program:
        """See `Method`.

        Raises:
            InputError: knobs that cannot be, no qwix, a model or a loss of one's own, or patterns of what
                cannot be multiplied so.
        """
        for name, known in (("dtype", tuple(OPERANDS)), ("backward", get_args(Backward))):
            if getattr(self, name) not in known:
                raise InputError(f"LowPrecision.{name}", expected=" or ".join(known), got=getattr(self, name))
        try:
            import qwix  # noqa: F401 found out before any device starts
        except ImportError:
            raise InputError("LowPrecision needs qwix", fix="pip install 'mosaicjax[quant]'") from None
        loss = program.loss
        if not isinstance(loss, DecoderLoss):
            raise InputError(
                "LowPrecision after a method that brings a loss of its own",
                got=" then ".join((*program.applied, "LowPrecision")),
                fix="list LowPrecision before it",
            )
        if not isinstance(loss.decoder, Decoder):
            raise InputError("LowPrecision of a module of one's own, whose products it does not know")
        names = frozenset(chosen(loss.decoder, self.only))
        model = Quantised(loss.decoder, Rounded(self.dtype, self.backward), names)
        return program.refine(self, loss=replace(loss, decoder=model))


def products(decoder: Decoder) -> Iterator[tuple[str, bool]]:
    """Names of the weights that layers multiply by, and whether these are experts'; last, the head's."""
    for name, param in decoder.spec().items():
        # A matrix reads the residual stream or writes to it; biases and norms of heads do neither.
        matrix = len(param.axes) > 1 and "embed" in param.axes and not param.wide
        if name.startswith("stacks/") and matrix:
            yield name, "experts" in param.axes
    yield HEAD, False


def chosen(decoder: Decoder, patterns: tuple[str, ...]) -> list[str]:
    """The products that patterns name.

    Raises:
        InputError: a pattern that names none, or experts' products.
    """
    known = dict(products(decoder))
    if not patterns:
        raise InputError("LowPrecision.only", expected="patterns of some products", got="none")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise InputError(
                f"LowPrecision.only: no product is called {pattern!r}", expected=f"some of {', '.join(known)}"
            )
    names = [name for name in known if any(fnmatchcase(name, pattern) for pattern in patterns)]
    experts = [name for name in names if known[name]]
    if experts:
        raise InputError(
            "LowPrecision does not reach experts' products",
            got=", ".join(experts),
            fix="LowPrecision(only=('stacks/*/attention/*',))",
        )
    return names


@dataclass(frozen=True)
class Rounded:
    """A `Product` of 8-bit numbers; see `LowPrecision`."""

    dtype: str
    backward_in: Backward

    def forward(self, x_RI: Array, weight_IO: Array) -> Array:
        """See `Product.forward`; float32 or wider."""
        x, weight = self._operands(x_RI, weight_IO)
        return _dot(x, weight, (1, 0), x.scale.dtype)

    def backward(self, x_RI: Array, weight_IO: Array, grad_RO: Array) -> tuple[Array, Array]:
        """See `Product.backward`."""
        if self.backward_in == "compute":
            return PLAIN.backward(x_RI, weight_IO, grad_RO)
        x, weight = self._operands(x_RI, weight_IO)
        # The operands' scales lie along the dim that is summed over here: they go into the gradient.
        wide_RO = grad_RO.astype(at_least_float32(grad_RO.dtype))
        x_grad = _dot(self._gradient(wide_RO * weight.scale, 0), weight.qvalue, (1, 1), wide_RO.dtype)
        if self.backward_in == "inputs":
            return x_grad, PLAIN.backward(x_RI, weight_IO, grad_RO)[1]
        return x_grad, _dot(x.qvalue, self._gradient(wide_RO * x.scale, 1), (0, 0), wide_RO.dtype)

    def _operands(self, x_RI: Array, weight_IO: Array) -> tuple[Any, Any]:
        kind, largest = OPERANDS[self.dtype], LARGEST[self.dtype]
        # As it is: XLA would keep what it is made of in float32, which the scale and the quotient both read.
        x_RI = jax.lax.optimization_barrier(x_RI)
        return _rounded(x_RI, kind, largest, 0), _rounded(weight_IO, kind, largest, 1)

    def _gradient(self, grad_RO: Array, dim: int) -> Any:
        return _rounded(grad_RO, GRADIENTS[self.dtype], LARGEST[self.dtype], dim)


def _rounded(matrix: Array, kind: Any, largest: str, dim: int) -> Any:
    """A matrix as qwix's array of 8-bit numbers, with a scale for each place along `dim`."""
    import qwix

    # In bfloat16 a quotient would be rounded before it is rounded.
    wide = matrix.astype(at_least_float32(matrix.dtype))
    return qwix.quantize(wide, kind, channelwise_axes=(dim,), calibration_method=largest)


def _dot(left: Any, right: Any, summed: tuple[int, int], dtype: Any) -> Array:
    """qwix's product, summed over a dim of each, in a dtype; integers are added up in int32."""
    import qwix

    numbers = (((summed[0],), (summed[1],)), ((), ()))
    # qwix multiplies sums of integers by scales, which strict promotion (our tests') refuses.
    with jax.numpy_dtype_promotion("standard"):
        out: Array = qwix.dot_general(left, right, numbers, preferred_element_type=dtype)
        return out


@dataclass(frozen=True)
class Quantised:
    """A decoder some of whose products are made otherwise: a `Model` of the same weights."""

    decoder: Decoder
    product: Rounded
    names: frozenset[str]

    @property
    def dims(self) -> Dims:
        """See `Model.dims`."""
        return self.decoder.dims

    @property
    def drops(self) -> bool:
        """See `Model.drops`."""
        return self.decoder.drops

    @property
    def places(self) -> tuple[str, ...]:
        """See `Model.places`."""
        return self.decoder.places

    def spec(self) -> Spec:
        """See `Model.spec`."""
        return self.decoder.spec()

    def check(self, length: int) -> None:
        """See `Model.check`."""
        self.decoder.check(length)

    def embed(self, weights: Any, tokens_BL: Array, context: Context) -> Array:
        """See `Model.embed`."""
        return self.decoder.embed(weights, tokens_BL, context)

    def hidden(self, weights: Any, x: Array, context: Context, *, measure: bool = False) -> Output:
        """See `Model.hidden`."""

        def marked(path: Any, _: Any, weight: Any) -> Any:
            if path_name(path) not in self.names:
                return weight
            if isinstance(weight, Adapted):
                return replace(weight, weight=Multiplied(weight.weight, self.product))
            return Multiplied(weight, self.product)

        tree = self.spec().tree
        weights = jax.tree_util.tree_map_with_path(marked, tree, weights, is_leaf=is_param)
        return self.decoder.hidden(weights, x, context, measure=measure)

    def head(self, weights: Any, context: Context) -> Head:
        """See `Model.head`."""
        head = self.decoder.head(weights, context)
        if HEAD not in self.names:
            return head
        assert isinstance(head.matrix_VD, Array), "the decoder's own head is plain"
        return head._replace(matrix_VD=Multiplied(head.matrix_VD, self.product))

    def logits(self, head: Head, hidden: Array, context: Context) -> Array:
        """See `Model.logits`."""
        return self.decoder.logits(head, hidden, context)
