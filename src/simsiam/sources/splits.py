"""Splits: which images of a source are for training, for validation and for the test.

The names of folders and shards decide, unless `--splits` does. What the names decided is said in
notes, because a name can mislead: a class may be called "train". This module does not import torch.
"""

import os
import posixpath
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from simsiam.errors import UsageError, unknown_name
from simsiam.utils.names import slashed

SPLITS = ("train", "val", "test")
# Words in the names of folders and shards, and the split that they name.
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "trainval": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "eval": "val",
    "evaluation": "val",
    "test": "test",
    "testing": "test",
}
WHOLE_SOURCE = "."  # as in --splits train=.
# Words that folders of images have besides that of a split, as in "test_images" and "trainset".
FILLERS = "images?|imgs?|pics?|photos?|data|set|split|jpe?gs?|pngs?"
_WORD = "|".join(sorted(SPLIT_WORDS, key=len, reverse=True))
_FILLED = rf"(?:(?:{FILLERS})[^/a-z]*)*"
SPLIT_LIKE = rf"[^/a-z]*{_FILLED}(?:{_WORD})[^/a-z]*{_FILLED}"  # the name of a folder
# Names of folders that hold annotations in the form of images, and of the images beside them.
ANNOTATION_NAMES = (
    r"(?i)^(gt|ground.?truth|masks?|labels?|annotations?|segmentation[a-z]*|trimaps?)$"
)
IMAGE_NAMES = r"(?i)^(images?|imgs?|pics?|photos?|jpe?gs?|jpegimages)$"
MAX_NAMES = 5  # names that a note lists
NAME_CHUNK = 10_000  # file names that are Python objects at the same time


class SplitPlace(NamedTuple):
    """What a value of `--splits` says.

    Attributes:
        split: "train", "val" or "test".
        place: A folder or a shard, relative to the source; "*" stands for any characters of a
            name. WHOLE_SOURCE for the source itself.
    """

    split: str
    place: str

    @property
    def depth(self) -> int:
        """The number of folders of the place."""
        return 0 if self.place == WHOLE_SOURCE else self.place.count("/") + 1

    @property
    def pattern(self) -> str:
        """A regular expression for the beginning of a path, which ends in "/" for a shard."""
        escaped = re.escape(f"{self.place}/").replace(r"\*", "[^/]*")
        return "" if self.place == WHOLE_SOURCE else escaped


def parse_splits(values: Iterable[str] | None) -> list[SplitPlace]:
    """Read the values of `--splits`.

    Args:
        values: Texts such as "train=photos/A"; None if names decide.

    Returns:
        What they say; [] if names decide.

    Raises:
        UsageError: A value is wrong, or none is for train.
    """
    if values is None:
        return []
    places = []
    for value in values:
        split, _, folder = value.partition("=")
        if split not in SPLITS:
            raise unknown_name("split in --splits", split, SPLITS)
        place = posixpath.normpath(slashed(folder) or "..")
        if place.startswith(("/", "..")):
            raise UsageError(
                f"--splits {value}: after = comes a folder inside of the source, as in "
                f"{split}=photos; {split}=. is the whole source"
            )
        places.append(SplitPlace(split, place))
    if "train" not in [place.split for place in places]:
        raise UsageError("--splits has no train=FOLDER: say which images are for training")
    return places


def canonical_split(folder: str) -> str | None:
    """Return the split that a folder's name is the name of.

    Args:
        folder: The name.

    Returns:
        "train", "val" or "test"; None if it is another name.
    """
    return SPLIT_WORDS.get(folder.lower())


def words_of_splits(path: str) -> list[str]:
    """Return the splits that a shard's name has words of, or else those of its folders.

    Args:
        path: The path of the shard in the source, such as "imagenet1k-validation-00.tar" or
            "default/train/0000.parquet".

    Returns:
        The different splits, in the order of their words; [] if there is no such word.
    """
    for name in reversed(path.lower().split("/")):
        words = [word for word in re.findall("[a-z]+", name) if word in SPLIT_WORDS]
        if words:
            return list(dict.fromkeys(SPLIT_WORDS[word] for word in words))
    return []


def path_component(paths: pa.Array, depth: int) -> pa.DictionaryArray:
    """Return the name of each path's folder at a depth.

    Args:
        paths: Paths with "/", large_binary.
        depth: 0 for the first folder.

    Returns:
        The names; null for a path that has no such folder.
    """
    pattern, names = "^" + "[^/]*/" * depth + "(?P<name>[^/]*)/", []
    for start in range(0, len(paths), NAME_CHUNK):
        matches = pc.extract_regex(paths[start : start + NAME_CHUNK], pattern)
        names.append(matches.flatten()[0].dictionary_encode())  # `field` would lose the nulls
    chunked = pa.chunked_array(names, pa.dictionary(pa.int32(), paths.type))
    return chunked.unify_dictionaries().combine_chunks()


