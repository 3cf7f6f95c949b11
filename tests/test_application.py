"""The article's listings, the whole road, the command line, what it leaves behind."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, make_photos
from sklearn.base import clone
from torch import nn

import finetune_nb
from finetune_nb.application import (
    FineTuner,
    FineTuneResNet,
    ResNet,
    default_recipe,
    fine_tune,
    predict,
)
from finetune_nb.data import load_images
from finetune_nb.environment import FinetuneError, shipped_file
from finetune_nb.evaluation import Evaluation, evaluate
from finetune_nb.models import adopt, load_model, load_resnet, to_input
from finetune_nb import showcase
from finetune_nb.showcase import demo, pretrain
from finetune_nb.training import Recipe, Run


@pytest.fixture(scope="module")
def arrays():
    images = load_images("digits", limit=400)
    train, _, test = images.three_way()
    read = lambda part: np.stack([np.asarray(part[i][0])[..., 0] for i in range(len(part))])  # noqa: E731
    return read(train), train.labels, read(test), test.labels


def test_article_listing_one(arrays):
    train_data, train_labels, test_data, test_labels = arrays
    train_images = train_data.astype("float") / 255
    model = ResNet(
        pretrained="data/pretrained_resnet_model.pth"
        if os.getcwd() == str(ROOT)
        else shipped_file("pretrained_resnet_model.pth"),
        num_classes=10,
    )
    torch.manual_seed(0)
    model.fit(train_images, train_labels, epochs=4, batch_size=32, progress=False)
    assert (model.predict(test_data / 255.0) == test_labels).mean() > 0.7


def test_article_listings_two_and_three(arrays):
    train_data, train_labels, test_data, test_labels = arrays

    class ResNet微调模型(nn.Module):
        def __init__(self, num_classes=10):
            super(ResNet微调模型, self).__init__()
            self.resnet = ResNet(pretrained=shipped_file("pretrained_resnet_model.pth"))
            self.resnet.fc = nn.Linear(self.resnet.fc.in_features, num_classes)

        def forward(self, x):
            return self.resnet(x)

    torch.manual_seed(0)
    model = ResNet微调模型()
    assert (
        model.resnet.fc.out_features == 10
        and len([n for n, _ in model.named_parameters() if n.endswith("fc.weight")]) == 1
    )
    model.resnet.fit(train_data, train_labels, epochs=4, batch_size=32, progress=False)
    model.eval()
    test = load_images("digits", limit=400).three_way()[2]
    correct = total = 0
    with torch.no_grad():
        for batch in test.loader(batch_size=16, size=32):
            outputs = model(to_input(batch.pixels, model.resnet))
            _, predicted = torch.max(outputs.data, 1)
            total += batch.labels.size(0)
            correct += (predicted == batch.labels).sum().item()
    assert correct / total > 0.7
    assert correct == (model.resnet.predict(test) == test.labels).sum()


def test_article_names():
    assert finetune_nb.ResNet微调模型 is FineTuneResNet
    model = FineTuneResNet(num_classes=4)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 4)
    with pytest.raises(FinetuneError, match="64 inputs"):
        model.resnet.fc = nn.Linear(3, 4)


def test_pixels_as_labels_are_refused(arrays):
    model = ResNet(num_classes=10)
    with pytest.raises(FinetuneError, match="one label for each"):
        model.fit(arrays[0] / 255, (arrays[0] / 255).reshape(-1, 1))
    with pytest.raises(FinetuneError, match="0…1"):
        model.fit(arrays[0].astype(float), arrays[1])


def test_scikit_learn_estimator(arrays):
    tuner = FineTuner("resnet20", weights="shipped", epochs=2, batch_size=32, seed=3)
    assert clone(tuner).get_params() == tuner.get_params()
    names = np.array(list("abcdefghij"))
    tuner.fit(arrays[0], names[arrays[1]])
    found = tuner.predict(arrays[2])
    assert (
        set(found) <= set(names)
        and tuner.score(arrays[2], names[arrays[3]]) == (found == names[arrays[3]]).mean()
    )
    again = clone(tuner).fit(arrays[0], names[arrays[1]])
    assert (again.predict(arrays[2]) == found).all()


class Tuned(FineTuner):
    """What a user writes: parameters of its own, handed on by name."""

    def __init__(self, strategy="head", extra=1, seed=0):
        super().__init__(arch="resnet20", weights="shipped", strategy=strategy, epochs=1, seed=seed)
        self.extra = extra


def test_estimator_can_be_subclassed(arrays):
    mine = Tuned(extra=7)
    assert (mine.strategy, mine.epochs, mine.extra) == ("head", 1, 7)
    assert mine.get_params() == {"strategy": "head", "extra": 7, "seed": 0}
    again = clone(mine.set_params(seed=3))
    assert type(again) is Tuned and again.get_params() == mine.get_params() and again.seed == 3
    again.fit(arrays[0][:40], arrays[1][:40])
    assert again.run_.recipe.strategy == "head" and again.run_.recipe.seed == 3


def test_every_parameter_of_the_estimator_is_kept_as_given():
    names = FineTuner().get_params()
    given = {name: object() for name in names}
    assert FineTuner(**given).get_params() == given


def test_estimator_predicts_at_the_size_it_learned(arrays):
    tuner = FineTuner("resnet20", weights="shipped", epochs=1, size=16).fit(
        arrays[0][:40], arrays[1][:40]
    )
    assert tuner.model_.info["size"] == 16


def test_the_last_layer_is_fc_whatever_its_name():
    model = ResNet()
    model.net = adopt(torchvision.models.mobilenet_v3_small(num_classes=3))
    assert model.fc is model.net.classifier[3]
    model.fc = nn.Linear(model.fc.in_features, 5)
    assert model.info["num_classes"] == 5
    assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 5)


def fine_tuned(folder, out, weights="shipped", epochs=1):
    recipe = Recipe(epochs=epochs, batch_size=8)
    return fine_tune(folder, out, "resnet20", weights, recipe, progress=False)


def test_the_whole_road_leaves_what_it_promises(tmp_path):
    folder = make_photos(tmp_path / "photos", split=True)
    found = fine_tuned(folder, tmp_path / "run", epochs=2)
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {
        "state.safetensors",
        "model.safetensors",
        "run.json",
        "evaluation.npz",
        "split.csv",
        "ledger.json",
        "report.html",
        "card.md",
    }
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("data:image/png;base64") >= 3 and not re.search(
        r'(src|href)="(?!data:)', page
    )
    for part in (
        "Data sample",
        "Learning curves",
        "Confusion matrix",
        "Most confident mistakes",
        "Recipe",
        "Versions",
    ):
        assert part in page
    assert str(tmp_path) not in page
    again = evaluate(load_model(tmp_path / "run"), load_images(folder).three_way()[2])
    assert np.allclose(
        again.logits, Evaluation.load(tmp_path / "run" / "evaluation.npz").logits, atol=1e-4
    )
    assert found["before"] is None and found["evaluation"].accuracy == again.accuracy
    card = (tmp_path / "run" / "card.md").read_text()
    assert "SHA-256" in card and f"{again.accuracy:.4f}" in card
    stored = (tmp_path / "run" / "split.csv").read_text().splitlines()
    assert len(stored) == 43 and stored[0] == "key,split"


def test_a_checkpoint_that_fits_is_measured_first(tmp_path):
    folder = make_photos(tmp_path / "photos")
    first = fine_tuned(folder, tmp_path / "a", epochs=2)
    second = fine_tuned(folder, tmp_path / "b", tmp_path / "a" / "model.safetensors", epochs=1)
    assert (
        second["before"].accuracy == first["evaluation"].accuracy
        and [r["stage"] for r in second["ledger"].rows][0] == "as it comes"
    )


def test_predict_keeps_the_order_and_marks_the_unreadable(tmp_path):
    folder = make_photos(tmp_path / "p", classes=2, each=5)
    (folder / "class0" / "003.png").write_bytes(b"broken")
    model = ResNet(num_classes=2).net
    images = load_images(folder)
    guess, sure = predict(model, images)
    bad = list(images.column("key")).index("class0/003.png")
    assert guess[bad] == -1 and sure[bad] == 0 and (np.delete(guess, bad) >= 0).all()


def test_default_recipes():
    small, large = load_resnet("resnet20", None), load_resnet("resnet18", None)
    assert default_recipe(small, 50_000).epochs <= 3
    assert "flip" not in default_recipe(small, 100, True).augment
    assert "flip" not in default_recipe(large, 100, True).augment
    assert default_recipe(large, 200).augment == "resized-crop-flip"
    large.info["size"] = 32  # what decides is the size it was made for, not its name
    assert default_recipe(large, 200) == default_recipe(small, 200)


def test_pretrain_small_is_reproducible(tmp_path):
    recipe = Recipe(epochs=1, batch_size=64, lr=0.05, augment="affine")
    a = pretrain(tmp_path / "a", limit=600, recipe=recipe, progress=False)
    b = pretrain(tmp_path / "b", limit=600, recipe=recipe, progress=False)
    from finetune_nb.environment import sha256_file

    assert sha256_file(a) == sha256_file(b) and sha256_file(a) in a.with_suffix(".md").read_text()


@pytest.mark.skipif(
    "FINETUNE_NB_PROFILE" not in os.environ,
    reason="takes two minutes; set FINETUNE_NB_PROFILE=lesson (make demo runs it as well)",
)
def test_demo_in_full(tmp_path):
    assert demo(tmp_path, progress=False).is_file()


def test_demo_short(tmp_path, monkeypatch):
    """The demo as it is, for one epoch: a table, comparisons without an order inside the noise, a
    report with photographs, a model and a card."""
    monkeypatch.setattr(showcase, "PLAN", [("5 labels a class", 5, 1, 25)])
    said = []
    report = demo(tmp_path, progress=False, echo=said.append)
    assert "held-out photographs of 20 classes" in said[0] and "one seed" in said[3]
    assert said[1].split() == ["labels", "images", "steps", "from", "scratch", "head", "everything"]
    figures = re.findall(r"(0\.\d{3}) \[(0\.\d{3}), (0\.\d{3})\]", said[2])
    assert len(figures) == 3 and " 100 " in said[2] and " 4 " in said[2]
    assert float(figures[1][0]) > float(figures[0][2])  # the head on ImageNet's features
    for line in said[4:]:
        low, high = map(float, re.search(r"\[([+-].*), ([+-].*)\]", line).groups())
        assert ("no difference shown" in line) == (low <= 0 <= high)
    assert len(said) == 7
    left = {path.name for path in tmp_path.iterdir()}
    assert {"report.html", "model.safetensors", "card.md"} <= left
    page = report.read_text()
    assert "Compared on the same test pictures" in page and page.count("data:image/png") >= 3


def cli(*arguments, cwd=None):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    code = "from finetune_nb.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=cwd,
    )


def test_command_line_goes_the_whole_road(tmp_path):
    folder = make_photos(tmp_path / "photos")
    (folder / "class0" / "bad.jpg").write_text("no image")
    small = ("--arch", "resnet20", "--weights", "shipped")
    run = (*small, "--epochs", 2, "--batch-size", 8, "-o", tmp_path / "run")
    done = cli("train", "--data", folder, *run)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.strip().splitlines()[-1] == f"report: {tmp_path / 'run' / 'report.html'}"
        and "set aside" in done.stdout
    )
    done = cli("evaluate", "--model", tmp_path / "run", "--data", folder)
    assert done.returncode == 0 and "accuracy" in done.stdout and "n=42" in done.stdout
    done = cli("predict", "--model", tmp_path / "run", "--data", folder)
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert (
        len(rows) == 43
        and {r[1] for r in rows} <= {"class0", "class1", "class2", "unreadable"}
        and [r for r in rows if r[1] == "unreadable"][0][0] == "class0/bad.jpg"
    )
    for _ in range(2):  # the second time nothing is decoded again
        done = cli("audit", "--data", folder, "-o", tmp_path / "audit", *small, "--size", 32)
        assert done.returncode == 0 and "near_duplicate" in done.stdout, done.stderr
    assert (tmp_path / "audit/audit.parquet").is_file()
    done = cli("features", "--data", folder, *small, "-o", tmp_path / "features", "--size", 32)
    assert "336 columns" in done.stdout, done.stderr
    done = cli(
        "pack", "--data", folder, "-o", tmp_path / "packed", "--size", 32, "--encoding", "raw"
    )
    assert (
        done.returncode == 0
        and "42 rows" in done.stdout
        and "bad.jpg" in (tmp_path / "packed" / "set_aside.csv").read_text()
    )
    (tmp_path / "run" / "report.html").unlink()
    done = cli("report", "-o", tmp_path / "run", "--data", folder)
    assert done.returncode == 0 and (tmp_path / "run" / "report.html").is_file()
    assert Run.load(tmp_path / "run").recipe.epochs == 2


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("train", "--data", "nowhere"), "does not exist"),
        (("train", "--data", "digits", "--strategy", "magic"), "choose from full, head"),
        (("train", "--data", "digits", "--lr", "nan"), "lr"),
        (("train", "--data", "digits", "--weights", "none.pth"), "none.pth"),
        (("evaluate", "--model", "x", "--data", "digits"), "does not exist"),
        (("train", "--data", "digits", "--device", "cuda:77"), "cuda:77"),
        (("predict", "--model", "x", "--data", "digits"), "does not exist"),
    ],
)
def test_command_line_mistakes_are_one_message(arguments, words, tmp_path):
    done = cli(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.startswith("finetune-nb: ")


def test_help_is_in_words():
    """Each verb and each option says what it is for; none shows how typer keeps it."""
    import typer

    from finetune_nb.cli import app

    verbs = typer.main.get_command(app).commands
    assert {"demo", "doctor", "train", "evaluate", "predict", "audit", "pack"} <= set(verbs)
    for name, verb in verbs.items():
        assert verb.help and not name.startswith("_")
        for option in verb.params:
            if option.name != "help":
                assert option.help and "OptionInfo" not in str(option.default), (name, option.name)


def test_command_line_other_classes(tmp_path):
    folder = make_photos(tmp_path / "photos", classes=2)
    recipe = Recipe(epochs=1, batch_size=8)
    fine_tune(folder, tmp_path / "run", "resnet20", "shipped", recipe, progress=False)
    done = cli("evaluate", "--model", tmp_path / "run", "--data", "digits")
    assert done.returncode == 2 and "must be the same" in done.stderr


def test_doctor():
    done = cli("doctor")
    assert done.returncode == 0, done.stdout
    assert "torch" in done.stdout and "shipped checkpoint" in done.stdout


def test_import_is_light():
    """What `import finetune_nb` brings in beyond torch: nothing of ours but itself."""
    code = (
        "import sys, torch; before = set(sys.modules); import finetune_nb; "
        "print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert json.loads(done.stdout.replace("'", '"')) == ["finetune_nb"]


def test_star_import():
    names = {}
    exec("from finetune_nb import *", names)
    assert {
        "load_images",
        "load_resnet",
        "fit",
        "evaluate",
        "FineTuner",
        "ResNet",
        "Recipe",
        "Images",
        "Ledger",
    } <= set(names)
    with pytest.raises(AttributeError, match="it has"):
        finetune_nb.nothing
