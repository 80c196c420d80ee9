"""eval_rouge.py as its users meet it: real files, a real small checkpoint, the tables it prints."""

import hashlib
import json
from pathlib import Path

import pytest

import eval_rouge
from babyllama.errors import ConfigError, DataError
from babyllama.rows import numbered_lines, write_rows
from babyllama.scoring import rouge, test_sets
from babyllama.scoring.prompts import SummaryPrompts
from conftest import save_model
from model import Transformer

REPO = Path(eval_rouge.__file__).parent
SHARED = REPO.parent / "shared/data"
TEXTS = [
    "小猫坐在窗台上看雨。雨停了。",
    "银杏是一种古老的树种，秋天叶子变黄。" * 20,
    "今天天气很好，我们去公园散步！",
    "老师说，学习要一步一步来。",
    "新的公交线路今天开通，市民出行更加方便。",
]
FEW = ("--max_new_tokens", "8", "--device", "cpu",
       "--prompts", str(REPO / "tests/small_prompts.yaml"))  # fmt: skip
TITLES = ["小猫看雨", "银杏", "公园散步", "学习", "公交线路开通"]


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    rows = [
        {"id": f"small/{i}", "text": text, "summary": title}
        for i, (text, title) in enumerate(zip(TEXTS, TITLES, strict=True))
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    return tmp_path / "rows.jsonl"


@pytest.fixture
def other(tmp_path: Path, model: Transformer, tokenizer) -> Path:
    """A second run whose model says other things."""
    model.init_weights()
    for weight in model.parameters():
        weight.data.mul_(8 if weight.dim() > 1 else 1)
    return save_model(tmp_path / "out/other", model, tokenizer, step=3)


def write_titles(path: Path, titles: list[str], texts: list[str] = TEXTS) -> Path:
    rows = [
        {"id": f"small/{i}", "text": text, "reference": TITLES[i], "prediction": title}
        for i, (text, title) in enumerate(zip(texts, titles, strict=True))
    ]
    write_rows(path, rows)
    return path


def read_pairs(path: Path) -> list[dict]:
    return test_sets.open_set(path, None, "test", None).rows


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for _, line in numbered_lines(path)]


