"""The verb `methods`."""

import argparse
import shutil

from simsiam.commands.output import print_lines

HELP = "print a table of all methods, or draw them as in Figure 3 of the paper"
GROUP = "laboratory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb.

    Args:
        parser: The verb's parser.
    """
    parser.add_argument(
        "--format",
        choices=("text", "markdown", "svg"),
        default="text",
        help="output format; svg draws Figure 3 [text]",
    )


def run(options: argparse.Namespace) -> None:
    """Run the verb.

    Args:
        options: The parsed arguments.
    """
    from simsiam.config import figure3

    formatters = {
        "text": lambda: figure3.format_methods_table(shutil.get_terminal_size().columns),
        "markdown": figure3.format_methods_markdown,
        "svg": figure3.draw_methods_svg,
    }
    print_lines(formatters[options.format]())
