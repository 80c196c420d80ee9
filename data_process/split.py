"""Which part of a set a row belongs to: the publisher's, else by a hash of its id.

A row's part depends on nothing but its id, so it stays where it is when other rows come or go.
"""

import hashlib
from collections.abc import Mapping

SPLITS = ("train", "val", "test")


def share_of(row_id: str) -> float:
    """A number in [0, 1) that belongs to an id."""
    digest = hashlib.blake2b(row_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def by_hash(row_id: str, shares: Mapping[str, float]) -> str:
    """The part of a row: held-out parts get their shares, train the rest."""
    place = share_of(row_id)
    for name, share in shares.items():
        if place < share:
            return name
        place -= share
    return "train"


class Splitter:
    """Assigns rows in reading order; official held-out rows come first (raw.data_files)."""

    def __init__(self, shares: Mapping[str, float]) -> None:
        self._shares = shares
        self._official: set[str] = set()

    def split(self, row_id: str, official: str | None) -> str:
        """The part of a row.

        An official train row serves as validation only if the publisher gives no validation
        part, and never as test.
        """
        if official:
            self._official.add(official)
        if official in ("val", "test"):
            return official
        if official == "train":
            shares = {"val": self._shares.get("val", 0.0)}
            return "train" if "val" in self._official else by_hash(row_id, shares)
        return by_hash(row_id, self._shares)
