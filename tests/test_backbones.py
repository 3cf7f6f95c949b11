"""Features of nets of many families: every block's numbers, the fingerprint of the function, and
the net given back as it came."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import SwinTransformer, VisionTransformer, mobilenet_v3_small
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.efficientnet import EfficientNet, MBConvConfig
from torchvision.models.maxvit import MaxVit
from torchvision.models.resnet import BasicBlock, ResNet

from finetune_nb.data.index import from_arrays
from finetune_nb.environment import FinetuneError
from finetune_nb.features import (
    Features,
    Taps,
    block_names,
    extract_features,
    linear_probe,
    model_fingerprint,
    tuned_probe,
)
from finetune_nb.models import (
    POOLS,
    adopt,
    anatomy,
    input_options,
    load_resnet,
    replace_activation,
    set_head,
    undisturbed,
)


class Eyes(nn.Module):
    """A block of one's own that gives maps [B, H, W, C], of which no table says anything."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(3, 9)

    def forward(self, x):
        return self.mix(nn.functional.avg_pool2d(x, 4).permute(0, 2, 3, 1))


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.eyes, self.mind, self.mouth = Eyes(), nn.Conv2d(9, 12, 3, 2, 1), nn.Linear(12, 4)

    def forward(self, x):
        x = self.mind(self.eyes(x).permute(0, 3, 1, 2))
        return self.mouth(x.mean((2, 3)))


def efficientnet():
    rows = [MBConvConfig(e, 3, s, i, o, 2, 1, 1) for e, s, i, o in ((1, 2, 8, 8), (4, 2, 8, 16))]
    return EfficientNet(rows, dropout=0.1, last_channel=24, num_classes=4)


def maxvit():
    return MaxVit((64, 64), 8, 4, [8, 16], [1, 1], 8, 0.0, num_classes=4)


def timm_net(name):
    def build():
        timm = pytest.importorskip("timm")
        return timm.create_model(name, num_classes=4)

    return build


BUILD = {
    "resnet": (lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4), 32),
    "convnext": (
        lambda: ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 2)], num_classes=4),
        32,
    ),
    "efficientnet": (efficientnet, 32),
    "mobilenet": (lambda: mobilenet_v3_small(num_classes=4), 32),
    "vit": (lambda: VisionTransformer(32, 8, 2, 2, 24, 48, num_classes=4), 32),
    "swin": (lambda: SwinTransformer([2, 2], 24, [2, 2], [2, 2], [4, 4], num_classes=4), 32),
    "maxvit": (maxvit, 64),
    "timm test_resnet": (timm_net("test_resnet"), 64),
    "timm test_vit": (timm_net("test_vit"), 160),
    "timm test_mambaout": (timm_net("test_mambaout"), 96),
    "own": (Own, 32),
}


def made(name):
    torch.manual_seed(0)
    build, size = BUILD[name]
    named = {"head": "mouth", "groups": ["eyes", "mind"]} if name == "own" else {}
    model = adopt(build(), size=size, arch=name, **named)
    with torch.no_grad():  # fresh nets have norms that do nothing and layer scales near zero
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def pictures(n=6, size=40):
    pixels = np.random.default_rng(0).integers(0, 255, (n, size, size, 3)).astype(np.uint8)
    return from_arrays(pixels, np.arange(n) % 2)


def lying(out, channels):
    """A block's output as [B, C, H, W], by its number of channels: an independent way."""
    if out.ndim == 2:
        return out[:, :, None, None]
    if out.ndim == 3:
        side = int((out.shape[1]) ** 0.5)
        return out[:, out.shape[1] - side * side :].transpose(1, 2).unflatten(2, (side, side))
    return out if out.shape[1] == channels and out.shape[2] == out.shape[3] else out.movedim(3, 1)


