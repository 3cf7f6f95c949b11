"""The range test puts everything back; blends against arithmetic; soups never fall below their best
member."""

import copy

import numpy as np
import pytest
import torch
from test_training import SMALL, digest, net, parts, quiet  # noqa: F401

from finetune_nb.environment import FinetuneError
from finetune_nb.evaluation import evaluate
from finetune_nb.models import load_resnet
from finetune_nb.weight_tuning import LRFinder, blend, find_lr, greedy_soup


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"strategy": "head"},
        {"strategy": "lora"},
        {"strategy": "lp-ft"},
        {"optimizer": "adamw"},
        {"size": 24},
    ],
    ids=str,
)
def test_find_lr_leaves_no_trace(parts, changes):
    model = net().train()
    model.fc.weight.requires_grad_(False)
    before, names, info, generator = (
        digest(model),
        list(model.state_dict()),
        copy.deepcopy(model.info),
        torch.get_rng_state(),
    )
    found = find_lr(model, parts[0], SMALL.replace(**changes), steps=25, device="cpu")
    assert (
        digest(model) == before
        and list(model.state_dict()) == names
        and model.info == info
        and torch.equal(torch.get_rng_state(), generator)
    )
    assert (
        model.training
        and not model.fc.weight.requires_grad
        and model.conv1.weight.requires_grad
        and all(p.grad is None for p in model.parameters())
    )
    assert (
        len(found.losses) <= 25
        and found.rates[0] < found.suggestion * 10 <= found.rates[-1] * 1.0001
    )


def test_find_lr_steps_are_those_of_the_loop(parts):
    """With the rate held still, the losses of the range test are those of a plain loop over the
    same batches."""
    recipe = SMALL.replace(schedule="constant", warmup=0, lr=0.01, epochs=1)
    found, losses = find_lr(net(), parts[0], recipe, low=0.01, high=0.01 * (1 + 1e-9), steps=10), []
    from finetune_nb.training.loop import Loop

    original = Loop.step

    def step(self, batch):
        before = self.at["sums"][0]
        original(self, batch)
        losses.append((self.at["sums"][0] - before) / len(batch.labels))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "step", step)
        quiet(net(), parts[0], recipe=recipe)
    n = min(len(losses), len(found.losses))
    assert n >= 5 and np.allclose(losses[:n], found.losses[:n], atol=1e-5)


def test_find_lr_explodes_quietly_and_says_what_is_wrong(parts):
    model = net()
    before = digest(model)
    found = find_lr(model, parts[0], SMALL.replace(clip_norm=0), low=1e-3, high=1e6, steps=40)
    assert len(found.rates) < 40 and digest(model) == before
    with pytest.raises(FinetuneError, match="0 < low < high"):
        find_lr(model, parts[0], SMALL, low=1, high=0.1)
    with pytest.raises(FinetuneError, match="layer9"):
        find_lr(model, parts[0], SMALL.replace(strategy="surgical", layers=("layer9",)))
    assert digest(model) == before


def test_suggestion_is_a_tenth_of_the_valley():
    rates = np.geomspace(1e-4, 10, 60)
    found = LRFinder(rates, 2 + (np.log10(rates) - np.log10(0.3)) ** 2)
    assert (
        found.lowest / 3 < 0.3 < found.lowest * 3
        and found.suggestion == pytest.approx(found.lowest / 10)
        and "a tenth" in found.reason
    )


def test_blend_is_the_weighted_mean(parts):
    a, b = net(), net(seed=3)
    with torch.no_grad():
        for p in b.parameters():
            p.add_(0.01 * torch.randn_like(p))
    mixed = blend([a, b], [0.25, 0.75])
    for (name, value), x, y in zip(
        mixed.state_dict().items(), a.state_dict().values(), b.state_dict().values()
    ):
        if value.is_floating_point():
            assert np.allclose(
                value.numpy(), 0.25 * x.double().numpy() + 0.75 * y.double().numpy(), atol=1e-6
            ), name
    assert digest(blend([a, b], [1, 0])) == digest(a)
    again = blend([a, b], [0.5, 0.5], parts[0])
    assert not torch.equal(
        again.bn1.running_var, blend([a, b], [0.5, 0.5]).bn1.running_var
    ) and torch.equal(again.conv1.weight, blend([a, b], [0.5, 0.5]).conv1.weight)


