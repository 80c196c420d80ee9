"""Puts one task to a checkpoint through lm-evaluation-harness, and says what came out."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import numpy as np

from babyllama.rows import write_rows
from bench.harness import Scorer
from bench.sandbox.run import run_all
from bench.scoring import (
    METRICS,
    SCORES,
    chance_of_answer,
    chance_of_choice,
    constant_answer,
    constant_choice,
    interval,
)
from bench.tasks import Rows, Task, harness_task, length_of_answer

CODE_METRIC = "pass@1"


def ask(task: Task, rows: Rows, lm: Scorer, shots: int, prompts: str, samples: Path) -> dict:
    """The report of a task; every row with its reply goes to `samples` as JSON lines."""
    from lm_eval.evaluator import evaluate

    began = perf_counter()
    is_chat = lm.is_chat and task.form != "text"

    def room(prompt: str, row: dict) -> bool:
        longest = length_of_answer(task, lm.tokenizer.encode, row)
        # A reply is never asked to be longer; an option may be, and is then cut.
        free = min(longest, lm.max_length // 2) if task.score != "choice" else longest
        return len(lm.encode_context(prompt)) + free <= lm.max_length

    made = harness_task(task, rows, shots, prompts, room)
    made.set_fewshot_seed(0)
    found = evaluate(
        lm,
        {"tasks": {task.name: made}, "groups": {}, "group_map": {}},
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=is_chat,
        fewshot_as_multiturn=is_chat,
    )
    official = (task.official or {}) if prompts == "official" else {}
    wanted = official.get("filter")
    said = [s for s in found["samples"][task.name] if wanted in (None, s["filter"])]
    said = list({s["doc_id"]: s for s in said}.values())  # one filter, where there are several
    metric = official["metric"] if prompts == "official" else task.metric
    values = {name: [float(s[name]) for s in said] for name in said[0]["metrics"]}
    extra = {}
    if task.score == "code":
        outcomes = run_all(rows.scored, [s["filtered_resps"][0] for s in said])
        values = {CODE_METRIC: [float(outcome.passed) for outcome in outcomes]}
        extra["programs"] = dict(Counter(one.reason for one in outcomes).most_common())
    report = _report(task, rows, values, metric) | extra
    write_rows(samples, _samples(task, said, values))
    return report | {
        "shots": shots,
        "mean_shots": float(np.mean(made.n_shots)),
        "own_shots": bool(shots and rows.own_shots),
        # Rows whose prompt lost its beginning, or an option its end, even without examples.
        "n_cut": sum(not room(one["arguments"][0][0], one["doc"]) for one in said),
        "prompt_language": "zh" if prompts == "zh" else official.get("language", "en"),
        "form": "dialogue" if is_chat else "text",
        "seconds": perf_counter() - began,
    }


def _report(task: Task, rows: Rows, values: dict[str, list[float]], metric: str) -> dict:
    scores = values[metric]
    low, high = interval(scores)
    # Of all rows: the most frequent answer of a few would look better than it is.
    if task.score == "choice":
        chance = constant = chance_of_choice(rows.every)
        # One option can be said every time: letters, or the same texts in every row.
        same = {tuple(row["options"]) for row in rows.every}
        if task.harness.get("doc_to_choice") == "letters" or len(same) == 1:
            constant = constant_choice(rows.every)
    elif task.score == "code":
        chance = constant = 0.0
    else:
        chance = chance_of_answer(rows.every)
        constant = constant_answer(rows.every, SCORES[task.score], METRICS[task.score])
    return {
        "task": task.name,
        "title": task.title,
        "groups": task.groups,
        "metric": metric,
        "score": float(np.mean(scores)),
        "low": low,
        "high": high,
        "chance": chance,
        "constant": constant,
        "n": len(scores),
        "n_all": len(rows.every),
        "left_out": dict(rows.left_out),
        "language": task.language,
        "other_metrics": {n: float(np.mean(v)) for n, v in values.items() if n != metric},
        "data_sha256": rows.sha256,
    }


def _samples(
    task: Task, said: list[dict], values: dict[str, list[float]]
) -> Iterator[dict[str, object]]:
    """Every question with its reply."""
    for number, sample in enumerate(said):
        replies = sample["filtered_resps"]
        if task.score == "choice":
            replies = [float(reply[0]) for reply in replies]
        yield {
            "prompt": str(sample["arguments"][0][0]),
            "said": replies,
            "wanted": sample["doc"]["gold"] or sample["doc"]["answers"],
            **{name: v[number] for name, v in values.items()},
        }
