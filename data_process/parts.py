"""Divides the raw files of a set into jobs of about the same size.

A long file of lines is cut into pieces that end with a line; short files are put together. The
division depends on the files alone, never on the number of workers.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_process.layouts import HEAD, layout_of
from data_process.raw import UNPACK, Part, whole_files
from data_process.registry import DataSet

JOB_BYTES = 64 << 20  # some ten seconds of work for one process
PACKED = (*UNPACK, b"PK\x03\x04", b"PAR1")
WIDE = ("utf16", "utf32")  # encodings in which the byte \n may be half a character


def divide(
    place: Path, data_set: DataSet, encoding: str, job_bytes: int = JOB_BYTES
) -> list[list[Part]]:
    """The jobs of a set, each a list of parts in their fixed order."""
    if data_set.read_dir:
        return [[]]
    files = whole_files(place)
    if data_set.whole:
        return [files]
    if data_set.split_files and not encoding.lower().replace("-", "").startswith(WIDE):
        pieces = [
            piece for file in files for piece in _cut(file, data_set.layout, encoding, job_bytes)
        ]
    else:
        pieces = files
    return list(_packed(pieces, job_bytes))


def _cut(part: Part, layout: str, encoding: str, job_bytes: int) -> Iterator[Part]:
    size = part.path.stat().st_size
    with open(part.path, "rb") as file:
        head = file.read(HEAD)
        layout = layout or layout_of(head, encoding, part.name)
        packed = head.startswith(PACKED) or head[257:262] == b"ustar"
        if size <= 1.5 * job_bytes or packed or layout not in ("lines", "text"):
            yield part
            return
        start = 0
        while start < size:
            end = min(start + job_bytes, size)
            if end < size:
                file.seek(end)
                end = _line_end(file)
            yield part._replace(start=start, end=end, layout=layout)
            start = end


def _line_end(file) -> int:
    """Where the line ends that holds the byte at which the file stands."""
    while block := file.read(HEAD):
        if (at := block.find(b"\n")) >= 0:
            return file.tell() - len(block) + at + 1
    return file.tell()


def _packed(parts: Iterable[Part], job_bytes: int) -> Iterator[list[Part]]:
    job, room = [], job_bytes
    for part in parts:
        size = (part.end or part.path.stat().st_size) - part.start
        if job and size > room:
            yield job
            job, room = [], job_bytes
        job.append(part)
        room -= size
    if job:
        yield job


def to_json(parts: list[Part]) -> str:
    """A job's parts as the text of its plan file."""
    return json.dumps([part._replace(path=str(part.path)) for part in parts], ensure_ascii=False)


def from_json(text: str) -> list[Part]:
    """The parts in a plan file."""
    return [Part(Path(path), *rest) for path, *rest in json.loads(text)]
