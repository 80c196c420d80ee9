"""The table of data sets. A new one is one file in datasets/ and one line here."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from babyllama.errors import ConfigError

MODULES = {
    "inews": "inews",
    "inews_title": "inews_title",
    "smalltalk": "smalltalk",
    "csl": "csl",
    "text": "text",
    "conversations": "conversations",
    "instruction": "instruction",
}
GROUPS = {"sample": ("inews", "inews_title", "smalltalk")}
SHARES = {"val": 0.02}


@dataclass(frozen=True)
class DataSet:
    """A set to be made: a reader's module with the usual values filled in.

    name: of the set, its directory under data/clean
    ids: the name before the ids of its rows
    rules: which row of the tables in clean.py applies
    """

    name: str
    reader: str
    kind: str
    source: str
    license: str
    ids: str
    rules: str
    shares: Mapping[str, float]
    package: tuple[str, str, str] | None
    read: Callable[[Path, str], Iterator]
    finish: Callable[[dict], dict]


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
    module = importlib.import_module(f"data_process.datasets.{MODULES[reader]}")
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
        read=module.read,
        finish=getattr(module, "finish", lambda row: row),
    )
