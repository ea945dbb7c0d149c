"""Distillation steps on a GPU: the loss alone beside its matrix products, and whole steps of align, match and extend.

Weights are random; bfloat16 products, float32 master weights, the optimizer's step included, loss on all tokens. Each
step is timed with KDA's kernels in CUDA C++, where the GPU runs them, and with those in Triton. A peer of a step at
AFM-4.5B's shape is one as DistillKit has it: layers of fla in the student, weights in bfloat16, float32 logits of both
models for all tokens, everything recomputed in the backward.
Run: python benchmarks/distill_gpu.py [parts of cases' names] (needs a CUDA GPU with 80 GB, for the long rows 140 GB;
flash-linear-attention==0.6.0 and liger-kernel==0.8.5 for the peers, bitsandbytes for extend)
"""

import gc
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import ArceeConfig, ArceeForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from common import AFM, TRITON, eager_seconds, in_triton, keep, row, write

from deltify.config import Stage
from deltify.conversion.student import layer_kinds, model_class, student_config
from deltify.conversion.teacher import FAMILIES, Teacher, freeze
from deltify.data.batches import Batch
from deltify.model.mixers import init_gates
from deltify.training.cuda_graphs import GraphedStep
from deltify.training.estimate import product_flops
from deltify.training.losses import linear_kl
from deltify.training.optimizers import make_optimizers, recomputes, set_learning_rates, trained
from deltify.training.steps import align_step, match_step
from deltify.training.teachers import LiveTeacher

try:
    from fla.layers import KimiDeltaAttention
    from fla.modules.fused_kl_div import fused_kl_div_loss
except ImportError:
    KimiDeltaAttention = fused_kl_div_loss = None
try:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD
except ImportError:
    LigerFusedLinearJSD = None

SMOLLM2 = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
)  # fmt: skip
QWEN = Qwen2Config(
    vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
    num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True,
)  # fmt: skip
AFM_CONFIG = ArceeConfig(**AFM, num_hidden_layers=36, max_position_embeddings=65536)
SHAPES = {
    "smollm2-135m": (SMOLLM2, LlamaForCausalLM), "qwen2.5-1.5b": (QWEN, Qwen2ForCausalLM),
    "afm-4.5b": (AFM_CONFIG, ArceeForCausalLM),
}  # fmt: skip
# shape, stage, rows, tokens of a row, what else the stage says
STEPS = [
    ("smollm2-135m", "match", 8, 2048, {}),
    ("smollm2-135m", "align", 32, 512, {}),
    ("qwen2.5-1.5b", "match", 2, 2048, {}),
    ("qwen2.5-1.5b", "extend", 1, 8192, {}),
    ("afm-4.5b", "align", 4, 2048, {}),
    ("afm-4.5b", "match", 1, 16384, {"activation_checkpointing": True}),
    ("afm-4.5b", "extend", 1, 32768, {"activation_checkpointing": True, "optimizer": "adamw8bit"}),
]
PEER, STEADY = "DistillKit-style step, fla", 6  # the last steps are timed


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
                init_gates(layer.self_attn)
    return teacher, student.train()


def step_rates(shape: str, name: str, rows: int, length: int, options: dict) -> tuple[float, float, float]:
    """(tokens per second; GiB at the peak; FLOPs of products with weights, a token)."""
    teacher, student = pair(shape, name)
    stage = Stage(tokens=rows * length * 100, sequence_length=length, batch_size=rows, **options)
    optimizers = make_optimizers(student, stage, name)
    compute = align_step if name == "align" else match_step

    def losses(batch: Batch, max_documents: int | None = None) -> dict[str, torch.Tensor]:
        with torch.autocast("cuda", torch.bfloat16):
            return compute(LiveTeacher(teacher), student, batch, stage, 1.0, max_documents)

    if again := recomputes(stage, name):
        student.gradient_checkpointing_enable()
        step = lambda batch, device: losses(batch.to(device))
    else:
        step = GraphedStep(losses, trained(optimizers), print)
    ids, positions = torch.randint(0, 40000, (rows, length)), torch.arange(length).expand(rows, length)

    def whole_step(number: int) -> None:
        set_learning_rates(optimizers, stage, number)
        step(Batch(ids.roll(number, 1), positions), torch.device("cuda"))
        torch.nn.utils.clip_grad_norm_(trained(optimizers), stage.max_grad_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=again)

    seconds, peak = time_steps(whole_step)
    return rows * length / seconds, peak, product_flops(name, stage, teacher, student)


def time_steps(step) -> tuple[float, float]:
    """(seconds, the median of the last; GiB at the peak)."""
    times = []
    torch.cuda.reset_peak_memory_stats()
    for number in range(3 + STEADY):
        torch.cuda.synchronize()
        started = time.perf_counter()
        step(number)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[-STEADY:]), torch.cuda.max_memory_allocated() / 2**30


