"""`make notebooks`: run notebooks, store their outputs and write README.md from the home page.

Beginnings of names as arguments choose some notebooks; `--readme` runs none.
"""

import ast
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
sys.path.insert(0, str(ROOT))
from finetune_nb.environment import notebook_hash
from lessons import PAGES, cells, parameters  # noqa: E402

WIDGETS = {"application/vnd.jupyter.widget-view+json", "application/vnd.jupyter.widget-state+json"}


def stored(output):
    """An output as it may be kept: no widget state, no addresses of this run."""
    if output["output_type"] == "execute_result":
        output["execution_count"] = None
    data = output.get("data")
    if data is not None:
        for kind in WIDGETS:
            data.pop(kind, None)
        if not data:
            return None
        if set(data) == {"text/plain"} and re.match(
            r"(interactive\(|HBox\(|<Figure size)", data["text/plain"]
        ):
            return None
    if output.get("name") == "stderr":
        return None
    return output


def run(notebook):
    resources = {"metadata": {"path": str(NBS)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()


def refresh(path):
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as runs:
        # A relative working folder keeps machine paths out of what the lessons print.
        os.environ.setdefault("TQDM_DISABLE", "1")
        # The tests draw without a screen; a notebook keeps what it draws.
        os.environ.pop("MPLBACKEND", None)
        os.environ["FINETUNE_NB_RUNS"] = runs
        for last in (False, True):  # with both cores busy, Jupyter loses a reply now and then
            try:
                run(notebook)
                break
            except TimeoutError as error:
                if last:
                    raise
                said = str(error)[:100]
                print(f"{path.name}: no answer to a cell, run again ({said})", flush=True)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [kept for kept in map(stored, cell.outputs) if kept is not None]
            cell.metadata = {key: value for key, value in cell.metadata.items() if key == "tags"}
    notebook.metadata = {
        "kernelspec": {"display_name": "python3", "language": "python", "name": "python3"},
        "finetune_nb": {"ran": notebook_hash(json.loads(nbformat.writes(notebook)))},
    }
    write(notebook, path)


def write(notebook, path):
    for cell in notebook.cells:  # nbdev's layout: one string a line
        cell.pop("attachments", None)
    text = json.dumps(
        json.loads(nbformat.writes(notebook)), indent=1, ensure_ascii=False, sort_keys=True
    )
    Path(path).write_text(text + "\n", encoding="utf-8")


def with_values(code, values):
    """Code with the notebook's parameters written out, so that it runs where it is pasted."""
    lines = code.splitlines()
    names = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Name) and n.id in values]
    for name in sorted(names, key=lambda n: (n.lineno, n.col_offset), reverse=True):
        line = lines[name.lineno - 1].encode()  # ast counts bytes
        value = json.dumps(values[name.id]) if isinstance(values[name.id], str) else None
        value = (value or repr(values[name.id])).encode()
        line = line[: name.col_offset] + value + line[name.end_col_offset :]
        lines[name.lineno - 1] = line.decode()
    return "\n".join(lines)


def repository_links(text):
    """Links of a page in nbs/, for a page at the top."""
    inside = re.sub(r"\]\((?!https?:|mailto:|#|\.\./|/)([^)\s]+)", r"](nbs/\1", text)
    return inside.replace("](../", "](")


def printed_by(cell):
    """The text under a cell, as one string."""
    texts = (o.get("text", o.get("data", {}).get("text/plain", "")) for o in cell["outputs"])
    return "".join("".join(text) for text in texts).rstrip()


def readme():
    """README.md from the home page: prose, code and what it prints, with the repository's links."""
    values, parts = parameters(NBS / "index.ipynb"), []
    for cell in cells(NBS / "index.ipynb"):
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(repository_links(text))
        elif "#| hide" not in text and "parameters" not in cell["metadata"].get("tags", []):
            parts.append(f"```python\n{with_values(text, values)}\n```")
            if printed_by(cell):
                parts.append(f"```\n{printed_by(cell)}\n```")
    text = "\n\n".join(parts)
    return f"<!-- Written by `make readme` from nbs/index.ipynb. -->\n\n{text}\n"


def main(names):
    chosen = [p for p in PAGES if not names or any(p.stem.startswith(name) for name in names)]
    for path in chosen:
        print(path.name, flush=True)
        refresh(path)
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
