"""Low-rank adaptation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import jax

from mosaicjax.adapters import RANK, Adapter
from mosaicjax.errors import InputError
from mosaicjax.methods.low_precision import Quantised
from mosaicjax.methods.patterns import matches
from mosaicjax.models.decoder import Decoder
from mosaicjax.program import DecoderLoss, Method, Program
from mosaicjax.spec import LAYER_KEY, ZEROS, FanIn, Param, Spec, is_param, path_name

A_GAIN = 1 / math.sqrt(3)
"""Of the spread of `a` at the start: the variance of PEFT's uniform numbers up to 1 / sqrt(fan-in)."""

ORDER = {
    "FreezeLayers": "LoRA freezes all weights, and FreezeLayers would freeze some of them once more",
    "WidthTransfer": "WidthTransfer sets how weights start and learn, which LoRA neither draws nor trains",
}
"""Methods that cannot be beside it, and why."""


@dataclass(frozen=True)
class LoRA(Method):
    """Train two small matrices beside each chosen weight, and leave all weights as they are.

    A weight W is used as W + `alpha` / `rank` * a b, with `rank` columns in a and rows in b; a starts as
    random numbers, b as zeros. `targets` are patterns of names, as in `FreezeLayers`, of matrices that layers
    multiply by: attention's and the MLP's, no experts', tables or norms. All layers of a stacked weight are
    adapted, or none.

    The weights are an argument of the step: no gradient of them is held, and the optimizer's state, the
    averages of `Ema` and `Swa` and the checkpoints are of the adapters alone. So a run needs `init_from`, and
    goes on, is evaluated, exported and generated from only while the weights that it began with are there:
    it remembers which checkpoint they were. `export` adds the adapters to the weights, or with `--adapter`
    writes them as PEFT reads them. Weights and adapters rest in `dtypes.param`. Of compute the weights' own
    gradients are saved, a third of their products; MFU still counts them.

    With `LowPrecision` the weights' products are rounded and the adapters' are not. `Ema` and `Swa` average a
    and b each by itself. It stands before `ScaleRates`, whose patterns then name `layer/0/attention/query/b`.
    There is no dropout. Optimizers that tell matrices by their axes (`Muon`) are refused, as are
    `FreezeLayers` and `WidthTransfer`.

    Source: Hu et al. 2021, arXiv 2106.09685; all matrices as targets: Dettmers et al. 2023, arXiv 2305.14314.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("*/attention/*", "*/mlp/*")

    @property
    def scale(self) -> float:
        """What the product of both matrices is multiplied by."""
        return self.alpha / self.rank

    def __call__(self, program: Program) -> Program:
        """See `Method`.

        Raises:
            InputError: knobs that cannot be, methods that it contradicts, or patterns of other weights.
        """
        if self.rank < 1 or not 0 < self.alpha < math.inf:
            raise InputError(
                "LoRA", expected="rank of 1 or more, alpha above 0", got=f"{self.rank}, {self.alpha:g}"
            )
        refined = program.refine(self)
        for name, why in ORDER.items():
            if name in program.applied:
                raise InputError(
                    why, expected=f"LoRA or {name}", got=" then ".join((*program.applied, "LoRA"))
                )
        if "ScaleRates" in program.applied:
            raise InputError(
                "LoRA after ScaleRates, whose patterns would be of weights that are not trained",
                fix="LoRA first",
            )
        if "DPO" in program.applied:
            raise InputError(
                "LoRA after DPO, which compares adapters with the weights that they stand on",
                fix="LoRA first",
            )
        loss = program.loss
        if isinstance(loss, DecoderLoss) and not isinstance(loss.decoder, Decoder | Quantised):
            raise InputError("LoRA of a module of one's own, whose products it does not know")
        spec = program.trainable
        return replace(refined, trainable=self.adapters(spec), frozen=spec)

    def adapters(self, spec: Spec) -> Spec:
        """The declarations of what is trained: a tree like the model's, with None where nothing is added.

        Raises:
            InputError: patterns that match no matrix, or some layers of a stacked one.
        """
        known = {name: param for name, param in spec.items() if summed_dims(name, param)}
        found = matches(Spec(known, spec.dims), self.targets, "LoRA.targets")
        chosen = {name for name, numbers in found.items() if any(number is not None for number in numbers)}
        for name in sorted(chosen):
            left = [place for place, number in enumerate(found[name]) if number is None]
            if left:
                raise InputError(
                    f"LoRA.targets: some layers of {name} alone",
                    expected="all layers of a stacked weight, or none",
                    got=f"all but places {', '.join(map(str, left))} of {len(found[name])}",
                )

        def beside(path: Any, param: Param) -> Adapter | None:
            return self.adapter(path_name(path), param) if path_name(path) in chosen else None

        tree = jax.tree_util.tree_map_with_path(beside, spec.tree, is_leaf=is_param)
        return Spec(tree, {**spec.dims, RANK: self.rank})

    def adapter(self, name: str, param: Param) -> Adapter:
        """The declarations of one adapter."""
        summed = summed_dims(name, param)
        into, out = param.axes[:summed], param.axes[summed:]
        a = replace(param, axes=(*into, RANK), init=FanIn(into, A_GAIN))
        b = replace(param, axes=(RANK, *out), init=ZEROS)
        return Adapter(a, b, self.scale, summed)


def summed_dims(name: str, param: Param) -> int:
    """Over how many of its first dims a layer's product with a weight sums; 0 for what is no such matrix.

    A matrix reads the residual stream or writes to it.
    """
    matrix = len(param.axes) > 1 and param.layers is not None and not param.wide
    if not matrix or f"/{LAYER_KEY}/" not in name or "experts" in param.axes:
        return 0
    if param.axes[0] == "embed":
        return 1
    return len(param.axes) - 1 if param.axes[-1] == "embed" else 0
