"""From raw files to a set of clean rows, stage by stage, each in shards.

    read, clean    raw parts → data/work/<set>/clean           (stages.py)
    dedup          → which rows repeat                          (dedup.py)
    decontaminate  → which rows share text with an evaluation   (decontaminate.py)
    write          → train, val and test rows, then data/clean/<set>, replaced as a whole

Several sets of one run go through each stage together: the held-out rows that their publishers
fixed are protected against all of them. A killed run continues with the shards that are missing;
a changed setting redoes the stages that it touches. counts.json says what each stage did, with
reasons and examples, and depends on the input and the settings alone.
"""

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from babyllama import rows
from babyllama.config import atomic_dir, from_repo, recover_dir, shown
from babyllama.errors import ConfigError, DataError
from babyllama.language import letters
from data_process import clean, columns, decontaminate, dedup, formats, raw, registry, stages
from data_process.decontaminate import flag_shard, make_windows
from data_process.dedup import BANDS, HELD_OUT, FindConfig, drops_path, find_duplicates, sign_shard
from data_process.executor import Engine, Job, ShardFunction, key_of, run_shards, write_whole
from data_process.registry import DataSet, package_dir
from data_process.stages import (
    SPLITS,
    TAIL,
    CleanConfig,
    RawSet,
    WriteConfig,
    clean_shard,
    merged,
    share_of,
    size_of,
    write_shard,
)

STAGES = ("read", "clean", "dedup", "decontaminate", "write")


@dataclass(frozen=True)
class SetConfig:
    """One set of a mixture.

    Args:
        reader: name of the reader, see python -m data_process.tools.list
        name: what the set is called, if not as its reader
        raw: directory or file with its raw data, below --raw, else below the repository
        weight: how often each row is seen in an epoch of the mixture
        official: keep the publisher's train, validation and test parts; else split by hash
    """

    reader: str
    name: str | None = None
    raw: Path | None = None
    weight: float = 1.0
    official: bool | None = None


@dataclass(frozen=True)
class ProcessConfig:
    """Settings of data_process.run.

    Args:
        dataset: name of a set or a group (sample), python -m data_process.tools.list shows all; or
            of a set that was made before, to be made again
        name: what the set is called, if not as its reader
        raw: directory or file with the raw data (default data/raw/<set>)
        out: root of clean/, tokens/, mixtures/, index/ and work/
        tokenizer: a SentencePiece .model; with it token files are made too
        index: make a full-text index of each set too (babyllama/retrieval), for sets of texts
        official: keep the publisher's train, validation and test parts; else split by hash
        columns: which column has which role, where the usual names do not fit: --columns.text body
        roles: who speaks under a name that is not known: --roles.narrator user
        sets: several sets that are made together and become a mixture
        mixture: name of the mixture's file in mixtures/
        evaluation: files whose text must not be trained on: texts of any kind, or .u64 lists
        dedup: Jaccard similarity of two rows from which the later one goes as a copy; null: off
        dedup_across: look for repeats across the sets, not only within each
        skip_rules: names of fixes and rules (see counts.json) to leave out
        engine: serial, processes for several at once, or ray for a running Ray cluster
        workers: number of processes
        max_bad: the share of damaged lines above which the set is refused
        encoding: of the raw files
    """

    dataset: str = ""
    name: str | None = None
    raw: Path | None = None
    out: Path = Path("data")
    tokenizer: Path | None = None
    index: bool = False
    official: bool | None = None
    columns: dict[str, str] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    sets: tuple[SetConfig, ...] = ()
    mixture: str | None = None
    evaluation: tuple[Path, ...] = ()
    dedup: float | None = 0.8
    dedup_across: bool = False
    skip_rules: tuple[str, ...] = ()
    engine: Engine = "serial"
    workers: int = 2
    max_bad: float = 0.01
    encoding: str = "utf-8-sig"


@dataclass(eq=False)
class Making:
    """A set on its way through the stages."""

    raw: RawSet
    cfg: ProcessConfig
    raw_key: str
    key: str
    notes: dict[str, dict] = field(default_factory=dict)  # what stages say beyond their counts
    read: list[dict] = field(default_factory=list)  # counts of the clean jobs
    shards: list[Path] = field(default_factory=list)  # clean rows
    first_ids: list[int] = field(default_factory=list)  # of each shard's job

    @property
    def name(self) -> str:
        return self.raw.data_set.name

    @property
    def work(self) -> Path:
        return from_repo(self.cfg.out) / "work" / self.name

    @property
    def target(self) -> Path:
        return from_repo(self.cfg.out) / "clean" / self.name

    def official(self) -> tuple[str, ...]:
        """The parts that the publisher fixed."""
        return tuple(sorted({part for counts in self.read for part in counts["official"]}))

    def held_out(self) -> bool:
        """True if the publisher holds rows out."""
        return bool({*HELD_OUT} & {*self.official()})


