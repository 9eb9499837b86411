"""The decoder that every family shares: embed, scan over blocks, norm, logits; a pure function."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mosaicjax.errors import InputError
from mosaicjax.kernels.flash_attention import ATTENTION, Implementation
from mosaicjax.kernels.grouped import PRODUCT
from mosaicjax.layers.block import Block
from mosaicjax.layers.context import KV, Context, RowOnly, dropout
from mosaicjax.layers.inits import InitRule, Kaiming
from mosaicjax.layers.linear import Multiplied, scores_of
from mosaicjax.layers.mlp import Mlp
from mosaicjax.layers.norm import LayerNorm, Norm, spread
from mosaicjax.layers.position import Position
from mosaicjax.layers.routing import RouterSums, Routing, joined
from mosaicjax.layers.token_inputs import TokenInput, Tokens, tokens_before
from mosaicjax.mesh import BATCH, GATHERED, gather_tree
from mosaicjax.spec import LAYER_KEY, ZEROS, Dims, Layers, Param, Spec, at_least_float32, stacked

VALUES = "values"
"""Of the names of value tables."""
VALUE_DIM = "sharded/values"
"""The values of all key heads together."""


class Remat(Enum):
    """What the backward pass keeps of a layer, and what it computes again.

    NONE keeps all activations, FULL only each layer's input; PRODUCTS keeps matrix products with weights and
    attention's output, so that single passes over activations alone are done again, DOTS the products with
    weights alone, QKV and ATTENTION the projections or attention's output, both named in the layers. No
    policy keeps gathered weights: they are gathered again.
    """

    NONE = "none"
    FULL = "full"
    PRODUCTS = "products"
    DOTS = "dots"
    QKV = "qkv"
    ATTENTION = "attention"

    @property
    def keeps_attention(self) -> bool:
        """Whether the backward pass need not run attention's forward kernel again."""
        return self in (Remat.NONE, Remat.PRODUCTS, Remat.ATTENTION)

    def wrap(self, function: Any) -> Any:
        """The function under this policy."""
        match self:
            case Remat.NONE:
                policy = _all_but_gathered
            case Remat.FULL:
                return jax.checkpoint(function, prevent_cse=False)
            case Remat.PRODUCTS:
                policy = jax.checkpoint_policies.save_from_both_policies(_products, _of(ATTENTION))
            case Remat.DOTS:
                policy = _products
            case Remat.QKV | Remat.ATTENTION:
                policy = _of(self.value)
        return jax.checkpoint(function, prevent_cse=False, policy=policy)


_of = jax.checkpoint_policies.save_only_these_names


def _named(primitive: Any, params: dict[str, Any], name: str) -> bool:
    """Whether a call of a function with its own gradient, which a policy sees from outside, holds a name."""
    if primitive.name != "custom_vjp_call":
        return False
    inner = params["call_jaxpr"].eqns
    return any(eqn.primitive.name == "name" and eqn.params["name"] == name for eqn in inner)


def _all_but_gathered(primitive: Any, *_: Any, **params: Any) -> bool:
    return not _named(primitive, params, GATHERED)


def _products(primitive: Any, *_: Any, **params: Any) -> bool:
    return _named(primitive, params, PRODUCT)


@dataclass(frozen=True)
class Stack:
    """`repeat` times the blocks of `block`, in turn; compiled once a block, whatever the repeat."""

    block: tuple[Block, ...]
    repeat: int

    @property
    def layers(self) -> int:
        """How many layers it is."""
        return len(self.block) * self.repeat


