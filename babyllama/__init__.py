"""The parts that the scripts share. Importing any of them does nothing visible.

Where nothing of requirements.txt is installed, it ends with one line that says what to do, instead
of the traceback of whatever import comes first; what else is missing config.run says.
"""

import importlib.util
import os
import re
import sys
from pathlib import Path

if sys.version_info < (3, 11) or importlib.util.find_spec("jsonargparse") is None:
    _activate = r".venv\Scripts\activate" if os.name == "nt" else "source .venv/bin/activate"
    _is_there = (Path(__file__).parents[1] / ".venv").is_dir()
    sys.stderr.write(
        f"error: wanted Python 3.11 with the packages of requirements.txt, found "
        f"{sys.version.split()[0]} without them; "
        + (f"activate them: {_activate}\n" if _is_there else "run first: python quickstart.py\n")
    )
    sys.exit(2)

# Of each shape of a bfloat16 product oneDNN, and torch above it, keep code and room: of 1,024
# shapes, 3.5 GB where rows have all lengths. A step of two shapes uses 47. Read when torch loads.
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "64")


def brought_by(module: str) -> str:
    """The file of requirements that brings a module, or ""."""
    name = re.compile(rf"(?im)^(# )?{module.partition('.')[0].replace('_', '[-_]')}\b")
    root = Path(__file__).parents[1]
    for file in (root / "requirements.txt", *sorted((root / "requirements").glob("*.txt"))):
        if file.stem != "dev" and name.search(file.read_text("utf-8")):
            return file.relative_to(root).as_posix()
    return ""
