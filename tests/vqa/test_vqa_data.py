"""Rows and images: readers, packed sets, batches, and a run from raw files to scores."""

import io
import json
import lzma
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from babyllama.config import REPO, parse, plain, to_yaml
from babyllama.errors import ConfigError, DataError
from babyllama.rows import check_row
from babyllama.sources import SourceConfig
from commands import call
from conftest import small_config
from data_process.raw import Skip, records, whole_files
from data_process.registry import data_sets
from model import IGNORED
from vqa.data import (
    ImageRows,
    Room,
    VqaDataConfig,
    features_of,
    open_vqa_data,
    prepared,
)
from vqa.encoders import EncoderConfig, make_encoder
from vqa.evaluate import Asked, report, score, shuffled
from vqa.images import normalise
from vqa.pack import Finder, PackConfig, PackedImages, pack
from vqa.train import VqaConfig

PIL = pytest.importorskip("PIL.Image", reason="pip install -r requirements/vqa.txt")
COLOURS = {"红色": "red", "蓝色": "blue", "绿色": "lime", "白色": "white"}
ENCODER = EncoderConfig(size=32, grid=1, depths=(4,))


def stored(colour: str, size: tuple[int, int] = (16, 16), kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    PIL.new("RGB", size, colour).save(out, kind)
    return out.getvalue()


def llava(name: str, *turns: str) -> dict:
    said = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(turns)]
    return {"id": "GCC", "image": name, "conversations": said}


def rows_of(name: str, place: Path) -> list[dict | Skip]:
    (data_set,) = data_sets(name)
    files = whole_files(place, data_set.inputs)
    rows = list(data_set.read(records(files, "utf-8-sig", data_set.layout)))
    for row in rows:
        if isinstance(row, dict):
            row.pop("unused", None)
    return rows


def read(name: str, place: Path) -> list:
    return [
        row.reason
        if isinstance(row, Skip)
        else (row["image"], *(m["content"] for m in row["messages"]))
        for row in rows_of(name, place)
    ]


def test_llava_rows_lose_their_placeholder_wherever_it_stands(tmp_path):
    rows = [
        llava("a.jpg", "<image>\n图里有什么？", "一只狗。"),
        llava("b.jpg", "描述图像。\n<image>", "一辆车。", "什么颜色？", "红色。"),
        llava("c.jpg", "两张：<image><image>", "不同。"),
        llava("", "没有图？", "没有。"),
        llava("d.jpg", "<image>", "只有图。"),
        {"image": "e.jpg", "text": "…"},
    ]
    (tmp_path / "chat-translated.json").write_text(json.dumps(rows), "utf-8")
    (tmp_path / "chat.json").write_text(json.dumps([llava("x.jpg", "What?", "A dog.")]), "utf-8")
    (tmp_path / "a.jpg").write_bytes(stored("red"))
    assert read("chinese_llava", tmp_path) == [
        ("a.jpg", "图里有什么？", "一只狗。"),
        ("b.jpg", "描述图像。", "一辆车。", "什么颜色？", "红色。"),
        "several_images",
        "no_image",
        "empty_turn",
        "unknown_columns",
    ]


def test_own_rows_of_all_forms_are_canonical_and_have_ids_of_their_own(tmp_path):
    rows = [
        {"image": "a.png", "qa": [*({"question": q, "answer": a} for q, a in ("甲乙", "丙丁")), 3]},
        {
            "image": "b.png",
            "messages": [
                {"role": role, "content": text}
                for role, text in (("user", "甲"), ("assistant", "乙"))
            ],
        },
    ]
    with lzma.open(tmp_path / "train.jsonl.xz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    found = [r for r in rows_of("vqa", tmp_path) if not isinstance(r, Skip)]
    assert [row["id"] for row in found] == [0, "0-1", 1]
    assert all(row.pop("split") == "train" for row in found)
    assert all(check_row(row | {"id": f"x/{row['id']}"}) is None for row in found)
    (tmp_path / "train.jsonl.xz").unlink()
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"like \*\.json.*found a\.jpg"):
        read("vqa", tmp_path)


