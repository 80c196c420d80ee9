"""Laws of choosing tokens: what a batch shares changes nothing, and no limit is passed."""

import pytest
import torch
from conftest import small_config
from torch import Tensor

from babyllama.errors import ConfigError
from babyllama.generate import SamplingConfig, choose, generate, stream
from model import Transformer

NEVER = 1000  # an <eos> that is not in the vocabulary
GREEDY = SamplingConfig(temperature=0, max_new_tokens=20)


@pytest.fixture
def model() -> Transformer:
    return lively_model()


def lively_model(**changes: object) -> Transformer:
    """A random model that says different things after different prompts."""
    torch.manual_seed(0)
    model = Transformer(small_config(**changes)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(15)
    return model


def some_prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(97, (n,), generator=generator).tolist() for n in lengths]


PROMPTS = some_prompts(5, 1, 17, 30, 8, 8)


def slow_greedy(
    model: Transformer, prompt: list[int], n: int, eos_id: int, penalty: float = 1.0
) -> list[int]:
    """The reference: no cache, no batch, the penalty written out."""
    ids = list(prompt)
    for _ in range(min(n, model.config.max_seq_len - len(prompt))):
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1]
        for token in set(ids):
            logits[token] = (
                logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
            )
        token = int(logits.argmax())
        if token == eos_id:
            break
        ids.append(token)
    return ids[len(prompt) :]


def an_eos_for(replies: list[list[int]]) -> int:
    """A token that ends these replies at different places."""
    places = {
        token: len({reply.index(token) if token in reply else -1 for reply in replies})
        for reply in replies
        for token in reply
    }
    return max(places, key=places.get)


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 2}], ids=["plain", "grouped"])
def test_a_greedy_reply_does_not_depend_on_the_batch(changes, penalty):
    model = lively_model(**changes)
    sampling = SamplingConfig(temperature=0, max_new_tokens=20, repetition_penalty=penalty)
    endless = [slow_greedy(model, prompt, 20, NEVER, penalty) for prompt in PROMPTS]
    eos_id = an_eos_for(endless)
    wanted = [slow_greedy(model, prompt, 20, eos_id, penalty) for prompt in PROMPTS]
    assert len({len(reply) for reply in wanted}) > 2
    assert generate(model, PROMPTS, sampling, eos_id) == wanted
    for prompt, reply in zip(PROMPTS, wanted, strict=True):
        assert generate(model, [prompt], sampling, eos_id) == [reply]
        assert list(stream(model, prompt, sampling, eos_id)) == reply
        assert reply == endless[PROMPTS.index(prompt)][: len(reply)]


def test_no_reply_holds_the_end(model):
    replies = generate(model, PROMPTS, GREEDY, NEVER)
    eos_id = an_eos_for(replies)
    ended = generate(model, PROMPTS, GREEDY, eos_id)
    for reply, endless in zip(ended, replies, strict=True):
        assert eos_id not in reply
        stop = endless.index(eos_id) if eos_id in endless else len(endless)
        assert reply == endless[:stop]


@pytest.mark.parametrize("max_new_tokens", [1, 10, 1000])
def test_a_reply_ends_at_its_limit_or_at_the_end_of_the_context(max_new_tokens):
    model = lively_model(max_seq_len=32)
    sampling = SamplingConfig(max_new_tokens=max_new_tokens, seed=0)
    prompts = some_prompts(1, 31, 30, 12)
    replies = generate(model, prompts, sampling, NEVER)
    assert [len(reply) for reply in replies] == [
        min(max_new_tokens, 32 - len(prompt)) for prompt in prompts
    ]


@pytest.mark.parametrize("lengths", [(32,), (5, 32), (40,), (5, 0)], ids=str)
def test_a_prompt_without_room_for_a_reply_is_refused(lengths):
    model = lively_model(max_seq_len=32)
    with pytest.raises(ConfigError, match=r"leaves no room .* context of 32, or a prompt is empty"):
        generate(model, some_prompts(*lengths), GREEDY, NEVER)
    with pytest.raises(ConfigError, match="context of 32"):
        list(stream(model, some_prompts(*lengths)[-1], GREEDY, NEVER))


