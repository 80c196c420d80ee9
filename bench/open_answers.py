"""Layouts of benchmarks that want a text as answer: each function makes rows (rows.py) of files."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

from bench.files import lines
from bench.rows import File, json_lines, row

_CALCULATOR = re.compile(r"<<.*?>>")


def gsm8k(files: Iterable[File]) -> Iterator[dict | str]:
    """question, answer: steps with <<3+4=7>> notes, the result after ####."""
    for _, data in json_lines(files):
        steps, _, result = data["answer"].rpartition("####")
        yield row(data["question"], answers=[result.strip().replace(",", "")],
                  steps=_CALCULATOR.sub("", steps).strip(), **data)  # fmt: skip


def gsm8k_zh(files: Iterable[File]) -> Iterator[dict | str]:
    """question_zh or question_zh-cn, answer_only; where both parts share a file, its test part."""
    for _, data in json_lines(files):
        if data.get("split", "test") != "test":
            yield "of the training part"
            continue
        question = data.get("question_zh") or data["question_zh-cn"]
        yield row(question, answers=[str(data["answer_only"]).replace(",", "")])


def math(files: Iterable[File]) -> Iterator[dict | str]:
    r"""problem, solution, type, level; the result is the last \boxed{…} of the solution."""
    for _, data in json_lines(files):
        result = boxed(data["solution"])
        subject = data.get("type") or data.get("subject") or ""
        yield row(data["problem"], answers=[result or ""], steps=data["solution"], subject=subject,
                  problem=data["problem"], solution=data["solution"])  # fmt: skip


def boxed(solution: str) -> str | None:
    r"""What stands in the last \boxed{…} or \boxed x; None if there is none."""
    start = max(solution.rfind("\\boxed"), solution.rfind("\\fbox"))
    if start < 0:
        return None
    rest = solution[start:].lstrip("\\").removeprefix("boxed").removeprefix("fbox")
    if not rest.startswith("{"):
        return rest.split("$")[0].strip()
    depth = 0
    for end, sign in enumerate(rest):
        depth += (sign == "{") - (sign == "}")
        if depth == 0:
            return rest[1:end]
    return None


def mgsm(files: Iterable[File]) -> Iterator[dict | str]:
    """TSV without a head: question, number."""
    for _, text in files:
        for line in lines(text):
            if line.strip():
                question, number = line.rstrip("\n").split("\t")
                number = number.replace(",", "")
                yield row(question, answers=[number], question=question, answer=None,
                          answer_number=number)  # fmt: skip


def cmath(files: Iterable[File]) -> Iterator[dict | str]:
    """grade, input, golden: Chinese primary school, by grade."""
    for _, data in json_lines(files):
        yield row(data["input"], answers=[data["golden"]], subject=f"grade {data['grade']}")


def ape210k(files: Iterable[File]) -> Iterator[dict | str]:
    """original_text, ans ("23(1/3)", "93.75%")."""
    for _, data in json_lines(files):
        yield row(data["original_text"], answers=[data["ans"]])


def nq_open(files: Iterable[File]) -> Iterator[dict | str]:
    """question, answer: a list of which any counts."""
    for _, data in json_lines(files):
        yield row(data["question"], answers=data["answer"], **data)


def trivia_qa(files: Iterable[File]) -> Iterator[dict | str]:
    """The original {"Data": […]}, the parquet form, and `context` with "Question: …\\nAnswer:"."""
    for name, text in files:
        if text.lstrip()[:1] == "{" and '"Data"' in text[:2000] + text[-2000:]:
            entries = json.loads(text)["Data"]
        else:
            entries = [data for _, data in json_lines([(name, text)])]
        for data in entries:
            if "context" in data:
                asked = re.fullmatch(r"(?s)Question: (.*?)\n?(?:Answer:)?\s*", data["context"])
                question, known = asked[1], [data["answer"], *data.get("aliases", [])]
            else:
                question = data.get("Question") or data["question"]
                answer = data.get("Answer") or data.get("answer") or {}
                low = {key.lower(): value for key, value in answer.items()}
                known = [low.get("value") or "", *(low.get("aliases") or [])]
            known = list(dict.fromkeys(filter(None, known)))
            yield row(question, answers=known, question=question.strip().removesuffix("?"),
                      answer={"aliases": known})  # fmt: skip


def bbh(files: Iterable[File]) -> Iterator[dict | str]:
    """examples[input, target]; the file is the task."""
    for name, text in files:
        for data in json.loads(text)["examples"]:
            options = re.findall(r"^\(([A-Z])\)|^- (\S.*)$", data["input"], re.MULTILINE)
            yield row(data["input"], answers=[data["target"]], subject=PurePosixPath(name).stem,
                      n_options=len(options), **data)  # fmt: skip


def agieval_cloze(files: Iterable[File]) -> Iterator[dict | str]:
    """AGIEval's sets without options: gaokao-mathcloze and math."""
    for name, data in json_lines(files):
        if data.get("options"):
            yield "has options"
            continue
        yield row(data["question"], answers=[data["answer"] or ""],
                  subject=PurePosixPath(name).stem)  # fmt: skip


def cmrc2018(files: Iterable[File]) -> Iterator[dict | str]:
    """data/ ({context_text, qas[query_text, answers]}) and squad-style-data/."""
    for _, text in files:
        data = json.loads(text)
        entries = data["data"] if isinstance(data, dict) else data
        for entry in entries:
            for paragraph in entry.get("paragraphs", [entry]):
                is_own = "context_text" in paragraph
                context = paragraph["context_text" if is_own else "context"]
                for qa in paragraph["qas"]:
                    texts = [a["text"] if isinstance(a, dict) else a for a in qa["answers"]]
                    ask = qa["query_text" if is_own else "question"]
                    yield row(ask, context=context, answers=dict.fromkeys(texts))


def quac(files: Iterable[File]) -> Iterator[dict | str]:
    """A dialogue about a text; earlier turns with their true answers stand before the question.

    "CANNOTANSWER" is what the publisher writes where the text does not say.
    """
    for _, text in files:
        for article in json.loads(text)["data"]:
            for paragraph in article["paragraphs"]:
                context = paragraph["context"].removesuffix("CANNOTANSWER")
                before = ""
                for qa in paragraph["qas"]:
                    known = [a["text"] for a in qa.get("answers") or [qa["orig_answer"]]]
                    known = ["无法回答" if a == "CANNOTANSWER" else a for a in known]
                    yield row(qa["question"], context=context, answers=dict.fromkeys(known),
                              subject=article["title"], before=before)  # fmt: skip
                    before += f"问：{qa['question']}\n答：{known[0]}\n"


def human_eval(files: Iterable[File]) -> Iterator[dict | str]:
    """task_id, prompt, entry_point, canonical_solution, test."""
    for _, data in json_lines(files):
        yield row(data["prompt"], answers=[data["canonical_solution"]], **data)
