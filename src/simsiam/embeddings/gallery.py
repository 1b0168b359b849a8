"""A web page of pictures: one HTML file that opens from disk and loads nothing from the network."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from simsiam.embeddings.copies.facts import relative_link
from simsiam.embeddings.copies.originals import Originals
from simsiam.embeddings.table import Embeddings
from simsiam.errors import UsageError, printable
from simsiam.utils.files import write_text

HTML_HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; }}
body {{ padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; }}
h2 {{ font-size: 1rem; margin: 2rem 0 .5rem; }}
.row {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)); gap: 12px; }}
figure {{ margin: 0; }}
img {{ width: 100%; aspect-ratio: 1; border-radius: 6px; }}
figcaption {{ font-size: 12px; overflow-wrap: anywhere; opacity: .75; }}
</style>
<h1>{title}</h1>
<p>{note}</p>
"""

# The position of an image in the embeddings, or a JPEG file of another; and its caption.
Figure = tuple[int | bytes, str]
Section = tuple[str, Sequence[Figure]]  # a heading, and the figures below it


def write_page(
    path: Path,
    title: str,
    note: str,
    sections: Sequence[Section],
    images: Embeddings,
    originals: Originals | None = None,
) -> None:
    """Write a web page of thumbnails. All text is escaped, also control characters in names.

    Args:
        path: The .html file to write.
        title: The heading of the page.
        note: A sentence below the heading.
        sections: The sections of the page, each a heading and its figures.
        images: The embeddings that the figures refer to.
        originals: Their files: pictures become links to those that are there.

    Raises:
        UsageError: If the embeddings have no thumbnails.
        WorkFailed: If the file cannot be written.
    """
    if images.thumbnails is None:
        raise UsageError(
            "the file has no thumbnails to show: use a file that `simsiam embed` wrote"
        )
    lines = [HTML_HEAD.format(title=_escape(title), note=_escape(note))]
    for heading, figures in sections:
        lines.append(f'<h2>{_escape(heading)}</h2>\n<div class="row">\n')
        for i, caption in figures:
            jpeg = i if isinstance(i, bytes) else images.thumbnails[i]
            data = base64.b64encode(jpeg).decode()
            picture = f'<img loading="lazy" alt="" src="data:image/jpeg;base64,{data}">'
            link = relative_link(originals, i, path) if originals and isinstance(i, int) else ""
            if link:
                picture = f'<a href="{escape(link)}">{picture}</a>'
            lines.append(f"<figure>{picture}<figcaption>{_escape(caption)}</figcaption></figure>\n")
        lines.append("</div>\n")
    write_text(path, "".join(lines))


def _escape(text: str) -> str:
    return escape(printable(text))
