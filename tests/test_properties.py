"""Properties that hold for any input, and files damaged at random."""

import io
import math
import os
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import chisquare

from finetune_nb.data.augmenting import AUGMENTATIONS, crop_box
from finetune_nb.data.batches import epoch_order
from finetune_nb.data import load_images
from finetune_nb.environment import (
    DOMAINS,
    FinetuneError,
    fingerprint,
    keyed_seed,
    keyed_uniform,
    mix64,
    write_atomic,
)
from finetune_nb.evaluation import Evaluation, compute_metrics, mcnemar, wilson
from finetune_nb.data.index import from_arrays
from finetune_nb.models import build, load_resnet, read_checkpoint
from finetune_nb.data.decoding import (
    BadImage,
    _plain_jpeg,
    decode_rgb,
    fit_square,
    npy_bytes,
    open_rgb,
    raw_pixels,
)
from finetune_nb.training import Recipe, rate

LONG = bool(os.environ.get("FINETUNE_NB_FUZZ"))
settings.register_profile(
    "here",
    max_examples=2000 if LONG else 60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("here")
seeds, epochs = st.integers(0, 2**63), st.integers(0, 10_000)


@given(st.one_of(st.integers(1, 60), st.integers(65_400, 65_700)), seeds, epochs)
def test_order_is_a_permutation(n, seed, epoch):
    order = epoch_order(n, seed, epoch, np.arange(n))
    assert np.array_equal(np.sort(order), np.arange(n))
    part = np.random.default_rng(0).integers(0, n, 20)
    assert np.array_equal(epoch_order(n, seed, epoch, part), order[part])


def test_order_looks_random():
    """Each sample comes about equally often at each tenth of the epoch, and neighbours are not
    kept together."""
    n, epochs = 50, 4000
    first = np.array([epoch_order(n, 1, e, np.arange(5)) for e in range(epochs)])
    counts = np.bincount(first.ravel(), minlength=n)
    assert abs(counts - epochs * 5 / n).max() < 6 * np.sqrt(epochs * 5 / n)
    order = epoch_order(100_000, 3, 0, np.arange(100_000))
    assert (
        abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
        and abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.02
    )


@pytest.mark.parametrize("n", [2, 3, 4])
def test_every_order_of_a_tiny_set_is_equally_likely(n):
    draws = 6000
    seen = Counter(tuple(epoch_order(n, s, 3, np.arange(n))) for s in range(draws))
    assert len(seen) == math.factorial(n)
    assert chisquare(list(seen.values())).pvalue > 1e-4


@pytest.mark.parametrize("n", [5, 12, 20, 70_000])
def test_each_sample_comes_equally_often_at_each_place(n):
    """Single places and pairs of places, over epochs, on both sides of the largest sorted set."""
    draws = 4000 if n < 100 else 1500
    first = np.array([epoch_order(n, 7, e, [0, 1, n - 1]) for e in range(draws)])
    bins = min(n, 20)
    for column in first.T:
        count = np.bincount(column * bins // n, minlength=bins)
        assert chisquare(count).pvalue > 1e-4
    pair = (first[:, 0] * bins // n) * bins + first[:, 1] * bins // n
    count = np.bincount(pair, minlength=bins**2)
    fits = np.ones((bins, bins)) if n > 20 else 1 - np.eye(n)
    likely = fits.ravel() > 0
    assert (count[~likely] == 0).all() and chisquare(count[likely]).pvalue > 1e-4


def test_no_two_purposes_share_numbers():
    """Each domain, also a user's own, has numbers that say nothing of those of another."""
    DOMAINS["a test of ours"] = "nothing"
    try:
        u = np.stack([keyed_uniform(0, name, np.arange(3000), 1)[:, 0] for name in DOMAINS])
    finally:
        del DOMAINS["a test of ours"]
    assert abs(np.corrcoef(u) - np.eye(len(u))).max() < 0.1
    assert len({keyed_seed(0, name, step) for name in DOMAINS for step in range(50)}) == 50 * (
        len(DOMAINS)
    )
    with pytest.raises(FinetuneError, match="a test of ours.*split, validation"):
        keyed_uniform(0, "a test of ours", [0], 1)


def test_a_selection_is_augmented_like_any_other():
    """What chose the rows of `few`, of a part or of a split says nothing of how they are
    turned."""
    images = load_images("digits")
    train = images.three_way()[0]
    for chosen in (train, train.few(10), images.divide(0.2)[1], images.limited(300)):
        u = keyed_uniform(0, "augmentation", chosen.rows_at(np.arange(len(chosen))), 8)
        spread = 4.5 * np.sqrt(1 / 12 / len(chosen))
        assert abs(u.mean(0) - 0.5).max() < spread


@given(seeds, epochs, st.lists(st.integers(0, 2**40), min_size=1, max_size=40), st.integers(1, 8))
def test_keyed_uniform_is_pointwise(seed, epoch, samples, k):
    u = keyed_uniform(seed, "order", samples, k, epoch)
    assert u.shape == (len(samples), k) and (u >= 0).all() and (u < 1).all()
    assert np.array_equal(keyed_uniform(seed, "order", samples[-1:], k, epoch)[0], u[-1])


def test_keyed_uniform_is_uniform():
    u = keyed_uniform(0, "split", np.arange(200_000), 4)
    counts = np.stack([np.histogram(u[:, i], 50, (0, 1))[0] for i in range(4)])
    chi = ((counts - 4000) ** 2 / 4000).sum(1)
    assert (chi < 110).all(), chi  # 49 degrees of freedom
    assert abs(np.corrcoef(u.T) - np.eye(4)).max() < 0.015
    others = [
        keyed_uniform(s, d, np.arange(1000), 1, e)[:, 0]
        for s, d, e in ((0, "split", 1), (1, "split", 0), (1, "split", 1), (0, "few", 0))
    ]
    assert all(abs(np.corrcoef(u[:1000, 0], other)[0, 1]) < 0.12 for other in others)


@given(st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=50, unique=True))
def test_mix_is_a_bijection(values):
    assert len(set(mix64(np.array(values, np.uint64)).tolist())) == len(values)


@given(st.sampled_from(sorted(AUGMENTATIONS)), st.integers(1, 6), st.integers(4, 24), seeds)
def test_augmentation_is_pointwise(name, n, size, seed):
    pixels = np.random.default_rng(seed % 1000).integers(0, 256, (n, size, size, 3), np.uint8)
    u = keyed_uniform(seed, "augmentation", np.arange(n), 8)
    whole = AUGMENTATIONS[name](pixels, u)
    assert whole.shape == pixels.shape and whole.dtype == np.uint8
    alone = np.concatenate([AUGMENTATIONS[name](pixels[i : i + 1], u[i : i + 1]) for i in range(n)])
    assert np.array_equal(whole, alone)


@given(st.lists(st.floats(0, 0.999), min_size=8, max_size=8), st.floats(0.05, 20))
def test_crop_lies_inside(u, ratio):
    left, top, width, height = crop_box(u, ratio)
    assert (
        0 <= left
        and 0 <= top
        and left + width <= 1 + 1e-9
        and top + height <= 1 + 1e-9
        and width > 0
        and height > 0
    )


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.floats(0.3, 1))
def test_any_shape_becomes_a_square(width, height, size, crop):
    assert fit_square(Image.new("RGB", (width, height), "red"), size, crop).shape == (size, size, 3)


@given(st.integers(1, 9), st.integers(1, 9))
def test_raw_pixels_round_trip(h, w):
    pixels = np.random.default_rng(h * 10 + w).integers(0, 256, (h, w, 3), np.uint8)
    assert np.array_equal(raw_pixels(npy_bytes(pixels)), pixels)


@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.booleans(),
    st.integers(1, 100),
    st.sampled_from([0, 1, 2]),
    st.booleans(),
    st.booleans(),
)
def test_the_fast_decoder_gives_the_pixels_of_pillow(
    width, height, grey, quality, subsampling, progressive, smooth
):
    draw = np.random.default_rng(width * 100 + height)
    pixels = (
        np.full((height, width, 3), 90, np.uint8)
        if smooth
        else draw.integers(0, 256, (height, width, 3), np.uint8)
    )
    image, buffer = Image.fromarray(pixels).convert("L" if grey else "RGB"), io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=subsampling, progressive=progressive)
    assert _plain_jpeg(buffer.getvalue()) == (width, height)
    assert np.array_equal(
        decode_rgb(buffer.getvalue()), np.asarray(Image.open(buffer).convert("RGB"))
    )


