"""Annotated images: Pascal VOC folders and COCO JSON as boxes, classes and masks. Loads no torch.

A fault in a file costs only that file or that object: it is counted and reported with the file's
name. Boxes are x0, y0, x1, y1 in pixels from the top left corner of the image, ends exclusive. VOC
counts pixels from 1 and includes the last one, so 1 is subtracted from its first two numbers, as
detectron2 does.
"""

import os
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import TypeGuard

import numpy as np
import pyarrow as pa

from simsiam.data.decode import Unreadable
from simsiam.data.images import Images
from simsiam.data.storage import FolderFiles, Names
from simsiam.errors import UsageError, WorkFailed, printable, truncate, unknown_name
from simsiam.utils.names import reason_line, slashed
from simsiam.utils.read_files import read_bytes, read_text
from simsiam.utils.typed_json import read_untyped_json
from simsiam.utils.workers import CPU_CORES

SOURCE_KINDS = (
    "one or more Pascal VOC folders (Annotations, JPEGImages, ImageSets/Main), each optionally "
    "with an image set, as in VOC2012:train; or one folder in COCO format "
    "(annotations/*.json, or _annotations.coco.json next to the images of each split)"
)
SPLITS = ("train", "val", "test")
# Names of splits in files, and the split that each one means.
SPLIT_ALIASES = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
MAX_ANNOTATION_BYTES = 2**29  # of a COCO JSON file; that of COCO itself has 448 MB
MAX_XML_BYTES = 2**24
MAX_COORDINATE = 100_000  # pixels, of a polygon
MAX_LOST_FRACTION = 0.5  # of the annotated images; losing more is treated as an error

CategoryId = int | str
Segments = list[object] | dict[str, object] | None  # one object's COCO polygons or run lengths
RawObject = tuple[Sequence[float], int, bool, bool, Segments]  # box, label, difficult, crowd, mask


@dataclass(frozen=True, eq=False)
class Objects:
    """The K objects in one image."""

    size: tuple[int, int]  # height and width of the image in pixels
    boxes: np.ndarray  # (K, 4) float32, pixels
    labels: np.ndarray  # (K,) int64, indices into the classes
    difficult: np.ndarray  # (K,) bool; VOC: used in training, ignored in evaluation
    crowd: np.ndarray  # (K,) bool; COCO: a group of objects, ignored in training too
    segments: tuple[Segments, ...] = ()  # one for each object; empty if the source has no masks

    def __len__(self) -> int:
        return len(self.boxes)

    def take(self, rows_or_mask: np.ndarray) -> "Objects":
        """Select objects.

        Args:
            rows_or_mask: Indices of objects, or a (K,) bool mask.

        Returns:
            The selected objects, in the given order.
        """
        rows = np.arange(len(self))[rows_or_mask]
        columns = {
            name: getattr(self, name)[rows] for name in ("boxes", "labels", "difficult", "crowd")
        }
        segments = tuple(self.segments[i] for i in rows) if self.segments else ()
        return replace(self, **columns, segments=segments)

    def to_bytes(self) -> bytes:
        """Return everything that is known about the objects, for a digest."""
        arrays = (self.boxes, self.labels, self.difficult, self.crowd)
        rest = repr((self.size, self.segments)).encode()
        return b"".join(array.tobytes() for array in arrays) + rest


