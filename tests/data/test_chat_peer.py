"""Conversations token by token beside transformers' `apply_chat_template`, on real rows."""

import json

import numpy as np
import pytest

from mosaicjax.data.chat import SHIPPED, Chat, LossOn
from mosaicjax.data.loss_mask import encode_marked
from mosaicjax.data.tokenizer import load_tokenizer

pytestmark = pytest.mark.peer
transformers = pytest.importorskip("transformers", reason="needs the peer library transformers")

TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}


@pytest.fixture(scope="module")
def folders(shared_data, tmp_path_factory):
    """GPT-NeoX's tokenizer with the special tokens that a template needs, in a folder for each."""
    settings = json.loads((shared_data("gpt-neox-20b-tokenizer") / "tokenizer.json").read_text())
    found = {}
    for name in SHIPPED:
        added = [
            {
                "id": 50_300 + number,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for number, token in enumerate(TOKENS.get(name, ()))
        ]
        folder = tmp_path_factory.mktemp(name)
        contents = settings | {"added_tokens": [*settings["added_tokens"], *added]}
        (folder / "tokenizer.json").write_text(json.dumps(contents))
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
        (folder / "chat_template.jinja").write_text(SHIPPED[name].read_text())
        found[name] = folder
    return found


@pytest.fixture(scope="module")
def conversations(shared_data):
    """Real ones: prompt and response, and several turns."""
    lines = (shared_data("dolly-hhrlhf-1k") / "train.jsonl").read_text().splitlines()[:150]
    talks = json.loads((shared_data("fastchat-identity") / "dummy_conversation.json").read_text())[:150]
    roles = {"human": "user", "gpt": "assistant"}
    found = []
    for row in map(json.loads, lines):
        turns = [("user", row["prompt"]), ("assistant", row["response"])]
        found.append((row, [{"role": role, "content": content} for role, content in turns]))
    for row in talks:
        found.append(
            (row, [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]])
        )
    return found


@pytest.mark.parametrize("name", sorted(SHIPPED))
@pytest.mark.parametrize("source", ["a name", "the tokenizer's own"])
def test_ids_and_what_is_learned_are_transformers(folders, conversations, name, source):
    tokenizer = load_tokenizer(folders[name])
    theirs = transformers.AutoTokenizer.from_pretrained(folders[name])
    chat = Chat.of(name if source == "a name" else "tokenizer", tokenizer)
    marked = [chat.content(row, f"row {number}") for number, (row, _) in enumerate(conversations)]
    for (ids, bears), (_, messages), each in zip(
        encode_marked(marked, tokenizer), conversations, marked, strict=True
    ):
        expected = theirs.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert ids.tolist() == expected["input_ids"], each.text
        # Of a last character of several tokens transformers counts the first alone.
        mask = np.array(expected["assistant_masks"], bool)
        assert (bears == mask).all() or not each.text.isascii(), each.text
        assert (bears | ~mask).all()
    whole = Chat.of(name, tokenizer, loss_on=LossOn.ALL).content(conversations[0][0], "a row")
    assert whole.learned == ((0, len(whole.text)),)


TRIMS = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{{ '' if loop.last else ' / ' }}{% endfor %}"
)


@pytest.mark.parametrize("name", [*sorted(SHIPPED), "trims"])
@pytest.mark.parametrize(
    "last", ["The answer", " The answer: ", "Two\n\nlines \n", "<|endoftext|> <|im_end|>"]
)
def test_a_turn_to_be_gone_on_with_is_transformers(folders, tmp_path, name, last):
    """And the prompt for one."""
    folder = folders.get(name, folders["plain"])
    template = SHIPPED[name].read_text() if name in SHIPPED else TRIMS
    (tmp_path / "its.jinja").write_text(template)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    chat = Chat.of(str(tmp_path / "its.jinja"), load_tokenizer(folder))
    turns = [("user", "What is 1 + 1? "), ("assistant", "2"), ("user", " And 2 + 2?"), ("assistant", last)]
    messages = [{"role": role, "content": content} for role, content in turns]
    for some, prompt in ((messages, False), (messages[:3], True), (messages[:1], True)):
        expected = theirs.apply_chat_template(
            some,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=prompt,
            continue_final_message=not prompt,
        )
        assert chat.text(some, "a row", prompt=prompt) == expected
