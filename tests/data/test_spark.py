"""Spark builds the store that this machine's cores build."""

import json

import pytest

from mosaicjax import cli
from mosaicjax.data import parts
from mosaicjax.data.build import Engines, build
from mosaicjax.data.filters import find
from mosaicjax.data.manifest import Layout, read_manifest
from mosaicjax.errors import InputError

pytest.importorskip("pyspark", reason="pip install 'mosaicjax[spark]'")

pytestmark = [pytest.mark.slow, pytest.mark.peer]


@pytest.fixture(scope="module")
def sources(tmp_path_factory, code_folder, write_rows):
    """A folder of code, rows, rows that are packed, and a table, with copies and empty texts among them."""
    import gzip

    from pyarrow import parquet, table

    folder = tmp_path_factory.mktemp("sources")
    texts = [f"row {n % 170} " * (n % 40) for n in range(400)]
    write_rows(folder / "rows.jsonl", texts)
    rows = write_rows(folder / "more.jsonl", [f"packed {n} é" for n in range(90)])
    (folder / "more.jsonl.gz").write_bytes(gzip.compress(rows.read_bytes()))
    parquet.write_table(table({"text": [f"cell {n}\n" * 7 for n in range(300)]}), folder / "cells.parquet")
    return [code_folder, folder / "rows.jsonl", folder / "more.jsonl.gz", folder / "cells.parquet"]


def lines(text):
    """A filter: texts of more than a line, or short."""
    return "\n" in text or len(text) < 200


LAYOUT = Layout(shard_tokens=2**16, part_characters=20_000)


@pytest.mark.parametrize(
    "options",
    [
        {"held_out": 0.1, "seed": 3},
        {"held_out": 0.0, "drop_duplicates": True, "filters": "lines"},
    ],
)
def test_the_same_store(sources, tokenizer, tmp_path, data_digests, monkeypatch, options):
    # Groups smaller than a corpus this small would have, so that there are several.
    monkeypatch.setattr(parts, "GROUP_BYTES", 100_000)
    if "filters" in options:
        options = options | {"filters": find([f"{__name__}:lines"])}
    made = {}
    for engine in Engines:
        out = tmp_path / engine.value
        build(
            sources,
            out,
            tokenizer=tokenizer,
            workers=2,
            engine=engine,
            layout=LAYOUT,
            progress=False,
            **options,
        )
        made[engine] = data_digests(out), read_manifest(out).splits, read_manifest(out).skipped
    assert made[Engines.CORES] == made[Engines.SPARK]
    assert len([name for name in made[Engines.SPARK][0] if "train/tokens/c/" in name]) > 2


def test_what_is_left_of_a_stopped_build_is_gone_on_with(
    sources, tokenizer, tmp_path, data_digests, monkeypatch
):
    monkeypatch.setattr(parts, "GROUP_BYTES", 100_000)
    options = {"tokenizer": tokenizer, "workers": 2, "layout": LAYOUT, "progress": False}
    build(sources, tmp_path / "whole", engine=Engines.CORES, **options)
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"text": "fine"}) + "\nnot json\n")
    with pytest.raises(InputError, match=r"bad.jsonl.*2"):
        build([*sources, bad], tmp_path / "refused", engine=Engines.SPARK, **options)
    out = tmp_path / "stopped"

    def stop(*_, **__):
        raise InputError("stopped")

    with monkeypatch.context() as stopped:
        stopped.setattr("mosaicjax.data.build.shuffle", stop)
        with pytest.raises(InputError, match="stopped"):
            build(sources, out, engine=Engines.SPARK, **options)
    folder = out / ".unfinished" / "parts-of-sources"
    left = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(left) > 10
    sorted(folder.glob("*.npy"))[0].unlink()
    build(sources, out, engine=Engines.SPARK, **options)
    assert data_digests(out) == data_digests(tmp_path / "whole")


def test_the_command(sources, tokenizer, tmp_path, capsys):
    command = ["data", "build", *map(str, sources), "--tokenizer", str(tokenizer.files[0])]
    assert cli.main([*command, "--out", str(tmp_path / "x"), "--engine", "dask"]) == 2
    assert "no such engine; expected cores or spark; got dask" in capsys.readouterr().err
    assert cli.main([*command, "--out", str(tmp_path / "store"), "--engine", "spark"]) == 0
    assert "documents" in capsys.readouterr().out
