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

from babyllama.config import atomic_write


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


def write_report(
    path: Path, names: tuple[str, str], measure: str, rows: Sequence[Compared], notes: Sequence[str]
) -> None:
    """The page, whole or not at all.

    measure: what the scores are; notes: lines to stand above the table
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(page(names, measure, rows, notes), "utf-8")


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
    return _PAGE.format(
        style=_STYLE, script=_SCRIPT, a=a, b=b, cards=cards, notes=listed, heads=heads, body=body,
        measure=visible(measure), n=len(rows),
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


_PAGE = """<!doctype html>
<html lang="zh-CN">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{a} / {b}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>摘要对比 <small>summaries side by side</small></h1>
<div class="cards">{cards}</div>
<p class="legend">{measure} · <span class="a"><span class="only">只有 A 有 / A alone</span></span>
 <span class="b"><span class="only">只有 B 有 / B alone</span></span>
 <span class="hit">参考里也有 / in the reference</span></p>
{notes}
<p class="tools"><input type="search" placeholder="搜索 / search" aria-label="搜索 / search">
<label><input type="checkbox"> 只看不同的 / only where they differ</label>
<span><output>{n}</output> 篇 / texts</span></p>
</header>
<main><table>
<thead><tr>{heads}</tr></thead>
<tbody>
{body}
</tbody>
</table></main>
<script>{script}</script>
</body>
</html>
"""

_STYLE = """
:root{--bg:#fbfaf8;--ink:#1f2328;--dim:#6b7280;--line:#e4e1db;--card:#fff;--a:#1f6feb;--b:#b35900;
--a-bg:#dbe9ff;--b-bg:#ffe6c7;--up:#1a7f37;--down:#c4302b}
@media (prefers-color-scheme:dark){:root{--bg:#15171a;--ink:#e6e6e3;--dim:#9aa0a8;--line:#2d3036;
--card:#1d2024;--a:#79b0ff;--b:#ffb066;--a-bg:#1b365d;--b-bg:#57370f;--up:#4ac26b;--down:#ff7b72}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);line-height:1.6;
font-family:system-ui,"Noto Sans CJK SC","PingFang SC","Microsoft YaHei",sans-serif;font-size:15px}
header,main{max-width:1280px;margin:0 auto;padding:0 20px}
h1{font-size:22px;margin:20px 0 12px}h1 small{color:var(--dim);font-size:14px;font-weight:400}
.cards{display:flex;gap:12px;flex-wrap:wrap}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 16px;
min-width:190px;display:flex;flex-direction:column}
.card span{font-size:28px;font-variant-numeric:tabular-nums;line-height:1.3}
.card small,.legend{color:var(--dim);font-size:13px}
b.a{color:var(--a)}b.b{color:var(--b)}
pre{color:var(--dim);font-size:12px;line-height:1.5;overflow-x:auto;margin:8px 0;
font-family:ui-monospace,"DejaVu Sans Mono","Noto Sans Mono CJK SC",monospace}
.tools{display:flex;gap:14px;align-items:center}
input[type=search]{font:inherit;padding:5px 10px;border:1px solid var(--line);border-radius:8px;
background:var(--card);color:var(--ink);width:220px}
.tools span{color:var(--dim);margin-left:auto;white-space:nowrap}
table{width:100%;border-collapse:collapse;background:var(--card);border:1px solid var(--line);
table-layout:fixed}
th{position:sticky;top:0;background:var(--card);text-align:left;border-bottom:2px solid var(--line);
z-index:1;overflow-wrap:anywhere}
th button{all:unset;cursor:pointer;padding:8px 10px;display:block;font-weight:600;font-size:13px}
th button:focus-visible{outline:2px solid var(--a)}
th button::after{content:" ↕";color:var(--dim);font-weight:400}
th[aria-sort=ascending] button::after{content:" ▲";color:inherit}
th[aria-sort=descending] button::after{content:" ▼";color:inherit}
td{vertical-align:top;padding:9px 10px;border-bottom:1px solid var(--line);overflow-wrap:anywhere}
th.n{width:92px;white-space:nowrap}th.n:first-child{width:52px}
td.n{color:var(--dim);font-variant-numeric:tabular-nums;font-size:13px}
td.gain{font-weight:600}.up{color:var(--up)!important}.down{color:var(--down)!important}
.a .only{background:var(--a-bg);border-radius:3px}.b .only{background:var(--b-bg);border-radius:3px}
.hit{text-decoration:underline;text-decoration-color:var(--up);text-decoration-thickness:2px;
text-underline-offset:4px}
.empty{color:var(--down);font-style:italic}
.score{display:flex;align-items:center;gap:8px;height:18px;margin-top:4px}
.score i{flex:1;height:4px;border-radius:2px;
background:linear-gradient(90deg,currentColor var(--share),var(--line) 0)}
.score em{font-style:normal;min-width:30px;font-size:12px;color:var(--dim);
font-variant-numeric:tabular-nums}
td.a .score i{color:var(--a)}td.b .score i{color:var(--b)}
details{font-size:13px;color:var(--dim)}summary{cursor:pointer}
details p{margin:4px 0;white-space:pre-wrap}
tr[hidden]{display:none!important}
@media (max-width:700px){header,main{padding:0 10px}body{font-size:14px}
.card{min-width:0;flex:1 1 130px;overflow-wrap:anywhere}.tools{flex-wrap:wrap;gap:8px 14px}
table,tbody{display:block}thead{display:block;position:sticky;top:0;z-index:1;
background:var(--card);border-bottom:2px solid var(--line)}
thead tr{display:flex;flex-wrap:wrap}th,th.n{position:static;width:auto;border:0}
th.n:first-child,td.n:first-child{display:none}th button{padding:6px}
tbody tr{display:grid;grid-template-columns:minmax(0,1fr) auto;padding:8px 10px;
border-bottom:1px solid var(--line)}
td{border:0;padding:4px 0}td.ref{grid-area:1/1}td.gain{grid-area:1/2;padding-left:10px}
td.a,td.b{grid-column:1/-1;padding-left:10px;border-left:3px solid var(--a);margin-top:4px}
td.b{border-left-color:var(--b)}}
"""

_SCRIPT = """
const body = document.querySelector("tbody"), rows = [...body.rows];
const search = document.querySelector("input[type=search]");
const differ = document.querySelector("input[type=checkbox]");
const words = rows.map(row => row.textContent.toLowerCase());
function sort(button) {
  const head = button.parentElement, key = button.dataset.key;
  const down = head.getAttribute("aria-sort") !== "descending";
  document.querySelectorAll("th").forEach(th => th.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const sign = down ? -1 : 1;
  body.append(...[...rows].sort((x, y) =>
    sign * (x.dataset[key] - y.dataset[key]) || x.dataset.n - y.dataset.n));
}
function filter() {
  const wanted = search.value.trim().toLowerCase();
  let shown = 0;
  rows.forEach((row, i) => {
    row.hidden = !words[i].includes(wanted) || (differ.checked && !row.querySelector(".only"));
    shown += !row.hidden;
  });
  document.querySelector("output").textContent = shown;
}
document.querySelectorAll("th button").forEach(b => b.addEventListener("click", () => sort(b)));
search.addEventListener("input", filter);
differ.addEventListener("change", filter);
"""
