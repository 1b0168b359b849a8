"""The pages for readers: links lead somewhere, code can be read, commands and flags exist."""

import ast
import re
from pathlib import Path

import pytest

from simsiam.commands.main import build_verb_parser, verb_names

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("results/**/*.md")])


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """The names under which links find the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", read(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", read(page)):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{link} leads to no heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_code_is_python_and_commands_exist(page):
    for code in re.findall("^```python\n(.*?)^```$", read(page), re.MULTILINE | re.DOTALL):
        ast.parse(code)
    text = read(page).replace("\\\n", " ")
    for verb, words in re.findall("(?:^|`|-m )simsiam ([a-z]+)([^#`\n]*)", text, re.MULTILINE):
        assert verb in verb_names()
        flags = set(re.findall(r"(?<= )--[\w-]+", words))
        assert flags <= build_verb_parser(verb)._option_string_actions.keys(), (verb, flags)


def test_the_readme_is_short():
    assert len(read(ROOT / "README.md").splitlines()) < 120
