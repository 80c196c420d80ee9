"""The .bin/.idx pair: everything that trains is read from it. No torch.

x.bin   token ids, little endian, uint16 where the vocabulary has at most 65,536 pieces, else uint32
x.idx   header (120 bytes), document ends, piece ends, piece roles, SHA-256 of all that

    header: magic 8s | version u32 | kind u32 | bytes per id u32 | vocabulary size u32 |
            tokens u64 | documents u64 | pieces u64 | tokenizer fingerprint 32s |
            SHA-256 of x.bin 32s | zeros
    text:   document ends (u64) count tokens; no pieces
    others: document ends count pieces, piece ends (u64) count tokens, one role (u8) a piece

Every piece of a dialogue keeps its role, so a training mask is never searched for in the ids.
Files are written under a temporary name and renamed, .idx last: where it is, the pair is whole.
"""

import errno
import hashlib
import os
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from babyllama.config import NOT_OFFERED, flush, from_repo, shown
from babyllama.errors import DataError
from tokenizer import Tokenizer

MAGIC = b"BABYLTOK"
VERSION = 1
HEADER = struct.Struct("<8sIIIIQQQ32s32s8x")
# What a summary row's meta may hold for a second turn: one piece each, or one a keyword.
META = ("keywords", "discipline", "category")
# The two answers that end a preference row, the better one first.
CHOICES = ("chosen", "rejected")
_TALK = ("system", "user", "assistant")
ROLES = (*_TALK, "text", "summary", *META, *CHOICES, "image")
_ROLES = {
    "text": (),
    "chat": _TALK,
    "summary": ("text", "summary", *META),
    "preference": (*_TALK, *CHOICES),
    "vqa": ("image", *_TALK),
}
KINDS = tuple(_ROLES)
AGAIN = "python -m data_process.run <set> --tokenizer <file>"


def id_dtype(vocab_size: int) -> np.dtype:
    """The narrowest id type that holds every id of the vocabulary."""
    return np.dtype("<u2" if vocab_size <= 65_536 else "<u4")


def pair(stem: Path) -> tuple[Path, Path]:
    """The two files of a token file, from its stem or from either of them."""
    stem = Path(stem)
    if stem.suffix in (".bin", ".idx"):
        stem = stem.with_suffix("")
    return stem.with_name(stem.name + ".bin"), stem.with_name(stem.name + ".idx")


def token_directory(name: str, tokenizer: Tokenizer) -> Path:
    """Directory of the token files of a source."""
    is_path = "/" in name or "\\" in name
    return from_repo(name if is_path else Path("data/tokens") / tokenizer.name / name)


def require_token_files(names: Sequence[str], tokenizer: Tokenizer) -> None:
    """raises: DataError with the commands that make those that are missing"""
    missing, commands = [], []
    for name in names:
        where = token_directory(name, tokenizer)
        for split in ("train", "val"):
            if not any(where.glob(f"{split}-*.idx")):
                missing.append(f"{shown(where)} ({split}-*.idx)")
                commands.append(
                    f"python -m data_process.run {where.name} --tokenizer {shown(tokenizer.path)}"
                )
    if missing:
        made = " && ".join(dict.fromkeys(commands))
        raise DataError(
            f"wanted token files, found none in {', '.join(missing)}; make them: {made}"
        )


