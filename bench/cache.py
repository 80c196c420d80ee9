"""What a checkpoint has answered so far, so that a run that was stopped goes on where it was.

One JSON line for each question, written a chunk at a time; a last line that was cut is dropped.
The key of a question holds all that the answer depends on.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path


class Store:
    """Answers by question, kept in a file; without a path, in memory only.

    about: what every answer depends on beside its question: the checkpoint and its format
    """

    def __init__(self, path: Path | None, about: object) -> None:
        self.path = path
        self.about = json.dumps(about, ensure_ascii=False, sort_keys=True, default=str)
        self.known: dict[str, object] = {}
        self.n_found = 0
        if path and path.exists():
            whole = path.read_bytes().rpartition(b"\n")[0]
            for line in whole.split(b"\n"):
                if line:
                    self.known.update([json.loads(line)])
            path.write_bytes(whole + b"\n" if whole else b"")

    def key(self, *question: object) -> str:
        """A short name for a question."""
        text = self.about + json.dumps(question, ensure_ascii=False, sort_keys=True)
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()

    def add(self, answers: Iterable[tuple[str, object]]) -> None:
        """Keep the answers of one chunk."""
        answers = list(answers)
        self.known.update(answers)
        if self.path:
            with open(self.path, "a", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(pair) + "\n" for pair in answers)
