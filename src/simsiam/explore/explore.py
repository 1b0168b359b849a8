"""The verb `explore`: open an embedding, serve it to the browser of this machine, until Ctrl-C."""

import os
import socket
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from simsiam.embeddings.embed import embed
from simsiam.embeddings.search_source import choose_encoder
from simsiam.embeddings.table import read_embeddings
from simsiam.errors import UsageError, check_ranges, printable
from simsiam.pages.embedding_gallery import is_embedding
from simsiam.runs.run_folder import Run
from simsiam.sources.open_source import absolute_sources, find_shards, source_names
from simsiam.utils.files import exclusive_lock

HOST = "127.0.0.1"


def explore(
    what: str | os.PathLike[str],
    *,
    port: int = 0,
    browser: bool = True,
    root: str | os.PathLike[str] | None = None,
    no_labels: bool = False,
    splits: Sequence[str] | None = None,
) -> None:
    """Serve the images of an embedding to the browser, until the process is interrupted.

    Args:
        what: A file or folder that `embed` wrote; or a run folder or a source of images, which is
            embedded first; see `find_embedding`.
        port: The port to listen on; 0 for any free one.
        browser: Whether to open the browser.
        root: Where the images are, if they are no longer where the embedding says.
        no_labels: Whether to ignore the labels of a source that is embedded first.
        splits: Which folder or shard of such a source is which split; see `open_source`.

    Raises:
        UsageError: There is nothing of this name, another process explores it, the port is taken,
            or the extra is not installed.
        WorkFailed: The images cannot be embedded.
    """
    check_ranges(SimpleNamespace(port=port), port=(0, 65535))
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise UsageError(f'explore needs {error.name}: pip install "simsiam[explore]"') from None
    from simsiam.explore.server import make_app, make_token
    from simsiam.explore.session import Session

    listener = _listen(port)
    port, token = listener.getsockname()[1], make_token()
    address = f"http://{HOST}:{port}/{token}/"
    print(address, flush=True)
    file = find_embedding(what, no_labels=no_labels, splits=splits)
    images = read_embeddings(file)
    with exclusive_lock(file.with_name(f".{file.name}.explore-lock"), printable(str(file))):
        session = Session(file, images, os.fspath(root) if root else None)
        if session.originals.missing:
            print(printable(f"originals: {session.originals.missing}"), file=sys.stderr)
        app = make_app(session, token, port)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, lifespan="off",
            timeout_graceful_shutdown=2,
        )  # fmt: skip
        print(f"labels: {printable(str(session.labels.file))}; Ctrl-C ends", flush=True)
        if browser:
            webbrowser.open(address)
        try:
            uvicorn.Server(config).run(sockets=[listener])
        finally:
            session.close()


def _listen(port: int) -> socket.socket:
    """Take a port of the loopback interface; connections wait until the server runs."""
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise UsageError(
            f"port {port} cannot be used ({error.strerror}): give another --port, or none"
        ) from None
    return listener


def find_embedding(
    what: str | os.PathLike[str],
    *,
    no_labels: bool = False,
    splits: Sequence[str] | None = None,
) -> Path:
    """Find the embedding of what the user gave; make it if there is none.

    Args:
        what: An embedding, a run folder or a source.
        no_labels: Whether to ignore the labels of the source.
        splits: Which folder or shard of the source is which split.

    Returns:
        The embedding file or folder. A new one is NAME.parquet in the current folder, or
        NAME-embedding.parquet where a file of this name is no embedding, such as the source.

    Raises:
        UsageError: There is nothing of this name, the file belongs to other images or would be
            among them, or an embedding is given with what is only for images.
        WorkFailed: The images cannot be embedded.
    """
    path = Path(os.path.abspath(what))
    name = path.name.split(".")[0] or "images"
    file = Path(f"{name}.parquet")
    if file.exists() and not is_embedding(file):
        file = Path(f"{name}-embedding.parquet")
    # What `explore .` has written in a folder of images is that of the folder, from anywhere.
    inside = path / f"{name}.parquet"
    has_own = inside.is_file() and is_embedding(inside) and _is_of(inside, path)
    if has_own:
        file = inside
    elif is_embedding(what):
        if no_labels or splits:
            raise UsageError(
                f"{printable(str(path))} is an embedding: --no-labels and --splits are for images "
                "that are to be embedded"
            )
        return path
    is_run = (path / "recipe.yaml").is_file()
    source = None if is_run else os.fspath(what)
    if file.exists():
        _check_same(file, path, source, no_labels, splits)
        print(f"{printable(str(file))} was made before: delete it to embed again", file=sys.stderr)
        return file
    if path == Path.cwd() and find_shards(str(path)):
        raise UsageError(
            f"{printable(str(file))} would be among the shards of this folder: go to another folder"
        )
    print(f"embedding into {printable(str(file))}", file=sys.stderr)
    if source is None:
        return embed(path, out=file, no_labels=no_labels, splits=splits)
    encoder = choose_encoder(None, None, source_names(source), 3, splits)
    run = encoder.run or encoder.name
    return embed(run, source, out=file, no_labels=no_labels, splits=splits)


def _is_of(file: Path, folder: Path) -> bool:
    """Whether an embedding was made of the images in a folder."""
    return read_embeddings(file).metadata.get("sources") == [str(folder)]


def _check_same(
    file: Path, run: Path, source: str | None, no_labels: bool, splits: Sequence[str] | None
) -> None:
    """Raise UsageError if an embedding was not made of this run or source, and in this way."""
    metadata = read_embeddings(file).metadata
    if source is not None:
        is_same = metadata.get("sources") == absolute_sources(source)
    else:
        is_same = os.path.abspath(str(metadata.get("run"))) == str(run)
        recipe = Run(run).recipe
        no_labels, splits = no_labels or recipe.no_labels, splits or recipe.splits
    if not is_same:
        raise UsageError(
            f"{printable(str(file))} is in the way and is of other images: go to another folder"
        )
    ways = metadata.get("no_labels", no_labels), metadata.get("splits") or []
    if ways != (no_labels, list(splits or [])):
        raise UsageError(
            f"{printable(str(file))} was made with another --no-labels or --splits: delete it, or "
            "go to another folder"
        )
