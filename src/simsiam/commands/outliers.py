"""The verb `outliers`."""

import argparse

from simsiam.commands.arguments import add_csv, add_embeddings, add_html
from simsiam.commands.output import print_lines

HELP = "list the images that are farthest from their nearest neighbors"
GROUP = "embeddings"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb.

    Args:
        parser: The verb's parser.
    """
    add_embeddings(parser)
    note = "number of nearest neighbors to average the distance over [10]"
    parser.add_argument("--k", metavar="N", type=int, default=10, help=note)
    add_csv(parser, "path, label and distance")
    add_html(parser, "the 60 farthest images")


def run(options: argparse.Namespace) -> None:
    """Run the verb.

    Args:
        options: The parsed arguments.
    """
    from simsiam.embeddings.outliers import format_outliers, outliers

    print_lines(format_outliers(outliers(**vars(options))))
