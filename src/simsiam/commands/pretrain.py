"""The verb `pretrain`."""

import argparse

from simsiam.commands.arguments import SETTINGS_NOTE, add_logger, add_recipe_flags, add_source
from simsiam.commands.output import print_run_summary
from simsiam.pages.words import PROGRESS_WORDS, WORDS

HELP = "train a backbone on images without labels, and write a run folder"
GROUP = "training"
USAGE = "simsiam pretrain [SOURCE ...] [--out RUN] [--FLAG VALUE ...]"
EPILOG = f"{SETTINGS_NOTE} Words of the progress line: " + " ".join(
    f"{word.upper()}: {WORDS[word]}" for word in PROGRESS_WORDS
)
MULTI_PROCESS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb.

    Args:
        parser: The verb's parser.
    """
    add_source(parser, "*", "the source in --recipe FILE, else shapes")
    note = "the run folder, which must not exist yet [runs/SOURCE-METHOD-N]"
    parser.add_argument("--out", metavar="RUN", help=note)
    note = (
        "end after N minutes on this machine, evaluation included; the number of steps is chosen "
        "to fit this time; so are the size of views, stem, width and batch size, unless they are "
        "given [no limit]"
    )
    parser.add_argument("--minutes", metavar="N", type=float, help=note)
    add_logger(parser, "tensorboard")
    add_recipe_flags(parser)


def run(options: argparse.Namespace) -> None:
    """Run the verb.

    Args:
        options: The parsed arguments.
    """
    from simsiam.training.launch import pretrain

    print_run_summary(pretrain(**vars(options)))
