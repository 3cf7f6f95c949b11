"""Figures against oracles, intervals against their promise, stored evaluations."""

import math
import os
import socket
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import ROOT, make_photos
from scipy.stats import binomtest, norm, ttest_1samp
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score, log_loss

from finetune_nb.data import load_images
from finetune_nb.environment import FinetuneError
from finetune_nb.evaluation import (
    Evaluation,
    Ledger,
    bootstrap,
    compute_metrics,
    evaluate,
    holm,
    interval,
    mcnemar,
    paired,
    predict,
    predict_logits,
    wilson,
)
from finetune_nb.models import load_resnet, to_input, undisturbed


def sample(n=400, k=5, seed=0, skill=1.5):
    rng = np.random.default_rng(seed)
    labels = rng.choice(k, n, p=np.arange(1, k + 1) / (k * (k + 1) / 2))
    return rng.normal(0, 1, (n, k)) + skill * np.eye(k)[labels], labels


def test_against_scikit_learn():
    logits, labels = sample()
    found, guess = compute_metrics(logits, labels), logits.argmax(1)
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
    assert math.isclose(compute_metrics(logits, labels)["ece"], total, abs_tol=1e-12)


def test_weights_are_repetitions():
    logits, labels = sample(60)
    times = np.random.default_rng(1).integers(0, 4, 60)
    repeated = compute_metrics(np.repeat(logits, times, 0), np.repeat(labels, times))
    weighted = compute_metrics(logits, labels, times[None])
    assert all(math.isclose(repeated[name], weighted[name][0], abs_tol=1e-9) for name in repeated)


def test_classes_that_are_absent_do_not_count():
    logits, labels = np.eye(4)[[0, 1, 1]] * 5.0, np.array([0, 1, 1])
    found = compute_metrics(logits, labels)
    assert found["balanced_accuracy"] == 1 and found["macro_f1"] == 1


def test_bootstrap_interval_covers():
    """Over many test sets the 95% interval holds the population's accuracy 95 times in 100."""
    hits = 0
    for seed in range(200):
        logits, labels = sample(200, 3, seed + 10)
        value, low, high = bootstrap(logits, labels, replicates=300)["accuracy"]
        hits += low <= TRUTH <= high
    assert binomtest(hits, 200, 0.95).pvalue > 1e-4, hits


TRUTH = compute_metrics(*sample(400_000, 3, 1))["accuracy"]


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


def test_comparison_is_paired_and_says_not_shown_inside_the_noise():
    logits, labels = sample(500)
    keys = [str(i) for i in range(500)]
    a = Evaluation(logits, labels, list("abcde"), keys)
    b = Evaluation(
        logits + np.random.default_rng(0).normal(0, 0.05, logits.shape), labels, list("abcde"), keys
    )
    worse = Evaluation(
        np.random.default_rng(0).normal(0, 1, logits.shape), labels, list("abcde"), keys
    )
    assert a.compare(a)["difference"] == 0 and a.compare(a)["verdict"] == "not shown"
    assert a.compare(b)["verdict"] == "not shown"
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


def simulated(seeds, rows, gap, seed_spread, rng, skill=1.2, row_spread=1.0):
    """Right/wrong of two methods whose seeds and rows differ, and what each would score at last."""
    row = rng.normal(0, row_spread, rows)
    scale = np.sqrt(1 + seed_spread**2 + row_spread**2)

    def one(skill):
        made = rng.normal(skill, seed_spread, (seeds, 1))
        return made + row + rng.normal(size=(seeds, rows)) > 0

    truths = norm.cdf(skill / scale), norm.cdf((skill + gap) / scale)
    return one(skill), one(skill + gap), truths


@pytest.mark.parametrize(
    "seeds, rows, seed_spread", [(1, 60, 0), (1, 400, 0), (2, 200, 0.3), (3, 200, 0.3), (5, 100, 0)]
)
def test_intervals_cover_seeds_and_rows(seeds, rows, seed_spread):
    """Of 400 intervals of each kind, about 95 in 100 hold the truth; never fewer than 92."""
    rng, hits = np.random.default_rng(seeds), np.zeros(2)
    for _ in range(400):
        one, two, truths = simulated(seeds, rows, 0.3, seed_spread, rng)
        share, gain = interval(one), paired(two, one)
        hits += share.low <= truths[0] <= share.high, gain.low <= truths[1] - truths[0] <= gain.high
    assert (hits >= 0.92 * 400).all(), hits
    if (seeds, rows) in ((1, 400), (3, 200)):
        assert (hits <= 0.99 * 400).all(), "far wider than promised"


