"""Columns of rows: the names that files use for them, the user's own choice, and what is left over.

A reader asks a record for its question, answer, text … by the tables of datasets/names.yaml. The
first filled name counts; --columns.ROLE NAME chooses another. What no reader asked for is named and
counted in the set's counts.json, so nothing is lost in silence. A record that cannot be understood
is Refused, with what was found in it and what is known.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from babyllama.rows import BODIES, SUMMARIES
from data_process.raw import Record, Skip

NAMES = Path(__file__).parent / "datasets/names.yaml"
NUMBERS = ("id", "idx", "index", "qid", "unnamed: 0")  # name a row, say nothing
SAMPLE = 40  # characters of a column that is left over
EXTRA = ("input", "system", "reference", "history", "title", "keywords")  # may be empty
FREE = ("question", "input", "reference", "summary", "title")  # a left-over column could be it
NOTHING = ("nan", "none", "null", "n/a")  # written out, such a cell is empty
LONGEST_WHY = (200, 800)  # characters at the beginning and at the end


@functools.cache
def names(kind: str) -> dict[str, tuple[str, ...]]:
    """A table of names.yaml."""
    return {
        key: tuple(some) for key, some in yaml.safe_load(NAMES.read_text("utf-8"))[kind].items()
    }


@functools.cache
def columns() -> dict[str, tuple[str, ...]]:
    """For each role the names of its columns, in the order in which they are looked for."""
    return names("columns") | {"text": BODIES, "summary": SUMMARIES}


@functools.cache
def known() -> frozenset[str]:
    """The names of all columns."""
    return frozenset(name for names in columns().values() for name in names)


class Refused(Exception):
    """A record that becomes no row.

    reason: short, to be counted
    why: what was found and what is known; empty where the reason says all
    broken: the record is damaged, which counts against --max_bad
    """

    def __init__(self, reason: str, why: str = "", broken: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.why, self.broken = reason, why, broken

    def skip(self, record: Record) -> Skip:
        why, (begin, end) = self.why, LONGEST_WHY
        if len(why) > begin + end:  # a name of a column may be as long as the file
            why = f"{why[:begin]} … {why[-end:]}"
        return record.skip(self.reason, "", self.broken, why)


def as_text(value: object, what: str) -> str:
    """A cell as text: an empty one (null, NaN) is "", a number is written out, parts are joined.

    raises: Refused that names the column or turn (`what`), and what stands there
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(int(value)) if float(value).is_integer() else str(value)
    if isinstance(value, list):
        if all(isinstance(part, str) for part in value) and len(value) < 2:
            return "".join(value)
        if all(isinstance(part, dict) and {"type", "text"} & part.keys() for part in value):
            odd = sorted({str(part.get("type", "text")) for part in value} - {"text"})
            if odd:
                raise Refused("not_text", f"{what}: a part of type {', '.join(odd)}; wanted text")
            return "".join(as_text(part.get("text"), what) for part in value)
    kind = {dict: "an object", list: "a list", bool: "true or false"}.get(type(value), "no text")
    raise Refused("wrong_type", f"{what}: {kind}; wanted text")


class Fields:
    """The columns of a record. What is asked for is marked as used.

    chosen: the user's choice of columns, by role
    """

    def __init__(self, record: Record, chosen: Mapping[str, str] | None = None) -> None:
        if not isinstance(record.data, dict):
            found = "a line of text" if isinstance(record.data, str) else "a list"
            raise Refused("not_an_object", f"{found}; wanted an object or the row of a table")
        self.where, self._chosen = record.where, chosen or {}
        self._data = {str(key).strip().lower(): value for key, value in record.data.items()}
        self._used: set[str] = set()
        self._asked: dict[str, bool] = {}  # the roles asked for, and if there was an answer

    def __contains__(self, role: str) -> bool:
        """True if a column of that role is there, even an empty one."""
        return any(name in self._data for name in self._names(role))

    def _names(self, role: str) -> Iterable[str]:
        return (self._chosen[role].lower(),) if role in self._chosen else columns()[role]

    def _filled(self, role: str) -> Iterator[str]:
        self._asked.setdefault(role, False)
        for name in self._names(role):
            value = self._data.get(name)
            is_publisher = name == "source" and "target" not in self._data
            said = value.strip().lower() if isinstance(value, str) else ""
            is_nothing = role in EXTRA and said in NOTHING
            if not (_is_empty(value) or is_publisher or is_nothing):
                self._asked[role] = True
                yield name

    def value(self, role: str) -> Any:
        """The first filled column of a role as it is, or None."""
        name = next(self._filled(role), None)
        self._used.update([name] if name else ())
        return self._data.get(name) if name else None

    def text(self, role: str) -> str:
        """The first filled column of a role as text; "" if there is none."""
        name = next(self._filled(role), None)
        return self._take(name) if name else ""

    def texts(self, role: str) -> list[str]:
        """All filled columns of a role as texts."""
        return [self._take(name) for name in self._filled(role)]

    def _take(self, name: str) -> str:
        self._used.add(name)
        return as_text(self._data[name], f"column {name!r}").strip()

    def unknown(self, *roles: str) -> Refused:
        """The refusal of a record that lacks columns of these roles."""
        found = ", ".join(map(str, self._data)) or "none"
        known = "; ".join(f"{role}: {', '.join(self._names(role))}" for role in roles)
        options = " ".join(f"--columns.{role} NAME" for role in roles)
        return Refused(
            "unknown_columns", f"columns {found}; known are {known}; choose with {options}"
        )

    def unused(self) -> dict[str, dict[str, str]]:
        """The filled columns that nobody asked for: the beginning of what each holds, and the role
        that it could have, by its name or because no other column has it."""
        free = [role for role, found in self._asked.items() if not found and role in FREE]
        left = {}
        for name, value in self._data.items():
            if name not in self._used and name not in NUMBERS and not _is_empty(value):
                roles = [role for role in self._asked if name in columns()[role]] + free
                role = {"role": roles[0]} if roles else {}
                left[name] = {"example": str(value)[:SAMPLE], **role}
        return left


def _is_empty(value: object) -> bool:
    """Nothing, NaN, blank text or an empty list."""
    return value is None or value != value or (isinstance(value, str) and not value.strip()) or (
        isinstance(value, list | dict) and not value
    )  # fmt: skip
