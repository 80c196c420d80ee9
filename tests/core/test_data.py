"""Laws of the order, the mixture, packing, and of what becomes of rows that are too long."""

import math
from collections import Counter
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from babyllama.data import (
    Data,
    Mixture,
    TrainData,
    ValData,
    best_fit,
    collate,
    open_data,
    pack,
    permuted,
    share,
)
from babyllama.rows import write_rows
from babyllama.scoring.prompts import READERS, SummaryPrompts
from babyllama.sources import DataConfig, Dialogues, SourceConfig, Windows, open_source
from babyllama.token_file import TokenFile, TokenFileWriter
from conftest import SMALL_PROMPTS, TEXTS
from data_process.pretokenize import PretokenizeConfig, pretokenize_shard
from model import IGNORED

REPO = Path(__file__).parents[2]
MAX_SEQ_LEN = 112

relaxed = settings(deadline=None, derandomize=True, max_examples=60)


@dataclass
class Order:
    """What the loop's settings say about the order."""

    batch_size: int = 8
    seed: int = 3


@dataclass
class Numbers:
    """A vocabulary so large that each id of a test is another number."""

    vocab_size: int = 100_000
    fingerprint: str = "00" * 32


def text_file(stem: Path, *documents: list[int], tokenizer: object = None) -> TokenFile:
    with TokenFileWriter(stem, "text", tokenizer or Numbers()) as writer:
        for ids in documents:
            writer.add_text(ids)
    return TokenFile(stem)


def numbered(tmp_path: Path, n_rows: int, first: int = 0) -> Windows:
    """A source of `n_rows` rows of one token each, whose ids count from `first`."""
    ids = list(range(first, first + n_rows + 1))
    return Windows(f"from {first}", [text_file(tmp_path / f"{first}", ids)], None, 1)


def config_of(token_root: Path, **weights: float) -> DataConfig:
    sources = [SourceConfig(str(token_root / name), weight) for name, weight in weights.items()]
    return DataConfig(sources=sources, prompts=SMALL_PROMPTS)


@pytest.fixture
def data(token_root, tokenizer) -> Data:
    config = config_of(token_root, text=1.0, chat=1.0, summary=1.0)
    return open_data(config, tokenizer, MAX_SEQ_LEN, Order(), READERS)


Sequence = tuple[tuple[int, int, int], ...]  # (token, target, segment) of each position


def sequences_of(batches: list[dict[str, Tensor]], pad_id: int) -> Counter[Sequence]:
    """The sequences of some batches without their padding, as a multiset."""
    found: Counter[Sequence] = Counter()
    for batch in batches:
        segments = batch.get("segments", torch.ones_like(batch["tokens"]))
        for line in torch.stack((batch["tokens"], batch["targets"], segments), dim=-1).tolist():
            while line and line[-1][:2] == [pad_id, IGNORED]:
                line.pop()
            if line:
                found[tuple(map(tuple, line))] += 1
    return found


@pytest.mark.parametrize("ranks, micro", [(1, 8), (2, 4), (4, 2), (3, 1)])
def test_the_global_batch_does_not_depend_on_the_split(data, tokenizer, ranks, micro):
    pad_id = tokenizer.pad_id
    for step in (0, 5, 40):
        wanted = sequences_of(data.train.batches(step, 8), pad_id)
        parts = [data.train.batches(step, micro, rank, ranks) for rank in range(ranks)]
        assert sequences_of([b for part in parts for b in part], pad_id) == wanted
        # Ranks that made another number of backward passes would wait for each other for ever.
        assert len({len(part) for part in parts}) == 1
        assert all(len(batch["tokens"]) <= micro for part in parts for batch in part)


def equal(first: list[dict[str, Tensor]], second: list[dict[str, Tensor]]) -> bool:
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize(
    "name, teaches",
    [("text", ["continue"]), ("chat", ["reference", "chat"]), ("summary", ["title"])],
)
def test_a_mixture_knows_what_it_teaches(token_root, tokenizer, name, teaches):
    config = config_of(token_root, **{name: 1.0})
    found = open_data(config, tokenizer, MAX_SEQ_LEN, Order(), READERS)
    assert found.train.teaches == teaches


