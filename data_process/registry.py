"""The data sets: entries of datasets/catalog.yaml, each with the function that reads it.

A reader is a function in datasets/, known by the name of its first argument:

    record   one raw record -> a row, or an iterator of rows; Refused is raised for none
    records  all raw records -> rows and Skips, where records depend on each other
    raw_dir  the directory itself, where the files are neither JSON nor tables nor text

Its other arguments come from the entry's `options`, and from --columns and --roles if it has them.
raw.py opens the files; what is kept is decided in clean.py and dedup.py. A row has the keys of its
kind, an `id` (the record's number; pipeline.py makes it unique and puts the set's name before it)
and optionally `split`, where the publisher fixed the part it belongs to.
"""

import functools
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from babyllama.config import REPO, read_yaml
from babyllama.errors import ConfigError, DataError, nearest
from babyllama.rows import ROLES
from data_process import datasets
from data_process.columns import Refused
from data_process.columns import columns as known_columns
from data_process.raw import Record, Skip

GROUPS = {"sample": ("inews", "inews_title", "smalltalk")}
CATALOG = Path(datasets.__path__[0]) / "catalog.yaml"


@dataclass(frozen=True)
class Source:
    """The publisher's places and figures of a data set. Empty fields are not known."""

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


@dataclass(frozen=True)
class DataSet:
    """A set to be made. The fields are explained at the top of the catalogue.

    name: of the set, its directory under data/clean
    entry: its name in the catalogue
    """

    name: str
    entry: str
    about: str
    reader: str
    kind: str
    license: str
    source: Source
    ids: str
    rules: str
    options: Mapping[str, Any] = field(default_factory=dict)
    finish: str = ""
    shares: Mapping[str, float] = field(default_factory=lambda: {"val": 0.02})
    package: tuple[str, str, str] | None = None
    layout: str = ""
    inputs: tuple[str, ...] = ()
    whole: bool = False
    split_files: bool = True
    refused_count: bool = False

    def _takes(self) -> list[str]:
        return list(inspect.signature(_function(self.reader)).parameters)

    @property
    def reads_dir(self) -> bool:
        """True if the reader opens the files itself."""
        return self._takes()[0] == "raw_dir"

    def read(self, found: Any, *more: object, **chosen: Mapping[str, str]) -> Iterator[dict | Skip]:
        """Rows and Skips of the raw records, or of a directory and an encoding.

        chosen: columns and roles that the user named
        raises: ConfigError if he named some for a reader that has no choice
        """
        takes, given = self._takes(), {name: value for name, value in chosen.items() if value}
        if odd := [name for name in given if name not in takes]:
            raise ConfigError(
                f"--{odd[0]}: {self.entry} has a fixed layout; leave it out, or read the files as "
                f"instruction, conversations, passages, pairs or text"
            )
        function = functools.partial(_function(self.reader), **self.options, **given)
        return _each(function, found) if takes[0] == "record" else function(found, *more)

    def finished(self, row: dict) -> dict:
        """The last step for a row, after cleaning and de-duplication."""
        return _function(self.finish)(row) if self.finish else row

    def key(self) -> list[object]:
        """What decides the rows: the entry, and the code of the readers."""
        return [repr(self), *sorted({*CATALOG.parent.glob("*.[py]*")} - {CATALOG})]


def _function(name: str) -> Callable[..., Any]:
    module, function = name.split(".")
    return getattr(importlib.import_module(f"data_process.datasets.{module}"), function)


def _each(
    function: Callable[[Record], dict | Iterator[dict | Skip]], records: Iterable[Record | Skip]
) -> Iterator[dict | Skip]:
    """The rows of all records. Several of one record have the ids n, n-1, n-2 …, which keeps them
    in one part of the set: they share its text."""
    for record in records:
        if isinstance(record, Skip):
            yield record
            continue
        try:
            made = function(record)
            rows = [made] if isinstance(made, dict) else list(made)
        except Refused as refused:
            yield refused.skip(record)
            continue
        n_rows = 0
        for row in rows:
            if isinstance(row, dict):
                row = row | {"id": f"{record.n}-{n_rows}"} if n_rows else row
                n_rows += 1
            yield row


