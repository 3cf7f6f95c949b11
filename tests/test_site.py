"""What a reader of the site and of README.md gets: pages as nbdev leaves them, and as rendered."""

import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys

import docs
import pytest
import refresh
import yaml
from conftest import NBS, ROOT
from lessons import LESSONS, PAGES, cells, source
from test_house import MODULES, defined, name_of, public

SETTINGS = configparser.ConfigParser(delimiters=["="])
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")
SITE = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
RAW = re.compile(r"<[\w.]+ object at|^:::", re.M)


def page_name(path):
    "A page's address on the site, as nbdev makes it."
    relative = path.relative_to(NBS)
    stem = re.sub(r"^\d+[a-z]?_", "", path.stem)
    return relative.with_name(f"{stem}.html").as_posix()


def text_of(page):
    "All that a page shows: prose, code and what stands under it."
    parts = []
    for cell in page["cells"]:
        parts.append("".join(cell["source"]))
        for output in cell.get("outputs", ()):
            parts.append("".join(output.get("text", "")))
            data = output.get("data", {})
            kinds = ("text/markdown", "text/html", "text/plain")
            parts += ["".join(data[kind]) for kind in kinds[:1] if kind in data] or [
                "".join(data[kind]) for kind in kinds[1:] if kind in data
            ]
    return "\n\n".join(parts)


