"""A look at a store against the documents that it was built of."""

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaicjax import cli
from mosaicjax.data import inspect
from mosaicjax.data.build import build
from mosaicjax.data.store import Store


@given(st.lists(st.integers(0, 5_000), min_size=1, max_size=50))
def test_bins_double(lengths):
    found = inspect.Lengths.of(np.array(lengths, np.int64))
    names = [found.name(number) for number in range(len(found.documents))]
    expected, tokens = Counter(), Counter()
    for length in lengths:
        for number, name in enumerate(names):
            low, _, high = name.replace(",", "").partition("-")
            if int(low) <= length <= int(high or low):
                expected[number] += 1
                tokens[number] += length
    assert found.documents.tolist() == [expected[number] for number in range(len(names))]
    assert found.tokens.tolist() == [tokens[number] for number in range(len(names))]
    assert sum(found.documents) == len(lengths)


@pytest.fixture(scope="module")
def stores(tokenizer, write_rows, tmp_path_factory):
    """Two stores, and the texts of the first: 90 of them, of which 30 are copies of 10."""
    folder = tmp_path_factory.mktemp("inspect")
    texts = [f"text {i} " * (i + 1) for i in range(50)] + [f"copied {i % 10}" for i in range(40)]
    for name, some in (("one", texts), ("two", texts[:20])):
        source = write_rows(folder / f"{name}.jsonl", some)
        build([source], folder / name, tokenizer=tokenizer, held_out=0.0, workers=1, progress=False)
    return folder, texts


def test_what_is_said_of_two_stores(stores, tokenizer, tmp_path, capsys):
    folder, texts = stores
    paths = [str(folder / "one"), str(folder / "two")]
    picture = tmp_path / "lengths.png"
    assert cli.main(["data", "inspect", *paths, "--documents", "4", "--picture", str(picture)]) == 0
    said = capsys.readouterr().out
    one, two = said.split(f"{paths[1]}: ")
    lengths = [len(tokenizer.encode(text)) for text in texts]
    tokens = sum(lengths) + len(texts) + 1
    others = sum(len(tokenizer.encode(text)) for text in texts[:20]) + 21
    share = tokens / (tokens + others)
    assert f"train: 90 documents, {tokens:,} tokens, {share:.1%} of all stores" in one
    assert f"{1 - share:.1%} of all stores" in two
    assert f"mean {np.mean(lengths):,.1f}, half below {np.median(lengths):,.0f}" in one
    assert "duplicates: 30 documents are copies, of 10 texts" in one
    assert "duplicates: 0 documents are copies, of 0 texts" in two
    counts = [int(each.replace(",", "")) for each in re.findall(r"# +([\d,]+) documents", one)]
    assert sum(counts) == 90
    split = Store.open(paths[0]).split("train")
    for number in (0, 22, 45, 67):
        span = split.spans(number, number + 1)[0].tolist()
        text = tokenizer.decode(split.tokens(*span).tolist())
        heading = f"document {number} of 90, {span[1] - span[0]:,} tokens:\n    | {text[:30]}"
        assert heading in one
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_duplicates_over_blocks(stores):
    """Documents are read some at a time; what lies in another block is seen too."""
    folder, _ = stores
    split = Store.open(folder / "one").split("train")
    assert inspect.duplicates(split, block=50) == (30, 10)


def test_a_split_without_documents_is_refused(stores, capsys):
    folder, _ = stores
    assert cli.main(["data", "inspect", str(folder / "one"), "--split", "validation"]) == 2
    assert "has no documents in validation; fix: another --split" in capsys.readouterr().err
    assert cli.main(["data", "inspect", str(folder / "absent")]) == 2
    assert "there is no token store at" in capsys.readouterr().err
