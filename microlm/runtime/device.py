"""How the arithmetic is done: device, dtype of activations, threads, compilation, and the reason for each choice."""

import os
import resource
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from microlm.parameters import RuntimeConfig
from microlm.runtime import compilation, distributed
from microlm.runtime.cores import available_cores

BFLOAT16_FLAGS = ("amx_bf16", "avx512_bf16")


@dataclass(frozen=True)
class Runtime:
    device: torch.device
    dtype: torch.dtype  # of activations; weights, losses and optimizer states are float32
    compiled: bool
    threads: int  # of all processes of the stage on this machine
    reasons: dict[str, str] = field(default_factory=dict)

    def decisive(self) -> list[object]:
        """What of it a training's last digits depend on; on CUDA the CPU's threads only feed it."""
        threads = None if self.device.type == "cuda" else self.threads
        return [self.device.type, str(self.dtype), self.compiled, threads]

    def lines(self) -> list[str]:
        """The banner's lines: each choice with its reason."""
        return [f"{name:<8} {reason}" for name, reason in self.reasons.items()]


def set_up(config: RuntimeConfig) -> Runtime:
    """Choose and apply. Libraries' chatter is silenced on the way."""
    quiet_libraries()
    device = torch.device("cuda", distributed.local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    threads = available_cores() if config.threads == "auto" else config.threads
    torch.set_num_threads(max(1, threads // distributed.local_size()))
    dtype, why_dtype = _choose_dtype(config.dtype, device)
    compiled, why_compiled = _choose_compilation(config.compile, device)
    compilation.enabled = compilation.enabled or compiled
    why_threads = "all this process may use" if config.threads == "auto" else "as params.yaml says"
    reasons = {"device": "cpu (no CUDA device is there)", "dtype": why_dtype, "threads": f"{threads} ({why_threads})"}
    reasons |= {"compile": why_compiled, "kernels": _kernels(device, dtype)}
    if device.type == "cuda":
        reasons["device"] = f"cuda ({torch.cuda.get_device_name(device)})"
        reasons["batches"] = "read ahead by a thread, pinned, copied without waiting (CUDA)"
    else:
        reasons["batches"] = (
            "read when they are needed (on the CPU a thread that reads ahead takes a core from the training)"
        )
    if distributed.size() > 1:
        reasons["ranks"] = f"{distributed.size()} processes, {distributed.local_size()} on this machine"
        reasons["threads"] += f", shared by {distributed.local_size()} processes"
    return Runtime(device, dtype, compiled, threads, reasons)


def _choose_dtype(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    if wanted != "auto":
        return getattr(torch, wanted), f"{wanted} activations, float32 weights (as params.yaml says)"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "bfloat16 activations, float32 weights (this GPU has it)"
        return torch.float32, "float32 (this GPU has no bfloat16)"
    found = next(filter(torch.cpu.get_capabilities().get, BFLOAT16_FLAGS), None)
    if found:
        return torch.bfloat16, f"bfloat16 activations, float32 weights (this CPU has {found})"
    return torch.float32, f"float32 (this CPU has none of {', '.join(BFLOAT16_FLAGS)})"


def _choose_compilation(wanted: str, device: torch.device) -> tuple[bool, str]:
    if wanted == "off":
        return False, "off (as params.yaml says)"
    if device.type == "cuda":
        return True, "on (torch.compile for CUDA)"
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++")), None)
    if compiler and shutil.which(compiler):
        return True, f"on (torch.compile through {Path(compiler).name}; the first steps of a first run wait for it)"
    return False, "off (no C++ compiler is there; with one, training is about three times as fast)"


def _kernels(device: torch.device, dtype: torch.dtype) -> str:
    """What PyTorch runs for attention and AdamW here."""
    if device.type != "cuda":
        return "PyTorch's attention for the CPU, fused AdamW"
    attention = "flash" if dtype == torch.bfloat16 and torch.backends.cuda.flash_sdp_enabled() else "memory-efficient"
    return f"{attention} attention (scaled_dot_product_attention, {str(dtype).removeprefix('torch.')}), fused AdamW"


def quiet_libraries() -> None:
    """Progress bars, advice and telemetry of the libraries below us off; their errors stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def peak_memory_bytes() -> int:
    """Most memory that this process has held so far: resident set on the CPU, allocated on CUDA."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
