"""The methods, as rows of one table (Figure 3); an ablation is a row with one value replaced.

`config.method.Method` explains each field and has SimSiam's values as defaults. A row gives what
differs, each with its source: a section of the method's paper, or "code" for its authors' code.
"+" marks SimSiam's improved reproduction (appendix C). Plain data; loads no torch.
"""

from dataclasses import replace

from simsiam.config.method import Method, Views

# fmt: off
BYOL_VIEWS = (  # BYOL's appendix B, table 6: the two views differ in blur and solarization
    Views(crop_min=0.08, jitter=(0.4, 0.4, 0.2, 0.1), blur=1.0, interpolation="bicubic"),
    Views(crop_min=0.08, jitter=(0.4, 0.4, 0.2, 0.1), blur=0.1, solarize=0.2,
          interpolation="bicubic"),
)
STRONG_JITTER = (0.8, 0.8, 0.8, 0.2)  # SimCLR's jitter of strength 1 (its appendix A)

SIMSIAM = Method(name="simsiam")

BYOL = Method(
    name="byol",  # Grill et al., 2020
    dim=256, proj_layers=2, proj_hidden=4096, pred_dim=4096,  # 3.3
    head_bn=("proj_hidden", "pred_hidden"), output_bias=False,  # 3.3; code
    predictor_lr="cosine",  # one schedule for all (3.3)
    target="momentum", target_decay=0.99,  # for 100 epochs (footnote 6)
    target_schedule="cosine",  # up to 1 (3.3)
    # The sum over both pairs of 2 - 2 cos (equation 2) is 4 times the mean of D, plus a constant.
    loss_scale=4.0,
    views=BYOL_VIEWS,
    optimizer="lars", base_lr=0.45, weight_decay=1e-6,  # for 100 epochs and batch 4096 (footnote 6)
    exclude="bias_and_norm", warmup_epochs=10,  # 3.3
)

SIMCLR = Method(
    name="simclr",  # Chen et al., 2020
    dim=128, proj_layers=3,  # + (originally 2 layers)
    head_bn=("proj_hidden", "proj_out", "pred_hidden"),  # code; there the output BN has a scale
    bn="joint",  # code: both views are one batch
    predictor="none", predictor_lr="cosine", stop_gradient=False,
    criterion="nt_xent", tau=0.1,  # code, for ImageNet; 0.5 for CIFAR-10
    views=(Views(crop_min=0.08, jitter=STRONG_JITTER, interpolation="bicubic"),),  # A; code
    # 2.2, for batch 4096
    optimizer="lars", base_lr=0.3, weight_decay=1e-6, exclude="bias_and_norm", warmup_epochs=10,
)

MOCO_V2 = Method(
    name="moco_v2",  # Chen et al., 2020, on He et al., 2020; its views are SimSiam's
    dim=128, proj_layers=2, head_bn=(),  # 3 and code: no batch norm in the head
    bn="split",  # 8 GPUs do not synchronize BN (MoCo 3.3); shared statistics would reveal the keys
    predictor="none", predictor_lr="cosine",
    target="momentum", target_decay=0.999,  # code: constant
    criterion="info_nce", tau=0.2, queue=65536,  # 3; code
    pairs="asymmetric",  # one view is the query, the other the key
    # code, batch 256; there the last scale of a residual branch does not start at 0
    base_lr=0.03, weight_decay=1e-4,
)

MOCO_V2_PLUS = replace(
    MOCO_V2,
    name="moco_v2_plus",  # + symmetric, as in MoCo's CIFAR notebook:
    pairs="symmetric", loss_scale=2.0,  # the sum of both directions, one queue for both views' keys
)

SWAV = Method(
    name="swav",  # Caron et al., 2020, without multi-crop
    dim=128, proj_layers=3,  # + (originally 2 layers)
    head_bn=("proj_hidden", "pred_hidden"), bn="joint",  # code: crops of one size are one batch
    predictor="none", predictor_lr="cosine",
    criterion="swapped", tau=0.1, prototypes=3000,  # 4.1 and code
    sinkhorn_epsilon=0.05, sinkhorn_iterations=3,  # 4.1 and code
    prototype_norm="inside",  # as in SimSiam's reproduction (footnote 8); originally outside
    freeze_prototypes=313,  # an epoch of batch 4096 (code)
    views=(Views(crop_min=0.08, jitter=STRONG_JITTER),),  # code; 0.14 with multi-crop
    # code: LARC on every parameter, lr 4.8 for batch 4096; it ends at 0.001 of that, and the last
    # scale of a residual branch does not start at 0
    optimizer="lars", base_lr=0.3, weight_decay=1e-6, warmup_epochs=10,
)

