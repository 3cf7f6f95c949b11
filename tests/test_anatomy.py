"""What nets are made of: all of torchvision, timm by its metadata, and nets named by hand."""

import pytest
import torch
import torchvision.models
from torch import nn

from finetune_nb.environment import FinetuneError
from finetune_nb.models import (
    BACKBONES,
    adopt,
    anatomy,
    apply_edit,
    backbone,
    build,
    count_cost,
    eval_mode,
    head_of,
    load_backbone,
    load_model,
    load_resnet,
    logits_of,
    replace_activation,
    save_model,
    set_head,
    tapped,
)

NAMES = torchvision.models.list_models(torchvision.models)
# The smallest member of each family of torchvision, and the side of the pictures it is tried with.
SMALLEST = (
    ("resnet18", 32),
    ("resnext50_32x4d", 32),
    ("wide_resnet50_2", 32),
    ("convnext_tiny", 32),
    ("efficientnet_b0", 32),
    ("efficientnet_v2_s", 32),
    ("mobilenet_v2", 32),
    ("mobilenet_v3_small", 32),
    ("regnet_x_400mf", 32),
    ("regnet_y_400mf", 32),
    ("densenet121", 32),
    ("mnasnet0_5", 32),
    ("shufflenet_v2_x0_5", 32),
    ("squeezenet1_1", 64),
    ("vgg11_bn", 32),
    ("alexnet", 64),
    ("googlenet", 64),
    ("inception_v3", 75),
    ("swin_t", 32),
    ("swin_v2_t", 32),
    ("vit_b_32", 224),
    ("maxvit_t", 224),
)


def bare(name):
    "A net of torchvision without memory for its weights."
    from torchvision.models import regnet

    build, plan = torchvision.models.get_model_builder(name), regnet.BlockParams.from_init_params
    lazy = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}

    def on_the_cpu(*arguments, **options):  # RegNet computes its widths with tensors
        with torch.device("cpu"):
            return plan(*arguments, **options)

    regnet.BlockParams.from_init_params = on_the_cpu
    try:
        with torch.device("meta"):
            return build(weights=None, num_classes=7, **lazy)
    finally:
        regnet.BlockParams.from_init_params = plan


def checked(net):
    "The anatomy, if each parameter is in exactly one group and the order is that of the input."
    parts = anatomy(net)
    names = [name for name, _ in net.named_parameters()]
    flat = [name for group in parts.groups.values() for name in group]
    assert len(set(flat)) == len(flat) and set(flat) == set(names)
    assert next(iter(parts.groups)) == "stem" and list(parts.groups)[-1] == "head"
    assert len(parts.groups) >= 4 and parts.blocks and parts.head not in parts.blocks
    assert set(parts.groups["head"]) == {
        name for name in names if name.startswith(f"{parts.head}.")
    }
    return parts


@pytest.mark.parametrize("name", NAMES)
def test_all_of_torchvision(name):
    net = bare(name)
    parts, order = checked(net), [module for module, _ in net.named_modules()]
    places = [order.index(block) for block in parts.blocks]
    assert places == sorted(places), "blocks stand in the order of the input"
    last = head_of(net)
    assert 7 == getattr(last, "out_features", getattr(last, "out_channels", None))
    assert name.startswith("resnet") <= (list(parts.groups)[1] == "layer1")
    with_norm = not any(name == n or name.startswith(n + "_") for n in ("alexnet", "squeezenet1"))
    assert bool(parts.norms) or not with_norm or name in ("vgg11", "vgg13", "vgg16", "vgg19")


def test_the_projects_own():
    parts = checked(load_resnet("resnet20", None, 10))
    assert list(parts.groups) == ["stem", "layer1", "layer2", "layer3", "head"]
    assert parts.head == "fc" and len(parts.blocks) == 9 and len(parts.norms) == 19
    assert parts.preprocessing["size"] == 32 and parts.preprocessing["crop_ratio"] == 1.0
    assert parts.group_of("layer2.0.conv1.weight") == "layer2"
    with pytest.raises(FinetuneError, match="no parameter 'layer9'"):
        parts.group_of("layer9")


def mine():
    net = nn.Sequential()
    net.add_module("eyes", nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)))
    net.add_module("brain", nn.Sequential(nn.Conv2d(8, 4, 3, padding=1), nn.ReLU()))
    net.add_module("mouth", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)))
    return net


