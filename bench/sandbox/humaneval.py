"""HumanEval: functions that the model completes, run with their tests (run.py).

The harness asks for the completions; it cannot score them offline, since its metric is fetched.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from tqdm import tqdm

from bench.sandbox.run import Limits, Outcome, run_program


def sources(row: dict, completion: str) -> tuple[str, str]:
    """The program that a completion makes, and the tests that it must pass."""
    program = f"{row['prompt']}{completion}\n"
    return program, f"{row['test']}\ncheck({row['entry_point']})\n"


def run_all(
    rows: Sequence[dict], completions: Iterable[str], limits: Limits | None = None
) -> list[Outcome]:
    """How each completed program ends, in order."""
    pairs = zip(rows, completions, strict=True)
    bar = tqdm(pairs, total=len(rows), desc="run programs", unit=" programs")
    return [run_program(*sources(row, text), limits) for row, text in bar]


def reasons(outcomes: Iterable[Outcome]) -> dict[str, int]:
    """How many programs ended in which way."""
    return dict(Counter(outcome.reason for outcome in outcomes).most_common())
