"""Runs one function over many shards: in this process, or in several.

A shard job is `function(in_path, out_path, cfg) -> Counts`. It is done when its `.done` file holds
the job's key; a run that was killed so continues where it stopped, and a job whose input or
settings changed is done again. Another engine (a cluster) is one more function in ENGINES.
"""

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from babyllama.errors import DataError

Counts = dict[str, int]
ShardFunction = Callable[[Path, Path, Any], Counts]


@dataclass(frozen=True)
class Job:
    """One shard to be made.

    target: stem of the output; `.done` and the suffixes in `makes` are put behind it
    key: stands for everything that decides the output's bytes
    """

    source: Path
    target: Path
    makes: tuple[str, ...]
    key: str

    @property
    def done_path(self) -> Path:
        return self.target.with_name(self.target.name + ".done")

    def counts(self) -> Counts | None:
        """What the job counted, if it is done and its files are there."""
        made = [self.target.with_name(self.target.name + suffix) for suffix in self.makes]
        if not self.done_path.is_file() or not all(path.is_file() for path in made):
            return None
        try:
            done = json.loads(self.done_path.read_text())
            return done["counts"] if done["key"] == self.key else None
        except (ValueError, TypeError, KeyError):
            return None


def file_key(path: Path, *settings: object) -> str:
    """A key that changes when a file's bytes or the settings do."""
    with open(path, "rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(json.dumps([content, *map(str, settings)]).encode()).hexdigest()


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    temporary = path.with_name(f"tmp-{path.name}")
    with open(temporary, "wb") as file:
        # Samples of damaged lines may hold bytes that are no UTF-8.
        file.write(text.encode("utf-8", "backslashreplace"))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _one(function: ShardFunction, job: Job, cfg: Any) -> Counts:
    job.done_path.unlink(missing_ok=True)
    counts = function(job.source, job.target, cfg)
    write_whole(job.done_path, json.dumps({"key": job.key, "counts": counts}))
    return counts


def serial(function: ShardFunction, jobs: list[Job], cfg: Any, workers: int) -> Iterator[Job]:
    """One after the other, in this process."""
    for job in jobs:
        _one(function, job, cfg)
        yield job


def processes(function: ShardFunction, jobs: list[Job], cfg: Any, workers: int) -> Iterator[Job]:
    """Several at once on this machine."""
    # spawn: the same on every system, and no copy of this process's threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context) as pool:
        futures = {pool.submit(_one, function, job, cfg): job for job in jobs}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BrokenProcessPool:
            raise DataError(
                f"wanted {len(jobs)} shards, but a worker process was killed (memory?); start "
                f"the same command again, with fewer --workers: finished shards are kept"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


ENGINES = {"serial": serial, "processes": processes}


def run_shards(
    function: ShardFunction,
    jobs: list[Job],
    cfg: Any,
    engine: str = "serial",
    workers: int = 1,
    show: Callable[[Iterable[Job], int], Iterable[Job]] = lambda jobs, n: jobs,
) -> list[Counts]:
    """Do the jobs that are not done; the counts of all, in order.

    show: wraps the finished jobs and their number, e.g. in a progress bar
    """
    todo = [job for job in jobs if job.counts() is None]
    for _ in show(ENGINES[engine](function, todo, cfg, workers) if todo else (), len(todo)):
        pass
    counts = [job.counts() for job in jobs]
    missing = [str(job.target) for job, count in zip(jobs, counts, strict=True) if count is None]
    assert not missing, missing
    return counts