BARLOW_TWINS = Method(
    name="barlow_twins",  # Zbontar et al., 2021
    dim=8192, proj_layers=3, proj_hidden=8192,  # 2.2
    head_bn=("proj_hidden", "pred_hidden"), output_bias=False,  # code: output BN is in the loss
    predictor="none", predictor_lr="cosine", stop_gradient=False,
    criterion="barlow_twins", barlow_lambda=5e-3,  # 2.2; 5.1e-3 in the code
    loss_scale=0.024,  # code; it affects biases and norms only: lr 0.0048 instead of 0.2
    pairs="asymmetric",  # its D is symmetric
    views=BYOL_VIEWS,  # 2.2
    # code, for batch 2048; the lr ends at 0.001 of its peak there
    optimizer="lars", base_lr=0.2, weight_decay=1e-6, exclude="bias_and_norm", warmup_epochs=10,
)

VICREG = Method(
    name="vicreg",  # Bardes et al., 2022
    dim=8192, proj_layers=3, proj_hidden=8192,  # 4.2
    head_bn=("proj_hidden", "pred_hidden"), output_bias=False,  # 4.2; code
    predictor="none", predictor_lr="cosine", stop_gradient=False,
    criterion="vicreg", vicreg_weights=(25.0, 25.0, 1.0),  # 4.2; the code halves the second
    pairs="asymmetric",  # its D is symmetric
    views=BYOL_VIEWS,  # code
    # code, for 100 epochs and batch 2048 (0.2 for 1000); the lr ends at 0.001 of its peak there
    optimizer="lars", base_lr=0.3, weight_decay=1e-6, exclude="bias_and_norm", warmup_epochs=10,
)

DISTILLATION = Method(
    name="distillation",  # the student predicts a teacher's features: Hinton et al., 2015
    dim=1280, proj_layers=2, head_bn=("proj_hidden",),  # a run sets dim to the teacher's
    predictor="none", predictor_lr="cosine",
    target="teacher", pairs="single",
    views=(Views(jitter_p=0.0, gray=0.0, blur=0.0),),  # a random crop and a flip
    base_lr=0.5,  # with 0.05 hardly anything is learned in 200 steps on `shapes`
)

CROP_AND_FLIP = (Views(crop_min=0.08, jitter_p=0.0, gray=0.0, blur=0.0),)

DEEPCLUSTER = Method(
    name="deepcluster",  # Caron et al., 2018, without its Sobel filter
    dim=10000, proj_layers=1, head_bn=(),  # 3.3: a linear classifier of 10,000 clusters
    predictor="none", predictor_lr="cosine",
    target="kmeans", criterion="classification", pairs="single",  # 3.2; clustered each epoch (3.3)
    views=CROP_AND_FLIP,  # 3.3; code
    base_lr=0.05, weight_decay=1e-5,  # 3.3; code: constant lr
)

INSTANCE_DISCRIMINATION = Method(
    name="instance_discrimination",  # Wu et al., 2018, with InfoNCE in place of NCE, as in MoCo
    dim=128, proj_layers=1, head_bn=(),  # 3.1; code: one linear layer
    predictor="none", predictor_lr="cosine",
    target="moving_average", target_decay=0.5, target_fresh=False,  # code: the memory bank
    criterion="info_nce", tau=0.07, queue=4096, pairs="single",  # 4.1; 3.2: 4096 negatives
    views=(Views(crop_min=0.2, jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=1.0, blur=0.0),),  # code
    base_lr=0.03, weight_decay=1e-4,  # 4.1; code: divided by 10 every 40 epochs after 120
)

SUPERVISED = Method(
    name="supervised",  # for comparison, as in He et al., 2016, and Goyal et al., 2017
    dim=1000, proj_layers=1, head_bn=(),  # one logit for each class of ImageNet; some may be unused
    predictor="none", predictor_lr="cosine",
    target="labels", criterion="classification", pairs="single",
    views=CROP_AND_FLIP,
    base_lr=0.1, weight_decay=1e-4,
)
# fmt: on

METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        SIMSIAM,
        BYOL,
        SIMCLR,
        MOCO_V2,
        MOCO_V2_PLUS,
        SWAV,
        BARLOW_TWINS,
        VICREG,
        DISTILLATION,
        DEEPCLUSTER,
        INSTANCE_DISCRIMINATION,
        SUPERVISED,
    )
}
