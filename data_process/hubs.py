"""Which files a data set has on Hugging Face, on ModelScope or behind direct addresses.

`list_files` asks the server and gives RemoteFiles, which download.py brings here. The listings are
those that the hubs' own clients use: huggingface_hub 0.36 (pages by Link header, `lfs.oid` is the
SHA-256) and modelscope_hub of 2026 (pages by number, `Sha256`).
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import PurePosixPath
from urllib.parse import quote, unquote, urlencode, urlsplit

from babyllama.errors import DataError
from data_process.download import REFUSALS, Line, RemoteFile, stated_size
from data_process.source import Source

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