def read(folder):
    found = docs.notebooks_of(folder)
    pages = {path.relative_to(folder).as_posix(): path for path in found}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in pages.items()}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages of a copy: as nbdev leaves them, as they are rendered, and the copy."""
    checkout = docs.copied(tmp_path_factory.mktemp("site"))
    pages = docs.process(checkout)
    before = read(pages)
    docs.finish(pages, checkout)
    after = {name: page for name, page in read(pages).items() if name in before}
    return before, after, checkout


def test_page_names_are_unique():
    names = [page_name(path) for path in PAGES]
    assert len(set(names)) == len(names), sorted(n for n in names if names.count(n) > 1)


def entries():
    for part in SITE["website"]["sidebar"]["contents"]:
        for entry in part.get("contents", [part]) if isinstance(part, dict) else [part]:
            yield (entry["href"], entry.get("text")) if isinstance(entry, dict) else (entry, None)


def test_sidebar_has_every_page_once_and_lessons_in_order_with_their_numbers():
    listed = [href for href, _ in entries()]
    assert sorted(listed) == sorted(path.relative_to(NBS).as_posix() for path in PAGES)
    assert [href for href in listed if re.match(r"\d", href)] == [path.name for path in LESSONS]
    for href, text in entries():
        number = re.match(r"0*(\d+[a-z]?)_", href)
        assert not number or text.startswith(f"{number[1]} · "), href


def test_configuration():
    assert SITE["project"]["output-dir"] == SETTINGS["DEFAULT"]["doc_path"]
    found = yaml.safe_load((NBS / "_quarto.yml").read_text(encoding="utf-8"))
    assert found == {"metadata-files": ["../_quarto.yml", "nbdev.yml"]}


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_title_has_the_number(path):
    number = re.match(r"0*(\d+[a-z]?)_", path.name)[1]
    assert source(cells(path)[0]).startswith(f"# {number} · ")


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_first_cell_is_title_and_promise(path):
    """nbdev drops all else that stands in it."""
    lines = [line for line in source(cells(path)[0]).splitlines() if line.strip()]
    assert len(lines) == 2 and lines[0].startswith("# ") and lines[1].startswith("> "), lines


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_no_markup_of_one_program_only(path):
    """JupyterLab shows `:::` as it stands, and nbdev or Quarto eat nothing of what remains."""
    for cell in cells(path, "markdown"):
        assert ":::" not in source(cell), source(cell)[:100]


def test_pages_hold_all_that_the_notebooks_say(site):
    """Boxes, tables and every other sentence of the prose are on the pages."""
    for path in PAGES:
        name = path.relative_to(NBS).as_posix()
        shown = text_of(site[1][name])
        for cell in cells(path, "markdown")[1:]:
            for line in filter(str.strip, source(cell).splitlines()):
                plain = re.split(r"[`\[\](]", line)[0].rstrip()
                assert plain in shown, f"{name} lost {line[:80]!r}"


def test_boxes_and_tables_are_on_the_pages(site):
    for path in LESSONS:
        shown = text_of(site[1][path.name])
        for part in ("You will be able to", "You need", "Time", "Article"):
            assert f"**{part}" in shown, f"{path.name}: {part}"
    assert "make demo" in text_of(site[1]["index.ipynb"])
    for name in ("index", "reference/command_line", "reference/names"):
        assert "\n|---|" in text_of(site[1][f"{name}.ipynb"]), name


def test_code_that_a_lesson_teaches_is_on_its_page(site):
    for path in LESSONS:
        shown = text_of(site[1][path.name])
        for cell in cells(path, "code"):
            if not re.search(r"^#\| exports\b", source(cell), re.M):
                continue
            for line in source(cell).splitlines():
                assert line.startswith("#|") or line in shown, f"{path.name}: {line}"


def test_the_comments_of_a_recipes_fields_are_on_a_page(site):
    for path in PAGES:
        for cell in cells(path, "code"):
            code = source(cell)
            if "class _Fields" in code and re.search(r"^#\| export", code, re.M):
                fields = [ln for ln in code.splitlines() if re.match(r"    \w+: .*  # ", ln)]
                assert fields
                shown = text_of(site[1][path.relative_to(NBS).as_posix()])
                for line in fields:
                    assert line.split("  # ")[1].strip() in shown, line
                return
    raise AssertionError("no notebook exports Recipe")


@pytest.mark.parametrize("which", (0, 1), ids=("as nbdev leaves them", "as they are rendered"))
def test_nothing_raw_is_shown(site, which):
    for name, page in site[which].items():
        found = RAW.search(text_of(page))
        assert not found, f"{name}: {found[0]}"


def test_figures_have_an_alt_text(site):
    for name, page in site[1].items():
        for cell in page["cells"]:
            text = "".join(cell["source"])
            drawn = [o for o in cell.get("outputs", ()) if docs.PICTURES & set(o.get("data", {}))]
            if drawn:
                found = re.search(r'#\| fig-alt: "?(.*?)"?$', text, re.M)
                assert found and len(found[1]) > 10, f"{name}: {text[:80]}"
            if cell["cell_type"] == "markdown":
                assert not re.search(r"!\[\]\(", text), f"{name}: {text[:80]}"


def test_links_between_pages_lead_to_where_a_name_is_documented(site):
    """None leads to a host, each to a page there is, and the page documents the name."""
    before, after, _ = site
    addresses = {page_name(path) for path in PAGES}
    homes = docs.homes(site[2])
    for name, page in after.items():
        for cell in page["cells"]:
            shown = text_of({"cells": [cell]})
            for match in re.finditer(r"\[`+([^`\]]+)`+\]\(([^)#\s]+\.html)#([^)]*)\)", shown):
                to = os.path.normpath(os.path.join(os.path.dirname(name), match[2]))
                assert to in addresses, f"{name}: {match[0]}"
                assert homes[match[1].split("(")[0]] == f"{to}#{match[3]}"
            assert not docs.NAME_LINK.search(shown), f"{name}: {docs.NAME_LINK.search(shown)[0]}"
    assert any(docs.NAME_LINK.search(text_of(page)) for page in before.values())


def test_names_of_the_package_are_linked_to_their_module(site):
    shown = text_of(site[1]["reference/names.ipynb"])
    code = "import finetune_nb as f, json; print(json.dumps({n: getattr(f, n).__module__"
    done = docs.python(
        f"{code} for n in f.__all__ if hasattr(getattr(f, n), '__module__')}}))", ROOT
    )
    assert done.returncode == 0, done.stderr
    index = (ROOT / "finetune_nb/_modidx.py").read_text(encoding="utf-8")
    modules = ast.literal_eval(index.partition("d = ")[2])["syms"]
    for name, module in json.loads(done.stdout).items():
        if not name.isascii():  # nbdev indexes no others
            continue
        address = modules[module][f"{module}.{name}"][0]
        page, _, anchor = address.partition("#")
        to = os.path.relpath(page, "reference")
        assert f"[`{name}`]({to}#{anchor})" in shown, f"{name} should lead to {address}"


def test_nothing_comes_from_another_host(site):
    """No output that makes Quarto fetch scripts, no font of the theme's."""
    for name, page in site[1].items():
        for cell in page["cells"]:
            for output in cell.get("outputs", ()):
                kinds = {"text/html", "application/javascript"} & set(output.get("data", {}))
                assert not kinds, f"{name}: {kinds}"
    theme = (NBS / "site.scss").read_text(encoding="utf-8")
    assert "$web-font-path: false;" in theme
    assert SITE["format"]["html"]["theme"] == ["cosmo", "site.scss"]
    assert SITE["format"]["html"]["html-math-method"] == "mathml"
    for sheet in NBS.glob("*.*css"):
        assert not re.search(r"@import|url\(|https?:", sheet.read_text(encoding="utf-8")), (
            sheet.name
        )


