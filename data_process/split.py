"""Which part of a set a row belongs to: the publisher's, else by a hash of its id.

A row's part depends on nothing but its id, so it stays where it is when other rows come or go.
"""

import hashlib
import re
from collections.abc import Collection, Mapping

TAIL = re.compile(r"(?<=\d)-\d+$")
SPLITS = ("train", "val", "test")


def share_of(row_id: str) -> float:
    """A number in [0, 1) that belongs to an id."""
    digest = hashlib.blake2b(row_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def by_hash(row_id: str, shares: Mapping[str, float]) -> str:
    """The part of a row: held-out parts get their shares, train the rest.

    Rows of one entry ("x/3-1", "x/3-2") stay together: they share its text.
    """
    place = share_of(TAIL.sub("", row_id))
    for name, share in shares.items():
        if place < share:
            return name
        place -= share
    return "train"


class Splitter:
    """Assigns rows to parts.

    official: the parts that the publisher fixed, in the whole set
    """

    def __init__(self, shares: Mapping[str, float], official: Collection[str]) -> None:
        self._shares, self._official = shares, official

    def split(self, row_id: str, official: str | None) -> str:
        """The part of a row.

        An official train row serves as validation only if the publisher gives no validation
        part, and never as test.
        """
        if official in ("val", "test"):
            return official
        if official == "train":
            shares = {"val": self._shares.get("val", 0.0)}
            return "train" if "val" in self._official else by_hash(row_id, shares)
        return by_hash(row_id, self._shares)