# --- folders and archives -----------------------------------------------------------------------


class SplitPart(NamedTuple):
    """Images of a split.

    Attributes:
        split: "train", "val" or "test".
        rows: Their positions, int64, increasing.
        depth: The depth of the folders that are their classes.
    """

    split: str
    rows: np.ndarray
    depth: int


def named_parts(folders: pa.DictionaryArray, depth: int) -> list[SplitPart]:
    """Find splits by the names of folders.

    Args:
        folders: The folder of each image at a depth, as `path_component` returns it.
        depth: This depth.

    Returns:
        The parts of the splits; [] if no folder is for training.
    """
    splits = [canonical_split(os.fsdecode(name)) for name in folders.dictionary.to_pylist()]
    codes = folders.indices.fill_null(-1).to_numpy()
    parts = [
        SplitPart(split, np.flatnonzero(codes == code), depth + 1)
        for code, split in enumerate(splits)
        if split is not None
    ]
    return parts if "train" in splits else []


def given_parts(keys: pa.Array, values: Iterable[str] | None, depth: int) -> list[SplitPart]:
    """Find the splits that `--splits` names.

    Args:
        keys: The paths of all images.
        values: The values of `--splits`.
        depth: The number of outer folders, which contain everything.

    Returns:
        The parts of the splits; [] if `--splits` is not given.

    Raises:
        UsageError: A value is wrong, a place has no image, or an image is in two splits.
    """
    parts, seen = list[SplitPart](), np.zeros(len(keys), bool)
    for given in parse_splits(values):
        inside = pc.match_substring_regex(keys, "^" + "[^/]*/" * depth + given.pattern)
        rows = np.flatnonzero(inside.to_numpy(zero_copy_only=False))
        if not len(rows):
            folders = sorted(path_component(keys, depth).dictionary.to_pylist())
            there = join_names(list(map(os.fsdecode, folders))) or "none"
            raise UsageError(
                f"--splits {given.split}={given.place}: the source has no image in this folder; "
                f"its folders of images are {there}"
            )
        if (twice := rows[seen[rows]]).size:
            name = os.fsdecode(keys[int(twice[0])].as_py())
            raise UsageError(f"--splits names {name} twice: an image is in one split only")
        seen[rows] = True
        parts.append(SplitPart(given.split, rows, depth + given.depth))
    return parts


# --- shards -------------------------------------------------------------------------------------


def shard_splits(
    names: Mapping[str, str], values: Iterable[str] | None
) -> tuple[dict[str, str], list[str]]:
    """Find the split of each shard.

    Args:
        names: The name of each shard, such as "train-00.tar" or "train/00.tar", by its path or URL.
        values: The values of `--splits`; None lets names decide.

    Returns:
        The split of each shard that is used, by its path; and lines about what names decided.

    Raises:
        UsageError: A value is wrong, no shard has the name that it says, or one has two.
    """
    if given := parse_splits(values):
        return _given_shard_splits(names, given)
    named = {path: words_of_splits(name) for path, name in names.items()}
    splits = {path: found[0] if found else "train" for path, found in named.items()}
    notes, unnamed = list[str](), [names[path] for path, found in named.items() if not found]
    ambiguous = [names[path] for path, found in named.items() if len(found) > 1]
    if ambiguous:
        notes.append(
            "shards whose names have words of several splits, of which the first is taken: "
            f"{join_names(ambiguous)}; --splits says which shard is what"
        )
    if "train" not in splits.values():
        if len(names) > 1:
            there = " and ".join(split for split in SPLITS if split in splits.values())
            notes.append(
                f"no shard is named train, so the shards of {there} are for training; --splits "
                "says which shard is what"
            )
        return dict.fromkeys(names, "train"), notes
    if 0 < len(unnamed) < len(names):
        notes.append(
            "shards whose names have no word of a split, and which are for training: "
            f"{join_names(unnamed)}; --splits says which shard is what"
        )
    return splits, notes