@pytest.mark.parametrize("name", BUILD)
def test_features_of_every_block(name):
    model, images = made(name), pictures()
    features = extract_features(model, images, pool=("mean", "max"), workers=0)
    assert features.layers == block_names(model) and len(features.layers) > 1
    assert np.isfinite(features.array).all() and features.array.astype(float).std(0).max() > 0
    batch = next(iter(images.loader(batch_size=6, workers=0, **input_options(model))))
    mean, std = (torch.tensor(model.info[k]).view(3, 1, 1) * 255 for k in ("mean", "std"))
    x = (batch.pixels.float() - mean) / std
    for layer in features.layers:
        seen, module = {}, model.get_submodule(layer)

        def keep(module, inputs, output):
            seen["out"] = (output if torch.is_tensor(output) else output[0]).clone()

        hook = module.register_forward_hook(keep)
        with torch.inference_mode():
            model(x)
        hook.remove()
        channels = int((features.columns["layer"] == layer).sum()) // 2
        maps = lying(seen["out"], channels)
        assert maps.shape[1] == channels
        expected = torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1)
        np.testing.assert_allclose(features.of_layers(layer), expected, rtol=4e-3, atol=4e-3)


def test_what_the_head_is_given():
    for name in ("resnet", "vit", "swin", "efficientnet"):
        model = made(name)
        x = torch.randn(3, 3, 32, 32)
        with torch.no_grad(), Taps(model, "head") as taps:
            given = taps(x)
            again = model.get_submodule(anatomy(model).head)(given)
            torch.testing.assert_close(again, model(x), atol=1e-4, rtol=1e-4)


def test_grid_keeps_places_of_channels_last_maps():
    model = made("swin")
    x = torch.zeros(1, 3, 32, 32)
    x[:, :, :16] = 2.0  # the upper half is bright
    with torch.no_grad(), Taps(model, block_names(model)[:1], "grid") as taps:
        cells = taps(x).view(-1, 4)
    assert (cells[:, 0] - cells[:, 2]).abs().max() > 5 * (cells[:, 0] - cells[:, 1]).abs().max()


def changes(model):
    """Nets whose function below the head is another one, and the name of what was changed."""
    yield "silu", replace_activation(model, "silu")
    half = replace_activation(model, "silu")
    for module in half.modules():
        if hasattr(module, "amount"):
            module.amount = 0.5
    yield "half of silu", half
    nearly = copy.deepcopy(half)
    for module in nearly.modules():
        if hasattr(module, "amount"):
            module.amount = 0.5001
    yield "a little more of silu", nearly
    for key, value in (
        ("mean", [0.4] * 3),
        ("std", [0.3] * 3),
        ("crop_ratio", 0.8),
        ("interpolation", "bicubic"),
        ("edits", [{"edit": "x"}]),
    ):
        other = copy.deepcopy(model)
        other.info[key] = value
        yield key, other
    weight = copy.deepcopy(model)
    with torch.no_grad():
        next(weight.parameters()).view(-1)[0] += 1e-3
    yield "a weight", weight
    moved = copy.deepcopy(model)
    next(b for n, b in moved.named_buffers() if n.endswith("running_var")).mul_(1.01)
    yield "a running variance", moved
    eps = copy.deepcopy(model)
    eps.bn1.eps = 0.1
    yield "the norm's epsilon", eps
    stride = copy.deepcopy(model)
    stride.conv1.stride = (2, 2)
    yield "a stride", stride


def test_fingerprint_tells_functions_apart():
    model = load_resnet("resnet20").eval()
    found = {"as it is": model_fingerprint(model)}
    found |= {name: model_fingerprint(other) for name, other in changes(model)}
    assert len(set(found.values())) == len(found), found


@pytest.mark.parametrize("name", ["resnet", "vit", "swin", "timm test_vit", "own"])
def test_fingerprint_is_of_what_lies_below_the_head(name):
    model = made(name)
    own = model_fingerprint(model)
    with torch.no_grad():
        model(torch.zeros(1, 3, model.info["size"], model.info["size"]))
    same = [model.train(), copy.deepcopy(model), set_head(copy.deepcopy(model), 7), made(name)]
    same[2].info["size"] = 96
    assert [model_fingerprint(other) for other in same] == [own] * 4


