"""Chinese Wikipedia, in any of the forms in which it is handed round.

JSON list        {"completion", "source"}          wikipedia-cn-20230720-filtered, simplified
JSON lines       {"id", "url", "title", "text"}    wiki_zh/AA/wiki_00, WikiExtractor --json
<doc …> blocks   WikiExtractor without --json
<page> blocks    the XML dump zhwiki-…-pages-articles.xml.bz2

A document is its title and its paragraphs, one a line. Of a dump only articles are taken, no
redirects, no lists of meanings; their wikitext becomes plain text: headings as bare lines, lists
as "* " lines, formulas as $LaTeX$; templates (but for those that only dress up a text), tables,
images, references and the sections that hold nothing else go, and of -{zh-hans:…;zh-hant:…}-
the simplified form stays.
"""

import re
from collections import deque
from collections.abc import Iterable, Iterator

from data_process.clean import unescape
from data_process.raw import Record, Skip, as_row

LONGEST_PAGE = 10_000_000  # characters; MediaWiki itself stops at 2 MB
OPENING = re.compile(r"\s*<(?:doc\s.*|page)>\s*$")
CLOSING = re.compile(r"\s*</(?:doc|page)>\s*$")
# What a lost template leaves in brackets: （，）, （teapot，）, （）.
REST = re.compile(r"(?<=（)[\s，、；：。,;:]{1,20}|[\s，、；：,;:]{1,20}(?=）)")
EMPTY_BRACKETS = re.compile(r"（）|《》|「」|\([\s，、；：。,;:]+\)|(?<![A-Za-z_])\(\)")


def wiki(records: Iterable[Record | Skip]) -> Iterator[dict | Skip]:
    """One document an object, or a block."""
    start, lines, size = None, [], 0
    for record in records:
        if isinstance(record, Skip) or not isinstance(record.data, str):
            yield record if isinstance(record, Skip) else _article(record)
        elif OPENING.match(record.data):
            if start:
                yield start.skip("cut_page", " ".join(lines[:3]), True)
            start, lines, size = record, [], 0
        elif start is None:
            # Outside of pages a dump has only lines of tags, such as <siteinfo>.
            if not record.data.lstrip().startswith("<"):
                yield record.skip("outside_page", broken=True)
        elif CLOSING.match(record.data):
            yield _block(start, lines) if size <= LONGEST_PAGE else start.skip("page_too_long")
            start = None
        else:
            size += len(record.data)
            if size <= LONGEST_PAGE:
                lines.append(record.data)
    if start:
        yield start.skip("cut_page", " ".join(lines[:3]), True)


def _article(record: Record) -> dict | Skip:
    data = record.data if isinstance(record.data, dict) else {}
    text, title = data.get("completion", data.get("text")), data.get("title", "")
    if not isinstance(text, str) or not isinstance(title, str):
        return record.skip("wrong_type", broken=True)
    return _document(record, title.strip(), text)


def _document(record: Record, title: str, text: str) -> dict | Skip:
    text = EMPTY_BRACKETS.sub("", REST.sub("", text))
    lines = [line.strip() for line in text.split("\n")]
    lines = [line for line in lines if line]
    if lines[:1] == [title]:
        del lines[0]
    if not lines:
        return record.skip("empty_text", title)
    return as_row(record, text="\n".join([title, *lines] if title else lines))


TITLE_OF_DOC = re.compile(r'\stitle="(.*)"')
TITLE = re.compile(r"<title>([^<]*)</title>")
NAMESPACE = re.compile(r"<ns>(-?\d+)</ns>")
TEXT = re.compile(r"<text\b[^<>]*>([^<]*)</text>")
REDIRECT = re.compile(r"(?i)\s*#\s*(?:redirect|重定向)")
MEANINGS = re.compile(
    r"(?i)\{\{\s*(?:(?:人名|地名)?消歧[义義][页頁]?|disambig(?:uation)?|dab|hndis|geodis)\s*[|}]"
    r"|__DISAMBIG__"
)


