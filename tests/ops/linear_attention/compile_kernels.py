"""Compile kernels for GPUs that are not here; run in a process of its own, as TRITON_INTERPRET must be off.

python -m tests.ops.linear_attention.compile_kernels ARCH [ARCH …] prints one JSON line per configuration.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from chela.ops.linear_attention import kernels
from chela.ops.linear_attention.tiles import Launch, launches, padded, precision

# Bytes a program may use: A100, H100, B200.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
FLOATS = {"scale_ptr", "delta_ptr", "total_ptr", "left_ptr", "right_ptr", "z_left_ptr", "z_right_ptr", "z_ptr"}
FLOATS |= {"ahead_ptr", "back_ptr", "sums_ptr", "flow_ptr"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Configuration:
    kernel: str
    dtype: str
    width: int


CONFIGURATIONS = [
    *(Configuration(kind, "bf16", width) for width in (64, 128, 256) for kind in ("out", "dq", "keys")),
    *(Configuration(kind, dtype, 128) for dtype in ("fp32", "fp16") for kind in ("dq", "keys")),
    *(Configuration(kind, "fp32", 64) for kind in ("out", "dq", "keys")),
    Configuration("states", "bf16", 256),
    Configuration("states", "fp32", 128),
]


def compile_one(c: Configuration, arch: int, launch: Launch) -> dict:
    """Compile with everything on: both directions, decay and its gradient, mask, normaliser."""
    common = {
        "BT": launch.BT,
        "MASKED": True,
        "DECAY": True,
        "WITH_Z": True,
        "DOT": kernels.tl.bfloat16 if c.dtype == "bf16" else kernels.tl.float32,
        "PRECISION": precision(DTYPES[c.dtype]),
    }
    if c.kernel == "states":
        tile = min(launch.BS, padded(c.width))
        function, constants = kernels.states_kernel, {"BD": tile, "BE": tile}
        constants |= {"SUFFIX": True, "SCALED": True}
    else:
        width, BK, BC = padded(c.width), min(launch.BK, padded(c.width)), min(launch.BC, padded(c.width))
        constants = {"LOWER": True, "UPPER": True, "NORMALIZE": True}
        if c.kernel == "keys":
            function = kernels.keys_kernel
            constants |= {"BD": width, "BE": width, "KD": BK, "KE": BK, "CD": BC, "CE": BC, "FLOW": True}
            constants |= {"BR": min(launch.BU, BK), "BU": launch.BU}
        else:
            function = kernels.attend_kernel
            constants |= {"KIND": c.kernel, "BA": width, "BK": BK, "BC": BC, "BR": launch.BR, "FLOW": c.kernel == "dq"}
    constants |= common
    signature, attrs = {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            inner = "fp32" if name in FLOATS else "u8" if name == "mask_ptr" else c.dtype
            signature[name] = "*fp32" if c.kernel == "states" and name == "out_ptr" else f"*{inner}"
            attrs[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "eps" else "i32"
            if name in ("D", "E", "WA", "WC"):
                attrs[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage = resources(compiled.asm["cubin"])
    # Tiles of 64 tokens are what the tensor cores of Hopper take at once.
    expected = arch == 90 and c.dtype == "bf16" and launch.BT == 64
    hgmma = "HGMMA" in machine_code(compiled.asm["cubin"]) if expected else None
    return {
        **c.__dict__,
        "arch": arch,
        "shared": compiled.metadata.shared,
        "limit": SHARED[arch],
        "hgmma": hgmma,
        "specialised": [p.name for p in function.params if not (p.is_constexpr or p.do_not_specialize)],
        # A product with the size of a part of ``flow``, which may be near 2³¹, must be in 64 bits.
        "narrow": re.findall(r"arith\.muli .*%flow_part\b.* : i32", compiled.asm["ttir"]),
        **usage,
    }


def chosen(c: Configuration, arch: int) -> Launch:
    """Return the launch of the table."""
    options = {"gradients": c.kernel in ("dq", "keys"), "hopper": arch == 90}
    return launches(c.width, c.width, DTYPES[c.dtype], SHARED[arch], **options)[0]


def tool(name: str, *arguments: str, cubin: bytes) -> str:
    """Run one of the binary tools that the triton package carries."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, *arguments, file.name], check=True, capture_output=True, text=True).stdout


def resources(cubin: bytes) -> dict:
    """Return registers per thread, and bytes of stack: what is spilled."""
    text = tool("cuobjdump", "-res-usage", cubin=cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return {"registers": int(found[1]), "spills": int(found[2])}


def machine_code(cubin: bytes) -> str:
    """Return the disassembly."""
    return tool("nvdisasm", "-c", cubin=cubin)


if __name__ == "__main__":
    for arch in sys.argv[1:]:
        for configuration in CONFIGURATIONS:
            print(json.dumps(compile_one(configuration, int(arch), chosen(configuration, int(arch)))), flush=True)
