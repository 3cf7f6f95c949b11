"""Every strategy: what moves, what rests, the arithmetic against an oracle, and runs that are
broken off."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_training import SMALL, break_and_resume, digest, net, parts, quiet  # noqa: F401

from finetune_nb.environment import FinetuneError
from finetune_nb.models import load_model, load_resnet, to_input
from finetune_nb.training import (
    STRATEGIES,
    SWA,
    Loop,
    LowRank,
    Recipe,
    Run,
    ScheduleFree,
    apply_strategy,
    layer_groups,
    relative_gradients,
)

PLAIN = dict(
    schedule="constant",
    warmup=0,
    weight_decay=0,
    clip_norm=0,
    momentum=0,
    epochs=1,
    batch_size=500,
    channels_last=False,
)
VARIANTS = [
    {"strategy": "lp-ft"},
    {"strategy": "gradual", "epochs": 3},
    {"strategy": "discriminative"},
    {"strategy": "surgical"},
    {"strategy": "surgical", "layers": ("layer1",)},
    {"strategy": "auto-rgn"},
    {"strategy": "norm-only"},
    {"strategy": "lora"},
    {"strategy": "lora", "patience": 1, "epochs": 3},
    {"strategy": "l2-sp"},
    {"sam": 0.05},
    {"swa": 0.5},
    {"optimizer": "schedule-free", "schedule": "constant"},
    {"strategy": "lora", "ema": 0.9},
]


def moved(before, after):
    """Groups of a CIFAR net in which a tensor changed."""
    tops = {n.split(".")[0] for n, value in after.items() if not torch.equal(value, before[n])}
    return {{"fc": "head", "conv1": "stem", "bn1": "stem"}.get(top, top) for top in tops}


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("steps", [1, 8, 9])
def test_broken_and_resumed_is_the_same(parts, tmp_path, changes, steps, monkeypatch):
    recipe = SMALL.replace(**changes)
    whole, resumed = break_and_resume(parts, tmp_path, recipe, steps, monkeypatch)
    assert (
        digest(resumed) == digest(whole) == digest(load_model(tmp_path))
        and Run.load(tmp_path).recipe == recipe
    )


@pytest.mark.parametrize(
    "name, learns",
    [("norm-only", None), ("lora", None), ("surgical", {"layer2", "head"}), ("head", {"head"})],
)
def test_what_moves_and_what_rests(parts, name, learns):
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    quiet(
        model,
        parts[0],
        recipe=SMALL.replace(
            strategy=name, layers=("layer2",) if name == "surgical" else (), weight_decay=0.1
        ),
    )
    after = model.state_dict()
    assert list(after) == list(before), "the net must be what it was, name for name"
    if learns:
        assert moved(before, after) == learns
    for key in after:
        if key.endswith("conv1.weight") and name == "norm-only":
            assert torch.equal(before[key], after[key])
        if ".bn" in key and name == "lora":
            assert torch.equal(before[key], after[key]), (
                f"{key}: a frozen norm keeps its statistics, too"
            )
    if name == "lora":
        change = (after["layer2.0.conv2.weight"] - before["layer2.0.conv2.weight"]).flatten(1)
        assert 1 <= torch.linalg.matrix_rank(change, rtol=1e-4) <= 8


def test_gradual_frees_from_the_top_and_discriminative_slows_to_the_bottom():
    model, groups = net(), ["head", "layer3", "layer2", "layer1", "stem"]
    assert list(layer_groups(model)) == groups[::-1]
    for epochs in (2, 3, 5, 9):
        recipe, free = Recipe(strategy="gradual", epochs=epochs), []
        for epoch in range(epochs):
            scales = apply_strategy(model, recipe, epoch)
            free.append({group for group in layer_groups(model) if scales[group] > 0})
        assert (
            free[0] == {"head"}
            and free[-1] == set(groups)
            and all(a <= b for a, b in zip(free, free[1:]))
        )
        assert all(f == set(groups[: len(f)]) for f in free)
    scales = apply_strategy(model, Recipe(strategy="discriminative", layer_decay=2.6), 0)
    assert (
        scales["head"] == 1
        and scales["layer3"] == pytest.approx(1 / 2.6)
        and scales["stem"] == pytest.approx(2.6**-4)
    )


def test_lp_ft_has_two_schedules(parts):
    run = quiet(
        net(),
        parts[0],
        recipe=SMALL.replace(strategy="lp-ft", epochs=4, body_lr=0.1, schedule="cosine", warmup=0),
    )
    assert [row["trained"] for row in run.history] == ["head", "head", "all", "all"]
    rates = [row["rate"] for row in run.history]
    assert (
        rates[0] == pytest.approx(rates[2])
        and rates[1] == pytest.approx(rates[3])
        and rates[1] < rates[0] / 5
    )
    with pytest.raises(FinetuneError, match="needs 2 epochs"):
        quiet(net(), parts[0], recipe=SMALL.replace(strategy="lp-ft", epochs=1))


def gradients(model, batch):
    """By autograd alone, in training mode, of a copy."""
    twin = copy.deepcopy(model).train()
    F.cross_entropy(twin(to_input(batch.pixels, twin)), batch.labels).backward()
    return dict(twin.named_parameters())


def one_batch(images):
    return next(iter(images.loader(batch_size=500, size=32, shuffle=True, seed=SMALL.seed)))


def test_l2_sp_is_its_penalty(parts):
    """One step from the start is a plain step, as the pull is zero there; the second one has the
    gradient of pull/2 |w − w0|²."""
    recipe = Recipe(strategy="l2-sp", pull=0.3, lr=0.05, **PLAIN | {"epochs": 2})
    start, model, oracle = net(), net(), net()
    quiet(model, parts[0], recipe=recipe)
    for epoch in range(2):
        batch = next(
            iter(
                parts[0].loader(
                    batch_size=500, size=32, shuffle=True, seed=recipe.seed, epoch=epoch
                )
            )
        )
        oracle.train()
        loss = F.cross_entropy(oracle(to_input(batch.pixels, oracle)), batch.labels)
        loss = loss + 0.3 / 2 * sum(
            ((p - q.detach()) ** 2).sum()
            for (name, p), q in zip(oracle.named_parameters(), start.parameters())
            if not name.startswith("fc.")
        )
        oracle.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in oracle.parameters():
                p -= 0.05 * p.grad
    for (name, a), b in zip(model.named_parameters(), oracle.parameters()):
        assert torch.allclose(a, b, atol=2e-5), name


def test_sam_is_a_step_with_the_gradient_of_the_worst_point(parts):
    recipe = Recipe(sam=0.1, lr=0.05, **PLAIN)
    model, start = net(), net()
    quiet(model, parts[0], recipe=recipe)
    batch = one_batch(parts[0])
    here = gradients(start, batch)
    length = math.sqrt(sum(float((p.grad**2).sum()) for p in here.values()))
    away = copy.deepcopy(start)
    with torch.no_grad():
        for p, g in zip(away.parameters(), here.values()):
            p += 0.1 / length * g.grad
    there = gradients(away, batch)
    for (name, a), b in zip(model.named_parameters(), start.parameters()):
        assert torch.allclose(a, b - 0.05 * there[name].grad, atol=2e-5), name
    twin = copy.deepcopy(start).train()
    twin(to_input(batch.pixels, twin))  # one pass only may move the running statistics
    assert torch.allclose(model.bn1.running_mean, twin.bn1.running_mean, atol=1e-5) and int(
        model.bn1.num_batches_tracked
    ) == int(twin.bn1.num_batches_tracked)


def test_swa_is_the_mean_of_the_last_weights(parts):
    recipe, seen = Recipe(swa=0.5, **PLAIN | {"epochs": 4}), []
    original = SWA.on_step_end

    def follow(self, loop):
        seen.append({k: v.detach().clone() for k, v in loop.model.named_parameters()})
        original(self, loop)

    model = net()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SWA, "on_step_end", follow)
        quiet(model, parts[0], recipe=recipe)
    assert len(seen) == 4
    for name, value in model.named_parameters():
        assert torch.allclose(value, (seen[2][name] + seen[3][name]) / 2, atol=1e-6), name


def test_schedule_free_by_its_definition():
    """In float64, as the three sequences of the paper, on gradients that do not depend on the
    point."""
    generator = torch.Generator().manual_seed(3)
    p = torch.nn.Parameter(torch.randn(7, generator=generator, dtype=torch.float64))
    x = z = p.detach().clone()
    optimizer, total = ScheduleFree([p], lr=0.1, momentum=0.9, weight_decay=0.01), 0.0
    for step in range(20):
        lr = 0.1 * min(1, (step + 1) / 5)
        optimizer.param_groups[0]["lr"] = lr
        y = 0.1 * z + 0.9 * x
        assert torch.allclose(p.detach(), y, atol=1e-12) or step == 0
        p.grad = torch.randn(7, generator=generator, dtype=torch.float64)
        total += lr**2
        z = z - lr * (p.grad + 0.01 * y)
        x = x + lr**2 / total * (z - x)
        optimizer.step()
    assert torch.allclose(optimizer.state[p]["x"], x, atol=1e-12)
    holder = torch.nn.ParameterList([p])
    assert torch.equal(optimizer.averaged(holder)[0], optimizer.state[p]["x"])


def test_relative_gradients_by_autograd_and_nothing_moves(parts):
    model = net()
    before, asked = digest(model), [p.requires_grad for p in model.parameters()]
    found = relative_gradients(model, parts[0], limit=10_000)
    assert (
        digest(model) == before
        and [p.requires_grad for p in model.parameters()] == asked
        and all(p.grad is None for p in model.parameters())
    )
    twin = copy.deepcopy(model).double().eval()
    pixels = torch.cat([b.pixels for b in parts[0].loader(batch_size=500, size=32)])
    labels = torch.cat([b.labels for b in parts[0].loader(batch_size=500, size=32)])
    F.cross_entropy(twin(to_input(pixels, twin).double()), labels, reduction="sum").backward()
    parameters = dict(twin.named_parameters())
    for group, names in layer_groups(twin).items():
        if group != "head":
            weights = [parameters[n] for n in names if parameters[n].ndim > 1]
            expected = math.sqrt(sum((p.grad**2).sum() for p in weights).item()) / math.sqrt(
                sum((p.detach() ** 2).sum() for p in weights)
            )
            assert found[group] == pytest.approx(float(expected), rel=1e-3), group


def test_auto_rgn_gives_the_keenest_layer_the_full_rate(parts, monkeypatch):
    seen, original = [], STRATEGIES["auto-rgn"].gradients

    def watch(loop):
        original(loop)
        seen.append({group["layer"]: group["lr"] for group in loop.optimizer.param_groups})

    monkeypatch.setattr(STRATEGIES["auto-rgn"], "gradients", watch, raising=False)
    recipe = SMALL.replace(strategy="auto-rgn", schedule="constant", warmup=0)
    quiet(net(), parts[0], recipe=recipe)
    assert seen
    for rates in seen:
        body = [value for name, value in rates.items() if name != "head"]
        assert max(body) == pytest.approx(SMALL.lr) and 0 < min(body) < SMALL.lr
        assert rates["head"] == pytest.approx(SMALL.lr)


@pytest.mark.parametrize(
    "layer, x",
    [
        (torch.nn.Conv2d(4, 6, 3, stride=2, padding=1), torch.randn(2, 4, 9, 9)),
        (torch.nn.Conv2d(4, 8, 3, groups=2), torch.randn(2, 4, 9, 9)),
        (torch.nn.Linear(5, 7), torch.randn(3, 5)),
    ],
    ids=["conv", "grouped", "linear"],
)
def test_low_rank_starts_at_nothing_and_merges_exactly(layer, x):
    from torch.nn.utils import parametrize

    before, kind = layer(x).detach(), type(layer)
    change = LowRank(layer.weight, 99, torch.Generator().manual_seed(0))
    parametrize.register_parametrization(layer, "weight", change, unsafe=True)
    assert len(change.down) <= min(len(layer.weight), layer.weight[0].numel())
    assert torch.equal(layer(x), before)
    with torch.no_grad():
        change.up.normal_()
    adapted = layer(x).detach()
    STRATEGIES["lora"].restore(torch.nn.Sequential(layer))
    assert type(layer) is kind and list(dict(layer.named_parameters())) == ["weight", "bias"]
    assert torch.equal(layer(x), adapted) and not torch.equal(adapted, before)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"strategy": "lora2"}, "choose from full, head, lp-ft"),
        ({"rank": 0}, "must be 1 or more"),
        ({"pull": float("nan")}, "finite number"),
        ({"swa": 0.5, "ema": 0.9}, "set ema=0"),
        ({"optimizer": "schedule-free"}, 'schedule="constant"'),
        ({"sam": -1}, "0 or more"),
        ({"layer_decay": 0.5}, "1 or more"),
        ({"ramp": 1.5}, "share of the steps"),
        ({"lr": float("nan")}, "finite number"),
    ],
)
def test_recipes_that_cannot_work(changes, message):
    with pytest.raises(FinetuneError, match=message):
        SMALL.replace(**changes)


def test_layers_that_do_not_exist(parts):
    with pytest.raises(FinetuneError, match="no group 'layer9'.*stem, layer1"):
        quiet(net(), parts[0], recipe=SMALL.replace(strategy="surgical", layers=("layer9",)))


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_every_strategy_fits_every_kind_of_resnet(parts, arch):
    """One step each on torchvision's nets: plain and bottleneck blocks, grouped convolutions."""
    few = parts[0].select(np.arange(8))
    for name in STRATEGIES:
        torch.manual_seed(0)
        model = load_resnet(arch, None, 10)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        recipe = SMALL.replace(
            strategy=name,
            epochs=2 if name == "lp-ft" else 1,
            batch_size=8,
            size=32,
            augment="none",
            warmup=0.0,
        )
        quiet(model, few, recipe=recipe)
        after = model.state_dict()
        assert list(after) == list(before), name
        learnt = {
            group
            for group, names in layer_groups(model).items()
            if any(not torch.equal(after[n], before[n]) for n in names)
        }
        if name in ("head", "gradual"):  # of gradual there is one epoch here
            assert learnt == {"head"}, name
        elif name == "surgical":
            assert "head" in learnt and len(learnt) == 2
        else:
            assert learnt == set(layer_groups(model)), name