def _given_shard_splits(
    names: Mapping[str, str], given: Sequence[SplitPlace]
) -> tuple[dict[str, str], list[str]]:
    """Return the split of each shard that `--splits` names, and a line about the others."""
    splits = dict[str, str]()
    for place in given:
        matching = [path for path, name in names.items() if re.match(place.pattern, f"{name}/")]
        if not matching:
            there = join_names(list(names.values()))
            raise UsageError(
                f"--splits {place.split}={place.place}: no shard has this name; there are {there}"
            )
        if twice := [names[path] for path in matching if path in splits]:
            raise UsageError(f"--splits names {twice[0]} twice: a shard is in one split only")
        splits |= dict.fromkeys(matching, place.split)
    left_out = [name for path, name in names.items() if path not in splits]
    note = f"shards in no split, which are left out: {join_names(left_out)}"
    return {path: splits[path] for path in names if path in splits}, [note] if left_out else []


# --- notes --------------------------------------------------------------------------------------


def join_names(names: Sequence[str]) -> str:
    """List the first names.

    Args:
        names: The names.

    Returns:
        At most MAX_NAMES of them, and how many more there are.
    """
    more = f" and {len(names) - MAX_NAMES:,} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


def note_left_out(keys: pa.Array, rows: np.ndarray, depth: int, given: bool) -> list[str]:
    """Say which images are in no split.

    Args:
        keys: The paths of all images.
        rows: The positions of those that are in no split.
        depth: Depth of the folders to name.
        given: Whether `--splits` was given.

    Returns:
        One line; none if there are no such images.
    """
    if not len(rows):
        return []
    counts = pc.value_counts(path_component(keys.take(pa.array(rows)), depth)).to_pylist()
    folders = [
        f"{entry['counts']:,} in {os.fsdecode(entry['values'])}/"
        if entry["values"] is not None
        else f"{entry['counts']:,} in no folder"
        for entry in sorted(counts, key=lambda entry: -entry["counts"])
    ]
    hint = "" if given else "; --splits says which folder is what, --splits train=. takes all"
    return [f"images in no split, which are left out: {len(rows):,} ({join_names(folders)}){hint}"]


def note_split_like(keys: pa.Array, depth: int, labeled: bool) -> list[str]:
    """Say which folders have names like those of splits, although no folder is taken as a split.

    Args:
        keys: The paths of the images.
        depth: The number of outer folders, which contain everything.
        labeled: Whether the names of folders are labels.

    Returns:
        One line; none if there are no such folders.
    """
    outer, places = "[^/]*/" * depth, set[bytes | None]()
    for start in range(0, len(keys), NAME_CHUNK):
        matches = pc.extract_regex(keys[start : start + NAME_CHUNK], "^(?P<folder>.*/)")
        places |= set(pc.unique(matches.flatten()[0]).to_pylist())
    pattern = re.compile(rf"(?i){outer}(?P<folder>(?:[^/]*/)*?{SPLIT_LIKE})/")
    found = [pattern.match(os.fsdecode(place)) for place in places if place]
    folders = sorted({match["folder"] for match in found if match}, key=_by_depth)
    if not folders:
        return []
    ignore = ", --no-labels ignores the names" if labeled and "/" not in folders[0] else ""
    return [
        f"folders with names like splits that are not taken as splits: {join_names(folders)}; "
        f"--splits {_suggest_places(folders)} makes them splits{ignore}"
    ]


def _by_depth(folder: str) -> tuple[int, str]:
    return folder.count("/"), folder


def _suggest_places(folders: Sequence[str]) -> str:
    """Make values of `--splits` for these folders; equal names in several folders are one."""
    parents: dict[tuple[str, str, int], list[list[str]]] = {}
    for folder in folders:
        *above, name = folder.split("/")
        (word,) = re.findall(_WORD, name.lower())[:1]
        parents.setdefault((SPLIT_WORDS[word], name, len(above)), []).append(above)
    values = [
        split + "=" + "/".join([*(c[0] if len(set(c)) == 1 else "*" for c in zip(*paths)), name])
        for (split, name, _), paths in parents.items()
    ]
    values.sort(key=lambda value: SPLITS.index(value.partition("=")[0]))
    if not values[0].startswith("train="):
        values.insert(0, "train=FOLDER")
    return " ".join(map(shlex.quote, values[:MAX_NAMES]))


def note_folder_labels(classes: Sequence[str]) -> list[str]:
    """Say that the names of folders are labels.

    Args:
        classes: The names; () without labels.

    Returns:
        One line; none without labels.
    """
    if not classes:
        return []
    line = (
        f"the names of {len(classes):,} folders are used as labels: {join_names(classes)}; "
        "--no-labels ignores them"
    )
    images = [name for name in classes if re.match(IMAGE_NAMES, name)]
    if images and any(re.match(ANNOTATION_NAMES, name) for name in classes):
        line += f"; --splits {shlex.quote(f'train={images[0]}')} takes the images alone"
    return [line]
