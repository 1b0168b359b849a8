"""Detectors on our ResNets from torchvision's parts: Faster and Mask R-CNN with the C4 backbone, or with a pyramid.

C4 (MoCo's, and so Table 5's): the RPN looks at conv4's features, conv5 is the head that looks at each region, and a
batch norm of its own follows it. All batch norms are trained. The stride of a bottleneck stands in its 3 x 3.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import ResNet
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.roi_heads import (
    RoIHeads,
    fastrcnn_loss,
    maskrcnn_inference,
    maskrcnn_loss,
)
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import RoIAlign
from torchvision.transforms.v2 import functional as TF

from simsiam.detection.schedules import Schedule
from simsiam.errors import UsageError
from simsiam.exports.detectron2 import detectron2_name

ASPECT_RATIOS = (0.5, 1.0, 2.0)  # height over width of the anchors of one size
# torchvision's values are detectron2's but where one stands here or in Schedule.
RPN_OPTIONS: dict[str, Any] = {
    "fg_iou_thresh": 0.7, "bg_iou_thresh": 0.3, "batch_size_per_image": 256, "positive_fraction": 0.5,
    "nms_thresh": 0.7,
}  # fmt: skip
ROI_HEAD_OPTIONS: dict[str, Any] = {
    "fg_iou_thresh": 0.5, "bg_iou_thresh": 0.5, "positive_fraction": 0.25, "bbox_reg_weights": None,
    "score_thresh": 0.05, "nms_thresh": 0.5, "detections_per_img": 100,
}  # fmt: skip


class DetectionTransform(GeneralizedRCNNTransform):
    """Normalizes, resizes, batches, and while training flips half of the images; draws from torch's own numbers.

    Not torchvision's resize: an image made smaller is smoothed first, as by Pillow, which detectron2 resizes with.
    """

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> Any:
        h, w = image.shape[-2:]
        side = self.torch_choice(self.min_size) if self.training else self.min_size[-1]
        scale = min(side / min(h, w), self.max_size / max(h, w))
        size = [max(1, round(h * scale)), max(1, round(w * scale))]
        flip = self.training and bool(torch.rand(()) < 0.5)
        image = TF.resize(image, size, antialias=True)
        image = image.flip(-1) if flip else image
        if target is None:
            return image, None
        target["boxes"] = resize_boxes(target["boxes"], [h, w], size)
        if "masks" in target:
            target["masks"] = TF.resize(target["masks"], size, TF.InterpolationMode.NEAREST)
        if flip:
            left, top, right, bottom = target["boxes"].unbind(1)
            target["boxes"] = torch.stack([size[1] - right, top, size[1] - left, bottom], dim=1)
            target |= {"masks": target["masks"].flip(-1)} if "masks" in target else {}
        return image, target


class Float32RPNHead(RPNHead):
    """torchvision's, with float32 out: boxes are decoded from it."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [one.float() for one in logits], [one.float() for one in deltas]