@dataclass(frozen=True, eq=False)
class DetectionDataset:
    """N images, and the objects in each of them by the same index."""

    images: Images
    objects: tuple[Objects, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.objects)

    def take(self, rows: np.ndarray) -> "DetectionDataset":
        """Select images.

        Args:
            rows: Indices of images, int64.

        Returns:
            The dataset of these images, in the given order.
        """
        objects = tuple(self.objects[i] for i in rows)
        return replace(self, images=self.images.take(rows), objects=objects)

    def concat(self, other: "DetectionDataset") -> "DetectionDataset":
        """Append another split of the same source.

        Args:
            other: A dataset whose images lie in the same root folder.

        Returns:
            The images of this dataset, then those of the other.
        """
        first, second = self.images.storage, other.images.storage
        assert isinstance(first, FolderFiles) and isinstance(second, FolderFiles)
        assert first.folder == second.folder
        images = images_from_names([*self.images.keys, *other.images.keys], first.folder)
        images = replace(images, channels=self.images.channels)
        return replace(self, images=images, objects=self.objects + other.objects)

    def hold_out(self, count: int) -> tuple["DetectionDataset", "DetectionDataset"]:
        """Split off images at random; the same call always selects the same images.

        Args:
            count: The number of images to hold out.

        Returns:
            The remaining images and the held-out images.
        """
        order = np.random.default_rng(0).permutation(len(self))
        return self.take(np.sort(order[count:])), self.take(np.sort(order[:count]))

    def trainable_subset(self) -> "DetectionDataset":
        """Drop crowds, and then the images without an object, as detectron2 does."""
        without_crowds = replace(self, objects=tuple(o.take(~o.crowd) for o in self.objects))
        return without_crowds.take(np.flatnonzero([len(o) > 0 for o in without_crowds.objects]))


@dataclass
class Faults:
    """The faults of a source: one line "file<tab>reason" for each, and counts by kind."""

    lines: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, file: object, reason: str) -> None:
        """Record one fault.

        Args:
            kind: The key under which it is counted.
            file: The file or image that has the fault.
            reason: What is wrong with it.
        """
        self.counts[kind] += 1
        self.lines.append(reason_line(str(file), reason))


@dataclass(frozen=True, eq=False)
class AnnotatedSource:
    """The splits of a source of annotated images."""

    name: str
    splits: Mapping[str, DetectionDataset]  # by name, a subset of SPLITS
    metric: str  # "voc" or "coco": the metric commonly reported for this kind of source
    faults: Faults


def open_annotated(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], channels: int = 3
) -> AnnotatedSource:
    """Read annotated images, one of SOURCE_KINDS.

    VOC's image sets train, val and test become the splits of these names (trainval is train and
    val), and several years are joined. A VOC folder without image sets is all train. The header of
    every image is read: an image that is missing, or whose size differs from its annotation, is
    left out.

    Args:
        sources: A folder, or several VOC folders.
        channels: The number of channels that images are read with.

    Returns:
        The splits that contain images, and the faults of the source.

    Raises:
        UsageError: If the source is none of SOURCE_KINDS.
        WorkFailed: If more than MAX_LOST_FRACTION of the images, or the whole of train, are lost.
    """
    texts = [
        os.path.expanduser(os.fspath(source))
        for source in ([sources] if isinstance(sources, str | os.PathLike) else sources)
    ]
    if not texts:
        raise UsageError(f"no source was given; transfer takes {SOURCE_KINDS}")
    faults = Faults()
    folders = [folder for text in texts for folder in find_voc_folders(text)]
    if folders:
        raw, metric = read_voc(folders, faults), "voc"
    elif len(texts) == 1:
        raw, metric = read_coco(Path(texts[0]), faults), "coco"
    else:
        names = ", ".join(map(printable, texts))
        raise UsageError(
            f"{names} are not all Pascal VOC folders; several sources must all be VOC folders"
        )
    name = "+".join(dict.fromkeys(Path(text.partition(":")[0]).resolve().name for text in texts))
    splits = {
        split: validate_images(part, faults, channels) for split, part in raw.items() if len(part)
    }
    kept, lost = sum(map(len, splits.values())), faults.counts["image left out"]
    if (
        lost > MAX_LOST_FRACTION * (kept + lost)
        or "train" not in splits
        or not any(map(len, splits["train"].objects))
    ):
        first = "no object is annotated"
        if faults.lines:
            first = printable(faults.lines[0].replace("\t", ": "))
        raise WorkFailed(
            f"{lost} of {kept + lost} annotated images of {name} cannot be used; the first, {first}"
        )
    return AnnotatedSource(name, splits, metric, faults)


# --- Pascal VOC -----------------------------------------------------------------------------------


