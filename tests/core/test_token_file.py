"""Laws of the .bin/.idx pair: what is written is read, and nothing damaged is."""

import errno
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from babyllama.errors import DataError
from babyllama.token_file import ROLES, TokenFile, TokenFileWriter, id_dtype, pair


@dataclass
class Vocabulary:
    """What the writer asks of a tokenizer."""

    vocab_size: int = 97
    fingerprint: str = hashlib.sha256(b"one").hexdigest()


Pieces = list[tuple[str, list[int]]]


def random_pieces(kind: str, n_rows: int, seed: int = 0, vocab_size: int = 97) -> list[Pieces]:
    """Rows as pieces; a text is one piece with no role. Some pieces are empty."""
    rng = np.random.default_rng(seed)

    def ids() -> list[int]:
        return rng.integers(vocab_size, size=rng.integers(0, 9)).tolist()

    roles = {
        "text": lambda: [""],
        "chat": lambda: ["system"] * rng.integers(2) + ["user", "assistant"] * rng.integers(1, 4),
        "summary": lambda: ["text", "summary"],
    }[kind]
    return [[(role, ids()) for role in roles()] for _ in range(n_rows)]


def write(stem: Path, kind: str, rows: list[Pieces], vocabulary: Vocabulary | None = None) -> Path:
    with TokenFileWriter(stem, kind, vocabulary or Vocabulary()) as writer:
        for pieces in rows:
            writer.add_text(pieces[0][1]) if kind == "text" else writer.add_row(pieces)
    return stem


def read(stem: Path, kind: str, **settings: object) -> list[Pieces]:
    file = TokenFile(stem, **settings)
    assert file.kind == kind
    if kind == "text":
        return [[("", ids.tolist())] for ids in np.split(file.ids, file.ends)[:-1]]
    return [[(role, ids.tolist()) for role, ids in file.pieces(i)] for i in range(file.n_docs)]


@pytest.mark.parametrize("vocab_size", [97, 70_000])
@pytest.mark.parametrize("n_rows", [0, 1, 50])
@pytest.mark.parametrize("kind", ["text", "chat", "summary"])
def test_what_is_written_is_read(tmp_path, kind, n_rows, vocab_size):
    rows = random_pieces(kind, n_rows, vocab_size=vocab_size)
    vocabulary = Vocabulary(vocab_size)
    stem = write(tmp_path / "new/train-00000", kind, rows, vocabulary)
    assert read(stem, kind, fingerprint=vocabulary.fingerprint) == rows
    file = TokenFile(stem)
    ids = [token for pieces in rows for _, part in pieces for token in part]
    assert file.ids.tolist() == ids
    assert (file.n_tokens, file.n_docs, file.vocab_size) == (len(ids), n_rows, vocab_size)
    assert file.fingerprint == vocabulary.fingerprint
    assert sorted(p.name for p in stem.parent.iterdir()) == ["train-00000.bin", "train-00000.idx"]


def test_the_same_rows_give_the_same_bytes(tmp_path):
    rows = random_pieces("chat", 20)
    for name in ("a", "b"):
        write(tmp_path / name, "chat", rows)
    for a, b in zip(pair(tmp_path / "a"), pair(tmp_path / "b"), strict=True):
        assert a.read_bytes() == b.read_bytes()


def test_a_pair_is_named_by_its_stem_or_by_either_file(tmp_path):
    stem = write(tmp_path / "a.b", "text", random_pieces("text", 3))
    assert [path.name for path in pair(stem)] == ["a.b.bin", "a.b.idx"]
    for path in pair(stem):
        assert pair(path) == pair(stem)
        assert TokenFile(path).n_docs == 3