def test_minimind_rows_of_both_editions(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    talk = [
        {"role": "user", "content": "<image>\n什么颜色？"},
        {"role": "assistant", "content": "红色。"},
    ]
    lines = [{"conversations": talk, "image": name} for name in ("a.jpg", "a.jpg, b.jpg")]
    (tmp_path / "sft.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    held = [[stored("red")], [stored("red"), stored("blue")], [stored("black", (8, 8))], [], [b"x"]]
    texts = [json.dumps(talk)] * 4 + ["{broken"]
    parquet.write_table(
        pyarrow.table({"conversations": texts, "image_bytes": held}), tmp_path / "i2t.parquet"
    )
    asked = ("什么颜色？", "红色。")
    assert read("minimind_v", tmp_path) == [
        ("i2t.parquet#0", *asked), "several_images", ("i2t.parquet#2", *asked), "no_image",
        "wrong_type", ("a.jpg", *asked), "several_images",
    ]  # fmt: skip
    finder = Finder(tmp_path)
    assert finder.find("i2t.parquet#0") == held[0][0]
    assert finder.find("i2t.parquet#1.1") == held[1][1]
    for name in ("i2t.parquet#9", "i2t.parquet#0.1", "i2t.parquet#3", "no.parquet#0"):
        with pytest.raises(DataError, match="no such image; wanted it in"):
            finder.find(name)


def write_rows_of(place: Path, names: list[str], split: str = "train") -> None:
    place.mkdir(parents=True, exist_ok=True)
    turns = [{"role": "user", "content": "什么？"}, {"role": "assistant", "content": "图。"}]
    rows = [{"id": f"x/{n}", "image": name, "messages": turns} for n, name in enumerate(names)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (place / f"{split}-00000.jsonl").write_text(text, "utf-8")


def test_bad_and_missing_pictures_are_counted_by_reason_and_left_out(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    (images / "good.png").write_bytes(stored("red"))
    (images / "COCO_train2014_000000000007.jpg").write_bytes(stored("blue", kind="JPEG"))
    (images / "cut.png").write_bytes(stored("red", (64, 64), "BMP")[:200])
    (images / "text.png").write_bytes(b"hello")
    (images / "black.png").write_bytes(stored("black", (8, 8)))
    (images / "large.png").write_bytes(stored("red", (300, 100)))
    (tmp_path / "outside.png").write_bytes(stored("red"))
    names = ["good.png", "train2017/000000000007.jpg", "cut.png", "text.png", "gone.png",
             "black.png", "large.png", "../outside.png", "good.png"]  # fmt: skip
    write_rows_of(tmp_path / "rows/set", names)
    cfg = PackConfig(str(tmp_path / "rows/set"), images, tmp_path / "out", max_side=50)
    counts = pack(cfg)
    assert counts["images"] == 3
    assert counts["left_out"] == {
        "wanted a whole image": 1, "wanted an image (JPEG, PNG, WEBP, GIF, BMP)": 1,
        "no such image": 1, "black 8 x 8": 1, "leads out": 1,
    }  # fmt: skip
    held = PackedImages(tmp_path / "out/set")
    assert held.names == ["good.png", "train2017/000000000007.jpg", "large.png"]
    assert held.read(0) == stored("red")
    assert max(PIL.open(io.BytesIO(held.read(2))).size) == 50
    # What reads in one direction, what reads by name, and every other tool see the same.
    with tarfile.open(tmp_path / "out/set/pictures-00000.tar") as archive:
        plain = {m.name: archive.extractfile(m).read() for m in archive}
    assert plain == {name: held.read(n) for name, n in held.number.items()}


def test_a_cut_shard_is_refused(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a.png", "b.png"):
        (images / name).write_bytes(stored("red"))
    write_rows_of(tmp_path / "rows/set", ["a.png", "b.png"])
    pack(PackConfig(str(tmp_path / "rows/set"), images, tmp_path / "out"), shard_bytes=1)
    shards = sorted((tmp_path / "out/set").glob("*.tar"))
    assert len(shards) == 2
    shards[0].write_bytes(shards[0].read_bytes()[:560])
    with pytest.raises(DataError, match=r"cut off|wanted a tar file"):
        PackedImages(tmp_path / "out/set")
    with pytest.raises(DataError, match=r"wanted pictures-\*.tar, found none; pack them"):
        PackedImages(tmp_path / "out/none")


def test_no_usable_picture_at_all_is_an_error(tmp_path):
    write_rows_of(tmp_path / "rows/set", ["a.png"])
    with pytest.raises(DataError, match=r"found none of 1 .*no such image"):
        pack(PackConfig(str(tmp_path / "rows/set"), tmp_path, tmp_path / "out"))
    with pytest.raises(ConfigError, match="wanted a set and --images"):
        PackConfig()


# A whole set: images of one colour, the question which.
QUESTION = "图片是什么颜色？"


@pytest.fixture(scope="module")
def colours(tmp_path_factory, tokenizer) -> Path:
    """Raw files of a set, in data/ below: rows, tokens and images, made by the commands."""
    root = tmp_path_factory.mktemp("colours")
    raw = root / "raw"
    raw.mkdir()
    for split, n_rows in (("train", 80), ("val", 8), ("test", 16)):
        rows = []
        for n in range(n_rows):
            answer, colour = list(COLOURS.items())[n % 4]
            name = f"{split}-{n}.png"
            (raw / name).write_bytes(stored(colour, (8 + n % 5, 9)))
            rows.append({"image": name, "qa": [{"question": QUESTION, "answer": answer}]})
        rows.append({"image": "gone.png", "qa": [{"question": "在吗？", "answer": "不在。"}]})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (raw / f"{split}.jsonl").write_text(text, "utf-8")
    run("data_process.run", "vqa", "--name", "colours", "--raw", raw, "--out", root / "data",
        "--tokenizer", tokenizer.path)  # fmt: skip
    run("vqa.pack", root / "data/clean/colours", "--images", raw, "--out", root / "data/pictures")
    return root


def run(module: str, *words: object, code: int = 0) -> str:
    found, said = call(module, *map(str, words))
    assert found == code and "Traceback" not in said, said[-2000:]
    return said


def data_of(root: Path, tokenizer, n_positions: int = 2, **changes: object):
    place = str(root / "data/tokens" / tokenizer.path.stem / "colours")
    config = VqaDataConfig((SourceConfig(place),), root / "data/pictures", **changes)
    held = PackedImages(root / "data/pictures/colours")
    order = type("Order", (), {"batch_size": 6, "seed": 0})
    room = Room(small_config().max_seq_len, tokenizer.pad_id, n_positions)
    return open_vqa_data(config, tokenizer, room, order, [held], ENCODER), held


def test_the_same_words_about_different_pictures_are_no_repeats(colours):
    counts = json.loads((colours / "data/clean/colours/counts.json").read_text("utf-8"))
    assert counts["kind"] == "vqa" and counts["rows_out"] == 107
    assert counts["parts"]["test"]["rows"] == 17


def test_rows_without_their_picture_are_counted_and_the_rest_is_whole(colours, tokenizer):
    data, held = data_of(colours, tokenizer)
    (source,) = data.train.mixture.sources
    assert source.dropped["image_missing"] == 1
    place = str(colours / "data/tokens" / tokenizer.path.stem / "colours")
    rows = ImageRows(place, 0, "test", tokenizer, held, 128, 2)
    assert len(rows) == 16
    for number in range(16):
        picture, messages = rows.messages(number)
        n = int(held.names[picture].split("-")[1].split(".")[0])
        assert messages[-1]["content"] == list(COLOURS)[n % 4]
        tokens, targets, wanted = rows.row(number, np.random.default_rng(0))
        assert tokens[:3].tolist() == [tokenizer.bos_id, -1, -2] and wanted.number == picture
        spoken = targets[targets != IGNORED].tolist()
        assert tokenizer.decode(spoken) == messages[-1]["content"]
        assert spoken[-1] == tokenizer.eos_id


def test_rows_that_are_too_long_lose_turns_or_go(tmp_path, colours, tokenizer):
    place = str(colours / "data/tokens" / tokenizer.path.stem / "colours")
    held = PackedImages(colours / "data/pictures/colours")
    whole = ImageRows(place, 0, "test", tokenizer, held, 128, 0)
    longest = max(len(whole.row(n, np.random.default_rng(0)).tokens) for n in range(16))
    fits = ImageRows(place, 0, "test", tokenizer, held, longest + 50, 50)
    assert len(fits) == 16 and fits.dropped["answer_does_not_fit"] == 0
    with pytest.raises(DataError, match="'answer_does_not_fit': 16"):
        ImageRows(place, 0, "test", tokenizer, held, longest + 9, 50)


def flat(batches: list[dict]) -> list:
    """What each row says of which image, whatever batch it stands in."""
    found = []
    for batch in batches:
        for row, goal, picture in zip(
            batch["tokens"], batch["targets"], batch["image_of"], strict=True
        ):
            if (goal != IGNORED).any():
                # The positions of its image, counted from where its image begins.
                words = torch.where(row < 0, row + 2 * int(picture), row)
                key = words[row != 2].tolist(), batch["pixels"][picture].flatten().tolist()
                found.append(json.dumps(key))
    return sorted(found)


@pytest.mark.parametrize("ranks, micro", [(1, 6), (1, 4), (2, 2), (4, 3), (5, 1)])
def test_the_global_batch_does_not_depend_on_the_split(ranks, micro, colours, tokenizer):
    data, _ = data_of(colours, tokenizer)
    wanted = flat(data.train.batches(3, 6))
    assert len(wanted) == 6
    parts = [data.train.batches(3, micro, rank, ranks) for rank in range(ranks)]
    assert flat([batch for part in parts for batch in part]) == wanted
    # Shares of a model are put together in each forward pass, in validation, too.
    judged = [data.val.batches(*data.val.names, micro, rank, ranks) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == len({len(part) for part in judged}) == 1


def test_each_picture_of_a_batch_is_its_rows_own(colours, tokenizer):
    data, _ = data_of(colours, tokenizer)
    for batch in data.train.batches(0, 6):
        for row, goal, picture in zip(
            batch["tokens"], batch["targets"], batch["image_of"], strict=True
        ):
            answer = tokenizer.decode(goal[goal != IGNORED].tolist())
            wanted = prepared(stored(COLOURS[answer]), "x", ENCODER)
            assert (batch["pixels"][picture].int() - wanted.int()).abs().max() <= 1
            assert sorted(row[row < 0].tolist()) == [-2 - 2 * picture, -1 - 2 * picture]


def test_features_are_kept_and_belong_to_their_encoder(colours):
    held, device = PackedImages(colours / "data/pictures/colours"), torch.device("cpu")
    encoder = make_encoder(ENCODER)
    first = features_of(encoder, held, device)
    assert first.shape == (104, 1, 128)
    pixels = prepared(held.read(5), "x", ENCODER)[None]
    with torch.no_grad():
        alone = encoder(normalise(pixels))[0].numpy()
    assert np.allclose(first[5], alone, rtol=2e-3, atol=2e-3)
    features_of(encoder, held, device)
    assert len(list(held.place.glob("features-*.npy"))) == 1
    features_of(make_encoder(ENCODER, seed=1), held, device)
    assert len(list(held.place.glob("features-*.npy"))) == 2


def asked_of(n: int) -> list[Asked]:
    talk = [{"role": "user", "content": QUESTION}]
    return [Asked(i // 2, talk, "是" if i % 4 < 2 else "不是") for i in range(n)]


def test_shuffled_pictures_are_all_others():
    asked = asked_of(20)
    found = shuffled(asked)
    assert all(one.image != other for one, other in zip(asked, found, strict=True))


def test_scores_know_the_majority_and_open_questions():
    asked = [*asked_of(8), Asked(9, [{"role": "user", "content": "叫什么？"}], "小花")]
    true = ["是。", "是", "不是", "不是", "是", "是", "是", "不是", "小草"]
    found = score(asked, {"true": true, "blank": ["是"] * 9})
    low, high = (found["closed"].pop(key) for key in ("low", "high"))
    assert found["closed"] == {"majority": 0.5, "true": 7 / 8, "blank": 0.5}
    assert low < 7 / 8 < high == 1 and found["questions"][QUESTION]["low"] == low
    everything = found | {"closed": {"majority": 0, "true": 0, "shuffled": 0, "blank": 0},
                          "questions": {}}  # fmt: skip
    assert report(everything).splitlines()[-3].endswith(" -"), "no closed question, no interval"
    assert found["rows"] == {"closed": 8, "open": 1}
    assert 0 < found["open"]["true"]["rouge-1"] < 1 and found["open"]["blank"]["rouge-1"] == 0


def config_of(root: Path, tokenizer, run_name: str, **changes: object) -> Path:
    config = {
        "name": str(root / run_name),
        "tokenizer": str(tokenizer.path),
        "model": {"dim": 32, "n_layers": 2, "n_heads": 4, "multiple_of": 16, "max_seq_len": 64},
        "encoder": {"name": "efficientvit_b0", "size": 32, "depths": [1, 4], "grid": 1},
        "fusion": {"kind": "splice"},
        "data": {
            "sources": [{"name": str(root / "data/tokens" / tokenizer.path.stem / "colours")}],
            "pictures": str(root / "data/pictures"),
            "cache_features": True,
        },
        "optim": {"lr": 1e-2, "warmup_steps": 5},
        "train": {"max_steps": 60, "batch_size": 16, "micro_batch_size": 16, "eval_every": 60,
                  "save_every": 30, "log_every": 30},
        "device": {"device": "cpu", "precision": "float32"},
    }  # fmt: skip
    path = root / f"{run_name}.yaml"
    path.write_text(yaml.safe_dump(config | changes), "utf-8")
    return path


def test_from_raw_files_to_a_model_that_looks_at_its_pictures(colours, tokenizer):
    """Training, a second stage, scores, chat and the sheet of photos, as a user starts them."""
    said = run("vqa.train", "--config", config_of(colours, tokenizer, "first"))
    assert "image_missing 1" in said and "4 positions" not in said
    place = str(colours / "data/tokens" / tokenizer.path.stem / "colours")
    where = ("--dataset", place, "--images", colours / "data/pictures")
    table = run("vqa.evaluate", colours / "first", *where)
    found = json.loads((colours / "first/vqa-colours-test.json").read_text("utf-8"))
    assert found["closed"]["true"] >= 0.75, table
    assert found["closed"]["true"] - found["closed"]["shuffled"] >= 0.4, table
    assert found["closed"]["majority"] == found["closed"]["blank"] == 0.25 or (
        found["closed"]["blank"] < 0.6
    )
    other = config_of(colours, tokenizer, "other", base=str(colours / "first"),
                      fusion={"kind": "cross"})  # fmt: skip
    assert "fusion: wanted" in run("vqa.train", "--config", other, code=2)
    second = config_of(
        colours, tokenizer, "second", base=str(colours / "first"), freeze=["encoder", "connector"],
        rates={"language.": 0.1},
        train={"max_steps": 3, "batch_size": 8, "micro_batch_size": 4, "eval_every": 3},
    )  # fmt: skip
    run("vqa.train", "--config", second)
    photo = colours / "raw/test-0.png"
    talk = run("vqa.chat", colours / "second", "--image", photo, "--ask", QUESTION)
    assert talk.startswith("助手：") and talk.strip() != "助手："
    run("vqa.evaluate", colours / "second", *where, "--sheet", colours / "sheet.png")
    with PIL.open(colours / "sheet.png") as sheet:
        assert sheet.size[0] > 300
    for words, message in (
        ((), "wanted an image, found a question without one"),
        (("--image", colours / "raw/train.jsonl"), "found .* bytes that are none"),
        (("--image", colours / "none.png"), "no such image"),
    ):
        err = run("vqa.chat", colours / "second", "--ask", QUESTION, *words, code=2)
        assert len(err.splitlines()) == 1
        assert re.search(message, err)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"name": None}, "the run has no name"),
        ({"freeze": ["encoder", "visual"]}, "begin no name"),
        ({"freeze": []}, "cache_features wants a frozen encoder"),
        ({"rates": {"eyes": 0.1}}, "names begin encoder, connector, language"),
        ({"encoder": {"size": 33}}, "encoder.size wants a multiple of 32"),
        ({"data": {"sources": []}}, "data.sources is empty"),
    ],
)
def test_settings_that_cannot_work_are_one_line(changes, message, colours, tokenizer):
    err = run("vqa.train", "--config", config_of(colours, tokenizer, "bad", **changes), code=2)
    assert message in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("path", sorted(REPO.glob("configs/vqa/*.yaml")), ids=lambda p: p.name)
def test_a_committed_config_is_read_and_survives_a_round_trip(path, tmp_path):
    cfg = parse(VqaConfig, "", ["--config", str(path)])
    assert cfg.name == "vqa-" + path.stem.replace("_", "-")
    (tmp_path / "again.yaml").write_text(to_yaml(cfg), "utf-8")
    assert plain(parse(VqaConfig, "", ["--config", str(tmp_path / "again.yaml")])) == plain(cfg)
