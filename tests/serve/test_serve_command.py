"""`mosaicjax serve`: what it refuses, and a whole life of it as a process of its own."""

import json
import re
import socket
import subprocess
import sys
import threading

import httpx2
import pytest

from mosaicjax.cli_serve import mesh_of
from mosaicjax.errors import InputError
from mosaicjax.generate import Sampling, generate, load_run
from mosaicjax.mesh import Mesh
from tests import jobs, tiny
from tests.serve import served


def refusal(capsys, *arguments):
    assert tiny.run("serve", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("mosaicjax: ")


def test_refusals(capsys, tmp_path, tiny_run, monkeypatch):
    monkeypatch.delenv("MOSAICJAX_API_KEYS", raising=False)
    assert refusal(capsys, tiny_run, "--host", "0.0.0.0") == (
        "--host 0.0.0.0 serves other machines, and there is no API key;"
        " fix: --keys FILE or MOSAICJAX_API_KEYS; or --host 127.0.0.1"
    )
    assert "holds no model" in refusal(capsys, tmp_path)
    assert refusal(capsys, tiny_run, "--mesh", "fsdp") == (
        "--mesh; expected data, fsdp and tensor, as fsdp=2,tensor=4; got fsdp"
    )
    said = refusal(capsys, tiny_run, "--max-tokens", 0)
    assert said == "the limit max_tokens; expected 1 or more; got 0"
    assert "serve's rows; expected 1 or more" in refusal(capsys, tiny_run, "--rows", 0)
    assert "the price of a chip hour is unusable" in refusal(capsys, tiny_run, "--usd-per-hour", "nan")
    assert "cannot be read" in refusal(capsys, tiny_run, "--keys", tmp_path / "missing")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot serve 127.0.0.1:{port}" in refusal(capsys, tiny_run, "--port", port)
    said = refusal(capsys, tiny_run, "--port", 0, "--template", "chatml")
    assert said.startswith("the template chatml needs special tokens that the tokenizer lacks")


def test_meshes():
    assert mesh_of("fsdp=1") == Mesh(fsdp=(1,))
    assert mesh_of("tensor=4, data=2,fsdp=-1") == Mesh(data=2, fsdp=(-1,), tensor=4)
    for text in ("", "fsdp", "fsdp=x", "rows=2", "fsdp=1,fsdp=2", "fsdp=--1"):
        with pytest.raises(InputError, match="--mesh; expected data, fsdp and tensor"):
            mesh_of(text)


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], env=jobs.environment(1), capture_output=True, text=True, check=False
    )


def test_the_command_line_waits_for_no_server():
    heavy = "{'fastapi', 'jax', 'pydantic', 'starlette', 'uvicorn'}"
    code = f"import sys; from mosaicjax import cli; cli.parser(); sys.exit(str({heavy} & set(sys.modules)))"
    assert run_python(code).stderr.strip() == "set()"


def test_without_the_extra_it_says_so(tiny_run):
    code = (
        "import sys; sys.modules['uvicorn'] = sys.modules['fastapi'] = None\n"
        "import importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name: None if name in ('fastapi', 'uvicorn') else real(name)\n"
        f"from mosaicjax import cli; sys.exit(cli.main(['serve', {str(tiny_run)!r}]))"
    )
    done = run_python(code)
    assert done.returncode == 2
    assert (
        done.stderr.strip()
        == "mosaicjax: serving needs fastapi, uvicorn; fix: pip install 'mosaicjax[serve]'"
    )


class Process:
    """`mosaicjax serve` in a process; its lines as they come."""

    def __init__(self, *arguments):
        self.process = tiny.launch("serve", *arguments, "--port", 0)
        self.lines, self.errors = [], []
        threading.Thread(target=lambda: self.errors.extend(self.process.stderr), daemon=True).start()
        for line in self.process.stdout:
            self.lines.append(line)
            if found := re.match(r"serving (\S+) at (http://\S+)/v1", line):
                self.name, self.url = found.groups()
                return
        raise AssertionError("".join(self.errors))

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.process.kill()
        self.process.wait()

    def end(self):
        self.lines += self.process.stdout
        return self.process.wait(served.SECONDS)


@pytest.mark.slow
def test_a_signal_in_mid_stream_lets_it_end(tiny_run):
    """Greedy text is what `generate` writes; SIGTERM while it comes changes none of it, and the exit is 0."""
    long = {"prompt": "Document", "max_tokens": 1_900, "temperature": 0, "ignore_eos": True, "stream": True}
    long["stream_options"] = {"include_usage": True}
    sampling = Sampling(max_tokens=60, temperature=0.0)
    (expected,) = generate(*load_run(tiny_run), ["Document"], sampling, lambda number, text: None)
    with (
        Process(tiny_run, "--longest", 2_048, "--rows", 2, "--usd-per-hour", 2) as server,
        httpx2.Client(base_url=server.url, timeout=served.SECONDS) as client,
    ):
        assert server.name == tiny_run.name
        body = {"prompt": "Document", "max_tokens": 60, "temperature": 0}
        assert served.asked(client, "/v1/completions", body)["choices"][0]["text"] == expected.text
        found = served.figures(client.get("/metrics").text)
        assert found["mosaicjax_tokens_total"] == len(expected.tokens)
        with client.stream("POST", "/v1/completions", json=long) as response:
            events = served.events(response)
            next(events)
            server.process.send_signal(tiny.TERM)
            # The line is written by the same loop that takes no more from then on.
            server.lines.append(server.process.stdout.readline())
            with httpx2.Client(base_url=server.url) as other:
                assert other.post("/v1/completions", json=body).status_code == 503
                assert other.get("/ready").status_code == 503
            rest = list(events)
        assert rest.pop() == "[DONE]"
        assert json.loads(rest[-1])["usage"]["completion_tokens"] == 1_900
        assert server.end() == 0
        assert [line.strip() for line in server.lines[-2:]] == [
            "stopping: answers under way end first",
            "stopped",
        ]
    assert not any("Traceback" in line for line in server.errors)


@pytest.mark.slow
def test_chats_keys_and_a_signal_while_idle(tiny_run, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("the-only-key\n")
    options = ("--host", "0.0.0.0", "--keys", keys, "--template", "dolly", "--name", "mine", "--rows", 2)
    with Process(tiny_run, *options, "--longest", 256) as server:
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        body = {"messages": [{"role": "user", "content": "Go on."}], "max_tokens": 5, "model": "mine"}
        assert httpx2.post(f"{url}/v1/chat/completions", json=body).status_code == 401
        headers = {"Authorization": "Bearer the-only-key"}
        answer = httpx2.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=served.SECONDS)
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] <= 5
        server.process.send_signal(tiny.INT)
        assert server.end() == 0
    assert not any("Go on." in line for line in server.errors)
