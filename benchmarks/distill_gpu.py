"""Distillation steps on a GPU: the loss alone beside its matrix products, and whole steps of align and match.

Weights are random; bfloat16 products, float32 master weights, AdamW, the optimizer's step included, loss on all tokens.
Run: python benchmarks/distill_gpu.py [part of a case's name] (needs a CUDA GPU with 80 GB;
flash-linear-attention==0.6.0 and liger-kernel==0.8.5 for the peers)
"""

import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import ArceeConfig, ArceeForCausalLM, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from common import eager_seconds, keep, row, write

from deltify.config import Stage
from deltify.convert import layer_kinds, model_class, student_config
from deltify.data import Batch
from deltify.distill import align_step, match_step
from deltify.graphs import GraphedStep
from deltify.losses import linear_kl
from deltify.model.mixers import library_gates
from deltify.teacher import FAMILIES, Teacher, freeze
from deltify.training import make_optimizers, set_learning_rates, trained

try:
    from fla.modules.fused_kl_div import fused_kl_div_loss
except ImportError:
    fused_kl_div_loss = None
try:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD
except ImportError:
    LigerFusedLinearJSD = None

SMOLLM2 = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
)  # fmt: skip
AFM = ArceeConfig(
    vocab_size=128004, hidden_size=2560, intermediate_size=18432, num_hidden_layers=36, num_attention_heads=20,
    num_key_value_heads=4, head_dim=128, max_position_embeddings=65536, tie_word_embeddings=False,
)  # fmt: skip
SHAPES = {"smollm2-135m": (SMOLLM2, LlamaForCausalLM), "afm-4.5b": (AFM, ArceeForCausalLM)}
# shape, stage, rows, tokens of a row
STEPS = [
    ("smollm2-135m", "match", 8, 2048),
    ("smollm2-135m", "align", 32, 512),
    ("afm-4.5b", "align", 4, 2048),
]


def loss_rows(N: int = 32768, D: int = 2560, W: int = 128004) -> list[dict]:
    """The loss with both gradients, beside its four matrix products alone and other libraries' fused losses; and the
    error of the gradient of the hidden states, on 1,024 tokens, against float64."""
    hidden, wanted = (torch.randn(N, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    head, t_head = (torch.randn(W, D, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(2))
    leaves = hidden.requires_grad_(), head.requires_grad_()
    losses = {"": lambda h, t: linear_kl(h, head, t, t_head)[0]}
    if fused_kl_div_loss:
        losses["fla fused_kl_div_loss"] = lambda h, t: fused_kl_div_loss(h, t, head, t_head)
    if LigerFusedLinearJSD:
        liger = LigerFusedLinearJSD(jsd_beta=0.0, accum_dtype=torch.float32)
        losses["Liger LigerFusedLinearJSD"] = lambda h, t: liger(h, head, t, t_head, None)

    part, few = torch.randn(1024, W, device="cuda", dtype=torch.bfloat16), hidden[:1024].detach()

    def products() -> None:
        for _ in range(N // 1024):
            for weight in (t_head, head.detach()):
                F.linear(few, weight)
            part @ head.detach()
            part.t() @ few

    exact = few.double().requires_grad_()
    student, teacher = exact @ head.detach().double().t(), wanted[:1024].double() @ t_head.double().t()
    target = teacher.log_softmax(-1)
    kl = F.kl_div(student.log_softmax(-1), target, log_target=True, reduction="batchmean")
    exact = torch.autograd.grad(kl, exact)[0]
    del student, teacher, target, kl
    found = {}
    for name, loss in losses.items():
        torch.cuda.empty_cache()
        step = lambda: torch.autograd.grad(loss(hidden, wanted), leaves)
        seconds = eager_seconds(step, calls=1, repeats=3)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        sample = few.clone().requires_grad_()
        got = torch.autograd.grad(loss(sample, wanted[:1024]), sample)[0].double()
        found[name] = seconds, peak, float((got - exact).norm() / exact.norm())
        print(f"loss {name or 'ours'}: {found[name]}", flush=True)
    case = f"loss/forward-kl/N{N}-D{D}-W{W}"
    ours = found.pop("")
    rows = [row(case, "s", ours[0], eager_seconds(products, calls=1, repeats=3), "its four matrix products alone")]
    for place, metric in enumerate(("s", "peak GiB above inputs", "relative error")):
        rows += [row(case, metric, ours[place], theirs[place], name) for name, theirs in found.items()]
    return rows


def pair(shape: str, stage: str) -> tuple[Teacher, torch.nn.Module]:
    """A random teacher in bfloat16 and its KDA-only student in float32; for align, of the student the mixers alone."""
    config, cls = SHAPES[shape]
    config._attn_implementation = "sdpa"
    with torch.device("cuda"):
        model = cls(config).to(torch.bfloat16)
    teacher = Teacher(freeze(model), None, FAMILIES[config.model_type])
    kinds = layer_kinds("none", config.num_hidden_layers)
    config = student_config(teacher, kinds, keep_rope=False, window=64, sinks=4)
    with torch.device("meta" if stage == "align" else "cuda"):
        student = model_class(config)(config)
    if stage == "align":
        for layer in student.model.layers:
            layer.self_attn.to_empty(device="cuda")
            for parameter in layer.self_attn.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
            with torch.no_grad():
                library_gates(layer.self_attn)
    return teacher, student.train()


def step_rate(shape: str, name: str, rows: int, length: int) -> tuple[float, float]:
    """(tokens per second, median of ten steps; GiB at the peak)."""
    teacher, student = pair(shape, name)
    stage = Stage(tokens=rows * length * 100, length=length, batch=rows)
    optimizers = make_optimizers(student, stage, name)
    compute = align_step if name == "align" else match_step

    def losses(batch: Batch) -> dict[str, torch.Tensor]:
        with torch.autocast("cuda", torch.bfloat16):
            return compute(teacher, student, batch, stage, 1.0)

    step = GraphedStep(losses, trained(optimizers), print)
    ids, positions = torch.randint(0, 40000, (rows, length)), torch.arange(length).expand(rows, length)
    times = []
    torch.cuda.reset_peak_memory_stats()
    for number in range(13):
        torch.cuda.synchronize()
        started = time.perf_counter()
        set_learning_rates(optimizers, stage, number)
        step(Batch(ids.roll(number, 1), positions), torch.device("cuda"))
        torch.nn.utils.clip_grad_norm_(trained(optimizers), stage.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return rows * length / sorted(times[3:])[5], torch.cuda.max_memory_allocated() / 2**30


def main(wanted: str) -> None:
    rows = loss_rows() if wanted in "loss/forward-kl" else []
    for shape, name, count, length in STEPS:
        case = f"{name}/{shape}/B{count}-T{length}"
        if wanted in case:
            torch.cuda.empty_cache()
            rate, peak = step_rate(shape, name, count, length)
            print(f"{case}: {rate:,.0f} tokens/s, {peak:.1f} GiB", flush=True)
            rows += [row(case, "tokens/s", rate, None, "", rate=True), row(case, "peak GiB", peak, None, "")]
            keep("distill_gpu", rows)
    write("distill_gpu", rows)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
