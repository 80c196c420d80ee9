"""Reference text (资料) for a dialogue: from an index on the disk, or from Wikipedia's own server.

    retriever = Retriever(Path("data/index/wiki"))
    found = retriever.context("马祖列岛有多少个岛屿？", budget=300, size=n_tokens)
    found.text, [passage.citation for passage in found.passages]

Without an index, or when asked to, `look_up` goes to the Chinese Wikipedia: it gives an Article, or
Choices when the word is ambiguous or has no page of its own. Every failure, from a missing network
to a broken answer, is a WikiError whose text can be shown to the user. Nothing here prints.

The `wikipedia` package (1.4.0) keeps address and user agent in module globals and sends its
requests without a time limit. `look_up` alone sets the globals, and the limit is kept from
outside: the look-up runs in a thread that is no longer waited for when time is up.
API: https://www.mediawiki.org/wiki/API:Query and Extension:TextExtracts.
"""

import json
import math
import re
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Overdue
from dataclasses import dataclass, field, replace
from pathlib import Path

import tantivy

from babyllama.config import REPO, from_repo, shown
from babyllama.errors import DataError
from babyllama.language.letters import plain
from babyllama.retrieval import index
from babyllama.retrieval.index import Passage, normal, terms

INDEX = REPO / "data" / "index" / "wiki"  # where data_process.run wiki --index puts it

# A passage is about a question if it holds this share of its weight, and as much as two terms that
# stand nowhere else, or the question names its title: 96 % of 600 questions of CMRC 2018 find
# something so among 5,390 articles, 20 % of small talk.
MIN_COVERAGE = 0.3
MIN_RARE = 2.0

API_URL = "https://zh.wikipedia.org/w/api.php"
USER_AGENT = "babyllama/1.0 (a small language model for study; python-wikipedia/1.4.0)"

# Sent with every request: text in simplified characters, titles found in either script.
VARIANT = "variant=zh-cn&converttitles=1"
MAX_CHOICES = 9


@dataclass(frozen=True)
class Context:
    """Reference text made of passages, best first; both are empty where nothing fits the question.

    passages: what stands in the text, each cut to the part that does
    """

    text: str = ""
    passages: list[Passage] = field(default_factory=list)

    @property
    def citation(self) -> str:
        """Titles and paragraphs, each once."""
        return "、".join(dict.fromkeys(passage.citation for passage in self.passages))