def test_every_page_offers_its_notebook(site):
    for name, page in site[1].items():
        if name != "index.ipynb":
            up = "../" * name.count("/")
            place = docs.PLACE.search(text_of(page))
            assert place and place[1] == f"{up}notebooks/{name}", name


def test_printed_columns_become_a_table():
    rows = docs.as_table("<pre>epoch  rate   loss\n    0  0.02   1.5\n    1  0.01   0.3</pre>")
    assert rows.count("<tr>") == 3 and rows.count("<th>") == 3 and "<td>0.01</td>" in rows
    for other in ("<pre>one  two\nthree</pre>", "<pre>a sentence</pre>", "<p>a  b\nc  d</p>"):
        assert docs.as_table(other) == other


def test_links_inside_code_are_names_again():
    link = "[`load`](https://somebody.github.io/project/pages/data.html#load)"
    known = {"load": "pages/data.html#load"}
    here = NBS.relative_to(NBS) / "pages" / "x.ipynb"
    text = f"See {link}.\n\n```python\ndef f(\n    a, # from {link}\n):\n```\n\nAnd {link}"
    done = docs.local_links(text, here, known)
    assert done.count("[`load`](data.html#load)") == 2
    assert "# from `load`\n" in done
    assert docs.local_links(link, here, {}) == "`load`"


def test_a_missing_alt_text_is_made_of_what_is_said():
    drawn = {"data": {"image/png": "x"}, "output_type": "display_data"}
    source = 'axis.set(xlabel="steps", ylabel="loss")'
    cell = {"cell_type": "code", "source": source, "outputs": [drawn]}
    prose = {"cell_type": "markdown", "source": '## Next\n\nIt *falls*, "fast". And so on.'}
    docs.finish_cell(cell, [prose], NBS, {})
    alt = cell["source"].splitlines()[0]
    assert alt.startswith(
        '#| fig-alt: "loss (upwards) against steps (to the right). It falls, fast.'
    )
    given = {"cell_type": "code", "source": '#| fig-alt: "mine"\nplot()', "outputs": [drawn]}
    docs.finish_cell(given, [], NBS, {})
    assert given["source"].count("fig-alt") == 1


# Reference: each public name is shown at work

DIRECTIVE = re.compile(r"^#\| (export|exports|exporti|default_exp|hide)\b", re.M)
WORD = re.compile(r"\w+")
NOT_SHOWN = {  # public names that still lack an example; none is added
    "Activation",
    "Batch",
    "CifarResNet",
    "Diverged",
    "EfficientNetLite0",
    "SelectedNet",
    "Strategy",
    "activations",
    "append_line",
    "apply_edit",
    "architectures",
    "as_images",
    "asked_by",
    "block_names",
    "cache_folder",
    "called_as_functions",
    "clean_images",
    "column_scores",
    "convert_lite0",
    "file_stamp",
    "fold_of",
    "fonts_for",
    "group_lasso_path",
    "import_timm",
    "is_called",
    "keyed_seed",
    "lite0_source",
    "load_state",
    "logits_of",
    "main",
    "make_optimizer",
    "make_table",
    "measure_pixels",
    "model_fingerprint",
    "momentum_at",
    "named_for",
    "open_index",
    "outlier_scores",
    "parts_of",
    "pixel_checks",
    "plan_recipe",
    "plant_defects",
    "read_decisions",
    "render_glyph",
    "render_many",
    "render_range",
    "require_fit",
    "robust_z",
    "row_ids",
    "save_index",
    "save_state",
    "show_suspects",
    "told_by_timm",
    "top_rate",
    "whole_table",
    "write_shards",
}


@pytest.fixture(scope="module")
def shown_at_work():
    "Words of cells that a reader sees run, and of what they print: not those of exported code."
    words = set()
    for path in PAGES:
        for cell in cells(path, "code"):
            if not DIRECTIVE.search(source(cell)):
                words.update(WORD.findall(source(cell)))
                words.update(WORD.findall(text_of({"cells": [cell]})))
    return words


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_public_name_has_an_example(path, shown_at_work):
    """On the page of its module, or in a lesson: a cell that uses it, with what comes of it."""
    own = [name for name in public(path) if name in defined(path)]
    missing = [n for n in own if n not in shown_at_work and n not in NOT_SHOWN]
    assert not missing, f"{name_of(path)}: no example of {', '.join(missing)}"


# README.md


