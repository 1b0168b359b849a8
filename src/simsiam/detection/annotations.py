"""Objects in images: Pascal VOC folders and COCO's JSON become boxes, classes and masks by image. Loads no torch.

What is wrong in a file costs that file or that object and nothing else: it is counted, and said with the file's name.
Boxes are x0, y0, x1, y1 in pixels from the image's corner, ends exclusive. VOC counts pixels from 1 and includes the
last, so 1 is taken from its first two numbers, as detectron2 does.
"""

import json
import os
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from simsiam.data.decode import Unreadable
from simsiam.data.images import Images
from simsiam.data.storage import Names
from simsiam.errors import UsageError, WorkFailed, printable, unknown_name
from simsiam.utils.workers import CPU_CORES

SOURCE_KINDS = (
    "a Pascal VOC folder (Annotations, JPEGImages, ImageSets/Main) or several, perhaps with a set, VOC2012:train; or "
    "a folder of COCO's (annotations/*.json, or _annotations.coco.json beside the images of each split)"
)
SPLITS = ("train", "val", "test")
SPLIT_ALIASES = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}  # their spelling: ours
MAX_LOST_FRACTION = 0.5  # of the annotated images; more is no accident
Segments = list[Any] | dict[str, Any] | None  # COCO's polygons or run lengths of one object


@dataclass(frozen=True, eq=False)
class Objects:
    """The K objects in one image."""

    size: tuple[int, int]  # height and width of the image
    boxes: np.ndarray  # float32 (K, 4)
    labels: np.ndarray  # int64 (K,), positions in the classes
    difficult: (
        np.ndarray
    )  # bool (K,): learned from, but to find them is neither right nor wrong (VOC)
    crowd: np.ndarray  # bool (K,): many objects in one; not learned from either (COCO)
    segments: tuple[Segments, ...] = ()  # one an object, or none where the source has no masks

    def __len__(self) -> int:
        return len(self.boxes)

    def take(self, rows_or_mask: np.ndarray) -> "Objects":
        """The objects at `kept`, a mask or positions."""
        rows = np.arange(len(self))[rows_or_mask]
        columns = {
            name: getattr(self, name)[rows] for name in ("boxes", "labels", "difficult", "crowd")
        }
        return replace(
            self, **columns, segments=tuple(self.segments[i] for i in rows) if self.segments else ()
        )


@dataclass(frozen=True, eq=False)
class DetectionDataset:
    """N images and the objects in them, by position."""

    images: Images
    objects: tuple[Objects, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.objects)

    def take(self, rows: np.ndarray) -> "DetectionDataset":
        return replace(
            self, images=self.images.take(rows), objects=tuple(self.objects[i] for i in rows)
        )

    def concat(self, other: "DetectionDataset") -> "DetectionDataset":
        """This part and another one of the same source."""
        assert isinstance(self.images.encoded, Path) and self.images.encoded == other.images.encoded
        images = images_from_names([*self.images.keys, *other.images.keys], self.images.encoded)
        return replace(
            self,
            images=replace(images, channels=self.images.channels),
            objects=self.objects + other.objects,
        )

    def hold_out(self, count: int) -> tuple["DetectionDataset", "DetectionDataset"]:
        """(the rest, `count` images held out), always the same ones."""
        order = np.random.default_rng(0).permutation(len(self))
        return self.take(np.sort(order[count:])), self.take(np.sort(order[:count]))

    def trainable_subset(self) -> "DetectionDataset":
        """Without crowds, and without the images that then hold no object: detectron2's choice as well."""
        kept = replace(self, objects=tuple(o.take(~o.crowd) for o in self.objects))
        return kept.take(np.flatnonzero([len(o) > 0 for o in kept.objects]))


@dataclass
class Faults:
    """What was wrong: lines "file<tab>reason", and how often each kind of thing was found."""

    lines: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, file: object, reason: str) -> None:
        self.counts[kind] += 1
        self.lines.append(f"{printable(str(file))}\t{printable(reason)}")


