"""The verb `compare`."""

import argparse

HELP = "show how runs differ in settings and results"
GROUP = "run folders"
USAGE = "simsiam compare RUN RUN [RUN ...]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb.

    Args:
        parser: The verb's parser.
    """
    parser.add_argument("runs", metavar="RUN", nargs="+", help="two or more run folders")


def run(options: argparse.Namespace) -> None:
    """Run the verb.

    Args:
        options: The parsed arguments.
    """
    from simsiam.pages.compare import compare

    compare(options.runs)
