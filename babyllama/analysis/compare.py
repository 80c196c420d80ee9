"""Several runs side by side: what their configs differ in, and what each came to.

python -m babyllama.analysis.compare out/a out/b
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pandas

from babyllama.config import from_repo, parse, run, shown
from babyllama.errors import ConfigError
from babyllama.log import read_metrics
from babyllama.run_dir import read_config
from babyllama.scoring.tables import table


@dataclass(frozen=True)
class CompareConfig:
    """Runs to compare.

    Args:
        runs: directories of runs, each with its metrics.jsonl and config.yaml
    """

    runs: tuple[Path, ...] = ()


def compared(configs: dict[str, dict], results: dict[str, dict]) -> str:
    """The settings that are not the same in all runs, and the last figures, as a table.

    configs: by run; results: figures by run
    """
    flat = {run: pandas.json_normalize(config).T[0] for run, config in configs.items()}
    settings = pandas.concat(flat, axis=1).map(json.dumps, na_action="ignore", ensure_ascii=False)
    settings = settings.fillna("-")
    rows = pandas.concat([settings[settings.nunique(axis=1) > 1], pandas.DataFrame(results)])
    return table([["", *configs], *rows.fillna("-").reset_index().to_numpy().tolist()])


def last_figures(records: list[dict]) -> dict[str, str]:
    """What a run came to: its last and its best validation, and its speed."""
    val = [record for record in records if record["kind"] == "val"]
    train = [record for record in records if record["kind"] == "train"]
    figures = {}
    if val:
        best = min(val, key=lambda record: record["loss"])
        figures["val loss, last"] = f"{val[-1]['loss']:.4f} (step {val[-1]['step']})"
        figures["val loss, best"] = f"{best['loss']:.4f} (step {best['step']})"
        if "bpb" in val[-1]:
            figures["bits per byte"] = f"{val[-1]['bpb']:.4f}"
    if train:
        rates = sorted(record["tokens_per_s"] for record in train)
        figures["tokens seen"] = f"{train[-1]['tokens']:,}"
        figures["tokens/s, median"] = f"{rates[len(rates) // 2]:,.0f}"
    return figures


def main(cfg: CompareConfig) -> None:
    """Print the table."""
    if len(cfg.runs) < 2:
        raise ConfigError(
            "wanted two runs or more: python -m babyllama.analysis.compare out/a out/b"
        )
    results, configs = {}, {}
    for given in cfg.runs:
        path = from_repo(given)
        name, records = shown(path.resolve()), read_metrics(path)
        if not records or not (path / "config.yaml").is_file():
            raise ConfigError(
                f"{shown(path)}: wanted the directory of a run with metrics.jsonl and config.yaml"
            )
        results[name] = last_figures(records)
        configs[name] = read_config(path / "config.yaml")
    print(compared(configs, results))


if __name__ == "__main__":
    run(main, parse(CompareConfig, __doc__, positional=("runs",)))
