"""The chat page in headless Chromium, beside a server that writes when the test says so."""

import json
import queue
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

import mosaicjax.serve
from tests.fake_openai import PATIENCE, FakeServer

PAGE = Path(mosaicjax.serve.__file__).with_name("chat.html")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-quic"),
)
NASTY = "<img src=x onerror='document.title=1'><b>größe</b> & "

# What a person does, in a frame within the page; what they see is told to the test.
PROBE = """<!doctype html><iframe id="frame" src="/" style="width:390px;height:700px"></iframe><script>
const tell = async (name) => {
  const page = frame.contentDocument;
  const rect = page.getElementById("send").parentElement.getBoundingClientRect();
  const seen = {name, width: page.documentElement.scrollWidth, right: rect.right, bottom: rect.bottom,
    turns: [...page.querySelectorAll(".turn")].map((each) => [each.className, each.textContent]),
    markup: page.querySelectorAll("#log b, #log img").length, speed: page.getElementById("speed").textContent,
    model: page.getElementById("model").textContent, stop: !page.getElementById("stop").hidden,
    input: page.getElementById("input").value};
  await fetch("/tell", {method: "POST", body: JSON.stringify(seen)});
};
const until = (holds) => new Promise((done) => {
  const page = frame.contentDocument;
  const look = () => { if (holds(page)) { watch.disconnect(); done(); } };
  const watch = new MutationObserver(look);
  watch.observe(page, {subtree: true, childList: true, characterData: true, attributes: true});
  look();
});
const type = (id, text) => {
  const field = frame.contentDocument.getElementById(id);
  field.value = text;
  field.dispatchEvent(new frame.contentWindow.Event("input", {bubbles: true}));
};
const enter = () => frame.contentDocument.getElementById("input").dispatchEvent(
  new frame.contentWindow.KeyboardEvent("keydown", {key: "Enter", bubbles: true, cancelable: true}));
const click = (id) => frame.contentDocument.getElementById(id).click();
const holds = (text) => (page) => page.getElementById("log").textContent.includes(text);
const idle = (page) => page.getElementById("stop").hidden;
frame.onload = async () => { %s };
</script>"""


@pytest.fixture
def chromium():
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium on this machine")
    return found


