"""Sizes that may be unknown: polynomials with integer coefficients over named symbols.

A design can be judged before its widths are chosen, so every shape in a graph is made of `Size`:
a number (`640`), a symbol (`d_ff`) or sums of products of them (`heads*head_dim + 2*rank`).
Symbols stand for integers of at least one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

from ..errors import BadInput

_TERM = re.compile(r"([+-]?)\s*([^+-]+)")
_SYMBOL = re.compile(r"[A-Za-z_]\w*\Z")
LONGEST = 500  # characters of an expression
MOST_DIGITS = 18
_ASSUMED = 64  # what a symbol is taken to be where unknown sizes have to be put in an order


@dataclass(frozen=True, eq=False)
class Size:
    """A polynomial, kept as sorted `(monomial, coefficient)` pairs; a monomial is a sorted tuple of symbols."""

    terms: tuple[tuple[tuple[str, ...], int], ...]

    @staticmethod
    def of(value: Size | int | str) -> Size:
        """Reads a number, a symbol or an expression such as `"3*d_model + heads*head_dim"`.

        Raises:
            BadInput: the text is not such an expression, or the number is negative.
        """
        if isinstance(value, Size):
            return value
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise BadInput(f"not a size: {value!r:.80}; write a number, a symbol or a sum of products, as 2*d_ff")
        found = _number(value) if isinstance(value, int) else Size._collect(_parse_terms(value))
        if found.known is not None and found.known < 0:
            raise BadInput(f"a size cannot be negative: {value}")
        return found

    @staticmethod
    def _collect(pairs: Iterable[tuple[tuple[str, ...], int]]) -> Size:
        total: dict[tuple[str, ...], int] = {}
        for monomial, coefficient in pairs:
            total[monomial] = total.get(monomial, 0) + coefficient
        return Size(tuple(sorted((m, c) for m, c in total.items() if c)))

    def __eq__(self, other: object) -> bool:
        """Sizes equal sizes, and the number or text that `json` gives."""
        return self.terms == other.terms if isinstance(other, Size) else self.json() == other

    def __hash__(self) -> int:
        return hash(self.json())

    def __add__(self, other: Size) -> Size:
        if (a := self.known) is not None and (b := other.known) is not None:
            return _number(a + b)
        return Size._collect([*self.terms, *other.terms])

    def __sub__(self, other: Size) -> Size:
        if (a := self.known) is not None and (b := other.known) is not None:
            return _number(a - b)
        return Size._collect([*self.terms, *((m, -c) for m, c in other.terms)])

    def __mul__(self, other: Size) -> Size:
        return Size._collect((tuple(sorted((*m, *n))), c * d) for m, c in self.terms for n, d in other.terms)

    @cached_property
    def known(self) -> int | None:
        """The number, or None while a symbol is left."""
        if not self.terms:
            return 0
        if len(self.terms) == 1 and self.terms[0][0] == ():
            return self.terms[0][1]
        return None

    def bind(self, constants: Mapping[str, object]) -> Size:
        """Puts numbers in for the symbols that `constants` knows."""
        total = Size(())
        for monomial, coefficient in self.terms:
            product = Size((((), coefficient),))
            for symbol in monomial:
                value = constants.get(symbol)
                if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                    raise BadInput(f"a size must be a whole number: {symbol} = {value!r:.80}")
                if value is not None and value < 0:
                    raise BadInput(f"a size cannot be negative: {symbol} = {value}")
                product = product * (Size((((symbol,), 1),)) if value is None else _number(value))
            total = total + product
        return total

    @property
    def symbols(self) -> frozenset[str]:
        return frozenset(s for monomial, _ in self.terms for s in monomial)

    def at_most(self, other: Size) -> bool | None:
        """Whether self <= other for all values of the symbols; None if that depends on them."""
        if (a := self.known) is not None and (b := other.known) is not None:
            return a <= b
        difference = (other - self).terms
        least = sum(c for _, c in difference)  # every symbol at its least value, one
        if all(c >= 0 for m, c in difference if m) and least >= 0:
            return True
        if all(c <= 0 for m, c in difference if m) and least < 0:
            return False
        return True if self._divides(other) else None

    def _divides(self, other: Size) -> bool:
        """Whether other is a product of self and more symbols: then self <= other."""
        if len(self.terms) != 1 or len(other.terms) != 1:
            return False
        (mine, c), (theirs, d) = self.terms[0], other.terms[0]
        left = list(theirs)
        for symbol in mine:
            if symbol not in left:
                return False
            left.remove(symbol)
        return 0 < c <= d

    def estimate(self) -> int:
        """A number for putting sizes in an order: unknown symbols count 64."""
        return sum(c * _ASSUMED ** len(m) for m, c in self.terms)

    def json(self) -> int | str:
        return self.known if self.known is not None else str(self)

    def __str__(self) -> str:
        if not self.terms:
            return "0"
        text = ""
        for monomial, coefficient in sorted(self.terms, key=lambda t: (-len(t[0]), t[0])):
            factors = [] if abs(coefficient) == 1 and monomial else [str(abs(coefficient))]
            sign = "-" if coefficient < 0 else "+" if text else ""
            text += (f" {sign} " if text else sign) + "*".join([*factors, *monomial])
        return text


@lru_cache(maxsize=1024)
def _number(value: int) -> Size:
    return Size((((), value),) if value else ())


def _parse_terms(text: str) -> list[tuple[tuple[str, ...], int]]:
    stripped = text.strip()
    matches = _TERM.findall(stripped) if len(stripped) <= LONGEST else []
    if not stripped or "".join(s + t for s, t in matches).replace(" ", "") != stripped.replace(" ", ""):
        raise BadInput(f"not a size: {text!r:.80}; write a number, a symbol or a sum of products, as 2*d_ff")
    pairs = []
    for sign, product in matches:
        coefficient, symbols = (-1 if sign == "-" else 1), []
        for factor in (part.strip() for part in product.split("*")):
            if factor.isdecimal() and len(factor) <= MOST_DIGITS:
                coefficient *= int(factor)
            elif _SYMBOL.match(factor):
                symbols.append(factor)
            else:
                raise BadInput(f"not a size: {text!r:.80} (at {factor!r:.80}); allowed are numbers, names, * + -")
        pairs.append((tuple(sorted(symbols)), coefficient))
    return pairs


@dataclass(frozen=True, eq=False)
class Capacity:
    """How many tokens one static value can serve: the least of some sizes; of none, any number."""

    sizes: tuple[Size, ...] = ()

    def __eq__(self, other: object) -> bool:
        """Capacities equal capacities, and the number or text that `json` gives."""
        return self.sizes == other.sizes if isinstance(other, Capacity) else self.json() == other

    def __hash__(self) -> int:
        return hash(self.json())

    @staticmethod
    def of(*values: Size | int) -> Capacity:
        return Capacity._least([Size.of(v) for v in values])

    @staticmethod
    def _least(sizes: list[Size]) -> Capacity:
        kept: list[Size] = []
        for size in sizes:
            if any(k.at_most(size) for k in kept):
                continue
            kept = [k for k in kept if not size.at_most(k)] + [size]
        return Capacity(tuple(kept))

    def __and__(self, other: Capacity) -> Capacity:
        """The capacity of two things that must both serve."""
        return Capacity._least([*self.sizes, *other.sizes])

    def serves(self, tokens: int) -> bool | None:
        """Whether `tokens` tokens fit; None where that hangs on an unknown size."""
        answers = [Size.of(tokens).at_most(s) for s in self.sizes]
        return False if False in answers else None if None in answers else True

    def estimate(self) -> float:
        return min((s.estimate() for s in self.sizes), default=math.inf)

    def json(self) -> int | str | None:
        if not self.sizes:
            return None
        return self.sizes[0].json() if len(self.sizes) == 1 else str(self)

    def __str__(self) -> str:
        if not self.sizes:
            return "any"
        names = [str(s) for s in self.sizes]
        return names[0] if len(names) == 1 else f"min({', '.join(names)})"
