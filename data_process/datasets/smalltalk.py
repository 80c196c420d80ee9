"""Short Chinese dialogues from the ChatterBot corpus, inside a PyPI package."""

from collections.abc import Iterator
from pathlib import Path

import yaml

from babyllama.errors import DataError
from data_process.datasets.turns import in_turns
from data_process.raw import Skip

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
