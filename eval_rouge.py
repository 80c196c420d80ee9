"""Summarise a test set in batches; score the titles by every protocol beside what copying scores.

    python eval_rouge.py                                     newest SFT run, headlines of iNews
    python eval_rouge.py out/csl out/wiki --dataset csl --split dev
    python eval_rouge.py out/csl --data data/raw/csl/ts/test.tsv --limit 100
    python eval_rouge.py out/csl --dataset csl --decoding greedy,beam,top_p,consensus
    python eval_rouge.py out/csl --dataset csl --wordings --follow-up
    python eval_rouge.py out/chat out/csl_titles.jsonl --dataset csl --report report.html
    python eval_rouge.py out/a out/b out/c --pool true --decoding consensus --n 64

A system is a checkpoint, or a file of titles that an earlier run has written. Greedy unless a
temperature or --decoding is given. --out gets the titles as JSON lines with the keys id, text,
reference and prediction; the scores stand beside it in <out>.scores.json, with all that is needed
to make them again. The measures and their traps: babyllama/scoring/rouge.py; published figures:
babyllama/scoring/tables.py.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from babyllama.checkpoint import Loaded
from babyllama.config import from_repo, parse, run, shown
from babyllama.device import Device, pick_device
from babyllama.errors import CheckpointError, ConfigError
from babyllama.generate import Weights
from babyllama.rows import write_rows
from babyllama.run_dir import beside, newest_run
from babyllama.sampling import SamplingConfig
from babyllama.scoring import probes, rouge, tables, test_sets
from babyllama.scoring.summarise import (
    Asking,
    System,
    Titles,
    all_titles,
    decodings,
    describe,
    open_systems,
    write_page,
    write_titles,
)
from babyllama.scoring.tables import SETS
from babyllama.scoring.test_sets import SummarySet


@dataclass(frozen=True)
class EvalConfig(SamplingConfig):
    """What is summarised, by which systems, and how.

    Args:
        systems: checkpoints (a run: its newest step) or files of titles; if absent the newest SFT
            run in out/. Differences are those of the first two
        base: one more system, usually the checkpoint before SFT
        dataset: a set; its data/clean/<dataset>/<split>-*.jsonl are read; if absent inews_title
        split: which part of the set; dev is the one that data_process calls val
        data: a file or folder instead: summary rows (.jsonl), CSL's TSV, csl_title_public's or
            LCSTS' JSON lines
        published: whose figures stand beside: auto (as the file's layout says), none,
            csl_title_public, csl_ts, lcsts
        out: file for the titles; if absent in the first checkpoint's run
        report: an HTML page with the titles of the first two systems side by side
        limit: only so many rows, the first
        decoding: ways to decode, each a line of the table: greedy, beam, top_p, consensus (of n
            replies the one most like the others); if absent the one that the settings describe
        wordings: also ask in the wordings that training never shows, first system only
        pool: all checkpoints are one system: the consensus of the replies of all, n of each
        follow_up: also ask about keywords, discipline and category, where the rows know them
        batch_size: replies written at once
        prompts: wordings; the `eval` question is asked
        device: auto, cpu, cuda or mps
        weights: auto, float32, or int8: a quarter of the bytes, on the cpu only, with a C compiler
        n: replies to each text, of which the consensus is taken
    """

    systems: tuple[Path, ...] = ()
    base: Path | None = None
    dataset: str | None = None
    split: Literal["test", "dev"] = "test"
    data: Path | None = None
    published: str = "auto"
    out: Path | None = None
    report: Path | None = None
    limit: int | None = None
    decoding: str = ""
    wordings: bool = False
    pool: bool = False
    follow_up: bool = False
    batch_size: int = 32
    prompts: Path = Path("configs/prompts/summary_zh.yaml")
    device: Device = "auto"
    weights: Weights = "float32"
    max_new_tokens: int = 48
    temperature: float = 0.0
    seed: int | None = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, found {value}")
        if self.n > 1 and self.temperature == 0 and self.beams == 1 and not self.decoding:
            raise ConfigError(f"n {self.n}: greedy replies are all the same; add --temperature 0.8")

    def asking(self, sampling: SamplingConfig) -> Asking:
        return Asking(sampling, self.prompts, self.batch_size, self.weights)

    def ways(self) -> dict[str, SamplingConfig]:
        """The ways to decode, by name; "" for the one that the settings describe."""
        plain = {field.name: getattr(self, field.name) for field in fields(SamplingConfig)}
        return decodings(self.decoding, SamplingConfig(**plain))


def system_paths(cfg: EvalConfig) -> list[Path]:
    """The systems in order, the newest SFT run where none is named."""
    paths = [from_repo(path) for path in (*cfg.systems, *([cfg.base] if cfg.base else []))]
    if not cfg.systems:
        newest = newest_run(kind="sft")
        if newest is None:
            raise CheckpointError(
                "wanted a checkpoint, found no SFT run in out/; make one with `python sft.py`, or "
                "name one: python eval_rouge.py CHECKPOINT"
            )
        paths = [newest, *paths]
    return paths


def choose_out(cfg: EvalConfig, places: Sequence[Path], found: SummarySet) -> Path:
    """Where the titles go; refuses at the start what would fail after the last title."""
    name = Path(found.name).stem if cfg.data else f"{found.name}-{cfg.split}"
    name += f"-{cfg.limit}" if cfg.limit else ""
    first = places[0]
    usual = beside(first) / f"rouge-{name}-{first.name}.jsonl"
    if test_sets.is_predictions(first):
        usual = first.with_name(f"{first.stem}-compared.jsonl")
    out = from_repo(cfg.out or usual)
    taken = [path.resolve() for path in (*found.files, *places)]
    if out.is_dir() or out.resolve() in taken:
        raise ConfigError(f"--out {shown(out)} is a directory or the data; name a new .jsonl file")
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def samples(columns: dict[str, Sequence[str]], n: int = 5) -> str:
    """A few rows, spread evenly over the set: what belongs together stands in one block."""
    n_rows = len(columns["text"])
    chosen = sorted({i * (n_rows - 1) // (n - 1) for i in range(n)})
    width = max(map(len, columns)) + 2
    return "\n\n".join(
        "\n".join(f"{name:<{width}}{' '.join(c[i].split())[:60]}" for name, c in columns.items())
        for i in chosen
    )


def about(
    cfg: EvalConfig, found: SummarySet, systems: dict[str, System], made: dict[str, Titles]
) -> dict:
    """What must be known to make the scores again."""
    return {
        "set": found.name,
        "split": None if cfg.data else cfg.split,
        "data_sha256": found.sha256,
        "n": len(found.rows),
        "models": describe(systems),
        "decoding": {way or "settings": asdict(sampling) for way, sampling in cfg.ways().items()},
        "pool": cfg.pool,
        "weights": cfg.weights,
        "batch_size": cfg.batch_size,
        "prompts": str(cfg.prompts),
        "prompts_sha256": hashlib.sha256(from_repo(cfg.prompts).read_bytes()).hexdigest(),
        "n_cut": {name: each.n_cut for name, each in made.items()},
        "n_framed": {name: each.n_framed for name, each in made.items()},
        "seconds": {name: each.seconds for name, each in made.items()},
    }


def more_questions(
    cfg: EvalConfig, loaded: Loaded, found: SummarySet, usual: Titles, result: dict
) -> Iterator[str]:
    """Tables of what else is asked of the first system; their figures are added to the result."""
    how = cfg.asking(next(iter(cfg.ways().values())))
    if cfg.wordings:
        texts, references = found.column("text"), found.column("summary")
        result["by_wording"] = probes.by_wording(loaded, texts, references, how, usual)
        yield probes.wording_table(result["by_wording"])
    if cfg.follow_up:
        asked = probes.ask_follow_ups(loaded, found.rows, usual.titles, how)
        result["follow_up"] = {each.name: probes.scores(each, found.rows) for each in asked}
        yield probes.follow_up_table(asked, found.rows)


def require_sense(cfg: EvalConfig, paths: Sequence[Path], files: Sequence[Path]) -> None:
    """Refuse at the start what has nothing to work on.

    raises: ConfigError
    """
    n_checkpoints = len(paths) - len(files)
    if cfg.pool and (n_checkpoints < 2 or any(way.n < 2 for way in cfg.ways().values())):
        raise ConfigError(
            f"--pool takes the consensus of several checkpoints: wanted two or more, and several "
            f"replies of each, found {n_checkpoints} and {', '.join(cfg.ways()) or 'the settings'};"
            f" add --decoding consensus --n 64"
        )
    if cfg.pool and (cfg.wordings or cfg.follow_up):
        raise ConfigError("--wordings and --follow-up ask one checkpoint; leave out --pool")
    n_systems = len(files) + (1 if cfg.pool else n_checkpoints) * len(cfg.ways())
    if cfg.report and n_systems < 2:
        raise ConfigError(
            "--report sets two systems side by side, found one; name a second checkpoint or file "
            "of titles, or two ways to decode: --decoding greedy,beam"
        )
    if (cfg.wordings or cfg.follow_up) and paths[0] in files:
        raise ConfigError(
            f"--wordings and --follow-up ask the first system, but {shown(paths[0])} is a file of "
            f"titles; name a checkpoint first"
        )


def main(cfg: EvalConfig) -> None:
    """Read, summarise, score, compare, print, write."""
    paths = system_paths(cfg)
    files = [path for path in paths if test_sets.is_predictions(path)]
    require_sense(cfg, paths, files)
    if len(files) == len(paths) and not (cfg.data or cfg.dataset):
        found = test_sets.set_of_predictions(files[0], cfg.limit)
    else:
        found = test_sets.open_set(cfg.data, cfg.dataset or "inews_title", cfg.split, cfg.limit)
    published = test_sets.choose_published(cfg.published, found, list(SETS))
    systems = open_systems(paths, pick_device(cfg.device))
    opened = list(systems.values())
    out = choose_out(cfg, [getattr(each, "path", each) for each in opened], found)
    made = all_titles(systems, found, {w: cfg.asking(how) for w, how in cfg.ways().items()},
                      cfg.pool)  # fmt: skip

    result = about(cfg, found, systems, made) | {"published": published}
    texts, references = found.column("text"), found.column("summary")
    titles = {name: each.titles for name, each in made.items()}
    others = rouge.copies(texts, references) | test_sets.stored_outputs(found)
    measured = {n: tables.measure(each, references) for n, each in (titles | others).items()}
    natures = {n: tables.nature(each, texts) for n, each in (titles | others).items()}
    scores = {name: tables.summary(each) | natures[name] for name, each in measured.items()}
    natures["the references"] = tables.nature(references, texts)
    result |= {"scores_x100": scores, "references": natures["the references"]}
    timed = {name: each.seconds for name, each in made.items() if each.seconds}
    for name in timed:
        print(f"{name}: {made[name].n_cut} of {len(texts)} texts cut to fit, "
              f"{made[name].n_framed} answers with a lead-in, which was taken off")  # fmt: skip
    print(f"{found.name}: {len(texts)} texts; {test_sets.known_as(published)}\n")
    print(tables.score_table(scores, SETS.get(published, ())), end="\n\n")
    print(tables.nature_table(natures, timed), end="\n\n")
    if len(titles) > 1:
        a, b = list(titles)[:2]
        result["differences"] = tables.differences(measured[a], measured[b])
        compared = tables.difference_table(result["differences"], (a, b))
        print(compared, end="\n\n")
    if isinstance(opened[0], Loaded):
        first = next(iter(made.values()))
        for table in more_questions(cfg, opened[0], found, first, result):
            print(table, end="\n\n")
    print(samples({"text": texts, "reference": references} | titles), end="\n\n")
    for name, place in write_titles(out, found, systems, made).items():
        print(f"titles of {name}: {shown(place)}")
    write_rows(out.with_suffix(".scores.json"), [result])
    print(f"scores: {shown(out.with_suffix('.scores.json'))}")
    if cfg.report:
        write_page(from_repo(cfg.report), found, titles, measured, compared)
        print(f"report: {shown(from_repo(cfg.report))}")


if __name__ == "__main__":
    run(main, parse(EvalConfig, __doc__, positional=["systems"]))