class C4RoIHeads(RoIHeads):
    """Regions of conv4 through conv5 and a batch norm, whose mean decides class and box, and whose map the mask."""

    def __init__(
        self,
        conv5: nn.Module,
        width: int,
        stride: int,
        num_classes: int,
        schedule: Schedule,
        masks: bool,
    ):
        pool, predictor = (
            RoIAlign(schedule.region_size, 1 / stride, 0, aligned=True),
            FastRCNNPredictor(width, 1 + num_classes),
        )
        nn.init.normal_(predictor.cls_score.weight, std=0.01)
        nn.init.normal_(predictor.bbox_pred.weight, std=0.001)
        nn.init.zeros_(predictor.cls_score.bias)
        nn.init.zeros_(predictor.bbox_pred.bias)
        head = nn.Sequential(conv5, nn.BatchNorm2d(width))
        super().__init__(
            pool, head, predictor, batch_size_per_image=schedule.regions, **ROI_HEAD_OPTIONS
        )
        if masks:
            self.mask_predictor = MaskRCNNPredictor(width, 256, 1 + num_classes)

    def region_features(self, features: Mapping[str, Tensor], regions: list[Tensor]) -> Tensor:
        """Features (regions of all images, width, h, w)."""
        (conv4,) = features.values()
        return self.box_head(self.box_roi_pool(conv4.float(), regions))

    def forward(self, features: Any, proposals: Any, image_shapes: Any, targets: Any = None) -> Any:
        if self.training:
            proposals, matched, labels, offsets = self.select_training_samples(proposals, targets)
            h = self.region_features(features, proposals)
            logits, deltas = self.box_predictor(h.float().mean((2, 3)))
            names = ("loss_classifier", "loss_box_reg")
            losses = dict(
                zip(
                    names,
                    fastrcnn_loss(logits.float(), deltas.float(), labels, offsets),
                    strict=True,
                )
            )
            if self.mask_predictor is not None:
                right = [one > 0 for one in labels]  # the regions that show an object
                losses["loss_mask"] = maskrcnn_loss(
                    self.mask_predictor(h[torch.cat(right)]).float(),
                    [one[r] for one, r in zip(proposals, right, strict=True)],
                    [t["masks"] for t in targets],
                    [t["labels"] for t in targets],
                    [one[r] for one, r in zip(matched, right, strict=True)],
                )
            return [], losses
        logits, deltas = self.box_predictor(
            self.region_features(features, proposals).float().mean((2, 3))
        )
        columns = self.postprocess_detections(
            logits.float(), deltas.float(), proposals, image_shapes
        )
        result = [
            dict(zip(("boxes", "scores", "labels"), one, strict=True))
            for one in zip(*columns, strict=True)
        ]
        if self.mask_predictor is not None:
            seen = self.mask_predictor(
                self.region_features(features, [one["boxes"] for one in result])
            ).float()
            for one, masks in zip(
                result, maskrcnn_inference(seen, [one["labels"] for one in result]), strict=True
            ):
                one["masks"] = masks
        return result, {}


def build_detector(
    backbone: nn.Module,
    num_classes: int,
    schedule: Schedule,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    masks: bool,
) -> GeneralizedRCNN:
    """The detector on a backbone, whose weights it takes over; the rest is drawn from torch's random numbers.

    Training: images, float32 (C, H, W) in 0..1, and targets (boxes, labels from 1, masks) to losses by name. Testing:
    images to boxes, labels, scores, masks, in pixels of the given images. Raises UsageError for another network than a
    ResNet.
    """
    if not isinstance(backbone, ResNet):
        raise UsageError(
            f"a detector is built on a ResNet's stages, and this is a {type(backbone).__name__}"
        )
    views = DetectionTransform(
        list(schedule.train_sides), schedule.longest_side, list(mean), list(std)
    )  # type: ignore[arg-type]
    if schedule.architecture == "fpn":
        return build_fpn_detector(backbone, num_classes, schedule, views, masks)
    stem = 4 if isinstance(backbone.maxpool, nn.MaxPool2d) else 1
    if schedule.stride == 8:
        if stem != 4:
            raise UsageError(
                f"a small stem has stride {4 * stem} at conv4 already: leave out --stride"
            )
        replace_stride_with_dilation(backbone.layer3)
    stride, width = stem * schedule.stride // 4, output_channels(backbone.layer3)
    conv4 = IntermediateLayerGetter(backbone, {"layer3": "conv4"})
    conv4.out_channels = width  # type: ignore[assignment]
    anchors = AnchorGenerator((schedule.anchors,), (ASPECT_RATIOS,))
    before = {
        "training": 6 * schedule.proposals,
        "testing": 6 * schedule.test_proposals,
    }  # detectron2: 12000 and 6000
    after = {"training": schedule.proposals, "testing": schedule.test_proposals}
    head = Float32RPNHead(width, len(schedule.anchors) * len(ASPECT_RATIOS))
    rpn = RegionProposalNetwork(
        anchors, head, pre_nms_top_n=before, post_nms_top_n=after, **RPN_OPTIONS
    )
    heads = C4RoIHeads(
        backbone.layer4, output_channels(backbone.layer4), stride, num_classes, schedule, masks
    )
    return GeneralizedRCNN(conv4, rpn, heads, views)


