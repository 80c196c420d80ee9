"""Layouts of benchmarks with options: each function turns a publisher's files into rows (rows.py).

A subject is the name of the file where a benchmark is divided that way.
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

from bench.files import lines
from bench.rows import LETTERS, File, json_lines, row

_LABEL = re.compile(r"^\s*[(（]?[A-J][)）.、．:：]\s*")
_STORY = {f"InputSentence{n}": f"input_sentence_{n}" for n in range(1, 5)} | {
    "RandomFifthSentenceQuiz1": "sentence_quiz1",
    "RandomFifthSentenceQuiz2": "sentence_quiz2",
    "AnswerRightEnding": "answer_right_ending",
}


def commonsenseqa(files: Iterable[File]) -> Iterator[dict | str]:
    """question.stem and question.choices, or the two lists of the parquet form."""
    for _, data in json_lines(files):
        question, choices = data["question"], data.get("choices")
        if isinstance(question, dict):
            choices = {key: [c[key] for c in question["choices"]] for key in ("label", "text")}
            question = question["stem"]
        key = data.get("answerKey") or ""
        gold = [choices["label"].index(key)] if key in choices["label"] else []
        yield row(question, options=choices["text"], gold=gold, question=question,
                  choices=choices, answerKey=key)  # fmt: skip


def boolq(files: Iterable[File]) -> Iterator[dict | str]:
    """The original, SuperGLUE's, and the one that packs both texts into `query`."""
    for _, data in json_lines(files):
        if "query" in data:
            packed = re.fullmatch(r"(?s)Passage: (.*)\n?Question: (.*?)\n?", data["query"])
            if not packed:
                yield "no passage"
                continue
            (passage, question), label = packed.groups(), data["gold"]
            label = data["choices"][label].strip().lower() == "yes"
        else:
            passage, question = data["passage"], data["question"]
            label = data["answer"] if "answer" in data else data["label"]
        label, question = int(label), question.strip().removesuffix("?")
        yield row(question, context=passage, options=("否", "是"), gold=[label],
                  passage=passage, question=question, label=label)  # fmt: skip


def mmlu(files: Iterable[File]) -> Iterator[dict | str]:
    """CSV without a head: question, A, B, C, D, letter; or the parquet form: choices, answer."""
    for name, text in files:
        if not name.endswith(".csv"):
            for _, data in json_lines([(name, text)]):
                yield row(data["question"], options=data["choices"], gold=[data["answer"]], **data)
            continue
        subject = re.sub(r"_(dev|val|test)$", "", PurePosixPath(name).stem)
        for cells in csv.reader(lines(text)):
            question, *options, letter = cells
            gold = LETTERS.index(letter)
            yield row(question, options=options, gold=[gold], subject=subject, question=question,
                      choices=options, answer=gold)  # fmt: skip


def lettered_csv(files: Iterable[File]) -> Iterator[dict | str]:
    """CMMLU (Question, Answer), C-Eval (question, answer), MMMLU (Question, Answer, Subject):
    CSV with a head and A, B, C, D."""
    for name, text in files:
        subject = re.sub(r"_(dev|val|test)$", "", PurePosixPath(name).stem)
        for cells in csv.DictReader(lines(text)):
            columns = {key: value for key, value in cells.items() if key}
            low = {key.lower(): value for key, value in columns.items()}
            if not low.get("answer"):
                yield "no label"  # C-Eval's test part
                continue
            gold = LETTERS.index(low["answer"].strip())
            yield row(low["question"], options=[columns[x] for x in "ABCD"], gold=[gold],
                      subject=columns.get("Subject") or subject, **columns)  # fmt: skip


def agieval(files: Iterable[File]) -> Iterator[dict | str]:
    """The sets with options; a label that is a list names several right ones."""
    for name, data in json_lines(files):
        if not data.get("options") or not data.get("label"):
            yield "no options"
            continue
        options = [_LABEL.sub("", option) for option in data["options"]]
        gold = [LETTERS.index(letter) for letter in "".join(data["label"]) if letter in LETTERS]
        passage, question = data.get("passage") or "", data["question"]
        query = "\n".join(filter(None, [passage, question, *data["options"]]))
        yield row(question, context=passage, options=options, gold=gold,
                  subject=PurePosixPath(name).stem, query=query, choices=options)  # fmt: skip


