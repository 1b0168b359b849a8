"""The verb `probe`."""

import argparse

from simsiam.commands.arguments import add_csv, add_embeddings
from simsiam.commands.output import print_lines

HELP = "predict labels for all images from a few labeled ones (logistic regression)"
GROUP = "embeddings"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb.

    Args:
        parser: The verb's parser.
    """
    add_embeddings(parser)
    note = (
        "a table with the columns path and label; rows without a label are ignored. To "
        "improve the result, fill in labels in the table that an earlier `simsiam probe --out` "
        "wrote, and give that table here"
    )
    parser.add_argument("labels", metavar="LABELS.csv", help=note)
    add_csv(parser, "path, label, predicted and confidence", required=True)


def run(options: argparse.Namespace) -> None:
    """Run the verb.

    Args:
        options: The parsed arguments.
    """
    from simsiam.embeddings.probe import format_probe, probe

    print_lines(format_probe(probe(**vars(options))))
