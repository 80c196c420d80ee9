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
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    minhash,
    near_duplicates,
    parts,
    raw,
    signatures,
    split,
    stages,
    windows,
)
from data_process.assemble import (
    Making,
    PipelineConfig,
    RawSet,
    finish_swap,
    old_counts,
    put_together,
    timing_of,
)
from data_process.decontaminate import FlagConfig, flag_shard, load_flags, make_windows
from data_process.executor import Job, key_of, run_shards, write_whole
from data_process.near_duplicates import DedupConfig, dedup_shards, load_drops, sign_shard
from data_process.packages import package_dir
from data_process.registry import DataSet
from data_process.stages import CleanConfig, WriteConfig, clean_shard, write_shard
from data_process.tally import merged

READ_CODE = tuple(Path(m.__file__) for m in (clean, clean_web, layouts, parts, raw, stages))
LATER = (decontaminate, dedup, minhash, near_duplicates, signatures, split, stages, windows)
LATER_CODE = tuple(Path(m.__file__) for m in LATER)
SIGN_CODE = tuple(Path(m.__file__) for m in (dedup, minhash, signatures))


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
