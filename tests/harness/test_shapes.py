from hypothesis import given
from hypothesis import strategies as st

from mosaicjax.harness.shapes import UNIT, lengths_up_to, padded


@given(st.integers(1, 40_000), st.data())
def test_few_sizes_hold_every_length_with_little_waste(longest, data):
    sizes = lengths_up_to(longest)
    assert sizes == sorted(set(sizes)) and sizes[-1] == longest
    assert len(sizes) <= 22
    assert all(size % UNIT == 0 for size in sizes[:-1])
    length = data.draw(st.integers(1, longest))
    size = padded(length, sizes)
    smaller = [other for other in sizes if other < size]
    assert length <= size and all(other < length for other in smaller)
    # At most half as long again, but for the shortest.
    assert size <= max(UNIT, 2 * length)


def test_the_sizes_are_these():
    assert lengths_up_to(512) == [64, 128, 192, 256, 384, 512]
    assert lengths_up_to(1000) == [64, 128, 192, 256, 384, 512, 768, 1000]
    assert lengths_up_to(10) == [10]
