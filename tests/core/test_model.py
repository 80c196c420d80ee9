"""Laws of the decoder, each held against a slow or foreign reference."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from babyllama.errors import ConfigError
from conftest import small_config
from model import IGNORED, SLICE, KVCache, ModelConfig, Transformer

REPO = Path(__file__).parents[2]


def random_model(seed: int = 0, **changes: object) -> Transformer:
    """Weights large enough that every part of the network matters; norms are not 1."""
    torch.manual_seed(seed)
    model = Transformer(small_config(**changes))
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3 + (weight.dim() == 1))
    return model.eval()


def random_tokens(*shape: int, seed: int = 1, vocab_size: int = 97) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_heads": 2},
        {"n_kv_heads": 1, "tied": True},
        {"rope_theta": 50.0, "norm_eps": 1e-2, "n_layers": 3},
    ],
    ids=["plain", "grouped", "tied", "theta"],
)
def test_logits_equal_those_of_transformers(changes):
    from benchmarks.peers import hf_copy

    model = random_model(**changes)
    peer = hf_copy(model)
    tokens = random_tokens(3, 40)
    with torch.no_grad():
        ours, theirs = model(tokens), peer(tokens).logits
    assert theirs.std() > 1
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("changed", [0, 7, 19])
def test_a_token_changes_no_logits_before_it(changed):
    model, tokens = random_model(), random_tokens(1, 20)
    other = tokens.clone()
    other[0, changed] = (other[0, changed] + 1) % 97
    before, after = model(tokens), model(other)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert (before[:, changed:] - after[:, changed:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("sizes", [[9] + [1] * 11, [1] * 20, [5, 1, 3, 4, 1, 6], [20]], ids=str)
@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 2}], ids=["plain", "grouped"])
def test_cached_decoding_equals_full_decoding(sizes, changes):
    model, tokens = random_model(**changes), random_tokens(2, 20)
    cache = KVCache(model.config, torch.zeros(2, dtype=torch.int64), 20)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in tokens.split(sizes, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sizes", [[12], [6, 1, 1, 4], [1] * 12], ids=str)
@pytest.mark.parametrize("starts", [[0, 5, 3], [2, 5, 3], [4, 4, 4]], ids=str)
def test_left_padded_rows_equal_single_rows(starts, sizes):
    model, tokens = random_model(), random_tokens(3, 12)
    cache = KVCache(model.config, torch.tensor(starts), 12)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in tokens.split(sizes, dim=1)]
        logits = torch.cat(parts, dim=1)
        assert logits.isfinite().all()
        for row, start in enumerate(starts):
            alone = model(tokens[row : row + 1, start:])[0]
            torch.testing.assert_close(logits[row, start:], alone, atol=1e-4, rtol=1e-4)


def test_rows_that_leave_the_cache_do_not_disturb_the_others():
    model, tokens = random_model(), random_tokens(3, 10)
    cache = KVCache(model.config, torch.tensor([0, 4, 2]), 10)
    with torch.no_grad():
        model(tokens[:, :6], cache=cache)
        cache.keep(torch.tensor([1, 2]))
        logits = model(tokens[1:, 6:], cache=cache)
        for row, start in ((1, 4), (2, 2)):
            alone = model(tokens[row : row + 1, start:])[0, 6 - start :]
            torch.testing.assert_close(logits[row - 1], alone, atol=1e-4, rtol=1e-4)


def test_padding_does_not_count_against_the_context():
    model, tokens = random_model(max_seq_len=8), random_tokens(1, 10)
    cache = KVCache(model.config, torch.tensor([2]), 10)
    with torch.no_grad():
        logits = model(tokens, cache=cache)[:, 2:]
        torch.testing.assert_close(logits, model(tokens[:, 2:]), atol=1e-4, rtol=1e-4)
        with pytest.raises(ConfigError, match="9 tokens do not fit the model's context of 8"):
            model(tokens[:, :1], cache=cache)


def test_input_embeds_stand_for_tokens():
    model, tokens = random_model(), random_tokens(2, 9)
    embedded = model.tok_embeddings(tokens)
    assert torch.equal(model(input_embeds=embedded), model(tokens))
    with pytest.raises(ValueError, match="either tokens or input_embeds"):
        model(tokens, input_embeds=embedded)
    with pytest.raises(ValueError, match="either tokens or input_embeds"):
        model()


def some_targets(n: int, n_targets: int, seed: int = 2) -> Tensor:
    """(1, n) targets, all but `n_targets` of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(97, (1, n), generator=generator)
    targets[0, torch.randperm(n, generator=generator)[n_targets:]] = IGNORED
    return targets


