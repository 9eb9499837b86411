"""The `mosaicjax data` commands: build, look at and check token stores."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from enum import Enum
from typing import Any, TypeVar

from mosaicjax.errors import InputError

Choice = TypeVar("Choice", bound=Enum)


def add_data(commands: Any, command_of: Callable[..., Any]) -> None:
    """Add the commands; `command_of` is how the others are made too."""
    data = command_of(commands, "data", None, "build and check token stores")
    steps = data.add_subparsers(
        dest="data_command", required=True, metavar="COMMAND", parser_class=type(data)
    )
    build = command_of(steps, "build", _data_build, "turn documents into a token store")
    tokenizer = command_of(steps, "train-tokenizer", _data_tokenizer, "learn a byte-level BPE from documents")
    for command in (build, tokenizer):
        command.add_argument(
            "sources",
            nargs="+",
            help="folders, text, .jsonl[.gz|.xz|.zst], .parquet, Delta tables (TABLE@v7), MDS, hf:NAME;"
            " here or on s3:// or gs://",
        )
        command.add_argument("--out", required=True)
        command.add_argument(
            "--held-out", type=float, default=0.01, help="share of documents kept for evaluation"
        )
        command.add_argument("--include", action="append", default=[], metavar="GLOB")
        command.add_argument("--exclude", action="append", default=[], metavar="GLOB")
        command.add_argument("--field", default="text", help="the text's key in .jsonl rows, or its column")
    build.add_argument("--tokenizer", required=True, help="tokenizer.json, tokenizer.model, or their folder")
    build.add_argument("--seed", type=int, default=0, help="of the documents' order")
    build.add_argument("--workers", type=int, default=0, help="processes (default: all cores)")
    build.add_argument(
        "--engine", default="cores", help="or spark: this machine, or the cluster that spark-submit brings"
    )
    build.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help="keep the texts for which it is true; may be repeated",
    )
    build.add_argument("--drop-duplicates", action="store_true", help="keep one document of each text")
    build.add_argument(
        "--template",
        default="",
        metavar="NAME|FILE",
        help="rows are conversations or preference pairs: plain, dolly, alpaca, chatml, llama3, tokenizer"
        " (its own), or a file",
    )
    build.add_argument(
        "--format", default="auto", help="of rows: prompt, instruction, messages, sharegpt or preference"
    )
    build.add_argument(
        "--loss-on", default="response", help="or last (the last response alone), or all (every token)"
    )
    build.add_argument(
        "--fim", type=float, default=0.0, metavar="RATE", help="share reordered for fill-in-the-middle"
    )
    build.add_argument(
        "--fim-spm", type=float, default=0.5, metavar="SHARE", help="of those, as suffix, prefix, middle"
    )
    build.add_argument(
        "--fim-tokens", default="", metavar="PREFIX,MIDDLE,SUFFIX", help="(default: the usual names)"
    )
    tokenizer.add_argument("--vocab", type=int, required=True, help="how many ids")
    tokenizer.add_argument(
        "--special", action="append", default=[], metavar="TOKEN", help="a special token; may be repeated"
    )
    adding = command_of(steps, "add-tokens", _data_add_tokens, "special tokens into a tokenizer that exists")
    adding.add_argument("tokenizer", help="a tokenizer.json, GPT-2's files, or a folder with one of these")
    adding.add_argument("--special", action="append", required=True, metavar="TOKEN", help="may be repeated")
    adding.add_argument("--out", required=True, help="the folder to write tokenizer.json into")
    verify = command_of(steps, "verify", _data_verify, "compare a store's files with their checksums")
    verify.add_argument("store")
    copy = command_of(steps, "copy", _data_copy, "copy a store elsewhere, such as to s3:// or gs://")
    copy.add_argument("store")
    copy.add_argument("target")
    inspect = command_of(steps, "inspect", _data_inspect, "what is in stores, and how long it is")
    inspect.add_argument("stores", nargs="+")
    inspect.add_argument("--split", default="train", help="or validation")
    inspect.add_argument("--documents", type=int, default=3, help="how many of each to show")
    inspect.add_argument("--picture", default="", metavar="FILE", help="the lengths, as a PNG")


def _data_add_tokens(options: argparse.Namespace) -> int:
    from mosaicjax.data.special_tokens import add_special_tokens

    made = add_special_tokens(options.tokenizer, options.out, options.special)
    named = ", ".join(f"{token} {made.special[token]}" for token in options.special)
    print(f"{options.out}: {made.size:,} ids; {named}")
    return 0


def _data_build(options: argparse.Namespace) -> int:
    from mosaicjax.data import filters
    from mosaicjax.data.build import Engines, build
    from mosaicjax.data.chat import Chat, LossOn
    from mosaicjax.data.conversations import Format
    from mosaicjax.data.fim import FillInMiddle
    from mosaicjax.data.tokenizer import load_tokenizer

    if options.filter:
        # As `python` itself does, and the console script does not; worker processes get the same path.
        sys.path.insert(0, os.getcwd())
    engine = _chosen(Engines, options.engine, "engine")
    loss_on = _chosen(LossOn, options.loss_on, "--loss-on")
    format_ = _chosen(Format, options.format, "--format")
    tokenizer, chat = load_tokenizer(options.tokenizer), None
    if options.template:
        chat = Chat.of(options.template, tokenizer, format_=format_, loss_on=loss_on)
    elif loss_on is not LossOn.RESPONSE or format_ is not Format.AUTO:
        raise InputError("--format and --loss-on are of conversations", fix="--template, such as plain")
    tokens = tuple(options.fim_tokens.split(",")) if options.fim_tokens else ()
    if tokens and not options.fim:
        raise InputError("--fim-tokens without --fim", fix="--fim RATE, such as 0.5")
    manifest = build(
        options.sources,
        options.out,
        tokenizer=tokenizer,
        held_out=options.held_out,
        seed=options.seed,
        workers=options.workers,
        include=options.include,
        exclude=options.exclude,
        field=options.field,
        fim=FillInMiddle(options.fim, options.fim_spm, tokens),
        filters=filters.find(options.filter),
        drop_duplicates=options.drop_duplicates,
        engine=engine,
        chat=chat,
    )
    for name, counts in manifest.splits.items():
        print(f"{name}: {counts.documents:,} documents, {counts.tokens:,} tokens, {counts.bytes:,} bytes")
    if manifest.fim:
        print(
            f"fill-in-the-middle: {manifest.fim['psm']:,} documents as prefix, suffix, middle and"
            f" {manifest.fim['spm']:,} as suffix, prefix, middle"
        )
    if manifest.skipped:
        print("left out: " + ", ".join(f"{count:,} {why}" for why, count in manifest.skipped.items()))
    return 0


def _chosen(kind: type[Choice], value: str, what: str) -> Choice:
    names = [each.value for each in kind]
    if value not in names:
        raise InputError(f"no such {what}", expected=" or ".join(names), got=value)
    return kind(value)


def _data_tokenizer(options: argparse.Namespace) -> int:
    from mosaicjax.data.tokenizer import train_tokenizer

    train_tokenizer(
        options.sources,
        options.out,
        vocab=options.vocab,
        held_out=options.held_out,
        include=options.include,
        exclude=options.exclude,
        field=options.field,
        special=options.special,
    )
    return 0


def _data_verify(options: argparse.Namespace) -> int:
    from mosaicjax.data.store import Store

    store = Store.open(options.store)
    store.verify()
    for name, counts in store.manifest.splits.items():
        print(
            f"{name}: {counts.documents:,} documents, {counts.tokens:,} tokens, {counts.bytes:,} bytes: sound"
        )
    return 0


def _data_copy(options: argparse.Namespace) -> int:
    from mosaicjax.data.store import Store

    store = Store.open(options.store)
    store.copy(options.target)
    size = store.manifest.data_bytes
    print(f"{options.target}: {len(store.manifest.files):,} files, {size / 1e9:,.3f} GB")
    return 0


def _data_inspect(options: argparse.Namespace) -> int:
    from mosaicjax.data.inspect import inspect

    for line in inspect(
        options.stores, split=options.split, documents=options.documents, picture=options.picture
    ):
        print(line, flush=True)
    return 0
