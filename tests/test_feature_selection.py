"""Selectors against independent oracles, leaks refused, chance where there is nothing to learn."""

import numpy as np
import pytest
import torch
from sklearn.feature_selection import f_classif

from finetune_nb.training import loop as engine
from finetune_nb.features import lasso
from finetune_nb.environment import FinetuneError
from finetune_nb.features import METHODS, Moments, group_lasso, select_features
from finetune_nb.features import Features, extract_features, linear_probe
from finetune_nb.data.index import from_arrays
from finetune_nb.models import load_model, load_resnet, save_model, to_input
from finetune_nb.features import Selection, selected_model
from finetune_nb.training import Recipe, fit


def made(n=300, d=40, useful=6, k=3, seed=0, strength=1.5):
    """The first `useful` columns tell the classes apart, the next are their copies, then noise."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, k, n)
    x = rng.normal(size=(n, d))
    x[:, :useful] += strength * rng.normal(size=(k, useful))[y]
    x[:, useful : 2 * useful] = x[:, :useful] + rng.normal(0, 0.05, (n, useful))
    x *= rng.uniform(0.1, 10, d)
    meta = {
        "data": "d",
        "model": "m",
        "columns": [["layer1.0", "mean", d // 2], ["layer2.0", "mean", d - d // 2]],
    }
    return Features(x.astype(np.float16), y, np.arange(n, dtype=np.uint64), meta)


def test_moments_in_blocks_equal_two_passes(monkeypatch):
    features = made()
    rows = np.sort(np.random.default_rng(1).choice(300, 211, replace=False))
    whole = Moments(features.array, features.labels[rows], rows)
    monkeypatch.setattr(lasso, "_BLOCK", 7)
    small = Moments(features.array, features.labels[rows], rows)
    x = features.array[rows].astype(np.float64)
    for found in (whole, small):
        np.testing.assert_allclose(found.variance, x.var(0), rtol=1e-9)
        np.testing.assert_allclose(found.f, f_classif(x, features.labels[rows])[0], rtol=1e-8)


def test_constant_columns_have_no_f_and_are_not_chosen():
    features = made()
    features.array[:, 3] = 2.5
    assert Moments(features.array, features.labels, np.arange(300)).f[3] == 0
    for method in METHODS:
        assert not select_features(features, method=method, k=39).mask[3], method
    with pytest.raises(
        FinetuneError, match="only 39 columns vary over these rows, fewer than k=40"
    ):
        select_features(features, method="variance", k=40)


@pytest.mark.parametrize("penalty", [0.005, 0.03, 0.1])
def test_group_lasso_is_at_its_optimum(penalty):
    """The conditions of Karush, Kuhn and Tucker, with the gradient from autograd in float64."""
    features = made(seed=3)
    rows = np.arange(0, 300, 2)
    y = features.labels[rows]
    w, b = group_lasso(features.array, y, rows, penalty, steps=3000, tolerance=1e-8)
    x = features.array[rows].astype(np.float64)
    x = torch.from_numpy((x - x.mean(0)) / x.std(0))
    tw, tb = (torch.from_numpy(v.copy()).requires_grad_() for v in (w, b))
    torch.nn.functional.cross_entropy(x @ tw + tb, torch.from_numpy(y)).backward()
    g, length = tw.grad.numpy(), np.linalg.norm(w, axis=1)
    assert 0 < (length > 0).sum() < 40 or penalty == 0.005
    assert np.linalg.norm(g[length == 0], axis=1).max(initial=0) <= penalty * 1.001
    np.testing.assert_allclose(
        g[length > 0], -penalty * w[length > 0] / length[length > 0, None], atol=penalty * 2e-3
    )
    assert np.abs(tb.grad.numpy()).max() < 1e-4


def test_group_lasso_without_penalty_is_the_l2_free_fit():
    features = made(n=200, d=8, useful=2, strength=0.5)
    w, b = group_lasso(
        features.array, features.labels, np.arange(200), 0.0, steps=3000, tolerance=1e-9
    )
    from sklearn.linear_model import LogisticRegression

    x = features.array.astype(np.float64)
    x = (x - x.mean(0)) / x.std(0)
    oracle = (
        LogisticRegression(C=np.inf, max_iter=5000, tol=1e-10)
        .fit(x, features.labels)
        .predict_proba(x)
    )
    z = np.exp(x @ w + b)
    np.testing.assert_allclose(z / z.sum(1, keepdims=True), oracle, atol=2e-3)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("random", "variance")])
def test_useful_columns_are_found(method):
    picked = np.flatnonzero(select_features(made(strength=2.0), method=method, k=6).mask)
    assert (picked < 12).sum() >= 5, picked


def test_redundancy_counts():
    """F takes a column and its copy; mRMR takes one of each pair first."""
    rng = np.random.default_rng(0)
    y = np.arange(400) % 4
    signal = 2.0 * np.eye(4)[y] + rng.normal(size=(400, 4))
    x = np.concatenate(
        [signal, signal + rng.normal(0, 0.05, (400, 4)), rng.normal(size=(400, 8))], 1
    )
    features = Features(
        x.astype(np.float16),
        y,
        np.arange(400, dtype=np.uint64),
        {"data": "d", "model": "m", "columns": [["layer1.0", "mean", 16]]},
    )
    distinct = {
        method: len(
            set((np.flatnonzero(select_features(features, method=method, k=4).mask) % 4).tolist())
        )
        for method in ("mrmr", "anova")
    }
    assert distinct["mrmr"] == 4 > distinct["anova"]


def test_random_does_not_look_and_differs_by_seed():
    a, b, c = (select_features(made(), method="random", k=10, seed=s).mask for s in (0, 0, 1))
    assert (a == b).all() and (a != c).any()


def test_rows_outside_have_no_say():
    features = made()
    rows = np.arange(150)
    before = {m: select_features(features, method=m, k=8, rows=rows).mask for m in METHODS}
    features.array[150:] = np.random.default_rng(9).normal(size=(150, 40)) * 50
    features.labels[150:] = 0
    for method, mask in before.items():
        assert (select_features(features, method=method, k=8, rows=rows).mask == mask).all(), method
    assert (
        select_features(features, method="anova", k=8, rows=np.arange(300) < 150).mask
        == before["anova"]
    ).all()


def test_a_planted_leak_is_refused():
    features = made()
    picked = select_features(features, k=5, rows=np.arange(200))
    assert picked.held_out(features, np.arange(200, 300)).shape == (100, 5)
    with pytest.raises(FinetuneError, match="1 of these 101 rows took part in the selection"):
        picked.held_out(features, np.arange(199, 300))


@pytest.mark.parametrize("method", METHODS)
def test_random_labels_end_at_chance(method):
    features = made(n=600, d=200, strength=0.0)
    features.labels[:] = np.random.default_rng(5).integers(0, 2, 600)
    right = 0
    for f in range(3):
        inside = np.arange(600) % 3 != f
        picked = select_features(features, method=method, k=20, rows=inside)
        right += (
            linear_probe(picked.take(features, inside), features.labels[inside]).predict(
                picked.held_out(features, ~inside)
            )
            == features.labels[~inside]
        ).sum()
    assert abs(right / 600 - 0.5) < 3.5 * 0.5 / 600**0.5, right / 600


def test_kept_and_refused(tmp_path):
    features = made()
    picked = select_features(features, k=7)
    picked.save(tmp_path / "s.npz")
    again = Selection.load(tmp_path / "s.npz")
    assert (
        (again.mask == picked.mask).all()
        and again.by_layer() == picked.by_layer()
        and again.meta["method"] == "group_lasso"
    )
    assert sum(chosen for chosen, _ in again.by_layer().values()) == 7 == len(again)
    with pytest.raises(FinetuneError, match="took part"):
        again.held_out(features)
    other = made()
    other.meta["model"] = "another"
    with pytest.raises(FinetuneError, match="features of another model"):
        picked.take(other)
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(FinetuneError, match="not a stored selection"):
        Selection.load(tmp_path / "bad.npz")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(method="best"), "choose from variance"),
        (dict(labels=[0, 1]), "2 labels but 300 rows"),
        (dict(rows=[]), "no training rows"),
        (dict(k=0), "between 1 and the 40"),
        (dict(k=41), "between 1 and the 40"),
        (dict(labels=np.zeros(300, int)), "all of one class"),
        (dict(labels=np.full(300, -1)), "300 of the rows have no label"),
    ],
)
def test_what_is_refused(change, message):
    with pytest.raises(FinetuneError, match=message):
        select_features(made(), **change)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "random"])
def test_nan_is_named(method):
    features = made()
    features.array[5] = np.nan
    with pytest.raises(FinetuneError, match="1 of the rows 0 … hold NaN.*features.good"):
        select_features(features, method=method, k=3)
    assert len(select_features(features, method=method, k=3, rows=features.good)) == 3


def joined_of(classes=3, seen=None, pool=("mean", "max", "grid"), k=30):
    torch.manual_seed(0)
    net = load_resnet("resnet20", "shipped", classes).eval()
    rng = np.random.default_rng(0)
    images = from_arrays(
        rng.integers(0, 255, (48, 32, 32, 3)).astype(np.uint8), np.arange(48) % classes
    )
    features = extract_features(net, images, pool=pool)
    rows = np.flatnonzero(features.labels < (seen or classes))
    picked = select_features(features, method="anova", k=k, rows=rows)
    probe = linear_probe(picked.take(features, rows), features.labels[rows], c=0.1)
    return net, images, features, picked, probe


@pytest.mark.parametrize("classes, seen", [(2, None), (5, None), (5, 4)])
def test_joined_model_is_the_probe(classes, seen, tmp_path):
    """From pixels to the probe's probabilities, up to float16; two classes, one unseen."""
    net, images, features, picked, probe = joined_of(classes, seen)
    joined = selected_model(net, picked, probe)
    again = load_model(save_model(joined, tmp_path / "model.safetensors"))
    assert again.info["edits"] == joined.info["edits"] and net.info["edits"] == []
    batch = next(iter(images.loader(batch_size=48, size=32)))
    x = to_input(batch.pixels, net)
    with torch.inference_mode():
        ours, loaded = joined(x).softmax(1).numpy(), again(x).softmax(1).numpy()
    oracle = np.zeros((48, classes))
    oracle[:, probe[-1].classes_] = probe.predict_proba(picked.take(features))
    np.testing.assert_allclose(ours, oracle, atol=0.01)
    assert (ours == loaded).all()
    np.testing.assert_allclose(
        joined.pooled(x).detach().numpy(), picked.take(features), rtol=2e-3, atol=2e-3
    )


