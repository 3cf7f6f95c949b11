"""What lesson 5 reports on real people's labels: real_cleaning.py published | labels | leaks |
finetuned | training | hymenoptera.

Reads FINETUNE_NB_DATA, writes ledgers to data/results/05_preprocessing/. Where cleanlab is
installed its figures stand beside ours.
"""

import csv
import os
import sys
from pathlib import Path

import numpy as np
import torch
from real_report import Report
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier

from finetune_nb.data import load_images
from finetune_nb.environment import cache_folder
from finetune_nb.evaluation import evaluate, paired
from finetune_nb.features import extract_features, linear_probe
from finetune_nb.models import load_resnet
from finetune_nb.preprocessing import (
    FILTERS,
    SCORES,
    audit,
    fold_of,
    label_issues,
    label_quality,
    out_of_fold,
)
from finetune_nb.training import Recipe, fit

REAL = Path(os.environ["FINETUNE_NB_DATA"])
WEIGHTS = REAL / "weights/resnet18_imagenet.pth"
COLUMNS = ("aggre_label", "random_label1", "worse_label")
report = Report("05_preprocessing")
say = report.say


def cleanlab_scores(p, y, wrong):
    """cleanlab's own score and filters on the same probabilities, or None where it is not
    installed."""
    try:
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores
    except ImportError:
        print("cleanlab is not installed: its figures are left out")
        return None
    scores = {
        name: np.abs(get_label_quality_scores(y, p, method=name) - label_quality(p, y, name)).max()
        for name in SCORES
    }
    ours = {"confident_learning": "confident_learning", "prune_by_noise_rate": "noise_rate"}
    filters = {
        a: (
            f1_score(wrong, find_label_issues(y, p, filter_by=a, n_jobs=1)),
            f1_score(wrong, label_issues(p, y, b)),
        )
        for a, b in ours.items()
    }
    return scores, filters


def judged(stage, p, y, truth, compare=False):
    wrong = y != truth
    auroc = {name: float(roc_auc_score(wrong, -label_quality(p, y, name))) for name in SCORES}
    ap = float(average_precision_score(wrong, -label_quality(p, y)))
    f1 = {name: float(f1_score(wrong, label_issues(p, y, name))) for name in FILTERS}
    text = (
        f"{stage:44} wrong {wrong.mean():5.1%}  AUROC "
        + " ".join(f"{v:.4f}" for v in auroc.values())
        + f"  AP {ap:.3f}  F1 "
        + " ".join(f"{v:.3f}" for v in f1.values())
    )
    say(
        stage,
        text,
        n=len(y),
        auroc=auroc,
        ap=ap,
        f1=f1,
        agreement=float((p.argmax(1) == truth).mean()),
    )
    theirs = cleanlab_scores(p, y, wrong) if compare else None
    if theirs:
        text = (
            f"{'  cleanlab on the same probabilities':44} largest difference of a score "
            f"{max(theirs[0].values()):.0e}; F1 "
            + ", ".join(f"{name} {a:.3f} (ours {b:.3f})" for name, (a, b) in theirs[1].items())
        )
        say(stage + ", cleanlab", text, score_difference=theirs[0], f1=theirs[1])


def head(what):
    say(
        "head",
        f"{what:44}              AUROC {' / '.join(SCORES)}; AP; F1 of {' / '.join(FILTERS)}",
    )


def published():
    head("published out-of-fold predictions")
    for path in sorted((REAL / "label_errors").glob("*.npz")):
        with np.load(path, allow_pickle=False) as file:
            judged(
                path.stem,
                file["pred_probs"].astype(np.float64),
                file["noisy_labels"].astype(int),
                file["true_labels"].astype(int),
                compare=True,
            )
    return {"data": "label_errors"}


def net():
    torch.manual_seed(0)
    return load_resnet("resnet18", WEIGHTS, 10).eval()


def keys_of(images):
    return images.table["key"].take(np.asarray(images.rows_at(np.arange(len(images))))).to_pylist()


def human_labels(images):
    """Columns of CIFAR-10N for the rows of `images`, by path."""
    with np.load(REAL / "cifar10n_labels.npz", allow_pickle=False) as file:
        at = {str(path).removeprefix("train/"): i for i, path in enumerate(file["path"])}
        rows = [at[key.removeprefix("train/")] for key in keys_of(images)]
        return {name: file[name][rows].astype(int) for name in ("clean_label", *COLUMNS)}


def neighbour_votes(x, y, k=30, folds=5):
    """Out-of-fold class shares among the nearest neighbours: the second cheap model."""
    fold, out = fold_of(y, folds), np.zeros((len(y), y.max() + 1))
    x = (x - x.mean(0)) / (x.std(0) + 1e-6)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    for f in range(folds):
        out[fold == f] = (
            KNeighborsClassifier(k, weights="distance")
            .fit(x[fold != f], y[fold != f])
            .predict_proba(x[fold == f])
        )
    return out


