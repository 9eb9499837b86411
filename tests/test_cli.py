"""The command: what it refuses, in one line, with which exit code."""

import json
import re
import shlex
import shutil

import pytest

from mosaicjax.errors import InputError
from tests import jobs, tiny

REFUSED = 2


@pytest.fixture
def damaged_store(tiny_store, tmp_path):
    """A copy of the store with one bit of its training tokens flipped."""
    store = tmp_path / "damaged"
    shutil.copytree(tiny_store, store)
    tiny.flip(store / "train/tokens/c/0")
    return store


def refusal(capsys, *arguments):
    """The one line that the command refuses with."""
    assert tiny.run(*arguments) == REFUSED
    return one_line(capsys.readouterr().err)


def one_line(stderr):
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("mosaicjax: ")
    return lines[0].removeprefix("mosaicjax: ")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--stepz", "3"], r"unknown override --stepz; fix: did you mean --steps( or \S+)*\?"),
        (
            ["--model.positon.max-bias", "3"],
            "unknown override --model.positon.max-bias; fix: did you mean --model.position.max-bias"
            r"( or \S+)*\?",
        ),
        (
            ["--zzzz=1"],
            "unknown override --zzzz; fix: `mosaicjax train RECIPE --show-overrides` lists them",
        ),
        (["--steps", "many"], "override: Error parsing --steps: invalid literal for int.*'many'.*"),
        (["--steps"], "override: Missing value for argument '--steps'. Expected 1 values."),
        (["--model.remat", "some"], "override: invalid choice 'some' for argument '--model.remat'.*FULL.*"),
        (["--steps", "3", "4"], "override: Unrecognized options: 4"),
        (["--steps", "0"], "steps of the recipe; expected 1 or more; got 0"),
        (["--eval.every", "-1"], "eval.every of the recipe; expected a positive number; got -1"),
        (
            ["--batch", "6"],
            r"the batch does not divide over the mesh; expected a multiple of 8 rows \(data 1 x fsdp 8\);"
            " got 6; fix: set batch or the mesh",
        ),
        (
            ["--microbatch", "6"],
            r"the microbatch does not divide over the mesh; expected a multiple of 8 rows .*; got 6; .*",
        ),
        (
            ["--mesh.fsdp", "3"],
            "the mesh does not match the devices; expected axes that multiply to 8;"
            " got data 1 x fsdp 3 x tensor 1; fix: .*",
        ),
        (
            ["--mesh.tensor", "8"],
            "stacks/0/0/layer/attention/key: the dim 'kv_heads' does not divide over the mesh;"
            " expected a multiple of 8 .*; got 2; fix: .*",
        ),
        (
            ["--model.vocab", "128"],
            r"the tokenizer of \S+/store is larger than the model's vocabulary;"
            " expected at most 128 ids; got 300; fix: --model.vocab 384",
        ),
        (["--data.path", "nowhere"], "there is no token store at nowhere"),
        (
            ["--seq", "100000"],
            r".*train is shorter than one row; expected at least 100001 tokens; got \d+; .*",
        ),
        (["--init-from", "nowhere"], r"nowhere holds no model; expected a run \(recipe.json\), .*"),
        (["--profile", "3"], "--profile; expected FIRST:LAST, steps from 1, as 10:13; got 3"),
        (["--profile", "0:3"], "--profile; expected .*; got 0:3"),
        (["--profile", "3:2"], "--profile; expected .*; got 3:2"),
        (["--profile", "a:b"], "--profile; expected .*; got a:b"),
        (["--processes", "2"], "wrong coordinator address; expected host:port; got nothing"),
        (["--process", "1"], "wrong process index; expected 0 to 0; got 1"),
        (["--processes", "two"], "mosaicjax train: argument --processes: invalid int value: 'two'; fix: .*"),
    ],
)
def test_a_wrong_option_is_one_line(capsys, tmp_path, tiny_recipe, options, line):
    out = tmp_path / "run"
    assert re.fullmatch(line, refusal(capsys, "train", tiny_recipe, "--out", out, *options))
    assert not out.exists() or not list(out.iterdir()), "a refused run leaves nothing behind"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("import json\n\nprice = missing + 1\n", "line 3: NameError: name 'missing' is not defined"),
        ("x = 1\n\n\nif x\n    pass\n", "line 4: SyntaxError: expected ':'"),
        (
            "def seed():\n    raise ValueError('two\\nlines')\n\nseed()\n",
            "line 2: ValueError: two lines",
        ),
    ],
)
def test_a_recipe_that_does_not_import_names_its_line(capsys, tmp_path, text, line):
    recipe = tmp_path / "mine.py"
    recipe.write_text(text)
    said = refusal(capsys, "train", recipe)
    assert said.startswith(f"the recipe does not import: {recipe}, {line}")


