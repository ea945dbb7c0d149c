"""AFM-4.5B's shape with random weights in bfloat16: prefill and decoding, the KDA-only student and a hybrid (one
attention layer of four, without RoPE) beside their teacher.

Run: python benchmarks/model_gpu.py [--quick] (needs a CUDA GPU with 80 GB; --quick leaves out the longest contexts)
"""

import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import ArceeConfig, ArceeForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from common import AFM, RESULTS, keep, row, write

from deltify.evaluation.plots import draw_decode_cost
from deltify.inference.prefill import cache_bytes, prefill
from deltify.model import ArceeKDAConfig, ArceeKDAForCausalLM
from deltify.model.cache import new_cache
from deltify.model.capture import STEPS, CapturedStep

QUICK = "--quick" in sys.argv
PREFILL = (8192, 32768, 131072) if QUICK else (8192, 32768, 131072, 1048576)
TEACHER_PREFILL = (8192, 32768) if QUICK else (8192, 32768, 131072)
DECODE = [(1, 1024), (1, 32768), (8, 1024)]
if not QUICK:
    DECODE += [(1, 131072), (1, 1048576), (8, 32768), (64, 1024)]
TEACHER_DECODE = [(1, 1024), (1, 32768), (8, 1024), (8, 32768)]
CASES = {"student": "afm-4.5b", "hybrid": "afm-4.5b-hybrid"}
PEER = "ArceeForCausalLM, SDPA"


def make(kind: str):
    shared = AFM | {"num_hidden_layers": 36}
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    with torch.device("cuda"):
        if kind != "teacher":
            layers = (["linear_attention"] * 3 + ["full_attention" if kind == "hybrid" else "linear_attention"]) * 9
            model = ArceeKDAForCausalLM(ArceeKDAConfig(**shared, layer_types=layers))
        else:
            config = ArceeConfig(**shared, max_position_embeddings=2**20)
            config._attn_implementation = "sdpa"
            model = ArceeForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.eval()


def text(rows: int, tokens: int) -> Tensor:
    return torch.arange(rows * tokens, device="cuda").view(rows, tokens) * 7919 % 128000


def prefill_rate(model, tokens: int) -> tuple[float, float]:
    """(tokens per second of reading a text, GiB at the peak), the head left out."""
    prefill(model, text(1, min(tokens, 32768)), new_cache(model))  # its kernels may be other ones than for short texts
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    prefill(model, text(1, tokens), new_cache(model), context=tokens)
    torch.cuda.synchronize()
    return tokens / (time.perf_counter() - started), torch.cuda.max_memory_allocated() / 2**30


def decode_ms(model, batch: int, context: int, tokens: int = 64) -> tuple[float, int, float | None]:
    """(milliseconds per token of `generate` with sampling, bytes of the cache, milliseconds of the captured step alone)
    after `context` tokens."""
    cache, ids = new_cache(model), text(batch, context)
    prefill(model, ids[:, :-1], cache, context=context)
    options = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "past_key_values": cache, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    times = []
    for _ in range(2):  # once to capture and warm up; both go on from the same cache
        torch.cuda.synchronize()
        started = time.perf_counter()
        longer = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, **options)
        torch.cuda.synchronize()
        new, ids = longer.shape[1] - ids.shape[1], longer  # a random model hardly ever ends its text
        times.append((time.perf_counter() - started) / new * 1e3)
        mask = torch.ones_like(ids)
    step = STEPS.get(cache)
    return times[-1], cache_bytes(cache), replay_ms(step) if isinstance(step, CapturedStep) else None


def replay_ms(step: CapturedStep) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(50):
        step.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 50


@torch.no_grad()
def greedy_ids_are_equal(model) -> bool:
    """Whether 256 greedily decoded tokens are the same with a captured step and without one."""
    from deltify.model import modeling

    results, captured = [], modeling.captured_logits
    for replay in (True, True, False):  # the first capture moves weights, which may change the last bits
        modeling.captured_logits = captured if replay else lambda *_: None
        ids = text(1, 100)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=256, min_new_tokens=256, do_sample=False
        )
        results.append(out)
    modeling.captured_logits = captured
    return torch.equal(*results[1:])


def rows_of(speeds: dict[tuple, float | None], sizes: dict[tuple, float]) -> list[dict]:
    """The students' figures, each beside the teacher's where there is one."""
    rows = []
    for key in [k for k in speeds if k[-1] in CASES]:
        peer, name = (*key[:-1], "teacher"), CASES[key[-1]]
        if key[0] == "step":
            rows.append(row(f"decode/{name}/B{key[1]}-T{key[2]}", "ms, captured step", speeds[key], None, ""))
            continue
        if key[0] == "prefill":
            case = f"prefill/{name}/B1-T{key[1]}"
            rows.append(row(case, "tokens/s", speeds[key], speeds.get(peer), PEER, rate=True))
            rows.append(row(case, "peak GiB", sizes[key], sizes.get(peer), PEER))
        else:
            case = f"decode/{name}/B{key[1]}-T{key[2]}"
            rows.append(row(case, "ms per token", speeds[key], speeds.get(peer), PEER))
            rows.append(row(case, "cache bytes", sizes[key], sizes.get(peer), PEER))
    return rows


@torch.no_grad()
def main() -> None:
    speeds: dict[tuple, float | None] = {}
    sizes: dict[tuple, float] = {}
    decode_rows = []
    for kind in (*CASES, "teacher"):
        model = make(kind)
        if kind in CASES:
            equal = greedy_ids_are_equal(model)
            print(f"{kind}: captured and eager greedy ids equal over 256 tokens: {equal}", flush=True)
        for tokens in PREFILL if kind == "student" else TEACHER_PREFILL:
            rate, peak = prefill_rate(model, tokens)
            speeds["prefill", tokens, kind], sizes["prefill", tokens, kind] = rate, peak
            print(f"{kind}: prefill of {tokens:,} tokens: {rate:,.0f} tokens/s, {peak:.1f} GiB", flush=True)
        for batch, context in DECODE if kind == "student" else TEACHER_DECODE:
            if (batch, context) not in DECODE:
                continue
            ms, size, step = decode_ms(model, batch, context)
            speeds["decode", batch, context, kind], sizes["decode", batch, context, kind] = ms, size
            speeds["step", batch, context, kind] = step
            print(
                f"{kind}: batch {batch} at {context:,} tokens: {ms:.2f} ms a token, the captured step {step or 0:.2f}, "
                f"cache {size:,} bytes",
                flush=True,
            )
            if batch == 1:
                facts = {"device": torch.cuda.get_device_name(), "dtype": "bfloat16"}
                decode_rows.append(
                    {"model": kind, "context": context, "cache_bytes": size, "ms_per_token": ms, **facts}
                )
        keep("model_gpu", rows_of(speeds, sizes))
        del model
        torch.cuda.empty_cache()
    RESULTS.mkdir(exist_ok=True)
    draw_decode_cost(decode_rows, RESULTS / "model_gpu_decode")
    write("model_gpu", rows_of(speeds, sizes))


if __name__ == "__main__":
    main()
