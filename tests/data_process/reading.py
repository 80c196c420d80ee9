"""What the tests of readers share: a set of the catalogue, its raw records, what became of them."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from babyllama.rows import check_row
from data_process.clean import fix
from data_process.columns import known
from data_process.raw import Record, Skip, records, whole_files
from data_process.registry import DataSet, data_sets

FIXTURES = Path(__file__).parents[1] / "fixtures/data_process"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text("utf-8"))
SHARED = Path(__file__).resolve().parents[3] / "shared/data"


def set_of(name: str) -> DataSet:
    (found,) = data_sets(name)
    return found


def raw(path: Path, data_set: DataSet) -> list[Record | Skip]:
    files = whole_files(path, data_set.inputs)
    return list(records(files, "utf-8-sig", data_set.layout, known()))


def read(data_set: DataSet, entries: Iterable[Record | Skip]) -> list[dict | Skip]:
    """What a reader makes of records, without the columns that it had no use for."""
    found = list(data_set.read(entries))
    for item in found:
        if isinstance(item, dict):
            item.pop("unused", None)
    return found


def reason(item: dict | Skip) -> str | None:
    """A Skip's reason, with "!" if the record is damaged."""
    return item.reason + "!" * item.broken if isinstance(item, Skip) else None


def finished(data_set: DataSet, row: dict) -> dict:
    """A row as the pipeline stores it, but for cleaning."""
    row = data_set.finished({key: value for key, value in row.items() if key != "split"})
    return row | {"id": f"x/{row['id']}"}


def fault(data_set: DataSet, row: dict, fixed: bool = False) -> str | None:
    """Why a row is not canonical, once clean.py has fixed it."""
    row = {key: value for key, value in row.items() if key != "split"}
    row = fix(row, data_set.rules)[0] if fixed else row
    return check_row(finished(data_set, row))


def mutants(data: object) -> Iterator[object]:
    """A value with each of its parts in turn replaced by one of another type."""
    yield from (junk for junk in (None, 3, "一", [3], {"x": 3}) if type(junk) is not type(data))
    places = data if isinstance(data, dict) else range(len(data)) if type(data) is list else ()
    for key in places:
        for mutant in mutants(data[key]):
            changed = data.copy()
            changed[key] = mutant
            yield changed


def check_wrong_types(data_set: DataSet, path: Path, fixed: bool) -> None:
    """A wrong type anywhere is counted and never raises."""
    for record in raw(path, data_set):
        for data in mutants(record.data) if isinstance(record, Record) else ():
            for item in read(data_set, [record._replace(data=data)]):
                assert reason(item) or fault(data_set, item, fixed) is None, data
