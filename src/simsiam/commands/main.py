"""The command line: one verb, one function, one output. Flags are the words of a recipe; help loads no torch."""

import argparse
import ctypes
import inspect
import json
import os
import re
import signal
import sys
import threading
import typing
from contextlib import suppress
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from simsiam import __version__
from simsiam.config import recipes
from simsiam.config.method import EQUAL_TERMS, Method, Views
from simsiam.config.protocols import FROZEN_PROTOCOLS, PROTOCOLS, Settings
from simsiam.detection.schedules import SCHEDULES, Schedule
from simsiam.errors import Stopped, UsageError, WorkFailed, printable, unknown_name
from simsiam.laboratory.experiments import EXPERIMENTS
from simsiam.laboratory.scales import SCALES

TOGETHER = (
    "pretrain",
    "resume",
    "evaluate",
    "transfer",
    "embed",
)  # verbs of several processes, under torchrun
EPILOG = "Documentation and source of every setting: README.md; `simsiam VERB --help` lists a verb's flags."


class Parser(argparse.ArgumentParser):
    """argparse, with whole flags only, and errors that are one line and know the nearest name."""

    def __init__(self, **how: Any):
        super().__init__(**how, allow_abbrev=False)

    def error(self, message: str) -> typing.NoReturn:
        raise UsageError(message)


def comments(owner: type) -> dict[str, str]:
    """What stands behind each field of a dataclass in its source: the documentation of the field and of its flag."""
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(owner), re.MULTILINE))


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for every word of a recipe, with the paper's baseline as its default."""
    for owner, title in (
        (recipes.Recipe, "the run"),
        (Method, "the method's cells"),
        (Views, "the views"),
    ):
        add_flags(parser, owner, title, recipes.SETTING_TYPES)
    note = "the row on simsiam's views and optimizer: " + ", ".join(EQUAL_TERMS)
    parser.add_argument("--equal-terms", action="store_true", default=argparse.SUPPRESS, help=note)


def add_flags(
    parser: argparse.ArgumentParser, owner: type, title: str, words: typing.Mapping[str, Any]
) -> None:
    """A flag for every field of a dataclass that is among `words`, which gives its type."""
    group, said = parser.add_argument_group(title), comments(owner)
    for f in fields(owner):
        if f.name in ("source", "name", "views") or f.name not in words:
            continue
        kind, default = words[f.name], "simsiam" if f.name == "method" else f.default
        note = said.get(f.name, "a row of `simsiam methods`" if f.name == "method" else "").replace(
            "%", "%%"
        )
        if default is not MISSING and default is not None:
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
            note += f" [{'on' if default is True else 'off' if default is False else shown}]"
        how: dict[str, Any] = {"help": note, "default": argparse.SUPPRESS}
        how |= (
            {"action": argparse.BooleanOptionalAction}
            if kind is bool
            else {"metavar": _metavar(kind)}
        )
        if tuple in (
            typing.get_origin(kind),
            *(typing.get_origin(option) for option in typing.get_args(kind)),
        ):
            how["nargs"] = "*"
        group.add_argument("--" + f.name.replace("_", "-"), **how)


def add_source(parser: argparse.ArgumentParser, count: str, default: str = "") -> None:
    text = "shapes (embedded), cifar10, cifar100, stl10, folders of images, a .txt that lists them, a .zip or .tar, "
    text += "Parquet or .tar shards, here or at a URL"
    parser.add_argument("source", nargs=count, metavar="SOURCE", help=f"{text} {default}".strip())


def _metavar(kind: Any) -> str:
    options = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return "{" + ",".join(map(str, options)) + "}"
    if options:
        return _metavar(options[0])
    return {int: "N", float: "X", str: "NAME"}[kind]


