"""Average precision in percent, by the two definitions that Table 5 mixes: COCO's for COCO, VOC's of 2007 for VOC.

Both take what was found and what is there, image by image. A class of which nothing is there has no AP and does not
count in the mean.
"""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count
from typing import Any

import numpy as np

from simsiam.detection.annotations import Objects
from simsiam.errors import UsageError

IOU_THRESHOLDS = np.arange(50, 100, 5) / 100
Record = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Detections:
    """The D objects that a detector finds in one image."""

    boxes: np.ndarray  # float32 (D, 4), pixels of the original image
    scores: np.ndarray  # float32 (D,)
    labels: np.ndarray  # int64 (D,)
    masks: tuple[
        dict[str, Any], ...
    ] = ()  # run lengths of the whole image, one a box; none where only boxes are found


def compute_metrics(
    predictions: Sequence[Detections],
    ground_truth: Sequence[Objects],
    classes: Sequence[str],
    task: str,
) -> dict[str, Record]:
    """Every metric by name: voc_box and coco_box, and for segmentation coco_mask."""
    metrics = {
        "voc_box": voc_ap(predictions, ground_truth, classes),
        "coco_box": coco_ap(predictions, ground_truth, classes, "bbox"),
    }
    return metrics | (
        {"coco_mask": coco_ap(predictions, ground_truth, classes, "segm")}
        if task == "segmentation"
        else {}
    )


# --- VOC --------------------------------------------------------------------------------------------------------------


def voc_ap(
    predictions: Sequence[Detections], ground_truth: Sequence[Objects], classes: Sequence[str]
) -> Record:
    """AP, AP50 and AP75 by the eleven points of VOC 2007, at IoU 0.50 to 0.95, as detectron2's evaluator has them.

    So scores are rounded to three digits and boxes to a tenth of a pixel, as in the files that it writes first.
    """
    per_class = {}
    for label, name in enumerate(classes):
        if (aps := voc_class_ap(predictions, ground_truth, label)) is not None:
            per_class[name] = aps
    table = 100 * np.array(list(per_class.values())).reshape(-1, len(IOU_THRESHOLDS))
    words = "VOC 2007, 11 points, at IoU 0.50:0.95, as detectron2 computes it"
    return summarize_ap(words, table, tuple(per_class))


def voc_class_ap(
    predictions: Sequence[Detections], ground_truth: Sequence[Objects], label: int
) -> np.ndarray | None:
    """AP (10,) of one class at each of IOUS, between 0 and 1; None where no object counts."""
    truth = [o.take(o.labels == label) for o in ground_truth]
    hard = [o.difficult | o.crowd for o in truth]
    positives = int(sum((~h).sum() for h in hard))
    if not positives:
        return None
    mine = [
        (i, row) for i, f in enumerate(predictions) for row in np.flatnonzero(f.labels == label)
    ]
    scores = np.array([round(float(predictions[i].scores[row]), 3) for i, row in mine])
    order = np.argsort(-scores, kind="stable")
    right, wrong = (
        np.zeros((len(IOU_THRESHOLDS), len(mine))),
        np.zeros((len(IOU_THRESHOLDS), len(mine))),
    )
    taken = [np.zeros((len(IOU_THRESHOLDS), len(o)), bool) for o in truth]
    for place, (i, row) in enumerate(mine[k] for k in order):
        overlaps = iou(round_box(predictions[i].boxes[row]), truth[i].boxes.astype(np.float64))
        best = int(overlaps.argmax()) if len(overlaps) else -1
        for level, least in enumerate(IOU_THRESHOLDS):
            if best < 0 or overlaps[best] <= least:
                wrong[level, place] = 1
            elif not hard[i][best]:
                (wrong if taken[i][level, best] else right)[level, place] = 1
                taken[i][level, best] = True
    right, wrong = right.cumsum(1), wrong.cumsum(1)
    recall = right / positives
    precision = right / np.maximum(right + wrong, np.finfo(np.float64).eps)
    return np.array([eleven_point_ap(r, p) for r, p in zip(recall, precision, strict=True)])


def round_box(box: np.ndarray) -> np.ndarray:
    """A box as it reads back from VOC's files, which count pixels from 1."""
    first = np.array([1, 1, 0, 0], np.float32)
    return np.array([round(float(end), 1) for end in box + first]) - first


