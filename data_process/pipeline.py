"""From raw files to a set of clean rows, stage by stage, each in shards.

    read, clean    raw parts → data/work/<set>/clean           (clean.py)
    dedup          → which rows repeat                          (dedup.py)
    decontaminate  → which rows share text with an evaluation   (decontaminate.py)
    write          → train, val and test rows, then data/clean/<set>, replaced as a whole

Several sets of one run go through each stage together: the held-out rows that their publishers
fixed are protected against all of them. A killed run continues with the shards that are missing;
a changed setting redoes the stages that it touches. counts.json says what each stage did, with
reasons and examples, and depends on the input and the settings alone; timing.json how long it took.

A clean row is a canonical row but for three keys: its `id` is its number within the job, `split`
is the part that the publisher put it in, and `refused` the rule that refuses it (only where
REFUSED_COUNT). Which part a row belongs to depends on nothing but the publisher's split or its id,
so it stays where it is when other rows come or go.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from babyllama import rows
from babyllama.config import from_repo, shown
from babyllama.errors import DataError
from babyllama.rows import check_row
from data_process import clean, decontaminate, dedup, raw
from data_process.clean import fix, reason_to_drop, texts
from data_process.decontaminate import FlagConfig, flag_shard, load_flags, make_windows
from data_process.dedup import DedupConfig, dedup_shards, load_drops, sign_shard
from data_process.executor import Counts, Engine, Job, key_of, run_shards, write_whole
from data_process.raw import Part, Skip, from_json, records
from data_process.registry import DataSet, data_sets, package_dir

N_EXAMPLES = 10
SAMPLE_CHARS = 80


@dataclass
class Tally:
    """Counts of one stage, of one shard or of all.

    dropped: rows by reason; examples: at most ten of each, "place: beginning"
    """

    rows_in: int = 0
    chars_in: int = 0
    rows_out: int = 0
    chars_out: int = 0
    fixed: Counter = field(default_factory=Counter)
    dropped: Counter = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def drop(self, reason: str, where: str, sample: str) -> None:
        """Count a row that goes."""
        self.dropped[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < N_EXAMPLES:
            examples.append(f"{where}: {sample[:SAMPLE_CHARS]}")

    def as_dict(self) -> dict:
        """What JSON can hold, the most frequent reasons first."""
        counts = {name: getattr(self, name)
                  for name in ("rows_in", "chars_in", "rows_out", "chars_out")}  # fmt: skip
        counts["fixed"] = dict(self.fixed.most_common())
        counts["dropped"] = {
            reason: {"rows": n, "examples": self.examples[reason]}
            for reason, n in self.dropped.most_common()
        }
        return counts


def merged(counts: Iterable[dict]) -> dict:
    """The sum of what several shards counted."""
    total = Tally()
    for one in counts:
        for name in ("rows_in", "chars_in", "rows_out", "chars_out"):
            setattr(total, name, getattr(total, name) + one[name])
        total.fixed.update(one["fixed"])
        for reason, found in one["dropped"].items():
            total.dropped[reason] += found["rows"]
            examples = total.examples.setdefault(reason, [])
            examples += found["examples"][: N_EXAMPLES - len(examples)]
    return total.as_dict()


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


SHARD_CHARS = 20_000_000  # about 60 MB of rows
N_BROKEN = 5


@dataclass(frozen=True)
class CleanConfig:
    """What decides the clean rows of a job, next to its raw parts.

    place: for readers that open the files themselves
    official: keep the parts that the publisher fixed
    skip: names of fixes and rules that are switched off
    """

    reader: str
    name: str
    encoding: str
    place: Path
    official: bool = True
    skip: tuple[str, ...] = ()
    shard_chars: int = SHARD_CHARS


class RowShards:
    """Writes rows to <stem>-000.jsonl, -001 …, each of about as many characters."""

    def __init__(self, stem: Path, shard_chars: int) -> None:
        self._stem, self._shard_chars = stem, shard_chars
        self._file: Any = None
        self._room = 0
        self.names: list[str] = []

    def __enter__(self) -> "RowShards":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def add(self, row: dict, n_chars: int) -> None:
        if self._room <= 0:
            self._close()
            self.names.append(f"{self._stem.name}-{len(self.names):03d}.jsonl")
            path = self._stem.with_name(self.names[-1])
            self._file = open(path, "w", encoding="utf-8", newline="\n")  # noqa: SIM115
            self._room = self._shard_chars
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._room -= n_chars

    def _close(self) -> None:
        if self._file:
            with self._file:
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file = None


class _Counted:
    """Passes an iterator on and counts."""

    def __init__(self, items: Iterable) -> None:
        self._items, self.n = items, 0

    def __iter__(self) -> Iterator:
        for item in self._items:
            self.n += 1
            yield item


def clean_shard(source: Path, target: Path, cfg: CleanConfig) -> Counts:
    """Read the parts that a plan file names, clean their rows, write them behind `target`."""
    (data_set,) = data_sets(cfg.reader, cfg.name)
    parts = from_json(source.read_text(encoding="utf-8"))
    for stale in target.parent.glob(f"{target.name}-*.jsonl"):
        stale.unlink()
    entries = _Counted(records(parts, cfg.encoding, data_set.layout))
    items = (
        data_set.read_dir(cfg.place, cfg.encoding) if data_set.read_dir else data_set.read(entries)
    )
    cleaning = Cleaning(data_set, cfg.official, cfg.skip)
    with RowShards(target, cfg.shard_chars) as shards:
        for row, n_chars in cleaning.rows(items):
            shards.add(row, n_chars)
    return cleaning.counts() | {
        "entries": entries.n,
        "inputs": {f"{p.name}+{p.start}" if p.start else p.name: _digest(p) for p in parts},
        "files": shards.names,
        "shards": len(shards.names),
    }


class Cleaning:
    """Fixes and rules over the rows of a reader; everything that goes is counted."""

    def __init__(
        self, data_set: DataSet, official: bool = True, skip: tuple[str, ...] = ()
    ) -> None:
        self._data_set, self._keep_official, self._skip = data_set, official, skip
        self.read, self.clean = Tally(), Tally()
        self.official: Counter[str] = Counter()
        self.n_broken, self.broken = 0, []

    def rows(self, items: Iterable[dict | Skip]) -> Iterator[tuple[dict, int]]:
        """The clean rows that stay, each with its number of characters."""
        for item in items:
            self.read.rows_in += 1
            if isinstance(item, Skip):
                self._skipped(item)
                continue
            n_chars = sum(map(len, texts(item)))
            self.read.rows_out += 1
            self.read.chars_out += n_chars
            official = item.pop("split", None) if self._keep_official else None
            item.pop("split", None)
            row, changed = fix(item, self._data_set.rules, self._skip)
            self.clean.fixed.update(changed)
            # The publisher's held-out rows stay as they are, or scores could not be compared.
            if official in ("val", "test"):
                reason = None
            else:
                reason = reason_to_drop(row, self._data_set.rules, self._skip)
            if reason:
                self.clean.drop(reason, f"{self._data_set.ids}/{row['id']}", " | ".join(texts(row)))
                if not self._data_set.refused_count:
                    continue
                row["refused"] = reason
            if official:
                row["split"] = official
                self.official[official] += 1
            n_chars = sum(map(len, texts(row)))
            if not reason:
                self.clean.rows_out += 1
                self.clean.chars_out += n_chars
            yield row, n_chars

    def _skipped(self, skip: Skip) -> None:
        self.read.drop(skip.reason, skip.where, skip.sample)
        if skip.broken:
            self.n_broken += 1
            if len(self.broken) < N_BROKEN:
                self.broken.append(f"{skip.where} {skip.reason}")

    def counts(self) -> Counts:
        self.read.chars_in = self.read.chars_out  # characters of damaged rows are not known
        self.clean.rows_in, self.clean.chars_in = self.read.rows_out, self.read.chars_out
        return {
            "read": self.read.as_dict(),
            "clean": self.clean.as_dict(),
            "official": dict(self.official),
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
    drops: for each stage between, a function (clean shard) -> {line: (reason, remark)}
    """

    reader: str
    name: str
    first_id: int
    official: tuple[str, ...]
    drops: tuple[tuple[str, Callable[[Path], Mapping[int, tuple[str, str]]], Path], ...] = ()


