"""The three fusions: what they change, what they must not, and the way to checkpoints and back."""

import io

import pytest
import torch

from babyllama.checkpoint import load_model
from babyllama.errors import CheckpointError, ConfigError, DataError
from babyllama.optim import OptimConfig, make_optimizer, set_lr
from babyllama.sampling import SamplingConfig
from conftest import save_model, small_config
from model import IGNORED, Transformer
from serving import answer
from vqa.chat import greedy, look, stream_answer
from vqa.encoders import EncoderConfig, make_encoder
from vqa.images import normalise
from vqa.model import (
    CrossAttention,
    FusionConfig,
    Loaded,
    VqaModel,
    load,
    n_positions,
    with_image,
)

PIL = pytest.importorskip("PIL.Image", reason="pip install -r requirements/vqa.txt")
ENCODER = EncoderConfig(size=32, grid=1, depths=(3, 4))
KINDS = ("splice", "resampler", "cross")
ASKED = [{"role": "user", "content": "图片里是什么？"}]


def model_of(kind: str, vocab_size: int = 97, opened: bool = True) -> VqaModel:
    torch.manual_seed(0)
    language = Transformer(small_config(vocab_size))
    fusion = FusionConfig(kind, n_queries=3, n_blocks=1)
    model = VqaModel(language, make_encoder(ENCODER), fusion)
    if opened:
        for gate in model.connector.gates.values():
            torch.nn.init.ones_(gate.open_look)
            torch.nn.init.ones_(gate.open_think)
    return model.eval()


def pixels(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 1, 3, 32, 32), generator=generator, dtype=torch.uint8)


