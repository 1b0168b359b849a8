"""Loggers show metrics.jsonl elsewhere, continue one curve after a crash, and never end a run."""

import errno
import json
import os
import socket
import struct
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import QUICK, TINY, flags

import simsiam
from simsiam.commands.main import main
from simsiam.errors import UsageError
from simsiam.runs import journal
from simsiam.runs.loggers import background, loggers
from simsiam.runs.loggers.choice import parse_loggers
from simsiam.runs.loggers.loggers import LOGGERS, LoggedRun, Logger, metrics
from simsiam.runs.run_folder import Run
from simsiam.training.pretrain import Pretraining
from simsiam.utils.names import hide_keys, without_credentials

SIX = QUICK | {"steps": 6, "save_seconds": 1e6}
TIMES = {"images_per_second", "data_wait"}
CRASH_STEP = 4  # the first step that is not taken; the last checkpoint is at step 0


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path_factory):
    """Any connection, also of W&B's own process, is counted by a server that stands for all."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # no key in ~/.netrc
    server = socket.create_server(("127.0.0.1", 0))
    server.setblocking(False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{server.getsockname()[1]}")
    connect = socket.socket.connect

    def local_only(self, address):
        local = isinstance(address, str | bytes) or address[0] in ("127.0.0.1", "::1")
        assert local, f"a connection to {address}"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
    yield
    with server, pytest.raises(BlockingIOError):
        server.accept()


def expected(run) -> dict[int, dict[str, float]]:
    return {line["step"]: metrics(line) for line in Run(run).metrics()}


# --- what a logger has written, as (step, values) in order ---


def read_tensorboard(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    values = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            assert name not in values.setdefault(event.step, {}), f"{name} twice"
            values[event.step][name] = event.value
    return sorted(values.items())


def wandb_records(run):
    """The records of the one offline run: LevelDB's log format, after seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    [path] = (run / "wandb").glob("offline-run-*/*.wandb")
    for _ in range(200):  # W&B's process may still be writing
        data, place, content, records = path.read_bytes(), 7, b"", []
        while place + 7 <= len(data):
            if 2**15 - place % 2**15 < 7:
                place += 2**15 - place % 2**15
                continue
            length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
            place += 7 + length
            if place > len(data):
                break
            content += data[place - length : place]
            if kind in (1, 4):  # a whole record, or the last part of one
                records.append(Record.FromString(content))
                content = b""
        if any(r.HasField("exit") for r in records):
            return records
        time.sleep(0.1)
    raise AssertionError(f"W&B did not finish {path}")


def wandb_items(items) -> dict:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def read_wandb(run):
    found = []
    for record in wandb_records(run):
        if record.HasField("history"):
            values = wandb_items(record.history.item)
            found.append((values["_step"], {k: v for k, v in values.items() if k[0] != "_"}))
    return found


def mlflow_run(run):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{run}/mlflow.db")
    experiment = client.get_experiment_by_name("simsiam")
    [found] = client.search_runs([experiment.experiment_id])
    return client, found


def read_mlflow(run):
    client, found = mlflow_run(run)
    values = {}
    for name in found.data.metrics:
        if not name.startswith("summary/"):
            for metric in client.get_metric_history(found.info.run_id, name):
                assert name not in values.setdefault(metric.step, {}), f"{name} twice"
                values[metric.step][name] = metric.value
    return sorted(values.items())


READERS = {"tensorboard": read_tensorboard, "wandb": read_wandb, "mlflow": read_mlflow}


def assert_has_metrics(name, run, *, without=frozenset()):
    found, lines = READERS[name](run), expected(run)
    assert [step for step, _ in found] == list(lines), name
    for step, values in found:
        assert values.keys() == lines[step].keys(), (name, step)
        kept = {k: v for k, v in values.items() if k not in without}
        assert kept == pytest.approx({k: lines[step][k] for k in kept}, rel=1e-6), (name, step)


@pytest.fixture(params=list(LOGGERS))
def name(request):
    if request.param != "tensorboard":
        pytest.importorskip(request.param)
    return request.param


def crash(monkeypatch, run, **words):
    """Begin a run that dies at CRASH_STEP, without a checkpoint of the steps before."""
    step = Pretraining.train_step

    def failing(self, batch):
        if self.step == CRASH_STEP - 1:
            raise RuntimeError("crash")
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Pretraining, "train_step", failing)
        with pytest.raises(RuntimeError, match="crash"):
            simsiam.pretrain("shapes", out=run, **SIX | words)


# --- the same numbers ---


