import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaicjax.data.split import check_fraction, is_held_out
from mosaicjax.errors import InputError


def test_fraction_is_met():
    texts = [f"document {number}" for number in range(20_000)]
    held_out = sum(is_held_out(text, 0.1) for text in texts)
    # five standard deviations of a binomial
    assert abs(held_out - 2_000) < 5 * math.sqrt(20_000 * 0.1 * 0.9)


@given(st.text(), st.floats(0, 0.99), st.floats(0, 0.99))
def test_a_larger_fraction_holds_out_the_same_documents_and_more(text, one, other):
    small, large = sorted((one, other))
    assert is_held_out(text, small) <= is_held_out(text, large)
    assert not is_held_out(text, 0.0)


def test_decision_is_the_same_for_ever():
    # stores built earlier rely on it
    assert [is_held_out(text, 0.5) for text in ("", "a", "b", "é", "long " * 9)] == [
        True,
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("fraction", [-0.01, 1.0, float("nan")])
def test_fraction_out_of_range(fraction):
    with pytest.raises(InputError, match="0 <= fraction < 1"):
        check_fraction(fraction)
