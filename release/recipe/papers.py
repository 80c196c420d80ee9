"""Everything that the recipe makes of papers: documents, titles, and talk about an abstract.

csl_papers       the four tasks of CSL's benchmark put together again: one row a paper
documents/<set>  an abstract with its title and keywords as text, for pretraining
titles/<set>     abstract and title, with keywords and discipline where the source knows them
about_real/<set>, about_translated/<set>
                 dialogues about an abstract: title, keywords, discipline, gist, a question that it
                 answers or one that it does not, thanks; in any order, up to five turns
write, category  from a title to its abstract and to its discipline's branch
title_lists      titles alone, by branch, as text

The parts of journals' papers that are scored (dev.jsonl of csl_papers and cnki) are never read: of
CSL one paper in five, whole, as the tasks' files hold the same papers. A paper that several files
hold is told by its arXiv number; one in two hundred is kept for validation in all of them.
"""

import hashlib
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from babyllama.config import REPO, shown
from babyllama.errors import DataError
from data_process.columns import Refused
from data_process.datasets.csl import paper_of
from data_process.decontaminate import Windows, hits, read_list
from data_process.raw import Skip, records
from data_process.stages import share_of
from release.recipe.passages import (
    HERE,
    MOST_COPIES,
    SENTENCE,
    objects,
    questions,
    turn,
    words,
    write_set,
)  # fmt: skip

CSL_DEV, CNKI_DEV, VAL = 0.2, 0.067, 0.005  # shares that are kept for validation
LONGEST = 400  # characters of an abstract that is talked about, so that later turns find room
BODIES, TITLES = ("text", "abst", "abstract"), ("summary", "title")
ENGLISH = re.compile(r"\s*[（(]?[A-Z][\x00-\x7f]{20,}[)）]?\s*$")  # what some gists end with
SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Source:
    """A file of papers, as papers.yaml describes it."""

    place: str
    about: int = 0
    documents: bool = True
    gist: bool = False


ABSTRACTS = "science_abstracts"
TRANSLATED = ("arxiv", "arxiv_llm", "notes_pairs")


@dataclass
class Paper:
    """What is known of a paper; keys of `known` are kinds of questions about it."""

    key: str
    text: str
    title: str = ""
    known: dict[str, str] = field(default_factory=dict)
    keywords: list[str] = field(default_factory=list)


def first_of(data: dict, keys: Iterable[str]) -> str:
    """The first of several fields that is filled."""
    found = next((data[key] for key in keys if data.get(key)), "")
    return found.strip() if isinstance(found, str) else ""


def paper(data: dict, source: Source) -> Paper:
    """What a record states of its paper."""
    text, title = first_of(data, BODIES), first_of(data, TITLES)
    words = data.get("keywords") or data.get("keyword") or []
    words = [word.strip() for word in words if isinstance(word, str) and word.strip()]
    label = data.get("discipline") or data.get("label")
    known = {
        "title": "" if source.gist else title,
        "keywords": "、".join(words[:6]),
        "discipline": label if isinstance(label, str) and not label.isdigit() else "",
        "category": data.get("category") or "",
        "gist": title if source.gist else ENGLISH.sub("", first_of(data, ("tldr",))),
    }
    key = str(data["id"]) if source.place.startswith(ABSTRACTS) and "id" in data else text
    filled = {kind: value for kind, value in known.items() if value}
    return Paper(key, text, known["title"], filled, words)


def document(number: int, data: dict) -> str:
    """An abstract that names its parts, in an order drawn by the paper's id."""
    body, title = first_of(data, BODIES), first_of(data, TITLES)
    raw = next((data[key] for key in BODIES if data.get(key)), "")
    chance = hashlib.blake2b(
        f"{data.get('id', number)} {raw[:50]}".encode(), digest_size=2
    ).digest()
    words = data.get("keywords") or []
    after = [f"标题：{title}"] if title else []
    if words and chance[0] % 2:
        after.append(f"关键词：{'、'.join(word.strip() for word in words)}")
    if isinstance(data.get("tldr"), str) and chance[0] % 3 == 0:
        after.append(f"一句话：{data['tldr'].strip()}")
    parts = [f"摘要：{body}"]
    if chance[1] % 4 == 0:  # as a journal prints it
        return "\n".join(after[:1] + parts + after[1:])
    return "\n".join(parts + (after[::-1] if chance[1] % 8 == 1 else after))


def passage(data: dict) -> str:
    """A passage with its questions as text."""
    asked = [f"问：{qa['q'].strip()}\n答：{qa['a'].strip()}" for qa in data["qas"]]
    return "\n".join([data["context"].strip(), *asked])


