"""The C files of this folder as a library: int8.c (steps) and choose.c (drawing a token).

They are compiled when they are first needed, in a second, for the processor at hand.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from babyllama.errors import ConfigError

_SOURCES = [Path(__file__).with_name(name) for name in ("int8.c", "choose.c")]

# Vector instructions add in an order of their own, only in the loops that allow it (omp simd): one
# that -ffast-math chose would depend on the number of rows, and change what tiny numbers are.
_FLAGS = "-O3 -shared -fPIC -fopenmp-simd -fno-math-errno -fno-trapping-math -ffinite-math-only"
# Not every compiler knows every processor or has OpenMP; the first set that works is taken.
_EXTRA = ("-march=native -fopenmp", "-mcpu=native -fopenmp", "-march=native", "-mcpu=native", "")


def compiler() -> str | None:
    """The C compiler of this machine: $CC, or one of the usual names."""
    names = [os.environ.get("CC"), "cc", "gcc", "clang"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


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
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "native.so"
        for extra in _EXTRA:
            command = [found, *_FLAGS.split(), *extra.split(), *map(str, _SOURCES), "-o", str(out)]
            done = subprocess.run([*command, "-lm"], capture_output=True, text=True)
            if done.returncode == 0:
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