def test_joined_model_can_be_fine_tuned_and_resumed(tmp_path, monkeypatch):
    net, images, features, picked, probe = joined_of()
    joined, recipe = selected_model(net, picked, probe), Recipe(epochs=2, batch_size=16, lr=0.001)
    before = {name: value.clone() for name, value in joined.state_dict().items()}
    written = engine.save_state

    def stop(*state, **more):
        written(*state, **more)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, "save_state", stop)
        fit(joined, images, None, recipe, tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "model.safetensors").exists(), "the run was not stopped"
    run = fit(
        selected_model(net, picked, probe), images, None, recipe, tmp_path / "run", progress=False
    )
    whole = fit(selected_model(net, picked, probe), images, None, recipe, progress=False)
    kept = load_model(tmp_path / "run").state_dict()
    for name, value in whole.model.state_dict().items():
        assert (kept[name] == value).all() and (run.model.state_dict()[name] == value).all(), name
    assert all(
        (kept[name] == before[name]).all()
        for name in kept
        if name in ("centre", "scale") or name.startswith("chosen")
    )
    assert all(
        (kept[name] != before[name]).any()
        for name in ("net.conv1.weight", "net.layer3.2.conv2.weight", "fc.weight")
    )


def test_parts_that_do_not_belong_together():
    net, images, features, picked, probe = joined_of()
    with pytest.raises(FinetuneError, match="the probe has 31 inputs, the selection 30"):
        selected_model(
            net,
            picked,
            linear_probe(np.random.default_rng(0).normal(size=(9, 31)), np.arange(9) % 3),
        )
    with torch.no_grad():
        net.conv1.weight += 1
    with pytest.raises(FinetuneError, match="features of another model"):
        selected_model(net, picked, probe)


