"""What to override so that a recipe's step fits a topology and costs least: found by compiling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mosaicjax.errors import InputError
from mosaicjax.hardware import Price
from mosaicjax.mesh import REST, Mesh
from mosaicjax.models import flops
from mosaicjax.models.decoder import Decoder, Remat
from mosaicjax.plan.bill import Bill, bill
from mosaicjax.plan.topology import Topology
from mosaicjax.recipe import WHOLE, Recipe

GIB = 2**30


class Fitting:
    """A search over remat policies, cheapest first, microbatches, largest first, and ways to gather."""

    def __init__(
        self, topology: Topology, price: Price | None, cache: Path | None, say: Callable[[str], None]
    ) -> None:
        self.topology, self.price, self.cache, self.say = topology, price, cache, say

    def search(self, recipe: Recipe) -> tuple[Bill, list[str]]:
        """The bill of the recipe that fits, and the overrides that make it of the given one.

        The cheapest remat policy with which any microbatch fits, the largest of its microbatches, and of the
        compiler's gathers and explicit ones along the torus those with the shorter step.

        Raises:
            InputError: nothing fits; it says what the smallest needs.
        """
        least: Bill | None = None
        for policy in policies(recipe):
            mine = replace(recipe, model=_with_remat(recipe.model, policy))
            choices = microbatches(mine, self.topology)
            smallest = self.tried(replace(mine, microbatch=choices[0]))
            if smallest.compiled.fits:
                found = self.other_gathers(self.largest(mine, choices, smallest))
                return found, overrides(recipe, found.recipe)
            if least is None or smallest.compiled.needed < least.compiled.needed:
                least = smallest
        assert least, "there is a policy"
        raise InputError(
            f"nothing fits {self.topology.title}",
            expected=f"at most {least.compiled.available / GIB:.2f} GiB a chip",
            got=f"{least.compiled.needed / GIB:.2f} GiB with {' '.join(overrides(recipe, least.recipe))}",
            fix="a larger topology, or a smaller model",
        )

    def largest(self, recipe: Recipe, choices: list[int], smallest: Bill) -> Bill:
        """The bill of the largest microbatch that fits; the first of the choices is known to."""
        best, low, high = smallest, 0, len(choices)
        while high - low > 1:
            middle = (low + high) // 2
            found = self.tried(replace(recipe, microbatch=choices[middle]))
            if found.compiled.fits:
                best, low = found, middle
            else:
                high = middle
        return best

    def other_gathers(self, found: Bill) -> Bill:
        """The same, or with another way to gather weights, whichever has the shorter step."""
        mesh = found.recipe.mesh
        if mesh.data != 1 or mesh.tensor != 1 or mesh.fsdp != (REST,) or self.topology.slices > 1:
            return found
        along = tuple(side for side in self.topology.grid if side > 1)
        # Sums in the compute dtype, as the compiler's own are.
        other = Mesh(fsdp=along, gather="explicit", sums="compute", rules=mesh.rules)
        tried = self.tried(replace(found.recipe, mesh=other))
        return tried if tried.compiled.fits and tried.seconds < found.seconds else found

    def tried(self, recipe: Recipe) -> Bill:
        """One recipe's bill, with a line on it."""
        found = bill(recipe, self.topology, price=self.price, cache=self.cache)
        compiled = found.compiled
        how = f"{compiled.needed / GIB:.2f} GiB a chip" + ("" if compiled.fits else ", too many")
        step = f", {found.seconds:.3f} s a step" if compiled.fits else ""
        self.say(
            f"tried     remat {_remat(recipe.model).name}, microbatch {recipe.microbatch:,},"
            f" gather {recipe.mesh.gather}: {how}{step}"
        )
        return found


def policies(recipe: Recipe) -> list[Remat]:
    """Remat policies by what they compute again, least first."""
    model = recipe.model.build()
    if not isinstance(model, Decoder):
        raise InputError("--fit chooses among remat policies; a module of one's own has none")

    def again(policy: Remat) -> float:
        return flops.recomputed(replace(model, remat=policy), recipe.seq).causal

    return sorted(Remat, key=again)


def microbatches(recipe: Recipe, topology: Topology) -> list[int]:
    """Rows at once that divide the batch and that the mesh can split, fewest first."""
    sizes = recipe.mesh.axes(topology.chips)
    shards = topology.chips // sizes["tensor"]
    found = [rows for rows in range(shards, recipe.batch + 1, shards) if recipe.batch % rows == 0]
    if not found:
        raise InputError(
            "the batch does not divide over the mesh",
            expected=f"a multiple of {shards} rows",
            got=recipe.batch,
            fix=f"--batch {-(-recipe.batch // shards) * shards}",
        )
    return found


def overrides(before: Recipe, after: Recipe) -> list[str]:
    """The words that make one recipe of the other on a command line."""
    words = []
    if (policy := _remat(after.model)) is not _remat(before.model):
        words += ["--model.remat", policy.name]
    rows = after.microbatch or after.batch
    if rows != (before.microbatch or before.batch):
        words += ["--microbatch", str(WHOLE if rows == after.batch else rows)]
    if after.mesh.gather != before.mesh.gather:
        words += ["--mesh.gather", after.mesh.gather]
    if after.mesh.sums != before.mesh.sums:
        words += ["--mesh.sums", after.mesh.sums]
    if after.mesh.fsdp != before.mesh.fsdp:
        words += ["--mesh.fsdp", *map(str, after.mesh.fsdp)]
    return words


def _remat(model: Any) -> Remat:
    """Of a family's configuration; all that build decoders have it."""
    found: Remat = model.remat
    return found


def _with_remat(model: Any, policy: Remat) -> Any:
    return replace(model, remat=policy)
