"""The verb `preview`."""

import argparse

from simsiam.commands.arguments import SETTINGS_NOTE, add_recipe_flags, add_source
from simsiam.commands.output import print_lines

HELP = "save a picture of some images and of the views that training would make of them"
GROUP = "data"
USAGE = "simsiam preview SOURCE [SOURCE ...] --out FILE.png [--FLAG VALUE ...]"
EPILOG = (
    "The settings are those of `simsiam pretrain`. Settings that do not change the views, such as "
    f"--optimizer, have no effect here. {SETTINGS_NOTE}"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb.

    Args:
        parser: The verb's parser.
    """
    add_source(parser, "+")
    note = "the picture; an existing file is replaced"
    parser.add_argument("--out", metavar="FILE.png", required=True, help=note)
    parser.add_argument("--rows", metavar="N", type=int, default=8, help="number of images [8]")
    add_recipe_flags(parser)


def run(options: argparse.Namespace) -> None:
    """Run the verb.

    Args:
        options: The parsed arguments.
    """
    from simsiam.pages.preview import preview

    settings = vars(options)
    print_lines(preview(settings.pop("source"), **settings))
