"""Channels of a model's parameters, and which of them stand or fall together."""

from __future__ import annotations

import bisect

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.int64]
"""Numbers of channels, one for each place of a dimension."""

FIXED = 0
"""The channel that is never removed: what is joined with it stays."""


class Channels:
    """Disjoint sets of channels: each place of each dimension of each parameter is one."""

    def __init__(self) -> None:
        """Begin with the fixed channel alone."""
        self._parents = [FIXED]
        self._starts = [FIXED]
        self._owners: list[tuple[str, int]] = [("", 0)]

    def add(self, name: str, dim: int, size: int) -> Labels:
        """Return new channels for a dimension of a parameter."""
        start = len(self._parents)
        self._parents.extend(range(start, start + size))
        self._starts.append(start)
        self._owners.append((name, dim))
        return np.arange(start, start + size)

    def join(self, one: Labels, other: Labels) -> None:
        """Let channels at the same places of two arrays of one shape stand or fall together."""
        if one is other:
            return
        for first, second in zip(one.ravel().tolist(), other.ravel().tolist(), strict=True):
            first, second = self._root(first), self._root(second)
            if first != second:
                # the least is the root, so that what is fixed stays so
                self._parents[max(first, second)] = min(first, second)

    def join_all(self, labels: Labels) -> None:
        """Let channels stand or fall together, all of them."""
        flat = labels.ravel()
        if flat.size:
            self.join(flat, np.full_like(flat, flat[0]))

    def fix(self, labels: Labels) -> None:
        """Let channels stay."""
        self.join(labels, np.full_like(labels, FIXED))

    def join_banks(self, one: int, other: int) -> None:
        """Join two channels, and with them all of the two dimensions whose channels at the same
        place they are: what is computed once for each of several alternatives, experts for example,
        need not have met all of them."""
        (first, first_size), (second, second_size) = self._bank(one), self._bank(other)
        if first_size == second_size and one - first == other - second:
            places = np.arange(first_size)
            self.join(first + places, second + places)
        else:
            self.join(np.array([one]), np.array([other]))

    def sets(self) -> list[dict[tuple[str, int], list[int]]]:
        """Return the sets without the fixed one: places by parameter and dimension."""
        found: dict[int, dict[tuple[str, int], list[int]]] = {}
        for number, owner in enumerate(self._owners[1:], start=1):
            start = self._starts[number]
            _, size = self._bank(start)
            for place in range(size):
                root = self._root(start + place)
                if root != FIXED:
                    found.setdefault(root, {}).setdefault(owner, []).append(place)
        return list(found.values())

    def owner(self, label: int) -> tuple[str, int]:
        """Return the parameter and the dimension of a channel."""
        return self._owners[bisect.bisect_right(self._starts, label) - 1]

    def _bank(self, label: int) -> tuple[int, int]:
        """Return the first channel of a channel's dimension, and their number."""
        after = bisect.bisect_right(self._starts, label)
        start = self._starts[after - 1]
        end = self._starts[after] if after < len(self._starts) else len(self._parents)
        return start, end - start

    def _root(self, label: int) -> int:
        parents = self._parents
        while parents[label] != label:
            parents[label] = parents[parents[label]]
            label = parents[label]
        return label