def test_every_logger_gets_the_numbers_the_recipe_and_the_summary(tmp_path, capsys):
    pytest.importorskip("wandb"), pytest.importorskip("mlflow")
    run = tmp_path / "run"
    simsiam.pretrain("shapes", out=run, logger=["tensorboard", "wandb", "mlflow"], **TINY)
    for name in READERS:
        assert_has_metrics(name, run)
    summary, recipe = Run(run).json("summary.json"), Run(run).recipe
    records = wandb_records(run)
    config = wandb_items(x for r in records for x in r.run.config.update)
    assert config.pop("_wandb") is not None and config == recipe.to_dict()
    of_wandb = wandb_items(x for r in records for x in r.summary.update)
    [exit_record] = [r.exit for r in records if r.HasField("exit")]
    assert exit_record.exit_code == 0
    of_mlflow = mlflow_run(run)[1]
    assert of_mlflow.info.status == "FINISHED"
    assert of_mlflow.data.params["method/dim"] == str(TINY["dim"])
    for values in (of_wandb, {**of_mlflow.data.tags, **of_mlflow.data.metrics}):
        assert values["summary/verdict"] == summary["verdict"]
        assert values["summary/knn_top1/best"] == summary["knn_top1"]["best"]
    # Where it goes is said, and nothing is written outside of the run folder.
    output = capsys.readouterr().err
    assert output.count("logger ") == 2 and "offline; `wandb sync" in output
    assert not os.listdir() and {entry.name for entry in tmp_path.iterdir()} == {"run"}
    text = " ".join(str(r) for r in records)
    assert socket.gethostname() not in text and os.path.expanduser("~") not in text


def test_loggers_change_no_result(tmp_path):
    runs = [tmp_path / name for name in ("none", "tensorboard")]
    for run in runs:
        simsiam.pretrain("shapes", out=run, logger=run.name, **QUICK)
    one, other = (Run(run).checkpoint()["model"] for run in runs)
    assert all(torch.equal(one[k], other[k]) for k in one)
    recipes = [(run / "recipe.yaml").read_bytes() for run in runs]
    assert recipes[0] == recipes[1]
    assert not (runs[0] / "tensorboard").exists() and (runs[1] / "tensorboard").exists()
    simsiam.resume(runs[0])  # nor is it there after the run continues
    assert not (runs[0] / "tensorboard").exists()


def test_only_one_process_logs(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "rank", lambda: 1)
    simsiam.pretrain("shapes", out=tmp_path / "run", **QUICK)
    assert not (tmp_path / "run" / "tensorboard").exists()


# --- one curve ---


def test_a_resumed_run_continues_its_curve(tmp_path, monkeypatch, name):
    run = tmp_path / "run"
    crash(monkeypatch, run, logger=name)
    assert [line["step"] for line in Run(run).metrics()] == [1, 2, 3]
    if name == "mlflow":
        assert mlflow_run(run)[1].info.status == "FAILED"
    simsiam.resume(run)
    assert len(expected(run)) == 6
    # MLflow keeps the lines that it has: those of the steps that are taken a second time.
    assert_has_metrics(name, run, without=TIMES)


def test_a_logger_that_failed_gets_what_it_lacks(tmp_path, monkeypatch, name):
    run, log = tmp_path / "run", LOGGERS[name].log

    def failing(self, records):
        log(self, records[:1])
        raise ConnectionError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(LOGGERS[name], "log", failing)
        crash(monkeypatch, run, logger=name, save_seconds=0)
    assert Run(run).checkpoint()["step"] == 3
    simsiam.resume(run)
    assert_has_metrics(name, run)


def test_a_logger_that_comes_later_gets_the_whole_curve(tmp_path, name):
    run = simsiam.pretrain("shapes", out=tmp_path / "run", logger="none", **SIX)
    simsiam.resume(run, logger=name)
    assert_has_metrics(name, run)
    names = Run(run).json("loggers.json")["loggers"]
    assert names == [name]


class StandInRun:
    """A run of W&B on a server that has the first two steps already."""

    starting_step, url, dir, finished = 3, "a url", "run/wandb/run-1/files", None

    def __init__(self, options):
        self.options, self.logged, self.summary = options, [], {}

    def log(self, values, step, commit):
        self.logged.append(step)

    def finish(self, exit_code):
        self.finished = exit_code


