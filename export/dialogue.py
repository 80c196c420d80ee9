"""The chat format of tokenizer.py as a Jinja template, and as text to compare it with.

Labels and separator are read from tokenizer.py, which owns the format; this file owns only how
Jinja says it. The template stands on one line, because engines differ in how they treat line ends.
"""

import json
import random
from collections.abc import Sequence

from tokenizer import LABELS, SEPARATOR, Tokenizer


def chat_template() -> str:
    """A template that renders messages as Tokenizer.render_chat and render_prompt do.

    It uses bos_token, eos_token, messages and add_generation_prompt. A role that the format does
    not know is an error.
    """
    labels, separator = _quoted(LABELS), _quoted(SEPARATOR)
    unknown = _quoted(f"a role must be one of {', '.join(LABELS)}; found ")
    return "".join(
        (
            "{%- set labels = " + labels + " -%}",
            "{{- bos_token -}}",
            "{%- for message in messages -%}",
            "{%- if not loop.first -%}{{- " + separator + " -}}{%- endif -%}",
            "{%- if message['role'] not in labels -%}",
            "{{- raise_exception(" + unknown + " + message['role']) -}}",
            "{%- endif -%}",
            "{{- labels[message['role']] + message['content'] -}}",
            "{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}",
            "{%- endfor -%}",
            "{%- if add_generation_prompt -%}",
            "{{- " + separator + " + labels['assistant'] -}}",
            "{%- endif -%}",
        )
    )


def _quoted(value: object) -> str:
    # JSON's literals are Jinja's, too.
    return json.dumps(value, ensure_ascii=False)


class TextFormat(Tokenizer):
    """The format itself, run over texts in the place of ids: its "ids" are strings to join."""

    def __init__(self, bos: str, eos: str) -> None:
        self.bos_id, self.eos_id = bos, eos
        self._labels = {role: [label] for role, label in LABELS.items()}
        self._separator = [SEPARATOR]

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[str]:
        return [text]

    def dialogue(self, messages: Sequence[dict]) -> str:
        """A finished dialogue as text, control pieces by their names."""
        return "".join(self.render_chat(messages)[0])

    def prompt(self, messages: Sequence[dict]) -> str:
        """A prompt as text, up to where the assistant begins."""
        return "".join(self.render_prompt(messages))


def dialogues(lines: Sequence[str], n: int, longest: int | None = None) -> list[list[dict]]:
    """Dialogues of one to three exchanges out of lines of text, some with a 资料.

    longest: characters that are kept of a line
    """
    made = []
    for number in range(n):
        chance = random.Random(number)
        roles = ["system"] * (chance.random() < 0.3) + ["user", "assistant"] * chance.randint(1, 3)
        made.append([{"role": role, "content": chance.choice(lines)[:longest]} for role in roles])
    return made