def stacks_of(blocks: Sequence[Block]) -> tuple[Stack, ...]:
    """Stacks for layers that may differ: one where they repeat in turn, else one a run of equal layers."""
    count = len(blocks)
    for period in range(1, count // 2 + 1):
        if count % period == 0 and all(blocks[i] == blocks[i % period] for i in range(count)):
            return (Stack(tuple(blocks[:period]), count // period),)
    runs: list[Stack] = []
    for block in blocks:
        if runs and runs[-1].block == (block,):
            runs[-1] = Stack((block,), runs[-1].repeat + 1)
        else:
            runs.append(Stack((block,), 1))
    return tuple(runs)


class Head(NamedTuple):
    """What reads logits off the residual stream.

    Shapes: `matrix_VD` [V, D]; `bias_V` [V] or None.
    """

    matrix_VD: Array | Multiplied
    bias_V: Array | None


@dataclass(frozen=True)
class Output:
    """What a forward pass gives.

    Shapes: `hidden_BLD` after the final norm; `rms_N` the root mean square of each layer's output, and
    `embed_rms` of the embeddings, where asked for. `routing` is None where no layer has experts.
    """

    hidden_BLD: Array
    kv: tuple[KV, ...]
    embed_rms: Array | None = None
    rms_N: Array | None = None
    routing: Routing | None = None


@dataclass(frozen=True)
class Decoder:
    """A decoder-only transformer.

    `stacks` run one after the other (a dense first layer is a stack of its own). `logit_scale` 1 and
    `softcap` 0 leave the logits alone; `inputs` are added to the embeddings in turn, `value_tables` is how
    many tables of value embeddings layers may name; `embedding_fraction` below 1 lets only that share of the
    gradient reach the embeddings; `tied` reads logits off the embedding table; `head_bias` adds a bias to
    them.

    Source: llm-foundry `MPTConfig` for the knobs; GLM-130B section 2.2 for `embedding_fraction`.
    """

    dims: Dims
    stacks: tuple[Stack, ...]
    norm: Norm = LayerNorm(bias=False)
    position: Position = Position()
    init: InitRule = Kaiming()
    tied: bool = True
    head_bias: bool = False
    logit_scale: float = 1.0
    softcap: float = 0.0
    embedding_fraction: float = 1.0
    embed_dropout: float = 0.0
    inputs: tuple[TokenInput, ...] = ()
    value_tables: int = 0
    remat: Remat = Remat.NONE

    @property
    def layers(self) -> int:
        """How many layers there are."""
        return sum(stack.layers for stack in self.stacks)

    def blocks(self) -> Iterator[tuple[int, int, Block, Layers]]:
        """Stack number, place in it, block, and the layers that it stands for."""
        first = 0
        for s, stack in enumerate(self.stacks):
            for b, block in enumerate(stack.block):
                yield s, b, block, Layers(first + b, len(stack.block), stack.repeat)
            first += stack.layers

    def with_attention(self, implementation: Implementation) -> Decoder:
        """The same with all attention computed so."""

        def block(block: Block) -> Block:
            return replace(block, attention=replace(block.attention, implementation=implementation))

        stacks = (replace(stack, block=tuple(map(block, stack.block))) for stack in self.stacks)
        return replace(self, stacks=tuple(stacks))

    @property
    def places(self) -> tuple[str, ...]:
        """What each number of a measured `Output` is of."""
        return ("the embeddings", *(f"layer {n}" for n in range(self.layers)))

    @property
    def drops(self) -> bool:
        """Whether anything is dropped out in training."""
        return self.embed_dropout > 0 or any(block.drops for _, _, block, _ in self.blocks())

    def spec(self) -> Spec:
        """Every weight, declared once."""
        table = Param(("vocab", "embed"), self.init.embedding())
        tree: dict[str, Any] = {
            "embed": {"tokens": table, **self.position.params(self.init.embedding())},
            "stacks": [[{} for _ in stack.block] for stack in self.stacks],
            "norm": self.norm.params(("embed",)),
        }
        tree["embed"] |= {part.name: part.params() for part in self.inputs}
        values = Param(("vocab", VALUE_DIM), self.init.matrix(("embed",)))
        tree["embed"] |= {f"{VALUES}{number}": values for number in range(self.value_tables)}
        for s, b, block, layers in self.blocks():
            tree["stacks"][s][b] = {LAYER_KEY: stacked(block.params(self.init, self.layers), layers)}
        if not self.tied:
            tree["head"] = Param(("vocab", "embed"), self.init.matrix(("embed",)))
        if self.head_bias:
            tree["head_bias"] = Param(("vocab",), ZEROS, decay=False)
        return Spec(tree, self.dims)

    def check(self, length: int) -> None:
        """Refuse sizes and knobs that cannot be.

        Raises:
            InputError: with the knob, expected and got.
        """
        for name, size in self.dims.items():
            if size < 1:
                raise InputError(f"model size {name!r}", expected="1 or more", got=size)
        if self.layers < 1 or any(stack.layers < 1 for stack in self.stacks):
            raise InputError("layers", expected="1 or more", got=[stack.layers for stack in self.stacks])
        for _, _, block, _ in self.blocks():
            block.attention.check(self.dims, length)
            block.norm.check()
            block.mlp.check(self.dims)
            if not 0 <= block.dropout < 1:
                raise InputError("residual dropout", expected="0 to below 1", got=block.dropout)
            if not 0 <= block.stochastic_depth < 1:
                raise InputError("stochastic_depth", expected="0 to below 1", got=block.stochastic_depth)
            if block.attention.value_table not in (None, *range(self.value_tables)):
                raise InputError(
                    "attention value_table",
                    expected=f"None, or the number of one of {self.value_tables} tables",
                    got=block.attention.value_table,
                )
        if len({part.name for part in self.inputs}) < len(self.inputs):
            raise InputError("inputs of the model", expected="each kind once", got=self.inputs)
        self.norm.check()
        self.position.check(length, self.dims["head_dim"])
        if not 0 < self.embedding_fraction <= 1:
            raise InputError("embedding_fraction", expected="above 0, at most 1", got=self.embedding_fraction)
        if not 0 <= self.embed_dropout < 1:
            raise InputError("embed_dropout", expected="0 to below 1", got=self.embed_dropout)
        if self.softcap < 0:
            raise InputError("softcap of the logits", expected="0 (none) or more", got=self.softcap)
        if self.logit_scale <= 0:
            raise InputError("logit_scale", expected="above 0", got=self.logit_scale)

    def embed(self, weights: Any, tokens_BL: Array, context: Context) -> Array:
        """Tokens as the first state of the residual stream, [B, L, D]."""
        params = self.spec().tree["embed"]
        read = [name for name in params if not name.startswith(VALUES)]
        table = gather_tree(
            {name: weights["embed"][name] for name in read},
            {name: params[name] for name in read},
            context.layout,
            context.dtypes,
        )
        # Its transpose keeps the scatter of gradients whole along embed; else the compiler would split that
        # dim first, and for it copy the residual stream's gradient to every device.
        tokens_VD = context.layout.constrain(table["tokens"], "vocab", None)
        # Whole rows first: else the compiler would gather the table.
        x_BLD = context.layout.constrain(
            jnp.take(tokens_VD, tokens_BL, axis=0, mode="clip"), BATCH, None, None
        )
        if self.inputs:
            x_BLD = self._with_inputs(table, tokens_VD, x_BLD, tokens_BL, context)
        x_BLD = self.position.embed(table, x_BLD, context.positions_BL)
        if self.embedding_fraction != 1.0:
            share = self.embedding_fraction
            x_BLD = x_BLD * share + jax.lax.stop_gradient(x_BLD) * (1.0 - share)
        return context.constrain(dropout(x_BLD, self.embed_dropout, context.for_layer(0), place=0))

    def _with_inputs(
        self, table: Any, tokens_VD: Array, x_BLD: Array, tokens_BL: Array, context: Context
    ) -> Array:
        """The embeddings with what `inputs` add."""
        before_BL = tokens_before(tokens_BL, context)
        before_BLD = jnp.take(tokens_VD, jnp.maximum(before_BL, 0), axis=0, mode="clip")
        before_BLD = jnp.where(before_BL[..., None] >= 0, before_BLD, jnp.zeros_like(before_BLD))
        of = Tokens(tokens_BL, before_BL, context.layout.constrain(before_BLD, BATCH, None, None))
        for part in self.inputs:
            x_BLD = part.apply(table[part.name], x_BLD, of, context)
        return x_BLD

    def _value_tables(self, weights: Any, context: Context) -> tuple[Array, ...]:
        """Each table's entries for the tokens, [B, L, K, C]."""
        assert context.tokens_BL is not None
        tree, found = self.spec().tree["embed"], []
        for number in range(self.value_tables):
            name = f"{VALUES}{number}"
            whole = gather_tree(weights["embed"][name], tree[name], context.layout, context.dtypes)
            whole = context.layout.constrain(whole, "vocab", None)
            entries = jnp.take(whole, context.tokens_BL, axis=0, mode="clip")
            by_head = entries.reshape(*entries.shape[:2], self.dims["kv_heads"], self.dims["head_dim"])
            found.append(context.layout.constrain(by_head, BATCH, None, "kv_heads", None))
        return tuple(found)

    def hidden(
        self,
        weights: Any,
        x_BLD: Array,
        context: Context,
        kv: tuple[KV, ...] | None = None,
        measure: bool = False,
    ) -> Output:
        """The residual stream after every layer and the final norm.

        `kv` holds one `KV` a block of `blocks()`, whose layers are numbered from 0 within it; None trains.

        Shapes: x [B, L, D], already embedded.
        """
        embed_rms = _rms(x_BLD) if measure else None
        context = replace(context, first_BLD=x_BLD, values=self._value_tables(weights, context))
        kept: list[KV] = list(kv) if kv is not None else []
        rms: list[Array] = []
        routed: list[tuple[int, Mlp, RouterSums]] = []
        done, first = 0, 0
        tree = self.spec().tree
        for s, stack in enumerate(self.stacks):
            mine = (
                tuple(kept[done : done + len(stack.block)]) if kv else tuple(RowOnly() for _ in stack.block)
            )
            x_BLD, mine, measured, sums = self._run(
                stack, tree["stacks"][s], weights["stacks"][s], x_BLD, context, mine, first, measure
            )
            kept[done : done + len(stack.block)] = mine
            routed += [
                (first + turn * len(stack.block) + b, block.mlp, jax.tree.map(itemgetter(turn), sums[b]))
                for turn in range(stack.repeat)
                for b, block in enumerate(stack.block)
                if sums[b] is not None
            ]
            done, first = done + len(stack.block), first + stack.layers
            rms.append(measured)
        norm = gather_tree(weights["norm"], tree["norm"], context.layout, context.dtypes)
        # Whole rows again: a loss may take them by chunks.
        x_BLD = context.whole(self.norm.apply(norm, x_BLD, context.dtypes))
        return Output(
            x_BLD, tuple(kept), embed_rms, jnp.concatenate(rms) if measure else None, joined(routed)
        )

    def _run(
        self,
        stack: Stack,
        params: Any,
        weights: Any,
        x_BLD: Array,
        context: Context,
        kv: tuple[KV, ...],
        first: int,
        measure: bool,
    ) -> tuple[Array, tuple[KV, ...], Array, tuple[Any, ...]]:
        """One stack, scanned over its repeats; measured RMS is [layers] or empty.

        Last, what each block's router did in all repeats.
        """

        def repeat(carry: tuple[Array, tuple[KV, ...]], at: tuple[Any, Array]) -> tuple[Any, Any]:
            x_BLD, kv = carry
            slices, turn = at
            carried, rms, routed = [], [], []
            for b, block in enumerate(stack.block):
                with jax.named_scope(f"block{b}"):
                    whole = gather_tree(
                        slices[b][LAYER_KEY], params[b][LAYER_KEY], context.layout, context.dtypes
                    )
                    number = first + turn * len(stack.block) + b
                    mine = context.for_layer(1 + number)
                    if block.stochastic_depth:
                        mine = replace(mine, depth=number / max(self.layers - 1, 1))
                    x_BLD, held, sums = block.apply(whole, x_BLD, mine, kv[b], turn)
                carried.append(held)
                routed.append(sums)
                rms.append(_rms(x_BLD) if measure else jnp.zeros((0,)))
            return (x_BLD, tuple(carried)), (jnp.stack(rms), tuple(routed))

        (x_BLD, kv), (rms, routed) = jax.lax.scan(
            self.remat.wrap(repeat), (x_BLD, kv), (weights, jnp.arange(stack.repeat))
        )
        return x_BLD, kv, rms.reshape(-1), routed

    def head(self, weights: Any, context: Context) -> Head:
        """What reads logits off the residual stream, whole."""
        tree = self.spec().tree
        names = {"matrix": "head"} | ({"bias": "head_bias"} if self.head_bias else {})
        params = {part: tree.get(name, tree["embed"]["tokens"]) for part, name in names.items()}
        mine = {part: weights.get(name, weights["embed"]["tokens"]) for part, name in names.items()}
        whole = gather_tree(mine, params, context.layout, context.dtypes)
        return Head(whole["matrix"], whole.get("bias"))

    def logits(self, head: Head, hidden_BLD: Array, context: Context) -> Array:
        """Scores of the next token, [B, L, V], in the reduce dtype."""
        logits_BLV = scores_of(hidden_BLD, head.matrix_VD, context.dtypes.reduce)
        if head.bias_V is not None:
            logits_BLV = logits_BLV + spread(head.bias_V, logits_BLV)
        if self.logit_scale != 1.0:
            logits_BLV = logits_BLV * self.logit_scale
        if self.softcap:
            logits_BLV = self.softcap * jnp.tanh(logits_BLV / self.softcap)
        return context.layout.constrain(logits_BLV, BATCH, None, "vocab")


def _rms(x: Array) -> Array:
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(at_least_float32(x.dtype)))))
