"""Laws of replies: what a batch shares changes nothing, no limit is passed, rules hold."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from babyllama.cpu.decoder import make_decoder
from babyllama.decoder import Reply
from babyllama.errors import CheckpointError, ConfigError
from babyllama.generate import generate, generate_replies, stream, stream_text
from babyllama.sampling import SamplingConfig, loops, repeats, squeeze, until_stop
from babyllama.scoring.beams import BeamConfig, extend_beams, search_beams
from conftest import small_config
from model import Transformer
from tokenizer import Tokenizer

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
        for token in set(ids) - {eos_id}:
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


@pytest.mark.parametrize("is_fast", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 2}], ids=["all heads", "grouped"])
def test_a_greedy_reply_does_not_depend_on_the_batch(changes, penalty, is_fast):
    model = lively_model(**changes)
    sampling = SamplingConfig(temperature=0, max_new_tokens=20, repetition_penalty=penalty)
    endless = [slow_greedy(model, prompt, 20, NEVER, penalty) for prompt in PROMPTS]
    eos_id = an_eos_for(endless)
    wanted = [slow_greedy(model, prompt, 20, eos_id, penalty) for prompt in PROMPTS]
    assert len({len(reply) for reply in wanted}) > 2
    model = make_decoder(model, "float32") if is_fast else model
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


@pytest.mark.parametrize("padding", [0, 50], ids=["zero", "eos"])
def test_padding_is_not_penalised(model, padding):
    # The short row wants to say what the batch may be filled up with.
    short, long = some_prompts(3, 20)
    short = [60 + token % 30 for token in short]
    with torch.no_grad():
        wish = model.hidden(torch.tensor([short]))[0, -1]
        best = model.output(wish).max()
        model.output.weight[padding] = wish * 1.5 * best / (wish @ wish)
    sampling = SamplingConfig(temperature=0, max_new_tokens=1, repetition_penalty=9.0)
    assert generate(model, [short, long], sampling, NEVER)[0] == [padding]
    # In the prompt itself it is.
    assert generate(model, [[padding, *short], long], sampling, NEVER)[0] != [padding]


def test_a_word_said_in_the_reply_is_penalised_too(model):
    sampling = SamplingConfig(temperature=0, max_new_tokens=60, repetition_penalty=10.0)
    for prompt, reply in zip(PROMPTS, generate(model, PROMPTS, sampling, NEVER), strict=True):
        assert len(set(reply)) > 0.9 * len(reply)
        assert len(set(reply) & set(prompt)) < len(reply) / 2


def test_a_drawn_reply_does_not_depend_on_the_replies_behind_it(model):
    sampling = SamplingConfig(seed=5, max_new_tokens=20)
    every = generate(model, PROMPTS, sampling, NEVER)
    for n in (1, 2, 5):
        assert generate(model, PROMPTS[:n], sampling, NEVER) == every[:n]


def test_several_replies_are_those_of_the_prompt_asked_several_times(model):
    sampling = SamplingConfig(seed=5, max_new_tokens=20)
    three = SamplingConfig(seed=5, max_new_tokens=20, n=3)
    replies = generate(model, PROMPTS[:2], three, NEVER)
    thrice = [prompt for prompt in PROMPTS[:2] for _ in range(3)]
    assert replies == generate(model, thrice, sampling, NEVER)
    assert len({tuple(reply) for reply in replies}) == 6
    short = lively_model(max_seq_len=32)
    lengths = [len(r) for r in generate(short, some_prompts(5, 20), replace(three, n=2), NEVER)]
    assert lengths == [20, 20, 12, 12]


def test_a_reply_says_how_it_ended(model):
    eos_id = an_eos_for(generate(model, PROMPTS, GREEDY, NEVER))
    for reply in generate_replies(model, PROMPTS, GREEDY, eos_id):
        assert reply.reason == ("length" if len(reply.ids) == 20 else "eos")
    reply = Reply()
    assert list(stream(model, PROMPTS[0], GREEDY, eos_id, reply=reply)) == reply.ids
    assert reply.reason


@pytest.fixture
def speaker(tokenizer: Tokenizer) -> Transformer:
    """A random model with the vocabulary of `tokenizer` that says many different things."""
    return lively_model(vocab_size=tokenizer.vocab_size)


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    return "".join(map(tokenizer.stream_decoder(), ids))


@pytest.mark.parametrize("seed", range(3))
def test_a_reply_ends_before_the_first_stop_text(speaker, tokenizer, seed):
    prompt = tokenizer.encode("今天")
    endless = SamplingConfig(seed=seed, max_new_tokens=100)
    (whole,) = generate_replies(speaker, [prompt], endless, NEVER, tokenizer)
    assert whole.text == text_of(tokenizer, whole.ids) and len(whole.text) > 40
    stops = [whole.text[30:33], whole.text[20:23], "not there"]
    sampling = SamplingConfig(seed=seed, max_new_tokens=100, stop=stops)
    (reply,) = generate_replies(speaker, [prompt], sampling, NEVER, tokenizer)
    assert reply.text == until_stop(whole.text, stops) and reply.reason == "stop"
    assert whole.ids[: len(reply.ids)] == reply.ids
    assert not any(stop in text_of(tokenizer, reply.ids[:-1]) for stop in stops)


@pytest.mark.parametrize("stop", ["", "[4:6]", "[-1:] and more", "never"])
def test_a_streamed_text_is_the_text_of_the_reply(speaker, tokenizer, stop):
    prompt = tokenizer.encode("今天")
    sampling = SamplingConfig(seed=0, max_new_tokens=60)
    (free,) = generate_replies(speaker, [prompt], sampling, tokenizer.eos_id, tokenizer)
    assert len(free.text) > 20
    texts = {"": [], "[4:6]": [free.text[4:6]], "[-1:] and more": [free.text[-1:] + " and more"]}
    sampling = replace(sampling, stop=texts.get(stop, [stop]))
    (wanted,) = generate_replies(speaker, [prompt], sampling, tokenizer.eos_id, tokenizer)
    reply = Reply()
    parts = list(stream_text(speaker, prompt, sampling, tokenizer, reply))
    assert "".join(parts) == wanted.text == reply.text
    assert all(parts) and reply == wanted


def test_no_run_of_characters_comes_twice_where_that_is_forbidden(speaker, tokenizer):
    prompt = tokenizer.encode("今天")
    free = SamplingConfig(temperature=0, max_new_tokens=80)
    bound = SamplingConfig(temperature=0, max_new_tokens=80, no_repeat_ngram=2)
    (loose,) = generate_replies(speaker, [prompt], free, NEVER, tokenizer)
    (strict,) = generate_replies(speaker, [prompt], bound, NEVER, tokenizer)
    assert repeats(squeeze(loose.text), 2) and not repeats(squeeze(strict.text), 2)
    same = [a == b for a, b in zip(loose.ids, strict.ids, strict=False)].index(False)
    # They part where the likeliest token would have been the first to repeat something.
    before, after = (squeeze(text_of(tokenizer, loose.ids[:n])) for n in (same, same + 1))
    assert same > 3 and not repeats(before, 2) and repeats(after, 2)


@pytest.fixture
def parrot(tokenizer: Tokenizer) -> Transformer:
    """A model that says the same few words for ever."""
    model = lively_model(vocab_size=tokenizer.vocab_size)
    circle = tokenizer.encode("今天天气很好，我们去公园散步。")
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.wo.weight.zero_()
            layer.feed_forward.w2.weight.zero_()
        for token, after in zip(circle, [*circle[1:], circle[0]], strict=True):
            model.output.weight[after] = 9 * model.tok_embeddings.weight[token]
    return model


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"seed": 0, "temperature": 0.5}], ids=str)
def test_a_guarded_reply_does_not_loop(parrot, tokenizer, fields):
    prompt = tokenizer.encode("今")

    def reply(guard: str) -> Reply:
        sampling = SamplingConfig(max_new_tokens=100, loop_guard=guard, **fields)
        return generate_replies(parrot, [prompt], sampling, NEVER, tokenizer)[0]

    free, ended, redrawn = reply("off"), reply("end"), reply("redraw")
    assert loops(free.text) and free.reason == "length"
    assert ended.reason == "loop" and not loops(ended.text)
    assert ended.ids == free.ids[: len(ended.ids)]
    assert loops(text_of(tokenizer, free.ids[: len(ended.ids) + 1]))
    assert len(redrawn.ids) == 100 and not loops(redrawn.text)
    assert redrawn.ids[: len(ended.ids)] == ended.ids


def test_settings_that_look_at_text_need_a_tokenizer(model):
    with pytest.raises(ValueError, match="give a tokenizer"):
        generate(model, PROMPTS, SamplingConfig(stop=["。"]), NEVER)


def overflowing() -> Transformer:
    """A model whose activations leave the range of float16, but not its weights."""
    model = lively_model()
    with torch.no_grad():
        for layer in model.layers:
            for weight in (layer.feed_forward.w1, layer.feed_forward.w3, layer.feed_forward.w2):
                weight.weight *= 60
    return model.half()


def test_logits_that_overflow_are_computed_again_in_float32():
    model = overflowing()
    wanted = generate(copy.deepcopy(model).float(), PROMPTS, GREEDY, NEVER)
    with pytest.warns(RuntimeWarning, match="float16 were not finite") as caught:
        assert generate(model, PROMPTS, GREEDY, NEVER) == wanted
    assert len(caught) == 1
    assert model.output.weight.dtype == torch.float16


def test_an_overflow_in_the_middle_of_replies_changes_no_token(model):
    eos_id = an_eos_for(generate(model, PROMPTS, GREEDY, NEVER))
    wanted = generate(model, PROMPTS, GREEDY, eos_id)
    decoder = make_decoder(model, "float32")
    sizes = []

    def step(tokens: Tensor, cache: object) -> Tensor:
        sizes.append(len(tokens))
        is_late = len(sizes) == 12
        return decoder.step(tokens, cache) * (torch.nan if is_late else 1)

    broken = type(decoder)(model, step, "breaks")
    with pytest.warns(RuntimeWarning, match="breaks were not finite"):
        assert generate(broken, PROMPTS, GREEDY, eos_id) == wanted
    assert len(sizes) == 12 and 1 <= sizes[-1] < len(PROMPTS)


def test_weights_that_are_not_finite_are_reported(model):
    with torch.no_grad():
        model.output.weight[3] = torch.nan
    with pytest.raises(CheckpointError, match=r"finite logits.*use an earlier one"):
        generate(model, PROMPTS, GREEDY, NEVER)


def likeliest(model: Transformer, prompt: list[int], n: int, eos_id: int, power: float) -> list:
    """The reference: every reply of n tokens or with an end before, best first."""
    found = []
    for reply in itertools.product(range(model.config.vocab_size), repeat=n):
        if eos_id in reply[:-1] and reply[reply.index(eos_id) :] != (eos_id,) * (
            n - reply.index(eos_id)
        ):
            continue  # counted once, with nothing but ends behind its end
        length = reply.index(eos_id) + 1 if eos_id in reply else n
        with torch.no_grad():
            log_p = model(torch.tensor([[*prompt, *reply]]))[0].log_softmax(-1)
        score = sum(float(log_p[len(prompt) - 1 + i, reply[i]]) for i in range(length))
        found.append((score / length**power, [t for t in reply[:length] if t != eos_id]))
    return [reply for _, reply in sorted(found, key=lambda pair: -pair[0])]


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_beams_enough_for_all_find_the_likeliest_replies(power):
    model, eos_id = lively_model(vocab_size=8), 2
    with torch.no_grad():
        model.output.weight /= 6
    sampling = BeamConfig(beams=64, n=5, max_new_tokens=3, length_penalty=power)
    for prompt in ([1, 4], [5]):
        wanted = likeliest(model, prompt, 3, eos_id, power)
        (replies,) = search_beams(model, [prompt], sampling, eos_id)
        assert [reply.ids for reply in replies][:5] == wanted[:5]


def slow_beams(
    model: Transformer, prompt: list[int], k: int, n: int, eos_id: int
) -> list[list[int]]:
    """The reference: no cache; ends when no unfinished reply beats the worst of k finished ones."""
    done, beams = [], [(0.0, [])]
    for length in range(1, n + 1):
        found = []
        for score, reply in beams:
            with torch.no_grad():
                log_p = model(torch.tensor([[*prompt, *reply]]))[0, -1].log_softmax(-1)
            found += [(score + float(p), [*reply, token]) for token, p in enumerate(log_p)]
        found = sorted(found, key=lambda pair: -pair[0])[: 2 * k]
        ended = [pair for pair in found if pair[1][-1] == eos_id or length == n]
        beams = [pair for pair in found if pair not in ended][:k]
        done += [(score / length, [t for t in reply if t != eos_id]) for score, reply in ended]
        done = sorted(done, key=lambda pair: -pair[0])[:k]
        if not beams or (len(done) == k and beams[0][0] / length <= done[-1][0]):
            break
    return [reply for _, reply in done]


@pytest.mark.parametrize("k", [2, 3])
def test_few_beams_find_what_a_slow_search_finds(k):
    model, eos_id = lively_model(vocab_size=12), 2
    with torch.no_grad():
        model.output.weight /= 10
    prompts = [[token % 12 for token in prompt] for prompt in PROMPTS]
    sampling = BeamConfig(beams=k, n=k, max_new_tokens=12)
    wanted = [slow_beams(model, prompt, k, 12, eos_id) for prompt in prompts]
    assert len({len(reply) for replies in wanted for reply in replies}) > 3
    for prompt, replies in zip(prompts, wanted, strict=True):
        (found,) = search_beams(model, [prompt], sampling, eos_id)
        assert [reply.ids for reply in found] == replies
    # Side by side, though the prompts differ in length and their searches end one after another.
    found = search_beams(model, prompts, sampling, eos_id)
    assert [[reply.ids for reply in replies] for replies in found] == wanted


def test_the_rules_hold_for_beams(parrot, tokenizer):
    sampling = BeamConfig(beams=3, max_new_tokens=60, loop_guard="redraw")
    ((reply, *_),) = search_beams(parrot, [tokenizer.encode("今")], sampling, NEVER, tokenizer)
    assert len(reply.ids) == 60 and not loops(reply.text)
    stopped = BeamConfig(beams=3, max_new_tokens=60, stop=["公园"])
    ((reply, *_),) = search_beams(parrot, [tokenizer.encode("今")], stopped, NEVER, tokenizer)
    assert reply.reason == "stop" and reply.text.endswith("我们去")


def test_beams_are_extended_by_the_best_of_all_pairs():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    scores = torch.tensor([-1.0, -3.0, -1.5])
    every = [
        (scores[beam] + logits[beam].log_softmax(0)[token], beam, token)
        for beam in range(3)
        for token in range(50)
    ]
    wanted = sorted(every, key=lambda triple: -triple[0])[:7]
    found = extend_beams(logits, scores, 7)
    assert [triple[1:] for triple in found] == [triple[1:] for triple in wanted]
    assert [triple[0] for triple in found] == pytest.approx([float(t[0]) for t in wanted])


@pytest.mark.parametrize(
    "changes", [{"n": 3, "beams": 2}, {"beams": 0}, {"length_penalty": float("inf")}], ids=str
)
def test_beams_that_cannot_work_are_refused(changes):
    with pytest.raises(ConfigError, match=r"sampling\.\w+ wants"):
        BeamConfig(**changes)
