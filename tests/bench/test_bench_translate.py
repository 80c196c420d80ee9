"""bench.translate against a real server of OpenAI's protocol: what must survive, does."""

import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from babyllama.errors import ConfigError, DataError
from bench.tasks import load, rows_of
from bench.translate import TranslateConfig, lost, main, text_paths

FIXTURES = Path(__file__).parents[1] / "fixtures" / "bench"
KEY = "a-secret-key"


class Translator(ThreadingHTTPServer):
    """Answers chat completions: English words become 译, all else stays.

    faults: how often a text's reply is spoilt before it is right; refuse: how often 503 comes
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: Counter[str] = Counter()
        self.faults: dict[str, int] = {}
        self.refuse = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Translator

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != f"Bearer {KEY}":
            return self.answer(401, {"error": {"message": "no such key"}})
        if self.path != "/v1/chat/completions" or body["model"] != "zh":
            return self.answer(404, {"error": {"message": "no such model"}})
        text = body["messages"][-1]["content"]
        with self.server.lock:
            if self.server.refuse:
                self.server.refuse -= 1
                return self.answer(503, {"error": {"message": "busy"}}, {"Retry-After": "0.01"})
            self.server.asked[text] += 1
            is_spoilt = self.server.asked[text] <= self.server.faults.get(text, 0)
        spoilt = "我不知道" if re.search(r"\d", text) else text
        said = spoilt if is_spoilt else in_chinese(text)
        choice = {"index": 0, "message": {"role": "assistant", "content": said}}
        return self.answer(200, {"object": "chat.completion", "choices": [choice]})

    def answer(self, code: int, body: dict, head: dict | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **(head or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Quiet."""


KEEP = r"\$[^$]+\$|\\\w+|<<.*?>>|\([A-R]\)|Passage:|Question:|Options:"


def in_chinese(text: str) -> str:
    parts = re.split(f"({KEEP})", text)
    return "".join(p if n % 2 else re.sub(r"[A-Za-z]+", "译", p) for n, p in enumerate(parts))


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("TRANSLATOR_KEY", KEY)
    with Translator() as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def config(server: Translator, out: Path, task: str, **changes: object) -> TranslateConfig:
    settings = {"endpoint": server.url, "model": "zh", "key_env": "TRANSLATOR_KEY", "workers": 2}
    return TranslateConfig(task, out=out, **({"data": FIXTURES} | settings | changes))


@pytest.mark.parametrize(
    "task", ["gsm8k", "math", "commonsenseqa", "boolq", "naturalquestions", "triviaqa", "quac",
             "mmlu", "bbh", "agieval"],
)  # fmt: skip
def test_a_set_keeps_its_layout_its_labels_and_its_numbers(task, server, tmp_path):
    assert load(task).reader in text_paths()
    main(config(server, tmp_path, task))
    english, chinese = (rows_of(load(task), place, None) for place in (FIXTURES, tmp_path))
    assert len(chinese.every) == len(english.every) and chinese.left_out == english.left_out
    assert len(chinese.shots) == len(english.shots)
    for before, after in zip(english.scored, chinese.scored, strict=True):
        assert (before["gold"], before["letters"]) == (after["gold"], after["letters"])
        assert before["subject"] == after["subject"] or task == "quac"
        if len(re.findall("[A-Za-z]{3,}", re.sub(KEEP, "", before["ask"]))) > 1:
            assert "译" in after["ask"]
        if load(task).score in ("number", "math", "bbh"):
            assert before["answers"] == after["answers"], "what is scored is no text"
    assert (tmp_path / load(task).folder / "failed.jsonl").read_text("utf-8") == ""
    assert KEY not in "".join(p.read_text("utf-8") for p in tmp_path.rglob("*") if p.is_file())


def test_what_is_chinese_already_is_not_sent_and_lies_flat_as_well(server, tmp_path):
    flat = tmp_path / "flat/agieval"
    flat.mkdir(parents=True)
    for path in (FIXTURES / "agieval/v1").iterdir():
        (flat / path.name).write_bytes(path.read_bytes())
    main(config(server, tmp_path / "zh", "agieval", data=flat.parent))
    assert set(server.asked) == {"If $x+1=3$, what is $x$?", *(f"({x}){n}" for n, x in
                                                               enumerate("ABCD", 1))}  # fmt: skip
    before, after = (rows_of(load("agieval"), place, None) for place in (FIXTURES, tmp_path / "zh"))
    assert after.left_out == before.left_out
    assert sum(a["ask"] != b["ask"] for a, b in zip(before.every, after.every, strict=True)) == 1