def test_the_format_is_the_documented_one(tmp_path):
    stem = write(tmp_path / "x", "chat", [[("user", [1, 2, 3]), ("assistant", [4])]])
    ids, index = (path.read_bytes() for path in pair(stem))
    assert ids == bytes([1, 0, 2, 0, 3, 0, 4, 0])
    numbers = np.frombuffer(index[8:24], "<u4").tolist()
    assert (index[:8], numbers) == (b"BABYLTOK", [1, 1, 2, 97])
    assert np.frombuffer(index[24:48], "<u8").tolist() == [4, 1, 2]
    assert index[48:80].hex() == Vocabulary().fingerprint
    assert index[80:112] == hashlib.sha256(ids).digest()
    assert np.frombuffer(index[120:144], "<u8").tolist() == [2, 3, 4]
    assert [ROLES[role] for role in index[144:146]] == ["user", "assistant"]
    assert index[146:] == hashlib.sha256(index[:146]).digest()


def test_ids_stay_on_the_disk(tmp_path):
    file = TokenFile(write(tmp_path / "x", "text", random_pieces("text", 9)))
    assert isinstance(file.ids, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        file.ids[0] = 1


def cut(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: rng.integers(len(data))]


def flip_a_bit(data: bytes, rng: np.random.Generator) -> bytes:
    place = rng.integers(len(data))
    return data[:place] + bytes([data[place] ^ (1 << rng.integers(8))]) + data[place + 1 :]


def swap_two_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    first = rng.integers(len(data))
    others = [i for i, byte in enumerate(data) if byte != data[first]]
    second = rng.choice(others)
    changed[first], changed[second] = changed[second], changed[first]
    return bytes(changed)


def add_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    return data + rng.bytes(rng.integers(1, 40))


@pytest.mark.parametrize("which", [0, 1], ids=["bin", "idx"])
@pytest.mark.parametrize("damage", [cut, flip_a_bit, swap_two_bytes, add_bytes])
@pytest.mark.parametrize("kind", ["text", "chat"])
def test_no_damaged_file_is_accepted(tmp_path, kind, damage, which):
    path = pair(write(tmp_path / "x", kind, random_pieces(kind, 12)))[which]
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(200):
        path.write_bytes(damage(whole, rng))
        with pytest.raises(DataError, match=r"x\.(bin|idx): "):
            TokenFile(path)
    path.write_bytes(whole)
    TokenFile(path)


def test_a_cut_is_noticed_by_the_size(tmp_path):
    path = pair(write(tmp_path / "x", "text", random_pieces("text", 12)))[0]
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"damaged or cut, wanted .* bytes, found"):
        TokenFile(path)


@pytest.mark.parametrize("which", [0, 1], ids=["bin", "idx"])
@pytest.mark.parametrize("data", [b"", b"\0", b"\0" * 7, b"\0" * 400], ids=len)
def test_a_foreign_file_is_refused(tmp_path, which, data):
    path = pair(write(tmp_path / "x", "text", random_pieces("text", 5)))[which]
    path.write_bytes(data)
    with pytest.raises(DataError, match="pre-tokenize"):
        TokenFile(path)


def test_the_ids_of_another_pair_are_refused(tmp_path):
    rows = [[("", [1, 2, 3])], [("", [4])]]
    one, other = write(tmp_path / "a", "text", rows), write(tmp_path / "b", "text", rows[::-1])
    pair(other)[0].replace(pair(one)[0])
    with pytest.raises(DataError, match="its ids do not match their checksum"):
        TokenFile(one)


@pytest.mark.parametrize("which", [0, 1], ids=["bin", "idx"])
def test_a_pair_with_a_missing_file_is_refused_with_the_command(tmp_path, which):
    stem = write(tmp_path / "x", "text", random_pieces("text", 5))
    pair(stem)[which].unlink()
    with pytest.raises(DataError, match=r"no such file.*python -m data_process\.run"):
        TokenFile(stem)


def test_a_file_of_another_tokenizer_is_refused(tmp_path):
    stem = write(tmp_path / "x", "text", random_pieces("text", 5))
    other = hashlib.sha256(b"two").hexdigest()
    with pytest.raises(DataError, match=rf"size 97\), wanted {other[:12]}.*pre-tokenize again"):
        TokenFile(stem, fingerprint=other)


