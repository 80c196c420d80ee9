"""One HTML page with the titles of two systems side by side: to read where a score comes from.

What the two do not share is coloured, what also stands in the reference is underlined; the table is
sorted by any score and searched in the page itself. The page is one file: no picture, font or
script comes from elsewhere, and its own policy forbids it. Everything a model wrote is escaped.
"""

import difflib
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from babyllama.config import atomic_write
from babyllama.scoring.tables import System


@dataclass(frozen=True)
class Compared:
    """One text with both titles; scores times 100."""

    row_id: str
    text: str
    reference: str
    titles: tuple[str, str]
    scores: tuple[float, float]

    @property
    def gain(self) -> float:
        return self.scores[0] - self.scores[1]


def write_report(path: Path, rows: Sequence[dict], systems: Sequence[System], note: str) -> None:
    """The page about two systems, with ROUGE-1 as published, written atomically.

    rows: summary rows; note: lines to stand above the table
    """
    names = tuple(system.name for system in systems)
    titles = zip(*(system.titles for system in systems), strict=True)
    points = zip(*((100 * s.rouge[0].f["rouge-1"]).tolist() for s in systems), strict=True)
    compared = [
        Compared(row["id"], row["text"], row["summary"], *rest)
        for row, *rest in zip(rows, titles, points, strict=True)
    ]
    measure = f"ROUGE-1 × 100, {systems[0].rouge[0].measure}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(page(names, measure, compared, [note]), "utf-8")


def page(
    names: tuple[str, str], measure: str, rows: Sequence[Compared], notes: Sequence[str]
) -> str:
    """The page as text."""
    a, b = map(visible, names)
    better = sum(row.gain > 1e-9 for row in rows)
    worse = sum(row.gain < -1e-9 for row in rows)
    means = [sum(row.scores[i] for row in rows) / max(1, len(rows)) for i in (0, 1)]
    cards = "".join(
        f'<div class="card"><b class="{side}">{name}</b><span>{mean:.1f}</span>'
        f"<small>{n} 篇更高 / higher on</small></div>"
        for side, name, mean, n in zip("ab", (a, b), means, (better, worse), strict=True)
    )
    same = len(rows) - better - worse
    cards += (
        f'<div class="card"><b>相同 / equal</b><span>{same}</span>'
        f"<small>共 {len(rows)} 篇 / texts in all</small></div>"
    )
    listed = "".join(f"<pre>{visible(note)}</pre>" for note in notes if note)
    body = "\n".join(_row(number, row) for number, row in enumerate(rows, 1))
    heads = "".join(
        f'<th class="{kind}"><button data-key="{key}">{label}</button></th>'
        for key, kind, label in (
            ("n", "n", "#"), ("ref", "", "参考 / reference"), ("a", "", f"A · {a}"),
            ("b", "", f"B · {b}"), ("gain", "n", "A − B"),
        )
    )  # fmt: skip
    template = Template(Path(__file__).with_name("report.html").read_text("utf-8"))
    return template.substitute(
        a=a, b=b, cards=cards, notes=listed, heads=heads, body=body, measure=visible(measure),
        n=len(rows),
    )  # fmt: skip


def _row(number: int, row: Compared) -> str:
    cells = "".join(
        f'<td class="{side}">{coloured(row.titles[i], row.titles[1 - i], row.reference)}'
        f'<div class="score"><em>{row.scores[i]:.1f}</em>'
        f'<i style="--share:{row.scores[i]:.0f}%"></i></div></td>'
        for i, side in enumerate("ab")
    )
    sign = "up" if row.gain > 1e-9 else "down" if row.gain < -1e-9 else ""
    gain = f"{row.gain:+.1f}".replace("-", "\u2212") if sign else "="
    return (
        f'<tr data-n="{number}" data-a="{row.scores[0]:.4f}" data-b="{row.scores[1]:.4f}" '
        f'data-gain="{row.gain:.4f}" data-ref="{len(row.reference)}">'
        f'<td class="n">{number}</td>'
        f'<td class="ref"><b>{visible(row.reference)}</b><details>'
        f"<summary>原文 / text · {visible(row.row_id)}</summary>"
        f"<p>{visible(row.text)}</p></details></td>{cells}"
        f'<td class="n gain {sign}">{gain}</td></tr>'
    )


def coloured(title: str, other: str, reference: str) -> str:
    """A title as HTML: `only` marks what the other lacks, `hit` what the reference has, too."""
    shared, hits = _matched(title, other), _matched(title, reference)
    parts: list[tuple[str, str]] = []
    for character, is_shared, is_hit in zip(title, shared, hits, strict=True):
        kind = " ".join(name for name, on in (("only", not is_shared), ("hit", is_hit)) if on)
        if parts and parts[-1][0] == kind:
            parts[-1] = (kind, parts[-1][1] + character)
        else:
            parts.append((kind, character))
    spans = (
        f'<span class="{kind}">{visible(text)}</span>' if kind else visible(text)
        for kind, text in parts
    )
    return "".join(spans) or '<span class="empty">空 / empty</span>'


def _matched(own: str, other: str) -> list[bool]:
    """Which characters of `own` stand in `other`, too, in the same order."""
    found = [False] * len(own)
    matcher = difflib.SequenceMatcher(None, own, other, autojunk=False)
    for block in matcher.get_matching_blocks():
        found[block.a : block.a + block.size] = [True] * block.size
    return found


def visible(text: str) -> str:
    """Text for HTML; what cannot be seen (controls, marks that turn the direction) is U+FFFD."""
    return html.escape(
        "".join(c if c.isprintable() or c in "\n\t\u3000" else "\ufffd" for c in text)
    )
