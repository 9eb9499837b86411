import email
import json
from pathlib import Path

import numpy as np
import pytest

from mosaicjax.data.arrays import CHUNK_TOKENS, create_array
from mosaicjax.data.manifest import Counts
from mosaicjax.data.store import Split
from mosaicjax.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def code_folder():
    """A folder of some 30 Python files that every Python has."""
    return Path(email.__file__).parent


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory, code_folder):
    """Our own tokenizer of 512 ids, trained on code."""
    return train_tokenizer([code_folder], tmp_path_factory.mktemp("tokenizer"), vocab=512, held_out=0.0)


@pytest.fixture(scope="session")
def write_split():
    """`write_split(folder, tokens, shard_tokens)`: a split of given tokens, written without the build."""

    def write(folder, tokens, *, shard_tokens=CHUNK_TOKENS, documents=1):
        array = create_array(
            folder / "tokens", dtype="uint16", shape=(len(tokens),), shard=shard_tokens, chunk=CHUNK_TOKENS
        )
        array.write(np.asarray(tokens, np.uint16)).result()
        return Split(folder, Counts(documents, len(tokens), 0), shard_tokens)

    return write


@pytest.fixture(scope="session")
def write_rows():
    """`write_rows(path, texts)`: a JSON lines file with the field `text`."""

    def write(path, texts):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        return path

    return write
