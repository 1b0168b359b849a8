"""The tables and figures of the paper as data: cells and claims with margins. Loads no torch.

A cell lists the settings that differ from the paper's baseline (section 3, with the constant
predictor lr that section 4.3 introduces); a scale turns it into a recipe. Margins are percentage
points of accuracy unless a metric is named, and were chosen before any run: 2 for "the same", 10
for "fails". The paper's own numbers are in paper.json, under the same names.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise, product

from simsiam.laboratory.claims import (
    Claim,
    claim_false,
    claim_greater,
    claim_in_range,
    claim_similar,
    claim_true,
)
from simsiam.laboratory.scales import Overrides

SAME_MARGIN, FAILURE_MARGIN = 2.0, 10.0


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One table or figure, with a run for each cell and seed.

    Attributes:
        title: Its title.
        section: Where it is in the paper.
        cells: The settings of each cell; without cells, the figure is drawn from METHODS.
        claims: What the paper says of the cells.
        common: Settings of all cells.
        seeds: The number of seeds.
        epochs: Epochs of its runs in the paper, except for cells that set their own.
        curve_metrics: Metrics to draw over epochs; "linear" keeps checkpoints and evaluates each.
        plot_against: A setting to draw accuracies against instead; cells whose names differ only
            in the last number form a line.
        measure_predictor: Whether to measure what the predictor predicts (section 5.1).
        train_detectors: Whether to fine-tune every run as a detector (Table 5).
        scratch_cells: Cells whose detectors start from random weights.
        record_steps: Whether to record what the network makes of the same images at several steps,
            and to write an interactive page.
        repeated_cells: Cells that get one seed more.
    """

    title: str
    section: str
    cells: Mapping[str, Overrides] = field(default_factory=dict)
    claims: tuple[Claim, ...] = ()
    common: Overrides = field(default_factory=dict)
    seeds: int = 3
    epochs: int = 100
    curve_metrics: tuple[str, ...] = ()
    plot_against: str = ""
    measure_predictor: bool = False
    train_detectors: bool = False
    scratch_cells: tuple[str, ...] = ()
    record_steps: bool = False
    repeated_cells: tuple[str, ...] = ()


COSINE_PREDICTOR_LR = {"predictor_lr": "cosine"}  # Figure 2, and the baseline of Table 1
NO_PREDICTOR = COSINE_PREDICTOR_LR | {"predictor": "none"}  # Table 1a
NO_BN = {"head_bn": (), "output_bn_affine": False}
WARMUP = {"warmup_epochs": 10}
# The paper does not give LARS's settings; these are SimCLR's.
LARS = {
    "optimizer": "lars",
    "base_lr": 0.3,
    "weight_decay": 1e-6,
    "exclude": "bias_and_norm",
}
OUTPUT_DIMS = (256, 512, 1024, 2048)
EPOCH_COUNTS = (100, 200, 400, 800)
# The cells of `switches`, named by what is on or off; batch sizes are those of the paper.
SWITCHES: dict[str, dict[str, Overrides]] = {
    "stop_gradient": {"stop-gradient": {}, "no stop-gradient": {"stop_gradient": False}},
    "predictor": {"predictor": {}, "no predictor": {"predictor": "none"}},
    "batch_norm": {"batch norm": {}, "no batch norm": NO_BN},
    "batch_size": {
        "small batch": {"batch_size": 64},
        "middle batch": {"batch_size": 256},
        "large batch": {"batch_size": 1024},
    },
}
SWITCH_CELLS: dict[str, Overrides] = {
    ", ".join((s, p, n, b)): {
        "epochs": 200,
        **SWITCHES["stop_gradient"][s],
        **SWITCHES["predictor"][p],
        **SWITCHES["batch_norm"][n],
        **SWITCHES["batch_size"][b],
    }
    for s, p, n, b in product(*SWITCHES.values())
}
ALL_ON = "stop-gradient, predictor, batch norm, middle batch"
METHOD_NAMES = ("simclr", "moco_v2_plus", "byol", "swav", "simsiam")

