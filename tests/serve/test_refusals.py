"""What is refused, with which status, in OpenAI's form."""

import json

import pytest

from tests.serve import served

COMPLETIONS, CHATS, PREDICT = "/v1/completions", "/v1/chat/completions", "/predict"
MESSAGES = [{"role": "user", "content": "x"}]


def error_of(response, status):
    """The error of an answer that has one, in the form that all have."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"] and body["error"]["type"]
    return body["error"]


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        (COMPLETIONS, {}, "prompt", "prompt: Field required"),
        (COMPLETIONS, {"prompt": None}, "prompt", "prompt: expected a string, a list of strings"),
        (COMPLETIONS, {"prompt": [1, "x"]}, "prompt", "prompt: expected a string, a list of strings"),
        (COMPLETIONS, {"prompt": [[1], [True]]}, "prompt", "prompt: expected a string"),
        (COMPLETIONS, {"prompt": []}, "prompt", "prompt: expected 1 to 64 completions"),
        (COMPLETIONS, {"prompt": [[]]}, "prompt", "a prompt's tokens; expected 1 to 80"),
        (COMPLETIONS, {"prompt": [259]}, "prompt", "prompt: expected ids of tokens, 0 to 258"),
        (COMPLETIONS, {"prompt": [-1]}, "prompt", "prompt: expected ids of tokens, 0 to 258"),
        (COMPLETIONS, {"prompt": [10**30]}, "prompt", "prompt: expected ids of tokens, 0 to 258"),
        (COMPLETIONS, {"prompt": "x" * 96}, "prompt", "prompt and completion have at most 96 tokens here"),
        (COMPLETIONS, {"prompt": "x" * 90, "max_tokens": 6}, "prompt", "and max_tokens is 6"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 0}, "max_tokens", "max_tokens: "),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 10**30}, "max_tokens", "max_tokens: expected at most"),
        (COMPLETIONS, {"prompt": "x", "n": 0}, "n", "n: "),
        (COMPLETIONS, {"prompt": "x", "n": 65}, "prompt", "prompt: expected 1 to 64 completions"),
        (COMPLETIONS, {"prompt": ["x"] * 33, "n": 2}, "prompt", "got 66"),
        (COMPLETIONS, {"prompt": "x", "temperature": -0.1}, "temperature", "temperature: "),
        (COMPLETIONS, {"prompt": "x", "temperature": "hot"}, "temperature", "temperature: "),
        (COMPLETIONS, {"prompt": "x", "top_p": 0}, "top_p", "top_p: "),
        (COMPLETIONS, {"prompt": "x", "top_p": 1.01}, "top_p", "top_p: "),
        (COMPLETIONS, {"prompt": "x", "top_k": -2}, "top_k", "top_k: "),
        (COMPLETIONS, {"prompt": "x", "min_p": 2}, "min_p", "min_p: "),
        (COMPLETIONS, {"prompt": "x", "repetition_penalty": 0}, "repetition_penalty", "repetition_penalty: "),
        (COMPLETIONS, {"prompt": "x", "presence_penalty": 3}, "presence_penalty", "presence_penalty: "),
        (COMPLETIONS, {"prompt": "x", "frequency_penalty": -3}, "frequency_penalty", "frequency_penalty: "),
        (COMPLETIONS, {"prompt": "x", "logit_bias": {"999": 1}}, "logit_bias", "logit_bias; expected"),
        (COMPLETIONS, {"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias", "logit_bias: expected numbers"),
        (
            COMPLETIONS,
            {"prompt": "x", "logit_bias": {"1": 101}},
            "logit_bias",
            "logit_bias: expected numbers",
        ),
        (COMPLETIONS, {"prompt": "x", "seed": 2**63}, "seed", "seed: "),
        (COMPLETIONS, {"prompt": "x", "stop": ""}, "stop", "stop: expected a string of 1 to 256"),
        (COMPLETIONS, {"prompt": "x", "stop": ["a", ""]}, "stop", "stop: expected a string of 1 to 256"),
        (COMPLETIONS, {"prompt": "x", "stop": ["a"] * 17}, "stop", "stop: expected at most 16 strings"),
        (COMPLETIONS, {"prompt": "x", "stop": "a" * 257}, "stop", "stop: expected a string of 1 to 256"),
        (COMPLETIONS, {"prompt": "x", "logprobs": 21}, "logprobs", "logprobs: "),
        (COMPLETIONS, {"prompt": "x", "logprobs": True}, "logprobs", "logprobs: "),
        (COMPLETIONS, {"prompt": "x", "echo": True, "logprobs": 1}, "echo", "echo is not supported with"),
        (COMPLETIONS, {"prompt": "x", "best_of": 2}, "best_of", "best_of is supported as n alone"),
        (COMPLETIONS, {"prompt": "x", "suffix": "y"}, "suffix", "suffix: "),
        (COMPLETIONS, {"prompt": "x", "stream": "yes"}, "stream", "stream: "),
        (COMPLETIONS, {"prompt": "x", "stream_options": {"x": 1}}, "stream_options.x", "not a field here"),
        (COMPLETIONS, {"prompt": "x", "beams": 4}, "beams", "beams is not a field here, or not supported"),
        (COMPLETIONS, {"prompt": "x", "messages": []}, "messages", "messages is not a field here"),
        (CHATS, {"messages": []}, "messages", "messages: "),
        (CHATS, {"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "messages.0.role: "),
        (CHATS, {"messages": [{"content": "x"}]}, "messages.0.role", "messages.0.role: Field required"),
        (
            CHATS,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "messages.0.content",
            "messages.0.content: expected a string, or parts of the type text",
        ),
        (
            CHATS,
            {"messages": [{"role": "user", "content": "\ufdd0"}]},
            "messages",
            "a character that is none",
        ),
        (CHATS, {"messages": MESSAGES, "tools": [{}]}, "tools", "tools: "),
        (CHATS, {"messages": MESSAGES, "tool_choice": "required"}, "tool_choice", "tool_choice: "),
        (
            CHATS,
            {"messages": MESSAGES, "response_format": {"type": "json_object"}},
            "response_format.type",
            "response_format.type: ",
        ),
        (CHATS, {"messages": MESSAGES, "reasoning_effort": "high"}, "reasoning_effort", "reasoning_effort: "),
        (CHATS, {"messages": MESSAGES, "store": True}, "store", "store: "),
        (CHATS, {"messages": MESSAGES, "audio": {}}, "audio", "audio: "),
        (CHATS, {"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs", "top_logprobs needs logprobs"),
        (CHATS, {"messages": MESSAGES, "logprobs": 2}, "logprobs", "logprobs: "),
        (
            CHATS,
            {"messages": MESSAGES, "max_tokens": 2, "max_completion_tokens": 3},
            "max_tokens",
            "max_tokens is the older name",
        ),
        (CHATS, {"messages": MESSAGES * 12}, "messages", "prompt and completion have at most 96 tokens"),
        (PREDICT, {"inputs": 3}, "inputs", "inputs: expected a string or a list of strings"),
        (PREDICT, {"inputs": ["x"], "parameters": {"beams": 2}}, "parameters.beams", "not a field here"),
        (PREDICT, {"inputs": ["x"], "parameters": {"use_cache": False}}, "parameters.use_cache", "use_cache"),
    ],
)
def test_a_wrong_field_is_named(client, path, body, param, message):
    error = error_of(client.post(path, json=body), 400)
    assert error["param"] == param and message in error["message"], error
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "fields",
    [
        {"n": None, "stop": None, "seed": None, "temperature": None, "logit_bias": None, "stream": None},
        {"store": False, "tools": [], "tool_choice": "none", "parallel_tool_calls": True, "audio": None},
        {"response_format": {"type": "text"}, "modalities": ["text"], "service_tier": "auto"},
        {"verbosity": "medium", "reasoning_effort": "none", "functions": [], "function_call": "auto"},
        {"user": "me", "safety_identifier": "me", "prompt_cache_key": "k", "metadata": {"a": "b"}},
        {"stream_options": {"include_usage": False, "include_obfuscation": False}, "top_k": -1},
    ],
)
def test_fields_without_effect_take_the_values_that_have_none(client, fields):
    body = {"messages": MESSAGES, "max_tokens": 3, "temperature": 0}
    plain = served.asked(client, CHATS, body)["choices"]
    assert served.asked(client, CHATS, {**body, **fields, "temperature": 0})["choices"] == plain
    turns = [{"role": "assistant", "content": None, "refusal": None, "tool_calls": [], "annotations": []}]
    served.asked(client, CHATS, body | {"messages": turns + MESSAGES})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the body: "),
        (b"{", "the body: "),
        (b"[]", "the body: "),
        (b"null", "the body: "),
        (b'{"prompt": "x"} x', "the body: "),
        (b'{"prompt": "\xff"}', "the body: "),
        (b'{"prompt": "\\ud800"}', "the body: "),
        (b'{"prompt": ' + b"[" * 5_000, "the body: "),
        (b'{"prompt": "x", "temperature": NaN}', "temperature"),
        (b'{"prompt": "x", "temperature": 1e999}', "temperature"),
        (b'{"prompt": "x", "seed": 1.5}', "seed"),
        (b'{"prompt": "x", "\xf0\x9f\x99\x82": 1}', "is not a field here"),
    ],
)
def test_bodies_that_are_none(client, data, message):
    response = client.post(COMPLETIONS, content=data, headers={"Content-Type": "application/json"})
    assert message in error_of(response, 400)["message"]


def test_other_statuses(client):
    error = error_of(client.post(COMPLETIONS, json={"prompt": "x", "model": "gpt"}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model") and "tiny" in error["message"]
    assert error_of(client.post(CHATS, json={"messages": MESSAGES, "model": ""}), 404)["param"] == "model"
    assert error_of(client.get("/v1/models/gpt"), 404)["code"] == "model_not_found"
    assert "GET /v1/nothing" in error_of(client.get("/v1/nothing"), 404)["message"]
    error_of(client.get(COMPLETIONS), 405)
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        body, headers = json.dumps({"prompt": "x"}), {"Content-Type": kind}
        assert error_of(client.post(COMPLETIONS, content=body, headers=headers), 415)
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert client.post(COMPLETIONS, content=body, headers=headers).status_code == 200
    error = error_of(client.post(COMPLETIONS, json={"prompt": "x" * 200}), 400)
    assert error["code"] == "context_length_exceeded"


def test_only_requests_to_this_machine_are_answered_without_keys(client, server):
    for host in ("evil.example", "127.0.0.1.evil.example:80", "[2001:db8::1]:80", ""):
        response = client.post(COMPLETIONS, json={"prompt": "x"}, headers={"Host": host})
        assert error_of(response, 403)["code"] == "wrong_host"
    for host in ("localhost", f"localhost:{server.port}", "127.0.0.1", "[::1]:80"):
        assert client.get("/v1/models", headers={"Host": host}).status_code == 200
