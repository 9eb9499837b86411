"""A server that speaks as much of OpenAI's HTTP as a test writes down for it."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PATIENCE = 60
"""Seconds after which a test that waits for something has failed."""


class Handler(BaseHTTPRequestHandler):
    """One request; what answers it writes by these."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        """Nothing is said on the screen."""

    def do_GET(self):
        self._answer({})

    def do_POST(self):
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}"))

    def _answer(self, body):
        with self.server.lock:
            self.server.asked.append((self.command, self.path, dict(self.headers), body))
        self.close_connection = True
        self.server.script(self, self.path, body)

    def whole(self, status, content, kind="application/json", **headers):
        """An answer in one piece; what is not bytes already becomes JSON."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(data)

    def stream(self):
        """The beginning of an answer of events."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def event(self, data):
        """One event; what is no text becomes JSON."""
        text = data if isinstance(data, str) else json.dumps(data)
        self.part(f"data: {text}\n\n".encode())

    def part(self, data):
        """A chunk; the empty one ends the answer."""
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.wfile.flush()

    def completion(self, pieces, finish="length", prompt_tokens=3, usage=True):
        """A whole stream of /v1/completions."""
        self.stream()
        for piece in pieces:
            self.event({"choices": [{"text": piece, "finish_reason": None}]})
        self.event({"choices": [{"text": "", "finish_reason": finish}]})
        if usage:
            counts = {"prompt_tokens": prompt_tokens, "completion_tokens": len(pieces)}
            self.event({"choices": [], "usage": counts})
        self.event("[DONE]")
        self.part(b"")


class FakeServer(ThreadingHTTPServer):
    """`script(handler, path, body)` answers each request in a thread of its own; `asked` keeps them all."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, script):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.asked, self.lock = script, [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        """A client that goes away is none of the server's business."""

    def __enter__(self):
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *unused):
        self.shutdown()
        self.thread.join(PATIENCE)
        self.server_close()

    @property
    def bodies(self):
        """What was posted."""
        return [body for method, _, _, body in self.asked if method == "POST"]
