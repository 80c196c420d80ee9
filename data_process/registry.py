"""The table of data sets: each file in datasets/ is one."""

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from babyllama.errors import ConfigError
from data_process import datasets
from data_process.source import Source

MODULES = tuple(sorted(module.name for module in pkgutil.iter_modules(datasets.__path__)))
GROUPS = {"sample": ("inews", "inews_title", "smalltalk")}
SHARES = {"val": 0.02}
IMPORT = re.compile(r"^from data_process\.datasets\.(\w+) import", re.MULTILINE)


@dataclass(frozen=True)
class DataSet:
    """A set to be made: a reader's module with the usual values filled in.

    name: of the set, its directory under data/clean
    ids: the name before the ids of its rows
    rules: which row of the tables in clean.py applies
    The other fields are explained in datasets/__init__.py.
    """

    name: str
    reader: str
    kind: str
    source: Source
    license: str
    ids: str
    rules: str
    shares: Mapping[str, float]
    package: tuple[str, str, str] | None
    layout: str
    whole: bool
    split_files: bool
    refused_count: bool
    read: Callable[..., Iterator] | None
    read_dir: Callable[[Path, str], Iterator] | None
    finish: Callable[[dict], dict]

    def code(self) -> list[Path]:
        """The reader's file, and those of the readers that it builds on."""
        found, waiting = [], [self.reader]
        while waiting:
            path = Path(datasets.__path__[0]) / f"{waiting.pop()}.py"
            if path not in found:
                found.append(path)
                waiting += IMPORT.findall(path.read_text(encoding="utf-8"))
        return sorted(found)


def data_sets(reader: str, name: str | None = None) -> list[DataSet]:
    """The sets behind a name on the command line; a group has several.

    name: what the set is called, if not as its reader
    raises: ConfigError if the reader is not known, or the name is no file name
    """
    if reader not in (*MODULES, *GROUPS):
        known = ", ".join([*GROUPS, *MODULES])
        raise ConfigError(f"wanted a data set, found {reader!r}; known are {known}")
    if name and (reader in GROUPS or "/" in name or name.startswith(".") or "\\" in name):
        raise ConfigError(f"--name {name!r} does not fit {reader}: a group keeps its names, "
                          f"and a name is one plain word")  # fmt: skip
    return [_data_set(member, name or member) for member in GROUPS.get(reader, (reader,))]


def _data_set(reader: str, name: str) -> DataSet:
    module = importlib.import_module(f"data_process.datasets.{reader}")
    read_dir = getattr(module, "read_dir", None)
    return DataSet(
        name=name,
        reader=reader,
        kind=module.KIND,
        source=module.SOURCE,
        license=module.LICENSE,
        ids=getattr(module, "IDS", name),
        rules=getattr(module, "RULES", module.KIND),
        shares=getattr(module, "SHARES", SHARES),
        package=getattr(module, "PACKAGE", None),
        layout=getattr(module, "LAYOUT", ""),
        whole=getattr(module, "WHOLE", False) or read_dir is not None,
        split_files=getattr(module, "SPLIT_FILES", True),
        refused_count=getattr(module, "REFUSED_COUNT", False),
        read=getattr(module, "read", None),
        read_dir=read_dir,
        finish=getattr(module, "finish", lambda row: row),
    )
