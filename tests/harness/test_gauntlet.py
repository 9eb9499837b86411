import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mosaicjax import cli
from mosaicjax.errors import InputError
from mosaicjax.harness.gauntlet import (
    Benchmark,
    Gauntlet,
    averages,
    gauntlet_of,
    load_gauntlet,
    weight,
)

TWO = Gauntlet(
    categories={
        "world": (Benchmark("arc/3-shot", 0.25), Benchmark("jeopardy/3-shot", 0.0)),
        "reading": (Benchmark("boolq/0-shot", 0.5),),
    },
    averages={"core": ("world", "reading"), "world_alone": ("world",)},
)


def test_scores_by_hand():
    accuracies = {"arc/3-shot": 0.55, "jeopardy/3-shot": 0.1, "boolq/0-shot": 0.4}
    categories, named = averages(TWO, accuracies, {})
    # (0.55 - 0.25) / 0.75 = 0.4 and 0.1; (0.4 - 0.5) / 0.5 = -0.2.
    assert categories["world"].score == pytest.approx(0.25)
    assert categories["reading"].score == pytest.approx(-0.2)
    assert named["core"].score == pytest.approx(0.025)
    assert named["world_alone"].score == pytest.approx(0.25)


def test_a_quarter_everywhere_is_a_quarter_everywhere():
    names = ["a/0-shot", "b/1-shot", "c/5-shot"]
    parts = {"x": tuple(Benchmark(n, 0.0) for n in names), "y": (Benchmark(names[0], 0.0),)}
    even = Gauntlet(parts, {"all": ("x", "y")})
    categories, named = averages(even, dict.fromkeys(names, 0.25), {})
    assert {average.score for average in (*categories.values(), *named.values())} == {0.25}


def test_a_category_with_a_missing_task_is_partial_and_so_is_its_average():
    categories, named = averages(TWO, {"arc/3-shot": 1.0, "boolq/0-shot": 1.0}, {})
    world = categories["world"]
    assert (world.score, world.present, world.missing) == (None, 1.0, ("jeopardy/3-shot",))
    assert categories["reading"].score == 1.0
    assert named["core"].score is None and named["core"].missing == ("world",)
    assert (named["world_alone"].score, named["world_alone"].present) == (None, None)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 0.9), st.integers(0, 5000)), min_size=1, max_size=6),
    st.sampled_from(["EQUAL", "SAMPLE_SZ", "LOG_SAMPLE_SZ"]),
)
def test_scores_stay_between_what_their_tasks_have(tasks, weighting):
    benchmarks = tuple(Benchmark(f"t{i}/0-shot", baseline) for i, (_, baseline, _) in enumerate(tasks))
    gauntlet = Gauntlet({"c": benchmarks}, {"all": ("c",)}, weighting=weighting)
    accuracies = {each.name: accuracy for each, (accuracy, _, _) in zip(benchmarks, tasks, strict=True)}
    counts = {each.name: count for each, (_, _, count) in zip(benchmarks, tasks, strict=True)}
    categories, named = averages(gauntlet, accuracies, counts)
    scores = [(accuracy - baseline) / (1 - baseline) for accuracy, baseline, _ in tasks]
    assert min(scores) - 1e-9 <= categories["c"].score <= max(scores) + 1e-9
    assert named["all"].score == categories["c"].score
    assert categories["c"].score <= 1 + 1e-9


def test_weights():
    assert [weight(count, "EQUAL") for count in (0, 7)] == [1, 1]
    assert [weight(count, "SAMPLE_SZ") for count in (0, 7)] == [1, 7]
    assert [weight(count, "LOG_SAMPLE_SZ") for count in (0, 1, 2, 1024)] == [1, 1, 1, 10]
    sized = Gauntlet({"c": (Benchmark("a/0-shot", 0), Benchmark("b/0-shot", 0))}, {}, weighting="SAMPLE_SZ")
    categories, _ = averages(sized, {"a/0-shot": 1, "b/0-shot": 0}, {"a/0-shot": 300, "b/0-shot": 100})
    assert categories["c"].score == pytest.approx(0.75)


def test_halves_of_the_score_can_be_left_away():
    plain = Gauntlet(TWO.categories, {}, subtract_random_baseline=False, rescale_accuracy=False)
    assert averages(plain, {"boolq/0-shot": 0.4}, {})[0]["reading"].score == 0.4
    lowered = Gauntlet(TWO.categories, {}, rescale_accuracy=False)
    assert averages(lowered, {"boolq/0-shot": 0.4}, {})[0]["reading"].score == pytest.approx(-0.1)


