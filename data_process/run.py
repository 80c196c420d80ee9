"""Make a data set: read, clean, de-duplicate, split, and with a tokenizer turn into token files.

    python -m data_process.run sample
    python -m data_process.run sample --tokenizer data/tokenizers/sample.model
    python -m data_process.run csl --raw ~/downloads/CSL/benchmark/ts
    python -m data_process.run conversations --name sharegpt --raw data/raw/sharegpt --engine processes

Clean rows go to data/clean/<set>/{train,val,test}-00000.jsonl with counts.json beside them: what was
dropped, why, and examples. Token files go to data/tokens/<tokenizer>/<set>/. A second run with
nothing changed does nothing; a run that was killed is started again with the same command. A set
is replaced only when the new one is whole.
"""  # noqa: E501

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from babyllama.cli import from_repo, parse, run, shown
from babyllama.errors import ConfigError, DataError
from babyllama.rows import check_row, texts_of
from data_process.clean import fix, reason_to_drop, texts
from data_process.dedup import Seen
from data_process.executor import Job, file_key, run_shards, write_whole
from data_process.packages import package_dir
from data_process.pretokenize import PretokenizeConfig, pretokenize_shard
from data_process.raw import Skip, data_files
from data_process.registry import GROUPS, DataSet, data_sets
from data_process.split import SPLITS, Splitter
from tokenizer import Tokenizer

SHARD_CHARS = 20_000_000  # about 60 MB of rows: half a minute of work for one process
N_EXAMPLES = 10


@dataclass(frozen=True)
class ProcessConfig:
    """Settings of data_process.run.

    Args:
        dataset: sample, inews, inews_title, smalltalk, csl, text, conversations or instruction
        name: what the set is called, if not as its reader
        raw: directory or file with the raw data (default data/raw/<set>)
        out: root of clean/ and tokens/
        tokenizer: a SentencePiece .model; with it token files are made too
        engine: serial, or processes for several at once
        workers: number of processes
        max_bad: the share of damaged lines above which the set is refused
        encoding: of the raw files
    """

    dataset: str = ""
    name: str | None = None
    raw: Path | None = None
    out: Path = Path("data")
    tokenizer: Path | None = None
    engine: Literal["serial", "processes"] = "serial"
    workers: int = 2
    max_bad: float = 0.01
    encoding: str = "utf-8-sig"