def test_readme_is_the_home_page():
    written = (ROOT / "README.md").read_text(encoding="utf-8")
    assert written == refresh.readme(), "README.md is not what index.ipynb gives: run make readme"


def test_code_of_the_readme_runs_when_pasted(tmp_path):
    """Word for word, in a new folder; the figures in it may differ from machine to machine."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
    assert blocks
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    command = [sys.executable, "-c", "\n".join(blocks)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


def test_parameters_are_written_out_in_the_readme():
    code = 'photos = load(data, limit=limit)  # 图像 limit\nprint(f"{limit} of 图 {data}", limit.x)'
    done = refresh.with_values(code, {"data": "photos", "limit": 40})
    assert done.splitlines()[0] == 'photos = load("photos", limit=40)  # 图像 limit'
    assert done.splitlines()[1].endswith("40.x)")
    text = "[a](04_data.ipynb#x), [b](../data/c.md), [c](https://x.y/z), ![d](images/p.png)"
    for link in ("(nbs/04_data.ipynb#x)", "(data/c.md)", "(https://x.y/z)", "(nbs/images/p.png)"):
        assert link in refresh.repository_links(text)


def links(text):
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    found = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    return [link for link in found if not link.startswith(("http:", "https:", "data:"))]


def test_links_lead_somewhere():
    for path in PAGES:
        for link in links("\n".join(map(source, cells(path, "markdown")))):
            assert (path.parent / link).exists(), f"{path.name} links to {link}"
    for link in links((ROOT / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / link).exists(), f"README.md links to {link}"


QUARTO = """#!{python}
import os, pathlib, sys
words = sys.argv[1:]
if "render" in words and "-o" in words:
    pathlib.Path("_docs").mkdir(exist_ok=True)
    pathlib.Path("_docs", words[words.index("-o") + 1]).write_text("rendered")
elif "render" in words:
    for page in pathlib.Path(".").rglob("*.ipynb"):
        target = pathlib.Path("_docs", page.with_suffix(".html"))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("a page")
"""


@pytest.fixture
def stand_in(tmp_path):
    """A PATH on which a program named quarto writes what Quarto would, without its contents."""
    program = tmp_path / "bin" / "quarto"
    program.parent.mkdir()
    program.write_text(QUARTO.format(python=sys.executable), encoding="utf-8")
    program.chmod(0o755)
    return f"{program.parent}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize("command", ("make docs", "nbdev_docs"))
def test_no_build_changes_the_readme(command, stand_in, tmp_path):
    """Also where README.md is older than the home page, which nbdev takes for a reason to."""
    checkout = docs.copied(tmp_path)
    for path in docs.notebooks_of(checkout / "nbs"):  # two pages do as well as all
        if path.stem not in ("index", "names"):
            path.unlink()
    os.utime(checkout / "README.md", (1, 1))
    before = {p: p.read_bytes() for p in checkout.rglob("*") if p.is_file()}
    code = {
        "make docs": "import sys; sys.path.insert(0, 'tests'); import docs; docs.main()",
        "nbdev_docs": "if __name__ == '__main__':\n    from nbdev import quarto\n"
        "    quarto.nbdev_docs.__wrapped__(n_workers=0)",
    }[command]
    environment = os.environ | {"PYTHONPATH": str(checkout), "PATH": stand_in, "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (checkout / "_docs" / "index.html").is_file()
    assert (checkout / "README.md").read_bytes() == before[checkout / "README.md"]
    if command == "make docs":
        for path, content in before.items():
            assert path.read_bytes() == content, f"{path.name} was changed"


def test_without_quarto_it_is_said_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(docs, "copied", lambda folder: tmp_path)
    monkeypatch.setattr(docs, "process", lambda checkout: tmp_path)
    monkeypatch.setattr(docs, "finish", lambda pages, checkout: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="Quarto, which renders the site, is not on PATH"):
        docs.main()


@pytest.mark.skipif(shutil.which("quarto") is None, reason="quarto is not on PATH")
def test_site_renders(site):
    folder = docs.render(site[2] / "_proc")
    for path in PAGES:
        page = (folder / page_name(path)).read_text(encoding="utf-8")
        fetched = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?:[^"]+)"', page)
        assert not fetched, f"{path.name}: {fetched}"
        name = path.relative_to(NBS)
        assert (folder / "notebooks" / name).read_bytes() == path.read_bytes()
        assert path.stem == "index" or f'notebooks/{name.as_posix()}" download>' in page
        assert "<img" not in page or not re.search(r"<img(?![^>]*alt=)[^>]*>", page), path.name
