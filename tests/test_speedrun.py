"""The arithmetic of the speedrun and its ablations, by hand."""

import math

import pytest

from benchmarks import ablation, speedrun
from mosaicjax.recipe_file import load

CURVE = [(0.5, 2.8), (1.0, 2.5), (2.0, 2.3)]


@pytest.mark.parametrize(
    ("loss", "length"),
    [
        (2.8, 0.5),
        (2.5, 1.0),
        (2.3, 2.0),
        (2.4, math.sqrt(2.0)),
        (2.65, math.sqrt(0.5)),
        # The outer lines go on: 0.3 bits for half as many tokens, 0.2 for twice as many.
        (2.95, 0.5 * math.sqrt(0.5)),
        (2.2, 2.0 * math.sqrt(2.0)),
    ],
)
def test_a_loss_as_a_multiple_of_tokens(loss, length):
    assert ablation.equivalent(loss, CURVE) == pytest.approx(length)
    assert ablation.equivalent(loss, CURVE[::-1]) == pytest.approx(length)


def test_how_many_times_less():
    def side(tokens, flops, seconds):
        runs = [
            {"step_seconds": s, "seconds_but_compiling": s + 2, "seconds": s + 5, "usd": 2 * s}
            for s in seconds
        ]
        return {"work": {"tokens": tokens, "flops": flops}, "runs": runs}

    found = speedrun.ratios(side(100, 900, [20.0, 30.0, 45.0]), side(25, 300, [5.0, 10.0, 5.0]))
    assert (found["tokens"], found["flops"]) == (4, 3)
    assert found["step_seconds"] == {"median": 4, "least": 3, "most": 9}
    assert found["seconds"] == {"median": 2.5, "least": 35 / 15, "most": 5}
    assert found["seconds_but_compiling"] == {"median": 22 / 7, "least": 32 / 12, "most": 47 / 7}
    assert found["usd"] == {"median": 4, "least": 3, "most": 9}


def test_documents_of_the_test_are_their_share():
    chosen = sum(speedrun.is_test(f"document {number}") for number in range(20_000))
    assert chosen / 20_000 == pytest.approx(speedrun.TEST_SHARE, abs=0.01)


@pytest.mark.parametrize("table", sorted(ablation.BASES))
def test_every_edit_is_a_recipe(table, tmp_path):
    """It loads and checks, and is another recipe than its base."""
    base, edits = ablation.BASES[table]
    plain = load(str(ablation.ROOT / base)).recipe
    for name, edit in edits.items():
        path = ablation.written(f"{tmp_path}/edit.py", base, f"replace(recipe, {edit})")
        assert load(path).recipe != plain, name
    longer = load(ablation.written(f"{tmp_path}/longer.py", base, "longer(recipe, 1.6)")).recipe
    assert longer.steps == round(1.6 * plain.steps)
    assert [each.step for each in longer.phases] == [round(1.6 * each.step) for each in plain.phases]


def test_work_is_counted_by_phase():
    """Matrices of 12 x 128^2 a layer and a head of 4,096 x 128, causal scores of each phase's rows."""
    work = speedrun.work_of(speedrun.BEST, ["--steps=84", "--phases.0.step=77"])
    per_token = 4 * 12 * 128**2 + 4_096 * 128
    attention = {length: 4 * 2 * 2 * 128 * (length + 1) / 2 for length in (32, 256)}
    steps = {32: (77, 16), 256: (7, 2)}
    expected = sum(
        3 * (2 * per_token + attention[length]) * length * batch * count
        for length, (count, batch) in steps.items()
    )
    assert work["flops"] == pytest.approx(expected, rel=1e-12)
    assert work["tokens"] == 84 * 512


def test_a_table_by_hand():
    """2.4 is half-way from the base's loss to that at 1.8 times its tokens: at the square root of 1.8."""
    factors = dict(zip(ablation.LENGTHS, (2.9, 2.5, 2.3), strict=True))

    def runs(*pairs):
        return [{"validation_bits_per_byte": loss, "step_seconds": seconds} for loss, seconds in pairs]

    base = speedrun.STANDARD
    made = {
        f"{base} {factor}": runs((loss - 0.01, 10.0), (loss + 0.01, 20.0)) for factor, loss in factors.items()
    }
    made["with good"] = runs((2.39, 12.0), (2.41, 24.0))
    made["with idle"] = runs((2.515, 10.0), (2.48, 20.0))
    edits = {"good": "seed=3", "idle": "seed=4"}
    for name, edit in edits.items():
        ablation.written(ablation.edited("with", name), base, f"replace(recipe, {edit})")
    found = ablation.table(base, edits, list(speedrun.SMALL), made, "with")["rows"]
    assert found["good"]["times_tokens"]["median"] == pytest.approx(1.8**-0.5)
    assert found["good"]["times_flops"] == pytest.approx(1.8**-0.5)
    assert found["good"]["times_seconds"] == pytest.approx(1.2 * 1.8**-0.5)
    assert not found["good"]["within_noise"]
    assert found["idle"]["within_noise"]
