"""Reference text (资料) for a dialogue, from the Chinese Wikipedia.

`look_up` gives an Article, or Choices when the word is ambiguous or has no page of its own; every
failure, from a missing network to a broken answer, is a WikiError whose text can be shown to the
user as it is. `trim` cuts a text to whole sentences. Nothing here prints.

The `wikipedia` package (1.4.0) keeps address and user agent in module globals and sends its
requests without a time limit. `_configure` is the one place that sets the globals, and the limit
is kept from outside: the look-up runs in a thread that is no longer waited for when time is up.
API: https://www.mediawiki.org/wiki/API:Query and Extension:TextExtracts.
"""

import bisect
import re
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Overdue
from dataclasses import dataclass

API_URL = "https://zh.wikipedia.org/w/api.php"
USER_AGENT = "babyllama/1.0 (a small language model for study; python-wikipedia/1.4.0)"

# Sent with every request: text in simplified characters, titles found in either script.
VARIANT = "variant=zh-cn&converttitles=1"
MAX_CHOICES = 9

# A sentence with the quotes and brackets that close it, or a line.
_SENTENCE = re.compile(r".+?(?:[。！？!?…；]+[”’」』）)\"]*|\.(?=\s)|\n+|$)", re.DOTALL)


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
    _configure(api_url)
    import requests
    from bs4 import GuessedAtParserWarning
    from wikipedia import WikipediaException

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
    except (WikipediaException, LookupError, TypeError, AttributeError) as error:
        # The package reads answers without checking their shape.
        reason = f"答复不像 MediaWiki 的（{type(error).__name__}: {error}）"
    raise WikiError(f"维基百科 {api_url}：{reason}；请检查网络后重试，或用 /资料 给出文本")


def _configure(api_url: str) -> None:
    """Point the `wikipedia` package at an address, as its own set_lang does."""
    try:
        import wikipedia
    except ImportError:
        raise WikiError("缺少 wikipedia 包；请运行 pip install -r requirements.txt") from None
    wikipedia.set_lang("zh")  # empties its caches as well
    wikipedia.set_user_agent(USER_AGENT)
    wikipedia.wikipedia.API_URL = f"{api_url}{'&' if '?' in api_url else '?'}{VARIANT}"


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


def trim(text: str, limit: int, size: Callable[[str], int] = len) -> str:
    """The longest beginning of `text` in whole sentences with size(beginning) <= limit.

    Where not even the first sentence fits, it is cut inside.

    size: characters unless told; grows with the text
    """
    ends = [match.end() for match in _SENTENCE.finditer(text)]
    return _longest(text, ends, limit, size) or _longest(text, range(len(text)), limit, size)


def _longest(text: str, ends: list[int] | range, limit: int, size: Callable[[str], int]) -> str:
    n_fit = bisect.bisect_right(ends, limit, key=lambda end: size(text[:end].rstrip()))
    return text[: ends[n_fit - 1]].rstrip() if n_fit else ""
