"""TensorBoard and Weights & Biases: what their own files hold is what metrics.jsonl holds, whatever became of the run."""

import json
import math
import resource
import signal
import struct
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import train
from runtime.checkpoint import checkpoints, read_checkpoint
from runtime.folder import open_trackers
from tests.conftest import PATIENCE, fails_in_one_line, fill, metrics_of, run_command, tiny_arguments
from tests.test_faults import leave_no_process_behind, start, wait_for_step  # noqa: F401 (a fixture)

STEPS = 30


@pytest.fixture
def tensorboard():
    return pytest.importorskip("tensorboard", reason="needs: pip install tensorboard")


@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    return pytest.importorskip("wandb", reason="needs: pip install wandb")


def curves_of(out: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard draws: tag to (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(out), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def assert_drawn(out: Path):
    """TensorBoard's curves are metrics.jsonl's, each step once, to the last bit of its float32."""
    expected = {}
    for line in metrics_of(out, timings=True):
        for name in line.keys() - {"split", "step"}:
            value = math.nan if line[name] is None else line[name]
            expected.setdefault(f"{line['split']}/{name}", []).append((line["step"], np.float32(value).item()))
    drawn = curves_of(out)
    assert drawn.keys() == expected.keys() and {"train/loss", "val/cross_entropy"} <= drawn.keys()
    for tag in drawn:
        np.testing.assert_array_equal(drawn[tag], expected[tag], tag)


def wandb_records(path: Path):
    """The records of a .wandb file: 7 bytes, then blocks of 32 KiB that hold pieces of (checksum, length, kind) and bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, whole, at = path.read_bytes(), b"", 7
    while at + 7 <= len(content):
        _, length, kind = struct.unpack_from("<IHB", content, at)
        if 2**15 - at % 2**15 < 7 or kind == 0:  # the rest of the block is empty
            at += 2**15 - at % 2**15
            continue
        whole = content[at + 7 : at + 7 + length] if kind in (1, 2) else whole + content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(whole)
            yield record


def wandb_runs(out: Path) -> list[tuple[list[tuple], list[dict]]]:
    """Of each process that wrote: (id, project, name) as often as it is said, and the rows, a step each."""
    runs = []
    for path in sorted((out / "wandb").glob("offline-run-*/*.wandb")):
        records = list(wandb_records(path))
        names = [(r.run.run_id, r.run.project, r.run.display_name) for r in records if r.WhichOneof("record_type") == "run"]
        histories = [r.history.item for r in records if r.WhichOneof("record_type") == "history"]
        rows = [{item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items} for items in histories]
        runs.append((names, rows))
    return runs


def rows_of(out: Path, after: int = 0) -> list[dict]:
    """metrics.jsonl's lines as wandb's rows: train and val of a step in one."""
    rows = {}
    for line in metrics_of(out, timings=True):
        values = {f"{line['split']}/{name}": line[name] for name in line.keys() - {"split", "step"}}
        rows.setdefault(line["step"], {"_step": line["step"]}).update(values)
    return [row for step, row in rows.items() if step > after]


def assert_same_rows(rows: list[dict], expected: list[dict]):
    number = lambda value: math.nan if value in (None, "NaN") else value
    assert [row["_step"] for row in rows] == [row["_step"] for row in expected]
    for row, other in zip(rows, expected):
        mine = {name: number(value) for name, value in row.items() if name not in ("_timestamp", "_runtime")}
        assert mine == pytest.approx({name: number(value) for name, value in other.items()}, rel=0, abs=0, nan_ok=True)


def test_tensorboard_draws_the_metrics_of_a_run_of_two_processes(tensorboard, data, tmp_path):
    out = tmp_path / "out"
    done = run_command(tiny_arguments(data, out, tensorboard=True), processes=2)
    assert done.returncode == 0, done.stderr
    assert len(list(out.glob("*tfevents*"))) == 1  # process 0 alone
    assert_drawn(out)


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGKILL))
def test_both_go_on_with_their_curves(tensorboard, wandb, data, tmp_path, number):
    """Stopped, or killed beyond its last checkpoint, and gone on with."""
    out = tmp_path / "a run"
    settings = {"max_steps": STEPS, "eval_interval": 10, "tensorboard": True, "wandb_project": "tests"}
    run = start(data, out, **settings)
    wait_for_step(run, out, 14)
    run.send_signal(number)
    output, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == (0 if number == signal.SIGTERM else -number), output
    reached = read_checkpoint(checkpoints(out)[-1])["step"]
    if number == signal.SIGKILL:
        assert reached == 10 < curves_of(out)["train/loss"][-1][0]  # steps that will be done again were drawn
    done = run_command(tiny_arguments(data, out, **settings))
    assert done.returncode == 0, done.stderr
    assert_drawn(out)
    assert [step for step, _ in curves_of(out)["train/loss"]] == list(range(1, STEPS + 1))

    (names, first), (names_again, second) = wandb_runs(out)
    if number == signal.SIGTERM:
        assert_same_rows(first + second, rows_of(out))
        assert set(names) == set(names_again)
    assert set(names_again) == {((out / "wandb_id").read_text(), "tests", "a run")}
    assert_same_rows(second, rows_of(out, after=reached))  # none twice once wandb leaves out the steps it has


def test_another_folder_is_another_run(wandb, data, tmp_path):
    """Though both are called the same."""
    for out in (tmp_path / "a/run", tmp_path / "b/run"):
        done = run_command(tiny_arguments(data, out, max_steps=3, wandb_project="tests"))
        assert done.returncode == 0, done.stderr
    (a, _), (b, _) = (run for folder in "ab" for run in wandb_runs(tmp_path / folder / "run"))
    assert a[0][1:] == b[0][1:] == ("tests", "run") and a[0][0] != b[0][0]


@pytest.mark.parametrize("package, setting", (("tensorboard", "--tensorboard=True"), ("wandb", "--wandb_project=mine")))
def test_a_missing_package_is_one_line_and_nothing_is_written(data, tmp_path, capsys, monkeypatch, train_here, package, setting):
    monkeypatch.setitem(sys.modules, package, None)  # Python's own way to say that there is none
    arguments = [*tiny_arguments(data, tmp_path / "out"), setting]
    assert f"pip install {package}" in fails_in_one_line(capsys, train_here, arguments)
    assert not (tmp_path / "out").exists()


def test_wandb_without_a_login_is_one_line(wandb, data, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # and its .netrc
    done = run_command(tiny_arguments(data, tmp_path / "out", wandb_project="mine"))
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("nanoOEC: wandb_project=mine cannot be opened")


def test_tensorboard_goes_on_once_a_full_disk_has_room(tensorboard, tmp_path, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda error: None)  # TensorBoard's own thread reports it as well
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    (show,) = open_trackers(train.TrainConfig(tensorboard=True), tmp_path, 0)
    show({"train/loss": 1.0}, 1)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (sum(path.stat().st_size for path in tmp_path.iterdir()) + 5, hard))
        with pytest.raises(OSError):
            show({"train/loss": 2.0}, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    show({"train/loss": 3.0}, 3)
    assert curves_of(tmp_path) == {"train/loss": [(1, 1.0), (3, 3.0)]}


def test_a_disk_that_fills_up_stops_neither_training_nor_trackers(tensorboard, wandb, data, small_disk):
    out = small_disk / "out"
    run = start(data, out, max_steps=10**5, eval_interval=20, tensorboard=True, wandb_project="tests")
    wait_for_step(run, out, 11)
    fill(out)
    lines = iter(run.stdout.readline, "")
    assert any("cannot be written" in line and "training continues" in line for line in lines)
    (out / "ballast").unlink()
    assert any("validation loss" in line for line in lines)
    run.terminate()
    output, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0 and "stopped at step" in output, output
    steps = [step for step, _ in curves_of(out)["train/loss"]]
    assert steps == sorted(set(steps)) and steps[-1] == metrics_of(out)[-1]["step"]
