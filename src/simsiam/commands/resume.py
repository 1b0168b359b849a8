"""The verb `resume`."""

import argparse

from simsiam.commands.arguments import add_accept_changed_source, add_logger, add_run
from simsiam.commands.output import print_run_summary

HELP = (
    "continue a run from its last checkpoint; with the same torch version, kind of device, "
    "precision and numbers of threads and processes, the result is bit-identical to that of an "
    "uninterrupted run"
)
GROUP = "training"
MULTI_PROCESS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb.

    Args:
        parser: The verb's parser.
    """
    add_run(parser)
    note = (
        "extend the run to N epochs; this changes the lr schedule, so the result is not that of "
        "a run with N epochs from the start"
    )
    parser.add_argument("--epochs", metavar="N", type=int, help=note)
    note = (
        "where the images of the run are now, if they have moved; or, for a run that is not yours, "
        "where they are [as in the recipe]"
    )
    parser.add_argument("--source", metavar="SOURCE", nargs="+", help=note)
    add_accept_changed_source(
        parser,
        "go on although images of the run are missing, new, renamed, labeled otherwise or have "
        "another content; without this flag, the command ends with a line that says what changed",
    )
    add_logger(parser, None)


def run(options: argparse.Namespace) -> None:
    """Run the verb.

    Args:
        options: The parsed arguments.
    """
    from simsiam.training.launch import resume

    settings = vars(options)
    print_run_summary(resume(settings.pop("run"), **settings))
