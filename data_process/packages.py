"""Raw data inside installed packages: found without importing, read without running code."""

import importlib.util
import pickle
from pathlib import Path
from typing import Any

from babyllama.cli import shown
from babyllama.errors import DataError


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
