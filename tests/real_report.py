"""What the programs behind the stored ledgers share: a line that they print is a row they keep."""

import torch
from conftest import NBS, ROOT

from finetune_nb.environment import notebook_hash
from finetune_nb.evaluation import Ledger


class Report:
    "The ledgers of one lesson, one a work, in data/results/."

    def __init__(self, lesson):
        self.lesson = lesson
        self.source = notebook_hash(NBS / f"{lesson}.ipynb")  # as it is when the work begins
        self.ledger = Ledger()

    def say(self, stage, text, **figures):
        print(text, flush=True)
        self.ledger.add(stage, text=text, **figures)

    def run(self, works, names):  # works: name → function that returns the ledger's context
        for name in names:
            self.ledger = Ledger()
            context = works[name]()
            place = self.ledger.save(
                ROOT / "data/results" / self.lesson / f"{name}-cpu.json",
                lesson=self.lesson,
                source=self.source,
                device="cpu",
                threads=torch.get_num_threads(),
                **context,
            )
            print("written", place.relative_to(ROOT))
