"""The snippets of docs/evening.md run from top to bottom in one interpreter."""

import re

from babyllama.config import REPO


def test_the_snippets_of_the_guided_reading_run_in_order():
    page = (REPO / "docs" / "evening.md").read_text("utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(snippets) > 8 and page.count("assert ") > 8
    names: dict = {}
    for snippet in snippets:
        exec(compile(snippet, "docs/evening.md", "exec"), names)
    assert names["reply"].text == "像扇子。"


def test_every_file_of_the_reading_order_has_its_section_in_order():
    page = (REPO / "docs" / "evening.md").read_text("utf-8")
    named = re.findall(r"^## \d+\. `([\w/]+\.py)`", page, re.MULTILINE)
    assert len(named) == 11 and all((REPO / name).is_file() for name in named)
    readme = (REPO / "README.md").read_text("utf-8")
    order = re.findall(r"`([\w/]+\.py)`", readme[readme.index("阅读顺序") :])[:11]
    assert [name.split("/")[-1] for name in order] == [name.split("/")[-1] for name in named]
