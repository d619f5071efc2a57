"""Chooses one option per item so that the costs are least and the sizes fit: a multiple-choice knapsack.

The lower convex hull of each item's options holds all that a Lagrange multiplier can pick. Its steps are taken over all
items together, the ones that save the most cost per byte first, as long as they fit; what is left of the budget goes to
whatever single change helps most. The result is at most one step of one item from the best there is.

Source:  Sinha and Zoltners, The multiple-choice knapsack problem (1979)
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from onnxpress.compiler.errors import OptionError


class Option(NamedTuple):
    """What an item may become."""

    cost: float
    nbytes: int


def allocate(items: Sequence[Sequence[Option]], budget: float) -> list[int] | None:
    """The index of an option for every item.

    Args:
        items: options of each, in any order, at least one.
        budget: bytes that all chosen options may take together.

    Returns:
        None when even the smallest options take more.
    """
    hulls = [_hull(options) for options in items]
    chosen = [hull[0] for hull in hulls]
    spent = sum(options[index].nbytes for options, index in zip(items, chosen, strict=True))
    if spent > budget:
        return None
    steps = sorted(
        (_slope(items[number][old], items[number][new]), number, old, new)
        for number, hull in enumerate(hulls)
        for old, new in itertools.pairwise(hull)
    )
    for _, number, old, new in steps:
        more = items[number][new].nbytes - items[number][old].nbytes
        # Steps of an item come in order, since a hull is convex; after one that did not fit the item stays.
        if chosen[number] == old and spent + more <= budget:
            chosen[number], spent = new, spent + more
    while True:
        gain, number, new = max(
            (
                (options[chosen[number]].cost - option.cost, number, index)
                for number, options in enumerate(items)
                for index, option in enumerate(options)
                if spent + option.nbytes - options[chosen[number]].nbytes <= budget
            ),
            default=(0.0, 0, 0),
        )
        if not gain > 0:
            return chosen
        spent += items[number][new].nbytes - items[number][chosen[number]].nbytes
        chosen[number] = new


def allocate_within(items: Sequence[Sequence[Option]], cost: float) -> list[int] | None:
    """The index of an option for every item so that costs stay within `cost` and bytes are few.

    Returns:
        None when even the options of the least cost cost more.
    """
    if sum(min(one.cost for one in options) for options in items) > cost:
        return None
    low = float(sum(min(one.nbytes for one in options) for options in items))
    high = float(sum(max(one.nbytes for one in options) for options in items))
    best = allocate(items, high)
    for _ in range(40):
        budget = (low + high) / 2
        chosen = allocate(items, budget)
        spent = sum(options[index].cost for options, index in zip(items, chosen or [], strict=False))
        if chosen is not None and spent <= cost:
            high, best = budget, chosen
        else:
            low = budget
    return best


def choose_within(items: Sequence[Sequence[Option]], kl: float, label: str) -> list[int]:
    """As `allocate_within`, where something must get smaller than its largest option.

    Raises:
        OptionError: nothing can change for so little; the nearest loss for which something can is named.
    """
    chosen = allocate_within(items, kl)
    wholes = [max(one.nbytes for one in options) for options in items]
    taken = [options[index].nbytes for options, index in zip(items, chosen or [], strict=False)]
    if chosen is None or taken == wholes:
        cost = least_cost(items)
        raise OptionError(
            f"{label}: kl={kl} cannot be met, the least that anything costs is {cost:.2g}",
            hint=f"the nearest is kl={cost * 1.1:.2g}",
        )
    return chosen


def least_cost(items: Sequence[Sequence[Option]]) -> float:
    """The least that `allocate` has anything get smaller for; `allocate_within` finds something for that."""
    whole = sum(max(one.nbytes for one in options) for options in items)
    chosen = allocate(items, whole - 1)
    return sum(options[index].cost for options, index in zip(items, chosen or [], strict=False))


def _hull(options: Sequence[Option]) -> list[int]:
    """Indices of the options on the lower convex hull of cost over bytes, the smallest first."""
    hull: list[int] = []
    for index in sorted(range(len(options)), key=lambda one: (options[one].nbytes, options[one].cost)):
        if hull and options[index].cost >= options[hull[-1]].cost:
            continue  # larger, and no better
        while len(hull) > 1 and _slope(options[hull[-1]], options[index]) <= _slope(
            options[hull[-2]], options[hull[-1]]
        ):
            hull.pop()
        hull.append(index)
    return hull


def _slope(small: Option, large: Option) -> float:
    """Cost per byte from one to the other, negative."""
    return (large.cost - small.cost) / (large.nbytes - small.nbytes)