def picture(kind):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)).save(
        buffer, kind
    )
    return buffer.getvalue()


PICTURES = {
    kind: picture(kind) for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
} | {"NPY": npy_bytes(np.zeros((5, 6, 3), np.uint8))}


@given(st.sampled_from(sorted(PICTURES)), st.integers(0, 2**32), st.booleans())
def test_damaged_images_never_crash(kind, seed, cut):
    """Bytes changed or cut off at random: an image, or a BadImage with a reason; nothing else."""
    rng = np.random.default_rng(seed)
    data = bytearray(PICTURES[kind])
    for _ in range(rng.integers(1, 6)):
        data[rng.integers(len(data))] = rng.integers(256)
    if cut:
        data = data[: rng.integers(len(data))]
    try:
        assert open_rgb(bytes(data)).mode == "RGB"
    except BadImage as error:
        assert str(error)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("c") / "x.pth"
    torch.save(build("resnet20", 3).state_dict(), path)
    return path.read_bytes()


@settings(max_examples=500 if LONG else 25)
@given(st.integers(0, 2**32))
def test_damaged_checkpoints_never_run_or_crash(checkpoint, tmp_path, seed):
    rng = np.random.default_rng(seed)
    data = bytearray(checkpoint)
    span = 3000 if rng.random() < 0.7 else len(data)
    for _ in range(rng.integers(1, 30)):
        data[rng.integers(span)] = rng.integers(256)
    if rng.random() < 0.3:
        data = data[: rng.integers(len(data))]
    path = tmp_path / "damaged.pth"
    path.write_bytes(bytes(data))
    try:
        load_resnet("resnet20", path)
    except FinetuneError as error:
        assert "damaged.pth" in str(error)


