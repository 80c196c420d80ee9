"""The two ends of making a set, as shard functions: raw files to clean rows, clean rows to rows.

Between them, dedup.py and decontaminate.py say which clean rows go. A clean row is a canonical row
but for three keys: its `id` is its number within the job, `split` is the part that the publisher
put it in, and `refused` the rule that refuses it (only where `refused_count`). Which part a row
belongs to depends on nothing but the publisher's split or its id, so it stays where it is when
other rows come or go.
"""

import contextlib
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from babyllama.config import flush
from babyllama.rows import check_row
from data_process.clean import fix, reason_to_drop, texts
from data_process.columns import known
from data_process.dedup import load_drops
from data_process.executor import Counts
from data_process.raw import Part, Skip, records
from data_process.registry import DataSet

N_EXAMPLES = 10
SAMPLE_CHARS = 80


SUMS = ("rows_in", "chars_in", "rows_out", "chars_out")


@dataclass
class Tally:
    """Counts of one stage, of one shard or of all.

    dropped: for each reason the number of rows, at most ten examples, "place: beginning", and, if
        the reason does not say all, the first place with what was found there (why)
    """

    sums: Counter = field(default_factory=lambda: Counter(dict.fromkeys(SUMS, 0)))
    fixed: Counter = field(default_factory=Counter)
    dropped: dict[str, dict] = field(default_factory=dict)

    def came(self, n_chars: int) -> None:
        """Count a row that the stage gets."""
        self.sums.update(rows_in=1, chars_in=n_chars)

    def stayed(self, n_chars: int) -> None:
        """Count a row that the stage hands on."""
        self.sums.update(rows_out=1, chars_out=n_chars)

    def drop(self, reason: str, where: str, sample: str, why: str = "") -> None:
        """Count a row that goes."""
        more = {"why": f"{where}: {why}"} if why else {}
        self._add(reason, {"rows": 1, "examples": [f"{where}: {sample[:SAMPLE_CHARS]}"]} | more)

    def _add(self, reason: str, found: dict) -> None:
        total = self.dropped.setdefault(reason, {"rows": 0, "examples": []})
        total["rows"] += found["rows"]
        total["examples"] += found["examples"][: N_EXAMPLES - len(total["examples"])]
        if "why" in found:
            total.setdefault("why", found["why"])

    def as_dict(self) -> dict:
        """What JSON can hold, the most frequent reasons first."""
        dropped = dict(sorted(self.dropped.items(), key=lambda item: -item[1]["rows"]))
        return {**self.sums, "fixed": dict(self.fixed.most_common()), "dropped": dropped}


def merged(counts: Iterable[dict]) -> dict:
    """The sum of what several shards counted."""
    total = Tally()
    for one in counts:
        total.sums.update({name: one[name] for name in SUMS})
        total.fixed.update(one["fixed"])
        for reason, found in one["dropped"].items():
            total._add(reason, found)
    return total.as_dict()


def size_of(row: dict) -> int:
    """Number of characters in the texts of a row."""
    return sum(map(len, texts(row)))


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


def part_of_row(
    row_id: str, official: str | None, shares: Mapping[str, float], fixed: Collection[str]
) -> str:
    """The part of a row: the publisher's, else one drawn by the hash of its id.

    An official train row serves as validation only if the publisher gives no validation part,
    and never as test.
    fixed: the parts that the publisher fixed, in the whole set
    """
    if official in ("val", "test"):
        return official
    if official == "train":
        return "train" if "val" in fixed else by_hash(row_id, {"val": shares.get("val", 0.0)})
    return by_hash(row_id, shares)


SHARD_CHARS = 20_000_000  # about 60 MB of rows
N_BROKEN = 5


@dataclass(frozen=True)
class RawSet:
    """A set to be made, and where its raw files lie.

    official: whether the publisher's parts count; None: yes, unless nothing is left to train on
    columns, roles: those that the user named
    """

    data_set: DataSet
    place: Path
    official: bool | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CleanConfig:
    """What decides the clean rows of a job.

    parts: of the raw files, for readers that do not open these themselves
    skip: names of fixes and rules that are switched off
    """

    raw: RawSet
    parts: tuple[Part, ...]
    encoding: str
    skip: tuple[str, ...]


