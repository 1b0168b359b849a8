"""A picture of a few test images: above what is annotated, below what the detector detected."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from simsiam.data.images import evenly_spaced
from simsiam.detection.annotations import DetectionDataset
from simsiam.detection.metrics import Detections, decode_masks, import_pycocotools
from simsiam.detection.train_detector import read_image
from simsiam.errors import printable, truncate
from simsiam.pages.preview import BACKGROUND_COLOR, GAP, MARGIN, MUTED_COLOR, TEXT_COLOR
from simsiam.utils.files import atomic_write

NUM_IMAGES = 4
IMAGE_SIDE = 420  # pixels, the longer side of each image
MIN_SCORE = 0.5  # detections with a lower score are not drawn
# Okabe and Ito's colors without black; they can be told apart by color-blind readers.
COLORS = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)


def draw_detections(
    dataset: DetectionDataset, rows: np.ndarray, detections: Sequence[Detections], path: Path
) -> None:
    """Draw NUM_IMAGES images, spread evenly over those that were tested, as a PNG file.

    Args:
        dataset: The test images.
        rows: The indices of the images that were tested, int64.
        detections: What was found in each of them.
        path: The file to write.
    """
    columns = []
    for i in evenly_spaced(len(rows), NUM_IMAGES):
        row, detected = int(rows[i]), detections[int(i)]
        pixels, objects = read_image(dataset, row).permute(1, 2, 0).numpy(), dataset.objects[row]
        image = Image.fromarray(
            pixels[..., :3] if pixels.shape[2] >= 3 else np.repeat(pixels[..., :1], 3, axis=2)
        )
        sure = detected.scores >= MIN_SCORE
        encoded = [mask for mask, drawn in zip(detected.masks, sure, strict=False) if drawn]
        decode = import_pycocotools().mask.decode
        masks = np.stack([decode(mask) for mask in encoded]) if encoded else None
        truth = decode_masks(objects) if objects.segments else None
        boxes, labels, scores = detected.boxes[sure], detected.labels[sure], detected.scores[sure]
        above = draw_boxes(image, objects.boxes, objects.labels, None, truth)
        columns.append((above, draw_boxes(image, boxes, labels, scores, masks)))
    with atomic_write(path) as part:
        _arrange(columns, dataset.classes).save(part, format="PNG")


def _arrange(
    columns: Sequence[tuple[Image.Image, Image.Image]], classes: Sequence[str]
) -> Image.Image:
    """Place the images on one sheet, with headings and the colors of the classes."""
    width = sum(above.width + GAP for above, _ in columns) - GAP + 2 * MARGIN
    height = max(above.height for above, _ in columns)
    sheet = Image.new("RGB", (width, 2 * height + 4 * MARGIN), BACKGROUND_COLOR)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    pen.text((MARGIN, MARGIN // 2), "annotated", TEXT_COLOR, font)
    heading = f"detected, with a score of at least {MIN_SCORE}"
    pen.text((MARGIN, height + 2 * MARGIN - MARGIN // 2), heading, TEXT_COLOR, font)
    left = MARGIN
    for above, below in columns:
        sheet.paste(above, (left, MARGIN + GAP // 2))
        sheet.paste(below, (left, height + 2 * MARGIN + GAP // 2))
        left += above.width + GAP
    left, top = MARGIN, sheet.height - MARGIN
    for label, name in enumerate(printable(truncate(name)) for name in classes):
        pen.rectangle([left, top, left + 12, top + 12], COLORS[label % len(COLORS)])
        pen.text((left + 18, top - 3), name, MUTED_COLOR, font)
        left += 36 + int(pen.textlength(name, font))
    return sheet


def draw_boxes(
    image: Image.Image,
    boxes: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray | None,
    masks: np.ndarray | None,
) -> Image.Image:
    """Draw objects onto a copy of an image.

    Args:
        image: The image.
        boxes: (K, 4), pixels.
        labels: (K,) int64, which choose the colors.
        scores: (K,), printed at the boxes; None prints nothing.
        masks: (K, H, W), drawn as a tint; None draws none.

    Returns:
        The copy, resized to a longer side of IMAGE_SIDE.
    """
    scale = IMAGE_SIDE / max(image.size)
    if masks is not None and len(masks):
        pixels = np.asarray(image).astype(np.float32)
        for mask, label in zip(masks.astype(bool), labels, strict=True):
            color = np.array(COLORS[label % len(COLORS)], np.float32)
            pixels[mask] = 0.5 * pixels[mask] + 0.5 * color
        image = Image.fromarray(pixels.astype(np.uint8))
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    for k, (box, label) in enumerate(zip(boxes * scale, labels, strict=True)):
        outline = COLORS[label % len(COLORS)]
        pen.rectangle([float(value) for value in box], outline=outline, width=2)
        if scores is not None:
            corner = (float(box[0]) + 4, float(box[1]) + 2)
            pen.text(corner, f"{scores[k]:.2f}", outline, font)
    return image
