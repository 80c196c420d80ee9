"""Summary rows as dialogues: prompt templates around already tokenized pieces.

A template file (configs/prompts/summary_zh.yaml) has `slots` (words that may stand for each
other), `families` (questions that fit with answers), `following` (second turns about a row's
keywords and the like) and `eval`. A wording is drawn anew for each row and epoch by the generator
that the caller seeds; what stands between the slots is tokenized once, the stored pieces are laid
in unchanged. Evaluation asks with the one `eval` question, which wants the summary alone, or with
wordings that training never shows; a lead-in that an answer has all the same is taken off by the
answer template that puts it on.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Self, TypeVar

import numpy as np

from babyllama import sources
from babyllama.config import from_repo, read_yaml
from babyllama.errors import ConfigError
from babyllama.language.letters import plain
from babyllama.sources import Reader, Row, Source, supervised
from babyllama.token_file import META, ROLES, TokenFile
from tokenizer import Tokenizer, defused

_SLOT = re.compile(r"\{(\w+)\}")
_TELLING = 4  # characters: so many of a template in a title are no accident
_STORED = ("text", "summary", *META)

Ids = Sequence[int]
Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Turn:
    """The wordings of a second turn about one thing in a row's meta.

    join: stands between its pieces
    """

    questions: list[str]
    answers: list[str]
    join: str = "、"


@dataclass
class SummaryPrompts:
    """The wordings of one template file for one tokenizer.

    unseen: questions that no training wording should equal, of the report on how much a score hangs
        on the phrase; a row is asked with the k-th by eval_prompt(text, max_ids, unseen[k]),
        and strip_frame takes off what a reply adds, whatever the question was
    share: of the rows that could have a second turn
    """

    tokenizer: Tokenizer
    slots: dict[str, list[str]]
    families: list[tuple[list[str], list[str]]]
    eval_question: str
    unseen: list[str] = field(default_factory=list)
    turns: dict[str, Turn] = field(default_factory=dict)
    share: float = 0.0
    _ids: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path, tokenizer: Tokenizer) -> Self:
        """Read and check a template file.

        raises: ConfigError with every fault of the file
        """
        if not path.is_file():
            raise ConfigError(f"template file {path}: no such file")
        try:
            raw = read_yaml(path)
            families = [(f["questions"], f["answers"]) for f in raw["families"].values()]
            after = raw.get("following", {"turns": {}, "share": 0.0})
            turns = {name: Turn(**turn) for name, turn in after["turns"].items()}
            prompts = cls(
                tokenizer, raw["slots"], families, raw["eval"]["question"],
                raw["eval"].get("unseen", []), turns, after["share"],
            )  # fmt: skip
            faults = prompts._faults() or prompts._clashes()
        except ConfigError:
            raise
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ConfigError(
                f"{path}: wanted slots, families (each with questions and answers), "
                f"eval.question and, if there are second turns, following (share, and turns with "
                f"questions and answers); missing or misplaced: {error}"
            ) from None
        if faults:
            raise ConfigError(f"{path}: " + "; ".join(faults[:10]))
        return prompts

    def _faults(self) -> list[str]:
        faults = [
            f"slot {name!r} must be a list of words, found {words!r}"
            for name, words in self.slots.items()
            if not isinstance(words, list) or not words or not all(map(_is_word, words))
        ]
        faults += [f"slot {n!r} is the name of a stored piece; take another" for n in _STORED
                   if n in self.slots]  # fmt: skip
        if not self.families or not all(q and a for q, a in self.families):
            faults.append("wanted families, each with a question and an answer at least")
        for name, turn in self.turns.items():
            if name not in META or not turn.questions or not turn.answers:
                faults.append(
                    f"following.turns.{name}: wanted one of {', '.join(META)}, with a question and "
                    f"an answer at least"
                )
        if not 0 <= self.share <= 1:
            faults.append(f"following.share wants 0 to 1, found {self.share!r}")
        for template, stored in self._templates():
            names = _SLOT.findall(template)
            if stored and names.count(stored) != 1:
                faults.append(f"{template!r} must hold {{{stored}}} exactly once")
            unknown = [n for n in names if n not in self.slots and n != stored]
            if unknown:
                faults.append(f"{template!r} has unknown slots {unknown}; add them to `slots`")
        return faults

    def _templates(self) -> Iterator[tuple[str, str | None]]:
        """Every template with the one stored piece that it must hold."""
        for questions, answers in self.families:
            yield from ((question, "text") for question in questions)
            yield from ((answer, "summary") for answer in answers)
        for name, turn in self.turns.items():
            yield from ((question, None) for question in turn.questions)
            yield from ((answer, name) for answer in turn.answers)
        yield from ((question, "text") for question in (self.eval_question, *self.unseen))

    def _clashes(self) -> list[str]:
        """Answers that could not be told apart."""
        return [
            f"answers that begin {lead!r} end in {end!r} or {other!r}, so it is open what "
            f"belongs to the summary; give them one ending or another beginning"
            for (lead, end), (same, other) in product(self._frames, repeat=2)
            if lead == same and end != other and end.endswith(other)
        ]

    @cached_property
    def longest(self) -> int:
        """The most ids that any wording adds to a text and its summary."""
        return max(self._longest(asked) + self._longest(said) for asked, said in self.families)

    @cached_property
    def _turn_longest(self) -> dict[str, int]:
        """The most ids that a second turn adds to its pieces, dialogue format included."""
        pair = [{"role": "user", "content": [[]]}, {"role": "assistant", "content": [[]]}]
        first, both = (len(self.tokenizer.render_chat(m)[0]) for m in (pair, pair + pair))
        return {
            name: both - first + self._longest(turn.questions) + self._longest(turn.answers)
            for name, turn in self.turns.items()
        }

    def _longest(self, templates: list[str]) -> int:
        filled = (_SLOT.split(one)[::2] for t in templates for one in self._fillings(t))
        return max(sum(len(self._encode(part)) for part in parts) for parts in filled)

    def _fillings(self, template: str) -> list[str]:
        """Every text that a template can become, stored slots left standing."""
        names = [n for n in dict.fromkeys(_SLOT.findall(template)) if n not in _STORED]
        choices = product(*(self.slots[name] for name in names))
        return [_fill(template, dict(zip(names, words, strict=True))) for words in choices]

    def _encode(self, text: str) -> list[int]:
        if text not in self._ids:
            self._ids[text] = self.tokenizer.encode(text)
        return self._ids[text]

    def messages(
        self,
        text: Ids,
        summary: Ids,
        rng: np.random.Generator,
        max_text: int | None = None,
        meta: Mapping[str, Sequence[Ids]] | None = None,
    ) -> list[dict]:
        """One row as a dialogue in a wording drawn from `rng`.

        text, summary: stored ids
        max_text: a longer text loses its end; a shorter one leaves room for a second turn
        meta: the pieces that a second turn may ask for, by their names in META
        """
        questions, answers = self.families[rng.integers(len(self.families))]
        question, answer = _one(questions, rng), _one(answers, rng)
        chosen = {name: _one(words, rng) for name, words in self.slots.items()}
        messages = [
            _message("user", self._lay(_fill(question, chosen), text[:max_text])),
            _message("assistant", self._lay(_fill(answer, chosen), summary)),
        ]
        spare = None if max_text is None else max_text - len(text)
        meta = meta or {}
        names = [name for name in self.turns if self.turn_fits(name, meta.get(name), spare)]
        if not names or rng.random() >= self.share:
            return messages
        name = _one(names, rng)
        turn = self.turns[name]
        question, answer = (_fill(_one(t, rng), chosen) for t in (turn.questions, turn.answers))
        return [
            *messages,
            _message("user", self._lay(question)),
            _message("assistant", self._lay(answer, *self._joined(meta[name], turn.join))),
        ]

    def turn_fits(self, name: str, pieces: Sequence[Ids] | None, spare: int | None) -> bool:
        """True if a second turn about these pieces takes at most `spare` ids in every wording."""
        if not pieces or spare is None:
            return bool(pieces)
        n_ids = sum(map(len, self._joined(pieces, self.turns[name].join)))
        return self._turn_longest[name] + n_ids <= spare

    def _joined(self, pieces: Sequence[Ids], join: str) -> list[Ids]:
        between = self._encode(join)
        return [part for piece in pieces for part in (between, piece)][1:]

    def eval_messages(
        self, text: Ids, max_text: int | None = None, question: str | None = None
    ) -> list[dict]:
        """The question that scoring asks, or another one; it wants the summary alone."""
        return [_message("user", self._lay(question or self.eval_question, text[:max_text]))]

    def eval_prompt(
        self, text: str, max_ids: int, question: str | None = None
    ) -> tuple[list[int], int]:
        """The rendered question about a text, and how many ids the text lost at its end to fit.

        max_ids: most ids of the whole prompt
        question: one of `unseen`, else the one that scoring asks
        raises: ConfigError if not even 16 ids of the text fit
        """
        ids = self.text_ids(text)
        empty = self.eval_messages([], question=question)
        room = max_ids - len(self.tokenizer.render_prompt(empty))
        if room < 16:
            raise ConfigError(
                f"a prompt of {max_ids} tokens leaves {room} for the text, wanted at least 16; "
                f"ask for fewer new tokens or use a model with a longer context"
            )
        asked = self.eval_messages(ids, room, question)
        return self.tokenizer.render_prompt(asked), max(0, len(ids) - room)

    def text_ids(self, text: str) -> list[int]:
        """The ids of a text that somebody has titled, as those of a summary row."""
        return self.tokenizer.encode(defused(plain(text), "\n"))

    def strip_frame(self, reply: str) -> str:
        """A reply without what an answer template adds to a summary; any other reply as it is.

        Beginning and end must be those of one template with one choice of words, letter by
        letter; where several fit, the one that adds most.
        """
        for lead, end in self._frames:
            if reply.startswith(lead) and reply.endswith(end) and len(reply) >= len(lead + end):
                return reply[len(lead) : len(reply) - len(end)]
        return reply

    @cached_property
    def _frames(self) -> list[tuple[str, str]]:
        """Texts of answers before and after a summary, longest first."""
        answers = [answer for _, own in self.families for answer in own]
        frames = {f.partition("{summary}")[::2] for a in answers for f in self._fillings(a)}
        return sorted(frames, key=lambda frame: (-len("".join(frame)), frame))

    def echoes(self, title: str, text: str) -> bool:
        """True if a title repeats words of a template that do not stand in the text."""
        return any(phrase in title and phrase not in text for phrase in self._phrases)

    @cached_property
    def _phrases(self) -> set[str]:
        """Texts between the slots of all templates that are long enough to be telling."""
        parts = (p.strip("：。，？\n") for t, _ in self._templates() for p in _SLOT.split(t)[::2])
        return {part for part in parts if len(part) >= _TELLING}

    def _lay(self, filled: str, *stored: Ids) -> list[Ids]:
        # What stands between the slots, and the names of the slots, take turns.
        return [
            ids
            for number, part in enumerate(_SLOT.split(filled))
            for ids in (stored if number % 2 else [self._encode(part)] if part else [])
        ]


# A summary row whose text would keep less than this is dropped.
_LEAST_TEXT = 16


class Summaries(Source):
    """A summary source: each row in a wording drawn anew, its text cut to fit."""

    def _fitting(self, max_seq_len: int) -> list[np.ndarray]:
        templates = from_repo(self._config.prompts)
        prompts = self._prompts = SummaryPrompts.load(templates, self._tokenizer)
        frame = self._tokenizer.render_chat(
            [{"role": "user", "content": [[]]}, {"role": "assistant", "content": [[]]}]
        )[0]
        self._room = max_seq_len + 1 - len(frame) - prompts.longest  # for text and summary
        fitting, n_cut, n_invented = [], 0, 0
        for file in self.files:
            text, summary = file.sizes[file.first], file.sizes[file.first + 1]
            fits = np.minimum(text, _LEAST_TEXT) + summary <= self._room
            for place in np.flatnonzero(fits) if self._config.least_copied else ():
                if self._copied(file, place) < self._config.least_copied:
                    fits[place], n_invented = False, n_invented + 1
            n_cut += int((fits & (text + summary > self._room)).sum())
            fitting.append(fits)
        self.dropped = {
            "summary_does_not_fit": sum(int((~fits).sum()) for fits in fitting) - n_invented,
            "summary_not_in_text": n_invented,
            "text_cut": n_cut,
        }
        has_keywords = any((file.roles == ROLES.index("keywords")).any() for file in self.files)
        asks = "keywords" in prompts.turns and prompts.share > 0
        self.teaches = ("title", "keywords") if asks and has_keywords else ("title",)
        return fitting

    def _copied(self, file: TokenFile, place: int) -> float:
        """The share of a summary's tokens that its text holds where it is cut."""
        (_, text), (_, summary), *_ = file.pieces(place)
        return float(np.isin(summary, text[: self._room - len(summary)]).mean())

    def row(self, number: int, rng: np.random.Generator) -> Row:
        file, place, _ = self._rows[number].tolist()
        (_, text), (_, summary), *more = self.files[file].pieces(place)
        meta: dict[str, list[np.ndarray]] = {}
        for role, ids in more:
            meta.setdefault(role, []).append(ids)
        room = self._room - len(summary)
        messages = self._prompts.messages(text, summary, rng, room, meta)
        return supervised(self._tokenizer, messages, self._config.supervise)


READERS: dict[str, Reader] = {**sources.READERS, "summary": Summaries}


def _is_word(word: object) -> bool:
    return isinstance(word, str) and not _SLOT.search(word)


def _fill(template: str, chosen: dict[str, str]) -> str:
    return _SLOT.sub(lambda found: chosen.get(found[1], found[0]), template)


def _one(choices: Sequence[Choice], rng: np.random.Generator) -> Choice:
    return choices[rng.integers(len(choices))]


def _message(role: str, content: list[Ids]) -> dict:
    return {"role": role, "content": content}
