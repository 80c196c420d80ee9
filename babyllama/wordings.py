"""How much of a score hangs on the wording of the question: one set asked in every unseen wording.

Training never shows these wordings (`eval.unseen` of the prompt file), so their mean is what a user
may expect who asks in his own words.
"""

from collections.abc import Sequence

import numpy as np

from babyllama import metrics
from babyllama.checkpoint import Loaded
from babyllama.errors import ConfigError
from babyllama.scoring import aligned
from babyllama.titles import Asking, Titles, summarise, templates

USUAL = "the usual question"


def by_wording(
    loaded: Loaded, texts: Sequence[str], references: Sequence[str], how: Asking, usual: Titles
) -> dict:
    """ROUGE of every unseen wording and of the usual one, times 100, and how the unseen differ.

    raises: ConfigError if the prompt file has no unseen wordings
    """
    unseen = templates(how.prompts, loaded.tokenizer).unseen
    if not unseen:
        raise ConfigError(f"{how.prompts}: wanted eval.unseen for --wordings, found none; add some")
    asked = {question: summarise(loaded, texts, how, question) for question in unseen}
    rows = {}
    for question, titles in ({USUAL: usual} | asked).items():
        f = metrics.rouge_published(titles.titles, references).f
        means = {name: 100 * float(values.mean()) for name, values in f.items()}
        rows[question] = means | {"n_framed": titles.n_framed}
    spread = {name: _spread([rows[q][name] for q in unseen]) for name in metrics.ROUGE}
    return {"wordings": rows, "spread": spread}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "mean": float(np.mean(values)),
        "deviation": float(np.std(values)),
        "lowest": min(values),
        "highest": max(values),
    }


def table(found: dict) -> str:
    """One line a wording, the best first, and what the unseen are together."""
    lines = [["wording", *metrics.ROUGE, "lead-ins"]]
    rows = sorted(found["wordings"].items(), key=lambda pair: -pair[1]["rouge-1"])
    for question, row in rows:
        figures = [f"{row[name]:.1f}" for name in metrics.ROUGE]
        lines.append([question.replace("\n", "⏎"), *figures, str(row["n_framed"])])
    for key in ("mean", "deviation", "lowest", "highest"):
        lines.append([f"unseen: {key}", *(f"{r[key]:.1f}" for r in found["spread"].values()), ""])
    return aligned(lines)
