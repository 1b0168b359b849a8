"""The verb `explore`."""

import argparse
import os
import signal
import sys

from simsiam.commands.arguments import add_no_labels, add_splits

HELP = "look at, search, label and clean up images in the browser, on this machine alone"
GROUP = "embeddings"
USAGE = "simsiam explore FILE.parquet or RUN or SOURCE [--no-browser] [--port N] [--FLAG VALUE ...]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb.

    Args:
        parser: The verb's parser.
    """
    note = (
        "a file or folder that `simsiam embed` wrote; or a run folder, or images, as for `simsiam "
        "pretrain`, which are embedded first, into NAME.parquet in the current folder, or into "
        "NAME-embedding.parquet if that is a file of images. Labels are written into "
        "NAME.labels.csv beside it, decisions into NAME.decisions.csv"
    )
    parser.add_argument("what", metavar="FILE.parquet", help=note)
    note = "do not open the browser; the first line printed is the address"
    parser.add_argument("--no-browser", dest="browser", action="store_false", help=note)
    note = "the port to listen on, of this machine alone [any free one]"
    parser.add_argument("--port", metavar="N", type=int, default=0, help=note)
    note = "where the images are, if they have moved since they were embedded"
    parser.add_argument("--root", metavar="FOLDER", help=note)
    add_no_labels(parser)
    add_splits(parser)


def run(options: argparse.Namespace) -> None:
    """Run the verb.

    Args:
        options: The parsed arguments.
    """
    from simsiam.explore.explore import explore

    try:
        explore(**vars(options))
    except KeyboardInterrupt as stop:
        # At the end of Python, work in the background would hold the process for minutes.
        print("explore has ended; labels and decisions are saved", file=sys.stderr, flush=True)
        os._exit(128 + int(*stop.args or [signal.SIGINT]))