@dataclass(frozen=True, eq=False)
class AnnotatedSource:
    name: str
    splits: Mapping[str, DetectionDataset]  # of SPLITS, those there are
    metric: str  # "voc" or "coco": which the field reports on such a source
    faults: Faults


def open_annotated(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], channels: int = 3
) -> AnnotatedSource:
    """The annotated images in KINDS. Raises UsageError for what is none of these, WorkFailed for what is all broken.

    VOC's image sets train and val are the splits of those names, trainval both, test the test; several years are one
    set. Without image sets all is train. Every image's header is read: an image that is missing or of another size
    than its annotation says is left out.
    """
    texts = [
        os.path.expanduser(os.fspath(one))
        for one in ([sources] if isinstance(sources, str | os.PathLike) else sources)
    ]
    if not texts:
        raise UsageError(f"no source is given: it takes {SOURCE_KINDS}")
    faults = Faults()
    folders = [folder for text in texts for folder in find_voc_folders(text)]
    if folders:
        raw, metric = read_voc(folders, faults), "voc"
    elif len(texts) == 1:
        raw, metric = read_coco(Path(texts[0]), faults), "coco"
    else:
        raise UsageError(
            f"{', '.join(map(printable, texts))} are not all Pascal VOC folders; only these can be several"
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
        first = faults.lines[0].replace("\t", ": ") if faults.lines else "no object is annotated"
        raise WorkFailed(
            f"{lost} of {kept + lost} annotated images of {name} cannot be used; the first, {first}"
        )
    return AnnotatedSource(name, splits, metric, faults)


# --- Pascal VOC -------------------------------------------------------------------------------------------------------


def find_voc_folders(source: str) -> list[tuple[Path, str]]:
    """The VOC folders that a source names, each with the image set asked for or ""; [] where it is no VOC."""
    path, wanted = Path(source), ""
    if not path.exists() and ":" in source:
        head, _, wanted = source.rpartition(":")
        path = Path(head)
    if not path.is_dir():
        raise UsageError(f"there is no folder {printable(source)}: transfer takes {SOURCE_KINDS}")
    path = path.absolute()
    if (path / "Annotations").is_dir():
        return [(path, wanted)]
    return [(one, wanted) for one in sorted(path.iterdir()) if (one / "Annotations").is_dir()]


def read_voc(folders: Sequence[tuple[Path, str]], faults: Faults) -> dict[str, DetectionDataset]:
    """The image sets of several VOC folders, by split; the classes are those of all objects, in order of names."""
    wanted: dict[str, list[tuple[Path, str]]] = {split: [] for split in SPLITS}
    for folder, chosen in folders:
        for split, names in read_image_sets(folder, chosen).items():
            wanted[split] += [(folder, name) for name in names]
    with ThreadPoolExecutor(CPU_CORES) as pool:
        parsed = {split: list(pool.map(parse_voc, rows)) for split, rows in wanted.items()}
    classes = sorted(
        {label for found in parsed.values() for one in found for label, *_ in one.objects}
    )
    root = Path(os.path.commonpath([folder for folder, _ in folders]))
    places = {name: i for i, name in enumerate(classes)}
    splits = {}
    for split, found in parsed.items():
        for one in found:
            for kind, reason in one.faults:
                faults.add(kind, one.file, reason)
        good = [one for one in found if one.size is not None]
        objects = tuple(
            build_objects(
                one.size,
                [(box, places[label], hard, False, None) for label, box, hard in one.objects],
            )
            for one in good
            if one.size is not None
        )
        keys = [os.path.normpath(os.path.relpath(one.image, root)) for one in good]
        splits[split] = DetectionDataset(images_from_names(keys, root), objects, tuple(classes))
    return splits


def read_image_sets(folder: Path, image_set: str) -> dict[str, list[str]]:
    """Names of annotation files by split. Of a chosen set, all is train but for a chosen "test"."""
    lists = {path.stem: path for path in (folder / "ImageSets" / "Main").glob("*.txt")}
    if image_set and image_set not in lists:
        raise unknown_name(f"image set of {folder}", image_set, lists)
    if image_set:
        return {"test" if image_set == "test" else "train": read_image_list(lists[image_set])}
    found = {split: read_image_list(lists[split]) for split in SPLITS if split in lists}
    if "train" not in found and "trainval" in lists:
        found["train"] = [
            name
            for name in read_image_list(lists["trainval"])
            if name not in set(found.get("val", ()))
        ]
    if not found.get("train"):
        rest = {name for names in found.values() for name in names}
        found["train"] = sorted(
            path.stem for path in (folder / "Annotations").glob("*.xml") if path.stem not in rest
        )
    return found


def read_image_list(path: Path) -> list[str]:
    """First words of a list's lines, each once: VOC's lists of a class have a second word."""
    return list(
        dict.fromkeys(
            line.split()[0]
            for line in path.read_text("utf-8", "replace").splitlines()
            if line.split()
        )
    )


@dataclass
class VocAnnotation:
    """One of VOC's XML files."""

    file: Path
    image: Path
    size: tuple[int, int] | None = None  # None: the image is left out
    objects: list[tuple[str, list[float], bool]] = field(
        default_factory=list
    )  # class, box, difficult
    faults: list[tuple[str, str]] = field(default_factory=list)


def parse_voc(row: tuple[Path, str]) -> VocAnnotation:
    folder, name = row
    made = VocAnnotation(
        folder / "Annotations" / f"{name}.xml", folder / "JPEGImages" / f"{name}.jpg"
    )
    try:
        root = ET.parse(made.file).getroot()
    except (OSError, ET.ParseError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not XML: {error}"
        made.faults.append(("image left out", str(reason)))
        return made
    stated = (root.findtext("filename") or "").strip()
    if not made.image.exists() and stated and os.path.basename(stated) == stated:
        made.image = folder / "JPEGImages" / stated
    height, width = (to_finite_float(root.findtext(f"size/{side}")) for side in ("height", "width"))
    made.size = (
        (int(height), int(width)) if height and width and min(height, width) >= 1 else (0, 0)
    )
    for place, found in enumerate(root.iter("object"), 1):
        label = (found.findtext("name") or "").strip()
        box = [
            to_finite_float(found.findtext(f"bndbox/{end}"))
            for end in ("xmin", "ymin", "xmax", "ymax")
        ]
        if not label or None in box:
            made.faults.append(
                (
                    "object left out",
                    f"object {place} has no {'box of four numbers' if label else 'name'}",
                )
            )
            continue
        x0, y0, x1, y1 = (value for value in box if value is not None)
        hard = (found.findtext("difficult") or "0").strip() not in ("0", "")
        made.objects.append((label, [x0 - 1, y0 - 1, x1, y1], hard))
    return made


def to_finite_float(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if isfinite(value) else None


# --- COCO -------------------------------------------------------------------------------------------------------------


def read_coco(root: Path, faults: Faults) -> dict[str, DetectionDataset]:
    """Splits of a folder of COCO's; a class has one place in all of them."""
    files = dict(find_coco_files(root))
    if not files:
        raise UsageError(
            f"{printable(str(root))} is no source of annotated images: transfer takes {SOURCE_KINDS}"
        )
    contents = {split: load_coco_json(file) for split, (file, _) in files.items()}
    categories: dict[Any, str] = {}
    for split, content in contents.items():
        for category in only_dicts(content.get("categories")):
            kind, name = category.get("id"), str(category.get("name", ""))
            if not is_valid_id(kind) or categories.get(kind, name) != name:
                raise WorkFailed(
                    f"{printable(str(files[split][0]))}: category {kind!r} {printable(name)!r} is not one of a set"
                )
            categories[kind] = name
    used = {
        a.get("category_id")
        for content in contents.values()
        for a in only_dicts(content.get("annotations"))
    }
    ids = sorted(
        kind for kind in categories if kind in used
    )  # Roboflow's have a category above all others, never used
    places = {kind: place for place, kind in enumerate(ids)}
    classes = tuple(categories[kind] for kind in ids)
    return {
        split: parse_coco_split(contents[split], file, root, folder, places, classes, faults)
        for split, (file, folder) in files.items()
    }


def find_coco_files(root: Path) -> Iterator[tuple[str, tuple[Path, Path]]]:
    """(split, (JSON, folder of its images))."""
    for split_name, split in SPLIT_ALIASES.items():
        if (file := root / split_name / "_annotations.coco.json").is_file():
            yield split, (file, file.parent)
    for file in sorted((root / "annotations").glob("*.json")):
        word = re.fullmatch(r"(?:instances_)?(train|val|valid|validation|test)(\d*)", file.stem)
        if word:
            folders = [
                root / (word[1] + word[2]),
                root / "images" / (word[1] + word[2]),
                root / "images",
                root,
            ]
            yield (
                SPLIT_ALIASES[word[1]],
                (file, next(folder for folder in folders if folder.is_dir())),
            )


def load_coco_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise WorkFailed(
            f"cannot read {printable(str(file))}: {' '.join(str(error).split())[:160]}"
        ) from None
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), list) for key in ("images", "categories")
    ):
        raise WorkFailed(
            f"{printable(str(file))} is not COCO's: it has no lists of images and categories"
        )
    return content