def build_parser() -> Parser:
    parser = Parser(
        prog="simsiam",
        description="Visual representations from images without labels.",
        epilog=EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"simsiam {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")

    pretrain = verbs.add_parser(
        "pretrain",
        help="train a backbone on images without labels; writes a run folder",
        usage="simsiam pretrain [SOURCE ...] [--out RUN] [--FLAG VALUE ...]",
        epilog="In brackets: the paper's baseline. The source or --recipe chooses other values for some; flags win.",
    )
    add_source(pretrain, "*", "[shapes]")
    pretrain.add_argument(
        "--recipe", metavar="NAME or FILE", help=f"{', '.join(recipes.RECIPES)}, or a recipe.yaml"
    )
    pretrain.add_argument(
        "--out", metavar="RUN", help="the run folder; it must not exist [runs/SOURCE-METHOD-N]"
    )
    add_recipe_flags(pretrain)

    resume = verbs.add_parser("resume", help="continue a run bit for bit from its last checkpoint")
    resume.add_argument("run", metavar="RUN")
    resume.add_argument(
        "--epochs",
        metavar="N",
        type=int,
        help="extend the run; says what that does to the schedule",
    )

    inspect = verbs.add_parser(
        "inspect",
        help="what a source holds: sizes, formats, labels, duplicates, broken files, the recipe, the time it takes",
        usage="simsiam inspect SOURCE [SOURCE ...] [--channels N] [--out FILE.json]",
    )
    add_source(inspect, "+")
    inspect.add_argument("--channels", metavar="N", type=int, default=3, help="of an image [3]")
    inspect.add_argument("--out", metavar="FILE.json", help="write the facts here too")

    shard = verbs.add_parser(
        "shard",
        help="any source as few large files, tar or Parquet; killed and started anew, it goes on",
        usage="simsiam shard SOURCE [SOURCE ...] --out FOLDER [--format NAME] [--per-shard N] [--channels N]",
    )
    add_source(shard, "+")
    shard.add_argument(
        "--out",
        metavar="FOLDER",
        required=True,
        help="a new folder; it appears when it is complete",
    )
    shard.add_argument(
        "--format",
        metavar="NAME",
        default="tar",
        help="tar (WebDataset's) or parquet (Hugging Face's)",
    )
    shard.add_argument(
        "--per-shard", metavar="N", type=int, default=10_000, help="images in a shard [10000]"
    )
    shard.add_argument("--channels", metavar="N", type=int, default=3, help="of an image [3]")

    plan = verbs.add_parser(
        "plan",
        help="what pretraining would take: steps, hours, memory, checkpoints, storage, reading, and what is assumed",
        usage="simsiam plan SOURCE [SOURCE ...] [--gpus N] [--images N] [--bench FILE.json ...] [--FLAG VALUE ...]",
        epilog="The flags are those of pretrain; the source or --recipe chooses their values as it does there.",
    )
    add_source(plan, "+")
    plan.add_argument(
        "--gpus", metavar="N", type=int, default=1, help="processes, one a device [1]"
    )
    plan.add_argument(
        "--images", metavar="N", type=int, help="as if there were so many like those of the source"
    )
    plan.add_argument(
        "--cores",
        metavar="N",
        type=int,
        help="of each process, to prepare images [as many as here]",
    )
    plan.add_argument(
        "--bench",
        metavar="FILE.json",
        nargs="+",
        help="of `simsiam bench --out`, from the machine that is to train",
    )
    plan.add_argument("--out", metavar="FILE.json", help="write the facts here too")
    plan.add_argument(
        "--recipe", metavar="NAME or FILE", help=f"{', '.join(recipes.RECIPES)}, or a recipe.yaml"
    )
    add_recipe_flags(plan)

    preview = verbs.add_parser(
        "preview",
        help="a picture of images and the views made of them",
        usage="simsiam preview SOURCE [SOURCE ...] --out FILE.png [--FLAG VALUE ...]",
        epilog="The flags are those of pretrain; the source or --recipe chooses their values as it does there.",
    )
    add_source(preview, "+")
    preview.add_argument(
        "--out", metavar="FILE.png", required=True, help="the picture; one of that name is replaced"
    )
    preview.add_argument("--rows", metavar="N", type=int, default=8, help="images [8]")
    preview.add_argument(
        "--recipe", metavar="NAME or FILE", help=f"{', '.join(recipes.RECIPES)}, or a recipe.yaml"
    )
    add_recipe_flags(preview)

    evaluate = verbs.add_parser(
        "evaluate",
        help="what a backbone is worth, by every protocol; writes RUN/evaluations/PROTOCOL.json",
        usage="simsiam evaluate RUN [SOURCE ...] [--protocol NAME ...] [--FLAG VALUE ...]",
        epilog="In brackets: the default. Any labeled source works; label_free needs no labels.",
    )
    evaluate.add_argument("run", metavar="RUN")
    add_source(evaluate, "*", "[the run's own]")
    names = f"{', '.join(PROTOCOLS)} [{' '.join(FROZEN_PROTOCOLS)}]"
    evaluate.add_argument(
        "--protocol",
        dest="protocols",
        metavar="NAME",
        nargs="+",
        default=FROZEN_PROTOCOLS,
        help=names,
    )
    evaluate.add_argument(
        "--checkpoint", metavar="NAME", default="last", help="last, best or epoch-NNNN [last]"
    )
    evaluate.add_argument("--device", metavar="NAME", default="auto", help="cpu, cuda, ... [auto]")
    precisions = "auto, bfloat16 or float32; of the backbone alone [auto]"
    evaluate.add_argument("--precision", metavar="NAME", default="auto", help=precisions)
    few = "a quick look: on N training and N test images, spread evenly [all]"
    evaluate.add_argument("--limit", metavar="N", type=int, help=few)
    add_flags(evaluate, Settings, "the protocols", typing.get_type_hints(Settings))

    add_transfer(verbs)
    add_embedding_verbs(verbs)

    export = verbs.add_parser(
        "export",
        help="the backbone for other programs, loaded again and compared before it is kept",
        usage="simsiam export RUN --format NAME [--out FOLDER] [--license NAME] [--push OWNER/NAME]",
    )
    export.add_argument("run", metavar="RUN")
    formats = "torchvision, timm, detectron2, safetensors, onnx, torch_export or huggingface"
    export.add_argument("--format", metavar="NAME", required=True, help=formats)
    export.add_argument("--out", metavar="FOLDER", help="a new folder [RUN/exports/FORMAT]")
    export.add_argument(
        "--license", metavar="NAME", help="huggingface: of the weights, for the model card"
    )
    push = "huggingface: upload to the hub too, as a private repository where there is none; else nothing leaves here"
    export.add_argument("--push", metavar="OWNER/NAME", help=push)

    compare = verbs.add_parser(
        "compare", help="what differs between runs, in how they were made and what came of it"
    )
    compare.add_argument("runs", metavar="RUN", nargs="+", help="two or more")

    report = verbs.add_parser(
        "report",
        help="one web page about a run, or about several side by side: verdict, results, curves, a map of the images",
        usage="simsiam report RUN [RUN ...] [--out FILE.html] [--limit N] [--no-map]",
    )
    report.add_argument("runs", metavar="RUN", nargs="+")
    report.add_argument(
        "--out",
        metavar="FILE.html",
        help="one of that name is replaced [report.html in the first RUN]",
    )
    report.add_argument(
        "--limit",
        metavar="N",
        type=int,
        default=3000,
        help="images on the map, spread evenly [3000]",
    )
    report.add_argument(
        "--no-map", dest="images", action="store_false", help="read no image: no views and no map"
    )

    demo = verbs.add_parser(
        "demo", help="see it work: pretrain on the embedded set, beside baselines and a ceiling"
    )
    demo.add_argument("--seeds", metavar="N", type=int, default=1, help="runs to average over [1]")
    demo.add_argument("--out", metavar="FOLDER", help="where the run folders go [runs/demo-N]")

    reproduce = verbs.add_parser(
        "reproduce",
        help="repeat tables and figures of the paper; writes results/SCALE/EXPERIMENT.md, .csv, .svg, .png, .json",
        usage="simsiam reproduce EXPERIMENT [EXPERIMENT ...] [--scale NAME] [--FLAG VALUE ...]",
        epilog="It shows its plan first. Runs are shared between experiments, and finished ones are reused; stopped or "
        "killed, it goes on where it was, and two of it share the work.",
    )
    reproduce.add_argument(
        "experiments", metavar="EXPERIMENT", nargs="+", help=f"{', '.join(EXPERIMENTS)}, or all"
    )
    reproduce.add_argument(
        "--scale", metavar="NAME", default="tiny", help=f"{', '.join(SCALES)} [tiny]"
    )
    reproduce.add_argument(
        "--source", metavar="SOURCE", nargs="+", default=(), help="the images [the scale's]"
    )
    reproduce.add_argument(
        "--seeds", metavar="N", type=int, help="runs of each cell [3; 5 for figure2]"
    )
    reproduce.add_argument(
        "--epochs", metavar="N", type=int, help="what the paper's 100 epochs become [the scale's]"
    )
    reproduce.add_argument("--limit", metavar="N", type=int, help="train on this many images [all]")
    reproduce.add_argument(
        "--only", metavar="CELL", nargs="+", default=(), help="run only these cells [all]"
    )
    annotated = (
        "table5: VOCdevkit, a folder of COCO 2017, any VOC folder, or shapes (embedded) [shapes]"
    )
    reproduce.add_argument(
        "--annotated", metavar="FOLDER", nargs="+", default=("shapes",), help=annotated
    )
    reproduce.add_argument(
        "--out", metavar="FOLDER", help="where pages and figures go [results/SCALE]"
    )
    reproduce.add_argument("--device", metavar="NAME", default="auto", help="cpu, cuda, ... [auto]")
    reproduce.add_argument("--plan", action="store_true", help="show the plan and stop")

    bench = verbs.add_parser(
        "bench", help="speed beside the plain way of doing the same, as ratios"
    )
    bench.add_argument(
        "--only",
        metavar="CASE",
        nargs="+",
        default=(),
        help="cases; an unknown one lists them [all]",
    )
    bench.add_argument("--device", metavar="NAME", default="auto", help="cpu, cuda, ... [auto]")
    bench.add_argument("--out", metavar="FILE.json", help="write everything measured here")

    convert = verbs.add_parser(
        "convert",
        help="make a run folder of other people's checkpoint",
        epilog="Layouts known: the authors' SimSiam, MoCo, lightly, mmselfsup, PatrickHua's SimSiam, solo-learn, "
        "torchvision, timm. Known by name: simsiam_resnet50_100ep, simsiam_resnet50_100ep_256bs, "
        "simsiam_resnet50_200ep_256bs, and torchvision's, such as ResNet50_Weights.IMAGENET1K_V2.",
    )
    convert.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a file, or the name of published weights"
    )
    convert.add_argument(
        "--out", metavar="RUN", required=True, help="the run folder; it must not exist"
    )
    convert.add_argument(
        "--backbone", metavar="NAME", help="its torchvision network, where that is no ResNet"
    )
    convert.add_argument(
        "--image-size",
        metavar="N",
        type=int,
        help="side of its images in pixels [224; 32 small stem]",
    )
    convert.add_argument(
        "--mean", metavar="X", type=float, nargs=3, help="of each channel, in 0..1 [ImageNet's]"
    )
    convert.add_argument("--std", metavar="X", type=float, nargs=3, help="likewise [ImageNet's]")

    methods = verbs.add_parser("methods", help="the methods as rows of one table (Figure 3)")
    methods.add_argument(
        "--format",
        choices=("text", "markdown", "svg"),
        default="text",
        help="svg draws them [text]",
    )
    return parser


