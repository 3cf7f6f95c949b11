"""What lesson 10 reports of strategies on photographs: real_strategies.py near | far | ood | slow |
many | activation.

near   a net that was trained on CIFAR-10's own pictures adapts, with 20 labels a class, to other
       pictures of the same classes (JPEG, noise, blur, low
       contrast) and to other labels for the same pictures (reversed)
far    ImageNet's ResNet-18 learns the classes of Caltech-101 and of CIFAR-10 (JPEG) from few labels
ood    the same net learns CIFAR-10 from 100 labels a class, by full fine-tuning and LP-FT, and is
       tested on what it learned and on pictures that are corrupted
slow   `ood` with a body that learns ten times slower than the head
many   `near` with 100 labels a class, for noise and for reversed labels
activation   another activation function in the net that was trained on CIFAR-10: what breaks, and
             how many steps mend it, at once or with a ramp

Reads FINETUNE_NB_DATA, writes ledgers to data/results/10_weight_tuning/. Every way of tuning gets
the same pictures and steps, and one of the same rates,
chosen on validation pictures with a seed of its own.
"""

import copy
import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from real_report import Report

from finetune_nb.data import load_images
from finetune_nb.models.edits import replace_activation
from finetune_nb.training.loop import recalibrate
from finetune_nb.evaluation import evaluate, holm, paired
from finetune_nb.data.index import from_arrays
from finetune_nb.models import load_resnet
from finetune_nb.models.anatomy import anatomy
from finetune_nb.training import Recipe, fit

REAL = Path(os.environ["FINETUNE_NB_DATA"])
report = Report("10_weight_tuning")
say = report.say
WAYS = {
    "full": {},
    "head": dict(strategy="head"),
    "lp-ft": dict(strategy="lp-ft"),
    "gradual": dict(strategy="gradual"),
    "discriminative": dict(strategy="discriminative"),
    "auto-rgn": dict(strategy="auto-rgn"),
    "surgical": dict(strategy="surgical"),
    "norm-only": dict(strategy="norm-only"),
    "lora": dict(strategy="lora"),
    "l2-sp": dict(strategy="l2-sp", pull=0.1),
}


def pixels_of(images, size):
    """uint8 [N, S, S, 3] and labels."""
    batches = list(images.loader(batch_size=500, size=size))
    return torch.cat([b.pixels for b in batches]).permute(
        0, 2, 3, 1
    ).contiguous().numpy(), torch.cat([b.labels for b in batches]).numpy()


def noise(x, sigma=20):
    return np.clip(x + np.random.default_rng(0).normal(0, sigma, x.shape), 0, 255).astype(np.uint8)


def blur(x):
    return np.stack(
        [
            np.asarray(Image.fromarray(one).filter(ImageFilter.GaussianBlur(x.shape[1] / 32)))
            for one in x
        ]
    )


def contrast(x):
    mean = x.mean((1, 2), keepdims=True)
    return (mean + 0.3 * (x - mean)).astype(np.uint8)


def same(x):
    return x


def tuned(start, part, shots, recipe, seed):
    model = start(seed)
    fit(model, part.few(shots, seed=seed), None, recipe.replace(seed=seed), progress=False)
    return model


def all_classes(*parts):
    """Every part must hold every class: a cut through rows that lie class by class would not."""
    for part in parts:
        assert len(np.unique(part.labels)) == len(part.classes), (
            f"only {len(np.unique(part.labels))} of {len(part.classes)} classes"
        )


def race(name, start, pool, valid, tests, shots, recipe, ways, rates, seeds):
    """Every way with the same pictures and steps: its rate by validation loss with a seed of its
    own, then `seeds` runs. {way: {test: right or wrong, bool [seeds, rows]}}."""
    all_classes(pool, valid, *tests.values())
    found, chosen = {}, {}
    for way, options in ways.items():
        rate = min(
            rates,
            key=lambda lr: (
                evaluate(
                    tuned(start, pool, shots, recipe.replace(lr=lr, **options), 1000),
                    valid,
                    size=recipe.size,
                ).nll
            ),
        )
        runs = [
            tuned(start, pool, shots, recipe.replace(lr=rate, **options), seed)
            for seed in range(seeds)
        ]
        found[way] = {
            name: np.stack([evaluate(model, test, size=recipe.size).right for model in runs])
            for name, test in tests.items()
        }
        chosen[way] = rate
        means = [right.mean().round(4) for right in found[way].values()]
        print(f"  {name}: {way}, rate {rate}: {means}", flush=True)
    for test in tests:
        base = found["full"][test]
        gains = holm({way: paired(found[way][test], base) for way in found if way != "full"})
        for way in found:
            right, gain = found[way][test], gains.get(way)
            against = f"against full {gain} (first: {way})" if gain else ""
            say(
                f"{name}, {test}, {way}",
                f"{name}, {test:24} {way:14} {right.mean():.3f}   {against}",
                n=len(tests[test]),
                values=right.mean(1).tolist(),
                rate=chosen[way],
                gain=gain,
            )
    return found