def gaokao(files: Iterable[File]) -> Iterator[dict | str]:
    """GAOKAO-Bench's objective questions; the options stand in the question.

    An entry with several questions gives a row for each.
    """
    for name, text in files:
        subject = PurePosixPath(name).stem.split("_", 1)[1]
        n_letters = 7 if "Cloze" in name else 4  # five of seven sentences fill five gaps
        for entry in json.loads(text)["example"]:
            for number, label in enumerate(entry["answer"], 1):
                letters = LETTERS[:n_letters]
                known = [letters.index(x) for x in label if x in letters]
                which = f"\n（第 {number} 小题）" if len(entry["answer"]) > 1 else ""
                yield row(entry["question"].strip() + which, letters=letters, gold=known,
                          subject=subject)  # fmt: skip


def c3(files: Iterable[File]) -> Iterator[dict | str]:
    """[[line, …], [{question, choice, answer}], id]; the answer is the text of a choice."""
    for name, text in files:
        subject = "dialogue" if "-d-" in name else "mixed"
        for passage, questions, _ in json.loads(text):
            for each in questions:
                gold = [n for n, choice in enumerate(each["choice"]) if choice == each["answer"]]
                yield row(each["question"], context="\n".join(passage), options=each["choice"],
                          gold=gold, subject=subject)  # fmt: skip


def zhoblimp(files: Iterable[File]) -> Iterator[dict | str]:
    """Minimal pairs: one sentence of the language, one that is none. The file is the paradigm."""
    for name, data in json_lines(files):
        pair = [data["sentence_good"], data["sentence_bad"]]
        yield row(
            "下面哪句话通顺？", options=pair, gold=[0], subject=PurePosixPath(name).stem, **data
        )


def xwinograd(files: Iterable[File]) -> Iterator[dict | str]:
    """A sentence with a gap "_" and two fillings, as JSON lines."""
    for _, data in json_lines(files):
        before, _, after = data["sentence"].partition("_")
        starts = [before + data[key] for key in ("option1", "option2")]
        yield row("下面哪句话说得通？", options=[start + after for start in starts],
                  gold=[int(data["answer"]) - 1], starts=starts, ending=after, **data)  # fmt: skip


def xcopa(files: Iterable[File]) -> Iterator[dict | str]:
    """premise, choice1, choice2, question: cause or effect, label."""
    for _, data in json_lines(files):
        why = {"cause": "因为", "effect": "所以"}[data["question"]]
        yield row(f"{data['premise'].strip().rstrip('。')}，{why}", gold=[int(data["label"])],
                  options=[data["choice1"], data["choice2"]], **data)  # fmt: skip


def xstorycloze(files: Iterable[File]) -> Iterator[dict | str]:
    """Four sentences and two endings; JSON lines, or the published TSV with a head."""
    for _, data in _table_or_lines(files):
        data = {_STORY.get(key, key): value for key, value in data.items()}
        story = "".join(data[f"input_sentence_{n}"] for n in range(1, 5))
        options = [data["sentence_quiz1"], data["sentence_quiz2"]]
        right = int(data["answer_right_ending"])
        columns = data | {"answer_right_ending": right}
        yield row(story, options=options, gold=[right - 1], **columns)


def belebele(files: Iterable[File]) -> Iterator[dict | str]:
    """flores_passage, question, mc_answer1 … 4, correct_answer_num."""
    for _, data in json_lines(files):
        data["correct_answer_num"] = str(data["correct_answer_num"])
        yield row(data["question"], context=data["flores_passage"],
                  options=[data[f"mc_answer{n}"] for n in range(1, 5)],
                  gold=[int(data["correct_answer_num"]) - 1], **data)  # fmt: skip


def _table_or_lines(files: Iterable[File]) -> Iterator[tuple[str, dict]]:
    for name, text in files:
        if name.endswith(".tsv"):
            table = csv.DictReader(lines(text), delimiter="\t", quoting=csv.QUOTE_NONE)
            yield from ((name, cells) for cells in table)
        else:
            yield from json_lines([(name, text)])
