"""Terminal output: colours, harmless characters, Chinese text cut by its width."""

import os
import sys
import unicodedata

from rich.cells import cell_len, set_cell_size

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


def clipped(text: str, width: int) -> str:
    """As much of a text as fits into so many columns."""
    return text if cell_len(text) <= width else set_cell_size(text, width - 1).rstrip() + "…"