def _block(start: Record, lines: list[str]) -> dict | Skip:
    if not start.data.lstrip().startswith("<page"):
        title = TITLE_OF_DOC.search(start.data)
        return _document(start, unescape(title[1]).strip() if title else "", "\n".join(lines))
    page = "\n".join(lines)
    found, namespace, text = TITLE.search(page), NAMESPACE.search(page), TEXT.search(page)
    name = unescape(found[1]) if found else ""
    if not name or not namespace:
        return start.skip("wrong_page", page[:200], True)
    if namespace[1] != "0":
        return start.skip("not_an_article", name)
    wikitext = unescape(text[1]) if text else ""
    if "<redirect " in page or REDIRECT.match(wikitext):
        return start.skip("redirect", name)
    if MEANINGS.search(wikitext) or name.endswith(("(消歧义)", "(消歧義)")):
        return start.skip("disambiguation", name)
    return _document(start, name, plain(wikitext))


# Wikitext.

LITERAL = "math|chem|ce|ref|nowiki|pre|syntaxhighlight|source|score|timeline|gallery|imagemap|hiero"
MARK = re.compile(
    rf"<!--|<({LITERAL})\b[^<>]*>"  # from here to its end nothing else counts
    r"|\{\{|\}\}|\[\[|\]\]|-\{(?!\{[^{])|\}-"
    r"|^[ \t:*]*(\{\|)|^[ \t]*(\|\})(?!\})",
    re.MULTILINE | re.IGNORECASE,
)
DEEPEST = 100  # MediaWiki itself stops at 100 templates inside each other
VERBATIM = {"math": "${}$", "chem": "{}", "ce": "{}", "nowiki": "{}"}
OPENS = {"}}": "{{", "]]": "[[", "}-": "-{", "|}": "{|"}
STRAY = re.compile(r"\[\[|\]\]|\{\{|\}\}|__[A-Z]+__")
OUTER_LINK = re.compile(r"\[(?:https?:|ftp:)?//[^\s\[\]]++[ \t]*+([^\[\]\n]*+)\]")
QUOTES = re.compile(r"'{2,5}")
LINE_BREAK = re.compile(r"<br\s*/?>|</(?:p|div|li|tr)>", re.IGNORECASE)
TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
HEADING = re.compile(r"(={1,6})(.+)\1")
LIST_MARK = re.compile(r"([*#:;]+)\s*")
APPENDIX = re.compile(
    r"(?:参考|參考)(?:文献|文獻|资料|資料|来源|來源|书目|書目)?|(?:资料|資料)(?:来源|來源)|(?:外部|相关|相關)"
    r"(?:链接|鏈接|连结|連結)|[参參另][见見]|[参參][看阅閱]|[注註](?:释|釋|解|脚|腳)|脚注|腳註|(?:相关|相關|关联|關聯)"
    r"(?:条目|條目|项目|項目)|延伸(?:阅读|閱讀)|引用|引注|引註"
)


def plain(wikitext: str) -> str:
    """The text of a page as a reader sees it, without what is named at the top of this file."""
    verbatim: list[str] = []
    text = STRAY.sub("", _resolved(wikitext.replace("\0", ""), verbatim))
    text = QUOTES.sub("", OUTER_LINK.sub(r"\1", text))
    text = unescape(TAG.sub("", LINE_BREAK.sub("\n", text)))
    text = "\n".join(_sections(text.split("\n")))
    return re.sub("\0(\\d+)\0", lambda place: verbatim[int(place[1])], text)


def _resolved(text: str, verbatim: list[str]) -> str:
    """The text with everything that stands in paired marks replaced, from the inside outwards.

    A mark without its partner costs nothing but itself; of marks inside marks the innermost
    DEEPEST count.

    verbatim: gets the contents that no later rule may touch; \\0 with their number marks the place
    """
    parts, opened, at, never_closed = [], deque(), 0, set()
    waiting = dict.fromkeys(CONTENT, 0)
    while mark := MARK.search(text, at):
        parts.append(text[at : mark.start()])
        at = mark.end()
        sign = mark[2] or mark[3] or mark[0]
        if sign[0] == "<":
            name = (mark[1] or "").lower()
            closing = f"</{name}>" if name else "-->"
            end = -1 if sign.endswith("/>") or closing in never_closed else text.find(closing, at)
            if end >= 0:
                if name in VERBATIM:
                    parts.append(f"\0{len(verbatim)}\0")
                    inside = unescape(" ".join(text[at:end].split()))
                    verbatim.append(VERBATIM[name].format(inside))
                at = end + len(closing)
            elif not sign.endswith("/>"):
                never_closed.add(closing)
        elif sign in CONTENT:
            if len(opened) == DEEPEST:
                waiting[opened.popleft()[0]] -= 1
            opened.append((sign, len(parts)))
            waiting[sign] += 1
            parts.append(sign)
        elif waiting[OPENS[sign]]:
            before = ""
            while before != OPENS[sign]:
                before, start = opened.pop()
                waiting[before] -= 1
            parts[start:] = [CONTENT[before]("".join(parts[start + 1 :]))]
        else:
            parts.append(sign)
    return "".join([*parts, text[at:]])


