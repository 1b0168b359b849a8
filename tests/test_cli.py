"""The command line: every mistake is one readable line and an exit code, never a traceback."""

import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import QUICK, TINY, flags
from PIL import Image

from simsiam.commands.main import build_verb_parser, main
from simsiam.config.recipes import SETTING_TYPES


def run_main(capsys, *arguments: object) -> tuple[int, str]:
    """The exit code of a command, and what it prints on stderr."""
    code = main([str(a) for a in arguments])
    return code, capsys.readouterr().err.strip()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["pretrian"], "simsiam: unknown command 'pretrian': did you mean 'pretrain'?"),
        (["xyzzy"], "unknown command 'xyzzy': choose from adapt, bench, cluster, "),
        ([""], "unknown command ''"),
        (["--epochs", "3"], "unknown argument '--epochs'"),
        (["compare", "a", "b", "--colour"], "unknown argument '--colour'"),
        (["pretrain", "shaeps"], "no such file or folder: shaeps; did you mean shapes?"),
        (["Evaluate"], "unknown command 'Evaluate': did you mean 'evaluate'?"),
        (["RESUME"], "unknown command 'RESUME': did you mean 'resume'?"),
        (["train"], "unknown command 'train': did you mean 'pretrain'?"),
        (["pretrain", "--method", "simsian"], "unknown method 'simsian': did you mean 'simsiam'?"),
        (["pretrain", "--epoch", "3"], "unknown argument '--epoch': did you mean '--epochs'?"),
        (["pretrain", "--epochs", "three"], "epochs is 'three'; it takes a whole number"),
        (["pretrain", "--epochs", "-3"], "epochs is -3; it is at least 1"),
        (["pretrain", "--predictor", "mpl"], "unknown predictor 'mpl': did you mean 'mlp'?"),
        (["pretrain", "--jitter", "1", "2"], "jitter takes 4 values, not 2"),
        (["pretrain", "--backbone", "resnet19"], "unknown backbone 'resnet19': did you mean"),
        (["pretrain", "--backbone", "vgg11", "--width", "16"], "vgg11 has neither"),
        (["pretrain", "--device", "tpu"], "device 'tpu' cannot be used here"),
        (
            ["pretrain", "--batch-size", "9999"],
            "there are only 4000 images: take a smaller --batch-size",
        ),
        (["pretrain", "--recipe", "cifra"], "unknown recipe 'cifra': did you mean 'cifar'?"),
        (["pretrain", "--output-bn-affine", "--head-bn", "pred_hidden"], "add proj_out to head_bn"),
        (["pretrain", "--backbone", "squeezenet1_0", "--width", "64"], "no clear feature output"),
        (["pretrain", "--device", "meta"], "device 'meta' cannot be used here"),
        (
            ["pretrain", "--target", "momentum", "--no-stop-gradient"],
            "a second encoder gets no gradient",
        ),
        (
            ["pretrain", "--queue", "64"],
            "queue has no effect here: it belongs to criterion info_nce",
        ),
        (
            ["pretrain", "--target", "momentun"],
            "unknown target 'momentun': did you mean 'momentum'",
        ),
        (["pretrain", "--criterion", "cosin"], "unknown criterion 'cosin': did you mean 'cosine'"),
        (["demo", "--seeds", "0"], "seeds is 0; it is at least 1"),
        (["resume", "nowhere"], "nowhere is not a run folder"),
        (["resume"], "the following arguments are required: RUN"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, text, capsys, tmp_path):
    os.chdir(tmp_path)
    code, error = run_main(capsys, *arguments)
    assert code == 2 and text in error and "\n" not in error, error
    assert not any(tmp_path.rglob("*")), "nothing may be left behind"


