"""pCLUE: nine Chinese tasks of understanding, written as prompts with short answers.

JSON lines of {"input", "target", "type", "answer_choices"?}. The target may be a list of texts,
joined by "，" as the official scorer does; the choices may be missing or "". Left out are rows
whose target is none of the choices, and texts with the marks of cut-out idioms.

Nearly all answers are one short phrase: a chat model that sees many of them answers briefly and
wrongly. Keep the share of this set small in a mixture, or leave it out.
"""

import re
from collections.abc import Iterable, Iterator

from data_process.datasets.conversations import dialogue, in_turns, refuse
from data_process.raw import Record, Skip
from data_process.registry import Source

KIND = "chat"
SOURCE = Source(
    home="github.com/CLUEbenchmark/pCLUE",
    rows="1,200,705 / 100,000",
    urls=tuple(
        f"https://raw.githubusercontent.com/CLUEbenchmark/pCLUE/HEAD/datasets/pCLUE_{part}.json"
        for part in ("dev", *(f"train_{n}" for n in range(1, 10)))
    ),
)
LICENSE = "none stated for the data (repository: Apache-2.0)"

ANSWER_LABEL = re.compile(r"\s*答案[:：]\s*$")
CUT_OUT = re.compile(r"#idiom\d+#|__")


def read(records: Iterable[Record | Skip]) -> Iterator[dict | Skip]:
    """One question and answer an object."""
    for record in records:
        yield record if isinstance(record, Skip) else _row(record)


def _row(record: Record) -> dict | Skip:
    data = record.data if isinstance(record.data, dict) else {}
    question, target = data.get("input"), data.get("target")
    choices = data.get("answer_choices") or []
    if not isinstance(question, str):
        return refuse(record, "wrong_keys")
    if target is None:  # the test files that are scored by the publisher
        return refuse(record, "no_target", broken=False)
    targets = target if isinstance(target, list) else [target]
    if not all(isinstance(text, str) for text in targets) or not isinstance(choices, list):
        return refuse(record, "wrong_type")
    if choices and not all(text in choices for text in targets):
        return refuse(record, "target_not_a_choice", broken=False)
    if any(map(CUT_OUT.search, (question, *targets))):
        return refuse(record, "cut_out_mark", broken=False)
    return dialogue(record, in_turns((ANSWER_LABEL.sub("", question), "，".join(targets))))