EXPERIMENTS: dict[str, Experiment] = {
    "figure2": Experiment(
        title="With and without stop-gradient",
        section="section 4.1, Figure 2",
        seeds=5,
        cells={
            "with stop-gradient": COSINE_PREDICTOR_LR,
            "without stop-gradient": COSINE_PREDICTOR_LR | {"stop_gradient": False},
        },
        curve_metrics=("loss", "z_std_sqrt_d", "knn_top1"),
        claims=(
            claim_in_range(
                "without, the loss falls to its minimum of -1",
                "without stop-gradient",
                "loss",
                high=-0.9,
            ),
            claim_in_range(
                "without, z/|z| is constant", "without stop-gradient", "z_std_sqrt_d", high=0.1
            ),
            claim_true(
                "without, the outputs collapse (std or rank)", "without stop-gradient", "collapsed"
            ),
            claim_in_range(
                "without, accuracy is at chance",
                "without stop-gradient",
                "above_chance",
                high=SAME_MARGIN,
            ),
            claim_in_range(
                "with it, the std is near 1/sqrt(d)", "with stop-gradient", "z_std_sqrt_d", low=0.9
            ),
            claim_false("with it, nothing collapses", "with stop-gradient", "collapsed"),
            claim_greater(
                "stop-gradient makes the difference",
                "with stop-gradient",
                "without stop-gradient",
                FAILURE_MARGIN,
            ),
        ),
    ),
    "table1": Experiment(
        title="The predictor",
        section="section 4.2, Table 1",
        cells={
            "baseline": COSINE_PREDICTOR_LR,
            "(a) no predictor": NO_PREDICTOR,
            "no predictor, asymmetric": NO_PREDICTOR | {"pairs": "asymmetric"},
            "(b) fixed at random": COSINE_PREDICTOR_LR | {"predictor": "fixed"},
            "(c) lr not decayed": {},
        },
        claims=(
            claim_greater(
                "without a predictor it does not work",
                "baseline",
                "(a) no predictor",
                FAILURE_MARGIN,
            ),
            claim_true("without a predictor it collapses", "(a) no predictor", "collapsed"),
            claim_true(
                "so it does with the asymmetric loss", "no predictor, asymmetric", "collapsed"
            ),
            claim_greater(
                "a fixed predictor does not work", "baseline", "(b) fixed at random", FAILURE_MARGIN
            ),
            claim_false("that failure is no collapse", "(b) fixed at random", "collapsed"),
            claim_greater("its loss stays high", "(b) fixed at random", "baseline", 0.1, "loss"),
            claim_greater(
                "a constant predictor lr is better than a decayed one",
                "(c) lr not decayed",
                "baseline",
            ),
        ),
    ),
    "table2": Experiment(
        title="The batch size",
        section="section 4.3, Table 2",
        plot_against="batch_size",
        cells={
            **{f"batch {n}": {"batch_size": n} for n in (64, 128, 256)},
            "batch 512": {},
            **{f"batch {n}": {"batch_size": n} | WARMUP for n in (1024, 2048, 4096)},
            "LARS, batch 4096": {"batch_size": 4096} | WARMUP | LARS,
        },
        claims=(
            claim_similar("256 is as good as 512", "batch 256", "batch 512", SAME_MARGIN),
            claim_similar("1024 is as good as 512", "batch 1024", "batch 512", SAME_MARGIN),
            claim_similar("2048 is as good as 512", "batch 2048", "batch 512", SAME_MARGIN),
            Claim(
                statement="64 is decent",
                weights={"batch 512": 1, "batch 64": -1},
                high=2 * SAME_MARGIN,
            ),
            Claim(
                statement="128 is decent",
                weights={"batch 512": 1, "batch 128": -1},
                high=2 * SAME_MARGIN,
            ),
            claim_greater("SGD is worse at 4096", "batch 512", "batch 4096"),
            claim_false("it does not collapse there", "batch 4096", "collapsed"),
            claim_greater(
                "LARS should help at 4096 (expected in the paper, not tried)",
                "LARS, batch 4096",
                "batch 4096",
            ),
        ),
    ),
    "table3": Experiment(
        title="Batch norm in the heads",
        section="section 4.4, Table 3",
        cells={
            "(a) none": NO_BN | WARMUP,
            "(b) hidden": {"head_bn": ("proj_hidden", "pred_hidden"), "output_bn_affine": False},
            "(c) default": {},
            "(d) all": {"head_bn": ("proj_hidden", "proj_out", "pred_hidden", "pred_out")},
            "default, no affine": {"output_bn_affine": False},
        },
        claims=(
            claim_false("without batch norm it does not collapse", "(a) none", "collapsed"),
            claim_greater("but accuracy is low", "(c) default", "(a) none", FAILURE_MARGIN),
            claim_greater(
                "batch norm in hidden layers makes the difference",
                "(b) hidden",
                "(a) none",
                FAILURE_MARGIN,
            ),
            claim_greater("that of f's output adds to it", "(c) default", "(b) hidden"),
            claim_similar(
                "its affine part does not matter", "default, no affine", "(c) default", SAME_MARGIN
            ),
            claim_greater(
                "batch norm on h's output does not work", "(c) default", "(d) all", FAILURE_MARGIN
            ),
            claim_false("that failure is no collapse", "(d) all", "collapsed"),
            claim_greater(
                "there the loss oscillates", "(d) all", "(c) default", metric="loss_swing"
            ),
        ),
    ),
    "similarity": Experiment(
        title="The similarity function",
        section="section 4.5",
        cells={"cosine": {}, "cross-entropy": {"criterion": "cross_entropy"}},
        claims=(
            claim_false("cross-entropy does not collapse", "cross-entropy", "collapsed"),
            claim_greater("cosine is better", "cosine", "cross-entropy"),
        ),
    ),
    "symmetrization": Experiment(
        title="Symmetrization",
        section="section 4.6",
        cells={
            "symmetric": {},
            "asymmetric": {"pairs": "asymmetric"},
            "asymmetric 2x": {"pairs": "asymmetric_2x"},
        },
        claims=(
            claim_false("asymmetric does not collapse", "asymmetric", "collapsed"),
            claim_greater("asymmetric is worse than asymmetric 2x", "asymmetric 2x", "asymmetric"),
            claim_greater("asymmetric 2x is worse than symmetric", "symmetric", "asymmetric 2x"),
        ),
    ),
    "alternation": Experiment(
        title="Multi-step alternation",
        section="section 5.2",
        cells={
            "1 step": {},
            "10 steps": {"target": "alternation", "target_steps": 10},
            "100 steps": {"target": "alternation", "target_steps": 100},
            "1 epoch": {"target": "alternation", "target_steps": 0},
        },
        claims=(
            claim_greater("10 steps are better than 1", "10 steps", "1 step"),
            claim_greater("100 steps are better than 1", "100 steps", "1 step"),
            claim_similar("an epoch works as well", "1 epoch", "1 step", SAME_MARGIN),
            claim_false("and does not collapse", "1 epoch", "collapsed"),
        ),
    ),
    "moving_average": Experiment(
        title="A moving average in place of the predictor",
        section="section 5.2",
        cells={
            "simsiam": {},
            "no predictor": NO_PREDICTOR,
            "no predictor, moving average": NO_PREDICTOR
            | {"target": "moving_average", "target_decay": 0.8},
        },
        claims=(
            claim_true("without both it collapses", "no predictor", "collapsed"),
            claim_false(
                "the moving average prevents it", "no predictor, moving average", "collapsed"
            ),
            claim_greater(
                "and learns", "no predictor, moving average", "no predictor", FAILURE_MARGIN
            ),
            claim_greater("less than with a predictor", "simsiam", "no predictor, moving average"),
        ),
    ),
    "expectation": Experiment(
        title="The expectation over views, and what h predicts",
        section="sections 5.1 and 5.2, equation 9",
        cells={
            "simsiam": {},
            "mean of 3 views": {"target": "expectation", "target_views": 3},
            "no predictor": NO_PREDICTOR,
            "no predictor, mean of 3 views": NO_PREDICTOR
            | {"target": "expectation", "target_views": 3},
        },
        measure_predictor=True,
        claims=(
            claim_in_range("p1 lies nearer to E[z] than z1 does", "simsiam", "h_gain", low=0),
            claim_false(
                "with the expectation no predictor is needed (suggested)",
                "no predictor, mean of 3 views",
                "collapsed",
            ),
            claim_greater(
                "with the expectation it learns without one (suggested)",
                "no predictor, mean of 3 views",
                "no predictor",
                FAILURE_MARGIN,
            ),
        ),
    ),
    "table4": Experiment(
        title="Methods and lengths of training",
        section="section 6.1, Table 4",
        plot_against="epochs",
        common={"batch_size": 256},
        cells={
            f"{row} {n}": {"method": row, "epochs": n}
            for row, n in product(METHOD_NAMES, EPOCH_COUNTS)
        },
        claims=(
            *(
                claim_greater(f"best at 100 epochs: above {row}", "simsiam 100", f"{row} 100")
                for row in METHOD_NAMES[:-1]
            ),
            *(
                claim_greater(f"above SimCLR at {n} epochs", f"simsiam {n}", f"simclr {n}")
                for n in EPOCH_COUNTS
            ),
            *(
                Claim(
                    statement=f"gains less from longer training than {row}",
                    weights={
                        f"{row} 800": 1,
                        f"{row} 100": -1,
                        "simsiam 800": -1,
                        "simsiam 100": 1,
                    },
                    low=0,
                )
                for row in METHOD_NAMES[:-1]
            ),
        ),
    ),
    "simclr_ablation": Experiment(
        title="A predictor and a stop-gradient for SimCLR",
        section="section 6.2",
        cells={
            "simclr": {"method": "simclr"},
            "with predictor": {"method": "simclr", "predictor": "mlp"},
            "with predictor and stop-gradient": {
                "method": "simclr",
                "predictor": "mlp",
                "stop_gradient": True,
            },
        },
        claims=(
            Claim(
                statement="a predictor does not help",
                weights={"with predictor": 1, "simclr": -1},
                high=SAME_MARGIN,
            ),
            Claim(
                statement="both do not help",
                weights={"with predictor and stop-gradient": 1, "simclr": -1},
                high=SAME_MARGIN,
            ),
            claim_false("neither is needed", "simclr", "collapsed"),
        ),
    ),
    "swav_ablation": Experiment(
        title="A predictor for SwAV, and no stop-gradient",
        section="section 6.2",
        cells={
            "swav": {"method": "swav"},
            "with predictor": {"method": "swav", "predictor": "mlp"},
            "without stop-gradient": {"method": "swav", "stop_gradient": False},
        },
        claims=(
            Claim(
                statement="a predictor does not help",
                weights={"with predictor": 1, "swav": -1},
                high=SAME_MARGIN,
            ),
            claim_true("without stop-gradient it diverges", "without stop-gradient", "diverged"),
        ),
    ),
    "byol_without_momentum": Experiment(
        title="BYOL without its momentum encoder",
        section="section 2, footnote 2",
        epochs=300,
        cells={
            "byol": {"method": "byol"},
            "no momentum": {"method": "byol", "target": "shared"},
            "no momentum, predictor lr x 10": {
                "method": "byol",
                "target": "shared",
                "predictor_lr_scale": 10.0,
            },
        },
        claims=(
            claim_greater("without it BYOL fails (its v1)", "byol", "no momentum", FAILURE_MARGIN),
            claim_false(
                "with ten times the predictor's lr nothing collapses",
                "no momentum, predictor lr x 10",
                "collapsed",
            ),
            claim_greater(
                "which mends it (its v3)", "no momentum, predictor lr x 10", "no momentum"
            ),
            claim_greater(
                "the momentum encoder is still of use", "byol", "no momentum, predictor lr x 10"
            ),
        ),
    ),
    "output_dim": Experiment(
        title="The output dimension d",
        section="appendix B",
        plot_against="dim",
        cells={
            **{f"d = {d}": {"dim": d, "pred_dim": d // 4} for d in OUTPUT_DIMS},
            "hidden = d = 2048": {"dim": 2048, "pred_dim": 2048},
        },
        claims=(
            *(
                claim_greater(f"{b} is better than {a}", f"d = {b}", f"d = {a}")
                for a, b in pairwise(OUTPUT_DIMS)
            ),
            claim_greater(
                "a predictor without bottleneck is less stable",
                "hidden = d = 2048",
                "d = 2048",
                metric="loss_swing",
            ),
            claim_greater("or fails", "d = 2048", "hidden = d = 2048", FAILURE_MARGIN),
        ),
    ),
    "figure_d1": Experiment(
        title="SimSiam beside SimCLR on equal terms",
        section="appendix D, Figure D.1",
        epochs=800,
        cells={"simsiam": {}, "simclr": {"method": "simclr", "proj_layers": 2}},
        curve_metrics=("knn_top1", "linear"),
        claims=(
            claim_false("SimSiam does not collapse", "simsiam", "collapsed"),
            claim_similar(
                "the kNN curves are similar: their means over training",
                "simsiam",
                "simclr",
                2 * SAME_MARGIN,
                "knn_mean",
            ),
            claim_similar("the results are similar", "simsiam", "simclr", SAME_MARGIN),
            claim_greater("SimSiam is slightly better", "simsiam", "simclr"),
        ),
    ),
    "switches": Experiment(
        title="Four switches",
        section="sections 4.1 to 4.4",
        seeds=1,
        epochs=200,
        cells=SWITCH_CELLS,
        record_steps=True,
        repeated_cells=tuple(cell for cell in SWITCH_CELLS if cell.endswith("middle batch")),
        claims=(
            claim_false("with everything on, nothing collapses", ALL_ON, "collapsed"),
            claim_true("without stop-gradient it collapses", f"no {ALL_ON}", "collapsed"),
            claim_true(
                "without a predictor it collapses",
                "stop-gradient, no predictor, batch norm, middle batch",
                "collapsed",
            ),
            claim_false(
                "without batch norm it does not collapse",
                "stop-gradient, predictor, no batch norm, middle batch",
                "collapsed",
            ),
        ),
    ),
    "figure3": Experiment(title="Siamese architectures", section="section 6.2, Figure 3"),
    "optimal_recipe": Experiment(
        title="The recipe that transfers better",
        section="section 6.1, Table 5",
        epochs=200,
        common={"batch_size": 256},
        cells={"base": {}, "optimal": {"base_lr": 0.5, "weight_decay": 1e-5}},
        claims=(
            claim_false("it does not collapse", "optimal", "collapsed"),
            claim_similar("its linear accuracy is similar", "optimal", "base", SAME_MARGIN),
        ),
    ),
    "table5": Experiment(
        title="Transfer to detection and segmentation",
        section="section 6.1, Table 5",
        epochs=200,
        common={"batch_size": 256},
        train_detectors=True,
        scratch_cells=("scratch",),
        cells={
            "scratch": {},
            "supervised": {"method": "supervised"},
            **{row: {"method": row} for row in ("simclr", "moco_v2_plus", "byol", "swav")},
            "simsiam, base": {},
            "simsiam, optimal": {"base_lr": 0.5, "weight_decay": 1e-5},
        },
        claims=(
            claim_greater(
                "SimSiam's features transfer", "simsiam, base", "scratch", SAME_MARGIN, "ap50"
            ),
            claim_greater(
                "so do the other recipe's, and better",
                "simsiam, optimal",
                "simsiam, base",
                metric="ap50",
            ),
            *(
                claim_greater(
                    f"{row} surpasses labels or is on par with them",
                    row,
                    "supervised",
                    -SAME_MARGIN,
                    "ap50",
                )
                for row in ("simclr", "moco_v2_plus", "byol", "swav", "simsiam, optimal")
            ),
            *(
                claim_greater(
                    f"SimSiam is competitive with {row}",
                    "simsiam, optimal",
                    row,
                    -SAME_MARGIN,
                    "ap50",
                )
                for row in ("simclr", "moco_v2_plus", "byol", "swav")
            ),
        ),
    ),
    "table_c1": Experiment(
        title="The other methods, as in their papers and improved",
        section="appendix C, Table C.1",
        common={"batch_size": 256},
        cells={
            **{
                f"simclr original {n}": {"method": "simclr", "epochs": n, "proj_layers": 2}
                for n in (200, 800)
            },
            **{f"simclr improved {n}": {"method": "simclr", "epochs": n} for n in (200, 800)},
            **{
                f"{row} {n}": {"method": row, "epochs": n}
                for n in (200, 800)
                for row in ("moco_v2", "moco_v2_plus")
            },
            "byol 300": {"method": "byol", "epochs": 300},
            "swav original 400": {"method": "swav", "epochs": 400, "proj_layers": 2},
            "swav improved 400": {"method": "swav", "epochs": 400},
        },
        claims=(
            *(
                claim_greater(
                    f"three layers are better: SimCLR, {n} epochs",
                    f"simclr improved {n}",
                    f"simclr original {n}",
                )
                for n in (200, 800)
            ),
            *(
                claim_greater(
                    f"both directions are better: MoCo v2, {n} epochs",
                    f"moco_v2_plus {n}",
                    f"moco_v2 {n}",
                )
                for n in (200, 800)
            ),
            claim_greater(
                "three layers are better: SwAV, 400 epochs",
                "swav improved 400",
                "swav original 400",
            ),
        ),
    ),
}
