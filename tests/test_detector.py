"""The C4 detector has detectron2's names and shapes; its transform moves boxes with pixels."""

import pytest
import torch

from simsiam.detection.detector import DetectionTransform, build_detector, to_detectron2
from simsiam.detection.schedules import SCHEDULES, Schedule
from simsiam.errors import UsageError
from simsiam.model.backbones import create_backbone

PAPER = Schedule()
STATISTICS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
SMALL = {"train_sides": (64,), "test_side": 64, "longest_side": 96, "anchors": (16, 32),
         "proposals": 40, "test_proposals": 20, "regions": 8, "region_size": 4}  # fmt: skip


def small_detector(num_classes=3, masks=False, size=224, **settings):
    torch.manual_seed(0)
    schedule = Schedule.from_settings(SMALL | settings)
    backbone = create_backbone("resnet18", image_size=size, width=8)
    return build_detector(backbone, num_classes, schedule, masks=masks, **STATISTICS)


def example(count=2, masks=False):
    """Return images with two objects each."""
    torch.manual_seed(1)
    boxes = torch.tensor([[5.0, 10, 40, 50], [30, 5, 60, 30]])
    targets = [{"boxes": boxes.clone(), "labels": torch.tensor([1, 3])} for _ in range(count)]
    for target in targets if masks else []:
        target["masks"] = torch.zeros(2, 64, 96, dtype=torch.uint8)
        target["masks"][0, 10:50, 5:40] = target["masks"][1, 5:30, 30:60] = 1
    return [torch.rand(3, 64, 96) for _ in range(count)], targets


def detectron2_shapes(classes: int, masks: bool) -> dict[str, tuple[int, ...]]:
    """R-50-C4 as detectron2 builds it, with MoCo's batch norm after res5, from its rules."""
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(name: str, width: int) -> None:
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{leaf}"] = (width,)

    def conv(name: str, out: int, inputs: int, k: int) -> None:
        shapes[f"{name}.weight"] = (out, inputs, k, k)
        norm(f"{name}.norm", out)

    conv("backbone.stem.conv1", 64, 3, 7)
    inputs = 64
    for stage, blocks in {2: 3, 3: 4, 4: 6, 5: 3}.items():
        owner = "roi_heads" if stage == 5 else "backbone"
        middle, out = 64 * 2 ** (stage - 2), 256 * 2 ** (stage - 2)
        for block in range(blocks):
            name = f"{owner}.res{stage}.{block}"
            if block == 0:
                conv(f"{name}.shortcut", out, inputs, 1)
            conv(f"{name}.conv1", middle, inputs, 1)
            conv(f"{name}.conv2", middle, middle, 3)
            conv(f"{name}.conv3", out, middle, 1)
            inputs = out
    norm("roi_heads.res5.norm", 2048)
    heads = {
        "proposal_generator.rpn_head.conv": (1024, 1024, 3, 3),
        "proposal_generator.rpn_head.objectness_logits": (15, 1024, 1, 1),
        "proposal_generator.rpn_head.anchor_deltas": (60, 1024, 1, 1),
        "roi_heads.box_predictor.cls_score": (classes + 1, 2048),
        "roi_heads.box_predictor.bbox_pred": (4 * classes, 2048),
    }
    if masks:
        heads |= {
            "roi_heads.mask_head.deconv": (2048, 256, 2, 2),
            "roi_heads.mask_head.predictor": (classes, 256, 1, 1),
        }
    for name, shape in heads.items():
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = (256 if "deconv" in name else shape[0],)
    return shapes


@pytest.mark.parametrize("classes, masks", [(20, False), (80, True)])
def test_the_full_size_c4_has_detectron2s_names_and_shapes(classes, masks):
    with torch.device("meta"):
        model = build_detector(
            create_backbone("resnet50", image_size=224), classes, PAPER, masks=masks, **STATISTICS
        )
        shapes = {name: tuple(tensor.shape) for name, tensor in to_detectron2(model, PAPER).items()}
    assert shapes == detectron2_shapes(classes, masks)
    first = model.roi_heads.box_head[0][0]
    # The stride is in the 3 x 3 convolution.
    assert first.conv2.stride == (2, 2) and first.conv1.stride == (1, 1)


def test_rows_are_in_detectron2s_order():
    """Anchors by size and then by shape, the background last, and boxes for classes only."""
    model = small_detector(num_classes=2)
    rpn, heads = model.rpn.head, model.roi_heads.box_predictor
    for layer in (rpn.cls_logits, rpn.bbox_pred, heads.cls_score, heads.bbox_pred):
        torch.nn.init.constant_(layer.weight, 0)
        layer.bias.data = torch.arange(len(layer.bias), dtype=torch.float32)
    state = to_detectron2(model, Schedule.from_settings(SMALL))
    # Our rows: shape 0 of sizes 16 and 32, then shape 1 of both, ...
    head = "proposal_generator.rpn_head"
    assert state[f"{head}.objectness_logits.bias"].tolist() == [0, 2, 4, 1, 3, 5]
    assert state[f"{head}.anchor_deltas.bias"].tolist()[:8] == [0, 1, 2, 3, 8, 9, 10, 11]
    assert state["roi_heads.box_predictor.cls_score.bias"].tolist() == [1, 2, 0]
    assert state["roi_heads.box_predictor.bbox_pred.bias"].tolist() == list(range(4, 12))
    sizes = [
        torch.sqrt((b[2] - b[0]) * (b[3] - b[1])).item()
        for b in model.rpn.anchor_generator.generate_anchors((16, 32), (0.5, 1.0, 2.0))
    ]
    assert [round(size / 16) for size in sizes] == [1, 2, 1, 2, 1, 2]


