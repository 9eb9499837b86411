import gc
from dataclasses import replace
from pathlib import Path

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaicjax import recipe_file
from mosaicjax.checkpoint import Checkpoints
from mosaicjax.data.mixture import TokenStore
from mosaicjax.data.tokenizer import load_tokenizer, train_tokenizer
from mosaicjax.errors import InputError
from mosaicjax.generate import (
    CACHE_BUCKET,
    PROMPT_BUCKET,
    Generator,
    Sampling,
    TextStream,
    generate,
    load_run,
    load_run_tokenizer,
)
from mosaicjax.mesh import REST, Mesh, shardings
from mosaicjax.models import mpt
from mosaicjax.recipe import Recipe
from mosaicjax.spec import Dtypes
from tests.scripted import REACH, SCRIPTED, SEPARATOR, byte_tokenizer, scripted

DTYPES = Dtypes()
GREEDY = Sampling(max_tokens=200, temperature=0.0)


def ignore(number, text):
    pass


class Heard:
    """What was streamed, by prompt."""

    def __init__(self):
        self.parts = {}

    def __call__(self, number, text):
        assert text, "nothing is streamed in vain"
        self.parts.setdefault(number, []).append(text)


SCRIPT = "Grüße, 世界! 🙂 The END is near. ENDE".encode()


@pytest.fixture(scope="module")
def writer():
    layout = Mesh(fsdp=(1,)).build(jax.devices()[:1])
    decoder, weights = scripted(SCRIPT, layout)
    return Generator(decoder, weights, layout, DTYPES, byte_tokenizer())


def test_a_prompt_goes_on_from_its_own_length_until_the_separator(writer):
    heard = Heard()
    settings = replace(GREEDY, max_tokens=70)
    done = writer.generate(["", "Grü", "xyz"], settings, heard)
    # An empty prompt is the separator alone: one token, so position 0 writes the script's beginning.
    rests = [SCRIPT, SCRIPT[4:], SCRIPT[3:]]
    assert [completion.text for completion in done] == [rest.decode(errors="replace") for rest in rests]
    assert [completion.tokens for completion in done] == [(*rest, SEPARATOR) for rest in rests]
    assert [completion.prompt_tokens for completion in done] == [1, 5, 4]
    assert {completion.finish for completion in done} == {"separator"}
    for i, completion in enumerate(done):
        assert "".join(heard.parts[i]) == completion.text
    # A character is streamed with its last byte, and each as soon as that comes.
    assert heard.parts[0] == list(SCRIPT.decode())


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (("END",), "Grüße, 世界! 🙂 The "),
        (("ENDE",), "Grüße, 世界! 🙂 The END is near. "),
        (("界",), "Grüße, 世"),
        (("ENDING", " is", "zzz"), "Grüße, 世界! 🙂 The END"),
        (("END", "The END"), "Grüße, 世界! 🙂 "),
        (("G",), ""),
        (("ENDEN", "nowhere"), SCRIPT.decode()),
    ],
)
def test_stop_strings_end_the_text_and_never_show(writer, stop, text):
    heard = Heard()
    (done,) = writer.generate([""], replace(GREEDY, max_tokens=70, stop=stop), heard)
    assert done.text == text == "".join(heard.parts.get(0, []))
    assert done.finish == ("separator" if text == SCRIPT.decode() else "stop")


def test_max_tokens_end_the_text_at_a_whole_character(writer):
    heard = Heard()
    (done,) = writer.generate([""], replace(GREEDY, max_tokens=13, stop=("世界",)), heard)
    # 13 bytes: the second of the two Chinese characters lacks one; the first was held back, then freed.
    assert (done.text, done.finish, len(done.tokens)) == ("Grüße, 世", "length", 13)
    assert heard.parts[0][-2:] == [" ", "世"]


def test_drawing_follows_the_seed_and_the_prompt_number(writer):
    # Flat logits over the vocabulary's known part, so that each draw shows the randomness.
    flat = jax.tree.map(jnp.zeros_like, writer.weights)
    drawing = Generator(writer.decoder, flat, writer.layout, DTYPES, writer.tokenizer)
    settings = Sampling(max_tokens=40, seed=5)
    first = drawing.generate(["a", "a", "b"], settings, ignore)
    assert first == drawing.generate(["a", "a", "b"], settings, ignore)
    assert first[0].tokens != first[1].tokens
    # Other neighbours, one of them much longer, change nothing.
    other = drawing.generate(["a", "c", "b" * 30], settings, ignore)
    assert other[0] == first[0]
    again = drawing.generate(["a", "a", "b"], replace(settings, seed=6), ignore)
    assert again[0].tokens != first[0].tokens
    assert max(max(each.tokens) for each in first + again) <= SEPARATOR
    # The likeliest of all tokens alike is the first.
    (narrow,) = drawing.generate(["a"], replace(settings, temperature=0.0), ignore)
    assert narrow.tokens == (0,) * 40


