"""The task files in configs/bench, and what they make of the rows for the harness.

title, groups      what the report calls the task, and the names that choose it
folder, files      where its rows are read from
columns            what the publisher's columns make of a row, and head and under (readers.table);
reader             or the function of readers.py that knows the layout
language           of the rows; the prompts are Chinese
score              "choice", "code", or one of scoring.SCORES
form               "text": never asked as a dialogue
harness            handed to lm-evaluation-harness as a task of its own (its docs/task_guide.md)
cloze              what NAME_cloze changes: the options' own texts are scored, not their letters
official           the harness' file that --prompts official takes instead, its metric and, where
                   that is not English, the language of its prompt
include            another file whose keys stand where this one has none
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import yaml

from babyllama.config import REPO, shown
from babyllama.errors import ConfigError, DataError
from bench import readers
from bench.readers import find, read_rows
from bench.scoring import METRICS, SCORES

CONFIGS = REPO / "configs" / "bench"
CLOZE = "_cloze"


@dataclass(frozen=True)
class Task:
    """A task file, read."""

    name: str
    title: str
    groups: list[str]
    folder: str
    files: dict[str, list[str]]
    language: str
    score: str
    harness: dict
    form: str = ""
    official: dict | None = None
    reader: str = "table"
    columns: dict | None = None
    head: list[str] | None = None
    under: str = ""

    @property
    def metric(self) -> str:
        """The headline: by length where options of different lengths are compared."""
        if self.score == "choice":
            return "acc_norm" if self.name.endswith(CLOZE) else "acc"
        return METRICS.get(self.score, "pass@1")


@dataclass
class Rows:
    """The rows of a task.

    scored: those that are asked; every: all that could be; shots: those examples are taken from
    own_shots: there were no others, so examples come from the scored ones
    """

    scored: list[dict]
    every: list[dict]
    shots: list[dict]
    own_shots: bool
    sha256: str
    left_out: Counter[str] = field(default_factory=Counter)


@cache
def tasks() -> dict[str, Task]:
    """Every task by its name, cloze forms included."""
    found = {}
    for path in sorted(CONFIGS.glob("[!_]*.yaml")):
        keys = _merged(path)
        cloze, name = keys.pop("cloze", None), path.stem
        found[name] = Task(name, **keys)
        if cloze:
            keys |= {"harness": keys["harness"] | cloze, "official": None}
            keys["title"] += "（选项原文）"
            found[name + CLOZE] = Task(name + CLOZE, **keys)
    return found


def _merged(path: Path) -> dict:
    """A task's file and what it includes."""
    found = yaml.safe_load(path.read_text("utf-8"))
    base = _merged(path.with_name(found.pop("include"))) if "include" in found else {}
    return base | found | {"harness": base.get("harness", {}) | found.get("harness", {})}


def choose(words: Sequence[str]) -> list[str]:
    """The tasks behind names and groups ("all", "cloze", "math" …), each once.

    raises: ConfigError with all names if one is not known
    """
    every = tasks()
    groups = {"all": list(every), "cloze": [name for name in every if name.endswith(CLOZE)]}
    for name, task in every.items():
        for group in task.groups if not name.endswith(CLOZE) else ():
            groups.setdefault(group, []).append(name)
    unknown = [word for word in words if word not in groups and word not in every]
    if unknown or not words:
        raise ConfigError(
            f"--tasks: wanted groups ({', '.join(groups)}) or names ({', '.join(every)}), found "
            f"{', '.join(map(repr, unknown)) or 'none'}"
        )
    found = [name for word in words for name in groups.get(word, [word])]
    return list(dict.fromkeys(found))