@pytest.mark.parametrize(
    "settings",
    [{}, {"stride": 8}, {"size": 32}, {"architecture": "fpn", "anchors": (8, 16, 32, 64, 128)}],
)
@pytest.mark.parametrize("masks", [False, True])
def test_one_step_trains_every_parameter_and_boxes_lie_in_the_image(settings, masks):
    model = small_detector(masks=masks, **settings).train()
    losses = model(*example(masks=masks))
    assert ("loss_mask" in losses) == masks and all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    untrained = [name for name, p in model.named_parameters() if p.grad is None]
    assert not untrained, untrained
    model.eval().roi_heads.score_thresh = 0.0
    image = torch.rand(3, 128, 192)
    (detections,) = model([image])
    boxes = detections["boxes"]
    assert len(boxes) and (boxes >= 0).all()
    assert (boxes[:, 2] <= 192).all() and (boxes[:, 3] <= 128).all()
    if masks:
        assert detections["masks"].shape == (len(boxes), 1, 128, 192)


def test_one_training_step_at_full_size():
    """ResNet-50 C4 with masks, COCO's anchors and classes; few pixels and regions, for speed."""
    schedule = Schedule.from_settings(
        SCHEDULES["coco"]() | {"train_sides": (128,), "proposals": 50, "regions": 4}
    )
    torch.manual_seed(0)
    model = build_detector(
        create_backbone("resnet50", image_size=224), 80, schedule, masks=True, **STATISTICS
    ).train()
    images, targets = example(1, masks=True)
    sum(model(images, targets).values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_stride_8_doubles_the_resolution_and_keeps_the_receptive_field():
    fine, coarse = small_detector(stride=8), small_detector()
    for m in (*fine.modules(), *coarse.modules()):
        if isinstance(m, torch.nn.BatchNorm2d):
            # The last one of a block starts at 0, which would hide the block's convolutions.
            torch.nn.init.ones_(m.weight)
    image = torch.rand(1, 3, 64, 64)
    (a,), (b,) = (m.eval().backbone(image).values() for m in (fine, coarse))
    assert a.shape[-2:] == (8, 8) and b.shape[-2:] == (4, 4)
    assert torch.allclose(a[..., ::2, ::2], b, atol=1e-5)  # equal where both have features
    shapes, coarse_shapes = (
        {k: v.shape for k, v in m.state_dict().items()} for m in (fine, coarse)
    )
    assert shapes == coarse_shapes
    with pytest.raises(UsageError, match="conv4 has stride 4 already"):
        small_detector(stride=8, size=32)


def test_boxes_and_masks_move_with_the_pixels():
    """A rectangle stays in its box and mask at every size and flip.

    Evaluation does not flip, and takes the side of test images, which training need not have had.
    """
    schedule = Schedule(train_sides=(40, 64, 90), test_side=48, longest_side=200)
    transform = DetectionTransform(schedule, [0.0] * 3, [1.0] * 3)
    image = torch.zeros(3, 60, 100)
    image[:, 10:30, 20:60] = 1
    target = {"boxes": torch.tensor([[20.0, 10, 60, 30]]), "masks": (image[:1] > 0).byte()}
    flips, sides = set(), set()
    torch.manual_seed(0)
    for _ in range(20):
        batch, (moved,) = transform.train()([image], [dict(target)])
        (h, w), (x0, y0, x1, y1) = batch.image_sizes[0], moved["boxes"][0].round().int().tolist()
        pixels = batch.tensors[0, 0, :h, :w]
        assert pixels[y0 + 2 : y1 - 2, x0 + 2 : x1 - 2].min() > 0.95
        assert abs(pixels.sum() - (x1 - x0) * (y1 - y0)) < 0.1 * pixels.sum()
        assert moved["masks"].shape == (1, h, w) and moved["masks"][0, y0 + 2, x0 + 2] == 1
        flips.add(x0 / w < 0.3)
        sides.add(h)
    assert flips == {True, False} and sides == {40, 64, 90}
    assert transform.eval()([image], None)[0].image_sizes == [(48, 80)]


def test_only_a_resnet_has_stages():
    with pytest.raises(UsageError, match="built on a ResNet's stages"):
        build_detector(torch.nn.Linear(2, 2), 3, PAPER, masks=False, **STATISTICS)