class Retriever:
    """Passages and reference text out of an index on the disk; for any number of threads.

    info: what index.json says: corpus, n_rows, n_passages and more
    """

    def __init__(self, place: Path) -> None:
        """raises: DataError if it is no index, damaged, or of another version"""
        self.place = place = from_repo(place)
        self.info, found = index.read_info(place), index.sizes_of(place)
        for name, wanted in self.info["sizes"].items():
            if wanted != found.get(name):
                raise DataError(
                    f"{place / name}: wanted {wanted:,} bytes, found {found.get(name, 0):,}; "
                    f"the index is damaged, make it again"
                )
        try:
            opened = tantivy.Index.open(str(place))
        except (OSError, ValueError) as error:
            raise DataError(f"{place}: wanted an index, found {str(error).splitlines()[0]}; make "
                            f"it again") from None  # fmt: skip
        self._schema, self._searcher = opened.schema, opened.searcher()

    def describe(self) -> str:
        return (f"{shown(self.place)}：{self.info['corpus']}，{self.info['n_rows']:,} 篇 "
                f"{self.info['n_passages']:,} 段")  # fmt: skip

    def context(
        self, question: str, budget: int, size: Callable[[str], int] = len, k: int = 5
    ) -> Context:
        """Reference text for a question: as many of the k best passages as fit, best first.

        Passages about something else are left out; one that does not fit is cut to the sentences
        that hold most of the question.

        budget: the most that size(text) may be
        size: characters unless told; tokens, usually
        """
        question = plain(question)
        found = [p for p in self.search(question, k) if is_about(p, question)]
        return fill(found, question, budget, size)

    def article(self, title: str, budget: int, size: Callable[[str], int] = len) -> Context:
        """The beginning of what is called so, or the passages that a search for it brings."""
        title = plain(title)
        found = self.titled(title)
        if found:
            return fill(found, "", budget, size)
        found = [p for p in self.search(title, 5) if p.coverage >= MIN_COVERAGE]
        return fill(found, title, budget, size)

    def titled(self, title: str, most: int = 100) -> list[Passage]:
        """The first passages of the documents called so, in their order."""
        query = tantivy.Query.term_query(self._schema, "title", normal(title).strip(), "basic")
        order = tantivy.Order.Asc
        hits = self._searcher.search(query, most, order_by_field="number", order=order).hits
        return [self._passage(address) for _, address in hits]

    def search(self, question: str, k: int) -> list[Passage]:
        """The k best passages, best first; fewer if fewer hold any term of the question."""
        pairs, alone = index.asked(question)
        counts = {term: self._searcher.doc_freq("terms", term) for term in pairs}
        counts |= {one: self._searcher.search(self._query(one), 1).count for one in alone}
        rarest = sorted(counts, key=counts.__getitem__)[: index.MOST_TERMS]
        if not any(counts[term] for term in rarest):
            return []
        should = [(tantivy.Occur.Should, self._query(term)) for term in rarest]
        hits = self._searcher.search(tantivy.Query.boolean_query(should), k, count=False).hits
        idf = {term: self._idf(counts[term]) for term in rarest}
        return [self._scored(self._passage(address), score, idf) for score, address in hits]

    def _query(self, term: str):
        if index.is_character(term):
            return tantivy.Query.regex_query(self._schema, "terms", f"{re.escape(term)}.?")
        return tantivy.Query.term_query(self._schema, "terms", term, "freq")

    def _idf(self, n_passages: int) -> float:
        """The weight of a term that stands in so many passages."""
        return math.log1p((self.info["n_passages"] - n_passages + 0.5) / (n_passages + 0.5))

    def _passage(self, address) -> Passage:
        row, title, paragraph, text = json.loads(bytes(self._searcher.doc(address)["passage"][0]))
        return Passage(title, paragraph, text, row)

    def _scored(self, passage: Passage, score: float, idf: dict[str, float]) -> Passage:
        """The passage with its score and how much of the question it holds."""
        text = normal(f"{passage.title}\n{passage.text}")
        there = set(terms(text))
        held = sum(weight for term, weight in idf.items()
                   if term in there or (index.is_character(term) and term in text))  # fmt: skip
        shares = (held / sum(idf.values()), held / self._idf(1))
        return replace(passage, score=score, coverage=shares[0], n_rare=shares[1])


def is_about(passage: Passage, question: str) -> bool:
    """True if a passage that a question brought is about it."""
    is_named = bool(passage.title) and normal(passage.title) in normal(question)
    return passage.coverage >= MIN_COVERAGE and (passage.n_rare >= MIN_RARE or is_named)


def fill(found: list[Passage], question: str, budget: int, size: Callable[[str], int]) -> Context:
    """The passages one after the other, the last one that fits in part cut."""
    text, kept = "", []
    for passage in found:
        named = "" if not passage.title or passage.title in passage.text else f"{passage.title}："
        before = f"{text}\n{named}" if text else named
        part = index.excerpt(passage.text, question, budget - size(before), size)
        if not part:
            break
        text += before[len(text) :] + part
        kept.append(replace(passage, text=part))
        if part != passage.text:
            break
    return Context(text, kept)


class WikiError(ValueError):
    """A look-up that brought no text; the message says why and what to do."""


@dataclass(frozen=True)
class Article:
    """The introduction of one page, paragraphs separated by one newline."""

    title: str
    text: str
    url: str


