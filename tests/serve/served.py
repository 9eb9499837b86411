"""A tiny model behind the API, in this process."""

import asyncio
import contextlib
import json
import threading

import httpx2
import jax

from mosaicjax.data.chat import SHIPPED, Chat
from mosaicjax.data.tokenizer import Tokenizer
from mosaicjax.generate import Generator
from mosaicjax.mesh import Mesh
from mosaicjax.models import mpt
from mosaicjax.serve.chatting import Chatter
from mosaicjax.serve.engine import Engine, Sizes
from mosaicjax.serve.server import Server, bind
from mosaicjax.serve.service import Service
from mosaicjax.spec import Dtypes
from tests.models.test_decode import drawn_weights

DTYPES = Dtypes()
NAME = "tiny"
SIZES = Sizes(rows=4, chunk=16, page=4, pages=160, longest=96)
SEPARATOR, START, END = 256, 257, 258
SECONDS = 120
TRIES = 20_000


def tokenizer():
    """A token a byte, the separator, and the special tokens of chatml."""
    return Tokenizer(
        encode=lambda text: list(text.encode()),
        encode_batch=lambda texts: [list(text.encode()) for text in texts],
        encoder="bytes",
        pieces=[*(bytes([byte]) for byte in range(256)), b"", b"", b""],
        separator=(SEPARATOR, "<|endoftext|>"),
        special={"<|endoftext|>": SEPARATOR, "<|im_start|>": START, "<|im_end|>": END},
        leading_space=False,
        files=(),
    )


TOKENIZER = tokenizer()


def chatter(template="chatml", before=()):
    """What makes prompts of conversations by a template that comes with the package."""
    text = SHIPPED[template].read_text(encoding="utf-8")
    chat = Chat(text, special=tuple(TOKENIZER.special), eos="<|endoftext|>")
    return Chatter(chat, TOKENIZER, before)


class Gated(Engine):
    """An engine whose turns wait while the gate is shut, or until `steps` let them through."""

    def __init__(self, *given):
        super().__init__(*given)
        self.turned = threading.Condition()
        self._open, self._steps = True, 0

    def shut(self):
        with self.turned:
            self._open = False

    def open(self):
        with self.turned:
            self._open = True
            self.turned.notify_all()

    def let(self, steps):
        """Let so many turns through, and wait for their end."""
        with self.turned:
            self._steps += steps
            self.turned.notify_all()
            assert self.turned.wait_for(lambda: self._steps == 0, SECONDS)

    def turn(self):
        with self.turned:
            assert self.turned.wait_for(lambda: self._open or self._steps, SECONDS)
        super().turn()
        with self.turned:
            self._steps = max(0, self._steps - 1)
            self.turned.notify_all()

    def wait_idle(self):
        with self.turned:
            assert self.turned.wait_for(lambda: self.idle, SECONDS)


class Model:
    """Random weights, and who else can write with them."""

    def __init__(self):
        config = mpt.Config(layers=2, embed=32, heads=4, kv_heads=2, mlp=48, vocab=260)
        self.layout = Mesh(fsdp=(1,)).build(jax.devices()[:1])
        self.decoder = config.build()
        self.weights = drawn_weights(self.decoder, self.layout)

    def engine(self, kind=Gated, sizes=SIZES):
        return kind(self.decoder, self.weights, self.layout, DTYPES, TOKENIZER, sizes)

    def generator(self):
        return Generator(self.decoder, self.weights, self.layout, DTYPES, TOKENIZER)


class Running:
    """A service at a free port, in a thread of its own."""

    def __init__(self, service):
        self.service, self.engine = service, service.engine
        self.server = Server(service)
        self._ready, self._begun = threading.Event(), threading.Event()
        self._sock = bind("127.0.0.1", 0)
        self.port = self._sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    async def _serve(self):
        self.loop = asyncio.get_running_loop()
        self._begun.set()
        await self.server.run_at(self._sock, self._ready.set)

    def start(self, *, wait=True):
        self.thread.start()
        assert self._begun.wait(SECONDS)
        if wait:
            assert self._ready.wait(SECONDS), "the engine did not become ready"
        return self

    def drain(self):
        # Of a loop that is closed, nothing is left to end.
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.server.drain)

    def client(self, key=None, **options):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=SECONDS, **options)

    def figures(self):
        """The lines of /metrics by name."""
        return figures(self.service.metrics.text())

    def until(self, true):
        """Ask the server again and again until something is true of its answer."""
        with self.client() as client:
            for _ in range(TRIES):
                client.get("/health")
                if true():
                    return
        raise AssertionError("it did not become true")


@contextlib.contextmanager
def running(engine, *, wait=True, **options):
    """A server for one engine, which nobody else may have meanwhile."""
    with contextlib.ExitStack() as stack:
        service = Service(engine, NAME, **({"chatter": chatter()} | options))
        made = Running(service).start(wait=wait)
        stack.callback(made.thread.join, SECONDS)
        if hasattr(engine, "open"):
            stack.callback(engine.open)
        stack.callback(made.drain)
        yield made


def figures(text):
    """Prometheus' text as numbers by name."""
    lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}


def events(response):
    """The data of server-sent events, up to the end."""
    for line in response.iter_lines():
        if line:
            assert line.startswith("data: "), line
            yield line.removeprefix("data: ")


def chunks(client, path, body):
    """A stream's chunks; it must end as it should."""
    with client.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        data = list(events(response))
    assert data.pop() == "[DONE]"
    return [json.loads(each) for each in data]


def rest_of(sock):
    """What comes from a socket until the other side has closed it, in order or not."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while part := sock.recv(65_536):
            received += part
    return received


def asked(client, path, body):
    """The answer to a request that must be answered well."""
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()
