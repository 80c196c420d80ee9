"""A linear probe: how well a straight line through the encoder's features tells answers apart.

Softmax regression on standardised features, fitted to its end by L-BFGS. It says what of an answer
is in the features, and so what a fusion could have got out of them at least.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F


def probe(
    train: tuple[np.ndarray, Sequence[str]],
    test: tuple[np.ndarray, Sequence[str]],
    decay: float = 1e-2,
    n_steps: int = 100,
) -> float:
    """The share of test answers that the probe gives.

    train, test: features (n, C) and the answers; test answers that training lacks are misses
    """
    answers = sorted(set(train[1]))
    x, y = (torch.from_numpy(np.asarray(part[0], dtype=np.float32)) for part in (train, test))
    mean, std = x.mean(0), x.std(0).clamp(min=1e-4)
    x, y = (x - mean) / std, (y - mean) / std
    goal = torch.tensor([answers.index(a) for a in train[1]])
    weight = torch.zeros(x.shape[1], len(answers), requires_grad=True)
    bias = torch.zeros(len(answers), requires_grad=True)
    search = torch.optim.LBFGS([weight, bias], max_iter=n_steps, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        search.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, goal) + decay * weight.square().sum() / 2
        loss.backward()
        return loss

    search.step(closure)
    with torch.no_grad():
        found = (y @ weight + bias).argmax(1).tolist()
    return sum(answers[f] == a for f, a in zip(found, test[1], strict=True)) / len(test[1])