def test_recipes_that_are_none(capsys, tmp_path):
    said = refusal(capsys, "train", "recipes/none.py")
    assert said == (
        "no such recipe; got recipes/none.py; fix: `ls recipes` lists those that come with mosaicjax"
    )
    assert refusal(capsys, "train", tmp_path) == (
        f"no recipe at {tmp_path}; expected a .py file, or a run directory with recipe.json"
    )
    empty = tmp_path / "empty.py"
    empty.write_text("recipes = 3\n")
    assert refusal(capsys, "show", empty) == (
        f"{empty} defines no recipe; expected recipe = Recipe(...); got NoneType"
    )


def test_a_trace_stays_on_this_machine(capsys, tiny_recipe):
    assert refusal(capsys, "train", tiny_recipe, "--out", "s3://bucket/run", "--profile", "1:2") == (
        "--profile writes to this machine alone; got s3://bucket/run; fix: an --out on this machine"
    )


def test_debug_shows_the_traceback_too(tiny_recipe):
    with pytest.raises(InputError, match="unknown override --stepz"):
        tiny.run("train", tiny_recipe, "--stepz", 3, "--debug")
    with pytest.raises(InputError, match="unknown override --stepz"):
        tiny.run("--debug", "train", tiny_recipe, "--stepz", 3)


def test_unknown_commands_and_arguments(capsys, tiny_run):
    assert "invalid choice: 'tain'" in refusal(capsys, "tain")
    assert "the following arguments are required: COMMAND" in refusal(capsys)
    assert refusal(capsys, "generate", tiny_run, "--prompt", "x", "--max-token", 3) == (
        "unknown argument --max-token; fix: `mosaicjax generate --help`"
    )


def test_damage_to_a_store_names_the_file(capsys, tiny_recipe, tmp_path, tiny_store, damaged_store):
    shard = damaged_store / "train/tokens/c/0"
    options = ("train", tiny_recipe, "--out", tmp_path / "run", "--data.path", damaged_store)
    said = refusal(capsys, *options)
    assert re.fullmatch(rf"{shard} is damaged; expected SHA-256 \w+; got \w+; fix: restore the file.*", said)
    shard.unlink()
    assert refusal(capsys, *options).startswith(f"{shard} is missing; fix: restore the file")
    (damaged_store / "manifest.json").unlink()
    said = refusal(capsys, *options)
    assert said.startswith(f"{damaged_store} has no manifest.json: an unfinished build")
    assert refusal(capsys, "data", "verify", damaged_store) == said


def test_an_empty_corpus(capsys, tmp_path, tiny_store):
    documents = tmp_path / "none.jsonl"
    documents.write_text("")
    tokenizer = tiny_store.parent / "tokenizer"
    store = tmp_path / "store"
    assert tiny.run("data", "build", documents, "--out", store, "--tokenizer", tokenizer) == REFUSED
    # A bar of progress stands before it, which draws over itself.
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("mosaicjax: empty corpus; expected at least one document; got 1 files")
    assert not (store / "manifest.json").exists()


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (lambda it: it | {"stepz": 3}, "recipe.json: Recipe has no stepz"),
        (lambda it: it | {"optimizer": it["optimizer"] | {"b3": 1}}, "recipe.json: AdamW has no b3"),
        (
            lambda it: it | {"optimizer": it["optimizer"] | {"type": "mosaicjax.optim:Sophia"}},
            "recipe.json names a class that is not there; got mosaicjax.optim:Sophia",
        ),
        (
            lambda it: it | {"optimizer": it["loss"]},
            "recipe.json: a part of another kind; expected Optimizer; got mosaicjax.losses:CrossEntropy",
        ),
        (lambda it: it | {"steps": "many"}, "recipe.json: Recipe.steps; expected int; got many"),
        (lambda it: it | {"steps": 3.5}, "recipe.json: Recipe.steps; expected int; got 3.5"),
        (
            lambda it: it | {"log": it["log"] | {"norms": "False"}},
            "recipe.json: Log.norms; expected bool; got False",
        ),
        (
            lambda it: it | {"model": it["model"] | {"remat": "some"}},
            "recipe.json: Config.remat; expected Remat; got some",
        ),
        (lambda it: [it], "recipe.json: a part is no object; expected Recipe; got .*"),
        (lambda it: it | {"model": 3}, "recipe.json: a part is no object; expected Family; got 3"),
        (lambda it: {"type": it["type"]}, "recipe.json cannot be read; got .*missing.*'model' and 'data'"),
    ],
)
def test_a_corrupt_recipe_of_a_run(capsys, tmp_path, tiny_run, edit, line):
    contents = json.loads((tiny_run / "recipe.json").read_text())
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.json").write_text(json.dumps(edit(contents)))
    for command in ("train", "show"):
        assert re.fullmatch(line, refusal(capsys, command, run)), line
    (run / "recipe.json").write_text('{"type": ')
    assert re.fullmatch("recipe.json cannot be read; got Expecting value.*", refusal(capsys, "train", run))


