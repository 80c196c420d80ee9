"""Finds rows whose text was seen before, exactly but for space, punctuation and case.

A summary row repeats if its text or its headline does: a headline learnt in training would give
away a row of the test set. Near duplicates are not looked for. Memory: about 100 bytes a row.
"""

import hashlib
import re
from typing import Any

NO_WORD = re.compile(r"[\W_]+")


def fingerprint(text: str) -> bytes:
    """Equal for texts that differ in nothing but space, punctuation and case."""
    plain = NO_WORD.sub("", text).lower() or text
    return hashlib.blake2b(plain.encode(), digest_size=12).digest()


def parts(row: dict[str, Any]) -> list[str]:
    """The texts of a row that must not stand in another row, each with its role."""
    if "messages" in row:
        return ["\n".join(f"{m['role']}:{m['content']}" for m in row["messages"])]
    return [f"{key}:{row[key]}" for key in ("text", "summary") if row.get(key)]


class Seen:
    """Remembers the rows that passed by."""

    def __init__(self) -> None:
        self._marks: set[bytes] = set()

    def repeats(self, row: dict[str, Any]) -> bool:
        """Whether a part of the row came before; remembers all its parts."""
        marks = {fingerprint(part) for part in parts(row)}
        again = not marks.isdisjoint(self._marks)
        self._marks |= marks
        return again
