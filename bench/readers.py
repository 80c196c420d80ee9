"""Layouts of benchmarks: each function turns the files of a publisher into rows.

A row is one question, whatever the layout:

ask, context   the question, and the text it is about ("" if there is none)
options        the texts to choose from; letters: their names; gold: numbers of the right ones
answers        the texts that count as right, where nothing is to be chosen
subject        part of the benchmark that the row belongs to: its file, where it is divided that way
Beside these a row keeps its publisher's columns, by which the harness' own prompts ask for it.

Files are as their publisher packed them: plain, .xz, .gz, in a tar or a zip; a parquet file is seen
as JSON lines, a row each. A folder is seen through its archives: `mmlu/mmlu.tar.xz` and an unpacked
`mmlu/dev/…` both hold "dev/anatomy_dev.csv". Names are compared from the end, so an outer folder
more does no harm.
"""

import csv
import gzip
import io
import json
import lzma
import re
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from babyllama.config import shown
from babyllama.errors import ConfigError, DataError

DAMAGED = (OSError, EOFError, lzma.LZMAError, zlib.error, tarfile.TarError, zipfile.BadZipFile,
           UnicodeDecodeError)  # fmt: skip


def find(folder: Path, patterns: Sequence[str]) -> list[tuple[str, str]]:
    """(name, text) of the files that the first pattern with any match names, by name.

    raises: DataError if a file is damaged or no UTF-8 text; [] if nothing matches
    """
    for pattern in patterns:
        found = []
        for name, read in _inside(folder):
            if fnmatchcase(name, pattern) or fnmatchcase(name, f"*/{pattern}"):
                found.append((name, _text(folder, name, read)))
        if found:
            return sorted(found)
    return []


def _text(folder: Path, name: str, read: Callable[[], bytes]) -> str:
    try:
        return read().decode("utf-8-sig")
    except DAMAGED as error:
        raise DataError(
            f"{shown(folder)}: wanted {name} as whole UTF-8 text, found {error}; get it again"
        ) from None


def _inside(folder: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Every file below a folder with a way to read it, while the archive it is in is open."""
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder).as_posix())
        if not path.is_file():
            continue
        try:
            yield from _entries(name, path)
        except DAMAGED as error:
            raise DataError(f"{shown(path)}: damaged, {error}; get the file again") from None


def _entries(name: str, path: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    if name.endswith((".tar", ".tar.xz", ".tar.gz", ".tgz")):
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile() and (file := archive.extractfile(member)):
                    yield member.name, file.read
    elif name.endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                yield entry.filename, partial(archive.read, entry)
    elif name.endswith(".xz"):
        yield name[:-3], lambda: lzma.decompress(path.read_bytes())
    elif name.endswith(".gz"):
        yield name[:-3], lambda: gzip.decompress(path.read_bytes())
    elif name.endswith(".parquet"):
        yield name, lambda: _json_lines(path)
    else:
        yield name, path.read_bytes


def _json_lines(path: Path) -> bytes:
    """The rows of a parquet file."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise ConfigError(
            f"wanted pyarrow to read {shown(path)}, found it not installed; "
            f"pip install -c constraints.txt -r requirements/bench.txt"
        ) from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise OSError(" ".join(str(error).split())[:200]) from None
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def lines(text: str) -> io.StringIO:
    """A text line by line: only a line feed ends one, for texts hold U+2028 and the like."""
    return io.StringIO(text, newline="\n")


LETTERS = "ABCDEFGHIJ"
File = tuple[str, str]  # name and text
Reader = Callable[[Iterable[File]], Iterator[dict | str]]


def row(
    ask: str,
    *,
    context: str = "",
    options: Iterable[str] = (),
    gold: Iterable[int] = (),
    answers: Iterable[str] = (),
    letters: Iterable[str] = (),
    subject: str = "",
    **columns: object,
) -> dict | str:
    """A row, or the reason why there is none."""
    options, gold, answers = list(options), list(gold), [str(a).strip() for a in answers]
    letters = list(letters) or list(LETTERS[: len(options)])
    if not ask.strip():
        return "no question"
    if letters and (len(letters) < 2 or not gold or not all(0 <= g < len(letters) for g in gold)):
        return "no right option"
    if any(not option.strip() for option in options):
        return "empty option"
    if not letters and not any(answers):
        return "no answer"
    made: dict[str, object] = {"ask": ask.strip(), "context": context.strip(), "options": options}
    made |= {"letters": letters, "gold": gold, "answers": answers, "subject": subject}
    return columns | made


def read_rows(read: Reader, files: Iterable[File], left_out: Counter[str]) -> list[dict]:
    """The rows of some files; entries that make no row are counted by reason.

    raises: DataError that names the file whose layout is another one
    """
    found = []
    for file in files:
        try:
            for item in read([file]):
                if isinstance(item, str):
                    left_out[item] += 1
                else:
                    found.append(item)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise DataError(
                f"{file[0]}: wanted the published layout of this benchmark, found "
                f"{type(error).__name__} {error}; bench/readers.py lists the layouts"
            ) from None
    return found


def json_lines(files: Iterable[File]) -> Iterator[tuple[str, dict]]:
    """(name of the file, object) of every line, or of every element of a JSON list."""
    for name, text in files:
        if text.lstrip()[:1] == "[":
            yield from ((name, item) for item in json.loads(text))
        else:
            yield from ((name, json.loads(line)) for line in lines(text) if line.strip())


_LABEL = re.compile(r"^\s*[(（]?[A-J][)）.、．:：]\s*")
_STORY = {f"InputSentence{n}": f"input_sentence_{n}" for n in range(1, 5)} | {
    "RandomFifthSentenceQuiz1": "sentence_quiz1",
    "RandomFifthSentenceQuiz2": "sentence_quiz2",
    "AnswerRightEnding": "answer_right_ending",
}


def columns(files: Iterable[File], wanted: dict) -> Iterator[dict | str]:
    """JSON lines whose columns a task file names.

    wanted: by what a row has (ask, options …) the column as it is, "{question}", or a text with
        columns in it, or several; {file} is the file's name
    """
    for name, data in json_lines(files):
        known = data | {"file": PurePosixPath(name).stem}
        yield row(**{key: _filled(value, known) for key, value in wanted.items()}, **data)


def _filled(wanted: object, known: dict) -> Any:
    if isinstance(wanted, list):
        return [_filled(each, known) for each in wanted]
    if not isinstance(wanted, str):
        return wanted
    return known[wanted[1:-1]] if wanted[1:-1] in known else wanted.format_map(known)


def commonsenseqa(files: Iterable[File]) -> Iterator[dict | str]:
    """question.stem and question.choices, or the two lists of the parquet form."""
    for _, data in json_lines(files):
        question = data["question"]
        if isinstance(question, dict):
            choices = {key: [c[key] for c in question["choices"]] for key in ("label", "text")}
            question = question["stem"]
        else:
            choices = data["choices"]
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
                question = asked[1] if asked else ""
                known = [data["answer"], *data.get("aliases", [])]
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