def test_the_gauntlet_that_comes_along():
    found = load_gauntlet("v0.3", "somewhere")
    assert len(found.names) == 31 and list(found.averages) == ["core_average"]
    assert set(found.names) <= set(found.tasks)
    svamp = found.tasks["svamp/5-shot"]
    assert svamp.path == "somewhere/symbolic_problem_solving/svamp.jsonl"
    assert svamp.form.prelimiter == "Question: " and svamp.form.cot_delimiter == "The answer is "
    assert svamp.form.early_stopping_criteria == ("\n\n", "Question:")
    assert found.tasks["jeopardy/3-shot"].by_category and not svamp.by_category
    assert Benchmark("siqa/3-shot", 0.5) in found.categories["commonsense_reasoning"]


SPEC = {
    "eval_gauntlet": {
        "categories": [
            {"name": "c", "benchmarks": [{"name": "t", "num_fewshot": 1, "random_baseline": 0.25}]}
        ]
    },
    "icl_tasks": [{"label": "t", "dataset_uri": "t.jsonl", "num_fewshot": [0, 1], "icl_task_type": "schema"}],
}


def changed(path, value):
    """The specification with one value another."""
    spec = json.loads(json.dumps(SPEC))
    at = spec
    for part in path[:-1]:
        at = at[part]
    at[path[-1]] = value
    return spec


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(SPEC))
    found = load_gauntlet(str(path))
    assert found.names == ["t/1-shot"] and set(found.tasks) == {"t/0-shot", "t/1-shot"}
    assert found.tasks["t/1-shot"].path == str(tmp_path / "t.jsonl")
    assert found.averages == {"default_average": ("c",)}


BENCHMARK = ("eval_gauntlet", "categories", 0, "benchmarks", 0)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("icl_tasks",), [], "icl_tasks; expected a list that is not empty"),
        (("icl_tasks", 0, "icl_task_type"), "code", "icl_task_type; expected multiple_choice, schema"),
        (("icl_tasks", 0, "num_fewshot"), [-1], "num_fewshot; expected numbers, 0 or more"),
        (("icl_tasks", 0, "num_fewshot"), [1, 1], "each label and num_fewshot once"),
        (("icl_tasks", 0, "continuation_delimiter"), 3, "continuation_delimiter; expected .*str.*got 3"),
        (("icl_tasks", 0, "hf_loading_vars"), {}, "hf_loading_vars; expected keys among"),
        ((*BENCHMARK, "random_baseline"), 1, "random_baseline of t; expected 0 to below 1; got 1"),
        (("eval_gauntlet", "weighting"), "SOME", "weighting; expected EQUAL, SAMPLE_SZ"),
        (("eval_gauntlet", "subtract_random_baseline"), False, "rescale_accuracy without subtract"),
        (("eval_gauntlet", "averages"), {"all": ["d"]}, "average all; expected another name"),
        (("eval_gauntlet", "averages"), {"c": ["c"]}, "average c; expected another name"),
        (("eval_gauntlet", "categories"), {}, "categories; expected a list"),
        (("eval_gauntlet",), 3, "eval_gauntlet; expected an object with categories; got int"),
    ],
)
def test_specifications_that_cannot_be_are_refused(path, value, message):
    with pytest.raises(InputError, match=message):
        gauntlet_of(changed(path, value), "mine.yaml", ".")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "eval; expected one of --tasks and --gauntlet; got none"),
        (["--tasks", "a", "--gauntlet", "v0.3"], "expected one of --tasks and --gauntlet; got both"),
        (["--gauntlet", "v9"], "--gauntlet; expected v0.3, or a .yaml file; got v9"),
        (["--gauntlet", "v0.3"], "--gauntlet v0.3 needs its task files; fix: --gauntlet-data DIR"),
        (["--gauntlet", "no.yaml"], "cannot read no.yaml"),
        (["--gauntlet", "v0.3", "--num-fewshot", "2"], "--num-fewshot; expected --tasks with it"),
        (["--gauntlet", "v0.3", "--limit", "-1"], "--limit; expected 0 (all) or more; got -1"),
        (["--tasks", "a,", "--limit", "1"], "--tasks; expected names of tasks"),
        (["--tasks", "a", "--num-fewshot", "-1"], "--num-fewshot; expected 0 or more; got -1"),
        (["--tasks", "a", "--seed", "-1"], "--seed; expected 0 to 2**32 - 1; got -1"),
        (["--tasks", "a", "--include", "nowhere"], "--include; expected a directory"),
        (["--tasks", "a", "--gauntlet-data", "x"], "--gauntlet-data; expected --gauntlet with it"),
        (["--tasks", "a", "--batch", "0"], "--batch; expected 1 or more rows; got 0"),
        (["--tasks", "a", "--max-length", "-5"], "--max-length; expected 1 or more tokens"),
        (["--tasks", "a", "--devices", "-1"], "--devices; expected 1 or more"),
        (["--tasks", "a"], "nowhere holds no model"),
    ],
)
def test_bad_options_are_refused_in_one_line(words, message, capsys):
    assert cli.main(["eval", "nowhere", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