# Templates that show one of their arguments: which, the first that is there.
SHOWN = {"lang": (2,), "le": (3, 1), "tsl": (4, 3, 2), "nowrap": (1,), "nobr": (1,), "small": (1,),
         "big": (1,), "nobold": (1,)}  # fmt: skip
SHOWN_PREFIX = {"link-": (3, 1), "lang-": (1,), "internal link helper/": (3, 1)}
NAMED = re.compile(r"\s*[^\W\d]\w*\s*=")
NUMBERED = re.compile(r"\s*\d+\s*=")


def _template(content: str) -> str:
    name, *arguments = content.split("|")
    name = name.strip().lower()
    places = SHOWN.get(name) or next((v for k, v in SHOWN_PREFIX.items() if name.startswith(k)), ())
    arguments = [NUMBERED.sub("", a, count=1) for a in arguments if not NAMED.match(a)]
    shown = [arguments[n - 1].strip() for n in places if n <= len(arguments)]
    return next(filter(None, shown), "")


NOT_TEXT = ("file", "image", "category", "media", "文件", "档案", "檔案", "图像", "圖像", "分类",
            "分類")  # fmt: skip


def _link(content: str) -> str:
    target, *labels = content.split("|")
    if ":" in target and target.split(":")[0].strip().lower() in NOT_TEXT:
        return ""
    return labels[-1] if labels and labels[-1].strip() else target.strip().lstrip(":")


VARIANT = re.compile(r"(?:[^:]*=>)?\s*(zh(?:-[a-z]+)?)\s*:(.*)", re.DOTALL)
SIMPLIFIED = ("zh-hans", "zh-cn", "zh-sg", "zh-my", "zh")


def _variant(content: str) -> str:
    """Of -{flags|zh-hans:…;zh-hant:…}- the simplified text; H, T and - only set a rule."""
    flags, bar, body = content.partition("|")
    if not bar:
        flags, body = "", content
    if flags.strip() in ("H", "T", "-", "N"):
        return ""
    variants, code = {}, ""
    for part in body.split(";"):
        if found := VARIANT.fullmatch(part):
            code, variants[found[1]] = found[1], found[2]
        elif code and part.strip():  # a semicolon in the text itself
            variants[code] += f";{part}"
    variants = {code: text.strip() for code, text in variants.items()}
    first = next(iter(variants.values()), body)
    return next((variants[code] for code in SIMPLIFIED if code in variants), first)


CONTENT = {"{{": _template, "[[": _link, "-{": _variant, "{|": lambda content: ""}


def _sections(lines: Iterable[str]) -> Iterator[str]:
    """The lines of all sections but appendices; headings come with the first line below them."""
    headings, left_out = [], 7  # a level below all others: nothing is left out
    for line in map(str.strip, lines):
        if heading := HEADING.fullmatch(line):
            level, name = len(heading[1]), heading[2].strip()
            headings = [pair for pair in headings if pair[0] < level] + [(level, name)]
            if level <= left_out:
                left_out = level if APPENDIX.fullmatch(name) else 7
        # What begins with | or ! is left of a table that is nowhere closed.
        elif left_out == 7 and line[:1] not in ("|", "!"):
            if mark := LIST_MARK.match(line):
                bullet = "* " if "*" in mark[1] or "#" in mark[1] else ""
                line = bullet + line[mark.end() :]
            if re.search(r"\w", line):
                yield from (above for _, above in headings)
                headings = []
                yield line
