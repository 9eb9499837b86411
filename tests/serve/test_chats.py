"""`/v1/chat/completions`: prompts written out by hand, and the same ids as a plain completion."""

import numpy as np
import pytest

from mosaicjax.data.chat import SHIPPED, Chat
from mosaicjax.errors import InputError
from mosaicjax.serve.chatting import Chatter, chatter_of
from tests.serve import served
from tests.serve.served import END, SEPARATOR, START, TOKENIZER, asked, chunks

PATH = "/v1/chat/completions"
MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Größe?"},
    {"role": "assistant", "content": "Seven."},
    {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "now?"}]},
]


def turn(role, text):
    return [START, *f"{role}\n{text}".encode(), END, *b"\n"]


PROMPT = [
    *turn("system", "Be short."),
    *turn("user", "Größe?"),
    *turn("assistant", "Seven."),
    *turn("user", "And now?"),
    START,
    *b"assistant\n",
]


def test_a_conversation_is_the_templates_text(client):
    assert served.chatter().ids([{"role": "user", "content": "x"}]) == [
        *turn("user", "x"),
        START,
        *b"assistant\n",
    ]
    body = {"model": "tiny", "temperature": 0, "max_tokens": 9}
    answer = asked(client, PATH, body | {"messages": MESSAGES})
    plain = asked(client, "/v1/completions", body | {"prompt": PROMPT})
    (choice,) = answer["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": plain["choices"][0]["text"],
        "refusal": None,
    }
    assert choice["finish_reason"] == plain["choices"][0]["finish_reason"] and choice["logprobs"] is None
    assert answer["usage"] == plain["usage"] and answer["object"] == "chat.completion"
    longer = {"messages": MESSAGES, "max_completion_tokens": 9, "temperature": 0}
    assert asked(client, PATH, longer)["choices"] == answer["choices"]


def test_developers_are_the_system(client):
    body = {"temperature": 0, "max_tokens": 5}
    both = [
        asked(client, PATH, body | {"messages": [{"role": role, "content": "Go."}]})["choices"]
        for role in ("system", "developer")
    ]
    assert both[0] == both[1]


@pytest.mark.parametrize("n", [1, 2])
def test_a_streams_pieces_make_up_the_whole(client, n):
    body = {"messages": MESSAGES[:1], "n": n, "seed": 4, "max_tokens": 25, "logprobs": True}
    body |= {"top_logprobs": 2, "stop": ["o"]}
    whole = asked(client, PATH, body)
    pieces = chunks(client, PATH, body | {"stream_options": {"include_usage": True}})
    assert pieces.pop()["usage"] == whole["usage"]
    found = [{"role": "", "content": "", "told": [], "finish": None} for _ in range(n)]
    for piece in pieces:
        assert piece["object"] == "chat.completion.chunk"
        (choice,) = piece["choices"]
        mine, delta = found[choice["index"]], choice["delta"]
        assert mine["finish"] is None
        mine["role"] += delta.get("role", "")
        mine["content"] += delta.get("content", "")
        mine["told"] += (choice["logprobs"] or {"content": []})["content"]
        mine["finish"] = choice["finish_reason"]
    for mine, choice in zip(found, whole["choices"], strict=True):
        assert mine["role"] == "assistant" and mine["finish"] == choice["finish_reason"]
        assert mine["content"] == choice["message"]["content"]
        assert mine["told"] == choice["logprobs"]["content"]


def test_logprobs_are_those_of_the_plain_completion(client):
    body = {"temperature": 1.5, "seed": 6, "max_tokens": 8, "ignore_eos": True}
    chat = asked(client, PATH, body | {"messages": MESSAGES, "logprobs": True, "top_logprobs": 3})
    plain = asked(client, "/v1/completions", body | {"prompt": PROMPT, "logprobs": 3})
    told, expected = chat["choices"][0]["logprobs"]["content"], plain["choices"][0]["logprobs"]
    assert [each["token"] for each in told] == expected["tokens"]
    assert [each["logprob"] for each in told] == expected["token_logprobs"]
    for each, likeliest in zip(told, expected["top_logprobs"], strict=True):
        top = {likely["token"]: likely["logprob"] for likely in each["top_logprobs"]}
        assert top.items() <= likeliest.items() and len(top) == 3
        data = each["bytes"]
        if data is None:
            assert each["token"] in TOKENIZER.special
        elif data[0] < 128:
            assert each["token"] == bytes(data).decode()
        else:
            assert each["token"] == f"bytes:\\x{data[0]:02x}"
    assert chat["choices"][0]["logprobs"]["refusal"] is None


