"""The container file: what it copies is there, what it pins is locked, and what it runs the command knows."""

import json
import re
import shlex
from pathlib import Path

from mosaicjax import cli

ROOT = Path(__file__).parents[1]


def instructions():
    """Each instruction of the file with its words, comments and line ends taken away."""
    text = "\n".join(line for line in (ROOT / "Dockerfile").read_text().splitlines() if line[:1] != "#")
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [line.split(None, 1) for line in lines if line.strip()]


def named(name):
    return [rest for word, rest in instructions() if word == name]


def test_what_is_copied_is_there_and_in_the_context():
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {word for rest in named("COPY") if "--from=" not in rest for word in shlex.split(rest)[:-1]}
    assert copied == {"locks/py312.txt", "pyproject.toml", "README.md", "LICENSE", "mosaicjax"}
    for name in copied:
        assert (ROOT / name).exists() and name.partition("/")[0] in kept


def test_versions_are_the_locked_ones_of_its_python():
    images = [rest.split()[0] for rest in named("FROM")]
    assert len(set(images)) == 1
    (minor,) = re.findall(r"^python:3\.(\d+)-slim$", images[0])
    (install,) = [rest for rest in named("RUN") if "pip install" in rest]
    assert f"PIP_CONSTRAINT=/src/locks/py3{minor}.txt" in install


def test_it_runs_as_nobody_in_particular_and_is_asked_after_its_health():
    words = [word for word, _ in instructions()]
    assert named("USER") == ["server"] and words.index("USER") < words.index("ENTRYPOINT")
    assert any("useradd" in rest and "--uid 10001" in rest for rest in named("RUN"))
    (health,) = named("HEALTHCHECK")
    port = named("EXPOSE")[0]
    assert f"http://127.0.0.1:{port}/health" in health
    compile(json.loads(health[health.index("[") :])[2], "health", "exec")


def test_the_command_knows_what_is_run():
    entry = json.loads(named("ENTRYPOINT")[0])
    assert entry[0] == "mosaicjax"
    options = cli.parser().parse_args(entry[1:])
    assert (options.command, options.model, options.host) == ("serve", "/model", "0.0.0.0")
    assert str(options.port) == named("EXPOSE")[0]


def test_the_extra_is_one_of_ours():
    project = (ROOT / "pyproject.toml").read_text()
    for extra in named("ARG")[0].partition("=")[2].split(","):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE)
