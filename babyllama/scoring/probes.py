"""Two questions beside the score of a set: what its wording is worth, what a second turn answers.

One set is asked in every wording that training never shows (`eval.unseen` of the prompt file):
their mean is what a user may expect who asks in his own words.

After the summary a question about the content follows: keywords, discipline, category. The summary
in the dialogue is the model's own. The wording is the first of each turn's questions in the prompt
file, with the first word of every slot; what the turn's answers lay round the thing that was asked
for comes off. Beside the scores stands what needs no model: the most frequent answer of the set,
or the longest words that the text repeats most.
"""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from babyllama.checkpoint import Loaded
from babyllama.errors import ConfigError
from babyllama.prompts import SummaryPrompts
from babyllama.scoring import rouge
from babyllama.scoring.rouge import bootstrap_interval, import_jieba
from babyllama.scoring.summarise import Asking, Titles, reply, summarise, templates
from babyllama.scoring.tables import aligned, squeezed

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
        f = rouge.rouge_published(titles.titles, references).f
        means = {name: 100 * float(values.mean()) for name, values in f.items()}
        rows[question] = means | {"n_framed": titles.n_framed}
    spread = {name: _spread([rows[q][name] for q in unseen]) for name in rouge.ROUGE}
    return {"wordings": rows, "spread": spread}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "mean": float(np.mean(values)),
        "deviation": float(np.std(values)),
        "lowest": min(values),
        "highest": max(values),
    }


def wording_table(found: dict) -> str:
    """One line a wording, the best first, and what the unseen are together."""
    lines = [["wording", *rouge.ROUGE, "lead-ins"]]
    rows = sorted(found["wordings"].items(), key=lambda pair: -pair[1]["rouge-1"])
    for question, row in rows:
        figures = [f"{row[name]:.1f}" for name in rouge.ROUGE]
        lines.append([question.replace("\n", "⏎"), *figures, str(row["n_framed"])])
    for key in ("mean", "deviation", "lowest", "highest"):
        lines.append([f"unseen: {key}", *(f"{r[key]:.1f}" for r in found["spread"].values()), ""])
    return aligned(lines)


_SLOT = re.compile(r"\{(\w+)\}")
_BETWEEN = re.compile(r"[、，,；;\n]|(?<=[^\x00-\x7f])\s+")
_LABELS = ("discipline", "category")


class FollowUp(NamedTuple):
    """Answers to one question.

    rows: the rows whose meta has what was asked for, by index
    """

    name: str
    question: str
    rows: list[int]
    answers: list[str]


def asked_for(rows: Sequence[dict], name: str) -> list[int]:
    """The rows whose meta tells the right answer."""
    return [i for i, row in enumerate(rows) if row.get("meta", {}).get(name)]


def ask_follow_ups(
    loaded: Loaded, rows: Sequence[dict], titles: Sequence[str], how: Asking
) -> list[FollowUp]:
    """One second turn for each thing that the prompt file asks about and some row knows."""
    prompts = templates(how.prompts, loaded.tokenizer)
    found = []
    for name, turn in prompts.turns.items():
        chosen = asked_for(rows, name)
        if not chosen:
            continue
        question = _fill(turn.questions[0], {n: words[0] for n, words in prompts.slots.items()})
        asked = [_prompt(loaded, prompts, rows[i], titles[i], question, how) for i in chosen]
        answers = [unframed(a, turn.answers, prompts.slots) for a in reply(loaded, asked, how)]
        found.append(FollowUp(name, question, chosen, answers))
    return found


def _prompt(
    loaded: Loaded, prompts: SummaryPrompts, row: dict, title: str, question: str, how: Asking
) -> list[int]:
    """The dialogue up to where the second answer begins; the text loses its end to fit."""
    tokenizer = loaded.tokenizer
    rest = [{"role": "assistant", "content": title}, {"role": "user", "content": question}]
    text = tokenizer.encode(row["text"])
    frame = len(tokenizer.render_prompt([*prompts.eval_messages([]), *rest]))
    room = loaded.config.max_seq_len - how.sampling.max_new_tokens - frame
    return tokenizer.render_prompt([*prompts.eval_messages(text, max(0, room)), *rest])