def find_voc_folders(source: str) -> list[tuple[Path, str]]:
    """Find the VOC folders of a source.

    Args:
        source: A VOC folder, a folder of VOC folders, or either with ":" and an image set.

    Returns:
        Each folder with the requested image set, or "" for all sets; empty if the source is not
        in VOC format.

    Raises:
        UsageError: If there is no such folder.
    """
    path, image_set = Path(source), ""
    if not path.exists() and ":" in source:
        head, _, image_set = source.rpartition(":")
        path = Path(head)
    if not path.is_dir():
        raise UsageError(f"there is no folder {printable(source)}; transfer takes {SOURCE_KINDS}")
    path = path.absolute()
    if (path / "Annotations").is_dir():
        return [(path, image_set)]
    years = sorted(year for year in path.iterdir() if (year / "Annotations").is_dir())
    return [(year, image_set) for year in years]


def read_voc(folders: Sequence[tuple[Path, str]], faults: Faults) -> dict[str, DetectionDataset]:
    """Read the image sets of VOC folders.

    Args:
        folders: VOC folders, each with an image set or "".
        faults: Collects what is wrong in the files.

    Returns:
        The datasets by split. Their classes are the names that occur in any split, sorted.
    """
    files: dict[str, list[tuple[Path, str]]] = {split: [] for split in SPLITS}
    for folder, image_set in folders:
        for split, names in read_image_sets(folder, image_set).items():
            files[split] += [(folder, name) for name in names]
    with ThreadPoolExecutor(CPU_CORES) as pool:
        parsed = {split: list(pool.map(parse_voc, rows)) for split, rows in files.items()}
    classes = sorted({label for rows in parsed.values() for a in rows for label, *_ in a.objects})
    root = Path(os.path.commonpath([folder for folder, _ in folders]))
    labels = {name: i for i, name in enumerate(classes)}
    splits = {}
    for split, annotations in parsed.items():
        objects, keys = [], []
        for annotation in annotations:
            for kind, reason in annotation.faults:
                faults.add(kind, annotation.file, reason)
            if annotation.size is None:
                continue
            rows = [
                (box, labels[name], difficult, False, None)
                for name, box, difficult in annotation.objects
            ]
            objects.append(build_objects(annotation.size, rows))
            keys.append(slashed(os.path.relpath(annotation.image, root)))
        splits[split] = DetectionDataset(
            images_from_names(keys, root), tuple(objects), tuple(classes)
        )
    return splits


def read_image_sets(folder: Path, image_set: str) -> dict[str, list[str]]:
    """Read the names of a VOC folder's annotation files.

    Args:
        folder: The VOC folder.
        image_set: The only image set to read, or "" for all of them.

    Returns:
        Names by split. A single image set is train, except for "test".

    Raises:
        UsageError: If the folder has no such image set.
    """
    lists = {path.stem: path for path in (folder / "ImageSets" / "Main").glob("*.txt")}
    if image_set and image_set not in lists:
        raise unknown_name(f"image set of {folder}", image_set, lists)
    if image_set:
        return {"test" if image_set == "test" else "train": read_image_list(lists[image_set])}
    names = {split: read_image_list(lists[split]) for split in SPLITS if split in lists}
    if "train" not in names and "trainval" in lists:
        val = set(names.get("val", ()))
        names["train"] = [n for n in read_image_list(lists["trainval"]) if n not in val]
    if not names.get("train"):
        rest = {name for listed in names.values() for name in listed}
        stems = sorted(path.stem for path in (folder / "Annotations").glob("*.xml"))
        names["train"] = [stem for stem in stems if stem not in rest]
    return names


def read_image_list(path: Path) -> list[str]:
    """Read the first word of every line without repetitions.

    Args:
        path: A VOC image set. Lists of a single class have a second word in each line.

    Returns:
        The names, in the order of the file.
    """
    lines = read_text(path, errors="replace").splitlines()
    return list(dict.fromkeys(line.split()[0] for line in lines if line.split()))


@dataclass
class VocAnnotation:
    """The content of one VOC XML file."""

    file: Path
    image: Path
    size: tuple[int, int] | None = None  # height and width; None: the image is left out
    # Class, box and whether it is difficult.
    objects: list[tuple[str, list[float], bool]] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)  # kind and reason


