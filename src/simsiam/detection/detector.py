"""Detectors on ResNets, built from torchvision: Faster and Mask R-CNN with a C4 or FPN backbone.

C4 is the architecture of MoCo and of Table 5: the region proposal network (RPN) reads the features
of conv4; conv5 and an additional batch norm are the head for each region. All batch norms are
trained. The stride of a bottleneck is in its 3 x 3 convolution.
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
# Values of detectron2. torchvision's defaults agree with them except where set here or in Schedule.
RPN_OPTIONS: dict[str, Any] = {
    "fg_iou_thresh": 0.7,
    "bg_iou_thresh": 0.3,
    "batch_size_per_image": 256,
    "positive_fraction": 0.5,
    "nms_thresh": 0.7,
}
ROI_HEAD_OPTIONS: dict[str, Any] = {
    "fg_iou_thresh": 0.5,
    "bg_iou_thresh": 0.5,
    "positive_fraction": 0.25,
    "bbox_reg_weights": None,
    "score_thresh": 0.05,
    "nms_thresh": 0.5,
    "detections_per_img": 100,
}
Target = dict[str, Tensor]  # boxes (K, 4), labels (K,) from 1, perhaps masks (K, H, W)


class DetectionTransform(GeneralizedRCNNTransform):
    """Normalize, resize and batch images; in training, flip half of them.

    Draws from torch's global random numbers. Unlike torchvision's resize, this one smooths an image
    before making it smaller, as Pillow does, which detectron2 resizes with.

    Args:
        schedule: The sizes of training and of test images.
        mean: The mean of each channel.
        std: The standard deviation of each channel.
    """

    def __init__(self, schedule: Schedule, mean: Sequence[float], std: Sequence[float]):
        sides: Any = list(schedule.train_sides)  # torchvision declares an int, and takes both
        super().__init__(sides, schedule.longest_side, list(mean), list(std))
        self.test_side = schedule.test_side

    def resize(self, image: Tensor, target: Target | None = None) -> tuple[Tensor, Target | None]:
        """Resize and perhaps flip one image.

        Args:
            image: (C, H, W) float32.
            target: The objects in it; changed in place.

        Returns:
            The image and its target in the new size.
        """
        h, w = image.shape[-2:]
        side = self.torch_choice(self.min_size) if self.training else self.test_side
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
    """torchvision's RPN head with float32 outputs, because boxes are decoded from them."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Predict objectness and box offsets for every anchor.

        Args:
            x: Feature maps, (N, C, h, w) each.

        Returns:
            Logits (N, A, h, w) and offsets (N, 4A, h, w) for each map, float32.
        """
        logits, offsets = super().forward(x)
        return [level.float() for level in logits], [level.float() for level in offsets]


class C4RoIHeads(RoIHeads):
    """The head for each region: conv5 and a batch norm on the region's conv4 features.

    The mean of its output map predicts class and box, and the map itself predicts the mask.

    Args:
        conv5: The last stage of the ResNet.
        width: The number of channels of conv5's output.
        stride: The stride of conv4's features, in pixels.
        num_classes: The number of classes without the background.
        schedule: The size and number of regions.
        masks: Whether to predict masks.
    """

    def __init__(
        self,
        conv5: nn.Module,
        width: int,
        stride: int,
        num_classes: int,
        schedule: Schedule,
        masks: bool,
    ):
        pool = RoIAlign(schedule.region_size, 1 / stride, 0, aligned=True)
        predictor = FastRCNNPredictor(width, 1 + num_classes)
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
        """Compute the features of regions.

        Args:
            features: The features of conv4, (N, C, h, w) under its name.
            regions: Boxes (R, 4) in each image.

        Returns:
            (regions of all images, width, h, w).
        """
        (conv4,) = features.values()
        return self.box_head(self.box_roi_pool(conv4.float(), regions))

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[Target] | None = None,
    ) -> tuple[list[Target], dict[str, Tensor]]:
        """Classify and refine proposed regions.

        Args:
            features: The features of conv4, (N, C, h, w) under its name.
            proposals: Boxes (R, 4) in each image.
            image_shapes: Height and width of each image.
            targets: The objects in each image; needed in training.

        Returns:
            In training, no detections and the losses by name; otherwise the boxes, scores, labels
            and masks in each image and no losses.
        """
        if self.training:
            return [], self._losses(features, proposals, targets)
        return self._detections(features, proposals, image_shapes), {}

    def _losses(
        self, features: dict[str, Tensor], proposals: list[Tensor], targets: list[Target] | None
    ) -> dict[str, Tensor]:
        assert targets is not None
        proposals, matched, labels, offsets = self.select_training_samples(proposals, targets)
        h = self.region_features(features, proposals)
        logits, deltas = self.box_predictor(h.float().mean((2, 3)))
        class_loss, box_loss = fastrcnn_loss(logits.float(), deltas.float(), labels, offsets)
        losses = {"loss_classifier": class_loss, "loss_box_reg": box_loss}
        if self.mask_predictor is not None:
            positive = [rows > 0 for rows in labels]  # the regions that show an object
            losses["loss_mask"] = maskrcnn_loss(
                self.mask_predictor(h[torch.cat(positive)]).float(),
                [boxes[rows] for boxes, rows in zip(proposals, positive, strict=True)],
                [target["masks"] for target in targets],
                [target["labels"] for target in targets],
                [indices[rows] for indices, rows in zip(matched, positive, strict=True)],
            )
        return losses

    def _detections(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> list[Target]:
        h = self.region_features(features, proposals)
        logits, deltas = self.box_predictor(h.float().mean((2, 3)))
        columns = self.postprocess_detections(
            logits.float(), deltas.float(), proposals, image_shapes
        )
        detections = [
            {"boxes": boxes, "scores": scores, "labels": labels}
            for boxes, scores, labels in zip(*columns, strict=True)
        ]
        if self.mask_predictor is not None:
            h = self.region_features(features, [image["boxes"] for image in detections])
            logits = self.mask_predictor(h).float()
            masks_of = maskrcnn_inference(logits, [image["labels"] for image in detections])
            for image, masks in zip(detections, masks_of, strict=True):
                image["masks"] = masks
        return detections


def build_detector(
    backbone: nn.Module,
    num_classes: int,
    schedule: Schedule,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    masks: bool,
) -> GeneralizedRCNN:
    """Build a detector on a backbone, whose modules it takes over.

    New weights are drawn from torch's global random numbers. In training mode the detector maps
    images, (C, H, W) float32 between 0 and 1, and targets (boxes, labels from 1, masks) to losses
    by name. In evaluation mode it maps images to boxes, labels, scores and masks in pixels of these
    images.

    Args:
        backbone: A ResNet.
        num_classes: The number of classes without the background.
        schedule: The architecture and the sizes of images, anchors and regions.
        mean: The mean of each channel, which images are normalized with.
        std: The standard deviation of each channel.
        masks: Whether to predict masks.

    Returns:
        The detector.

    Raises:
        UsageError: If the backbone is not a ResNet, or its stem does not allow the stride.
    """
    if not isinstance(backbone, ResNet):
        raise UsageError(
            f"the backbone is a {type(backbone).__name__}; a detector is built on a ResNet's stages"
        )
    transform = DetectionTransform(schedule, mean, std)
    if schedule.architecture == "fpn":
        return build_fpn_detector(backbone, num_classes, schedule, transform, masks)
    stem = 4 if isinstance(backbone.maxpool, nn.MaxPool2d) else 1
    if schedule.stride == 8:
        if stem != 4:
            raise UsageError(
                f"with a small stem, conv4 has stride {4 * stem} already: leave out --stride"
            )
        replace_stride_with_dilation(backbone.layer3)
    stride, width = stem * schedule.stride // 4, output_channels(backbone.layer3)
    conv4 = IntermediateLayerGetter(backbone, {"layer3": "conv4"})
    conv4.out_channels = width  # type: ignore[assignment]
    anchors = AnchorGenerator((schedule.anchors,), (ASPECT_RATIOS,))
    after_nms = {"training": schedule.proposals, "testing": schedule.test_proposals}
    before_nms = {mode: 6 * count for mode, count in after_nms.items()}  # detectron2: 12000, 6000
    head = Float32RPNHead(width, len(schedule.anchors) * len(ASPECT_RATIOS))
    rpn = RegionProposalNetwork(
        anchors, head, pre_nms_top_n=before_nms, post_nms_top_n=after_nms, **RPN_OPTIONS
    )
    heads = C4RoIHeads(
        backbone.layer4, output_channels(backbone.layer4), stride, num_classes, schedule, masks
    )
    return GeneralizedRCNN(conv4, rpn, heads, transform)


def build_fpn_detector(
    backbone: ResNet,
    num_classes: int,
    schedule: Schedule,
    transform: DetectionTransform,
    masks: bool,
) -> GeneralizedRCNN:
    """Build torchvision's Faster or Mask R-CNN with a feature pyramid on all four stages.

    Args:
        backbone: The ResNet.
        num_classes: The number of classes without the background.
        schedule: The sizes of anchors and regions.
        transform: Normalizes and resizes images.
        masks: Whether to predict masks.

    Returns:
        The detector; its pyramid has batch norms.
    """
    stages = {f"layer{i}": str(i - 1) for i in (1, 2, 3, 4)}
    widths = [output_channels(backbone.get_submodule(name)) for name in stages]
    pyramid = BackboneWithFPN(backbone, stages, widths, 256, norm_layer=nn.BatchNorm2d)
    sizes = tuple((side,) for side in schedule.anchors)  # one for each level
    model = (MaskRCNN if masks else FasterRCNN)(
        pyramid,
        1 + num_classes,
        rpn_anchor_generator=AnchorGenerator(sizes, (ASPECT_RATIOS,) * len(sizes)),
        rpn_pre_nms_top_n_train=schedule.proposals,
        rpn_pre_nms_top_n_test=schedule.test_proposals,
        rpn_post_nms_top_n_train=schedule.proposals,
        rpn_post_nms_top_n_test=schedule.test_proposals,
        box_batch_size_per_image=schedule.regions,
    )
    model.transform = transform
    return model


def output_channels(stage: nn.Module) -> int:
    """Return the number of channels of a stage's output: those of its last batch norm.

    Args:
        stage: A stage of a ResNet.

    Returns:
        The number of channels.
    """
    return next(
        m.num_features for m in reversed(list(stage.modules())) if isinstance(m, nn.BatchNorm2d)
    )


def replace_stride_with_dilation(stage: nn.Sequential) -> None:
    """Remove the stride of a stage, and dilate its later 3 x 3 convolutions by 2 instead.

    They keep their receptive field, and the features have twice the resolution.

    Args:
        stage: A stage of a ResNet; changed in place.
    """
    for position, block in enumerate(stage):
        for conv in (m for m in block.modules() if isinstance(m, nn.Conv2d)):
            if (
                conv.kernel_size == (3, 3)
                and conv.stride == (1, 1)
                and (position or conv is not block.conv1)
            ):
                conv.dilation = conv.padding = (2, 2)
            conv.stride = (1, 1)


# --- detectron2 -----------------------------------------------------------------------------------


def to_detectron2(model: GeneralizedRCNN, schedule: Schedule) -> dict[str, Tensor]:
    """Convert the state of a C4 detector to detectron2's Res5ROIHeads with MoCo's extra batch norm.

    In detectron2 the background is the last class and has no box and no mask, and anchors are
    ordered by size first and then by aspect ratio.

    Args:
        model: A C4 detector.
        schedule: The schedule that it was built with.

    Returns:
        Tensors by detectron2's names, with rows in detectron2's order.
    """
    assert schedule.architecture == "c4"
    sizes, shapes = len(schedule.anchors), len(ASPECT_RATIOS)
    rows = torch.arange(shapes * sizes).view(shapes, sizes).T.flatten()  # detectron2's row to ours
    state = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        part, _, rest = name.partition(".")
        leaf = name.rpartition(".")[2]
        if part == "backbone":
            state[f"backbone.{detectron2_name(rest)}"] = tensor
        elif rest.startswith("head.conv."):
            state[f"proposal_generator.rpn_head.conv.{leaf}"] = tensor
        elif rest.startswith("head.cls_logits."):
            state[f"proposal_generator.rpn_head.objectness_logits.{leaf}"] = tensor[rows]
        elif rest.startswith("head.bbox_pred."):
            grouped = tensor.unflatten(0, (len(rows), 4))
            state[f"proposal_generator.rpn_head.anchor_deltas.{leaf}"] = grouped[rows].flatten(0, 1)
        elif rest.startswith("box_head.0."):
            name_in_res5 = detectron2_name(rest.replace("box_head.0", "layer4", 1))
            state[f"roi_heads.{name_in_res5}"] = tensor
        elif rest.startswith("box_head.1."):
            state[f"roi_heads.res5.norm.{leaf}"] = tensor
        elif rest.startswith("box_predictor.cls_score."):
            state[f"roi_heads.{rest}"] = tensor.roll(-1, 0)
        elif rest.startswith("box_predictor.bbox_pred."):
            state[f"roi_heads.{rest}"] = tensor[4:]
        elif rest.startswith("mask_predictor.conv5_mask."):
            state[f"roi_heads.mask_head.deconv.{leaf}"] = tensor
        else:
            assert rest.startswith("mask_predictor.mask_fcn_logits."), name
            state[f"roi_heads.mask_head.predictor.{leaf}"] = tensor[1:]
    return state
