"""What retrieval finds for real questions with passages, and what it does to a model's answers.

    python -m data_process.run wiki --raw data/raw/wiki --index
    python -m benchmarks.retrieval --questions '[cmrc2018_dev.json, xquad.zh.json]'
    python -m benchmarks.retrieval out/redgpt --questions '[cmrc2018_dev.json]' --limit 200

Asked is what stands in the index: questions whose passage does. Recall: how often the passage, or
any of the right answers, is among the first passages, and in the reference text of `budget`
characters that chat.py would take. Small talk, and questions about passages that the index does
not hold, should find nothing. Answers: greedy, with no reference text, with what was retrieved,
and with the question's own passage; exact (letters and digits equal) or contained in the reply.
The last line is JSON.
"""

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from babyllama.chat.session import Conversation
from babyllama.checkpoint import load_model
from babyllama.config import from_repo, parse, run, shown
from babyllama.cpu.decoder import make_decoder
from babyllama.device import Device, pick_device
from babyllama.errors import DataError
from babyllama.generate import generate_replies
from babyllama.retrieval.index import Passage
from babyllama.retrieval.retriever import INDEX, MIN_COVERAGE, Retriever, fill
from babyllama.rows import read_rows
from babyllama.sampling import SamplingConfig
from benchmarks.questions import Question, find_rows, read_questions, squeeze

BATCH = 16


@dataclass(frozen=True)
class RetrievalConfig:
    """What to ask.

    Args:
        checkpoint: that answers; without one only what is found is counted
        index: a full-text index
        questions: files in the layout of CMRC 2018, SQuAD or C3
        talk: chat rows whose first messages should find nothing
        limit: questions that a checkpoint answers, drawn at random
        budget: characters of reference text, where no checkpoint says how much fits
        device: auto, cpu, cuda or mps
    """

    checkpoint: Path | None = None
    index: Path = INDEX
    questions: tuple[Path, ...] = ()
    talk: Path | None = None
    limit: int = 200
    budget: int = 400
    device: Device = "auto"


def holds(text: str, question: Question) -> bool:
    """Whether a text holds one of the right answers."""
    text = squeeze(text)
    return any(squeeze(answer) in text for answer in question.answers if squeeze(answer))


def recall(retriever: Retriever, asked: list[Question], rows: dict[str, str], budget: int) -> dict:
    """Shares of the questions."""
    counts = dict.fromkeys(("passage@1", "passage@5", "answer@1", "answer@5", "context"), 0)
    n_found, seconds = 0, 0.0
    for question in asked:
        start = time.perf_counter()
        found = retriever.search(question.text, 5)
        seconds += time.perf_counter() - start
        hits = [passage.row == rows[question.passage] for passage in found]
        answers = [holds(passage.text, question) for passage in found]
        context = retriever.context(question.text, budget)
        n_found += bool(context.text)
        counts["passage@1"] += any(hits[:1])
        counts["passage@5"] += any(hits)
        counts["answer@1"] += any(answers[:1])
        counts["answer@5"] += any(answers)
        counts["context"] += holds(context.text, question)
    shares = {name: round(count / len(asked), 4) for name, count in counts.items()}
    found = {"found": round(n_found / len(asked), 4)}
    return shares | found | {"ms": round(1e3 * seconds / len(asked), 2)}


def found_share(retriever: Retriever, texts: list[str]) -> float:
    return round(sum(bool(retriever.context(text, 400).text) for text in texts) / len(texts), 4)


def answers(cfg: RetrievalConfig, retriever: Retriever, asked: list[Question]) -> dict:
    """Exact and contained answers of a checkpoint, for each way of getting a reference text."""
    loaded = load_model(from_repo(cfg.checkpoint), pick_device(cfg.device))
    decoder, tokenizer = make_decoder(loaded.model), loaded.tokenizer
    sampling = SamplingConfig(max_new_tokens=48, temperature=0)
    room = loaded.config.max_seq_len - sampling.max_new_tokens

    def own(question: Question, budget: int, size: Callable[[str], int]) -> str:
        return fill([Passage("", 1, question.passage)], question.text, budget, size).text

    def found(question: Question, budget: int, size: Callable[[str], int]) -> str:
        return retriever.context(question.text, budget, size).text

    ways = {"no reference": lambda *_: "", "retrieved": found, "own passage": own}
    table = {}
    for name, way in ways.items():
        talk, prompts, given = Conversation(tokenizer, room), [], 0
        for question in asked:
            text = way(question, talk.reference_room(question.text), talk.n_tokens)
            prompts.append(talk.prompt_for(question.text, text))
            given += holds(text, question)
        order = sorted(range(len(asked)), key=lambda n: len(prompts[n]))
        n_exact = n_contained = 0
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            replies = generate_replies(
                decoder, [prompts[n] for n in batch], sampling, tokenizer.eos_id, tokenizer
            )
            for n, reply in zip(batch, replies, strict=True):
                n_exact += squeeze(reply.text) in map(squeeze, asked[n].answers)
                n_contained += holds(reply.text, asked[n])
        table[name] = {
            "answer given in the reference": round(given / len(asked), 4),
            "exact": round(n_exact / len(asked), 4),
            "contained": round(n_contained / len(asked), 4),
        }
        print(f"  {name:<14} {table[name]}", flush=True)
    return {"checkpoint": shown(loaded.path), "questions": len(asked), "answers": table}


def main(cfg: RetrievalConfig) -> None:
    retriever = Retriever.open(cfg.index)
    questions = [q for path in cfg.questions for q in read_questions(from_repo(path))]
    rows = find_rows(questions, retriever)
    known = [question for question in questions if question.passage in rows]
    print(retriever.describe())
    result = {"index": retriever.describe(), "sources": {}}
    for source in dict.fromkeys(question.source for question in questions):
        here = [question for question in known if question.source == source]
        n_all = sum(question.source == source for question in questions)
        line = {"questions": n_all, "in the index": len(here)}
        line |= recall(retriever, here, rows, cfg.budget) if here else {}
        others = [q.text for q in questions if q.source == source and q.passage not in rows]
        line |= {"found of others": found_share(retriever, others)} if others else {}
        result["sources"][source] = line
        print(f"  {source:<16} {line}", flush=True)
    if cfg.talk:
        texts = [row["messages"][0]["content"] for row in read_rows(from_repo(cfg.talk))]
        texts = list(dict.fromkeys(texts))
        result["small talk"] = {"messages": len(texts), "found": found_share(retriever, texts)}
        print(f"  small talk       {result['small talk']}, at a coverage of {MIN_COVERAGE}")
    if cfg.checkpoint:
        if not known:
            raise DataError(f"wanted questions about {shown(cfg.index)}, found none; name others")
        asked = random.Random(0).sample(known, min(cfg.limit, len(known)))
        result |= answers(cfg, retriever, asked)
    print(json.dumps(result, ensure_ascii=False))


if __name__ == "__main__":
    run(main, parse(RetrievalConfig, __doc__, positional=["checkpoint"]))
