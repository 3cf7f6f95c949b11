"""Label scores against published figures and an oracle; audits, twins, cleaning, refusals."""

import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, make_photos, needs_real_data, real_data
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from sklearn.metrics import roc_auc_score

from finetune_nb.data import load_images
from finetune_nb.environment import FinetuneError
from finetune_nb.preprocessing.rules import pair_checks, twin_groups
from finetune_nb.data.index import from_arrays
from finetune_nb.preprocessing.neighbours import (
    group_rows,
    near_duplicates,
    nearest,
    outlier_scores,
)
from finetune_nb.preprocessing.pixels import (
    MEASURES,
    channel_statistics,
    denoise,
    measure_pixels,
    pixel_pass,
)
from finetune_nb.preprocessing import (
    CHECKS,
    FILTERS,
    SCORES,
    audit,
    confident_joint,
    fold_of,
    label_issues,
    label_quality,
    out_of_fold,
)
from finetune_nb.preprocessing.reviewing import read_decisions, review


# Labels


@needs_real_data
@pytest.mark.parametrize("name, expected", [("cifar10s", 0.99688), ("cifar10n_aggregate", 0.97730)])
def test_published_figures(name, expected):
    with np.load(
        next((real_data() / "label_errors").glob(f"*{name}*.npz")), allow_pickle=False
    ) as file:
        p, y, truth = file["pred_probs"], file["noisy_labels"].astype(int), file["true_labels"]
    assert roc_auc_score(y != truth, -label_quality(p, y)) == pytest.approx(expected, abs=1e-4)


def random_case(seed, n=300, k=5):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, k, n)
    p = rng.dirichlet(np.full(k, 0.4), n)
    p[np.arange(n), y] += rng.random(n)
    return p / p.sum(1, keepdims=True), y


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6))
def test_scores_row_by_row(seed, k):
    p, y = random_case(seed, 40, k)
    for i in range(len(y)):
        own, others = p[i, y[i]], [p[i, c] for c in range(k) if c != y[i]]
        entropy = -sum(v * np.log(v) for v in p[i] if v > 0) / np.log(k)
        expected = {
            "self_confidence": own,
            "normalized_margin": (own - max(others) + 1) / 2,
            "confidence_weighted_entropy": np.log(entropy / own + 1) / (entropy / own),
        }
        for name, value in expected.items():
            assert label_quality(p, y, name)[i] == pytest.approx(value, rel=1e-6)
    certain = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert label_quality(certain, np.array([0, 0]), "confidence_weighted_entropy")[
        0
    ] == pytest.approx(1), "a certain, agreeing model is no suspicion"


def slow_joint(p, y):
    """The definition of Northcutt et al., counted in plain loops."""
    k = p.shape[1]
    threshold = [np.mean([p[i, c] for i in range(len(y)) if y[i] == c]) for c in range(k)]
    out = np.zeros((k, k), int)
    for i in range(len(y)):
        above = [c for c in range(k) if p[i, c] >= threshold[c]]
        if above:
            out[y[i], max(above, key=lambda c: p[i, c])] += 1
    return out


@pytest.mark.parametrize("seed", range(5))
def test_confident_joint_by_its_definition(seed):
    p, y = random_case(seed)
    assert (confident_joint(p, y) == slow_joint(p, y)).all()
    assert label_issues(p, y, "confident_learning").sum() == confident_joint(p, y).sum() - np.trace(
        confident_joint(p, y)
    )
    assert (label_issues(p, y, "argmax") == (p.argmax(1) != y)).all()


@pytest.mark.parametrize("seed", range(3))
def test_against_cleanlab(seed):
    rank = pytest.importorskip("cleanlab.rank", reason="cleanlab, an oracle, is not installed")
    from cleanlab.count import compute_confident_joint

    p, y = random_case(seed)
    for name in SCORES:
        np.testing.assert_allclose(
            label_quality(p, y, name), rank.get_label_quality_scores(y, p, method=name), atol=1e-6
        )
    assert (confident_joint(p, y) == compute_confident_joint(y, p, calibrate=False)).all()


def test_planted_mistakes_are_found():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, 600)
    x = np.eye(4)[truth] * 5 + rng.normal(size=(600, 4))
    y = truth.copy()
    wrong = rng.random(600) < 0.1
    y[wrong] = (truth[wrong] + rng.integers(1, 4, wrong.sum())) % 4
    p = out_of_fold(x, y, c=1.0)
    for name in SCORES:
        assert roc_auc_score(wrong, -label_quality(p, y, name)) > 0.95
    for name in FILTERS:
        flag = label_issues(p, y, name)
        assert wrong[flag].mean() > 0.6 and flag[wrong].mean() > 0.6, name