def test_no_prompts_give_no_replies(model):
    assert generate(model, [], GREEDY, NEVER) == []


def test_the_same_seed_gives_the_same_reply(model):
    def reply(seed: int) -> list[list[int]]:
        return generate(model, PROMPTS, SamplingConfig(seed=seed, max_new_tokens=20), NEVER)

    torch.manual_seed(1)
    first = reply(5)
    torch.manual_seed(2)
    assert reply(5) == first
    assert reply(6) != first


def test_a_stream_is_the_reply_of_its_seed(model):
    sampling = SamplingConfig(seed=5, max_new_tokens=20)
    (reply,) = generate(model, PROMPTS[:1], sampling, NEVER)
    assert list(stream(model, PROMPTS[0], sampling, NEVER)) == reply


def test_without_a_seed_each_reply_is_another(model):
    first, second = (
        generate(model, PROMPTS, SamplingConfig(max_new_tokens=20), NEVER) for _ in range(2)
    )
    assert first != second


def test_sampling_leaves_the_global_generator_alone_when_seeded(model):
    torch.manual_seed(1)
    wanted = torch.get_rng_state()
    generate(model, PROMPTS, SamplingConfig(seed=5, max_new_tokens=5), NEVER)
    assert torch.equal(torch.get_rng_state(), wanted)


@pytest.mark.parametrize(
    "changes",
    [{"top_k": 1}, {"top_p": 1e-6}, *({"temperature": t} for t in (1e-5, 1e-20, 1e-40, 1e-300))],
    ids=str,
)
def test_settings_that_leave_one_token_equal_greedy(model, changes):
    sampling = SamplingConfig(**{"max_new_tokens": 20, "temperature": 1.0, "seed": 0} | changes)
    wanted = generate(model, PROMPTS, GREEDY, NEVER)
    assert generate(model, PROMPTS, sampling, NEVER) == wanted


def test_a_stream_leaves_its_caller_outside_inference_mode(model):
    for _ in stream(model, PROMPTS[0], GREEDY, NEVER):
        assert not torch.is_inference_mode_enabled()


N_DRAWS = 8_000


def drawn(logits: Tensor, **settings: object) -> Tensor:
    """How often each token is chosen: (V,) shares of N_DRAWS."""
    sampling = SamplingConfig(**{"temperature": 1.0, "top_p": 1.0} | settings)
    generator = torch.Generator().manual_seed(0)
    chosen = choose(logits.expand(N_DRAWS, -1), sampling, generator=generator)
    return torch.bincount(chosen, minlength=len(logits)) / N_DRAWS


def reference_shares(
    logits: Tensor, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
) -> Tensor:
    """The reference: sort everything, keep what is wanted, write the shares back."""
    values, order = (logits / temperature).softmax(-1).sort(descending=True)
    kept = torch.arange(len(logits)) < (top_k or len(logits))
    kept &= values.cumsum(-1) - values < top_p
    shares = torch.zeros_like(logits)
    shares[order] = values * kept / (values * kept).sum()
    return shares