def plain_loss(model: Transformer, tokens: Tensor, targets: Tensor) -> tuple[Tensor, int, int]:
    """The reference: all logits, one cross-entropy."""
    logits = model(tokens).float()
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    is_target = targets != IGNORED
    return loss, int(is_target.sum()), int((logits.argmax(-1) == targets)[is_target].sum())


def gradients(model: Transformer) -> dict[str, Tensor | None]:
    found = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("n_targets", [0, 1, SLICE - 1, SLICE, SLICE + 1, 700])
@pytest.mark.parametrize("tied", [False, True])
def test_sliced_loss_and_its_gradients_equal_plain_cross_entropy(n_targets, tied):
    model = random_model(max_seq_len=720, tied=tied)
    tokens, targets = random_tokens(1, 720), some_targets(720, n_targets)
    wanted, n_wanted, n_correct = plain_loss(model, tokens, targets)
    (wanted / 7).backward()
    wanted_gradients = gradients(model)
    found = model(tokens, targets)
    (found.loss_sum / 7).backward()
    torch.testing.assert_close(found.loss_sum, wanted, rtol=1e-5, atol=1e-5)
    assert found.loss_sum.dtype == torch.float32
    assert (int(found.n_targets), int(found.n_correct)) == (n_wanted, n_correct)
    assert n_wanted == n_targets
    assert n_targets < 700 or n_correct > 0
    for name, gradient in gradients(model).items():
        scale = float(wanted_gradients[name].abs().max())
        torch.testing.assert_close(
            gradient, wanted_gradients[name], rtol=1e-3, atol=1e-5 * scale, msg=name
        )


def test_equal_logits_are_no_right_answer():
    model = random_model()
    for weight in model.parameters():
        torch.nn.init.zeros_(weight)
    found = model(random_tokens(2, 8), random_tokens(2, 8))
    assert (int(found.n_targets), int(found.n_correct)) == (16, 0)


def test_sliced_loss_under_autocast_equals_plain_cross_entropy():
    model = random_model(max_seq_len=300)
    tokens, targets = random_tokens(2, 300), random_tokens(2, 300, seed=3)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, _, _ = plain_loss(model, tokens, targets)
        wanted.backward()
        wanted_gradients = gradients(model)
        found = model(tokens, targets)
    found.loss_sum.backward()
    assert found.loss_sum.dtype == torch.float32
    torch.testing.assert_close(found.loss_sum, wanted, rtol=1e-3, atol=0)
    for name, gradient in gradients(model).items():
        assert gradient.dtype == torch.float32
        assert F.cosine_similarity(gradient.flatten(), wanted_gradients[name].flatten(), 0) > 0.999
        assert gradient.norm() / wanted_gradients[name].norm() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("frozen", ["head", "body", "both"])
def test_frozen_weights_get_no_gradient_and_the_rest_gets_the_same(frozen):
    model, tokens, targets = random_model(), random_tokens(2, 30), random_tokens(2, 30, seed=3)
    model(tokens, targets).loss_sum.backward()
    wanted = gradients(model)
    for name, weight in model.named_parameters():
        is_head = name == "output.weight"
        weight.requires_grad = frozen != "both" and is_head == (frozen == "body")
    loss = model(tokens, targets).loss_sum
    assert loss.requires_grad == (frozen != "both")
    if frozen != "both":
        loss.backward()
    for name, gradient in gradients(model).items():
        is_frozen = frozen == "both" or (name == "output.weight") == (frozen == "head")
        assert (gradient is None) == is_frozen, name
        if not is_frozen:
            torch.testing.assert_close(gradient, wanted[name], msg=name)


