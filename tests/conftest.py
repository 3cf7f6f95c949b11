import os
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ["MPLBACKEND"] = "Agg"
PROFILES = yaml.safe_load((ROOT / "tests" / "profiles.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="session", autouse=True)
def shared_cache(tmp_path_factory):
    """Indexes and glyphs of all workers lie in one folder of this test run, never in the user's
    cache."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    os.environ["FINETUNE_NB_CACHE"] = str(base / "finetune_nb_cache")


def make_photos(folder, classes=3, each=14, seed=0, split=False):
    """A folder of photographs of different sizes and kinds: each class has its own colour and
    stripes."""
    rng = np.random.default_rng(seed)
    for c in range(classes):
        for i in range(each):
            width, height = int(rng.integers(40, 120)), int(rng.integers(40, 120))
            x = np.arange(width)[None, :, None] + np.zeros((height, 1, 1))
            stripes = 127 + 100 * np.sin(x / (2 + 3 * c)) * np.roll([1, 0.3, 0.1], c)
            pixels = np.clip(stripes + rng.normal(0, 25, (height, width, 3)), 0, 255).astype(
                np.uint8
            )
            part = ("train", "train", "train", "test")[i % 4] + "/" if split else ""
            path = Path(folder) / f"{part}class{c}" / f"{i:03d}.{('jpg', 'png')[i % 2]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return Path(folder)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))


def real_data():
    folder = os.environ.get("FINETUNE_NB_DATA")
    return Path(folder) if folder and Path(folder).is_dir() else None


needs_real_data = pytest.mark.skipif(
    real_data() is None, reason="FINETUNE_NB_DATA does not point to a folder of real data sets"
)
sys.path.insert(0, str(ROOT / "tests"))
