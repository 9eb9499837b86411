"""The estimate without a compiler: by hand, and against what the compiler makes of the same recipe."""

import json
import sys
from dataclasses import replace

import pytest

from mosaicjax import cli
from mosaicjax.data.mixture import Rows, TokenStore
from mosaicjax.errors import InputError
from mosaicjax.hardware import Price
from mosaicjax.losses import CrossEntropy
from mosaicjax.mesh import Mesh
from mosaicjax.methods.dpo import DPO
from mosaicjax.methods.lora import LoRA
from mosaicjax.models import flops, mpt
from mosaicjax.models.decoder import Remat
from mosaicjax.plan.analytic import estimate, lines
from mosaicjax.plan.bill import bill
from mosaicjax.plan.topology import Topology, compiler_there
from mosaicjax.recipe import Recipe
from tests.plan.planned import planned

MODEL = mpt.Config(layers=4, embed=1_024, heads=8, mlp=4_096, vocab=8_192)
PAIRS = TokenStore("none", isolate=True, rows=Rows.PAIRS)
RECIPE = Recipe(MODEL, TokenStore("none"), seq=1_024, batch=32, steps=1_000)
V5E = Topology.read("v5e:2x2")


def test_by_hand():
    recipe = replace(RECIPE, microbatch=16)
    found = estimate(recipe, V5E, Price(2.0, "a test", "2026-01-01"))
    layer = 4 * 1_024 * 1_024 + 2 * 1_024 * 4_096
    matrices, tokens = 4 * layer + 8_192 * 1_024, 32 * 1_024 / 4
    scores = 4 * 2 * 2 * 1_024 * (1_024 + 1) / 2
    assert found.model == pytest.approx(3 * (2 * matrices + scores) * tokens)
    # Products of weights at 197 TFLOP/s, attention by the table.
    assert found.matrix == pytest.approx(6 * matrices * tokens / 197e12)
    assert found.flops - found.model > scores / 2 * tokens
    # Two microbatches gather weights twice and sum gradients whole, in 2 bytes; 9 norms scale 1,024 channels.
    entries = matrices + 9 * 1_024
    assert found.wire_bytes == pytest.approx(2 * entries * (2 * 2 + 2 * 2) * 3 / 4)
    # Two links a dim in one direction of 50 GB/s each.
    assert found.wire == pytest.approx(found.wire_bytes / (4 * 50e9))
    assert found.seconds == max(found.matrix + found.attention, found.wire)
    # AdamW: weights, their gradients and two moments in float32, and a count of steps on each chip.
    assert found.state_bytes == pytest.approx(4 * 4 * entries / 4, rel=1e-3)
    usd = 4 * 2.0 / 3_600 * found.seconds
    assert found.usd_per_million_tokens == pytest.approx(usd / (32 * 1_024) * 1e6)


def test_a_reference_goes_forward_once_more():
    """By hand: a third of the model's FLOPs, its weights gathered forward and, but for adapters, held."""
    plain = estimate(RECIPE, V5E, None)
    found = estimate(replace(RECIPE, data=PAIRS, methods=(DPO(),)), V5E, None)
    assert found.model == plain.model
    # And what attention's kernel multiplies beside what is seen, a seventh of which is the forward pass's.
    beside = found.flops - plain.flops - plain.model / 3
    assert 0 < beside < 0.05 * plain.model
    layer = 4 * 1_024 * 1_024 + 2 * 1_024 * 4_096
    entries = 4 * layer + 8_192 * 1_024 + 9 * 1_024
    assert found.wire_bytes - plain.wire_bytes == pytest.approx(entries * 2 * 3 / 4)
    # Segments and positions of packed rows come with the batch, which does not count here.
    assert found.state_bytes - plain.state_bytes == pytest.approx(4 * entries / 4)
    adapters = replace(RECIPE, data=PAIRS, init_from="x", methods=(LoRA(), DPO()))
    alone = replace(adapters, data=RECIPE.data, methods=(LoRA(),))
    both = [estimate(each, V5E, None) for each in (adapters, alone)]
    assert both[0].state_bytes == both[1].state_bytes
    assert both[0].wire_bytes - both[1].wire_bytes == pytest.approx(entries * 2 * 3 / 4)


def test_a_mesh_of_copies_gathers_nothing_and_explicit_sums_are_scattered():
    alone = replace(RECIPE, mesh=Mesh(data=4, fsdp=(1,)))
    assert estimate(alone, V5E, None).wire_bytes == 0
    explicit = replace(RECIPE, mesh=Mesh(fsdp=(2, 2), gather="explicit"))
    ratio = estimate(explicit, V5E, None).wire_bytes / estimate(RECIPE, V5E, None).wire_bytes
    # Float32 sums once, where bfloat16 sums go around twice.
    assert ratio == pytest.approx(1.0)


