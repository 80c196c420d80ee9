"""Turn an English benchmark into Chinese through any endpoint that speaks OpenAI's protocol.

    python -m bench.translate gsm8k --data data/benchmarks --out data/benchmarks_zh
        --endpoint http://127.0.0.1:8000/v1 --model NAME --key_env MY_KEY
    python -m bench.run out/my_run --tasks gsm8k --data data/benchmarks_zh

The files keep their layout, so that the same tasks read them; labels, letters and what is Chinese
already are not sent. A translation must hold the numbers, formulas and option letters of its text,
and Han characters. One that does not is asked for again, then its row is left out and listed in
<out>/<set>/failed.jsonl.
Texts that were translated are kept in translated.jsonl beside it: a second call asks for the rest.
The key is read from the environment variable that --key_env names, and is not written anywhere.
"""

import csv
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from http.client import HTTPException
from pathlib import Path

import yaml
from tqdm import tqdm

from babyllama.config import REPO, atomic_write, from_repo, parse, run, shown
from babyllama.errors import ConfigError, DataError
from babyllama.rows import write_rows
from bench.cache import Store
from bench.readers import find, lines
from bench.tasks import load, names

_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
_LETTER = re.compile(r"\(([A-R])\)|^([A-R])[.)](?=\s)", re.MULTILINE)
_FORMULA = re.compile(r"\$[^$]+\$")
_COMMAND = re.compile(r"\\boxed|\\frac|<<[^>]*>>|####|Passage:|Question:|Answer:|Options:")
_HAN = re.compile(r"[\u3400-\u9fff]")
_WORD = re.compile(r"[A-Za-z]{3,}")
_WORDS = {
    "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10", "eleven": "11", "twelve": "12",
    "half": "2", "dozen": "12",
}  # fmt: skip
LONGER = 4  # a translation is at most so many times as long: more is an explanation


def is_chinese(text: str) -> bool:
    """Whether a text of a mixed set (AGIEval) needs no translation."""
    return bool(_HAN.search(text))


def lost(text: str, translation: str) -> str:
    """What is wrong with a translation, in words; "" if nothing."""
    faults = []
    if not translation.strip():
        return "没有译文"
    for name, pattern in (("字母选项", _LETTER), ("公式", _FORMULA), ("标记", _COMMAND)):
        faults += _missing(name, _found(pattern, text), _found(pattern, translation))
    faults += _numbers(text, translation)
    # A name or a formula may stay as it is; a sentence may not.
    if len(_WORD.findall(_FORMULA.sub("", text))) >= 2 and not _HAN.search(translation):
        faults.append("没有译成中文")
    if len(translation) > LONGER * len(text) + 20:
        faults.append("译文过长，像是解释")
    return "；".join(faults)


def _numbers(text: str, translation: str) -> list[str]:
    """Every number must be there again; a new one only where a word said it."""
    wanted, found = (_values(t) for t in (text, translation))
    faults = _missing("数字", wanted, found)
    words = Counter(_WORDS[w] for w in re.findall(r"[a-z]+", text.lower()) if w in _WORDS)
    new = found - wanted - words
    return faults + ([f"多出数字 {'、'.join(sorted(new))}"] if new else [])


def _values(text: str) -> Counter[str]:
    return Counter(n.replace(",", "").rstrip(".") for n in _NUMBER.findall(text))


def _found(pattern: re.Pattern[str], text: str) -> Counter[str]:
    return Counter(match.group(0).strip() for match in pattern.finditer(text))


def _missing(name: str, wanted: Counter[str], found: Counter[str]) -> list[str]:
    gone = wanted - found
    return [f"缺少{name} {'、'.join(sorted(gone))}"] if gone else []


_BUSY = (408, 425, 429, 500, 502, 503, 504)
_TRIES = 6


class TooLong(Exception):
    """The text and its answer do not fit into the context of the endpoint's model."""


