"""What a person takes along: lists, tables, and scripts that move or copy images."""

import io
from collections.abc import Callable, Mapping
from typing import NamedTuple

from typing_extensions import TypedDict

from simsiam.errors import UsageError
from simsiam.explore.originals import path_in_folder
from simsiam.explore.scripts import copy_script, move_script
from simsiam.explore.session import DROP, Session
from simsiam.utils.files import write_csv_rows
from simsiam.utils.names import join_names


class Export(TypedDict):
    """What is to be exported."""

    kind: str  # a key of EXPORTS
    rows: list[int]  # the selected images; [] for all


class Exported(NamedTuple):
    """A file to take along.

    Attributes:
        content: Its content.
        left_out: The number of images that it should name, and that have no file any more.
    """

    content: bytes
    left_out: int = 0


def make_export(session: Session, export: Export) -> tuple[str, Exported]:
    """Make a file to take along.

    Args:
        session: The session.
        export: What is to be exported.

    Returns:
        The name of the file, and the file.

    Raises:
        UsageError: There is no such kind, or there is nothing to export.
    """
    if export["kind"] not in EXPORTS:
        raise UsageError(f"there is no export of this kind; there are {', '.join(EXPORTS)}")
    rows = export["rows"] or list(range(len(session.images)))
    name = export["kind"]
    return name, EXPORTS[name][1](session, rows)


def _table(header: list[str], rows: list[list[object]]) -> bytes:
    text = io.StringIO(newline="")
    write_csv_rows(text, [header, *rows])
    return text.getvalue().encode()


def _images_csv(session: Session, rows: list[int]) -> Exported:
    """A table of the images with all that is known of them."""
    result, clusters = session.result, session.clusters
    labels, decisions = _labels(session), _decisions(session)
    table: list[list[object]] = [
        [
            session.images.paths[row],
            labels.get(row, ""),
            result.classes[result.predicted[row]] if result else "",
            f"{result.confidence[row]:.4f}" if result else "",
            int(clusters[row]) if clusters is not None else "",
            decisions.get(row, ""),
        ]
        for row in rows
    ]
    header = ["path", "label", "predicted", "confidence", "cluster", "decision"]
    return Exported(_table(header, table))


def _source_list(session: Session, rows: list[int]) -> Exported:
    """A list of the files of images, which `simsiam pretrain` takes, without dropped ones."""
    decisions = _decisions(session)
    kept = [row for row in rows if decisions.get(row) != DROP]
    if not kept:
        raise UsageError("all of these images are dropped: there is nothing to list")
    paths = _existing(session, kept)
    return Exported(join_names(paths.values()), len(kept) - len(paths))


def _drop_list(session: Session, rows: list[int]) -> Exported:
    paths, left_out = _dropped(session, rows)
    return Exported(join_names(paths), left_out)


def _drop_script(session: Session, rows: list[int]) -> Exported:
    paths, left_out = _dropped(session, rows)
    return Exported(move_script("drop.sh", paths, left_out), left_out)


def _dropped(session: Session, rows: list[int]) -> tuple[list[str], int]:
    decisions = _decisions(session)
    dropped = [row for row in rows if decisions.get(row) == DROP]
    if not dropped:
        raise UsageError("no image is marked as dropped: do that on the page Clean up")
    paths = list(_existing(session, dropped).values())
    return paths, len(dropped) - len(paths)


def _existing(session: Session, rows: list[int]) -> dict[int, str]:
    """The path of each image in its folder, without those that are no files there any more."""
    found = {row: path for row in rows if (path := path_in_folder(session.originals, row))}
    if not found:
        why = session.originals.missing or "they are gone, or they are not files in one folder"
        raise UsageError(f"none of {len(rows)} images has a file to name: {why}")
    if lines := [path for path in found.values() if "\n" in path or "\r" in path]:
        raise UsageError(f"{len(lines)} files have a line break in their name: rename them")
    return found


def _folders(
    name: str, of: Callable[[Session], Mapping[int, str]]
) -> Callable[[Session, list[int]], Exported]:
    def export(session: Session, rows: list[int]) -> Exported:
        known = of(session)
        folders = {row: known[row] for row in rows if row in known}
        if not folders:
            raise UsageError("no image has one of these yet")
        paths = _existing(session, list(folders))
        left_out = len(folders) - len(paths)
        targets = {path: folders[row] for row, path in paths.items()}
        return Exported(copy_script(name, targets, left_out), left_out)

    return export


def _labels(session: Session) -> dict[int, str]:
    return session.rows_of(session.labels)


def _decisions(session: Session) -> dict[int, str]:
    return session.rows_of(session.decisions)


def _clusters(session: Session) -> dict[int, str]:
    numbers = session.clusters.tolist() if session.clusters is not None else []
    return {row: f"cluster {number}" for row, number in enumerate(numbers)}


def _predictions(session: Session) -> dict[int, str]:
    if (result := session.result) is None:
        return {}
    return {row: result.classes[number] for row, number in enumerate(result.predicted.tolist())}


# What can be taken along: a description, and what makes the file of that name.
EXPORTS: dict[str, tuple[str, Callable[[Session, list[int]], Exported]]] = {
    "images.csv": ("Table: path, label, prediction, confidence, cluster, decision", _images_csv),
    "source.txt": (
        "List of files without the dropped ones, for simsiam pretrain; it must be in the folder of "
        "the images",
        _source_list,
    ),
    "dropped.txt": (
        "List of the dropped files; as a source, it must be in the folder of the images",
        _drop_list,
    ),
    "drop.sh": ("Script that moves the dropped files into a folder beside", _drop_script),
    "folders-by-label.sh": (
        "Script that copies the files into a folder per label",
        _folders("folders-by-label.sh", _labels),
    ),
    "folders-by-prediction.sh": (
        "Script that copies the files into a folder per predicted class",
        _folders("folders-by-prediction.sh", _predictions),
    ),
    "folders-by-cluster.sh": (
        "Script that copies the files into a folder per cluster",
        _folders("folders-by-cluster.sh", _clusters),
    ),
    "folders-by-decision.sh": (
        "Script that copies the files into the folders keep and drop",
        _folders("folders-by-decision.sh", _decisions),
    ),
}