def eleven_point_ap(recall: np.ndarray, precision: np.ndarray) -> float:
    """The mean over recalls 0, 0.1, ..., 1 of the best precision at that recall or a higher one."""
    return sum(precision[recall >= t].max(initial=0.0) for t in np.arange(0.0, 1.1, 0.1)) / 11


def iou(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Intersection over union of one box (4,) with boxes (K, 4)."""
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    both = np.maximum(sides, 0).prod(1)
    return both / ((box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(1) - both)


def summarize_ap(metric_name: str, ap_table: np.ndarray, class_names: Sequence[str]) -> Record:
    """A record from the AP (classes, IOUS) of each class."""
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


# --- COCO -------------------------------------------------------------------------------------------------------------


def import_pycocotools() -> Any:
    """pycocotools. Raises UsageError where it is not installed."""
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
    kind: str,
) -> Record:
    """COCO's AP, AP50 and AP75 of boxes ("bbox") or masks ("segm"), by pycocotools; difficult objects as crowds."""
    api = import_pycocotools()
    truth, guesses = api.coco.COCO(), api.coco.COCO()
    images = [
        {"id": i, "height": o.size[0], "width": o.size[1]} for i, o in enumerate(ground_truth)
    ]
    categories = [{"id": label, "name": name} for label, name in enumerate(classes)]
    truth.dataset = {
        "images": images,
        "categories": categories,
        "annotations": list(objects_to_coco(ground_truth, kind)),
    }
    guesses.dataset = {
        "images": images,
        "categories": categories,
        "annotations": list(detections_to_coco(predictions, kind)),
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        guesses.createIndex()
        judge = api.cocoeval.COCOeval(truth, guesses, kind)
        judge.evaluate()
        judge.accumulate()
    precision = judge.eval["precision"][
        :, :, :, 0, -1
    ]  # (IOUS, recalls, classes): all areas, 100 detections an image
    table = 100 * precision.mean(1).T
    known = [label for label in range(len(classes)) if (precision[:, :, label] > -1).all()]
    words = (
        f"COCO, {'boxes' if kind == 'bbox' else 'masks'}, 101 points, at IoU 0.50:0.95, pycocotools"
    )
    return summarize_ap(
        f"{words} {version('pycocotools')}", table[known], [classes[label] for label in known]
    )


def objects_to_coco(ground_truth: Sequence[Objects], kind: str) -> Any:
    """What is there, as COCO has it."""
    for objects, k, one in iterate_boxes(ground_truth):
        one["iscrowd"] = int(objects.crowd[k] or objects.difficult[k])
        if kind == "segm":
            one["segmentation"] = object_rle(objects, k)
            one["area"] = float(import_pycocotools().mask.area(one["segmentation"]))
        yield one


def detections_to_coco(predictions: Sequence[Detections], kind: str) -> Any:
    """What was found, as COCO has it."""
    for f, k, one in iterate_boxes(predictions):
        one |= {"score": float(f.scores[k]), "iscrowd": 0}
        if kind == "segm":
            one["segmentation"] = f.masks[k]
        yield one


def iterate_boxes(images: Sequence[Any]) -> Any:
    """Each box of each image: the image's boxes, which of them it is, and COCO's words for any box.

    Ids begin at 1, for to pycocotools 0 is no match.
    """
    ids = count(1)
    for i, of in enumerate(images):
        for k, (x1, y1, x2, y2) in enumerate(of.boxes.astype(np.float64)):
            w, h = x2 - x1, y2 - y1
            box = {"bbox": [x1, y1, w, h], "area": w * h}
            yield of, k, {"id": next(ids), "image_id": i, "category_id": int(of.labels[k])} | box


# --- masks ------------------------------------------------------------------------------------------------------------


def object_rle(objects: Objects, index: int) -> dict[str, Any]:
    """Object k's mask in COCO's run lengths."""
    masks, (h, w), segments = import_pycocotools().mask, objects.size, objects.segments[index]
    if isinstance(segments, dict):
        return (
            masks.frPyObjects(segments, h, w) if isinstance(segments["counts"], list) else segments
        )
    return masks.merge(masks.frPyObjects(segments, h, w))


def decode_masks(objects: Objects) -> np.ndarray:
    """All masks, uint8 (K, H, W)."""
    rows = [import_pycocotools().mask.decode(object_rle(objects, k)) for k in range(len(objects))]
    return np.stack(rows) if rows else np.zeros((0, *objects.size), np.uint8)


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """A mask, bool (H, W), in COCO's run lengths."""
    return import_pycocotools().mask.encode(np.asfortranarray(mask.astype(np.uint8)))