class Talk:
    """Makes dialogues about an abstract."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.words = words()
        prompts = yaml.safe_load((REPO / "configs/prompts/summary_zh.yaml").read_text("utf-8"))
        self.slots, self.families = prompts["slots"], list(prompts["families"].values())
        self.turns = prompts["following"]["turns"]

    def about(self, one: Paper) -> dict | None:
        """One to five turns about a paper; a title never stands alone, for the titles' sets ask so.

        None if nothing is known of the paper.
        """
        chance, text = self.chance, shortened(one.text, LONGEST)
        known = dict(one.known)
        asked = questions(text, chance)
        kinds = [*known, *["question"] * min(2, len(asked))]
        chance.shuffle(kinds)
        if "title" in kinds and chance.random() < 0.6:
            kinds.remove("title")
            kinds.insert(0, "title")
        kinds = kinds[: chance.choices((1, 2, 3, 4), (20, 45, 25, 10))[0]]
        if not kinds or kinds == ["title"]:
            return None
        if chance.random() < 0.15:
            kinds.insert(chance.randint(1, len(kinds)), "unsaid")
        messages = []
        for number, kind in enumerate(kinds):
            if kind == "question":
                known["question"], known["answer"] = asked.pop()
            messages += self._turn(kind, known, text if number == 0 else None)
        if chance.random() < 0.25:
            messages += turn(*chance.choice(self.words["thanks"]))
        return {"messages": messages}

    def _turn(self, kind: str, known: dict[str, str], text: str | None) -> list[dict]:
        chance, words = self.chance, self.words
        # The templates say {title} for the word 标题, and {summary} for the title.
        pieces = known | {name: chance.choice(some) for name, some in self.slots.items()}
        pieces["summary"] = known.get("title", "")
        if kind == "unsaid":
            thing, asked = chance.choice(words["unsaid"])
            answer = chance.choice(words["unsaid_answers"])
            return turn(chance.choice(asked), answer.format(thing=thing))
        family = chance.choice(self.families)
        turns = self.turns.get(kind, {})
        if text is not None:
            asked = family["questions"] if kind == "title" else words["first"][kind]
            pieces["text"] = text
        else:
            asked = words["later"].get(kind) or turns["questions"]
        answers = words["answers"].get(kind) or turns["answers"]
        if kind == "title" and text is not None:
            answers = family["answers"]
        return turn(filled(chance.choice(asked), pieces), filled(chance.choice(answers), pieces))


def filled(template: str, pieces: dict[str, str]) -> str:
    """A template with its slots filled; braces inside the pieces stay."""
    return SLOT.sub(lambda found: pieces[found[1]], template)


def shortened(text: str, longest: int) -> str:
    """The first whole sentences of a text, at least one of them, at most `longest` characters."""
    ends = [match.end() for match in SENTENCE.finditer(text)]
    return text[: max((end for end in ends if end <= longest), default=longest)].strip()


def write_parts(place: Path, rows: Iterable[tuple[str, dict]], dev: float = VAL) -> None:
    """Write train.jsonl and, where papers are kept for validation, dev.jsonl.

    rows: each with the key of its paper, by whose hash it is kept
    """
    parts: dict[str, list[dict]] = {"train": [], "dev": []}
    for key, row in rows:
        parts["dev" if key and share_of(key) < dev else "train"].append(row)
    for part, mine in parts.items():
        if mine:
            write_set(place, mine, part)


def journals(path: Path) -> Iterator[tuple[str, dict]]:
    """The journals' papers, laid out as CSL's."""
    for data in objects(path):
        row = {"id": data["id"], "abstract": data["text"], "title": data["summary"]}
        yield data["text"], row | ({"keywords": data["keywords"]} if data.get("keywords") else {})


def task(place: Path, *wanted: str) -> Iterator[dict]:
    """The papers in the dev file of one of CSL's tasks, as far as its lines state them."""
    for record in records(place, "utf-8"):
        try:
            if isinstance(record, Skip):
                raise Refused(record.reason)
            if record.split == "val":
                yield paper_of(record, *wanted)
        except Refused:
            raise DataError(
                f"{shown(place)}, {record.where}: wanted {' and '.join(wanted)}, found another "
                f"line; take the file from CSL's repository again"
            ) from None