@dataclass(frozen=True)
class Choices:
    """Titles to choose from.

    ambiguous: the word has several meanings; otherwise there is no such page, and these are
        the nearest search hits
    """

    term: str
    titles: list[str]
    ambiguous: bool


def look_up(term: str, api_url: str = API_URL, timeout_s: float = 10.0) -> Article | Choices:
    """The page called `term`, redirects followed, or what the user may choose from.

    timeout_s: for the whole look-up, however many requests it takes
    raises: WikiError
    """
    # These signs have a meaning in titles, and "|" would ask for two pages at once.
    if not term.strip() or len(term.encode()) > 255 or re.search(r"[#<>\[\]|{}\x00-\x1f]", term):
        raise WikiError(f"{term[:40]!r} 不能作词条名：应为 1 到 255 字节，不含 # < > [ ] | {{ }}")
    import requests
    import wikipedia
    from bs4 import GuessedAtParserWarning

    wikipedia.set_lang("zh")  # empties its caches as well
    wikipedia.set_user_agent(USER_AGENT)
    wikipedia.wikipedia.API_URL = f"{api_url}{'&' if '?' in api_url else '?'}{VARIANT}"
    try:
        with warnings.catch_warnings():
            # The package calls BeautifulSoup without naming a parser; html.parser will do.
            warnings.simplefilter("ignore", GuessedAtParserWarning)
            return _within(timeout_s, lambda: _fetch(term.strip()))
    except Overdue:
        reason = f"{timeout_s:g} 秒内没有答复"
    except requests.exceptions.JSONDecodeError:
        reason = "答复不是 JSON（服务器出错，或被代理、登录页面拦截）"
    except requests.exceptions.RequestException as error:
        reason = f"无法连接（{type(error).__name__}）"
    except (wikipedia.WikipediaException, LookupError, TypeError, AttributeError) as error:
        # The package reads answers without checking their shape.
        reason = f"答复不像 MediaWiki 的（{type(error).__name__}: {error}）"
    raise WikiError(f"维基百科 {api_url}：{reason}；请检查网络后重试，或用 /资料 给出文本")


def _within(timeout_s: float, job: Callable[[], Article | Choices]) -> Article | Choices:
    """What `job` returns or raises, or Overdue after `timeout_s`.

    A daemon thread does not keep the program from ending. This also bounds what no time limit
    of a socket bounds: name look-up, and a server that sends one byte now and then.
    """
    future: Future = Future()

    def work() -> None:
        try:
            future.set_result(job())
        except Exception as error:  # handed over to the caller, who waits for the result
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future.result(timeout_s)


def _fetch(term: str) -> Article | Choices:
    import wikipedia

    try:
        page = wikipedia.page(term, auto_suggest=False)
        text = _tidy(page.summary) or _tidy(page.content)
    except wikipedia.DisambiguationError as error:
        return Choices(term, _distinct(error.options), ambiguous=True)
    except (wikipedia.PageError, AssertionError):
        # Its assertion does not know titles that were converted and then redirected.
        titles = _distinct(wikipedia.search(term, results=MAX_CHOICES))
        if not titles:
            raise WikiError(f"维基百科没有“{term}”这个词条，也没有相近的；请换一个词") from None
        return Choices(term, titles, ambiguous=False)
    if not text:
        raise WikiError(f"维基百科的“{page.title}”没有正文；请换一个词")
    return Article(page.title, text, page.url)


def _distinct(titles: list[str]) -> list[str]:
    return list(dict.fromkeys(title.strip() for title in titles if title.strip()))[:MAX_CHOICES]


def _tidy(text: str) -> str:
    """Paragraphs one newline apart (an empty line ends the reference in a dialogue)."""
    text = re.sub(r"^=+ *(.*?) *=+$", r"\1", text, flags=re.MULTILINE)
    return re.sub(r"\s*\n\s*", "\n", text).strip()