def test_a_second_call_asks_only_for_what_is_missing(server, tmp_path):
    main(config(server, tmp_path, "gsm8k", limit=2))
    first = sum(server.asked.values())
    main(config(server, tmp_path, "gsm8k"))
    assert first and max(server.asked.values()) == 1
    before = sum(server.asked.values())
    main(config(server, tmp_path, "gsm8k"))
    assert sum(server.asked.values()) == before > first


def test_a_text_that_loses_a_number_is_asked_again_then_its_row_is_listed(server, tmp_path, capsys):
    questions = [json.loads(line)["question"] for line in
                 (FIXTURES / "gsm8k/test.jsonl").read_text("utf-8").splitlines()]  # fmt: skip
    server.faults = {questions[0]: 2, questions[1]: 99}
    server.refuse = 3
    main(config(server, tmp_path, "gsm8k"))
    assert server.asked[questions[0]] == server.asked[questions[1]] == 3
    (failed,) = map(json.loads, (tmp_path / "gsm8k/failed.jsonl").read_text("utf-8").splitlines())
    assert failed["texts"] == [questions[1]] and failed["entry"]["question"] == questions[1]
    assert len(rows_of(load("gsm8k"), tmp_path, None).every) == len(questions) - 1
    assert "left out: test.jsonl: 缺少数字" in capsys.readouterr().out
    main(config(server, tmp_path, "gsm8k"))
    assert server.asked[questions[1]] == 6, "what failed is asked for again"


def test_a_model_that_cannot_translate_and_wrong_settings_are_said(server, tmp_path, monkeypatch):
    bad = [
        ({"key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY"),
        ({"model": "no_such"}, "refused with 404"),
        ({"endpoint": server.url.removesuffix("/v1")}, "refused with 404"),
        ({"endpoint": "localhost:1"}, "wanted http://"),
        ({"endpoint": None}, "wanted --endpoint"),
        ({"tries": 0}, "must be positive"),
    ]
    for changes, message in bad:
        with pytest.raises(ConfigError, match=message):
            main(config(server, tmp_path, "gsm8k", **changes))
    with pytest.raises(ConfigError, match="wanted an English benchmark, found 'cmmlu'"):
        main(config(server, tmp_path, "cmmlu"))
    with pytest.raises(ConfigError, match="would be replaced"):
        main(config(server, FIXTURES, "gsm8k"))
    monkeypatch.setenv("TRANSLATOR_KEY", "another")
    with pytest.raises(ConfigError, match="refused with 401") as raised:
        main(config(server, tmp_path, "gsm8k"))
    assert "another" not in str(raised.value)
    monkeypatch.setenv("TRANSLATOR_KEY", KEY)
    texts = (FIXTURES / "natural_questions/NQ-open.dev.jsonl").read_text("utf-8").splitlines()
    server.faults = {json.loads(line)["question"]: 99 for line in texts}
    with pytest.raises(DataError, match="translated no entry"):
        main(config(server, tmp_path, "naturalquestions", tries=1))


@pytest.mark.parametrize(
    "text, translation, word",
    [
        ("Tom has 3 pens and two cups.", "汤姆有3支笔和2个杯子。", ""),
        ("Tom has 3 pens.", "汤姆有三支笔。", "缺少数字 3"),
        ("Tom has 3 pens.", "汤姆有3支笔，共5支。", "多出数字 5"),
        ("He earns $1,200.50 a day.", "他每天挣 1200.50 美元。", ""),
        ("(A) red (B) blue", "(A) 红 蓝", "缺少字母选项 (B)"),
        ("Find $x+1$ for me.", "求 $x+2$。", "缺少公式 $x+1$"),
        ("So \\boxed{4} it is.", "所以是 4。", "缺少标记 \\boxed"),
        ("a very big house", "a very big house", "没有译成中文"),
        ("Paris", "Paris", ""),
        ("Who are you?", "", "没有译文"),
        ("Who are you?", "你是谁？" * 40, "译文过长"),
    ],
)
def test_what_a_translation_lost_is_said(text, translation, word):
    found = lost(text, translation)
    assert word in found and bool(found) == bool(word)