def add_transfer(verbs: typing.Any) -> None:
    transfer = verbs.add_parser(
        "transfer",
        help="fine-tune a backbone as a detector on annotated images; writes RUN/transfers/TASK.json and a picture",
        usage="simsiam transfer RUN SOURCE [SOURCE ...] [--task NAME] [--schedule NAME] [--FLAG VALUE ...]",
        epilog="In brackets: VOC07+12's values, the paper's. The schedule chooses others for some; flags win. Stopped, "
        "the same command goes on.",
    )
    transfer.add_argument("run", metavar="RUN")
    sources = "Pascal VOC folders (VOC2007, VOC2012:train), a folder of COCO's JSON and images, or shapes (embedded)"
    transfer.add_argument("source", metavar="SOURCE", nargs="+", help=sources)
    transfer.add_argument(
        "--task", metavar="NAME", default="detection", help="detection or segmentation [detection]"
    )
    named = f"{', '.join(SCHEDULES)} (the paper's), or auto, by the number of images [auto]"
    transfer.add_argument("--schedule", metavar="NAME", default="auto", help=named)
    init = "start from a run folder, a checkpoint or published weights [RUN's backbone]"
    transfer.add_argument("--init", metavar="WEIGHTS", help=init)
    transfer.add_argument("--from-scratch", action="store_true", help="start from random weights")
    transfer.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of new weights and of every step [0]"
    )
    transfer.add_argument("--device", metavar="NAME", default="auto", help="cpu, cuda, ... [auto]")
    transfer.add_argument(
        "--precision", metavar="NAME", default="auto", help="auto, bfloat16 or float32 [auto]"
    )
    add_flags(transfer, Schedule, "the schedule", typing.get_type_hints(Schedule))


