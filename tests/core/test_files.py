"""Files and directories are replaced as a whole, with the rights of new ones, and held by one
process at a time; what cannot be written is refused in time, and YAML of unknown origin is read
without harm."""

import errno
import os
import socket
import stat
from pathlib import Path

import pytest

from babyllama.config import (
    atomic_dir,
    atomic_write,
    lock,
    read_yaml,
    recover_dir,
    require_writable,
)
from babyllama.errors import ConfigError


def test_what_is_in_the_way_comes_back_where_the_swap_fails(tmp_path, monkeypatch):
    place = tmp_path / "place"
    with atomic_dir(place) as new:
        (new / "one").write_text("")
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if Path(source).name == "tmp-place":
            raise OSError(errno.EIO, "no")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no"), atomic_dir(place) as new:
        (new / "two").write_text("")
    assert [path.name for path in place.iterdir()] == ["one"]


@pytest.mark.skipif(os.name != "posix", reason="rights of POSIX")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_get_the_rights_that_umask_says(mask, tmp_path):
    before = os.umask(mask)
    try:
        with atomic_dir(tmp_path / "place") as new:
            os.close(os.open(new / "file", os.O_CREAT | os.O_WRONLY, 0o600))  # as safetensors does
    finally:
        os.umask(before)
    assert (tmp_path / "place/file").stat().st_mode & 0o777 == 0o666 & ~mask


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(ConfigError, match="is a directory"):
        require_writable(tmp_path)
    with pytest.raises(OSError, match="file"):
        require_writable(tmp_path / "file/inside")
    require_writable(tmp_path / "file")
    require_writable(tmp_path / "new/place/file")
    assert (tmp_path / "file").read_text() == "old"
    assert not list(tmp_path.glob("**/tmp-*"))


BOMB = "a: &a [x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcd", "bcde"))  # noqa: B905


@pytest.mark.parametrize(
    "text", [BOMB, "[" * 10_000, "a: !!python/name:os.system", "a: !!int x", "a: !!float x",
             "a: 1" + "0" * 5000, "\x00", "name: [", "a: !!timestamp {}", "\ud800"],
)  # fmt: skip
def test_yaml_that_is_none_of_ours_is_refused_in_one_line(text, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError) as error:
        read_yaml(path)
    assert len(str(error.value).splitlines()) == 1


def test_a_name_that_looks_like_a_date_is_a_name(tmp_path):
    (tmp_path / "x.yaml").write_text("a: 2024-01-31\nb: 2024-99-99\nc: 1.5\nd: null")
    assert read_yaml(tmp_path / "x.yaml") == {"a": "2024-01-31", "b": "2024-99-99", "c": 1.5,
                                              "d": None}  # fmt: skip


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), atomic_write(path) as temporary:
        temporary.write_text("ne")
        raise OSError("disk full")
    assert path.read_text() == "old"
    with atomic_write(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("earlier", [True, False])
def test_a_directory_is_replaced_whole_or_not_at_all(tmp_path, earlier):
    place = tmp_path / "set"
    if earlier:
        place.mkdir()
        (place / "old").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match="full"), atomic_dir(place) as fresh:
        (fresh / "ne").touch()
        raise OSError("disk full")
    assert sorted(tmp_path.rglob("*")) == before
    with atomic_dir(place) as fresh:
        (fresh / "inner").mkdir()
        (fresh / "inner/new").write_text("new")
    assert sorted(tmp_path.rglob("*")) == [place, place / "inner", place / "inner/new"]


def test_a_directory_survives_a_kill_between_the_two_renames(tmp_path):
    place, old = tmp_path / "set", tmp_path / "old-set"
    old.mkdir()
    (old / "row").touch()
    recover_dir(place)
    assert sorted(tmp_path.rglob("*")) == [place, place / "row"]
    old.mkdir()  # killed behind the second one
    recover_dir(place)
    assert sorted(tmp_path.rglob("*")) == [place, place / "row"]


@pytest.mark.parametrize("kind", [errno.EINVAL, errno.EBADF, errno.ENOTSUP])
def test_a_disk_that_flushes_no_directories_is_written_to_all_the_same(tmp_path, monkeypatch, kind):
    flush = os.fsync

    def refuse(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(kind, "no such call here")
        flush(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    with atomic_write(tmp_path / "file") as temporary:
        temporary.write_text("new")
    with atomic_dir(tmp_path / "set") as fresh:
        (fresh / "row").touch()
    assert (tmp_path / "file").read_text() == "new" and (tmp_path / "set/row").exists()


def test_a_disk_that_is_full_is_not_passed_over(tmp_path, monkeypatch):
    def refuse(handle: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="full"), atomic_write(tmp_path / "file") as temporary:
        temporary.write_text("new")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("offered", [True, False])
def test_a_directory_has_one_holder(tmp_path, monkeypatch, offered):
    fcntl = pytest.importorskip("fcntl")
    if not offered:

        def refuse(*_: object) -> None:
            raise OSError(errno.ENOLCK, "no locks here")

        monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(socket, "gethostname", lambda: "小明的电脑\udce4")
    for _ in range(2):
        with lock(tmp_path):
            said = rf"in use \(process {os.getpid()} on 小明的电脑"
            with pytest.raises(ConfigError, match=said), lock(tmp_path):
                raise AssertionError
            assert (tmp_path / "lock.txt").exists()
        assert not (tmp_path / "lock.txt").exists()
