"""gzip of the held-out documents, against the documents themselves."""

import gzip
import json

from mosaicjax.data.split import is_held_out
from mosaicjax.data.store import Store
from mosaicjax.evaluate.compression import Compressed, gzip_held_out
from tests import tiny


def test_gzip_is_of_each_original_document(tiny_store):
    lines = (tiny_store.parent / "documents.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    held_out = [text.encode() for text in texts if is_held_out(text, tiny.HELD_OUT)]
    assert 10 < len(held_out) < 60
    bits = sum(8 * len(gzip.compress(document, 9)) for document in held_out)
    size = sum(map(len, held_out))
    assert gzip_held_out([Store.open(tiny_store)]) == Compressed(len(held_out), size, bits)


def test_bits_per_byte():
    assert Compressed(documents=1, text_bytes=16, bits=40).bits_per_byte == 2.5