@pytest.mark.parametrize("frozen", ["output.weight", "tok_embeddings.weight"])
def test_no_gradient_of_a_frozen_head_is_computed(frozen):
    model, tokens = random_model(), random_tokens(2, 30)
    model.get_parameter(frozen).requires_grad = False
    kept: list[torch.Size] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tokens, tokens)
    # The loss keeps the finished gradient of the head, and nothing else has its shape.
    assert (model.output.weight.shape in kept) == (frozen != "output.weight")


def test_per_position_losses_sum_to_the_loss():
    model, tokens = random_model(max_seq_len=300), random_tokens(1, 300)
    targets = some_targets(300, 280)
    whole = model(tokens, targets)
    whole.loss_sum.backward()
    wanted = gradients(model)
    losses = model(tokens, targets, per_position=True)
    assert losses.shape == targets.shape
    assert losses.dtype == torch.float32
    assert (losses[targets == IGNORED] == 0).all()
    torch.testing.assert_close(losses.sum(), whole.loss_sum)
    losses.sum().backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-4, msg=name)


def test_packed_documents_equal_padded_ones():
    model, lengths = random_model(), [7, 1, 12, 4]
    packed = random_tokens(1, 28)
    segments = torch.tensor([[1] * 7 + [2] * 1 + [3] * 12 + [4] * 4 + [0] * 4])
    with torch.no_grad():
        logits = model(packed, segments=segments)[0]
        assert logits.isfinite().all()
        start = 0
        for length in lengths:
            alone = model(packed[:, start : start + length])[0]
            torch.testing.assert_close(logits[start : start + length], alone, atol=1e-4, rtol=1e-4)
            start += length


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_the_loss_never_builds_all_logits():
    vocab_size, shape = 500, (8, 256)
    model = random_model(max_seq_len=256, vocab_size=vocab_size)
    tokens = random_tokens(*shape, vocab_size=vocab_size)
    n_logits = tokens.numel() * vocab_size
    with LargestTensor() as loss_only:
        model(tokens, tokens).loss_sum.backward()
    with LargestTensor() as with_logits:
        model(tokens)
    assert with_logits.numel == n_logits
    assert loss_only.numel <= n_logits // 4


def test_43m_has_its_published_number_of_parameters():
    shape = yaml.safe_load((REPO / "configs/model/43m.yaml").read_text("utf-8"))
    with torch.device("meta"):
        model = Transformer(ModelConfig(vocab_size=65_000, **shape))
    assert model.n_parameters() == 43_510_016


@pytest.mark.parametrize("changes", [{}, {"tied": True}, {"n_kv_heads": 2}, {"multiple_of": 48}])
def test_a_shape_knows_its_parameters_without_a_model(changes):
    config = small_config(n_layers=3, **changes)
    assert config.n_parameters == Transformer(config).n_parameters()


def test_only_the_projections_into_the_residual_stream_start_smaller():
    torch.manual_seed(0)
    model = Transformer(small_config(dim=128, n_layers=8, vocab_size=200))
    smaller = set()
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            assert (weight == 1).all(), name
            continue
        std = weight.std().item()
        assert std == pytest.approx(0.02, rel=0.05) or std == pytest.approx(0.005, rel=0.05), name
        if std < 0.01:
            smaller.add(name)
    ends = ("attention.wo.weight", "feed_forward.w2.weight")
    assert smaller == {f"layers.{layer}.{end}" for layer in range(8) for end in ends}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dim": 33}, "dim 33 must be n_heads 4 times an even head width; .* is 32"),
        ({"dim": 12}, "even head width"),
        ({"n_kv_heads": 3}, "n_heads 4 is not a multiple of n_kv_heads 3"),
        ({"n_kv_heads": 0}, "n_kv_heads 0"),
        ({"n_heads": 0}, "at least 1"),
        ({"n_layers": 0}, "at least 1"),
        ({"max_seq_len": 0}, "at least 1"),
        ({"multiple_of": -1}, "at least 1"),
        ({"vocab_size": 0}, "it comes from the tokenizer"),
    ],
    ids=str,
)
def test_a_shape_that_cannot_work_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Transformer(small_config(**changes))


def test_a_sequence_longer_than_the_context_is_refused():
    model = random_model(max_seq_len=8)
    with pytest.raises(ConfigError, match="9 tokens do not fit the model's context of 8"):
        model(random_tokens(1, 9))