def batch_of(model: VqaModel, n_rows: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows of six words, each about an image of its own; the last three words are targets."""
    words = torch.randint(3, 97, (n_rows, 6), generator=torch.Generator().manual_seed(9)).tolist()
    tokens = torch.tensor([with_image(w, n, model.n_positions) for n, w in enumerate(words)])
    targets = torch.full_like(tokens, IGNORED)
    targets[:, -3:] = tokens[:, -3:]
    return {
        "tokens": tokens,
        "targets": targets,
        "image_of": torch.arange(n_rows),
        "pixels": pixels(n_rows, seed),
    }


def test_a_picture_takes_the_positions_that_the_config_says():
    assert n_positions(FusionConfig("splice"), EncoderConfig(grid=4, tiles=2)) == 5 * 16 * 2
    assert n_positions(FusionConfig("resampler", n_queries=7), ENCODER) == 7
    assert n_positions(FusionConfig("cross"), ENCODER) == 0
    assert with_image([1, 5, 6], 2, 3) == [1, -7, -8, -9, 5, 6]


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_depends_on_its_own_picture_and_no_other(kind):
    model = model_of(kind)
    batch = batch_of(model)
    del batch["targets"]
    before = model(**batch)
    batch["pixels"][1] = pixels(1, seed=5)[0]
    after = model(**batch)
    first = 1 + model.n_positions  # what stands before the image cannot see it
    assert torch.allclose(before[[0, 2]], after[[0, 2]], atol=1e-5)
    assert not torch.allclose(before[1, first:], after[1, first:], atol=1e-4)
    assert kind == "cross" or torch.allclose(before[1, 0], after[1, 0], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_features_that_were_kept_give_the_same_as_the_picture(kind):
    model = model_of(kind)
    batch = batch_of(model)
    loss = model(**batch).loss_sum
    batch["features"] = model.encoder(normalise(batch.pop("pixels")))
    assert torch.allclose(model(**batch).loss_sum, loss, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_carry_no_loss(kind):
    model = model_of(kind)
    batch = batch_of(model)
    assert int(model(**batch).n_targets) == 9
    assert bool((batch["targets"][batch["tokens"] < 0] == IGNORED).all())


def test_closed_gates_leave_the_language_model_as_it_is():
    model = model_of("cross", opened=False)
    batch = batch_of(model)
    alone = model.language(batch["tokens"], batch["targets"])
    assert torch.equal(model(**batch).loss_sum, alone.loss_sum)
    model = model_of("cross")
    assert not torch.equal(model(**batch).loss_sum, alone.loss_sum)
    # Outside of a batch nothing is left of the image.
    assert torch.equal(model.language(batch["tokens"], batch["targets"]).loss_sum, alone.loss_sum)


def test_gates_stand_before_the_chosen_layers_alone():
    torch.manual_seed(0)
    language = Transformer(small_config())
    model = VqaModel(language, make_encoder(ENCODER), FusionConfig("cross", layers=(1,)))
    assert list(model.connector.gates) == ["1"]
    with pytest.raises(ConfigError, match=r"fusion.layers \[7\].*layers 0 to 1"):
        VqaModel(language, make_encoder(ENCODER), FusionConfig("cross", layers=(0, 7)))


def test_a_gate_may_look_at_nothing_and_then_adds_less():
    torch.manual_seed(0)
    look = CrossAttention(8, 1, may_pass=True)
    x, memory = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    torch.nn.init.eye_(look.wo.weight)
    passed = look(x, memory)
    look.may_pass = False
    share = passed / look(x, memory)
    assert torch.allclose(share, share[..., :1].expand_as(share), rtol=1e-3)
    assert bool(((share > 0) & (share < 1)).all())


def test_features_are_left_out_in_training_alone():
    torch.manual_seed(0)
    language = Transformer(small_config())
    model = VqaModel(language, make_encoder(ENCODER), FusionConfig("splice", dropout=0.5))
    batch = batch_of(model)
    first, second = (model.train()(**batch).loss_sum for _ in range(2))
    assert not torch.equal(first, second)
    first, second = (model.eval()(**batch).loss_sum for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(ConfigError, match="dropout wants 0 to below 1"):
        FusionConfig(dropout=1.0)


def test_the_language_models_parameters_keep_their_names():
    names = {name for name, _ in Transformer(small_config()).named_parameters()}
    for kind in KINDS:
        mine = {n.removeprefix("language.") for n, _ in model_of(kind).named_parameters()
                if n.startswith("language.")}  # fmt: skip
        assert mine == names


def test_frozen_parts_get_no_gradient_and_their_statistics_stay():
    model = model_of("splice").freeze(["encoder", "language."]).train()
    statistics = {n: w.clone() for n, w in model.encoder.named_parameters()}
    batch = batch_of(model)
    model(**batch).loss_sum.backward()
    trained = {n.split(".")[0] for n, w in model.named_parameters() if w.grad is not None}
    assert trained == {"connector"}
    assert all(torch.equal(w, statistics[n]) for n, w in model.encoder.named_parameters())
    model.freeze([]).train()
    model(**batch).loss_sum.backward()
    assert any(w.grad is not None for w in model.encoder.parameters())
    assert any(not torch.equal(w, statistics[n]) for n, w in model.encoder.named_parameters()
               if n.endswith("running_mean"))  # fmt: skip


def test_a_name_that_freezes_nothing_is_refused():
    model = model_of("splice")
    with pytest.raises(ConfigError, match=r"\['visual'\] begin no name.*encoder, connector"):
        model.freeze(["visual"])
    with pytest.raises(ConfigError, match="leaves nothing to train"):
        model.freeze(["encoder", "connector", "language"])


def test_each_part_learns_at_its_own_rate():
    model = model_of("splice").freeze([])
    model.rates = {"language.": 0.1, "encoder": 0.5}
    optimizer = make_optimizer(model, OptimConfig(lr=1.0))
    set_lr(optimizer, 2.0)
    rate_of = {id(w): group["lr"] for group in optimizer.param_groups for w in group["params"]}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            wanted = {"language": 0.2, "encoder": 1.0, "connector": 2.0}[name.split(".")[0]]
            assert rate_of[id(weight)] == pytest.approx(wanted), name
    decays = {id(w): g["weight_decay"] for g in optimizer.param_groups for w in g["params"]}
    assert decays[id(model.language.norm.weight)] == 0.0
    assert decays[id(model.language.layers[0].attention.wq.weight)] == 0.1


@pytest.fixture(params=KINDS)
def trained(request, tokenizer, tmp_path) -> Loaded:
    """A stored checkpoint, loaded again."""
    model = model_of(request.param, tokenizer.vocab_size)
    path = save_model(tmp_path / "run", model.freeze(["encoder"]), tokenizer, "vqa", 3)
    found = load(path)
    for (name, ours), (_, theirs) in zip(
        sorted(model.named_parameters()), sorted(found.model.named_parameters()), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert found.model.encoder.config == model.encoder.config
    assert found.model.fusion == model.fusion
    batch = batch_of(model)
    assert torch.equal(found.model(**batch).loss_sum, model.eval()(**batch).loss_sum)
    return found


def stored(colour: str = "red", size: tuple[int, int] = (20, 10)) -> bytes:
    out = io.BytesIO()
    PIL.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


def test_a_checkpoint_comes_back_and_answers_as_before(trained):
    tokenizer = trained.tokenizer
    ids = tokenizer.render_prompt(ASKED)
    seen = look(trained, [stored()])
    # A slow reference: the whole sequence anew for each token, without a cache.
    said: list[int] = []
    for _ in range(6):
        row = torch.tensor([with_image(ids, 0, trained.model.n_positions) + said])
        with torch.no_grad(), trained.model.looking_at(seen):
            embeds = trained.model.embed(row, seen)
            token = int(trained.model.language(input_embeds=embeds)[0, -1].argmax())
        if token == tokenizer.eos_id:
            break
        said.append(token)
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=6)
    assert answer(trained, [stored()], ASKED, sampling) == tokenizer.decode(said)
    # Many at once, of different lengths, each with its image.
    pictures = [stored("red"), stored("blue"), stored("lime")]
    prompts = [ids, ids[:1] + ids, ids]
    many = torch.cat([look(trained, [p]) for p in pictures])
    together = greedy(trained.model, prompts, many, tokenizer.eos_id, 6)
    for prompt, picture, reply in zip(prompts, pictures, together, strict=True):
        alone = greedy(trained.model, [prompt], look(trained, [picture]), tokenizer.eos_id, 6)
        assert alone == [reply]
    assert together[0] == said


def test_no_picture_and_three_pictures_get_a_clear_answer(trained):
    with pytest.raises(DataError, match=r"wanted an image, found a question without one; send"):
        answer(trained, [], ASKED)
    with pytest.raises(DataError, match=r"wanted one image, found 3; this model looks at one"):
        answer(trained, [stored()] * 3, ASKED)
    with pytest.raises(DataError, match="wanted an image"):
        answer(trained, [b"no image"], ASKED)


def test_dialogues_that_cannot_be_asked_are_refused(trained):
    seen = look(trained, [stored()])
    for wrong in ([], [{"role": "assistant", "content": "x"}], [{"role": "user", "content": " "}]):
        with pytest.raises(DataError, match="wanted questions and answers in turn"):
            list(stream_answer(trained, seen, wrong, SamplingConfig()))
    long = [{"role": "user", "content": "花" * 400}]
    with pytest.raises(ConfigError, match=r"less than 128 tokens, found \d+, of which the image"):
        list(stream_answer(trained, seen, long, SamplingConfig()))


def test_each_kind_of_checkpoint_is_refused_where_the_other_is_wanted(trained, checkpoint):
    with pytest.raises(CheckpointError, match=r"answers about images; use python -m vqa.chat"):
        load_model(trained.path)
    with pytest.raises(CheckpointError, match=r"wanted a checkpoint of python -m vqa.train.*'sft'"):
        load(checkpoint)
