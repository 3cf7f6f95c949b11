"""The loop against an oracle, frozen layers, and runs that are killed."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from finetune_nb.data import load_images
from finetune_nb.training import (
    EMA,
    STRATEGIES,
    GroupOf,
    Loop,
    layer_groups,
    make_optimizer,
    momentum_at,
    rate,
    strategy,
)
from finetune_nb.environment import FinetuneError
from finetune_nb.evaluation import evaluate
from finetune_nb.data.index import from_arrays
from finetune_nb.models import load_model, load_resnet, to_input
from finetune_nb.training import Recipe, Run, fit, recalibrate

SMALL = Recipe(epochs=2, batch_size=16, lr=0.02, augment="affine")


@pytest.fixture(scope="module")
def parts():
    return load_images("digits", limit=160).three_way()


def net(seed=0, **options):
    torch.manual_seed(seed)
    return load_resnet("resnet20", "shipped", 10, **options)


def digest(model):
    return hashlib.sha256(
        b"".join(v.detach().contiguous().numpy().tobytes() for v in model.state_dict().values())
    ).hexdigest()


def quiet(*args, **options):
    return fit(*args, progress=False, workers=options.pop("workers", 1), **options)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_oracle(parts, optimizer):
    """One epoch against torch's own optimizer with schedule and clipping by hand: SGD in double
    precision; Adam, whose first steps are the sign of the gradient and so magnify any rounding,
    in the same precision and without the fused kernel."""
    dtype = torch.float64 if optimizer == "sgd" else torch.float32
    recipe = Recipe(
        epochs=1,
        batch_size=16,
        lr=0.01,
        optimizer=optimizer,
        body_lr=0.3,
        label_smoothing=0.1,
        clip_norm=1.0,
        channels_last=False,
    )
    ours, theirs = net(), net().to(dtype)
    quiet(ours, parts[0], recipe=recipe)
    head = list(theirs.fc.parameters())
    rest = [p for n, p in theirs.named_parameters() if not n.startswith("fc")]
    groups = [
        {
            "params": [p for p in ps if (p.ndim > 1) == decay],
            "scale": scale,
            "weight_decay": recipe.weight_decay * decay,
        }
        for ps, scale in ((head, 1), (rest, 0.3))
        for decay in (True, False)
    ]
    opt = (
        torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True)
        if optimizer == "sgd"
        else torch.optim.AdamW(groups, lr=0.01, fused=False)
    )
    batches = list(parts[0].loader(batch_size=16, size=32, shuffle=True, seed=0, epoch=0))
    theirs.train()
    for step, batch in enumerate(batches):
        for group in opt.param_groups:
            group["lr"] = 0.01 * rate(step, len(batches), recipe) * group["scale"]
            if optimizer == "sgd":
                group["momentum"] = momentum_at(step, len(batches), recipe)
        loss = F.cross_entropy(
            theirs(to_input(batch.pixels, theirs).to(dtype)), batch.labels, label_smoothing=0.1
        )
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        opt.step()
    gap = max(
        (a.double() - b.double()).abs().max().item()
        for a, b in zip(ours.parameters(), theirs.parameters())
    )
    assert gap < 2e-3, gap


def test_schedule():
    recipe = Recipe(warmup=0.2)
    rates = [rate(s, 100, recipe) for s in range(100)]
    assert 0 < rates[0] < 0.06 and abs(max(rates) - 1) < 0.01 and rates[-1] < 0.01
    assert (
        rates.index(max(rates)) in (19, 20, 21)
        and all(np.diff(rates[:20]) > 0)
        and all(np.diff(rates[21:]) < 0)
    )
    assert rate(7, 100, Recipe(schedule="constant", warmup=0)) == 1
    momenta = [momentum_at(s, 100, recipe) for s in range(100)]
    assert min(momenta) == pytest.approx(0.9, abs=0.001) and max(momenta) < 0.95


def test_no_decay_on_norms_and_biases():
    model = net()
    for group in make_optimizer(model, SMALL, GroupOf(model), bool).param_groups:
        for p in group["params"]:
            assert (group["weight_decay"] > 0) == (p.ndim > 1)


def test_head_moves_nothing_else(parts):
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    quiet(model, parts[0], recipe=SMALL.replace(strategy="head", weight_decay=0.1))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith("fc."), name


@pytest.mark.parametrize(
    "policy, statistics, affine",
    [
        ("frozen-with-layer", False, False),
        ("adapt", True, False),
        ("recalibrate", True, False),
        ("train", True, True),
    ],
)
def test_batchnorm_policies(parts, policy, statistics, affine):
    model = net(batchnorm=policy)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    quiet(model, parts[0], recipe=SMALL.replace(strategy="head"))
    after = model.state_dict()
    assert (
        not torch.equal(before["layer2.0.bn1.running_var"], after["layer2.0.bn1.running_var"])
    ) == statistics
    assert (not torch.equal(before["layer2.0.bn1.weight"], after["layer2.0.bn1.weight"])) == affine
    assert torch.equal(before["layer2.0.conv1.weight"], after["layer2.0.conv1.weight"])


def test_recalibrate_gives_the_statistics_of_the_data(parts):
    model = recalibrate(net(), parts[0], limit=10_000)
    pixels = torch.cat([b.pixels for b in parts[0].loader(batch_size=500, size=32)])
    with torch.no_grad():
        out = model.conv1(to_input(pixels, model))
    assert torch.allclose(model.bn1.running_mean, out.mean((0, 2, 3)), atol=1e-3)


def test_run_is_kept_and_found_again(parts, tmp_path):
    model = net()
    run = quiet(model, *parts[:2], SMALL, folder=tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "state.safetensors",
        "model.safetensors",
        "run.json",
    }
    again = Run.load(tmp_path)
    assert (
        again.recipe == SMALL
        and again.history == run.history
        and digest(again.model) == digest(model)
    )
    assert [row["epoch"] for row in run.history] == [0, 1] and run.history[0]["valid_accuracy"] <= 1
    assert (
        "train_loss" in run.summary()
        and run.meta["versions"]["torch"] == torch.__version__.split("+")[0]
    )
    with pytest.raises(FinetuneError, match="holds no run"):
        Run.load(tmp_path / "nowhere")


def break_and_resume(parts, folder, recipe, steps, monkeypatch, net=net):
    """An error in the place of a power cut after so many steps, then a second run from the folder:
    (whole model, resumed model) with the same history."""
    whole = net()
    first = quiet(whole, *parts[:2], recipe)
    original, count = Loop.step, [0]

    def step(self, *args):
        count[0] += 1
        if count[0] == steps + 1:
            raise SystemError("power cut")
        return original(self, *args)

    monkeypatch.setattr(Loop, "step", step)
    with pytest.raises(SystemError):
        quiet(net(), *parts[:2], recipe, folder=folder, save_every=3)
    monkeypatch.setattr(Loop, "step", original)
    resumed = net(seed=99)  # even the head's first weights come from the state, if there is one
    if not (folder / "state.safetensors").exists():
        resumed = net()
    second = quiet(resumed, *parts[:2], recipe, folder=folder, save_every=3, workers=2)
    drop = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]  # noqa: E731
    assert drop(second.history) == drop(first.history)
    return whole, resumed


@pytest.mark.parametrize(
    "changes",
    [{}, {"ema": 0.9}, {"optimizer": "adamw"}, {"freeze_epochs": 1}, {"patience": 1, "epochs": 3}],
    ids=str,
)
@pytest.mark.parametrize("steps", [1, 8, 9])
def test_broken_and_resumed_is_the_same(parts, tmp_path, changes, steps, monkeypatch):
    whole, resumed = break_and_resume(parts, tmp_path, SMALL.replace(**changes), steps, monkeypatch)
    assert digest(resumed) == digest(whole)


def launch(folder, recipe, *sleep):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        str(ROOT / "tests" / "killed_run.py"),
        str(folder),
        json.dumps(recipe),
        *sleep,
    ]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_kill_minus_nine(tmp_path):
    """A real process is killed in the middle of epochs and across the moment where the body is
    unfrozen; it ends with the same bits."""
    recipe = {
        "epochs": 3,
        "batch_size": 20,
        "freeze_epochs": 1,
        "lr": 0.02,
        "augment": "affine",
        "ema": 0.9,
    }
    whole = launch(tmp_path / "whole", recipe)
    assert whole.wait(300) == 0, whole.stderr.read()
    rng, kills = random.Random(5), []
    for limit in (3, 9, 12, 17):  # 8 steps an epoch: before, at and after the unfreezing
        process = launch(tmp_path / "killed", recipe, "0.05")
        for line in process.stdout:
            if int(line) >= limit:
                break
        signal_after = rng.uniform(0, 0.06)
        try:
            process.wait(signal_after)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.wait()
        kills.append(process.returncode)
    assert kills.count(-signal.SIGKILL) >= 3, kills
    last = launch(tmp_path / "killed", recipe)
    assert last.wait(300) == 0, last.stderr.read()
    assert digest(load_model(tmp_path / "whole")) == digest(load_model(tmp_path / "killed"))
    history = json.loads((tmp_path / "killed" / "run.json").read_text())["history"]
    assert [row["trained"] for row in history] == ["head", "all", "all"]


# One run of 3 epochs of 7 steps each; the phases of lp-ft and gradual change between epochs.
EVERY = {
    "head": {},
    "full": {"freeze_epochs": 1},
    "lp-ft": {},
    "gradual": {},
    "discriminative": {},
    "surgical": {},
    "auto-rgn": {},
    "norm-only": {},
    "lora": {"ema": 0.9},
    "l2-sp": {},
    "sam": {"strategy": "full", "sam": 0.05},
    "swa": {"strategy": "full", "swa": 0.5},
    "schedule-free": {"strategy": "full", "optimizer": "schedule-free", "schedule": "constant"},
    "ramp": {"strategy": "full", "activation": "silu", "ramp": 0.5},
}


def test_every_strategy_survives_kill_minus_nine(tmp_path):
    """Each by name, killed inside the first phase, just before and after a change of phase, and
    near the end: the weights are those of a run that was left alone."""
    plans = {
        name: {"strategy": name, "epochs": 3, "batch_size": 16, "augment": "affine"} | changes
        for name, changes in EVERY.items()
    }
    assert set(STRATEGIES) <= {plan["strategy"] for plan in plans.values()}
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tests" / "killed_strategies.py"),
            str(tmp_path),
            json.dumps(plans),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == set(plans)
    for name, (whole, killed, kills) in found.items():
        assert whole == killed, f"{name}: killed and resumed is not the same as left alone"
        assert kills == 4, f"{name} was killed {kills} times"


def test_another_recipe_or_data_is_refused(parts, tmp_path):
    quiet(net(), *parts[:2], SMALL, folder=tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(FinetuneError, match="lr: 0.02 then, 0.5 now"):
        quiet(net(), *parts[:2], SMALL.replace(lr=0.5), folder=tmp_path)
    with pytest.raises(FinetuneError, match="data"):
        quiet(net(), parts[0].select(np.arange(40)), parts[1], SMALL, folder=tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    quiet(net(), *parts[:2], SMALL.replace(epochs=1), folder=tmp_path, resume=False)
    assert len(Run.load(tmp_path).history) == 1


def test_a_damaged_state_is_named(parts, tmp_path):
    quiet(net(), parts[0], recipe=SMALL.replace(epochs=1), folder=tmp_path)
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:5000])
    with pytest.raises(FinetuneError, match="resume=False"):
        quiet(net(), parts[0], recipe=SMALL.replace(epochs=1), folder=tmp_path)


def test_another_number_of_threads_is_said(parts, tmp_path):
    quiet(net(), parts[0], recipe=SMALL.replace(epochs=1), folder=tmp_path)
    n = torch.get_num_threads()
    torch.set_num_threads(n + 1)
    try:
        with pytest.warns(UserWarning, match="threads"):
            quiet(net(), parts[0], recipe=SMALL.replace(epochs=1), folder=tmp_path)
    finally:
        torch.set_num_threads(n)


def test_early_stopping_keeps_the_best_by_validation(parts):
    model = net()
    run = quiet(
        model,
        *parts[:2],
        SMALL.replace(epochs=20, patience=1, lr=0.1, schedule="constant", warmup=0),
    )
    losses = [row["valid_loss"] for row in run.history]
    assert len(losses) < 20 and len(losses) - 1 - int(np.argmin(losses)) == 1
    assert evaluate(model, parts[1]).nll == pytest.approx(min(losses), rel=1e-6)


def test_ema_is_the_average(parts, monkeypatch):
    model, seen = net(), []
    recipe = SMALL.replace(epochs=1, ema=0.8, channels_last=False)
    mean, original = net().fc.weight.detach().double(), EMA.on_step_end

    def watch(self, loop):
        original(self, loop)
        seen.append((loop.model.fc.weight.detach().clone(), loop.at["step"]))

    monkeypatch.setattr(EMA, "on_step_end", watch)
    quiet(model, parts[0], recipe=recipe)
    assert [step for _, step in seen] == list(range(len(seen)))
    for value, step in seen:
        decay = min(0.8, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * value.double()
    assert torch.allclose(model.fc.weight.double(), mean, atol=1e-6)


def test_nan_stops_and_the_last_good_state_stays(parts, tmp_path):
    with pytest.raises(FinetuneError, match=r"step \d+ .*lower lr") as caught:
        quiet(
            net(),
            parts[0],
            recipe=SMALL.replace(lr=1e25, clip_norm=0, schedule="constant", warmup=0, epochs=3),
            folder=tmp_path,
            save_every=1,
        )
    assert str(tmp_path) in str(caught.value)
    for tensor in load_state_tensors(tmp_path).values():
        assert torch.isfinite(tensor).all()  # nothing that had become NaN was written


def load_state_tensors(folder):
    import safetensors.torch

    return {
        k: v
        for k, v in safetensors.torch.load_file(folder / "state.safetensors").items()
        if v.is_floating_point() and k.startswith("model.") and "running" not in k
    }


def test_the_callers_generator_is_left_alone(parts):
    model = load_resnet("resnet20", None, 10)
    state = torch.get_rng_state()
    quiet(model, parts[0], recipe=SMALL.replace(epochs=1))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "field, value",
    [
        ("lr", float("nan")),
        ("lr", -1),
        ("epochs", 0),
        ("batch_size", 0),
        ("strategy", "nothing"),
        ("optimizer", "lion"),
        ("schedule", "step"),
        ("precision", "fp8"),
        ("ema", 1.0),
    ],
)
def test_recipes_that_cannot_work(field, value):
    with pytest.raises(FinetuneError, match=field):
        Recipe(**{field: value})


def test_data_that_cannot_be_trained_on(parts):
    one = from_arrays(np.zeros((6, 8, 8), np.uint8), np.zeros(6, int))
    many = from_arrays(np.zeros((24, 8, 8), np.uint8), np.arange(24) % 12)
    for train, words in (
        (one, "one class only"),
        (many, "num_classes=12"),
        (parts[0].select([]), "no images"),
    ):
        with pytest.raises(FinetuneError, match=words):
            quiet(net(), train, recipe=SMALL)
    with pytest.raises(FinetuneError, match="info"):
        quiet(torch.nn.Linear(2, 2), parts[0], recipe=SMALL)
    with pytest.raises(FinetuneError, match="augment"):
        quiet(net(), parts[0], recipe=SMALL.replace(augment="mixup"))


def test_bad_images_are_counted_in_the_history(tmp_path):
    from conftest import make_photos

    folder = make_photos(tmp_path / "photos", classes=2)
    (folder / "class0" / "bad.jpg").write_text("no image")
    images = load_images(folder)
    run = quiet(
        load_resnet("resnet20", None, 2), images, recipe=SMALL.replace(epochs=1, augment="none")
    )
    assert run.history[0]["set_aside"] == 1 and list(run.meta["set_aside"]) == ["class0/bad.jpg"]


def test_a_full_disk_loses_nothing(parts, tmp_path, monkeypatch):
    """Writing fails as on a full disk, in the middle; what was there stays, and the run goes on
    when there is room."""
    import safetensors.torch

    quiet(net(), *parts[:2], SMALL.replace(epochs=1), folder=tmp_path / "a")
    folder = tmp_path / "run"
    real, calls = safetensors.torch.save_file, [0]

    def full(tensors, path, metadata=None):
        calls[0] += 1
        if calls[0] == 2:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return real(tensors, path, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(FinetuneError, match="make room"):
        quiet(net(), *parts[:2], SMALL, folder=folder)
    monkeypatch.setattr(safetensors.torch, "save_file", real)
    assert sorted(p.name for p in folder.iterdir()) == ["state.safetensors"]
    resumed, whole = net(), net()
    quiet(resumed, *parts[:2], SMALL, folder=folder)
    quiet(whole, *parts[:2], SMALL)
    assert digest(resumed) == digest(whole)


def test_strategies_are_registered_by_name(parts):
    @strategy("stem")
    def stem(model, recipe, epoch, notes):
        return {group: float(group in ("stem", "head")) for group in layer_groups(model)}

    try:
        model = net()
        before = model.layer2[0].conv1.weight.clone()
        quiet(model, parts[0], recipe=SMALL.replace(strategy="stem", epochs=1))
        assert torch.equal(before, model.layer2[0].conv1.weight)
    finally:
        del STRATEGIES["stem"]


def test_bf16_and_compile_options_run(parts):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = quiet(net(), parts[0], recipe=SMALL.replace(epochs=1, precision="bf16"))
    assert np.isfinite(run.history[0]["train_loss"])


def test_without_a_folder_no_picture_is_read_for_its_hash(parts, monkeypatch):
    def read(self):
        raise AssertionError("the contents are hashed, and nothing keeps the hash")

    monkeypatch.setattr(type(parts[0]), "fingerprint", read)
    assert quiet(net(), *parts[:2], SMALL.replace(epochs=1)).meta["data"] is None
