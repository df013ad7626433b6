"""The softmax pass that CUDA runs, without CUDA: what it computes, under Triton's interpreter, and the machine code it becomes.

    TRITON_INTERPRET=1 python -m pytest -m triton       the numbers
    python -m pytest -m triton                          the machine code
"""

import os
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

import oec
import runtime.unembedding as lean

try:
    triton_version = version("triton")
except PackageNotFoundError:
    triton_version = None
pytestmark = [pytest.mark.triton, pytest.mark.skipif(triton_version is None, reason="needs: pip install triton==3.6.0")]
# Read when the kernel is decorated, so that one process can do either.
is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
numbers = pytest.mark.skipif(not is_interpreted, reason="needs TRITON_INTERPRET=1, which runs kernels on a CPU")
machine_code = pytest.mark.skipif(
    is_interpreted or triton_version != "3.6.0", reason="counts what triton==3.6.0 makes; TRITON_INTERPRET=1 leaves nothing to compile"
)


# --- numbers


@pytest.fixture
def on_triton(monkeypatch):
    monkeypatch.setattr(lean, "_takes_triton", lambda device, compiled: True)


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


def assert_equal_to_the_plain_loss(hidden, W, targets, tolerance, dtype=None, **options):
    """Every entry and both gradients, beside the plain loss in float64."""
    exact = oec.unembedding_loss(h := hidden.detach().double().requires_grad_(), w := W.detach().double().requires_grad_(), targets,
                                 **{name: value for name, value in options.items() if name not in ("chunk_rows", "logits_dtype")})  # fmt: skip
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        parts = lean.unembedding_loss(hidden, W, targets, **options)
    for name, value, right in zip(parts._fields, parts, exact):
        if name != "rounding_nats":  # it depends on the dtype of the logits
            torch.testing.assert_close(value.double(), right, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}")
    for value, right in zip(gradients(parts.loss, hidden, W), gradients(exact.loss, h, w)):
        torch.testing.assert_close(value.double(), right, rtol=tolerance, atol=tolerance * max(1e-3, right.abs().max().item()))


def problem(tokens: int, vocab_size: int, padded: int, scale: float = 1.0, shift: float = 0.0):
    generator = torch.Generator().manual_seed(tokens + vocab_size)
    hidden, W = torch.randn(tokens, 16, generator=generator), torch.randn(padded, 16, generator=generator)
    hidden[:, 0] = 1.0
    W[:, 0] = shift
    targets = torch.randint(0, vocab_size, (tokens,), generator=generator)
    return (hidden * scale).requires_grad_(), W.requires_grad_(), targets


@numbers
@pytest.mark.parametrize("cap", (0.0, 5.0, 60.0))
@pytest.mark.parametrize("z_weight", (0.0, 0.1))
@pytest.mark.parametrize("tokens, vocab_size, padded", ((7, 300, 384), (1, 5, 128), (5, 1, 128), (3, 4096, 4096), (4, 4097, 4224), (6, 8500, 8576), (5, 77, 77), (3, 100, 8576)))
def test_equals_the_plain_loss(on_triton, cap, z_weight, tokens, vocab_size, padded):
    hidden, W, targets = problem(tokens, vocab_size, padded)
    targets[1::3] = -1
    options = {"vocab_size": vocab_size, "soft_cap": cap, "z_loss_weight": z_weight, "chunk_rows": 3}
    assert_equal_to_the_plain_loss(hidden, W, targets, 2e-5, **options)


@numbers
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("logits_dtype", (None, torch.float32))
def test_equals_the_plain_loss_in_low_precision(on_triton, dtype, logits_dtype):
    hidden, W, targets = problem(9, 300, 384)
    assert_equal_to_the_plain_loss(hidden, W, targets, 3e-2, dtype, vocab_size=300, logits_dtype=logits_dtype)


@numbers
@pytest.mark.parametrize("ignored", (-1, -100))
def test_no_counted_token_is_zero(on_triton, ignored):
    hidden, W, targets = problem(4, 300, 384)
    parts = lean.unembedding_loss(hidden, W, torch.full_like(targets, ignored), vocab_size=300, ignore_index=ignored)
    assert parts.loss == 0 and not any(gradient.any() for gradient in gradients(parts.loss, hidden, W))


