"""`make docs`: the site, built in a copy, so that nothing of the checkout changes but `_docs/`.

nbdev processes the notebooks, `finish` mends what it leaves (links, alt texts, raw markup),
Quarto renders. Without Quarto the pages are processed all the same, and it is said what is missing.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_COPIED = (".venv", ".git", "runs", "_docs", "_proc", "build", "__pycache__", "*.egg-info")
# nbdev runs exports and imports to document them; of a cell that also does something else, nothing.
PROCESS = """
import ast
from nbdev import processors, quarto, serve

whole = processors._do_eval
shown = {"export", "exports", "exporti", "exec_doc"}


def needed(cell):
    if cell.cell_type != "code" or not whole(cell):
        return False
    trees = cell.parsed_()
    imports = all(isinstance(tree, (ast.Import, ast.ImportFrom)) for tree in trees)
    return bool(imports or shown & set(cell.directives_) or processors._show_docs(trees))


processors._do_eval = needed
if __name__ == "__main__":
    quarto.refresh_quarto_yml()
    serve.proc_nbs(n_workers=0)
"""
NO_QUARTO = """Quarto, which renders the site, is not on PATH, so nothing was written.
The pages themselves were processed without a fault: only the rendering is missing.
Install Quarto 1.5 or newer from https://quarto.org/docs/get-started and run `make docs` again."""
# What nbdev makes of a name between backticks: a link to the host that settings.ini names.
NAME_LINK = re.compile(r"\[(`+)([^`\]]+)`+\]\(https?://[^)\s]+/\w+\.html(?:#[^)\s]*)?\)")
FENCE = re.compile(r"^(```+|~~~+).*?^\1[ \t]*$", re.M | re.S)
PRIVATE = re.compile(r"^show_doc\((\w+\.)?_", re.M)
PICTURES = {"image/png", "image/svg+xml", "image/jpeg"}


def copied(folder):
    "The checkout as git would clone it."
    target = Path(folder) / "checkout"
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*NOT_COPIED))
    return target


def python(code, checkout):
    "Run code in a copy, with the copy's package."
    environment = os.environ | {"PYTHONPATH": str(checkout), "MPLBACKEND": "Agg"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)


