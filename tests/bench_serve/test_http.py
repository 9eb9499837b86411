"""Answers as they come over the wire, cut anywhere, beside the events that they were made of."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaicjax.bench_serve.http import Broken, Reply, Server, events
from mosaicjax.errors import InputError

TEXTS = st.lists(
    st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\r\n"), max_size=12), max_size=6
)


def written(texts, newline, comments):
    """Events by the standard: a line a line, an empty line behind each; comments are nobody's."""
    parts = []
    for number, text in enumerate(texts):
        if comments:
            parts.append(f": {number}{newline}id: {number}{newline}")
        parts.append(f"data: {text}{newline}{newline}")
    return "".join(parts).encode()


def framed(data, framing, cuts):
    """Headers of the answer, and its body on the wire."""
    if framing == "chunked":
        places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
        chunks = [data[a:b] for a, b in zip(places, places[1:], strict=False)]
        body = b"".join(b"%X;name=value\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
        return {"transfer-encoding": "chunked"}, body + b"0\r\n\r\n"
    return ({"content-length": str(len(data))} if framing == "length" else {}), data


def heard(headers, wire, cuts=()):
    """The events of an answer of which parts come one after the other."""

    async def listen():
        reader = asyncio.StreamReader()
        reply = Reply(200, headers, reader)
        places = sorted({0, len(wire), *(cut % (len(wire) + 1) for cut in cuts)})

        async def feed():
            for a, b in zip(places, places[1:], strict=False):
                reader.feed_data(wire[a:b])
                await asyncio.sleep(0)
            reader.feed_eof()

        task = asyncio.create_task(feed())
        found = [event async for event in events(reply)]
        await task
        return found

    return asyncio.run(listen())


CUTS = st.lists(st.integers(0, 10_000), max_size=8)


@given(
    TEXTS,
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    st.sampled_from(["chunked", "length", "close"]),
    CUTS,
    CUTS,
)
def test_events_are_those_that_were_written(texts, newline, comments, framing, chunks, cuts):
    headers, wire = framed(written(texts, newline, comments), framing, chunks)
    assert heard(headers, wire, cuts) == texts


@given(st.sampled_from(["chunked", "length"]), st.data())
def test_an_answer_that_ends_early_is_broken(framing, data):
    headers, wire = framed(written(["one", "two", "three"], "\n", False), framing, [7, 20])
    # What ends a chunked answer is its last, empty chunk: the line behind it says nothing.
    last = len(wire) - (3 if framing == "chunked" else 1)
    cut = data.draw(st.integers(0, last))
    with pytest.raises(Broken):
        heard(headers, wire[:cut])


def test_what_is_no_chunk_is_broken():
    for wire in (b"zz\r\n", b"-1\r\n", b"\r\n"):
        with pytest.raises(Broken):
            heard({"transfer-encoding": "chunked"}, wire)


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("http://127.0.0.1:8000", (False, "127.0.0.1", 8000, "")),
        ("http://127.0.0.1:8000/v1/", (False, "127.0.0.1", 8000, "")),
        ("https://example.org/openai/v1", (True, "example.org", 443, "/openai")),
        ("http://[::1]:90/a", (False, "::1", 90, "/a")),
        ("http://example.org", (False, "example.org", 80, "")),
    ],
)
def test_addresses(url, parts):
    server = Server.parse(url)
    assert (server.secure, server.host, server.port, server.base) == parts
    assert Server.parse(str(server)) == server


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://a", "http://", "http://a:b", "http://a/?x=1"])
def test_what_is_no_address(url):
    with pytest.raises(InputError, match="URL; expected as http"):
        Server.parse(url)