def test_an_edit_that_is_not_known(tmp_path):
    net = load_resnet("resnet20", "shipped", 3)
    net.info["edits"] = [{"edit": "fold", "times": 2}]
    save_model(net, tmp_path / "model.safetensors")
    with pytest.raises(FinetuneError, match="changed by 'fold', which this version does not know"):
        load_model(tmp_path)
    net.info["edits"] = [
        {"edit": "select_columns", "taps": [["layer9.0", "mean", 4]], "num_classes": 3}
    ]
    save_model(net, tmp_path / "model.safetensors")
    with pytest.raises(FinetuneError, match="no 4 columns of 'mean' of the block 'layer9.0'"):
        load_model(tmp_path)


def test_path_by_the_strong_rule_is_the_path(monkeypatch):
    """Screening must not change the answer: without it the same columns come."""
    features, rows, looked = made(n=200, d=60, seed=4), np.arange(200), []
    y, moments = features.labels, Moments(features.array, features.labels, rows)

    def tight(array, labels, rows, penalty, start, steps, tolerance, moments, among=None):
        looked.append(60 if among is None else len(among))
        return group_lasso(array, labels, rows, penalty, start, 3000, 1e-7, moments, among)

    monkeypatch.setattr(lasso, "group_lasso", tight)
    length = lasso.group_lasso_path(features.array, y, rows, 12, moments)
    assert min(looked) < 20, "nothing was screened"
    start = np.zeros((60, 3)), np.log(moments.count / 200)
    penalty = np.linalg.norm(
        lasso.cross_entropy(
            lasso.standardised(features.array, rows, moments, np.arange(60)), y, *start
        )[1],
        axis=1,
    ).max()
    while (np.linalg.norm(start[0], axis=1) > 0).sum() < 12:
        penalty *= 0.8
        start = tight(features.array, y, rows, penalty, start, 0, 0, moments)
    np.testing.assert_allclose(length, np.linalg.norm(start[0], axis=1), atol=0.01 * length.max())