def test_rows_alone_do_not_cover_seeds():
    """What is mended: an interval over one of the two, where both vary, promises too much."""
    rng, hits = np.random.default_rng(0), np.zeros(2)
    for _ in range(200):
        one, _, (truth, _) = simulated(4, 300, 0, 0.6, rng)
        for i, over in enumerate(("rows", "both")):
            found = interval(one, over=over)
            hits[i] += found.low <= truth <= found.high
    assert hits[0] < 0.8 * 200 < 0.92 * 200 <= hits[1], hits


@pytest.mark.parametrize("seeds, rows", [(1, 30), (2, 8), (3, 50), (6, 1), (1, 1)])
@pytest.mark.parametrize("binary", (True, False))
def test_verdict_p_and_interval_agree(seeds, rows, binary):
    rng = np.random.default_rng(rows)
    for gap in np.linspace(-0.6, 0.6, 25):
        first, second = rng.normal(gap, 0.4, (seeds, rows)), rng.normal(0, 0.4, (seeds, rows))
        if binary:
            first, second = first > 0, second > 0
        for level in (0.9, 0.95):
            found, turned = paired(first, second, level), paired(second, first, level)
            expected = "first better" if found.low > 0 else "not shown"
            expected = "second better" if found.high < 0 else expected
            assert found.verdict == expected
            assert (found.p < 1 - level) == (found.verdict != "not shown"), found
            assert math.isclose(found.low, -turned.high) and math.isclose(found.p, turned.p)
            assert found.low <= found.value <= found.high


def test_one_margin_is_student_s_t():
    values = np.random.default_rng(0).normal(0.1, 0.2, 7)
    theirs = ttest_1samp(values, 0)
    found = paired(values, np.zeros(7), over="seeds")
    assert math.isclose(found.p, theirs.pvalue)
    assert np.allclose((found.low, found.high), theirs.confidence_interval(0.95))
    assert np.allclose(tuple(interval(values, over="seeds"))[1:], theirs.confidence_interval(0.95))
    right = np.arange(153) < 145
    assert tuple(interval(right))[1:] == wilson(145, 153)


def test_never_narrower_than_a_margin_alone():
    rng = np.random.default_rng(5)
    for _ in range(50):
        table = rng.normal(0, 1, (3, 1)) * rng.uniform(0, 2) + rng.normal(size=(3, 40))
        both = interval(table)
        for over in ("rows", "seeds"):
            one = interval(table, over=over)
            assert both.low <= one.low + 1e-12 and one.high <= both.high + 1e-12