def parse_voc(folder_and_name: tuple[Path, str]) -> VocAnnotation:
    """Read one VOC XML file.

    Args:
        folder_and_name: The VOC folder, and the file's name without its extension.

    Returns:
        The objects and the faults of the file.
    """
    folder, name = folder_and_name
    annotation = VocAnnotation(
        folder / "Annotations" / f"{name}.xml", folder / "JPEGImages" / f"{name}.jpg"
    )
    if not is_inside(name):
        annotation.faults.append(("image left out", "its name leads out of the folder"))
        return annotation
    try:
        root = ET.fromstring(read_bytes(annotation.file, MAX_XML_BYTES))
    except (OSError, UsageError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        annotation.faults.append(("image left out", str(reason)))
        return annotation
    except (ET.ParseError, ValueError, LookupError) as error:  # LookupError: of an encoding
        annotation.faults.append(("image left out", f"not XML: {truncate(error)}"))
        return annotation
    file_name = (root.findtext("filename") or "").strip()
    plain = is_inside(file_name) and os.path.basename(file_name) == file_name
    if plain and not annotation.image.exists():
        annotation.image = folder / "JPEGImages" / file_name
    height, width = (to_finite_float(root.findtext(f"size/{side}")) for side in ("height", "width"))
    known = height and width and min(height, width) >= 1
    annotation.size = (int(height or 0), int(width or 0)) if known else (0, 0)
    for number, element in enumerate(root.iter("object"), 1):
        label = (element.findtext("name") or "").strip()
        ends = ("xmin", "ymin", "xmax", "ymax")
        box = [to_finite_float(element.findtext(f"bndbox/{end}")) for end in ends]
        if not label or None in box:
            part = "box of four numbers" if label else "name"
            annotation.faults.append(("object left out", f"object {number} has no {part}"))
            continue
        x0, y0, x1, y1 = (value for value in box if value is not None)
        difficult = (element.findtext("difficult") or "0").strip() not in ("0", "")
        annotation.objects.append((label, [x0 - 1, y0 - 1, x1, y1], difficult))
    return annotation


def to_finite_float(value: object) -> float | None:
    """Convert text or a number to a float.

    Args:
        value: A value from XML or JSON.

    Returns:
        The number, or None if the value is not a finite number.
    """
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if isfinite(number) else None


# --- COCO -----------------------------------------------------------------------------------------


def read_coco(root: Path, faults: Faults) -> dict[str, DetectionDataset]:
    """Read the splits of a folder in COCO format.

    Args:
        root: The folder.
        faults: Collects what is wrong in the files.

    Returns:
        The datasets by split; a class has the same index in all of them. Classes that no
        annotation uses are left out, such as the extra top-level category of Roboflow's files.

    Raises:
        UsageError: If the folder has no COCO JSON file.
        WorkFailed: If a file cannot be read, or its categories contradict those of another one.
    """
    files = dict(find_coco_files(root))
    if not files:
        raise UsageError(
            f"{printable(str(root))} is not a source of annotated images; "
            f"transfer takes {SOURCE_KINDS}"
        )
    contents = {split: load_coco_json(file) for split, (file, _) in files.items()}
    categories: dict[CategoryId, str] = {}
    for split, content in contents.items():
        for category in only_dicts(content.get("categories")):
            category_id, name = category.get("id"), str(category.get("name", ""))
            if not is_valid_id(category_id) or categories.get(category_id, name) != name:
                raise WorkFailed(
                    f"{printable(str(files[split][0]))}: category {truncate(category_id, repr)} "
                    f"{truncate(name, repr)} has no valid id, or its id has another name elsewhere"
                )
            categories[category_id] = name
    used = {
        category_id
        for content in contents.values()
        for annotation in only_dicts(content.get("annotations"))
        if is_valid_id(category_id := annotation.get("category_id"))
    }
    ids = sorted(categories.keys() & used, key=lambda key: (isinstance(key, str), key))
    labels = {category_id: label for label, category_id in enumerate(ids)}
    classes = tuple(categories[category_id] for category_id in ids)
    return {
        split: parse_coco_split(
            contents[split], file, root=root, folder=folder, labels=labels, classes=classes,
            faults=faults,
        )
        for split, (file, folder) in files.items()
    }  # fmt: skip


def find_coco_files(root: Path) -> Iterator[tuple[str, tuple[Path, Path]]]:
    """Find the JSON file of each split.

    Args:
        root: A folder in COCO format.

    Yields:
        The split, and the pair of its JSON file and the folder of its images.
    """
    for alias, split in SPLIT_ALIASES.items():
        if (file := root / alias / "_annotations.coco.json").is_file():
            yield split, (file, file.parent)
    for file in sorted((root / "annotations").glob("*.json")):
        match = re.fullmatch(r"(?:instances_)?(train|val|valid|validation|test)(\d*)", file.stem)
        if match:
            name = match[1] + match[2]
            folders = [root / name, root / "images" / name, root / "images", root]
            yield SPLIT_ALIASES[match[1]], (file, next(f for f in folders if f.is_dir()))


def load_coco_json(file: Path) -> dict[str, object]:
    """Read a COCO JSON file.

    Args:
        file: The file.

    Returns:
        Its content, in which "images" and "categories" are lists.

    Raises:
        WorkFailed: If it cannot be read or is not in COCO format.
    """
    try:
        content = read_untyped_json(file, MAX_ANNOTATION_BYTES)
    except (OSError, ValueError, RecursionError) as error:
        raise WorkFailed(
            f"cannot read {printable(str(file))}: {' '.join(str(error).split())[:160]}"
        ) from None
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), list) for key in ("images", "categories")
    ):
        raise WorkFailed(
            f"{printable(str(file))} is not in COCO format: "
            "it must contain the lists images and categories"
        )
    return content


