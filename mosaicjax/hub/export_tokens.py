"""A tokenizer's files for Transformers, which then puts the same ids around a text as we do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mosaicjax import storage
from mosaicjax.data.tokenizer import MERGE_FILES, Tokenizer
from mosaicjax.hub.foreign_dir import read_object
from mosaicjax.hub.sentencepiece_json import to_json
from mosaicjax.hub.tokens import CONFIG, JSON, files_of

SENTENCEPIECE = "tokenizer.model"
"""The name by which Transformers finds a SentencePiece model."""


def copy_tokenizer(source: storage.PathLike, out: storage.PathLike) -> None:
    """An imported model's tokenizer as it came, byte for byte."""
    for name in files_of(source):
        storage.copy_file(storage.join(source, name), storage.join(out, name))


def write_tokenizer(
    tokenizer: Tokenizer, length: int, out: storage.PathLike, say: Callable[[str], None]
) -> None:
    """A run's tokenizer: what the run puts before a prompt, Transformers puts there too.

    `length` is how many tokens the model was trained for.
    """
    file = Path(tokenizer.files[0])
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.separator_token,
        "eos_token": tokenizer.separator_token,
        "clean_up_tokenization_spaces": False,
        "model_max_length": length,
    }
    if file.suffix == ".json" and file.name in (name for pair in MERGE_FILES for name in pair):
        vocabulary, merges = (str(part) for part in tokenizer.files)
        storage.copy_file(vocabulary, storage.join(out, "vocab.json"))
        storage.copy_file(merges, storage.join(out, "merges.txt"))
        config |= {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}
    else:
        settings = read_object(str(file)) if file.suffix == ".json" else to_json(file, tokenizer)
        if settings is not None:
            settings["post_processor"] = _with_separator(settings.get("post_processor"), tokenizer)
            storage.write_text(storage.join(out, JSON), json.dumps(settings, ensure_ascii=False) + "\n")
        else:
            storage.copy_file(str(file), storage.join(out, SENTENCEPIECE))
            config |= {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True}
            say(
                f"the SentencePiece model {file.name} has no equal among fast tokenizers: it was copied, and"
                " Transformers may give other ids for some texts than it does"
            )
    storage.write_text(storage.join(out, CONFIG), json.dumps(config, indent=1, ensure_ascii=False) + "\n")


def _with_separator(processor: dict[str, Any] | None, tokenizer: Tokenizer) -> dict[str, Any]:
    """A post-processor that puts the separator before a text; one for offsets alone stays in front of it."""
    token, number = tokenizer.separator_token, tokenizer.separator
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    template: dict[str, Any] = {
        "type": "TemplateProcessing",
        "single": [special, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            special,
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": token, "type_id": 1}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }
    if processor is not None and processor.get("type") == "ByteLevel":
        return {"type": "Sequence", "processors": [processor, template]}
    return template