def test_out_of_fold_has_not_seen_the_row():
    """Features are noise, labels arbitrary: who has seen a row knows it, others cannot."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 400)), np.arange(200) % 2
    quality = label_quality(out_of_fold(x, y, c=10.0), y)
    assert abs((quality > 0.5).mean() - 0.5) < 0.15


def test_twins_lie_in_one_fold_and_classes_are_shared_out():
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], [100, 50, 10])
    head = group_rows(160, [3, 20, 60], [40, 3, 61])
    fold = fold_of(y, 5, 0, head)
    assert fold[3] == fold[40] == fold[20] and fold[60] == fold[61]
    for c in range(3):
        count = np.bincount(fold[y == c], minlength=5)
        assert count.min() >= (y == c).sum() // 5 - 3
    x = rng.normal(size=(160, 200)) * 0.01
    x[80:] = x[:80] + 0  # each row has an exact twin, with a random label of its own pair
    labels = np.tile(rng.integers(0, 2, 80), 2)

    def right(groups):
        return (out_of_fold(x, labels, c=100.0, groups=groups).argmax(1) == labels).mean()

    assert right(None) > 0.8 > 0.65 > right(group_rows(160, np.arange(80), np.arange(80, 160))), (
        "a twin in another fold gives the answer away"
    )


def test_random_labels_end_at_chance():
    rng = np.random.default_rng(1)
    y = rng.integers(0, 10, 1000)
    p = out_of_fold(rng.normal(size=(1000, 50)), y)
    assert abs((p.argmax(1) == y).mean() - 0.1) < 0.05


@pytest.mark.parametrize(
    "p, y, message",
    [
        (np.ones((3, 2)) / 2, [0, 1], "do not match"),
        (np.ones((2, 2)) / 2, [0, 2], r"0 … 1"),
        (np.ones((2, 2)), [0, 1], "sum 1"),
        (np.array([[np.nan, 1], [0.5, 0.5]]), [0, 1], "finite"),
        (np.zeros((0, 2)), np.zeros(0, int), "empty"),
        (np.ones((2, 2)) / 2, [0.5, 1.0], "whole numbers"),
    ],
)
def test_labels_that_do_not_fit(p, y, message):
    with pytest.raises(FinetuneError, match=message):
        label_quality(p, np.asarray(y))


def test_names_that_do_not_exist():
    p, y = random_case(0)
    for call in (
        lambda: label_quality(p, y, "entropy"),
        lambda: label_issues(p, y, "best"),
        lambda: denoise(np.zeros((1, 4, 4, 3), np.uint8), "wiener"),
        lambda: audit(load_images("digits", limit=20), checks=("labels",)),
    ):
        with pytest.raises(FinetuneError, match="choose from"):
            call()
    with pytest.raises(FinetuneError, match="class 1 has 2 images, fewer than the 5 folds"):
        out_of_fold(np.zeros((12, 2)), np.repeat([0, 1], [10, 2]))


# Pixels


def slow_measures(image):
    """One image, by the definitions, in float64."""
    grey = np.floor(
        (image[..., 0] * 19595.0 + image[..., 1] * 38470.0 + image[..., 2] * 7471.0 + 2**15) / 2**16
    )  # ITU-R 601, as Pillow rounds it
    rows = (
        image[::4] if grey.size > 4096 else image
    )  # of large images every fourth row tells the colour
    share = np.bincount(grey.astype(int).ravel(), minlength=256) / grey.size
    lap = np.array(
        [
            [
                grey[i - 1, j] + grey[i + 1, j] + grey[i, j - 1] + grey[i, j + 1] - 4 * grey[i, j]
                for j in range(1, grey.shape[1] - 1)
            ]
            for i in range(1, grey.shape[0] - 1)
        ]
    )
    mask = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]])
    second = [
        abs((grey[i - 1 : i + 2, j - 1 : j + 2] * mask).sum())
        for i in range(1, grey.shape[0] - 1)
        for j in range(1, grey.shape[1] - 1)
    ]
    ordered = np.sort(grey.ravel())
    return {
        "contrast": grey.std(),
        "entropy": -sum(s * np.log2(s) for s in share if s),
        "sharpness": lap.var(),
        "noise": np.sort(second)[(len(second) - 1) // 2] / (6 * 0.6745),
        "colour": (rows.max(2).astype(float) - rows.min(2)).mean(),
        "dark": ordered[int(np.ceil(0.99 * grey.size)) - 1],
        "bright": ordered[int(np.ceil(0.05 * grey.size)) - 1],
    }


@pytest.mark.parametrize("shape", [(9, 7), (32, 32), (90, 70)])
def test_measures_by_their_definitions(shape):
    rng = np.random.default_rng(0)
    images = np.stack(
        [
            rng.integers(0, 256, (*shape, 3)),
            np.full((*shape, 3), 30),
            np.clip(rng.normal(120, 9, (*shape, 3)), 0, 255),
        ]
    ).astype(np.uint8)
    found = measure_pixels(images)
    for i, image in enumerate(images):
        for name, value in slow_measures(image).items():
            assert found[name][i] == pytest.approx(value, rel=1e-4, abs=1e-3), name
        alone = measure_pixels(image[None])
        assert (
            all(alone[name][0] == found[name][i] for name in MEASURES)
            and (alone["thumb"][0] == found["thumb"][i]).all()
        ), "images do not change each other"
        assert (found["sums"][i] == image.reshape(-1, 3).astype(int).sum(0)).all() and (
            found["squares"][i] == (image.reshape(-1, 3).astype(int) ** 2).sum(0)
        ).all()


@pytest.mark.parametrize("sigma", [10, 25, 50])
def test_noise_is_estimated_in_grey_levels(sigma):
    rng = np.random.default_rng(0)
    edges = np.where(np.arange(96) // 24 % 2, 90, 160)[None, :, None] + np.zeros((96, 96, 3))
    noisy = np.clip(edges + rng.normal(0, sigma, (96, 96, 1)), 0, 255).astype(np.uint8)
    assert measure_pixels(noisy[None])["noise"][0] == pytest.approx(sigma, rel=0.12)


def test_one_pixel_images_have_measures():
    found = measure_pixels(np.full((2, 1, 1, 3), 7, np.uint8))
    assert all(np.isfinite(found[name]).all() for name in MEASURES)


def test_pass_does_not_depend_on_threads_parts_or_stops(tmp_path):
    images = load_images("digits", limit=200)
    whole = pixel_pass(images, workers=1)
    part = pixel_pass(images, tmp_path / "a", workers=3, part=64)
    (tmp_path / "a/part-000001.npz").unlink()
    again = pixel_pass(images, tmp_path / "a", part=64)
    for name, column in whole.items():
        assert (column == part[name]).all() and (column == again[name]).all(), name
    with pytest.raises(FinetuneError, match="something else; different: data"):
        pixel_pass(images.select(np.arange(100)), tmp_path / "a", part=64)


def test_each_image_is_decoded_once_and_done_parts_not_again(tmp_path, photos, monkeypatch):
    import finetune_nb.preprocessing.pixels as pixels

    count, original = [0], pixels.decode_rgb

    def counted(data):
        count[0] += 1
        return original(data)

    monkeypatch.setattr(pixels, "decode_rgb", counted)
    images = load_images(photos)
    audit(images, folder=tmp_path)
    assert count[0] == len(images)
    audit(images, folder=tmp_path)
    assert count[0] == len(images)


PROGRAM = """
import sys, numpy as np, torch
from finetune_nb.data import load_images
from finetune_nb.preprocessing import audit
torch.set_num_threads(1)
images = load_images(sys.argv[1])
found = audit(images, np.random.default_rng(0).normal(size=(len(images), 8)), folder=sys.argv[2])
found.to_parquet(sys.argv[3])
"""


def test_ranks_share_an_audit(tmp_path, photos):
    def start(name, out, **environment):
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(photos), str(tmp_path / name), str(tmp_path / out)],
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        )

    runs = [
        start("alone", "alone.parquet"),
        *(start("shared", f"rank{r}.parquet", RANK=str(r), WORLD_SIZE="2") for r in range(2)),
    ]
    assert [run.wait() for run in runs] == [0, 0, 0]
    import pyarrow.parquet as pq

    alone, *ranks = (
        pq.read_table(tmp_path / name)
        for name in ("alone.parquet", "rank0.parquet", "rank1.parquet")
    )
    assert all(one.equals(alone) for one in ranks)


def test_statistics_are_of_the_training_rows():
    images = load_images("digits")
    mean, std = audit(images, checks=("dark",)).statistics("train")
    train = images.split("train")
    pixels = images.memory[train.rows_at(np.arange(len(train)))] / 255
    np.testing.assert_allclose(mean, pixels.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std((0, 1, 2)), rtol=1e-9)
    with pytest.raises(FinetuneError, match="no pixel was read"):
        channel_statistics(pixel_pass(train), np.zeros(0, int))


def test_filters_remove_noise():
    rng = np.random.default_rng(0)
    clean = np.clip(np.linspace(40, 200, 32)[None, :, None] + np.zeros((3, 32, 32, 3)), 0, 255)
    clean[:, 8:24, 8:24] = 90
    noisy = np.clip(clean + rng.normal(0, 20, clean.shape), 0, 255).astype(np.uint8)
    before = np.abs(noisy - clean).mean()
    for method in ("median", "bilateral", "non-local means"):
        assert np.abs(denoise(noisy, method, 30.0) - clean).mean() < 0.75 * before, method
    assert denoise(noisy, "none") is noisy
    median = np.asarray(Image.fromarray(noisy[0]).filter(ImageFilter.MedianFilter(3)))
    assert (denoise(noisy, "median")[0] == median).all()


# Neighbours


def test_neighbours_by_all_pairs_and_by_cells():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2500, 24))
    x[2400:] = x[:100] + rng.normal(0, 0.03, (100, 24))
    z = (x - x.mean(0)) / x.std(0)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    similarity = z @ z.T
    np.fill_diagonal(similarity, -2)
    near, who = nearest(x, 5, exact=True)
    np.testing.assert_allclose(near, np.sort(similarity, 1)[:, ::-1][:, :5], atol=1e-5)
    np.testing.assert_allclose(similarity[np.arange(2500)[:, None], who], near, atol=1e-5)
    first, second, _ = near_duplicates(nearest(x, 5, exact=False))
    assert set(zip(first, second)) == {(i, i + 2400) for i in range(100)}


def test_odd_rows_score_high():
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [
            rng.normal(size=(200, 8)) + 4 * np.eye(8)[0],
            rng.normal(size=(200, 8)) - 4 * np.eye(8)[0],
            12 * np.eye(8)[1:3],
        ]
    )
    y = np.repeat([0, 1], [200, 202])
    y[5] = 1
    assert set(np.argsort(-outlier_scores(nearest(x, 10)))[:2]) <= {400, 401} or outlier_scores(
        nearest(x, 10)
    )[400:].min() > np.median(outlier_scores(nearest(x, 10)))
    assert np.argsort(-outlier_scores(nearest(x, 10), y))[:3].tolist().count(5) == 1


@pytest.mark.parametrize(
    "x, message",
    [
        (np.zeros((5,)), r"must be \[N, D\]"),
        (np.full((3, 2), np.nan), "3 rows of the features hold NaN"),
        (np.zeros((1, 4)), "no neighbours"),
    ],
)
def test_features_that_have_no_neighbours(x, message):
    with pytest.raises(FinetuneError, match=message):
        nearest(x)


def test_constant_columns_do_no_harm():
    x = np.random.default_rng(0).normal(size=(30, 5))
    wide = np.concatenate([x, np.ones((30, 3))], 1)
    np.testing.assert_allclose(nearest(wide, 3)[0], nearest(x, 3)[0], atol=1e-5)


# Audits


@pytest.fixture
def dirty(tmp_path):
    """Photographs of two splits with one defect of each kind, by name."""
    folder = make_photos(tmp_path / "photos", classes=2, each=24, split=True)
    rng = np.random.default_rng(0)

    def place(split, c, name):
        return folder / split / f"class{c}" / name

    (place("train", 0, "zz_text.jpg")).write_bytes(b"<html>not found</html>")
    whole = place("train", 1, "000.jpg").read_bytes()
    place("train", 1, "zz_cut.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    Image.new("RGB", (60, 60), (3, 2, 4)).save(place("train", 0, "zz_dark.png"))
    Image.new("RGB", (60, 60), (250, 252, 249)).save(place("train", 0, "zz_bright.png"))
    Image.fromarray(rng.integers(0, 255, (50, 900, 3), np.uint8)).save(
        place("train", 1, "zz_wide.png")
    )
    Image.fromarray(np.repeat(rng.integers(0, 255, (60, 60, 1), np.uint8), 3, 2)).save(
        place("train", 0, "zz_grey.png")
    )
    place("train", 0, "zz_copy.jpg").write_bytes(place("train", 0, "000.jpg").read_bytes())
    place("train", 1, "zz_leak.png").write_bytes(place("test", 1, "003.png").read_bytes())
    return folder


def flagged(found, check):
    return {found.keys[i].split("/")[-1] for i in found.suspects(check)}


def test_each_defect_is_named(dirty):
    found = audit(load_images(dirty))
    for check, name in {
        "unreadable": "zz_text.jpg",
        "dark": "zz_dark.png",
        "bright": "zz_bright.png",
        "odd_aspect": "zz_wide.png",
        "grey": "zz_grey.png",
        "leak": "zz_leak.png",
    }.items():
        assert name in flagged(found, check), (check, flagged(found, check))
    assert flagged(found, "exact_duplicate") == {"zz_copy.jpg"}
    assert flagged(found, "truncated") == {"zz_cut.jpg"} or "zz_cut.jpg" in flagged(
        found, "unreadable"
    )
    assert {"zz_dark.png", "zz_bright.png"} <= flagged(found, "low_contrast")
    assert not any(found.keys[i].startswith("test/") for i in found.suspects("leak"))
    assert "labels were not judged" in found.summary()


def test_cleaning_keeps_reasons_and_is_undone(dirty, tmp_path):
    before = {path: path.read_bytes() for path in dirty.rglob("*.*")}
    images = load_images(dirty)
    found = audit(images, folder=tmp_path / "audit")
    kept = found.clean()
    reasons = dict(found.set_aside)
    assert len(kept) + len(reasons) == len(images) == len(found.images)
    assert next(r for k, r in reasons.items() if k.endswith("zz_leak.png")) == ["leak"]
    assert {
        row["key"]: row["reasons"]
        for row in json.loads((tmp_path / "audit/set_aside.json").read_text())
    } == reasons
    assert len(found.clean(checks=())) == len(images)
    assert before == {path: path.read_bytes() for path in dirty.rglob("*.*")}


def test_decisions_outlive_the_process(dirty, tmp_path):
    images = load_images(dirty)
    found = audit(images, folder=tmp_path)
    leak, other = (
        int(found.suspects("leak")[0]),
        int(np.flatnonzero((images.labels == 0) & ~np.any(list(found.flags.values()), 0))[0]),
    )
    found.decide(leak, "keep")
    found.decide(other, "class1")
    with open(tmp_path / "decisions.jsonl", "a") as file:
        file.write('{"key": "cut o')
    again = audit(images, folder=tmp_path)
    kept = again.clean()
    keys = kept.table["key"].take(np.asarray(kept.rows_at(np.arange(len(kept))))).to_pylist()
    assert (
        again.keys[leak] in keys
        and kept.labels[keys.index(again.keys[other])] == 1
        and images.labels[other] == 0
    )
    again.decide(other, "drop")
    assert read_decisions(tmp_path / "decisions.jsonl")[again.keys[other]] == "drop", (
        "a line after a broken one must count"
    )
    with pytest.raises(FinetuneError, match="no decision: say keep, drop"):
        again.decide(0, "class7")


def test_widget_saves_as_it_goes(dirty, tmp_path):
    found = audit(load_images(dirty), folder=tmp_path)
    box = review(found, "dark")
    keep, drop, relabel, _ = box.children[2].children[:4]
    first = found.keys[found.suspects("dark")[0]]
    assert first in box.children[0].value
    box.children[2].children[4].value = "class1"
    relabel.click()
    assert read_decisions(tmp_path / "decisions.jsonl") == {first: "class1"}
    for _ in range(5):
        keep.click()
    assert "are decided" in box.children[0].value


@pytest.mark.parametrize("check", CHECKS)
def test_every_check_can_be_shown(dirty, check):
    images = load_images(dirty)
    rng = np.random.default_rng(0)
    figure = audit(
        images,
        np.repeat(images.labels[:, None], 9, 1) + rng.normal(0, 0.6, (len(images), 9)),
        folds=3,
    ).show(check)
    assert figure.axes


def test_cleaning_must_leave_every_class(dirty):
    found = audit(load_images(dirty))
    found.flags["leak"] = np.asarray(found.images.labels) == 1
    with pytest.raises(FinetuneError, match="no training image of the class class1"):
        found.clean()
    with pytest.raises(FinetuneError, match="was not made"):
        audit(load_images(dirty), checks=("dark",)).show("blurred")


def test_a_class_with_one_image_is_not_judged():
    rng = np.random.default_rng(0)
    images = from_arrays(rng.integers(0, 255, (61, 8, 8, 3), np.uint8), np.r_[np.arange(60) % 2, 2])
    found = audit(images, np.repeat(images.labels[:, None], 9, 1) + rng.normal(0, 0.6, (61, 9)))
    assert "1 classes have fewer than 5 images" in found.summary() and not found.flags["label"][60]


def test_features_that_cannot_tell_rows_apart():
    rng = np.random.default_rng(0)
    images = from_arrays(rng.integers(0, 255, (60, 8, 8, 3), np.uint8), np.arange(60) % 2)
    assert (
        "too alike to tell twins"
        in audit(images, np.eye(2)[images.labels] + rng.normal(0, 0.01, (60, 2))).summary()
    )


def test_rows_must_match(dirty):
    images = load_images(dirty)
    with pytest.raises(FinetuneError, match=f"3 rows of features but {len(images)} images"):
        audit(images, np.zeros((3, 4)))
    with pytest.raises(FinetuneError, match="do not match"):
        audit(images, pred_probs=np.ones((3, 2)) / 2)
    with pytest.raises(FinetuneError, match="selection is empty"):
        audit(images.select(np.zeros(len(images), bool)))


NO_PAIRS = (np.zeros(0, int), np.zeros(0, int), np.zeros(0, np.float32))


def test_twins_across_and_within():
    digest = np.array([5, 5, 5, 6, 0, 0], np.uint64)
    splits = ["train", "train", "test", "valid", "train", "train"]
    _, flag, shown = pair_checks(digest, NO_PAIRS, splits)
    assert np.flatnonzero(flag["leak"]).tolist() == [0, 1], "both copies in train, not one"
    assert np.flatnonzero(flag["exact_duplicate"]).tolist() == [1]
    assert set(zip(shown["leak"][0], shown["leak"][1])) == {(2, 0), (2, 1)}, "beside the test image"
    near = (np.array([0, 2]), np.array([1, 3]), np.array([0.99, 0.97]))
    _, flag, _ = pair_checks(
        np.arange(1, 5, dtype=np.uint64), near, ["valid", "test", "train", "train"]
    )
    assert np.flatnonzero(flag["leak"]).tolist() == [0]
    assert np.flatnonzero(flag["near_duplicate"]).tolist() == [3]


def slow_twins(digest, pairs, splits):
    """Groups by walking along links; flags by their definitions, row by row."""
    n = len(digest)
    linked = {i: {i} for i in range(n)}
    links = [(i, j) for i in range(n) for j in range(i) if digest[i] and digest[i] == digest[j]]
    for i, j in [*links, *zip(*pairs[:2])]:
        linked[int(i)].add(int(j))
        linked[int(j)].add(int(i))
    groups = []
    for i in range(n):
        found, waiting = {i}, [i]
        while waiting:
            new = linked[waiting.pop()] - found
            found |= new
            waiting += new
        groups.append(found)

    def first(rows):
        return min(rows, key=lambda r: (("test", "valid", splits[r]).index(splits[r]), r))

    flags = {
        "leak": [i for i in range(n) if splits[first(groups[i])] != splits[i]],
        "exact_duplicate": [
            i
            for i in range(n)
            if any(
                digest[i] and digest[i] == digest[j] and splits[i] == splits[j] for j in range(i)
            )
        ],
    }
    near = [i for i in range(n) if any(j < i and splits[i] == splits[j] for j in groups[i])]
    copies = [
        min(j for j in groups[i] if splits[i] == splits[j]) for i in range(n)
    ]  # the first of the group in the row's own split
    flags["near_duplicate"] = [
        i for i in near if not (digest[i] and digest[i] == digest[copies[i]])
    ]
    return [min(found) for found in groups], flags


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 12), st.integers(0, 12))
def test_groups_of_any_number_in_any_splits(seed, n, kinds, links):
    rng = np.random.default_rng(seed)
    digest = rng.integers(0, kinds + 1, n).astype(np.uint64)  # 0 is unreadable
    first, second = rng.integers(0, n, links), rng.integers(0, n, links)
    keep = first < second
    pairs = (first[keep], second[keep], rng.uniform(0.95, 1, keep.sum()).astype(np.float32))
    splits = rng.choice(["train", "valid", "test"], n)
    groups, flags = slow_twins(digest, pairs, splits)
    score, flag, shown = pair_checks(digest, pairs, splits)
    assert twin_groups(digest, pairs).tolist() == groups
    for name, expected in flags.items():
        assert np.flatnonzero(flag[name]).tolist() == expected, name
        assert sorted(shown[name][1].tolist()) == expected
        assert (score[name][expected] >= 0.95).all() and (score[name][~flag[name]] == 0).all()
        for twin, row in zip(*shown[name][:2]):
            assert groups[twin] == groups[row] and twin != row
            assert (splits[twin] == splits[row]) == (name != "leak")
    assert not (flag["leak"] & (splits == "test")).any()


@pytest.mark.parametrize("copies", [2, 3, 14])
@pytest.mark.parametrize("held", ["test", "valid"])
def test_no_copy_of_a_held_out_image_stays_in_train(copies, held):
    rng = np.random.default_rng(copies)
    pixels = rng.integers(0, 256, (60, 16, 16, 3), np.uint8)
    splits = np.array(["train"] * 40 + [held] * 20)
    pixels[rng.permutation(40)[:copies]] = pixels[50]
    pixels[51] = pixels[50]  # twice in the held-out part, too
    pixels[39] = pixels[38]  # a second group, inside train
    images = from_arrays(pixels, np.arange(60) % 2, splits=splits)
    same_all = (pixels == pixels[50]).all((1, 2, 3))
    for features in (None, pixels.reshape(60, -1)[:, :50].astype(float)):
        found = audit(images, features, checks=("exact_duplicate", "near_duplicate", "leak"))
        kept = found.clean()
        rows = kept.rows_at(np.arange(len(kept)))
        same = (pixels[rows] == pixels[50]).all((1, 2, 3))
        assert sorted(rows[same]) == [50, 51], "none in train, and both held-out rows"
        assert (kept.column("split").astype(str) == held).sum() == 20
        heads = {int(found.groups[row]) for row in np.flatnonzero(same_all)}
        assert len(heads) == 1 and (found.groups == heads.pop()).sum() == same_all.sum()


def test_a_chain_of_near_twins_across_splits():
    """Each is like the next one only; the last lies in test: the whole chain leaves train."""
    near = (np.arange(5), np.arange(1, 6), np.full(5, 0.96, np.float32))
    splits = ["train", "train", "valid", "train", "train", "test"]
    digest = np.arange(1, 7, dtype=np.uint64)
    score, flag, shown = pair_checks(digest, near, splits)
    assert np.flatnonzero(flag["leak"]).tolist() == [0, 1, 2, 3, 4]
    assert twin_groups(digest, near).tolist() == [0] * 6
    assert score["leak"][0] == pytest.approx(0.96), "it hangs on the chain, not on the test image"


def test_images_without_a_split():
    pixels = np.random.default_rng(0).integers(0, 256, (30, 12, 12, 3), np.uint8)
    pixels[[5, 9, 20]] = pixels[2]
    images = from_arrays(pixels, np.arange(30) % 2)
    table = images.table.drop_columns(["split"])
    for some in (images, images.with_table(table)):
        found = audit(some, checks=("exact_duplicate", "near_duplicate", "leak"))
        assert np.flatnonzero(found.flags["exact_duplicate"]).tolist() == [5, 9, 20]
        assert not found.flags["leak"].any() and found.groups[[5, 9, 20]].tolist() == [2, 2, 2]


def test_groups_serve_as_folds():
    from sklearn.model_selection import GroupKFold

    pixels = np.random.default_rng(0).integers(0, 256, (60, 12, 12, 3), np.uint8)
    pixels[10:40] = pixels[np.repeat([0, 1, 2], 10)]
    groups = audit(from_arrays(pixels, np.arange(60) % 2), checks=("leak",)).groups
    fold = fold_of(np.arange(60) % 2, 4, groups=groups)
    for head in range(3):
        assert len(np.unique(fold[groups == head])) == 1 and (groups == head).sum() == 11
    for a, b in GroupKFold(4).split(groups, groups=groups):
        assert not set(groups[a]) & set(groups[b])


def test_a_burst_longer_than_the_list_of_neighbours():
    """Forty frames in two scenes: each list of ten neighbours is full before the other scene."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(240, 64))
    x[200:] = x[200] + rng.normal(0, 0.1, (40, 64))
    x[220:] += rng.normal(0, 0.25, 64)  # the second scene is a little further away
    around = nearest(x, 5)
    short = near_duplicates(around, 0.9)
    first, second, similarity = near_duplicates(around, 0.9, x)
    assert len(np.unique(group_rows(240, *short[:2])[200:])) > 1, "lists alone tear it apart"
    assert set(group_rows(240, first, second)[200:]) == {200}
    assert (first < second).all() and (similarity >= 0.9).all()
    assert len(set(zip(first, second))) == len(first)
    z = (x - x.mean(0)) / x.std(0)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    alike = np.argwhere(np.triu(z @ z.T > 0.9 + 1e-6, 1))
    groups = group_rows(240, first, second)
    assert (groups[alike[:, 0]] == groups[alike[:, 1]]).all()