def write_shards(stem: Path, rows: Iterable[tuple[dict, int]], shard_chars: int) -> list[str]:
    """Write rows to <stem>-000.jsonl, -001 …, each of about as many characters.

    rows: each with its number of characters
    returns: the names of the files
    """
    names, room = [], 0
    with contextlib.ExitStack() as opened:
        for row, n_chars in rows:
            if room <= 0:
                opened.close()
                names.append(f"{stem.name}-{len(names):03d}.jsonl")
                path, room = stem.with_name(names[-1]), shard_chars
                opened.callback(flush, path)
                file = opened.enter_context(open(path, "w", encoding="utf-8", newline="\n"))
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            room -= n_chars
    return names


def clean_shard(source: Path, target: Path, cfg: CleanConfig) -> Counts:
    """Read the raw parts of a job, clean their rows, write them behind `target`."""
    raw_set, data_set = cfg.raw, cfg.raw.data_set
    for stale in target.parent.glob(f"{target.name}-*.jsonl"):
        stale.unlink()
    columns = known() | {name.lower() for name in raw_set.columns.values()}
    n_entries = itertools.count()
    found = zip(records(cfg.parts, cfg.encoding, data_set.layout, columns), n_entries, strict=False)
    entries = (entry for entry, _ in found)
    if data_set.reads_dir:
        items = data_set.read(raw_set.place, cfg.encoding)
    else:
        items = data_set.read(entries, columns=raw_set.columns, roles=raw_set.roles)
    cleaning = Cleaning(data_set, raw_set.official is not False, cfg.skip)
    names = write_shards(target, cleaning.rows(items), SHARD_CHARS)
    return cleaning.counts() | {
        "entries": next(n_entries),
        "inputs": {f"{p.name}+{p.start}" if p.start else p.name: _digest(p) for p in cfg.parts},
        "files": names,
        "shards": len(names),
    }


class Cleaning:
    """Fixes and rules over the rows of a reader; everything that goes is counted."""

    def __init__(
        self, data_set: DataSet, official: bool = True, skip: tuple[str, ...] = ()
    ) -> None:
        self._data_set, self._keep_official, self._skip = data_set, official, skip
        self.read, self.clean = Tally(), Tally()
        self.official: Counter[str] = Counter()
        self.unused: dict[str, dict] = {}
        self.n_broken, self.broken = 0, []

    def rows(self, items: Iterable[dict | Skip]) -> Iterator[tuple[dict, int]]:
        """The clean rows that stay, each with its number of characters."""
        for item in items:
            n_chars = 0 if isinstance(item, Skip) else size_of(item)
            self.read.came(n_chars)  # characters of damaged rows are not known
            if isinstance(item, Skip):
                self._skipped(item)
                continue
            self.read.stayed(n_chars)
            self.clean.came(n_chars)
            official = item.pop("split", None)
            official = official if self._keep_official else None
            for column, sample in item.pop("unused", {}).items():
                self.unused.setdefault(column, {"rows": 0} | sample)["rows"] += 1
            row, changed = fix(item, self._data_set.rules, self._skip)
            self.clean.fixed.update(changed)
            reason = None
            # The publisher's held-out rows stay as they are, or scores could not be compared.
            if official not in ("val", "test"):
                reason = reason_to_drop(row, self._data_set.rules, self._skip)
            if reason:
                self.clean.drop(reason, f"{self._data_set.ids}/{row['id']}", " | ".join(texts(row)))
                if not self._data_set.refused_count:
                    continue
                row["refused"] = reason
            if official:
                row["split"] = official
                self.official[official] += 1
            n_chars = size_of(row)
            if not reason:
                self.clean.stayed(n_chars)
            yield row, n_chars

    def _skipped(self, skip: Skip) -> None:
        self.read.drop(skip.reason, skip.where, skip.sample, skip.why)
        if skip.broken:
            self.n_broken += 1
            if len(self.broken) < N_BROKEN:
                why = f" ({skip.why})" if skip.why else ""
                self.broken.append(f"{skip.where} {skip.reason}{why}")

    def counts(self) -> Counts:
        return {
            "read": self.read.as_dict(),
            "clean": self.clean.as_dict(),
            "official": dict(self.official),
            "unused": self.unused,
            "n_broken": self.n_broken,
            "broken": self.broken,
        }


