"""What machines and people do to a run: real processes, real signals, real files. Nothing may be lost."""

import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import train
from runtime.checkpoint import checkpoint_path, checkpoints, read_checkpoint
from runtime.folder import Metrics
from tests.conftest import (
    PATIENCE, ROOT, assert_same_bits, command, fails_in_one_line, fill, metrics_of, run_command, tiny_arguments, tiny_folder, write_shard,
)  # fmt: skip
from tools.sample import load_model

STEPS = 60


def state_of(out: Path, step: int = STEPS) -> dict:
    state = read_checkpoint(out / f"ckpt_{step:07d}.pt")
    for name in ("out_dir", "data_dir", "resume"):
        del state["config"][name]
    return state


def assert_same_run(a: Path, b: Path):
    assert_same_bits(state_of(a), state_of(b))
    assert metrics_of(a) == metrics_of(b)
    assert not list(b.glob("*.tmp"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    data = tiny_folder(folder / "tiny")
    done = run_command(tiny_arguments(data, folder / "out", max_steps=STEPS, eval_interval=5))
    assert done.returncode == 0, done.stderr
    return data, folder / "out"


started = []


@pytest.fixture(autouse=True)
def leave_no_process_behind():
    yield
    while started:
        run = started.pop()
        for pid in [run.pid, *(workers_of(run) if run.poll() is None else [])]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.communicate(timeout=PATIENCE)


def start(data, out, processes=1, launch={}, **changes) -> subprocess.Popen:
    arguments = tiny_arguments(data, out, **{"max_steps": STEPS, "eval_interval": 5} | changes)
    run = subprocess.Popen(command(arguments, processes, **launch), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    started.append(run)
    return run


def wait_for_step(run: subprocess.Popen, out: Path, step: int):
    """Until `metrics.jsonl` has the step's line."""
    while not ((out / "metrics.jsonl").exists() and f'"step": {step},' in (out / "metrics.jsonl").read_text()):
        assert run.poll() is None, f"the run ended before step {step}: {run.stdout.read()}"
        time.sleep(0.005)


def wait_for_line(run: subprocess.Popen, part: str):
    """Until the run prints a line with this part."""
    lines = []
    for line in iter(run.stdout.readline, ""):
        lines.append(line)
        if part in line:
            return
    raise AssertionError(f"the run ended without a line with {part!r}: {''.join(lines)}")


# --- kills


@pytest.mark.parametrize(
    "kills, compiled",
    (pytest.param(5, False, marks=pytest.mark.slow), pytest.param(40, False, marks=pytest.mark.slow), pytest.param(12, True, marks=pytest.mark.slow)),
)
def test_kill_9_at_any_moment_loses_nothing(undisturbed, tmp_path, kills, compiled):
    data, expected = undisturbed
    if compiled:  # other rounding: an undisturbed run of its own
        expected = tmp_path / "undisturbed"
        assert start(data, expected, compile=True).wait(timeout=PATIENCE) == 0
    whole_size = (expected / f"ckpt_{STEPS:07d}.pt").stat().st_size
    dice, out = random.Random(kills), tmp_path / "0"
    moments = {
        "any time": lambda: True,
        "in a step": lambda: run.stdout.readline().startswith("step ") or run.poll() is not None,
        "in a write": lambda: any(out.glob("ckpt_*.tmp")),
        "before the rename": lambda: any(p.stat().st_size >= whole_size for p in out.glob("ckpt_*.tmp")),
    }
    delays = {"any time": 30 if compiled else 6, "in a step": 0.3}
    died, finished = Counter(), 0
    while died.total() < kills:
        run = start(data, out, compile=compiled)
        moment = dice.choice(list(moments))
        while run.poll() is None:
            with suppress(FileNotFoundError):  # renamed while it was looked at
                if moments[moment]():
                    break
            time.sleep(0.0002)
        time.sleep(dice.uniform(0, delays.get(moment, 0)))
        run.kill()
        status = run.wait()
        assert status in (0, -signal.SIGKILL), run.stdout.read()
        died[moment] += status != 0
        if status == 0:  # came through before the kill: the next kills are another run's
            assert_same_run(expected, out)
            finished += 1
            out = tmp_path / str(finished)
    done = start(data, out, compile=compiled)
    assert done.wait(timeout=PATIENCE) == 0, done.stdout.read()
    assert_same_run(expected, out)
    print(f"kills {dict(died)}, runs {finished + 1}")


@pytest.mark.parametrize("number", (signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)))
def test_a_signal_saves_and_leaves_with_0(undisturbed, tmp_path, number):
    data, expected = undisturbed
    out = tmp_path / "out"
    run = start(data, out, max_steps=STEPS)
    wait_for_step(run, out, 3)
    run.send_signal(number)
    output, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0 and "stopped at step" in output, output
    newest = sorted(out.glob("ckpt_*.pt"))[-1]
    assert read_checkpoint(newest)["step"] == metrics_of(out)[-1]["step"]  # the step in flight is not lost
    assert run_command(tiny_arguments(data, out, max_steps=STEPS, eval_interval=5)).returncode == 0
    assert_same_run(expected, out)


def test_a_second_ctrl_c_stops_at_once(data, tmp_path):
    out = tmp_path / "out"
    run = start(data, out, max_steps=10**6, batch_size=2**16)  # a step that takes a minute
    wait_for_line(run, "parameters")
    run.send_signal(signal.SIGINT)
    wait_for_line(run, "stopping after this step")
    time.sleep(0.6)  # within half a second it would count as the same one
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == 130 and "stopped at once" in output and "Traceback" not in output, output
    assert not checkpoints(out)  # it did not wait for the step's end


def workers_of(run: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.parametrize(
    "receiver, number, status",
    (("worker", signal.SIGTERM, 0), pytest.param("torchrun", signal.SIGTERM, 1, marks=pytest.mark.slow), pytest.param("torchrun", signal.SIGKILL, -9, marks=pytest.mark.slow)),
)
def test_a_signal_stops_all_processes_with_a_checkpoint(data, tmp_path, receiver, number, status):
    """The workers stop in order and leave with 0; torchrun itself, when it is the one told to end, reports 1."""
    out = tmp_path / "out"
    run = start(data, out, processes=2, max_steps=10**5)
    wait_for_step(run, out, 3)
    os.kill(workers_of(run)[1] if receiver == "worker" else run.pid, number)
    output, _ = run.communicate(timeout=PATIENCE)  # until the workers too have closed their end of the pipe
    assert run.returncode == status and "stopped at step" in output, output
    assert read_checkpoint(sorted(out.glob("ckpt_*.pt"))[-1])["step"] == metrics_of(out)[-1]["step"]


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced(data, tmp_path):
    """Two processes with restarts; what they end with is what an undisturbed pair ends with."""
    outs = [tmp_path / name for name in ("whole", "broken")]
    for out in outs:
        run = start(data, out, processes=2, launch={"max-restarts": 3})
        if out.name == "broken":
            wait_for_step(run, out, 13)
            os.kill(workers_of(run)[1], signal.SIGKILL)
        output, _ = run.communicate(timeout=PATIENCE)
        assert run.returncode == 0, output
    assert_same_run(*outs)


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_with_one_and_the_other_way_round(undisturbed, tmp_path):
    data, expected = undisturbed
    for first, second in ((2, 1), (1, 2)):
        out = tmp_path / f"{first}{second}"
        run = start(data, out, processes=first, max_steps=STEPS)
        wait_for_step(run, out, 11)
        os.kill(workers_of(run)[0] if first > 1 else run.pid, signal.SIGTERM)
        assert run.communicate(timeout=PATIENCE) and run.returncode == 0
        done = run_command(tiny_arguments(data, out, max_steps=STEPS, eval_interval=5), second)
        assert done.returncode == 0, done.stderr
        for a, b in zip(metrics_of(expected), metrics_of(out), strict=True):
            assert (a["split"], a["step"]) == (b["split"], b["step"])
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)


@pytest.mark.slow  # compiles twice
def test_a_compile_cache_that_a_dying_machine_left_unfinished(data, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    arguments = tiny_arguments(data, tmp_path / "out", compile=True)
    assert run_command(arguments + ["--max_steps=3"]).returncode == 0
    for library in (tmp_path / "cache").rglob("*.so"):
        library.write_bytes(b"")
    refused = run_command(arguments)
    assert refused.returncode == 2 and refused.stderr.strip().endswith("they are deleted: start again"), refused.stderr
    done = run_command(arguments)
    assert done.returncode == 0 and metrics_of(tmp_path / "out")[-1]["step"] == 12, done.stderr


@pytest.mark.slow  # compiles until the disk is full
def test_a_full_temporary_folder_while_compiling_is_one_line(data, tmp_path, small_disk, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(small_disk))
    for room in (0, 200_000):
        fill(small_disk)
        os.truncate(small_disk / "ballast", (small_disk / "ballast").stat().st_size - room)
        done = run_command(tiny_arguments(data, tmp_path / f"out{room}", compile=True))
        # Python itself takes another folder if TMPDIR has no room at all: on one core, that is enough for the run.
        is_refused = done.returncode == 2 and done.stderr.count("\n") == 1 and "TMPDIR" in done.stderr
        assert is_refused or room == 0 and done.returncode == 0, done.stderr
        for path in small_disk.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


# --- divergence

POISONED = """
import math, sys
import torch
import train

original = train.Trainer.update

def update(self, batches):
    if self.step == 5 and self.machine.rank == 1:
        hook = self.model.blocks[0].mlp.up.weight.register_hook(lambda gradient: gradient * math.nan)
        metrics = original(self, batches)
        hook.remove()
    else:
        metrics = original(self, batches)
    if self.step == self.config.max_steps:
        torch.save(self.model.state_dict(), f"{self.out_dir}/rank{self.machine.rank}.state")
    return metrics

train.Trainer.update = update
train.main()
"""


def test_one_process_with_a_nan_skips_the_step_on_all(data, tmp_path):
    script, out = tmp_path / "poisoned.py", tmp_path / "out"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{POISONED}")
    run = start(data, out, processes=2, launch={"script": script}, max_steps=12)
    assert run.wait(timeout=PATIENCE) == 0, run.stdout.read()
    assert {int(s["step"]) for s in state_of(out, 12)["optimizers"][0]["state"].values()} == {11}
    assert [x["bad_steps"] for x in metrics_of(out) if x["split"] == "train"] == [0] * 5 + [1] * 7
    first, second = (torch.load(out / f"rank{rank}.state", weights_only=True) for rank in (0, 1))
    assert_same_bits(dict(first), dict(second))
    assert all(weight.isfinite().all() for weight in first.values())


# --- disks


@pytest.mark.slow
@pytest.mark.parametrize("stop", (False, True))
def test_a_disk_that_refuses_a_checkpoint(data, tmp_path, stop):
    """A limit on the size of files, below a checkpoint's and above the metrics'. Without its last one no run is done."""
    out = tmp_path / "out"
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    arguments = command(tiny_arguments(data, out, stop_on_write_error=stop))
    done = subprocess.run(arguments, preexec_fn=limit, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2, done.stderr  # at the first one or, where it may go on without, at the last one
    assert ("training continues" in done.stderr) != stop
    assert "cannot be written" in done.stderr and "Traceback" not in done.stderr
    assert not list(out.glob("ckpt*")) and not list(out.glob("*.tmp"))
    assert len(metrics_of(out)) == (5 if stop else 15)
    assert run_command(tiny_arguments(data, out)).returncode == 0  # with room again
    assert len(metrics_of(out)) == 15


@pytest.mark.parametrize("listener", ("full disk", "closed pipe"))
def test_a_run_does_not_need_its_standard_output(data, tmp_path, listener):
    """`train.py > log` on a full disk, `train.py | tee log` with a tee that has died."""
    reading, writing = os.pipe()
    os.close(reading)
    where = open("/dev/full", "w") if listener == "full disk" else os.fdopen(writing, "w")
    with where:
        done = subprocess.run(command(tiny_arguments(data, tmp_path / "out")), stdout=where, stderr=subprocess.PIPE, text=True, timeout=PATIENCE)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert len(metrics_of(tmp_path / "out")) == 15


def test_a_disk_that_refuses_a_metrics_line(tmp_path):
    """The line waits, no part of it stays, and it is there once there is room."""
    metrics = Metrics(tmp_path / "metrics.jsonl", 0, 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    metrics.write(step=1, loss=1.0)
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 5, hard))
        with pytest.raises(OSError):
            metrics.write(step=2, loss=float("nan"))
        assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    metrics.write(step=3, loss=3.0)
    assert [(x["step"], x["loss"]) for x in metrics_of(tmp_path)] == [(1, 1.0), (2, None), (3, 3.0)]


def test_an_evaluation_that_will_be_made_again_is_not_kept(tmp_path):
    """Stopped during evaluation 10, resumed, evaluated, and killed before the next checkpoint."""
    metrics = Metrics(tmp_path / "metrics.jsonl", 0, 0)
    for split, step in (("train", 5), ("val", 5), ("train", 10), ("val", 10), ("train", 15)):
        metrics.write(split=split, step=step)
    Metrics(tmp_path / "metrics.jsonl", 10, 5)
    assert [(x["split"], x["step"]) for x in metrics_of(tmp_path)] == [("train", 5), ("val", 5), ("train", 10)]


def make_read_only(out: Path):
    if subprocess.run(["chattr", "+i", out], capture_output=True).returncode:  # root may write where modes say no
        pytest.skip("making a folder read-only for root needs chattr and a file system that knows it")


@pytest.mark.parametrize(
    "place, break_it, mend",
    (pytest.param("small_disk", fill, lambda out: (out / "ballast").unlink(), id="full", marks=pytest.mark.slow),
     pytest.param("tmp_path", make_read_only, lambda out: subprocess.run(["chattr", "-i", out], check=True), id="read-only", marks=pytest.mark.slow)),
)  # fmt: skip
def test_a_disk_that_fills_up_or_a_folder_that_turns_read_only_during_a_run(request, data, place, break_it, mend):
    """Training says so and goes on; what was written before stays whole; with the disk mended nothing is missing."""
    out = request.getfixturevalue(place) / "out"
    run = start(data, out, max_steps=10**5, eval_interval=20)
    wait_for_step(run, out, 21)
    break_it(out)
    lines = iter(run.stdout.readline, "")
    try:
        assert any("cannot be written" in line and "training continues" in line for line in lines)
    finally:
        mend(out)
    assert all(read_checkpoint(path) for path in checkpoints(out))
    assert any("validation loss" in line for line in lines)
    run.terminate()
    output, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0 and "stopped at step" in output and "Traceback" not in output, output
    steps = [x["step"] for x in metrics_of(out) if x["split"] == "train"]
    assert steps == list(range(1, len(steps) + 1))
    assert read_checkpoint(checkpoints(out)[-1])["step"] == steps[-1]
    assert not list(out.glob("*.tmp"))


# --- slow trouble


@pytest.mark.slow
def test_two_thousand_steps_leak_nothing(data, tmp_path, train_here, monkeypatch):
    """Memory, open files and threads at step 2,000 are within 2% of step 200's, and steps take no longer."""
    original, seen, times = train.Trainer.update, {}, []

    def update(self, batches):
        began = time.perf_counter()
        metrics = original(self, batches)
        times.append(time.perf_counter() - began)
        if self.step in (200, 2000):
            resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
            seen[self.step] = resident_pages, len(os.listdir("/proc/self/fd")), threading.active_count()
        return metrics

    monkeypatch.setattr(train.Trainer, "update", update)
    size = {"n_layer": 1, "n_embd": 16, "block_size": 8, "batch_size": 2, "micro_batch_size": 2, "eval_sequences": 2}
    size |= {"max_steps": 2000, "log_interval": 10, "eval_interval": 100}
    train_here(tiny_arguments(data, tmp_path / "out", **size))
    for early, late in zip(seen[200], seen[2000]):
        assert late <= 1.02 * early, seen
    assert sorted(times[-900:])[450] <= 1.2 * sorted(times[200:1100])[450]


# --- files


@pytest.fixture
def finished(data, tmp_path, train_here):
    """A run of 12 steps with checkpoints at 8 and 12, to be gone on with to 16."""
    train_here(tiny_arguments(data, tmp_path / "out"))
    return tmp_path / "out", tiny_arguments(data, tmp_path / "out", max_steps=16)


def flip(path: Path, at: float):
    blob = bytearray(path.read_bytes())
    blob[int(at * (len(blob) - 1))] ^= 0x10
    path.write_bytes(blob)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "noise": lambda path: path.write_bytes(random.Random(0).randbytes(5000)),
    "a flipped bit early": lambda path: flip(path, 0.3),
    "a flipped bit late": lambda path: flip(path, 0.8),
    "another step's": lambda path: path.write_bytes((path.parent / "ckpt_0000008.pt").read_bytes()),
    "not ours": lambda path: torch.save({"step": 12}, path),
    "no numbers": lambda path: torch.save(torch.load(path, weights_only=True) | {"step": "12"}, path),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_set_aside(finished, train_here, capsys, damage):
    out, arguments = finished
    kept = (out / "ckpt_0000008.pt").read_bytes()
    DAMAGES[damage](out / "ckpt_0000012.pt")
    damaged = (out / "ckpt_0000012.pt").read_bytes()
    capsys.readouterr()
    assert train_here(arguments).step == 16
    output = capsys.readouterr().out
    assert "ckpt_0000012.pt is not a whole checkpoint" in output and "at step 8" in output
    assert "renamed to ckpt_0000012.pt.damaged" in output
    assert (out / "ckpt_0000012.pt.damaged").read_bytes() == damaged  # theirs to look at
    assert kept and [x["step"] for x in metrics_of(out) if x["split"] == "train"] == list(range(1, 17))


def test_moments_of_the_wrong_shape_are_refused(finished, train_here, capsys):
    out, arguments = finished
    state = read_checkpoint(out / "ckpt_0000012.pt")
    state["optimizers"][0]["state"][0]["exp_avg"] = torch.zeros(1)
    torch.save(state, out / "ckpt_0000012.pt")
    assert "exp_avg is of shape (1,)" in fails_in_one_line(capsys, train_here, arguments)


def test_other_files_in_the_folder_are_left_alone(finished, train_here):
    """Copies of checkpoints under names of the user's, notes, half-finished downloads."""
    out, arguments = finished
    names = ("ckpt_best.pt", "ckpt_0000012_mine.pt", "ckpt_9999999x.pt", "probe", "notes.tmp")
    for name in names:
        (out / name).write_bytes((out / "ckpt_0000008.pt").read_bytes())
    assert train_here(arguments).step == 16
    assert all((out / name).read_bytes()[:2] == b"PK" for name in names)


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in (9_999_999, 10_000_000, 8):
        checkpoint_path(tmp_path, step).touch()
    assert [int(path.stem[5:]) for path in checkpoints(tmp_path)] == [8, 9_999_999, 10_000_000]


def test_a_folder_that_holds_other_things_is_refused(data, tmp_path, train_here, capsys):
    for name in ("config.json", "metrics.jsonl"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text('{"mine": 1}')
        assert "not a run's" in fails_in_one_line(capsys, train_here, tiny_arguments(data, folder))
        assert (folder / name).read_text() == '{"mine": 1}'


def test_a_damaged_config_json_is_said_and_written_again(finished, train_here, capsys):
    out, arguments = finished
    whole = (out / "config.json").read_bytes()
    flip(out / "config.json", 0.0)
    capsys.readouterr()
    assert train_here(arguments).step == 16
    assert "config.json is missing or damaged" in capsys.readouterr().out
    assert (out / "config.json").read_bytes() == whole.replace(b'"max_steps": 12', b'"max_steps": 16')


@pytest.mark.slow  # waits out the 15 s that a killed process is given to be gone
def test_two_processes_never_write_one_run(data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run = start(data, out, max_steps=10**5)
    wait_for_step(run, out, 3)
    done = run_command(tiny_arguments(data, out))
    assert done.returncode == 2 and "another process" in done.stderr and len(done.stderr.splitlines()) == 1
    run.terminate()
    output, _ = run.communicate(timeout=PATIENCE)  # a fast run fills the pipe in these 15 s, and waits for a reader
    assert run.returncode == 0, output


def test_when_all_checkpoints_are_damaged_they_are_named(finished, train_here, capsys):
    out, arguments = finished
    for path in out.glob("ckpt_*.pt"):
        DAMAGES["half"](path)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    line = fails_in_one_line(capsys, train_here, arguments)
    assert "ckpt_0000008.pt" in line and "ckpt_0000012.pt" in line
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


def test_another_runs_checkpoint_is_refused_with_the_differences(finished, data, train_here, capsys):
    out, arguments = finished
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    line = fails_in_one_line(capsys, train_here, [*arguments, "--n_layer=3", "--seed=5"])
    assert "n_layer was 2, is 3" in line and "seed was 1337, is 5" in line
    write_shard(data / "train_000001.bin", torch.arange(13_007).numpy() % 299)
    assert "train data has changed" in fails_in_one_line(capsys, train_here, arguments)
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


def test_resume_never_and_resume_from_a_path(finished, tmp_path, train_here, capsys):
    out, arguments = finished
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert "resume=never" in fails_in_one_line(capsys, train_here, [*arguments, "--resume=never"])
    path = out / "ckpt_0000008.pt"
    assert "of its own" in fails_in_one_line(capsys, train_here, [*arguments, f"--resume={path}"])
    missing = [*arguments, f"--resume={path}x", f"--out_dir={tmp_path / 'other'}"]
    assert "ckpt_0000008.ptx" in fails_in_one_line(capsys, train_here, missing)
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    elsewhere = [*arguments, f"--resume={path}", f"--out_dir={tmp_path / 'other'}"]
    resumed = train_here([*elsewhere, "--eval_interval=0"])  # one evaluation, at its end
    assert resumed.step == 16 and metrics_of(tmp_path / "other")[0]["step"] == 9
    assert resumed.best_step == 16  # the best checkpoint of the first run is not this run's
    assert train_here([*elsewhere, "--max_steps=20"]).step == 20  # the same command goes on with what it had reached
    assert metrics_of(tmp_path / "other")[-1]["step"] == 20 and metrics_of(tmp_path / "other")[0]["step"] == 9
    for checkpoint in (tmp_path / "other").glob("ckpt_*.pt"):  # a run without a checkpoint is a run too, of its own if it began otherwise
        checkpoint.unlink()
    lines = (tmp_path / "other/metrics.jsonl").read_bytes()
    assert "of its own" in fails_in_one_line(capsys, train_here, [*elsewhere, f"--resume={out / 'ckpt_0000012.pt'}"])
    assert lines == (tmp_path / "other/metrics.jsonl").read_bytes()


class Payload:
    """A pickle that would make a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("form", ("torch", "pickle"))
def test_a_checkpoint_never_runs_anything(finished, tmp_path, train_here, capsys, form):
    out, arguments = finished
    proof, state = tmp_path / "executed", read_checkpoint(out / "ckpt_0000012.pt")
    hostile = out / "ckpt_0000012.pt"
    state["optimizers"] = Payload(proof)
    torch.save(state, hostile) if form == "torch" else hostile.write_bytes(pickle.dumps(state))
    capsys.readouterr()
    fails_in_one_line(capsys, load_model, hostile)
    assert train_here(arguments).step == 16
    assert not proof.exists()
