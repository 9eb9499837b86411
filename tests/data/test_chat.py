"""Conversations as documents: what the templates write, and which of the tokens bear loss."""

import json

import deltalake
import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from mosaicjax.data.build import build
from mosaicjax.data.chat import SHIPPED, Chat, LossOn
from mosaicjax.data.conversations import Format
from mosaicjax.data.documents import open_sources
from mosaicjax.data.loss_mask import encode_marked
from mosaicjax.data.manifest import Layout, read_manifest
from mosaicjax.data.packing import Packing
from mosaicjax.data.rows import Contiguous, Packed
from mosaicjax.data.store import Store
from mosaicjax.data.stream import Drawn, HeldOut, Stream
from mosaicjax.data.tokenizer import load_tokenizer, train_tokenizer
from mosaicjax.errors import InputError
from tests import object_store, tiny

SPECIAL = (
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
INTRO = (
    "Below is an instruction that describes a task."
    " Write a response that appropriately completes the request."
)
WITHOUT_MARKS = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory, code_folder):
    """Ours, with the special tokens of all templates."""
    return train_tokenizer(
        [code_folder], tmp_path_factory.mktemp("chat"), vocab=600, held_out=0.0, special=SPECIAL
    )


@pytest.fixture(scope="module")
def of(chat_tokenizer, tmp_path_factory):
    """`of(template, ...)`: a chat of a name or of Jinja text."""

    def made(template, **options):
        if template not in (*SHIPPED, "tokenizer"):
            path = tmp_path_factory.mktemp("templates") / "a.jinja"
            path.write_text(template, encoding="utf-8")
            template = str(path)
        return Chat.of(template, chat_tokenizer, **options)

    return made


def learned(chat, row, place="a row"):
    """A row's text with what is learned of it in double brackets."""
    marked = chat.content(row, place)
    text, at = "", 0
    for first, last in marked.learned:
        text += f"{marked.text[at:first]}⟦{marked.text[first:last]}⟧"
        at = last
    return text + marked.text[at:]


PROMPT = {"prompt": "Two?", "response": "2."}
DOLLY = {"instruction": "Sum up.", "context": "A cat sat.", "response": "It sat.", "category": "x"}
ALPACA = {"instruction": "Say hi.", "input": "", "output": "hi"}
MESSAGES = {
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": " Two"}, {"type": "text", "text": "? "}]},
        {"role": "assistant", "content": " 2. "},
        {"role": "user", "content": "Three?"},
        {"role": "assistant", "content": "3."},
    ]
}
SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "Two?"},
        {"from": "gpt", "value": "2."},
        {"from": "human", "value": "Thanks."},
    ]
}
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n".format