def test_a_set_is_summarised_scored_and_saved(checkpoint, rows_file, tmp_path, script, monkeypatch):
    out = tmp_path / "new/predictions.jsonl"
    monkeypatch.chdir(tmp_path)
    done = script("eval_rouge.py", checkpoint.parent, "--data", rows_file.name,
                  "--out", out, "--batch_size", 2, *FEW)  # fmt: skip
    assert done.code == 0, done.err

    rows = rows_of(out)
    assert [list(row) for row in rows] == [["id", "text", "reference", "prediction"]] * 5
    assert [row["id"] for row in rows] == [f"small/{i}" for i in range(5)]
    assert [row["text"] for row in rows] == TEXTS and [row["reference"] for row in rows] == TITLES

    result = json.loads(out.with_suffix(".scores.json").read_text("utf-8"))
    name = "small/step-000007"
    assert result["data_sha256"] == hashlib.sha256(rows_file.read_bytes()).hexdigest()
    assert (result["n"], result["n_cut"]) == (5, {name: 1})
    (model,) = result["models"]
    assert model["path"] == str(checkpoint)
    weights = (checkpoint / "model.safetensors").read_bytes()
    assert model["sha256"]["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    asked = hashlib.sha256((REPO / "tests/small_prompts.yaml").read_bytes()).hexdigest()
    assert result["prompts_sha256"] == asked
    decoding = result["decoding"]["settings"]
    assert (decoding["temperature"], decoding["max_new_tokens"]) == (0, 8)
    assert result["seconds"][name] > 0
    scores = result["scores_x100"]
    assert next(iter(scores)) == name and "first clause" in scores
    firsts = [rouge.first_sentence(text) for text in TEXTS]
    for measure in rouge.ROUGE_MEASURES:
        wanted = measure(firsts, TITLES)
        found = scores["first sentence"]["rouge"][wanted.measure]
        for each, f in wanted.f.items():
            assert found[each]["mean"] == pytest.approx(100 * f.mean())
            assert found[each]["low"] <= found[each]["mean"] <= found[each]["high"]
    bleu = rouge.bleu_published(firsts, TITLES).mean()
    assert scores["first sentence"]["bleu"]["mean"] == pytest.approx(100 * bleu)

    assert all(title in done.out for title in TITLES) and "(3) rouge-chinese" in done.out
    assert "the references" in done.out and "no published set" in done.out
    assert "5/5" in done.err and "jieba" not in done.err


def test_texts_are_cut_to_the_length_that_is_asked_for(
    checkpoint, rows_file, tmp_path, script, tokenizer
):
    out = tmp_path / "predictions.jsonl"
    done = script("eval_rouge.py", checkpoint, "--data", rows_file, "--out", out, *FEW,
                  "--max_seq_len", 38)  # fmt: skip
    assert done.code == 0, done.err
    own = SummaryPrompts.load(REPO / "tests/small_prompts.yaml", tokenizer)
    wanted = sum(own.eval_prompt(text, 38 - 8)[1] > 0 for text in TEXTS)
    found = json.loads(out.with_suffix(".scores.json").read_text("utf-8"))["n_cut"]
    assert list(found.values()) == [wanted] and wanted > 1


def test_two_systems_are_compared_row_by_row(checkpoint, other, rows_file, tmp_path, script):
    out = tmp_path / "out.jsonl"
    done = script("eval_rouge.py", checkpoint, other, "--data", rows_file, "--out", out, *FEW)
    assert done.code == 0, done.err
    names = ["small/step-000007", "other/step-000003"]
    assert f"{names[0]} minus {names[1]}" in done.out
    result = json.loads(out.with_suffix(".scores.json").read_text("utf-8"))
    assert list(result["scores_x100"])[:2] == names
    first, second = (
        {m: r[name]["mean"] for m, r in result["scores_x100"][each]["rouge"].items()}
        for each, name in zip(names, ["rouge-1"] * 2, strict=True)
    )
    for measure, row in result["differences"].items():
        assert row["rouge-1"]["mean"] == pytest.approx(first[measure] - second[measure])
        assert 0 < row["rouge-1"]["p"] <= 1
    assert [row["id"] for row in rows_of(out.with_name("out-2.jsonl"))] == [
        row["id"] for row in rows_of(out)
    ]


def test_titles_on_file_are_scored_without_a_model_or_the_data(tmp_path, script):
    good = write_titles(tmp_path / "good.jsonl", TITLES)
    bad = write_titles(tmp_path / "bad.jsonl", ["", ".", "猫", "银杏", "模型"])
    done = script("eval_rouge.py", good, bad)
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "good-compared.scores.json").read_text("utf-8"))
    ours, theirs = list(result["scores_x100"].values())[:2]
    means = [next(iter(each["rouge"].values()))["rouge-1"]["mean"] for each in (ours, theirs)]
    assert means[0] == pytest.approx(100) and means[1] < 30
    assert not (tmp_path / "good-compared.jsonl").exists()
    assert theirs["percent_empty"] == 40
    (first, _) = result["models"]
    assert first["sha256"] == hashlib.sha256(good.read_bytes()).hexdigest()


def test_titles_for_other_texts_are_refused(tmp_path, rows_file, script):
    swapped = write_titles(tmp_path / "swapped.jsonl", TITLES, TEXTS[::-1])
    found = script("eval_rouge.py", swapped, "--data", rows_file).error
    assert "row 1" in found and "another text" in found
    few = tmp_path / "few.jsonl"
    write_rows(few, rows_of(write_titles(tmp_path / "all.jsonl", TITLES))[:3])
    assert "--limit 3" in script("eval_rouge.py", few, "--data", rows_file).error
    assert script("eval_rouge.py", few, "--data", rows_file, "--limit", 3).code == 0


def test_each_way_to_decode_is_a_line_with_its_time(checkpoint, rows_file, tmp_path, script):
    out = tmp_path / "o.jsonl"
    ways = ["--decoding", "greedy,beam,top_p,best", "--beams", 3, "--limit", 2]
    done = script("eval_rouge.py", checkpoint, "--data", rows_file, "--out", out, *ways, *FEW)
    assert done.code == 0, done.err
    result = json.loads(out.with_suffix(".scores.json").read_text("utf-8"))
    names = [f"small/step-000007 {way}" for way in ("greedy", "beam", "top_p", "best")]
    assert list(result["seconds"]) == names and min(result["seconds"].values()) > 0
    assert result["decoding"]["best"]["n"] > 3 and result["decoding"]["beam"]["beams"] == 3
    assert len(rows_of(out.with_name("o-4.jsonl"))) == 2
    assert "wanted some of" in script("eval_rouge.py", checkpoint, "--decoding", "vote").error


def test_wordings_are_asked_of_a_checkpoint(rows_file, tmp_path, script):
    titles = write_titles(tmp_path / "t.jsonl", TITLES)
    asked = (titles, "--data", rows_file, *FEW, "--wordings", "true")
    assert "asks a checkpoint" in script("eval_rouge.py", *asked).error