def write_shard(source: Path, target: Path, cfg: WriteConfig) -> Counts:
    """Write <target>.train.jsonl, .val.jsonl and .test.jsonl from clean rows; empty ones not."""
    (data_set,) = data_sets(cfg.reader, cfg.name)
    finishing = Finishing(data_set, cfg)
    parts = {split: Counter(rows=0, chars=0) for split in SPLITS}
    with contextlib.ExitStack() as stack:
        out = {
            split: stack.enter_context(
                open(_part_path(target, split), "w", encoding="utf-8", newline="\n")
            )
            for split in SPLITS
        }
        with open(source, encoding="utf-8", newline="\n") as lines:
            for split, row in finishing.rows(map(json.loads, lines)):
                parts[split].update(rows=1, chars=sum(map(len, texts(row))))
                out[split].write(json.dumps(row, ensure_ascii=False) + "\n")
        for file in out.values():
            file.flush()
            os.fsync(file.fileno())
    kept = [split for split in SPLITS if parts[split]["rows"]]
    for split in set(SPLITS) - set(kept):
        _part_path(target, split).unlink()
    return {
        "stages": {name: tally.as_dict() for name, tally in finishing.stages.items()},
        "parts": {split: dict(count) for split, count in parts.items()},
        "leaks": finishing.leaks,
        "files": [_part_path(target, split).name for split in kept],
    }


