"""Keys, limits, time-outs, and clients that go away or are slow."""

import json
import logging
import socket
import threading

import pytest

from mosaicjax.errors import InputError
from mosaicjax.serve.limits import Held, InFlight, Keys, Limits, check_host, is_loopback
from mosaicjax.serve.problems import Problem
from tests.serve import served
from tests.serve.test_refusals import error_of

PATH = "/v1/completions"
KEYS = ("first-key", "second-key")


@pytest.fixture
def engine(free_engine):
    """The engine of the test's own server; all that a test asked of it must have left it at the end."""
    free_engine.open()
    yield free_engine
    assert free_engine.idle and free_engine.pages.held == 0


def test_keys_are_asked_for(engine):
    with served.running(engine, keys=Keys(KEYS)) as server, server.client() as client:
        body = {"prompt": "x", "max_tokens": 1}
        for header in (
            None,
            "Bearer",
            "Bearer first-ke",
            "Bearer first-key-",
            "Basic first-key",
            "first-key",
            "Bearer \xff\xfe",
        ):
            headers = {} if header is None else {"Authorization": header.encode("latin-1")}
            for call in (
                lambda: client.post(PATH, json=body, headers=headers),  # noqa: B023
                lambda: client.post("/v1/chat/completions", json=body, headers=headers),  # noqa: B023
                lambda: client.post("/predict", json=body, headers=headers),  # noqa: B023
                lambda: client.get("/v1/models", headers=headers),  # noqa: B023
                lambda: client.get("/metrics", headers=headers),  # noqa: B023
            ):
                error = error_of(call(), 401)
                assert error["code"] == "invalid_api_key" and "first-key" not in error["message"]
        for key in KEYS:
            for scheme in ("Bearer", "bearer"):
                headers = {"Authorization": f"{scheme} {key}", "Host": "any.example"}
                assert client.post(PATH, json=body, headers=headers).status_code == 200
        for path in ("/health", "/ready"):
            assert client.get(path).status_code == 200


def test_where_keys_come_from(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# ours\nfirst-key\n\n  second-key  \nfirst-key\n")
    for keys in (Keys.read(str(path), {}), Keys.read("", {"MOSAICJAX_API_KEYS": "first-key, second-key,"})):
        assert len(keys) == 2
        assert [keys.number(f"Bearer {key}") for key in KEYS] == [0, 1]
        with pytest.raises(Problem):
            keys.number("Bearer # ours")
    assert len(Keys.read("", {})) == 0 and Keys(()).number(None) is None
    path.write_text("# none\n")
    for given, environment, what in (
        (str(path), {}, "holds no API key"),
        (str(tmp_path / "missing"), {}, "cannot be read"),
        (str(path), {"MOSAICJAX_API_KEYS": "first-key"}, "fix: one of them"),
        ("", {"MOSAICJAX_API_KEYS": "short"}, "8 or more visible ASCII characters"),
        ("", {"MOSAICJAX_API_KEYS": "größer-als-acht"}, "8 or more visible ASCII characters"),
    ):
        with pytest.raises(InputError, match=what):
            Keys.read(given, environment)


def test_other_machines_need_a_key():
    own = ("127.0.0.1", "127.8.9.1", "::1", "localhost")
    others = ("0.0.0.0", "::", "10.0.0.1", "example.org", "", "localhost.example")
    assert all(map(is_loopback, own)) and not any(map(is_loopback, others))
    for host in own:
        check_host(host, Keys(()))
    for host in others:
        check_host(host, Keys(KEYS))
        with pytest.raises(InputError, match="there is no API key; fix: --keys FILE or MOSAICJAX_API_KEYS"):
            check_host(host, Keys(()))


def test_limits_that_mean_nothing():
    Limits().check()
    with pytest.raises(InputError, match="the limit body_bytes; expected 1 or more; got 0"):
        Limits(body_bytes=0).check()


def test_places_are_counted():
    """By key and in all; a key's limit is none of those without one."""
    in_flight, empty = InFlight(Limits(in_flight=8, in_flight_per_key=3)), []
    in_flight.when_empty = lambda: empty.append(True)
    with in_flight.hold(0) as first:
        first.grow(3)
        with pytest.raises(Problem, match="3 of 3 completions of this API key"):
            in_flight.hold(0)
        with in_flight.hold(1) as second:
            with pytest.raises(Problem, match="1 of 3 completions of this API key"):
                second.grow(4)
            second.grow(3)
            with in_flight.hold(2) as third:
                third.grow(2)
                with pytest.raises(Problem, match="8 of 8 completions are in flight") as full:
                    in_flight.hold(None)
            assert full.value.status == 429 and full.value.headers == {"Retry-After": "1"}
        assert in_flight.total == 3
    assert in_flight.total == 0
    with in_flight.hold(None) as free:
        free.grow(8)
        in_flight.drain()
        with pytest.raises(Problem) as stopping:
            in_flight.hold(None)
        assert stopping.value.status == 503 and not empty
    assert empty == [True]
    assert isinstance(free, Held)


def test_a_large_body_is_refused_before_it_is_read(engine):
    limits = Limits(body_bytes=1_000)
    with served.running(engine, limits=limits) as server, server.client() as client:
        room = 1_000 - len(json.dumps({"prompt": ""}))
        fits = json.dumps({"prompt": "x" * room})
        headers = {"Content-Type": "application/json"}
        assert "96 tokens" in error_of(client.post(PATH, content=fits, headers=headers), 400)["message"]
        assert (
            error_of(client.post(PATH, content=fits + " ", headers=headers), 413)["code"] == "body_too_large"
        )
        # In chunks, of which nobody says how many come.
        parts = (part for part in [fits.encode(), b" ", b"x" * 5_000])
        error_of(client.post(PATH, content=parts, headers=headers), 413)
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 999999999\r\n\r\n"
            )
            assert raw.recv(100).startswith(b"HTTP/1.1 413 ")
        assert client.get("/health").status_code == 200


