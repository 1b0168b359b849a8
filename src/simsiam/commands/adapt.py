"""The verb `adapt`."""

import argparse

from simsiam.commands.arguments import (
    WEIGHTS_KINDS,
    add_backbone,
    add_channels,
    add_device,
    add_limit,
    add_no_labels,
    add_precision,
    add_source,
)
from simsiam.commands.output import print_lines

HELP = "find the best features for your own images: in minutes, with or without published weights"
GROUP = "training"
USAGE = "simsiam adapt SOURCE [--init WEIGHTS] [--minutes N] [--out RUN] [--FLAG VALUE ...]"
EPILOG = (
    "Tries encoders one after the other, from the simplest on, and takes one only if images that "
    "nothing was fitted on say, without labels, that it is better than the best before. adapt.json "
    "in the run folder lists what was tried."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb.

    Args:
        parser: The verb's parser.
    """
    add_source(parser, "+")
    note = f"weights to start from: {WEIGHTS_KINDS} [none: patches, learned from the images alone]"
    parser.add_argument("--init", metavar="WEIGHTS", help=note)
    add_backbone(parser, "WEIGHTS")
    note = "time limit in minutes, from start to end; what does not fit is left out [none]"
    parser.add_argument("--minutes", metavar="N", type=float, help=note)
    add_no_labels(parser)
    note = "the run folder to write [runs/SOURCE-adapt-N]"
    parser.add_argument("--out", metavar="RUN", help=note)
    add_channels(parser)
    add_limit(parser)
    note = "random seed of the sample and of training [0]"
    parser.add_argument("--seed", metavar="N", type=int, default=0, help=note)
    add_device(parser)
    add_precision(parser)


def run(options: argparse.Namespace) -> None:
    """Run the verb.

    Args:
        options: The parsed arguments.
    """
    from simsiam.training.adaptation.adapt import adapt

    print_lines(adapt(**vars(options)))
