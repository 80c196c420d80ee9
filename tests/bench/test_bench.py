"""The benchmarks end to end on small rows of ours: prompts, likelihoods, scores, report.

The toy model is told what to say: its head is solved (least squares) so that a task's prompt is
followed by the right answer in some rows and a wrong one in the others. What the harness then
scores is known beforehand; a change of prompt, extraction or scoring shows at once.
"""

import json
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

from babyllama.checkpoint import Loaded, load_model
from babyllama.errors import ConfigError, DataError
from bench import contamination
from bench.harness import Scorer, Store, for_harness
from bench.run import cli, main
from bench.run_task import ask
from bench.sandbox import run as sandbox
from bench.tasks import FixedShots, Task, choose, harness_task, rows_of, tasks
from conftest import save_model, small_config
from data_process.vocabulary import train_vocabulary
from model import Transformer
from tokenizer import Tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures" / "bench"
FEW = 4  # rows of each task
LATER = ("gsm8k_zh", "mmmlu", "xquad")  # another vocabulary would move the pinned figures

# Of rows 0, 1, 2, 3 the toy model is taught all but 2.
TAUGHT = {
    "agieval": 3 / 4, "agieval_cloze_math": 1.0, "ape210k": 3 / 4, "bbh": 3 / 4, "belebele": 1.0,
    "boolq": 3 / 4, "c3": 2 / 3, "ceval": 3 / 4, "cmath": 3 / 4, "cmmlu": 3 / 4, "cmrc2018": 1.0,
    "commonsenseqa": 3 / 4, "gaokao": 3 / 4, "gsm8k": 3 / 4, "math": 3 / 4, "mgsm_zh": 3 / 4,
    "mmlu": 3 / 4, "naturalquestions": 3 / 4, "quac": 2 / 3, "triviaqa": 2 / 3,
    "gsm8k_zh": 3 / 4, "mmmlu_zh": 3 / 4, "xquad_zh": 2 / 3,
}  # fmt: skip
# Raw and by length, by a model of fixed random weights.
LIKELIHOOD = {
    "zhoblimp": (1 / 4, 1 / 4), "xwinograd_zh": (1 / 2, 1 / 2), "xcopa_zh": (1 / 2, 1 / 2),
    "xstorycloze_zh": (0.0, 1.0), "cmmlu_cloze": (1 / 4, 1 / 4), "ceval_cloze": (1 / 4, 1 / 4),
    "mmlu_cloze": (1 / 5, 2 / 5), "c3_cloze": (1 / 3, 1 / 3), "agieval_cloze": (1 / 2, 1 / 2),
    "belebele_cloze": (0.0, 0.0), "commonsenseqa_cloze": (2 / 5, 3 / 5),
    "mmmlu_zh_cloze": (1 / 4, 1 / 4),
}  # fmt: skip
WRONG = {"number": "答案是999999", "math": "\\boxed{999}", "exact": "nobody", "bbh": "neither",
         "cmrc": "别的", "shared_words": "别的", "code": "    return None\n"}  # fmt: skip


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Tokenizer:
    return learnt_vocabulary(tmp_path_factory.mktemp("bench"))


def learnt_vocabulary(place: Path) -> Tokenizer:
    """A vocabulary of 900, learnt from the fixtures and some words of the prompts."""
    paths = [p for p in FIXTURES.rglob("*.*") if p.is_file() and p.parent.name not in LATER]
    texts = [path.read_text("utf-8") for path in sorted(paths)]
    texts.append("以下是单项选择题，请直接写出正确选项的字母。" * 3)
    texts.append("问题：题目：资料：答案：解答：数学应用题" * 3)
    train_vocabulary(texts, place / "small.model", vocab_size=900)
    return Tokenizer(place / "small.model")


def fixed_model(vocab_size: int, **sizes: int) -> Transformer:
    """Weights that no release of torch changes, large enough for a context to matter."""
    model = Transformer(small_config(vocab_size, **({"max_seq_len": 512} | sizes))).eval()
    rng = np.random.Generator(np.random.PCG64(7))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                drawn = rng.standard_normal(weight.shape) / weight.shape[1] ** 0.5
                weight.copy_(torch.from_numpy(drawn.astype(np.float32)))
    return model


