"""Loads on a server of the test's own, which knows how many requests it has at once."""

import asyncio
import json
import socket
import threading

import numpy as np
import pytest

from mosaicjax import cli
from mosaicjax.bench_serve.asks import Ask, Range, Synthetic
from mosaicjax.bench_serve.client import Target, ask_one
from mosaicjax.bench_serve.http import Server
from mosaicjax.bench_serve.load import Clients, Poisson, send
from mosaicjax.errors import InputError
from tests.fake_openai import PATIENCE, FakeServer


class Ticks:
    """A clock that goes on by one each time that it is read."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1
        return self.now


def writes(handler, path, body):
    """As many pieces as tokens are asked for."""
    if path == "/v1/models":
        return handler.whole(200, {"data": [{"id": "first"}, {"id": "second"}]})
    handler.completion(
        [f"w{number} " for number in range(body["max_tokens"])], prompt_tokens=len(body["prompt"])
    )


def asked(url, ask, **target):
    return asyncio.run(ask_one(Target(Server.parse(url), "m", **target), ask, Ticks()))


def test_an_answer_has_its_text_times_and_counts():
    with FakeServer(writes) as server:
        answer = asked(server.url, Ask([5, 6, 7], 4), temperature=0.5, key="secret", extra={"top_k": 3})
        ((_, path, headers, body),) = server.asked
    assert answer.whole and answer.text == "w0 w1 w2 w3 " and answer.status == 200
    # The clock is read when it is sent, once a piece of text, and at the end.
    assert (answer.sent, answer.times, answer.ended) == (1, (2, 3, 4, 5), 6)
    assert (answer.prompt_tokens, answer.tokens) == (3, 4)
    assert path == "/v1/completions" and headers["Authorization"] == "Bearer secret"
    assert body == {
        "model": "m",
        "prompt": [5, 6, 7],
        "max_tokens": 4,
        "temperature": 0.5,
        "stream": True,
        "stream_options": {"include_usage": True},
        "top_k": 3,
    }


def test_a_conversation_is_asked_by_its_own_path():
    def script(handler, path, body):
        handler.stream()
        handler.event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        handler.event({"choices": [{"delta": {"content": "größe"}}]})
        handler.event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        handler.part(b"")

    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    with FakeServer(script) as server:
        answers = [asked(server.url, Ask(prompt, 4), api="chat") for prompt in ("hello", messages)]
        assert [path for _, path, _, _ in server.asked] == ["/v1/chat/completions"] * 2
        assert [body["messages"] for body in server.bodies] == [
            [{"role": "user", "content": "hello"}],
            messages,
        ]
    for answer in answers:
        # What opens the answer is no text yet, and a server need not count.
        assert answer.whole and answer.text == "größe" and len(answer.times) == 1 and answer.tokens == -1


def test_what_goes_wrong_is_said():
    gone = threading.Event()

    def script(handler, path, body):
        match body["prompt"]:
            case "busy":
                handler.whole(429, {"error": {"message": "too  many\nrequests"}})
            case "odd":
                handler.whole(400, {"detail": "not so"})
            case "bare":
                handler.whole(502, b"<html>")
            case "late":
                handler.stream()
                handler.event({"choices": [{"text": "a"}]})
                handler.event({"error": {"message": "it broke"}})
                handler.part(b"")
            case "garbage":
                handler.stream()
                handler.event("{")
                handler.part(b"")
            case "early":
                handler.stream()
                handler.event({"choices": [{"text": "a"}]})
                handler.part(b"")
            case "broken":
                handler.stream()
                handler.event({"choices": [{"text": "a"}]})
            case "never":
                gone.wait(PATIENCE)

    expected = {
        "busy": (429, "too many requests"),
        "odd": (400, "not so"),
        "bare": (502, "status 502"),
        "late": (200, "it broke"),
        "garbage": (200, "an event that is no JSON"),
        "early": (200, "the stream ended early"),
        "broken": (200, "broken off: the connection was closed in mid-answer"),
    }
    with FakeServer(script) as server:
        for prompt, (status, failure) in expected.items():
            answer = asked(server.url, Ask(prompt, 4))
            assert (answer.status, answer.failure) == (status, failure), prompt
        answer = asked(server.url, Ask("never", 4), timeout_seconds=0.01)
        assert (answer.status, answer.failure) == (0, "no end within 0.01 s")
        gone.set()
    answer = asked(server.url, Ask("nobody there", 4))
    assert (answer.status, answer.failure) == (0, "no connection")


class Crowd:
    """Answers once so many requests are under way; the most there ever were at once."""

    def __init__(self, wait_for):
        self.barrier = threading.Barrier(wait_for)
        self.lock, self.now, self.most = threading.Lock(), 0, 0

    def __call__(self, handler, path, body):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        self.barrier.wait(PATIENCE)
        with self.lock:
            self.now -= 1
        writes(handler, path, body)


def test_clients_are_as_many_as_asked_for_and_answers_in_order():
    asks = Synthetic(Range(2, 9), Range(1, 6)).draw(20, seed=3)
    crowd, heard = Crowd(5), []
    with FakeServer(crowd) as server:
        target = Target(Server.parse(server.url), "m")
        answers = asyncio.run(send(target, asks, Clients(5), heard.append))
        assert sorted(body["prompt"] for body in server.bodies) == sorted(ask.prompt for ask in asks)
    # Five came at once, or none would have been answered.
    assert crowd.most == 5
    assert [answer.tokens for answer in answers] == [ask.max_tokens for ask in asks]
    assert len(heard) == 20 and set(heard) == set(answers)


def test_arrivals_wait_for_nobody():
    asks = Synthetic(Range(2, 9), Range(1, 6)).draw(12, seed=3)
    crowd = Crowd(12)
    with FakeServer(crowd) as server:
        answers = asyncio.run(send(Target(Server.parse(server.url), "m"), asks, Poisson(10_000.0)))
    assert crowd.most == 12 and all(answer.whole for answer in answers)


def test_arrivals_are_those_of_a_poisson_process():
    """Waits have mean and deviation 1 / rate, counts in equal windows a variance as large as their mean."""
    due = np.array(Poisson(50.0, seed=2).due(20_000))
    waits = np.diff(due)
    assert due[0] == 0 and waits.min() >= 0
    np.testing.assert_allclose([waits.mean(), waits.std()], 1 / 50, rtol=0.03)
    counts, _ = np.histogram(due, np.arange(0, due[-1], 0.2))
    np.testing.assert_allclose([counts.mean(), counts.var()], 10, rtol=0.1)


@pytest.mark.parametrize(
    ("api", "prompt"), [("chat", [1, 2]), ("completions", [{"role": "u", "content": ""}])]
)
def test_prompts_that_an_interface_lacks_are_refused_before_any_is_sent(api, prompt):
    target = Target(Server(False, "127.0.0.1", 1), "m", api)
    with pytest.raises(InputError, match=f"--api {api}; expected prompts of text or"):
        asyncio.run(send(target, [Ask("fine", 1), Ask(prompt, 1)], Clients(1)))


def bench(capsys, *arguments):
    code = cli.main(["bench-serve", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out.splitlines(), said.err.splitlines()


def test_the_command_counts_what_it_asked_for(capsys, tmp_path, monkeypatch):
    out, key = tmp_path / "out.json", tmp_path / "key"
    key.write_text("of-a-file\n")
    monkeypatch.setenv("MOSAICJAX_API_KEY", "of-the-environment")
    options = (
        "--requests",
        9,
        "--clients",
        3,
        "--prompt-length",
        "4:8",
        "--vocabulary",
        50,
        "--max-tokens",
        "2:5",
    )
    with FakeServer(writes) as server:
        code, said, errors = bench(capsys, server.url + "/v1", *options, "--key", key, "--json", out)
        assert (code, errors) == (0, [])
        keys = {headers["Authorization"] for _, _, headers, _ in server.asked}
        bodies = server.bodies
        bench(capsys, server.url, *options, "--model", "second", "--extra", '{"ignore_eos": true}')
        later = server.asked[-9:]
    found = json.loads(out.read_text())
    assert said[0] == f"{server.url}, first: 3 clients, completions" and said[1].startswith("9 of 9 answered")
    assert found["written_tokens"] == sum(body["max_tokens"] for body in bodies)
    assert found["prompt_tokens"] == sum(len(body["prompt"]) for body in bodies)
    assert {body["model"] for body in bodies} == {"first"} and keys == {"Bearer of-a-file"}
    # The same seed asks for the same, whatever the server; a named model is not looked up.
    assert sorted(body["prompt"] for *_, body in later) == sorted(body["prompt"] for body in bodies)
    assert {(body["model"], body["ignore_eos"]) for *_, body in later} == {("second", True)}
    assert {headers["Authorization"] for _, _, headers, _ in later} == {"Bearer of-the-environment"}


def test_a_server_that_does_not_answer_is_one_line(capsys):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        code, said, errors = bench(capsys, url)
    assert (code, said, len(errors)) == (2, [], 1)
    assert errors[0].startswith(f"mosaicjax: {url} does not answer; got ")


def test_a_server_that_refuses_all_is_one_line(capsys):
    def script(handler, path, body):
        handler.whole(401, {"error": {"message": "no such key"}})

    with FakeServer(script) as server:
        code, said, errors = bench(capsys, server.url)
        assert (code, said) == (2, [])
        assert errors == [f"mosaicjax: {server.url}/v1/models refuses; got 401 no such key; fix: --key FILE"]
        code, said, errors = bench(capsys, server.url, "--model", "m", "--requests", 4)
        assert code == 2 and said[-1] == "error 401: 4"
        assert errors == [f"mosaicjax: {server.url} answered none of 4 requests; got 401 (4)"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--requests", "0"], "--requests; expected 1 or more; got 0"),
        (["--clients", "-1"], "--clients; expected 1 or more; got -1"),
        (["--rate", "inf"], "--rate; expected 0 or more; got inf"),
        (["--rate", "nan"], "--rate; expected 0 or more; got nan"),
        (["--timeout", "0"], "--timeout; expected above 0; got 0.0"),
        (["--seed", "-1"], "--seed; expected 0 or more; got -1"),
        (
            ["--max-tokens", "5:1"],
            "--max-tokens; expected a number from 1, or LEAST:MOST, as 64:256; got 5:1",
        ),
        (["--extra", "[1]"], "--extra; expected a JSON object; got [1]"),
        (["--prompts", "/nowhere"], "cannot read /nowhere"),
        (["--key", "/nowhere"], "cannot read /nowhere"),
    ],
)
def test_settings_that_mean_nothing(capsys, options, line):
    code, _, errors = bench(capsys, "http://127.0.0.1:1", *options)
    assert code == 2 and len(errors) == 1 and errors[0].startswith(f"mosaicjax: {line}")
