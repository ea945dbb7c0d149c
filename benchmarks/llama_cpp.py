"""A KDA-only student in llama.cpp beside its teacher: SmolLM2-135M on a CPU, both in q8_0.

The student is not trained, which does not change its speed. Both files allow any context: positions beyond the
teacher's window of 8k make its text bad, not slow. Each measurement has a process of its own. The default takes about
20 minutes on two idle cores, most of it the teacher's prompt of 32k.
Run: python benchmarks/llama_cpp.py --contexts 1024 32768
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

DECODED = 32
CACHE_CONTEXTS = (1024, 32768, 131072)  # caches are allocated at once, so that their size needs no long prompt


def measure(path: str, tokens: int, context: int, threads: int) -> dict:
    """Return speeds and memory after a prompt of `tokens` random tokens and DECODED more.

    Args:
        path: GGUF file.
        tokens: Length of the prompt.
        context: Number of tokens that caches are allocated for.
        threads: Number of threads.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.verbosity = context, 1, 4
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    prompt = random.Random(0).choices(range(100, 40_000), k=tokens)
    body = {"prompt": prompt, "n_predict": DECODED, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{server.listening_address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        timings = json.load(answer)["timings"]
    assert (timings["prompt_n"], timings["predicted_n"]) == (tokens, DECODED), timings
    resident = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return {
        "prompt tokens/s": timings["prompt_per_second"],
        "decode tokens/s": timings["predicted_per_second"],
        "process MiB": int(resident[1]) / 1024,
    }


def measure_in_child(path: Path, tokens: int, context: int, threads: int) -> dict:
    """Return what `measure` does and the MiB of the caches that llama.cpp logs."""
    command = [sys.executable, __file__, "--measure", str(path), str(tokens), str(context), str(threads)]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    caches = re.findall(r"(?:llama_kv_cache|llama_memory_recurrent): size = +([\d.]+) MiB", child.stderr)
    return json.loads(child.stdout.splitlines()[-1]) | {"cache MiB": sum(map(float, caches[-2:]))}


def write_student(path: Path) -> None:
    from deltify import convert
    from deltify.conversion.teacher import load_teacher
    from deltify.inference.gguf_export import write_gguf

    teacher = load_teacher("smollm2-135m-instruct")
    student = convert(teacher, init="library")
    student.config.max_position_embeddings = max(CACHE_CONTEXTS)
    write_gguf(student, teacher.tokenizer, path, "q8_0")


def write_teacher(path: Path) -> None:
    """Write the embedded teacher in q8_0 instead of q4_1."""
    import gguf

    from deltify.conversion.teacher import embedded_gguf

    reader, out = gguf.GGUFReader(embedded_gguf()), gguf.GGUFWriter(path, "llama")
    changed = {"llama.context_length": max(CACHE_CONTEXTS), "general.file_type": gguf.LlamaFileType.MOSTLY_Q8_0}
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            element = field.types[-1] if len(field.types) > 1 else None
            out.add_key_value(name, changed.get(name, field.contents()), field.types[0], element)
    for tensor in reader.tensors:
        kind = gguf.GGMLQuantizationType.Q8_0 if len(tensor.shape) > 1 else gguf.GGMLQuantizationType.F32
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        out.add_tensor(tensor.name, gguf.quantize(values, kind), raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 32768], help="lengths of the prompt")
    parser.add_argument("--threads", type=int, default=2, help="no more than there are idle cores: they spin")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)  # the child's work
    arguments = parser.parse_args()
    if arguments.measure:
        path, *numbers = arguments.measure
        print(json.dumps(measure(path, *map(int, numbers))))
        return
    import torch
    from common import keep, processor_name, row, write

    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        files = {"student": Path(folder) / "student.gguf", "teacher": Path(folder) / "teacher.gguf"}
        write_student(files["student"])
        write_teacher(files["teacher"])
        megabytes = {name: path.stat().st_size / 1e6 for name, path in files.items()}
        peer, case = "teacher in llama.cpp", "smollm2-135m/q8_0"
        rows = [row(case, "file MB", megabytes["student"], megabytes["teacher"], peer)]
        for context in CACHE_CONTEXTS:
            found = {name: measure_in_child(path, 16, context, 1)["cache MiB"] for name, path in files.items()}
            rows.append(row(f"{case}/context {context}", "cache MiB", found["student"], found["teacher"], peer))
        for tokens in arguments.contexts:
            found, loads = {}, [round(os.getloadavg()[0], 1)]
            for name, path in files.items():
                found[name] = measure_in_child(path, tokens, tokens + DECODED, arguments.threads)
                loads.append(round(os.getloadavg()[0], 1))
            for metric in ("prompt tokens/s", "decode tokens/s", "process MiB"):
                ours, theirs, rate = found["student"][metric], found["teacher"][metric], metric.endswith("/s")
                new = row(f"{case}/T{tokens}", metric, ours, theirs, peer, rate=rate)
                rows.append(new | {"load before, between and after": loads} if rate else new)
            keep("llama_cpp", rows, processor_name())
    write("llama_cpp", rows, processor_name())


if __name__ == "__main__":
    main()
