"""Average precision (AP) in percent by the two definitions of Table 5: COCO's and that of VOC 2007.

Both compare detections with annotated objects image by image. A class without annotated objects
has no AP and does not count in the mean.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count
from types import ModuleType
from typing import Literal, TypedDict, cast

import numpy as np

from simsiam.detection.annotations import Objects
from simsiam.errors import UsageError

IOU_THRESHOLDS = np.arange(50, 100, 5) / 100


class RunLengths(TypedDict):
    """A mask in COCO's run-length encoding."""

    size: list[int]  # height and width
    counts: bytes


class ApRecord(TypedDict):
    """Average precision in percent."""

    metric: str  # the definition
    AP: float  # mean over IOU_THRESHOLDS and classes
    AP50: float  # at IoU 0.50
    AP75: float  # at IoU 0.75
    AP50_of_class: dict[str, float]


@dataclass(frozen=True, eq=False)
class Detections:
    """The D objects that a detector finds in one image."""

    boxes: np.ndarray  # (D, 4) float32, pixels of the original image
    scores: np.ndarray  # (D,) float32
    labels: np.ndarray  # (D,) int64
    masks: tuple[RunLengths, ...] = ()  # of the whole image, one for each box; empty without masks


def compute_metrics(
    predictions: Sequence[Detections],
    ground_truth: Sequence[Objects],
    classes: Sequence[str],
    task: str,
) -> dict[str, ApRecord]:
    """Compute every metric of a task.

    Args:
        predictions: The detections in each image.
        ground_truth: The annotated objects in each image.
        classes: The names of the classes.
        task: "detection" or "segmentation".

    Returns:
        Records by metric: voc_box and coco_box, and for segmentation coco_mask.
    """
    metrics = {
        "voc_box": voc_ap(predictions, ground_truth, classes),
        "coco_box": coco_ap(predictions, ground_truth, classes, "bbox"),
    }
    if task == "segmentation":
        metrics["coco_mask"] = coco_ap(predictions, ground_truth, classes, "segm")
    return metrics


# --- VOC ------------------------------------------------------------------------------------------


def voc_ap(
    predictions: Sequence[Detections], ground_truth: Sequence[Objects], classes: Sequence[str]
) -> ApRecord:
    """Compute VOC 2007's AP of boxes as detectron2's evaluator does.

    Precision is interpolated at eleven points. Scores are rounded to three digits and boxes to a
    tenth of a pixel, because detectron2 evaluates text files with these digits.

    Args:
        predictions: The detections in each image.
        ground_truth: The annotated objects in each image; difficult objects and crowds are ignored.
        classes: The names of the classes.

    Returns:
        The AP of each class that has objects, and the means.
    """
    aps_of_class = {}
    for label, name in enumerate(classes):
        if (aps := voc_class_ap(predictions, ground_truth, label)) is not None:
            aps_of_class[name] = aps
    table = 100 * np.array(list(aps_of_class.values())).reshape(-1, len(IOU_THRESHOLDS))
    metric = "VOC 2007, 11 points, at IoU 0.50:0.95, as detectron2 computes it"
    return summarize_ap(metric, table, tuple(aps_of_class))


def voc_class_ap(
    predictions: Sequence[Detections], ground_truth: Sequence[Objects], label: int
) -> np.ndarray | None:
    """Compute VOC 2007's AP of one class.

    Args:
        predictions: The detections in each image.
        ground_truth: The annotated objects in each image.
        label: The index of the class.

    Returns:
        AP at each of IOU_THRESHOLDS, (10,) float64 between 0 and 1; None without objects to find.
    """
    truth = [o.take(o.labels == label) for o in ground_truth]
    hard = [o.difficult | o.crowd for o in truth]
    positives = int(sum((~h).sum() for h in hard))
    if not positives:
        return None
    detections = [
        (i, row) for i, d in enumerate(predictions) for row in np.flatnonzero(d.labels == label)
    ]
    scores = np.array([round(float(predictions[i].scores[row]), 3) for i, row in detections])
    order = np.argsort(-scores, kind="stable")
    right, wrong = (np.zeros((len(IOU_THRESHOLDS), len(detections))) for _ in range(2))
    taken = [np.zeros((len(IOU_THRESHOLDS), len(o)), bool) for o in truth]
    for place, (i, row) in enumerate(detections[k] for k in order):
        overlaps = iou(round_box(predictions[i].boxes[row]), truth[i].boxes.astype(np.float64))
        best = int(overlaps.argmax()) if len(overlaps) else -1
        for level, threshold in enumerate(IOU_THRESHOLDS):
            if best < 0 or overlaps[best] <= threshold:
                wrong[level, place] = 1
            elif not hard[i][best]:
                (wrong if taken[i][level, best] else right)[level, place] = 1
                taken[i][level, best] = True
    right, wrong = right.cumsum(1), wrong.cumsum(1)
    recall = right / positives
    precision = right / np.maximum(right + wrong, np.finfo(np.float64).eps)
    return np.array([eleven_point_ap(r, p) for r, p in zip(recall, precision, strict=True)])