class TokenFileWriter:
    """Writes one pair; a context manager. An error inside leaves nothing behind.

    Memory: 8 bytes a document (and 9 a piece); ids go straight to the disk.
    """

    def __init__(self, stem: Path, kind: str, tokenizer: Tokenizer) -> None:
        self.bin_path, self.idx_path = pair(stem)
        self.kind, self._tokenizer = kind, tokenizer
        self._dtype = id_dtype(tokenizer.vocab_size)
        self._ends, self._piece_ends, self._roles = array("Q"), array("Q"), bytearray()
        self._n_tokens = 0
        self._hash = hashlib.sha256()

    def __enter__(self) -> "TokenFileWriter":
        self.bin_path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = [p.with_name(f"tmp-{p.name}") for p in (self.bin_path, self.idx_path)]
        self._file = open(self._temporary[0], "wb")
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.close()
            for path in self._temporary:
                path.unlink(missing_ok=True)

    def add_text(self, ids: Sequence[int]) -> None:
        """One document, its <eos> included."""
        self._write(ids)
        self._ends.append(self._n_tokens)

    def add_row(self, pieces: Sequence[tuple[str, Sequence[int]]]) -> None:
        """One dialogue or summary row as (role, ids) pieces."""
        for role, ids in pieces:
            self._write(ids)
            self._piece_ends.append(self._n_tokens)
            self._roles.append(ROLES.index(role))
        self._ends.append(len(self._piece_ends))

    def _write(self, ids: Sequence[int]) -> None:
        wide = np.asarray(ids, dtype=np.int64)
        # astype() would wrap an id that does not fit, without a word.
        if wide.size and not 0 <= wide.min() <= wide.max() < self._tokenizer.vocab_size:
            raise DataError(
                f"{self.bin_path}: wanted ids below the vocabulary size "
                f"{self._tokenizer.vocab_size}, found {wide.min()} to {wide.max()}; "
                f"encode with the tokenizer that is named for this file"
            )
        data = wide.astype(self._dtype).tobytes()
        self._hash.update(data)
        self._file.write(data)
        self._n_tokens += wide.size

    def _finish(self) -> None:
        header = HEADER.pack(
            MAGIC, VERSION, KINDS.index(self.kind), self._dtype.itemsize,
            self._tokenizer.vocab_size, self._n_tokens, len(self._ends), len(self._piece_ends),
            bytes.fromhex(self._tokenizer.fingerprint), self._hash.digest(),
        )  # fmt: skip
        ends = (np.array(each, "<u8").tobytes() for each in (self._ends, self._piece_ends))
        index = header + b"".join(ends) + bytes(self._roles)
        self._temporary[1].write_bytes(index + hashlib.sha256(index).digest())
        self._file.close()
        for path in self._temporary:
            flush(path)
        self.idx_path.unlink(missing_ok=True)
        os.replace(self._temporary[0], self.bin_path)
        os.replace(self._temporary[1], self.idx_path)
        flush(self.idx_path.parent)


