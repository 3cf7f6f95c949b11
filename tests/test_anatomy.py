"""What nets are made of: all of torchvision, timm by its metadata, and nets named by hand."""

import pytest
import torch
import torchvision.models
from torch import nn

from finetune_nb.environment import FinetuneError
from finetune_nb.models import adopt, anatomy, head_of, load_resnet, set_head, tapped

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
