"""The pages for readers: links lead somewhere, code can be read, commands and flags exist."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import simsiam
from simsiam.commands.main import build_verb_parser, verb_names
from simsiam.pages.words import WORDS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("results/**/*.md")])
UNDERSTAND = sorted(ROOT.glob("docs/understand/*.md"))
FENCED = re.compile(r"^(`{3,}).*?^\1$", re.MULTILINE | re.DOTALL)


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


@pytest.mark.parametrize("page", UNDERSTAND, ids=lambda page: page.stem)
def test_lines_of_code_beside_equations_are_lines_of_the_package(page):
    """What a table of *Understand* quotes as code is in the source, or in the short example."""
    sources = [*ROOT.glob("src/simsiam/**/*.py"), ROOT / "examples" / "simsiam_minimal.py"]
    lines = {line.strip() for path in sources for line in read(path).splitlines()}
    quoted = re.findall(r"\| `((?:return|p|t|logits|loss) [^`]*)` ?\|", read(page))
    assert page.stem not in ("views_and_encoder", "neighbors", "stop_gradient") or quoted
    for code in quoted:
        assert code in lines, code


def test_every_public_name_is_in_the_reference():
    documented = re.findall(r"^::: simsiam\.(\w+)$", read(ROOT / "docs/reference/python.md"), re.M)
    tables = {"CRITERIA", "METHODS", "TARGETS"}  # named in a sentence
    assert {*documented} == {*simsiam.__all__} - tables


def test_the_glossary_explains_the_words_of_the_report_as_the_report_does():
    glossary = read(ROOT / "docs" / "glossary.md")
    for word, text in WORDS.items():
        assert f"## {word}\n{text}" in glossary
    scripts = "".join(read(path) for path in ROOT.glob("src/simsiam/pages/page/*.js"))
    linked = set(re.findall(r'word(?:Link\(|: )"([^"]+)"', scripts))
    assert linked <= WORDS.keys()


def test_every_link_of_the_site_leads_to_a_page_of_the_site(tmp_path):
    subprocess.run([sys.executable, ROOT / "docs" / "prepare_site.py", tmp_path], check=True)
    pages = list(tmp_path.glob("**/*.md"))
    assert {"index.md", "finetune.md", "commands.md"} <= {page.name for page in pages}
    for page in pages:
        for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", re.sub(FENCED, "", read(page))):
            assert (page.parent / link).is_file(), f"{page.relative_to(tmp_path)}: {link}"
    commands = read(tmp_path / "reference" / "commands.md")
    for verb in verb_names():
        for flag in build_verb_parser(verb)._option_string_actions:
            assert flag in commands, (verb, flag)
