"""Laws of continuous batching with images: each reply looks at its own, whoever is beside it."""

import io

import pytest
import torch

from babyllama.errors import DataError
from babyllama.sampling import SamplingConfig
from conftest import TEXTS
from serve.engine import Engine, Job
from serve.vision import Eyes, ImageEngine
from serving import as_url, seeing_model
from tokenizer import Tokenizer
from vqa.chat import look, stream_answer
from vqa.model import Loaded

PIL = pytest.importorskip("PIL.Image", reason="pip install -r requirements/vqa.txt")
COLOURS = ("red", "blue", "lime", "white", "black")


def stored(colour: str) -> bytes:
    out = io.BytesIO()
    PIL.new("RGB", (20, 10), colour).save(out, "PNG")
    return out.getvalue()


def asked(number: int) -> list[dict]:
    return [{"role": "user", "content": TEXTS[number % len(TEXTS)][: 8 + 5 * number]}]


@pytest.fixture(params=["splice", "resampler", "cross"])
def loaded(request, tokenizer: Tokenizer, tmp_path) -> Loaded:
    return Loaded(seeing_model(tokenizer, request.param), tokenizer, 1, tmp_path, "vqa")


def alone(loaded: Loaded, number: int, colour: str, sampling: SamplingConfig) -> str:
    """What vqa.chat says."""
    seen = look(loaded, [stored(colour)])
    return "".join(stream_answer(loaded, seen, asked(number), sampling))


def together(engine: Engine, loaded: Loaded, wanted: list[tuple], at: int) -> list[str]:
    """Replies to (number, colour, sampling), one more of them coming every `at` steps."""
    eyes = Eyes(loaded)
    texts = [""] * len(wanted)
    for n, (number, colour, sampling) in enumerate(wanted):
        ids = eyes.laid(loaded.tokenizer.render_prompt(asked(number)))

        def tell(piece, n=n) -> None:
            texts[n] += piece.text

        engine.add(Job(ids, sampling, tell, image=eyes.look([as_url(stored(colour))])))
        for _ in range(at):
            engine.step()
    while engine.step():
        pass
    return texts


@pytest.mark.parametrize("slots, at", [(1, 0), (4, 0), (4, 3), (2, 1)])
def test_a_reply_looks_at_its_own_picture_in_any_company(loaded, slots, at):
    wanted = [
        (n, colour, SamplingConfig(temperature=0.7, max_new_tokens=4 + 3 * n, seed=n))
        for n, colour in enumerate(COLOURS)
    ]
    expected = [alone(loaded, *one) for one in wanted]
    assert together(ImageEngine(loaded, slots), loaded, wanted, at) == expected
    # Of the same question, so that only the image can make a difference.
    same = [(0, colour, SamplingConfig(temperature=0.0, max_new_tokens=12)) for colour in COLOURS]
    texts = together(ImageEngine(loaded, slots), loaded, same, at)
    assert texts == [alone(loaded, *one) for one in same]
    assert len(set(texts)) > 1


def test_a_reply_of_no_length_leaves_the_next_one_its_picture(loaded):
    """Two prompts are read in one step when the first reply ends at once."""
    short = SamplingConfig(temperature=0.0, max_new_tokens=1)
    long = SamplingConfig(temperature=0.0, max_new_tokens=12)
    wanted = [(0, "red", short), (0, "blue", long)]
    texts = together(ImageEngine(loaded, 1), loaded, wanted, 0)
    assert texts == [alone(loaded, *one) for one in wanted]


@pytest.mark.parametrize("penalty", [{"repetition_penalty": 5.0}, {"frequency_penalty": 10.0}])
def test_penalties_pass_over_the_positions_of_the_picture(loaded, penalty):
    """Positions are negative ids, which are no tokens that could be less likely."""
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=40, **penalty)
    text = alone(loaded, 0, "red", sampling)
    assert together(ImageEngine(loaded, 2), loaded, [(0, "red", sampling)], 0) == [text]
    assert text != alone(loaded, 0, "red", SamplingConfig(temperature=0.0, max_new_tokens=40))


def test_eyes_take_exactly_one_data_url(loaded):
    eyes, url = Eyes(loaded), as_url(stored("red"))
    assert torch.equal(eyes.look([url]), look(loaded, [stored("red")]))
    for urls, fault in (
        ([], "wanted an image, found a question without one"),
        ([url] * 3, "wanted one image, found 3"),
        (["https://example.org/a.png"], "not fetched from the network"),
    ):
        with pytest.raises(DataError, match=fault):
            eyes.look(urls)
