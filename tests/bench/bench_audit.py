"""An audit's speed and memory: the pixel pass and the whole for growing sets, and both beside
cleanvision where it is installed.

bench_audit.py [sizes …]   (default 5000 20000 50000; 200000 takes several minutes)
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import jpeg_folder, timed

ROUND = """
import json, resource, sys, time
import numpy as np
sys.path.insert(0, sys.argv[1])
from finetune_nb.data import load_images
from finetune_nb.preprocessing.pixels import pixel_pass
from finetune_nb.preprocessing import audit
from finetune_nb.preprocessing.rules import CHECKS
images = load_images(sys.argv[2])
n = int(sys.argv[3])
# Rows again and again: the work and the memory are those of n images.
images = images.select(np.resize(np.arange(len(images)), n))
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
begin = time.perf_counter()
if sys.argv[5] == "pixels": pixel_pass(images, sys.argv[4])
else:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(n, 64)).astype(np.float32)
    checks = [name for name in CHECKS if name != "label"]
    audit(images, features, folder=sys.argv[4], checks=checks)
took = time.perf_counter() - begin
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
print(json.dumps({"seconds": took, "memory": memory, "base": base}))
"""


def one(folder, n, what):
    with tempfile.TemporaryDirectory() as out:
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                ROUND,
                str(Path(__file__).resolve().parents[2]),
                str(folder),
                str(n),
                out,
                what,
            ],
            capture_output=True,
            text=True,
            check=True,
        )
    return json.loads(done.stdout.splitlines()[-1])


def growth(folder, sizes):
    for what in ("pixels", "audit"):
        found = [one(folder, n, what) for n in sizes]
        for n, row in zip(sizes, found):
            print(
                f"{what:8} {n:8,} images  {n / row['seconds']:8,.0f} images/s   "
                f"{row['seconds']:7.1f} s   peak {row['memory']:6,.0f} MB (before the work "
                f"{row['base']:,.0f})",
                flush=True,
            )
        if len(sizes) > 1:
            slope = np.polyfit(np.log(sizes), np.log([row["seconds"] for row in found]), 1)[0]
            print(f"{what:8} seconds grow as n^{slope:.2f}", flush=True)


def neighbours(images, name):
    """The index against all pairs, on the thumbnails that the pixel pass keeps."""
    from finetune_nb.preprocessing.neighbours import nearest
    from finetune_nb.preprocessing.pixels import pixel_pass

    x, found = pixel_pass(images)["thumb"].astype(np.float32), {}
    exact, index = (
        timed(lambda way=way: found.__setitem__(way, nearest(x, exact=way)[1]))
        for way in (True, False)
    )
    share = [
        np.mean(
            [
                len(set(a[:k]) & set(b[:k])) / k
                for a, b in zip(found[True][:5000], found[False][:5000])
            ]
        )
        for k in (1, 10)
    ]
    print(
        f"{name:28} neighbours of {len(x):,} rows: all pairs {exact:.1f} s, index {index:.1f} s, "
        f"ratio {exact / index:.1f}; the index finds {share[0]:.1%} of the nearest and "
        f"{share[1]:.1%} of the ten nearest",
        flush=True,
    )


def beside_cleanvision(folder, name):
    from finetune_nb.data import load_images
    from finetune_nb.preprocessing import audit

    try:
        from cleanvision import Imagelab
    except ImportError:
        print("cleanvision is not installed: the comparison is left out")
        return
    checks = (
        "unreadable",
        "odd_size",
        "odd_aspect",
        "dark",
        "bright",
        "low_contrast",
        "blurred",
        "grey",
        "exact_duplicate",
        "near_duplicate",
    )
    images = load_images(folder)

    def theirs():
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            Imagelab(data_path=str(folder)).find_issues(n_jobs=2)

    ratios = []
    theirs(), audit(images, checks=checks)  # imports, and the files into the system's cache
    for _ in range(5):
        slow, fast = timed(theirs), timed(lambda: audit(images, checks=checks))
        ratios.append(slow / fast)
        print(
            f"{name:28} ours {len(images) / fast:8,.0f} images/s   cleanvision "
            f"{len(images) / slow:8,.0f} images/s   ratio {slow / fast:.1f}",
            flush=True,
        )
    print(f"{name:28} median ratio {np.median(ratios):.1f}", flush=True)


if __name__ == "__main__":
    sizes = [int(a) for a in sys.argv[1:]] or [5000, 20_000, 50_000]
    with tempfile.TemporaryDirectory() as work, tempfile.TemporaryDirectory() as cache:
        os.environ["FINETUNE_NB_CACHE"] = cache
        small = jpeg_folder(Path(work) / "small", 3000)
        growth(small, sizes)
        beside_cleanvision(small, "JPEG, 32 px")
        beside_cleanvision(jpeg_folder(Path(work) / "large", 200, 384), "JPEG, 576 × 384 px")
        real = os.environ.get("FINETUNE_NB_DATA")
        if real and (Path(real) / "cifar10-train.tar").is_file():
            from finetune_nb.data import load_images

            neighbours(load_images("cifar10"), "CIFAR-10")
        if real and (Path(real) / "hymenoptera_data").is_dir():
            beside_cleanvision(Path(real) / "hymenoptera_data", "hymenoptera")
