"""Extraction here against another checkout: `bench_extraction_versions.py OTHER [ARCH SIZE]`.

Each runs in a process of its own, in turn, on the same images; the ratio of the medians is printed
(above 1: this checkout is faster)."""

import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys, time, numpy as np, torch
torch.set_num_threads(1)
try:
    from finetune_nb.data.index import from_arrays
except ImportError:
    from finetune_nb.index import from_arrays
from finetune_nb.features import extract_features
from finetune_nb.models import load_resnet
arch, size, n = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(0)
model = load_resnet(arch, None, 10).eval()
pixels = np.random.default_rng(0).integers(0, 255, (n, size, size, 3)).astype(np.uint8)
images = from_arrays(pixels, np.arange(n) % 10)
extract_features(model, images.select(np.arange(64)), size=size, workers=0)
begin = time.perf_counter()
extract_features(model, images, pool=("mean", "max"), size=size, workers=0)
print(n / (time.perf_counter() - begin))
"""


def speed(checkout, arch, size, n):
    command = [sys.executable, "-c", PROGRAM, arch, str(size), str(n)]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


if __name__ == "__main__":
    other = Path(sys.argv[1])
    cases = [(sys.argv[2], int(sys.argv[3]), 600)] if len(sys.argv) > 3 else []
    for arch, size, n in cases or [("resnet20", 32, 4000), ("resnet18", 64, 1200)]:
        found = [(speed(HERE, arch, size, n), speed(other, arch, size, n)) for _ in range(5)]
        ours, theirs = (statistics.median(column) for column in zip(*found))
        ratios = sorted(a / b for a, b in found)
        print(
            f"{arch} at {size} px: {ours:,.0f} img/s, the other {theirs:,.0f}; ratio of medians "
            f"{ours / theirs:.2f} (runs {ratios[0]:.2f} … {ratios[-1]:.2f})",
            flush=True,
        )