def only_dicts(value: object) -> list[dict[str, object]]:
    """Select the dictionaries of a list.

    Args:
        value: A value from JSON.

    Returns:
        The dictionaries in it; empty if the value is not a list.
    """
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def is_inside(name: str) -> bool:
    """Check that a name in an annotation is that of a file in the folder that it is relative to.

    Args:
        name: The name.

    Returns:
        Whether it leads out of no folder, and a file system can have it.
    """
    parts = slashed(name).split("/")
    if not name or "\0" in name or ".." in parts or os.path.isabs(name):
        return False
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def is_valid_segmentation(value: object) -> TypeGuard[list[object] | dict[str, object]]:
    """Check for polygons of at least three corners each, or run lengths.

    Args:
        value: A value from JSON.

    Returns:
        Whether it is a COCO segmentation.
    """
    if isinstance(value, dict):
        return isinstance(value.get("counts"), list | str) and isinstance(value.get("size"), list)
    polygons = value if isinstance(value, list) and value else [None]
    return all(
        isinstance(polygon, list)
        and len(polygon) >= 6
        and not len(polygon) % 2
        and all(type(end) in (int, float) and abs(end) <= MAX_COORDINATE for end in polygon)
        for polygon in polygons
    )


def has_run_lengths_of(segments: Segments, size: tuple[int, int]) -> bool:
    """Check the run lengths of a mask: with others, pycocotools reads or writes beyond its memory.

    Args:
        segments: A mask as polygons, as run lengths, or None.
        size: Height and width of the image in pixels.

    Returns:
        Whether it is a mask of this size; True if it is not given as run lengths.
    """
    if not isinstance(segments, dict):
        return True
    counts = segments["counts"]
    lengths = decode_run_lengths(counts) if isinstance(counts, str) else counts
    return (
        segments["size"] == list(size)
        and isinstance(lengths, list)
        and all(type(length) is int and length >= 0 for length in lengths)
        and sum(lengths) == size[0] * size[1]
    )


def decode_run_lengths(text: str) -> list[int] | None:
    """Decode COCO's compressed run lengths, as rleFrString in pycocotools does.

    Args:
        text: Characters of six bits each: five are digits of a number, the sixth says that more
            follow. From the fourth on, numbers are differences to the one two places before.

    Returns:
        The lengths; None if the text is no such code.
    """
    lengths, number, shift = list[int](), 0, 0
    for character in text:
        digit = ord(character) - 48
        if not 0 <= digit < 64 or shift > 30:
            return None
        number |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            number -= 1 << shift
        lengths.append(number + lengths[-2] if len(lengths) > 2 else number)
        number, shift = 0, 0
    return None if shift else lengths