def put_together(making: Making, made: list[tuple[Job, dict]]) -> None:
    """Number the shards through, join the small held-out parts, swap the set in."""
    sizes = {name: Counter(rows=0, chars=0, shards=0) for name in SPLITS}
    with atomic_dir(making.target) as fresh:
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
    shutil.rmtree(making.work / "rows", ignore_errors=True)


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
        n_chars = sum(size_of(json.loads(line)) for line in kept)
        sizes[name] = Counter(rows=len(kept), chars=n_chars, shards=1)


def _append(fresh: Path, name: str, source: Path, size: Counter, count: dict) -> None:
    """Put a shard's rows into the set: as a file of their own, or behind the file before."""
    last = fresh / f"{name}-{size['shards'] - 1:05d}.jsonl"
    fits = size["shards"] and last.stat().st_size + source.stat().st_size < raw.JOB_BYTES
    size.update(count | {"shards": 0 if fits else 1})
    path = last if fits else fresh / f"{name}-{size['shards'] - 1:05d}.jsonl"
    with open(path, "ab") as out, open(source, "rb") as rows:
        shutil.copyfileobj(rows, out)


def _counts(making: Making, written: list[dict], sizes: dict[str, Counter]) -> dict:
    """What counts.json says. It depends on the input and the settings alone."""
    by_stage = {stage: merged(c[stage] for c in making.read) for stage in ("read", "clean")}
    for stage in STAGES[2:]:
        if stage in written[0]["stages"]:
            by_stage[stage] = merged(count["stages"][stage] for count in written)
    dropped = {r: found for counts in by_stage.values() for r, found in counts["dropped"].items()}
    data_set = making.raw.data_set
    unused: dict[str, dict] = {}
    for column, seen in (item for c in making.read for item in c["unused"].items()):
        total = unused.setdefault(column, seen | {"rows": 0})
        total["rows"] += seen["rows"]
    return {
        "set": data_set.name,
        "reader": data_set.entry,
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
        "unused": unused,
        "left_alone": [path.name for path in _raw_files(making.raw)[1]],
        "leaks": [row_id for count in written for row_id in count["leaks"]],
        "inputs": {name: digest for c in making.read for name, digest in c["inputs"].items()},
        "key": making.key,
    }


def old_counts(target: Path, key: str) -> dict | None:
    try:
        counts = json.loads((target / "counts.json").read_text(encoding="utf-8"))
        names = [f"{s}-{n:05d}.jsonl" for s in SPLITS for n in range(counts["parts"][s]["shards"])]
        whole = counts["key"] == key and all((target / name).is_file() for name in names)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return counts if whole else None


READING = (clean, columns, formats, letters, raw, registry, rows, stages)
READ_CODE = (clean.WORDS, *(Path(m.__file__ or "") for m in READING))
LATER_CODE = (*(Path(m.__file__ or "") for m in (decontaminate, dedup, stages)), Path(__file__))
SIGN_CODE = (Path(dedup.__file__ or ""),)

# For each clean shard: stage, and the list of its rows that go.
Drops = dict[Path, list[tuple[str, Path]]]


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
            f"them with `python -m data_process.fetch {data_set.entry}` ({data_set.source}), or "
            f"say where they are with --raw"
        )
    return place


def make_clean(sets: list[RawSet], cfg: ProcessConfig) -> list[tuple[dict, bool]]:
    """counts.json of each set once its rows stand; and whether they stood before."""
    raw_keys = [_raw_key(raw_set, cfg) for raw_set in sets]
    evaluation = [_identity(path) for path in map(from_repo, cfg.evaluation)]
    settings = (cfg.dedup, cfg.dedup_across, cfg.max_bad, evaluation)
    later = key_of(*LATER_CODE, *settings, *raw_keys)
    all_sets = [
        Making(raw_set, cfg, key, key_of(key, later))
        for raw_set, key in zip(sets, raw_keys, strict=True)
    ]
    for making in all_sets:
        recover_dir(making.target)
    old = {making: old_counts(making.target, making.key) for making in all_sets}
    if fresh := [making for making, counts in old.items() if not counts]:
        # All sets of the run: the held-out rows of one concern the others.
        _make(all_sets, fresh)
    return [
        (counts or json.loads((making.target / "counts.json").read_text("utf-8")), bool(counts))
        for making, counts in old.items()
    ]


