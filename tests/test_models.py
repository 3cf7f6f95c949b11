"""Nets, checkpoints, what travels with the weights."""

import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import needs_real_data, real_data
from torch import nn

from finetune_nb.environment import FinetuneError
from finetune_nb.models import (
    BATCHNORM_POLICIES,
    SMALL,
    architectures,
    build,
    count_cost,
    load_model,
    load_resnet,
    read_checkpoint,
    save_model,
    to_input,
    train_mode,
)


@pytest.mark.parametrize(
    "arch, parameters, macs",
    [
        ("resnet20", 0.27e6, 41e6),
        ("resnet32", 0.46e6, 69e6),
        ("resnet56", 0.85e6, 126e6),
        ("resnet18", 11.69e6, 1.82e9),
        ("resnet50", 25.56e6, 4.11e9),
    ],
)
def test_published_sizes(arch, parameters, macs):
    """He et al. 2016, table 6, and torchvision's documentation; multiply-adds within 3%."""
    cost = count_cost(build(arch, 10 if arch in SMALL else 1000))
    assert abs(cost["parameters"] / parameters - 1) < 0.03 and abs(cost["macs"] / macs - 1) < 0.03


def test_architectures_cover_torchvision():
    import torchvision.models

    assert set(torchvision.models.list_models(torchvision.models)) <= set(architectures())
    assert {"resnet20", "efficientnet_lite0"} <= set(architectures())
    assert not any("quant" in name for name in architectures())
    with pytest.raises(FinetuneError, match="near: .*resnet20.*choose from resnet20"):
        build("resnet21", 10)
    with pytest.raises(FinetuneError, match="use load_backbone"):
        load_resnet("swin_t", None)


def wrap(state, shape):
    if shape == "nested":
        return {"state_dict": state, "epoch": 3, "best_prec1": 91.0}
    if shape == "module":
        return {"state_dict": {f"module.{k}": v for k, v in state.items()}}
    if shape == "compiled":
        return {"model": {f"_orig_mod.module.{k}": v for k, v in state.items()}}
    if shape == "linear":
        return {k.replace("fc.", "linear."): v for k, v in state.items()}
    if shape == "half":
        return {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    return state


@pytest.mark.parametrize("shape", ["plain", "nested", "module", "compiled", "linear", "half"])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_shapes_met_in_the_wild(shape, legacy, tmp_path):
    torch.manual_seed(0)
    net = build("resnet20", 7)
    torch.save(
        wrap(net.state_dict(), shape), tmp_path / "x.th", _use_new_zipfile_serialization=not legacy
    )
    found = load_resnet("resnet20", tmp_path / "x.th")
    assert found.info["num_classes"] == 7 and {row[3] for row in found.loading} == {"loaded"}
    for a, b in zip(net.state_dict().values(), found.state_dict().values()):
        assert torch.allclose(a.float(), b.float(), atol=1e-3)


def test_another_number_of_classes_gets_a_new_head(tmp_path):
    net = build("resnet20", 7)
    torch.save(net.state_dict(), tmp_path / "x.pth")
    found = load_resnet("resnet20", tmp_path / "x.pth", num_classes=3)
    assert found.fc.out_features == 3 and [
        row[0] for row in found.loading if row[3] == "new head"
    ] == ["fc.bias", "fc.weight"]
    assert torch.equal(found.conv1.weight, net.conv1.weight)


def test_another_architecture_names_tensors_and_shapes(tmp_path):
    torch.save(build("resnet32", 10).state_dict(), tmp_path / "deep.pth")
    with pytest.raises(FinetuneError) as caught:
        load_resnet("resnet20", tmp_path / "deep.pth")
    assert (
        "layer1.3.bn1.bias" in str(caught.value)
        and "(16,)" in str(caught.value)
        and "not in the model" in str(caught.value)
    )
    with pytest.raises(FinetuneError, match="missing in the file|another shape"):
        load_resnet("resnet18", tmp_path / "deep.pth")


class Evil:
    def __reduce__(self):
        return (os.system, ("touch owned",))


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint_is_not_run(legacy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # would switch the default off
    torch.save(
        {"state_dict": {"conv1.weight": Evil()}},
        "evil.pth",
        _use_new_zipfile_serialization=not legacy,
    )
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pth", "plain.pth"):
        with pytest.raises(FinetuneError, match="evil.pth|plain.pth"):
            load_resnet("resnet20", name)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_truncated(keep, tmp_path):
    torch.save(build("resnet20", 10).state_dict(), tmp_path / "x.pth")
    save_model(build("resnet20", 10), tmp_path / "x.safetensors")
    for name in ("x.pth", "x.safetensors"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(
            data[: keep if isinstance(keep, int) else int(len(data) * keep)]
        )
        with pytest.raises(FinetuneError, match=name):
            load_resnet("resnet20", tmp_path / name)


@pytest.mark.parametrize(
    "content, words",
    [
        ({}, "no state_dict"),
        ([1, 2], "no state_dict"),
        ({"a": torch.ones(2)}, "no last layer"),
        ({"fc.weight": torch.full((3, 64), float("nan"))}, "NaN"),
    ],
)
def test_files_that_are_no_checkpoints(content, words, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(FinetuneError, match=words):
        load_resnet("resnet20", tmp_path / "x.pth")


def test_missing_file_and_wrong_combinations():
    for arguments, words in (
        (("resnet20", "nowhere.pth"), "does not exist"),
        (("resnet18", "shipped"), "shipped weights are a resnet20"),
        (("resnet20", "imagenet"), "no ImageNet weights"),
    ):
        with pytest.raises(FinetuneError, match=words):
            load_resnet(*arguments)
    with pytest.raises(FinetuneError, match="batchnorm"):
        load_resnet("resnet20", None, batchnorm="eval")


def test_imagenet_weights_from_a_loopback_server(tmp_path, monkeypatch):
    import functools
    import hashlib
    import http.server
    import threading

    import torchvision.models

    net = torchvision.models.resnet18(weights=None)
    torch.save(net.state_dict(), tmp_path / "w.pth")
    digest = hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()[:8]
    (tmp_path / "w.pth").rename(tmp_path / f"resnet18-{digest}.pth")
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *a: None})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(quiet, directory=str(tmp_path))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))

    def fetched(entry, **options):
        return torch.hub.load_state_dict_from_url(
            f"http://127.0.0.1:{server.server_port}/resnet18-{digest}.pth", **options
        )

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", fetched)
    try:
        found = load_resnet("resnet18", "imagenet", num_classes=4)
    finally:
        server.shutdown()
    assert torch.equal(found.conv1.weight, net.conv1.weight) and found.fc.out_features == 4
    server.server_close()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    with pytest.raises(FinetuneError, match="could not be downloaded"):
        load_resnet("resnet18", "imagenet")