@dataclass(frozen=True)
class Endpoint:
    """Where to ask.

    url: up to and with /v1
    key: sent as a bearer token; shown nowhere
    pause_s: wait after the first refusal; doubled each time
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    timeout_s: float = 120.0
    pause_s: float = 1.0

    def ask(self, messages: list[dict[str, str]]) -> str:
        """The answer to a dialogue, at temperature 0.

        raises: ConfigError if the endpoint refuses, is not there, or says something else;
            TooLong if another text may do better
        """
        body = {"model": self.model, "messages": messages, "temperature": 0, "stream": False}
        head = {"Content-Type": "application/json"}
        if self.key:
            head["Authorization"] = f"Bearer {self.key}"
        address = self.url.rstrip("/") + "/chat/completions"
        if not address.startswith(("http://", "https://")):
            raise ConfigError(f"--endpoint: wanted http://… or https://…, found {self.url!r}")
        asked = urllib.request.Request(address, json.dumps(body).encode(), head)
        for number in range(_TRIES):
            try:
                with urllib.request.urlopen(asked, timeout=self.timeout_s) as answer:
                    return self._text(answer.read(1 << 24))
            except urllib.error.HTTPError as error:
                said = error.read(2000).decode("utf-8", "replace")
                if "context_length_exceeded" in said:
                    raise TooLong from None
                if error.code not in _BUSY:
                    said = " ".join(said.split())[:300]
                    raise ConfigError(
                        f"{self.url}: refused with {error.code}: {said}; look at --endpoint, "
                        f"--model and --key_env"
                    ) from None
                reason = f"{error.code}"
                pause = _seconds(error.headers.get("Retry-After"))
            except (OSError, HTTPException) as error:
                reason, pause = str(error), None
            if number + 1 < _TRIES:
                time.sleep(self.pause_s * 2**number if pause is None else pause)
        raise ConfigError(
            f"{self.url}: no answer after {_TRIES} tries ({reason}); is it running? Start the same "
            f"command again later: what was translated is kept"
        )

    def _text(self, body: bytes) -> str:
        try:
            text = json.loads(body)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            text = None
        if not isinstance(text, str):
            raise ConfigError(
                f"{self.url}: wanted a chat completion, found {body[:100]!r}; the address must end "
                f"with /v1"
            )
        return text.strip()


def _seconds(text: str | None) -> float | None:
    return min(float(text), 60.0) if text and text.replace(".", "", 1).isdigit() else None


UNSENT = ("CANNOTANSWER",)


@cache
def text_paths() -> dict[str, list[str]]:
    """Where the texts of an entry stand, by the layout of its file."""
    return yaml.safe_load((REPO / "configs/bench/_texts.yaml").read_text("utf-8"))


@dataclass(frozen=True)
class TranslateConfig:
    """What is translated, and who does it.

    Args:
        task: a benchmark with English rows
        data: folder with a folder for each benchmark
        out: such a folder for the Chinese files
        endpoint: address up to and with /v1
        model: name that the endpoint knows
        key_env: environment variable that holds the key; if absent none is sent
        limit: entries of each file at most, the first
        tries: how often a text is asked for before its row is given up
        workers: texts that are asked for at the same time
        timeout_s: longest wait for one answer
    """

    task: str | None = None
    data: Path = Path("data/benchmarks")
    out: Path = Path("data/benchmarks_zh")
    endpoint: str | None = None
    model: str | None = None
    key_env: str | None = None
    limit: int | None = None
    tries: int = 3
    workers: int = 4
    timeout_s: float = 120.0


@dataclass
class Entry:
    """One entry of a file, and its texts that are to be translated."""

    name: str
    data: dict | list
    places: list[tuple]
    texts: list[str]


def read_entries(reader: str, files: list[tuple[str, str]], limit: int | None) -> Iterator[Entry]:
    """The entries of the files, in order."""
    for name, text in files:
        if name.endswith(".csv"):
            found: list = list(csv.reader(lines(text)))
        elif text.lstrip()[:1] == "[":
            found = json.loads(text)
        elif reader in ("bbh", "quac") or '"Data"' in text[:2000]:
            found = [json.loads(text)]
        else:
            found = [json.loads(line) for line in lines(text) if line.strip()]
        name = name.removesuffix(".parquet") + ".jsonl" * name.endswith(".parquet")
        for data in found[:limit]:
            places = [p for path in text_paths()[reader] for p in _places(data, path.split("."))]
            texts = [_get(data, place) for place in places]
            wanted = [
                n for n, t in enumerate(texts)
                if t.strip() and t not in UNSENT and not is_chinese(t)
            ]  # fmt: skip
            yield Entry(name, data, [places[n] for n in wanted], [texts[n] for n in wanted])


def _places(data: object, path: list[str], before: tuple = ()) -> Iterator[tuple]:
    """The keys that lead to each text of a path; [] where the entry has none."""
    if not path:
        if isinstance(data, str):
            yield before
    elif path[0] == "*" and isinstance(data, list):
        for n, item in enumerate(data):
            yield from _places(item, path[1:], (*before, n))
    elif isinstance(data, dict) and path[0] in data:
        yield from _places(data[path[0]], path[1:], (*before, path[0]))
    elif isinstance(data, list) and path[0].isdigit() and int(path[0]) < len(data):
        yield from _places(data[int(path[0])], path[1:], (*before, int(path[0])))


def _get(data: object, place: tuple) -> str:
    for key in place:
        data = data[key]
    return data


def translated(entry: Entry, known: Callable[[str], str]) -> dict | list:
    """A copy of an entry with its texts in Chinese."""
    data = deepcopy(entry.data)
    for place, text in zip(entry.places, entry.texts, strict=True):
        inner = _get(data, place[:-1])
        inner[place[-1]] = known(text)
    return data


def translate_text(text: str, endpoint: Endpoint, tries: int) -> dict[str, str]:
    """{"zh": the translation}, or {"lost": what it never held}."""
    complaint = ""
    for _ in range(tries):
        try:
            reply = endpoint.ask(_request(text, complaint))
        except TooLong:  # also with a complaint: the next one would be as long
            return {"lost": "原文太长，模型的上下文放不下", "last": ""}
        complaint = lost(text, reply)
        if not complaint:
            return {"zh": reply}
    return {"lost": complaint, "last": reply[:500]}


def _request(text: str, complaint: str) -> list[dict[str, str]]:
    rules = (
        "请把下面的英文译成通顺的简体中文。数字、公式、字母选项（如 (A)）、反斜杠命令和 #### 必须"
        "原样保留；人名可音译；不要解答，不要解释，只输出译文。"
    )
    if complaint:
        rules += f"上一次译文有误：{complaint}。请改正。"
    return [{"role": "system", "content": rules}, {"role": "user", "content": text}]


def write_files(entries: list[Entry], out: Path, known: Callable[[str], str | None]) -> list[dict]:
    """Write what is whole, file by file; returns what must be left out."""
    failed, files = [], {}
    for entry in entries:
        bad = [text for text in entry.texts if known(text) is None]
        files.setdefault(entry.name, [])
        if bad:
            failed.append({"file": entry.name, "texts": bad, "entry": entry.data})
        else:
            files[entry.name].append(translated(entry, known))
    for name, data in files.items():
        if not name.endswith(".csv"):
            write_rows(out / name, data)
            continue
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        with (
            atomic_write(out / name) as temporary,
            open(temporary, "w", encoding="utf-8", newline="") as file,
        ):
            csv.writer(file, lineterminator="\n").writerows(data)
    return failed


def check(cfg: TranslateConfig) -> None:
    """raises: ConfigError naming what is missing"""
    english = [n for n in names() if not n.endswith("_cloze") and load(n).reader in text_paths()]
    if cfg.task not in english:
        raise ConfigError(f"wanted an English benchmark, found {cfg.task!r}; known are "
                          f"{', '.join(english)}")  # fmt: skip
    if not cfg.endpoint or not cfg.model:
        raise ConfigError("wanted --endpoint URL and --model NAME, found "
                          f"{cfg.endpoint!r} and {cfg.model!r}")  # fmt: skip
    if cfg.key_env and not os.environ.get(cfg.key_env):
        raise ConfigError(f"--key_env {cfg.key_env}: wanted a key in this environment variable, "
                          f"found none; export it, or leave the flag out")  # fmt: skip
    if min(cfg.tries, cfg.workers) < 1 or cfg.timeout_s <= 0:
        raise ConfigError("tries, workers and timeout_s must be positive")
    if from_repo(cfg.out).resolve() == from_repo(cfg.data).resolve():
        raise ConfigError(f"--out {cfg.out} is --data: the English files would be replaced")


def main(cfg: TranslateConfig) -> int:
    """Read, ask, write; 0 if every row could be translated."""
    check(cfg)
    task = load(cfg.task)
    data, out = from_repo(cfg.data) / task.folder, from_repo(cfg.out) / task.folder
    files = [file for patterns in task.files.values() for file in find(data, patterns)]
    if not files:
        raise DataError(f"wanted {task.files['scored']} in {shown(data)}, found none")
    entries = list(read_entries(task.reader, files, cfg.limit))
    out.mkdir(parents=True, exist_ok=True)
    store = Store(out / "translated.jsonl", {"model": cfg.model})
    endpoint = Endpoint(cfg.endpoint, cfg.model, os.environ.get(cfg.key_env or ""), cfg.timeout_s)

    def known(text: str) -> str | None:
        return store.known.get(store.key(text), {}).get("zh")

    every = dict.fromkeys(text for entry in entries for text in entry.texts)
    waiting = [text for text in every if known(text) is None]
    bar = tqdm(total=len(every), initial=len(every) - len(waiting), unit=" texts")
    with bar, ThreadPoolExecutor(cfg.workers) as pool:
        answers = pool.map(lambda t: translate_text(t, endpoint, cfg.tries), waiting)
        for text, answer in zip(waiting, answers, strict=True):
            store.add([(store.key(text), answer)])
            bar.update()
    failed = write_files(entries, out, known)
    write_rows(out / "failed.jsonl", failed)
    print(f"{cfg.task}: {len(entries) - len(failed):,} of {len(entries):,} entries, "
          f"{len(every):,} texts ({len(waiting):,} asked now) in {shown(out)}")  # fmt: skip
    for row in failed[:10]:
        reasons = [store.known.get(store.key(text), {}).get("lost", "?") for text in row["texts"]]
        print(f"  left out: {row['file']}: {reasons[0]}: {row['texts'][0][:60]!r}")
    if len(failed) == len(entries):
        raise DataError(f"{cfg.model} translated no entry so that numbers and letters survive; "
                        f"see {shown(out / 'failed.jsonl')}, take another model")  # fmt: skip
    return 0


if __name__ == "__main__":
    run(main, parse(TranslateConfig, __doc__, positional=("task",)))