class Site:
    """The page, the probe, and answers that `chat` gives; what the probe tells comes by `next`."""

    def __init__(self, steps, chat, then=(), model="the-model"):
        self.steps, self.chat, self.told = steps, chat, queue.Queue()
        self.then, self.model = dict(then), model

    def __call__(self, handler, path, body):
        if path == "/":
            handler.whole(200, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif path == "/probe":
            handler.whole(200, (PROBE % self.steps).encode(), "text/html; charset=utf-8")
        elif path == "/v1/models":
            handler.whole(200, {"data": [{"id": self.model}]})
        elif path == "/tell":
            # Before the page goes on.
            self.then.get(body["name"], lambda: None)()
            self.told.put(body)
            handler.whole(200, {})
        else:
            self.chat(handler, path, body)

    def next(self, name):
        seen = self.told.get(timeout=PATIENCE)
        assert seen["name"] == name, seen
        return seen


class Browser:
    """Chromium at an address, until the block ends; what the page said on its console."""

    def __init__(self, chromium, folder, url):
        profile = f"--user-data-dir={folder}/profile"
        self.process = subprocess.Popen(
            [chromium, *FLAGS, "--enable-logging=stderr", profile, "--remote-debugging-port=0", url],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.process.terminate()
        _, errors = self.process.communicate(timeout=PATIENCE)
        said = [line for line in errors.splitlines() if "CONSOLE" in line]
        # Chromium says so of every refusal, whatever the page makes of it.
        assert not [line for line in said if "Failed to load resource" not in line]


def piece(text, finish=None):
    return {"choices": [{"delta": {"content": text}, "finish_reason": finish}]}


def test_it_is_one_small_page_without_outside_assets():
    text = PAGE.read_text(encoding="utf-8")
    assert len(text) < 16_000
    assert not re.findall(r"https?://|@import|url\(|<link(?! rel=\"icon\" href=\"data:,\")|\ssrc=", text)
    assert not re.findall(
        "innerHTML|outerHTML|insertAdjacentHTML|document.write|eval|localStorage|cookie", text
    )


@pytest.mark.slow
def test_type_see_the_streamed_answer_and_stop_it(chromium, tmp_path):
    go_on, gone = threading.Event(), threading.Event()

    def chat(handler, path, body):
        handler.stream()
        handler.event({"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        if len(body["messages"]) == 1:
            handler.event(piece(NASTY))
            # The rest is written once the page shows this.
            assert go_on.wait(PATIENCE)
            data = "data: " + json.dumps(piece("größer", "length"), ensure_ascii=False) + "\n\n"
            # Cut within a character.
            cut = data.encode().index("ö".encode()) + 1
            handler.part(data.encode()[:cut])
            handler.part(data.encode()[cut:])
            handler.event({"choices": [], "usage": {"completion_tokens": 2, "prompt_tokens": 1}})
            handler.event("[DONE]")
            return handler.part(b"")
        handler.event(piece("endless"))
        try:
            while True:
                handler.event(piece(" text"))
        except OSError:
            gone.set()

    steps = """
      type("key", "secret"); type("temperature", "0.25"); type("most", "7");
      type("input", "Hello"); enter();
      await until(holds("größe")); await tell("first");
      await until(idle); await tell("whole");
      type("input", "More"); click("send");
      await until(holds("endless text")); click("stop");
      await until(idle); await tell("stopped");
      click("clear"); await tell("cleared");
    """
    site = Site(steps, chat)
    with FakeServer(site) as server, Browser(chromium, tmp_path, f"{server.url}/probe"):
        first = site.next("first")
        # It was shown while the server still wrote.
        assert first["turns"] == [["turn user", "Hello"], ["turn waiting", NASTY]] and first["stop"]
        go_on.set()
        whole = site.next("whole")
        stopped = site.next("stopped")
        assert gone.wait(PATIENCE)
        cleared = site.next("cleared")
        asked = [each for each in server.asked if each[1] == "/v1/chat/completions"]
    note = ["turn note", "The most tokens are written."]
    assert whole["turns"] == [["turn user", "Hello"], ["turn", f"{NASTY}größer"], note]
    # What the model writes is text: no element came of it. On a telephone nothing is cut off.
    assert whole["markup"] == 0 and whole["model"] == "the-model"
    assert whole["width"] <= 390 and whole["right"] <= 390 and whole["bottom"] <= 700
    assert re.fullmatch(r"[\d.]+ tokens/s, first token after [\d.]+ s, 2 tokens", whole["speed"])
    assert not whole["stop"] and whole["input"] == ""
    assert stopped["turns"][:4] == [*whole["turns"], ["turn user", "More"]]
    kind, text = stopped["turns"][4]
    assert kind == "turn" and re.fullmatch(r"endless( text)+", text) and stopped["turns"][5][1] == "Stopped."
    assert cleared["turns"] == [] and cleared["speed"] == ""
    bodies = [body for *_, body in asked]
    assert [body["messages"] for body in bodies] == [
        [{"role": "user", "content": "Hello"}],
        [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": f"{NASTY}größer"},
            {"role": "user", "content": "More"},
        ],
    ]
    for _, _, headers, body in asked:
        assert headers["Authorization"] == "Bearer secret" and body["stream"] is True
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("the-model", 0.25, 7)


@pytest.mark.slow
def test_without_a_chat_template_it_goes_on_with_the_text_and_refusals_are_shown(chromium, tmp_path):
    def chat(handler, path, body):
        if path == "/v1/chat/completions":
            return handler.whole(400, {"error": {"message": "the tokenizer has no chat template"}})
        if body["prompt"].endswith("refuse"):
            return handler.whole(429, {"error": {"message": "too many <b>requests</b>"}})
        handler.completion([" there", " was"])

    steps = """
      type("input", "Once upon a time"); click("send"); await until(idle);
      type("input", " a king"); click("send"); await until(idle); await tell("plain");
      type("input", "refuse"); click("send"); await until(idle); await tell("refused");
    """
    site = Site(steps, chat)
    with FakeServer(site) as server, Browser(chromium, tmp_path, f"{server.url}/probe"):
        plain, refused = site.next("plain"), site.next("refused")
        prompts = [body["prompt"] for _, path, _, body in server.asked if path == "/v1/completions"]
    assert prompts[:2] == ["Once upon a time", "Once upon a time there was a king"]
    note = ["turn note", "This model has no chat template: it goes on with your text."]
    assert plain["turns"][:3] == [["turn user", "Once upon a time"], note, ["turn", " there was"]]
    assert refused["turns"][-1] == ["turn error", "too many <b>requests</b>"] and refused["markup"] == 0
    # Nothing was answered: the text can be sent again.
    assert refused["input"] == "refuse"