def near(
    shots=20,
    epochs=6,
    seeds=4,
    shifts=("JPEG", "noise", "blur", "low contrast", "labels reversed"),
    ways=WAYS,
    rates=(0.002, 0.01, 0.05),
):
    """Pictures come from the test split: the net has seen the originals of the training split."""

    def start(seed):
        return copy.deepcopy(source)

    source = load_resnet("resnet20", REAL / "weights/resnet20-12fca82f.th", 10)
    images = load_images("cifar10", "test")
    x, y = pixels_of(images, 32)
    order = np.random.default_rng(0).permutation(len(x))
    cut = {"test": order[:2000], "valid": order[2000:2500], "pool": order[2500:]}
    change = {"noise": noise, "blur": blur, "low contrast": contrast}
    groups = [group for group in anatomy(source).groups if group != "head"]
    ways = ways | {f"only {g}": dict(strategy="surgical", layers=(g,), head_lr=0.0) for g in groups}
    recipe = Recipe(epochs=epochs, batch_size=32, size=32)
    for shift in shifts:
        moved = change.get(shift, same)(x)
        labels = 9 - y if shift == "labels reversed" else y
        parts = {
            name: from_arrays(moved[at], labels[at], images.classes) for name, at in cut.items()
        }
        say(
            f"{shift}, as it comes",
            f"{shift}: as it comes {evaluate(source, parts['test'], size=32).accuracy:.3f}; "
            f"{shots} labels a class, {epochs} epochs, {seeds} seeds, {len(cut['test'])} test "
            "images",
            n=len(cut["test"]),
        )
        race(
            shift,
            start,
            parts["pool"],
            parts["valid"],
            {"test": parts["test"]},
            shots,
            recipe,
            ways,
            rates,
            seeds,
        )
    return {
        "data": f"cifar10 near, {shots} labels a class",
        "arch": "resnet20",
        "size": 32,
        "fingerprint": images.fingerprint(),
    }


def many():
    few = {way: WAYS[way] for way in ("full", "head", "auto-rgn", "norm-only", "lora")}
    return near(100, 4, 3, ("noise", "labels reversed"), few, (0.005, 0.03))


def imagenet(classes):
    def start(seed):
        torch.manual_seed(seed)
        return load_resnet("resnet18", REAL / "weights/resnet18_imagenet.pth", classes)

    return start


def cifar(size, n_test=1000):
    """Pool, validation and test pictures of CIFAR-10 (JPEG) at a size, and corrupted copies of the
    test pictures."""
    train, test = (
        load_images("cifar10", "train", limit=6000),
        load_images("cifar10", "test", limit=n_test),
    )
    (x, y), (tx, ty) = pixels_of(train, size), pixels_of(test, size)
    order = np.random.default_rng(0).permutation(len(x))  # the rows lie class by class
    x, y = x[order], y[order]
    tests = {
        "its own distribution": tx,
        "off it: noise": noise(tx, 30),
        "off it: blur": blur(tx),
        "off it: low contrast": contrast(tx),
    }
    return (
        from_arrays(x[1000:], y[1000:], train.classes),
        from_arrays(x[:1000], y[:1000], train.classes),
        {name: from_arrays(v, ty, train.classes) for name, v in tests.items()},
        train,
    )


def far(size=64, seeds=3):
    pool, valid, tests, images = cifar(size)
    race(
        "CIFAR-10",
        imagenet(10),
        pool,
        valid,
        {name: tests[name] for name in ("its own distribution", "off it: noise")},
        20,
        Recipe(epochs=6, batch_size=32, size=size),
        WAYS,
        (0.005, 0.03),
        seeds,
    )
    caltech = load_images("caltech101")
    pool, valid, test = caltech.three_way()
    test = test.limited(1000)
    parts = [from_arrays(*pixels_of(part, size), caltech.classes) for part in (pool, valid, test)]
    race(
        "Caltech-101",
        imagenet(len(caltech.classes)),
        parts[0],
        parts[1].limited(500),
        {"its own distribution": parts[2]},
        5,
        Recipe(epochs=4, batch_size=32, size=size),
        WAYS,
        (0.01, 0.05),
        seeds,
    )
    return {
        "data": "cifar10 and caltech101, few labels",
        "arch": "resnet18",
        "size": size,
        "fingerprint": images.fingerprint(),
    }