@pytest.mark.parametrize(
    "spread, settings",
    [
        (3.0, {"top_p": 0.9}),  # a nucleus of some dozens of 600: the shortcut
        (3.0, {"top_p": 0.9, "temperature": 0.5}),
        (0.1, {"top_p": 0.9}),  # a nucleus of more than 256: everything is sorted
        (0.1, {"top_p": 1.0}),
        (3.0, {"top_k": 5}),
        (3.0, {"top_k": 20, "top_p": 0.5, "temperature": 2.0}),
        (3.0, {"top_k": 1000}),
    ],
    ids=str,
)
def test_tokens_are_drawn_from_the_nucleus_with_their_shares(spread, settings):
    logits = spread * torch.randn(600, generator=torch.Generator().manual_seed(1))
    wanted, found = reference_shares(logits, **settings), drawn(logits, **settings)
    assert (found[wanted == 0] == 0).all()
    # Five deviations of a count, which is at least as wide as that of a single draw.
    deviation = (wanted * (1 - wanted) / N_DRAWS).sqrt()
    assert ((found - wanted).abs() <= 5 * deviation + 2 / N_DRAWS).all()
    likely = wanted > 10 / N_DRAWS
    assert likely.sum() > 2
    assert (found[likely] > 0).all()


def test_rows_of_a_batch_with_small_and_large_nuclei_are_both_served():
    generator = torch.Generator().manual_seed(1)
    peaked, flat = torch.zeros(600), 0.01 * torch.randn(600, generator=generator)
    peaked[7] = 20.0
    logits = torch.stack((peaked, flat)).repeat(3000, 1)
    chosen = choose(logits, SamplingConfig(temperature=1.0, top_p=0.9), generator=generator)
    assert (chosen[::2] == 7).all()
    assert 500 < len(chosen[1::2].unique()) <= 541


def test_the_penalty_lowers_seen_tokens_alone():
    logits = torch.tensor([[2.0, 1.5, -1.0, -1.2, 0.0]])
    seen = torch.tensor([[True, False, True, False, True]])
    weak = torch.tensor([[2.0 / 1.6, 1.5, -1.6, -1.2, 0.0]])
    penalised = SamplingConfig(temperature=1.0, top_p=1.0, repetition_penalty=1.6)
    plain = SamplingConfig(temperature=1.0, top_p=1.0)
    many = (4000, -1)
    found = choose(
        logits.expand(many), penalised, seen.expand(many), torch.Generator().manual_seed(0)
    )
    wanted = choose(weak.expand(many), plain, None, torch.Generator().manual_seed(0))
    assert torch.equal(found, wanted)
    assert logits.tolist()[0][0] == 2.0  # what the caller gave is left alone


@pytest.mark.parametrize("filler", [0, 50], ids=["zero", "eos"])
def test_filler_is_not_penalised(model, filler):
    # The short row wants to say what the batch may be filled up with.
    short, long = some_prompts(3, 20)
    short = [60 + token % 30 for token in short]
    with torch.no_grad():
        wish = model.hidden(torch.tensor([short]))[0, -1]
        best = model.output(wish).max()
        model.output.weight[filler] = wish * 1.5 * best / (wish @ wish)
    sampling = SamplingConfig(temperature=0, max_new_tokens=1, repetition_penalty=9.0)
    assert generate(model, [short, long], sampling, NEVER)[0] == [filler]
    # In the prompt itself it is.
    assert generate(model, [[filler, *short], long], sampling, NEVER)[0] != [filler]


def test_a_word_said_in_the_reply_is_penalised_too(model):
    sampling = SamplingConfig(temperature=0, max_new_tokens=60, repetition_penalty=10.0)
    for prompt, reply in zip(PROMPTS, generate(model, PROMPTS, sampling, NEVER), strict=True):
        assert len(set(reply)) > 0.9 * len(reply)
        assert len(set(reply) & set(prompt)) < len(reply) / 2


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"max_new_tokens": 0}, r"max_new_tokens 0 \(at least 1\)"),
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": 11}, "temperature 11"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_p": 0}, "top_p 0 "),
        ({"top_p": 1.1}, "top_p 1.1"),
        ({"top_k": -1}, "top_k -1"),
        ({"repetition_penalty": 0}, "repetition_penalty 0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty inf"),
        ({"top_k": -1, "top_p": 2, "max_new_tokens": -5}, "max_new_tokens .*top_p .*top_k"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        SamplingConfig(**changes)
