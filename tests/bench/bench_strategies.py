"""What a step of each strategy costs, as a multiple of a step of `full` in the same round (less is
cheaper), and how many epochs a second the head alone makes on stored features."""

import statistics

import numpy as np
import torch
from bench_features import head
from common import timed

from finetune_nb.data import load_images
from finetune_nb.features import extract_features
from finetune_nb.models import load_resnet
from finetune_nb.training import Recipe, fit

WAYS = {  # name → what differs from `full`
    "head": dict(strategy="head"),
    "surgical, layer1": dict(strategy="surgical", layers=("layer1",)),
    "surgical, last layer": dict(strategy="surgical"),
    "norm-only": dict(strategy="norm-only"),
    "lora": dict(strategy="lora"),
    "l2-sp": dict(strategy="l2-sp"),
    "auto-rgn": dict(strategy="auto-rgn"),
    "ema": dict(ema=0.99),
    "swa, with the pass that re-estimates norms": dict(swa=0.5),
    "sam (two passes)": dict(sam=0.05),
    "schedule-free, with that pass": dict(optimizer="schedule-free", schedule="constant"),
}


def seconds(arch, weights, images, size, **changes):
    torch.manual_seed(0)
    model = load_resnet(arch, weights, 130)
    recipe = Recipe(epochs=1, batch_size=64, lr=0.001, size=size).replace(**changes)
    return timed(lambda: fit(model, images, None, recipe, progress=False))


if __name__ == "__main__":
    every = load_images("glyphs", limit=1920)
    for arch, weights, size, n, last in (
        ("resnet20", "shipped", 32, 1920, "layer3"),
        ("resnet18", None, 64, 640, "layer4"),
    ):
        images = every.select(np.arange(n))
        seconds(arch, weights, images, size)  # fills the cache of decoded squares
        found = {name: [] for name in WAYS}
        for _ in range(3):
            for name, changes in WAYS.items():
                changes = changes | ({"layers": (last,)} if name == "surgical, last layer" else {})
                plain = seconds(arch, weights, images, size)
                found[name].append(seconds(arch, weights, images, size, **changes) / plain)
        for name, ratios in found.items():
            print(
                f"{arch} at {size} px: {name:42} {statistics.median(ratios):.2f} of a step of "
                f"full  ({min(ratios):.2f} … {max(ratios):.2f})",
                flush=True,
            )
        torch.manual_seed(0)
        features = extract_features(
            load_resnet(arch, weights, 130), images, layers="last", size=size
        )
        x, y = (
            torch.from_numpy(features.array.astype(np.float32)),
            torch.from_numpy(features.labels.astype(np.int64)),
        )
        fast, slow = (
            head(lambda: zip(x.split(64), y.split(64)), x.shape[1], 130, 20),
            min(seconds(arch, weights, images, size) for _ in range(3)),
        )
        print(
            f"{arch} at {size} px: the head on stored features makes {slow / fast:,.0f} times "
            "the epochs a second of full",
            flush=True,
        )