def add_embedding_verbs(verbs: typing.Any) -> None:
    """embed, and the verbs that work on what it writes."""
    embed = verbs.add_parser(
        "embed",
        help="a backbone's features of every image, as Parquet; killed and started anew, it goes on",
        usage="simsiam embed RUN [SOURCE ...] --out FILE.parquet [--device NAME] [--precision NAME]",
    )
    embed.add_argument("run", metavar="RUN")
    add_source(embed, "*", "[the run's own]")
    outs = "a new .parquet, a folder for many files of 100,000 images, or a .npy with a .csv of paths beside it"
    embed.add_argument("--out", metavar="FILE.parquet", required=True, help=outs)
    embed.add_argument("--device", metavar="NAME", default="auto", help="cpu, cuda, ... [auto]")
    embed.add_argument(
        "--precision", metavar="NAME", default="auto", help="auto, bfloat16 or float32 [auto]"
    )

    def verb(name: str, help: str, out: str = "", html: str = "") -> Parser:
        found = verbs.add_parser(name, help=help)
        found.add_argument(
            "file", metavar="FILE.parquet", help="what `simsiam embed` wrote, a file or a folder"
        )
        if out:
            found.add_argument("--out", metavar="FILE.csv", required=name == "probe", help=out)
        if html:
            found.add_argument("--html", metavar="FILE.html", help=f"a page of {html}")
        return found

    neighbors = verb("neighbors", "the images most similar to one", html="them")
    neighbors.add_argument(
        "query", metavar="QUERY", help="an embedded image's path or name, or another image file"
    )
    neighbors.add_argument("--k", metavar="N", type=int, default=10, help="how many [10]")

    duplicates = verb(
        "duplicates",
        "copies, resized or compressed again, in groups",
        "group, path, distance",
        "groups",
    )
    note = "most that two thumbnails differ, relative to their contrast [0.28]"
    duplicates.add_argument(
        "--threshold", metavar="X", type=float, default=argparse.SUPPRESS, help=note
    )

    cluster = verb(
        "cluster",
        "images in groups of similar ones (k-means)",
        "path, cluster, distance",
        "every cluster",
    )
    cluster.add_argument("--clusters", metavar="N", type=int, default=10, help="how many [10]")
    cluster.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of the first centers [0]"
    )

    probe = verb(
        "probe",
        "label a few images and have all others labeled",
        "path, label, predicted, confidence",
    )
    probe.add_argument(
        "labels", metavar="LABELS.csv", help="columns path and label, a line an image"
    )

    outliers = verb(
        "outliers", "the images that are least like any other", "path, label, distance", "the first"
    )
    outliers.add_argument(
        "--k", metavar="N", type=int, default=10, help="neighbors that count [10]"
    )


