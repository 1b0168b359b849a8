"""The verb `duplicates`."""

import argparse

from simsiam.commands.arguments import add_csv, add_embeddings, add_html
from simsiam.commands.output import print_lines

HELP = "find groups of copies of the same image, including resized and recompressed copies"
GROUP = "embeddings"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb.

    Args:
        parser: The verb's parser.
    """
    add_embeddings(parser)
    note = (
        "two images are copies if their distance is at most X; images that are linked by a chain "
        "of such pairs form one group. The distance is the RMS difference of two thumbnails, "
        "divided by the standard deviation of their pixels; for unrelated images it is about 1.4 "
        "[0.28]"
    )
    parser.add_argument(
        "--threshold", metavar="X", type=float, default=argparse.SUPPRESS, help=note
    )
    add_csv(parser, "group, path and distance")
    add_html(parser, "the groups")


def run(options: argparse.Namespace) -> None:
    """Run the verb.

    Args:
        options: The parsed arguments.
    """
    from simsiam.embeddings.duplicates import duplicates, format_duplicates

    print_lines(format_duplicates(duplicates(**vars(options))))