def rows_of(task: Task, data: Path, limit: int | None) -> Rows:
    """The rows of a task; with a limit, so many, evenly spread over the file.

    raises: DataError that names the files that are wanted
    """
    read = getattr(readers, task.reader)
    if task.columns:
        read = partial(read, columns=task.columns, head=task.head, under=task.under)
    left_out: Counter[str] = Counter()
    parts, digest = {}, hashlib.sha256()
    for part, patterns in task.files.items():
        files = find(data / task.folder, patterns)
        for name, text in files:
            digest.update(f"{name}\0{text}\0".encode())
        parts[part] = read_rows(read, files, left_out if part == "scored" else Counter())
    every = parts["scored"]
    if not every:
        raise DataError(
            f"{task.name}: wanted rows from {' or '.join(task.files['scored'])} in "
            f"{shown(data / task.folder)}, found none; get the files "
            f"(configs/bench/{task.name.removesuffix(CLOZE)}.yaml), or name another --data"
        )
    scored = every
    if limit and limit < len(every):
        scored = [every[i * len(every) // limit] for i in range(limit)]
    shots = parts.get("shots") or every
    return Rows(scored, every, shots, not parts.get("shots"), digest.hexdigest(), left_out)


class FixedShots:
    """Examples for a row: the first of its subject that are not the row itself.

    They do not depend on chance, so that a row is asked alike in every run.
    """

    def __init__(self, pool: Sequence[dict]) -> None:
        self.by_subject: dict[str, list[dict]] = {}
        for each in pool:
            self.by_subject.setdefault(each["subject"], []).append(each)
        self.pool = pool
        self.row: dict = {}

    def set_rnd(self, seed: int | None) -> None:
        """The harness hands out a seed; there is nothing to draw."""

    def sample(self, n: int, eval_doc: dict | None = None) -> list[dict]:
        """The examples for `row`, at most n."""
        pool = self.by_subject.get(self.row["subject"], self.pool)
        asked = (self.row["ask"], self.row["context"])
        others = (each for each in pool if (each["ask"], each["context"]) != asked)
        return [each for each, _ in zip(others, range(n), strict=False)]


class FittingShots:
    """Gives a harness task our rows, and as many whole examples as the context holds.

    room: whether a prompt fits, given the row
    n_shots: how many examples each row got
    """

    data: dict
    sampler: Any
    room: Callable[[str, dict], bool]

    def download(self, *_: object, **__: object) -> None:
        """Nothing is fetched."""
        self.dataset = self.data
        self.n_shots: list[int] = []

    def fewshot_context(self, doc: dict, num_fewshot: int, **settings: object) -> str | list[str]:
        """The prompt of a row: the harness' own, with fewer examples where they do not fit."""
        self.sampler.row = doc
        n = len(self.sampler.sample(num_fewshot))
        while True:
            whole = super().fewshot_context  # type: ignore[misc]  # ConfigurableTask's
            prompt = whole(doc, num_fewshot=n, **settings)
            longest = max(prompt, key=len) if isinstance(prompt, list) else prompt
            if n == 0 or type(self).room(longest, doc):
                self.n_shots.append(n)
                return prompt
            n -= 1


def harness_task(
    task: Task,
    rows: Rows,
    shots: int,
    prompts: str,
    room: Callable[[str, dict], bool],
) -> Any:
    """The harness' object for a task. Its metrics are those of the task file."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    data = {"scored": Dataset.from_list(rows.scored), "shots": Dataset.from_list(rows.shots)}
    config = _official(task) if prompts == "official" else _ours(task)
    config |= {"task": task.name, "test_split": "scored", "fewshot_split": "shots",
               "num_fewshot": shots, "repeats": 1, "training_split": None,
               "validation_split": None, "dataset_path": None, "dataset_name": None}  # fmt: skip
    make = type("HarnessTask", (FittingShots, ConfigurableTask), {"data": data, "room": room})
    made = make(config=config)
    made.sampler = FixedShots(rows.shots)
    return made


def _ours(task: Task) -> dict:
    config = json.loads(json.dumps(task.harness)) | {"metadata": {"version": 1}}
    config.setdefault("target_delimiter", "")
    metrics = ["acc", "acc_norm"]
    if task.score != "choice":
        # Code is scored by running it.
        score = SCORES.get(task.score, lambda reply, answers: {"asked": 1.0})
        config["process_results"] = lambda row, replies: score(replies[0], row["answers"])
        metrics = list(score("", [""]))
    config["metric_list"] = [
        {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics
    ]
    return config


def _official(task: Task) -> dict:
    """The harness' own task file, without its ways to fetch data."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    if not task.official:
        raise ConfigError(
            f"--prompts official: {task.name} has no prompt in the harness; leave the task or the "
            f"flag out"
        )
    place = Path(lm_eval.tasks.__file__).parent / task.official["include"]
    config = dict(load_yaml(place))
    for key in ("tag", "dataset_kwargs", "include", "group", "task_list"):
        config.pop(key, None)
    return config


def length_of_answer(task: Task, encode: Callable[[str], list[int]], row: dict) -> int:
    """Tokens that must stay free behind a prompt."""
    if task.score == "choice":
        texts = row["options"] if task.harness.get("doc_to_choice") == "options" else row["letters"]
        return max(len(encode(text)) for text in texts or row["letters"])
    return task.harness["generation_kwargs"]["max_gen_toks"]
