"""What the compiler makes of the Triton kernel for GPUs that are not here: vector width, registers, exact division.

Compiling needs a process of its own, in which Triton does not interpret: this file, run as a program, compiles every
case and prints what it found.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_triton_kernel import needs_triton, run_as_program

pytestmark = pytest.mark.slow

CAPABILITIES = (80, 90, 100)  # A100, H100 and H200, B200
KINDS = {
    "fp32": ("fp32", None, "fp32"),
    "bf16, fp32 masters": ("bf16", "fp32", "fp32"),
    "bf16, 16-bit remainders, bf16 moments": ("bf16", "i16", "bf16"),
}
# Then a multiprocessor's 65,536 registers hold 4 programs of 4 warps. Each of their 512 threads has at least 80 bytes
# under way (bf16 moments and remainders), 40 KiB in all; HBM at 8 TB/s, 148 multiprocessors and 0.7 us needs 37 KiB.
REGISTERS = 128


def main() -> None:
    """Compile every case; print JSON."""
    found = {f"sm_{c}: {name}": compiled(c, *kind) for c in CAPABILITIES for name, kind in KINDS.items()}
    print(json.dumps(found))


def compiled(capability: int, param: str, master: str | None, state: str) -> dict[str, Any]:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from dist_adamw.optimizer.kernels import _triton_code as code

    types, constants = _signature(code, param, master, state)
    names = code.update.arg_names
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n, t in types.items() if t.startswith("*")}
    source = ASTSource(code.update, types, {(names.index(n),): v for n, v in constants.items()}, aligned)
    options = {"num_warps": 4, "enable_fp_fusion": True}
    kernel = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = kernel.asm["ptx"]
    widths = {op: re.findall(rf"\b{op}\.global[\w.]*\.(v\d\.b\d+)", ptx) for op in ("ld", "st")}
    return {
        "widths": widths,
        "resources": _resources(kernel.asm["cubin"]),
        "divisions": sorted(set(re.findall(r"\b(?:div|sqrt|rsqrt)\.[\w.]*f32", ptx))),
    }


def _signature(code: Any, param: str, master: str | None, state: str) -> tuple[dict[str, str], dict[str, Any]]:
    dtype = {"fp32": code.tl.float32, "bf16": code.tl.bfloat16}[param]
    constants: dict[str, Any] = {
        "PARAM": dtype, "GRAD": dtype, "REMAINDER": master == "i16", "MAXIMIZE": False, "DECAY_BESIDE_LR": False,
        "LR_IN_MEMORY": True, "DECAY_IN_MEMORY": False, "HAS_LIBRARY": True, "ROW_NUMEL": 4096, "TILE": 1024,
        "max_exp_avg_sqs": None,
    }  # fmt: skip
    types = dict.fromkeys(code.update.arg_names, "fp32")
    types |= {"table": "*i64", "exp_avgs": f"*{state}", "exp_avg_sqs": f"*{state}"}
    types |= dict.fromkeys(("steps", "scale", "found_inf", "lr"), "*fp32")
    if master is None:
        constants["masters"] = None
    else:
        types["masters"] = f"*{master}"
    return types | dict.fromkeys(constants, "constexpr"), constants


def _resources(cubin: bytes) -> dict[str, int]:
    """Return registers per thread, and bytes of stack and of spilled registers."""
    import triton

    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([program, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", done.stdout)}


# ---------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cache = str(tmp_path_factory.mktemp("triton"))
    return run_as_program(__file__, TRITON_INTERPRET="0", TRITON_CACHE_DIR=cache)


def vectors(param: str, master: str | None, state: str) -> list[int]:
    """Return how many 16-byte loads and stores 8 elements a thread need."""
    size = {"fp32": 4, "bf16": 2}[param]
    state_bytes = {"fp32": 8, "bf16": 4}[state] + {"fp32": 4, "i16": 2, None: 0}[master]
    return [(state_bytes + 2 * size) // 2, (state_bytes + size) // 2]


every_case = pytest.mark.parametrize("case", [f"sm_{c}: {name}" for c in CAPABILITIES for name in KINDS])


@needs_triton
@every_case
def test_it_reads_and_writes_16_bytes_at_once(case: str, found: dict[str, Any]) -> None:
    """Bandwidth depends on this alignment, which an address from a table does not imply."""
    widths = found[case]["widths"]
    due = vectors(*KINDS[case.partition(": ")[2]])
    assert [widths["ld"], widths["st"]] == [["v4.b32"] * n for n in due]


@needs_triton
@every_case
def test_it_has_enough_registers(case: str, found: dict[str, Any]) -> None:
    resources = found[case]["resources"]
    assert resources["REG"] <= REGISTERS
    assert (resources["STACK"], resources["LOCAL"]) == (0, 0), "registers are spilled to memory"


@needs_triton
@every_case
def test_it_divides_as_torchs_kernel(case: str, found: dict[str, Any]) -> None:
    """Correctly rounded: approximate division and roots would be other bits."""
    assert found[case]["divisions"] == ["div.rn.f32", "sqrt.rn.f32"]


if __name__ == "__main__":
    main()
