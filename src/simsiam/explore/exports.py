"""What a person takes along: lists, tables, and scripts that move or copy images."""

import io
from collections.abc import Callable

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


def make_export(session: Session, export: Export) -> tuple[str, bytes]:
    """Make a file to take along.

    Args:
        session: The session.
        export: What is to be exported.

    Returns:
        The name and the content of the file.

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


def _images_csv(session: Session, rows: list[int]) -> bytes:
    """A table of the images with all that is known of them."""
    paths, result, clusters = session.images.paths, session.result, session.clusters
    labels, decisions = session.labels.values, session.decisions.values
    table: list[list[object]] = [
        [
            paths[row],
            labels.get(paths[row], ""),
            result.classes[result.predicted[row]] if result else "",
            f"{result.confidence[row]:.4f}" if result else "",
            int(clusters[row]) if clusters is not None else "",
            decisions.get(paths[row], ""),
        ]
        for row in rows
    ]
    return _table(["path", "label", "predicted", "confidence", "cluster", "decision"], table)


def _source_list(session: Session, rows: list[int]) -> bytes:
    """A list of the files of images, which `simsiam pretrain` takes, without dropped ones."""
    decisions, paths = session.decisions.values, session.images.paths
    kept = [row for row in rows if decisions.get(paths[row]) != DROP]
    return join_names(_existing(session, kept).values())


def _drop_list(session: Session, rows: list[int]) -> bytes:
    return join_names(_dropped(session, rows))


def _drop_script(session: Session, rows: list[int]) -> bytes:
    return move_script("drop.sh", _dropped(session, rows))


def _dropped(session: Session, rows: list[int]) -> list[str]:
    decisions, paths = session.decisions.values, session.images.paths
    dropped = [row for row in rows if decisions.get(paths[row]) == DROP]
    if not dropped:
        raise UsageError("no image is marked as dropped: do that on the page Clean up")
    return list(_existing(session, dropped).values())


def _existing(session: Session, rows: list[int]) -> dict[int, str]:
    """The path of each image in its folder; those that are no files there are an error."""
    found = {row: path for row in rows if (path := path_in_folder(session.originals, row))}
    if len(found) < len(rows):
        lost = len(rows) - len(found)
        why = session.originals.missing or "they are gone, or they are not files in one folder"
        raise UsageError(f"{lost} of {len(rows)} images have no file to name: {why}")
    if lines := [path for path in found.values() if "\n" in path or "\r" in path]:
        raise UsageError(f"{len(lines)} files have a line break in their name: rename them")
    return found


def _folders(name: str, of: Callable[[Session, int], str]) -> Callable[[Session, list[int]], bytes]:
    def export(session: Session, rows: list[int]) -> bytes:
        folders = {row: folder for row in rows if (folder := of(session, row))}
        if not folders:
            raise UsageError("no image has one of these yet")
        paths = _existing(session, list(folders))
        return copy_script(name, {paths[row]: folder for row, folder in folders.items()})

    return export


def _label(session: Session, row: int) -> str:
    return session.labels.values.get(session.images.paths[row], "")


def _cluster(session: Session, row: int) -> str:
    return f"cluster {session.clusters[row]}" if session.clusters is not None else ""


def _prediction(session: Session, row: int) -> str:
    return session.result.classes[session.result.predicted[row]] if session.result else ""


def _decision(session: Session, row: int) -> str:
    return session.decisions.values.get(session.images.paths[row], "")


# What can be taken along: a description, and what makes the file of that name.
EXPORTS: dict[str, tuple[str, Callable[[Session, list[int]], bytes]]] = {
    "images.csv": ("Table: path, label, prediction, confidence, cluster, decision", _images_csv),
    "source.txt": ("List of files without the dropped ones, for simsiam pretrain", _source_list),
    "dropped.txt": ("List of the dropped files", _drop_list),
    "drop.sh": ("Script that moves the dropped files into a folder beside", _drop_script),
    "folders-by-label.sh": (
        "Script that copies the files into a folder per label",
        _folders("folders-by-label.sh", _label),
    ),
    "folders-by-prediction.sh": (
        "Script that copies the files into a folder per predicted class",
        _folders("folders-by-prediction.sh", _prediction),
    ),
    "folders-by-cluster.sh": (
        "Script that copies the files into a folder per cluster",
        _folders("folders-by-cluster.sh", _cluster),
    ),
    "folders-by-decision.sh": (
        "Script that copies the files into the folders keep and drop",
        _folders("folders-by-decision.sh", _decision),
    ),
}
