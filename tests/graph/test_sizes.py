"""Sizes are polynomials of symbols; how many tokens a parameter serves is the least of several."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockkit.errors import BadInput
from blockkit.graph.sizes import Capacity, Size


def test_sizes_are_polynomials() -> None:
    d, h = Size.of("d"), Size.of("h")
    assert str(Size.of("2*d + 3 - h*d")) == "-d*h + 2*d + 3"
    assert Size.of("d + 0*h") == d
    assert (d + h) * (d - h) == Size.of("d*d - h*h")
    assert (d - d).known == 0
    assert str(d - d) == "0"
    assert Size.of("3*4 - 2").known == 10
    assert Size.of("d*h").bind({"d": 3, "h": 4}).known == 12
    assert Size.of("d*h + 1").bind({"d": 3}) == Size.of("3*h + 1")
    assert Size.of("d*h").symbols == {"d", "h"}
    assert d.known is None
    assert Size.of(5).json() == 5
    assert (d * h).json() == "d*h"
    assert Size.of(d) is d
    assert Size.of(4) == 4
    assert hash(Size.of(4)) == hash(4), "what is equal has one hash"


POLYNOMIALS = st.dictionaries(
    st.lists(st.sampled_from("abc"), max_size=2).map(lambda m: tuple(sorted(m))), st.integers(-3, 3), max_size=4
).map(lambda terms: Size._collect(terms.items()))
NUMBERS = st.fixed_dictionaries({name: st.integers(1, 9) for name in "abc"})


@given(POLYNOMIALS, POLYNOMIALS, NUMBERS)
def test_size_arithmetic_agrees_with_numbers(a: Size, b: Size, numbers: dict[str, int]) -> None:
    def value(size: Size) -> int:
        found = size.bind(numbers).known
        assert found is not None
        return found

    assert value(a + b) == value(a) + value(b)
    assert value(a - b) == value(a) - value(b)
    assert value(a * b) == value(a) * value(b)
    assert a.known is not None or Size.of(str(a)) == a
    answer = a.at_most(b)
    assert answer is None or answer == (value(a) <= value(b))


@given(POLYNOMIALS, POLYNOMIALS)
def test_numbers_are_always_ordered(a: Size, b: Size) -> None:
    ones = dict.fromkeys("abc", 1)
    assert a.bind(ones).at_most(b.bind(ones)) is not None


def test_at_most_knows_what_follows_from_sizes_of_at_least_one() -> None:
    d, h = Size.of("d"), Size.of("h")
    assert d.at_most(d * h) is True
    assert d.at_most(d + h) is True
    assert (d + h).at_most(d) is False
    assert d.at_most(h) is None
    assert Size.of(1).at_most(d * h) is True
    assert Size.of(1).at_most(d + h) is True
    assert Size.of(2).at_most(d + h) is True
    assert Size.of(3).at_most(d + h) is None
    assert (d + h).at_most(Size.of(1)) is False


@pytest.mark.parametrize("text", ["", "  ", "a b", "2d", "a**b", "a+", "*a", "a/2", "(a)", "1.5", "a-", "²", "--a"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="not a size"):
        Size.of(text)


@pytest.mark.parametrize("value", [-1, "-3", "2 - 5"])
def test_a_negative_size_is_refused(value: int | str) -> None:
    with pytest.raises(BadInput, match="negative"):
        Size.of(value)


@pytest.mark.parametrize("value", [4.5, None, True, [4]])
def test_what_is_neither_number_nor_text_is_no_size(value: object) -> None:
    with pytest.raises(BadInput):
        Size.of(value)  # type: ignore[arg-type]


def test_capacities() -> None:
    d, h = Size.of("d"), Size.of("h")
    assert str(Capacity()) == "any"
    assert Capacity().json() is None
    assert Capacity().serves(10**9) is True
    assert (Capacity.of(3) & Capacity.of(5)) == Capacity.of(3)
    assert str(Capacity.of(d) & Capacity.of(h)) == "min(d, h)"
    assert (Capacity.of(d * h) & Capacity.of(d)) == Capacity.of(d)
    assert (Capacity.of(d) & Capacity.of(1)) == Capacity.of(1)
    assert Capacity.of(d).serves(1) is True
    assert Capacity.of(d).serves(2) is None
    assert Capacity.of(d, 3).serves(4) is False
    assert Capacity.of(4).serves(4) is True
    assert Capacity.of(4).json() == 4
    assert Capacity.of(d + h).serves(1) is True
    assert Capacity.of(4).estimate() < Capacity.of(d).estimate() < Capacity().estimate()