def test_named_by_hand():
    net = mine()
    with pytest.raises(FinetuneError, match="head='mouth', groups=.*'eyes', 'brain'"):
        anatomy(net)
    for groups in (None, ["eyes", "brain"], {"stem": ["eyes"], "rest": "brain"}):
        parts = anatomy(net, head="mouth.2", groups=groups)
        assert list(parts.groups)[-1] == "head" and len(parts.groups) == 3
        assert parts.blocks == ("eyes", "brain") and parts.norms == ("eyes.1",)
    adopt(net, head="mouth.2", groups=["eyes", "brain"], size=16, mean=[0.5] * 3)
    assert list(anatomy(net).groups) == ["eyes", "brain", "head"]
    assert net.info["num_classes"] == 5 and anatomy(net).preprocessing["size"] == 16
    set_head(net, 9)
    assert net(torch.zeros(2, 3, 8, 8)).shape == (2, 9) and net.info["num_classes"] == 9


@pytest.mark.parametrize(
    "names, words",
    [
        ({"head": "mouth.2", "groups": ["eyes", "legs"]}, "'legs'.*matches no parameter"),
        ({"head": "mouth.2", "groups": ["eyes"]}, "in no group, such as brain.0.weight"),
        ({"head": "mouth.2", "groups": ["eyes", "eyes.0", "brain"]}, "in two groups"),
        ({"head": "nose", "groups": ["eyes", "brain", "mouth"]}, "no module 'nose'"),
        ({"head": "brain.1", "groups": ["eyes", "brain", "mouth"]}, "has no parameters"),
        ({"head": "mouth.2", "blocks": ["eyes", "ears"]}, "no module 'ears'"),
    ],
)
def test_names_that_do_not_fit(names, words):
    with pytest.raises(FinetuneError, match=words):
        anatomy(mine(), **names)
    with pytest.raises(FinetuneError, match="choose from size"):
        adopt(mine(), head="mouth.2", sighs=3)


def test_taps_leave_nothing_behind():
    net = adopt(mine(), head="mouth.2")
    seen = {}
    with tapped(net, ["eyes", "brain", "mouth.2"], lambda name, x: seen.update({name: x})):
        net.eval()(torch.zeros(2, 3, 8, 8))
    assert seen["brain"].shape == (2, 4, 8, 8) and seen["mouth.2"].shape == (2, 4, 1, 1)
    assert torch.allclose(seen["brain"].mean((2, 3)), seen["mouth.2"].flatten(1))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


# Small nets of timm, of different kinds, and the side of the pictures they are tried with.
TIMM = (
    ("resnet10t", 32),
    ("convnext_atto", 32),
    ("tf_efficientnet_lite0", 32),
    ("vit_tiny_patch16_224", 224),
    ("swin_tiny_patch4_window7_224", 224),
    ("mobilenetv3_small_050", 32),
    ("regnetx_002", 32),
    ("mixer_s32_224", 224),
    ("beit_base_patch16_224", 224),
    ("maxvit_rmlp_pico_rw_256", 256),
    ("edgenext_xx_small", 64),
    ("tiny_vit_5m_224", 224),
)
SMALL_NETS = (*SMALLEST, *((f"timm/{name}", size) for name, size in TIMM))
# What builds a deep timm net in a small form.
SHALLOW = {"timm/beit_base_patch16_224": {"depth": 2, "embed_dim": 48, "num_heads": 2}}


def small_net(name, classes=5):
    "A net of `SMALL_NETS` with fresh weights, and `info`."
    torch.manual_seed(0)
    if name in SHALLOW:
        timm = pytest.importorskip("timm")
        return adopt(timm.create_model(name[5:], num_classes=classes, **SHALLOW[name]), arch=name)
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    return build(name, classes)


QUICK = (
    *SMALLEST[:10],
    ("squeezenet1_1", 64),
    ("timm/resnet10t", 32),
    ("timm/edgenext_xx_small", 64),
)


@pytest.mark.parametrize("name, size", QUICK)
def test_small_nets(name, size, tmp_path):
    """Head replaced, features out of every block, and the same function after save and load."""
    net = small_net(name)
    parts, seen = checked(net), {}
    x = torch.rand(2, 3, size, size)
    set_head(net, 3)
    with torch.no_grad(), eval_mode(net):
        with tapped(net, [*parts.blocks, parts.head], lambda at, out: seen.update({at: out.shape})):
            logits = net(x)
        assert logits.shape == (2, 3) == (2, net.info["num_classes"])
    assert list(seen) == [*parts.blocks, parts.head], "each block is passed once, in order"
    width = head_of(net).weight.shape[1]
    assert all(len(shape) == 4 and shape[0] == 2 for shape in seen.values())
    assert seen[parts.head][1] == width
    assert isinstance(logits_of(net.train()(x)), torch.Tensor)
    if name not in SHALLOW:
        again = load_model(save_model(net, tmp_path / "m.safetensors"))
        with torch.no_grad():
            assert torch.equal(net.eval()(x), again(x)) and again.info == net.info


