"""Tokenizers: loading those of others, and training our own byte-level BPE on the training split."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from mosaicjax.data.byte_level import PATTERN, has_type, piece_bytes, split_pattern, tiktoken_ranks
from mosaicjax.data.documents import Documents, open_sources
from mosaicjax.data.split import check_fraction, is_held_out
from mosaicjax.errors import InputError

END_OF_TEXT = "<|endoftext|>"
DETECT = "detect"
SEPARATORS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|eos|>")
MERGE_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
# tiktoken's expression engine overflows its stack on about a million blanks in a row
LONG_BLANK = re.compile(r"\s{50000}")

Encode = Callable[[str], list[int]]
EncodeBatch = Callable[[Sequence[str]], list[list[int]]]


class Tokenizer:
    """Text to ids and back, whatever file it came from.

    `size`: ids are below it. `separator`: the id that ends a text. `encoder`: which library encodes. `files`:
    what to copy to have the same tokenizer elsewhere. `pieces[id]`: the bytes an id stands for, none for
    special tokens. `special`: the ids of those by name; no text is encoded as one. `leading_space`: a space
    may come before a text. `before`: the ids that a model expects before a prompt, `ends`: those that end its
    text; the separator, unless the model says otherwise.
    """

    def __init__(
        self,
        *,
        encode: Encode,
        encode_batch: EncodeBatch,
        encoder: str,
        pieces: Sequence[bytes],
        separator: tuple[int, str],
        leading_space: bool,
        files: tuple[Path, ...],
        special: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self._encode = encode
        self._encode_batch = encode_batch
        self.leading_space = leading_space
        self.special = dict(special)
        self.encoder = encoder
        self.pieces = tuple(pieces)
        self.separator, self.separator_token = separator
        self.before: tuple[int, ...] = (self.separator,)
        self.ends: tuple[int, ...] = (self.separator,)
        self.files = files

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return len(self.pieces)

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """How many UTF-8 bytes each id stands for: 0 for the separator and other special tokens.

        Over the ids of a text they add up to its bytes for a byte-level tokenizer without a normalizer.
        SentencePiece counts the space it may put before a text.

        Shapes: int32 [size].
        """
        return np.array([len(piece) for piece in self.pieces], np.int32)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the files, in hexadecimal."""
        return _hash_files(self.files)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; what looks like a special token in it is plain text."""
        return self._encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        return self._encode_batch(texts)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes that ids stand for; special tokens stand for none."""
        data = b"".join(self.pieces[id_] for id_ in ids)
        return data[1:] if self.leading_space and data.startswith(b" ") else data

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text that ids stand for, with U+FFFD where they end within a character."""
        return self.decode_bytes(ids).decode(errors="replace")


def load_tokenizer(path: str | Path, *, separator: str = DETECT) -> Tokenizer:
    """Load a Hugging Face `tokenizer.json`, a SentencePiece model, or GPT-2's pair of files.

    `path` is the file or a folder that holds one (`tokenizer.json` before a `*.model*`). The separator is
    found in `tokenizer_config.json` (`eos_token`) or among the usual names unless it is given.

    Raises: InputError where there is no tokenizer, it is of an unknown kind, or its separator cannot be told.
    """
    path = Path(path)
    if path.is_dir():
        path = _find(path)
    elif not path.exists():
        raise InputError(f"tokenizer {path} does not exist")
    if ".model" in path.suffixes:
        return _load_sentencepiece(path, separator)
    for vocabulary, merges in MERGE_FILES:
        if path.name in (vocabulary, merges):
            files = (path.with_name(vocabulary), path.with_name(merges))
            return _from_settings(_gpt2_settings(*files), files, separator)
    if path.suffix != ".json":
        raise InputError(
            f"tokenizer {path} is of an unknown kind", expected="tokenizer.json or a SentencePiece .model"
        )
    return _from_settings(_read_json(path), (path,), separator)


def tokenizer_settings(files: Sequence[Path]) -> dict[str, Any]:
    """A tokenizer's files, a `tokenizer.json` or GPT-2's pair, as the settings of a `tokenizer.json`.

    Raises: InputError where they cannot be read.
    """
    return _read_json(files[0]) if len(files) == 1 else _gpt2_settings(*files)


def train_tokenizer(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    vocab: int,
    held_out: float,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    field: str = "text",
    special: Sequence[str] = (),
) -> Tokenizer:
    """Train a byte-level BPE on the training split of some sources and write it as a `tokenizer.json`.

    `out` is the file, or the folder to put `tokenizer.json` in. Id 0 is the separator `<|endoftext|>`, then
    come the tokens of `special` and the 256 bytes. Validation documents (`is_held_out`) are never seen, and
    the same sources give the same file.

    Raises: InputError where the documents hold fewer than `vocab` tokens worth a merge, or a special token is
        one that text may be encoded as.
    """
    check_fraction(held_out)
    least = 257 + len(special)
    if vocab < least:
        raise InputError(
            "the vocabulary is too small",
            expected=f"at least {least}: 256 bytes, a separator and {len(special)} special tokens"
            if special
            else "at least 257: 256 bytes and a separator",
            got=vocab,
        )
    documents = open_sources(sources, include=include, exclude=exclude, field=field)
    trained = _train(documents, vocab, held_out, special)
    if trained.get_vocab_size() != vocab:
        raise InputError(
            "the documents do not have that many tokens",
            expected=f"a vocabulary of {vocab}",
            got=trained.get_vocab_size(),
            fix="a smaller --vocab, or more text",
        )
    out = Path(out)
    path = out if out.suffix == ".json" else out / "tokenizer.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(trained.to_str(pretty=True), encoding="utf-8")
    unfinished.replace(path)
    return load_tokenizer(path)


def _train(documents: Documents, vocab: int, held_out: float, special: Sequence[str]) -> Any:
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as HuggingFace

    tokenizer = HuggingFace(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for token in special:
        # One piece of the pre-tokenizer's could be built by merges, and would then be no special token.
        whole = len(tokenizer.pre_tokenizer.pre_tokenize_str(token)) < 2
        if whole or token in SEPARATORS or special.count(token) > 1:
            raise InputError(
                "a special token",
                expected="a name that is no word, once, and does not end a text, as <fim_prefix>",
                got=token,
            )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=2,
        special_tokens=[END_OF_TEXT, *special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    training = (document.text for document in documents if not is_held_out(document.text, held_out))
    tokenizer.train_from_iterator(training, trainer)
    return tokenizer


def _find(folder: Path) -> Path:
    models = sorted(path for path in folder.iterdir() if ".model" in path.suffixes)
    for path in (folder / "tokenizer.json", *models, *(folder / names[0] for names in MERGE_FILES)):
        if path.exists():
            return path
    raise InputError(f"no tokenizer in {folder}", expected="tokenizer.json or a SentencePiece *.model")


def _hash_files(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"tokenizer file {path} does not exist") from error
    except ValueError as error:
        raise InputError(f"tokenizer {path} is not JSON", got=str(error)) from error
    if not isinstance(settings, dict):
        raise InputError(f"tokenizer {path}", expected="a JSON object", got=type(settings).__name__)
    return settings


def _gpt2_settings(vocabulary: Path, merges: Path) -> dict[str, Any]:
    if not merges.exists():
        raise InputError(f"tokenizer file {merges} does not exist", fix=f"put it beside {vocabulary.name}")
    ids = _read_json(vocabulary)
    lines = [
        line
        for line in merges.read_text(encoding="utf-8").split("\n")
        if line and not line.startswith("#version")
    ]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": ids[END_OF_TEXT], "content": END_OF_TEXT, **special}]
        if END_OF_TEXT in ids
        else [],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": ids, "merges": lines},
    }


def _from_settings(settings: dict[str, Any], files: tuple[Path, ...], separator: str) -> Tokenizer:
    from tokenizers import Tokenizer as HuggingFace

    try:
        # `tokenizers` raises the bare class for a file it cannot read
        hugging_face = HuggingFace.from_str(json.dumps(settings))
    except Exception as error:
        raise InputError(f"tokenizer {files[0]} cannot be read", got=str(error)) from error
    hugging_face.encode_special_tokens = True
    ids = hugging_face.get_vocab(with_added_tokens=True)
    special = {token["content"] for token in settings["added_tokens"] if token["special"]}
    added = {token["content"] for token in settings["added_tokens"]}
    to_bytes = _piece_decoder(settings, files[0])
    pieces = [b""] * (max(ids.values()) + 1)
    for piece, id_ in ids.items():
        if piece not in special:
            pieces[id_] = piece.encode() if piece in added else to_bytes(piece)

    def encode(text: str) -> list[int]:
        return hugging_face.encode(text, add_special_tokens=False).ids

    def encode_batch(texts: Sequence[str]) -> list[list[int]]:
        return [row.ids for row in hugging_face.encode_batch_fast(list(texts), add_special_tokens=False)]

    ranks, pattern = tiktoken_ranks(settings), split_pattern(settings)
    fast = None if ranks is None or pattern is None else _tiktoken_encode(pattern, ranks, encode)
    return Tokenizer(
        encode=fast or encode,
        encode_batch=_one_by_one(fast) if fast else encode_batch,
        encoder="tiktoken" if fast else "tokenizers",
        pieces=pieces,
        separator=_find_separator(files[0], ids, special, separator),
        special={piece: ids[piece] for piece in special},
        leading_space=has_type(settings.get("decoder"), "Strip")
        or has_type(settings.get("decoder"), "Metaspace"),
        files=files,
    )


def _one_by_one(encode: Encode) -> EncodeBatch:
    return lambda texts: [encode(text) for text in texts]


def _tiktoken_encode(pattern: str, ranks: dict[bytes, int], for_long_blanks: Encode) -> Encode:
    import tiktoken

    encoding = tiktoken.Encoding("mosaicjax", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def encode(text: str) -> list[int]:
        if LONG_BLANK.search(text):
            return for_long_blanks(text)
        return encoding.encode_ordinary(text)

    return encode


def _piece_decoder(settings: dict[str, Any], path: Path) -> Callable[[str], bytes]:
    decoder = settings.get("decoder")
    if has_type(decoder, "ByteLevel"):
        return piece_bytes
    if has_type(decoder, "Metaspace") or has_type(decoder, "ByteFallback"):
        return _spaced_piece_bytes
    raise InputError(
        f"tokenizer {path} does not say which bytes its tokens stand for",
        expected="a decoder ByteLevel, Metaspace or ByteFallback",
        got=(decoder or {}).get("type", "no decoder"),
    )


def _spaced_piece_bytes(piece: str) -> bytes:
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


def _find_separator(path: Path, ids: dict[str, int], special: set[str], separator: str) -> tuple[int, str]:
    token: str | None = separator
    if separator == DETECT:
        config_path = path.with_name("tokenizer_config.json")
        config = _read_json(config_path) if config_path.exists() else {}
        named = config.get("eos_token")
        token = named["content"] if isinstance(named, dict) else named
        usual = [name for name in SEPARATORS if name in special]
        if token is None and len(usual) == 1:
            token = usual[0]
    if token is None or token not in special:
        raise InputError(
            f"tokenizer {path}: which special token ends a text?",
            expected="eos_token in tokenizer_config.json, or exactly one of " + ", ".join(SEPARATORS),
            got=", ".join(sorted(special)) or "no special token",
            fix="name it with separator",
        )
    return ids[token], token


def _load_sentencepiece(path: Path, separator: str) -> Tokenizer:
    try:
        import sentencepiece
    except ImportError as error:
        raise InputError(
            f"tokenizer {path} needs SentencePiece", fix="pip install 'mosaicjax[sentencepiece]'"
        ) from error
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise InputError(
            f"tokenizer {path} cannot be read", expected="a SentencePiece model", got=str(error)
        ) from error
    names = [model.id_to_piece(id_) for id_ in range(model.vocab_size())]
    special = {id_ for id_ in range(len(names)) if model.is_control(id_) or model.is_unknown(id_)}
    end = model.eos_id() if separator == DETECT else model.piece_to_id(separator)
    if end not in special or model.is_unknown(end):
        raise InputError(
            f"tokenizer {path} has no token that ends a text", fix="name a control token with separator"
        )
    return Tokenizer(
        encode=lambda text: model.encode(text),
        encode_batch=lambda texts: model.encode(list(texts)),
        encoder="sentencepiece",
        pieces=[b"" if id_ in special else _spaced_piece_bytes(name) for id_, name in enumerate(names)],
        separator=(end, names[end]),
        special={names[id_]: id_ for id_ in special if not model.is_unknown(id_)},
        leading_space=model.encode("a") != []
        and _spaced_piece_bytes(names[model.encode("a")[0]]).startswith(b" "),
        files=(path,),
    )
