"""Brings one file from a server, through broken connections, and checks it.

A Line is how a server is asked, by the listings in hubs.py too: what may pass (a broken connection,
a busy server) is tried again. A file under way is NAME.part, with a note of its version beside it;
bytes of that version are not fetched twice (HTTP ranges, RFC 9110, sections 13.1.5 and 14).
"""

import hashlib
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import requests
from requests.exceptions import ChunkedEncodingError, ContentDecodingError, JSONDecodeError
from tqdm import tqdm

from babyllama.errors import DataError

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
                        f"{what}: wanted an answer, found {lost} {failures} times in a row; check "
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
