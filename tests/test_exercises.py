"""The solutions are right, and a tempting wrong answer is not."""

import math
import os

import numpy as np
import pytest
import torch
from conftest import ROOT  # noqa: F401
from lessons import LESSONS, cells, solutions, source
from torch import nn

from finetune_nb.checks import CHECKS, check

SOLUTIONS = {number: (path, block) for path in LESSONS for number, block in solutions(path).items()}


def decay_by_name(model):
    weights = [p for n, p in model.named_parameters() if n.endswith("weight")]
    return weights, [p for n, p in model.named_parameters() if n.endswith("bias")]


def freeze_only(net):
    for layer in net[:-1]:
        layer.requires_grad_(False)


def plain_write(path, write):
    with open(path, "w") as file:
        write(file)


TEMPTING = {
    "1.1": lambda before, after: after - before,
    "1.2": lambda right, n: 1 - right / n,
    "1.3": lambda a, b: [x for x in a if x not in b],
    "2.1": lambda parts, trained: 1 - sum(parts[n] for n in trained) / sum(parts.values()),
    "2.2": lambda n, e, b: e * (n // b),
    "2.3": lambda w, g, r: w + r * g,
    "3.1": lambda a, b: a < b,
    "3.2": lambda seed, n: np.random.default_rng().random(n),
    "3.3": plain_write,
    "4.1": lambda paths: [p.split("/")[0] for p in paths],
    "4.2": lambda labels, share: np.arange(len(labels)) < share * len(labels),
    "4.3": lambda n, seed, p: int(np.random.default_rng([seed, p]).integers(n)),
    "5.1": lambda p, y, n: np.argsort(p.max(1))[:n],
    "5.2": lambda parts: (np.mean([s / n for n, s, q in parts]), 1),
    "5.3": lambda pairs, splits: {max(pair) for pair in pairs},
    "6.1": lambda s: {k.removeprefix("module."): v for k, v in s.items()},
    "6.2": lambda x, m, s: (x - m) / s,
    "6.3": freeze_only,
    "7.1": lambda maps: np.concatenate(
        [maps.mean((0, 2, 3))[None].repeat(2, 0), maps.max((2, 3))], 1
    ),
    "7.2": lambda n, channels, cells: n * sum(channels) * cells * 4 / 1e6,
    "7.3": lambda a, b: tuple(
        (x - np.concatenate([a, b]).mean(0)) / np.maximum(np.concatenate([a, b]).std(0), 1e-9)
        for x in (a, b)
    ),
    "8.1": lambda weights, k: np.argsort(-weights.sum(1))[:k],
    "8.2": lambda w, charge: np.sign(w) * np.maximum(0, np.abs(w) - charge),
    "8.3": lambda x, y: (
        sum((y == c).sum() * (x[y == c].mean() - x.mean()) ** 2 for c in np.unique(y))
        / sum(((x[y == c] - x[y == c].mean()) ** 2).sum() for c in np.unique(y))
    ),
    "9.1": lambda step, total, share, highest: highest * min(1, step / (share * total)),
    "9.2": decay_by_name,
    "9.3": lambda losses, patience: next(
        (i for i in range(1, len(losses)) if losses[i] > losses[i - 1]), None
    ),
    "10.1": lambda a, b, alpha: {n: alpha * a[n] + (1 - alpha) * b[n] for n in a},
    "10.2": lambda n, lr, factor: [lr / factor**i for i in range(n)],
    "10.3": lambda g, w: np.mean([np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(g, w)]),
    "13.1": lambda y, p: np.mean(np.array(y) == np.array(p)),
    "13.2": lambda a, b: sum(math.comb(a + b, i) for i in range(min(a, b) + 1)) / 2 ** (a + b),
    "13.3": lambda c, r: abs(np.mean(c - r)),
    "14.1": lambda x: x / 255,
    "14.2": lambda logits, y: (logits.argmax(0) == 0).mean(),
    "14.3": lambda test, valid: max(test),
}


def test_every_check_is_an_exercise():
    assert set(SOLUTIONS) == set(CHECKS) == set(TEMPTING)


@pytest.mark.parametrize("number", sorted(SOLUTIONS))
def test_solution(number, capsys):
    names = {"np": np, "math": math, "torch": torch, "nn": nn, "os": os}
    exec(SOLUTIONS[number][1], names)
    assert check(number, names[f"answer_{number.replace('.', '_')}"]), capsys.readouterr().out


@pytest.mark.parametrize("number", sorted(TEMPTING))
def test_tempting_wrong_answer(number, capsys):
    assert not check(number, TEMPTING[number])
    assert "not yet — " in capsys.readouterr().out


@pytest.mark.parametrize("number", sorted(SOLUTIONS))
def test_stub_is_not_right_and_does_not_raise(number):
    stub = next(
        source(c)
        for c in cells(SOLUTIONS[number][0], "code")
        if f"def answer_{number.replace('.', '_')}(" in source(c)
    )
    names = {"check": lambda *a: None}
    exec(stub, names)
    assert not check(number, names[f"answer_{number.replace('.', '_')}"])


def test_unknown_number():
    assert not check("99.9", lambda: None)