@pytest.fixture
def stand_in(monkeypatch):
    """A module `wandb` whose user is logged in."""
    module = SimpleNamespace(
        settings=SimpleNamespace(mode="online", project=None, run_name=None),
        logged_in=True,
        runs=[],
    )
    module.setup = lambda settings: module
    module.Settings = lambda **settings: settings

    def login(*, prompt, verify):
        assert not prompt and not verify
        return module.logged_in

    def init(**options):
        module.runs.append(StandInRun(options))
        return module.runs[-1]

    module.login, module.init = login, init
    monkeypatch.setitem(sys.modules, "wandb", module)
    spec = SimpleNamespace(origin="a file")
    monkeypatch.setattr("simsiam.runs.loggers.choice.find_spec", lambda name: spec)
    return module


def test_a_run_of_wandb_that_is_online_is_continued_under_its_id(tmp_path, stand_in):
    run = simsiam.pretrain("shapes", out=tmp_path / "run", logger="wandb", **QUICK)
    simsiam.resume(run)
    first, second = stand_in.runs
    assert first.options["resume"] == "allow" and first.options["mode"] is None
    assert first.options["id"] == second.options["id"] == Run(run).json("loggers.json")["id"]
    assert first.logged == second.logged == [3]  # the server has the others
    assert first.finished == 0 and first.summary["summary/steps"] == 3
    stand_in.logged_in = False
    simsiam.resume(run)
    assert stand_in.runs[2].options["mode"] == "offline"
    assert stand_in.runs[2].options["resume"] is None


# --- a logger never ends a run ---


class Failing(Logger):
    """Raises where its class attribute says."""

    place, error = "", RuntimeError("the server\nis gone: https://me:secret@host/path?key=abc")

    def fail(self, place):
        if place == self.place:
            raise self.error

    def open(self):
        self.fail("open")
        return -1, ""

    def log(self, records):
        self.fail("log")

    def close(self, summary, status):
        self.fail("close")


@pytest.mark.parametrize("place", ["open", "log", "close"])
@pytest.mark.parametrize("error", [Failing.error, SystemExit(3), OSError(errno.ENOSPC, "full")])
def test_a_logger_that_fails_is_said_once_and_ends_nothing(
    tmp_path, monkeypatch, capfd, place, error
):
    monkeypatch.setattr(Failing, "place", place)
    monkeypatch.setattr(Failing, "error", error)
    monkeypatch.setitem(LOGGERS, "tensorboard", Failing)
    run = tmp_path / "run"
    assert main(["pretrain", "--out", str(run), *flags(**QUICK)]) == 0
    [line] = [x for x in capfd.readouterr().err.splitlines() if "tensorboard" in x]
    assert line.startswith("logger   tensorboard: ") and "the run goes on without" in line
    assert "secret" not in line and "abc" not in line
    assert len(expected(run)) == 3 and Run(run).json("summary.json")["steps"] == 3


