"""Download the raw files of a data set from where its publisher put them.

    python -m data_process.fetch belle --dry-run
    python -m data_process.fetch belle
    python -m data_process.fetch belle --from modelscope
    python -m data_process.fetch mnbvc --files 'qa/*/zhihu/4.jsonl.gz'
    HF_ENDPOINT=https://a.mirror python -m data_process.fetch belle

Files go to data/raw/<set>/. What is complete is not fetched again; a download that was interrupted
goes on with the same command. A file has its name only when its size and, where it is known, its
SHA-256 are right. Hugging Face is downloaded from with huggingface_hub, ModelScope and plain
addresses with requests. `python -m data_process.tools.list` shows the sets; what needs a form or lies
on a shared disk must be fetched by hand, and is told how.
"""  # noqa: E501

import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar
from urllib.parse import unquote, urlencode, urlsplit

import requests
import urllib3
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError
from tqdm import tqdm

from babyllama.analysis.terminal_text import visible
from babyllama.config import flush, from_repo, lock, parse, run, shown
from babyllama.errors import ConfigError, DataError
from data_process.raw import is_ignored
from data_process.registry import DataSet, Source, data_sets, package_dir

Result = TypeVar("Result")

PLACES = {"huggingface": "Hugging Face", "modelscope": "ModelScope", "url": "direct address"}
ENDPOINTS = {"huggingface": "https://huggingface.co", "modelscope": "https://www.modelscope.cn"}
PAGE = 200  # entries of a ModelScope listing, as its client asks for
BLOCK = 1 << 16
TRIES = 6  # failures in a row after which a server is given up
WAIT_S = 1.0  # pause after the first failure, which doubles with each
TIMEOUT_S = 30.0  # silence after which a connection counts as broken
TERMS = (
    "open its page in a browser: it may be gone, or ask for terms to be accepted; for Hugging Face "
    "then set HF_TOKEN to a token of your account"
)
REFUSALS = {401: TERMS, 403: TERMS, 404: "it may have moved: look at its page"}
# What a request may fail with. urllib3's own errors come through for addresses it cannot parse.
FAILURES = (requests.RequestException, urllib3.exceptions.HTTPError, ValueError)