def build_fpn_detector(
    backbone: ResNet,
    num_classes: int,
    schedule: Schedule,
    transform: DetectionTransform,
    masks: bool,
) -> GeneralizedRCNN:
    """torchvision's Faster or Mask R-CNN with a feature pyramid on all four stages, with batch norms in it."""
    stages = {f"layer{i}": str(i - 1) for i in (1, 2, 3, 4)}
    widths = [output_channels(backbone.get_submodule(name)) for name in stages]
    pyramid = BackboneWithFPN(backbone, stages, widths, 256, norm_layer=nn.BatchNorm2d)
    model = (MaskRCNN if masks else FasterRCNN)(
        pyramid, 1 + num_classes,
        rpn_anchor_generator=AnchorGenerator(tuple((side,) for side in schedule.anchors), (ASPECT_RATIOS,) * len(schedule.anchors)),
        rpn_pre_nms_top_n_train=schedule.proposals, rpn_pre_nms_top_n_test=schedule.test_proposals,
        rpn_post_nms_top_n_train=schedule.proposals, rpn_post_nms_top_n_test=schedule.test_proposals,
        box_batch_size_per_image=schedule.regions,
    )  # fmt: skip
    model.transform = transform
    return model


def output_channels(stage: nn.Module) -> int:
    """Channels that a stage gives: those of its last batch norm."""
    return next(
        m.num_features for m in reversed(list(stage.modules())) if isinstance(m, nn.BatchNorm2d)
    )


def replace_stride_with_dilation(stage: nn.Sequential) -> None:
    """Take a stage's stride away, and let its 3 x 3 convolutions after that see as far as before."""
    for place, block in enumerate(stage):
        for conv in (m for m in block.modules() if isinstance(m, nn.Conv2d)):
            if (
                conv.kernel_size == (3, 3)
                and conv.stride == (1, 1)
                and (place or conv is not block.conv1)
            ):
                conv.dilation = conv.padding = (2, 2)
            conv.stride = (1, 1)


# --- detectron2's names -----------------------------------------------------------------------------------------------


def to_detectron2(model: GeneralizedRCNN, schedule: Schedule) -> dict[str, Tensor]:
    """A C4 detector's tensors by the names, and in the order of rows, of detectron2's Res5ROIHeads with MoCo's norm.

    There the background is the last class and has no box and no mask; anchors go by size first and then by shape.
    """
    assert schedule.architecture == "c4"
    sizes, shapes = len(schedule.anchors), len(ASPECT_RATIOS)
    rows = torch.arange(shapes * sizes).view(shapes, sizes).T.flatten()  # theirs to ours
    found = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        part, _, rest = name.partition(".")
        leaf = name.rpartition(".")[2]
        if part == "backbone":
            found[f"backbone.{detectron2_name(rest)}"] = tensor
        elif rest.startswith("head.conv."):
            found[f"proposal_generator.rpn_head.conv.{leaf}"] = tensor
        elif rest.startswith("head.cls_logits."):
            found[f"proposal_generator.rpn_head.objectness_logits.{leaf}"] = tensor[rows]
        elif rest.startswith("head.bbox_pred."):
            grouped = tensor.unflatten(0, (len(rows), 4))
            found[f"proposal_generator.rpn_head.anchor_deltas.{leaf}"] = grouped[rows].flatten(0, 1)
        elif rest.startswith("box_head.0."):
            there = detectron2_name(rest.replace("box_head.0", "layer4", 1))
            found[f"roi_heads.{there}"] = tensor
        elif rest.startswith("box_head.1."):
            found[f"roi_heads.res5.norm.{leaf}"] = tensor
        elif rest.startswith("box_predictor.cls_score."):
            found[f"roi_heads.{rest}"] = tensor.roll(-1, 0)
        elif rest.startswith("box_predictor.bbox_pred."):
            found[f"roi_heads.{rest}"] = tensor[4:]
        elif rest.startswith("mask_predictor.conv5_mask."):
            found[f"roi_heads.mask_head.deconv.{leaf}"] = tensor
        else:
            assert rest.startswith("mask_predictor.mask_fcn_logits."), name
            found[f"roi_heads.mask_head.predictor.{leaf}"] = tensor[1:]
    return found