def test_holm_against_a_table_by_hand():
    """Holm (1979): 4·.005, 3·.010, 2·.030, then never less than the one before."""
    assert np.allclose(holm([0.010, 0.040, 0.030, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert holm({"a": 0.6, "b": 0.5}) == {"a": 1.0, "b": 1.0} and holm([]) == []
    with pytest.raises(FinetuneError, match="0…1"):
        holm([1.5])


def test_holm_widens_intervals_until_they_agree():
    rng = np.random.default_rng(3)
    base = rng.random((3, 300)) < 0.8
    for _ in range(20):
        flips = [rng.uniform(0, 0.12) for _ in range(5)]
        several = {
            i: paired(base & (rng.random(base.shape) > f), base) for i, f in enumerate(flips)
        }
        for name, found in holm(several).items():
            assert found.p >= several[name].p and found.low <= several[name].low
            assert (found.p < 0.05) == (found.verdict != "not shown")
            assert found.comparisons == 5 and "Holm, 5" in repr(found)


@pytest.mark.parametrize(
    "scores, low, high",
    [([1], 0.2, 1), (np.ones((3, 50)), 0.9, 1), ([0, 0, 0], 0, 0.6), ([[1], [1]], 0.1, 1)],
)
def test_few_or_perfect_rows_have_wide_intervals(scores, low, high):
    found = interval(scores)
    assert 0 <= found.low <= max(low, found.value) and found.high >= min(high, found.value)
    assert found.low < found.high
    same = paired(scores, scores)
    assert same.value == 0 and same.low < 0 < same.high and same.verdict == "not shown"


def test_a_spread_that_cannot_be_told_is_infinite_and_says_why():
    one, alike = interval([0.91], over="seeds"), paired([0.9, 0.8], [0.7, 0.6], over="seeds")
    assert one.low == -math.inf and "one value" in repr(one) and np.isnan(one.errors).all()
    assert alike.verdict == "not shown" and alike.p == 1 and "all values are alike" in repr(alike)
    assert holm([alike, alike])[0].verdict == "not shown"


def test_repr_is_short():
    rng = np.random.default_rng(0)
    found = paired(rng.random((3, 400)) < 0.91, rng.random((3, 400)) < 0.90)
    words = repr(found).split()
    assert len(words) == 5 and words[0][:2] in ("+.", "-.") and words[-2:] == ["not", "shown"]
    assert repr(interval([0.0, 1.0] * 50)) == ".500 [.404, .596]"


@pytest.mark.parametrize(
    "scores, words",
    [
        ([], "shape"),
        ([[1, 2], [3]], "table"),
        ([1, np.nan], "finite"),
        (np.ones((1, 1, 1)), "shape"),
    ],
)
def test_scores_that_are_no_table(scores, words):
    with pytest.raises(FinetuneError, match=words):
        interval(scores)


def test_pairs_that_do_not_match():
    with pytest.raises(FinetuneError, match="same seeds and rows"):
        paired(np.ones((2, 5)), np.ones((2, 4)))
    with pytest.raises(FinetuneError, match="choose from"):
        paired([1, 0], [0, 1], over="columns")
    with pytest.raises(FinetuneError, match="right of"):
        wilson(3, 2)


def tiny(classes=10, seed=0):
    torch.manual_seed(seed)
    return load_resnet("resnet20", "shipped", classes)


@pytest.mark.parametrize(
    "run",
    [
        lambda net, images: evaluate(net, images),
        lambda net, images: predict(net, images),
        lambda net, images: predict_logits(net, images, device="cpu"),
    ],
)
def test_every_module_comes_back_in_its_own_mode(run):
    net, images = tiny(), load_images("digits", limit=20)
    net.train()
    net.bn1.eval()
    net.layer2[0].eval()
    before = [module.training for module in net.modules()]
    run(net, images)
    assert [module.training for module in net.modules()] == before


def test_mode_comes_back_after_an_error():
    net = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(2, 2)).train()
    net[0].eval()
    with pytest.raises(ZeroDivisionError), undisturbed(net, "cpu"):
        assert not net[1].training
        raise ZeroDivisionError
    assert [module.training for module in net] == [False, True]


def test_device_comes_back():
    """A device that is not the model's own stands in for a GPU: the model returns from it."""

    class Travelled(torch.nn.Linear):
        seen = ()

        def to(self, device, *rest):
            self.seen += (str(device),)
            return self  # what lies on the meta device could not come back

    net = Travelled(2, 2)
    with undisturbed(net, torch.device("meta")) as device:
        assert device.type == "meta"
    assert net.seen == ("meta", "cpu")


def test_a_row_that_stands_twice_is_answered_twice(tmp_path):
    folder = make_photos(tmp_path, classes=2, each=4)
    (folder / "class0" / "bad.png").write_bytes(b"broken")
    images = load_images(folder)
    bad = int(np.flatnonzero(["bad" in key for key in images.column("key")])[0])
    other = [i for i in range(len(images)) if i != bad]
    net = tiny(2)
    places = [other[3], bad, other[0], other[3], bad, bad, other[1], other[3]]
    guess, sure = predict(net, images.select(places), batch_size=3)
    alone, each = predict(net, images)
    assert (guess == alone[places]).all() and np.allclose(sure, each[places], atol=1e-6)
    assert (guess[[1, 4, 5]] == -1).all() and (guess[[0, 2, 3, 6, 7]] >= 0).all()
    found = evaluate(net, images.select(places))
    assert found.keys == [images.column("key")[i] for i in places if i != bad]


def test_predictions_are_the_evaluation_s():
    net, images = tiny(), load_images("digits", limit=50)
    found, (guess, sure) = evaluate(net, images), predict(net, images, batch_size=7)
    assert (guess == found.predictions).all()
    assert np.allclose(sure, found.probabilities.max(1), atol=1e-5)


def test_any_truncation_of_a_stored_evaluation_is_told(tmp_path):
    logits, labels = sample(50)
    path = Evaluation(logits, labels, list("abcde"), [str(i) for i in range(50)]).save(
        tmp_path / "e.npz"
    )
    whole = path.read_bytes()
    for end in [0, 1, 4, 30, *range(60, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:end])
        with pytest.raises(FinetuneError, match="e.npz"):
            Evaluation.load(path)
    np.savez(path, logits=logits)
    with pytest.raises(FinetuneError, match="not a stored evaluation"):
        Evaluation.load(path)
    with pytest.raises(FinetuneError, match="missing.npz"):
        Evaluation.load(tmp_path / "missing.npz")


def test_damaged_bytes_never_pass_as_another_error(tmp_path):
    logits, labels = sample(30)
    path = Evaluation(logits, labels, list("abcde")).save(tmp_path / "e.npz")
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(100):
        broken = bytearray(whole)
        for at in rng.integers(0, len(whole), 4):
            broken[at] = rng.integers(256)
        path.write_bytes(broken)
        try:
            Evaluation.load(path)
        except FinetuneError:
            pass


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": 3}', '{"rows": [1]}', '{"rows": [{}]}'])
def test_files_that_are_no_ledger(tmp_path, text):
    (tmp_path / "l.json").write_text(text)
    with pytest.raises(FinetuneError, match="l.json is not a ledger"):
        Ledger.load(tmp_path / "l.json")


def test_ledger_is_utf8_whatever_the_machine_speaks(tmp_path):
    ledger = Ledger()
    ledger.add("清洗 <b>", n=3, gain=paired([0.5, 0.6, 0.8], [0.4, 0.4, 0.5], over="seeds"))
    ledger.add("one seed", gain=interval([0.5], over="seeds"), values=np.arange(3))
    path = ledger.save(tmp_path / "l.json", data="蜂")
    code = (
        "import sys; from finetune_nb.evaluation import Ledger; found = Ledger.load(sys.argv[1]);"
        "found.save(sys.argv[1]); assert found.rows[0]['stage'] == '\\u6e05\\u6d17 <b>'"
    )
    plain = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT)}
    plain["PYTHONCOERCECLOCALE"] = "0"
    subprocess.run([sys.executable, "-c", code, str(path)], env=plain, check=True)
    again = Ledger.load(path)
    assert again.rows[1] == {"stage": "one seed", "gain": [0.5, None, None], "values": [0, 1, 2]}
    assert len(again.rows[0]["gain"]) == 3 and "&lt;b&gt;" in again._repr_html_()
    assert "清洗" in repr(again) and len(again) == 2


