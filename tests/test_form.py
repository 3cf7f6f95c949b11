"""What a lesson, its stored outputs and the export must be like."""

import ast
import configparser
import json
import re
import shutil
import subprocess
import sys

import docs
import nbformat
import pytest
from conftest import ROOT
from lessons import LESSONS, NAMES, PAGES, cells, parameters, solutions, source

from test_house import MODULES, name_of

sys.path.insert(0, str(ROOT))
from finetune_nb.environment import notebook_hash  # noqa: E402

config = configparser.ConfigParser(delimiters=["="])
config.read(ROOT / "settings.ini", encoding="utf-8")
DEBTS = {  # lessons that are still too long; none is added
    "14_application",
}
SETTINGS = config["DEFAULT"]
HEX = re.compile(r"0x[0-9a-f]{6,}")


EXPORT = """
import sys
from nbdev.doclinks import nbdev_export
sys.argv = ["nbdev_export"]
nbdev_export()
"""


def test_package_is_what_the_notebooks_say(tmp_path):
    """Exported into an empty folder, so that a module whose notebook is gone is found too."""
    copy = docs.copied(tmp_path)
    shutil.rmtree(copy / "finetune_nb")
    (copy / "finetune_nb").mkdir()
    done = docs.python(EXPORT, copy)
    assert done.returncode == 0, done.stderr
    exported, committed = (
        {str(p.relative_to(base)): p.read_text() for p in base.rglob("*.py")}
        for base in (copy / "finetune_nb", ROOT / "finetune_nb")
    )
    assert exported.keys() == committed.keys()
    differs = [name for name in exported if exported[name] != committed[name]]
    assert not differs, f"run nbdev_export: {', '.join(differs)} are not what the notebooks export"


def python_of(cell):
    """A cell without IPython's magics."""
    return re.sub(r"^\s*[%!].*$", "", source(cell), flags=re.M)


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_lesson_form(path):
    if path.stem in DEBTS:
        pytest.xfail("a known debt: too long since it is written one statement a line")
    code, prose = cells(path, "code"), cells(path, "markdown")
    words = sum(len(re.sub(r"```.*?```|\|.*\|", " ", source(c), flags=re.S).split()) for c in prose)
    lines = sum(
        len([line for line in source(c).splitlines() if line.strip() and not line.startswith("#|")])
        for c in code
    )  # nbdev's directives are no code
    assert len(code) + len(prose) <= 80 and 600 <= words <= 2500 and lines <= 350, (
        len(code) + len(prose),
        words,
        lines,
    )
    assert max(len(source(c).splitlines()) for c in code) <= 40, [
        source(c)[:60] for c in code if len(source(c).splitlines()) > 40
    ]
    values = parameters(path)
    assert 0 < len(values) <= 10
    text = "\n".join(map(source, prose))
    assert text.startswith("# ")
    for part in (
        "## The question",
        "## What goes wrong",
        "## Exercises",
        "## Take-away",
        "**Sources.**",
        "Predict first",
        "You will be able to",
    ):
        assert part in text, f"{path.name} lacks {part!r}"
    assert "## The experiment" in text
    assert "interact(" in "\n".join(map(source, code))
    assert len(solutions(path)) == 3
    tagged = [c for c in code if "parameters" in c["metadata"].get("tags", [])]
    for node in ast.parse(source(tagged[0])).body:
        assert isinstance(node, ast.Assign)
        ast.literal_eval(node.value)


