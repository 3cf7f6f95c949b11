"""The shape of the package: modules and lines by floor, and the walk of a source through it.

The walk counts which files a picture's road enters, from `load_images` over `fit` to `evaluate`,
and how often a function of a lower floor calls one of a higher floor (a climb)."""

import sys
import threading
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from test_house import FLOOR, FLOORS, MODULES, PACKAGE, name_of  # noqa: E402


def shape():
    "Print modules, lines and the longest line of each floor."
    print(f"{'floor':>5}  {'modules':>7}  {'lines':>6}  {'longest line':>12}  rooms")
    for number, rooms in enumerate(FLOORS):
        here = [p for p in MODULES if name_of(p).split(".")[0] in rooms]
        lines = [line for p in here for line in p.read_text(encoding="utf-8").splitlines()]
        if here:
            names = ", ".join(dict.fromkeys(name_of(p).split(".")[0] for p in here))
            print(f"{number:5}  {len(here):7}  {len(lines):6,}  {max(map(len, lines)):12}  {names}")


class Walk:
    "Counts calls from one module of the package to another, in every thread."

    def __init__(self):
        self.entered, self.climbs = Counter(), Counter()

    def module(self, frame):
        path = Path(frame.f_code.co_filename)
        return name_of(path) if PACKAGE in path.parents else None

    def __call__(self, frame, event, argument):
        if event != "call" or (here := self.module(frame)) is None:
            return
        caller = frame.f_back
        while caller is not None and self.module(caller) is None:
            caller = caller.f_back
        self.entered[here] += 1
        above = self.module(caller) if caller is not None else None
        if above and FLOOR[here.split(".")[0]] > FLOOR[above.split(".")[0]]:
            self.climbs[f"{above} → {here}"] += 1


def walk():
    "Print the files that a source enters on its way to an evaluation, and the climbs."
    from finetune_nb import Recipe, evaluate, fit, load_images, load_resnet

    seen = Walk()
    threading.setprofile(seen)
    sys.setprofile(seen)
    train, valid, test = load_images("digits", limit=100).three_way()
    model = load_resnet(num_classes=10)
    fit(model, train, valid, Recipe(epochs=1), progress=False)
    evaluate(model, test)
    sys.setprofile(None)
    threading.setprofile(None)
    print(f"\nfiles entered: {len(seen.entered)} ({', '.join(sorted(seen.entered))})")
    print(f"climbs: {sum(seen.climbs.values())} {dict(seen.climbs)}")


if __name__ == "__main__":
    shape()
    walk()