def test_bootstrap_s_memory_is_bounded():
    """Ten times the classes or the replicates take no more than the logits themselves do."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 500, 4000)
    logits = rng.normal(size=(4000, 500)).astype(np.float32)
    for replicates in (20, 400):
        tracemalloc.start()
        found = bootstrap(logits, labels, replicates=replicates)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert most < 250e6, most
    assert found["accuracy"][1] <= found["accuracy"][0] <= found["accuracy"][2]


def test_right_goes_into_paired():
    logits, labels = sample(300)
    one = Evaluation(logits, labels, list("abcde"))
    other = Evaluation(logits[:, ::-1], labels, list("abcde"))
    assert one.compare(other) == paired(one.right, other.right)
    assert one.compare(other)["verdict"] == "first better" and one.compare(other).p < 0.05


RANKS = """
import sys, numpy as np, torch
torch.set_num_threads(1)
from finetune_nb.data import load_images
from finetune_nb.evaluation import evaluate, predict
from finetune_nb.models import load_resnet
torch.manual_seed(0)
net, images = load_resnet("resnet20", None, 2), load_images(sys.argv[1])
found = evaluate(net, images, device="cpu")
np.savez(sys.argv[2] + sys.argv[3], logits=found.logits, guess=predict(net, images)[0])
assert found.keys == [k for k in images.column("key") if "bad" not in k], found.keys
assert list(found.set_aside) == ["class1/bad.png"], found.set_aside
one = evaluate(net, images.select([0]), device="cpu")
assert len(one) == 1 and np.allclose(one.logits[0], found.logits[0], atol=1e-5)
"""


def test_ranks_share_the_rows_and_return_the_whole(tmp_path):
    folder = make_photos(tmp_path, classes=2, each=5)
    (folder / "class1" / "bad.png").write_bytes(b"broken")
    alone = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANKS, str(folder), str(tmp_path / "out")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    together = alone | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    jobs = [subprocess.Popen([*command, str(r)], env=together | {"RANK": str(r)}) for r in range(2)]
    assert [job.wait(120) for job in jobs] == [0, 0]
    torch.manual_seed(0)
    net, images = load_resnet("resnet20", None, 2), load_images(folder)
    one, guess = evaluate(net, images), predict(net, images)[0]
    for name in "01":
        part = np.load(tmp_path / f"out{name}.npz")
        assert np.allclose(part["logits"], one.logits, atol=1e-5) and (part["guess"] == guess).all()


def test_a_world_that_cannot_be_joined_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(FinetuneError, match="torchrun"):
        evaluate(tiny(), load_images("digits", limit=20))
