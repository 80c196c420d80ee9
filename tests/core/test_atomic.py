"""Files and directories replaced as a whole, and directories held by one process at a time."""

import errno
import os
import socket
import stat

import pytest

from babyllama.config import atomic_dir, atomic_write, lock, recover_dir
from babyllama.errors import ConfigError


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
