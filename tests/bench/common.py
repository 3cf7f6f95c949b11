"""What the benchmarks share: alternating runs, medians, ratios."""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def timed(function):
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def compare(name, ours, plain, work, unit, repeats=3):
    """Run both in turn, so that a busy moment of the machine hits both; print medians and their
    ratio (above 1: ours is faster)."""
    times = {"ours": [], "plain": []}
    for _ in range(repeats):
        times["plain"].append(timed(plain))
        times["ours"].append(timed(ours))
    a, b = statistics.median(times["ours"]), statistics.median(times["plain"])
    ratios = sorted(p / o for p, o in zip(times["plain"], times["ours"]))
    print(
        f"{name:58} ours {work / a:10,.1f} {unit}/s   plain {work / b:10,.1f} {unit}/s   ratio "
        f"{b / a:.2f}  ({ratios[0]:.2f} … {ratios[-1]:.2f}; best against best "
        f"{min(times['plain']) / min(times['ours']):.2f})",
        flush=True,
    )
    return b / a


def jpeg_folder(folder, n=2000, size=32):
    """n glyphs as JPEG files in ImageFolder layout."""
    from PIL import Image

    from finetune_nb.data.glyphs import render_many

    pixels, labels = render_many(0, n)
    for i, (image, label) in enumerate(zip(pixels, labels % 10)):
        path = Path(folder) / f"class{label}" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(image)
        if size != 32:
            picture = picture.resize((size * 3 // 2, size), Image.Resampling.BICUBIC)
        picture.save(path, quality=90)
    return Path(folder)