def _digest(part: Part) -> str:
    """SHA-256 of the bytes of a part."""
    digest = hashlib.sha256()
    with open(part.path, "rb") as file:
        file.seek(part.start)
        left = (part.end or part.path.stat().st_size) - part.start
        while left and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class WriteConfig:
    """What decides the finished rows of a shard, next to its clean rows.

    first_id: number of the first entry of the shard's job among all of the set
    official: the parts that the publisher fixed, in the whole set
    drops: for each stage between, the list of rows that go (dedup.write_drops)
    """

    data_set: DataSet
    first_id: int
    official: tuple[str, ...]
    drops: tuple[tuple[str, Path], ...] = ()


def write_shard(source: Path, target: Path, cfg: WriteConfig) -> Counts:
    """Write <target>.train.jsonl, .val.jsonl and .test.jsonl from clean rows; empty ones not."""
    finishing = Finishing(cfg)
    parts = {split: Counter(rows=0, chars=0) for split in SPLITS}
    out: dict[str, IO[str]] = {}
    with contextlib.ExitStack() as opened:
        lines = opened.enter_context(open(source, encoding="utf-8", newline="\n"))
        for split, row in finishing.rows(map(json.loads, lines)):
            if split not in out:
                path = target.with_name(f"{target.name}.{split}.jsonl")
                opened.callback(flush, path)
                out[split] = opened.enter_context(open(path, "w", encoding="utf-8", newline="\n"))
            parts[split].update(rows=1, chars=size_of(row))
            out[split].write(json.dumps(row, ensure_ascii=False) + "\n")
    return {
        "stages": {name: tally.as_dict() for name, tally in finishing.stages.items()},
        "parts": {split: dict(count) for split, count in parts.items()},
        "leaks": finishing.leaks,
        "files": [Path(out[split].name).name for split in SPLITS if split in out],
    }


class Finishing:
    """Takes out what the stages between drop, gives the rows their ids and their parts."""

    def __init__(self, cfg: WriteConfig) -> None:
        self._data_set, self._first_id = cfg.data_set, cfg.first_id
        self._fixed = cfg.official
        self._drops = [(stage, load_drops(path)) for stage, path in cfg.drops]
        self.stages = {name: Tally() for name in (*(stage for stage, _ in cfg.drops), "write")}
        self.leaks: list[str] = []

    def rows(self, clean_rows: Iterable[dict]) -> Iterator[tuple[str, dict]]:
        """(part, canonical row) for every row that stays."""
        for number, row in enumerate(clean_rows):
            official = row.pop("split", None)
            if row.pop("refused", None):
                continue
            row["id"] = f"{self._data_set.ids}/{self._number(row['id'])}"
            if self._is_dropped(number, row, official):
                continue
            tally = self.stages["write"]
            tally.came(size_of(row))
            row = self._data_set.finished(row)
            if reason := check_row(row):
                tally.drop(reason, row["id"], str(row))
                continue
            tally.stayed(size_of(row))
            yield part_of_row(row["id"], official, self._data_set.shares, self._fixed), row

    def _number(self, local: int | str) -> str:
        """An entry's number in the set; rows of one entry, "3-1" or "3.1", keep their ends."""
        number = re.split(r"\D", str(local), maxsplit=1)[0]
        return f"{self._first_id + int(number)}{str(local)[len(number) :]}"

    def _is_dropped(self, number: int, row: dict, official: str | None) -> bool:
        n_chars = size_of(row)
        for stage, drops in self._drops:
            tally = self.stages[stage]
            tally.came(n_chars)
            reason, remark = drops.get(number, ("", ""))
            # The publisher's held-out rows stay as they are, or scores could not be compared.
            if reason and official not in ("val", "test"):
                tally.drop(reason, row["id"], f"{remark} {' | '.join(texts(row))}".strip())
                if stage == "decontaminate":
                    self.leaks.append(row["id"])
                return True
            tally.stayed(n_chars)
        return False
