"""The verb `export`."""

import argparse

from simsiam.commands.arguments import add_run
from simsiam.commands.output import print_lines
from simsiam.exports import format_names

HELP = (
    "write the backbone of a run, and its linear map where the format can hold it, in a format of "
    "another library; check that the exported file gives the same output"
)
GROUP = "checkpoints"
USAGE = "simsiam export RUN --format NAME [--out FOLDER] [--license NAME] [--push OWNER/NAME]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb.

    Args:
        parser: The verb's parser.
    """
    add_run(parser, weights=True)
    note = f"the format: {', '.join(format_names())}"
    parser.add_argument("--format", metavar="NAME", required=True, help=note)
    note = "a new folder; required if RUN is not a run folder [RUN/exports/FORMAT]"
    parser.add_argument("--out", metavar="FOLDER", help=note)
    note = "with --format huggingface: license of the weights, for the model card"
    parser.add_argument("--license", metavar="NAME", help=note)
    note = (
        "with --format huggingface: also upload to this repository; if it does not exist, it is "
        "created as private. Without this flag nothing is uploaded"
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help=note)


def run(options: argparse.Namespace) -> None:
    """Run the verb.

    Args:
        options: The parsed arguments.
    """
    from simsiam.exports.export import export, format_export

    print_lines(format_export(export(**vars(options))))