class FlaMixer(nn.Module):
    """fla's layer where a transformers layer has attention."""

    def __init__(self, width: int, heads: int, head: int, index: int):
        super().__init__()
        self.kda = KimiDeltaAttention(hidden_size=width, num_heads=heads, head_dim=head, layer_idx=index)

    def forward(self, hidden_states, **_):
        return self.kda(hidden_states)[0], None


def distillkit_rates(shape: str, name: str, rows: int, length: int) -> tuple[float, float]:
    """(tokens per second, GiB at the peak). align: mixers trained by cross-entropy, KL at T=2 and the cosine of all
    hidden states; otherwise all weights, by cross-entropy and KL."""
    config, cls = SHAPES[shape]
    config._attn_implementation = "sdpa"
    with torch.device("cuda"):
        teacher, student = freeze(cls(config)).bfloat16(), cls(config)
        for index, layer in enumerate(student.model.layers):
            layer.self_attn = FlaMixer(config.hidden_size, config.num_attention_heads, config.head_dim, index)
    student.bfloat16()
    if name == "align":
        student.requires_grad_(False)
        for layer in student.model.layers:
            layer.self_attn.requires_grad_(True)
    student.train().gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-5, fused=True)
    ids = torch.randint(0, 40000, (rows, length), device="cuda")
    hidden = {"output_hidden_states": name == "align", "use_cache": False}

    def step(number: int) -> None:
        rolled = ids.roll(number, 1)
        with torch.no_grad():
            wanted = teacher(rolled, **hidden)
        got = student(rolled, **hidden)
        mine, theirs = got.logits.float(), wanted.logits.float()
        ce = F.cross_entropy(mine[:, :-1].flatten(0, 1), rolled[:, 1:].flatten())
        target = (theirs / 2).log_softmax(-1).flatten(0, 1)
        kl = F.kl_div((mine / 2).log_softmax(-1).flatten(0, 1), target, log_target=True, reduction="batchmean") * 4
        loss = 0.2 * ce + 0.2 * kl
        if name == "align":
            pairs = zip(got.hidden_states[1:], wanted.hidden_states[1:])
            loss = loss + 0.6 * sum(1 - F.cosine_similarity(a.float(), b.float(), dim=-1).mean() for a, b in pairs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds, peak = time_steps(step)
    return rows * length / seconds, peak


def product_rate(size: int = 8192) -> float:
    """TFLOP/s of a product of two random matrices."""
    factor = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    return 2 * size**3 / 1e12 / eager_seconds(lambda: factor @ factor)


def step_rows(shape: str, name: str, count: int, length: int, options: dict) -> list[dict]:
    case = f"{name}/{shape}/B{count}-T{length}"
    torch.cuda.empty_cache()
    with in_triton():
        triton = step_rates(shape, name, count, length, options)
    gc.collect()
    torch.cuda.empty_cache()
    rate, peak, flops = step_rates(shape, name, count, length, options)
    reached, possible = rate * flops / 1e12, product_rate()
    print(f"{case}: {rate:,.0f} tokens/s, {peak:.1f} GiB, {reached:.0f} of {possible:.0f} TFLOP/s", flush=True)
    print(f"{TRITON}: {triton[0]:,.0f} tokens/s, {triton[1]:.1f} GiB", flush=True)
    peer, theirs = "", (None, None)
    if KimiDeltaAttention and shape == "afm-4.5b":
        gc.collect()
        torch.cuda.empty_cache()
        peer = PEER
        try:
            theirs = distillkit_rates(shape, name, count, length)
        except torch.OutOfMemoryError:
            peer += ": out of memory"
        print(f"{peer}: {theirs}", flush=True)
    return [
        row(case, "tokens/s", rate, theirs[0], peer, rate=True),
        row(case, "peak GiB", peak, theirs[1], peer),
        row(case, "tokens/s", rate, triton[0], TRITON, rate=True),
        row(case, "peak GiB", peak, triton[1], TRITON),
        row(case, "TFLOP/s", reached, possible, "an 8192^3 product", rate=True),
    ]


def main(wanted: list[str]) -> None:
    rows = loss_rows() if any(part in "loss/forward-kl" for part in wanted) else []
    for shape, name, count, length, options in STEPS:
        if any(part in f"{name}/{shape}/B{count}-T{length}" for part in wanted):
            gc.collect()
            rows += step_rows(shape, name, count, length, options)
            keep("distill_gpu", rows)
    write("distill_gpu", rows)


if __name__ == "__main__":
    main(sys.argv[1:] or [""])
