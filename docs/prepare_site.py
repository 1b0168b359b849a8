"""Write the source of the documentation site: `python docs/prepare_site.py FOLDER`.

The pages in docs/ link to the README, to results and to source files, as GitHub shows them. This
copies all of it into one folder, where every link leads to a file below, turns notebooks into pages
and writes the page of all commands. `make docs` then builds the site from that folder.
"""

import argparse
import json
import posixpath
import re
import shutil
import sys
from pathlib import Path, PurePosixPath

from simsiam.commands.main import GROUPS, build_verb_parser, find_verb, verb_names

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?!https?:|#|mailto:)([^)#\s]+)")
SHOWN = (".md", ".svg", ".png", ".json", ".html")  # other files become pages of code


def write_site_source(folder: Path) -> None:
    """Write everything that the site shows into an empty folder."""
    pages = [
        page.relative_to(ROOT)
        for pattern in ("*.md", "docs/**/*.md", "docs/**/*.ipynb", "results/**/*.md")
        for page in ROOT.glob(pattern)
    ]
    texts = {page: read_page(ROOT / page) for page in pages}
    linked = {path_of(page, link) for page, text in texts.items() for link in LINK.findall(text)}
    for page, text in texts.items():
        text = lead_links(text, page)
        if page.suffix == ".ipynb":
            text += f"\n\nThis page is a notebook: [download it]({page.name}).\n"
            copy(ROOT / page, folder / page.relative_to("docs"))
        write(folder / site_path(page), text)
    for path in (ROOT / "docs" / "assets").rglob("*.js"):
        copy(path, folder / path.relative_to(ROOT / "docs"))
    for path in sorted(linked - texts.keys()):
        if site_path(path).startswith("source/"):
            language = {".py": "python", ".sh": "bash"}.get(path.suffix, "text")
            code = (ROOT / path).read_text("utf-8")
            write(folder / site_path(path), f"# {path}\n\n````{language}\n{code}````\n")
        elif (ROOT / path).is_file():
            copy(ROOT / path, folder / site_path(path))
    write(folder / "reference" / "commands.md", describe_commands())


def write(path: Path, text: str) -> None:
    """Write a page, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def copy(path: Path, target: Path) -> None:
    """Copy a file, with the folders above it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, target)


def read_page(path: Path) -> str:
    """The Markdown of a page, or of a notebook, whose code becomes blocks."""
    if path.suffix == ".md":
        return path.read_text("utf-8")
    parts = []
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join(parts)


def path_of(page: PurePosixPath, link: str) -> PurePosixPath:
    """Where a link of a page leads in the repository; to a package's first module."""
    path = PurePosixPath(posixpath.normpath((page.parent / link).as_posix()))
    return path / "__init__.py" if (ROOT / path / "__init__.py").is_file() else path


def site_path(path: PurePosixPath) -> str:
    """The place on the site of a file of the repository."""
    if path.name == "README.md" and path.parent == PurePosixPath("."):
        return "index.md"
    if path.parts[0] == "docs":
        path = path.relative_to("docs")
        return str(path.with_suffix(".md") if path.suffix == ".ipynb" else path)
    return path.as_posix() if path.suffix in SHOWN else f"source/{str(path).lstrip('.')}.md"


def lead_links(text: str, page: PurePosixPath) -> str:
    """Let the links of a page lead to their places on the site."""
    start = posixpath.dirname(site_path(page)) or "."
    return LINK.sub(lambda m: posixpath.relpath(site_path(path_of(page, m[0])), start), text)


def describe_commands() -> str:
    """Every command with every flag, from the parsers that the program uses."""
    lines = ["# Every command and flag", "", "Generated from `simsiam COMMAND --help`.", ""]
    for group in GROUPS:
        for verb in (verb for verb in verb_names() if group == find_verb(verb).GROUP):
            lines += describe_command(verb)
    return "\n".join(lines)


def describe_command(verb: str) -> list[str]:
    """One command: what it does, and its arguments as a list of definitions."""
    parser = build_verb_parser(verb)
    formatter = parser._get_formatter()
    lines = [f"## simsiam {verb}", "", plain(parser.description or ""), ""]
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if a.help not in (None, argparse.SUPPRESS)]
        lines += [f"**{group.title}**", ""] if actions else []
        for action in actions:
            flag = formatter._format_action_invocation(action)
            lines += [f"`{flag}`", f":   {plain(formatter._expand_help(action))}", ""]
    return lines


def plain(text: str) -> str:
    """Text in which Markdown finds no marks."""
    return re.sub(r"([\\*_<>|\[\]`])", r"\\\1", " ".join(text.split()))


if __name__ == "__main__":
    write_site_source(Path(sys.argv[1]))