def test_checks_leave_valid_and_test_alone(dirty):
    """Whatever is flagged there stays; the summary counts it; a person's word is another matter."""
    images = load_images(dirty)
    found = audit(images)
    for name in found.flags:
        found.flags[name] |= found.held_out
    before = int(found.held_out.sum())
    assert before > 0
    kept = found.clean(CHECKS[:9])
    splits = kept.column("split").astype(str)
    assert (np.isin(splits, ("valid", "test"))).sum() == before
    assert not any(key.startswith("test/") for key, _ in found.set_aside)
    lines = {line.split()[0]: line.split() for line in found.summary().splitlines()}
    assert lines["dark"][-1] == str(before) == lines["label"][-1]
    assert f"{before} flagged rows lie in valid and test" in found.summary()
    place = int(np.flatnonzero(found.held_out)[0])
    found.decide(place, "drop")
    assert len(found.clean(("dark",))) < len(images)
    assert (found.keys[place], ["dropped by hand"]) in found.set_aside


def test_a_class_of_twins_is_not_judged():
    """All of a class in one group: no probe has learned it, which says nothing about its labels."""
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], [60, 60, 6])
    x = np.eye(3)[y] * 6 + rng.normal(size=(126, 3))
    x[120:] = x[120] + 1e-3
    groups = np.arange(126)
    groups[120:] = 120
    p = out_of_fold(x, y, c=1.0, groups=groups)
    assert np.isnan(p[120:]).all() and np.isfinite(p[:120]).all()
    for name in SCORES:
        assert np.isnan(label_quality(p, y, name)[120:]).all()
        assert np.isfinite(label_quality(p, y, name)[:120]).all()
    for name in FILTERS:
        alone = label_issues(p[:120], y[:120], name)
        assert (label_issues(p, y, name) == np.r_[alone, np.zeros(6, bool)]).all()
    assert (confident_joint(p, y) == confident_joint(p[:120], y[:120])).all()
    assert not label_issues(np.full((4, 2), np.nan), np.zeros(4, int)).any()