def test_remat_keeps_less_and_does_more():
    found = [
        estimate(replace(RECIPE, model=replace(MODEL, remat=policy)), V5E, None)
        for policy in (Remat.PRODUCTS, Remat.DOTS, Remat.QKV, Remat.FULL)
    ]
    kept, work = [each.kept_bytes for each in found], [each.flops for each in found]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 4
    assert work == sorted(work) and len(set(work)) == 4
    plain = estimate(RECIPE, V5E, None)
    assert plain.kept_bytes > kept[0] and plain.flops == work[0]
    chunked = estimate(replace(RECIPE, loss=CrossEntropy(chunk=128)), V5E, None)
    assert chunked.kept_bytes < plain.kept_bytes and chunked.flops == plain.flops


def test_recomputation_by_hand():
    decoder = replace(MODEL, remat=Remat.FULL).build()
    again = flops.recomputed(decoder, 1_024)
    # Of a layer all but the product down, whose result the stream alone reads; attention's two products
    # forward and its scores in the backward pass.
    products = 4 * (4 * 1_024 * 1_024 + 1_024 * 4_096)
    assert again.causal == 2 * products + 4 * 3 * 2 * 1_024 * (1_024 + 1) / 2
    assert again.full == 2 * products + 4 * 3 * 2 * 1_024 * 1_024
    # Without remat the scores alone.
    assert flops.recomputed(MODEL.build(), 1_024).full == 4 * 2 * 1_024 * 1_024


def test_without_the_compiler_the_command_says_so(monkeypatch, capsys, tmp_path, tiny_recipe):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    out = tmp_path / "plan.json"
    words = ["plan", str(tiny_recipe), "--topologies", "v5e:2x2,v6e:2x2", "--json", str(out), "--batch", "16"]
    assert cli.main(words) == 0
    page = capsys.readouterr().out
    assert page.count("an ESTIMATE from structure: nothing was compiled") == 2
    rows = json.loads(out.read_text())
    assert [row["topology"]["name"] for row in rows] == ["v5e:2x2", "v6e:2x2"]
    assert all("ESTIMATE" in row["estimate"] for row in rows)
    assert cli.main([*words, "--fit"]) == 2
    assert "--fit compiles, and no TPU compiler is installed; fix: pip install" in capsys.readouterr().err
    assert cli.main([*words, "--slices", "2"]) == 2
    assert "knows no network between slices; expected --slices 1; got 2" in capsys.readouterr().err


def test_no_price_is_one_line():
    unpriced = replace(V5E, chip=replace(V5E.chip, price=None))
    for plan in (estimate, lambda *given: bill(*given[:2], price=None, cache=None)):
        with pytest.raises(InputError, match="no price is known for v5e; fix: --usd-per-chip-hour USD"):
            plan(RECIPE, unpriced, None)
    assert (
        estimate(replace(RECIPE, price=Price(3.0, "us", "2026-01-01")), unpriced, None).price.source == "us"
    )


FILE = """
from dataclasses import replace
from mosaicjax.models.decoder import Remat
from tests.plan.test_analytic import MODEL, RECIPE
recipe = replace(RECIPE, model=replace(MODEL, remat=Remat.{policy}), microbatch=16)
"""


@pytest.mark.slow
@pytest.mark.skipif(not compiler_there(), reason="libtpu, the TPU compiler, is not installed")
@pytest.mark.parametrize("policy", [pytest.param(Remat.NONE, marks=pytest.mark.soak), Remat.FULL])
def test_against_the_compiled_step(policy, tmp_path):
    recipe = replace(RECIPE, model=replace(MODEL, remat=policy), microbatch=16)
    outline = estimate(recipe, V5E, None)
    path = tmp_path / "recipe.py"
    path.write_text(FILE.format(policy=policy.name))
    code, page, errors, plan = planned(tmp_path, path, "--topology", "v5e:2x2")
    assert (code, errors) == (0, []), page
    assert outline.flops == pytest.approx(plan["flops"]["compiled"], rel=1e-3)
    assert outline.wire_bytes == pytest.approx(plan["wire_bytes"], rel=0.15)
    assert 0.7 < (outline.state_bytes + outline.kept_bytes) / plan["memory"]["needed"] < 1.4
    assert outline.seconds < plan["step_seconds"]["optimistic"]["total"]
    assert outline.usd_per_million_tokens < plan["usd_per_million_tokens"]
    assert any("ESTIMATE" in line for line in lines(outline, "a recipe"))
