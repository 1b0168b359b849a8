"""The verb `neighbors`."""

import argparse

from simsiam.commands.arguments import add_embeddings, add_html
from simsiam.commands.output import print_lines

HELP = "find the images most similar to a given image"
GROUP = "embeddings"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb.

    Args:
        parser: The verb's parser.
    """
    add_embeddings(parser)
    note = "path or file name of an image in FILE.parquet, or any other image file"
    parser.add_argument("query", metavar="QUERY", help=note)
    note = "number of images to find [10]"
    parser.add_argument("--k", metavar="N", type=int, default=10, help=note)
    add_html(parser, "the images found")


def run(options: argparse.Namespace) -> None:
    """Run the verb.

    Args:
        options: The parsed arguments.
    """
    from simsiam.embeddings.neighbors import format_neighbors, neighbors

    print_lines(format_neighbors(neighbors(**vars(options))))
