"""Laws of continuous batching: a reply does not notice its company, and what is not needed goes."""

import random
from dataclasses import replace

import pytest
import torch

from babyllama.cpu.compile import compiler
from babyllama.cpu.decoder import make_decoder
from babyllama.decoder import Decoder, plain_decoder
from babyllama.generate import generate_replies
from babyllama.sampling import SamplingConfig
from conftest import TEXTS, small_config
from model import Transformer
from serve.engine import Engine, Job, Piece, PrefixCache, Reading, Slots
from tokenizer import Tokenizer

BLOCK = 16
KINDS = [
    "plain",
    "float32",
    pytest.param("int8", marks=pytest.mark.skipif(not compiler(), reason="no C compiler")),
]


@pytest.fixture
def decoder(model: Transformer, request: pytest.FixtureRequest) -> Decoder:
    """Random weights whose choices are sharp enough to be unlike each other."""
    with torch.no_grad():
        model.norm.weight *= 20
    kind = getattr(request, "param", "float32")
    return plain_decoder(model) if kind == "plain" else make_decoder(model, kind)


class Caller:
    """Keeps the pieces of one job."""

    def __init__(self, prompt: list[int], sampling: SamplingConfig, **more: object) -> None:
        self.pieces: list[Piece] = []
        self.job = Job(prompt, sampling, self.pieces.append, **more)

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def reason(self) -> str:
        return self.pieces[-1].reason if self.pieces else ""


def make_engine(decoder: Decoder, tokenizer: Tokenizer, n_slots: int = 4, **more) -> Engine:
    return Engine(decoder, tokenizer, n_slots, block=BLOCK, **more)


def run(engine: Engine, callers: list[Caller], at: list[int] | None = None) -> None:
    """Let each caller come before the step that `at` says, and finish all."""
    at = at or [0] * len(callers)
    left, number = sorted(zip(at, range(len(callers)), strict=True)), 0
    while left or engine.n_running or engine.n_waiting:
        while left and left[0][0] <= number:
            engine.add(callers[left.pop(0)[1]].job)
        engine.step()
        number += 1
        assert number < 5000