@numbers
def test_statistics_survive_a_drift(on_triton):
    hidden, W, targets = problem(6, 300, 384, shift=3000.0)
    assert_equal_to_the_plain_loss(hidden, W, targets, 2e-3, vocab_size=300)
    parts = lean.unembedding_loss(hidden, W, targets, vocab_size=300)
    logits = (hidden.double() @ W.double().T)[:, :300]
    assert parts.logit_std.item() == pytest.approx(logits.std(correction=0).item(), rel=1e-4)


@numbers
def test_a_logit_that_is_not_finite_is_seen(on_triton):
    for bad in (float("nan"), float("inf")):
        hidden, W, targets = problem(3, 300, 384)
        with torch.no_grad():
            W[7] = bad
        assert not lean.unembedding_loss(hidden, W, targets, vocab_size=300).loss.isfinite()


@numbers
def test_targets_of_any_stride_and_wrong_ones(on_triton):
    hidden, W, targets = problem(4, 300, 384)
    table = torch.stack((targets, targets + 1, targets + 2), dim=1)
    assert_equal_to_the_plain_loss(hidden, W, table[:, 0], 2e-5, vocab_size=300)
    for wrong in (-100, 300, 10**6):
        targets[2] = wrong
        assert lean.unembedding_loss(hidden, W, targets, vocab_size=300).loss.isnan()


# --- machine code


def compiled(capability: int, logits: str, cap: float, folder: Path) -> tuple[str, int]:
    """The kernel's machine code for a device of that compute capability, for GPT-2's vocabulary; bytes of its stack."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {"logits": f"*{logits}", "grad_logits": "*bf16", "targets": "*i64", "statistics": "*fp32", "stride": "i32", "z_weight": "fp32", "ignore_index": "i32"}
    options = lean._launch_options({"bf16": 2, "fp32": 4}[logits])
    constants = {"V": 50257, "WIDTH": 50304, "CAP": cap, "BLOCK": options["BLOCK"], "LOAD": options["LOAD"]}
    aligned = {(place,): [["tt.divisibility", 16]] for place in (0, 1, 2)}  # as PyTorch's allocator gives them
    source = ASTSource(lean._triton_softmax_pass, signature | dict.fromkeys(constants, "constexpr"), constants, aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": options["num_warps"]})
    (folder / "kernel.cubin").write_bytes(binary.asm["cubin"])
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    run = lambda *command: subprocess.run([*map(str, command), str(folder / "kernel.cubin")], capture_output=True, text=True, check=True).stdout
    usage = run(tools / "cuobjdump", "--dump-resource-usage")
    return run(tools / "nvdisasm", "-c"), int(re.search(r"STACK:(\d+)", usage)[1])


def loops(machine_code: str) -> list[list[str]]:
    """The instructions of each loop: from a label to the branch back to it."""
    instructions, labels, found = [], {}, []
    for line in machine_code.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(instruction[1])
            back = re.search(r"BRA.*`\((\.L\w+)\)", instruction[1])
            if back and back[1] in labels and labels[back[1]] < len(instructions) - 1:
                found.append(instructions[labels[back[1]] :])
    return found


@machine_code
@pytest.mark.parametrize("capability", (80, 90, 100))
@pytest.mark.parametrize("logits, cap, most", (("bf16", 0.0, 30), ("fp32", 0.0, 30), ("bf16", 30.0, 60)))
def test_instructions_a_logit(tmp_path, capability, logits, cap, most):
    """Of both passes together; two reads and one write, none narrower than 8 bytes, nothing spilled."""
    code, stack = compiled(capability, logits, cap, tmp_path)
    passes = loops(code)
    assert len(passes) == 2 and stack == 0
    per_thread = 16
    counts = [len(instructions) / per_thread for instructions in passes]
    print(f"sm_{capability} {logits} cap {cap:g}: {' + '.join(f'{count:.1f}' for count in counts)} instructions a logit")
    assert sum(counts) <= most
    moved = [[x for x in instructions if re.search(r"\b(LDG|STG|LDL|STL)\b", x)] for instructions in passes]
    assert all(re.search(r"\.(64|128)\b", x.split("desc")[0].split("[")[0]) and "LDL" not in x and "STL" not in x for x in sum(moved, []))
    bytes_a_logit = lambda kind: sum(int(re.search(r"\.(64|128)\b", x)[1]) / 8 for x in sum(moved, []) if kind in x) / per_thread
    width = {"bf16": 2, "fp32": 4}[logits]
    assert (bytes_a_logit("LDG"), bytes_a_logit("STG")) == (2 * width, 2)  # gradients are bfloat16 in all of them
