"""eval_rouge.py as its users meet it: real files, a real small checkpoint, a subprocess."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import eval_rouge
from babyllama import metrics
from babyllama.checkpoint import load_model
from babyllama.errors import ConfigError, DataError
from babyllama.rows import numbered_lines, write_rows

REPO = Path(eval_rouge.__file__).parent
TEXTS = [
    "小猫坐在窗台上看雨。雨停了。",
    "银杏是一种古老的树种，秋天叶子变黄。" * 20,
    "今天天气很好，我们去公园散步！",
    "老师说，学习要一步一步来。",
    "新的公交线路今天开通，市民出行更加方便。",
]
TITLES = ["小猫看雨", "银杏", "公园散步", "学习", "公交线路开通"]


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    rows = [
        {"id": f"small/{i}", "text": text, "summary": title}
        for i, (text, title) in enumerate(zip(TEXTS, TITLES, strict=True))
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    return tmp_path / "rows.jsonl"


def evaluate(*arguments: object, cwd: Path = REPO) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPO / "eval_rouge.py"), *map(str, arguments)]
    command += ["--max_new_tokens", "8", "--device", "cpu"]
    return subprocess.run(
        command,
        capture_output=True,
        encoding="utf-8",
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_a_set_is_summarised_scored_and_saved(checkpoint, rows_file, tmp_path):
    out = tmp_path / "new/predictions.jsonl"
    settings = ["--data", rows_file.name, "--base", checkpoint, "--out", out, "--batch_size", 2]
    done = evaluate(checkpoint.parent, *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    rows = [json.loads(line) for _, line in numbered_lines(out)]
    assert [list(row) for row in rows] == [["id", "text", "reference", "prediction"]] * 5
    assert [row["id"] for row in rows] == [f"small/{i}" for i in range(5)]
    assert [row["text"] for row in rows] == TEXTS and [row["reference"] for row in rows] == TITLES

    result = json.loads(out.with_suffix(".scores.json").read_text("utf-8"))
    assert result["data_sha256"] == hashlib.sha256(rows_file.read_bytes()).hexdigest()
    assert (result["n"], result["n_cut"]) == (5, {"checkpoint": 1, "base": 1})
    assert result["models"]["checkpoint"] == {"path": str(checkpoint), "step": 7}
    assert (result["decoding"]["temperature"], result["decoding"]["max_new_tokens"]) == (0, 8)
    assert result["seconds"] > 0
    scores = result["scores_x100"]
    assert list(scores) == ["checkpoint", "base", "first sentence", "first 25 characters"]
    assert scores["base"] == scores["checkpoint"]
    firsts = [metrics.first_sentence(text) for text in TEXTS]
    for measure in metrics.ROUGE_MEASURES:
        wanted = measure(firsts, TITLES)
        found = scores["first sentence"]["rouge"][wanted.measure]
        for name, f in wanted.f.items():
            assert found[name]["mean"] == pytest.approx(100 * f.mean())
            assert found[name]["low"] <= found[name]["mean"] <= found[name]["high"]

    lines = done.stdout.splitlines()
    head = next(i for i, line in enumerate(lines) if "R-1 (1)" in line)
    assert len({len(line) for line in lines[head : head + 5]}) == 1
    assert all(title in done.stdout for title in TITLES) and "(3) rouge-chinese" in done.stdout
    assert "5/5" in done.stderr and "jieba" not in done.stderr


def wide_awake(checkpoint: Path):
    """The checkpoint with weights so large that every text gets a title of its own."""
    loaded = load_model(checkpoint)
    with torch.no_grad():
        for weight in loaded.model.parameters():
            weight.mul_(8 if weight.dim() > 1 else 1)
    return loaded


def test_titles_come_in_the_order_of_the_file_whatever_the_batches(checkpoint):
    loaded = wide_awake(checkpoint)
    cfg = eval_rouge.EvalConfig(max_new_tokens=8, batch_size=2)
    prompts, n_cut = eval_rouge.ask(loaded, TEXTS, cfg)
    one_by_one = [eval_rouge.summarise(loaded, [prompt], cfg)[0] for prompt in prompts]
    assert len(set(one_by_one)) == 5 and n_cut == 1
    assert eval_rouge.summarise(loaded, prompts, cfg) == one_by_one
    assert eval_rouge.summarise(loaded, prompts, replace(cfg, batch_size=32)) == one_by_one


def test_every_prompt_leaves_room_for_the_title(checkpoint):
    loaded = load_model(checkpoint)
    cfg = eval_rouge.EvalConfig(max_new_tokens=8)
    prompts, _ = eval_rouge.ask(loaded, TEXTS, cfg)
    assert max(map(len, prompts)) == loaded.config.max_seq_len - cfg.max_new_tokens
    with pytest.raises(ConfigError, match="leaves"):
        eval_rouge.ask(loaded, TEXTS, replace(cfg, max_new_tokens=120))


def test_csl_rows_may_hold_single_quotation_marks(tmp_path):
    path = tmp_path / "dev.tsv"
    path.write_text('to title\t"一国两制.\t国家主权\nto title\t提出了"模型\t模型\n', "utf-8")
    assert eval_rouge.read_pairs(path) == [
        {"id": "dev/1", "text": '"一国两制.', "summary": "国家主权"},
        {"id": "dev/2", "text": '提出了"模型', "summary": "模型"},
    ]


def test_csl_files_run_to_the_end_and_land_in_the_run(checkpoint, tmp_path):
    path = tmp_path / "test.tsv"
    path.write_text('to title\t小猫"坐在窗台上.\t小猫\nto title\t银杏\t树\n' * 3, "utf-8")
    done = evaluate(checkpoint, "--data", path, "--limit", 3)
    assert done.returncode == 0, done.stderr
    out = checkpoint.parent / "rouge-test-3-step-000007.jsonl"
    rows = [json.loads(line) for _, line in numbered_lines(out)]
    assert [row["text"] for row in rows] == ['小猫"坐在窗台上.', "银杏", '小猫"坐在窗台上.']


def test_csl_title_public_rows_are_read(tmp_path):
    path = tmp_path / "csl_title_dev.json"
    path.write_text('{"id": 3001, "title": "网络编码", "abst": "提出了一种策略。"}\n', "utf-8")
    wanted = {"id": "3001", "text": "提出了一种策略。", "summary": "网络编码"}
    assert eval_rouge.read_pairs(path) == [wanted]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", '{"id": "a/1", "text": "方", "summary": "法"}\n{oops\n', r"a\.jsonl:2: .*oops"),
        ("a.jsonl", '{"id": "a/1", "text": "方法"}\n', r"a\.jsonl:1: .*found text"),
        ("a.jsonl", '{"id": 1, "abst": "方法", "title": " "}\n', r"a\.jsonl:1: .*empty_text"),
        ("a.jsonl", '{"id": 1, "abst": null, "title": "方"}\n', r"a\.jsonl:1: .*not_a_string"),
        ("a.jsonl", '{"id": 1, "abst": "\\ud800", "title": "方"}\n', "lone_surrogate"),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1: "),
        ("a.tsv", "to keywords\t方法\t方_法\n", r"a\.tsv:1: .*to title"),
        ("a.tsv", "to title\t方法\n", r"a\.tsv:1: .*to title"),
        ("a.jsonl", "\n", "empty file"),
    ],
)
def test_a_line_without_text_and_title_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, "utf-8")
    with pytest.raises(DataError, match=message):
        eval_rouge.read_pairs(tmp_path / name)


def test_mistakes_are_one_line_and_code_2(checkpoint, rows_file, tmp_path, capsys):
    def mistake(*arguments: object) -> str:
        cfg = eval_rouge.parse(
            eval_rouge.EvalConfig, "", list(map(str, arguments)), positional=["checkpoint"]
        )
        with pytest.raises(SystemExit) as stop:
            eval_rouge.run(eval_rouge.main, cfg)
        assert stop.value.code == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1
        return message

    assert "no/such.tsv" in mistake(checkpoint, "--data", "no/such.tsv")
    assert "data_process.run no_such_set" in mistake(checkpoint, "--dataset", "no_such_set")
    assert "no/such/run" in mistake("no/such/run", "--data", rows_file)
    assert "no/such/base" in mistake(checkpoint, "--base", "no/such/base", "--data", rows_file)
    assert "is a directory" in mistake(checkpoint, "--data", rows_file, "--out", tmp_path)
    assert "or the data" in mistake(checkpoint, "--data", rows_file, "--out", rows_file)
    with pytest.raises(ConfigError, match="limit must be at least 1, found 0"):
        eval_rouge.EvalConfig(limit=0)


def test_a_mistake_ends_the_script_with_code_2(checkpoint):
    done = evaluate(checkpoint, "--data", "no/such.jsonl")
    assert (done.returncode, done.stdout) == (2, "") and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_lead_in_comes_off_and_nothing_else(checkpoint):
    titles = ["这段摘要的标题可以拟成：秋叶变黄", "可以叫《秋叶变黄》", "秋叶变黄", "标题党", ""]
    bare, n_framed = eval_rouge.unframed(load_model(checkpoint), titles, eval_rouge.EvalConfig())
    assert bare == ["秋叶变黄", "秋叶变黄", "秋叶变黄", "标题党", ""] and n_framed == 2
