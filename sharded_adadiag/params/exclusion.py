"""Parameters that are kept from rotation by their names."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Sequence

from sharded_adadiag.params.not_rotated import MATRIX, kind_by_name, kind_by_shape

# A longer side than this many times the other is no weight that we have seen: LoRA of
# rank 8 on 28,672 features comes closest, and 576 in some 1200 models.
LOPSIDED = 4000


class Exclusion:
    """Which parameters are not rotated because of their names.

    Args:
        patterns: One ``fnmatch`` pattern, or several, that the user gave.
    """

    def __init__(self, patterns: str | Iterable[str]) -> None:
        self.patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)

    def rotates(
        self, name: str, shape: Sequence[int], names: Collection[str], *, guess: bool
    ) -> bool:
        """Whether a parameter may be rotated.

        Args:
            name: The parameter's name.
            shape: Its logical shape.
            names: The names of all parameters.
            guess: The parameters have DeepSpeed's names and are not sorted into
                groups, so what is not to be rotated is told by name and shape.

        Returns:
            False if a pattern of the user, or one of the list, matches.
        """
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.patterns):
            return False
        if not guess or len(shape) < 2:
            return True
        kinds = kind_by_name(name, names, usual=True), kind_by_shape(name, shape)
        return kinds == (MATRIX, MATRIX)

    def check(self, names: Sequence[str]) -> None:
        """Refuse a pattern that matches none of the names.

        Args:
            names: The names of all parameters.

        Raises:
            ValueError: Naming the pattern.
        """
        for pattern in self.patterns:
            if not fnmatch.filter(names, pattern):
                raise ValueError(
                    f"exclude: the pattern {pattern!r} matches none of the "
                    f"{len(names)} parameters (the first is {names[0]!r}); write it "
                    "for their names, or remove it"
                )
