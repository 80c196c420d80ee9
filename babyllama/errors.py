"""The user's mistakes: errors that end a script with one line and exit code 2.

A message says what was wanted, what was found, where, and what to do. Anything else that is
raised is a bug of ours and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A setting, a flag or a combination of them that cannot work."""


class DataError(ValueError):
    """A file with text, rows or tokens that is missing, foreign or damaged."""


class CheckpointError(ValueError):
    """A checkpoint or run directory that is missing, damaged or belongs to something else."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Addition to a message about an unknown word: the known one most like it, if one is."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""


def require(section: str, config: object, wanted: dict[str, tuple[str, bool]]) -> None:
    """Refuse settings that cannot be.

    wanted: by name, what a setting must be and whether it is; NaN compares as false, so conditions
        are written that hold for what is good
    raises: ConfigError with all that are not
    """
    bad = [
        f"{section}.{name} wants {what}, found {getattr(config, name)!r}"
        for name, (what, is_good) in wanted.items()
        if not is_good
    ]
    if bad:
        raise ConfigError("; ".join(bad))
