"""A few test images beside each other, with what is there and with what was found."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from simsiam.data.images import evenly_spaced
from simsiam.detection.annotations import DetectionDataset
from simsiam.detection.metrics import Detections, decode_masks, import_pycocotools
from simsiam.detection.train_detector import read_image
from simsiam.pages.preview import BACKGROUND_COLOR, GAP, MARGIN, MUTED_COLOR, TEXT_COLOR
from simsiam.utils.files import atomic_write

NUM_IMAGES, IMAGE_SIDE = 4, 420  # images, and the longer side of each in pixels
MIN_SCORE = 0.5  # score of an object that is drawn
# Okabe and Ito's, without black: told apart without seeing red or green.
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
    dataset: DetectionDataset, positions: np.ndarray, detections: Sequence[Detections], path: Path
) -> None:
    """Write a PNG of SHOWN images, spread evenly over `positions`: above what is there, below what is found.

    `found` is by the same positions.
    """
    chosen = [int(i) for i in evenly_spaced(len(positions), NUM_IMAGES)]
    columns = []
    for i in chosen:
        at = int(positions[i])
        pixels, objects, seen = (
            read_image(dataset, at).permute(1, 2, 0).numpy(),
            dataset.objects[at],
            detections[i],
        )
        picture = Image.fromarray(
            pixels[..., :3] if pixels.shape[2] >= 3 else np.repeat(pixels[..., :1], 3, axis=2)
        )
        sure = seen.scores >= MIN_SCORE
        guessed = [mask for mask, good in zip(seen.masks, sure, strict=False) if good]
        masks = (
            np.stack([import_pycocotools().mask.decode(mask) for mask in guessed])
            if guessed
            else None
        )
        truth = decode_masks(objects) if objects.segments else None
        columns.append(
            (
                draw_boxes(picture, objects.boxes, objects.labels, None, truth),
                draw_boxes(picture, seen.boxes[sure], seen.labels[sure], seen.scores[sure], masks),
            )
        )
    width = sum(above.width + GAP for above, _ in columns) - GAP + 2 * MARGIN
    height = max(above.height for above, _ in columns)
    sheet = Image.new("RGB", (width, 2 * height + 4 * MARGIN), BACKGROUND_COLOR)
    pen, font, left = ImageDraw.Draw(sheet), ImageFont.load_default(15), MARGIN
    pen.text((MARGIN, MARGIN // 2), "what is there", TEXT_COLOR, font)
    pen.text(
        (MARGIN, height + 2 * MARGIN - MARGIN // 2),
        f"what is found, at a score of {MIN_SCORE} and more",
        TEXT_COLOR,
        font,
    )
    for above, below in columns:
        sheet.paste(above, (left, MARGIN + GAP // 2))
        sheet.paste(below, (left, height + 2 * MARGIN + GAP // 2))
        left += above.width + GAP
    left = MARGIN
    for label, name in enumerate(dataset.classes):
        pen.rectangle(
            [left, sheet.height - MARGIN, left + 12, sheet.height - MARGIN + 12],
            COLORS[label % len(COLORS)],
        )
        pen.text((left + 18, sheet.height - MARGIN - 3), name, MUTED_COLOR, font)
        left += 36 + int(pen.textlength(name, font))
    with atomic_write(path) as file:
        sheet.save(file, format="PNG")


def draw_boxes(
    image: Image.Image,
    boxes: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray | None,
    masks: np.ndarray | None,
) -> Image.Image:
    """A copy of the picture, its longer side SIDE, with boxes, scores as numbers, and masks as a tint."""
    scale = IMAGE_SIDE / max(image.size)
    if masks is not None and len(masks):
        pixels = np.asarray(image).astype(np.float32)
        for mask, label in zip(masks.astype(bool), labels, strict=True):
            pixels[mask] = 0.5 * pixels[mask] + 0.5 * np.array(
                COLORS[label % len(COLORS)], np.float32
            )
        image = Image.fromarray(pixels.astype(np.uint8))
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    for k, (box, label) in enumerate(zip(boxes * scale, labels, strict=True)):
        color = COLORS[label % len(COLORS)]
        pen.rectangle([float(value) for value in box], outline=color, width=2)
        if scores is not None:
            pen.text((float(box[0]) + 4, float(box[1]) + 2), f"{scores[k]:.2f}", color, font)
    return image