def labels(n=20_000, size=96):
    images = load_images("cifar10", "train", limit=n)
    features = extract_features(
        net(), images, size=size, folder=cache_folder() / f"cleaning/{n}-{size}", progress=True
    )
    human, last, everything = (
        human_labels(images),
        features.of_layers(features.layers[-1]),
        np.asarray(features.array, np.float32),
    )
    head(f"CIFAR-10N, {len(images):,} images, ResNet-18 at {size} px")
    for column in COLUMNS:
        y, truth = human[column], human["clean_label"]
        parts = {
            "probe on the last block": out_of_fold(last, y, c=1e-3),
            "probe on all blocks": out_of_fold(everything, y, c=1e-3),
            "30 nearest neighbours": neighbour_votes(last, y),
        }
        for name, p in parts.items():
            judged(f"{column}, {name}", p, y, truth, compare=name == "probe on all blocks")
        judged(f"{column}, mean of the three", np.mean(list(parts.values()), 0), y, truth)
        judged(
            f"{column}, the probe in-sample",
            linear_probe(everything, y, 1e-3).predict_proba(everything),
            y,
            truth,
        )
        if column == COLUMNS[-1]:
            judged(
                f"{column}, a weak penalty, out of fold",
                out_of_fold(everything, y, c=0.3),
                y,
                truth,
            )
            judged(
                f"{column}, a weak penalty, in-sample",
                linear_probe(everything, y, 0.3).predict_proba(everything),
                y,
                truth,
            )
    return {"data": "cifar10n", "size": size, "fingerprint": images.fingerprint()}


def leaks(size=64, near=5):
    both = load_images("cifar10")
    features = extract_features(
        net(), both, size=size, folder=cache_folder() / f"cleaning/all-{size}", progress=True
    )
    splits, place = (
        both.column("split").astype(str),
        {key: i for i, key in enumerate(keys_of(both))},
    )
    with open(REAL / "cifar10_train_test_duplicates.csv") as file:
        judged_near = [
            (place[row["test"]], place[row["train"]])
            for row in csv.DictReader(file)
            if row["judgment"] == "1"
        ]
    middle = [name for name in features.layers if name.startswith(("layer2", "layer3"))]
    for name, layers in (
        ("last block", features.layers[-1:]),
        ("all blocks", features.layers),
        ("middle blocks", middle),
    ):
        similarity, place_of = nearest_in_train(features.of_layers(*layers), splits, near)
        first, among = (np.mean([j in place_of[i][:n] for i, j in judged_near]) for n in (1, near))
        order, found = (
            np.sort(list(values))[::-1]
            for values in (
                [s[0] for s in similarity.values()],
                [similarity[i][0] for i, j in judged_near if j in place_of[i]],
            )
        )
        text = (
            f"{name:14} of {len(judged_near)} judged near-duplicates the nearest training image "
            f"is the judged one for {first:.1%}, one of the {near} nearest for {among:.1%}"
        )
        looked = {}
        for goal in (0.5, 0.9, 0.95):
            needed = int(np.ceil(goal * len(judged_near)))
            if needed <= len(found):
                looked[str(goal)] = int((order >= found[needed - 1]).sum())
                text += (
                    f"; {goal:.0%} of all within the {looked[str(goal)]} most similar test "
                    f"images, {looked[str(goal)] / needed:.1f} to look at for each"
                )
        say(name, text, n=len(judged_near), nearest=first, among=among, looked=looked)
    return {"data": "cifar10 duplicates", "size": size, "fingerprint": both.fingerprint()}


def nearest_in_train(x, splits, k):
    """For each test row its k most similar training rows, by cosine of standardised columns:
    {place: similarities}, {place: places}."""
    x = torch.nn.functional.normalize(torch.from_numpy((x - x.mean(0)) / (x.std(0) + 1e-6)), dim=1)
    test, train = (torch.from_numpy(np.flatnonzero(splits == name)) for name in ("test", "train"))
    top = [(x[part] @ x[train].T).topk(k, 1) for part in test.split(1000)]
    similarity, at = (
        torch.cat([t.values for t in top]).tolist(),
        train[torch.cat([t.indices for t in top])].tolist(),
    )
    return dict(zip(test.tolist(), similarity)), dict(zip(test.tolist(), at))


RECIPE = Recipe(epochs=2, batch_size=32, lr=0.02, size=64, augment="crop-flip", weight_decay=1e-4)


def with_labels(images, y):
    """The same images with other labels."""
    table = images.table
    values = table["label"].to_numpy().copy()
    values[images.rows_at(np.arange(len(images)))] = y
    return images.with_table(
        table.set_column(table.column_names.index("label"), "label", [values.astype(np.int32)])
    )