def test_the_head_can_rest(parts):
    """As in surgical fine-tuning after Lee et al.: one block and nothing else."""
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    quiet(model, parts[0], recipe=SMALL.replace(strategy="surgical", layers="layer2", head_lr=0.0))
    assert moved(before, model.state_dict()) == {"layer2"}
    model = net(batchnorm="train")  # norms learn everywhere; the head's bias is no norm
    quiet(model, parts[0], recipe=SMALL.replace(strategy="surgical", layers="layer2", head_lr=0.0))
    assert "head" not in moved(before, model.state_dict())
    for name in ("head", "lp-ft", "gradual"):
        with pytest.raises(FinetuneError, match="it must learn"):
            SMALL.replace(strategy=name, head_lr=0.0)


def test_a_strategy_that_does_not_fit_names_those_that_do(parts):
    model = net()
    for block in [model, *model.layer1, *model.layer2, *model.layer3]:
        for name in [n for n, m in block.named_children() if isinstance(m, torch.nn.BatchNorm2d)]:
            setattr(block, name, torch.nn.Identity())
    with pytest.raises(
        FinetuneError,
        match="'norm-only' does not fit this resnet20: it has no norms; "
        "those that do: full, head, lp-ft, gradual.*l2-sp",
    ) as error:
        quiet(model, parts[0], recipe=SMALL.replace(strategy="norm-only"))
    assert str(error.value).count("norm-only") == 1
    quiet(model, parts[0], recipe=SMALL.replace(strategy="discriminative", epochs=1))