@dataclass(frozen=True)
class FetchConfig:
    """Settings of data_process.fetch.

    Args:
        dataset: a set or a group; python -m data_process.tools.list shows them
        from_: huggingface, modelscope, url, or auto for the first that the set has; also --from
        files: which files, as names or patterns with commas between (default: what the set needs)
        out: directory that gets <set>/
        dry_run: only list files and sizes
    """

    dataset: str = ""
    from_: Literal["auto", "huggingface", "modelscope", "url"] = "auto"
    files: str = ""
    out: Path = Path("data/raw")
    dry_run: bool = False


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server.

    path: where it belongs below the set's directory, with "/"
    url: "" for Hugging Face, where huggingface_hub knows it
    size: in bytes, None where it is not known; sha256: "" where it is not known
    """

    path: str
    url: str = ""
    size: int | None = None
    sha256: str = ""


def main(cfg: FetchConfig) -> None:
    """Fetch every set behind the name; those that must be fetched by hand are told at the end."""
    if not re.fullmatch(r"[\x21-\x7e]*", _token()):
        raise ConfigError("HF_TOKEN: wanted a token of letters and digits, found other characters")
    by_hand = []
    for data_set in data_sets(cfg.dataset):
        if places(data_set.source):
            fetch(data_set, cfg)
        elif data_set.package:
            package_dir(*data_set.package)
            requirement = data_set.package[0]
            print(f"{data_set.name}: lies in the package {requirement}, which is installed")
        else:
            by_hand.append(_by_hand(data_set, cfg))
    if by_hand:
        raise DataError("; ".join(by_hand))


def _token() -> str:
    return os.environ.get("HF_TOKEN", "").strip()


def places(source: Source) -> list[str]:
    """The keys of PLACES where a set can be had, in the order in which they are tried."""
    there = {"huggingface": source.huggingface, "modelscope": source.modelscope, "url": source.urls}
    return [place for place in PLACES if there[place]]


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
    target = from_repo(cfg.out) / data_set.name
    try:
        files = _wanted(data_set, cfg, place)
        if cfg.dry_run:
            print(_listing(files, target))
            return
        todo = _missing(files, target)
        _check_space(todo, target)
        target.mkdir(parents=True, exist_ok=True)
        with (
            lock(target, "choose another place with --out"),
            tqdm(todo, data_set.name, disable=None, unit="file") as bar,
        ):
            for file in bar:
                bar.set_postfix_str(visible(PurePosixPath(file.path).name))
                download(file, target, data_set.source)
    except DataError as error:
        others = [f"--from {other}" for other in there if other != place]
        advice = f"; or take it from elsewhere: {' or '.join(others)}" if others else ""
        raise DataError(f"{data_set.name}: {visible(str(error))}{advice}") from None
    shutil.rmtree(target / ".hub", ignore_errors=True)
    n_bytes = sum(size_of(target / file.path) for file in files)
    print(
        f"{data_set.name}: {len(files)} file(s), {amount(n_bytes)}, in {shown(target)}: "
        f"{len(todo)} downloaded, {len(files) - len(todo)} were there"
    )
    if data_set.source.manual:
        print(f"{data_set.name}: {data_set.source.manual}")


def _hub() -> str:
    """The address of Hugging Face or a mirror of it."""
    address = os.environ.get("HF_ENDPOINT") or ENDPOINTS["huggingface"]
    if not re.match(r"https?://[^/]", address):
        raise ConfigError(
            f"HF_ENDPOINT: wanted an address such as {ENDPOINTS['huggingface']}, found {address!r}"
        )
    return address.rstrip("/")


def _wanted(data_set: DataSet, cfg: FetchConfig, place: str) -> list[RemoteFile]:
    """The files of the set that are to be fetched; those that are no data never are."""
    found = [file for file in _listed(place, data_set.source) if not is_ignored(file.path)]
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
    known = data_set.source.sha256
    return [
        replace(f, sha256=(known.get(PurePosixPath(f.path).name) or f.sha256).lower())
        for f in wanted
    ]


def _fits(file: RemoteFile, pattern: str) -> bool:
    names = (file.path, PurePosixPath(file.path).name)
    return any(fnmatchcase(name, pattern) for name in names)


def _listing(files: list[RemoteFile], target: Path) -> str:
    lines = [f"{shown(target)}/"]
    for file in files:
        is_there = file.size is not None and size_of(target / file.path) == file.size
        state = "there" if is_there else ""
        lines.append(f"  {amount(file.size):>8}  {visible(file.path)}  {state}".rstrip())
    total = sum(file.size or 0 for file in files)
    unknown = "" if all(file.size is not None for file in files) else ", some sizes unknown"
    free = amount(_free(target))
    return "\n".join(
        [*lines, f"  {amount(total):>8}  in {len(files)} file(s){unknown}; {free} free"]
    )


def amount(n_bytes: int | None) -> str:
    """A number of bytes for people: 1.29GB, "?" if it is not known."""
    return "?" if n_bytes is None else tqdm.format_sizeof(n_bytes, "B")


def size_of(path: Path) -> int:
    """Bytes of a file, 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0


def _missing(files: list[RemoteFile], target: Path) -> list[RemoteFile]:
    """The files that are not there as the publisher has them."""
    missing = []
    for file in files:
        path = target / file.path
        if problem := fault(path, file):
            missing.append(file)
            if path.exists():
                print(f"{shown(path)}: {problem}; a new one replaces it", file=sys.stderr)
    return missing


def _check_space(todo: list[RemoteFile], target: Path) -> None:
    needed = sum(file.size or 0 for file in todo)
    if needed > _free(target):
        raise DataError(
            f"{shown(target)}: wanted {amount(needed)} of space, found {amount(_free(target))}; "
            f"free some, choose another disk with --out, or fewer files with --files"
        )


