"""The verb `adapt`."""

import argparse

from simsiam.commands.arguments import (
    CHANNELS_NOTE,
    WEIGHTS_KINDS,
    add_backbone,
    add_device,
    add_limit,
    add_no_labels,
    add_precision,
    add_source,
    add_splits,
)
from simsiam.commands.output import print_lines

HELP = "find good features for your own images in minutes, with or without published weights"
GROUP = "training"
USAGE = "simsiam adapt SOURCE [SOURCE ...] [--init WEIGHTS] [--minutes N] [--FLAG VALUE ...]"
EPILOG = (
    "The command tries several encoders, the simplest first. An encoder replaces the best one so "
    "far only if its score on held-out images is significantly higher (one-sided test, 95 %). The "
    "score needs no labels; if there are labels, kNN accuracy is printed beside it. adapt.json in "
    "the run folder lists all encoders with their scores."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb.

    Args:
        parser: The verb's parser.
    """
    add_source(parser, "+")
    note = (
        f"weights to start from: a run folder, {WEIGHTS_KINDS} [none; the command then tries only "
        "features of small image patches, which it learns from the images without a network]"
    )
    parser.add_argument("--init", metavar="WEIGHTS", help=note)
    add_backbone(parser, "WEIGHTS")
    note = (
        "time limit of the whole command in minutes; encoders that cannot be measured in this time "
        "are left out. If both --minutes and --init are given, the remaining time is used to "
        "train the network with SimSiam; otherwise no network is trained [no limit]"
    )
    parser.add_argument("--minutes", metavar="N", type=float, help=note)
    add_no_labels(parser)
    add_splits(parser)
    note = "the run folder to write [runs/SOURCE-adapt-N]"
    parser.add_argument("--out", metavar="RUN", help=note)
    note = f"{CHANNELS_NOTE} [those of --init, else 3]"
    parser.add_argument("--channels", metavar="N", type=int, help=note)
    add_limit(parser)
    note = "random seed, for the choice of the images that are measured and for training [0]"
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