def _part_path(target: Path, split: str) -> Path:
    return target.with_name(f"{target.name}.{split}.jsonl")


class Finishing:
    """Takes out what the stages between drop, gives the rows their ids and their parts."""

    def __init__(self, data_set: DataSet, cfg: WriteConfig) -> None:
        self._data_set, self._first_id = data_set, cfg.first_id
        self._splitter = Splitter(data_set.shares, cfg.official)
        self._drops = [(stage, load(path)) for stage, load, path in cfg.drops]
        self.stages = {name: Tally() for name in (*(stage for stage, _, _ in cfg.drops), "write")}
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
            n_chars = sum(map(len, texts(row)))
            tally = self.stages["write"]
            tally.rows_in, tally.chars_in = tally.rows_in + 1, tally.chars_in + n_chars
            row = self._data_set.finish(row)
            if reason := check_row(row):
                tally.drop(reason, row["id"], str(row))
                continue
            n_chars = sum(map(len, texts(row)))
            tally.rows_out, tally.chars_out = tally.rows_out + 1, tally.chars_out + n_chars
            yield self._splitter.split(row["id"], official), row

    def _number(self, local: int | str) -> str:
        """An entry's number in the set; rows of one entry, "3-1" or "3.1", keep their ends."""
        number = re.match(r"\d+", str(local))[0]
        return f"{self._first_id + int(number)}{str(local)[len(number) :]}"

    def _is_dropped(self, number: int, row: dict, official: str | None) -> bool:
        n_chars = sum(map(len, texts(row)))
        for stage, drops in self._drops:
            tally = self.stages[stage]
            tally.rows_in, tally.chars_in = tally.rows_in + 1, tally.chars_in + n_chars
            reason, remark = drops.get(number, ("", ""))
            # The publisher's held-out rows stay as they are, or scores could not be compared.
            if reason and official not in ("val", "test"):
                tally.drop(reason, row["id"], f"{remark} {' | '.join(texts(row))}".strip())
                if stage == "decontaminate":
                    self.leaks.append(row["id"])
                return True
            tally.rows_out, tally.chars_out = tally.rows_out + 1, tally.chars_out + n_chars
        return False


STAGES = ("read", "clean", "dedup", "decontaminate", "write")


@dataclass(frozen=True)
class RawSet:
    """A set to be made, where its raw files lie, and whether the publisher's parts count."""

    data_set: DataSet
    place: Path
    official: bool = True


@dataclass(frozen=True)
class PipelineConfig:
    """What decides the rows, and how the work is done.

    out: root of clean/ and work/
    skip: names of fixes and rules that are switched off
    evaluation: files whose text must not be trained on
    job_bytes: of raw files, for one job
    dedup_across: repeats are looked for across the sets of the run, else within each
    """

    out: Path
    encoding: str = "utf-8-sig"
    max_bad: float = 0.01
    skip: tuple[str, ...] = ()
    evaluation: tuple[Path, ...] = ()
    dedup: DedupConfig | None = field(default_factory=DedupConfig)
    dedup_across: bool = False
    keep_work: bool = True
    job_bytes: int = raw.JOB_BYTES
    engine: Engine = "serial"
    workers: int = 1