def _free(directory: Path) -> int:
    there = next(place for place in (directory, *directory.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free


def fault(path: Path, file: RemoteFile) -> str:
    """What is wrong with a file; "" if nothing is. What is not known is not compared."""
    if not path.is_file():
        return "wanted a file, found none"
    found = path.stat().st_size
    if file.size not in (None, found):
        return f"wanted {file.size:,} bytes, found {found:,}"
    with open(path, "rb") as data:
        if found < 1024 and data.read(40).startswith(b"version https://git-lfs.github.com"):
            return "wanted the data, found the note that git-lfs leaves in their place"
        data.seek(0)
        if file.sha256:
            digest = hashlib.file_digest(data, "sha256").hexdigest()
            if digest != file.sha256:
                return f"wanted SHA-256 {file.sha256[:16]}…, found {digest[:16]}…"
    return ""


def is_inside(path: str) -> bool:
    """True if a path stays below the directory it is put into, on every system."""
    odd = re.search(r"[\x00-\x1f\\]|^[A-Za-z]:", path)
    return not odd and all(part.rstrip(". ") for part in path.split("/"))


def _listed(place: str, source: Source) -> list[RemoteFile]:
    """Every file that the set has at a place.

    raises: DataError if the server does not answer as expected, or names a path outside the set
    """
    if place == "huggingface" and constants.HF_HUB_OFFLINE:
        raise ConfigError(
            f"{source.huggingface}: wanted to download, found HF_HUB_OFFLINE or "
            f"TRANSFORMERS_OFFLINE set; unset them and start the same command again"
        )
    listing = {"huggingface": _huggingface, "modelscope": _modelscope, "url": _urls}[place]
    try:
        found = listing(source)
        for file in found:
            if not is_inside(file.path):
                raise DataError(
                    f"{PLACES[place]}: wanted file names inside the set, found {file.path!r}; "
                    f"nothing was downloaded: do not use this server"
                )
            if file.size is not None and not 0 <= file.size < 1 << 60:
                raise TypeError(f"a size of {file.size!r}")
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{place}: wanted a listing as {PLACES[place]} sends it, found another answer "
            f"({type(error).__name__}: {error}); see HF_ENDPOINT"
        ) from None
    return found


def _huggingface(source: Source) -> list[RemoteFile]:
    api, name = HfApi(_hub(), token=_token() or False), source.huggingface
    info = _insist(name, partial(api.dataset_info, name, files_metadata=True))
    return [
        RemoteFile(file.rfilename, "", file.size, file.lfs.sha256 if file.lfs else "")
        for file in info.siblings or ()
    ]


def _modelscope(source: Source) -> list[RemoteFile]:
    api = f"{ENDPOINTS['modelscope']}/api/v1/datasets/{source.modelscope}/repo"
    found: dict[str, dict] = {}
    for number in count(1):
        asked = {"Revision": "master", "Recursive": "True", "PageNumber": number, "PageSize": PAGE}
        url = f"{api}/tree?{urlencode(asked)}"
        page = _insist(url, partial(_json, url))["Data"]["Files"] or []
        n_before = len(found)
        found |= {entry["Path"]: entry for entry in page}
        if len(page) < PAGE or len(found) == n_before:
            break
    return [
        RemoteFile(path, f"{api}?{urlencode({'Revision': 'master', 'FilePath': path})}",
                   entry["Size"], entry.get("Sha256") or "")
        for path, entry in found.items() if entry["Type"] != "tree"
    ]  # fmt: skip


def _urls(source: Source) -> list[RemoteFile]:
    found = []
    for url in source.urls:
        with _insist(url, partial(_ask, url)) as answer:
            length = re.fullmatch(r"[0-9]{1,18}", answer.headers.get("Content-Length", ""))
            size = int(length[0]) if length and "Content-Encoding" not in answer.headers else None
        found.append(RemoteFile(unquote(PurePosixPath(urlsplit(url).path).name), url, size))
    return found


def _ask(url: str, **headers: str) -> requests.Response:
    """The answer, its body not read yet."""
    # Compressed bytes could be neither counted nor taken up in the middle.
    sent = {"User-Agent": "babyllama/1.0", "Accept-Encoding": "identity"} | headers
    answer = requests.get(url, headers=sent, stream=True, timeout=TIMEOUT_S)
    if not answer.ok:
        answer.close()
        answer.raise_for_status()
    return answer


def _json(url: str) -> Any:
    return _ask(url).json()


def _insist(
    what: str, attempt: Callable[[], Result], progress: Callable[[], int] = lambda: 0
) -> Result:
    """What `attempt` returns, which is called again while another try may help.

    progress: a number that grows with what has been reached; where it does, the patience starts
        afresh
    raises: DataError when the patience ends
    """
    best, failures = progress(), 0
    while True:
        try:
            return attempt()
        except DataError:
            raise
        except FAILURES as error:
            reason, reached = _passing(what, error), progress()
        failures, best = (1, reached) if reached > best else (failures + 1, best)
        if failures >= TRIES:
            raise DataError(
                f"{what}: wanted an answer, found {reason}, {failures} times in a row; check "
                f"the network and start the same command again, it goes on from there"
            )
        pause = WAIT_S * 2 ** (failures - 1)
        note = f"{what}: {reason}; trying again in {pause:g} s"
        tqdm.write(visible(note), file=sys.stderr)
        time.sleep(pause)


def _passing(what: str, error: Exception) -> str:
    """What failed, if it may pass; raises: DataError if it will not"""
    if isinstance(error, requests.JSONDecodeError):
        raise DataError(
            f"{what}: wanted JSON, found something else (a login page of the network, or "
            f"another kind of server); open the address in a browser"
        )
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
    answer = getattr(cause, "response", None)
    if answer is None:
        while (deeper := error.__context__) is not None:  # what is outside repeats the address
            error = deeper  # type: ignore[assignment]
        return f"no connection ({(str(error) or type(error).__name__)[:120]})"
    code, said = answer.status_code, answer.headers.get("X-Error-Message") or answer.reason or ""
    if code in (408, 416, 429) or code >= 500:
        return f"the server answers {code} {said[:200]}"
    advice = REFUSALS.get(code, "open the address in a browser")
    raise DataError(f"{what}: wanted an answer, found {code} {said[:200]}; {advice}")


def download(file: RemoteFile, target: Path, source: Source) -> None:
    """Bring one file into the directory of its set. It gets its name when it is whole and right;
    until then an older one stays.

    raises: DataError; a part that may be gone on with is kept
    """
    path = target / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    if file.url:
        part = path.with_name(f"{path.name}.part")
        if not file.sha256:  # who knows of which version the bytes here are
            part.unlink(missing_ok=True)
        _insist(file.path, lambda: _go_on(file, part), lambda: size_of(part))
    else:
        # In a directory beside, from which it gets its place.
        hub = target / ".hub"
        attempt = partial(
            hf_hub_download, source.huggingface, file.path, repo_type="dataset", local_dir=hub,
            endpoint=_hub(), token=_token() or False,
        )  # fmt: skip
        begun = lambda: sum(map(size_of, hub.rglob("*.incomplete")))  # noqa: E731
        part = Path(_insist(file.path, attempt, begun))
    if problem := fault(part, file):
        part.unlink()
        raise DataError(
            f"{file.path}: {problem}; the file was thrown away: it may have been changed just now, "
            f"so start the same command again"
        )
    flush(part)
    os.replace(part, path)


def _go_on(file: RemoteFile, part: Path) -> None:
    """Fetch what is missing of a file, up to its end."""
    start = size_of(part) if file.sha256 else 0
    if start and start == file.size:
        return
    try:
        answer = _ask(file.url, **{"Range": f"bytes={start}-"} if start else {})
    except requests.HTTPError as error:
        if error.response.status_code == 416:  # the server cannot go on from there
            part.unlink(missing_ok=True)
        raise
    with answer, open(part, "ab" if answer.status_code == 206 else "wb") as out:
        kind = answer.headers.get("Content-Type", "")
        if kind.startswith("text/html") and ".htm" not in file.path:
            raise DataError(
                f"{file.url}: wanted a file, found a web page (a login or a question?); "
                f"open the address in a browser"
            )
        for block in answer.iter_content(BLOCK):
            out.write(block)
            if file.size is not None and out.tell() > file.size:
                return  # as `fault` will say
    if file.size is not None and size_of(part) < file.size:
        raise requests.ConnectionError(
            f"the server stopped at byte {size_of(part):,} of {file.size:,}"
        )


if __name__ == "__main__":
    run(main, parse(FetchConfig, __doc__, positional=("dataset",)))
