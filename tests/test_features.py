"""Features: what is in them, and what happens when a pass is stopped, shared or refused."""

import errno
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, make_photos

from finetune_nb.data import load_images
from finetune_nb.environment import FinetuneError
from finetune_nb.features import Features, block_names, extract_features, linear_probe
from finetune_nb.models import POOLS, load_resnet, to_input
from finetune_nb.resumable import Parts


@pytest.fixture(scope="module")
def digits():
    return load_images("digits", limit=150)


@pytest.fixture(scope="module")
def net():
    return load_resnet("resnet20").eval()


def maps(model, images, layer):
    """Outputs of a block for all images at once, by an independent way: no taps, float64."""
    found, module = {}, dict(model.named_modules())[layer]
    pixels = next(
        iter(
            images.loader(
                batch_size=len(images), size=model.info["size"], crop_ratio=model.info["crop_ratio"]
            )
        )
    ).pixels
    hook = module.register_forward_hook(lambda m, i, o: found.update(out=o))
    with torch.inference_mode():
        model.double()(to_input(pixels, model).double())
    hook.remove()
    model.float()
    return found["out"].numpy()


@pytest.mark.parametrize("arch", ["resnet20", "resnet18", "resnet50"])
def test_every_column_is_what_it_says(arch, digits):
    torch.manual_seed(0)
    model = load_resnet(arch, None, 10).eval()
    model.info["size"] = 32
    few = digits.select(np.arange(12))
    features = extract_features(model, few, layers=block_names(model)[1:3], pool=tuple(POOLS))
    rng = np.random.default_rng(0)
    for column in rng.choice(features.array.shape[1], 25, replace=False):
        layer, pool, cell, channel = features.columns[column]
        out = maps(model, few, layer)[:, channel]
        h, w = out.shape[1] // 2, out.shape[2] // 2
        expected = {
            "mean": out.mean((1, 2)),
            "max": out.max((1, 2)),
            "grid": out[
                :, (cell // 2) * h : (cell // 2 + 1) * h, (cell % 2) * w : (cell % 2 + 1) * w
            ].mean((1, 2)),
        }[pool]
        np.testing.assert_allclose(
            features.array[:, column].astype(float), expected, rtol=2e-3, atol=1e-4
        )


def test_last_block_feeds_the_head(digits, net):
    features = extract_features(net, digits, layers="last")
    pixels = next(iter(digits.loader(batch_size=len(digits), size=32))).pixels
    with torch.inference_mode():
        logits = net(to_input(pixels, net))
        again = net.fc(torch.from_numpy(features.array.astype(np.float32)))
    assert (logits - again).abs().max() < 0.02
    assert (logits.argmax(1) == again.argmax(1)).float().mean() > 0.98


@pytest.mark.parametrize(
    "options",
    [dict(batch_size=1), dict(batch_size=33, workers=0), dict(batch_size=1000, workers=4)],
)
def test_same_bytes_for_any_batch_size_and_workers(digits, net, options):
    assert (
        extract_features(net, digits, **options).array.tobytes()
        == extract_features(net, digits).array.tobytes()
    )


def test_parts_do_not_show(digits, net, tmp_path):
    whole = extract_features(net, digits)
    kept = extract_features(net, digits, folder=tmp_path, part=64)
    assert kept.array.tobytes() == whole.array.tobytes() and isinstance(kept.array, np.memmap)
    assert (kept.labels == digits.labels).all() and (kept.columns == whole.columns).all()


def test_training_mode_and_head_are_left_alone(digits, net):
    net.train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    extract_features(net, digits.select(np.arange(40)))
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_hooks for m in net.modules())
    net.eval()


PROGRAM = """
import sys, numpy as np, torch
from finetune_nb.data import load_images
from finetune_nb.features import extract_features
from finetune_nb.models import load_resnet
torch.set_num_threads(1)
images = load_images("digits", limit=150)
extract_features(load_resnet("resnet20"), images, folder=sys.argv[1], part=32)
"""


