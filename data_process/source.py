"""Where a data set comes from: what a reader says in SOURCE, for fetch.py and list.py."""

from collections.abc import Mapping
from dataclasses import dataclass, field


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