@dataclass
class Making:
    """A set on its way through the stages."""

    raw: RawSet
    cfg: PipelineConfig
    raw_key: str
    key: str
    seconds: dict[str, float] = field(default_factory=dict)
    notes: dict[str, dict] = field(default_factory=dict)  # what stages say beyond their counts
    read: list[dict] = field(default_factory=list)  # counts of the clean jobs
    shards: list[Path] = field(default_factory=list)  # clean rows
    first_ids: list[int] = field(default_factory=list)  # of each shard's job

    @property
    def name(self) -> str:
        return self.raw.data_set.name

    @property
    def work(self) -> Path:
        return self.cfg.out / "work" / self.name

    @property
    def target(self) -> Path:
        return self.cfg.out / "clean" / self.name

    def official(self) -> tuple[str, ...]:
        """The parts that the publisher fixed."""
        return tuple(sorted({part for counts in self.read for part in counts["official"]}))

    def held_out(self) -> bool:
        """Whether the publisher holds rows out."""
        return bool({"val", "test"} & set(self.official()))


def put_together(making: Making, made: list[tuple[Job, dict]]) -> None:
    """Number the shards through, join the small held-out parts, swap the set in."""
    fresh = making.target.with_name(f"tmp-{making.name}")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    sizes = {name: Counter(rows=0, chars=0, shards=0) for name in SPLITS}
    try:
        for job, count in made:
            for name in SPLITS:
                if count["parts"][name]["rows"]:
                    source = job.target.with_name(f"{job.target.name}.{name}.jsonl")
                    _append(fresh, name, source, sizes[name], count["parts"][name])
        if making.raw.data_set.shares.get("val") and not sizes["val"]["rows"]:
            _hold_out(fresh, sizes)
        counts = _counts(making, [count for _, count in made], sizes)
        text = json.dumps(counts, ensure_ascii=False, indent=1) + "\n"
        write_whole(fresh / "counts.json", text)
        _swap(fresh, making.target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(making.work / "rows" if making.cfg.keep_work else making.work, ignore_errors=True)


def _hold_out(fresh: Path, sizes: dict[str, Counter]) -> None:
    """Give a small set, of whose rows no hash is small enough, one entry to validate with: that of
    the smallest hash. Nothing happens to a set of a single entry."""
    train, val = fresh / "train-00000.jsonl", fresh / "val-00000.jsonl"
    lines = train.read_bytes().splitlines(keepends=True) if sizes["train"]["shards"] == 1 else []
    entries = [TAIL.sub("", json.loads(line)["id"]) for line in lines]
    if len(set(entries)) < 2:
        return
    held = min(entries, key=share_of)
    for path, name in ((train, "train"), (val, "val")):
        kept = [line for line, entry in zip(lines, entries, strict=True)
                if (entry == held) == (name == "val")]  # fmt: skip
        path.write_bytes(b"".join(kept))
        n_chars = sum(len(text) for line in kept for text in texts(json.loads(line)))
        sizes[name].update({key: -n for key, n in sizes[name].items()})
        sizes[name].update(rows=len(kept), chars=n_chars, shards=1)


def _append(fresh: Path, name: str, source: Path, size: Counter, count: dict) -> None:
    """Put a shard's rows into the set: as a file of their own, or behind the file before."""
    last = fresh / f"{name}-{size['shards'] - 1:05d}.jsonl"
    fits = size["shards"] and last.stat().st_size + source.stat().st_size < raw.JOB_BYTES
    size.update(count | {"shards": 0 if fits else 1})
    path = last if fits else fresh / f"{name}-{size['shards'] - 1:05d}.jsonl"
    with open(path, "ab") as out, open(source, "rb") as rows:
        shutil.copyfileobj(rows, out)
        out.flush()
        os.fsync(out.fileno())


def _counts(making: Making, written: list[dict], sizes: dict[str, Counter]) -> dict:
    """What counts.json says. It depends on the input and the settings alone."""
    by_stage = {stage: merged(c[stage] for c in making.read) for stage in ("read", "clean")}
    for stage in STAGES[2:]:
        if stage in written[0]["stages"]:
            by_stage[stage] = merged(count["stages"][stage] for count in written)
    dropped = {r: found for counts in by_stage.values() for r, found in counts["dropped"].items()}
    data_set = making.raw.data_set
    return {
        "set": data_set.name,
        "reader": data_set.reader,
        "kind": data_set.kind,
        "source": str(data_set.source),
        "license": data_set.license,
        "rows_in": by_stage["read"]["rows_in"],
        "chars_in": by_stage["read"]["chars_in"],
        "rows_out": by_stage["write"]["rows_out"],
        "chars_out": by_stage["write"]["chars_out"],
        "parts": sizes,
        "fixed": by_stage["clean"]["fixed"],
        "dropped": dict(sorted(dropped.items(), key=lambda item: -item[1]["rows"])),
        "stages": by_stage,
        "notes": making.notes,
        "leaks": [row_id for count in written for row_id in count["leaks"]],
        "inputs": {name: digest for c in making.read for name, digest in c["inputs"].items()},
        "key": making.key,
    }


def timing_of(making: Making) -> dict:
    """Seconds of each stage (of all sets of the run together), and its rate."""
    counts = json.loads((making.target / "counts.json").read_text(encoding="utf-8"))
    rows = {name: counts["stages"][name]["rows_in"] for name in STAGES if name in counts["stages"]}
    return {
        "engine": making.cfg.engine,
        "workers": making.cfg.workers,
        "stages": {
            name: {"seconds": seconds, "rows_per_s": round(rows[name] / max(seconds, 1e-3), 1)}
            for name, seconds in making.seconds.items()
            if name in rows
        },
    }


def old_counts(target: Path, key: str) -> dict | None:
    try:
        counts = json.loads((target / "counts.json").read_text(encoding="utf-8"))
        names = [f"{s}-{n:05d}.jsonl" for s in SPLITS for n in range(counts["parts"][s]["shards"])]
        whole = counts["key"] == key and all((target / name).is_file() for name in names)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return counts if whole else None


def _swap(fresh: Path, target: Path) -> None:
    """Put a finished directory in the place of an old one, with no moment without either."""
    old = target.with_name(f"old-{target.name}")
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def finish_swap(target: Path) -> None:
    """Undo or clear away what a run left that was killed between the two renames."""
    old = target.with_name(f"old-{target.name}")
    if old.exists() and not target.exists():
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)