@given(st.binary(max_size=300))
def test_any_bytes_as_a_checkpoint(tmp_path, data):
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(FinetuneError):
        read_checkpoint(tmp_path / "x.pt")


@given(st.integers(0, 400), st.integers(0, 400))
def test_intervals_and_p_values(a, b):
    assert 0 <= mcnemar(a, b) <= 1 and mcnemar(a, b) == mcnemar(b, a)
    if a + b:
        low, high = wilson(a, a + b)
        assert 0 <= low <= a / (a + b) <= high <= 1


@given(st.integers(1, 40), st.integers(2, 6), seeds)
def test_metrics_lie_in_range_and_do_not_depend_on_order(n, k, seed):
    rng = np.random.default_rng(seed % 2**32)
    logits, labels = rng.normal(0, 3, (n, k)), rng.integers(0, k, n)
    found, turned = compute_metrics(logits, labels), compute_metrics(logits[::-1], labels[::-1])
    assert all(0 <= found[name] <= 1 for name in found if name != "nll") and found["nll"] >= 0
    assert all(np.isclose(found[name], turned[name]) for name in found)
    assert np.allclose(Evaluation(logits, labels, range(k)).probabilities.sum(1), 1)


@given(st.integers(1, 500), st.sampled_from(["one-cycle", "cosine", "constant"]), st.floats(0, 0.9))
def test_rate_is_never_negative_or_above_one(total, schedule, warmup):
    recipe = Recipe(schedule=schedule, warmup=warmup)
    assert all(0 <= rate(step, total, recipe) <= 1 for step in range(total))
    assert rate(0, total, recipe) > 0


@given(
    st.lists(st.integers(0, 4), min_size=4, max_size=80), st.floats(0.05, 0.9), st.integers(0, 99)
)
def test_dividing_loses_and_doubles_nothing(labels, share, seed):
    images = from_arrays(np.zeros((len(labels), 2, 2), np.uint8), np.array(labels), list("abcde"))
    rest, part = images.divide(share, seed)
    assert sorted([*rest.column("key"), *part.column("key")]) == sorted(images.column("key"))
    again = images.divide(share, seed)[1]
    assert list(again.column("key")) == list(part.column("key"))


@given(st.binary(max_size=50), st.binary(max_size=50))
def test_write_atomic_replaces_or_keeps(tmp_path, old, new):
    path = tmp_path / "f"
    write_atomic(path, old)

    def fails(temporary):
        open(temporary, "wb").write(new)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        write_atomic(path, fails)
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["f"]
    assert write_atomic(path, new).read_bytes() == new


@given(st.lists(st.integers(), max_size=5), st.lists(st.integers(), max_size=5))
def test_fingerprint_tells_apart(a, b):
    assert (fingerprint(a) == fingerprint(b)) == (a == b)


def test_data_fingerprint_changes_with_anything():
    images = load_images("digits", limit=50)
    base = images.fingerprint()
    pixels = images.memory.copy()
    pixels[int(images.rows_at([0])[0]), 0, 0, 0] ^= 1
    from finetune_nb.data.index import Images

    assert Images(images.table, images.rows, pixels).fingerprint() != base
    assert images.select(np.arange(49)).fingerprint() != base and images.fingerprint() == base
