"""Many runs, each once left alone and once killed with SIGKILL and resumed: killed_strategies.py
FOLDER {NAME: RECIPE, …}.  Prints {NAME: [digest of the whole, digest of the killed, kills]}. The
runs are forks of this process, so that torch is imported once."""

import hashlib
import json
import os
import signal
import sys
import time

import torch

torch.set_num_threads(1)  # before anything else: a fork inherits no threads
from finetune_nb.data import load_images  # noqa: E402
from finetune_nb.models.edits import replace_activation  # noqa: E402
from finetune_nb.models import load_model, load_resnet  # noqa: E402
from finetune_nb.training import Loop, Recipe, fit  # noqa: E402

TRAIN, VALID, _ = load_images("digits", limit=160).three_way()
KILLS = (3, 7, 9, 19)  # steps after which: 7 end an epoch


def train(folder, recipe, steps=None):
    """In the child: one run from wherever the folder stands; after each step its number goes
    through the pipe, and time to be killed in."""
    activation = recipe.pop("activation", None)
    if steps:
        step = Loop.step
        Loop.step = lambda self, *args: (
            step(self, *args),
            os.write(steps, bytes([self.at["step"]])),
            time.sleep(0.02),
        )
    torch.manual_seed(0)
    model = load_resnet("resnet20", "shipped", 10)
    if activation:
        model = replace_activation(model, activation)
    fit(model, TRAIN, VALID, Recipe(**recipe), folder, save_every=2, workers=1, progress=False)


def child(folder, recipe, kill_after=None):
    """Fork a run; kill it after a step. True where it was killed."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            train(folder, dict(recipe), write if kill_after else None)
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    while kill_after and (got := os.read(read, 1)):
        if got[0] >= kill_after:
            os.kill(pid, signal.SIGKILL)
            break
    os.close(read)
    _, status = os.waitpid(pid, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if not killed and status:
        sys.exit(f"the run in {folder} failed")
    return killed


def digest(folder):
    return hashlib.sha256(
        b"".join(v.contiguous().numpy().tobytes() for v in load_model(folder).state_dict().values())
    ).hexdigest()


if __name__ == "__main__":
    base, plans, found = sys.argv[1], json.loads(sys.argv[2]), {}
    for name, recipe in plans.items():
        whole, broken = f"{base}/{name}-whole", f"{base}/{name}-killed"
        child(whole, recipe)
        kills = sum(child(broken, recipe, after) for after in KILLS)
        child(broken, recipe)
        found[name] = digest(whole), digest(broken), kills
    print(json.dumps(found))