def draws(code):
    """Whether a cell makes a figure when it runs, as against in a function that it only defines."""
    calls = {
        node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        for statement in ast.parse(code).body
        if not isinstance(statement, (ast.FunctionDef, ast.ClassDef))
        for node in ast.walk(statement)
        if isinstance(node, ast.Call)
    }
    return any(
        name in ("subplots", "show", "plot") or name.startswith(("plot_", "show_"))
        for name in calls
    )


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_every_figure_is_stored(path):
    """A cell that draws shows what it drew: a backend switched on the way would hide it."""
    for cell in cells(path, "code"):
        code = python_of(cell)
        if draws(code):
            assert any("image/png" in output.get("data", {}) for output in cell["outputs"]), (
                f"{path.name}: no picture under {code[:60]!r}"
            )


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_stored_outputs(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    nbformat.validate(nbformat.from_dict(notebook))
    assert path.stat().st_size < 1_000_000, f"{path.name} is larger than 1 MB"
    ran = notebook["metadata"].get("finetune_nb", {}).get("ran")
    assert ran == notebook_hash(path), (
        f"{path.name}: its code is newer than its outputs; run make notebooks"
    )
    for cell in cells(path, "code"):
        for output in cell["outputs"]:
            text = json.dumps(output, ensure_ascii=False)
            assert len(text) < 200_000, f"{path.name}: an output of {len(text):,} bytes"
            assert output["output_type"] != "error"
            assert "widget-view" not in text
            shown = "".join(output.get("text", "")) + "".join(
                output.get("data", {}).get("text/plain", "")
            )
            assert not re.search(r"(?<![\w.…])/(home|tmp|root|work|Users|var)/", shown), (
                f"{path.name} stores a machine's path: {shown[:200]}"
            )
            assert not HEX.search(shown), f"{path.name} stores an address: {shown[:200]}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_public_names_are_documented(path):
    missing = [
        n.name
        for n in ast.parse(path.read_text()).body
        if isinstance(n, (ast.FunctionDef, ast.ClassDef))
        and not n.name.startswith("_")
        and not ast.get_docstring(n)
    ]
    assert not missing, f"{name_of(path)}: {', '.join(missing)} lack a docstring"


def test_ledgers_name_their_source():
    """A stored figure must come from a version of its lesson that is, or was, committed."""
    found = sorted((ROOT / "data" / "results").glob("*/*.json"))
    shallow = subprocess.run(
        ["git", "rev-parse", "--is-shallow-repository"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    if shallow != "false":
        pytest.skip(
            "this is no full clone: without its history the ledgers' sources cannot be looked up"
        )
    assert found
    for path in found:
        ledger = json.loads(path.read_text())
        lesson = NAMES[path.parent.name]
        history = {notebook_hash(lesson)}
        commits = subprocess.run(
            ["git", "log", "--format=%H", "--", f"nbs/{lesson.name}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        ).stdout.split()
        for commit in commits:
            shown = subprocess.run(
                ["git", "show", f"{commit}:nbs/{lesson.name}"],
                cwd=ROOT,
                capture_output=True,
                text=True,
            )
            if shown.returncode == 0:
                history.add(notebook_hash(json.loads(shown.stdout)))
        assert ledger["source"] in history, (
            f"{path.name} was written by a source that is not in the history: run it again"
        )
        for row in ledger["rows"]:
            assert "accuracy" in row or "values" in row or "text" in row, (
                f"{path.name}: a row that says nothing: {row}"
            )
            if "accuracy" in row:
                value, low, high = row["accuracy"]
                assert 0 <= low <= value <= high <= 1 and row["n"] > 0
            assert all(0 <= value <= 1 for value in row.get("values", ()))


def test_nothing_names_this_machine():
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split("\n")
    for name in filter(None, listed):
        path = ROOT / name
        if (
            path.suffix
            in {".ipynb", ".py", ".md", ".ini", ".toml", ".yml", ".yaml", ".txt", ".json"}
            and path.is_file()
            and path.name != "test_form.py"
        ):
            text = path.read_text(encoding="utf-8")
            bad = re.search(
                r"pythonhosted|//pypi\.|registry\.npmjs|(?<![\w.])/(work|farm|root)/[a-z.]", text
            )
            assert not bad, f"{name}: {bad[0]}"


def test_versions_are_pinned():
    pins = SETTINGS["dev_requirements"].split()
    loose = [pin for pin in pins if "==" not in pin and "<" not in pin]
    assert not loose
    for needed in (
        "jupyterlab",
        "nbdev",
        "torch",
        "torchvision",
        "matplotlib",
        "ipywidgets",
        "papermill",
    ):
        assert any(pin.startswith(needed + "==") for pin in pins), needed
