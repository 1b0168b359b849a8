"""The annotated images of a transfer: which are trained on, select the lr, and are tested on."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from simsiam.detection import scenes
from simsiam.detection.annotations import AnnotatedSource, DetectionDataset, open_annotated
from simsiam.distributed.process_group import rank_zero_only
from simsiam.errors import UsageError

MIN_TRAIN_IMAGES = 20  # with fewer training images, none can be held out

SourcePath = str | os.PathLike[str]


class TransferSplits(NamedTuple):
    """Which images are used for what."""

    train: DetectionDataset  # the final detector is trained on these
    search_train: DetectionDataset  # the detectors of the lr search are trained on these ...
    val: DetectionDataset  # ... and compared on these
    test: DetectionDataset
    descriptions: dict[str, str]  # of train, test and val, for people


def list_sources(source: SourcePath | Sequence[SourcePath]) -> list[SourcePath]:
    """Put a single source into a list.

    Args:
        source: One source or several.

    Returns:
        The sources.
    """
    return [source] if isinstance(source, str | os.PathLike) else list(source)


def open_transfer_source(sources: Sequence[SourcePath], channels: int) -> AnnotatedSource:
    """Read annotated images.

    Args:
        sources: One of SOURCE_KINDS, or "shapes", the built-in scenes.
        channels: The number of channels that images are read with.

    Returns:
        The annotated images.

    Raises:
        UsageError: If the source is none of these.
        WorkFailed: If too many images are lost.
    """
    if [os.fspath(path) for path in sources] == ["shapes"]:
        folder = rank_zero_only(scenes.prepare_scenes)()
        return replace(open_annotated(folder, channels), name="shapes")
    return open_annotated(sources, channels)


def split_source(source: AnnotatedSource) -> TransferSplits:
    """Decide which images are used for training, for the lr search and for testing.

    With train, val and test splits, val selects the lr and is trained on in the end, as VOC's
    trainval is. Otherwise val is the test split, or else a fifth of the training images is; and a
    tenth of the training images, held out during the search only, selects the lr.

    Args:
        source: The annotated images.

    Returns:
        The splits.

    Raises:
        UsageError: If there are too few images to hold some out.
    """
    splits = source.splits
    train = splits["train"]
    if "test" in splits and "val" in splits:
        return _with_objects(
            source.name,
            train.concat(splits["val"]),
            train,
            splits["val"],
            splits["test"],
            {"train": "train and val", "test": "test", "val": "val"},
        )
    if len(train) < MIN_TRAIN_IMAGES:
        raise UsageError(
            f"{source.name} has {len(train)} training images; "
            f"it needs at least {MIN_TRAIN_IMAGES}, because some are held out"
        )
    test_name = "test" if "test" in splits else "val"
    descriptions = {"train": "train", "test": test_name, "val": "a tenth of train"}
    test = splits.get(test_name)
    if test is None:
        train, test = train.hold_out(len(train) // 5)
        descriptions |= {"train": "four fifths of train", "test": "a fifth of train"}
    search_train, val = train.hold_out(max(1, len(train) // 10))
    return _with_objects(source.name, train, search_train, val, test, descriptions)


def _with_objects(
    name: str,
    train: DetectionDataset,
    search_train: DetectionDataset,
    val: DetectionDataset,
    test: DetectionDataset,
    descriptions: dict[str, str],
) -> TransferSplits:
    """Leave the training images without an object out."""
    train, search_train = train.trainable_subset(), search_train.trainable_subset()
    if not len(train) or not len(search_train):
        raise UsageError(f"{name} has too few training images with objects")
    return TransferSplits(train, search_train, val, test, descriptions)