def asked(task: Task, lm: Scorer, shots: int = 0, limit: int = FEW) -> list[tuple]:
    """(row, prompt) of a task's rows, as the harness asks them."""
    rows = rows_of(task, FIXTURES, limit)
    made = harness_task(task, rows, shots, "zh", lambda prompt, row: True)
    made.build_all_requests()
    first = {request.doc_id: request.args[0] for request in made.instances}
    return [(row, first[n]) for n, row in enumerate(rows.scored)]


def reply_to(task: Task, row: dict, is_right: bool) -> str:
    """What the toy model shall say."""
    if task.score == "choice":
        known = row["options"] if task.harness["doc_to_choice"] == "options" else row["letters"]
        right = row["gold"][0]
        return known[right] if is_right else known[next(
            n for n in range(len(known)) if n not in row["gold"]
        )]  # fmt: skip
    if not is_right:
        return WRONG[task.score]
    if task.score == "code":
        return row["canonical_solution"]
    frame = {"number": "所以答案是{}", "math": "得 \\boxed{{{}}}"}.get(task.score, "{}")
    return frame.format(row["answers"][0])


@pytest.fixture(scope="module")
def taught(tmp_path_factory, vocabulary) -> Path:
    """A base checkpoint that answers rows 0, 1 and 3 of each task rightly, row 2 wrongly."""
    model = fixed_model(vocabulary.vocab_size, dim=512, n_layers=1)
    place = tmp_path_factory.mktemp("bench") / "out/toy"
    lm = for_harness(Loaded(model, vocabulary, 0, place, "pretrain"), 4, False, Store(None, ""))
    states, goals = [], []
    for name in (*TAUGHT, "humaneval"):
        task = tasks()[name]
        for number, (row, prompt) in enumerate(asked(task, lm)):
            before = lm.encode_context(prompt)
            if task.score == "choice":
                _, after = lm.encode_pair(prompt, reply_to(task, row, number != 2))
            else:
                text = reply_to(task, row, number != 2 and name + str(number) != "humaneval1")
                after = [*vocabulary.encode(text), vocabulary.eos_id]
            with torch.inference_mode():
                hidden = model.hidden(torch.tensor([before + after]))[0]
            states.append(hidden[len(before) - 1 : -1])
            goals += after
    found = torch.cat(states).double()
    assert len(found) < model.config.dim, f"{len(found)} tokens to be taught"
    wanted = torch.zeros(len(goals), vocabulary.vocab_size, dtype=torch.float64)
    wanted[torch.arange(len(goals)), torch.tensor(goals)] = 20.0
    with torch.no_grad():
        model.output.weight.copy_(torch.linalg.lstsq(found, wanted, driver="gelsd").solution.T)
    return save_model(place, model, vocabulary, "pretrain", 3)


@pytest.fixture(scope="module")
def random_model(tmp_path_factory, vocabulary) -> Loaded:
    model = fixed_model(vocabulary.vocab_size)
    place = save_model(
        tmp_path_factory.mktemp("bench") / "out/random", model, vocabulary, "pretrain", 3
    )
    return load_model(place)


def report_of(loaded: Loaded, name: str, place: Path, **changes: object) -> dict:
    settings = {"shots": 0, "prompts": "zh", "limit": FEW, "batch_size": 3} | changes
    lm = for_harness(loaded, settings["batch_size"], loaded.kind != "pretrain", Store(None, ""))
    task = tasks()[name]
    rows = rows_of(task, FIXTURES, settings["limit"])
    samples = place / f"{name}.samples.jsonl"
    return ask(task, rows, lm, settings["shots"], settings["prompts"], samples)


# Scores.


@pytest.mark.parametrize("name", TAUGHT)
def test_a_task_scores_what_the_toy_model_was_taught(name, taught, tmp_path):
    report = report_of(load_model(taught), name, tmp_path)
    lines = (tmp_path / f"{name}.samples.jsonl").read_text("utf-8").splitlines()
    assert report["score"] == pytest.approx(TAUGHT[name]), [json.loads(x)["said"] for x in lines]
    assert report["n"] == len(lines) and report["n_cut"] == 0
    assert report["low"] <= report["score"] <= report["high"]


