"""Parameters that are kept from rotation by their names."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

# Embeddings and output heads, as model families call them. A config file has no
# modules to look at, so there names must do; elsewhere `param_groups` looks at types.
USUAL_NAMES = (
    "*embed*",
    "emb.*",
    "*.emb.*",
    "wte.*",
    "*.wte.*",
    "wpe.*",
    "*.wpe.*",
    "*lm_head*",
    "head.*",
    "*.head.*",
    "output.weight",
)


class Exclusion:
    """Name patterns of parameters that are not rotated.

    Args:
        patterns: ``fnmatch`` patterns of the user.
    """

    def __init__(self, patterns: str | Iterable[str]) -> None:
        self.patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)

    def rotates(self, name: str, *, by_usual_names: bool) -> bool:
        """Whether a parameter of this name may be rotated.

        Args:
            name: Of the parameter.
            by_usual_names: Nobody has sorted the parameters into groups, so
                embeddings and heads are told by their usual names as well.

        Returns:
            False if a pattern matches.
        """
        patterns = self.patterns + (USUAL_NAMES if by_usual_names else ())
        return not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    def check(self, names: Sequence[str]) -> None:
        """Refuse a pattern that matches none of the names.

        Args:
            names: Of all parameters.

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
