"""What a build leaves out: duplicates, and texts against which a plain function is."""

import json
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaicjax import cli
from mosaicjax.data.build import build
from mosaicjax.data.filters import described, find, first_against
from mosaicjax.data.fim import FillInMiddle
from mosaicjax.data.manifest import Layout
from mosaicjax.data.store import Store
from mosaicjax.data.tokenizer import train_tokenizer
from mosaicjax.errors import InputError


def short(text):
    return len(text) < 40


def even(text):
    return len(text) % 2 == 0


def broken(text):
    return text[1_000] == ""


def texts_of(store):
    """The documents of both splits as text."""
    found = {}
    for name in ("train", "validation"):
        split = store.split(name)
        spans = split.spans().tolist()
        found[name] = [store.tokenizer.decode(split.tokens(*span).tolist()) for span in spans]
    return found


@settings(max_examples=12)
@given(
    texts=st.lists(st.sampled_from([f"{'ab' * i} text {i}" for i in range(30)]), min_size=12, max_size=60),
    filters=st.sampled_from([(), (short,), (even,), (short, even), (even, short)]),
    drop=st.booleans(),
    characters=st.sampled_from([1, 200, 10_000]),
    seed=st.integers(0, 99),
)
def test_what_is_left_is_what_a_list_leaves(
    texts, filters, drop, characters, seed, tokenizer, write_rows, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("filters")
    source = write_rows(folder / "rows.jsonl", texts)
    layout = Layout(part_characters=characters, shard_tokens=2**16)
    options = {"held_out": 0.2, "seed": seed, "layout": layout, "workers": 1, "progress": False}
    left = Counter()
    kept = []
    for text in texts:
        against = [function for function in filters if not function(text)]
        if against:
            left[f"{__name__}:{against[0].__name__}"] += 1
        elif drop and text in kept:
            left["duplicate"] += 1
        else:
            kept.append(text)
    plain = texts_of_build(source, folder / "plain", tokenizer, options)
    expected = {name: [text for text in each if text in kept] for name, each in plain.items()}
    if drop:
        expected = {name: list(dict.fromkeys(each)) for name, each in expected.items()}
    if not expected["train"]:
        with pytest.raises(InputError, match="every document is held out"):
            build(
                [source],
                folder / "store",
                tokenizer=tokenizer,
                filters=filters,
                drop_duplicates=drop,
                **options,
            )
        return
    manifest = build(
        [source], folder / "store", tokenizer=tokenizer, filters=filters, drop_duplicates=drop, **options
    )
    # In the order that they had among all, and each once where copies are dropped.
    assert texts_of(Store.open(folder / "store", verify=True)) == expected
    assert manifest.skipped == {name: count for name, count in sorted(left.items()) if count}


def texts_of_build(source, out, tokenizer, options):
    """The documents of a build that leaves nothing out; both splits as they lie."""
    try:
        build([source], out, tokenizer=tokenizer, **options)
    except InputError:
        return {"train": [], "validation": []}
    return texts_of(Store.open(out))


def test_in_workers_and_by_name(tokenizer, write_rows, data_digests, tmp_path, monkeypatch, capsys):
    """The command, with functions of a module that lies where it is given, in two processes."""
    (tmp_path / "my_filters.py").write_text("def brief(text):\n    return len(text) < 60\n", encoding="utf-8")
    texts = [f"{i % 50} " * (i % 40 + 1) for i in range(400)]
    source = write_rows(tmp_path / "rows.jsonl", texts)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    command = ["data", "build", str(source), "--tokenizer", str(tokenizer.files[0]), "--held-out", "0.1"]
    options = ["--filter", "my_filters:brief", "--drop-duplicates"]
    for workers in ("1", "2"):
        assert cli.main([*command, *options, "--out", f"store{workers}", "--workers", workers]) == 0
    assert data_digests("store1") == data_digests("store2")
    left = len(texts) - len({text for text in texts if len(text) < 60})
    skipped = json.loads((tmp_path / "store1" / "manifest.json").read_text())["skipped"]
    assert sum(skipped.values()) == left and set(skipped) == {"duplicate", "my_filters:brief"}
    assert f"{skipped['duplicate']:,} duplicate" in capsys.readouterr().out
    # A filter that was edited is another setting.
    (tmp_path / "my_filters.py").write_text("def brief(text):\n    return len(text) < 61\n", encoding="utf-8")
    monkeypatch.delitem(sys.modules, "my_filters")
    assert cli.main([*command, *options, "--out", "store1", "--workers", "1"]) == 2
    assert "begun with another filters" in capsys.readouterr().err
    assert cli.main([*command, "--filter", "my_filters:absent", "--out", "other"]) == 2
    assert "no filter my_filters:absent; expected MODULE:FUNCTION" in capsys.readouterr().err


def test_duplicates_count_once_in_fill_in_the_middle(write_rows, tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [f"document {i % 20} of some words" for i in range(100)])
    special = ["<fim_prefix>", "<fim_middle>", "<fim_suffix>"]
    tokenizer = train_tokenizer([source], tmp_path / "tokenizer", vocab=270, held_out=0.0, special=special)
    manifest = build(
        [source],
        tmp_path / "store",
        tokenizer=tokenizer,
        workers=1,
        held_out=0.0,
        progress=False,
        fim=FillInMiddle(1.0, 0.5),
        drop_duplicates=True,
    )
    assert manifest.fim["psm"] + manifest.fim["spm"] == manifest.splits["train"].documents == 20


def test_functions_that_cannot_be():
    for function in (lambda text: True, len, "short"):
        with pytest.raises(InputError, match="a filter must be a function of a module"):
            described([function])
    assert described([short])[0].startswith(f"{__name__}:short ")
    assert find([f"{__name__}:even"]) == [even]
    with pytest.raises(InputError, match="the filter .*:broken failed: IndexError"):
        first_against([short, broken], "a text")