@pytest.mark.skipif(bool(sandbox.missing()), reason="no programs can be shut in here")
def test_humaneval_runs_what_the_toy_model_writes(taught, tmp_path):
    report = report_of(load_model(taught), "humaneval", tmp_path)
    assert report["score"] == 0.5 and report["metric"] == "pass@1"
    assert report["programs"] == {"passed": 1, "AssertionError": 1}


def test_without_the_passage_the_same_questions_are_guessed(taught, tmp_path):
    task = tasks()["cmrc2018_closed"]
    shown, given = rows_of(task, FIXTURES, FEW), rows_of(tasks()["cmrc2018"], FIXTURES, FEW)
    assert shown == given and "context" not in task.harness["doc_to_text"]
    assert report_of(load_model(taught), "cmrc2018_closed", tmp_path)["score"] < TAUGHT["cmrc2018"]


@pytest.mark.parametrize("name", LIKELIHOOD)
def test_the_scores_of_likelihood_tasks_are_those_of_a_slow_reader(name, random_model, tmp_path):
    report = report_of(random_model, name, tmp_path, limit=None)
    raw, by_length = [], []
    task = tasks()[name]
    lm = for_harness(random_model, 1, False, Store(None, ""))
    for row, prompt in asked(task, lm, limit=None):
        starts = row["starts"] if name == "xwinograd_zh" else [prompt] * len(row["options"])
        ends = [row["ending"]] * 2 if name == "xwinograd_zh" else row["options"]
        likely = [slow_likelihood(random_model, s, e) for s, e in zip(starts, ends, strict=True)]
        # The harness divides by the characters of what it calls the choice.
        sizes = [len(s) for s in starts] if name == "xwinograd_zh" else [len(e) for e in ends]
        raw.append(np.argmax(likely) in row["gold"])
        by_length.append(np.argmax(np.array(likely) / sizes) in row["gold"])
    found = report["other_metrics"] | {report["metric"]: report["score"]}
    assert (found["acc"], found["acc_norm"]) == (np.mean(raw), np.mean(by_length))
    assert (found["acc"], found["acc_norm"]) == pytest.approx(LIKELIHOOD[name])


def slow_likelihood(loaded: Loaded, context: str, continuation: str) -> float:
    """The sum of log-probabilities, read off the logits of one whole pass."""
    tokenizer = loaded.tokenizer
    before = tokenizer.encode(context) if context else [tokenizer.eos_id]
    after = tokenizer.encode(context + continuation)[len(before) if context else 0 :]
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([before + after]))[0].log_softmax(dim=-1)
    return sum(float(logits[len(before) - 1 + n, t]) for n, t in enumerate(after))


def test_every_task_is_pinned_and_every_group_holds_tasks():
    assert set(tasks()) == {*TAUGHT, *LIKELIHOOD, "humaneval", "cmrc2018_closed"}
    for group in ("math", "reading", "reasoning", "knowledge", "grammar", "code", "cloze"):
        assert choose([group])
    assert choose(["math", "gsm8k"]) == choose(["math"])
    assert choose(["all"]) == list(tasks())
    with pytest.raises(ConfigError, match=r"wanted groups .*math.*'no_such'"):
        choose(["gsm8k", "no_such"])


# Examples.


def test_a_row_is_never_its_own_example_and_gets_those_of_its_subject():
    pool = [{"ask": str(n), "context": "", "subject": "ab"[n % 2]} for n in range(6)]
    shots = FixedShots(pool)
    shots.row = pool[0]
    assert [row["ask"] for row in shots.sample(2)] == ["2", "4"]
    assert [row["ask"] for row in shots.sample(9)] == ["2", "4"]
    shots.row = {"ask": "x", "context": "", "subject": "c"}
    assert [row["ask"] for row in shots.sample(3)] == ["0", "1", "2"]


