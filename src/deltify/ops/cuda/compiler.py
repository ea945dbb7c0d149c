"""Compile CUDA C++ with NVRTC, keep the result on disk, and load and launch it with the driver.

PyTorch's CUDA builds install NVRTC as a package. It needs neither nvcc nor headers.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ARCHITECTURE = "sm_90a"
OPTIONS = [f"--gpu-architecture={ARCHITECTURE}", "-std=c++17", "-default-device"]
MAX_SHARED, CARVEOUT = 8, 9  # attributes of a function: CU_FUNC_ATTRIBUTE_...
BFLOAT16, SWIZZLE_128B, PROMOTE_256B = 9, 3, 3  # CU_TENSOR_MAP_...


def join_sources(constants: dict[str, int], *names: str) -> str:
    """Return constants, machine.h and other files of this folder as one source."""
    files = [Path(__file__).with_name(name).read_text() for name in ("machine.h", *names)]
    return "".join([f"#define {name} {value}\n" for name, value in constants.items()] + files)


@functools.cache
def nvrtc() -> ctypes.CDLL:
    """Return NVRTC of the CUDA version for which PyTorch was built.

    Raises:
        OSError: If there is none.
    """
    name = f"libnvrtc.so.{(torch.version.cuda or '').split('.')[0]}"
    folders = [Path(torch.__file__).parent / "lib"]
    for place in filter(None, sys.path):
        folders += sorted(Path(place).glob("nvidia/*/lib"))
    for folder in folders:
        if (folder / name).exists():
            for builtins in folder.glob("libnvrtc-builtins.so.*"):  # NVRTC does not find them everywhere itself
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(str(folder / name))
    return ctypes.CDLL(name)


@functools.cache
def nvrtc_version() -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def compile_source(source: str) -> bytes:
    """Return machine code (a cubin).

    Raises:
        RuntimeError: If the source does not compile.
    """
    library, program = nvrtc(), ctypes.c_void_p()
    library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"deltify.cu", 0, None, None)
    options = (ctypes.c_char_p * len(OPTIONS))(*(x.encode() for x in OPTIONS))
    code = library.nvrtcCompileProgram(program, len(options), options)
    if code:
        log = read_from(program, library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog).rstrip(b"\0").decode()
        raise RuntimeError(f"NVRTC {nvrtc_version()} cannot compile the kernel: {log}")
    cubin = read_from(program, library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin


def read_from(program: ctypes.c_void_p, size_of, read) -> bytes:
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    read(program, text)
    return text.raw


def cache_folder() -> Path:
    return Path(os.environ.get("DELTIFY_CACHE", Path.home() / ".cache" / "deltify")) / "cuda"


def cubin_of(source: str) -> bytes:
    """Return machine code from the disk if it is there, or compile and keep it."""
    key = hashlib.sha256("\0".join([source, *OPTIONS, nvrtc_version()]).encode()).hexdigest()[:32]
    path = cache_folder() / f"{ARCHITECTURE}-{key}.cubin"
    with contextlib.suppress(OSError):
        return path.read_bytes()
    cubin = compile_source(source)
    with contextlib.suppress(OSError):  # a disk that cannot be written costs a second in each process
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(cubin)
        part.replace(path)
    return cubin


@functools.cache
def driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def check(code: int) -> None:
    if code:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"CUDA driver: error {code}, {(text.value or b'unknown').decode()}")


@dataclass(frozen=True)
class Kernel:
    """A kernel that takes its arguments as one struct."""

    function: ctypes.c_void_p
    threads: int
    shared: int  # bytes of shared memory

    def __call__(self, blocks: int, arguments: bytes, stream: int) -> None:
        struct = ctypes.create_string_buffer(arguments, len(arguments))
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(struct))
        size = (blocks, 1, 1, self.threads, 1, 1, self.shared)
        check(driver().cuLaunchKernel(self.function, *size, ctypes.c_void_p(stream), pointers, None))


def load(device: int, source: str, name: str, threads: int, shared: int) -> Kernel:
    """Return a kernel of the source, on a GPU."""
    cubin, module, function = cubin_of(source), ctypes.c_void_p(), ctypes.c_void_p()
    with torch.cuda.device(device):
        torch.zeros(1, device=f"cuda:{device}")  # opens the context in this thread
        check(driver().cuModuleLoadData(ctypes.byref(module), cubin))
        check(driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
        check(driver().cuFuncSetAttribute(function, MAX_SHARED, shared))
        check(driver().cuFuncSetAttribute(function, CARVEOUT, 100))
    return Kernel(function, threads, shared)


@functools.lru_cache(4096)
def tensor_map(pointer: int, columns: int, rows: int) -> bytes:
    """Return a CUtensorMap of a bfloat16 matrix, for loads of 64 x 64 elements."""
    room = ctypes.create_string_buffer(192)  # a map begins at a multiple of 64 bytes
    start = -ctypes.addressof(room) % 64
    sizes, stride = (ctypes.c_uint64 * 2)(columns, rows), (ctypes.c_uint64 * 1)(2 * columns)
    box, one = (ctypes.c_uint32 * 2)(64, 64), (ctypes.c_uint32 * 2)(1, 1)
    map_at = ctypes.c_void_p(ctypes.addressof(room) + start)
    check(
        driver().cuTensorMapEncodeTiled(
            map_at, BFLOAT16, 2, ctypes.c_void_p(pointer), sizes, stride, box, one, 0, SWIZZLE_128B, PROMOTE_256B, 0
        )
    )
    return room.raw[start : start + 128]