def slow():
    """The same with a body that learns ten times slower than the head, for both."""
    return ood(
        ways={
            "full": {},
            "full slow": dict(body_lr=0.1),
            "lp-ft slow": dict(strategy="lp-ft", body_lr=0.1),
        },
        rival="full slow",
        probe="lp-ft slow",
    )


def ood(
    size=64,
    seeds=3,
    shots=100,
    ways={way: WAYS[way] for way in ("full", "head", "lp-ft", "auto-rgn", "l2-sp")},
    rival="full",
    probe="lp-ft",
):
    """Kumar et al. 2022: equal pictures seen; the head first, or everything at once."""
    pool, valid, tests, images = cifar(size)
    found = race(
        f"CIFAR-10, {shots} labels",
        imagenet(10),
        pool,
        valid,
        tests,
        shots,
        Recipe(epochs=4, batch_size=32, size=size, augment="flip"),
        ways,
        (0.003, 0.015),
        seeds,
    )
    own, *others = tests
    for name, columns in ((own, [own]), (f"off it, mean of {len(others)}", others)):
        # The corrupted pictures are copies of the same ones: a row's score is its mean over copies.
        first, second = (
            np.mean([found[way][column] for column in columns], 0) for way in (probe, rival)
        )
        gain = paired(first, second)
        text = f"{probe} against {rival}, {name}"
        say(text, f"{text}: {gain}", n=len(tests[own]), gain=gain)
    return {
        "data": f"cifar10, {shots} labels a class",
        "arch": "resnet18",
        "size": size,
        "fingerprint": images.fingerprint(),
    }


def activation(shots=100, epochs=5, seeds=3, kinds=("relu", "leaky_relu", "gelu", "silu", "tanh")):
    """Validation accuracy after every epoch from the exchange on; the rate of each function by
    validation accuracy with a seed of its own."""
    source, images = (
        load_resnet("resnet20", REAL / "weights/resnet20-12fca82f.th", 10),
        load_images("cifar10", "test"),
    )
    x, y = pixels_of(images, 32)
    order = np.random.default_rng(0).permutation(len(x))
    test, valid, pool = (
        from_arrays(x[at], y[at], images.classes)
        for at in (order[:2000], order[2000:2500], order[2500:])
    )
    recipe, control = Recipe(epochs=epochs, batch_size=32, size=32), None

    def run(kind, ramp, lr, seed):
        model = replace_activation(source, kind)
        history = fit(
            model,
            pool.few(shots, seed=seed),
            valid,
            recipe.replace(ramp=ramp, lr=lr, seed=seed),
            progress=False,
        ).history
        return model, [row["valid_accuracy"] for row in history]

    for kind in kinds:
        swapped = replace_activation(source, kind)
        mended = recalibrate(copy.deepcopy(swapped), pool, 32)
        at_once, anew = (evaluate(net, test, size=32).accuracy for net in (swapped, mended))
        say(
            f"{kind}, untrained",
            f"{kind:11} as exchanged {at_once:.3f}, norms measured anew {anew:.3f}",
            n=len(test),
        )
        rate = max(
            (0.01, 0.05), key=lambda lr: run(kind, 0.0, lr, 1000)[1][-1]
        )  # by accuracy: a net that is sure of itself has a high loss and may yet be right
        for ramp in (0.0, 0.5) if kind != "relu" else (0.0,):
            runs = [run(kind, ramp, rate, seed) for seed in range(seeds)]
            values = np.stack([evaluate(model, test, size=32).right for model, _ in runs])
            path = np.mean([accuracies for _, accuracies in runs], 0)
            control = values if control is None else control
            gain = paired(values, control) if kind != "relu" else None
            against = f", against relu trained alike {gain} (first: {kind})" if gain else ""
            say(
                f"{kind}, ramp {ramp}",
                f"{kind:11} {'with a ramp' if ramp else 'at once':11}: validation after each "
                f"{-(-10 * shots // 32)} steps {', '.join(f'{v:.3f}' for v in path)}; test "
                f"{values.mean():.3f}{against}",
                n=len(test),
                values=values.mean(1).tolist(),
                path=path.tolist(),
                rate=rate,
                gain=gain,
            )
    return {
        "data": f"cifar10 activation, {shots} labels a class",
        "arch": "resnet20",
        "size": 32,
        "fingerprint": images.fingerprint(),
    }


if __name__ == "__main__":
    works = {
        "near": near,
        "far": far,
        "ood": ood,
        "many": many,
        "activation": activation,
        "slow": slow,
    }
    report.run(works, sys.argv[1:])