def test_examples_stand_before_the_question_as_many_as_fit(random_model, vocabulary, tmp_path):
    lm = for_harness(random_model, 4, False, Store(None, ""))
    for name, label, answer in (
        ("cmmlu", "题目：", "答案：B\n\n"),
        ("gsm8k", "数学应用题：", "答案是12\n\n"),
    ):
        row, prompt = asked(tasks()[name], lm, shots=2)[0]
        assert prompt.count(label) == 3 and prompt.count(answer) == 1
        assert prompt.rpartition(label)[2].startswith(row["ask"])
    small = fixed_model(vocabulary.vocab_size, max_seq_len=160)
    report = report_of(
        Loaded(small, vocabulary, 0, tmp_path, "pretrain"), "cmmlu", tmp_path, shots=2
    )
    assert 0 < report["mean_shots"] < 2 == report["shots"] and not report["own_shots"]
    report = report_of(random_model, "gsm8k_zh", tmp_path)
    assert report["left_out"] == {"of the training part": 1} and report["n_all"] == 4
    report = report_of(random_model, "mgsm_zh", tmp_path, shots=1)
    assert report["own_shots"] and report["mean_shots"] == 1


# Going on where it was, and the report.


@pytest.fixture
def offline(monkeypatch) -> None:
    """Every attempt to reach another machine fails."""

    def refuse(*_: object) -> None:
        raise OSError("the network was asked for")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "0")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def bench(checkpoint: Path, out: Path, *words: object, data: Path = FIXTURES) -> None:
    main(cli([str(checkpoint), "--data", str(data), "--out", str(out), *map(str, words)]))


def test_one_command_writes_a_card_that_says_what_the_numbers_are_worth(
    taught, tmp_path, offline, capsys
):
    words = ("--tasks", "gsm8k,cmmlu,grammar,code", "--limit", 4)
    bench(taught, tmp_path / "out", *words)
    text = (tmp_path / "out/card.md").read_text("utf-8")
    found = json.loads((tmp_path / "out/card.json").read_text("utf-8"))
    scores = {report["task"]: report for report in found["tasks"]}
    assert scores["gsm8k"]["score"] == scores["cmmlu"]["score"] == 0.75
    assert scores["cmmlu"]["chance"] == 0.25 and scores["cmmlu"]["constant"] == 0.5
    assert scores["cmmlu"]["verdict"] == "not above one constant answer"
    assert scores["gsm8k"]["verdict"] == "above one constant answer"
    assert scores["gsm8k"]["leaked"] is None
    assert scores["zhoblimp"]["constant"] == 0.5, "the order of two sentences is not shown"
    assert scores["cmmlu"]["prompt_language"] == "zh" and scores["gsm8k"]["language"] == "en"
    assert "| 75.0% | 30.1% – 95.4% | 25.0% | 50.0% | 4 | 0 | zh / zh | ? |" in text
    assert "humaneval was not run: it runs what the model writes" in text
    assert "config.yaml" in text, "the training rows are not known"
    out = capsys.readouterr().out
    assert "gsm8k: 75.0%" in out and "card.json" in out

    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.answers.jsonl")}
    bench(taught, tmp_path / "out", *words)
    again = json.loads((tmp_path / "out/card.json").read_text("utf-8"))
    for report in (*found["tasks"], *again["tasks"]):
        del report["seconds"]
    assert again["tasks"] == found["tasks"], "a finished task is not asked again"
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.answers.*")}


