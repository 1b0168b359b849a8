"""Average precision: VOC's equals a reference below, COCO's equals pycocotools and a reference."""

import numpy as np
import pytest

from simsiam.detection.annotations import Objects
from simsiam.detection.metrics import Detections, coco_ap, decode_masks, encode_mask, voc_ap

pytest.importorskip("pycocotools")
CLASSES = ("a", "b", "c")


def scene(seed: int, images: int = 30):
    """Draw objects and detections: objects moved, missed, doubled or invented; scores tie."""
    rng = np.random.default_rng(seed)
    truth, predictions = [], []
    for _ in range(images):
        k = rng.integers(0, 6)
        corner, sides = rng.uniform(0, 60, (k, 2)), rng.uniform(5, 38, (k, 2))
        boxes = np.round(np.concatenate([corner, corner + sides], 1)).astype(np.float32)
        difficult = rng.random(k) < 0.2
        labels = rng.integers(0, 3, k)
        truth.append(Objects((100, 100), boxes, labels, difficult, np.zeros(k, bool)))
        rows = rng.integers(0, k, rng.integers(0, 9)) if k else np.zeros(0, int)
        moved = boxes[rows] + rng.normal(0, 3, (len(rows), 4)).astype(np.float32)
        made = np.concatenate([moved, [[5.25, 5, 20, 30]]]).astype(np.float32)
        made[:, 2:] = np.maximum(made[:, 2:], made[:, :2] + 1)
        guessed = np.where(rng.random(len(rows)) < 0.9, labels[rows], 0)
        scores = np.round(rng.random(len(made)), 2).astype(np.float32) + np.float32(0.0001)
        predictions.append(Detections(made, scores, np.append(guessed, 1)))
    return predictions, truth


def voc_reference(predictions, truth, label: int, threshold: float) -> float:
    """AP of a class at one IoU, as VOC 2007's development kit computes it; pixels count from 1."""
    rows = []
    for image, f in enumerate(predictions):
        for box, score, kind in zip(f.boxes, f.scores, f.labels):
            if kind == label:
                x0, y0, x1, y1 = (float(f"{v:.1f}") for v in box + np.float32([1, 1, 0, 0]))
                rows.append((float(f"{score:.3f}"), image, (x0, y0, x1, y1)))
    rows.sort(key=lambda row: -row[0])
    positives = sum(int(k == label and not h) for o in truth for k, h in zip(o.labels, o.difficult))
    used, hits = set(), []
    for _, image, (x0, y0, x1, y1) in rows:
        best, at = -1.0, None
        for k, (box, kind) in enumerate(zip(truth[image].boxes, truth[image].labels)):
            if kind == label:
                u0, v0, u1, v1 = box[0] + 1, box[1] + 1, box[2], box[3]
                wide, high = min(x1, u1) - max(x0, u0) + 1, min(y1, v1) - max(y0, v0) + 1
                both = max(wide, 0) * max(high, 0)
                overlap = both / (
                    (x1 - x0 + 1) * (y1 - y0 + 1) + (u1 - u0 + 1) * (v1 - v0 + 1) - both
                )
                if overlap > best:
                    best, at = overlap, k
        if best <= threshold:
            hits.append(False)
        elif not truth[image].difficult[at]:
            hits.append((image, at) not in used)
            used.add((image, at))
    ap, curve, right = 0.0, [], 0
    for rank, hit in enumerate(hits, 1):
        right += hit
        curve.append((right / positives, right / rank))
    for t in np.arange(0.0, 1.1, 0.1):
        ap += max((p for r, p in curve if r >= t), default=0.0) / 11
    return ap


def ap_table(reference, predictions, truth):
    """AP in percent by a reference, (classes, thresholds)."""
    thresholds = [percent / 100 for percent in range(50, 100, 5)]
    return 100 * np.array(
        [[reference(predictions, truth, c, t) for t in thresholds] for c in range(3)]
    )


@pytest.mark.parametrize("seed", range(3))
def test_voc_is_the_reference(seed):
    predictions, truth = scene(seed)
    table = ap_table(voc_reference, predictions, truth)
    record = voc_ap(predictions, truth, CLASSES)
    assert np.isclose(record["AP"], table.mean(), atol=1e-3) and 0 < record["AP"] < 100
    assert np.isclose(record["AP50"], table[:, 0].mean(), atol=1e-3)
    assert np.isclose(record["AP75"], table[:, 5].mean(), atol=1e-3)
    assert np.allclose(list(record["AP50_of_class"].values()), table[:, 0], atol=1e-3)


