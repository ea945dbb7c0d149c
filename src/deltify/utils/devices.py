"""Choose the device and precision of a run."""

import os

import torch


def pick_device(name: str) -> torch.device:
    """Return the device of this name, or for auto a GPU if there is one.

    Raises:
        ValueError: If the name is unknown, or this machine has no such device.
    """
    gpus, apple = torch.cuda.device_count() if torch.cuda.is_available() else 0, torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if gpus else "mps" if apple else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (":" in name and not index.isdecimal()):
        raise ValueError(f"device {name!r} is unknown; choose auto, cpu, cuda, cuda:0 (or another number), or mps")
    missing = {"cpu": False, "cuda": int(index or 0) >= gpus, "mps": not apple}
    if missing[kind]:
        available = f"{gpus} CUDA GPUs and {'an' if apple else 'no'} Apple GPU"
        raise ValueError(
            f"device {name!r} is not there: PyTorch {torch.__version__} sees {available}; choose auto or cpu, or "
            "install a PyTorch built for your GPU"
        )
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> str:
    """Return the precision of this name, or for auto bf16 where its matrix products are faster, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)  # GPUs before Ampere emulate it
    else:
        fast = device.type == "cpu" and torch.cpu.get_capabilities().get("amx_bf16", False)
    return "bf16" if fast else "fp32"


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the type of any other device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def machine_memory() -> int:
    """Return the bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
