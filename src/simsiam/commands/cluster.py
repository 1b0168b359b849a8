"""The verb `cluster`."""

import argparse

from simsiam.commands.arguments import add_csv, add_embeddings, add_html
from simsiam.commands.output import print_lines

HELP = "group similar images (k-means)"
GROUP = "embeddings"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb.

    Args:
        parser: The verb's parser.
    """
    add_embeddings(parser)
    note = "number of clusters [10]"
    parser.add_argument("--clusters", metavar="N", type=int, default=10, help=note)
    note = "random seed of the initial centers [0]"
    parser.add_argument("--seed", metavar="N", type=int, default=0, help=note)
    add_csv(parser, "path, cluster and distance")
    add_html(parser, "images of each cluster")


def run(options: argparse.Namespace) -> None:
    """Run the verb.

    Args:
        options: The parsed arguments.
    """
    from simsiam.embeddings.cluster import cluster, format_cluster

    print_lines(format_cluster(cluster(**vars(options))))
    if options.out is None and options.html is None:
        print("--out FILE.csv lists the images of each cluster, --html FILE.html shows them")