def test_a_logger_that_hangs_does_not_hold_the_run(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(background, "OPEN_SECONDS", 0.1)
    monkeypatch.setattr(background, "CLOSE_SECONDS", 0.2)
    released = threading.Event()
    monkeypatch.setattr(Failing, "log", lambda self, records: released.wait())
    monkeypatch.setitem(LOGGERS, "tensorboard", Failing)
    simsiam.pretrain("shapes", out=tmp_path / "run", **QUICK)
    [line] = [x for x in capfd.readouterr().err.splitlines() if "tensorboard" in x]
    assert "not everything was sent within" in line
    [thread] = [x for x in threading.enumerate() if x.name == "tensorboard"]
    monkeypatch.setattr(Failing, "close", lambda self, summary, status: 1 / 0)
    released.set()
    thread.join()
    assert not capfd.readouterr().err  # said once


def test_a_full_disk_ends_tensorboard_and_not_the_run(tmp_path, monkeypatch, capfd):
    append, written = loggers.append_bytes, []

    def full(file, data):
        written.append(data)
        if len(written) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(file, data)

    monkeypatch.setattr(loggers, "append_bytes", full)
    simsiam.pretrain("shapes", out=tmp_path / "run", **SIX)
    output = capfd.readouterr().err
    assert output.count("No space left on device") == 1 and "Traceback" not in output
    assert len(expected(tmp_path / "run")) == 6


def test_a_full_disk_ends_a_run_whose_metrics_cannot_be_written(tmp_path, monkeypatch, capfd):
    def full(file, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(journal, "append_bytes", full)
    assert main(["pretrain", "--out", str(tmp_path / "run"), *flags(**QUICK)]) == 1
    output = capfd.readouterr().err
    assert "cannot write metrics.jsonl in" in output and "Traceback" not in output


def test_tensorboard_that_cannot_be_imported_or_written_ends_nothing(tmp_path, monkeypatch, capfd):
    run = tmp_path / "run"
    crash(monkeypatch, run, logger="none")
    (run / "tensorboard").write_text("a file in its place")
    simsiam.resume(run, logger="tensorboard")
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    simsiam.pretrain("shapes", out=tmp_path / "other", **QUICK)
    found = [x for x in capfd.readouterr().err.splitlines() if x.startswith("logger ")]
    assert len(found) == 2 and "Not a directory" in found[0] and "event_pb2" in found[1]


def test_a_server_that_is_gone_ends_nothing(tmp_path, monkeypatch, capfd):
    """MLflow tries again for minutes; the run does not wait for that."""
    pytest.importorskip("mlflow")
    monkeypatch.setattr(background, "OPEN_SECONDS", 0.1)
    monkeypatch.setattr(background, "CLOSE_SECONDS", 1.0)
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: time.sleep(60))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    begin = time.monotonic()
    assert main(["pretrain", "--out", "run", "--logger", "mlflow", *flags(**QUICK)]) == 0
    assert time.monotonic() - begin < 50
    [line] = [x for x in capfd.readouterr().err.splitlines() if x.startswith("logger ")]
    assert "metrics.jsonl has all numbers" in line and "secret" not in line


# --- the choice ---


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_logger_without_its_package_is_refused_at_the_start(
    tmp_path, monkeypatch, capsys, package
):
    monkeypatch.setattr("simsiam.runs.loggers.choice.find_spec", lambda name: None)
    out = tmp_path / "run"
    assert main(["pretrain", "--out", str(out), "--logger", package, *flags(**QUICK)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f'pip install "simsiam[{package}]"' in line and not out.exists()
    # A folder of W&B's name in the working directory is no package.
    namespace = SimpleNamespace(origin=None)
    monkeypatch.setattr("simsiam.runs.loggers.choice.find_spec", lambda name: namespace)
    with pytest.raises(UsageError, match="pip install"):
        parse_loggers(package)


def test_names_of_loggers_are_checked(capsys):
    assert parse_loggers("none") == () and parse_loggers(["tensorboard"] * 2) == ("tensorboard",)
    for names, message in {
        ("wanb",): "unknown logger 'wanb': did you mean 'wandb'?",
        ("none", "tensorboard"): "none stands alone",
    }.items():
        assert main(["pretrain", "shapes", "--logger", *names]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert message in line


def test_a_change_of_loggers_keeps_the_id(tmp_path, stand_in):
    run = simsiam.pretrain("shapes", out=tmp_path / "run", logger="wandb", **QUICK)
    first = Run(run).json("loggers.json")["id"]
    simsiam.resume(run, logger="none")
    assert len(stand_in.runs) == 1 and not (run / "tensorboard").exists()
    simsiam.resume(run, logger=["tensorboard", "wandb"])
    assert Run(run).json("loggers.json") == {"loggers": ["tensorboard", "wandb"], "id": first}


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"loggers": 5, "id": "0"}', '{"loggers": ["wandb"], "id": "../x"}']
)
def test_a_damaged_choice_is_one_line(tmp_path, capsys, text):
    run = simsiam.pretrain("shapes", out=tmp_path / "run", **QUICK)
    (run / "loggers.json").write_text(text)
    assert main(["resume", str(run)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "loggers.json is damaged" in line


@pytest.mark.parametrize(
    ("text", "shown"),
    {
        "s3://bucket/a/b@2": "s3://bucket/a/b@2",
        "https://me:secret@host:80/data/{0..9}.tar?token=abc#x": "https://host:80/data/{0..9}.tar",
        "https://key@host": "https://host",
        "simplecache::https://a:b@c@host/x y?k=a b": "simplecache::https://host/x y",
        "/photos/me@home?/#1": "/photos/me@home?/#1",
    }.items(),
)
def test_urls_are_logged_without_keys(text, shown):
    assert hide_keys(text) == shown
    recipe = {"source": [text], "method": {"name": text}, "epochs": 3}
    assert without_credentials(recipe) == {
        "source": [shown],
        "method": {"name": shown},
        "epochs": 3,
    }


def test_texts_of_a_stranger_are_no_metrics(tmp_path):
    logger = LOGGERS["tensorboard"](LoggedRun(tmp_path, 0, "", {}))
    logger.open()
    logger.log([{"step": 1, "warning": "no", "loss": 2.0, "knn_top1": None}])
    logger.close({}, "finished")
    assert read_tensorboard(tmp_path) == [(1, {"loss": 2.0})]