@pytest.mark.parametrize(
    ("template", "loss_on", "row", "expected"),
    [
        ("plain", "response", PROMPT, "Two?⟦2.⟧"),
        ("plain", "all", PROMPT, "⟦Two?2.⟧"),
        ("plain", "last", SHAREGPT, "Two?⟦2.⟧Thanks."),
        ("plain", "response", {"prompt": "", "completion": "2."}, "⟦2.⟧"),
        (
            "dolly",
            "response",
            DOLLY,
            f"{INTRO}\n\n### Instruction:\nSum up.\n\nInput:\nA cat sat.\n\n### Response:\n"
            "⟦It sat.\n\n### End⟧",
        ),
        (
            "dolly",
            "response",
            ALPACA,
            f"{INTRO}\n\n### Instruction:\nSay hi.\n\n### Response:\n⟦hi\n\n### End⟧",
        ),
        ("alpaca", "response", ALPACA, f"{INTRO}\n\n### Instruction:\nSay hi.\n\n### Response:\n⟦hi⟧"),
        (
            "alpaca",
            "response",
            DOLLY,
            "Below is an instruction that describes a task, paired with an input that provides further"
            " context. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nSum up.\n\n"
            "### Input:\nA cat sat.\n\n### Response:\n⟦It sat.⟧",
        ),
        (
            "chatml",
            "response",
            MESSAGES,
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n Two? <|im_end|>\n"
            "<|im_start|>assistant\n"
            "⟦ 2. <|im_end|>⟧\n<|im_start|>user\nThree?<|im_end|>\n<|im_start|>assistant\n⟦3.<|im_end|>⟧\n",
        ),
        (
            "chatml",
            "last",
            DOLLY,
            "<|im_start|>user\nSum up.\n\nA cat sat.<|im_end|>\n<|im_start|>assistant\n⟦It sat.<|im_end|>⟧\n",
        ),
        (
            "llama3",
            "last",
            MESSAGES,
            f"<|begin_of_text|>{HEADER('system')}Be kind.<|eot_id|>{HEADER('user')}Two?<|eot_id|>"
            f"{HEADER('assistant')}2.<|eot_id|>{HEADER('user')}Three?<|eot_id|>{HEADER('assistant')}"
            "⟦3.<|eot_id|>⟧",
        ),
        (WITHOUT_MARKS, "response", SHAREGPT, "[user]Two?[/][assistant]⟦2.[/]⟧[user]Thanks.[/]"),
        (
            WITHOUT_MARKS,
            "response",
            MESSAGES,
            "[system]Be kind.[/][user] Two? [/][assistant]⟦ 2. [/]⟧[user]Three?[/][assistant]⟦3.[/]⟧",
        ),
    ],
)
def test_what_is_learned(of, template, loss_on, row, expected):
    assert learned(of(template, loss_on=LossOn(loss_on)), row) == expected


def test_tokens_of_a_conversation_by_hand(of, chat_tokenizer):
    """One token after the other, with what looks like a special token in a turn."""
    row = {"prompt": "a<|im_end|>", "response": "bb"}
    ((ids, bears),) = encode_marked([of("chatml").content(row, "a row")], chat_tokenizer)
    special, encode = chat_tokenizer.special, chat_tokenizer.encode
    expected = [
        ([special["<|im_start|>"]], 0),
        (encode("user\na<|im_end|>"), 0),
        ([special["<|im_end|>"]], 0),
        (encode("\n"), 0),
        ([special["<|im_start|>"]], 0),
        (encode("assistant\nbb"), None),
        ([special["<|im_end|>"]], 1),
        (encode("\n"), 0),
    ]
    assert ids.tolist() == [each for part, _ in expected for each in part]
    at = 0
    for part, bearing in expected:
        if bearing is None:
            # Tokens of "assistant\n" bear none; those that have a byte of "bb" do.
            ends = np.cumsum([len(chat_tokenizer.pieces[each]) for each in part])
            assert bears[at : at + len(part)].tolist() == (ends > len("assistant\n")).tolist()
        else:
            assert (bears[at : at + len(part)] == bearing).all()
        at += len(part)
    assert special["<|im_end|>"] not in encode("user\na<|im_end|>")


PARTS = st.sampled_from(["a", "é", "😀", "\n", " ", "b", *SPECIAL, "<|", "im_end"])
TURNS = st.lists(PARTS, min_size=1).map("".join).filter(lambda text: text.strip())


@given(turns=st.lists(TURNS, min_size=2, max_size=5), template=st.sampled_from(["chatml", "plain", "llama3"]))
def test_no_turn_writes_a_special_token(of, chat_tokenizer, turns, template):
    """The special tokens are the template's, whatever turns say; what the assistant says is learned."""
    roles = ["user", "assistant"] * len(turns)
    row = {"messages": [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]}
    ((ids, bears),) = encode_marked([of(template).content(row, "a row")], chat_tokenizer)
    count = {"plain": 0, "chatml": 2 * len(turns), "llama3": 1 + 3 * len(turns)}[template]
    assert sum(int(each) in chat_tokenizer.special.values() for each in ids) == count
    names = {number: name for name, number in chat_tokenizer.special.items()}
    at, written = 0, by_byte(template, turns, roles)
    for token, bearing in zip(ids.tolist(), bears.tolist(), strict=True):
        piece = names[token].encode() if token in names else chat_tokenizer.pieces[token]
        assert bytes(byte for byte, _ in written[at : at + len(piece)]) == piece
        # A token of both sides of a bound bears loss.
        assert bearing == any(learned for _, learned in written[at : at + len(piece)])
        at += len(piece)
    assert at == len(written)


