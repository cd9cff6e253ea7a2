"""Units: entries of arrays that can only be removed together.

A union-find structure over numbers, with two additions: a class of tied units can have
parts, as the channels of a flattened image have a row, a column and a channel, and
units can be fixed, with the reason. `lbi.dataflow` fills it from a jaxpr.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# The unit that is never removed.
FIXED = 0
# Depth of parts of parts at which a class is taken to contain itself.
_MAX_DEPTH = 8


class Column(NamedTuple):
    """One unit for each index along an axis.

    Attributes:
      units: unit numbers, (n,), int.
      origins: the axes of parameters that the indices come from, {(path, axis)}.
      sliced: which indices come from a part of a longer axis, bool, (n,) or ().
    """

    units: np.ndarray
    origins: frozenset = frozenset()
    sliced: np.ndarray | bool = False

    def take(self, places: np.ndarray | slice) -> "Column":
        """The column of the indices at these places."""
        sliced = np.broadcast_to(self.sliced, self.units.shape)
        return self._replace(units=self.units[places], sliced=sliced[places])


class Units:
    """Units, which of them are tied, and which are fixed.

    A class of tied units can have parts: it is then removed if one of them is.
    """

    def __init__(self):
        self._parent = np.arange(1024)
        self._size = 1
        self._parts = {}
        self._has_parts = np.zeros(1024, bool)
        self._fixed = []

    def fresh(self, count: int) -> np.ndarray:
        """New units, (count,)."""
        start, self._size = self._size, self._size + count
        if self._size > len(self._parent):
            grown = np.arange(2 * self._size)
            grown[: len(self._parent)] = self._parent
            self._parent = grown
            flags = np.zeros(len(grown), bool)
            flags[: len(self._has_parts)] = self._has_parts
            self._has_parts = flags
        return np.arange(start, self._size)

    def find(self, units: np.ndarray) -> np.ndarray:
        """The number of the class of each unit."""
        roots = self._parent[units]
        while not np.array_equal(above := self._parent[roots], roots):
            roots = above
        self._parent[units] = roots
        return roots

    def fix(self, columns: Sequence[Column], reason: str) -> None:
        """Forbids removing the units of these columns."""
        self._fixed += [(column.units, reason) for column in columns]

    def tie(self, first: np.ndarray, second: np.ndarray, reason: str) -> None:
        """Makes units removable only together.

        Args:
          first: unit numbers, (n,).
          second: those that they are tied to, (n,).
          reason: why, for units that become fixed.
        """
        first, second = self.find(first), self.find(second)
        differ = first != second
        first, second = first[differ], second[differ]
        every = np.concatenate([first, second])
        simple = len(np.unique(every)) == len(every) and not (every == FIXED).any()
        if simple and not self._has_parts[every].any():
            self._parent[second] = first  # all at once, as the loop below would
            return
        for pair in dict.fromkeys(zip(first.tolist(), second.tolist(), strict=True)):
            self._tie_one(*pair, reason)

    def tie_axes(
        self, first: Sequence[Column], second: Sequence[Column], reason: str
    ) -> None:
        """Ties all columns of one axis to those of another of the same length.

        Args:
          first: columns of one axis.
          second: columns of the other.
          reason: why, for units that become fixed.
        """
        if len(first) == len(second) == 1:
            self.tie(first[0].units, second[0].units, reason)
            return
        first, second = self.leaves(first), self.leaves(second)
        if len(first) > len(second):
            first, second = second, first
        if len(first) == len(second):
            pairs, rest = list(zip(first, second, strict=True)), []
        else:
            # Columns with the same partition of the indices belong together; the
            # others, for example the window of a kernel, keep their length.
            pairs, rest = [], list(second)
            for column in first:
                same = [c for c in rest if _same_partition(column.units, c.units)]
                if same:
                    pairs.append((column, same[0]))
                    rest = [c for c in rest if c is not same[0]]
            if len(pairs) < len(first) == 1:
                self.expand(first[0].units, [c.units for c in second], reason)
                return
            if len(pairs) < len(first):
                pairs, rest = [], [*first, *second]
        for a, b in pairs:
            self.tie(a.units, b.units, reason)
        self.fix(rest, reason)

    def expand(
        self, units: np.ndarray, parts: Sequence[np.ndarray], reason: str
    ) -> None:
        """Makes unit i removed if and only if one of parts[0][i], ... is.

        Args:
          units: unit numbers, (n,).
          parts: unit numbers of each part, (n,).
          reason: why, for units that become fixed.
        """
        rows = np.stack([self.find(units), *map(self.find, parts)], axis=1)
        for root, *row in np.unique(rows, axis=0).tolist():
            self._expand_one(root, tuple(row), reason)

    def leaves(self, columns: Sequence[Column]) -> list[Column]:
        """The same columns in terms of classes without parts."""
        found = []
        for column in columns:
            found += [
                column._replace(units=units) for units in self._leaves(column.units, 0)
            ]
        return found

    def split(
        self, column: Column, sizes: Sequence[int], reason: str
    ) -> list[tuple[Column, ...]]:
        """The columns of the axes that an axis is split into.

        Args:
          column: a column of the whole axis.
          sizes: lengths of the new axes.
          reason: why, for units that become fixed.
        """
        axes = [()] * len(sizes)
        for leaf in self.leaves([column]):
            array = leaf.units.reshape(sizes)
            varies = [
                k for k in range(len(sizes)) if (array != array.take([0], k)).any()
            ]
            if not varies:
                self.fix([leaf], f"they are reshaped as a whole ({reason})")
            elif len(varies) == 1:
                [k] = varies
                places = np.moveaxis(np.arange(array.size).reshape(sizes), k, 0)
                axes[k] += (leaf.take(places.reshape(sizes[k], -1)[:, 0]),)
            else:
                parts, sliced = [], np.any(leaf.sliced)
                for k in varies:
                    units = self.fresh(sizes[k])
                    axes[k] += (Column(units, leaf.origins, sliced),)
                    view = [1] * len(sizes)
                    view[k] = sizes[k]
                    parts.append(np.broadcast_to(units.reshape(view), sizes).ravel())
                self.expand(leaf.units, parts, f"reshaped ({reason})")
        return axes

    def reasons(self) -> dict[int, str]:
        """{class without parts: why it is fixed}."""
        found = {}

        def add(root, reason, depth):
            parts = self._parts.get(root)
            if parts is None or depth > _MAX_DEPTH:
                found.setdefault(root, reason)
                return
            for part in parts:
                add(self._root(part), reason, depth + 1)

        for units, reason in self._fixed:
            for root in np.unique(self.find(units)).tolist():
                add(root, reason, 0)
        found.pop(FIXED, None)
        return found

    def _root(self, unit):
        return int(self.find(np.array([unit]))[0])

    def _tie_one(self, first, second, reason):
        first, second = self._root(first), self._root(second)
        if first == second:
            return
        if FIXED in (first, second):
            self.fix([Column(np.array([max(first, second)]))], reason)
            return
        self._parent[second] = first
        parts = self._parts.pop(second, None)
        if parts is not None:
            self._expand_one(first, parts, reason)

    def _expand_one(self, root, parts, reason):
        root = self._root(root)
        if root == FIXED:
            self.fix([Column(np.array(parts))], reason)
            return
        known = self._parts.get(root)
        if known is None:
            self._parts[root] = parts
            self._has_parts[root] = True
        elif len(known) == len(parts):
            for pair in zip(known, parts, strict=True):
                self._tie_one(*pair, reason)
        else:
            self.fix([Column(np.array(known + parts))], reason)

    def _leaves(self, units, depth):
        roots = self.find(units)
        if not self._has_parts[roots].any():
            return [roots] if (roots != FIXED).any() else []
        if depth > _MAX_DEPTH:  # a class that contains itself
            self.fix([Column(roots)], "they are reshaped in several ways")
            return []
        parts = [self._parts.get(root, (root,)) for root in roots.tolist()]
        width = max(map(len, parts))
        padded = np.array([row + (FIXED,) * (width - len(row)) for row in parts])
        return [leaf for part in padded.T for leaf in self._leaves(part, depth + 1)]


def _same_partition(first, second):
    """Whether two arrays of units divide their indices in the same way."""
    numbers = [np.unique(units, return_inverse=True)[1] for units in (first, second)]
    pairs = len(np.unique(np.stack(numbers), axis=1).T)
    return all(pairs == n.max() + 1 for n in numbers)
