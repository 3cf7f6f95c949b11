"""Ranks: told by the environment, joined by torchrun, refused where they cannot work together."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from finetune_nb.distributed import average, gather_rows, is_writer, join, leave, rank, world
from finetune_nb.environment import FinetuneError
from finetune_nb.resumable import Parts

NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    """Set the names that torchrun sets; the others are absent."""

    def put(**values):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    put()
    return put


def test_one_process_needs_nothing(environment):
    values = torch.tensor([1.0, 2.0])
    average([values], weight=3)
    assert (rank(), world(), join(), is_writer()) == (0, 1, 1, True)
    assert values.tolist() == [1, 2] and gather_rows(np.arange(3)).tolist() == [0, 1, 2]
    leave()


@pytest.mark.parametrize(
    "values, says",
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "MASTER_PORT"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "0 … 1"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "0 … 1"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "whole number"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "1 or more"),
        ({"RANK": "1"}, "WORLD_SIZE is not"),
        ({"WORLD_SIZE": "4"}, "RANK is not"),
    ],
)
def test_ranks_that_cannot_work_together_are_refused(environment, values, says):
    environment(**values)
    with pytest.raises(FinetuneError, match=says) as caught:
        rank()
        join()
    assert "torchrun" in str(caught.value)


PROGRAM = """
import numpy as np, torch
from finetune_nb.distributed import (
    average, gather_rows, is_writer, join, leave, rank, wait_for_all, world
)
assert join() == 2 and world() == 2
values = [torch.full((2, 2), float(rank())), torch.tensor([10.0 * rank()])]
average(values, weight=1 + 2 * rank())
assert torch.allclose(values[0], torch.full((2, 2), 0.75)) and values[1].item() == 7.5
rows = np.arange(rank() + 1, dtype=np.float16)[:, None] + [0, 10]
assert gather_rows(rows.astype(np.float16)).tolist() == [[0, 10], [0, 10], [1, 11]]
assert gather_rows(np.zeros((2 * rank(), 3), np.int64)).shape == (2, 3)
wait_for_all()
if is_writer():
    print("writer", rank())
leave()
"""


def test_two_processes_average_and_gather(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [*launch, str(tmp_path / "program.py")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["writer", "0"]


def test_parts_take_their_rank_from_the_environment(environment, tmp_path):
    environment(RANK="1", WORLD_SIZE="3")
    parts = Parts(tmp_path, 100, {"what": "x"}, size=10)
    assert parts.todo() == [1, 4, 7] and "0 done" in repr(parts)
    parts.save(4, x=np.arange(10))
    assert parts.todo() == [1, 7] and "1 done" in repr(parts)


TRAINING = """
import sys
import torch
from finetune_nb.data import load_images
from finetune_nb.distributed import rank
from finetune_nb.models import load_resnet
from finetune_nb.training import Recipe, fit
torch.set_num_threads(1)
train, valid, test = load_images("digits", limit=160).three_way()
torch.manual_seed(0)
model = load_resnet("resnet20", "shipped", 10)
# The head learns and every norm keeps its statistics, so that halves of a batch say what it says.
recipe = Recipe(strategy="head", epochs=2, batch_size=16, augment="affine", loss=sys.argv[2])
run = fit(model, train, valid, recipe, sys.argv[1], progress=False)
last = run.history[-1]
with open(f"{sys.argv[1]}-{rank()}.txt", "w") as file:
    file.write(f"{last['train_loss']:.4f} {last['valid_loss']:.4f}")
"""


@pytest.mark.parametrize("loss", ["cross-entropy", "weighted"])
def test_two_ranks_train_what_one_process_trains(tmp_path, loss):
    """The ranks share each batch: same weights as one process, one writer, one history."""
    from finetune_nb.models import load_model

    (tmp_path / "program.py").write_text(TRAINING)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    said = []
    for name, launch in (("one", []), ("two", torchrun)):
        command = [*launch, str(tmp_path / "program.py"), str(tmp_path / name), loss]
        environment = {k: v for k, v in os.environ.items() if k not in NAMES}
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        said += [path.read_text() for path in sorted(tmp_path.glob(f"{name}-*.txt"))]
    assert len(said) == 3 and len(set(said)) == 1, f"one process and two ranks: {said}"
    one, two = (load_model(tmp_path / name).state_dict() for name in ("one", "two"))
    for name, value in one.items():
        assert torch.allclose(value.float(), two[name].float(), atol=2e-5), name


def test_a_rank_that_cannot_join_trains_nothing(environment, tmp_path):
    from test_training import SMALL, net, quiet

    from finetune_nb.data import load_images

    train, valid, _ = load_images("digits", limit=60).three_way()
    environment(RANK="1", WORLD_SIZE="2")
    with pytest.raises(FinetuneError, match="MASTER_ADDR.*torchrun"):
        quiet(net(), train, valid, SMALL, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()
