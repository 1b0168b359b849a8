"""The verb `shard`."""

import argparse

from simsiam.commands.arguments import (
    add_accept_changed_source,
    add_channels,
    add_no_labels,
    add_source,
    add_splits,
)

HELP = (
    "pack the images of a source into a few large files, tar or Parquet; "
    "after an interruption, give the same command again to go on"
)
GROUP = "data"
USAGE = (
    "simsiam shard SOURCE [SOURCE ...] --out FOLDER [--format NAME] [--per-shard N] [--channels N] "
    "[--no-labels]"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb.

    Args:
        parser: The verb's parser.
    """
    add_source(parser, "+")
    note = "a new folder; it has a temporary name until all images are written"
    parser.add_argument("--out", metavar="FOLDER", required=True, help=note)
    note = "tar (as in WebDataset) or parquet (as in Hugging Face datasets) [tar]"
    parser.add_argument("--format", metavar="NAME", default="tar", help=note)
    note = "images in a shard [10000]"
    parser.add_argument("--per-shard", metavar="N", type=int, default=10_000, help=note)
    add_channels(parser)
    add_accept_changed_source(
        parser,
        "begin again with the images as they are, if they have changed since an earlier command "
        "wrote the first parts; without this flag, the command then ends with a line that says so",
    )
    add_no_labels(parser)
    add_splits(parser)


def run(options: argparse.Namespace) -> None:
    """Run the verb.

    Args:
        options: The parsed arguments.
    """
    from simsiam.sources.write_shards import format_shard_summary, write_shards

    settings = vars(options)
    print(format_shard_summary(write_shards(settings.pop("source"), **settings)))