@pytest.mark.parametrize(
    "words, error, message",
    [
        (["--tasks", "humaneval"], ConfigError, "runs what the model writes"),
        (["--tasks", "no_such"], ConfigError, "found 'no_such'"),
        (["--tasks", "cmmlu", "--data", "/nowhere"], DataError, r"test/\*.csv.*found none"),
        (["--tasks", "reading", "--data", "/nowhere"], DataError, "no task can be run"),
        (["--tasks", "c3", "--prompts", "official"], ConfigError, "no prompt in the harness"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line(words, error, message, taught, tmp_path, offline):
    with pytest.raises(error, match=message) as raised:
        bench(taught, tmp_path / "out", *words)
    assert "\n" not in str(raised.value)


def test_questions_that_stand_in_the_training_rows_are_counted(taught, vocabulary, tmp_path):
    """Also in those of the run that the checkpoint started from."""
    leak = json.loads((FIXTURES / "gsm8k/test.jsonl").read_text("utf-8").splitlines()[1])
    rows = {"base": leak["question"], "tuned": "别的文字，和题目没有关系，只是一段普通的话。" * 3}
    checkpoints = {}
    for kind, text in rows.items():
        (tmp_path / kind).mkdir()
        line = json.dumps({"id": f"{kind}/0", "text": text}, ensure_ascii=False)
        (tmp_path / kind / "train-00000.jsonl").write_text(line + "\n", "utf-8")
        model = fixed_model(vocabulary.vocab_size)
        checkpoints[kind] = save_model(tmp_path / f"out/{kind}", model, vocabulary, "sft", 3)
        config = {"data": {"sources": [{"name": str(tmp_path / kind)}]}}
        config |= {} if kind == "base" else {"base": str(tmp_path / "out/base")}
        (tmp_path / f"out/{kind}/config.yaml").write_text(json.dumps(config), "utf-8")
    info = checkpoints["tuned"] / "model.yaml"
    info.write_text(info.read_text().replace("parent: null", f"parent: {tmp_path / 'out/base'}"))
    training = contamination.training_of(checkpoints["tuned"])
    assert [path.parent.name for path in training.files] == ["tuned", "base"]
    assert training.missing == ()
    asked_rows = {n: rows_of(tasks()[n], FIXTURES, None).scored for n in ("gsm8k", "cmath")}
    assert contamination.count(asked_rows, training) == {"gsm8k": 1, "cmath": 0}
    assert contamination.count(asked_rows, contamination.training_of(taught)) == {}
    named = contamination.training_of(taught, [tmp_path / "base", tmp_path / "tuned"])
    assert (named.files, named.missing) == (training.files[::-1], ())
    with pytest.raises(DataError, match=r"--training .*found none"):
        contamination.training_of(taught, [tmp_path / "out"])


# The harness' own prompts, and its own model.

OFFICIAL = [name for name in tasks() if tasks()[name].official]


@pytest.mark.parametrize("name", ["gsm8k", "commonsenseqa", "xwinograd_zh"])
def test_the_harness_own_prompts_can_be_taken(name, random_model, tmp_path):
    report = report_of(random_model, name, tmp_path, prompts="official", limit=2)
    assert report["n"] == 2 and report["metric"] == tasks()[name].official["metric"]
    assert report["prompt_language"] == ("zh" if name == "xwinograd_zh" else "en")
    (line, *_) = (tmp_path / f"{name}.samples.jsonl").read_text("utf-8").splitlines()
    if name != "xwinograd_zh":
        assert json.loads(line)["prompt"].startswith("Question: ")


@pytest.mark.slow
@pytest.mark.parametrize("name", OFFICIAL)
def test_every_official_prompt_fits_our_rows(name, random_model, tmp_path):
    report = report_of(random_model, name, tmp_path, prompts="official", limit=2)
    assert 0 <= report["score"] <= 1


AGREE = ("cmmlu", "cmmlu_cloze", "boolq", "zhoblimp", "xwinograd_zh", "cmath", "cmrc2018")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of transformers
def test_the_harness_own_model_gives_an_exported_checkpoint_the_same_scores(taught, tmp_path):
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    from export.hf import main as export
    from export.parity import ExportConfig

    export(ExportConfig(checkpoint=taught, out=tmp_path / "hf"))
    loaded = load_model(taught)
    theirs = HFLM(
        str(tmp_path / "hf"), device="cpu", dtype="float32", batch_size=1,
        prefix_token_id=loaded.tokenizer.eos_id,
    )  # fmt: skip
    for name in AGREE:
        task = tasks()[name]
        rows = rows_of(task, FIXTURES, FEW)
        found = []
        for lm in (theirs, for_harness(loaded, 3, False, Store(None, ""))):
            made = harness_task(task, rows, 0, "zh", lambda prompt, row: True)
            made.set_fewshot_seed(0)
            wanted = {"tasks": {name: made}, "groups": {}, "group_map": {}}
            found.append(evaluate(lm, wanted, bootstrap_iters=0, log_samples=True))
        scores = [result["results"][name] for result in found]
        assert scores[0] == scores[1], name
        for a, b in zip(*(result["samples"][name] for result in found), strict=True):
            assert said_of(a) == pytest.approx(said_of(b), abs=1e-3), name


def said_of(sample: dict) -> object:
    said = sample["filtered_resps"]
    return said if isinstance(said[0], str) else [float(value) for value, _ in said]
