"""The chat page in a real browser: one to share, visitors who have never been there, waiting."""

import contextlib
import shutil
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip

needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on this machine; .ci/run installs Debian's"
)


@contextlib.contextmanager
def launched() -> "Iterator[Browser]":
    """A browser. It holds asyncio's loop of this thread, so it must not outlast a module."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@contextlib.contextmanager
def visitor(browser: "Browser", url: str, key: str = "", **more: object) -> "Iterator[Page]":
    """The page at its first visit, ready; whatever goes wrong in it, a dialog that opens, or a
    request to elsewhere fails the test.

    key: what the server wants, typed where the page asks for it
    more: settings of the browser's context
    """
    usual = {"locale": "zh-CN", "viewport": {"width": 1000, "height": 760}}
    context = browser.new_context(**usual | more)
    page = context.new_page()
    page.set_default_timeout(20_000)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if is_fault(message) else None)
    page.on("dialog", lambda dialog: (faults.append("a dialog opened"), dialog.dismiss()))
    page.on("request", lambda request: None if request.url.startswith((url, "blob:", "data:"))
            else faults.append(f"asked {request.url}"))  # fmt: skip
    page.goto(url)
    if key:
        page.wait_for_selector("#settings:not([hidden])")
        page.fill("#key", key)
        page.click("#close-settings")
    ready(page)
    yield page
    assert not faults, faults
    context.close()


def is_fault(message: "ConsoleMessage") -> bool:
    """An error in the console, but for the browser's word on an answer that is no 200."""
    return message.type == "error" and not message.text.startswith("Failed to load resource")


def ready(page: "Page") -> None:
    """Wait until the page knows what is served."""
    until(page, "document.querySelector('#model').options.length > 0")


def reload(page: "Page") -> None:
    """Load the page again, once what was being saved is saved."""
    page.evaluate("saving")
    page.reload()
    ready(page)


def until(page: "Page", condition: str, seconds: float = 20) -> None:
    """Wait for an expression to hold; playwright's own way needs eval, which the page forbids."""
    limit = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < limit, condition
        page.wait_for_timeout(20)


def ask(page: "Page", text: str, tokens: int = 12) -> str:
    """Send a message and wait for the whole reply, which leaves the page if it has no text
    (serving.talkative_model)."""
    page.evaluate(f"state.sampling.max_tokens = {tokens}")
    before = page.locator("#messages li.assistant").count()
    page.fill("#question", text)
    page.press("#question", "Enter")
    until(
        page, f"!writing && document.querySelectorAll('#messages li.assistant').length > {before}"
    )
    return texts(page)[-1]


def texts(page: "Page") -> list[str]:
    """All messages of the conversation, as they were written; each is on the screen."""
    found = page.evaluate("talk.messages.map((message) => message.content)")
    shown = page.locator("#messages > li > .text:not(.rich)").all_text_contents()
    assert [text for text in shown if text not in found] == []
    assert page.locator("#messages > li").count() == len(found)
    return found


def put_talk(page: "Page", talk: dict) -> None:
    """Write a conversation into the browser's store, and show it."""
    page.evaluate(
        """async (talk) => {
            const kept = { ...store.blank(), ...talk };
            await store.put(kept);
            await openTalk(await store.get(kept.id));
        }""",
        talk,
    )