def flags_of(parser: Parser, verb: str | None) -> list[str]:
    verbs = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    return [
        flag for action in verbs.get(verb or "", parser)._actions for flag in action.option_strings
    ]


def run(arguments: dict[str, Any]) -> None:
    """One verb. Modules that load torch are imported by the verb that needs them."""
    verb = arguments.pop("verb")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and verb not in TOGETHER:
        raise UsageError(
            f"{verb} is work for one process: start it without torchrun, which serves {', '.join(TOGETHER)}"
        )
    if verb == "pretrain":
        from simsiam.training.pretrain import pretrain

        tell(pretrain(arguments.pop("source"), **arguments))
    elif verb == "resume":
        from simsiam.training.pretrain import resume

        tell(resume(arguments["run"], epochs=arguments["epochs"]))
    elif verb == "inspect":
        from simsiam.training.inspect import inspect

        inspect(arguments["source"], channels=arguments["channels"], out=arguments["out"])
    elif verb == "shard":
        from simsiam.sources.write_shards import format_shard_summary as written
        from simsiam.sources.write_shards import write_shards

        print(written(write_shards(arguments.pop("source"), **arguments)))
    elif verb == "plan":
        from simsiam.training.plan import plan

        plan(arguments.pop("source"), **arguments)
    elif verb == "preview":
        from simsiam.pages.preview import preview

        say(preview(arguments.pop("source"), **arguments))
    elif verb == "evaluate":
        from simsiam.evaluation.evaluate import evaluate

        evaluate(arguments.pop("run"), arguments.pop("source"), **arguments)
    elif verb == "transfer":
        from simsiam.detection.transfer import transfer

        transfer(arguments.pop("run"), arguments.pop("source"), **arguments)
    elif verb == "embed":
        from simsiam.embeddings.embed import embed

        say(embed(arguments.pop("run"), arguments.pop("source"), **arguments))
    elif verb in ("neighbors", "duplicates", "cluster", "probe", "outliers"):
        module = import_module(f"simsiam.embeddings.{verb}")
        say(vars(module)[f"format_{verb}"](vars(module)[verb](**arguments)))
    elif verb == "export":
        from simsiam.exports.export import export
        from simsiam.exports.export import format_export as exported

        say(exported(export(arguments.pop("run"), **arguments)))
    elif verb == "compare":
        from simsiam.pages.compare import compare

        compare(arguments["runs"])
    elif verb == "report":
        from simsiam.pages.report import report

        page = report(arguments.pop("runs"), **arguments)
        say(f"{page}: {page.stat().st_size / 1e6:.1f} MB")
    elif verb == "demo":
        from simsiam.laboratory.demo import demo

        demo(**arguments)
    elif verb == "reproduce":
        from simsiam.laboratory.reproduce import reproduce

        reproduce(arguments.pop("experiments"), **arguments)
    elif verb == "bench":
        from simsiam.laboratory.bench import bench

        bench(**arguments)
    elif verb == "convert":
        from simsiam.runs.convert import convert, format_conversion

        say(format_conversion(convert(**arguments)))
    elif verb == "methods":
        from simsiam.config import figure3

        say(
            {
                "text": figure3.format_methods_table,
                "markdown": figure3.format_methods_markdown,
                "svg": figure3.draw_methods_svg,
            }[arguments["format"]]()
        )