def test_wordings_are_a_table_of_their_own(checkpoint, tmp_path, script):
    pairs = enumerate(zip(TEXTS[:2], TITLES, strict=False))
    rows = [{"id": f"csl/{i}", "text": text, "summary": title} for i, (text, title) in pairs]
    write_rows(tmp_path / "meta.jsonl", rows)
    out = tmp_path / "o.jsonl"
    done = script("eval_rouge.py", checkpoint, "--data", tmp_path / "meta.jsonl", "--out", out,
                  "--wordings", *FEW)  # fmt: skip
    assert done.code == 0, done.err
    result = json.loads(out.with_suffix(".scores.json").read_text("utf-8"))
    found = result["by_wording"]
    assert len(found["wordings"]) == 4
    values = [r["rouge-1"] for q, r in found["wordings"].items() if q != "the usual question"]
    assert found["spread"]["rouge-1"]["mean"] == pytest.approx(sum(values) / 3)
    assert found["spread"]["rouge-1"]["highest"] == max(values)
    assert "unseen: mean" in done.out


def test_csl_rows_may_hold_single_quotation_marks(tmp_path):
    path = tmp_path / "dev.tsv"
    path.write_text('to title\t"一国两制.\t国家主权\nto title\t提出了"模型\t模型\n', "utf-8")
    assert read_pairs(path) == [
        {"id": "dev/1", "text": '"一国两制.', "summary": "国家主权"},
        {"id": "dev/2", "text": '提出了"模型', "summary": "模型"},
    ]


def test_csl_files_run_to_the_end_and_land_in_the_run(checkpoint, tmp_path, script):
    path = tmp_path / "test.tsv"
    path.write_text('to title\t小猫"坐在窗台上.\t小猫\nto title\t银杏\t树\n' * 3, "utf-8")
    done = script("eval_rouge.py", checkpoint, "--data", path, "--limit", 3, *FEW)
    assert done.code == 0, done.err
    out = checkpoint.parent / "rouge-test-3-step-000007.jsonl"
    rows = rows_of(out)
    assert [row["text"] for row in rows] == ['小猫"坐在窗台上.', "银杏", '小猫"坐在窗台上.']


def test_csl_title_public_rows_are_read(tmp_path):
    path = tmp_path / "csl_title_dev.json"
    path.write_text('{"id": 3001, "title": "网络编码", "abst": "提出了一种策略。"}\n', "utf-8")
    wanted = {"id": "3001", "text": "提出了一种策略。", "summary": "网络编码"}
    assert read_pairs(path) == [wanted]


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
        read_pairs(tmp_path / name)


def test_mistakes_are_one_line_and_code_2(checkpoint, rows_file, tmp_path, script):
    def mistake(*argv: object) -> str:
        return script("eval_rouge.py", *argv).error

    titles = write_titles(tmp_path / "t.jsonl", TITLES)
    twice = mistake(checkpoint, checkpoint.parent, "--data", rows_file)
    assert "found the same checkpoint" in twice
    assert "no/such.tsv" in mistake(checkpoint, "--data", "no/such.tsv")
    assert "data_process.run no_such_set" in mistake(checkpoint, "--dataset", "no_such_set")
    assert "no/such/run" in mistake("no/such/run", "--data", rows_file)
    assert "is a directory" in mistake(checkpoint, "--data", rows_file, "--out", tmp_path)
    assert "is the data" in mistake(checkpoint, "--data", rows_file, "--out", rows_file)
    assert "is the data" in mistake(titles, checkpoint, "--data", rows_file, "--out", titles)
    assert "asks a checkpoint" in mistake(titles, "--wordings")
    assert "wanted texts under" in mistake(rows_file)
    with pytest.raises(ConfigError, match="limit must be at least 1, found 0"):
        eval_rouge.EvalConfig(limit=0)


def test_what_cannot_be_written_is_refused_before_the_first_title(
    checkpoint, other, rows_file, script, tmp_path
):
    (tmp_path / "full").write_text("", "utf-8")  # a file where a folder would have to be
    place = tmp_path / "full" / "o.jsonl"
    done = script("eval_rouge.py", checkpoint, other, "--data", rows_file, "--out", place, *FEW)
    assert done.code == 2 and "full" in done.err and "prompts" not in done.err + done.out


