"""The C files of this folder as a library: int8.c (steps), choose.c (drawing a token), train.c.

They are compiled when they are first needed, in two seconds, for the processor at hand, and kept in
the user's cache directory for the next start.
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
from functools import cache
from pathlib import Path

from babyllama.errors import ConfigError

_SOURCES = [Path(__file__).with_name(name) for name in ("int8.c", "choose.c", "train.c")]

# Vector instructions add in an order of their own, only in the loops that allow it (omp simd): one
# that -ffast-math chose would depend on the number of rows, and change what tiny numbers are.
_FLAGS = "-O3 -shared -fPIC -fopenmp-simd -fno-math-errno -fno-trapping-math -ffinite-math-only"
# Not every compiler knows every processor or has OpenMP; the first set that works is taken.
_EXTRA = ("-march=native -fopenmp", "-mcpu=native -fopenmp", "-march=native", "-mcpu=native", "")


def compiler() -> str | None:
    """The C compiler of this machine: $CC, or one of the usual names."""
    names = [os.environ.get("CC"), "cc", "gcc", "clang"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _kept(compiler: str) -> Path:
    """Where the library of these sources, this compiler and this processor is kept."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text("utf-8", "replace").splitlines() if cpu.is_file() else []
    told = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    parts = [compiler, _FLAGS, *_EXTRA, platform.platform(), platform.processor(), *sorted(told)]
    key = hashlib.sha256("\0".join(parts).encode())
    for source in _SOURCES:
        key.update(source.read_bytes())
    place = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return place / "babyllama" / f"native-{key.hexdigest()[:16]}.so"


def _keep(library: Path, kept: Path) -> None:
    """Keep a library, whole or not at all; where that cannot be, it is compiled each time."""
    if not kept.is_absolute():  # without a home; the XDG standard ignores relative paths, too
        return
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_name(f"tmp-{os.getpid()}-{kept.name}")
        shutil.copyfile(library, temporary)
        os.replace(temporary, kept)


@cache
def compiled() -> ctypes.CDLL:
    """The library.

    raises: ConfigError if there is no compiler, or it cannot compile the files
    """
    found = compiler()
    if found is None or sys.platform == "win32":
        raise ConfigError(
            "int8 weights need a C compiler (cc, gcc or clang), found none; install one, or "
            "decode with --weights float32"
        )
    kept = _kept(found)
    with contextlib.suppress(OSError):  # there is none, or it is damaged
        return ctypes.CDLL(str(kept))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "native.so"
        for extra in _EXTRA:
            command = [found, *_FLAGS.split(), *extra.split(), *map(str, _SOURCES), "-o", str(out)]
            done = subprocess.run([*command, "-lm"], capture_output=True, text=True)
            if done.returncode == 0:
                _keep(out, kept)
                return ctypes.CDLL(str(out))
    reason = " ".join(done.stderr.split())[:200]
    raise ConfigError(
        f"int8 weights need a C compiler that compiles {_SOURCES[0].name}, found that {found} "
        f"says: {reason}; name another in the variable CC, or decode with --weights float32"
    )


@cache
def library() -> ctypes.CDLL | None:
    """The same, or None where it cannot be had."""
    try:
        return compiled()
    except ConfigError:
        return None