def test_a_body_or_head_that_does_not_come_is_given_up(engine):
    with served.running(engine, limits=Limits(read_seconds=1)) as server:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.sendall(head + b'Content-Length: 20\r\n\r\n{"prompt"')
            answer = served.rest_of(raw)
        assert answer.startswith(b"HTTP/1.1 408 ") and b"the body did not come within 1 s" in answer
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.sendall(head)
            assert served.rest_of(raw) == b""
        assert server.service.in_flight.total == 0


def test_limits_of_a_request(engine):
    limits = Limits(prompt_tokens=9, max_tokens=7, choices=3, stops=2)
    with served.running(engine, limits=limits) as server, server.client() as client:

        def refused(**fields):
            return error_of(client.post(PATH, json={"prompt": "x", **fields}), 400)["message"]

        assert refused(prompt="x" * 9) == "a prompt has at most 9 tokens here, and this 10"
        assert refused(max_tokens=8) == "max_tokens: expected at most 7, got 8"
        assert "1 to 3 completions of a request, got 4" in refused(n=2, prompt=["x", "y"])
        assert refused(stop=["a", "b", "c"]) == "stop: expected at most 2 strings"
        answer = served.asked(
            client, PATH, {"prompt": "x" * 8, "n": 3, "stop": ["a", "b"], "ignore_eos": True}
        )
        assert len(answer["choices"]) == 3 and answer["usage"]["completion_tokens"] <= 21


class Asker(threading.Thread):
    """A request in a thread of its own, and its answer."""

    def __init__(self, server, body, key=None):
        super().__init__()
        self._client, self._body = server.client(key), body
        self.start()

    def run(self):
        with self._client:
            self.answer = self._client.post(PATH, json=self._body)

    def status(self):
        self.join(served.SECONDS)
        return self.answer.status_code


def test_beyond_the_places_the_answer_is_429_at_once(engine):
    limits = Limits(in_flight=5, in_flight_per_key=3)
    with served.running(engine, limits=limits, keys=Keys((*KEYS, "third-key"))) as server:
        engine.shut()
        body = {"prompt": "x", "max_tokens": 4, "n": 3}
        first = Asker(server, body, KEYS[0])
        server.until(lambda: server.service.in_flight.total == 3)
        with server.client(KEYS[0]) as client:
            for n in (1, 3):
                answer = client.post(PATH, json=body | {"n": n})
                error = error_of(answer, 429)
                assert error["code"] == "rate_limit_exceeded" and answer.headers["Retry-After"] == "1"
        second = Asker(server, body | {"n": 2}, KEYS[1])
        server.until(lambda: server.service.in_flight.total == 5)
        with server.client("third-key") as client:
            assert "5 of 5 completions" in error_of(client.post(PATH, json=body), 429)["message"]
            engine.open()
            assert first.status() == second.status() == 200
            assert client.post(PATH, json=body).status_code == 200
        assert server.service.in_flight.total == 0


