"""A set on its way: its settings, what its stages said, and how the finished rows take their place.

data/clean/<set> is replaced as a whole: the rows' shards, numbered through, and counts.json, which
depends on the input and the settings alone. timing.json beside it says how long the stages took.
"""

import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from data_process import parts
from data_process.executor import Engine, Job, write_whole
from data_process.minhash import DedupConfig
from data_process.registry import DataSet
from data_process.split import SPLITS
from data_process.tally import merged

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
    job_bytes: int = parts.JOB_BYTES
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
        counts = _counts(making, [count for _, count in made], sizes)
        text = json.dumps(counts, ensure_ascii=False, indent=1) + "\n"
        write_whole(fresh / "counts.json", text)
        _swap(fresh, making.target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(making.work / "rows" if making.cfg.keep_work else making.work, ignore_errors=True)


def _append(fresh: Path, name: str, source: Path, size: Counter, count: dict) -> None:
    """Put a shard's rows into the set: as a file of their own, or behind the file before."""
    last = fresh / f"{name}-{size['shards'] - 1:05d}.jsonl"
    fits = size["shards"] and last.stat().st_size + source.stat().st_size < parts.JOB_BYTES
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