def test_two_classes_one_of_them_twins():
    """Without the twins only one class is left to learn from: nothing in that fold is judged."""
    y = np.repeat([0, 1], [20, 5])
    groups = np.r_[np.arange(20), np.full(5, 20)]
    p = out_of_fold(np.random.default_rng(0).normal(size=(25, 4)), y, groups=groups)
    fold = fold_of(y, 5, groups=groups)
    assert np.isnan(p[fold == fold[20]]).all() and np.isfinite(p[fold != fold[20]]).all()


def test_an_audit_says_what_it_did_not_judge():
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], [60, 60, 6])
    x = np.eye(3)[y] * 6 + rng.normal(size=(126, 3))
    pixels = rng.integers(0, 255, (126, 8, 8, 3), np.uint8)
    x[120:], pixels[120:] = x[120], pixels[120]
    found = audit(from_arrays(pixels, y), x, limits={"duplicate": 0.9999})
    assert np.isnan(found.scores["label"][120:]).all() and not found.flags["label"][120:].any()
    assert "6 labels were not judged: twins hold together" in found.summary()
    p = np.eye(3)[y] * 0.8 + 0.2 / 3
    p[7] = np.nan
    found = audit(from_arrays(pixels, y), pred_probs=p)
    assert np.isnan(found.scores["label"][7]) and not found.flags["label"][7]
    assert "1 labels were not judged: pred_probs has NaN" in found.summary()