def test_the_batches_of_a_step_do_not_depend_on_earlier_calls(token_root, tokenizer, data):
    steps = [0, 1, 2, 17, 60]  # the last lies in a later epoch
    assert data.train.steps_per_epoch < 60
    forwards = {step: data.train.batches(step, 4) for step in steps}
    config = config_of(token_root, text=1.0, chat=1.0, summary=1.0)
    again = open_data(config, tokenizer, MAX_SEQ_LEN, Order(), READERS).train
    for step in reversed(steps):
        assert equal(again.batches(step, 4), forwards[step])
    assert not equal(forwards[0], forwards[1])


def test_another_seed_gives_another_order(token_root, tokenizer, data):
    config = config_of(token_root, text=1.0, chat=1.0, summary=1.0)
    other = open_data(config, tokenizer, MAX_SEQ_LEN, Order(seed=4), READERS).train
    assert not equal(other.batches(0, 8), data.train.batches(0, 8))


def rows_of_epoch(mixture: Mixture, epoch: int) -> list[int]:
    first = epoch * len(mixture)
    return [int(mixture.row(first + i)[0][0]) for i in range(len(mixture))]


@pytest.mark.parametrize("n_rows", [(1,), (7,), (64, 1, 30)])
def test_every_row_comes_once_an_epoch_in_another_order(tmp_path, n_rows):
    sources = [numbered(tmp_path, n, first=1000 * i) for i, n in enumerate(n_rows)]
    mixture = Mixture(sources, [1.0] * len(sources), seed=5)
    wanted = [1000 * i + row for i, n in enumerate(n_rows) for row in range(n)]
    orders = [rows_of_epoch(mixture, epoch) for epoch in range(3)]
    assert all(sorted(order) == wanted for order in orders)
    assert len(wanted) == 1 or len({tuple(order) for order in orders}) == 3


def test_weights_say_how_often_the_rows_of_a_source_come(tmp_path):
    weights = [0.25, 0.5, 1.0, 2.0, 2.5, 0.001]
    sources = [numbered(tmp_path, 50, first=1000 * i) for i in range(len(weights))]
    mixture = Mixture(sources, weights, seed=5)
    halves = []
    for epoch in range(3):
        seen = Counter(rows_of_epoch(mixture, epoch))
        for number, weight in enumerate(weights):
            counts = [seen[1000 * number + row] for row in range(50)]
            assert sum(counts) == max(1, round(weight * 50))
            assert set(counts) <= {int(weight), int(weight) + (weight % 1 > 0)}
        halves.append({row for row in seen if 1000 <= row < 2000})
    # Another half of the source each time.
    assert halves[0] != halves[1] != halves[2]


def test_sources_are_mixed_evenly_over_an_epoch(tmp_path):
    mixture = Mixture([numbered(tmp_path, 400), numbered(tmp_path, 400, 1000)], [1.0, 1.0], seed=5)
    turns = [[row < 1000 for row in rows_of_epoch(mixture, epoch)] for epoch in range(2)]
    # A hypergeometric count: mean 200, deviation 7.1.
    assert all(170 < sum(turn[:400]) < 230 for turn in turns)
    assert turns[0] != turns[1]


def test_permuted_is_a_permutation_and_another_for_each_epoch():
    for n in range(1, 301):
        order = [permuted(i, n, 7, 0) for i in range(n)]
        assert sorted(order) == list(range(n))
        next_order = [permuted(i, n, 7, 1) for i in range(min(n, 20))]
        assert n < 8 or order[:20] != next_order


def test_permuted_shows_no_pattern():
    n = 4096
    order = np.array([permuted(i, n, 1, 2) for i in range(n)])
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.06
    # Neighbours do not stay neighbours: |a - b| of two random places is n/3 on average.
    assert np.abs(np.diff(order)).mean() == pytest.approx(n / 3, rel=0.05)


