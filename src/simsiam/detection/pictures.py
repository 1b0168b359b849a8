"""A few test images beside each other, with what is there and with what was found."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from simsiam.data.images import spread
from simsiam.detection.annotations import Annotated
from simsiam.detection.metrics import Found, coco_api, pixels_of
from simsiam.detection.train_detector import read
from simsiam.pages.preview import GAP, INK, MARGIN, PALE, PAPER
from simsiam.utils.files import whole

SHOWN, SIDE = 4, 420  # images, and the longer side of each in pixels
LEAST = 0.5  # score of an object that is drawn
# Okabe and Ito's, without black: told apart without seeing red or green.
COLORS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))


def draw(part: Annotated, positions: np.ndarray, found: Sequence[Found], path: Path) -> None:
    """Write a PNG of SHOWN images, spread evenly over `positions`: above what is there, below what is found.

    `found` is by the same positions.
    """
    chosen = [int(i) for i in spread(len(positions), SHOWN)]
    columns = []
    for i in chosen:
        at = int(positions[i])
        pixels, objects, seen = read(part, at).permute(1, 2, 0).numpy(), part.objects[at], found[i]
        picture = Image.fromarray(pixels[..., :3] if pixels.shape[2] >= 3 else np.repeat(pixels[..., :1], 3, axis=2))
        sure = seen.scores >= LEAST
        guessed = [mask for mask, good in zip(seen.masks, sure, strict=False) if good]
        masks = np.stack([coco_api().mask.decode(mask) for mask in guessed]) if guessed else None
        truth = pixels_of(objects) if objects.segments else None
        columns.append(
            (
                marked(picture, objects.boxes, objects.labels, None, truth),
                marked(picture, seen.boxes[sure], seen.labels[sure], seen.scores[sure], masks),
            )
        )
    width = sum(above.width + GAP for above, _ in columns) - GAP + 2 * MARGIN
    height = max(above.height for above, _ in columns)
    sheet = Image.new("RGB", (width, 2 * height + 4 * MARGIN), PAPER)
    pen, font, left = ImageDraw.Draw(sheet), ImageFont.load_default(15), MARGIN
    pen.text((MARGIN, MARGIN // 2), "what is there", INK, font)
    pen.text((MARGIN, height + 2 * MARGIN - MARGIN // 2), f"what is found, at a score of {LEAST} and more", INK, font)
    for above, below in columns:
        sheet.paste(above, (left, MARGIN + GAP // 2))
        sheet.paste(below, (left, height + 2 * MARGIN + GAP // 2))
        left += above.width + GAP
    left = MARGIN
    for label, name in enumerate(part.classes):
        pen.rectangle([left, sheet.height - MARGIN, left + 12, sheet.height - MARGIN + 12], COLORS[label % len(COLORS)])
        pen.text((left + 18, sheet.height - MARGIN - 3), name, PALE, font)
        left += 36 + int(pen.textlength(name, font))
    with whole(path) as file:
        sheet.save(file, format="PNG")


def marked(
    picture: Image.Image, boxes: np.ndarray, labels: np.ndarray, scores: np.ndarray | None, masks: np.ndarray | None
) -> Image.Image:
    """A copy of the picture, its longer side SIDE, with boxes, scores as numbers, and masks as a tint."""
    scale = SIDE / max(picture.size)
    if masks is not None and len(masks):
        pixels = np.asarray(picture).astype(np.float32)
        for mask, label in zip(masks.astype(bool), labels, strict=True):
            pixels[mask] = 0.5 * pixels[mask] + 0.5 * np.array(COLORS[label % len(COLORS)], np.float32)
        picture = Image.fromarray(pixels.astype(np.uint8))
    picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
    for k, (box, label) in enumerate(zip(boxes * scale, labels, strict=True)):
        color = COLORS[label % len(COLORS)]
        pen.rectangle([float(value) for value in box], outline=color, width=2)
        if scores is not None:
            pen.text((float(box[0]) + 4, float(box[1]) + 2), f"{scores[k]:.2f}", color, font)
    return picture
