"""The C files of this folder as a library: int8.c (steps), choose.c (drawing a token), train.c
and train32.c (training steps).

They are compiled when they are first needed, in two seconds, for the processor at hand, and kept in
the user's cache directory for the next start. What is kept runs as the user: it is loaded from a
directory alone that nobody else can write to, and only as it was written.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from babyllama.config import atomic_write
from babyllama.errors import ConfigError

_HERE = Path(__file__).parent
_SOURCES = [_HERE / name for name in ("int8.c", "choose.c", "train.c", "train32.c")]

# Vector instructions add in an order of their own, only in the loops that allow it (omp simd): one
# that -ffast-math chose would depend on the number of rows, and change what tiny numbers are.
_FLAGS = "-O3 -shared -fPIC -fopenmp-simd -fno-math-errno -fno-trapping-math -ffinite-math-only"
# Not every compiler knows every processor or has OpenMP; the first set that works is taken.
_EXTRA = ("-march=native -fopenmp", "-mcpu=native -fopenmp", "-march=native", "-mcpu=native", "")


def compiler() -> str | None:
    """The C compiler of this machine: $CC, or one of the usual names."""
    names = [os.environ.get("CC"), "cc", "gcc", "clang"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _key(compiler: str) -> str:
    """Stands for these sources, this compiler and this processor."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text("utf-8", "replace").splitlines() if cpu.is_file() else []
    told = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    parts = [compiler, _FLAGS, *_EXTRA, platform.platform(), platform.processor(), *sorted(told)]
    key = hashlib.sha256("\0".join(parts).encode())
    for source in sorted(_HERE.glob("*.[ch]")):
        key.update(source.read_bytes())
    return key.hexdigest()[:16]


def _cache_dir() -> Path | None:
    """The directory where libraries are kept, the user's own and closed to others; None where
    there cannot be one, and each start compiles anew."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if not root.is_absolute():  # without a home; the XDG standard ignores relative paths, too
        return None
    place = root / "babyllama"
    with contextlib.suppress(OSError):
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not place.is_symlink() and place.stat().st_uid == os.geteuid():
            place.chmod(0o700)
            return place if place.stat().st_mode & 0o777 == 0o700 else None
    return None


def _digest(library: Path) -> str:
    """What the name of a kept library ends with: one that a crash has cut would crash us, too."""
    return hashlib.sha256(library.read_bytes()).hexdigest()[:16]


def _kept(folder: Path | None, key: str) -> Iterator[Path]:
    """The libraries that are kept for a key, whole; a damaged one is deleted."""
    for path in sorted(folder.glob(f"native-{key}-*.so")) if folder else ():
        with contextlib.suppress(OSError):
            if path.stem.endswith(_digest(path)):
                yield path
            else:
                path.unlink()


def _keep(library: Path, folder: Path | None, key: str) -> None:
    """Keep a library, whole or not at all; where that cannot be, it is compiled each time."""
    if folder is None:
        return
    with contextlib.suppress(OSError):
        kept = folder / f"native-{key}-{_digest(library)}.so"
        with atomic_write(kept, unique=True) as temporary:
            shutil.copyfile(library, temporary)


def _compile(compiler: str, out: Path) -> None:
    """raises: ConfigError if it cannot compile the files"""
    for extra in _EXTRA:
        command = [compiler, *_FLAGS.split(), *extra.split(), *map(str, _SOURCES), "-o", str(out)]
        done = subprocess.run([*command, "-lm"], capture_output=True, text=True, errors="replace")
        if done.returncode == 0:
            return
    reason = " ".join(done.stderr.split())[:200]
    raise ConfigError(
        f"int8 weights need a C compiler that compiles {_SOURCES[0].name}, found that {compiler} "
        f"says: {reason}; name another in the variable CC, or decode with --weights float32"
    )


@cache
def compiled() -> ctypes.CDLL:
    """The library.

    raises: ConfigError if there is no compiler, it cannot compile the files, or no directory
        allows what it made to run
    """
    found = compiler()
    if found is None or sys.platform == "win32":
        raise ConfigError(
            "int8 weights need a C compiler (cc, gcc or clang), found none; install one, or "
            "decode with --weights float32"
        )
    folder, key = _cache_dir(), _key(found)
    library = _loaded(_kept(folder, key))
    if library is None:
        try:
            with tempfile.TemporaryDirectory() as place:
                out = Path(place) / "native.so"
                _compile(found, out)
                _keep(out, folder, key)
                library = _loaded((out, *_kept(folder, key)))
        except OSError as error:
            raise ConfigError(f"int8 weights need a temporary directory: {error}") from None
    if library is None:
        raise ConfigError(
            "int8 weights need a directory whose programs may run, found none (mounted noexec?); "
            "name one in the variable TMPDIR, or decode with --weights float32"
        )
    return library


def _loaded(places: Iterable[Path]) -> ctypes.CDLL | None:
    """The first of these files that the system takes: not one of a directory mounted noexec."""
    for path in places:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(path))
    return None


@cache
def library() -> ctypes.CDLL | None:
    """The same, or None where it cannot be had."""
    try:
        return compiled()
    except ConfigError:
        return None
