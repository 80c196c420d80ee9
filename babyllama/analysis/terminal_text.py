"""Terminal output: colours and harmless characters."""

import os
import sys
import unicodedata

GREEN, RESET = "\x1b[32m", "\x1b[0m"


def has_colours() -> bool:
    """True if standard output is a terminal that shows them, and NO_COLOR is not set."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or os.name == "nt"
    return sys.stdout.isatty() and not plain


def visible(text: str) -> str:
    """Control and invisible characters spelled out: a row must not steer the terminal."""
    return "".join(
        c.encode("unicode_escape").decode()
        if c not in "\n\u200d" and unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")
        else c
        for c in text
    )
