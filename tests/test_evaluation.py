"""Figures against oracles, intervals against their promise, stored evaluations."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score, log_loss

from finetune_nb.data import load_images
from finetune_nb.environment import FinetuneError
from finetune_nb.evaluation import Evaluation, Ledger, bootstrap, evaluate, mcnemar, metrics, wilson
from finetune_nb.models import load_resnet, to_input


def sample(n=400, k=5, seed=0, skill=1.5):
    rng = np.random.default_rng(seed)
    labels = rng.choice(k, n, p=np.arange(1, k + 1) / (k * (k + 1) / 2))
    return rng.normal(0, 1, (n, k)) + skill * np.eye(k)[labels], labels


def test_against_scikit_learn():
    logits, labels = sample()
    found, guess = metrics(logits, labels), logits.argmax(1)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert found["accuracy"] == (guess == labels).mean()
    assert math.isclose(found["balanced_accuracy"], balanced_accuracy_score(labels, guess))
    assert math.isclose(found["macro_f1"], f1_score(labels, guess, average="macro"))
    assert math.isclose(found["nll"], log_loss(labels, p), rel_tol=1e-9)


def test_ece_by_the_definition():
    logits, labels = sample(seed=3)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    sure, right = p.max(1), p.argmax(1) == labels
    total = 0.0
    for b in range(15):
        inside = (sure >= b / 15) & (sure < (b + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - sure[inside].mean())
    assert math.isclose(metrics(logits, labels)["ece"], total, abs_tol=1e-12)


def test_weights_are_repetitions():
    logits, labels = sample(60)
    times = np.random.default_rng(1).integers(0, 4, 60)
    repeated = metrics(np.repeat(logits, times, 0), np.repeat(labels, times))
    weighted = metrics(logits, labels, times[None])
    assert all(math.isclose(repeated[name], weighted[name][0], abs_tol=1e-9) for name in repeated)


def test_classes_that_are_absent_do_not_count():
    logits, labels = np.eye(4)[[0, 1, 1]] * 5.0, np.array([0, 1, 1])
    found = metrics(logits, labels)
    assert found["balanced_accuracy"] == 1 and found["macro_f1"] == 1


def test_bootstrap_interval_covers():
    """Over many test sets the 95% interval contains the population's accuracy about 95 times in 100."""
    hits = 0
    for seed in range(200):
        logits, labels = sample(200, 3, seed + 10)
        value, low, high = bootstrap(logits, labels, replicates=300)["accuracy"]
        hits += low <= TRUTH <= high
    assert binomtest(hits, 200, 0.95).pvalue > 1e-4, hits


TRUTH = metrics(*sample(400_000, 3, 1))["accuracy"]


def test_bootstrap_is_reproducible_and_ordered():
    logits, labels = sample()
    a, b = bootstrap(logits, labels), bootstrap(logits, labels)
    assert a == b and all(
        low <= value <= high for name, (value, low, high) in a.items() if name != "ece"
    )


@pytest.mark.parametrize("right, n", [(0, 10), (3, 10), (145, 153), (153, 153), (9_000, 10_000)])
def test_wilson_and_mcnemar_against_scipy(right, n):
    low, high = wilson(right, n)
    theirs = binomtest(right, n).proportion_ci(method="wilson")
    assert math.isclose(low, theirs.low, abs_tol=1e-6) and math.isclose(
        high, theirs.high, abs_tol=1e-6
    )
    assert math.isclose(
        mcnemar(right, n - right), binomtest(right, n).pvalue, rel_tol=1e-6, abs_tol=1e-12
    )


def test_comparison_is_paired_and_says_no_difference_inside_the_noise():
    logits, labels = sample(500)
    keys = [str(i) for i in range(500)]
    a = Evaluation(logits, labels, list("abcde"), keys)
    b = Evaluation(
        logits + np.random.default_rng(0).normal(0, 0.05, logits.shape), labels, list("abcde"), keys
    )
    worse = Evaluation(
        np.random.default_rng(0).normal(0, 1, logits.shape), labels, list("abcde"), keys
    )
    assert a.compare(a)["difference"] == 0 and a.compare(a)["verdict"] == "no difference"
    assert a.compare(b)["verdict"] == "no difference"
    assert (
        a.compare(worse)["verdict"] == "first better"
        and worse.compare(a)["verdict"] == "second better"
    )
    assert a.compare(worse)["low"] > 0
    with pytest.raises(FinetuneError, match="same images"):
        a.compare(Evaluation(logits, labels, list("abcde"), keys[::-1]))
    with pytest.raises(FinetuneError, match="same images"):
        a.compare(Evaluation(logits[:9], labels[:9], list("abcde")))


