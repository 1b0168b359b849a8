"""The verb `embed`."""

import argparse

from simsiam.commands.arguments import (
    add_accept_changed_source,
    add_device,
    add_limit,
    add_no_labels,
    add_precision,
    add_run,
    add_source,
    add_splits,
)
from simsiam.commands.output import print_lines

HELP = (
    "compute the features of all images, and write them with thumbnails to a Parquet file; after "
    "an interruption, give the same command again to go on"
)
GROUP = "embeddings"
USAGE = "simsiam embed RUN [SOURCE ...] --out FILE.parquet [--limit N] [--FLAG VALUE ...]"
MULTI_PROCESS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb.

    Args:
        parser: The verb's parser.
    """
    add_run(parser, weights=True, source=True)
    add_source(parser, "*", "the source of the run; required for weights")
    note = (
        "a new .parquet file; or a folder, for files of about 100,000 images each; or a .npy file, "
        "with the paths in a .csv of the same name. neighbors, duplicates, cluster, outliers and "
        "probe cannot read .npy"
    )
    parser.add_argument("--out", metavar="FILE.parquet", required=True, help=note)
    note = (
        "tensorboard: a folder with vectors, names and thumbnails for `tensorboard --logdir "
        "FOLDER`, page Projector; fiftyone: a folder for FiftyOne, `fiftyone.Dataset.from_dir("
        "FOLDER, dataset_type=fiftyone.types.LegacyFiftyOneDataset)` [as the ending of --out says]"
    )
    parser.add_argument("--format", metavar="F", help=note)
    add_limit(parser)
    add_accept_changed_source(
        parser,
        "begin again with the images as they are, if they have changed since an earlier command "
        "wrote the first parts; without this flag, the command then ends with a line that says so",
    )
    add_no_labels(parser)
    add_splits(parser)
    add_device(parser)
    add_precision(parser)


def run(options: argparse.Namespace) -> None:
    """Run the verb.

    Args:
        options: The parsed arguments.
    """
    from simsiam.embeddings.embed import embed

    print_lines(embed(**vars(options)))
