"""Preference pairs: which rows make them, which tokens bear loss, and that both answers stay together."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaicjax import cli
from mosaicjax.data import parts
from mosaicjax.data.build import build
from mosaicjax.data.chat import Chat, LossOn
from mosaicjax.data.conversations import Format
from mosaicjax.data.documents import open_sources
from mosaicjax.data.fim import FillInMiddle
from mosaicjax.data.held_pairs import HeldOutPairs, runs
from mosaicjax.data.loss_mask import encode_marked
from mosaicjax.data.manifest import Layout, read_manifest
from mosaicjax.data.marked import Pair
from mosaicjax.data.packing import Packing
from mosaicjax.data.rows import Packed
from mosaicjax.data.shards import shuffle
from mosaicjax.data.split import is_held_out
from mosaicjax.data.store import Store
from mosaicjax.data.stream import Drawn, Stream
from mosaicjax.data.tokenizer import load_tokenizer, train_tokenizer
from mosaicjax.errors import InputError
from tests import tiny

SPECIAL = ("<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module")
def pair_tokenizer(tmp_path_factory, code_folder):
    """Ours, with ChatML's special tokens."""
    folder = tmp_path_factory.mktemp("pairs-tokenizer")
    return train_tokenizer([code_folder], folder, vocab=600, held_out=0.0, special=SPECIAL)


@pytest.fixture(scope="module")
def chatml(pair_tokenizer):
    return Chat.of("chatml", pair_tokenizer)


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be kind."}
TEXTS = {"prompt": "Two?", "chosen": "2.", "rejected": "3."}
ASKED = "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n"
BEFORE = (
    "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHi.<|im_end|>\n"
)


def shown(marked):
    """A document with what is learned of it in double brackets."""
    text, at = "", 0
    for first, last in marked.learned:
        text += f"{marked.text[at:first]}⟦{marked.text[first:last]}⟧"
        at = last
    return text + marked.text[at:]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (TEXTS, ASKED),
        ({"prompt": [user("Two?")], "chosen": [said("2.")], "rejected": [said("3.")]}, ASKED),
        ({"prompt": "Two?", "chosen": [said("2.")], "rejected": [said("3.")]}, ASKED),
        ({"prompt": [user("Two?")], "chosen": "2.", "rejected": "3."}, ASKED),
        ({"chosen": [user("Two?"), said("2.")], "rejected": [user("Two?"), said("3.")]}, ASKED),
        (
            {"prompt": " Two?", "chosen": [user("Two?"), said("2.")], "rejected": [user("Two?"), said("3.")]},
            ASKED,
        ),
        (
            {
                "chosen": [SYSTEM, user("Hi"), said("Hi."), user("Two?"), said("2.")],
                "rejected": [SYSTEM, user("Hi"), said("Hi."), user("Two?"), said("3.")],
                "prompt_id": 7,
            },
            BEFORE + ASKED,
        ),
        (
            {
                "prompt": [SYSTEM, user("Hi"), said("Hi."), user("Two?")],
                "chosen": [said("2.")],
                "rejected": [said("3.")],
            },
            BEFORE + ASKED,
        ),
    ],
)
def test_the_last_answer_alone_is_learned(chatml, row, prompt):
    """Of every form of row, found by its fields, with earlier answers among the prompt."""
    for chat in (chatml.of_pairs(), Chat.of("chatml", _tokenizer_of(chatml), format_=Format.PREFERENCE)):
        pair = chat.content(row, "a row")
        assert isinstance(pair, Pair)
        assert shown(pair.chosen) == f"{prompt}⟦2.<|im_end|>⟧\n"
        assert shown(pair.rejected) == f"{prompt}⟦3.<|im_end|>⟧\n"
    found = chatml.content(row, "a row")
    assert isinstance(found, Pair) and found.chosen.text == pair.chosen.text


def _tokenizer_of(chat):
    return SimpleNamespace(
        files=[Path("nowhere/tokenizer.json")],
        special=dict.fromkeys(chat.special, 0),
        separator_token=chat.eos,
    )