class Tally:
    """Counts of one set: rows in, fixed, dropped by reason with examples, and rows out."""

    def __init__(self) -> None:
        self.n_in = self.chars_in = self.n_broken = 0
        self.fixed: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self.broken: list[str] = []

    def drop(self, reason: str, where: str, sample: str) -> None:
        self.dropped[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < N_EXAMPLES:
            examples.append(f"{where}: {sample[:80]}")

    def skip(self, skip: Skip) -> None:
        self.drop(skip.reason, skip.where, skip.sample)
        if skip.broken:
            self.n_broken += 1
            if len(self.broken) < 5:
                self.broken.append(f"{skip.where} {skip.reason}")


def clean_rows(
    items: Iterable[dict | Skip], data_set: DataSet, tally: Tally
) -> Iterator[tuple[str, dict]]:
    """(split, canonical row) for every row that is kept; everything else is counted.

    Duplicates go before the rules, so that two sets made of the same articles under different
    rules agree on which copy of an article counts.
    """
    seen, splitter = Seen(), Splitter(data_set.shares)
    for item in items:
        tally.n_in += 1
        if isinstance(item, Skip):
            tally.skip(item)
            continue
        official = item.pop("split", None)
        row = item | {"id": f"{data_set.ids}/{item['id']}"}
        tally.chars_in += sum(map(len, texts(row)))
        row, changed = fix(row, data_set.rules)
        tally.fixed.update(changed)
        reason = "duplicate" if seen.repeats(row) else None
        # The publisher's held-out rows stay as they are, or scores could not be compared.
        if not reason and official not in ("val", "test"):
            reason = reason_to_drop(row, data_set.rules)
        if not reason:
            row = data_set.finish(row)
            reason = check_row(row)
        if reason:
            tally.drop(reason, row["id"], " | ".join(texts(row)))
        else:
            yield splitter.split(row["id"], official), row


class RowShards:
    """Writes rows to <split>-00000.jsonl, -00001 … in a directory."""

    def __init__(self, directory: Path, shard_chars: int = SHARD_CHARS) -> None:
        self._directory, self._shard_chars = directory, shard_chars
        self._files: dict = {}
        self.counts = {split: Counter(rows=0, chars=0, shards=0) for split in SPLITS}
        self._room = dict.fromkeys(SPLITS, 0)

    def __enter__(self) -> "RowShards":
        return self

    def __exit__(self, *_: object) -> None:
        for split in list(self._files):
            self._close(split)

    def add(self, split: str, row: dict) -> None:
        n_chars = sum(map(len, texts_of(row)))
        if self._room[split] <= 0:
            self._open_next(split)
        self._files[split].write(json.dumps(row, ensure_ascii=False) + "\n")
        self._room[split] -= n_chars
        self.counts[split].update(rows=1, chars=n_chars)

    def _open_next(self, split: str) -> None:
        self._close(split)
        path = self._directory / f"{split}-{self.counts[split]['shards']:05d}.jsonl"
        self._files[split] = open(path, "w", encoding="utf-8", newline="\n")  # noqa: SIM115
        self.counts[split]["shards"] += 1
        self._room[split] = self._shard_chars

    def _close(self, split: str) -> None:
        if file := self._files.pop(split, None):
            with file:
                file.flush()
                os.fsync(file.fileno())


def raw_place(data_set: DataSet, cfg: ProcessConfig) -> Path:
    """Where the raw files of a set lie.

    raises: DataError that says where to get them
    """
    if data_set.package and not cfg.raw:
        return package_dir(*data_set.package)
    if cfg.raw:
        inside = data_set.reader if cfg.dataset in GROUPS else ""
        place = from_repo(cfg.raw) / inside if inside else from_repo(cfg.raw)
    else:
        place = from_repo(Path("data/raw") / data_set.name)
    if not place.exists():
        raise DataError(
            f"wanted the raw files of {data_set.name} in {shown(place)}, found no such place; "
            f"get them ({data_set.source}) and put them there, or say where they are with --raw"
        )
    return place


def inputs_key(data_set: DataSet, place: Path, cfg: ProcessConfig) -> str:
    """Changes when the raw files, the settings or the code of this package do."""
    here = Path(__file__).parent
    code = [path.read_bytes() for path in sorted(here.rglob("*.py"))]
    stats = [(str(path), path.stat()) for path in data_files(place)]
    files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    settings = [data_set.name, data_set.reader, cfg.encoding, cfg.max_bad, files]
    return hashlib.sha256(json.dumps(settings).encode() + b"".join(code)).hexdigest()


def make_clean(data_set: DataSet, cfg: ProcessConfig) -> tuple[dict, bool]:
    """The content of counts.json once the clean rows stand; and whether they stood before."""
    place = raw_place(data_set, cfg)
    key = inputs_key(data_set, place, cfg)
    target = from_repo(cfg.out) / "clean" / data_set.name
    _finish_swap(target)
    old = _old_counts(target, key)
    if old:
        return old, True
    fresh = target.with_name(f"tmp-{data_set.name}")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    tally = Tally()
    try:
        items = tqdm(
            data_set.read(place, cfg.encoding), desc=data_set.name, unit=" rows", disable=None
        )
        with RowShards(fresh) as shards:
            for split, row in clean_rows(items, data_set, tally):
                shards.add(split, row)
        _refuse_damaged(data_set, place, tally, shards, cfg.max_bad)
        counts = _counts(data_set, key, tally, shards)
        write_whole(fresh / "counts.json", json.dumps(counts, ensure_ascii=False, indent=1) + "\n")
        _swap(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return counts, False


def _old_counts(target: Path, key: str) -> dict | None:
    try:
        counts = json.loads((target / "counts.json").read_text(encoding="utf-8"))
        names = [f"{s}-{n:05d}.jsonl" for s in SPLITS for n in range(counts["parts"][s]["shards"])]
        whole = counts["key"] == key and all((target / name).is_file() for name in names)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return counts if whole else None


def _swap(fresh: Path, target: Path) -> None:
    """Put a finished directory in the place of an old one, with no moment without either."""
    old = target.with_name(f"old-{target.name}")
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _finish_swap(target: Path) -> None:
    """Undo or clear away what a run left that was killed between the two renames."""
    old = target.with_name(f"old-{target.name}")
    if old.exists() and not target.exists():
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _refuse_damaged(
    data_set: DataSet, place: Path, tally: Tally, shards: RowShards, max_bad: float
) -> None:
    if tally.n_broken > max_bad * tally.n_in:
        raise DataError(
            f"{shown(place)}: wanted at most {max_bad:.2%} damaged lines for {data_set.name}, "
            f"found {tally.n_broken} of {tally.n_in}: {'; '.join(tally.broken)}; "
            f"download the files again, or accept the loss with a larger --max_bad"
        )
    if not any(count["rows"] for count in shards.counts.values()):
        reasons = ", ".join(f"{name} {n}" for name, n in tally.dropped.most_common())
        raise DataError(
            f"{shown(place)}: wanted rows for {data_set.name}, found none that can be kept among "
            f"{tally.n_in} ({reasons or 'the files are empty'}); look at the files, "
            f"or choose another reader"
        )


def _counts(data_set: DataSet, key: str, tally: Tally, shards: RowShards) -> dict:
    return {
        "set": data_set.name,
        "kind": data_set.kind,
        "source": data_set.source,
        "license": data_set.license,
        "rows_in": tally.n_in,
        "chars_in": tally.chars_in,
        "rows_out": sum(count["rows"] for count in shards.counts.values()),
        "chars_out": sum(count["chars"] for count in shards.counts.values()),
        "parts": shards.counts,
        "fixed": dict(tally.fixed.most_common()),
        "dropped": {
            reason: {"rows": n, "examples": tally.examples[reason]}
            for reason, n in tally.dropped.most_common()
        },
        "key": key,
    }


def make_tokens(data_set: DataSet, tokenizer: Tokenizer, cfg: ProcessConfig) -> dict[str, int]:
    """Token files of a set whose clean rows stand; the number of tokens of each part."""
    source = from_repo(cfg.out) / "clean" / data_set.name
    target = from_repo(cfg.out) / "tokens" / tokenizer.path.stem / data_set.name
    if data_set.kind != "text":
        tokenizer.require_dialogue()
    code = Path(__file__).with_name("pretokenize.py").read_text(encoding="utf-8")
    jobs = [
        Job(path, target / path.stem, (".bin", ".idx"), file_key(path, tokenizer.fingerprint, code))
        for path in sorted(source.glob("*-*.jsonl"))
    ]
    target.mkdir(parents=True, exist_ok=True)
    counts = run_shards(
        pretokenize_shard,
        jobs,
        PretokenizeConfig(tokenizer.path, data_set.kind),
        cfg.engine,
        cfg.workers,
        lambda done, n: tqdm(done, f"{data_set.name} → ids", n, unit=" shards", disable=None),
    )
    kept = {job.target.name for job in jobs}
    for path in target.iterdir():
        if path.stem not in kept:
            path.unlink()
    tokens: Counter[str] = Counter()
    for job, count in zip(jobs, counts, strict=True):
        tokens[job.target.name.rsplit("-", 1)[0]] += count["tokens"]
    return tokens


def table(made: list[tuple[dict, dict[str, int] | None]]) -> str:
    """The counts of all sets, as the user sees them at the end."""
    lines = [f"{'set':<14} {'part':<6} {'rows':>10} {'characters':>13} {'tokens':>13}"]
    for counts, tokens in made:
        for part in SPLITS:
            n = counts["parts"][part]
            ids = f"{tokens.get(part, 0):,}" if tokens is not None else "-"
            if n["rows"]:
                lines.append(
                    f"{counts['set']:<14} {part:<6} {n['rows']:>10,} {n['chars']:>13,} {ids:>13}"
                )
        n_dropped = counts["rows_in"] - counts["rows_out"]
        reasons = ", ".join(f"{name} {n['rows']:,}" for name, n in counts["dropped"].items())
        lines.append(
            f"{'':<14} {n_dropped:,} of {counts['rows_in']:,} rows dropped"
            + (f": {reasons}" if reasons else "")
        )
    return "\n".join(lines)


def check(cfg: ProcessConfig) -> None:
    """Refuse settings that cannot work, before anything is read."""
    if cfg.workers < 1 or not 0 <= cfg.max_bad <= 1:
        raise ConfigError(
            f"wanted --workers of 1 or more and --max_bad from 0 to 1, found {cfg.workers} and "
            f"{cfg.max_bad}"
        )
    try:
        "".encode(cfg.encoding)
    except LookupError:
        raise ConfigError(
            f"wanted a text encoding, found --encoding {cfg.encoding!r}; "
            f"usual ones are utf-8-sig, gb18030, utf-16"
        ) from None


def main(cfg: ProcessConfig) -> None:
    """Make every set behind the name, then print the table."""
    check(cfg)
    sets = data_sets(cfg.dataset, cfg.name)
    tokenizer = Tokenizer(from_repo(cfg.tokenizer)) if cfg.tokenizer else None
    made = []
    for data_set in sets:
        counts, stood = make_clean(data_set, cfg)
        if stood:
            print(f"{data_set.name}: nothing has changed, the clean rows are used again")
        made.append((counts, make_tokens(data_set, tokenizer, cfg) if tokenizer else None))
    print(table(made))


if __name__ == "__main__":
    run(main, parse(ProcessConfig, doc=__doc__, positional=("dataset",)))
