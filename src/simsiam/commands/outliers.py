"""The verb `outliers`."""

import argparse

from simsiam.commands.arguments import add_csv, add_embeddings, add_html
from simsiam.commands.output import print_lines

HELP = "find the images that are least similar to all others"
GROUP = "embeddings"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb.

    Args:
        parser: The verb's parser.
    """
    add_embeddings(parser)
    note = "number of nearest neighbors that the distance is averaged over [10]"
    parser.add_argument("--k", metavar="N", type=int, default=10, help=note)
    add_csv(parser, "path, label and distance")
    add_html(parser, "the first of them")


def run(options: argparse.Namespace) -> None:
    """Run the verb.

    Args:
        options: The parsed arguments.
    """
    from simsiam.embeddings.outliers import format_outliers, outliers

    print_lines(format_outliers(outliers(**vars(options))))