def test_stored_features_of_another_net_are_refused(tmp_path):
    model, images = load_resnet("resnet20").eval(), pictures(8)
    first = extract_features(model, images, folder=tmp_path)
    silu = replace_activation(model, "silu")
    with pytest.raises(FinetuneError, match=r"different: model \(there"):
        extract_features(silu, images, folder=tmp_path)
    with pytest.raises(FinetuneError, match="features are of another net"):
        Features.load(tmp_path).require(images, silu)
    Features.load(tmp_path).require(images, model)
    assert first.meta["model"] == model_fingerprint(model)
    (tmp_path / "features.f16").write_bytes(b"\0" * 10)
    with pytest.raises(FinetuneError, match="features.f16 is missing or cut short"):
        Features.load(tmp_path)


def test_every_mode_comes_back():
    model = load_resnet("resnet20")
    model.train()
    model.bn1.eval()
    model.layer2.eval()
    before = {name: module.training for name, module in model.named_modules()}
    extract_features(model, pictures())
    assert {name: module.training for name, module in model.named_modules()} == before
    with pytest.raises(ValueError), undisturbed(model):
        assert not any(module.training for module in model.modules())
        raise ValueError
    assert {name: module.training for name, module in model.named_modules()} == before


def test_tensors_come_back_to_their_device():
    model = load_resnet("resnet20")
    kept = {name: value.clone() for name, value in model.state_dict().items()}

    class Moved(Exception):
        pass

    with pytest.raises(Moved), undisturbed(model, torch.device("cpu")):
        model.half()
        model.float()
        raise Moved
    assert all(tensor.device.type == "cpu" for tensor in model.state_dict().values())
    assert kept.keys() == model.state_dict().keys()
    if torch.cuda.is_available():
        with undisturbed(model, torch.device("cuda")):
            assert next(model.parameters()).is_cuda
        assert not any(tensor.is_cuda for tensor in model.state_dict().values())


def test_long_names_of_blocks_are_whole():
    name = "features.denseblock1.denselayer1.a_rather_long_one"
    columns = [[name, "mean", 3]]
    features = Features(
        np.zeros((4, 3), np.float16),
        np.zeros(4),
        np.arange(4),
        {"columns": columns, "data": "", "model": ""},
    )
    assert features.columns["layer"][0] == name
    assert features.of_layers(name).shape == (4, 3)
    assert name in repr(features)


def test_what_a_net_cannot_do_is_said():
    vit = made("vit")
    with pytest.raises(FinetuneError, match="vit cannot take pictures of 48 pixels.*size=32"):
        extract_features(vit, pictures(), size=48)
    with pytest.raises(FinetuneError, match="models.adopt"):
        extract_features(ResNet(BasicBlock, [1, 1, 1, 1]), pictures())
    with pytest.raises(FinetuneError, match="no block 'layer9'.*encoder_layer_0"):
        extract_features(vit, pictures(), layers="layer9")
    with pytest.raises(FinetuneError, match="nothing to tap"):
        extract_features(vit, pictures(), layers=[])
    assert set(POOLS) == {"mean", "max", "grid"}


def test_probe_with_few_rows_is_the_probe():
    """The fit in the space of the rows has the same optimum as the one in all columns."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 300)).astype(np.float32), np.arange(40) % 3
    new = rng.normal(size=(50, 300)).astype(np.float32)
    scaler = StandardScaler().fit(x)
    oracle = LogisticRegression(C=0.1, max_iter=5000, tol=1e-10).fit(scaler.transform(x), y)
    ours = linear_probe(x, y, c=0.1).predict_proba(new)
    np.testing.assert_allclose(ours, oracle.predict_proba(scaler.transform(new)), atol=2e-3)


def test_strength_is_chosen_on_validation_rows():
    rng = np.random.default_rng(1)
    y = np.arange(260) % 2
    x = rng.normal(size=(260, 400)).astype(np.float32)
    x[:, 0] += 3 * y
    probe = tuned_probe(x[:60], y[:60], x[60:160], y[60:160], (1e-4, 1e-2, 1.0))
    scores = {
        c: tuned_probe(x[:60], y[:60], x[60:160], y[60:160], (c,)).score(x[60:160], y[60:160])
        for c in (1e-4, 1e-2, 1.0)
    }
    assert probe[-1].C in scores and scores[probe[-1].C] >= max(scores.values()) - 0.011
    with pytest.raises(FinetuneError, match="0 validation rows and 0 labels"):
        tuned_probe(x[:60], y[:60], x[:0], y[:0])