def joined(benchmark: Path) -> Iterator[tuple[str, dict]]:
    """The papers of ts with what the other tasks know of them.

    kg has abstract, a space and title; cls_dcp the abstract; cls_ctg the title.
    """
    tasks = {"keywords": ("kg", "abstract"), "discipline": ("cls_dcp", "abstract"),
             "category": ("cls_ctg", "title")}  # fmt: skip
    known = {
        field: {one[by]: one[field] for one in task(benchmark / folder, by, field)}
        for field, (folder, by) in tasks.items()
    }
    for one in task(benchmark / "ts", "abstract", "title"):
        abstract, title = one["abstract"], one["title"]
        keys = {"keywords": f"{abstract} {title}", "discipline": abstract, "category": title}
        found = {field: known[field][key] for field, key in keys.items() if key in known[field]}
        yield abstract, {"title": title, "abstract": abstract} | found


def write(raw: Path, out: Path, kept_out: Iterable[Path]) -> None:
    """Split, read, write."""
    write_parts(out / "csl_papers", joined(raw / "csl/benchmark"), CSL_DEV)
    write_parts(out / "cnki", journals(raw / ABSTRACTS / "cnki_real_titles.jsonl.xz"), CNKI_DEV)
    talk = Talk(seed=0)
    titled: dict[str, list[Paper]] = {}
    files = yaml.safe_load((HERE / "papers.yaml").read_text("utf-8"))
    for name, source in ((name, Source(**given)) for name, given in files.items()):
        found = list(objects((out if source.place.startswith(name) else raw) / source.place))
        if source.documents:
            write_set(
                out / "documents" / name, ({"text": document(n, d)} for n, d in enumerate(found))
            )
        papers = [paper(data, source) for data in found]
        # The few that were matched are no set of their own.
        group = titled.setdefault(name.replace("matched", "papers"), [])
        group += [one for one in papers if one.title and one.text]
        if source.about:
            about = f"about_{'translated' if name in TRANSLATED else 'real'}/{name}"
            write_parts(out / about, abouts(papers, source.about, talk))
    for name, papers in titled.items():
        if papers:
            write_parts(out / "titles" / name, ((one.key, title_row(one)) for one in papers))
    real = [one for name in ("csl_computing", "csl_papers", "cnki") for one in titled[name]]
    _write_others(out, raw, real, talk, kept_out)


def title_row(one: Paper) -> dict:
    """A pair as the reader of CSL takes it."""
    meta: Any = {key: one.known[key] for key in ("discipline", "category") if key in one.known}
    meta |= {"keywords": one.keywords} if one.keywords else {}
    return {"abstract": one.text, "title": one.title} | meta


def abouts(papers: list[Paper], n: int, talk: Talk) -> Iterator[tuple[str, dict]]:
    """Dialogues about `n` papers; of few papers several each."""
    n = min(n, MOST_COPIES * len(papers))
    for one in talk.chance.sample(papers * MOST_COPIES, n):
        if row := talk.about(one):
            yield one.key, row


def titles_alone(path: Path, kept_out: Iterable[Path]) -> list[list[str]]:
    """Titles and branches of CSL's cls_ctg. One window in common with a kept-out text is enough to
    drop a title, for it has few."""
    numbers = np.concatenate([np.empty(0, "<u8"), *map(read_list, kept_out)])
    windows = Windows(("kept out",), (np.unique(numbers),), None)
    lines: Iterable[Any] = records(path, "utf-8")  # of a published file: all of them are whole
    rows = [line.data.split("\t")[1:] for line in lines]
    n_hits = hits([title for title, _ in rows], windows)[:, 0]
    return [row for row, n in zip(rows, n_hits, strict=True) if n == 0]


def _write_others(
    out: Path, raw: Path, titled: list[Paper], talk: Talk, kept_out: Iterable[Path]
) -> None:
    def asked(kind: str, title: str, answer: str) -> dict:
        question = talk.chance.choice(talk.words[kind]).format(title=title)
        return {"messages": turn(question, answer)}

    write_parts(out / "write", ((one.key, asked("write", one.title, one.text)) for one in titled))
    branches = titles_alone(raw / "csl/benchmark/cls_ctg/train.tsv.xz", kept_out)
    rows = ((title, asked("category", title, branch)) for title, branch in branches)
    write_parts(out / "category", rows)
    by_branch: dict[str, list[str]] = {}
    for title, branch in branches:
        by_branch.setdefault(branch, []).append(title)
    lists = [
        {"text": "\n".join([name, *titles[start : start + 12]])}
        for name, titles in sorted(by_branch.items())
        for start in range(0, len(titles), 12)
    ]
    write_set(out / "title_lists", lists)
    readings = (data for path in sorted((raw / "reading").glob("*.xz")) for data in objects(path))
    write_set(out / "documents/reading", ({"text": passage(data)} for data in readings))
