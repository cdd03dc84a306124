"""Which cases are test cases, and in which order cases become labelled: random in the seed, rare classes first."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain

Classes = Mapping[str, frozenset[str]]


def shuffled(cases: Iterable[str], seed: int) -> list[str]:
    """Cases in an order that depends on their names and the seed alone; a further case leaves the others' order."""
    return sorted(cases, key=lambda case: hashlib.blake2b(f"{seed} {case}".encode()).digest())


def labelling_order(classes: Classes, seed: int) -> list[str]:
    """All cases, so that the first n are the labelled ones whatever n is: hence nested, and independent of each other.

    Each next case has the most classes that none before it has, until every class has occurred; the others, and cases
    that are equal in this, follow in random order.

    Args:
        classes: case name to the classes in its label file.
        seed: of the random order.
    """
    rest = shuffled(classes, seed)
    uncovered = set(chain.from_iterable(classes.values()))
    order: list[str] = []
    while uncovered:
        best = max(rest, key=lambda case: len(classes[case] & uncovered))  # the first of equal ones
        rest.remove(best)
        order.append(best)
        uncovered -= classes[best]
    return order + rest


def choose_test_cases(classes: Classes, count: int, seed: int) -> list[str]:
    """Test cases with every class that other cases have too; a class keeps a training case as long as that is possible.

    Args:
        classes: case name to the classes in its label file.
        count: number of test cases, less than there are cases.
        seed: of the random order among cases that are equal in this.
    """
    rest = shuffled(classes, seed)
    uncovered = set(chain.from_iterable(classes.values()))
    left = Counter(chain.from_iterable(classes.values()))

    def preference(case: str) -> tuple[int, int]:
        lost_to_training = sum(left[name] == 1 for name in classes[case])
        return -lost_to_training, len(classes[case] & uncovered)

    chosen: list[str] = []
    for _ in range(count):
        best = max(rest, key=preference)
        rest.remove(best)
        chosen.append(best)
        uncovered -= classes[best]
        left.subtract(classes[best])
    return sorted(chosen)