@pytest.mark.parametrize(
    "models, shares, message",
    [
        (lambda: [net(), net()], [0.5, 0.6], "with the sum 1"),
        (lambda: [net()], [0.5, 0.5], "one share a model"),
        (
            lambda: [net(), load_resnet("resnet20", "shipped", 7)],
            [0.5, 0.5],
            "tensors differ, such as fc.bias",
        ),
    ],
)
def test_blends_that_cannot_be(models, shares, message):
    with pytest.raises(FinetuneError, match=message):
        blend(models(), shares)


def test_soup_is_never_worse_on_what_chose_it(parts):
    models = []
    for seed, lr in enumerate((0.005, 0.02, 0.3)):
        model = net()
        quiet(model, parts[0], recipe=SMALL.replace(lr=lr, seed=seed))
        models.append(model)
    before = [digest(model) for model in models]
    soup, inside = greedy_soup(models, parts[1])
    single = [evaluate(model, parts[1]).accuracy for model in models]
    assert (
        evaluate(soup, parts[1]).accuracy >= max(single)
        and single[inside[0]] == max(single)
        and len(set(inside)) == len(inside)
    )
    assert [digest(model) for model in models] == before
    assert greedy_soup(models[:1], parts[1])[1] == [0]
    with pytest.raises(FinetuneError, match="no models"):
        greedy_soup([], parts[1])


def test_find_lr_keeps_the_mode_of_every_module(parts):
    model = net().train()
    model.bn1.eval()
    modes = [module.training for module in model.modules()]
    find_lr(model, parts[0], SMALL, steps=10)
    assert [module.training for module in model.modules()] == modes


def test_find_lr_leaves_unreadable_pictures_out(tmp_path):
    from conftest import make_photos
    from finetune_nb.data import load_images

    folder = make_photos(tmp_path / "photos", classes=2, each=12)
    for path in sorted(folder.rglob("*.*"))[::2]:
        path.write_bytes(b"broken")
    images = load_images(folder)
    found = find_lr(
        load_resnet("resnet20", "shipped", 2), images, SMALL.replace(batch_size=2), steps=12
    )
    assert 1 <= len(found.losses) <= 12 and np.isfinite(found.losses).all()
    for path in folder.rglob("*.*"):
        path.write_bytes(b"broken")
    with pytest.raises(FinetuneError, match="no batch holds two|could be decoded"):
        find_lr(load_resnet("resnet20", "shipped", 2), load_images(folder), SMALL, steps=12)


def test_table_of_ways_marks_what_an_interval_shows():
    from finetune_nb.evaluation import Ledger
    from finetune_nb.weight_tuning import by_way, ways_table

    ledger = Ledger()
    for way, values in {
        "full": [0.5, 0.6, 0.7],
        "up": [0.6, 0.7, 0.81],
        "same": [0.5, 0.61, 0.69],
    }.items():
        ledger.add(f"noise, test, {way}", values=values)
    assert by_way(ledger)["up"] == {"noise": [0.6, 0.7, 0.81]}
    lines = ways_table(ledger).splitlines()
    marks = [line.rstrip()[-1] for line in lines[1:]]
    assert marks == ["0", "+", "0"] and "0.600" in lines[1] and "0.703" in lines[2]


def test_a_blend_is_in_eval_mode_with_and_without_new_statistics(parts):
    nets = [net().train(), net(seed=3).train()]
    for images in (None, parts[0]):
        assert not any(module.training for module in blend(nets, [0.5, 0.5], images).modules())