@pytest.mark.parametrize("row_id", ['"id": 0, ', ""])
def test_a_row_of_ours_needs_no_name(row_id, tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(f'{{{row_id}"text": "文", "summary": "题"}}\n', "utf-8")
    (row,) = test_sets.open_set(path, None, "test", None).rows
    assert row == {"id": "0" if row_id else "own/1", "text": "文", "summary": "题"}


def test_a_choice_between_columns_is_told(tmp_path):
    row = {"Text": "本文研究文本摘要。", "Summary": "文本摘要", "headline": "别的", "id": 1}
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", "utf-8")
    found = test_sets.open_set(path, None, "test", None)
    assert (found.rows[0]["summary"], found.columns) == (
        "文本摘要", "; title: summary; not used: headline"
    )  # fmt: skip


@pytest.mark.parametrize(
    "data", ["[\n", '{"question": "文", "title": "题"}', "text,summary\n文,题"]
)
def test_rows_that_are_not_understood_name_the_keys_and_the_way_to_rows(data, tmp_path):
    (tmp_path / "我的 x.json").write_text(data, "utf-8")
    with pytest.raises(
        DataError, match=r"keys for the text: text, content.*title: summary"
    ) as said:
        read_pairs(tmp_path / "我的 x.json")
    assert f"run pairs --name NAME --raw '{tmp_path}/我的 x.json'" in str(said.value)


def test_chinese_names_of_parts_are_known_in_a_folder(tmp_path):
    for name in ("训练集", "测试集", "验证集"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "文", "title": "{name}"}}\n', "utf-8")
    sets = [test_sets.open_set(tmp_path, None, split, None) for split in ("test", "dev")]
    assert [one.column("summary") for one in sets] == [["测试集"], ["验证集"]]


@pytest.mark.parametrize("columns", ["article title", "text summary", "content headline"])
def test_a_publisher_beside_the_article_is_not_the_text(columns, tmp_path):
    body, title = columns.split()
    row = {body: "本文研究文本摘要。", title: "文本摘要", "source": "新浪网"}
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", "utf-8")
    (found,) = test_sets.open_set(path, None, "test", None).rows
    assert (found["text"], found["summary"]) == (row[body], row[title])


def test_a_layout_tells_the_published_set(tmp_path):
    ts = tmp_path / "ts"
    ts.mkdir()
    (ts / "dev.tsv").write_text("to title\t方法\t题\n", "utf-8")
    (ts / "test.tsv").write_text("to title\t甲\t乙\n", "utf-8")
    public = tmp_path / "csl_title_public"
    public.mkdir()
    (public / "csl_title_dev.json").write_text('{"id": 1, "title": "题", "abst": "方"}\n', "utf-8")
    (public / "csl_title_test.json").write_text('{"id": 2, "title": "甲", "abst": "乙"}\n', "utf-8")
    (tmp_path / "lcsts_test.jsonl").write_text('{"content": "文", "title": "题"}\n', "utf-8")
    (tmp_path / "news_test.jsonl").write_text('{"content": "文", "title": "题"}\n', "utf-8")

    def opened(path: Path, split: str = "dev"):
        return test_sets.open_set(path, None, split, None)

    assert opened(ts).published == opened(ts / "test.tsv").published == "csl_ts"
    assert [opened(ts, s).rows[0]["text"] for s in ("dev", "test")] == ["方法", "甲"]
    assert opened(public).published == "csl_title_public"
    assert opened(public, "test").column("summary") == ["甲"]
    lcsts = opened(tmp_path / "lcsts_test.jsonl")
    assert lcsts.published == "lcsts"
    assert opened(tmp_path / "news_test.jsonl").published is None
    mixed = tmp_path / "mixed.jsonl"
    text = (public / "csl_title_dev.json").read_text("utf-8")
    mixed.write_text(text + '{"id": "a", "text": "文", "summary": "题"}\n', "utf-8")
    assert opened(mixed).published is None
    with pytest.raises(DataError, match="wanted a file of test"):
        (ts / "test.tsv").unlink()
        opened(ts, "test")


def test_published_systems_stand_only_beside_their_own_set(checkpoint, tmp_path, script):
    path = tmp_path / "csl_title_dev.json"
    path.write_text('{"id": 1, "title": "方法", "abst": "提出一种方法。"}\n', "utf-8")
    done = script("eval_rouge.py", checkpoint, "--data", path, *FEW)
    assert "T5-PEGASUS" in done.out and "MoCoBart" not in done.out, done.err
    ts = tmp_path / "ts.tsv"
    ts.write_text("to title\t提出一种方法。\t方法\n", "utf-8")
    done = script("eval_rouge.py", checkpoint, "--data", ts, *FEW)
    assert "PEGASUS" not in done.out and "no systems known" in done.out


@pytest.mark.skipif(not SHARED.exists(), reason="the real sets lie beside the project")
def test_real_sets_are_recognised():
    for path, published, n in (
        ("csl/benchmark/ts", "csl_ts", 1000),
        ("csl/csl_title_public", "csl_title_public", 250),
    ):
        found = test_sets.open_set(SHARED / path, "", "dev", None)
        assert (found.published, len(found.rows)) == (published, n)
    lcsts = test_sets.open_set(SHARED / "lcsts", "", "test", None)
    assert (lcsts.published, len(lcsts.rows)) == ("lcsts", 362)
