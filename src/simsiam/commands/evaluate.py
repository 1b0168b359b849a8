"""The verb `evaluate`."""

import argparse
from typing import get_type_hints

from simsiam.commands.arguments import (
    PAPER_NOTE,
    add_device,
    add_no_labels,
    add_precision,
    add_run,
    add_setting_flags,
    add_source,
    add_splits,
)
from simsiam.config.protocols import FROZEN_PROTOCOLS, PROTOCOLS, Settings

HELP = (
    "measure the quality of a backbone with one or more protocols, "
    "and write RUN/evaluations/PROTOCOL.json"
)
GROUP = "evaluation"
USAGE = "simsiam evaluate RUN [SOURCE ...] [--protocol NAME ...] [--FLAG VALUE ...]"
EPILOG = (
    "Values in brackets are the defaults. "
    "Test images are those of the split `test` of the source; if there is none, those of `val`; "
    "if there is neither, a fifth of the training images, or, if the run was trained with their "
    f"labels, those that training held out. {PAPER_NOTE}"
)
MULTI_PROCESS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb.

    Args:
        parser: The verb's parser.
    """
    add_run(parser, weights=True, source=True)
    add_source(parser, "*", "the source of the run; required for weights")
    parser.add_argument(
        "--protocol",
        dest="protocols",
        metavar="NAME",
        nargs="+",
        help=f"protocols: {', '.join(PROTOCOLS)}; few_label is a classifier from few labels, and "
        "label_free measures what needs no labels, such as alignment and RankMe "
        f"[{', '.join(FROZEN_PROTOCOLS)}; without labels, only label_free]",
    )
    note = "last, best (highest kNN accuracy during training) or epoch-NNNN [last]"
    parser.add_argument("--checkpoint", metavar="NAME", default="last", help=note)
    add_device(parser)
    add_precision(parser)
    note = "use only N training images and N test images, evenly spaced in the source [all]"
    parser.add_argument("--limit", metavar="N", type=int, help=note)
    add_no_labels(parser)
    add_splits(parser)
    add_setting_flags(parser, Settings, "protocol settings", get_type_hints(Settings))


def run(options: argparse.Namespace) -> None:
    """Run the verb.

    Args:
        options: The parsed arguments.
    """
    from simsiam.evaluation.evaluate import evaluate

    evaluate(**vars(options))
