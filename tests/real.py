"""Run a lesson in the `real` profile: real.py LESSON NAME. Its ledger goes to data/results/."""

import os
import sys
import tempfile

import papermill
from conftest import NBS, PROFILES

lesson, name = sys.argv[1:]
chosen = {
    key: os.path.expandvars(value) if isinstance(value, str) else value
    for key, value in PROFILES[lesson]["real"][name].items()
}
if any("${" in str(value) for value in chosen.values()):
    sys.exit("set FINETUNE_NB_DATA to the folder of real data sets")
with tempfile.TemporaryDirectory() as folder:
    papermill.execute_notebook(
        NBS / f"{lesson}.ipynb",
        f"{folder}/out.ipynb",
        parameters=chosen,
        cwd=NBS,
        kernel_name="python3",
        progress_bar=False,
        log_output=False,
    )