def test_folders_that_cannot_be_used(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    code, error = run_main(capsys, "pretrain", tmp_path / "empty")
    assert code == 2 and "no image in" in error and "\n" not in error
    (tmp_path / "notes.txt").write_text("hello")
    code, error = run_main(capsys, "pretrain", tmp_path / "notes.txt")
    assert code == 1 and "\n" not in error and "hello: No such file or directory" in error
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    code, error = run_main(capsys, "pretrain", "--out", tmp_path / "full", *flags(**TINY))
    assert (
        code == 2
        and "not written over" in error
        and (tmp_path / "full" / "x").read_text() == "mine"
    )
    (tmp_path / "file").write_text("")
    code, error = run_main(capsys, "pretrain", "--out", tmp_path / "file" / "run", *flags(**TINY))
    assert code == 2 and "cannot write to" in error


@pytest.mark.parametrize(
    "verb", ["pretrain", "plan", "preview", "shard", "pretrain --recipe cifar"]
)
@pytest.mark.parametrize("kind", ["folder", "list", "parquet"])
def test_where_no_image_can_be_read_the_first_and_the_reason_are_named(
    capsys, tmp_path, verb, kind
):
    source = tmp_path / "images"
    if kind == "folder":
        source.mkdir()
        for i in range(20):
            (source / f"{i:02}.jpg").write_bytes(b"not an image")
        reason = "00.jpg: not one of JPEG, PNG"
    elif kind == "list":
        source = tmp_path / "list.txt"
        source.write_text("".join(f"{i}.jpg,{i % 2}\n" for i in range(20)))
        reason = "0.jpg,0: No such file or directory"
    else:
        source = tmp_path / "images.parquet"
        rows = [{"bytes": None, "path": f"{i}.jpg"} for i in range(20)]
        image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        pq.write_table(pa.table({"image": pa.array(rows, image)}), source)
        reason = "train#0: no image in this row: Parquet needs the bytes of image files"
    name, *options = verb.split()
    if name != "plan":
        options += ["--out", tmp_path / "out.png"]
    code, error = run_main(capsys, name, source, *options)
    assert code == 1 and "\n" not in error
    assert f"none of the 20 images can be read; the first, {reason}" in error


def test_a_broken_recipe_file(capsys, tmp_path):
    path = tmp_path / "recipe.yaml"
    near = ("method: {name: x, dimm: 3}", "did you mean 'dim'")
    for text, message in [("a: [", "is not YAML"), ("- 1", "takes a mapping"), near]:
        path.write_text(text)
        code, error = run_main(capsys, "pretrain", "--recipe", path)
        assert code == 2 and message in error and "\n" not in error


def test_every_setting_of_a_recipe_is_a_documented_flag():
    actions = build_verb_parser("pretrain")._actions
    documented = {flag: action.help for action in actions for flag in action.option_strings}
    for name in SETTING_TYPES.keys() - {"source"}:
        assert documented["--" + name.replace("_", "-")], name
    for flag in (
        "--no-stop-gradient",
        "--predictor-lr-scale",
        "--head-bn",
        "--output-bn-affine",
        "--pred-dim",
    ):
        assert flag in documented


def test_one_command_trains_and_prints_a_summary(tmp_path):
    command = [
        sys.executable,
        "-m",
        "simsiam",
        "pretrain",
        "--out",
        str(tmp_path / "run"),
        *flags(**TINY),
    ]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "too early after 32 steps" in process.stdout
    assert f"run folder: {tmp_path / 'run'}" in process.stdout
    lines = process.stderr.replace(str(tmp_path), "").splitlines()
    assert max(map(len, lines)) <= 80
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["command"][1] == "pretrain"


def test_method_settings_reach_the_model_from_the_command_line(tmp_path):
    from simsiam.runs.run_folder import Run

    cells = {"stop_gradient": False, "predictor": "fixed", "predictor_lr": "cosine", "dim": 8}
    run = ["pretrain", "--out", str(tmp_path / "run"), "--steps", "1", "--head-bn", "proj_hidden"]
    assert main(run + flags(**TINY | cells)) == 0
    method = Run(tmp_path / "run").recipe.method
    assert {k: getattr(method, k) for k in cells} == cells and method.head_bn == ("proj_hidden",)


def test_a_row_on_equal_terms_and_the_table_of_rows(tmp_path, capsys):
    from simsiam.runs.run_folder import Run

    run = [
        "pretrain",
        "--out",
        str(tmp_path / "run"),
        "--method",
        "simclr",
        "--equal-terms",
        "--predictor",
        "mlp",
    ]
    assert main([*run, "--stop-gradient", *flags(**QUICK)]) == 0
    row = Run(tmp_path / "run").recipe.method
    assert (row.criterion, row.optimizer, row.predictor, row.stop_gradient) == (
        "nt_xent",
        "sgd",
        "mlp",
        True,
    )
    capsys.readouterr()
    for name, start in (("text", "method "), ("markdown", "| method |"), ("svg", "<svg ")):
        assert main(["methods", "--format", name]) == 0
        assert capsys.readouterr().out.startswith(start)


def test_a_single_image_is_too_few(capsys, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    code, error = run_main(capsys, "pretrain", tmp_path / "one.png")
    assert code == 2 and "there are only 1 images" in error