OWN_CODE = Path(__file__)
READ_CODE = (*(Path(m.__file__) for m in (clean, raw, rows)), OWN_CODE)
LATER_CODE = (*(Path(m.__file__) for m in (decontaminate, dedup)), OWN_CODE)
SIGN_CODE = (Path(dedup.__file__),)

# For each clean shard: stage, the function that loads its list, and the list's place.
Drops = dict[Path, list[tuple[str, Callable, Path]]]


def raw_place(data_set: DataSet, place: Path | None) -> Path:
    """Where the raw files of a set lie: the given place, a package, or data/raw/<set>.

    raises: DataError that says where to get them
    """
    if data_set.package and not place:
        return package_dir(*data_set.package)
    place = from_repo(place or Path("data/raw") / data_set.name)
    if not place.exists():
        raise DataError(
            f"wanted the raw files of {data_set.name} in {shown(place)}, found no such place; get "
            f"them with `python -m data_process.fetch {data_set.reader}` ({data_set.source}), or "
            f"say where they are with --raw"
        )
    return place


def make_clean(sets: list[RawSet], cfg: PipelineConfig) -> list[tuple[dict, bool]]:
    """counts.json of each set once its rows stand; and whether they stood before."""
    raw_keys = [_raw_key(raw_set, cfg) for raw_set in sets]
    evaluation = [_identity(path) for path in cfg.evaluation]
    settings = (cfg.dedup, cfg.dedup_across, cfg.max_bad, evaluation)
    later = key_of(*LATER_CODE, *settings, *raw_keys)
    all_sets = [
        Making(raw_set, cfg, key, key_of(key, later))
        for raw_set, key in zip(sets, raw_keys, strict=True)
    ]
    for making in all_sets:
        finish_swap(making.target)
    old = {making.name: old_counts(making.target, making.key) for making in all_sets}
    fresh = [making for making in all_sets if not old[making.name]]
    if fresh:
        # All sets of the run: the held-out rows of one concern the others.
        _make(all_sets, {making.name for making in fresh})
    return [
        (old[m.name] or json.loads((m.target / "counts.json").read_text("utf-8")),
         old[m.name] is not None)
        for m in all_sets
    ]  # fmt: skip