def _fill(template: str, chosen: dict[str, str]) -> str:
    return _SLOT.sub(lambda found: chosen.get(found[1], found[0]), template)


def unframed(answer: str, templates: Sequence[str], slots: dict[str, list[str]]) -> str:
    """What stands in an answer where a template has the thing asked for; else the answer."""
    bare = answer.strip()
    kept = [bare]
    for template in templates:
        names = [name for name in dict.fromkeys(_SLOT.findall(template)) if name in slots]
        for words in product(*(slots[name] for name in names)):
            lead, _, end = _SLOT.split(_fill(template, dict(zip(names, words, strict=True))))
            if bare.startswith(lead) and bare.endswith(end) and len(bare) >= len(lead + end):
                kept.append(bare[len(lead) : len(bare) - len(end)].strip())
    return min(kept, key=len)


def keywords_of(answer: str) -> list[str]:
    """The keywords that an answer lists, in one spelling, each once."""
    words = [squeezed(word).strip("。.：:") for word in _BETWEEN.split(answer)]
    return list(dict.fromkeys(word for word in words if word))


def keyword_scores(answers: Sequence[str], wanted: Sequence[Sequence[str]]) -> dict:
    """Exact matches: F1, precision and recall of each row, times 100."""
    found = []
    for answer, words in zip(answers, wanted, strict=True):
        said, right = set(keywords_of(answer)), set(map(squeezed, words))
        n = len(said & right)
        both = len(said) + len(right)
        found.append((2 * n / both, n / len(said) if said else 0.0, n / len(right)))
    f1, precision, recall = 100 * np.array(found).T
    return _with_interval("f1", f1) | {
        "precision": float(precision.mean()), "recall": float(recall.mean()),
    }  # fmt: skip


def label_scores(answers: Sequence[str], wanted: Sequence[str]) -> dict:
    """The share of answers that are the label and nothing else, times 100."""
    hits = [squeezed(a).strip("。.") == squeezed(w) for a, w in zip(answers, wanted, strict=True)]
    return _with_interval("accuracy", 100 * np.array(hits, np.float64))


def _with_interval(name: str, values: np.ndarray) -> dict:
    low, high = bootstrap_interval(values)
    return {name: float(values.mean()), "low": low, "high": high}


def frequent_words(text: str, n: int = 4) -> str:
    """The words of two characters or more that a text has most often: keywords without a model."""
    jieba, _ = import_jieba()
    words = [word for word in jieba.cut(text) if len(word) > 1 and word.isalnum()]
    counts = Counter(words)
    ranked = sorted(counts, key=lambda word: (-counts[word] * len(word), words.index(word)))
    return "、".join(ranked[:n])


def scores(found: FollowUp, rows: Sequence[dict]) -> dict[str, dict]:
    """The model's scores and the baseline's, each with what it is called."""
    wanted = [rows[i]["meta"][found.name] for i in found.rows]
    if found.name not in _LABELS:
        baseline = [frequent_words(rows[i]["text"]) for i in found.rows]
        scored = {"answers": found.answers, "words the text repeats most": baseline}
        return {name: keyword_scores(answers, wanted) for name, answers in scored.items()}
    ((most, _),) = Counter(wanted).most_common(1)
    scored = {"answers": found.answers, f"always {most}": [most] * len(wanted)}
    return {name: label_scores(answers, wanted) for name, answers in scored.items()}


def follow_up_table(found: Sequence[FollowUp], rows: Sequence[dict]) -> str:
    """One block a question."""
    lines = []
    for each in found:
        lines.append(f"{each.name}: {each.question} ({len(each.rows)} rows)")
        for name, row in scores(each, rows).items():
            head = "f1" if "f1" in row else "accuracy"
            rest = "".join(f"  {k} {row[k]:.1f}" for k in ("precision", "recall") if k in row)
            lines.append(f"  {head} {row[head]:5.1f}  95 % {row['low']:.1f} - {row['high']:.1f}"
                         f"{rest}  {name}")  # fmt: skip
    return "\n".join(lines) or "no row of this set has keywords, discipline or category in its meta"
