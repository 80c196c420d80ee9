"""What chat.py's session says beside the reply: why it ended, a title, notes for a terminal."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from test_chat import ENVIRONMENT, REPLY, endless, make_checkpoint, polite  # noqa: F401

import chat
from babyllama.chat import replies
from babyllama.chat.session import Session
from babyllama.checkpoint import load_model
from babyllama.config import REPO
from babyllama.sampling import SamplingConfig, squeeze
from conftest import TEXTS


def test_why_a_reply_ended_early_is_known(endless, polite):  # noqa: F811
    """length: as long as was allowed; context: no room for more; loop: see test_generate.py."""

    def reason(path: Path, **changes: object) -> str:
        cfg = chat.ChatConfig(temperature=0, loop_guard="off", **changes)
        session = Session(load_model(path), cfg)
        asked = session.ask("你好")
        assert "".join(session.answer(asked)) == asked.text
        return asked.reason

    assert reason(polite) == "eos"
    assert reason(endless, max_new_tokens=30) == "length"
    assert reason(endless, max_new_tokens=4000) == "context"
    assert {"length", "context", "loop", "interrupted"} == set(replies.ENDINGS)


def test_a_title_is_the_choice_of_many_and_the_same_every_time(tmp_path, tokenizer):
    """Random weights: what is drawn differs, the choice does not; nothing comes twice in it."""
    session = Session(
        load_model(make_checkpoint(tmp_path / "r", tokenizer, None)), SamplingConfig()
    )
    (first,), again = session.summarise(TEXTS[0]).titles, session.summarise(TEXTS[0]).titles[0]
    assert first == again and len(first) > 5
    letters = squeeze(first)
    assert len({letters[i : i + 3] for i in range(len(letters) - 2)}) == len(letters) - 2


@pytest.mark.skipif(os.name == "nt", reason="no pseudo terminals")
def test_notes_on_a_terminal_are_harmless_where_the_reply_goes_to_a_file(polite, tmp_path):  # noqa: F811
    main, end = os.openpty()
    words = ["--prompt", "你好", "--reference", "红\x1b[31m\u202e色"]
    command = [sys.executable, REPO / "chat.py", polite, *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=end, cwd=REPO, env=ENVIRONMENT)
    os.close(end)
    shown = b""
    with suppress(OSError):  # Linux says so when all is read
        while part := os.read(main, 4096):
            shown += part
    os.close(main)
    assert "红·[31m·色" in shown.decode("utf-8") and b"\x1b" not in shown
    assert done.stdout.decode("utf-8") == REPLY + "\n"