def test_blocks_that_do_not_fit_in_memory(monkeypatch):
    features, rows = made(), np.arange(300)
    moments = Moments(features.array, features.labels, rows)
    whole = group_lasso(features.array, features.labels, rows, 0.03, moments=moments)
    monkeypatch.setattr(lasso, "_BLOCK", 64)
    monkeypatch.setattr(lasso, "_KEPT", 0)
    streamed = group_lasso(features.array, features.labels, rows, 0.03, moments=moments)
    np.testing.assert_allclose(streamed[0], whole[0], atol=1e-9)


def test_small_weights_do_not_end_the_path_early():
    """With many classes and few rows all weights are small; the optimum must be reached, nearly."""
    rng = np.random.default_rng(8)
    y = np.repeat(np.arange(50), 4)
    x = rng.normal(size=(200, 300)).astype(np.float32)
    x[:, :60] += rng.normal(size=(50, 60))[y]
    moments, rows, seen = Moments(x, y, np.arange(200)), np.arange(200), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            lasso,
            "group_lasso",
            lambda array, labels, rows, penalty, *rest: (
                seen.append((penalty, group_lasso(array, labels, rows, penalty, *rest)))
                or seen[-1][1]
            ),
        )
        length = lasso.group_lasso_path(x, y, rows, 50, moments)
    penalty, (w, b) = seen[-1]
    assert (length > 0).sum() >= 50 and set(np.argsort(-length)[:40]) <= set(range(60))
    g = lasso.cross_entropy(lasso.standardised(x, rows, moments, np.arange(300)), y, w, b)[1]
    inside = np.linalg.norm(w, axis=1) > 0
    gap = np.linalg.norm(
        g[inside] + penalty * w[inside] / np.linalg.norm(w[inside], axis=1, keepdims=True), axis=1
    )
    assert np.linalg.norm(g[~inside], axis=1).max() <= penalty * 1.05 and gap.max() <= penalty * 0.1
