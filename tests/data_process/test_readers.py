"""Readers: what becomes of each record of the fixtures, as expected.json beside them says.

It has, by reader and file, of a row its id, its part and its texts, and of a Skip its reason, with
"!" if the record is damaged.
"""

import pytest
from reading import (
    EXPECTED,
    FIXTURES,
    check_wrong_types,
    fault,
    finished,
    raw,
    read,
    reason,
    set_of,
)

from data_process.clean import fix
from data_process.raw import Skip
from data_process.registry import DataSet

PLACES = [(name, place) for name, files in EXPECTED.items() for place in files]


def told(data_set: DataSet, item: dict | Skip) -> object:
    """A row or a Skip as expected.json writes it."""
    if isinstance(item, Skip):
        return reason(item)
    row = finished(data_set, item)
    turns = [f"{m['role'][0].upper()}:{m['content']}" for m in row.get("messages", ())]
    texts = turns or [row[key] for key in ("text", "summary") if key in row]
    return [item["id"], item.get("split"), *texts, *([row["meta"]] if "meta" in row else [])]


@pytest.mark.parametrize(("name", "place"), PLACES)
def test_every_record_becomes_the_expected_rows_and_skips(name, place):
    data_set = set_of(name)
    items = read(data_set, raw(FIXTURES / place, data_set))
    assert [told(data_set, item) for item in items] == EXPECTED[name][place]
    rows = [item for item in items if isinstance(item, dict)]
    # An open last turn of a dialogue goes in cleaning.
    assert not any(fault(data_set, row, fixed=data_set.kind == "chat") for row in rows)
    assert len({row["id"] for row in rows}) == len(rows)


@pytest.mark.parametrize(("name", "place"), PLACES)
def test_a_wrong_type_anywhere_is_counted_and_never_raises(name, place):
    data_set = set_of(name)
    check_wrong_types(data_set, FIXTURES / place, fixed=data_set.kind == "chat")


def test_only_sets_with_a_real_reference_text_keep_their_system_turn():
    kept = set()
    for name, place in PLACES:
        data_set = set_of(name)
        for row in read(data_set, raw(FIXTURES / place, data_set)):
            fixed = fix(row, data_set.rules)[0] if isinstance(row, dict) else {}
            if fixed.get("messages", [{"role": ""}])[0]["role"] == "system":
                kept.add(name)
    assert kept == {"redgpt", "c3", "cmrc2018", "squad", "boolq", "quac"}


def test_naturalconv_finds_its_split_in_whatever_order_the_files_are_read():
    data_set = set_of("naturalconv")
    entries = raw(FIXTURES / "naturalconv", data_set)
    backwards = read(data_set, entries[::-1])
    assert sorted(map(str, backwards)) == sorted(map(str, read(data_set, entries)))
    assert [row.get("split") for row in backwards if type(row) is dict] == [
        "test", "val", "train", None]  # fmt: skip


def test_a_squad_file_on_one_line_gives_the_rows_of_its_articles():
    data_set = set_of("squad")
    articles = raw(FIXTURES / "squad.json", data_set)
    whole = articles[0]._replace(data={"version": "v2.0", "data": [articles[0].data]})
    assert read(data_set, [whole]) == read(data_set, articles[:1])