@relaxed
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5), max_seq_len=st.integers(1, 12))
def test_windows_make_each_id_a_target_once(tmp_path_factory, lengths, max_seq_len):
    directory = tmp_path_factory.mktemp("windows")
    files, wanted = [], []
    for number, length in enumerate(lengths):
        ids = list(range(1000 * number, 1000 * number + length))
        # Documents of any length, which windows cross.
        files.append(text_file(directory / f"{number}", ids[: length // 3], [], ids[length // 3 :]))
        wanted += ids[1:]
    source = Windows("x", files, None, max_seq_len)
    rows = [source.row(i, np.random.default_rng(0)) for i in range(len(source))]
    assert [int(target) for _, targets in rows for target in targets] == wanted
    for tokens, targets in rows:
        assert (tokens + 1 == targets).all()
        assert 1 <= len(tokens) <= max_seq_len


@relaxed
@given(lengths=st.lists(st.integers(1, 50), max_size=60), capacity=st.integers(50, 80))
def test_packing_keeps_every_row_and_never_overfills(lengths, capacity):
    bins = best_fit(lengths, capacity)
    assert sorted(item for items in bins for item in items) == list(range(len(lengths)))
    filled = [sum(lengths[item] for item in items) for items in bins]
    assert max(filled, default=0) <= capacity
    # Two bins that would fit into one were not packed.
    assert all(a + b > capacity for a, b in combinations(filled, 2))


def test_packing_takes_the_bin_that_fits_best():
    # 30 goes beside 70, though 60 leaves more room: that room is wanted for 25 and 15.
    bins = best_fit([70, 60, 30, 25, 15], 100)
    assert sorted(map(sorted, bins)) == [[0, 2], [1, 3, 4]]


def test_a_packed_batch_has_the_loss_of_its_rows(data, model):
    rows = [data.train.mixture.row(i) for i in range(12)]
    sequences = pack(rows, MAX_SEQ_LEN)
    assert 1 < len(sequences) < 12
    alone = [model(**collate([[row]], 0)) for row in rows]
    packed = model(**collate(sequences, 0))
    assert "segments" in collate(sequences, 0)
    torch.testing.assert_close(packed.loss_sum, sum(loss.loss_sum for loss in alone))
    for name in ("n_targets", "n_correct"):
        assert getattr(packed, name) == sum(getattr(loss, name) for loss in alone)
    packed.loss_sum.backward()
    packed_gradients = [weight.grad for weight in model.parameters()]
    model.zero_grad(set_to_none=True)
    sum(loss.loss_sum for loss in alone).backward()
    for found, weight in zip(packed_gradients, model.parameters(), strict=True):
        torch.testing.assert_close(found, weight.grad, rtol=1e-3, atol=1e-5)


def test_a_rank_without_sequences_gets_empty_batches(data, model):
    sequences = data.train.sequences(0)[:1]
    parts = [share(sequences, 2, rank, 3, pad_id=0) for rank in range(3)]
    assert [len(part) for part in parts] == [1, 1, 1]
    for (batch,) in parts[1:]:
        loss = model(**batch)
        loss.loss_sum.backward()
        assert (int(loss.n_targets), loss.loss_sum.item()) == (0, 0.0)


Messages = list[tuple[str, list[int]]]


def random_dialogues(tokenizer, n: int, longest: int = 30, seed: int = 0) -> list[Messages]:
    rng = np.random.default_rng(seed)

    def said(role: str) -> tuple[str, list[int]]:
        return role, rng.integers(3, tokenizer.vocab_size, rng.integers(0, longest)).tolist()

    return [
        [
            *([said("system")] if rng.random() < 0.4 else []),
            *(said(role) for _ in range(rng.integers(1, 6)) for role in ("user", "assistant")),
        ]
        for _ in range(n)
    ]


def chat_files(directory: Path, tokenizer, *parts: list[Messages]) -> list[TokenFile]:
    stems = [directory / f"train-{number:05d}" for number in range(len(parts))]
    for stem, dialogues in zip(stems, parts, strict=True):
        with TokenFileWriter(stem, "chat", tokenizer) as writer:
            for messages in dialogues:
                writer.add_row(messages)
    return [TokenFile(stem) for stem in stems]


def longest_that_fits(tokenizer, messages: Messages, max_seq_len: int) -> int:
    """The reference: how many messages are kept, by rendering each beginning; 0 is none."""
    n_kept = 0
    for end, (role, _) in enumerate(messages, 1):
        ids, _ = render(tokenizer, messages[:end])
        if role == "assistant" and len(ids) - 1 <= max_seq_len:
            n_kept = end
    return n_kept


def render(tokenizer, messages: Messages) -> tuple[list[int], list[int]]:
    return tokenizer.render_chat([{"role": role, "content": [ids]} for role, ids in messages])


@pytest.mark.parametrize("max_seq_len", [24, 60, 97, 1000])
def test_long_dialogues_lose_whole_turns_from_their_end(tmp_path, tokenizer, max_seq_len):
    dialogues = random_dialogues(tokenizer, 1000)
    files = chat_files(tmp_path, tokenizer, dialogues[:1], dialogues[1:400], dialogues[400:])
    source = Dialogues("x", files, tokenizer, max_seq_len)
    fitting = [longest_that_fits(tokenizer, d, max_seq_len) for d in dialogues]
    n_cut = sum(0 < n < len(d) for d, n in zip(dialogues, fitting, strict=True))
    assert source.dropped == {"answer_does_not_fit": fitting.count(0), "turns_cut": n_cut}
    assert (n_cut > 0, fitting.count(0) > 0) == (max_seq_len < 1000, max_seq_len < 97)
    kept = [d[:n] for d, n in zip(dialogues, fitting, strict=True) if n]
    assert len(source) == len(kept)
    for number, messages in enumerate(kept):
        tokens, targets = source.row(number, np.random.default_rng(0))
        ids, mask = render(tokenizer, messages)
        assert tokens.tolist() == ids[:-1]
        assert len(tokens) <= max_seq_len
        wanted = [i if m else IGNORED for i, m in zip(ids[1:], mask[1:], strict=True)]
        assert targets.tolist() == wanted
        assert (targets != IGNORED).any()


def test_the_targets_of_a_dialogue_read_as_the_assistants_texts(tmp_path, tokenizer):
    rng = np.random.default_rng(0)

    def text() -> str:
        return TEXTS[rng.integers(len(TEXTS))][: rng.integers(1, 30)]

    dialogues = [
        [(role, text()) for _ in range(rng.integers(1, 4)) for role in ("user", "assistant")]
        for _ in range(1000)
    ]
    encoded = [[(role, tokenizer.encode(said)) for role, said in d] for d in dialogues]
    source = Dialogues("x", chat_files(tmp_path, tokenizer, encoded), tokenizer, 10_000)
    assert len(source) == 1000
    for number, dialogue in enumerate(dialogues):
        _, targets = source.row(number, np.random.default_rng(0))
        targets = targets[targets != IGNORED]
        ends = np.flatnonzero(targets == tokenizer.eos_id)
        said = np.split(targets, ends + 1)[:-1]
        answers = [content for role, content in dialogue if role == "assistant"]
        assert [tokenizer.decode(ids) for ids in said] == answers
        assert ends[-1] == len(targets) - 1
        assert len(targets) == sum(len(tokenizer.encode(answer)) + 1 for answer in answers)


@pytest.mark.parametrize("name", ["chat", "summary"])
def test_where_all_tokens_are_supervised_a_row_is_read_as_a_text(token_root, tokenizer, name):
    answers = config_of(token_root, **{name: 1.0})
    everything = replace(answers, supervise="all")
    rows = [
        open_data(c, tokenizer, MAX_SEQ_LEN, Order(), READERS).train.rows(0)
        for c in (answers, everything)
    ]
    for (tokens, some), (same, targets) in zip(*rows, strict=True):
        assert tokens.tolist() == same.tolist()
        assert targets[:-1].tolist() == tokens[1:].tolist()
        assert (some == IGNORED).any() and targets[-1] == some[-1] == tokenizer.eos_id


def write_summaries(stem: Path, tokenizer, sizes: list[tuple[int, int]]) -> None:
    rng = np.random.default_rng(0)
    with TokenFileWriter(stem, "summary", tokenizer) as writer:
        for n_text, n_summary in sizes:
            text, summary = (
                rng.integers(3, tokenizer.vocab_size, n).tolist() for n in (n_text, n_summary)
            )
            writer.add_row([("text", text), ("summary", summary)])


def test_a_summary_row_fits_in_every_wording_and_only_its_texts_end_is_cut(tmp_path, tokenizer):
    max_seq_len, rng = 128, np.random.default_rng(1)
    sizes = [(int(rng.integers(1, 120)), int(rng.integers(1, 60))) for _ in range(200)]
    write_summaries(tmp_path / "train-00000", tokenizer, sizes)
    where = SourceConfig(str(tmp_path))
    source = open_source(where, "train", tokenizer, DataConfig(), max_seq_len, READERS)
    file = TokenFile(tmp_path / "train-00000")
    longest = SummaryPrompts.load(REPO / DataConfig().prompts, tokenizer).longest
    frame = len(render(tokenizer, [("user", []), ("assistant", [])])[0])
    room = max_seq_len + 1 - frame - longest  # for text and summary
    kept = [i for i, (n, n_summary) in enumerate(sizes) if min(16, n) + n_summary <= room]
    assert 0 < len(kept) < 200
    n_cut = sum(sum(sizes[place]) > room for place in kept)
    assert source.dropped == {
        "summary_does_not_fit": 200 - len(kept),
        "summary_not_in_text": 0,
        "text_cut": n_cut,
    }
    assert len(source) == len(kept)
    for number, place in enumerate(kept):
        (_, text), (_, summary) = ((role, ids.tolist()) for role, ids in file.pieces(place))
        for seed in range(5):
            tokens, targets = source.row(number, np.random.default_rng(seed))
            assert len(tokens) <= max_seq_len
            answer = targets[targets != IGNORED].tolist()
            assert answer[-len(summary) - 1 :] == [*summary, tokenizer.eos_id]
            assert contains(tokens.tolist(), text[: room - len(summary)])


def test_summaries_that_are_not_copied_from_what_is_kept_of_the_text_can_be_left_out(
    tmp_path, tokenizer
):
    with TokenFileWriter(tmp_path / "train-00000", "summary", tokenizer) as writer:
        for n_copied in range(11):
            for start in (0, 200):  # the second text is cut before what its summary holds
                text = [3] * start + list(range(10, 20)) + [4] * 200
                summary = list(range(10, 10 + n_copied)) + [5] * (10 - n_copied)
                writer.add_row([("text", text), ("summary", summary)])
    config = DataConfig((SourceConfig(str(tmp_path)),), least_copied=0.6)
    source = open_source(config.sources[0], "train", tokenizer, config, 128, READERS)
    said = [source.row(number, np.random.default_rng(0))[1] for number in range(len(source))]
    copied = [int(np.isin(targets, range(10, 20)).sum()) for targets in said]
    assert copied == [6, 7, 8, 9, 10]
    assert source.dropped["summary_not_in_text"] == 22 - 5


def contains(ids: list[int], part: list[int]) -> bool:
    return any(ids[i : i + len(part)] == part for i in range(len(ids) - len(part) + 1))


def test_a_summary_row_is_worded_anew_each_epoch(token_root, tokenizer):
    config = replace(config_of(token_root, summary=1.0), prompts=DataConfig().prompts)
    mixture = open_data(config, tokenizer, MAX_SEQ_LEN, Order(), READERS).train.mixture
    wordings = []
    for epoch in range(4):
        rows = range(epoch * len(mixture), (epoch + 1) * len(mixture))
        by_row = {mixture.place(i)[2]: mixture.row(i)[0].tolist() for i in rows}
        again = {mixture.place(i)[2]: mixture.row(i)[0].tolist() for i in reversed(rows)}
        assert by_row == again
        wordings.append(by_row)
    n_changed = sum(wordings[0][row] != wordings[1][row] for row in wordings[0])
    assert n_changed > 0.8 * len(mixture)


@pytest.mark.parametrize("weight", [2.0, 2.5])
def test_the_copies_of_a_row_have_wordings_of_their_own(token_root, tokenizer, weight):
    config = replace(config_of(token_root, summary=weight), prompts=DataConfig().prompts)
    mixture = open_data(config, tokenizer, MAX_SEQ_LEN, Order(), READERS).train.mixture
    seen = {}
    for position in range(len(mixture)):
        _, _, row, copy = mixture.place(position)
        assert (row, copy) not in seen
        seen[row, copy] = mixture.row(position)[0].tolist()
    rows = {row for row, _ in seen}
    assert {copy for _, copy in seen} == set(range(math.ceil(weight)))
    assert sum(seen[row, 0] != seen[row, 1] for row in rows) > 0.8 * len(rows)


META = {"keywords": ["花", "公园"], "discipline": "园艺", "category": "农学", "level": 3}


def test_what_a_row_knows_besides_becomes_a_second_turn(tmp_path, tokenizer):
    rows = [
        {"id": "x/0", "text": TEXTS[0], "summary": "天气"},
        {"id": "x/1", "text": TEXTS[0], "summary": "天气", "meta": META},
        {"id": "x/2", "text": TEXTS[1] * 9, "summary": "小猫", "meta": META},
        {"id": "x/3", "text": TEXTS[1] * 9, "summary": "小猫", "meta": {"keywords": [" "]}},
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    cfg = PretokenizeConfig(tokenizer.path, "summary")
    pretokenize_shard(tmp_path / "rows.jsonl", tmp_path / "train-00000", cfg)
    file = TokenFile(tmp_path / "train-00000")
    said = [[(role, tokenizer.decode(ids)) for role, ids in file.pieces(n)] for n in range(4)]
    assert said[0] == [("text", TEXTS[0]), ("summary", "天气")]
    assert said[1][2:] == said[2][2:] == [
        ("keywords", "花"), ("keywords", "公园"), ("discipline", "园艺"), ("category", "农学"),
    ]  # fmt: skip
    assert len(said[3]) == 2
    source = open_source(
        SourceConfig(str(tmp_path)), "train", tokenizer, DataConfig(), 260, READERS
    )
    turns = {n: 0 for n in range(4)}
    for seed in range(60):
        for n in turns:
            tokens, targets = source.row(n, np.random.default_rng(seed))
            assert len(tokens) <= 260
            turns[n] += int((targets == tokenizer.eos_id).sum()) - 1
            known = tokenizer.decode(targets[targets != IGNORED].tolist())
            words = ("花、公园", "园艺", "农学")
            assert any(word in known for word in words) == bool((targets == 2).sum() - 1)
    assert turns[0] == turns[2] == turns[3] == 0 and 15 < turns[1] < 45


def test_validation_is_the_same_in_each_run(token_root, tokenizer, data):
    config = config_of(token_root, chat=1.0, summary=1.0, text=1.0)
    again = open_data(config, tokenizer, MAX_SEQ_LEN, Order(seed=9, batch_size=3), READERS).val
    assert sorted(again.names) == sorted(data.val.names)
    for name in again.names:
        assert equal(again.batches(name, 4), data.val.batches(name, 4))


def test_validation_takes_the_first_rows_and_shares_them(tmp_path):
    source = numbered(tmp_path, 30)
    val = ValData([source], 10, 1, pad_id=0)
    parts = [val.batches(source.name, 4, rank, 3) for rank in range(3)]
    batches = [batch for part in parts for batch in part]
    assert len({len(part) for part in parts}) == 1
    targets = torch.cat([batch["targets"].flatten() for batch in batches])
    assert sorted(targets[targets != IGNORED].tolist()) == list(range(1, 11))


def test_a_step_takes_the_rows_that_follow_those_of_the_step_before(tmp_path):
    mixture = Mixture([numbered(tmp_path, 30)], [1.0], seed=1)
    train = TrainData(mixture, batch_size=4, max_seq_len=1, pad_id=0)
    seen = [
        int(tokens[0]) for step in range(15) for rows in train.sequences(step) for tokens, _ in rows
    ]
    # 60 rows are two whole epochs, though no epoch ends with a step.
    assert Counter(seen) == dict.fromkeys(range(30), 2)
    assert train.steps_per_epoch == 7.5


def no_rows(stem: Path, tokenizer, kind: str) -> None:
    with TokenFileWriter(stem, kind, tokenizer):
        pass


@pytest.mark.parametrize("kind", ["text", "chat", "summary"])
def test_a_file_without_rows_beside_others_does_no_harm(tmp_path, token_root, tokenizer, kind):
    where = SourceConfig(str(token_root / kind))
    before = open_source(where, "train", tokenizer, DataConfig(), MAX_SEQ_LEN, READERS)
    wanted = [before.row(i, np.random.default_rng(i)) for i in range(len(before))]
    for name in ("train-0", "train-00001"):  # one stands first, one last
        no_rows(token_root / kind / name, tokenizer, kind)
    after = open_source(where, "train", tokenizer, DataConfig(), MAX_SEQ_LEN, READERS)
    found = [after.row(i, np.random.default_rng(i)) for i in range(len(after))]
    assert [[x.tolist() for x in row] for row in found] == [[x.tolist() for x in r] for r in wanted]