def _raw_key(raw_set: RawSet, cfg: PipelineConfig) -> str:
    """Changes when the raw files, the reader, or the settings of cleaning do."""
    data_set = raw_set.data_set
    files = [_identity(part) for part in raw.data_files(raw_set.place)]
    settings = (data_set.name, raw_set.official, cfg.encoding, cfg.skip, cfg.job_bytes)
    return key_of(*READ_CODE, *data_set.code(), *settings, files)


def _identity(path: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return str(path), stat.st_size, stat.st_mtime_ns


def _make(all_sets: list[Making], wanted: set[str]) -> None:
    cfg = all_sets[0].cfg
    with _timed("clean", all_sets):
        _clean(all_sets)
    for making in all_sets:
        _refuse_damaged(making)
    drops: Drops = defaultdict(list)
    # Rows about pictures say the same words of different pictures.
    of_text = [making for making in all_sets if making.raw.data_set.kind != "vqa"]
    if cfg.dedup and of_text:
        with _timed("dedup", all_sets):
            _dedup(of_text, cfg.dedup, drops)
    if of_text:
        with _timed("decontaminate", all_sets):
            _decontaminate(of_text, drops)
    fresh = [making for making in all_sets if making.name in wanted]
    with _timed("write", all_sets):
        _write(fresh, drops)
    for making in fresh:
        timing = json.dumps(timing_of(making), indent=1) + "\n"
        write_whole(making.target / "timing.json", timing)


@contextmanager
def _timed(stage: str, all_sets: list[Making]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    for making in all_sets:
        making.seconds[stage] = round(time.perf_counter() - start, 3)


def _run(cfg: PipelineConfig, function: Callable, jobs: list[Job], title: str) -> list[dict]:
    def show(done: Iterator[Job], n: int) -> Iterator[Job]:
        return tqdm(done, title, n, unit=" shards", disable=None if n else True)

    return run_shards(function, jobs, cfg.engine, cfg.workers, show)


def _clean(all_sets: list[Making]) -> None:
    """Read and clean all sets; their shards and counts stand afterwards."""
    cfg, jobs, owners = all_sets[0].cfg, [], []
    for making in all_sets:
        data_set, place = making.raw.data_set, making.raw.place
        settings = CleanConfig(
            data_set.reader, making.name, cfg.encoding, place, making.raw.official, cfg.skip
        )
        plan = making.work / "plan"
        plan.mkdir(parents=True, exist_ok=True)
        for number, job in enumerate(raw.divide(place, data_set, cfg.encoding, cfg.job_bytes)):
            path = plan / f"{number:05d}.json"
            path.write_text(raw.to_json(job), encoding="utf-8")
            target = making.work / "clean" / path.stem
            jobs.append(Job(path, target, key_of(making.raw_key, number), settings))
            owners.append(making)
    counts = _run(cfg, clean_shard, jobs, "read and clean")
    next_id: Counter[str] = Counter()
    for making, job, count in zip(owners, jobs, counts, strict=True):
        names = [f"{job.target.name}-{n:03d}.jsonl" for n in range(count["shards"])]
        making.read.append(count)
        making.shards += [job.target.parent / name for name in names]
        making.first_ids += [next_id[making.name]] * len(names)
        next_id[making.name] += count["entries"]


def _refuse_damaged(making: Making) -> None:
    data_set, max_bad = making.raw.data_set, making.cfg.max_bad
    place = shown(making.raw.place)
    read, clean_counts = (merged(c[stage] for c in making.read) for stage in ("read", "clean"))
    n_broken = sum(counts["n_broken"] for counts in making.read)
    if n_broken > max_bad * read["rows_in"]:
        broken = [text for counts in making.read for text in counts["broken"]][:N_BROKEN]
        raise DataError(
            f"{place}: wanted at most {max_bad:.2%} damaged lines for {data_set.name}, "
            f"found {n_broken} of {read['rows_in']}: {'; '.join(broken)}; "
            f"download the files again, or accept the loss with a larger --max_bad"
        )
    if not clean_counts["rows_out"]:
        dropped = read["dropped"] | clean_counts["dropped"]
        reasons = ", ".join(f"{name} {found['rows']}" for name, found in dropped.items())
        raise DataError(
            f"{place}: wanted rows for {data_set.name}, found none that can be kept among "
            f"{read['rows_in']} ({reasons or 'the files are empty'}); look at the files, "
            f"or choose another reader"
        )


def _dedup(all_sets: list[Making], settings: DedupConfig, drops: Drops) -> None:
    cfg, jobs = all_sets[0].cfg, []
    sign_key = key_of(*SIGN_CODE, settings.bands, settings.band_rows)
    for making in all_sets:
        for shard in making.shards:
            key = key_of(_done_key(shard), sign_key)
            jobs.append(Job(shard, making.work / "signatures" / shard.stem, key, settings))
    _run(cfg, sign_shard, jobs, "sign")
    keys = {job.source: job.key for job in jobs}
    # Sets with held-out rows first: these stay, and their copies elsewhere go.
    ordered = sorted(all_sets, key=lambda making: not making.held_out())
    groups = [ordered] if cfg.dedup_across else [[making] for making in all_sets]
    for group in groups:
        signed = [(shard, m.work / "signatures" / shard.stem) for m in group for shard in m.shards]
        directory = group[0].work / ("repeats-across" if cfg.dedup_across else "repeats")
        key = key_of(settings, *LATER_CODE, *(keys[shard] for shard, _ in signed))
        for shard, place in dedup_shards(signed, directory, settings, key).items():
            drops[shard].append(("dedup", load_drops, place))
        done = json.loads((directory / "done.json").read_text(encoding="utf-8"))
        for making in group:
            making.notes["dedup"] = done["counts"]


def _decontaminate(all_sets: list[Making], drops: Drops) -> None:
    cfg = all_sets[0].cfg
    held_out = [
        shard for making in all_sets if making.held_out() for shard in making.shards
    ]  # fmt: skip
    windows_path = make_windows(cfg.evaluation, held_out, cfg.out / "work" / "windows")
    if not windows_path:
        return
    settings = FlagConfig(windows_path)
    jobs = []
    for making in all_sets:
        for shard in making.shards:
            key = key_of(_done_key(shard), windows_path.name)
            jobs.append(Job(shard, making.work / "flags" / shard.stem, key, settings))
    _run(cfg, flag_shard, jobs, "decontaminate")
    notes = json.loads(windows_path.with_suffix(".json").read_text(encoding="utf-8"))
    for making in all_sets:
        making.notes["evaluation"] = notes
    for job in jobs:
        drops[job.source].append(("decontaminate", load_flags, job.target))


def _done_key(shard: Path) -> str:
    """The key of the job that made a clean shard."""
    done = shard.with_name(f"{shard.stem.rsplit('-', 1)[0]}.done")
    return json.loads(done.read_text(encoding="utf-8"))["key"] + shard.stem


def _write(fresh: list[Making], drops: Drops) -> None:
    jobs, owners = [], []
    for making in fresh:
        shutil.rmtree(making.work / "rows", ignore_errors=True)
        data_set = making.raw.data_set
        for n, shard in enumerate(making.shards):
            settings = WriteConfig(
                data_set.reader,
                making.name,
                making.first_ids[n],
                making.official(),
                tuple(drops[shard]),
            )
            jobs.append(Job(shard, making.work / "rows" / f"{n:05d}", making.key, settings))
            owners.append(making)
    counts = _run(fresh[0].cfg, write_shard, jobs, "write")
    for making in fresh:
        mine = [
            (job, count)
            for job, count, owner in zip(jobs, counts, owners, strict=True)
            if owner is making
        ]
        put_together(making, mine)