def is_valid_id(value: object) -> TypeGuard[CategoryId]:
    """Check for an id of an image or of a category.

    Args:
        value: A value from JSON.

    Returns:
        Whether it is a whole number or text.
    """
    return isinstance(value, int | str) and not isinstance(value, bool)


def parse_coco_split(
    content: Mapping[str, object],
    file: Path,
    *,
    root: Path,
    folder: Path,
    labels: Mapping[CategoryId, int],
    classes: tuple[str, ...],
    faults: Faults,
) -> DetectionDataset:
    """Convert the content of one COCO JSON file.

    Args:
        content: The content of the file.
        file: The file, for the names of faults.
        root: The folder of the source; keys of images are relative to it.
        folder: The folder that the images of this split lie in.
        labels: The index in `classes` of each category id.
        classes: The names of the classes.
        faults: Collects what is wrong in the file.

    Returns:
        The images, and the objects in each of them.
    """
    rows: dict[CategoryId, tuple[str, tuple[int, int]]] = {}
    objects_of: dict[CategoryId, list[RawObject]] = {}
    images, annotations = content.get("images"), content.get("annotations")
    prefix = os.path.relpath(folder, root)
    for position, image in enumerate(images if isinstance(images, list) else ()):
        fields = image if isinstance(image, dict) else {}
        key, name = fields.get("id"), fields.get("file_name")
        if not is_valid_id(key) or not isinstance(name, str) or key in rows:
            reason = f"images[{position}] has no unique id or no file_name"
            faults.add("image left out", file, reason)
            continue
        if not is_inside(os.path.normpath(os.path.join(prefix, name))):
            reason = f"images[{position}] has a file_name that leads out of the folder"
            faults.add("image left out", file, reason)
            continue
        height, width = (to_finite_float(fields.get(side)) for side in ("height", "width"))
        rows[key] = name, (int(height or 0), int(width or 0))
        objects_of[key] = []
    for position, annotation in enumerate(annotations if isinstance(annotations, list) else ()):
        fields = annotation if isinstance(annotation, dict) else {}
        key, category, box = (fields.get(k) for k in ("image_id", "category_id", "bbox"))
        sides = [to_finite_float(value) for value in box] if isinstance(box, list) else []
        if not is_valid_id(key) or key not in rows:
            reason = f"belongs to image {truncate(key, repr)}, which is not in the file"
        elif not is_valid_id(category) or category not in labels:
            reason = f"has category {truncate(category, repr)}, which is not in the file"
        elif len(sides) != 4 or None in sides:
            reason = f"has the box {truncate(box, repr)} instead of x, y, width, height"
        else:
            x, y, w, h = (value for value in sides if value is not None)
            segments = fields.get("segmentation")
            mask = segments if is_valid_segmentation(segments) else None
            crowd = bool(fields.get("iscrowd"))
            objects_of[key].append(([x, y, x + w, y + h], labels[category], False, crowd, mask))
            continue
        faults.add("object left out", file, f"annotations[{position}] {reason}")
    keys = [slashed(os.path.normpath(os.path.join(prefix, name))) for name, _ in rows.values()]
    objects = tuple(build_objects(size, objects_of[key]) for key, (_, size) in rows.items())
    return DetectionDataset(images_from_names(keys, root), objects, classes)


# --- both -----------------------------------------------------------------------------------------


def images_from_names(names: Iterable[str], folder: Path) -> Images:
    """Build a source of image files.

    Args:
        names: Paths relative to the folder.
        folder: The root folder.

    Returns:
        The images, whose keys are the names.
    """
    keys = Names(pa.array([os.fsencode(name) for name in names], pa.large_binary()))
    return Images(keys, FolderFiles(folder, keys))


def build_objects(size: tuple[int, int], rows: Sequence[RawObject]) -> Objects:
    """Convert the objects of one image to arrays.

    Args:
        size: Height and width of the image in pixels.
        rows: The objects.

    Returns:
        The same objects, column by column.
    """
    boxes, labels, difficult, crowd, segments = (
        zip(*rows, strict=True) if rows else ((), (), (), (), ())
    )
    with np.errstate(over="ignore"):  # numbers too large for float32 are cut at the image's edge
        corners = np.array(boxes, np.float32).reshape(-1, 4)
    return Objects(
        size,
        corners,
        np.array(labels, np.int64),
        np.array(difficult, bool),
        np.array(crowd, bool),
        tuple(segments) if any(segments) else (),
    )


