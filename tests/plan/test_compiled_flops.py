"""What the TPU compiler makes of recipes' steps, against counts by structure: the command, end to end."""

import pytest

from mosaicjax.plan.topology import compiler_there
from tests.plan.planned import planned

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not compiler_there(), reason="libtpu, the TPU compiler, is not installed"),
]

RECIPE = """
from mosaicjax.data.mixture import TokenStore
from mosaicjax.layers.attention import QkNorm
from mosaicjax.layers.mlp import Glu
from mosaicjax.layers.moe import Moe
from mosaicjax.kernels.grouped import Grouped
from mosaicjax.losses import CrossEntropy
from mosaicjax.mesh import Mesh
from mosaicjax.models import gptj, llama, mixtral, mpt
from mosaicjax.models.decoder import Remat
from mosaicjax.recipe import Recipe

recipe = Recipe(
    model={model}, data=TokenStore("none", isolate={isolate}), seq=512, batch=16, steps=100, {more}
)
"""

SMALL = "layers=4, embed=256, heads=4, vocab=1024"
CASES = {
    "mpt, full remat, logits by chunks, two microbatches": (
        f"mpt.Config({SMALL}, mlp=1024, remat=Remat.FULL)",
        False,
        "loss=CrossEntropy(chunk=128), microbatch=8",
    ),
    "mpt, blocks in turn, all products kept": (
        f"mpt.Config({SMALL}, mlp=640, kv_heads=2, windows=(0, 100), remat=Remat.PRODUCTS)",
        False,
        "",
    ),
    "mpt, a gate, products kept, explicit gathers": (
        f"mpt.Config({SMALL}, mlp=640, ffn=Glu(), tied=False, remat=Remat.DOTS)",
        False,
        "mesh=Mesh(fsdp=(2, 2), gather='explicit')",
    ),
    "llama, packed rows, projections kept": (
        f"llama.Config({SMALL}, mlp=640, kv_heads=2, remat=Remat.QKV)",
        True,
        "microbatch=4",
    ),
    "llama, attention's result kept, tensor shards": (
        f"llama.Config({SMALL}, mlp=640, kv_heads=2, remat=Remat.ATTENTION)",
        False,
        "mesh=Mesh(fsdp=(2,), tensor=2)",
    ),
    "gptj, full remat": (f"gptj.Config({SMALL}, mlp=1024, remat=Remat.FULL)", False, ""),
    "mixtral by megablox, full remat": (
        f"mixtral.Config({SMALL}, mlp=512, kv_heads=2, experts=4,"
        " ffn=Moe(grouped=Grouped.MEGABLOX), remat=Remat.FULL)",
        False,
        "",
    ),
}


def written(folder, name):
    model, isolate, more = CASES[name]
    path = folder / "recipe.py"
    path.write_text(RECIPE.format(model=model, isolate=isolate, more=more))
    return path


# Each is compiled for a TPU: most are left to the soak.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.soak] * (n % 4 > 0)) for n, name in enumerate(CASES)]
)
def test_compiled_flops_are_the_structures(name, tmp_path):
    code, page, errors, found = planned(tmp_path, written(tmp_path, name), "--topology", "v5e:2x2")
    assert (code, errors) == (0, []), page
    flops = found["flops"]
    # A router's few products are counted by structure too; nothing else is left over.
    assert flops["compiled"] == pytest.approx(flops["expected"], rel=1e-3)
    assert flops["model"] + flops["recomputed"] + flops["masked"] == flops["expected"]
    step = found["step_seconds"]
    for each in (step["optimistic"], step["pessimistic"]):
        parts = [each[kind] for kind in ("matrix", "vector", "kernels", "collectives")]
        assert each["total"] == pytest.approx(sum(parts)) and all(part >= 0 for part in parts)
    assert step["optimistic"]["total"] <= step["expected"] <= step["pessimistic"]["total"]
    # 4 chips at $1.20 an hour: what a million tokens cost follows from their speed.
    speed = 16 * 512 / step["expected"]
    assert found["tokens_per_second"] == pytest.approx(speed)
    assert found["usd_per_million_tokens"] == pytest.approx(1e6 / speed * 4 * 1.20 / 3_600)
    assert found["run"]["usd"] == pytest.approx(100 * step["expected"] * 4 * 1.20 / 3_600)
    assert "costliest operations" in page and f"{found['usd_per_million_tokens']:.4f}" in page


def test_the_second_time_nothing_is_compiled_and_all_is_the_same(tmp_path):
    recipe = written(tmp_path, "gptj, full remat")
    first, second = (planned(tmp_path, recipe, "--topology", "v5e:2x2")[3] for _ in range(2))
    assert first["compile_seconds"] > 0 and second["compile_seconds"] is None
    assert {**first, "compile_seconds": None} == second
    # Another number of chips is another program.
    other = planned(tmp_path, recipe, "--topology", "v5e:2x4", "--usd-per-chip-hour", "2.5")[3]
    assert other["compile_seconds"] > 0 and other["program"] != first["program"]
    assert other["price"]["usd_per_chip_hour"] == 2.5


@pytest.mark.soak
def test_what_does_not_fit_is_said_and_mended(tmp_path):
    recipe = tmp_path / "recipe.py"
    model = "mpt.Config(layers=8, embed=2048, heads=16, mlp=8192, vocab=50368)"
    recipe.write_text(RECIPE.format(model=model, isolate=False, more="").replace("batch=16", "batch=256"))
    code, page, errors, found = planned(tmp_path, recipe, "--topology", "v5e:2x2")
    assert (code, errors, found["fits"]) == (1, [], False)
    assert "does not fit" in page and "--fit" in page
    assert len(page.splitlines()) < 40
    assert found["memory"]["needed"] > found["memory"]["available"] > 15 * 2**30
    code, page, errors, found = planned(tmp_path, recipe, "--topology", "v5e:2x2", "--fit")
    assert (code, errors, found["fits"]) == (0, [], True), page
    assert found["fit"][0] == "--microbatch"
    assert f"fit       v5e:2x2: {' '.join(found['fit'])}" in page
    code, _, _, again = planned(tmp_path, recipe, "--topology", "v5e:2x2", *found["fit"])
    assert (code, again["program"]) == (0, found["program"])


@pytest.mark.soak
def test_topologies_are_ranked_by_what_a_token_costs(tmp_path):
    recipe = written(tmp_path, "mpt, full remat, logits by chunks, two microbatches")
    names = ["v5e:2x2", "v6e:2x2", "v4:2x2x1"]
    code, page, errors, found = planned(tmp_path, recipe, "--topologies", ",".join(names))
    assert (code, errors) == (0, [])
    costs = {row["topology"]["name"]: row["usd_per_million_tokens"] for row in found}
    assert list(costs) == names
    ranked = [line.split()[0] for line in page.splitlines() if line.startswith(("v4", "v5", "v6"))]
    assert ranked == sorted(names, key=costs.__getitem__)