def test_tables(tmp_path):
    logits, labels = sample()
    e = Evaluation(
        logits, labels, list("abcde"), [str(i) for i in range(len(labels))], {"bad.jpg": "reason"}
    )
    assert np.array_equal(e.confusion(), confusion_matrix(labels, logits.argmax(1)))
    rows = e.per_class()
    assert [r[2] for r in rows] == sorted(r[2] for r in rows) and sum(r[1] for r in rows) == len(
        labels
    )
    wrong = e.mistakes()
    assert (e.predictions[wrong] != labels[wrong]).all() and (
        np.diff(e.probabilities.max(1)[wrong]) <= 1e-12
    ).all()
    assert "1 images set aside" in e.summary() and "balanced_accuracy" in e._repr_html_()
    again = Evaluation.load(e.save(tmp_path / "e.npz"))
    assert (
        np.array_equal(again.logits, e.logits)
        and again.keys == e.keys
        and again.set_aside == e.set_aside
    )
    (tmp_path / "bad.npz").write_bytes(b"PK")
    with pytest.raises(FinetuneError, match="bad.npz"):
        Evaluation.load(tmp_path / "bad.npz")


@pytest.mark.parametrize(
    "logits, labels, words",
    [
        (np.zeros((0, 2)), [], "nothing"),
        (np.zeros((3, 2)), [0, 1], "match"),
        (np.zeros((2, 2)), [0, 5], "outputs"),
        (np.zeros((2, 2)), [0, -1], "labels run"),
    ],
)
def test_inputs_that_do_not_fit(logits, labels, words):
    with pytest.raises(FinetuneError, match=words):
        Evaluation(logits, labels, ["a", "b"])


def test_evaluate_is_the_plain_loop():
    torch.manual_seed(0)
    net, images = load_resnet("resnet20", "shipped", 10), load_images("digits", limit=100)
    net.train()
    found = evaluate(net, images, batch_size=32)
    assert net.training
    net.eval()
    batch = next(iter(images.loader(batch_size=100, size=32)))
    with torch.no_grad():
        plain = net(to_input(batch.pixels, net)).numpy()
    assert np.allclose(found.logits, plain, atol=1e-4) and np.array_equal(
        found.labels, images.labels
    )
    assert found.keys == list(images.column("key"))


def test_evaluate_counts_bad_images(tmp_path):
    from conftest import make_photos

    folder = make_photos(tmp_path, classes=2, each=6)
    (folder / "class1" / "bad.png").write_bytes(b"\x89PNG broken")
    found = evaluate(load_resnet("resnet20", None, 2), load_images(folder))
    assert len(found) == 12 and list(found.set_aside) == ["class1/bad.png"]
    for path in folder.rglob("*.*"):
        path.write_bytes(b"broken")
    with pytest.raises(FinetuneError, match="none of the 13 images"):
        evaluate(load_resnet("resnet20", None, 2), load_images(folder))


def test_ledger(tmp_path):
    logits, labels = sample()
    ledger = Ledger()
    row = ledger.add("a stage", Evaluation(logits, labels, list("abcde")), seconds=1.5)
    assert row["accuracy"][1] <= row["accuracy"][0] <= row["accuracy"][2] and row["seconds"] == 1.5
    again = Ledger.load(ledger.save(tmp_path / "l.json", data="x"))
    assert (
        again.rows == ledger.rows
        and again.context["data"] == "x"
        and "torch" in again.context["versions"]
    )
    assert "a stage" in again.summary()
    (tmp_path / "l.json").write_text("{")
    with pytest.raises(FinetuneError, match="not a ledger"):
        Ledger.load(tmp_path / "l.json")
