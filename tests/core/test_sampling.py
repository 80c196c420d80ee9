"""Laws of choosing a token: the shares of the reference, and what penalties and rules may touch."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from babyllama.cpu.decoder import choose
from babyllama.errors import ConfigError
from babyllama.sampling import (
    LOOP_LENGTH,
    LOOP_TIMES,
    N_CHANCES,
    SamplingConfig,
    loops,
    n_showable,
    penalise,
    repeats,
    until_stop,
)
from babyllama.sampling import choose as choose_in_torch
from stand_in import OnCard, card

N_DRAWS = 4_000
# In C where there is a compiler, and by torch anywhere.
both_ways = pytest.mark.parametrize("choose", [choose, choose_in_torch])


def drawn(choose: Callable, logits: Tensor, n_chances: int, **changes: object) -> Tensor:
    """How often each token is chosen: (V,) shares of N_DRAWS, at evenly spread chances."""
    sampling = SamplingConfig(**{"temperature": 1.0, "top_p": 1.0} | changes)
    chances = torch.rand(N_DRAWS, n_chances, generator=torch.Generator().manual_seed(0))
    chances[:, 0] = (torch.arange(N_DRAWS) + 0.5) / N_DRAWS
    chosen = choose(logits.expand(N_DRAWS, -1), sampling, chances)
    return torch.bincount(chosen, minlength=len(logits)) / N_DRAWS


def reference_shares(
    logits: Tensor,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
) -> Tensor:
    """The reference: sort everything, keep what is wanted, write the shares back."""
    values, order = (logits / temperature).softmax(-1).sort(descending=True)
    kept = torch.arange(len(logits)) < (top_k or len(logits))
    kept &= values.cumsum(-1) - values < top_p
    kept &= values >= min_p * values[0]
    shares = torch.zeros_like(logits)
    shares[order] = values * kept / (values * kept).sum()
    return shares


@both_ways
@pytest.mark.parametrize("n_chances", [1, N_CHANCES])
@pytest.mark.parametrize(
    "spread, changes",
    [
        (3.0, {"top_p": 0.9}),  # a nucleus of some dozens of 600
        (3.0, {"top_p": 0.9, "temperature": 0.5}),
        (0.1, {"top_p": 0.9}),  # of more than 500
        (0.1, {"top_p": 1.0}),
        (3.0, {"top_k": 5}),
        (3.0, {"top_k": 20, "top_p": 0.5, "temperature": 2.0}),
        (3.0, {"top_k": 1000}),
        (3.0, {"min_p": 0.05}),
        (3.0, {"min_p": 0.3, "top_p": 0.6}),
        (3.0, {"min_p": 1.0}),
    ],
    ids=str,
)
def test_tokens_are_drawn_from_the_nucleus_with_their_shares(choose, spread, changes, n_chances):
    logits = spread * torch.randn(600, generator=torch.Generator().manual_seed(1))
    wanted = reference_shares(logits, **changes)
    found = drawn(choose, logits, n_chances, **changes)
    assert (found[wanted == 0] == 0).all()
    # The first chances are spread evenly, so they meet a share to the two draws at its ends; those
    # after them are random: five deviations of a count.
    deviation = (wanted * (1 - wanted) / N_DRAWS).sqrt() if n_chances > 1 else 0
    assert ((found - wanted).abs() <= 5 * deviation + 2.1 / N_DRAWS).all()
    assert (found > 0).sum() >= min(3, (wanted > 0).sum())


@both_ways
@pytest.mark.parametrize("changes", [{}, {"top_p": 1.0}, {"top_k": 20}, {"min_p": 0.2}], ids=str)
def test_a_row_is_chosen_as_if_it_were_alone(choose, changes):
    generator = torch.Generator().manual_seed(1)
    spread = torch.tensor([0.01, 5.0, 0.5, 0.02, 3.0])[:, None]
    logits = spread * torch.randn(5, 900, generator=generator)
    chances = torch.rand(5, N_CHANCES, generator=generator)
    sampling = SamplingConfig(**{"temperature": 1.0, "top_p": 0.9} | changes)
    alone = [choose(logits[i : i + 1], sampling, chances[i : i + 1]).item() for i in range(5)]
    assert choose(logits, sampling, chances).tolist() == alone


@both_ways
@pytest.mark.parametrize("chance", [2**-53, 1.0])
@pytest.mark.parametrize("changes", [{}, {"top_k": 3}, {"min_p": 0.5}, {"top_p": 1e-6}], ids=str)
@pytest.mark.parametrize("n_chances", [1, N_CHANCES])
def test_the_extreme_chances_choose_a_token_that_is_kept(choose, chance, changes, n_chances):
    logits = torch.tensor([[-torch.inf, 5.0, 4.9, 4.8, 0.0, -torch.inf]])
    sampling = SamplingConfig(**{"temperature": 1.0, "top_p": 0.99} | changes)
    chosen = choose(logits, sampling, torch.full((1, n_chances), chance))
    assert chosen.item() == (1 if chance < 1 or "top_p" in changes else 3)
    everything = SamplingConfig(temperature=1.0, top_p=1.0)
    assert choose(logits, everything, torch.full((1, n_chances), chance)).item() in (1, 4)


@pytest.mark.parametrize(
    "changes", [{}, {"top_p": 1.0}, {"min_p": 0.1}, {"temperature": 0}], ids=str
)
@pytest.mark.parametrize("V", [1, 255, 256, 257, 5000])
def test_all_ways_to_choose_take_the_same_token(V, changes, monkeypatch):
    generator = torch.Generator().manual_seed(V)
    logits = 3 * torch.randn(300, V, generator=generator)
    chances = torch.rand(300, N_CHANCES, generator=generator).clamp(min=1e-6)
    sampling = SamplingConfig(**{"temperature": 0.8, "top_p": 0.9} | changes)
    wanted = choose_in_torch(logits, sampling, chances)
    with card(monkeypatch) as waits:
        on_card = choose_in_torch(OnCard(logits), sampling, OnCard(chances)).held
    assert not waits
    for found in (choose(logits, sampling, chances), on_card):
        # A chance may fall on the border of two tokens, to rounding.
        assert (found == wanted).sum() >= 298


SAID = torch.tensor([[0, 2, 4, 2]])
LOGITS = torch.tensor([[2.0, 1.5, -1.0, -1.2, 0.0]])


def test_the_repetition_penalty_lowers_what_was_said_but_the_end():
    sampling = SamplingConfig(repetition_penalty=1.6)
    assert penalise(LOGITS, sampling, SAID, 2, -1).tolist() == [
        pytest.approx([2.0 / 1.6, 1.5, -1.6, -1.2, 0.0])
    ]
    for eos_id in (0, 2):
        found = penalise(LOGITS, sampling, SAID, 2, eos_id)[0]
        assert found[eos_id] == LOGITS[0, eos_id]
        assert (found != LOGITS[0]).sum() == 1
    assert LOGITS[0, 0] == 2.0  # what the caller gave is left alone


@pytest.mark.parametrize(
    "n_prompt, counts", [(0, [1, 0, 2, 0, 1]), (2, [0, 0, 1, 0, 1]), (4, [0] * 5)]
)
def test_the_frequency_penalty_counts_the_reply(n_prompt, counts):
    found = penalise(LOGITS, SamplingConfig(frequency_penalty=0.5), SAID, n_prompt, -1)
    assert torch.allclose(found, LOGITS - 0.5 * torch.tensor([counts]))


@settings(max_examples=100, deadline=None)
@given(st.text("ab", max_size=20), st.integers(1, 4), st.integers(2, 3))
def test_a_repeat_is_a_run_that_stands_there_so_often(text, n, times):
    runs = [text[i : i + n] for i in range(len(text) - n + 1)]
    assert repeats(text, n, times) == any(runs.count(run) >= times for run in runs)


SENTENCE = "今天天气很好，我们去公园散步。"


@pytest.mark.parametrize(
    "text, is_loop",
    [
        (SENTENCE * 2, False),
        (SENTENCE * 3, True),
        ("好" * (LOOP_LENGTH + LOOP_TIMES - 2), False),
        ("好" * (LOOP_LENGTH + LOOP_TIMES - 1), True),
        ("一，" + SENTENCE + "二，" + SENTENCE + "三，" + SENTENCE, True),  # not quite periodic
        ("\n".join(" ".join(SENTENCE) for _ in range(3)), True),  # white space does not hide it
        ("", False),
    ],
)
def test_a_loop_is_ten_characters_for_the_third_time(text, is_loop):
    assert loops(text) == is_loop


@pytest.mark.parametrize(
    "text, stop, wanted, shown",
    [
        ("你好。再见", ["。"], "你好", 2),
        ("你好", ["。", "再"], "你好", 2),
        ("你好\n\n人", ["\n\n人类："], "你好\n\n人", 2),
        ("你好\n\n", ["\n\n人类：", "\n"], "你好", 2),
        ("你好\n\n人类：", ["\n\n人类："], "你好", 2),
        ("aab", ["aabb", "bc"], "aab", 0),
        ("aabd", ["aabb"], "aabd", 4),
        ("aa", ["ab", "aaa"], "aa", 0),
        ("", ["x"], "", 0),
        ("x", [], "x", 1),
    ],
)
def test_a_text_ends_before_its_stop_and_shows_no_beginning_of_one(text, stop, wanted, shown):
    assert until_stop(text, stop) == wanted
    assert n_showable(text, stop) == shown


@settings(max_examples=100, deadline=None)
@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_what_was_shown_is_never_taken_back(text, stop):
    prefixes = [text[:n] for n in range(len(text) + 1)]
    going = [part for part in prefixes if until_stop(part, stop) == part]
    shown = max(n_showable(part, stop) for part in going)
    # The reply goes on by one token, of one character or of more.
    for last in prefixes[len(going) :] or [text]:
        assert shown <= len(until_stop(last, stop))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"max_new_tokens": 0}, "sampling.max_new_tokens wants 1 or more, found 0"),
        ({"temperature": -0.1}, r"temperature wants .*, found -0.1"),
        ({"temperature": 11}, r"temperature wants .*, found 11"),
        ({"temperature": math.nan}, r"temperature wants .*, found nan"),
        ({"top_p": 0}, r"top_p wants .*, found 0"),
        ({"top_p": 1.1}, r"top_p wants .*, found 1.1"),
        ({"top_k": -1}, r"top_k wants .*, found -1"),
        ({"min_p": 1.5}, r"min_p wants .*, found 1.5"),
        ({"repetition_penalty": 0}, r"repetition_penalty wants .*, found 0"),
        ({"repetition_penalty": math.inf}, r"repetition_penalty wants .*, found inf"),
        ({"frequency_penalty": math.nan}, r"frequency_penalty wants .*, found nan"),
        ({"no_repeat_ngram": -2}, r"no_repeat_ngram wants .*, found -2"),
        ({"stop": ["。", ""]}, "stop wants no empty text"),
        ({"loop_guard": "on"}, "loop_guard wants .*redraw, found 'on'"),
        ({"n": 0}, r"n wants .*, found 0"),
        ({"top_k": -1, "top_p": 2, "max_new_tokens": -5}, "max_new_tokens .*top_p .*top_k"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        SamplingConfig(**changes)