@pytest.mark.slow
def test_rows_fill_the_mesh():
    one_head = {"heads": "none", "kv_heads": "none"}
    layout = Mesh(data=2, fsdp=(2,), tensor=2, rules=one_head).build(jax.devices())
    decoder, weights = scripted(SCRIPT, layout)
    heard, settings = Heard(), replace(GREEDY, max_tokens=6)
    prompts = ["", "abcd", "Grü", "a", ""]
    done = generate(decoder, weights, layout, DTYPES, byte_tokenizer(), prompts, settings, heard)
    assert [completion.text for completion in done] == ["Grüß", "ße, ", "ße, ", "rüße", "Grüß"]
    assert ["".join(heard.parts[i]) for i in range(5)] == [completion.text for completion in done]


def test_no_prompts_give_no_completions(writer):
    assert writer.generate([], GREEDY, ignore) == []


def test_a_tokenizers_leading_space_is_left_out_of_a_whole_text_alone():
    script = b" one two"
    layout = Mesh(fsdp=(1,)).build(jax.devices()[:1])
    decoder, weights = scripted(script, layout)
    spaced = Generator(decoder, weights, layout, DTYPES, byte_tokenizer(leading_space=True))
    empty, after = spaced.generate(["", "xxxx"], replace(GREEDY, max_tokens=20), ignore)
    assert (empty.text, after.text) == ("one two", " two")


def naive_end(text, stop):
    """Where a text ends that is read one character at a time until a stop string is complete."""
    for end in range(1, len(text) + 1):
        complete = [each for each in stop if text[:end].endswith(each)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


LETTERS = st.text("abé🙂", max_size=30)


@given(LETTERS, st.lists(st.text("abé🙂", min_size=1, max_size=4), max_size=3), st.data())
def test_streams_equal_whole_texts_however_the_bytes_are_cut(text, stop, data):
    raw = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=12)))
    stream, shown = TextStream(tuple(stop)), ""
    expected, stopped = naive_end(text, stop)
    for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True):
        shown += stream.push(raw[start:end])
        assert expected.startswith(shown), "something was shown that a stop string takes away"
        read = raw[:end].decode(errors="ignore")
        if not stream.stopped:
            # Held back is only what could begin a stop string.
            held = read[len(shown) :]
            assert read.startswith(shown)
            assert not held or any(each.startswith(held) for each in stop)
    assert stream.stopped == stopped
    assert shown + stream.close() == expected


def test_bytes_that_are_no_utf8_are_marked():
    stream = TextStream(())
    assert [stream.push(data) for data in (b"a\xff", b"\xe4\xb8", b"b", b"\xf0\x9f")] == ["a�", "", "�b", ""]
    assert stream.close() == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Sampling(max_tokens=0), "max_tokens; expected 1 or more; got 0"),
        (Sampling(temperature=-0.5), "temperature; expected 0 .* got -0.5"),
        (Sampling(temperature=float("nan")), "temperature; expected 0 .* got nan"),
        (Sampling(temperature=1e-30), "temperature; expected 0 .* got 1e-30"),
        (Sampling(top_k=-1), "top_k; expected 0 .* got -1"),
        (Sampling(top_p=0.0), "top_p; expected above 0, at most 1 .* got 0.0"),
        (Sampling(top_p=1.5), "top_p; .* got 1.5"),
        (Sampling(seed=-1), "seed; expected 0 to .* got -1"),
        (Sampling(stop=("a", "")), "stop; expected a tuple of strings, none of them empty"),
        (Sampling(stop="abc"), "stop; expected a tuple of strings"),
    ],
)
def test_bad_settings_are_refused(writer, settings, message):
    with pytest.raises(InputError, match=message):
        writer.generate(["a"], settings, ignore)


def test_what_the_learned_positions_do_not_reach_is_refused(writer):
    # Three characters and the separator before them; the last token drawn needs no position.
    fits = REACH - 3
    (done,) = writer.generate(["abc"], replace(GREEDY, max_tokens=fits), ignore)
    assert done.finish == "separator"
    refusal = f"prompt 1 of 4 tokens with max_tokens {fits + 1}: .* at most {REACH}"
    with pytest.raises(InputError, match=refusal):
        writer.generate(["a", "abc"], replace(GREEDY, max_tokens=fits + 1), ignore)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(writer):
    small = replace(SCRIPTED, vocab=256).build()
    with pytest.raises(InputError, match="at most 256 ids; got 257"):
        Generator(small, writer.weights, writer.layout, DTYPES, writer.tokenizer)


def test_weights_that_are_not_finite_are_refused(writer):
    broken = jax.tree.map(lambda leaf: leaf.at[...].set(np.nan), writer.weights)
    generator = Generator(writer.decoder, broken, writer.layout, DTYPES, writer.tokenizer)
    with pytest.raises(InputError, match=r"not finite \(prompt 0, token 0\)"):
        generator.generate(["a"], replace(GREEDY, max_tokens=1), ignore)


