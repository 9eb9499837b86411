"""Layer freezing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax

from mosaicjax.errors import InputError
from mosaicjax.methods.patterns import matches
from mosaicjax.program import Method, Program
from mosaicjax.spec import Layers, Param, Spec, is_param, path_name


@dataclass(frozen=True)
class FreezeLayers(Method):
    """Leave the weights whose names match a pattern as they were when the run began.

    `embed/*`, `layer/[0-3]/*`, `*/attention/*`: names are those of `mosaicjax show`, with a stacked weight's
    layers by number; of the layers of one stacked weight the frozen ones must be the first. Freezing the
    embedding freezes the head that is tied to it.

    Frozen weights have no gradient in memory and no optimizer state, which with AdamW in float32 saves 12 of
    16 bytes. Of compute only those weights' own gradients are saved, a third of their products, and where a
    stacked weight is frozen in part not even these: the loop over layers makes them for all, and joins the
    two parts anew for every microbatch. MFU still counts all of it.

    For language models it is a tool of fine-tuning, together with `init_from`: in pre-training from random
    weights frozen layers stay random. Composer freezes more and more layers during a run; here that takes
    several runs, each with the `init_from` of the one before.

    Source: Brock et al. 2017, arXiv 1706.04983 (layers frozen one after the other); Howard and Ruder 2018,
    arXiv 1801.06146 (the other way, in fine-tuning).
    """

    patterns: tuple[str, ...] = ()

    def __call__(self, program: Program) -> Program:
        """See `Method`."""
        if "LoRA" in program.applied:
            raise InputError(
                "LoRA freezes all weights, and FreezeLayers would freeze some of them once more",
                expected="LoRA or FreezeLayers",
                got=" then ".join((*program.applied, "FreezeLayers")),
            )
        if "ScaleRates" in program.applied:
            raise InputError(
                "FreezeLayers after ScaleRates, whose patterns would be of weights that are not trained",
                fix="FreezeLayers first",
            )
        program, spec = program.refine(self), program.trainable
        found = matches(spec, self.patterns, "FreezeLayers.patterns")
        counts = {name: _first_layers(name, numbers) for name, numbers in found.items()}

        def part(frozen: bool) -> Spec:
            def cut(path: Any, param: Param) -> Param | None:
                name = path_name(path)
                count, whole = counts[name], len(found[name])
                if count in (0, whole):
                    return param if (count == whole) is frozen else None
                assert param.layers is not None, "a weight of one name is frozen or not"
                return replace(param, layers=_cut(param.layers, count, frozen))

            tree = jax.tree_util.tree_map_with_path(cut, spec.tree, is_leaf=is_param)
            return Spec(tree, spec.dims)

        trainable, frozen = part(False), part(True)
        if not trainable.count():
            raise InputError("FreezeLayers leaves nothing to train", got=" ".join(self.patterns))
        return replace(program, trainable=trainable, frozen=frozen)


def _first_layers(name: str, numbers: list[int | None]) -> int:
    """How many of a weight's layers are frozen, which must be the first ones."""
    frozen = [number is not None for number in numbers]
    count = sum(frozen)
    if not all(frozen[:count]):
        raise InputError(
            f"FreezeLayers: the frozen layers of {name} are not its first ones",
            expected="all of its layers, or the first so many",
            got=f"places {', '.join(str(place) for place, each in enumerate(frozen) if each)}"
            f" of {len(frozen)}",
        )
    return count


def _cut(layers: Layers, count: int, first: bool) -> Layers:
    if first:
        return replace(layers, count=count)
    return replace(layers, first=layers.first + count * layers.stride, count=layers.count - count)