class TokenFile:
    """An opened pair. The ids stay on the disk (memory map); the index is in memory.

    ids: (n_tokens,) uint16 or uint32
    ends: (n_docs,) ends of the documents, in tokens (text) or in pieces (all other kinds)
    piece_ends, roles: (n_pieces,) ends in tokens, and indices into ROLES
    digest: SHA-256 of the index, which holds that of the ids
    """

    def __init__(self, stem: Path, fingerprint: str | None = None) -> None:
        """Open and check a pair (about 1 s a gigabyte).

        fingerprint: of the tokenizer that will read the ids; a file of another one is refused
        raises: DataError if a file is missing, foreign, cut or altered
        """
        self.bin_path, self.idx_path = pair(stem)
        for path in (self.bin_path, self.idx_path):
            if not path.is_file():
                raise DataError(
                    f"{path}: no such file; a token file is a .bin with its .idx, made by {AGAIN}"
                )
        index = self.idx_path.read_bytes()
        self.digest = index[-32:]
        self._read_index(index[:-32])
        if fingerprint is not None and fingerprint != self.fingerprint:
            raise DataError(
                f"{self.bin_path}: made with tokenizer {self.fingerprint[:12]}… "
                f"(vocabulary size {self.vocab_size}), wanted {fingerprint[:12]}…; pre-tokenize "
                f"again: {AGAIN}"
            )
        self._map_ids()

    def _read_index(self, index: bytes) -> None:
        if index[:8] != MAGIC:
            raise DataError(
                f"{self.idx_path}: wanted a babyllama index, found bytes {index[:8]!r}; "
                f"a .bin of another project must be pre-tokenized again"
            )
        if hashlib.sha256(index).digest() != self.digest or len(index) < HEADER.size:
            raise self._damaged(self.idx_path, "its checksum does not match")
        (_, version, kind, width, self.vocab_size, self.n_tokens, self.n_docs, n_pieces,
         fingerprint, self._bin_sha256) = HEADER.unpack_from(index)  # fmt: skip
        if version != VERSION:
            raise DataError(f"{self.idx_path}: wanted version {VERSION}, found {version}")
        self.dtype = id_dtype(self.vocab_size)
        wanted = HEADER.size + 8 * (self.n_docs + n_pieces) + n_pieces
        if kind >= len(KINDS) or width != self.dtype.itemsize or len(index) != wanted:
            raise self._damaged(self.idx_path, "its header does not fit it")
        self.kind, self.fingerprint = KINDS[kind], fingerprint.hex()
        numbers = np.frombuffer(index, "<u8", self.n_docs + n_pieces, HEADER.size)
        self.ends, self.piece_ends = numbers[: self.n_docs], numbers[self.n_docs :]
        self.roles = np.frombuffer(index, np.uint8, n_pieces, len(index) - n_pieces)
        if not self._is_in_order(n_pieces):
            raise self._damaged(self.idx_path, "its documents and pieces are in no order")
        self.ends, self.piece_ends = self.ends.astype(np.int64), self.piece_ends.astype(np.int64)

    def _is_in_order(self, n_pieces: int) -> bool:
        """True if documents and pieces follow each other to the end, and are those of the kind."""
        is_text = self.kind == "text"
        lasts = (self.n_tokens, 0) if is_text else (n_pieces, self.n_tokens)
        for ends, last in zip((self.ends, self.piece_ends), lasts, strict=True):
            if np.any(ends[1:] < ends[:-1]) or (ends[-1] if len(ends) else 0) != last:
                return False
        opening = ("text", "summary") if self.kind == "summary" else ()
        first = np.concatenate(([0], self.ends)).astype(np.int64)[:-1]
        has_pieces = not np.any(self.ends < first + (len(opening) or not is_text))
        return (
            has_pieces
            and np.isin(self.roles, [ROLES.index(role) for role in _ROLES[self.kind]]).all()
            and all(np.all(self.roles[first + n] == ROLES.index(r)) for n, r in enumerate(opening))
        )

    def _map_ids(self) -> None:
        wanted, found = self.n_tokens * self.dtype.itemsize, self.bin_path.stat().st_size
        if wanted != found:
            raise self._damaged(self.bin_path, f"wanted {wanted} bytes, found {found}")
        with open(self.bin_path, "rb") as file:
            if hashlib.file_digest(file, "sha256").digest() != self._bin_sha256:
                raise self._damaged(self.bin_path, "its ids do not match their checksum")
        self.ids = self._mapped()
        if self.n_tokens and int(self.ids.max()) >= self.vocab_size:
            raise self._damaged(self.bin_path, f"it holds ids of {self.vocab_size} and more")

    def _mapped(self) -> np.ndarray:
        if not self.n_tokens:
            return np.zeros(0, self.dtype)  # an empty file cannot be mapped
        try:
            return np.memmap(self.bin_path, self.dtype, mode="r")
        except OSError as error:
            if error.errno not in (*NOT_OFFERED, errno.ENODEV):
                raise
            return np.fromfile(self.bin_path, self.dtype)  # takes memory, but can be read

    @staticmethod
    def _damaged(path: Path, what: str) -> DataError:
        return DataError(
            f"{path}: damaged or cut, {what}; delete it and pre-tokenize again: {AGAIN}"
        )

    @property
    def sizes(self) -> np.ndarray:
        """Ids of each piece."""
        return np.diff(self.piece_ends, prepend=0)

    @property
    def n_pieces(self) -> np.ndarray:
        """Pieces of each row."""
        return np.diff(self.ends, prepend=0)

    @property
    def first(self) -> np.ndarray:
        """The first piece of each row."""
        return self.ends - self.n_pieces

    def pieces(self, number: int) -> list[tuple[str, np.ndarray]]:
        """One row of a chat or summary file as (role, ids) pieces."""
        first = self.ends[number - 1] if number else 0
        starts = (self.piece_ends[i - 1] if i else 0 for i in range(first, self.ends[number]))
        return [
            (ROLES[self.roles[i]], self.ids[start : self.piece_ends[i]])
            for i, start in enumerate(starts, first)
        ]
