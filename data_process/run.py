"""Make data sets: read, clean, de-duplicate, decontaminate, split, and turn into token files.

    python -m data_process.run sample
    python -m data_process.run sample --tokenizer data/tokenizers/sample.model
    python -m data_process.run csl --raw ~/downloads/CSL/benchmark/ts
    python -m data_process.run conversations --name sharegpt --raw data/raw/sharegpt --engine processes
    python -m data_process.run wiki --evaluation '[data/raw/cmrc2018/cmrc2018_dev.json]'
    python -m data_process.run wiki --index             and a full-text index, for chat and server
    python -m data_process.run --config configs/mix/text.yaml --raw data/raw --tokenizer FILE

Clean rows go to data/clean/<set>/{train,val,test}-00000.jsonl with counts.json beside them: what each
stage dropped, why, and examples. Token files go to data/tokens/<tokenizer>/<set>/, a mixture to
data/mixtures/, an index to data/index/<set>/. A second run with nothing changed does nothing; a run that was killed is started
again with the same command. A set is replaced only when the new one is whole.
"""  # noqa: E501

import json
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from babyllama.config import from_repo, lock, parse, run, shown
from babyllama.errors import ConfigError
from babyllama.retrieval.index import build
from data_process.clean import check_names
from data_process.executor import Job, key_of, write_whole
from data_process.pipeline import ProcessConfig, RawSet, make_clean, raw_place, run_sets
from data_process.pretokenize import PretokenizeConfig, pretokenize_shard
from data_process.registry import GROUPS, DataSet, catalog, check_chosen, data_sets
from data_process.stages import SPLITS
from tokenizer import Tokenizer


def check(cfg: ProcessConfig) -> None:
    """Refuse settings that cannot work, before anything is read."""
    odd_dedup = cfg.dedup is not None and not 0 < cfg.dedup <= 1
    if cfg.workers < 1 or not 0 <= cfg.max_bad <= 1 or odd_dedup:
        raise ConfigError(
            f"wanted --workers of 1 or more, --max_bad from 0 to 1 and --dedup above 0 and up to "
            f"1, or null, found {cfg.workers}, {cfg.max_bad} and {cfg.dedup}"
        )
    if bool(cfg.dataset) == bool(cfg.sets):
        raise ConfigError(
            "wanted the name of a data set, or a --config with `sets`, and not both; "
            "python -m data_process.tools.list shows the names"
        )
    check_names(cfg.skip_rules)
    check_chosen(cfg.columns, cfg.roles)
    for path in cfg.evaluation:
        if not from_repo(path).exists():
            raise ConfigError(f"--evaluation: wanted a file, found no {path}")
    try:
        "".encode(cfg.encoding)
    except LookupError:
        raise ConfigError(
            f"wanted a text encoding, found --encoding {cfg.encoding!r}; "
            f"usual ones are utf-8-sig, gb18030, utf-16"
        ) from None


def chosen(cfg: ProcessConfig) -> list[RawSet]:
    """The sets that the settings name, each with its raw files' place."""
    if not cfg.sets:
        inside = cfg.raw if cfg.raw and cfg.dataset in GROUPS else None
        return [
            RawSet(one, raw_place(one, inside / one.entry if inside else cfg.raw),
                   cfg.official, cfg.columns, cfg.roles)
            for one in data_sets(cfg.dataset, cfg.name)
        ]  # fmt: skip
    found = []
    for one in cfg.sets:
        (data_set,) = data_sets(one.reader, one.name)
        place = (cfg.raw or Path("data/raw")) / (one.raw or data_set.name)
        if one.raw and not from_repo(place).exists() and from_repo(one.raw).exists():
            place = one.raw
        place = raw_place(data_set, None if data_set.package else place)
        found.append(RawSet(data_set, place, one.official))
    names = Counter(raw_set.data_set.name for raw_set in found)
    if twice := [name for name, n in names.items() if n > 1]:
        raise ConfigError(f"sets: wanted different names, found {twice} twice; give them a `name`")
    return found


def made_before(cfg: ProcessConfig) -> tuple[DataSet, dict] | None:
    """A set of the user's own name whose clean rows stand, with its counts: its raw files need
    not be named again to make token files or an index of it."""
    place = from_repo(cfg.out) / "clean" / cfg.dataset / "counts.json"
    if cfg.sets or cfg.raw or cfg.dataset in (*catalog(), *GROUPS) or not place.is_file():
        return None
    counts = json.loads(place.read_text("utf-8"))
    return data_sets(counts["reader"], cfg.dataset)[0], counts


def make_tokens(
    sets: list[DataSet], tokenizer: Tokenizer, cfg: ProcessConfig
) -> dict[str, Counter[str]]:
    """Token files of sets whose clean rows stand; for each, the number of tokens of its parts."""
    if any(data_set.kind != "text" for data_set in sets):
        tokenizer.require_dialogue()
    code = Path(__file__).with_name("pretokenize.py")
    root = from_repo(cfg.out)
    jobs: dict[str, list[Job]] = {}
    for data_set in sets:
        settings = PretokenizeConfig(tokenizer.path, data_set.kind)
        target = root / "tokens" / tokenizer.name / data_set.name
        target.mkdir(parents=True, exist_ok=True)
        source = root / "clean" / data_set.name
        jobs[data_set.name] = its_jobs = []
        for path in sorted(source.glob("*-*.jsonl")):
            key = key_of(source / "counts.json", path.stat().st_size, tokenizer.fingerprint, code)
            its_jobs.append(Job(path, target / path.stem, key, settings))
    tokens: dict[str, Counter[str]] = {}
    for name, done in run_sets(pretokenize_shard, jobs, cfg, "turn into ids").items():
        tokens[name] = Counter()
        for job, counts in done:
            tokens[name][job.target.name.rsplit("-", 1)[0]] += counts["tokens"]
        kept = {job.target for job, _ in done}
        for path in (root / "tokens" / tokenizer.name / name).iterdir():
            if path.with_suffix("") not in kept:
                path.unlink()
    return tokens


