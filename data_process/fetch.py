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
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar
from urllib.parse import unquote, urlencode, urlsplit

import requests
import urllib3
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
WAIT_S, MAX_WAIT_S = 1.0, 300.0  # pause after the first failure, which doubles with each; at most
TIMEOUT_S = 30.0  # silence after which a connection counts as broken
TERMS = (
    "open its page in a browser: it may be gone, or ask for terms to be accepted; for Hugging Face "
    "then set HF_TOKEN to a token of your account"
)
REFUSALS = {401: TERMS, 403: TERMS, 404: "it may have moved: look at its page"}
# What a request may fail with. urllib3's own errors come through for addresses it cannot parse.
FAILURES = (requests.RequestException, urllib3.exceptions.HTTPError, UnicodeError, ValueError)


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


class Lost(Exception):
    """A failure that may pass: broken connection, busy server. after_s: the server's wish."""

    def __init__(self, reason: str, after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.after_s = after_s


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
    server = Server(place, data_set.source)
    target = from_repo(cfg.out) / data_set.name
    with _naming(data_set, place):
        files = _wanted(data_set, cfg, server)
    if cfg.dry_run:
        print(_listing(files, target))
        return
    todo = _missing(files, target)
    _check_space(todo, target)
    target.mkdir(parents=True, exist_ok=True)
    held = lock(target, "choose another place with --out")
    with (
        held,
        _naming(data_set, place),
        tqdm(todo, data_set.name, disable=None, unit="file") as bar,
    ):
        for file in bar:
            bar.set_postfix_str(visible(PurePosixPath(file.path).name))
            server.download(file, target / file.path)
    shutil.rmtree(target / ".hub", ignore_errors=True)
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
        raise DataError(f"{data_set.name}: {visible(str(error))}{advice}") from None


def _endpoint(place: str) -> str:
    endpoint = ENDPOINTS.get(place, "")
    if place == "huggingface":
        endpoint = os.environ.get("HF_ENDPOINT") or endpoint
        if not re.match(r"https?://[^/]", endpoint):
            raise ConfigError(
                f"HF_ENDPOINT: wanted an address such as {ENDPOINTS[place]}, found {endpoint!r}"
            )
    return endpoint.rstrip("/")


def _wanted(data_set: DataSet, cfg: FetchConfig, server: "Server") -> list[RemoteFile]:
    """The files of the set that are to be fetched; those that are no data never are."""
    found = [file for file in server.files() if not is_ignored(file.path)]
    named = [pattern.strip() for pattern in cfg.files.split(",") if pattern.strip()]
    patterns = named or ([] if server.place == "url" else list(data_set.source.files))
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


class Server:
    """A place from which a set is fetched, and how it is asked."""

    def __init__(self, place: str, source: Source) -> None:
        self.place, self._source, self._endpoint = place, source, _endpoint(place)
        self._token = _token() if place == "huggingface" else ""
        self._session = requests.Session()
        self._session.max_redirects = 10

    def files(self) -> list[RemoteFile]:
        """Every file that the set has here.

        raises: DataError if the server does not answer as expected, or names a path outside the set
        """
        listing = {"huggingface": self._huggingface, "modelscope": self._modelscope,
                   "url": self._urls}[self.place]  # fmt: skip
        found: list[RemoteFile] = []
        try:
            for file in listing():
                if not is_inside(file.path):
                    raise DataError(
                        f"{self._endpoint or 'urls'}: wanted file names inside the set, found "
                        f"{file.path!r}; nothing was downloaded: do not use this server"
                    )
                if file.size is not None and not 0 <= file.size < 1 << 60:
                    raise TypeError(f"a size of {file.size!r}")
                found.append(file)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{self._endpoint}: wanted a listing as {PLACES[self.place]} sends it, found "
                f"another answer ({type(error).__name__}: {error}); see HF_ENDPOINT"
            ) from None
        return found

    def _huggingface(self) -> Iterator[RemoteFile]:
        query, seen = "recursive=true", set()
        while query:
            if query in seen:
                raise TypeError("its pages lead back to each other")
            seen.add(query)
            address = f"{self._endpoint}/api/datasets/{self._source.huggingface}/tree/main?{query}"
            entries, links = self._json(address)
            for entry in entries:
                if entry["type"] == "file":
                    digest = (entry.get("lfs") or {}).get("oid", "").removeprefix("sha256:")
                    yield RemoteFile(entry["path"], "", entry["size"], digest)
            # A mirror may pass on links that lead to the original: only their query counts.
            query = urlsplit(links.get("next", {}).get("url", "")).query

    def _modelscope(self) -> Iterator[RemoteFile]:
        api = f"{self._endpoint}/api/v1/datasets/{self._source.modelscope}/repo"
        number, seen = 1, set()
        while True:
            asked = {"Revision": "master", "Recursive": "True", "PageNumber": number,
                     "PageSize": PAGE}  # fmt: skip
            url = f"{api}/tree?{urlencode(asked)}"
            answer, _ = self._json(url)
            if answer["Code"] != 200:
                raise DataError(f"{url}: wanted a listing, found {answer['Code']} "
                                f"{answer.get('Message')}; {REFUSALS[404]}")  # fmt: skip
            entries = answer["Data"]["Files"] or []
            fresh = [entry for entry in entries if entry["Path"] not in seen]
            for entry in fresh:
                seen.add(entry["Path"])
                if entry["Type"] != "tree":
                    query = urlencode({"Revision": "master", "FilePath": entry["Path"]})
                    address = f"{api}?{query}"
                    digest = entry.get("Sha256") or ""
                    yield RemoteFile(entry["Path"], address, entry["Size"], digest)
            if len(entries) < PAGE or not fresh:
                return
            number += 1

    def _urls(self) -> Iterator[RemoteFile]:
        for url in self._source.urls:
            with self._insist(url, partial(self._ask, url)) as answer:
                name = unquote(PurePosixPath(urlsplit(url).path).name)
                yield RemoteFile(name, url, _stated_size(answer))

    def _ask(self, url: str, headers: dict[str, str] | None = None) -> requests.Response:
        """The answer, its body not read yet.

        raises: Lost if another try may help, DataError if not
        """
        # Compressed bytes could be neither counted nor taken up in the middle.
        sent = {"User-Agent": "babyllama/1.0", "Accept-Encoding": "identity"} | (headers or {})
        if self._token:
            sent["Authorization"] = f"Bearer {self._token}"
        try:
            answer = self._session.get(url, headers=sent, stream=True, timeout=TIMEOUT_S)
        except (requests.ConnectionError, requests.Timeout) as error:
            raise Lost(f"no connection ({_root(error)})") from None
        except FAILURES as error:
            raise DataError(
                f"{url}: wanted an answer, found an address or a setting that cannot work "
                f"({type(error).__name__}); check the address, the proxy and HF_TOKEN"
            ) from None
        if answer.ok or answer.status_code == 416:
            return answer
        answer.close()
        said = answer.headers.get("X-Error-Message", answer.reason or "")[:200]
        raise _refusal(url, answer.status_code, said, answer.headers.get("Retry-After", ""))

    def _insist(
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
                if failures >= TRIES:
                    raise DataError(
                        f"{what}: wanted an answer, found {lost}, {failures} times in a row; check "
                        f"the network and start the same command again, it goes on from there"
                    ) from None
                pause = min(max(WAIT_S * 2 ** (failures - 1), lost.after_s), MAX_WAIT_S)
                note = f"{what}: {lost}; trying again in {pause:g} s"
                tqdm.write(visible(note), file=sys.stderr)
                time.sleep(pause)

    def _json(self, url: str) -> tuple[Any, dict]:
        """The JSON value of an answer, and the links of its Link header."""

        def attempt() -> tuple[bytes, dict]:
            with self._ask(url) as answer:
                try:
                    return answer.content, answer.links
                except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
                    raise Lost(f"the connection broke ({_root(error)})") from None

        body, links = self._insist(url, attempt)
        try:
            return json.loads(body), links
        except (ValueError, RecursionError):
            raise DataError(
                f"{url}: wanted JSON, found something else (a login page of the network, or "
                f"another kind of server); open the address in a browser"
            ) from None

    def download(self, file: RemoteFile, path: Path) -> None:
        """Bring one file here. It gets its name when it is whole and right; until then an older one
        stays.

        raises: DataError; a part that may be gone on with is kept
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        for is_last in (False, True):
            part = self._bring(file, path) if file.url else self._from_hub(file, path)
            if not (problem := fault(part, file)):
                flush(part)
                os.replace(part, path)
                return
            part.unlink(missing_ok=True)
            if is_last:
                break
            # Pieces of two versions may have met: what comes in one piece will tell.
            print(f"{visible(file.path)}: {problem}; once more from its start", file=sys.stderr)
        raise DataError(
            f"{file.path}: {problem}; the file was thrown away: it may have been changed just now, "
            f"so start the same command again"
        )

    def _from_hub(self, file: RemoteFile, path: Path) -> Path:
        """A file of Hugging Face, in a directory beside from which it gets its place."""
        from huggingface_hub import errors, hf_hub_download

        place = path.parents[file.path.count("/")] / ".hub"

        def attempt() -> Path:
            try:
                return Path(hf_hub_download(
                    self._source.huggingface, file.path, repo_type="dataset", local_dir=place,
                    endpoint=self._endpoint, token=self._token or False,
                    etag_timeout=TIMEOUT_S,
                ))  # fmt: skip
            except errors.HfHubHTTPError as error:
                is_vague = isinstance(error, errors.LocalEntryNotFoundError)
                cause = error.__cause__ if is_vague else error
                if isinstance(cause, errors.OfflineModeIsEnabled):
                    raise DataError(
                        f"{file.path}: wanted to download, found HF_HUB_OFFLINE or "
                        f"TRANSFORMERS_OFFLINE set; unset them and start the same command again"
                    ) from None
                answer = getattr(cause, "response", None)
                if answer is None:
                    raise Lost(f"no connection ({_root(error)})") from None
                said = getattr(cause, "server_message", "") or answer.reason or ""
                raise _refusal(file.path, answer.status_code, said[:200]) from None
            except FAILURES as error:
                raise Lost(f"the connection broke ({_root(error)})") from None

        return self._insist(
            file.path, attempt, lambda: sum(map(size_of, place.rglob("*.incomplete")))
        )

    def _bring(self, file: RemoteFile, path: Path) -> Path:
        """A file of a plain address, beside its place."""
        part = path.with_name(f"{path.name}.part")
        if not file.sha256:  # who knows of which version the bytes here are
            part.unlink(missing_ok=True)
        self._insist(file.path, lambda: self._go_on(file, part), lambda: size_of(part))
        return part

    def _go_on(self, file: RemoteFile, part: Path) -> None:
        """Fetch what is missing of a file, up to its end; raises Lost before it."""
        start = size_of(part) if file.sha256 else 0
        if start and start == file.size:
            return
        with self._ask(file.url, {"Range": f"bytes={start}-"} if start else {}) as answer:
            if answer.headers.get("Content-Type", "").startswith("text/html") and (
                ".htm" not in file.path
            ):
                raise DataError(
                    f"{file.url}: wanted a file, found a web page (a login or a question?); "
                    f"open the address in a browser"
                )
            span = re.match(r"bytes (\d{1,18})-", answer.headers.get("Content-Range", ""))
            goes_on = answer.status_code == 206 and span and int(span[1]) == start
            goes_on = goes_on and "Content-Encoding" not in answer.headers
            if answer.status_code == 416 or (answer.status_code == 206 and not goes_on):
                part.unlink(missing_ok=True)
                raise Lost(f"the server cannot go on at byte {start:,}")
            with open(part, "ab" if goes_on else "wb") as out:
                try:
                    for block in answer.iter_content(BLOCK):
                        out.write(block)
                        if file.size is not None and out.tell() > file.size:
                            return  # as `fault` will say
                except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
                    where = f"at byte {out.tell():,}"
                    raise Lost(f"the connection broke {where} ({_root(error)})") from None
        if file.size is not None and size_of(part) < file.size:
            raise Lost(f"the server stopped at byte {size_of(part):,} of {file.size:,}")


def _refusal(what: str, code: int, said: str, after: str = "") -> Exception:
    """What a server's status means: Lost if it may pass, else a DataError."""
    if code in (0, 408, 429) or code >= 500:
        after_s = float(after) if re.fullmatch(r"[0-9]{1,6}", after) else 0.0
        return Lost(f"the server answers {code} {said}", after_s)
    advice = REFUSALS.get(code, "open the address in a browser")
    return DataError(f"{what}: wanted an answer, found {code} {said}; {advice}")


def _root(error: BaseException) -> str:
    """The first cause of a network failure; what is wrapped round it only repeats the address."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error) or type(error).__name__)[:120]


def _stated_size(answer: requests.Response) -> int | None:
    """Length of the body as the server says, if it says so and does not compress it."""
    length = answer.headers.get("Content-Length", "")
    known = re.fullmatch(r"[0-9]{1,18}", length) and "Content-Encoding" not in answer.headers
    return int(length) if known else None


if __name__ == "__main__":
    run(main, parse(FetchConfig, __doc__, positional=("dataset",)))