def test_tokens_of_a_pair_by_hand(chatml, pair_tokenizer):
    """One token after the other: the answer's bear loss, the prompt's and the template's do not."""
    pair = chatml.of_pairs().content({"prompt": "a", "chosen": "bb", "rejected": "c"}, "a row")
    encoded = list(encode_marked([pair.chosen, pair.rejected], pair_tokenizer))
    special, encode = pair_tokenizer.special, pair_tokenizer.encode
    for (ids, bears), answer in zip(encoded, ("bb", "c"), strict=True):
        answered = encode(f"assistant\n{answer}")
        # Those that have a byte of the answer bear loss.
        ends = np.cumsum([len(pair_tokenizer.pieces[each]) for each in answered])
        expected = [
            ([special["<|im_start|>"], *encode("user\na"), special["<|im_end|>"], *encode("\n")], None),
            ([special["<|im_start|>"]], None),
            (answered, ends > len("assistant\n")),
            ([special["<|im_end|>"]], [True]),
            (encode("\n"), None),
        ]
        assert ids.tolist() == [each for part, _ in expected for each in part]
        masks = [[False] * len(part) if mask is None else list(mask) for part, mask in expected]
        assert bears.tolist() == [bool(each) for mask in masks for each in mask]


TURNED = [user("Two?"), said("2."), user("Sure?")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "line 2 lacks 'rejected'; got chosen, prompt"),
        ({"prompt": "a", "rejected": "b"}, "line 2 lacks 'chosen'; got prompt, rejected"),
        ({"chosen": "a", "rejected": "b"}, "line 2 lacks 'prompt'; got chosen, rejected"),
        ({"chosen": [said("a")], "rejected": [said("b")]}, "line 2 lacks 'prompt'"),
        (TEXTS | {"chosen": " \n"}, "line 2, field 'chosen' has an empty answer; expected a text"),
        (TEXTS | {"rejected": [said("")]}, "line 2, field 'rejected' has an empty answer"),
        (
            TEXTS | {"rejected": []},
            "line 2, field 'rejected', last turn; expected the assistant's; got no turn",
        ),
        (TEXTS | {"rejected": "2."}, "line 2: the template writes the same for chosen and rejected"),
        (TEXTS | {"rejected": 3}, "line 2, field 'rejected'; expected a string; got int"),
        (
            {"chosen": TURNED, "rejected": TURNED},
            "line 2, field 'chosen', last turn; expected the assistant's; got user",
        ),
        (
            {"chosen": [*TURNED, said("a")], "rejected": [user("Two?"), said("3."), *TURNED[2:], said("a")]},
            "line 2, field 'chosen' goes on from what both have in common; expected with one turn, the"
            " answer; got 3 turns",
        ),
        (
            {"prompt": "One?", "chosen": [*TURNED, said("a")], "rejected": [*TURNED, said("b")]},
            "line 2, field 'prompt' is none of the turns that chosen and rejected begin with",
        ),
        (
            {"prompt": [{"role": "bot", "content": "a"}], "chosen": "a", "rejected": "b"},
            "line 2, prompt, turn 0 has an unknown role",
        ),
        ({"prompt": "a", "response": "b"}, "line 2 lacks 'chosen'; got prompt, response"),
        (TEXTS | {"chosen": "a\ufdd0"}, "line 2 holds a character that is none"),
    ],
)
def test_rows_that_are_refused(chatml, pair_tokenizer, tmp_path, row, message):
    path = write(tmp_path / "rows.jsonl", [TEXTS, row])
    with pytest.raises(InputError) as refusal:
        build([path], tmp_path / "store", tokenizer=pair_tokenizer, chat=chatml, progress=False)
    assert message in str(refusal.value) and str(refusal.value).startswith(f"{path}, ")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_what_a_template_strips_does_not_tell_answers_apart(pair_tokenizer, tmp_path):
    template = tmp_path / "strip.jinja"
    template.write_text("{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{% endfor %}")
    chat = Chat.of(str(template), pair_tokenizer, format_=Format.PREFERENCE)
    with pytest.raises(InputError, match="a row: the template writes the same for chosen and rejected"):
        chat.content({"prompt": "a", "chosen": "b", "rejected": "b "}, "a row")


@pytest.mark.parametrize("first", [TEXTS, {"prompt": "a", "response": "b"}], ids=["pairs", "conversations"])
def test_a_store_is_of_one_kind(chatml, pair_tokenizer, tmp_path, first):
    other = {"prompt": "a", "response": "b"} if first is TEXTS else TEXTS
    path = write(tmp_path / "rows.jsonl", [first, other])
    with pytest.raises(InputError, match="line 2 ") as refusal:
        build([path], tmp_path / "store", tokenizer=pair_tokenizer, chat=chatml, progress=False)
    wanted = "lacks 'chosen'" if first is TEXTS else "is a preference pair, and the first row was none"
    assert wanted in str(refusal.value)


