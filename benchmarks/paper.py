"""A distillation on many GPUs, on paper: memory, traffic and hours of match, from the rates that `deltify plan` uses.

Llama-3.1-70B's shape, sharded over all GPUs. Traffic is what a GPU receives: the weights that it gathers, in the data
types that FSDP2 has them in, and the gradients that it reduces. Hours of traffic come from the bandwidth that is given,
and hours of compute from the plan. They overlap in part.
Run: python benchmarks/paper.py --bandwidth 40 [--gpus 16 64] [--gpu h200] [--tokens 1e9] [--length 8192] [--rows 1]
"""

import argparse

import torch
from transformers import AutoConfig, PreTrainedModel

from deltify.config import Stage
from deltify.conversion.student import layer_kinds, model_class, student_config
from deltify.training.estimate import MEMORY, count, loading_bytes, plan_stage, skeleton

LLAMA = {"vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
LLAMA |= {"num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 80, "tie_word_embeddings": False}


def traffic_bytes(teacher: PreTrainedModel, student: PreTrainedModel, gpus: int) -> float:
    """Return the bytes that a GPU receives in a step of one micro-batch, with activation checkpointing.

    The teacher's weights are gathered once, in bfloat16. The student's layers are gathered twice: MLPs in bfloat16, the
    others in float32. Its embeddings and head are gathered once, and all gradients are reduced in float32.
    """
    layers, mlps = count(student.model.layers), sum(count(layer.mlp) for layer in student.model.layers)
    gathered = 2 * count(teacher.model) + 2 * (4 * layers - 2 * mlps) + 4 * (count(student) - layers)
    return (gathered + 4 * count(student)) * (gpus - 1) / gpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bandwidth", type=float, required=True, help="GB/s that a GPU receives, as measured")
    parser.add_argument("--gpus", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--gpu", choices=MEMORY, default="h200")
    parser.add_argument("--tokens", type=float, default=1e9)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=1, help="rows of a GPU in a step")
    options = parser.parse_args()
    teacher = skeleton(AutoConfig.for_model("llama", **LLAMA, max_position_embeddings=options.length))
    kinds = layer_kinds("none", teacher.config.num_hidden_layers)
    config = student_config(teacher, kinds, keep_rope=False, window=64, sinks=4)
    with torch.device("meta"):
        student = model_class(config)(config)
    sizes = f"{count(teacher.model):,} parameters of the teacher, {count(student):,} of the student"
    print(f"{sizes}; {options.gpu}, rows of {options.length}")
    for gpus in options.gpus:
        for optimizer in ("adamw", "adamw8bit"):
            rows = gpus * options.rows
            again = {"optimizer": optimizer, "activation_checkpointing": True}
            stage = Stage(int(options.tokens), options.length, rows, 1, **again)
            plan = plan_stage("match", stage, teacher, student, options.gpu, gpus, sharded=True)
            received = options.rows * traffic_bytes(teacher.model, student, gpus)
            traffic = received / options.bandwidth / 1e9
            print(
                f"{gpus} GPUs, {optimizer}: {plan.total / 2**30:.0f} GiB of {MEMORY[options.gpu] / 2**30:.0f} a GPU, "
                f"{loading_bytes(teacher, student, gpus) / 2**30:.0f} while loading; a step: {plan.seconds:.1f} s of "
                f"compute, {received / 1e9:.0f} GB received in {traffic:.1f} s; {stage.steps:,} steps: "
                f"{plan.seconds * stage.steps / 3600:.0f} h of compute, {traffic * stage.steps / 3600:.0f} h of traffic"
            )


if __name__ == "__main__":
    main()
