import json
import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaicjax import cli
from mosaicjax.data.build import build
from mosaicjax.data.fim import FillInMiddle
from mosaicjax.data.manifest import Layout, read_manifest
from mosaicjax.data.store import Store
from mosaicjax.data.tokenizer import load_tokenizer, train_tokenizer
from mosaicjax.errors import InputError

PREFIX, MIDDLE, SUFFIX = SENTINELS = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>")
SMALL = Layout(shard_tokens=65_536, part_characters=30_000)
# Documents that look like reordered ones, cuts within what is one token or one grapheme, and no ASCII.
AWKWARD = [
    "",
    "x",
    "".join(SENTINELS),
    f"a{MIDDLE}b{PREFIX}{SUFFIX}",
    "größe 日本語 🙂👩‍👩‍👧 e\u0301",
    "\r\n \t\x00",
]
TEXTS = st.text(max_size=40) | st.sampled_from(AWKWARD) | st.text("<fim_prexudl>|", max_size=60)


@pytest.fixture(scope="module")
def fim_tokenizer(tmp_path_factory, code_folder):
    folder = tmp_path_factory.mktemp("fim-tokenizer")
    return train_tokenizer([code_folder], folder, vocab=512, held_out=0.0, special=SENTINELS)


def undo(ids, tokenizer):
    """What kind of document some ids are, and its text, told by the sentinels alone."""
    named = {
        token: json.loads(tokenizer.files[0].read_text())["model"]["vocab"][token] for token in SENTINELS
    }
    places = {token: [i for i, id_ in enumerate(ids) if id_ == at] for token, at in named.items()}
    if not any(places.values()):
        return "plain", tokenizer.decode_bytes(ids)
    ((prefix,), (middle,), (suffix,)) = places[PREFIX], places[MIDDLE], places[SUFFIX]
    assert prefix == 0 and prefix < suffix < middle
    first, last, rest = ids[prefix + 1 : suffix], ids[suffix + 1 : middle], ids[middle + 1 :]
    if suffix == prefix + 1 and not tokenizer.decode_bytes(first):
        # Prefix-suffix-middle with an empty prefix is the same as suffix-prefix-middle with one.
        return "spm", tokenizer.decode_bytes(rest) + tokenizer.decode_bytes(last)
    return "psm", b"".join(map(tokenizer.decode_bytes, (first, rest, last)))


def encoded(fim, text, seed, tokenizer):
    kind, pieces = fim.split(text, seed)
    return kind, pieces, fim.join(kind, tuple(map(tokenizer.encode, pieces)), tokenizer)


@settings(max_examples=100)
@given(text=TEXTS, seed=st.integers(0, 2**32), spm=st.sampled_from([0.0, 0.5, 1.0]))
def test_undone_it_is_the_document(text, seed, spm, fim_tokenizer):
    fim = FillInMiddle(1.0, spm).resolve(fim_tokenizer)
    kind, pieces, ids = encoded(fim, text, seed, fim_tokenizer)
    assert "".join(pieces) == text and kind == ({0.0: 1, 1.0: 2}.get(spm) or kind)
    said, back = undo(ids, fim_tokenizer)
    assert back == text.encode()
    assert said == ("spm" if kind == 2 or not pieces[0] else "psm")
    assert fim_tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert fim.split(text, seed) == (kind, pieces)


def within(count, total, share):
    """Whether a count is within five standard deviations of a binomial's mean."""
    return abs(count - total * share) <= 5 * math.sqrt(total * share * (1 - share))


@pytest.mark.parametrize("rate, spm", [(0.5, 0.5), (0.9, 0.1), (0.05, 0.8)])
def test_shares_and_cuts_are_those_asked_for(rate, spm):
    fim, count = FillInMiddle(rate, spm, SENTINELS), 20_000
    found = [fim.split(f"document {i}", seed=3) for i in range(count)]
    reordered = [entry for entry in found if entry[0] != 0]
    assert within(len(reordered), count, rate)
    assert within(sum(kind == 2 for kind, _ in reordered), len(reordered), spm)
    other = [fim.split(f"document {i}", seed=4)[0] != 0 for i in range(count)]
    both = sum(a and kind != 0 for a, (kind, _) in zip(other, found, strict=True))
    assert within(both, count, rate * rate)


