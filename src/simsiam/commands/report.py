"""The verb `report`."""

import argparse

from simsiam.commands.arguments import WEIGHTS_KINDS, add_backbone, add_no_labels
from simsiam.commands.output import print_lines

HELP = (
    "write a web page about one or more runs: verdict, results, curves, views, and a 2-D map that "
    "places images by their features; or about embeddings: the map, clusters and neighbors"
)
GROUP = "run folders"
USAGE = "simsiam report RUN or FILE.parquet [...] [--out FILE.html] [--limit N] [--FLAG ...]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb.

    Args:
        parser: The verb's parser.
    """
    note = (
        "one or more run folders, or files or folders that `simsiam embed` wrote, or weights: "
        f"{WEIGHTS_KINDS}"
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help=note)
    add_backbone(parser, "RUN")
    note = (
        "the page; an existing file is replaced [report.html in the first RUN; for FILE.parquet, "
        "FILE-report.html beside it]"
    )
    parser.add_argument("--out", metavar="FILE.html", help=note)
    note = (
        "where the images of RUN are. Without it, the place in the recipe of RUN is used, if you "
        "have named it in an earlier command, as in `simsiam pretrain` [as in the recipe]"
    )
    parser.add_argument("--source", metavar="SOURCE", nargs="+", help=note)
    note = "number of images on the map, evenly spaced in the source [3000]"
    parser.add_argument("--limit", metavar="N", type=int, default=3000, help=note)
    note = "do not read images; the page then has no views and no map"
    parser.add_argument("--no-map", dest="images", action="store_false", help=note)
    add_no_labels(parser)


def run(options: argparse.Namespace) -> None:
    """Run the verb.

    Args:
        options: The parsed arguments.
    """
    from simsiam.pages.report import report

    page = report(**vars(options))
    print_lines(f"{page}: {page.stat().st_size / 1e6:.1f} MB")