@pytest.mark.parametrize("strategy", ["full", "auto-rgn", "lora"])
def test_a_run_that_diverges_keeps_its_last_good_state(parts, tmp_path, strategy, monkeypatch):
    """The loss is finite when the update breaks the weights: no state with NaN may be written, and
    the caller gets the last good net."""
    original, kept = Loop.step, {}

    def step(self, *args):
        original(self, *args)
        if self.at["step"] == 6:
            kept.update(state=(tmp_path / "state.safetensors").read_bytes())
            with torch.no_grad():
                next(p for p in self.model.layer2.parameters() if p.requires_grad).fill_(
                    float("nan")
                )

    monkeypatch.setattr(Loop, "step", step)
    model = net()
    with pytest.raises(
        FinetuneError,
        match=r"NaN or infinity after step 5 \(epoch 0, the batch with .*last good state is in",
    ):
        quiet(model, *parts[:2], SMALL.replace(strategy=strategy), folder=tmp_path, save_every=3)
    monkeypatch.setattr(Loop, "step", original)
    assert (tmp_path / "state.safetensors").read_bytes() == kept["state"]
    assert all(torch.isfinite(v).all() for v in model.state_dict().values()) and list(
        model.state_dict()
    ) == list(net().state_dict())
    whole, again = net(), net(seed=5)
    quiet(whole, *parts[:2], SMALL.replace(strategy=strategy))
    quiet(again, *parts[:2], SMALL.replace(strategy=strategy), folder=tmp_path, save_every=3)
    assert digest(whole) == digest(again), "it goes on from there"


