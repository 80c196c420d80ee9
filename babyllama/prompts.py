"""Summary rows as dialogues: templates laid round already tokenized pieces. No torch.

A template file (configs/prompts/summary_zh.yaml) has `slots` (words that may stand for each
other), `families` (questions that fit with answers) and one `eval` wording. A wording is drawn
anew for each row and epoch by the generator that the caller seeds; what stands between the slots
is tokenized once, the text and the summary are the stored ids, unchanged. Evaluation asks with
the one `eval` question, whose answer is the summary and nothing else.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
import yaml

from babyllama.errors import ConfigError
from tokenizer import Tokenizer

_SLOT = re.compile(r"\{(\w+)\}")
_STORED = ("text", "summary")


@dataclass
class SummaryPrompts:
    """The wordings of one template file for one tokenizer.

    longest: the most ids that any wording adds to a text and its summary
    """

    tokenizer: Tokenizer
    slots: dict[str, list[str]]
    families: list[tuple[list[str], list[str]]]
    eval_question: str
    longest: int = 0
    _ids: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path, tokenizer: Tokenizer) -> "SummaryPrompts":
        """Read and check a template file.

        raises: ConfigError with every fault of the file
        """
        if not path.is_file():
            raise ConfigError(f"template file {path}: no such file")
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8"))
            families = [(f["questions"], f["answers"]) for f in raw["families"].values()]
            prompts = cls(tokenizer, raw["slots"], families, raw["eval"]["question"])
            faults = prompts._faults()
        except (TypeError, KeyError, AttributeError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(
                f"{path}: wanted slots, families (each with questions and answers) and "
                f"eval.question; missing or misplaced: {error}"
            ) from None
        if faults:
            raise ConfigError(f"{path}: " + "; ".join(faults[:10]))
        prompts.longest = max(prompts._lengths())
        return prompts

    def _faults(self) -> list[str]:
        wanted = [(q, "text") for questions, _ in self.families for q in questions]
        wanted += [(a, "summary") for _, answers in self.families for a in answers]
        faults = [
            f"slot {name!r} must be a list of words, found {words!r}"
            for name, words in self.slots.items()
            if not isinstance(words, list) or not words or not all(map(_is_word, words))
        ]
        if not self.families or not all(q and a for q, a in self.families):
            faults.append("wanted families, each with a question and an answer at least")
        for template, stored in [*wanted, (self.eval_question, "text")]:
            names = _SLOT.findall(template)
            if names.count(stored) != 1:
                faults.append(f"{template!r} must hold {{{stored}}} exactly once")
            unknown = [n for n in names if n not in self.slots and n != stored]
            if unknown:
                faults.append(f"{template!r} has unknown slots {unknown}; add them to `slots`")
        return faults

    def _lengths(self) -> list[int]:
        """Template ids of every filling, question and answer of a family together."""
        lengths = []
        for questions, answers in self.families:
            longest = [max(map(self._n_ids, self._fillings(t))) for t in questions]
            longest_answer = max(self._n_ids(a) for t in answers for a in self._fillings(t))
            lengths += [n + longest_answer for n in longest]
        return lengths

    def _fillings(self, template: str) -> list[str]:
        """Every text that a template can become, stored slots left standing."""
        names = [n for n in dict.fromkeys(_SLOT.findall(template)) if n not in _STORED]
        choices = product(*(self.slots[name] for name in names))
        return [_fill(template, dict(zip(names, words, strict=True))) for words in choices]

    def _n_ids(self, filled: str) -> int:
        return sum(len(self._encode(part)) for part in _SLOT.split(filled)[::2])

    def _encode(self, text: str) -> list[int]:
        if text not in self._ids:
            self._ids[text] = self.tokenizer.encode(text)
        return self._ids[text]

    def n_wordings(self) -> int:
        """How many different pairs of question and answer can be drawn."""
        pairs = set()
        for questions, answers in self.families:
            for question, answer in product(questions, answers):
                names = dict.fromkeys(_SLOT.findall(question + answer))
                free = [n for n in names if n not in _STORED]
                for words in product(*(self.slots[n] for n in free)):
                    chosen = dict(zip(free, words, strict=True))
                    pairs.add((_fill(question, chosen), _fill(answer, chosen)))
        return len(pairs)

    def messages(
        self,
        text: Sequence[int],
        summary: Sequence[int],
        rng: np.random.Generator,
        max_text: int | None = None,
    ) -> list[dict]:
        """One row as a dialogue in a wording drawn from `rng`.

        text, summary: stored ids
        max_text: a longer text loses its end
        """
        questions, answers = self.families[rng.integers(len(self.families))]
        question, answer = (
            questions[rng.integers(len(questions))],
            answers[rng.integers(len(answers))],
        )
        chosen = {name: words[rng.integers(len(words))] for name, words in self.slots.items()}
        return [
            {"role": "user", "content": self._lay(_fill(question, chosen), text[:max_text])},
            {"role": "assistant", "content": self._lay(_fill(answer, chosen), summary)},
        ]

    def eval_messages(self, text: Sequence[int], max_text: int | None = None) -> list[dict]:
        """The question that scoring asks; its answer is the summary and nothing else."""
        return [{"role": "user", "content": self._lay(self.eval_question, text[:max_text])}]

    def eval_prompt(self, text: str, max_ids: int) -> tuple[list[int], bool]:
        """The rendered question about a text, and whether the text was cut to fit.

        max_ids: most ids of the whole prompt
        raises: ConfigError if not even 16 ids of the text fit
        """
        ids = self.tokenizer.encode(text)
        room = max_ids - len(self.tokenizer.render_prompt(self.eval_messages([])))
        if room < 16:
            raise ConfigError(
                f"a prompt of {max_ids} tokens leaves {room} for the text, wanted at least 16; "
                f"ask for fewer new tokens or use a model with a longer context"
            )
        return self.tokenizer.render_prompt(self.eval_messages(ids, room)), len(ids) > room

    def _lay(self, filled: str, stored: Sequence[int]) -> list[Sequence[int]]:
        # What stands between the slots, and the names of the slots, take turns.
        return [
            stored if number % 2 else self._encode(part)
            for number, part in enumerate(_SLOT.split(filled))
            if part
        ]


def _is_word(word: object) -> bool:
    return isinstance(word, str) and not _SLOT.search(word)


def _fill(template: str, chosen: dict[str, str]) -> str:
    return _SLOT.sub(lambda found: chosen.get(found[1], found[0]), template)