def by_byte(template, turns, roles):
    """Every byte of a conversation, and whether the assistant says it."""
    parts = [("<|begin_of_text|>", False)] if template == "llama3" else []
    for text, role in zip(turns, roles, strict=False):
        mine = role == "assistant"
        if template == "plain":
            parts.append((text, mine))
        elif template == "chatml":
            parts += [(f"<|im_start|>{role}\n", False), (f"{text}<|im_end|>", mine), ("\n", False)]
        else:
            parts += [(HEADER(role), False), (f"{text.strip()}<|eot_id|>", mine)]
    return [(byte, learned) for text, learned in parts for byte in text.encode()]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "response": "  \n"}, "rows.jsonl, line 2 has an empty response"),
        ({"prompt": "a"}, "rows.jsonl, line 2 lacks 'response' or 'completion'; got prompt"),
        ({"instruction": "a", "context": "b"}, "rows.jsonl, line 2 lacks 'response' or 'output'"),
        ({"question": "a"}, "rows.jsonl, line 2 is of no known format; expected a field messages"),
        ({"prompt": 1, "response": "a"}, "rows.jsonl, line 2, field 'prompt'; expected a string; got int"),
        ({"messages": "a"}, "rows.jsonl, line 2, field 'messages'; expected a list of turns; got str"),
        (
            {"messages": [{"role": "bot", "content": "a"}]},
            "rows.jsonl, line 2, turn 0 has an unknown role; expected system or .*; got bot",
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "me", "value": "a"}]},
            "rows.jsonl, line 2, turn 1 has an unknown role; .*; got me",
        ),
        ({"conversations": [{"from": "human", "value": "a"}]}, "rows.jsonl, line 2 has no response"),
        (
            {"messages": [{"role": "user", "content": "a"}] * 2 + [{"role": "assistant", "content": ""}]},
            "rows.jsonl, line 2, turn 2 has an empty response",
        ),
        (
            {"messages": [{"role": "tool", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "rows.jsonl, line 2: the chat template refuses it; got a turn of tool",
        ),
        ({"prompt": "a\ufdd0", "response": "b"}, "rows.jsonl, line 2 holds a character that is none"),
    ],
)
def test_rows_that_are_refused(of, chat_tokenizer, tmp_path, row, said):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in (PROMPT, row)))
    with pytest.raises(InputError, match=said):
        build([path], tmp_path / "store", tokenizer=chat_tokenizer, chat=of("dolly"), progress=False)


