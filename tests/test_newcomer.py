"""What somebody with only the README gets from a fresh clone, in ten minutes each: a title, a bot
of their own, a model that writes on in their style, and the way to the 43M model on an RTX 3090."""

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from babyllama.config import REPO
from commands import refused

pytestmark = [pytest.mark.slow, pytest.mark.timeout(660)]
LIMIT_S = 600
ABSTRACT = (
    "针对传统图像去噪方法容易丢失边缘细节的问题，提出一种结合残差学习与注意力机制的图像去噪算法。该算法用残差网络"
    "提取噪声特征，用注意力模块突出纹理区域。实验结果表明，与现有算法相比，该算法在保留图像细节的同时提高了峰值信噪比。"
)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("newcomer") / "babyllama"
    subprocess.run(["git", "clone", "-q", str(REPO), str(place)], check=True)
    return place


def ran(clone: Path, *words: object, said: str = "") -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=clone, input=said, capture_output=True,
        encoding="utf-8", timeout=LIMIT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture
def server(clone: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "serve.server", "release", "--port", str(port)]
    with open(clone / "server.log", "w") as log:
        process = subprocess.Popen(command, cwd=clone, stdout=log, stderr=log)
        url = f"http://127.0.0.1:{port}"
        while process.poll() is None:
            try:
                httpx.get(f"{url}/health", timeout=5)
                break
            except httpx.TransportError:
                time.sleep(0.5)
        yield url
        process.terminate()
        process.wait(30)


def test_a_title_from_the_server(server):
    """What the page's 写标题 asks."""
    body = {"messages": [{"role": "user", "content": ABSTRACT}], "task": "title", "n": 3}
    answer = httpx.post(f"{server}/v1/chat/completions", json=body, timeout=LIMIT_S).json()
    titles = [choice["message"]["content"] for choice in answer["choices"]]
    assert len(titles) == 3 and all(4 < len(title) < 60 for title in titles)
    assert "去噪" in titles[0]


def test_a_bot_from_50_dialogues(clone):
    rows = (clone / "configs/persona.jsonl").read_text("utf-8").splitlines()[:50]
    (clone / "my.jsonl").write_text("\n".join(rows), "utf-8")
    assert "python chat.py out/my" in ran(clone, "sft.py", "--rows", "my.jsonl").stderr
    for asked, told in (
        ("你叫什么？", "石榴"),
        ("你叫什么名字呢", "石榴"),
        ("你住在哪里？", "书店"),
    ):
        words = ("chat.py", "out/my", "--json", "--temperature", "0")
        (line,) = ran(clone, *words, said=asked).stdout.splitlines()
        assert told in json.loads(line)["reply"], (asked, line)


def test_a_model_that_writes_on_from_a_text_file(clone):
    diary = "\n".join(
        f"三月{n}日，小雨。老周又来修船，他说这条船比他的孙子还难伺候。我给他倒了一杯茶。"
        for n in range(1, 32)
    )
    (clone / "diary.txt").write_text(diary * 4, "utf-8")
    said = ran(clone, "pretrain.py", "--text", "diary.txt", "--base", "release").stderr
    assert said.startswith("base: release") and "out/diary" in said
    words = ("chat.py", "out/diary", "--json", "--temperature", "0")
    (line,) = ran(clone, *words, said="三月五日，小雨。老周又来").stdout.splitlines()
    assert "修船" in json.loads(line)["reply"]


def test_the_way_to_the_43m_model_on_a_3090(clone):
    """With a smaller batch: the 43M shape is measured for a minute on two quiet cores."""
    small = ("--train.batch_size", "1", "--train.micro_batch_size", "1")
    said = ran(clone, "pretrain.py", "--dry-run", *small).stdout
    assert "43,510,016 parameters" in said and re.search(r"RTX 3090: [\d.]+ GB and [\d.]+ to", said)
    commands = re.findall(r"^python (?:-m )?(.*)$", said, re.MULTILINE)
    assert [words.split()[0] for words in commands] == [
        "data_process.fetch", "data_process.run", "tokenizer.py", "data_process.run",
        "pretrain.py", "pretrain.py", "tokenizer.py", "data_process.run", "pretrain.py",
    ]  # fmt: skip
    assert not [words for words in commands if refused(*words.split())]