def start(folder, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ranks_share_the_rows_and_a_killed_one_is_made_good(tmp_path):
    alone = start(tmp_path / "alone")
    assert alone.wait() == 0, alone.stderr.read()
    victim = start(tmp_path / "shared", RANK="0", WORLD_SIZE="2")
    while not list((tmp_path / "shared").glob("part-*")) and victim.poll() is None:
        pass
    victim.kill()
    victim.wait()
    both = [start(tmp_path / "shared", RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    for one in both:
        assert one.wait() == 0, one.stderr.read()
    a, b = (Features.load(tmp_path / name) for name in ("alone", "shared"))
    assert a.array.tobytes() == b.array.tobytes() and (a.labels == b.labels).all()


def test_unreadable_image_is_a_row_of_nan(tmp_path, net):
    make_photos(tmp_path / "photos")
    (tmp_path / "photos/class1/003.png").write_bytes(b"no image")
    images = load_images(tmp_path / "photos")
    features = extract_features(net, images, batch_size=8)
    assert (~features.good).sum() == 1 and images.table["key"][
        int(images.rows_at([np.flatnonzero(~features.good)[0]])[0])
    ].as_py().endswith("class1/003.png")
    sound = images.select(features.good)
    np.testing.assert_allclose(
        extract_features(net, sound).array.astype(float),
        features.array[features.good].astype(float),
        rtol=1e-2,
        atol=1e-3,
    )
    with pytest.raises(FinetuneError, match="1 rows of the features hold NaN"):
        linear_probe(features.array, features.labels)


def test_what_is_refused(digits, net, tmp_path):
    with pytest.raises(FinetuneError, match=r"no block 'layer9.9'.*layer1\.0"):
        extract_features(net, digits, layers=["layer9.9"])
    with pytest.raises(FinetuneError, match="pool='median': choose from mean, max, grid"):
        extract_features(net, digits, pool="median")
    with pytest.raises(FinetuneError, match="selection is empty"):
        extract_features(net, digits.select(np.zeros(len(digits), bool)))
    extract_features(net, digits, folder=tmp_path / "a")
    with pytest.raises(FinetuneError, match=r"different: data \(there"):
        extract_features(net, digits.select(np.arange(149)), folder=tmp_path / "a")
    other = load_resnet("resnet20", None, 130)
    with pytest.raises(FinetuneError, match=r"different: model \(there"):
        extract_features(other, digits, folder=tmp_path / "a")
    with pytest.raises(FinetuneError, match="fingerprint"):
        Features.load(tmp_path / "a").require(digits.select(np.arange(5)))
    with pytest.raises(FinetuneError, match="holds no parts of a pass"):
        Features.load(tmp_path)
    with torch.no_grad():
        other.bn1.bias += 1e6
    with pytest.raises(FinetuneError, match="float16 cannot hold"):
        extract_features(other, digits)


def test_half_written_and_damaged_stores(digits, net, tmp_path):
    extract_features(net, digits, folder=tmp_path, part=64)
    (tmp_path / "part-000001.npz").unlink()
    with pytest.raises(FinetuneError, match="1 of 3 parts are missing; run extract_features again"):
        Features.load(tmp_path)
    (tmp_path / "part-000001.npz").write_bytes(b"PK\x03\x04half")
    with pytest.raises(FinetuneError, match="part-000001.npz is damaged.*delete this one file"):
        Features.load(tmp_path)
    (tmp_path / "part-000001.npz").unlink()
    assert (
        extract_features(net, digits, folder=tmp_path, part=64).array.tobytes()
        == extract_features(net, digits).array.tobytes()
    )
    (tmp_path / "key.json").write_text("{")
    with pytest.raises(FinetuneError, match="key.json is damaged"):
        Features.load(tmp_path)


def test_full_disk_is_said_before_the_work(digits, net, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        FinetuneError,
        match=r"features.f16 needs \d+ MB, which cannot be had \(No space left on device\)",
    ):
        extract_features(net, digits, folder=tmp_path)


def test_a_rank_that_never_comes(tmp_path):
    parts = Parts(tmp_path, 10, {}, 4, rank=0, world=2)
    for part in parts.todo():
        parts.save(part, x=np.zeros(1))
    with pytest.raises(FinetuneError, match="1 of 3 parts .* another process has stopped"):
        parts.wait(patience=0.3)


def test_probe_learns_and_says_what_is_wrong(digits, net):
    features = extract_features(net, digits, layers="last")
    x = features.of_layers("layer3.2")
    assert linear_probe(x[::2], features.labels[::2]).score(x[1::2], features.labels[1::2]) > 0.75
    with pytest.raises(FinetuneError, match="150 rows of features but 3 labels"):
        linear_probe(x, [0, 1, 2])
    with pytest.raises(FinetuneError, match="all of one class"):
        linear_probe(x, np.zeros(len(x), int))
    with pytest.raises(FinetuneError, match="no column comes from layer1.0: there are layer3.2"):
        features.of_layers("layer1.0")
    assert re.search(r"150 rows × 64 columns", repr(features))