def test_decisions_do_not_pass_to_other_pictures(dirty, tmp_path):
    """A picture replaced in place, by one of as many bytes: the old pass and decision are gone."""
    images = load_images(dirty)
    found = audit(images, folder=tmp_path)
    place = next(i for i, key in enumerate(found.keys) if key.endswith("zz_dark.png"))
    other = next(i for i, key in enumerate(found.keys) if key.endswith("zz_grey.png"))
    found.decide(place, "drop")
    found.decide(other, "keep")
    bright = [p for p in dirty.rglob("zz_bright.png")][0]
    target = [p for p in dirty.rglob("zz_dark.png")][0]
    target.write_bytes(bright.read_bytes())
    again = audit(load_images(dirty), folder=tmp_path)
    place = again.keys.index(found.keys[place])
    assert not again.flags["dark"][place] and again.flags["bright"][place]
    assert again.decisions == {found.keys[other]: "keep"}
    assert "1 decisions were made about other pictures" in again.summary()
    again.decide(place, "keep")
    third = audit(load_images(dirty), folder=tmp_path)
    assert third.decisions == again.decisions and len(third.decisions) == 2


def test_pictures_of_one_colour_but_other_shape_are_no_copies():
    columns = [np.zeros((h, w, 3), np.uint8) for h, w in ((8, 18), (18, 8), (12, 12))]
    from finetune_nb.preprocessing.pixels import _digest

    assert len({_digest(pixels) for pixels in columns}) == 3