def test_shipped_checkpoint_and_its_card():
    from finetune_nb.environment import sha256_file, shipped_file

    path = shipped_file("pretrained_resnet_model.pth")
    card = shipped_file("pretrained_resnet_model.md").read_text()
    assert sha256_file(path) in card and "seed" in card and "glyphs" in card
    with zipfile.ZipFile(path) as archive:
        assert sum(info.file_size for info in archive.infolist()) < 2_000_000
    net = load_resnet("resnet20", "shipped")
    from finetune_nb.data import load_images
    from finetune_nb.evaluation import evaluate, wilson

    fresh = load_images("glyphs", limit=1000, seed=12345)
    found = evaluate(net, fresh)
    import re

    stated = float(re.search(r"accuracy on [\d,]+ held-out images: ([\d.]+)", card)[1])
    low, high = wilson(round(found.accuracy * 1000), 1000, z=3.3)
    assert low <= stated <= high, f"the card says {stated}, 1000 new glyphs say {found.accuracy}"


def test_saved_model_is_the_same_function(tmp_path):
    torch.manual_seed(1)
    net = load_resnet("resnet20", "shipped", num_classes=5, batchnorm="adapt")
    net.info["classes"] = list("äöüßé")
    save_model(net, tmp_path / "m.safetensors")
    again = load_model(tmp_path / "m.safetensors")
    x = torch.randn(3, 3, 32, 32)
    assert torch.equal(net.eval()(x), again(x)) and again.info == net.info
    with safetensors.safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert json.loads(file.metadata()["finetune_nb"])["arch"] == "resnet20"
    torch.save(net.state_dict(), tmp_path / "foreign.safetensors")
    with pytest.raises(FinetuneError):
        load_model(tmp_path / "foreign.safetensors")


def test_to_input_is_torchvisions_normalisation():
    from torchvision.transforms import v2

    net = build("resnet20", 10)
    pixels = torch.randint(0, 256, (4, 3, 9, 9), dtype=torch.uint8)
    theirs = v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize(net.info["mean"], net.info["std"])]
    )(pixels)
    assert torch.allclose(to_input(pixels, net), theirs, atol=1e-5)


def test_train_mode_follows_the_policy():
    for policy in BATCHNORM_POLICIES:
        net = load_resnet("resnet20", None, batchnorm=policy)
        net.conv1.requires_grad_(False), net.bn1.requires_grad_(False)
        train_mode(net)
        assert net.bn1.training == (policy in ("adapt", "train")) and net.layer1[0].bn1.training


def test_third_party_architecture_is_ours():
    """Option A by hand: subsample, pad half the new channels before and half after."""
    from finetune_nb.models.networks import _Block

    block = _Block(4, 8, 2).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(1, 4, 6, 6)
    assert (
        torch.equal(block(x)[:, 2:6], x[:, :, ::2, ::2])
        and block(x)[:, :2].abs().sum() == 0 == block(x)[:, 6:].abs().sum()
    )


@needs_real_data
@pytest.mark.parametrize("name", ["resnet20-12fca82f", "resnet56-4bfd9763"])
def test_third_party_checkpoint_on_real_images(name):
    from finetune_nb.data import load_images
    from finetune_nb.evaluation import evaluate

    net = load_resnet(name.split("-")[0], real_data() / "weights" / f"{name}.th")
    part = load_images("cifar10", split="test").limited(1000)
    found = evaluate(net, part)
    assert found.accuracy > 0.77 and np.isfinite(found.nll)


@needs_real_data
def test_imagenet_resnet18_reads():
    net = load_resnet("resnet18", real_data() / "weights" / "resnet18_imagenet.pth")
    assert net.info["num_classes"] == 1000 and next(net.parameters()).dtype == torch.float32


def test_read_checkpoint_leaves_names_plain(tmp_path):
    torch.save({"net": {"module._orig_mod.classifier.weight": torch.ones(2, 3)}}, tmp_path / "x.pt")
    assert list(read_checkpoint(tmp_path / "x.pt")) == ["fc.weight"]
