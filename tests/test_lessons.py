"""Every lesson runs whole, in the smoke profile, on every kind of source."""

import os
import warnings

import papermill
import pytest
from conftest import NBS, PROFILES, needs_real_data, real_data
from lessons import LESSONS, NAMES, PAGES, parameters

REAL = ("cifar10", "hymenoptera", "caltech101")
SOURCES = ("digits", "glyphs", "photos", *REAL)


def run(path, out, cell_seconds=300, **parameters):
    """A notebook by papermill. Once in some hundred runs, with both cores busy, Jupyter loses the
    reply of a finished cell (seen where a widget is shown) and would wait for ever: a cell that has
    not answered in time is reported, and the notebook is run once more from its beginning."""
    again = dict(
        parameters=parameters,
        cwd=NBS,
        kernel_name="python3",
        progress_bar=False,
        execution_timeout=cell_seconds,
    )
    try:
        papermill.execute_notebook(path, out, **again)
    except TimeoutError as error:
        warnings.warn(
            f"{path.name}: no answer within {cell_seconds} seconds, run again: {str(error)[:200]}"
        )
        papermill.execute_notebook(path, out, **again)


def cases():
    for path in [NAMES["index"], *LESSONS]:
        if "data" not in parameters(path):
            yield pytest.param(path.stem, None, id=path.stem)
            continue
        for data in SOURCES:
            marks = [needs_real_data] if data in REAL else []
            yield pytest.param(path.stem, data, id=f"{path.stem}-{data}", marks=marks)


def profile(lesson, data):
    """The parameters of a smoke run."""
    plan = PROFILES[lesson]
    return plan["smoke"] | plan.get("data", {}).get(data, {})


@pytest.mark.parametrize("lesson, data", cases())
def test_runs(lesson, data, photos, tmp_path):
    chosen = dict(profile(lesson, data))
    if data is not None:
        chosen["data"] = str(photos) if data == "photos" else data
    if data in REAL:
        assert real_data().is_dir()
    run(NAMES[lesson], tmp_path / "out.ipynb", **chosen)


def test_no_lesson_writes_into_the_checkout():
    assert not list(NBS.glob("runs")) and not [
        p for p in NBS.iterdir() if p.suffix in (".npz", ".safetensors", ".arrow")
    ]


@pytest.mark.parametrize("lesson", PROFILES)
def test_profiles_name_what_lessons_have(lesson):
    """papermill only logs an unknown parameter; here it is an error."""
    known = set(parameters(NAMES[lesson]))
    plan = PROFILES[lesson]
    used = (
        set(plan["smoke"])
        | {k for o in plan.get("data", {}).values() for k in o}
        | {k for o in plan.get("real", {}).values() for k in o}
    )
    assert used <= known, f"{lesson} has no parameter {used - known}"


def test_every_lesson_has_a_profile():
    assert {path.stem for path in LESSONS} | {"index"} == set(PROFILES)


@pytest.mark.parametrize(
    "path", [p for p in PAGES if p not in LESSONS and p.stem != "index"], ids=lambda p: p.stem
)
def test_reference_pages_run(path, tmp_path):
    run(path, tmp_path / "out.ipynb")


@pytest.mark.skipif(
    os.environ.get("FINETUNE_NB_PROFILE") != "lesson",
    reason="set FINETUNE_NB_PROFILE=lesson to run the lessons at full length, with other seeds",
)
@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_runs_in_full(path, tmp_path):
    run(path, tmp_path / "out.ipynb", 1800, **({"seed": 1} if "seed" in parameters(path) else {}))