def test_without_faiss_all_pairs_are_compared(monkeypatch):
    import importlib.util

    import finetune_nb.preprocessing.neighbours as neighbours

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "faiss" else found(name)
    )
    x = np.random.default_rng(0).normal(size=(300, 8))
    x[299] = x[3]
    with pytest.raises(FinetuneError, match=r"finetune_nb\[faiss\]"):
        nearest(x, 3, exact=False)
    expected = nearest(x, 3, exact=True)
    monkeypatch.setattr(neighbours, "ALL_PAIRS", 100)
    with pytest.warns(UserWarning, match="faiss is not installed"):
        got = nearest(x, 3)
    assert all((a == b).all() for a, b in zip(got, expected))
    images = from_arrays(
        np.arange(300 * 192).reshape(300, 8, 8, 3).astype(np.uint8), np.zeros(300, int)
    )
    with pytest.warns(UserWarning):
        assert "faiss is not installed" in audit(images, x, checks=("outlier",)).summary()


def test_review_without_widgets(dirty, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(FinetuneError, match=r"finetune_nb\[widgets\]"):
        review(audit(load_images(dirty), checks=("dark",)), "dark")


def test_full_disk_leaves_what_was_decided(dirty, tmp_path, monkeypatch):
    found = audit(load_images(dirty), folder=tmp_path)
    found.decide(0, "keep")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        FinetuneError, match="could not be written.*No space left.*earlier ones are kept"
    ):
        found.decide(1, "drop")
    assert read_decisions(tmp_path / "decisions.jsonl")[found.keys[0]] == "keep"


@needs_real_data
def test_hymenoptera_picture_of_nothing_is_found():
    images = load_images("hymenoptera")
    found = audit(
        images, checks=("odd_size", "odd_aspect", "low_contrast", "blurred", "grey", "unreadable")
    )
    assert len(found) == len(images) and sum(flag.sum() for flag in found.flags.values()) > 0
