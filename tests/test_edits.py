"""Activations that are exchanged: what stays, what is saved, and the ramp from one to the other."""

import copy

import pytest
import torch
from test_training import SMALL, break_and_resume, digest, net, parts, quiet  # noqa: F401

from finetune_nb.models.edits import ACTIVATIONS, Activation, activations, replace_activation
from finetune_nb.environment import FinetuneError
from finetune_nb.evaluation import evaluate
from finetune_nb.models import load_model, load_resnet, save_model


def amounts(model):
    return {module.amount for module in model.modules() if isinstance(module, Activation)}


@pytest.mark.parametrize(
    "arch, weights, places",
    [("resnet20", "shipped", 10), ("resnet18", None, 9), ("resnet50", None, 17)],
)
def test_every_activation_is_exchanged(arch, weights, places):
    torch.manual_seed(0)
    model, x = load_resnet(arch, weights, 10).eval(), torch.randn(2, 3, 32, 32)
    changed = replace_activation(model, "silu")
    assert len(activations(model)) == len(activations(changed)) == places and {
        name for *_, name in activations(changed)
    } == {"silu"}
    assert not any(
        isinstance(m, torch.nn.ReLU) and not isinstance(p, Activation)
        for p in changed.modules()
        for m in p.children()
    )
    with torch.no_grad():
        before = model(x)
        assert not torch.allclose(changed(x), before) and torch.equal(model(x), before), (
            "the net that was given stays as it is"
        )
        assert torch.allclose(replace_activation(changed, "relu")(x), before, atol=1e-5)
    assert list(changed.state_dict()) == list(model.state_dict()) and model.info["edits"] == []


def test_the_function_is_the_one_that_was_asked_for():
    """By torch's own functions, through a whole block."""
    model = replace_activation(load_resnet("resnet20", "shipped", 10).eval(), "gelu")
    block, x = model.layer1[0], torch.randn(1, 16, 8, 8)
    gelu = torch.nn.functional.gelu
    assert torch.allclose(
        block(x), gelu(x + block.bn2(block.conv2(gelu(block.bn1(block.conv1(x)))))), atol=1e-6
    )


@pytest.mark.parametrize("activation", ["silu", "leaky_relu", "tanh"])
def test_saved_and_loaded(tmp_path, activation):
    model, x = replace_activation(net(), activation).eval(), torch.randn(2, 3, 32, 32)
    again = load_model(save_model(model, tmp_path / "model.safetensors"))
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert again.info["edits"] == [{"edit": "replace_activation", "activation": activation}]


def test_the_ramp_begins_where_the_net_was(parts):
    """With rates of 0 the net at amount 0 is the old net, at 1 the new one, and half way the mean
    of the two functions."""
    model = replace_activation(net(), "silu").eval()
    block, x = copy.deepcopy(model.layer1[0].relu), torch.randn(99)
    block.amount = 0.5
    assert torch.allclose(block(x), (torch.relu(x) + torch.nn.functional.silu(x)) / 2, atol=1e-6)
    for module in model.modules():
        if isinstance(module, Activation):
            module.amount = 0.0
    assert evaluate(model, parts[1]).nll == pytest.approx(evaluate(net(), parts[1]).nll, rel=1e-5)


@pytest.mark.parametrize(
    "changes", [{}, {"ema": 0.9}, {"patience": 1}, {"strategy": "lora"}], ids=str
)
def test_a_ramp_ends_at_one_and_survives_a_break(parts, tmp_path, changes, monkeypatch):
    recipe = SMALL.replace(ramp=0.6, epochs=3, **changes)
    whole, resumed = break_and_resume(
        parts,
        tmp_path,
        recipe,
        9,
        monkeypatch,
        lambda seed=0: replace_activation(net(seed), "silu"),
    )
    assert digest(resumed) == digest(whole) == digest(load_model(tmp_path))
    assert amounts(whole) == amounts(resumed) == amounts(load_model(tmp_path)) == {1.0}


def test_an_unfinished_ramp_is_never_the_best(parts):
    run = quiet(
        replace_activation(net(), "silu"), *parts[:2], SMALL.replace(ramp=1.0, epochs=3, patience=1)
    )
    assert len(run.history) == 3 and amounts(run.model) == {1.0}


def test_a_ramp_needs_something_to_ramp(parts):
    with pytest.raises(FinetuneError, match="no replaced activation"):
        quiet(net(), parts[0], recipe=SMALL.replace(ramp=0.5))


def test_names_that_do_not_exist():
    with pytest.raises(FinetuneError, match="choose from relu, leaky_relu"):
        replace_activation(net(), "swoosh")
    bare = torch.nn.Sequential(torch.nn.Flatten())
    bare.info = {"arch": "bare", "edits": []}
    with pytest.raises(FinetuneError, match="nothing to replace"):
        replace_activation(bare, "silu")
    assert all(not list(kind().parameters()) for kind in ACTIVATIONS.values())