def prompts_of(tokenizer: Tokenizer, n: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 2 to 90 tokens, some with a common beginning."""
    chance = random.Random(seed)
    ids = [token for text in TEXTS for token in tokenizer.encode(text)]
    shared = tokenizer.encode(TEXTS[2], bos=True)[:40]
    prompts = []
    for number in range(n):
        start, length = chance.randrange(40), chance.randrange(2, 50)
        own = ids[start : start + length]
        prompts.append(shared + own if number % 3 == 0 else own)
    return prompts


def settings(n: int) -> list[SamplingConfig]:
    kinds = [
        {"temperature": 0},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 0.7, "top_k": 5, "repetition_penalty": 1.2},
        {"temperature": 1.2, "frequency_penalty": 0.5, "loop_guard": "redraw"},
        {"temperature": 1.0, "stop": ["。", "天气"]},
        {"temperature": 1.0, "top_p": 0.8, "repetition_penalty": 1.5},
    ]
    return [
        SamplingConfig(max_new_tokens=5 + 7 * (i % 6), seed=i, **kinds[i % 6]) for i in range(n)
    ]


@pytest.mark.parametrize("decoder", KINDS, indirect=True)
def test_a_reply_in_company_is_the_reply_written_alone(decoder, tokenizer):
    """Exactly with int8 weights; the sums of float32 steps agree to rounding, which changes none
    of these replies."""
    asked = list(zip(prompts_of(tokenizer, 30), settings(30), strict=True))
    together = [Caller(*one) for one in asked]
    at = [random.Random(number).randrange(40) for number in range(30)]
    run(make_engine(decoder, tokenizer), together, at)
    for caller, one in zip(together, asked, strict=True):
        alone = Caller(*one)
        run(make_engine(decoder, tokenizer, prefix_mb=0), [alone])
        assert caller.job.reply == alone.job.reply
        assert (caller.text, caller.reason) == (alone.text, alone.reason)


@pytest.mark.skipif(not compiler(), reason="no C compiler")
def test_int8_logits_in_company_are_equal_bit_for_bit(model, tokenizer):
    plain, seen = make_decoder(model, "int8"), set()

    def choose(logits: torch.Tensor, *more: object) -> torch.Tensor:
        seen.update(row.numpy().tobytes() for row in logits)
        return plain.choose(logits, *more)

    decoder = replace(plain, choose=choose)
    asked = list(zip(prompts_of(tokenizer, 12, seed=1), settings(12), strict=True))
    together = [Caller(*one) for one in asked]
    run(make_engine(decoder, tokenizer, n_slots=5), together, list(range(0, 36, 3)))
    in_company = seen.copy()
    for caller, one in zip(together, asked, strict=True):
        alone = Caller(*one)
        run(make_engine(decoder, tokenizer), [alone])
        assert caller.text == alone.text
    assert seen == in_company and len(seen) > 100


@pytest.mark.parametrize("decoder", KINDS, indirect=True)
def test_the_engine_writes_what_generate_writes(decoder, tokenizer):
    for prompt, sampling in zip(prompts_of(tokenizer, 10, seed=2), settings(10), strict=True):
        callers = [Caller(prompt, sampling, number=number) for number in range(3)]
        run(make_engine(decoder, tokenizer), callers)
        wanted = [
            reply
            for number in range(3)
            for reply in generate_replies(
                decoder, [prompt], SamplingConfig(**vars(sampling) | {"n": 3}),
                tokenizer.eos_id, tokenizer,
            )[number : number + 1]
        ]  # fmt: skip
        assert [c.job.reply for c in callers] == wanted
        assert [c.text for c in callers] == [reply.text for reply in wanted]


def test_a_prompt_that_was_read_before_gives_the_same_numbers(decoder, tokenizer):
    known, prompt = PrefixCache(10**6, BLOCK), prompts_of(tokenizer, 1)[0][:60]
    with torch.inference_mode():
        found = []
        for other in (prompt[:40] + prompt[:9], prompt, prompt):
            reading, logits = Reading(decoder, other, known), None
            while logits is None:
                _, logits = reading.read_block()
            found.append((reading.n_known, logits, reading.cache.buffer))
        whole = decoder.model(torch.tensor([prompt]))[:, -1]
    assert [n for n, *_ in found] == [0, 32, 48]
    alone = Reading(decoder, prompt, PrefixCache(0, BLOCK))
    with torch.inference_mode():
        while (logits := alone.read_block()[1]) is None:
            pass
    for _, read, buffer in found[1:]:
        assert torch.equal(read, logits) and torch.equal(buffer, alone.cache.buffer)
    torch.testing.assert_close(logits, whole)


def test_the_prefix_cache_forgets_the_least_used_and_keeps_its_bound(decoder, tokenizer):
    block_bytes = 2 * 2 * 32 * BLOCK * 4
    known = PrefixCache(3 * block_bytes, BLOCK)
    prompts = [[n] * (BLOCK + 1) for n in range(3, 7)]
    with torch.inference_mode():
        for prompt in [*prompts[:3], prompts[0], prompts[3]]:
            reading = Reading(decoder, prompt, known)
            while reading.read_block()[1] is None:
                pass
    assert [len(known.find(p)) for p in prompts] == [1, 0, 1, 1]
    assert known.n_bytes == 3 * block_bytes
    (kept,) = known.find(prompts[3])
    assert kept.untyped_storage().nbytes() == block_bytes  # and not the whole prompt's


def test_a_cancelled_reply_frees_its_slot_within_a_step(decoder, tokenizer):
    engine = make_engine(decoder, tokenizer, n_slots=2)
    long = SamplingConfig(max_new_tokens=100, temperature=0)
    callers = [Caller([5, n], long) for n in range(6, 10)]
    for caller in callers:
        engine.add(caller.job)
    for _ in range(4):
        engine.step()
    assert engine.n_running == 2 and engine.n_waiting == 2
    callers[0].job.cancelled = callers[3].job.cancelled = True
    engine.step()
    assert callers[0].reason == callers[3].reason == "cancelled"
    assert engine.n_running == 2 and engine.n_waiting == 0  # the third has taken the place
    seen = len(callers[0].pieces)
    run(engine, [])
    assert len(callers[0].pieces) == seen
    assert {callers[1].reason, callers[2].reason} <= {"length", "eos"}


def test_a_reply_ends_when_its_time_is_up(decoder, tokenizer):
    now = [0.0]
    engine = make_engine(decoder, tokenizer, n_slots=1, clock=lambda: now[0])
    running, waiting = (
        Caller([5, 6], SamplingConfig(max_new_tokens=100, temperature=0), deadline=5.0)
        for _ in range(2)
    )
    engine.add(running.job)
    engine.add(waiting.job)
    engine.step()
    now[0] = 6.0
    assert not engine.step()
    assert running.reason == waiting.reason == "time"
    assert running.job.reply.ids and not waiting.job.reply.ids


def test_slots_move_back_and_shrink_without_changing_a_reply(decoder, tokenizer):
    """Many short replies one after the other beside a long one: the columns run out and begin
    anew several times."""
    engine = make_engine(decoder, tokenizer, n_slots=3)
    long = Caller([7, 8, 9], SamplingConfig(max_new_tokens=120, temperature=0))
    short = [
        Caller([5, 6, n], SamplingConfig(max_new_tokens=8, temperature=0)) for n in range(10, 60)
    ]
    lengths = []
    engine.slots.stepped, stepped = lambda free: lengths.append(stepped(free)), engine.slots.stepped
    run(engine, [long, *short], [3 * n for n in range(51)])
    assert len(lengths) > 2 * (engine.slots.size - engine.slots.context)
    assert engine.rows == []
    alone = Caller([7, 8, 9], SamplingConfig(max_new_tokens=120, temperature=0))
    run(make_engine(decoder, tokenizer), [alone])
    assert long.job.reply == alone.job.reply


def test_memory_of_the_slots_is_taken_once(model):
    slots = Slots(model, 4)
    where = slots._memory.data_ptr()
    for rows in (1, 4, 2, 0, 3):
        slots.resize([], rows)
        assert slots.window().buffer.is_contiguous() if rows else True
        assert slots.buffer.data_ptr() == where or not rows


def test_pieces_are_whole_characters_and_show_nothing_of_a_stop_text(decoder, tokenizer):
    """Nor of its beginning, though it comes in several tokens."""
    n_cut = 0
    for seed in range(20):
        settings = {"max_new_tokens": 60, "temperature": 1.3, "seed": seed}
        whole = Caller([5, 6, 7], SamplingConfig(**settings))
        run(make_engine(decoder, tokenizer), [whole])
        assert whole.text == whole.job.reply.text
        if len(whole.text) < 12:
            continue  # mostly bytes that are no characters
        n_cut += 1
        stop = whole.text[5:10]
        cut = Caller([5, 6, 7], SamplingConfig(**settings, stop=[stop, "没有的话"]))
        run(make_engine(decoder, tokenizer), [cut])
        assert cut.reason == "stop"
        assert cut.text == cut.job.reply.text == whole.text[: whole.text.index(stop)]
    assert n_cut > 5


def test_logits_that_are_no_numbers_end_the_reply_and_not_the_engine(tokenizer):
    torch.manual_seed(0)
    model = Transformer(small_config(tokenizer.vocab_size)).eval()
    with torch.no_grad():
        model.tok_embeddings.weight[9] = float("nan")
    engine = make_engine(make_decoder(model, "float32"), tokenizer)
    tiny = {"repetition_penalty": 5e-324}
    good, bad, far = (
        Caller(prompt, SamplingConfig(max_new_tokens=4, **more))
        for prompt, more in (([5, 6], {}), ([5, 9], {}), ([5, 6], tiny))
    )
    run(engine, [bad, far, good])
    assert bad.reason == far.reason == "error" and good.reason in ("length", "eos")
