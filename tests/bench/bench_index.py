"""Scanning, opening and reading: the index against torchvision's ImageFolder."""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import compare, jpeg_folder, timed
from torchvision.datasets import ImageFolder

from finetune_nb.data import load_images


def many_files(folder, n=50_000, classes=100):
    for c in range(classes):
        (Path(folder) / f"c{c:03d}").mkdir(parents=True)
    for i in range(n):
        (Path(folder) / f"c{i % classes:03d}" / f"{i}.jpg").write_bytes(b"x")
    return folder


def imports(repeats=7):
    """The difference of medians, both run in turn: a start takes seconds, and what is asked for is
    milliseconds of it."""

    def once(code):
        return timed(lambda: subprocess.run([sys.executable, "-c", code], check=True))

    pairs = [(once("import torch"), once("import torch, finetune_nb")) for _ in range(repeats)]
    base, both = (statistics.median(column) for column in zip(*pairs))
    print(
        f"{'import finetune_nb beyond import torch':58} {(both - base) * 1000:.0f} ms (import "
        f"torch itself: {base:.2f} s)"
    )


if __name__ == "__main__":
    imports()
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory() as cache,
        tempfile.TemporaryDirectory() as pictures,
    ):
        os.environ["FINETUNE_NB_CACHE"] = cache
        many_files(folder)
        compare(
            "scanning a folder of 50,000 files",
            lambda: load_images(folder),
            lambda: ImageFolder(folder),
            50_000,
            "files",
        )
        jpeg_folder(pictures, 2000)
        images, plain = load_images(pictures), ImageFolder(pictures)
        order = np.random.default_rng(0).permutation(len(images))
        compare(
            "rows out of Images, decoded, in random order",
            lambda: [images[int(i)] for i in order],
            lambda: [plain[int(i)] for i in order],
            len(order),
            "rows",
        )
        packed = load_images(images.pack(Path(pictures) / "packed", encoding="raw"))
        compare(
            "rows out of packed raw shards",
            lambda: [packed[int(i)] for i in order],
            lambda: [plain[int(i)] for i in order],
            len(order),
            "rows",
        )