def write_mixture(cfg: ProcessConfig, sets: list[DataSet], tokenizer: Tokenizer) -> Path:
    """The file that pretrain.py or sft.py take with --config: where the sets lie, and weights."""
    root = from_repo(cfg.out)
    sources = [
        {"name": shown(root / "tokens" / tokenizer.name / data_set.name), "weight": one.weight}
        for data_set, one in zip(sets, cfg.sets, strict=True)
    ]
    is_text = all(data_set.kind == "text" for data_set in sets)
    content: dict[str, Any] = {"name": cfg.mixture}
    content |= {"tokenizer": shown(tokenizer.path)} if is_text else {}
    content |= {"data": {"sources": sources}}
    path = root / "mixtures" / f"{cfg.mixture}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = f"# python {'pretrain.py' if is_text else 'sft.py'} --config {shown(path)}\n"
    write_whole(path, head + yaml.safe_dump(content, allow_unicode=True, sort_keys=False))
    return path


def make_index(data_set: DataSet, cfg: ProcessConfig) -> str:
    """A full-text index of a set whose clean rows stand; returns what to say about it."""
    root = from_repo(cfg.out)
    rows = sorted((root / "clean" / data_set.name).glob("*-*.jsonl"))
    place = root / "index" / data_set.name
    info = build(rows, place, data_set.name)
    size = sum(info["sizes"].values()) / 1e6
    found = f"{info['n_rows']:,} documents, {info['n_passages']:,} passages, {size:,.1f} MB"
    return f"index: {shown(place)}, {found}{', as it was' * ('unchanged' in info)}"


def table(made: list[tuple[dict, dict[str, int] | None]]) -> str:
    """The counts of all sets, as the user sees them at the end."""
    line = "{:<16} {:<6} {:>10} {:>13} {:>13}".format
    lines = [line("set", "part", "rows", "characters", "tokens")]
    totals: Counter[str] = Counter()
    for counts, tokens in made:
        for part in SPLITS:
            n = counts["parts"][part]
            ids = f"{tokens.get(part, 0):,}" if tokens is not None else "-"
            if n["rows"]:
                lines.append(line(counts["set"], part, f"{n['rows']:,}", f"{n['chars']:,}", ids))
        totals.update(counts["parts"]["train"], tokens=(tokens or {}).get("train", 0))
        n_dropped = counts["rows_in"] - counts["rows_out"]
        reasons = ", ".join(f"{name} {n['rows']:,}" for name, n in counts["dropped"].items())
        lines.append(
            f"{'':<17}{n_dropped:,} of {counts['rows_in']:,} rows dropped"
            + (f": {reasons}" if reasons else "")
        )
        lines += [f"{'':<16} {note}" for note in remarks(counts)]
    if len(made) > 1:
        ids = f"{totals['tokens']:,}" if totals["tokens"] else "-"
        lines.append(line("all", "train", f"{totals['rows']:,}", f"{totals['chars']:,}", ids))
    return "\n".join(lines)


def remarks(counts: dict) -> Iterator[str]:
    """What was not understood or not used of the raw files, each with an example."""
    for name, found in counts["dropped"].items():
        if "why" in found:
            yield f"{name}: {found['why']}"
    for column, seen in counts.get("unused", {}).items():
        role, name = seen.get("role"), shlex.quote(column)
        choice = f"; to take it instead: --columns.{role} {name}" if role else ""
        yield f"not used: {column} ({seen['rows']:,} rows, such as {seen['example']!r}{choice})"
    if names := counts.get("left_alone"):
        more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
        yield f"left alone: {', '.join(names[:5])}{more}"


def main(cfg: ProcessConfig) -> None:
    """Make every set that is named; one run at a time in each --out."""
    check(cfg)
    work = from_repo(cfg.out) / "work"
    work.mkdir(parents=True, exist_ok=True)
    with lock(work, "take another --out"):
        make(cfg)


def make(cfg: ProcessConfig) -> None:
    """Make every set that is named, then print the table; nobody else is at work in --out."""
    tokenizer = Tokenizer(from_repo(cfg.tokenizer)) if cfg.tokenizer else None
    standing = made_before(cfg)
    raw_sets = [] if standing else chosen(cfg)
    sets = [standing[0]] if standing else [raw_set.data_set for raw_set in raw_sets]
    if cfg.index and (others := [one.name for one in sets if one.kind != "text"]):
        raise ConfigError(f"--index wants sets of texts, found {', '.join(others)}; leave them out")
    made = [(standing[1], True)] if standing else make_clean(raw_sets, cfg)
    for counts, stood in made:
        if stood:
            print(f"{counts['set']}: nothing has changed, the clean rows are used again")
    for data_set in sets if cfg.index else ():
        print(make_index(data_set, cfg))
    tokens = make_tokens(sets, tokenizer, cfg) if tokenizer else {}
    print(table([(counts, tokens.get(counts["set"])) for counts, _ in made]))
    if cfg.mixture and tokenizer:
        print(f"mixture: {shown(write_mixture(cfg, sets, tokenizer))}")


if __name__ == "__main__":
    run(main, parse(ProcessConfig, doc=__doc__, positional=("dataset",)))