def notebooks_of(folder):
    return sorted(p for p in folder.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def process(checkout):
    "Let nbdev process the notebooks of a copy; the folder of the pages."
    done = python(PROCESS, checkout)
    if done.returncode:
        raise RuntimeError(f"nbdev could not process the notebooks:\n{done.stderr[-3000:]}")
    pages = checkout / "_proc"
    for path in notebooks_of(checkout / "nbs"):  # it skips all where a folder's name has a dot
        if not (pages / path.relative_to(checkout / "nbs")).is_file():
            raise RuntimeError(f"nbdev left out {path.name}")
    return pages


def homes(checkout):
    "Name → page and anchor of its documentation; not those that two modules define."
    index = (checkout / "finetune_nb" / "_modidx.py").read_text(encoding="utf-8")
    modules = ast.literal_eval(index.partition("d = ")[2])["syms"]
    found = {}
    for module, names in modules.items():
        if module == "finetune_nb.cli":  # a verb bears the name of the function that it calls
            continue
        for dotted, (address, _) in names.items():
            found.setdefault(dotted.removeprefix(f"{module}."), set()).add(address)
    return {name: addresses.pop() for name, addresses in found.items() if len(addresses) == 1}


def local_links(text, here, known):
    "nbdev's links to names: from page to page, to where the name is defined, and none inside code."

    def mended(link):
        ticks, name = link[1], link[2]
        shown = f"{ticks}{name}{ticks}"
        address = known.get(name.split("(")[0])
        if address is None:
            return shown
        page, _, anchor = address.partition("#")
        return f"[{shown}]({Path(os.path.relpath(page, here.parent)).as_posix()}#{anchor})"

    def plain(link):
        return f"{link[1]}{link[2]}{link[1]}"

    parts, last = [], 0
    for block in FENCE.finditer(text):
        parts.append(NAME_LINK.sub(mended, text[last : block.start()]))
        parts.append(NAME_LINK.sub(plain, block[0]))
        last = block.end()
    return "".join([*parts, NAME_LINK.sub(mended, text[last:])])


def every_name(text, here, known):
    "The names that nbdev does not know how to link, such as those in other scripts than Latin."

    def linked(found):
        page, _, anchor = known.get(found[1], "").partition("#")
        to = Path(os.path.relpath(page, here.parent)).as_posix() if page else ""
        return f"[{found[0]}]({to}#{anchor})" if page else found[0]

    return re.sub(r"(?<!\[)`([^`\n]+)`(?!\])", linked, text)


LABEL = re.compile(r"""(xlabel|ylabel|title)\s*[=(]\s*f?["']([^"'{}]{3,80})["']""")


def said(cell, following):
    "What stands in for a missing alt text: the words on the axes, and what is said of the figure."
    words = {kind: label.strip() for kind, label in LABEL.findall("".join(cell["source"]))}
    parts = [words["title"]] if "title" in words else []
    if {"xlabel", "ylabel"} <= set(words):
        parts.append(f"{words['ylabel']} (upwards) against {words['xlabel']} (to the right)")
    prose = next((c for c in following if c["cell_type"] == "markdown"), None)
    lines = "".join(prose["source"]).splitlines() if prose else []
    parts.append(" ".join(line for line in lines if line.strip() and line[0] not in "#|>`<"))
    text = re.sub(r"\]\([^)]*\)|[*`\[\]\"\\]", "", ". ".join(filter(None, parts)))
    sentences = re.split(r"(?<=[.!?:])\s+", text.strip())
    return " ".join(sentences[:3])[:300].strip() or "A figure that the code above draws."


def as_table(html):
    "Text in columns as a table, where every line has as many entries; other markup as it is."
    inside = re.fullmatch(r"\s*<pre[^>]*>(.*)</pre>\s*", html, re.S)
    rows = [re.split(r"\s{2,}", ln.strip()) for ln in inside[1].splitlines()] if inside else []
    rows = [row for row in rows if row != [""]]
    if len(rows) < 2 or len(rows[0]) < 2 or len({len(row) for row in rows}) > 1:
        return html
    lines = []
    for i, row in enumerate(rows):
        kind = "td" if i else "th"
        lines.append("<tr>" + "".join(f"<{kind}>{entry}</{kind}>" for entry in row) + "</tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def finish_cell(cell, following, here, known):
    "Mend one cell of a processed page, in place."
    if cell["cell_type"] == "markdown":
        text = local_links("".join(cell["source"]), here, known)
        cell["source"] = every_name(text, here, known) if here.stem == "names" else text
        return
    if cell["cell_type"] != "code":
        return
    source = "".join(cell["source"])
    drawn = any(PICTURES & set(output.get("data", {})) for output in cell["outputs"])
    if drawn and "#| fig-alt:" not in source:
        cell["source"] = f'#| fig-alt: "{said(cell, following)}"\n{source}'
    for output in cell["outputs"]:
        data = output.get("data", {})
        if "text/html" in data:  # Quarto would load scripts from another host for it
            html = as_table("".join(data.pop("text/html")))
            data["text/markdown"] = f"```{{=html}}\n{html}\n```".splitlines(keepends=True)
        elif "text/markdown" in data:
            text = local_links("".join(data["text/markdown"]), here, known)
            text = every_name(text, here, known) if here.stem == "names" else text
            text = re.sub(r"^def ([A-Z])", r"class \1", text, flags=re.M)
            data["text/markdown"] = text.splitlines(keepends=True)


def finish(pages, checkout):
    "Mend what nbdev leaves on every page, and put the notebook itself beside it."
    known = homes(checkout)
    for path in notebooks_of(pages):
        here = path.relative_to(pages)
        page = json.loads(path.read_text(encoding="utf-8"))
        cells = page["cells"]
        cells = [cell for cell in cells if not PRIVATE.search("".join(cell["source"]))]
        for i, cell in enumerate(cells):
            finish_cell(cell, cells[i + 1 :], here, known)
        if path.stem != "index":
            cells.insert(min(2, len(cells)), download(here))
        for cell in cells:  # Quarto wants one string a line
            cell["source"] = "".join(cell["source"]).splitlines(keepends=True)
        page["cells"] = cells
        path.write_text(json.dumps(page, ensure_ascii=False, indent=1), encoding="utf-8")


def download(here):
    "A place for the way to the notebook: Quarto would turn a link into one to the page."
    up = "../" * (len(here.parts) - 1)
    place = f'<p class="download" data-notebook="{up}notebooks/{here.as_posix()}"></p>'
    text = f"```{{=html}}\n{place}\n```"
    return {"cell_type": "markdown", "id": "download", "metadata": {}, "source": text}


PLACE = re.compile(r'<p class="download" data-notebook="([^"]+)">\s*</p>')
LINK = r'<p class="download"><a href="\1" download>Download this notebook</a></p>'


def render(pages):
    "Quarto's part, and the notebooks to be downloaded; the folder of the site."
    done = subprocess.run(["quarto", "render", "--no-cache"], cwd=pages)
    if done.returncode:
        raise RuntimeError(f"quarto ended with status {done.returncode}; its words stand above")
    site, notebooks = pages / "_docs", pages.parent / "nbs"
    for path in notebooks_of(notebooks):
        target = site / "notebooks" / path.relative_to(notebooks)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        path.write_text(PLACE.sub(LINK, text), encoding="utf-8")
    return site


def main():
    with tempfile.TemporaryDirectory() as folder:
        checkout = copied(folder)
        try:
            pages = process(checkout)
            finish(pages, checkout)
            if shutil.which("quarto") is None:
                sys.exit(NO_QUARTO)
            site = render(pages)
        except RuntimeError as error:
            sys.exit(str(error))
        shutil.rmtree(ROOT / "_docs", ignore_errors=True)
        shutil.move(site, ROOT / "_docs")
    print("the site: _docs/index.html")


if __name__ == "__main__":
    main()
