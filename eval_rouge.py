"""Summarise a test set in batches; score the titles by every protocol beside what copying scores.

    python eval_rouge.py                                     newest SFT run, headlines of iNews
    python eval_rouge.py out/csl out/wiki --dataset csl --split dev
    python eval_rouge.py out/csl --data data/raw/csl/ts/test.tsv --limit 100
    python eval_rouge.py out/csl --dataset csl --decoding greedy,beam,top_p,best
    python eval_rouge.py out/csl --dataset csl --wordings
    python eval_rouge.py out/chat out/csl_titles.jsonl --dataset csl

A system is a checkpoint, or a file of titles that an earlier run has written. --decoding best is
the search behind every title that people see: of the best of a beam search the one most like the
others. --out gets the titles as JSON lines with the keys id, text, reference and prediction; the
scores stand beside it in <out>.scores.json, with all that is needed to make them again. Measures:
scoring/rouge.py; published figures: scoring/published.yaml.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from babyllama.config import from_repo, parse, plain, run, shown
from babyllama.rows import write_rows
from babyllama.sampling import alone
from babyllama.scoring import rouge, summarise, tables, test_sets
from babyllama.scoring.beams import BeamConfig
from babyllama.scoring.summarise import AskConfig, ReadyModel, decodings, summarise_all
from babyllama.scoring.tables import System
from babyllama.scoring.test_sets import SummarySet


@dataclass(frozen=True)
class EvalConfig(AskConfig):
    """Settings of an evaluation: texts, systems, decoding.

    Args:
        systems: checkpoints (a run: its newest step) or files of titles; if absent the newest SFT
            run in out/. Differences are those of the first two
        dataset: a set; its data/clean/<dataset>/<split>-*.jsonl are read; if absent inews_title
        split: which part of the set; dev is the one that data_process calls val
        data: a file or folder instead: summary rows (.jsonl), CSL's TSV, csl_title_public's or
            LCSTS' JSON lines
        out: file for the titles; if absent in the first checkpoint's run
        limit: only so many rows, the first
        max_seq_len: longest question with its answer, where it is less than the model's context; a
            model asks best for what is as long as what it was trained on (data.max_seq_len)
        decoding: ways to decode, each a line of the table: greedy, beam, top_p, best; if absent the
            one that the settings describe
        wordings: also ask in the wordings that training never shows, first system only
    """

    systems: tuple[Path, ...] = ()
    dataset: str | None = None
    split: Literal["test", "dev"] = "test"
    data: Path | None = None
    out: Path | None = None
    limit: int | None = None
    max_seq_len: int | None = None
    decoding: str = ""
    wordings: bool = False
    max_new_tokens: int = 48
    temperature: float = 0.0
    seed: int | None = 0


def evaluate(
    cfg: EvalConfig, found: SummarySet, lines: list[System], model: ReadyModel | None, result: dict
) -> Iterator[str]:
    """The tables, one after another; their figures are added to the result."""
    texts, references = found.column("text"), found.column("summary")
    others = rouge.copies(texts, references)
    scored = [*lines, *(System(name, titles) for name, titles in others.items())]
    for line in scored:
        line.score(texts, references)
    result["scores_x100"] = {line.name: line.summary() for line in scored}
    result["references"] = tables.nature(references, texts)
    published = tables.published_sets().get(found.published or "", ())
    yield tables.opening(found.name, len(texts), found.published, lines) + found.columns
    yield tables.score_table(scored, published)
    yield tables.nature_table(scored, result["references"])
    if len(lines) > 1:
        result["differences"] = tables.differences(*lines[:2])
        yield tables.difference_table(result["differences"], lines[0].name, lines[1].name)
    if cfg.wordings:
        assert model
        sampling = next(iter(decodings(cfg.decoding, alone(cfg, BeamConfig)).values()))
        result["by_wording"] = summarise.by_wording(
            model, texts, references, sampling, cfg, lines[0]
        )
        yield tables.wording_table(result["by_wording"])
    yield test_sets.samples(found, lines)


def main(cfg: EvalConfig) -> None:
    """Read, summarise, score, compare, print, write."""
    systems = test_sets.choose_systems(cfg.systems, cfg.wordings)
    ways = decodings(cfg.decoding, alone(cfg, BeamConfig))
    places = list(systems.values())
    found = test_sets.open_set(cfg.data, cfg.dataset, cfg.split, cfg.limit, places)
    out = test_sets.choose_out(cfg.out, places, found)
    lines, model = summarise_all(systems, found, ways, cfg, cfg.max_seq_len)
    result = {
        "set": found.name,
        "data_sha256": found.sha256,
        "n": len(found.rows),
        "published": found.published,
        "models": test_sets.describe(places),
        "settings": plain(cfg),
        "prompts_sha256": test_sets.sha256(from_repo(cfg.prompts)),
        "decoding": {way or "settings": asdict(how) for way, how in ways.items()},
    }
    for key in ("n_cut", "n_lead_ins", "seconds"):
        result[key] = {line.name: getattr(line, key) for line in lines}
    for block in evaluate(cfg, found, lines, model, result):
        print(block, end="\n\n")
    for line, place in test_sets.write_titles(out, found, lines):
        print(f"titles of {line.name}: {shown(place)}")
    write_rows(out.with_suffix(".scores.json"), [result])
    print(f"scores: {shown(out.with_suffix('.scores.json'))}")


if __name__ == "__main__":
    run(main, parse(EvalConfig, __doc__, positional=["systems"]))