def test_timm_two_heads_are_named():
    timm = pytest.importorskip("timm")
    net = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3)
    with pytest.raises(FinetuneError, match="has 2 heads.*head='head'"):
        anatomy(net)
    parts = anatomy(net, head="head")
    assert parts.groups["head"] == ("head.weight", "head.bias")
    with pytest.raises(FinetuneError, match="timm has no model 'resnet19'.*near"):
        build("timm/resnet19", 3)


def test_auxiliary_heads_of_a_file_are_left_out(tmp_path):
    full = torchvision.models.googlenet(weights=None, num_classes=6, init_weights=False)
    torch.save(full.state_dict(), tmp_path / "g.pth")
    net = load_backbone("googlenet", tmp_path / "g.pth")
    assert net.info["num_classes"] == 6
    assert {row[0].split(".")[0] for row in net.loading if row[3] == "ignored" and row[1]} >= {
        "aux1",
        "aux2",
    }
    parts = checked(full)
    assert any(name.startswith("aux1.") for name in parts.groups["inception4"])
    assert logits_of(full.train()(torch.rand(2, 3, 64, 64))).shape == (2, 6)


@pytest.mark.parametrize("name", ["densenet121", "vit_b_32", "swin_t", "mobilenet_v3_small"])
def test_checkpoints_of_every_family(name, tmp_path):
    """A file keeps its own names for heads and prefixes, and each finds its place."""
    net = getattr(torchvision.models, name)(weights=None, num_classes=4)
    state = {f"module.{key}": value for key, value in net.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    found = load_backbone(name, tmp_path / "x.pth")
    assert {row[3] for row in found.loading} == {"loaded"} and found.info["num_classes"] == 4
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), found.parameters()))
    with pytest.raises(FinetuneError, match="does not fit|no last layer"):
        load_backbone("resnet18", tmp_path / "x.pth")


def test_edits_of_other_nets(tmp_path):
    """A head on chosen columns, and another activation, for nets that are no ResNets."""
    x = torch.rand(2, 3, 32, 32)
    for name in ("convnext_tiny", "mobilenet_v3_small"):
        net = build(name, 4)
        block = anatomy(net).blocks[1]
        edit = {"edit": "select_columns", "taps": [[block, "mean", 6]], "num_classes": 4}
        joined = apply_edit(net, edit).eval()
        parts = checked(joined)
        assert parts.head == "fc" and parts.blocks[0].startswith("net.")
        again = load_model(save_model(joined, tmp_path / "m.safetensors"))
        with torch.no_grad():
            assert torch.equal(joined(x), again(x))
    changed = replace_activation(build("convnext_tiny", 4), "relu").eval()
    again = load_model(save_model(changed, tmp_path / "m.safetensors"))
    assert torch.equal(changed(x), again(x))
    with pytest.raises(FinetuneError, match="relu as a function"):
        replace_activation(build("densenet121", 4), "gelu")


def test_modes_come_back_module_by_module():
    net = build("resnet20", 3).train()
    net.bn1.eval()
    before = [module.training for module in net.modules()]
    count_cost(net)
    assert [module.training for module in net.modules()] == before
    vit = small_net("vit_b_32")
    assert count_cost(vit, 224)["macs"] > 4.3e9, "attention is counted, too: 4.41 billion"


def test_a_backbone_of_ones_own(tmp_path):
    @backbone("test_mine", head="mouth.2", groups=["eyes", "brain"], size=16)
    def made(classes):
        return set_head(adopt(mine(), head="mouth.2"), classes)

    net = load_backbone("test_mine", None, 6).eval()
    again = load_model(save_model(net, tmp_path / "m.safetensors"))
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(net(x), again(x)) and list(anatomy(again).groups)[:2] == ["eyes", "brain"]
    del BACKBONES["test_mine"]
    with pytest.raises(FinetuneError, match="registered with @backbone"):
        load_model(tmp_path / "m.safetensors")
    with pytest.raises(FinetuneError, match="take another"):
        backbone("resnet18")
