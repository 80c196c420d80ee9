"""The report of a checkpoint: card.md and card.json.

A row says what the number is worth: its interval, what chance and the most frequent answer give,
how many questions there were, and how many of them stood in the training rows.
"""

import shutil
import subprocess
from pathlib import Path

from babyllama.config import REPO
from babyllama.scoring.test_sets import write_json

HEAD = ("任务 task", "分数 score", "95 %", "随机 chance", "常答 constant", "题数 n", "例 shots",
        "语言 rows / prompt", "污染 leaked", "结论 verdict")  # fmt: skip


def markdown(card: dict) -> str:
    """The card as a page of Markdown."""
    model, about, is_whole = card["model"], card["about"], not card["training"]["missing"]
    table = [HEAD, ["---"] * len(HEAD), *(cells(report, is_whole) for report in card["tasks"])]
    lines = [
        f"# {card['checkpoint']}",
        "",
        f"{model['n_parameters']:,} parameters, step {model['step']} ({model['kind']}), context "
        f"{model['context']}; lm-evaluation-harness {about['harness']}, prompts: "
        f"{about['prompts']}, {about['form']}; {about['commit']}",
        "",
        *(f"| {' | '.join(row)} |" for row in table),
        "",
        *notes(card),
        "",
    ]
    return "\n".join(lines)


def commit() -> str:
    """The commit of this copy of the project, for reports; a copy without git has none."""
    if not shutil.which("git"):
        return "no commit"
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    return f"commit {done.stdout.strip()}" if done.returncode == 0 else "no commit"


def cells(report: dict, is_whole: bool = True) -> list[str]:
    """One line of the table.

    is_whole: all training rows were looked through; else the count of leaks is a lower bound
    """
    p = "{:.1%}".format
    n = f"{report['n']:,}" + (f" / {report['n_all']:,}" if report["n"] < report["n_all"] else "")
    shots = str(report["shots"])
    if report["mean_shots"] < report["shots"]:
        shots += f" ({report['mean_shots']:.1f} fit)"
    leaked = report["leaked"]
    return [
        f"{report['title']} ({report['metric']})",
        p(report["score"]),
        f"{p(report['low'])} – {p(report['high'])}",
        p(report["chance"]),
        p(report["constant"]),
        n,
        shots,
        f"{report['language']} / {report['prompt_language']}",
        "?" if leaked is None else f"{leaked:,}" if is_whole else f"≥ {leaked:,}",
        report["verdict"],
    ]


def notes(card: dict) -> list[str]:
    """What must be known beside the table."""
    found = [
        "chance: blind choice among the options. constant: the most frequent answer, said every "
        "time. 95 %: Wilson's interval, or a bootstrap where scores are shares.",
    ]
    training = card["training"]
    if training["missing"]:
        found.append(f"leaked: not known for {', '.join(training['missing'])}, whose rows are not "
                     f"here; looked up in {len(training['files'])} files.")  # fmt: skip
    else:
        found.append(f"leaked: questions of which half stands in the training rows "
                     f"({len(training['files'])} files).")  # fmt: skip
    for report in card["tasks"]:
        name, own = report["title"], []
        if report["n_cut"]:
            own.append(f"{report['n_cut']:,} questions are longer than the context and were cut")
        if report["metric"] == "acc_norm":
            raw = report["other_metrics"]["acc"]
            own.append(f"by length; acc, the likelihood as it is: {raw:.1%}")
        if report["left_out"]:
            counts = ", ".join(f"{n:,} {why}" for why, n in report["left_out"].items())
            own.append(f"entries that make no question: {counts}")
        if report["own_shots"]:
            own.append("examples are other rows of the scored part, for lack of another")
        if report.get("programs"):
            counts = ", ".join(f"{n} {why}" for why, n in report["programs"].items())
            own.append(f"programs: {counts}")
        if own:
            found.append(f"{name}: {'; '.join(own)}.")
    found += [f"{name} was not run: {why}" for name, why in card["skipped"].items()]
    return [f"- {line}" for line in found]


def write(card: dict, out: Path) -> list[Path]:
    """Write both files; returns them."""
    paths = [out / "card.md", out / "card.json"]
    paths[0].write_text(markdown(card), "utf-8")
    write_json(paths[1], card)
    return paths
