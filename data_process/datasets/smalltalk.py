"""Short Chinese dialogues from the ChatterBot corpus. Ship inside a PyPI package."""

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import yaml

from babyllama.errors import DataError
from data_process.raw import Skip
from data_process.registry import Source

KIND = "chat"
RULES = "smalltalk"
SHARES = {"val": 0.05}
SOURCE = Source(
    home="github.com/gunthercox/chatterbot-corpus",
    rows="467",
    size="0.1 MB",
    manual="comes with the PyPI package chatterbot-corpus 1.3.3; nothing to fetch",
)
LICENSE = "package metadata: BSD License; no licence file inside; texts contributed by users"
PACKAGE = ("chatterbot-corpus==1.3.3", "chatterbot_corpus", "data/chinese")

# Translated word by word from English puns, gossip and insults; their Chinese says nothing.
UNREADABLE = ("gossip", "humor", "psychology")


def read_dir(raw_dir: Path, encoding: str) -> Iterator[dict | Skip]:
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
                roles = cycle(("user", "assistant"))
                messages = [{"role": r, "content": u} for r, u in zip(roles, entry, strict=False)]
                yield {"id": number, "messages": messages}
            number += 1