def tell(run: Path) -> None:
    """How a run ended; of several processes the first one says it."""
    if os.environ.get("RANK", "0") != "0":
        return
    summary = json.loads((run / "summary.json").read_text())
    knn = summary.get("knn_top1")
    say(
        f"{summary['verdict']} after {summary['steps']} steps at {summary['images_per_second']:.0f} images/s"
    )
    if knn:
        best = f"{knn['best']:.1f} % at best (step {knn['best_step']})"
        say(f"kNN on held-out images: {knn['last']:.1f} % at the end, {best}")
    if summary["unreadable"]:
        say(f"{summary['unreadable']} unreadable files were left out: {run}/quarantine.txt")
    say(summary["remedy"])
    if summary["verdict"] == "healthy":
        say(summary["advice"])
    say(f"run folder: {run}")


def say(text: object) -> None:
    """Lines for a person, with whatever a terminal would obey made visible."""
    print("\n".join(map(printable, str(text).splitlines())))


def keep_memory() -> None:
    """Have glibc keep what is freed: the next step asks for as much, and a new page costs more than the sums on it."""
    mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    with suppress(AttributeError, OSError, TypeError):  # macOS, Windows and musl have no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0: done. 1: the work failed. 2: wrong usage. 128 + n: stopped by signal n."""
    keep_memory()
    before = None
    try:
        if threading.current_thread() is threading.main_thread():
            before = signal.signal(signal.SIGTERM, terminate)
        parser = build_parser()
        arguments = sys.argv[1:] if argv is None else argv
        if not arguments:
            parser.print_help()
            return 0
        known, strange = parser.parse_known_args(arguments)
        if strange:
            raise unknown_name("argument", strange[0].split("=")[0], flags_of(parser, known.verb))
        run(vars(known))
        return 0
    except (UsageError, WorkFailed, Stopped, OSError) as error:
        who = f"simsiam, process {os.environ['RANK']}" if "RANK" in os.environ else "simsiam"
        print(f"{who}: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        if isinstance(error, Stopped):
            return 128 + error.signum
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt as error:
        number = signal.Signals(*error.args or [signal.SIGINT])
        print(f"simsiam: stopped by {number.name}; nothing is half-written", file=sys.stderr)
        return 128 + number
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def terminate(number: int, frame: object) -> None:
    """SIGTERM as Ctrl-C: what is half-written is taken away. An Exception might be taken for an image's own."""
    raise KeyboardInterrupt(number)
