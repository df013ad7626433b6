"""What machines and people do to a run: real processes, real signals, real files. Nothing may be lost."""

import os
import pickle
import random
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

import train
from tests.conftest import (
    assert_same_bits, command, fails_in_one_line, metrics_of, run_command, tiny_arguments, tiny_folder, write_shard,
)  # fmt: skip
from tools.sample import load_model

STEPS = 60


def state_of(out: Path, step: int = STEPS) -> dict:
    state = train.read_checkpoint(out / f"ckpt_{step:07d}.pt")
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
        run.kill()
        run.communicate()


def start(data, out, processes=1, torchrun={}, **changes) -> subprocess.Popen:
    arguments = tiny_arguments(data, out, **{"max_steps": STEPS, "eval_interval": 5} | changes)
    run = subprocess.Popen(command(arguments, processes, **torchrun), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    started.append(run)
    return run


def wait_for_step(out: Path, step: int, seconds: float = 60):
    """Until `metrics.jsonl` has the step's line."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (out / "metrics.jsonl").exists() and f'"step": {step},' in (out / "metrics.jsonl").read_text():
            return
        time.sleep(0.005)
    raise TimeoutError(f"no step {step} in {out} after {seconds} s")


# --- kills


@pytest.mark.parametrize("kills", (5, pytest.param(50, marks=pytest.mark.slow)))
def test_kill_9_at_any_moment_loses_nothing(undisturbed, tmp_path, kills):
    data, expected = undisturbed
    dice = random.Random(kills)
    died = finished = 0
    out = tmp_path / "0"
    while died < kills:
        run = start(data, out)
        moment = dice.choice(("any time", "a step", "a write"))
        if moment == "any time":
            time.sleep(dice.uniform(0, 6))
        else:
            end = time.monotonic() + 30
            wanted = "*.tmp" if moment == "a write" else "metrics.jsonl"
            while not list(out.glob(wanted)) and time.monotonic() < end and run.poll() is None:
                time.sleep(0.0005)
            time.sleep(dice.uniform(0, 0.3) if moment == "a step" else 0)
        run.kill()
        status = run.wait()
        assert status in (0, -signal.SIGKILL), run.stdout.read()
        died += status != 0
        if status == 0:  # came through before the kill: the next kills are another run's
            assert_same_run(expected, out)
            finished += 1
            out = tmp_path / str(finished)
    done = start(data, out)
    assert done.wait(timeout=120) == 0, done.stdout.read()
    assert_same_run(expected, out)
    print(f"{died} kills over {finished + 1} runs")


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_a_signal_saves_and_leaves_with_0(undisturbed, tmp_path, number):
    data, expected = undisturbed
    out = tmp_path / "out"
    run = start(data, out, max_steps=STEPS)
    wait_for_step(out, 3)
    run.send_signal(number)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 0 and "stopped at step" in output, output
    newest = sorted(out.glob("ckpt_*.pt"))[-1]
    assert train.read_checkpoint(newest)["step"] == metrics_of(out)[-1]["step"]  # the step in flight is not lost
    assert run_command(tiny_arguments(data, out, max_steps=STEPS, eval_interval=5)).returncode == 0
    assert_same_run(expected, out)


def test_a_second_ctrl_c_stops_at_once(data, tmp_path):
    out = tmp_path / "out"
    run = start(data, out, max_steps=10**6, eval_interval=1, batch_size=4096)
    end = time.monotonic() + 60
    while not list(out.glob("ckpt_*.pt")) and time.monotonic() < end:
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)  # in the middle of a step that takes seconds
    time.sleep(0.9)
    for _ in range(20):
        run.send_signal(signal.SIGINT)
        time.sleep(0.1)
        if run.poll() is not None:
            break
    output, _ = run.communicate(timeout=10)
    assert run.returncode in (0, 130) and "Traceback" not in output, output
    assert train.read_checkpoint(sorted(out.glob("ckpt_*.pt"))[-1])["step"] >= 1


def workers_of(run: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_a_signal_to_one_worker_stops_all_with_a_checkpoint(data, tmp_path):
    out = tmp_path / "out"
    run = start(data, out, processes=2, max_steps=10**5)
    wait_for_step(out, 3)
    os.kill(workers_of(run)[1], signal.SIGTERM)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 0 and "stopped at step" in output, output
    assert train.read_checkpoint(sorted(out.glob("ckpt_*.pt"))[-1])["step"] == metrics_of(out)[-1]["step"]


def test_a_worker_that_dies_is_replaced(data, tmp_path):
    """Two processes with restarts; what they end with is what an undisturbed pair ends with."""
    outs = [tmp_path / name for name in ("whole", "broken")]
    for out in outs:
        run = start(data, out, processes=2, torchrun={"max-restarts": 3})
        if out.name == "broken":
            wait_for_step(out, 13)
            os.kill(workers_of(run)[1], signal.SIGKILL)
        output, _ = run.communicate(timeout=120)
        assert run.returncode == 0, output
    assert_same_run(*outs)


def test_a_run_of_two_processes_goes_on_with_one_and_the_other_way_round(undisturbed, tmp_path):
    data, expected = undisturbed
    for first, second in ((2, 1), (1, 2)):
        out = tmp_path / f"{first}{second}"
        run = start(data, out, processes=first, max_steps=STEPS)
        wait_for_step(out, 11)
        os.kill(workers_of(run)[0] if first > 1 else run.pid, signal.SIGTERM)
        assert run.communicate(timeout=60) and run.returncode == 0
        done = run_command(tiny_arguments(data, out, max_steps=STEPS, eval_interval=5), second)
        assert done.returncode == 0, done.stderr
        for a, b in zip(metrics_of(expected), metrics_of(out), strict=True):
            assert (a["split"], a["step"]) == (b["split"], b["step"])
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)


# --- disks


@pytest.mark.parametrize("stop", (False, True))
def test_a_disk_that_refuses_a_checkpoint(data, tmp_path, stop):
    """A limit on the size of files, below a checkpoint's and above the metrics'."""
    out = tmp_path / "out"
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    arguments = command(tiny_arguments(data, out, stop_on_write_error=stop))
    done = subprocess.run(arguments, preexec_fn=limit, capture_output=True, text=True, timeout=60)
    assert done.returncode == (2 if stop else 0), done.stderr
    assert "cannot be written" in done.stderr and "Traceback" not in done.stderr
    assert not list(out.glob("ckpt*")) and not list(out.glob("*.tmp"))
    assert len(metrics_of(out)) == (5 if stop else 15)
    assert run_command(tiny_arguments(data, out)).returncode == 0  # with room again
    assert len(metrics_of(out)) == 15


def test_a_disk_that_refuses_a_metrics_line(tmp_path):
    """The line waits, no part of it stays, and it is there once there is room."""
    metrics = train.Metrics(tmp_path / "metrics.jsonl", 0)
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
    assert "ckpt_0000012.pt is no whole checkpoint" in output and "at step 8" in output
    assert (out / "ckpt_0000012.pt.damaged").read_bytes() == damaged  # theirs to look at
    assert kept and [x["step"] for x in metrics_of(out) if x["split"] == "train"] == list(range(1, 17))


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
    trainer = train_here([*arguments, f"--resume={path}", f"--out_dir={tmp_path / 'other'}"])
    assert trainer.step == 16 and metrics_of(tmp_path / "other")[0]["step"] == 9


class Payload:
    """A pickle that would make a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("form", ("torch", "pickle"))
def test_a_checkpoint_never_runs_anything(finished, tmp_path, train_here, capsys, form):
    out, arguments = finished
    proof, state = tmp_path / "executed", train.read_checkpoint(out / "ckpt_0000012.pt")
    hostile = out / "ckpt_0000012.pt"
    state["optimizer"] = Payload(proof)
    torch.save(state, hostile) if form == "torch" else hostile.write_bytes(pickle.dumps(state))
    capsys.readouterr()
    fails_in_one_line(capsys, load_model, hostile)
    assert train_here(arguments).step == 16
    assert not proof.exists()
