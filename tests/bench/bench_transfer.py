"""Is the shipped checkpoint worth starting from? Accuracy on 600 handwritten digits, three seeds,
against the same net from scratch at equal steps."""

import numpy as np
import torch
from common import timed

from finetune_nb.data import load_images
from finetune_nb.evaluation import evaluate
from finetune_nb.models import load_resnet
from finetune_nb.showcase import PLAN, plan_recipe
from finetune_nb.training import fit


def parts():
    """(train, test): the test digits and 241 of the training digits make 600; validation digits,
    which recipes were chosen on, are trained on."""
    whole = load_images("digits")
    train, valid, test = whole.three_way()
    rest, more = train.divide((600 - len(test)) / len(train), seed=1)

    def join(a, b):
        return whole.select(
            np.sort(np.concatenate([a.rows_at(np.arange(len(a))), b.rows_at(np.arange(len(b)))]))
        )

    train, test = join(rest, valid), join(test, more)
    test = test.select(np.arange(600))
    assert not set(train.column("key")) & set(test.column("key"))
    return train, test


def run(train, test, plan, start, seed):
    _, k, epochs, batch, strategy = plan
    torch.manual_seed(seed)
    model = load_resnet("resnet20", "shipped" if start == "pretrained" else None, 10)
    fit(
        model,
        train.few(k, seed),
        recipe=plan_recipe(epochs, batch, strategy, start == "pretrained", seed),
        progress=False,
    )
    return evaluate(model, test).accuracy


if __name__ == "__main__":
    train, test = parts()
    print(f"{len(train)} digits to train on, {len(test)} to test, 3 seeds: mean (each)")
    for plan in PLAN:
        for start in ("pretrained", "from scratch"):
            found = []
            seconds = timed(
                lambda: found.extend(run(train, test, plan, start, seed) for seed in range(3))
            )
            print(
                f"{plan[0]:18} {start:13} {np.mean(found):.3f}  "
                f"({', '.join(f'{a:.3f}' for a in found)})   {seconds:.0f} s",
                flush=True,
            )
