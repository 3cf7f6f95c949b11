"""A training run in a process of its own, to be killed.

killed_run.py FOLDER RECIPE_JSON [SLEEP]
"""

import json
import sys
import time

import torch

torch.set_num_threads(1)
from finetune_nb.data import load_images  # noqa: E402
from finetune_nb.models import load_resnet  # noqa: E402
from finetune_nb.training import Loop, Recipe, fit  # noqa: E402

folder, recipe = sys.argv[1], Recipe(**json.loads(sys.argv[2]))
if len(sys.argv) > 3:  # time to be killed in
    step = Loop.step
    Loop.step = lambda self, *args: (
        step(self, *args),
        print(self.at["step"], flush=True),
        time.sleep(float(sys.argv[3])),
    )
images = load_images("digits", limit=240)
train, valid, _ = images.three_way()
torch.manual_seed(0)
model = load_resnet("resnet20", "shipped", 10)
fit(model, train, valid, recipe, folder, save_every=2, workers=1, progress=False)
