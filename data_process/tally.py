"""Counts of one stage: rows and characters in and out, fixes, and every drop with its reason."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

N_EXAMPLES = 10
SAMPLE_CHARS = 80


@dataclass
class Tally:
    """Counts of one stage, of one shard or of all.

    dropped: rows by reason; examples: at most ten of each, "place: beginning"
    """

    rows_in: int = 0
    chars_in: int = 0
    rows_out: int = 0
    chars_out: int = 0
    fixed: Counter = field(default_factory=Counter)
    dropped: Counter = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def drop(self, reason: str, where: str, sample: str) -> None:
        """Count a row that goes."""
        self.dropped[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < N_EXAMPLES:
            examples.append(f"{where}: {sample[:SAMPLE_CHARS]}")

    def as_dict(self) -> dict:
        """What JSON can hold, the most frequent reasons first."""
        counts = {name: getattr(self, name)
                  for name in ("rows_in", "chars_in", "rows_out", "chars_out")}  # fmt: skip
        counts["fixed"] = dict(self.fixed.most_common())
        counts["dropped"] = {
            reason: {"rows": n, "examples": self.examples[reason]}
            for reason, n in self.dropped.most_common()
        }
        return counts


def merged(counts: Iterable[dict]) -> dict:
    """The sum of what several shards counted."""
    total = Tally()
    for one in counts:
        for name in ("rows_in", "chars_in", "rows_out", "chars_out"):
            setattr(total, name, getattr(total, name) + one[name])
        total.fixed.update(one["fixed"])
        for reason, found in one["dropped"].items():
            total.dropped[reason] += found["rows"]
            examples = total.examples.setdefault(reason, [])
            examples += found["examples"][: N_EXAMPLES - len(examples)]
    return total.as_dict()
