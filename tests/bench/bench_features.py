"""Extraction of all blocks against the bare forward pass, and a head on stored features against
the net."""

import time

import numpy as np
import torch
import torch.nn.functional as F
from common import compare

from finetune_nb.data import load_images
from finetune_nb.features import extract_features
from finetune_nb.models import head_of, load_resnet, to_input


def forward_only(model, images, size, group=32):
    images = images.select(
        np.arange(len(images))
    )  # decodes anew, as a first pass must: extraction does, too
    loader = images.loader(batch_size=256, size=size, crop_ratio=model.info["crop_ratio"])
    with torch.inference_mode():
        for batch in loader:
            for some in batch.pixels.split(group):
                model(to_input(some, model).contiguous(memory_format=torch.channels_last))


def head(inputs, width, classes, epochs):
    layer = torch.nn.Linear(width, classes)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05, momentum=0.9)
    begin = time.perf_counter()
    for _ in range(epochs):
        for x, y in inputs():
            loss = F.cross_entropy(layer(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return (time.perf_counter() - begin) / epochs


if __name__ == "__main__":
    images = load_images("glyphs", limit=6000)
    for arch, weights, size in (
        ("resnet20", "shipped", 32),
        ("resnet18", None, 64),
        ("resnet50", None, 64),
    ):
        some = images if arch != "resnet50" else images.select(np.arange(2400))
        torch.manual_seed(0)
        model = load_resnet(arch, weights, 130).eval()
        forward_only(
            model, some, size
        )  # once for nothing: kernels are chosen, files lie in the system's cache
        compare(
            f"{arch} at {size} px, all blocks, against forward only",
            lambda: extract_features(model, some, size=size),
            lambda: forward_only(model, some, size),
            len(some),
            "img",
            7,
        )
        features = extract_features(model, some, layers="last", size=size)
        x, y = (
            torch.from_numpy(features.array.astype(np.float32)),
            torch.from_numpy(features.labels.astype(np.int64)),
        )

        def through_net():
            for batch in some.loader(
                batch_size=128, size=size, crop_ratio=model.info["crop_ratio"]
            ):
                with torch.no_grad():
                    seen = {}
                    hook = head_of(model).register_forward_pre_hook(
                        lambda m, inputs: seen.update(x=inputs[0])
                    )
                    model(to_input(batch.pixels, model))
                    hook.remove()
                yield seen["x"], batch.labels

        fast = head(lambda: zip(x.split(128), y.split(128)), x.shape[1], 130, 20)
        slow = head(through_net, x.shape[1], 130, 1)
        steps = -(-len(some) // 128)
        print(
            f"{arch} at {size} px: a head's step on stored features {fast / steps * 1000:.2f} ms, "
            f"an epoch {slow / fast:,.0f} times as fast as through the net",
            flush=True,
        )