def test_shapes_come_in_buckets(writer):
    settings = replace(GREEDY, max_tokens=5)
    writer.generate([""], settings, ignore)
    compiled = writer._first._cache_size(), writer._next._cache_size()
    for prompt in ("a", "b" * (PROMPT_BUCKET - 1)):
        writer.generate([prompt], settings, ignore)
    assert (writer._first._cache_size(), writer._next._cache_size()) == compiled
    writer.generate(["b" * PROMPT_BUCKET], settings, ignore)
    assert (writer._first._cache_size(), writer._next._cache_size()) == (compiled[0] + 1, compiled[1])
    assert REACH < CACHE_BUCKET


RUN = mpt.Config(layers=2, embed=16, heads=2, mlp=32, vocab=300)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory with two checkpoints, as training leaves it."""
    root = tmp_path_factory.mktemp("run")
    text = root / "text.txt"
    text.write_text("the cat sat on the mat and the dog sat on the log. " * 40, encoding="utf-8")
    train_tokenizer([text], root / "tokenizer", vocab=270, held_out=0.0)
    recipe = Recipe(model=RUN, data=TokenStore("store"), dtypes=Dtypes(compute="bfloat16"))
    recipe_file.save(str(root), recipe_file.Loaded(recipe, "", "run"))
    spec = RUN.build().spec()
    places = shardings(spec, Mesh(fsdp=(REST,)).build(jax.devices()[:2]))
    saved = {}
    with Checkpoints(root) as checkpoints:
        for step in (10, 20):
            rng = np.random.default_rng(step)
            drawn = spec.map(lambda param, rng=rng: rng.normal(size=param.shape(spec.dims)))
            saved[step] = jax.tree.map(lambda x, at: jax.device_put(np.float32(x), at), drawn, places)
            checkpoints.save(step, {"step": np.int32(step), "trainable": saved[step], "optimizer": {}}, {})
    return root, saved


def test_a_run_directory_is_enough(run):
    root, saved = run
    decoder, weights, layout, dtypes, tokenizer = load_run(root)
    assert (decoder.dims["vocab"], layout.mesh.size, tokenizer.size) == (300, 1, 270)
    assert dtypes == Dtypes(compute="bfloat16")
    for got, expected in zip(jax.tree.leaves(weights), jax.tree.leaves(saved[20]), strict=True):
        assert got.dtype == jnp.bfloat16
        assert (np.asarray(got) == np.asarray(expected).astype(jnp.bfloat16)).all()
    _, earlier, spread, _, _ = load_run(root, Mesh(fsdp=(2,), tensor=2), step=10)
    assert spread.mesh.size == 4
    table = earlier["embed"]["tokens"]
    assert table.sharding.shard_shape(table.shape) == (150, 8)
    assert (np.asarray(table) == np.asarray(saved[10]["embed"]["tokens"]).astype(jnp.bfloat16)).all()
    heard = Heard()
    (done,) = generate(
        decoder, weights, layout, dtypes, tokenizer, ["the cat"], Sampling(max_tokens=8, seed=3), heard
    )
    drawn = [token for token in done.tokens if token != tokenizer.separator]
    whole = tokenizer.decode_bytes(drawn).decode(errors="replace")
    assert whole.startswith(done.text)
    assert whole[len(done.text) :] in ("", "�")
    assert done.prompt_tokens == 1 + len(tokenizer.encode("the cat"))


def test_a_run_without_what_it_needs_is_refused(run, tmp_path):
    root, _ = run
    with pytest.raises(InputError, match="recipe.json"):
        load_run(tmp_path)
    (tmp_path / "recipe.json").write_text((root / "recipe.json").read_text())
    with pytest.raises(InputError, match="holds no checkpoint"):
        load_run(tmp_path)
    with pytest.raises(InputError, match="holds no tokenizer"):
        load_run_tokenizer(tmp_path)
    with pytest.raises(InputError, match=r"no complete checkpoint of step 15 .* \[10, 20\]"):
        load_run(root, step=15)


def test_a_remote_runs_tokenizer_is_copied_for_as_long_as_it_is_used(run):
    root, _ = run
    remote = fsspec.filesystem("memory")
    remote.put(str(root / "tokenizer") + "/", "memory://bucket/run/tokenizer/", recursive=True)
    tokenizer = load_run_tokenizer("memory://bucket/run")
    local = load_tokenizer(root / "tokenizer")
    assert (tokenizer.hash, tokenizer.encode("the cat")) == (local.hash, local.encode("the cat"))
    folder = Path(tokenizer.files[0]).parent
    assert folder.exists()
    del tokenizer
    gc.collect()
    assert not folder.exists()