def test_the_templates_end_of_a_turn_ends_it(client):
    body = {"messages": MESSAGES[:1], "logit_bias": {str(END): 100}, "max_tokens": 5}
    (choice,) = asked(client, PATH, body)["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "stop")
    (choice,) = asked(client, PATH, body | {"ignore_eos": True, "temperature": 0})["choices"]
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("template", "ends", "stops"),
    [
        ("chatml", (END,), ()),
        ("dolly", (), ("\n\n### End",)),
        ("alpaca", (), ()),
        ("plain", (), ()),
    ],
)
def test_how_templates_end_a_turn(template, ends, stops):
    made = served.chatter(template)
    assert (made.ends, made.stops) == (ends, stops)


def made_of(text, before=()):
    chat = Chat(text, special=tuple(TOKENIZER.special), eos="<|endoftext|>")
    return Chatter(chat, TOKENIZER, before)


def test_templates_of_others():
    """As models bring them: without marks around what the assistant says, and with blanks before the end."""
    text = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }} {{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    made = made_of(text)
    assert (made.ends, made.stops) == ((SEPARATOR,), ())
    assert made.ids([{"role": "user", "content": "x"}]) == [*b"[user] x ", SEPARATOR, *b"[assistant] "]
    assert made_of("{% for m in messages %}<{{ m.content }}>{% endfor %}").stops == (">",)
    with pytest.raises(InputError, match="the chat template leaves out what the assistant says"):
        made_of("{{ messages[0].content }}")
    with pytest.raises(InputError, match="refuses it; got no"):
        made_of("{{ raise_exception('no') }}")


def test_what_comes_before_a_conversation():
    """A run's documents stand behind a separator; a template that writes it itself gets no second one."""
    messages = [{"role": "user", "content": "x"}]
    plain = served.chatter("chatml").ids(messages)
    assert served.chatter("chatml", before=(SEPARATOR,)).ids(messages) == [SEPARATOR, *plain]
    own = "{{ eos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert made_of(own, before=(SEPARATOR,)).ids(messages) == [SEPARATOR, *b"x"]
    nothing = "{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}"
    assert made_of(nothing).ids(messages) == [SEPARATOR]


def test_special_tokens_in_a_message_are_text():
    rng = np.random.default_rng(2)
    words = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "x", "\n", "system", "|>", "<|im_", "größe"]
    for _ in range(50):
        content = "".join(rng.choice(words, 6))
        ids = served.chatter().ids([{"role": "user", "content": content}])
        assert ids == [*turn("user", content), START, *b"assistant\n"]


def test_a_model_without_a_template(free_engine, tmp_path):
    with served.running(free_engine, chatter=None) as server, server.client() as client:
        answer = client.post(PATH, json={"messages": MESSAGES})
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (
            error["code"] == "no_chat_template" and "--template alpaca or chatml or dolly" in error["message"]
        )
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200


def test_where_templates_come_from(tmp_path):
    """The tokenizer's own file, or a name; a tokenizer that brings none."""

    class Files:
        files = (tmp_path / "tokenizer.json",)
        special = TOKENIZER.special
        separator, separator_token = SEPARATOR, "<|endoftext|>"

    assert chatter_of("", Files, ()) is None
    assert chatter_of("dolly", Files, ()).stops == ("\n\n### End",)
    (tmp_path / "chat_template.jinja").write_text(SHIPPED["chatml"].read_text())
    assert chatter_of("", Files, ()).ends == (END,)
    with pytest.raises(InputError, match="there is no chat template missing"):
        chatter_of("missing", Files, ())
