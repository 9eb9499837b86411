"""The chat page with a model that is served."""

import json
import urllib.error
import urllib.request

import pytest

from tests.fake_openai import FakeServer
from tests.serve import served
from tests.serve.test_chat_page import Browser, Site, chromium

__all__ = ["chromium"]


def relay(url):
    """Hands requests to a server, and its answers on as they come."""

    def chat(handler, path, body):
        asked = urllib.request.Request(
            url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(asked) as reply:
                handler.stream()
                while part := reply.read1():
                    handler.part(part)
                handler.part(b"")
        except urllib.error.HTTPError as error:
            handler.whole(error.code, error.read())

    return chat


@pytest.mark.slow
def test_a_served_model_answers_and_is_stopped(chromium, model, tmp_path):
    steps = """
      type("temperature", "0"); type("most", "20");
      type("input", "Hello"); enter(); await until(idle); await tell("whole");
      type("input", "More"); enter(); await tell("asked");
      click("stop"); await until(idle); await tell("stopped");
    """
    engine = model.engine()
    with served.running(engine) as real, real.client() as client:
        body = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 20}
        expected = served.asked(client, "/v1/chat/completions", body)["choices"][0]["message"]["content"]
        # While the second answer is stopped no turn goes on, so that it cannot end by itself.
        site = Site(steps, relay(real.url), {"whole": engine.shut}, served.NAME)
        with FakeServer(site) as server, Browser(chromium, tmp_path, f"{server.url}/probe"):
            whole, _, stopped = (site.next(name) for name in ("whole", "asked", "stopped"))
            engine.open()
            engine.wait_idle()
        real.until(lambda: real.figures()["mosaicjax_in_flight"] == 0)
        assert real.figures()["mosaicjax_cache_pages_used"] == 0
    assert whole["turns"][:2] == [["turn user", "Hello"], ["turn", expected]] and expected
    assert whole["model"] == served.NAME
    assert stopped["turns"][-1] == ["turn note", "Stopped."] and stopped["input"] == "More"
