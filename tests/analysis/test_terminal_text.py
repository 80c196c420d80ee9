"""Text for a terminal: what is learnt is marked, it is cut by its width, and harmless."""

import re

from hypothesis import given
from hypothesis import strategies as st

from babyllama.analysis.inspect_batch import dialogue
from babyllama.analysis.terminal_text import visible
from tokenizer import Tokenizer


@given(st.text())
def test_no_text_steers_the_terminal(text: str):
    shown = visible(text + "\x1b[2J\r\x9b\u202e\u200b\u2028")
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u2028\u202e]", shown)
    assert visible("天\n气 👨‍👩‍👧") == "天\n气 👨‍👩‍👧"


def test_signs_or_colours_stand_round_what_is_learnt_and_nothing_else(tokenizer: Tokenizer):
    turns = [("user", "天气怎么样？"), ("assistant", "很好。\n去公园吧"), ("user", "谢谢"),
             ("assistant", "好")]  # fmt: skip
    read = tokenizer.render_chat([{"role": role, "content": said} for role, said in turns])
    shown = dialogue(tokenizer, read, False)
    assert re.findall("⟦([^⟧]*)⟧", shown) == ["很好。\n去公园吧<eos>", "好<eos>"]
    bare = shown.replace("⟦", "").replace("⟧", "")
    assert bare == (
        "<bos>人类：天气怎么样？\n\n助手：很好。\n去公园吧<eos>\n\n人类：谢谢\n\n助手：好<eos>"
    )
    coloured = dialogue(tokenizer, read, True)
    assert re.sub("\x1b\\[32m([^\x1b]*)\x1b\\[0m", "⟦\\1⟧", coloured) == shown