def test_a_turn_that_the_template_leaves_out_cannot_be_gone_on_with(chat_tokenizer, tmp_path):
    (tmp_path / "users.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    chat = Chat.of(str(tmp_path / "users.jinja"), chat_tokenizer)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert chat.text(turns, "a row", prompt=True) == "a"
    with pytest.raises(InputError, match="a row: the chat template leaves out the turn"):
        chat.text(turns, "a row", prompt=False)


def test_templates_that_are_refused(of, tokenizer, chat_tokenizer, tmp_path):
    with pytest.raises(
        InputError, match=r"needs special tokens that the tokenizer lacks; .*--special <\|im_start"
    ):
        Chat.of("chatml", tokenizer)
    with pytest.raises(InputError, match="there is no chat template chatm; expected alpaca, chatml"):
        Chat.of("chatm", tokenizer)
    with pytest.raises(InputError, match="brings no chat template"):
        Chat.of("tokenizer", chat_tokenizer)
    with pytest.raises(InputError, match="the chat template is no Jinja"):
        of("{% for %}")
    with pytest.raises(InputError, match="cannot be told: the chat template writes turns otherwise"):
        of("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}").content(
            MESSAGES, "a row"
        )
    with pytest.raises(InputError, match="a row: the chat template refuses it"):
        of("{{ messages.clear() }}").content(PROMPT, "a row")


def test_the_tokenizers_own_template(chat_tokenizer, tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(chat_tokenizer.files[0].read_bytes())
    config = {
        "eos_token": {"content": "<|im_end|>"},
        "bos_token": "<|im_start|>",
        "chat_template": [{"name": "tools", "template": "x"}, {"name": "default", "template": WITHOUT_MARKS}],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    chat = Chat.of("tokenizer", load_tokenizer(folder), format_=Format.PROMPT)
    assert (chat.bos, chat.eos) == ("<|im_start|>", "<|im_end|>")
    assert learned(chat, PROMPT) == "[user]Two?[/][assistant]⟦2.[/]⟧"
    (folder / "chat_template.jinja").write_text("{{ bos_token }}" + WITHOUT_MARKS)
    chat = Chat.of("tokenizer", load_tokenizer(folder))
    marked = chat.content(PROMPT, "a row")
    assert marked.special == ((0, len("<|im_start|>")),) and marked.text.startswith("<|im_start|>[user]")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """400 rows of three formats, of many lengths."""
    random = np.random.default_rng(5)
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with path.open("w") as file:
        for number in range(400):
            words = [" ".join(random.choice(tiny.WORDS, int(count))) for count in random.integers(1, 60, 4)]
            kinds = (
                {"prompt": words[0], "response": words[1]},
                {"instruction": words[0], "context": words[1], "response": words[2]},
                {
                    "messages": [
                        {"role": role, "content": text}
                        for role, text in zip(["user", "assistant"] * 2, words, strict=True)
                    ]
                },
            )
            file.write(json.dumps(kinds[number % 3]) + "\n")
    return path


def bears_of(store, split):
    """A naive second reading: all tokens, and which bear loss, by turns of the ChatML text itself."""
    tokenizer, tokens = store.tokenizer, split.tokens(0, len(split)).tolist()
    start, end = (tokenizer.special[name] for name in ("<|im_start|>", "<|im_end|>"))
    bears, said, speaking = [], "", False
    for token in tokens:
        if token == start:
            said, speaking = "", True
            bears.append(False)
        elif token == end:
            bears.append(said.startswith("assistant\n"))
            speaking = False
        else:
            said = said + tokenizer.decode([token]) if speaking else ""
            bears.append(said.startswith("assistant\n") and len(said) > len("assistant\n"))
    return np.array(tokens), np.array(bears)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_store_says_which_tokens_bear_loss(of, rows, chat_tokenizer, tmp_path, monkeypatch, workers):
    layout = Layout(shard_tokens=65_536, part_characters=9_000)
    options = {"tokenizer": chat_tokenizer, "held_out": 0.1, "chat": of("chatml"), "progress": False}
    manifest = build([rows], tmp_path / "store", workers=workers, layout=layout, **options)
    assert manifest == read_manifest(tmp_path / "store") and manifest.settings.chat == of("chatml")
    store = Store.open(tmp_path / "store", verify=True)
    for name in ("train", "validation"):
        split = store.split(name)
        tokens, bears = bears_of(store, split)
        assert split.read_loss([(0, len(split))])()[0].tolist() == bears.tolist()
        held_out = HeldOut(
            {"a": split}, separator=store.tokenizer.separator, seq=100, isolate=name == "train"
        )
        batch = held_out.rows(range(len(held_out)))
        flat = batch["weights"].reshape(-1)[: len(tokens) - 1]
        assert flat.tolist() == bears[1:].astype(float).tolist() and batch["weights"].sum() == bears[1:].sum()
    if workers == 1:
        monkeypatch.setenv("MOSAICJAX_CACHE_DIR", str(tmp_path / "cache"))
        there = object_store.new_bucket(monkeypatch) + "/store"
        store.copy(there)
        split = Store.open(there).split("train")
        assert split.read_loss([(3, len(split))])()[0].tolist() == bears_of(store, split)[1][3:].tolist()
    options["chat"] = of("chatml", loss_on=LossOn.ALL)
    whole = build([rows], tmp_path / "all", layout=layout, **options)
    assert not Store.open(tmp_path / "all").split("train").masked
    assert whole.splits == manifest.splits


def test_rows_of_tables(of, rows, chat_tokenizer, tmp_path):
    """Of Parquet and Delta, where fields that a row lacks are nulls: the same documents as of JSON lines."""
    contents = [json.loads(line) for line in rows.read_text().splitlines()]
    names = sorted({name for row in contents for name in row})
    table = pyarrow.table({name: [row.get(name) for row in contents] for name in [*names]})
    parquet.write_table(table.append_column("id", [range(len(contents))]), tmp_path / "rows.parquet")
    deltalake.write_deltalake(tmp_path / "delta", table)
    chat, expected = of("chatml"), [json.loads(line) for line in rows.read_text().splitlines()]
    expected = [chat.content(row, "") for row in expected]
    for path in (tmp_path / "rows.parquet", tmp_path / "delta"):
        found = [document.content for document in open_sources([path], rows=chat)]
        assert [each.encode() for each in found] == [each.encode() for each in expected]
    with pytest.raises(InputError, match="holds no conversations; expected columns among prompt, "):
        parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "texts.parquet")
        list(open_sources([tmp_path / "texts.parquet"], rows=chat))
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(InputError, match=r"a\.txt holds no rows; expected \.jsonl"):
        open_sources([tmp_path / "a.txt"], rows=chat)


def test_a_separator_bears_the_loss_of_what_it_ends(of, rows, chat_tokenizer, tmp_path):
    """And the second shard begins at a separator, at a token, or anywhere."""
    texts = [{"prompt": "ab" * 40_000, "response": "c" * 26_000}, {"prompt": "d", "response": "e"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in texts))
    options = {"tokenizer": chat_tokenizer, "held_out": 0.0, "chat": of("plain"), "progress": False}
    build([path], tmp_path / "store", layout=Layout(shard_tokens=65_536), **options)
    split = Store.open(tmp_path / "store").split("train")
    tokens = split.tokens(0, len(split))
    expected = np.zeros(len(tokens), bool)
    for first, last in split.spans().tolist():
        text = chat_tokenizer.decode(tokens[first:last].tolist())
        response = 1 if text == "de" else 26_000
        sizes = np.array([len(chat_tokenizer.pieces[each]) for each in tokens[first:last]])
        expected[first:last] = np.cumsum(sizes) > len(text) - response
        expected[last] = True
    assert split.read_loss([(0, len(split))])()[0].tolist() == expected.tolist()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("isolate", [False, True])
def test_rows_weigh_what_is_learned(of, rows, chat_tokenizer, tmp_path, packed, isolate):
    build(
        [rows], tmp_path / "store", tokenizer=chat_tokenizer, held_out=0.1, chat=of("chatml"), progress=False
    )
    store = Store.open(tmp_path / "store")
    split, seq = store.split("train"), 64
    tokens, bears = bears_of(store, split)
    form = Packed(Packing.of(split, seq)) if packed else Contiguous(split, seq)
    drawn = [Drawn("a", form, 1)]
    stream = Stream(drawn, separator=store.tokenizer.separator, seq=seq, batch=7, seed=3, isolate=isolate)
    # Every place of the text by the tokens of a target and those before it in its row.
    where = {}
    for at in range(len(tokens) - 8):
        where.setdefault(tuple(tokens[at : at + 8]), []).append(at)
    checked = 0
    for step in range(20):
        batch = stream.rows(step, range(7))
        for row in range(7):
            inputs = np.append(batch["tokens"][row], batch["targets"][row][-1])
            for place in range(7, seq):
                if packed and len(set(batch["segments"][row, place - 7 : place + 1])) > 1:
                    continue
                if packed and batch["segments"][row, place] == 0:
                    assert batch["weights"][row, place] == 0
                    continue
                window = (*inputs[place - 6 : place + 1], batch["targets"][row, place])
                found = {bool(bears[at + 7]) for at in where.get(tuple(window), [])}
                if len(found) == 1:
                    assert batch["weights"][row, place] == found.pop()
                    checked += 1
    assert checked > 2_000
    assert 0 < batch["weights"].mean() < 1