def test_every_pair_of_cuts_is_as_likely():
    # A document of 3 characters can be cut at 4 places: 16 ordered pairs of cuts.
    fim, count = FillInMiddle(1.0, 0.5, SENTINELS), 16_000
    cuts = np.zeros((4, 4), int)
    for seed in range(count):
        prefix, middle, _ = fim.split("abc", seed)[1]
        cuts[len(prefix), len(prefix) + len(middle)] += 1
    for first in range(4):
        for last in range(4):
            assert within(cuts[first, last], count, (2 if first < last else 1) / 16 * (first <= last))


@pytest.fixture(scope="module")
def rows(tmp_path_factory, write_rows):
    texts = [f"{i}: " + f"größe {PREFIX} x = {i}\n" * (i % 7 + 1) for i in range(600)]
    return texts, write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", texts)


OPTIONS = {"held_out": 0.2, "seed": 5, "layout": SMALL, "progress": False}


@pytest.fixture(scope="module")
def stores(rows, fim_tokenizer, tmp_path_factory):
    """Stores of the same documents, with a half reordered and without."""
    folder = tmp_path_factory.mktemp("stores")
    for name, fim in (("plain", None), ("half", FillInMiddle(0.5, 0.25))):
        build([rows[1]], folder / name, tokenizer=fim_tokenizer, workers=1, fim=fim, **OPTIONS)
    return folder


def documents(store, name):
    split = store.split(name)
    return [split.tokens(*span).tolist() for span in split.spans().tolist()], split.document_bytes().tolist()


def test_a_store_of_it(rows, stores, fim_tokenizer):
    half, plain = Store.open(stores / "half", verify=True), Store.open(stores / "plain")
    found, sizes = documents(half, "train")
    undone = [undo(ids, fim_tokenizer) for ids in found]
    texts = [fim_tokenizer.decode_bytes(ids) for ids in documents(plain, "train")[0]]
    assert [text for _, text in undone] == texts and sizes == [len(text) for text in texts]
    counts = half.manifest.fim
    assert sum(kind != "plain" for kind, _ in undone) == counts["psm"] + counts["spm"]
    assert within(counts["psm"] + counts["spm"], len(found), 0.5)
    assert sum(fim_tokenizer.token_bytes[ids].sum() for ids in found) == half.manifest.splits["train"].bytes
    assert half.manifest.settings.fim == FillInMiddle(0.5, 0.25, SENTINELS)
    # Held-out documents are as they were, so that bits a byte mean what they meant.
    assert documents(half, "validation") == documents(plain, "validation")
    assert plain.manifest.fim == {} and plain.manifest.settings.fim is None


@pytest.mark.parametrize("workers, characters", [(2, 10_000), (1, 2_000)])
def test_workers_and_parts_decide_nothing(
    rows, stores, fim_tokenizer, data_digests, tmp_path, workers, characters
):
    options = OPTIONS | {"layout": Layout(shard_tokens=65_536, part_characters=characters)}
    fim = FillInMiddle(0.5, 0.25)
    build([rows[1]], tmp_path / "s", tokenizer=fim_tokenizer, workers=workers, fim=fim, **options)
    assert data_digests(tmp_path / "s") == data_digests(stores / "half")
    assert read_manifest(tmp_path / "s").fim == read_manifest(stores / "half").fim


def test_an_interrupted_build_goes_on_to_the_same(rows, stores, fim_tokenizer, data_digests, tmp_path):
    class Stopped(Exception):
        pass

    left = [3]

    def stop(event, arguments):
        if left and event == "os.rename" and ".npy." in str(arguments[0]):
            left[0] -= 1
            if left[0] == 0:
                left.clear()
                raise Stopped

    sys.addaudithook(stop)
    options = OPTIONS | {"layout": Layout(shard_tokens=65_536, part_characters=5_000)}
    given = {"tokenizer": fim_tokenizer, "workers": 1, "fim": FillInMiddle(0.5, 0.25), **options}
    with pytest.raises(Stopped):
        build([rows[1]], tmp_path / "s", **given)
    assert len(list((tmp_path / "s").rglob("*.npy"))) == 2
    for other in (None, FillInMiddle(0.5, 0.5), FillInMiddle(0.4, 0.25)):
        with pytest.raises(InputError, match="was begun with another fim"):
            build([rows[1]], tmp_path / "s", **given | {"fim": other})
    build([rows[1]], tmp_path / "s", **given)
    assert data_digests(tmp_path / "s") == data_digests(stores / "half")
    assert read_manifest(tmp_path / "s").fim == read_manifest(stores / "half").fim


