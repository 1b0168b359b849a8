"""The verb `inspect`."""

import argparse

from simsiam.commands.arguments import add_channels, add_no_labels, add_source, add_splits

HELP = (
    "show what a source contains (image sizes, formats, labels, duplicates, broken files), which "
    "recipe `simsiam pretrain` would choose for it, and how long training would take"
)
GROUP = "data"
USAGE = "simsiam inspect SOURCE [SOURCE ...] [--channels N] [--no-labels] [--FLAG ...]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb.

    Args:
        parser: The verb's parser.
    """
    add_source(parser, "+")
    add_channels(parser)
    add_no_labels(parser)
    add_splits(parser)
    parser.add_argument(
        "--out", metavar="FILE.json", help="also write the results to this JSON file"
    )


def run(options: argparse.Namespace) -> None:
    """Run the verb.

    Args:
        options: The parsed arguments.
    """
    from simsiam.training.inspect import inspect

    settings = vars(options)
    inspect(settings.pop("source"), **settings)
