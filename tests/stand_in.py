"""Tensors that stand in for those of a card: they compute on the processor, raise where devices
mix as a card's do, and note each time that the processor would have to wait for the card.

No torch without CUDA has tensors of device "cuda"; these say "meta", and that they are on CUDA.
"""

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

aten = torch.ops.aten
CARD = torch.device("meta")
REPO = str(Path(__file__).parent.parent) + "/"
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default,
            aten._index_put_impl_.default}  # fmt: skip
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default,
         aten.equal.default}  # fmt: skip
# Who waits, by place in our code, and how often.
waits: Counter[str] = Counter()


def note(what: str) -> None:
    ours = (f for f in reversed(traceback.extract_stack()) if f.filename.startswith(REPO))
    frame = next(f for f in ours if not f.filename.endswith("stand_in.py"))
    waits[f"{what} at {frame.filename.removeprefix(REPO)}:{frame.lineno} {frame.line}"] += 1


class OnCard(Tensor):
    """A tensor of the card; what it holds is at `held`."""

    is_cuda = True

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnCard":
        made = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=CARD,
        )  # fmt: skip
        made.held = held
        return made

    def tolist(self) -> list:
        note("tolist")
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class OnCards(TorchDispatchMode):
    """As long as it is on, tensors that are made for the card are such tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _held(value: object) -> object:
    return value.held if isinstance(value, OnCard) else value


def _run(func, args: tuple, kwargs: dict) -> object:
    flat, spec = tree_flatten(args)
    tensors = [a for a in (*flat, *kwargs.values()) if isinstance(a, Tensor)]
    ours = [t for t in tensors if isinstance(t, OnCard)]
    theirs = [t for t in tensors if not isinstance(t, OnCard) and t.dim()]
    is_copy = func in (aten._to_copy.default, aten.copy_.default)
    if ours and theirs and not is_copy:
        if func not in INDEXING or not isinstance(args[0], OnCard):
            raise RuntimeError(f"{func}: tensors of the card and of the processor are mixed")
        note("index from the processor")
    wanted = kwargs.get("device")
    on_card = bool(ours) if wanted is None else torch.device(wanted) == CARD
    if func is aten._to_copy.default and wanted is None:
        on_card = isinstance(args[0], OnCard)
    leaves = is_copy and bool(ours)
    leaves &= not (on_card if func is aten._to_copy.default else isinstance(args[0], OnCard))
    masks = func in INDEXING and any(
        isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
    )
    if ours and (func in WAITS or masks or leaves):
        note(str(func))
    if ours and func is aten.cumsum.default and torch.are_deterministic_algorithms_enabled():
        raise RuntimeError("cumsum: a card adds floats up in any order")
    real = {k: _held(v) for k, v in kwargs.items()}
    if "device" in real and on_card:
        real["device"] = torch.device("cpu")
    with torch._C._DisableTorchDispatch():
        plain = tree_unflatten([_held(a) for a in flat], spec)
        if func is aten.mm.dtype:  # this and the next one are made for cards only
            out = plain[0].float() @ plain[1].float()
        elif func is aten.addmm.dtype_out:
            out = real["out"].copy_(plain[0] + plain[1].float() @ plain[2].float())
        else:
            out = func(*plain, **real)
    if func._schema.is_mutable and isinstance(out, Tensor):
        for given in tensors:
            if _held(given) is out:
                return given
    return tree_map(lambda a: OnCard(a) if isinstance(a, Tensor) and on_card else a, out)


def to_card(model: nn.Module) -> nn.Module:
    """The model with all that it holds on the card."""
    for part in model.modules():
        for name, weight in part._parameters.items():
            if weight is not None and not isinstance(weight, OnCard):
                made = nn.Parameter(OnCard(weight.detach()), requires_grad=weight.requires_grad)
                part._parameters[name] = made
        for name, buffer in part._buffers.items():
            if buffer is not None and not isinstance(buffer, OnCard):
                part._buffers[name] = OnCard(buffer)
    return model


@contextlib.contextmanager
def card(patch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """As long as the block runs there is a card; gives the waits, which begin anew.

    Left out: autocast and fused optimizers, which do not know the stand-in's device.
    """
    waits.clear()
    adamw, tensor = torch.optim.AdamW.__init__, torch.tensor

    def made(data: object, *args: object, device: object = None, **kwargs: object) -> Tensor:
        on_card = device is not None and torch.device(device) == CARD
        found = tensor(data, *args, device=None if on_card else device, **kwargs)
        return OnCard(found) if on_card else found

    patch.setattr(torch, "tensor", made)
    patch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    patch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    patch.setattr(torch, "inference_mode", torch.no_grad)
    patch.setattr(
        torch.optim.AdamW, "__init__",
        lambda self, *a, **k: adamw(self, *a, **{**k, "fused": False, "foreach": False}),
    )  # fmt: skip
    with OnCards():
        yield waits