def only_dicts(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def is_valid_segmentation(value: Any) -> bool:
    """Polygons of at least three corners each, or run lengths."""
    if isinstance(value, dict):
        return isinstance(value.get("counts"), list | str) and isinstance(value.get("size"), list)
    lists = value if isinstance(value, list) and value else [None]
    return all(
        isinstance(one, list)
        and len(one) >= 6
        and not len(one) % 2
        and None not in map(to_finite_float, one)
        for one in lists
    )


def is_valid_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def parse_coco_split(
    content: Mapping[str, Any],
    file: Path,
    root: Path,
    folder: Path,
    category_to_label: Mapping[Any, int],
    classes: tuple[str, ...],
    faults: Faults,
) -> DetectionDataset:
    found: dict[Any, list[tuple[list[float], int, bool, bool, Segments]]] = {}
    rows: dict[Any, tuple[str, tuple[int, int]]] = {}
    for place, image in enumerate(content["images"]):
        about = image if isinstance(image, dict) else {}
        key, name = about.get("id"), about.get("file_name")
        if not is_valid_id(key) or not isinstance(name, str) or key in rows:
            faults.add(
                "image left out", file, f"images[{place}] has no id of its own or no file_name"
            )
            continue
        sides = [to_finite_float(about.get(side)) for side in ("height", "width")]
        rows[key] = name, (int(sides[0] or 0), int(sides[1] or 0))
        found[key] = []
    for place, one in enumerate(content.get("annotations") or ()):
        about = one if isinstance(one, dict) else {}
        key, kind, box = about.get("image_id"), about.get("category_id"), about.get("bbox")
        sides = [to_finite_float(value) for value in box] if isinstance(box, list) else []
        if not is_valid_id(key) or key not in found:
            reason = f"is of image {key!r}, which is not there"
        elif not is_valid_id(kind) or kind not in category_to_label:
            reason = f"is of category {kind!r}, which is not there"
        elif len(sides) != 4 or None in sides:
            reason = f"has the box {box!r}, not x, y, width, height"
        else:
            x, y, w, h = (value for value in sides if value is not None)
            segments = about.get("segmentation")
            good = segments if is_valid_segmentation(segments) else None
            found[key].append(
                (
                    [x, y, x + w, y + h],
                    category_to_label[kind],
                    False,
                    bool(about.get("iscrowd")),
                    good,
                )
            )
            continue
        faults.add("object left out", file, f"annotations[{place}] {reason}")
    objects = tuple(build_objects(size, found[key]) for key, (_, size) in rows.items())
    keys = [
        os.path.normpath(os.path.join(os.path.relpath(folder, root), name))
        for name, _ in rows.values()
    ]
    return DetectionDataset(images_from_names(keys, root), objects, classes)


# --- both -------------------------------------------------------------------------------------------------------------


def images_from_names(keys: Iterable[str], folder: Path) -> Images:
    return Images(Names(pa.array([os.fsencode(key) for key in keys], pa.large_binary())), folder)


def build_objects(
    size: tuple[int, int], rows: Sequence[tuple[list[float], int, bool, bool, Segments]]
) -> Objects:
    boxes, labels, difficult, crowd, segments = (
        zip(*rows, strict=True) if rows else ((), (), (), (), ())
    )
    return Objects(
        size,
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(labels, np.int64),
        np.array(difficult, bool),
        np.array(crowd, bool),
        tuple(segments) if any(segments) else (),
    )


def validate_images(dataset: DetectionDataset, faults: Faults, channels: int) -> DetectionDataset:
    """Only images that are there and have the size that is stated, and boxes cut at their edges that then have an area.

    A box of no more than a pixel across is an accident of whoever drew it.
    """
    images = replace(dataset.images, channels=channels)

    def size_of(i: int) -> tuple[int, int] | str:
        try:
            return images.read_header(i)[:2]
        except Unreadable as error:
            return str(error)

    with ThreadPoolExecutor(CPU_CORES) as pool:
        sizes = list(pool.map(size_of, range(len(dataset))))
    kept, objects = [], []
    for i, (size, stated) in enumerate(zip(sizes, dataset.objects, strict=True)):
        key = images.keys[i]
        if isinstance(size, str):
            faults.add("image left out", key, size)
        elif stated.size not in ((0, 0), size, size[::-1]):  # turned by EXIF, sides change places
            h, w = stated.size
            faults.add(
                "image left out", key, f"{size[1]} x {size[0]} pixels, annotated as {w} x {h}"
            )
        else:
            real = size if stated.size == (0, 0) else stated.size
            kept.append(i)
            objects.append(clip_boxes(replace(stated, size=real), key, dataset.classes, faults))
    return replace(dataset, images=images.take(np.array(kept, np.int64)), objects=tuple(objects))


def clip_boxes(objects: Objects, file: str, classes: Sequence[str], faults: Faults) -> Objects:
    h, w = objects.size
    inside = np.clip(objects.boxes, 0, np.array([w, h, w, h], np.float32))
    sides = inside[:, 2:] - inside[:, :2]
    good = (sides > 1).all(1)
    for box, label in zip(objects.boxes[~good], objects.labels[~good], strict=True):
        corners = ", ".join(f"{value:g}" for value in box)
        faults.add(
            "degenerate box dropped",
            file,
            f"the box {corners} of a {classes[label]} has no area in the image",
        )
    if cut := int((good & (inside != objects.boxes).any(1)).sum()):
        faults.counts["box cut at the edge"] += cut
    return replace(objects, boxes=inside).take(good)


def keep_masked_objects(source: AnnotatedSource) -> AnnotatedSource:
    """The source without the objects that have no mask. Raises UsageError where none has."""
    splits = {}
    for split, part in source.splits.items():
        if not any(o.segments for o in part.objects):
            raise UsageError(
                f"{source.name} has no masks in {split}: --task detection needs only boxes"
            )
        objects = []
        for i, found in enumerate(part.objects):
            there = np.array(
                [segments is not None for segments in found.segments or [None] * len(found)], bool
            )
            for label in found.labels[~there]:
                source.faults.add(
                    "object left out", part.images.keys[i], f"a {part.classes[label]} has no mask"
                )
            objects.append(found.take(there))
        splits[split] = replace(part, objects=tuple(objects))
    return replace(source, splits=splits)
