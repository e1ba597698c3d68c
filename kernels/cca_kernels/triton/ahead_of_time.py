"""Compile every shipped config without a GPU and look at what came out.

``python -m cca_kernels.triton.ahead_of_time`` prints registers per thread and KiB of shared memory of each
kernel, and fails if one spills, asks for more shared memory than there is, has no tensor-core products, or
multiplies a stride in 32 bits.
"""

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from cca_kernels.triton.configs import ARCHES, DIMS, TABLE, Config
from cca_kernels.triton.launch import Inputs, Launch, Settings

SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes that one program may use, by architecture (CUDA C++ Programming Guide, compute capabilities).

8.0 has 163 KiB, but 8.6 and 8.9 take its tiles, and have 99.
"""
_NARROW = re.compile(r"arith\.muli .*%\w*_(?:token|sample|group|head|row)\b.* : (?:tensor<\w*xi32>|i32)")
"""In Triton's intermediate code, where arguments keep their names."""
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_MULTIPLIES = {"mix_kernel", "latent_gradient_kernel", "filter_gradient_kernel"}


@dataclass(frozen=True)
class Compiled:
    """One kernel, compiled."""

    kernel: str
    variant: str
    arch: int
    dtype: str
    dim: int
    registers: int
    shared: int
    spills: int
    """Local-memory loads and stores in the machine code."""
    tensor_core: int
    """HGMMA, HMMA and Blackwell's UTC*MMA instructions."""
    wgmma: int
    narrow: int = 0
    """Strides multiplied in 32 bits, which millions of tokens overflow."""

    def problems(self) -> list[str]:
        """What a shipped kernel must not have."""
        found = []
        if self.spills:
            found.append(f"{self.spills} spilled accesses")
        if self.shared > SHARED_MEMORY[self.arch]:
            found.append(f"{self.shared} bytes of shared memory")
        if self.narrow:
            found.append(f"{self.narrow} strides multiplied in 32 bits")
        products = self.kernel in _MULTIPLIES and self.dtype != "float32"
        if products and not (self.wgmma if self.arch == 90 else self.tensor_core):
            found.append("no tensor-core instruction")
        return found


class _Driver:
    """As much of a driver as compiling needs; the number of the device is the architecture."""

    def __init__(self, arch: int):
        self._arch = arch

    def get_current_device(self) -> int:
        return self._arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)


class _Compiling(Launch):
    """Compiles what a launch would start."""

    def __init__(self, inputs: Inputs, settings: Settings, config: Config):
        super().__init__(inputs, settings, config)
        self.compiled: list[tuple[str, dict[str, Any], Any]] = []

    def _start(self, kernel: Any, programs: int, *args: Any, **options: Any) -> None:
        self.compiled.append((kernel.__name__, options, kernel.warmup(*args, grid=(programs,), **options)))


def compile_config(
    arch: int, dtype: torch.dtype, dim: int, config: Config, *, packed: bool = False, boundary: bool = False
) -> Iterator[Compiled]:
    """Compile all kernels of one shape class: 8 query and 2 key heads, K0 = K1 = 2, half-width RoPE."""
    queries, groups, tokens = 4, 2, 4096
    channels, segments = groups * (queries + 1) * dim, 4

    def make(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    inputs = Inputs(
        mixed=make(tokens, 1, groups, queries + 2, dim),
        conv0=make(channels, 1, 2),
        bias0=make(channels),
        conv1=make(channels, dim, 2),
        bias1=make(channels),
        temperature=make(groups),
        cos=make(tokens, 1, 1, dim // 2, dtype=torch.float32),
        sin=make(tokens, 1, 1, dim // 2, dtype=torch.float32),
        cu_seqlens=make(segments + 1, dtype=torch.int32) if packed else None,
        before=make(segments, 2, 1, groups, queries + 1, dim) if boundary else None,
        value_before=make(segments, 1, groups * dim // 2) if boundary else None,
    )
    settings = Settings(True, groups * dim // 2, False, False, 0, queries, "sbhd")
    triton.runtime.driver.set_active(_Driver(arch))
    launch = _Compiling(inputs, settings, config)
    q, k, v, norms = launch.forward()
    launch.backward(q, k, v, q, k, norms)
    for kernel, options, compiled in launch.compiled:
        names = {"KEY": "key", "BOUNDARY": "boundary", "BEFORE": "before", "RECOVER_BELOW": "recover"}
        words = [name for option, name in names.items() if options.get(option)]
        yield _inspect(kernel, " ".join(words), arch, str(dtype).removeprefix("torch."), dim, compiled)


def _inspect(kernel: str, variant: str, arch: int, dtype: str, dim: int, compiled: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(compiled.asm["cubin"])
        binary.flush()
        usage, code = (
            subprocess.run(
                [_TOOLS / tool, option, binary.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump says nothing of registers of {kernel}: {usage}")

    def count(pattern: str) -> int:
        return len(re.findall(rf"\b(?:{pattern})\b", code))

    return Compiled(
        kernel,
        variant,
        arch,
        dtype,
        dim,
        registers=int(registers[1]),
        shared=compiled.metadata.shared,
        spills=count("LDL|STL"),
        tensor_core=count(r"HGMMA|HMMA|UTC\w*MMA"),
        wgmma=count("HGMMA"),
        narrow=len(_NARROW.findall(compiled.asm["ttir"])),
    )


def shipped(arches: list[int], dtypes: list[torch.dtype], dims: list[int]) -> Iterator[Compiled]:
    """Every config of the table, compiled for plain sequences and for packed documents with boundary rows."""
    for arch, dtype, dim in itertools.product(arches, dtypes, dims):
        config = TABLE[arch, dtype.itemsize, dim]
        seen = set()
        for special in (False, True):
            for compiled in compile_config(arch, dtype, dim, config, packed=special, boundary=special):
                if (compiled.kernel, compiled.variant) not in seen:
                    yield compiled
                seen.add((compiled.kernel, compiled.variant))


def table(rows: list[Compiled]) -> str:
    """Markdown: registers and KiB of shared memory, a line per kernel, dtype and head dim."""
    arches = sorted({row.arch for row in rows})
    lines: dict[tuple[str, str, int], dict[int, str]] = {}
    for row in rows:
        name = f"{row.kernel.removesuffix('_kernel')} {row.variant}".strip()
        cells = lines.setdefault((name, row.dtype, row.dim), {})
        cells[row.arch] = f"{row.registers}, {row.shared / 1024:.0f}"
    head = ["| kernel | dtype | D | " + " | ".join(f"sm_{arch}" for arch in arches) + " |"]
    head += ["|---" * (3 + len(arches)) + "|"]
    return "\n".join(
        head
        + [
            f"| {name} | {dtype} | {dim} | " + " | ".join(cells[arch] for arch in arches) + " |"
            for (name, dtype, dim), cells in lines.items()
        ]
    )


def main() -> int:
    """Print the table; 1 if a kernel breaks a rule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=sorted(ARCHES), choices=sorted(ARCHES))
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--dim", type=int, nargs="+", default=list(DIMS), choices=DIMS)
    args = parser.parse_args()
    rows = list(shipped(args.arch, [getattr(torch, name) for name in args.dtype], args.dim))
    print(table(rows))
    broken = [(row, row.problems()) for row in rows if row.problems()]
    for row, problems in broken:
        name = f"{row.kernel} {row.variant} sm_{row.arch} {row.dtype} D={row.dim}"
        print(f"error: {name}: {', '.join(problems)}", file=sys.stderr)
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