def test_the_command(rows, fim_tokenizer, stores, data_digests, tmp_path, capsys):
    folder = tmp_path / "tokenizer"
    special = [word for token in SENTINELS for word in ("--special", token)]
    made = ["data", "train-tokenizer", str(rows[1]), "--out", str(folder), "--vocab", "300", *special]
    assert cli.main(made) == 0
    assert load_tokenizer(folder).special == {"<|endoftext|>": 0, PREFIX: 1, MIDDLE: 2, SUFFIX: 3}
    out = str(tmp_path / "store")
    given = ["data", "build", str(rows[1]), "--out", out, "--tokenizer", str(folder), "--workers", "1"]
    assert cli.main([*given, "--fim", "1", "--fim-spm", "0", "--fim-tokens", ",".join(SENTINELS)]) == 0
    count = read_manifest(tmp_path / "store").splits["train"].documents
    assert (
        f"fill-in-the-middle: {count} documents as prefix, suffix, middle and 0 as" in capsys.readouterr().out
    )
    for wrong, said in (
        (["--fim", "1.5"], "--fim is a share of the documents; expected 0 to 1; got 1.5"),
        (["--fim", "0.5", "--fim-spm", "-1"], "--fim-spm is a share"),
        (["--fim-tokens", ",".join(SENTINELS)], "--fim-tokens without --fim"),
        (["--fim", "0.5", "--fim-tokens", "<a>,<b>,<c>"], "expected <a>,<b>,<c>; got <fim_middle>, "),
        (["--fim", "0.5", "--fim-tokens", f"{PREFIX},{PREFIX},{SUFFIX}"], "three sentinels among"),
        (["--fim", "0.5", "--fim-tokens", f"{PREFIX},{SUFFIX}"], "three sentinels among"),
    ):
        assert cli.main([*given, *wrong]) == 2
        assert said in capsys.readouterr().err


def test_tokenizers_that_cannot_are_refused(rows, tokenizer, fim_tokenizer, tmp_path):
    def refused(tokenizer, said):
        with pytest.raises(InputError, match=said):
            build([rows[1]], tmp_path / "s", tokenizer=tokenizer, fim=FillInMiddle(0.5), **OPTIONS)

    refused(tokenizer, r"needs three sentinels .* expected <fim_prefix>,<fim_middle>,<fim_suffix> or")
    file = json.loads(fim_tokenizer.files[0].read_text())
    # An added token that is not special would be found in documents that hold its text.
    plain = file | {"added_tokens": [token | {"special": token["id"] == 0} for token in file["added_tokens"]]}
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "tokenizer.json").write_text(json.dumps(plain))
    refused(load_tokenizer(tmp_path / "plain"), r"fix: --fim-tokens .* `special` true")
    spaced = json.loads(fim_tokenizer.files[0].read_text())
    spaced["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True
    (tmp_path / "spaced").mkdir()
    (tmp_path / "spaced" / "tokenizer.json").write_text(json.dumps(spaced))
    refused(load_tokenizer(tmp_path / "spaced"), "puts a space before a text")


@pytest.mark.parametrize("special", [("the",), ("",), ("</s>",), ("<a>", "<a>"), ("<|endoftext|>",)])
def test_special_tokens_that_text_could_be_are_refused(special, code_folder, tmp_path):
    with pytest.raises(InputError, match="a special token; expected a name that is no word, once"):
        train_tokenizer([code_folder], tmp_path, vocab=512, held_out=0.0, special=special)


def test_special_tokens_change_no_other_encoding(code_folder, tokenizer, fim_tokenizer):
    # The same merges, 3 ids later and 3 fewer.
    text = (code_folder / "header.py").read_text()
    assert fim_tokenizer.encoder == tokenizer.encoder == "tiktoken"
    shifted = [id_ - 3 for id_ in fim_tokenizer.encode(text)]
    assert tokenizer.decode_bytes(shifted) == text.encode()
