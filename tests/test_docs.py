"""The Python blocks of the documentation run: those of one page in order, in one namespace."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [page for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))) if page.exists()]
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<code>.*?)^```[ ]*$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)(?P<file>[^)#\s]*)(?:#(?P<heading>[^)\s]+))?\)")


def python_blocks(text: str) -> list[tuple[int, str]]:
    """Line number and code of every block fenced as ``python``; ``python no-run`` and other fences are left out."""
    return [
        (text.count("\n", 0, block.start("code")) + 1, block["code"])
        for block in FENCE.finditer(text)
        if block["info"].split() == ["python"]
    ]


def anchors(text: str) -> set[str]:
    """The names by which a page's headings can be linked to, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


WITH_CODE = [page for page in PAGES if python_blocks(page.read_text())]


def test_blocks_are_found() -> None:
    text = "```python\nx = 1\n```\n```python no-run\ny\n```\n```diff\n- z\n```\ntext\n```python\nx += 1\n```\n"
    assert python_blocks(text) == [(2, "x = 1\n"), (12, "x += 1\n")]
    assert ROOT / "docs/equations.md" in WITH_CODE


@pytest.mark.parametrize("page", WITH_CODE, ids=names(WITH_CODE))
def test_code_runs(page: Path, tmp_path: Path) -> None:
    program = ""
    for line, code in python_blocks(page.read_text()):
        program += "\n" * (line - 1 - program.count("\n")) + code  # a traceback's line numbers are the page's
    script = tmp_path / f"{page.name}.py"
    script.write_text(program)
    # In a process of its own: a page may register names and put modules into sys.modules.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script.name], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{page}:\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.finditer(FENCE.sub("", page.read_text())):
        target = page.parent / link["file"] if link["file"] else page
        assert target.exists(), f"{link[0]}: there is no {target}"
        assert not link["heading"] or link["heading"] in anchors(target.read_text()), f"{link[0]}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_formulas_survive_markdown(page: Path) -> None:
    """A backslash before punctuation is eaten by markdown, a pipe ends the cell of a table."""
    for number, line in enumerate(FENCE.sub(lambda b: "\n" * b[0].count("\n"), page.read_text()).split("\n"), 1):
        line = re.sub(r"`[^`]*`", "", line)
        assert line.count("$") % 2 == 0, f"{page.name}:{number}: a formula is not closed"
        for formula in re.findall(r"\$\$?([^$]+)\$\$?", line):
            assert not re.search(r"\\[^A-Za-z]", formula), f"{page.name}:{number}: {formula}"
            assert not (line.startswith("|") and "|" in formula), f"{page.name}:{number}: {formula}"