def test_a_failed_run_leaves_a_plain_net(parts):
    model = net()
    with pytest.raises(FinetuneError, match="the loss became"):
        quiet(
            model,
            parts[0],
            recipe=SMALL.replace(
                strategy="lora", lr=1e20, clip_norm=0, warmup=0, schedule="constant"
            ),
        )
    assert list(model.state_dict()) == list(net().state_dict())


def test_a_state_of_another_version_is_refused_with_the_reason(parts, tmp_path):
    """The steps of another version are not the same: its state is named, and nothing is touched."""
    import json

    import safetensors
    import safetensors.torch

    quiet(net(), *parts[:2], SMALL.replace(epochs=1), folder=tmp_path)
    path = tmp_path / "state.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["meta"])
    for other in (None, 1, 99):
        meta["version"] = other
        told = {k: v for k, v in meta.items() if v is not None}
        tensors = safetensors.torch.load_file(path)
        safetensors.torch.save_file(tensors, path, {"meta": json.dumps(told)})
        model, kept = net(3), path.read_bytes()
        before = digest(model)
        with pytest.raises(FinetuneError, match="another version.*resume=False"):
            quiet(model, *parts[:2], SMALL.replace(epochs=1), folder=tmp_path)
        assert digest(model) == before and path.read_bytes() == kept
    assert Run.load(tmp_path).recipe == SMALL.replace(epochs=1)


def test_a_run_json_with_the_options_of_all_strategies_loads(tmp_path):
    """Earlier versions wrote every option into one flat list, also those of strategies not used."""
    import json

    from finetune_nb.models import save_model

    flat = {
        "strategy": "full",
        "epochs": 3,
        "layers": ["layer1"],
        "rank": 8,
        "pull": 0.01,
        "ema": 0.9,
    }
    flat |= {"layer_decay": 2.6, "freeze_epochs": 1, "clip_norm": 5.0, "swa": 0.0, "patience": 0}
    save_model(net(), tmp_path / "model.safetensors")
    (tmp_path / "run.json").write_text(json.dumps({"recipe": flat, "history": []}))
    assert Run.load(tmp_path).recipe == Recipe(epochs=3, ema=0.9, freeze_epochs=1)
