"""The engine's thread and the server around it: beginning, end, and failure."""

import json
import threading

import jax
import pytest

from mosaicjax.errors import InputError
from mosaicjax.serve.driver import STALLED_SECONDS, Driver, State
from mosaicjax.serve.server import bind
from mosaicjax.serve.service import Service
from tests.serve import served
from tests.serve.test_limits import Asker
from tests.serve.test_refusals import error_of

PATH = "/v1/completions"
LONG = {"prompt": "x", "max_tokens": 60, "ignore_eos": True, "temperature": 0}


def test_draining_lets_streams_end_and_takes_no_new_ones(free_engine):
    engine = free_engine
    engine.open()
    with served.running(engine) as server, server.client() as client:
        whole = served.asked(client, PATH, LONG)["choices"][0]["text"]
        engine.shut()
        waiting = Asker(server, LONG)
        server.until(lambda: server.service.in_flight.total == 1)
        with client.stream("POST", PATH, json=LONG | {"stream": True}) as response:
            server.until(lambda: server.service.in_flight.total == 2)
            engine.let(12)
            lines = served.events(response)
            text = json.loads(next(lines))["choices"][0]["text"]
            server.drain()
            server.until(lambda: server.service.in_flight.draining)
            with server.client() as other:
                assert error_of(other.post(PATH, json=LONG), 503)["code"] == "draining"
                assert other.get("/ready").status_code == 503
                assert other.get("/health").status_code == 200
            engine.open()
            rest = list(lines)
        assert rest.pop() == "[DONE]"
        text += "".join(json.loads(each)["choices"][0]["text"] for each in rest)
        assert text == whole and waiting.status() == 200
        assert waiting.answer.json()["choices"][0]["text"] == whole
        server.thread.join(served.SECONDS)
        assert not server.thread.is_alive() and server.service.driver.state is State.STOPPED


def test_a_second_signal_ends_at_once(free_engine):
    engine = free_engine
    engine.open()
    with served.running(engine) as server, server.client() as client:
        engine.shut()
        with client.stream("POST", PATH, json=LONG | {"stream": True}) as response:
            server.until(lambda: server.service.in_flight.total == 1)
            assert response.status_code == 200
            server.drain()
            server.until(lambda: server.service.in_flight.draining)
            server.drain()
            # A turn that is under way is waited for.
            engine.open()
            server.thread.join(served.SECONDS)
            assert not server.thread.is_alive()
    while not engine.idle:
        engine.turn()


class Breaking(served.Gated):
    """An engine that breaks in its next turn when told to."""

    broken = False

    def turn(self):
        super().turn()
        if self.broken:
            raise RuntimeError("planted")


class Slow(served.Gated):
    """An engine whose warm-up waits."""

    def __init__(self, *given):
        super().__init__(*given)
        self.warm = threading.Event()

    def warm_up(self):
        assert self.warm.wait(served.SECONDS)
        if getattr(self, "cold", False):
            raise RuntimeError("planted")


def test_an_engine_that_breaks_is_told_of_and_nobody_hangs(model, capfd):
    engine = model.engine(Breaking)
    with served.running(engine) as server, server.client() as client:
        engine.shut()
        waiting = [Asker(server, LONG) for _ in range(5)]
        server.until(lambda: server.service.in_flight.total == 5)
        with client.stream("POST", PATH, json=LONG | {"stream": True}) as response:
            server.until(lambda: server.service.in_flight.total == 6)
            engine.let(1)
            engine.broken = True
            engine.open()
            last = list(served.events(response))[-1]
        assert json.loads(last)["error"]["message"] == "the engine has failed"
        for each in waiting:
            each.join(served.SECONDS)
            assert error_of(each.answer, 500)["type"] == "server_error"
        answer = client.get("/health")
        assert (answer.status_code, answer.text) == (503, "the engine has failed")
        assert error_of(client.get("/ready"), 503)["code"] == "failed"
        assert error_of(client.post(PATH, json=LONG), 503)["message"] == "the engine is broken"
        assert server.service.in_flight.total == 0
    assert "RuntimeError: planted" in capfd.readouterr().err


def test_before_the_engine_is_warm_it_is_not_ready(model):
    engine = model.engine(Slow)
    with served.running(engine, wait=False) as server, server.client() as client:
        assert client.get("/health").text == "ok"
        assert error_of(client.get("/ready"), 503)["code"] == "warming"
        answer = client.post(PATH, json=LONG)
        assert error_of(answer, 503)["message"] == "the engine is warming up"
        assert answer.headers["Retry-After"] == "1"
        assert client.get("/v1/models").status_code == 200
        engine.warm.set()
        server.until(lambda: server.service.driver.state is State.READY)
        assert client.get("/ready").text == "ready"
    cold = model.engine(Slow)
    cold.cold = True
    cold.warm.set()
    with served.running(cold, wait=False) as server, server.client() as client:
        server.until(lambda: server.service.driver.state is State.FAILED)
        assert client.get("/health").status_code == 503


def test_weights_that_are_not_finite_are_a_fault_of_ours():
    broken = served.Model()
    broken.weights = jax.tree.map(lambda weight: weight * float("nan"), broken.weights)
    engine = broken.engine()
    with served.running(engine) as server, server.client() as client:
        assert "not finite" in error_of(client.post(PATH, json=LONG), 500)["message"]
        with client.stream("POST", PATH, json=LONG | {"stream": True}) as response:
            (event,) = served.events(response)
        assert "not finite" in json.loads(event)["error"]["message"]
        assert client.get("/health").status_code == 200
        engine.wait_idle()
        assert engine.pages.held == 0


def test_a_turn_that_does_not_end_is_not_healthy(free_engine):
    free_engine.open()
    now = [0.0]
    with served.running(free_engine) as server, server.client() as client:
        driver = server.service.driver
        driver._clock = lambda: now[0]
        free_engine.shut()
        asker = Asker(server, LONG)
        server.until(lambda: driver._turn_began is not None)
        now[0] = STALLED_SECONDS - 1
        assert client.get("/health").status_code == 200
        now[0] = STALLED_SECONDS + 1
        assert client.get("/health").status_code == 503
        free_engine.open()
        assert asker.status() == 200
        assert client.get("/health").status_code == 200


def test_a_driver_that_never_began_can_be_stopped(free_engine):
    driver = Driver(free_engine)
    driver.stop()
    assert not driver.healthy


def test_an_address_that_somebody_has(free_engine):
    with bind("127.0.0.1", 0) as sock:
        sock.listen()
        port = sock.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot serve 127.0.0.1:{port}; got .*in use.*; fix: another"):
            bind("127.0.0.1", port)
    with pytest.raises(InputError, match="--port; expected 0 to 65535; got 99999"):
        bind("127.0.0.1", 99_999)
    with pytest.raises(InputError, match="cannot serve nowhere.invalid:0"):
        bind("nowhere.invalid", 0)
    assert isinstance(Service(free_engine, "x").name, str)


def test_the_page(client):
    answer = client.get("/")
    if answer.status_code == 200:
        assert answer.headers["content-type"].startswith("text/html")
        assert "default-src 'self'" in answer.headers["content-security-policy"]
    else:
        error_of(answer, 404)