def round_box(box: np.ndarray) -> np.ndarray:
    """Round a box as writing it to a VOC file and reading it back does; VOC counts pixels from 1.

    Args:
        box: x0, y0, x1, y1 in pixels, (4,) float32.

    Returns:
        The rounded box, (4,) float64.
    """
    offset = np.array([1, 1, 0, 0], np.float32)
    return np.array([round(float(end), 1) for end in box + offset]) - offset


def eleven_point_ap(recall: np.ndarray, precision: np.ndarray) -> float:
    """Average the interpolated precision over the recalls 0, 0.1, ..., 1.

    Args:
        recall: (D,) in order of descending score.
        precision: (D,) in the same order.

    Returns:
        The mean over the eleven recalls of the highest precision at that recall or above.
    """
    return sum(precision[recall >= t].max(initial=0.0) for t in np.arange(0.0, 1.1, 0.1)) / 11


def iou(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Compute intersection over union.

    Args:
        box: One box, (4,).
        boxes: Other boxes, (K, 4).

    Returns:
        The IoU of the box with each of the others, (K,).
    """
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    both = np.maximum(sides, 0).prod(1)
    return both / ((box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(1) - both)


def summarize_ap(metric_name: str, ap_table: np.ndarray, class_names: Sequence[str]) -> ApRecord:
    """Average over classes and thresholds.

    Args:
        metric_name: The definition of the metric.
        ap_table: AP in percent of each class at each of IOU_THRESHOLDS, (classes, 10).
        class_names: The names of these classes.

    Returns:
        The record, rounded to three digits.
    """
    mean = ap_table.mean(0) if len(ap_table) else np.zeros(len(IOU_THRESHOLDS))
    return {
        "metric": metric_name,
        "AP": round(float(mean.mean()), 3),
        "AP50": round(float(mean[0]), 3),
        "AP75": round(float(mean[5]), 3),
        "AP50_of_class": {
            name: round(float(row[0]), 3) for name, row in zip(class_names, ap_table, strict=True)
        },
    }


# --- COCO -----------------------------------------------------------------------------------------


def import_pycocotools() -> ModuleType:
    """Import pycocotools with its three modules.

    Raises:
        UsageError: If it is not installed.
    """
    try:
        import pycocotools.coco
        import pycocotools.cocoeval
        import pycocotools.mask
    except ImportError:
        raise UsageError(
            'COCO\'s metric and masks need pycocotools: pip install "simsiam[transfer]"'
        ) from None
    return pycocotools


def coco_ap(
    predictions: Sequence[Detections],
    ground_truth: Sequence[Objects],
    classes: Sequence[str],
    kind: Literal["bbox", "segm"],
) -> ApRecord:
    """Compute COCO's AP with pycocotools.

    Args:
        predictions: The detections in each image.
        ground_truth: The annotated objects in each image; difficult objects are treated as crowds.
        classes: The names of the classes.
        kind: "bbox" for boxes or "segm" for masks.

    Returns:
        The AP of each class that has objects, and the means.
    """
    api = import_pycocotools()
    truth, detections = api.coco.COCO(), api.coco.COCO()
    images = [
        {"id": i, "height": o.size[0], "width": o.size[1]} for i, o in enumerate(ground_truth)
    ]
    categories = [{"id": label, "name": name} for label, name in enumerate(classes)]
    content = {"images": images, "categories": categories}
    truth.dataset = {**content, "annotations": list(objects_to_coco(ground_truth, kind))}
    detections.dataset = {**content, "annotations": list(detections_to_coco(predictions, kind))}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        detections.createIndex()
        evaluator = api.cocoeval.COCOeval(truth, detections, kind)
        evaluator.evaluate()
        evaluator.accumulate()
    # (thresholds, recalls, classes): all areas, 100 detections an image; -1 without objects
    precision = evaluator.eval["precision"][:, :, :, 0, -1]
    table = 100 * precision.mean(1).T
    labels = [label for label in range(len(classes)) if (precision[:, :, label] > -1).all()]
    parts = "boxes" if kind == "bbox" else "masks"
    metric = f"COCO, {parts}, 101 points, at IoU 0.50:0.95, pycocotools {version('pycocotools')}"
    return summarize_ap(metric, table[labels], [classes[label] for label in labels])


def objects_to_coco(ground_truth: Sequence[Objects], kind: str) -> Iterator[dict[str, object]]:
    """Convert annotated objects to COCO annotations.

    Args:
        ground_truth: The annotated objects in each image.
        kind: "bbox", or "segm" to include masks.

    Yields:
        One annotation for each object.
    """
    for i, k, annotation in iterate_boxes(ground_truth):
        objects = ground_truth[i]
        annotation["iscrowd"] = int(objects.crowd[k] or objects.difficult[k])
        if kind == "segm":
            annotation["segmentation"] = object_rle(objects, k)
            annotation["area"] = float(import_pycocotools().mask.area(annotation["segmentation"]))
        yield annotation


def detections_to_coco(predictions: Sequence[Detections], kind: str) -> Iterator[dict[str, object]]:
    """Convert detections to COCO annotations.

    Args:
        predictions: The detections in each image.
        kind: "bbox", or "segm" to include masks.

    Yields:
        One annotation for each detection.
    """
    for i, k, annotation in iterate_boxes(predictions):
        annotation |= {"score": float(predictions[i].scores[k]), "iscrowd": 0}
        if kind == "segm":
            annotation["segmentation"] = predictions[i].masks[k]
        yield annotation


def iterate_boxes(
    images: Sequence[Objects | Detections],
) -> Iterator[tuple[int, int, dict[str, object]]]:
    """Enumerate the boxes of all images.

    Args:
        images: The boxes in each image.

    Yields:
        The index of the image, the index of the box in it, and the fields that every COCO
        annotation has. Ids begin at 1, because to pycocotools 0 means "no match".
    """
    ids = count(1)
    for i, image in enumerate(images):
        for k, (x0, y0, x1, y1) in enumerate(image.boxes.astype(np.float64)):
            w, h = x1 - x0, y1 - y0
            box = {"bbox": [x0, y0, w, h], "area": w * h}
            label = int(image.labels[k])
            yield i, k, {"id": next(ids), "image_id": i, "category_id": label} | box


# --- masks ----------------------------------------------------------------------------------------


def object_rle(objects: Objects, index: int) -> RunLengths:
    """Encode the mask of one object.

    Args:
        objects: The objects of an image, with masks.
        index: Which of them.

    Returns:
        The mask in COCO's run-length encoding.
    """
    masks, (h, w), segments = import_pycocotools().mask, objects.size, objects.segments[index]
    if not isinstance(segments, dict):
        return masks.merge(masks.frPyObjects(segments, h, w))
    if isinstance(segments["counts"], list):
        return masks.frPyObjects(segments, h, w)
    return cast(RunLengths, segments)


def decode_masks(objects: Objects) -> np.ndarray:
    """Draw the masks of all objects.

    Args:
        objects: The K objects of an image, of which some may have no mask.

    Returns:
        (K, H, W) uint8, 1 inside.
    """
    masks = np.zeros((len(objects), *objects.size), np.uint8)
    for k, segments in enumerate(objects.segments):
        if segments is not None:
            masks[k] = import_pycocotools().mask.decode(object_rle(objects, k))
    return masks


def encode_mask(mask: np.ndarray) -> RunLengths:
    """Encode a mask.

    Args:
        mask: (H, W) bool.

    Returns:
        The mask in COCO's run-length encoding.
    """
    return import_pycocotools().mask.encode(np.asfortranarray(mask.astype(np.uint8)))