def test_overrides_are_listed_as_one_would_type_them(capsys, tiny_recipe):
    options = ("--model.windows", "8", "0", "--model.remat", "QKV", "--log.norms", "True", "--seed", "9")
    assert tiny.run("train", tiny_recipe, *options, "--show-overrides") == 0
    listed = capsys.readouterr().out.splitlines()
    assert {"--model.windows 8 0", "--model.remat QKV", "--log.norms True", "--seed 9"} < set(listed)
    assert {"--methods.0.norm 1.0", "--mesh.fsdp -1", "--init-from ''"} < set(listed)
    # All of them together are the recipe that they were listed of.
    typed = shlex.split(" ".join(listed))
    assert tiny.run("train", tiny_recipe, *typed, "--show-overrides") == 0
    assert capsys.readouterr().out.splitlines() == listed


def job_refusals(*arguments):
    """The line of each of two processes, each of which must refuse."""
    results = tiny.ended(tiny.launch_job(*arguments))
    lines = []
    for result in results:
        assert result.returncode == REFUSED, result
        said = [line for line in result.stderr.splitlines() if line.startswith("mosaicjax: ")]
        assert len(said) == 1 and "Traceback" not in result.stderr, result.stderr
        lines.append(said[0].removeprefix("mosaicjax: "))
    return lines


def test_both_processes_refuse_damage_that_each_sees(tiny_recipe, tmp_path, damaged_store):
    lines = job_refusals("train", tiny_recipe, "--out", tmp_path / "run", "--data.path", damaged_store)
    shard = damaged_store / "train/tokens/c/0"
    for line in lines:
        assert line.startswith(f"process 0 (and 1 more): {shard} is damaged; expected SHA-256 "), line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            ["--model.vocab", "128"],
            r"process 0 \(and 1 more\): the tokenizer of \S+ is larger than the model's .*",
        ),
        (
            ["--batch", "6"],
            r"process 0 \(and 1 more\): the batch does not divide .*; got 6; .*",
        ),
        (["--stepz", "6"], r"process 0 \(and 1 more\): unknown override --stepz; .*"),
    ],
)
def test_both_processes_refuse(tiny_recipe, tmp_path, options, line):
    for said in job_refusals("train", tiny_recipe, "--out", tmp_path / "run", *options):
        assert re.fullmatch(line, said)


@pytest.mark.slow
def test_both_processes_refuse_a_recipe_that_one_cannot_import(tiny_recipe, tmp_path, monkeypatch):
    recipe = tiny_recipe.read_text() + "\nimport os\nassert 'BROKEN' not in os.environ, 'broken here'\n"
    (tmp_path / "mine.py").write_text(recipe)
    command = ("train", tmp_path / "mine.py", "--out", tmp_path / "run", "--processes", 2)
    command = (*command, "--coordinator", jobs.free_address(), "--process")
    sound = tiny.launch(*command, 0)
    monkeypatch.setenv("BROKEN", "1")
    for result in tiny.ended([sound, tiny.launch(*command, 1)]):
        assert result.returncode == REFUSED, result
        assert "process 1: the recipe does not import: " in result.stderr
        assert "AssertionError: broken here" in result.stderr