@pytest.mark.parametrize(
    "vocab_size, dtype", [(65_000, "<u2"), (65_536, "<u2"), (65_537, "<u4"), (70_001, "<u4")]
)
def test_no_id_wraps_around(tmp_path, vocab_size, dtype):
    assert id_dtype(vocab_size) == np.dtype(dtype)
    asked = [0, 64_999, 65_535, 65_536, 70_000]
    fitting = [token for token in asked if token < vocab_size]
    stem = write(tmp_path / "x", "text", [[("", fitting)]], Vocabulary(vocab_size))
    assert TokenFile(stem).ids.tolist() == fitting
    assert TokenFile(stem).ids.dtype == np.dtype(dtype)
    for token in [*asked[len(fitting) :], vocab_size, -1]:
        for kind, role in (("text", ""), ("chat", "user"), ("summary", "text")):
            with pytest.raises(DataError, match=f"below the vocabulary size {vocab_size}, found"):
                write(tmp_path / "y", kind, [[(role, [1, token])]], Vocabulary(vocab_size))
    assert not list(tmp_path.glob("*y*"))


@pytest.mark.parametrize("has_earlier", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=repr)
def test_an_error_inside_the_writer_leaves_what_was_there(tmp_path, error, has_earlier):
    if has_earlier:
        write(tmp_path / "x", "text", [[("", [1, 2])]])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with (
        pytest.raises(type(error)),
        TokenFileWriter(tmp_path / "x", "text", Vocabulary()) as writer,
    ):
        writer.add_text([5, 6, 7])
        raise error
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert len(before) == (2 if has_earlier else 0)


def test_a_whole_pair_replaces_an_earlier_one(tmp_path):
    write(tmp_path / "x", "text", random_pieces("text", 9))
    rows = random_pieces("summary", 4)
    assert read(write(tmp_path / "x", "summary", rows), "summary") == rows


@pytest.mark.parametrize("kind", ["text", "chat", "summary"])
def test_a_crafted_index_is_refused_or_read_and_nothing_else(tmp_path, kind):
    """Its checksum fits what it says, so that alone what it says can be wrong."""
    stem = write(tmp_path / "x", kind, random_pieces(kind, 9))
    _, idx = pair(stem)
    index, rng = idx.read_bytes()[:-32], np.random.default_rng(0)
    n_refused = 0
    for _ in range(400):
        crafted = bytearray(index)
        for place in rng.integers(12, len(index), size=rng.integers(1, 4)):
            crafted[place] = rng.choice([0, 1, 7, 127, 255])
        if rng.random() < 0.1:
            crafted = crafted[: rng.integers(8, len(crafted))]
        idx.write_bytes(crafted + hashlib.sha256(crafted).digest())
        try:
            found = read(stem, TokenFile(stem).kind)
        except DataError:
            n_refused += 1
            continue
        assert all(0 <= i < 97 for row in found for _, ids in row for i in ids)
    assert 200 < n_refused < 400


def test_ids_beyond_the_vocabulary_are_refused(tmp_path):
    stem = write(tmp_path / "x", "text", [[("", [96])]])
    ids, idx = pair(stem)
    ids.write_bytes(b"\x61\x00")  # 97
    index = bytearray(idx.read_bytes()[:-32])
    digest = hashlib.sha256(b"\x60\x00").digest()
    place = index.index(digest)
    index[place : place + 32] = hashlib.sha256(b"\x61\x00").digest()
    idx.write_bytes(index + hashlib.sha256(index).digest())
    with pytest.raises(DataError, match="ids of 97 and more"):
        TokenFile(stem)


def test_a_file_system_that_cannot_map_files_is_read_into_memory(tmp_path, monkeypatch):
    rows = random_pieces("chat", 9)
    stem = write(tmp_path / "x", "chat", rows)

    def refuse(*_, **__):
        raise OSError(errno.ENODEV, "no such device")

    monkeypatch.setattr(np, "memmap", refuse)
    assert read(stem, "chat") == rows