def validate_images(dataset: DetectionDataset, faults: Faults, channels: int) -> DetectionDataset:
    """Drop images that are missing or have another size, and clip boxes to the images.

    Args:
        dataset: A split as it is annotated.
        faults: Collects what is dropped.
        channels: The number of channels that images are read with.

    Returns:
        The split with the images and boxes that can be used.
    """
    images = replace(dataset.images, channels=channels)

    def size_of(i: int) -> tuple[int, int] | str:
        try:
            return images.read_header(i)[:2]
        except Unreadable as error:
            return str(error)

    with ThreadPoolExecutor(CPU_CORES) as pool:
        sizes = list(pool.map(size_of, range(len(dataset))))
    rows, clipped = [], []
    for i, (size, objects) in enumerate(zip(sizes, dataset.objects, strict=True)):
        key = images.keys[i]
        if isinstance(size, str):
            faults.add("image left out", key, size)
        elif objects.size not in ((0, 0), size, size[::-1]):  # EXIF rotation exchanges the sides
            h, w = objects.size
            reason = f"{size[1]} x {size[0]} pixels, annotated as {w} x {h}"
            faults.add("image left out", key, reason)
        else:
            sized = replace(objects, size=size if objects.size == (0, 0) else objects.size)
            rows.append(i)
            clipped.append(clip_boxes(drop_wrong_masks(sized), key, dataset.classes, faults))
    return replace(dataset, images=images.take(np.array(rows, np.int64)), objects=tuple(clipped))


def drop_wrong_masks(objects: Objects) -> Objects:
    """Drop the masks whose run lengths are not of the image's size; the boxes stay.

    Args:
        objects: The objects of one image of known size.

    Returns:
        The objects.
    """
    segments = tuple(x if has_run_lengths_of(x, objects.size) else None for x in objects.segments)
    return replace(objects, segments=segments if any(segments) else ())


def clip_boxes(objects: Objects, file: str, classes: Sequence[str], faults: Faults) -> Objects:
    """Clip boxes to the image and drop those of at most one pixel on a side, which are mistakes.

    Args:
        objects: The objects of one image.
        file: The image, for the names of faults.
        classes: The names of the classes.
        faults: Collects what is clipped and dropped.

    Returns:
        The objects whose boxes have an area inside the image.
    """
    h, w = objects.size
    inside = np.clip(objects.boxes, 0, np.array([w, h, w, h], np.float32))
    sides = inside[:, 2:] - inside[:, :2]
    good = (sides > 1).all(1)
    for box, label in zip(objects.boxes[~good], objects.labels[~good], strict=True):
        corners = ", ".join(f"{value:g}" for value in box)
        reason = f"the box {corners} of a {classes[label]} has no area in the image"
        faults.add("degenerate box dropped", file, reason)
    if clipped := int((good & (inside != objects.boxes).any(1)).sum()):
        faults.counts["box cut at the edge"] += clipped
    return replace(objects, boxes=inside).take(good)


def keep_masked_objects(source: AnnotatedSource) -> AnnotatedSource:
    """Drop the objects that have no mask.

    Args:
        source: An annotated source; what is dropped is added to its faults.

    Returns:
        The source with the other objects.

    Raises:
        UsageError: If no object of a split has a mask.
    """
    splits = {}
    for split, part in source.splits.items():
        if not any(o.segments for o in part.objects):
            raise UsageError(
                f"{source.name} has no masks in {split}: --task detection needs only boxes"
            )
        kept = []
        for i, objects in enumerate(part.objects):
            segments = objects.segments or [None] * len(objects)
            has_mask = np.array([segment is not None for segment in segments], bool)
            for label in objects.labels[~has_mask]:
                reason = f"a {part.classes[label]} has no mask"
                source.faults.add("object left out", part.images.keys[i], reason)
            kept.append(objects.take(has_mask))
        splits[split] = replace(part, objects=tuple(kept))
    return replace(source, splits=splits)