def _raw_key(raw_set: RawSet, cfg: ProcessConfig) -> str:
    """Changes when the raw files, the reader, or the settings of cleaning do."""
    data_set = raw_set.data_set
    files = [_identity(path) for path in _raw_files(raw_set)[0]]
    settings = (raw_set.official, dict(raw_set.columns), dict(raw_set.roles), cfg.encoding)
    skip = sorted(set(cfg.skip_rules))
    return key_of(*READ_CODE, *data_set.key(), *settings, skip, raw.JOB_BYTES, files)


def _raw_files(raw_set: RawSet) -> tuple[list[Path], list[Path]]:
    """The files that a set is made of, and those that are left alone."""
    if raw_set.data_set.reads_dir:
        return sorted(path for path in raw_set.place.rglob("*") if path.is_file()), []
    return raw.sorted_files(raw_set.place, raw_set.data_set.inputs)


def _identity(path: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return str(path), stat.st_size, stat.st_mtime_ns


def _make(all_sets: list[Making], wanted: list[Making]) -> None:
    cfg = all_sets[0].cfg
    _clean(all_sets)
    for making in all_sets:
        _refuse_damaged(making)
    drops: Drops = defaultdict(list)
    # Rows about images say the same words of different images.
    of_text = [making for making in all_sets if making.raw.data_set.kind != "vqa"]
    if cfg.dedup and of_text:
        _dedup(of_text, cfg.dedup, drops)
    if of_text:
        _decontaminate(of_text, drops)
    _write(wanted, drops)


Jobs = dict[Making, list[Job]]
Key = TypeVar("Key")


def run_sets(
    function: ShardFunction, jobs: Mapping[Key, list[Job]], cfg: ProcessConfig, title: str
) -> dict[Key, list[tuple[Job, dict]]]:
    """Do the jobs of all sets; for each set its jobs and what these counted."""
    counts = iter(run_shards(function, [*chain(*jobs.values())], cfg.engine, cfg.workers, title))
    return {key: [(job, next(counts)) for job in its_jobs] for key, its_jobs in jobs.items()}


def _clean(all_sets: list[Making]) -> None:
    """Read and clean all sets; their shards and counts stand afterwards."""
    jobs: Jobs = {}
    for making in all_sets:
        made, cfg = making.raw, making.cfg
        jobs[making] = [
            Job(made.place, making.work / "clean" / f"{number:05d}", key_of(making.raw_key, number),
                CleanConfig(made, tuple(parts), cfg.encoding, cfg.skip_rules))
            for number, parts in enumerate(_jobs(made, cfg))
        ]  # fmt: skip
    for making, done in run_sets(clean_shard, jobs, all_sets[0].cfg, "read and clean").items():
        n_entries = 0
        for job, count in done:
            making.read.append(count)
            for n in range(count["shards"]):
                making.shards.append(job.target.with_name(f"{job.target.name}-{n:03d}.jsonl"))
                making.first_ids.append(n_entries)
            n_entries += count["entries"]


def _jobs(made: RawSet, cfg: ProcessConfig) -> list[list[raw.Part]]:
    """The raw parts of a set, by job."""
    data_set = made.data_set
    if data_set.reads_dir:
        return [[]]
    files = raw.whole_files(made.place, data_set.inputs)
    known = columns.known() | {name.lower() for name in made.columns.values()}
    cuts = (cfg.encoding, data_set.layout, raw.JOB_BYTES, known, data_set.split_files)
    return [files] if data_set.whole else raw.divide(files, *cuts)


def _refuse_damaged(making: Making) -> None:
    """Refuse a set with too much damage, without rows, or without rows to train on."""
    data_set, max_bad = making.raw.data_set, making.cfg.max_bad
    place = shown(making.raw.place)
    read, clean_counts = (merged(c[stage] for c in making.read) for stage in ("read", "clean"))
    n_broken = sum(counts["n_broken"] for counts in making.read)
    if n_broken > max_bad * read["rows_in"]:
        broken = [text for counts in making.read for text in counts["broken"]][: stages.N_BROKEN]
        raise DataError(
            f"{place}: wanted at most {max_bad:.2%} damaged lines for {data_set.name}, "
            f"found {n_broken} of {read['rows_in']}: {'; '.join(broken)}; correct the files or "
            f"download them again, or accept the loss with a larger --max_bad"
        )
    n_kept = clean_counts["rows_out"]
    if not n_kept:
        dropped = read["dropped"] | clean_counts["dropped"]
        reasons = ", ".join(
            f"{name} {found['rows']}" + (f": {found['why']}" if "why" in found else "")
            for name, found in dropped.items()
        )
        raise DataError(
            f"{place}: wanted rows for {data_set.name}, found none that can be kept among "
            f"{read['rows_in']} ({reasons or 'the files are empty'}); look at the files, or read "
            f"them as instruction, conversations, passages, pairs, text or lines"
        )
    held_out = sum(counts["official"].get(part, 0) for counts in making.read for part in HELD_OUT)
    if making.raw.official is None and held_out >= n_kept:
        raise ConfigError(
            f"{place}: all {n_kept} rows of {data_set.name} are of files called test or dev, so "
            f"none is left to train on; take them as training rows with --official false, or make "
            f"a set of held-out rows with --official true"
        )


def _dedup(all_sets: list[Making], threshold: float, drops: Drops) -> None:
    cfg = all_sets[0].cfg
    jobs = _of_shards(all_sets, "signatures", key_of(*SIGN_CODE), BANDS)
    run_sets(sign_shard, jobs, cfg, "sign")
    # Sets with held-out rows first: these stay, and their copies elsewhere go.
    ordered = sorted(all_sets, key=lambda making: not making.held_out())
    groups = [ordered] if cfg.dedup_across else [[making] for making in all_sets]
    for group in groups:
        signed = [job for making in group for job in jobs[making]]
        target = group[0].work / ("repeats-across" if cfg.dedup_across else "repeats") / "drops"
        key = key_of(threshold, *LATER_CODE, *(job.key for job in signed))
        settings = FindConfig(tuple((job.source, job.target) for job in signed), threshold)
        job = Job(signed[0].source, target, key, settings)
        (counts,) = run_shards(find_duplicates, [job], title="find copies")
        for number, job in enumerate(signed):
            drops[job.source].append(("dedup", drops_path(target, number)))
        for making in group:
            making.notes["dedup"] = counts


def _decontaminate(all_sets: list[Making], drops: Drops) -> None:
    cfg = all_sets[0].cfg
    held_out = [shard for making in all_sets if making.held_out() for shard in making.shards]
    evaluation, place = [*map(from_repo, cfg.evaluation)], from_repo(cfg.out) / "work/windows"
    if not (made := make_windows(evaluation, held_out, place)):
        return
    windows_path, notes = made
    jobs = _of_shards(all_sets, "flags", windows_path.name, windows_path)
    run_sets(flag_shard, jobs, cfg, "decontaminate")
    for making, its_jobs in jobs.items():
        making.notes["evaluation"] = notes
        for job in its_jobs:
            drops[job.source].append(("decontaminate", drops_path(job.target)))


def _of_shards(all_sets: list[Making], place: str, key: str, settings: Any) -> Jobs:
    """A job for each clean shard, done again when the shard is, or the key changes."""
    jobs: Jobs = {making: [] for making in all_sets}
    for making, its_jobs in jobs.items():
        for shard in making.shards:
            done = shard.with_name(f"{shard.stem.rsplit('-', 1)[0]}.done")
            made_by = json.loads(done.read_text(encoding="utf-8"))["key"] + shard.stem
            target = making.work / place / shard.stem
            its_jobs.append(Job(shard, target, key_of(made_by, key), settings))
    return jobs


def _write(fresh: list[Making], drops: Drops) -> None:
    jobs: Jobs = {}
    for making in fresh:
        shutil.rmtree(making.work / "rows", ignore_errors=True)
        official, numbered = making.official(), zip(making.shards, making.first_ids, strict=True)
        jobs[making] = [
            Job(shard, making.work / "rows" / f"{n:05d}", making.key,
                WriteConfig(making.raw.data_set, first_id, official, tuple(drops[shard])))
            for n, (shard, first_id) in enumerate(numbered)
        ]  # fmt: skip
    for making, done in run_sets(write_shard, jobs, fresh[0].cfg, "write").items():
        put_together(making, done)
