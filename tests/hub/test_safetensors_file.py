import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mosaicjax.errors import InputError
from mosaicjax.hub.safetensors_file import header_bytes, read_tensors, write_tensor
from mosaicjax.hub.stored import FLOATS, cast, copy_into, numpy_dtype
from tests.hub.models import DTYPES

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=8)
TENSORS = st.dictionaries(NAMES.filter(lambda name: name != "__metadata__"), SHAPES, max_size=5)


def drawn(shapes, dtype, seed=0):
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.normal(size=shape)).astype(DTYPES[dtype]) for name, shape in shapes.items()}


def same_bits(ours, theirs):
    return (ours.shape, ours.dtype, ours.tobytes()) == (theirs.shape, theirs.dtype, theirs.tobytes())


@given(shapes=TENSORS, dtype=st.sampled_from(sorted(DTYPES)))
def test_what_the_library_writes_is_read(shapes, dtype, tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    arrays = drawn(shapes, dtype)
    save_file(arrays, path)
    found = read_tensors(str(path))
    assert set(found) == set(arrays)
    for name, stored in found.items():
        assert (FLOATS[stored.dtype], stored.nbytes) == (dtype, arrays[name].nbytes)
        with stored.open() as array:
            assert same_bits(np.array(array), arrays[name])


@given(shapes=TENSORS, dtype=st.sampled_from(sorted(DTYPES)))
def test_what_is_written_the_library_reads(shapes, dtype, tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    arrays = drawn(shapes, dtype)
    with open(path, "wb") as file:
        file.write(header_bytes([(name, dtype, array.shape) for name, array in arrays.items()]))
        for array in arrays.values():
            write_tensor(file, np.ascontiguousarray(array))
    theirs = load_file(path)
    assert set(theirs) == set(arrays)
    assert all(same_bits(theirs[name], arrays[name]) for name in arrays)
    with safe_open(path, "np") as opened:
        assert opened.metadata() == {"format": "pt"}


def raw(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return str(path)


def entry(begin, end, shape=None, dtype="F32"):
    return {
        "dtype": dtype,
        "shape": [(end - begin) // 4] if shape is None else shape,
        "data_offsets": [begin, end],
    }


@pytest.mark.parametrize(
    ("header", "size", "said"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "tensor b overlaps tensor a"),
        ({"a": entry(0, 8), "b": entry(12, 16)}, 16, "4 bytes before tensor b belong to none"),
        ({"a": entry(0, 8), "b": entry(8, 16)}, 12, "is truncated: tensor b is cut off; expected at least "),
        ({"a": entry(0, 8)}, 9, "is longer than its header says"),
        (
            {"a": entry(0, 8, [3])},
            8,
            r"tensor a has data_offsets that contradict its shape \[3\]; expected 12 by",
        ),
        ({"a": entry(0, 8, [-2])}, 8, "tensor a has a wrong shape"),
        ({"a": entry(0, 8, [True, 2])}, 8, "tensor a has a wrong shape"),
        ({"a": entry(8, 0, [2])}, 8, "tensor a has wrong data_offsets"),
        ({"a": entry(0, 8, dtype="F12")}, 8, "tensor a is of an unknown dtype; expected .*; got F12"),
        ({"a": entry(0, 8, dtype=["F32"])}, 8, "tensor a is of an unknown dtype"),
        ({"a": {"dtype": "F32"}}, 8, "tensor a is not described"),
        ([1], 0, "is no safetensors file; expected a JSON object"),
        (b"{oh", 0, "is no safetensors file: its header is no JSON"),
        (b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{}}', 0, "lists tensor a twice"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path, header, size, said):
    path = raw(tmp_path / "model.safetensors", header, bytes(size))
    with pytest.raises(InputError, match=said) as refused:
        read_tensors(path)
    assert path in str(refused.value)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = tmp_path / "whole.safetensors"
    save_file(drawn({"a": (3, 2), "b": (4,)}, "float32"), whole)
    data = whole.read_bytes()
    path = tmp_path / "cut.safetensors"
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(InputError, match="is truncated|is no safetensors file"):
            read_tensors(str(path))


def test_weights_of_other_dtypes_are_refused(tmp_path):
    save_file({"a": np.arange(3)}, tmp_path / "x.safetensors")
    (stored,) = read_tensors(str(tmp_path / "x.safetensors")).values()
    with pytest.raises(
        InputError, match=r"x.safetensors: tensor a is of a dtype .* expected F32, .*; got I64"
    ):
        with stored.open():
            pass


@given(
    shape=st.lists(st.integers(1, 300), min_size=1, max_size=3).filter(lambda s: math.prod(s) < 200_000),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(sorted(DTYPES)),
)
def test_copies_between_layouts_are_copies(shape, seed, dtype):
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(shape)) for _ in range(2)]
    source, target = (
        np.zeros([shape[i] for i in order], numpy_dtype(dtype)).transpose(np.argsort(order))
        for order in orders
    )
    source[...] = rng.normal(size=shape).astype(numpy_dtype(dtype))
    copy_into(target, source)
    assert same_bits(np.ascontiguousarray(target), np.ascontiguousarray(source))


def test_casts_round_to_nearest_and_refuse_what_overflows():
    numbers = np.array([1.0 + 2**-8, 1.0 + 2**-8 + 2**-20, np.inf, np.nan], np.float32)
    half = cast(numbers, numpy_dtype("bfloat16"), "here")
    # A tie goes to the even neighbour, what lies above it up.
    np.testing.assert_array_equal(half.astype(np.float32), [1.0, 1.0 + 2**-7, np.inf, np.nan])
    np.testing.assert_array_equal(
        cast(numbers[2:], np.dtype(np.float16), "here"), numbers[2:].astype(np.float16)
    )
    with pytest.raises(InputError, match="tensor x has numbers that float16 cannot hold; .*65504; got 70000"):
        cast(np.array([1.0, -70_000.0], np.float32), np.dtype(np.float16), "tensor x")