def coco_reference(predictions, truth, label: int, threshold: float) -> float:
    """AP of a class at one IoU by COCO's definition, without crowds.

    Detections are matched greedily by score, and precision is averaged over 101 recalls.
    """
    rows, positives = [], sum(int((o.labels == label).sum()) for o in truth)
    for image, f in enumerate(predictions):
        detections = [k for k in np.argsort(-f.scores, kind="stable") if f.labels[k] == label]
        objects = [k for k in range(len(truth[image])) if truth[image].labels[k] == label]
        used = set()
        for k in detections:
            x0, y0, x1, y1 = f.boxes[k].astype(float)
            best, at = threshold, None
            for j in objects:
                u0, v0, u1, v1 = truth[image].boxes[j].astype(float)
                both = max(min(x1, u1) - max(x0, u0), 0) * max(min(y1, v1) - max(y0, v0), 0)
                overlap = both / ((x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - both)
                if j not in used and overlap >= best:
                    best, at = overlap, j
            used.add(at)
            rows.append((float(f.scores[k]), at is not None))
    rows.sort(key=lambda row: -row[0])
    hits = np.cumsum([hit for _, hit in rows])
    recall, precision = hits / positives, hits / np.arange(1, len(rows) + 1)
    return float(np.mean([precision[recall >= t].max(initial=0.0) for t in np.linspace(0, 1, 101)]))


def test_coco_is_the_definition():
    predictions, truth = scene(7)
    truth = [Objects(o.size, o.boxes, o.labels, np.zeros(len(o), bool), o.crowd) for o in truth]
    record = coco_ap(predictions, truth, CLASSES, "bbox")
    table = ap_table(coco_reference, predictions, truth)
    assert np.isclose(record["AP"], table.mean(), atol=0.01) and 0 < record["AP"] < 100
    assert np.isclose(record["AP50"], table[:, 0].mean(), atol=0.01)


def test_coco_is_pycocotools_on_its_own_files(tmp_path):
    """The same objects and detections, written as COCO files and read by pycocotools alone."""
    import json

    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def xywh(box):
        x0, y0, x1, y1 = box.astype(float).tolist()
        return [x0, y0, x1 - x0, y1 - y0]

    predictions, truth = scene(11)
    boxes = [(i, k, xywh(box)) for i, o in enumerate(truth) for k, box in enumerate(o.boxes)]
    truth_file = {
        "images": [{"id": i + 1, "height": 100, "width": 100} for i in range(len(truth))],
        "categories": [{"id": c + 1, "name": name} for c, name in enumerate(CLASSES)],
        "annotations": [
            {"id": n + 1, "image_id": i + 1, "category_id": int(truth[i].labels[k]) + 1,
             "bbox": box, "area": box[2] * box[3], "iscrowd": int(truth[i].difficult[k])}
            for n, (i, k, box) in enumerate(boxes)
        ],
    }  # fmt: skip
    results = [
        {"image_id": i + 1, "category_id": int(c) + 1, "bbox": xywh(box), "score": float(s)}
        for i, f in enumerate(predictions) for box, s, c in zip(f.boxes, f.scores, f.labels)
    ]  # fmt: skip
    (tmp_path / "truth.json").write_text(json.dumps(truth_file))
    (tmp_path / "results.json").write_text(json.dumps(results))
    api = COCO(str(tmp_path / "truth.json"))
    evaluator = COCOeval(api, api.loadRes(str(tmp_path / "results.json")), "bbox")
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    record = coco_ap(predictions, truth, CLASSES, "bbox")
    assert np.allclose(
        [record[k] for k in ("AP", "AP50", "AP75")], 100 * evaluator.stats[:3], atol=1e-3
    )


def test_a_perfect_mask_scores_100_and_masks_count_where_boxes_agree():
    """A disc and its square have the same box; only the mask of the disc matches the disc."""
    y, x = np.ogrid[:60, :60]
    disc = (y - 30) ** 2 + (x - 30) ** 2 < 20**2
    box, label = np.array([[11, 11, 50, 50]], np.float32), np.array([0])
    ring = [
        [
            float(v)
            for t in np.linspace(0, 2 * np.pi, 60)
            for v in (30.5 + 20 * np.cos(t), 30.5 + 20 * np.sin(t))
        ]
    ]
    truth = [Objects((60, 60), box, label, np.zeros(1, bool), np.zeros(1, bool), (ring,))]
    assert abs(int(decode_masks(truth[0]).sum()) - int(disc.sum())) < 60
    square = np.zeros((60, 60), bool)
    square[11:50, 11:50] = True
    aps = {}
    for name, mask in {"disc": disc, "square": square}.items():
        predictions = [Detections(box, np.array([0.9], np.float32), label, (encode_mask(mask),))]
        aps[name] = coco_ap(predictions, truth, ("a",), "segm")
        assert coco_ap(predictions, truth, ("a",), "bbox")["AP"] == pytest.approx(100)
    assert aps["disc"]["AP75"] == pytest.approx(100) and aps["square"]["AP"] < 80


def test_a_class_without_objects_does_not_count():
    predictions, truth = scene(5)
    truth = [o.take(o.labels < 2) for o in truth]
    voc = voc_ap(predictions, truth, CLASSES)["AP50_of_class"]
    assert set(voc) == set(coco_ap(predictions, truth, CLASSES, "bbox")["AP50_of_class"])
    assert "c" not in voc
