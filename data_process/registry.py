"""The table of data sets: each file in datasets/ is one.

What a reader says of its source, for fetch.py and tools/list.py; and raw data inside installed
packages, found without importing, read without running code.
"""

import importlib
import importlib.util
import pickle
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from babyllama.config import REPO, read_yaml, shown
from babyllama.errors import ConfigError, DataError, nearest
from data_process import datasets


@dataclass(frozen=True)
class Source:
    """The publisher's places and figures of a data set. Empty fields are not known.

    home: page that describes the set
    rows, size: as published
    huggingface, modelscope: "owner/name" of the data set there
    files: which files of the hub are wanted, as glob patterns; empty: all
    urls: direct addresses of files
    sha256: of files, by name
    manual: what the user must do where there is no open download
    """

    home: str
    rows: str = ""
    size: str = ""
    huggingface: str = ""
    modelscope: str = ""
    files: tuple[str, ...] = ()
    urls: tuple[str, ...] = ()
    sha256: Mapping[str, str] = field(default_factory=dict)
    manual: str = ""

    def __str__(self) -> str:
        return self.home


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
        raise _unknown(reader)
    if name and (reader in GROUPS or "/" in name or name.startswith(".") or "\\" in name):
        raise ConfigError(f"--name {name!r} does not fit {reader}: a group keeps its names, "
                          f"and a name is one plain word")  # fmt: skip
    return [_data_set(member, name or member) for member in GROUPS.get(reader, (reader,))]


def require_known(names: Iterable[str]) -> None:
    """raises: ConfigError at a name that is no reader's, no set's that was made, and no path"""
    for name in names:
        if not {"/", "\\"} & set(name) and name not in known_names():
            raise _unknown(name)


def known_names() -> list[str]:
    """Readers, groups, sets that were made, and the configs of sft.py."""
    made = [*(REPO / "data").glob("clean/*/"), *(REPO / "data").glob("tokens/*/*/")]
    configs = (REPO / "configs/sft").glob("*.yaml")
    return [*GROUPS, *MODULES, *(path.name for path in made), *(path.stem for path in configs)]


def settings_of(argv: Sequence[str]) -> list[str]:
    """What sft.py reads before a command line without --config: the file of the first set that it
    names, configs/sft/<set>.yaml, else its line in configs/sft/datasets.yaml."""
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        name = following if word == "--dataset" else word.removeprefix("--dataset=")
        name = name.partition(",")[0].partition(":")[0].strip()
        if word.startswith("--dataset") and not any(w.startswith("--config") for w in argv):
            table = REPO / "configs/sft/datasets.yaml"
            own, sets = table.with_name(f"{name}.yaml"), read_yaml(table)
            if own.is_file() and own != table:
                return ["--config", str(own)]
            changes = sets["all"] | sets[name] if name in sets else {}
            return [f"--{setting}={value}" for setting, value in changes.items()]
    return []


def _unknown(name: str) -> ConfigError:
    return ConfigError(
        f"wanted a data set, found {name!r}{nearest(name, known_names())}; "
        f"python -m data_process.tools.list shows all"
    )


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


def package_dir(requirement: str, module: str, folder: str) -> Path:
    """The data directory of an installed package, found without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"wanted the data of the package {requirement}, found it not installed; "
            f"pip install {requirement}"
        )
    return Path(spec.submodule_search_locations[0]) / folder


class _NoGlobals(pickle.Unpickler):
    """Reads lists, strings and numbers; a pickle that names a function or class is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}, which could run code")


def read_pickle(path: Path) -> Any:
    """The plain value in a pickle file."""
    try:
        with open(path, "rb") as file:
            return _NoGlobals(file).load()
    # A damaged pickle fails in as many ways as it has opcodes.
    except (pickle.UnpicklingError, EOFError, ArithmeticError, AttributeError, ImportError,
            LookupError, MemoryError, TypeError, ValueError) as error:  # fmt: skip
        raise DataError(
            f"{shown(path)}: wanted a pickle of plain lists, found one that is refused "
            f"({error}); install the package again"
        ) from None
