"""What the tests ask of notebooks: their cells, their parameters, their exercises."""

import json
import re

from conftest import NBS

LESSONS = [path for path in sorted(NBS.glob("*.ipynb")) if re.match(r"(0[1-9]|1\d)_", path.name)]
PAGES = sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
NAMES = {path.stem: path for path in PAGES}


def cells(path, kind=None):
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if kind is None or cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def parameters(path):
    """name → value, of the cell tagged `parameters`; {} where there is none."""
    tagged = [
        cell for cell in cells(path, "code") if "parameters" in cell["metadata"].get("tags", [])
    ]
    assert len(tagged) <= 1, f"{path.name} has {len(tagged)} cells tagged parameters"
    values = {}
    for cell in tagged:
        exec(source(cell), {}, values)  # literals only; test_lesson_form looks at that
    return values


def solutions(path):
    """number → the source of the folded solution."""
    text = "\n".join(source(cell) for cell in cells(path, "markdown"))
    blocks = re.findall(
        r"<details><summary>Solution</summary>\n\n```python\n(.*?)```", text, flags=re.S
    )
    return {
        re.search(r"def answer_(\d+)_(\d+)", block)[0][11:].replace("_", "."): block
        for block in blocks
    }
