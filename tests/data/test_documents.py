import gzip
import json
import lzma

import pytest

from mosaicjax.data.documents import Document, open_sources
from mosaicjax.errors import InputError


def write_tree(root, files):
    for name, contents in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())


def test_folder_is_sorted_filtered_and_counted(tmp_path):
    write_tree(
        tmp_path,
        {
            "b.py": "b = 1\r\n",
            "a/z.md": "zé",
            "a/Y.TXT": "upper",
            "a/tests/t.py": "left out",
            "lib/idle_test/x.py": "left out",
            "other/idle_test/x.py": "kept",
            "a/__pycache__/b.py": "left out",
            ".git/config.txt": "left out",
            "photo.png": b"\x89PNG",
            "latin.txt": b"caf\xe9",
            "nul.txt": "a\0b",
            "empty.py": "",
        },
    )
    documents = open_sources([tmp_path], exclude=["tests", "lib/idle_test"])
    names = ["b.py", "a/Y.TXT", "a/z.md", "other/idle_test/x.py"]
    texts = ["b = 1\r\n", "upper", "zé", "kept"]
    expected = [Document(text, str(tmp_path / name)) for text, name in zip(texts, names, strict=True)]
    for _ in range(2):
        assert list(documents) == expected
        assert documents.skipped == {"excluded": 4, "extension": 1, "binary": 2, "empty": 1}


def test_include_replaces_the_extensions(tmp_path):
    write_tree(tmp_path, {"a.py": "no", "rows/b.jsonl": '{"text": "yes"}\n', "c.odd": "odd"})
    documents = open_sources([tmp_path], include=["rows/*.jsonl", "*.odd"])
    assert [document.text for document in documents] == ["odd", "yes"]


def test_folder_links_are_not_followed(tmp_path):
    write_tree(tmp_path, {"a/x.txt": "once"})
    (tmp_path / "a" / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert [document.text for document in open_sources([tmp_path])] == ["once"]


@pytest.mark.parametrize(
    "name, pack", [("r.jsonl", bytes), ("r.jsonl.gz", gzip.compress), ("r.jsonl.xz", lzma.compress)]
)
def test_json_lines(tmp_path, name, pack):
    path = tmp_path / name
    path.write_bytes(pack(b'{"body": "one\\n\\u00e9"}\n\n{"body": "", "id": 1}\n{"body": "last"}'))
    documents = open_sources([path], field="body")
    assert list(documents) == [Document("one\né", f"{path}:1"), Document("last", f"{path}:4")]
    assert documents.skipped == {"empty": 1}


@pytest.mark.parametrize(
    "line, problem",
    [
        (b'{"other": "x"}', r"with the field 'text'; got \['other'\]"),
        (b'["text"]', "with the field 'text'; got list"),
        (b'{"text": 3}', "expected a string; got int"),
        (b'{"text": "x"', "expected one JSON object"),
        (b'{"text": "\xff"}', "expected UTF-8; got invalid start byte at byte 10"),
        (b'{"text": "a\\ud800"}', "half a surrogate pair at character 1"),
    ],
)
def test_bad_row_is_named(tmp_path, line, problem):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(InputError, match=rf"rows\.jsonl, line 2.*{problem}"):
        list(open_sources([path]))


@pytest.mark.parametrize("suffix, pack", [(".gz", gzip.compress), (".xz", lzma.compress)])
@pytest.mark.parametrize("damage", ["cut", "flipped", "no archive"])
def test_broken_archive_is_named(tmp_path, suffix, pack, damage):
    path = tmp_path / f"rows.jsonl{suffix}"
    rows = "".join(json.dumps({"text": f"{number**9}"}) + "\n" for number in range(20_000))
    packed = bytearray(pack(rows.encode()))
    if damage == "cut":
        del packed[len(packed) // 2 :]
    elif damage == "flipped":
        packed[len(packed) // 2] ^= 0x10
    else:
        packed = bytearray(rows.encode())
    path.write_bytes(packed)
    with pytest.raises(InputError, match=r"rows\.jsonl\.(gz|xz), line \d+"):
        list(open_sources([path]))


def test_text_file_is_one_document_and_must_be_utf8(tmp_path):
    write_tree(tmp_path, {"a.txt": "one\n\ntwo\n", "b.txt": b"\xff"})
    assert list(open_sources([tmp_path / "a.txt"])) == [Document("one\n\ntwo\n", str(tmp_path / "a.txt"))]
    with pytest.raises(InputError, match=r"b\.txt cannot be read as text; expected UTF-8"):
        list(open_sources([tmp_path / "b.txt"]))


def test_sources_that_cannot_be(tmp_path):
    write_tree(tmp_path, {"picture.png": b"x"})
    with pytest.raises(InputError, match="missing.txt does not exist"):
        open_sources([tmp_path / "missing.txt"])
    with pytest.raises(InputError, match=r"unknown kind.*got \.png"):
        open_sources([tmp_path / "picture.png"])
    with pytest.raises(InputError, match="no source was given"):
        open_sources([])
    with pytest.raises(InputError, match="empty corpus.*'extension': 1"):
        list(open_sources([tmp_path]))


def test_a_source_is_read_as_it_goes(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "first"}\nnot JSON\n')
    documents = iter(open_sources([path]))
    assert next(documents).text == "first"
    with pytest.raises(InputError, match="line 2"):
        next(documents)