def tuned(images, rows, recipe):
    """A ResNet-18 from ImageNet, fine-tuned on some of the rows."""
    torch.manual_seed(recipe.seed)
    model = load_resnet("resnet18", WEIGHTS, 10)
    model.info["size"] = recipe.size
    fit(model, images.select(rows), None, recipe, progress=False)
    return model


def probabilities(model, images):
    found = evaluate(model, images, size=model.info["size"])
    return torch.from_numpy(np.asarray(found.logits, np.float64)).softmax(1).numpy()


def finetuned(n=5000, folds=3):
    """Out-of-fold probabilities of fine-tuned nets, beside the probe on the same images, their
    mean, and the same nets in-sample."""
    images = load_images("cifar10", "train", limit=n)
    human = human_labels(images)
    features = extract_features(
        net(), images, size=96, folder=cache_folder() / f"cleaning/{n}-96", progress=True
    )
    head(f"CIFAR-10N, {n:,} images, ResNet-18 fine-tuned at {RECIPE.size} px")
    for column in ("aggre_label", "worse_label"):
        y, truth = human[column], human["clean_label"]
        noisy, fold, out, inside = (
            with_labels(images, y),
            fold_of(y, folds),
            np.zeros((n, 10)),
            np.zeros((n, 10)),
        )
        for f in range(folds):
            model = tuned(noisy, np.flatnonzero(fold != f), RECIPE.replace(seed=f))
            p = probabilities(model, noisy)
            out[fold == f] = p[fold == f]
            inside[fold != f] += p[fold != f] / (folds - 1)
        probe = out_of_fold(features.array, y, c=1e-3, folds=folds)
        for name, p in (
            ("probe at 96 px", probe),
            ("fine-tuned", out),
            ("mean of both", (probe + out) / 2),
            ("fine-tuned, in-sample", inside),
        ):
            judged(f"{column}, {name}", p, y, truth)
    return {"data": "cifar10n finetuned", "size": RECIPE.size, "fingerprint": images.fingerprint()}


def training(n=5000, seeds=3):
    """The same fine-tuning, step for step, on given, cleaned and true labels."""
    images, test = (
        load_images("cifar10", "train", limit=n),
        load_images("cifar10", "test", limit=5000),
    )
    human = human_labels(images)
    features = extract_features(
        net(), images, size=96, folder=cache_folder() / f"cleaning/{n}-96", progress=True
    )
    for column in ("aggre_label", "worse_label"):
        y, truth, result = human[column], human["clean_label"], {}
        p = out_of_fold(features.array, y, c=1e-3)
        arms = {
            "raw": np.ones(n, bool),
            "cleaned": ~label_issues(p, y, "noise_rate"),
            "oracle": y == truth,
        }
        noisy = with_labels(images, y)
        for seed in range(seeds):
            for arm, keep in arms.items():
                model = tuned(
                    noisy,
                    np.resize(np.random.default_rng(seed).permutation(np.flatnonzero(keep)), n),
                    RECIPE.replace(seed=seed),
                )
                result.setdefault(arm, []).append(evaluate(model, test, size=RECIPE.size).right)
                print(column, seed, arm, result[arm][-1].mean(), flush=True)
        raw = np.stack(result["raw"])
        for arm in ("cleaned", "oracle"):
            right = np.stack(result[arm])
            gain = paired(right, raw)
            say(
                f"{column}, {arm}",
                f"{column:14} raw {raw.mean():.4f}, {arm:7} {right.mean():.4f} "
                f"({arms[arm].sum()} of {n} rows), difference {gain} (first: {arm})",
                n=len(test),
                raw=raw.mean(1).tolist(),
                arm=right.mean(1).tolist(),
                gain=gain,
            )
    return {"data": "cifar10n training", "size": RECIPE.size, "fingerprint": images.fingerprint()}


def hymenoptera():
    images = load_images("hymenoptera")
    torch.manual_seed(0)
    found = audit(
        images, extract_features(load_resnet("resnet18", WEIGHTS, 2).eval(), images, progress=True)
    )
    for line in found.summary().splitlines():
        say("summary", line, n=len(images))
    for name in (
        "unreadable",
        "odd_size",
        "odd_aspect",
        "low_contrast",
        "exact_duplicate",
        "near_duplicate",
        "leak",
        "label",
    ):
        for i in found.suspects(name)[:4]:
            say(
                name,
                f"  {name:16} {found.keys[i]}  given {images.classes[images.labels[i]]}  score "
                f"{found.scores[name][i]:.3f}",
                n=len(images),
            )
    return {"data": "hymenoptera", "fingerprint": images.fingerprint()}


if __name__ == "__main__":
    works = {
        "published": published,
        "labels": labels,
        "leaks": leaks,
        "finetuned": finetuned,
        "training": training,
        "hymenoptera": hymenoptera,
    }
    report.run(works, sys.argv[1:])
