"""Runs one function over many shards: in this process, in several, or on a Ray cluster.

A shard job is `function(source, target, cfg) -> counts`. It writes its files behind the stem
`target` and names them in counts["files"]. It is done when its `.done` file holds the job's key
and those files have the sizes that it states; a run that was killed so continues where it
stopped, and a job whose input or settings changed is done again. Which engine ran, and with how
many workers, leaves no trace in the bytes.
"""

import hashlib
import json
import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from babyllama.config import REPO, atomic_write
from babyllama.errors import ConfigError, DataError

Engine = Literal["serial", "processes", "ray"]
Counts = dict[str, Any]  # what JSON can hold
ShardFunction = Callable[[Path, Path, Any], Counts]


@dataclass(frozen=True)
class Job:
    """One shard to be made.

    target: stem of the output; `.done` and other suffixes are put behind it
    key: stands for everything that decides the output's bytes
    cfg: third argument of the function
    """

    source: Path
    target: Path
    key: str
    cfg: Any

    @property
    def done_path(self) -> Path:
        return self.target.with_name(self.target.name + ".done")

    def counts(self) -> Counts | None:
        """What the job counted, if it is done and its files are there."""
        try:
            done = json.loads(self.done_path.read_text(encoding="utf-8"))
            sizes = {name: (self.target.parent / name).stat().st_size for name in done["sizes"]}
            return done["counts"] if (done["key"], done["sizes"]) == (self.key, sizes) else None
        except (OSError, ValueError, TypeError, KeyError):
            return None


def key_of(*settings: object) -> str:
    """A key that changes when a setting does; files (Path) stand for their bytes."""
    parts = [
        hashlib.sha256(item.read_bytes()).hexdigest() if isinstance(item, Path) else str(item)
        for item in settings
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    with atomic_write(path) as temporary:
        # Samples of damaged lines may hold bytes that are no UTF-8.
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))


def _one(function: ShardFunction, job: Job) -> None:
    job.done_path.unlink(missing_ok=True)
    counts = function(job.source, job.target, job.cfg)
    sizes = {name: (job.target.parent / name).stat().st_size for name in counts.pop("files")}
    done = {"key": job.key, "sizes": sizes, "counts": counts}
    write_whole(job.done_path, json.dumps(done, ensure_ascii=False))


def serial(function: ShardFunction, jobs: list[Job], workers: int) -> Iterator[Job]:
    """One after the other, in this process."""
    for job in jobs:
        _one(function, job)
        yield job


def processes(function: ShardFunction, jobs: list[Job], workers: int) -> Iterator[Job]:
    """Several at once on this machine."""
    # spawn: the same on every system, and no copy of this process's threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context) as pool:
        futures = {pool.submit(_one, function, job): job for job in jobs}
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


def cluster(function: ShardFunction, jobs: list[Job], workers: int) -> Iterator[Job]:
    """Several at once on a running Ray cluster whose machines share this file system.

    Ray starts a task again whose worker or machine died; a task's own error ends the run.
    """
    ray = _join_cluster(jobs[0].target.parent)
    task = ray.remote(_one).options(max_retries=3, num_cpus=1)
    waiting, running = list(reversed(jobs)), {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop()
                running[task.remote(function, job)] = job
            (ready,), _ = ray.wait(list(running), num_returns=1)
            ray.get(ready)
            yield running.pop(ready)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise DataError(
            f"wanted {len(jobs)} shards from the Ray cluster, but a task was lost more than three "
            f"times ({type(error).__name__}); look at `ray status`, then start the same command "
            f"again: finished shards are kept"
        ) from None
    finally:
        if running:  # something failed: the cluster drops what this run still asks for
            ray.shutdown()


def _join_cluster(directory: Path) -> Any:
    """The module ray, connected, once every machine of the cluster sees a directory of ours."""
    import ray

    if not ray.is_initialized():
        _reach(os.environ.get("RAY_ADDRESS", ""))
        # The code is read from the shared file system, as the data are.
        paths = os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])])
        try:
            ray.init("auto", runtime_env={"env_vars": {"PYTHONPATH": paths}}, log_to_driver=False)
        except ConnectionError:
            raise ConfigError(NO_CLUSTER.format("")) from None
    mark = directory / f"tmp-seen-{os.getpid()}"
    mark.touch()
    try:
        blind = [
            node["NodeManagerHostname"]
            for node in ray.nodes()
            if node["Alive"] and not ray.get(_on_node(ray, node["NodeID"]).remote(str(mark)))
        ]
    finally:
        mark.unlink()
    if blind:
        raise ConfigError(
            f"--engine ray wants a file system that all machines share, but {', '.join(blind)} "
            f"cannot see {directory}; choose --out on a shared disk"
        )
    return ray


NO_CLUSTER = (
    "--engine ray wants a running cluster, found none{}; start it with `ray start --head` here and "
    "`ray start --address=HOST:6379` on the other machines"
)


def _reach(address: str) -> None:
    """Refuse an address at which nobody answers; Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        raise ConfigError(NO_CLUSTER.format(f" at RAY_ADDRESS {address}")) from None


def _on_node(ray: Any, node_id: str) -> Any:
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(os.path.exists).options(num_cpus=0, scheduling_strategy=strategy)


ENGINES = {"serial": serial, "processes": processes, "ray": cluster}


def run_shards(
    function: ShardFunction,
    jobs: list[Job],
    engine: Engine = "serial",
    workers: int = 1,
    title: str = "shards",
) -> list[Counts]:
    """Do the jobs that are not done; the counts of all, in order.

    title: of the progress bar
    """
    todo = [job for job in jobs if job.counts() is None]
    for directory in {job.target.parent for job in todo}:
        directory.mkdir(parents=True, exist_ok=True)
    done = ENGINES[engine](function, todo, workers) if todo else ()
    for _ in tqdm(done, title, len(todo), unit=" shards", disable=None if todo else True):
        pass
    counts = {job.target: job.counts() for job in jobs}
    missing = [str(target) for target, count in counts.items() if count is None]
    assert not missing, missing
    return [count for count in counts.values() if count is not None]