def test_rows_with_messages_beside_pairs_are_read_as_the_format_says(pair_tokenizer, chatml, tmp_path):
    row = TEXTS | {"messages": [user("Two?"), said("2.")], "score": 1.0}
    path = write(tmp_path / "rows.jsonl", [row, row])
    chat = Chat.of("chatml", pair_tokenizer, format_=Format.MESSAGES)
    options = {"tokenizer": pair_tokenizer, "held_out": 0.0, "progress": False}
    made = build([path], tmp_path / "messages", chat=chat, **options)
    assert made.splits["train"].documents == 2 and not made.settings.pairs
    made = build([path], tmp_path / "pairs", chat=chatml, **options)
    assert made.splits["train"].documents == 4 and made.settings.pairs


def test_what_does_not_go_with_pairs(chatml, pair_tokenizer, tmp_path):
    path = write(tmp_path / "rows.jsonl", [TEXTS])
    for options, message in (
        ({"filters": [tiny.losses]}, "--filter with preference pairs"),
        ({"drop_duplicates": True}, "--drop-duplicates with preference pairs"),
        ({"fim": FillInMiddle(0.5)}, "fill-in-the-middle of conversations"),
        ({"chat": Chat.of("chatml", pair_tokenizer, loss_on=LossOn.ALL)}, "--loss-on all with preference"),
    ):
        with pytest.raises(InputError, match=message):
            given = {"tokenizer": pair_tokenizer, "chat": chatml, "progress": False} | options
            build([path], tmp_path / "store", **given)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """300 pairs of many lengths, some prompts and some answers among them more than once."""
    random = np.random.default_rng(5)
    rows = []
    for number in range(300):
        prompt, *answers = (" ".join(random.choice(tiny.WORDS, int(n))) for n in random.integers(1, 60, 3))
        prompt = prompt if number % 7 else "what now"
        rows.append({"prompt": prompt, "chosen": f"{answers[0]} {number}", "rejected": answers[1]})
    return rows, write(tmp_path_factory.mktemp("written") / "rows.jsonl", rows)