def test_a_request_that_takes_too_long_is_broken_off(engine):
    with served.running(engine, limits=Limits(request_seconds=1)) as server, server.client() as client:
        engine.shut()
        error = error_of(client.post(PATH, json={"prompt": "x"}), 504)
        assert error["code"] == "timeout" and "not done within 1 s" in error["message"]
        with client.stream("POST", PATH, json={"prompt": "x", "stream": True}) as response:
            (event,) = served.events(response)
            assert response.status_code == 200 and json.loads(event)["error"]["code"] == "timeout"
        engine.open()
        engine.wait_idle()
        assert server.service.in_flight.total == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_rows_and_pages(engine, stream):
    with served.running(engine) as server:
        engine.shut()
        before, freed = engine.counts.written_tokens, engine.counts.finished
        body = json.dumps(
            {"prompt": "x" * 40, "n": 6, "max_tokens": 50, "ignore_eos": True, "stream": stream}
        )
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            server.until(lambda: server.service.in_flight.total == 6)
            engine.let(8)
            assert engine.running == 4 and engine.waiting == 2 and engine.pages.held > 0
            if stream:
                assert raw.recv(100).startswith(b"HTTP/1.1 200 ")
        server.until(lambda: server.service.in_flight.total == 0)
        written = engine.counts.written_tokens
        # A turn may have begun before, and waits at the gate; the next one ends them.
        engine.open()
        engine.wait_idle()
        assert engine.running == engine.waiting == engine.pages.held == 0
        assert engine.counts.written_tokens <= written + 4 < before + 6 * 50
        assert engine.counts.finished == freed + 6
        # It is counted once its places are free.
        server.until(lambda: server.figures()["mosaicjax_clients_gone_total"] == 1)


def test_a_reader_that_reads_nothing_is_given_up(engine):
    with served.running(engine, limits=Limits(write_seconds=1, in_flight=64)) as server:
        # Small buffers, so that an answer does not fit into them.
        for sock in server.server.servers[0].sockets:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_096)
        body = {"prompt": ["x", "y"], "n": 32, "max_tokens": 90, "ignore_eos": True, "logprobs": 20}
        body = json.dumps(body | {"stream": True})
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.socket() as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            raw.connect(("127.0.0.1", server.port))
            raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            server.until(lambda: server.figures()["mosaicjax_clients_gone_total"] == 1)
            assert server.service.in_flight.total == 0
            received = served.rest_of(raw)
        assert received.startswith(b"HTTP/1.1 200 ") and b"[DONE]" not in received
        engine.wait_idle()


SECRET = "a secret nobody may read"


@pytest.mark.parametrize("told", [False, True])
def test_prompts_are_logged_only_where_that_is_asked_for(engine, told, caplog):
    caplog.set_level(logging.DEBUG)
    with served.running(engine, log_prompts=told) as server, server.client() as client:
        served.asked(client, PATH, {"prompt": SECRET, "max_tokens": 2})
        served.asked(client, PATH, {"prompt": [*SECRET.encode()], "max_tokens": 2, "echo": True})
        chat = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 2}
        served.asked(client, "/v1/chat/completions", chat)
        served.asked(client, "/predict", {"inputs": [SECRET], "parameters": {"max_tokens": 2}})
        error_of(client.post(PATH, json={"prompt": SECRET, "stop": 3}), 400)
        error_of(client.post(PATH, json={"prompt": SECRET * 9}), 400)
    # The client is in this process too.
    records = [record for record in caplog.records if not record.name.startswith("http")]
    lines = [record.getMessage() for record in records]
    assert sum(SECRET in line for line in lines) == (3 if told else 0)
    assert sum("/v1/completions" in line for line in lines) == 4
