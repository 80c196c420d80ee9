"""From raw files to a set of clean rows, stage by stage, each in shards.

    read, clean    raw parts → data/work/<set>/clean           (stages.py)
    dedup          → which rows repeat                          (near_duplicates.py)
    decontaminate  → which rows share text with an evaluation   (decontaminate.py)
    write          → train, val and test rows, then data/clean/<set>, replaced as a whole

Several sets of one run go through each stage together: the held-out rows that their publishers
fixed are protected against all of them. A killed run continues with the shards that are missing;
a changed setting redoes the stages that it touches. counts.json says what each stage did, with
reasons and examples; timing.json how long it took.
"""

import json
import os
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from babyllama.cli import from_repo, shown
from babyllama.errors import DataError
from data_process import (
    clean,
    clean_web,
    decontaminate,
    dedup,
    layouts,
    near_duplicates,
    parts,
    raw,
    split,
    stages,
)
from data_process.decontaminate import FlagConfig, flag_shard, load_flags, make_windows
from data_process.executor import Engine, Job, key_of, run_shards, write_whole
from data_process.near_duplicates import DedupConfig, dedup_shards, load_drops, sign_shard
from data_process.packages import package_dir
from data_process.registry import DataSet
from data_process.split import SPLITS
from data_process.stages import CleanConfig, WriteConfig, clean_shard, write_shard
from data_process.tally import merged

READ_CODE = tuple(Path(m.__file__) for m in (clean, clean_web, layouts, parts, raw, stages))
LATER_CODE = tuple(Path(m.__file__) for m in (near_duplicates, decontaminate, dedup, split, stages))
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


# For each clean shard: stage, the function that loads its list, and the list's place.
Drops = dict[Path, list[tuple[str, Callable, Path]]]


@dataclass
class Making:
    """A set on its way through the stages."""

    raw: RawSet
    cfg: PipelineConfig
    raw_key: str
    key: str
    seconds: dict[str, float] = field(default_factory=dict)
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
        _finish_swap(making.target)
    old = {making.name: _old_counts(making.target, making.key) for making in all_sets}
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
    if cfg.dedup:
        with _timed("dedup", all_sets):
            _dedup(all_sets, cfg.dedup, drops)
    with _timed("decontaminate", all_sets):
        _decontaminate(all_sets, drops)
    fresh = [making for making in all_sets if making.name in wanted]
    with _timed("write", all_sets):
        _write(fresh, drops)
    for making in fresh:
        timing = json.dumps(_timing(making), indent=1) + "\n"
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
        for number, job in enumerate(parts.divide(place, data_set, cfg.encoding, cfg.job_bytes)):
            path = plan / f"{number:05d}.json"
            path.write_text(parts.to_json(job), encoding="utf-8")
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
        broken = [text for counts in making.read for text in counts["broken"]][: stages.N_BROKEN]
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
    for making in all_sets:
        for shard in making.shards:
            key = key_of(_done_key(shard), settings)
            jobs.append(Job(shard, making.work / "signatures" / shard.stem, key, settings))
    _run(cfg, sign_shard, jobs, "sign")
    groups = [all_sets] if cfg.dedup_across else [[making] for making in all_sets]
    for group in groups:
        signed = [(shard, m.work / "signatures" / shard.stem) for m in group for shard in m.shards]
        directory = group[0].work / ("repeats-across" if cfg.dedup_across else "repeats")
        key = key_of(settings, *(job.key for job in jobs if (job.source, job.target) in signed))
        found = dedup_shards(signed, directory, settings, key)
        for shard, place in found.items():
            drops[shard].append(("dedup", load_drops, place))


def _decontaminate(all_sets: list[Making], drops: Drops) -> None:
    cfg = all_sets[0].cfg
    held_out = [
        shard for making in all_sets if {"val", "test"} & set(making.official())
        for shard in making.shards
    ]  # fmt: skip
    windows = make_windows(cfg.evaluation, held_out, cfg.out / "work" / "windows")
    if not windows:
        return
    settings = FlagConfig(windows)
    jobs = []
    for making in all_sets:
        for shard in making.shards:
            key = key_of(_done_key(shard), windows.name)
            jobs.append(Job(shard, making.work / "flags" / shard.stem, key, settings))
    _run(cfg, flag_shard, jobs, "decontaminate")
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
        _put_together(making, mine)


def _put_together(making: Making, made: list[tuple[Job, dict]]) -> None:
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
        "leaks": [row_id for count in written for row_id in count["leaks"]],
        "inputs": {name: digest for c in making.read for name, digest in c["inputs"].items()},
        "key": making.key,
    }


def _timing(making: Making) -> dict:
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


def _old_counts(target: Path, key: str) -> dict | None:
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


def _finish_swap(target: Path) -> None:
    """Undo or clear away what a run left that was killed between the two renames."""
    old = target.with_name(f"old-{target.name}")
    if old.exists() and not target.exists():
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)
