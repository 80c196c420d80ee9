"""Questions beyond the usual one: unseen wordings, and second turns about the content.

Prompt sensitivity: ROUGE under every prompt template that training never uses (`eval.unseen` of the
prompt file); their mean is what users may expect who ask in their own words.

After the title the model, whose own title stands in the dialogue, is asked for keywords, discipline
and category, with the first question of each turn in the prompt file and the first word of every
slot. Beside the scores stands what needs no model: the most frequent answer of the set, or the
longest words that the text repeats most.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from babyllama.errors import ConfigError
from babyllama.log import table
from babyllama.sampling import SamplingConfig
from babyllama.scoring import rouge
from babyllama.scoring.summarise import AskConfig, ReadyModel, ask_all, summarise, templates
from babyllama.scoring.tables import System, normalised

USUAL = "the usual question"
_BETWEEN = re.compile(r"[、，,；;\n]|(?<=[^\x00-\x7f])\s+")
_LABELS = ("discipline", "category")


def by_wording(
    model: ReadyModel,
    texts: Sequence[str],
    references: Sequence[str],
    sampling: SamplingConfig,
    cfg: AskConfig,
    usual: System,
) -> dict:
    """ROUGE of the usual question and of every unseen one, times 100, and how the unseen differ.

    raises: ConfigError if the prompt file has no unseen wordings
    """
    unseen = templates(cfg.prompts, model.tokenizer).unseen
    if not unseen:
        raise ConfigError(f"{cfg.prompts}: wanted eval.unseen for --wordings, found none; add some")
    rows = {USUAL: _means(usual.titles, references) | {"n_lead_ins": usual.n_lead_ins}}
    for question in unseen:
        made = summarise([model], texts, sampling, cfg.batch_size, cfg.prompts, question)
        rows[question] = _means([each.title for each in made], references)
        rows[question]["n_lead_ins"] = sum(each.had_lead_in for each in made)
    ways = {"mean": np.mean, "deviation": np.std, "lowest": np.min, "highest": np.max}
    spread = {
        name: {way: float(of([rows[q][name] for q in unseen])) for way, of in ways.items()}
        for name in rouge.ROUGE
    }
    return {"wordings": rows, "spread": spread}


def _means(titles: Sequence[str], references: Sequence[str]) -> dict:
    found = rouge.rouge_published(titles, references).f
    return {name: 100 * float(f.mean()) for name, f in found.items()}


def wording_table(found: dict) -> str:
    """One line a wording, the best first, and what the unseen are together."""
    lines = [["wording", *rouge.ROUGE, "lead-ins"]]
    rows = sorted(found["wordings"].items(), key=lambda pair: -pair[1]["rouge-1"])
    for question, row in rows:
        figures = [f"{row[name]:.1f}" for name in rouge.ROUGE]
        lines.append([question.replace("\n", "⏎"), *figures, row["n_lead_ins"]])
    for way in ("mean", "deviation", "lowest", "highest"):
        figures = [f"{found['spread'][name][way]:.1f}" for name in rouge.ROUGE]
        lines.append([f"unseen: {way}", *figures, ""])
    return table(lines)


class FollowUp(NamedTuple):
    """Answers to one question, for the rows (by index) whose meta has what was asked for."""

    name: str
    question: str
    rows: list[int]
    answers: list[str]


def ask_follow_ups(
    model: ReadyModel, rows: Sequence[dict], titles: Sequence[str], cfg: AskConfig
) -> list[FollowUp]:
    """One second turn for each thing that the prompt file asks about and some row knows; greedy."""
    prompts = templates(cfg.prompts, model.tokenizer)
    greedy = SamplingConfig(max_new_tokens=cfg.max_new_tokens, temperature=0.0)
    found = []
    for name in prompts.turns:
        chosen = [i for i, row in enumerate(rows) if row.get("meta", {}).get(name)]
        if not chosen:
            continue
        question = prompts.first_question(name)
        asked = [second_turn(model, rows[i]["text"], titles[i], question, cfg) for i in chosen]
        replies = ask_all(model, asked, greedy, cfg.batch_size)
        answers = [prompts.strip_frame(reply.text.strip(), name).strip() for (reply,) in replies]
        found.append(FollowUp(name, question, chosen, answers))
    return found


def second_turn(
    model: ReadyModel, text: str, title: str, question: str, cfg: AskConfig
) -> list[int]:
    """The prompt up to where the second answer begins; a text too long for it loses its end."""
    prompts, tokenizer = templates(cfg.prompts, model.tokenizer), model.tokenizer
    said = [{"role": "assistant", "content": title}, {"role": "user", "content": question}]
    frame = len(tokenizer.render_prompt([*prompts.eval_messages([]), *said]))
    room = model.decoder.model.config.max_seq_len - cfg.max_new_tokens - frame
    ids = prompts.text_ids(text)[: max(0, room)]
    return tokenizer.render_prompt([*prompts.eval_messages(ids), *said])


def keywords_of(answer: str) -> list[str]:
    """The keywords that an answer lists, in one spelling, each once."""
    words = [normalised(word).strip("。.：:") for word in _BETWEEN.split(answer)]
    return list(dict.fromkeys(word for word in words if word))


def keyword_scores(answers: Sequence[str], wanted: Sequence[Sequence[str]]) -> dict:
    """Exact matches: F1, precision and recall of each row, times 100."""
    found = []
    for answer, words in zip(answers, wanted, strict=True):
        said, right = set(keywords_of(answer)), set(map(normalised, words))
        n = len(said & right)
        both = len(said) + len(right)
        found.append((2 * n / both, n / len(said) if said else 0.0, n / len(right)))
    f1, precision, recall = 100 * np.array(found).T
    means = {"precision": float(precision.mean()), "recall": float(recall.mean())}
    return _with_interval("f1", f1) | means


def label_scores(answers: Sequence[str], wanted: Sequence[str]) -> dict:
    """The share of answers that are the label and nothing else, times 100."""
    pairs = zip(answers, wanted, strict=True)
    hits = [normalised(answer).strip("。.") == normalised(label) for answer, label in pairs]
    return _with_interval("accuracy", 100 * np.array(hits, np.float64))


def _with_interval(name: str, values: np.ndarray) -> dict:
    low, high = rouge.bootstrap_interval(values)
    return {name: float(values.mean()), "low": low, "high": high, "n": len(values)}


def frequent_words(text: str, n: int = 4) -> str:
    """The words of two characters or more that a text has most often: keywords without a model."""
    jieba, _ = rouge.import_jieba()
    words = [word for word in jieba.cut(text) if len(word) > 1 and word.isalnum()]
    counts = Counter(words)
    by_weight = sorted(counts, key=lambda word: (-counts[word] * len(word), words.index(word)))
    return "、".join(by_weight[:n])


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


def follow_up_table(found: dict[str, dict[str, dict]]) -> str:
    """One line a question and system.

    found: what `scores` says, by what was asked for
    """
    lines = [["asked for", "rows", "f1 or accuracy", "95 %", "precision", "recall"]]
    for name, of_systems in found.items():
        for system, row in of_systems.items():
            interval = f"{row['low']:.1f} - {row['high']:.1f}"
            rest = [f"{row[key]:.1f}" if key in row else "-" for key in ("precision", "recall")]
            figure = row.get("f1", row.get("accuracy"))
            lines.append([f"{name}: {system}", row["n"], f"{figure:.1f}", interval, *rest])
    if len(lines) == 1:
        return "no row of this set has keywords, discipline or category in its meta"
    return table(lines)