def documents(store, split):
    """Every document of a split as text and its learned part, read without `Split.spans`."""
    tokens, loss = (split.tokens(0, len(split)), split.read_loss([(0, len(split))])()[0])
    at = np.flatnonzero(tokens == store.tokenizer.separator)
    pieces = [range(first + 1, last) for first, last in zip(at, at[1:], strict=False)]
    decode = store.tokenizer.decode
    return [
        (decode(tokens[piece].tolist()), decode([int(tokens[i]) for i in piece if loss[i]]))
        for piece in pieces
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_store_of_pairs(chatml, written, pair_tokenizer, tmp_path, workers):
    """Documents 2i and 2i + 1 are a pair, each once, in another order than the rows, on one side."""
    rows, path = written
    layout = Layout(shard_tokens=65_536, part_characters=5_000)
    options = {"tokenizer": pair_tokenizer, "held_out": 0.2, "progress": False, "layout": layout}
    manifest = build([path], tmp_path / "store", chat=chatml, workers=workers, **options)
    assert manifest == read_manifest(tmp_path / "store") and manifest.settings.pairs
    assert str(manifest.settings.chat).startswith("preference rows, loss on last")
    # The same settings again: the store is left as it is.
    assert build([path], tmp_path / "store", chat=chatml, workers=workers, **options) == manifest
    store = Store.open(tmp_path / "store", verify=True)
    found = {"train": [], "validation": []}
    for name, pairs in found.items():
        each = documents(store, store.split(name))
        for (chosen, liked), (rejected, other) in zip(each[::2], each[1::2], strict=True):
            assert chosen.endswith(liked + "\n") and rejected.endswith(other + "\n")
            prompt = chosen.removesuffix(liked + "\n")
            assert prompt == rejected.removesuffix(other + "\n")
            # Special tokens decode to nothing.
            asked = prompt.removeprefix("user\n").removesuffix("\nassistant\n")
            pairs.append((asked, liked, other))
    expected = [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    assert Counter(found["train"] + found["validation"]) == Counter(expected)
    assert 30 < len(found["validation"]) < 100
    order = [expected.index(pair) for pair in found["train"]]
    assert np.corrcoef(order, range(len(order)))[0, 1] < 0.3
    for name, pairs in found.items():
        both = [chatml.content(dict(zip(TEXTS, pair, strict=True)), "") for pair in pairs]
        texts = [f"{pair.chosen.text}\0{pair.rejected.text}" for pair in both]
        assert all(is_held_out(text, 0.2) == (name == "validation") for text in texts)


class Grouped:
    """An engine whose tasks read the sources, as a cluster's do, in this process."""

    reads_sources = True

    def run(self, function, tasks, most=None):
        for task in list(tasks):
            yield task, function(task)


def test_tasks_that_read_sources_make_the_same(chatml, written, pair_tokenizer, tmp_path, monkeypatch):
    """As Spark's do: groups of sources, whose first document is even."""
    rows, _ = written
    monkeypatch.setattr(parts, "GROUP_BYTES", 10_000)
    paths = [write(tmp_path / f"{n}.jsonl", rows[n * 50 : n * 50 + 50]) for n in range(6)]
    sources = open_sources(paths, rows=chatml.of_pairs())
    tables = []
    for engine in (Grouped(), parts_engine()):
        folder = tmp_path / type(engine).__name__
        folder.mkdir()
        settings = parts.PartSettings(
            folder,
            pair_tokenizer.files[0],
            pair_tokenizer.separator_token,
            "uint16",
            0.2,
            3,
            5_000,
            masked=True,
            pairs=True,
        )
        made = parts.tokenise(sources, settings, engine=engine, progress=False)
        tables.append(shuffle(made)[0])
    for name in ("train", "validation"):
        ours, theirs = (table[name] for table in tables)
        assert ours.counts == theirs.counts and ours.counts.documents % 2 == 0
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        np.testing.assert_array_equal(ours.bytes, theirs.bytes)


def parts_engine():
    from mosaicjax.data.workers import Cores

    return Cores(1)


def test_pairs_of_one_key_stay_pairs(monkeypatch, chatml, written, pair_tokenizer, tmp_path):
    """Even where all hashes are equal, within parts and between them."""
    rows, path = written
    monkeypatch.setattr(parts, "shuffle_key", lambda seed, number: 7)
    layout = Layout(shard_tokens=65_536, part_characters=5_000)
    options = {
        "tokenizer": pair_tokenizer,
        "held_out": 0.2,
        "progress": False,
        "layout": layout,
        "workers": 1,
    }
    build([path], tmp_path / "store", chat=chatml, **options)
    store = Store.open(tmp_path / "store")
    each = [learned for _, learned in documents(store, store.split("train"))]
    whole = {(row["chosen"], row["rejected"]) for row in rows}
    assert len(each) > 400 and whole.issuperset(zip(each[::2], each[1::2], strict=True))


def test_the_command_builds_pairs(written, pair_tokenizer, tmp_path, capsys):
    options = (
        "--tokenizer",
        pair_tokenizer.files[0],
        "--template",
        "chatml",
        "--held-out",
        0.1,
        "--workers",
        1,
    )
    command = ["data", "build", written[1], *options]
    assert cli.main([*map(str, command), "--out", str(tmp_path / "store")]) == 0
    assert read_manifest(tmp_path / "store").settings.pairs
    assert cli.main([*map(str, command), "--out", str(tmp_path / "b"), "--format", "preference"]) == 0
    assert read_manifest(tmp_path / "b").files == read_manifest(tmp_path / "store").files
    assert cli.main([*map(str, command), "--out", str(tmp_path / "c"), "--drop-duplicates"]) == 2
    assert "--drop-duplicates with preference pairs" in capsys.readouterr().err
    assert load_tokenizer(tmp_path / "store" / "tokenizer").hash == pair_tokenizer.hash


SEPARATOR = 0


class InMemory:
    """A split of documents of given lengths, whose tokens count up from 1."""

    masked = True

    def __init__(self, lengths):
        self.lengths = np.array(lengths, np.int64)
        self.counts = SimpleNamespace(documents=len(lengths))
        self.starts = 1 + np.cumsum(self.lengths + 1) - (self.lengths + 1)
        self.folder, self.identity = "in/memory", "memory"
        self.all = np.zeros(len(self), np.int64)
        for first, length in zip(self.starts, self.lengths, strict=True):
            self.all[first : first + length] = np.arange(first, first + length)

    def __len__(self):
        return int(self.lengths.sum()) + len(self.lengths) + 1

    def spans(self, first=0, last=None):
        return np.stack([self.starts, self.starts + self.lengths], axis=1)[first:last]

    def read(self, spans):
        return lambda: [self.all[first:last] for first, last in spans]

    def read_loss(self, spans):
        # Every third token.
        return lambda: [(self.all[first:last] % 3 == 0).astype(np.uint8) for first, last in spans]


def pairs_of(row):
    """The documents of a packed row, two and two, as their tokens, with all arrays compared by hand."""
    segments = row["segments"]
    found, at = [], 0
    for segment in range(1, segments.max() + 1):
        tokens = row["tokens"][segments == segment]
        place = slice(at, at + len(tokens))
        assert (segments[place] == segment).all(), "documents follow one another"
        targets = row["targets"][place]
        assert tokens[0] == SEPARATOR == targets[-1]
        assert tokens[1:].tolist() == targets[:-1].tolist()
        assert row["positions"][place].tolist() == list(range(len(tokens)))
        assert row["weights"][place].tolist() == [float(each % 3 == 0) for each in targets]
        found.append(tuple(tokens[1:].tolist()))
        at += len(tokens)
    assert (segments[at:] == 0).all() and (row["weights"][at:] == 0).all()
    assert len(found) % 2 == 0
    return list(zip(found[::2], found[1::2], strict=True))


PAIRS = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=60)


@given(
    lengths=PAIRS,
    room=st.integers(0, 40),
    region=st.sampled_from([20, 90, 10_000]),
    seed=st.integers(0, 99),
    batch=st.integers(1, 5),
)
def test_pairs_are_never_parted(lengths, room, region, seed, batch):
    """Whatever the lengths, row, regions and order: whole pairs in every row, each once an epoch."""
    split = InMemory([length for pair in lengths for length in pair])
    seq = max(chosen + rejected + 2 for chosen, rejected in lengths) + room
    # A region is as long as some rows at least, of which a small one is made here.
    found = packing(split, seq, region)
    expected = Counter(
        tuple(tuple(range(first, last)) for first, last in split.spans()[2 * i : 2 * i + 2].tolist())
        for i in range(len(lengths))
    )
    stream = Stream(
        [Drawn("", Packed(found), 1)], separator=SEPARATOR, seq=seq, batch=batch, seed=seed, isolate=True
    )
    epochs: list[Counter] = [Counter(), Counter()]
    for number in range(2 * len(found)):
        rows = stream.rows(number // batch, [number % batch])
        epochs[number // len(found)].update(pairs_of({name: array[0] for name, array in rows.items()}))
    assert epochs == [expected, expected]
    held = HeldOutPairs({"a": split, "b": split}, separator=SEPARATOR, seq=seq)
    assert held.names == ("a", "b") and len(held) % 2 == 0 and held.isolate
    order = np.random.default_rng(seed).permutation(len(held)).tolist()
    rows = held.rows(order)
    assert rows["domain"].tolist() == [int(number >= len(held) // 2) for number in order]
    seen = Counter()
    for i in range(len(held)):
        seen.update(pairs_of({name: array[i] for name, array in rows.items() if name != "domain"}))
    assert seen == expected + expected


def packing(split, seq, region):
    """`Packing.of` with regions of so many tokens, however long rows are."""
    found = Packing.of(split, seq, region=region, together=2)
    if region > 1_000:
        return found
    # Cut by hand at even documents, to have many regions of few rows.
    cuts = [0, *range(2, len(split.lengths), 4), len(split.lengths)]
    rows = [len(parts_of(split, low, high, seq)) for low, high in zip(cuts, cuts[1:], strict=False)]
    return Packing(split, seq, np.array(cuts), np.concatenate([[0], np.cumsum(rows)]), together=2)


def parts_of(split, low, high, seq):
    from mosaicjax.data.packing import packed

    return packed(split.spans(low, high), seq, 2)[1]


def test_regions_begin_with_a_pair():
    """Cut where documents of very different lengths fall, in a split of many regions."""
    lengths = np.random.default_rng(2).geometric(1 / 40, 4_000).clip(1, 400)
    split = InMemory(lengths)
    found = Packing.of(split, 900, region=3_000, together=2)
    assert len(found.documents) > 2 and (found.documents % 2 == 0).all()
    pieces = [row for row in found.pieces(0, len(found))]
    starts = {first - 1: number for number, (first, _) in enumerate(split.spans().tolist())}
    numbers = [[starts[first] for first, _ in row.tolist()] for row in pieces]
    assert all(each[1::2] == [number + 1 for number in each[::2]] for each in numbers)
    assert sorted(sum(numbers, [])) == list(range(4_000))


def test_pairs_longer_than_a_row_are_refused():
    split = InMemory([3, 4, 5, 5, 1, 1, 6, 6])
    assert len(Packing.of(split, 14, together=2)) == 3
    with pytest.raises(InputError) as refusal:
        Packing.of(split, 11, together=2)
    assert str(refusal.value) == (
        "2 of 4 pairs in in/memory are longer than a row; expected at most 11 tokens, separators among them;"
        " got 14 in the longest; fix: --seq 14 or more, or a store without them"
    )
    with pytest.raises(InputError, match="2 of 4 pairs"):
        HeldOutPairs({"": split}, separator=SEPARATOR, seq=11)


@given(st.sets(st.integers(0, 40)))
def test_runs_of_numbers(numbers):
    spans = runs(sorted(numbers))
    assert [number for span in spans for number in range(*span)] == sorted(numbers)
    assert all(before[1] < after[0] for before, after in zip(spans, spans[1:], strict=False))
