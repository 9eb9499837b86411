import collections
import datetime
import os
import pickle
import zipfile

import numpy as np
import pytest

from mosaicjax.errors import InputError
from mosaicjax.hub.stored import FLOATS
from mosaicjax.hub.torch_file import read_tensors


def archive(path, described, members=(), compression=zipfile.ZIP_STORED):
    """A file in torch's format with such a pickle."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr(
            "archive/data.pkl", described if isinstance(described, bytes) else pickle.dumps(described)
        )
        for name, data in members:
            file.writestr(f"archive/{name}", data)
    return str(path)


class Runs:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("deep", [False, True])
def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path, deep):
    marker = tmp_path / "ran"
    described = {"weight": [Runs(marker)]} if deep else Runs(marker)
    path = archive(tmp_path / "pytorch_model.bin", described)
    with pytest.raises(InputError, match="wants to run code: its pickle imports posix.mkdir") as refused:
        read_tensors(path)
    assert path in str(refused.value)
    assert not marker.exists()


@pytest.mark.parametrize("kind", [getattr, collections.Counter, datetime.date, np.ndarray, __import__])
def test_nothing_else_is_imported(tmp_path, kind):
    path = archive(tmp_path / "x.bin", kind)
    with pytest.raises(InputError, match=f"imports {kind.__module__}.{kind.__name__};"):
        read_tensors(path)


def global_name(module, name):
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def test_a_dotted_name_does_not_lead_out_of_what_is_known(tmp_path):
    path = archive(tmp_path / "x.bin", b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93.")
    with pytest.raises(InputError, match="imports collections.OrderedDict.fromkeys"):
        read_tensors(path)


def tensor(key="0", count=4, shape=(2, 2), strides=(2, 1), offset=0):
    """The pickle of one tensor named w, as torch writes it."""

    def tuple_of(numbers):
        return b"(" + b"".join(b"I%d\n" % number for number in numbers) + b"t"

    storage = b"(U\x07storage" + global_name("torch", "FloatStorage")
    storage += b"U" + bytes([len(key)]) + key.encode() + b"U\x03cpuI%d\ntQ" % count
    made = global_name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + b"I%d\n" % offset
    made += (
        tuple_of(shape) + tuple_of(strides) + b"I00\n" + global_name("collections", "OrderedDict") + b")RtR"
    )
    return b"\x80\x02}U\x01w" + made + b"s."


def test_a_tensor_by_hand(tmp_path):
    numbers = np.arange(4, dtype=np.float32)
    path = archive(tmp_path / "x.bin", tensor(strides=(1, 2)), [("data/0", numbers.tobytes())])
    (stored,) = read_tensors(path).values()
    with stored.open() as array:
        np.testing.assert_array_equal(array, numbers.reshape(2, 2).T)


@pytest.mark.parametrize(
    ("described", "said"),
    [
        (tensor(offset=1), r"tensor w lies outside its storage; expected 20 bytes in data/0; got 16"),
        (tensor(key="7"), r"tensor w lies outside its storage; .* got 0"),
        (tensor(shape=(2, 2), strides=(2,)), "its pickle cannot be read: a tensor with wrong sizes"),
        (tensor(shape=(-2, 2)), "its pickle cannot be read: a tensor with wrong sizes"),
        (tensor()[:-20], "its pickle cannot be read"),
        ([1, 2], "holds no weights by name; got list"),
        ({"w": 3}, "w is no tensor; expected weights by name; got int"),
    ],
)
def test_a_damaged_pickle_is_refused(tmp_path, described, said):
    path = archive(tmp_path / "x.bin", described, [("data/0", bytes(16))])
    with pytest.raises(InputError, match=said):
        read_tensors(path)


def test_other_formats_are_refused(tmp_path):
    path = archive(tmp_path / "x.bin", tensor(), [("data/0", bytes(1600))], zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="is compressed"):
        read_tensors(path)
    path = archive(tmp_path / "big.bin", tensor(), [("data/0", bytes(16)), ("byteorder", b"big")])
    with pytest.raises(InputError, match="big-endian"):
        read_tensors(path)
    (tmp_path / "old.bin").write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2))
    with pytest.raises(InputError, match="before 1.6"):
        read_tensors(str(tmp_path / "old.bin"))
    whole = (tmp_path / "big.bin").read_bytes()
    (tmp_path / "cut.bin").write_bytes(whole[:-30])
    with pytest.raises(InputError, match="cut.bin is truncated or damaged"):
        read_tensors(str(tmp_path / "cut.bin"))
    archive(tmp_path / "none.bin", {})
    with zipfile.ZipFile(tmp_path / "other.bin", "w") as file:
        file.writestr("readme", "hello")
    with pytest.raises(InputError, match="lacks data.pkl"):
        read_tensors(str(tmp_path / "other.bin"))


@pytest.mark.peer
def test_what_torch_saves_is_read(tmp_path):
    torch = pytest.importorskip("torch", reason="needs the peer library torch")
    torch.manual_seed(0)
    base = torch.randn(6, 5, 4)
    saved = {
        "whole": base,
        "view": base[1:5, ::2, 1],
        "turned": base.permute(2, 0, 1),
        "spread": torch.randn(3, 1).expand(3, 4),
        "half": torch.randn(7).half(),
        "brain": torch.randn(3, 3).bfloat16(),
        "parameter": torch.nn.Parameter(torch.randn(2, 3)),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
    }
    for name, state in {"dict": dict(saved), "ordered": collections.OrderedDict(saved)}.items():
        path = tmp_path / f"{name}.bin"
        torch.save(state, path)
        found = read_tensors(str(path))
        assert list(found) == list(saved)
        for key, stored in found.items():
            with stored.open() as array:
                ours = torch.from_numpy(np.array(array, np.float32))
            assert torch.equal(ours, saved[key].detach().float())
            assert FLOATS[stored.dtype] == str(saved[key].dtype).removeprefix("torch.")
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(module.state_dict(), tmp_path / "module.bin")
    found = read_tensors(str(tmp_path / "module.bin"))
    assert found["1.num_batches_tracked"].dtype == "I64"
    with found["0.weight"].open() as array:
        assert torch.equal(torch.from_numpy(np.array(array)), module[0].weight)
    torch.save(saved, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match="before 1.6"):
        read_tensors(str(tmp_path / "old.bin"))
    torch.save(module, tmp_path / "module_itself.bin")
    with pytest.raises(InputError, match=r"imports torch.nn.modules.container.Sequential"):
        read_tensors(str(tmp_path / "module_itself.bin"))