@functools.cache
def catalog() -> dict[str, dict[str, Any]]:
    """The entries of all sets by name, with what they take from others filled in."""
    found = yaml.safe_load(CATALOG.read_text("utf-8"))
    return {name: found.get(entry.pop("like", ""), {}) | entry for name, entry in found.items()}


def data_sets(entry: str, name: str | None = None) -> list[DataSet]:
    """The sets behind a name on the command line; a group has several.

    name: what the set is called, if not as its entry
    raises: ConfigError if there is no such entry, or the name is no file name
    """
    if entry not in (*catalog(), *GROUPS):
        raise _unknown(entry)
    if name and (entry in GROUPS or "/" in name or name.startswith(".") or "\\" in name):
        raise ConfigError(f"--name {name!r} does not fit {entry}: a group keeps its names, "
                          f"and a name is one plain word")  # fmt: skip
    return [_data_set(member, name or member) for member in GROUPS.get(entry, (entry,))]


def require_known(names: Iterable[str]) -> None:
    """raises: ConfigError at a name that is no entry's, no set's that was made, and no path"""
    for name in names:
        if not {"/", "\\"} & set(name) and name not in known_names():
            raise _unknown(name)


def known_names() -> list[str]:
    """Entries, groups, sets that were made, and the configs of sft.py."""
    made = [*(REPO / "data").glob("clean/*/"), *(REPO / "data").glob("tokens/*/*/")]
    configs = {path.stem for path in (REPO / "configs/sft").glob("*.yaml")} - {"datasets"}
    return [*GROUPS, *catalog(), *(path.name for path in made), *sorted(configs)]


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


def weighted_names(text: str) -> dict[str, float]:
    """The sets that a command line names, and how often each is seen: "csl" or "csl:2,belle:0.5".

    raises: ConfigError if a weight is no number or a name comes twice
    """
    found: dict[str, float] = {}
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        name, *weights = re.split(r"(?<=.):(?=[^:/\\]*$)", part)
        try:
            found[name.strip()] = float(*weights) if weights else 1.0
        except ValueError:
            raise ConfigError(
                f"--dataset: wanted NAME or NAME:WEIGHT, found {part!r}; as in csl:2,belle:0.5"
            ) from None
    if not found or len(found) < len(parts):
        raise ConfigError(
            f"--dataset {text!r}: wanted each set once; a weight says how often its rows are seen, "
            f"as in csl:2"
        )
    return found


def _unknown(name: str) -> ConfigError:
    return ConfigError(
        f"wanted a data set, found {name!r}{nearest(name, known_names())}; "
        f"python -m data_process.tools.list shows all"
    )


def _data_set(entry: str, name: str) -> DataSet:
    given: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in catalog()[entry].items()}
    source = Source(**{f.name: given.pop(f.name) for f in fields(Source) if f.name in given})
    usual = {"name": name, "entry": entry, "ids": name, "rules": given["kind"], "source": source}
    return DataSet(**{**usual, **given})


def check_chosen(columns: Mapping[str, str], roles: Mapping[str, str]) -> None:
    """Refuse --columns and --roles for what there is not."""
    if odd := sorted(set(columns) - set(known_columns())):
        raise ConfigError(f"--columns.{odd[0]}: wanted one of {', '.join(known_columns())}")
    for name, role in roles.items():
        if role not in ROLES:
            raise ConfigError(f"--roles.{name}: wanted {', '.join(ROLES)}, found {role!r}")


def package_dir(requirement: str, module: str, folder: str) -> Path:
    """The data directory of an installed package, found without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"wanted the data of the package {requirement}, found it not installed; "
            f"pip install {requirement}"
        )
    return Path(spec.submodule_search_locations[0]) / folder
