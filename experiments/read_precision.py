"""How precisely a head must read to recall, and how precisely a KDA head can: SmolLM2-135M-Instruct.

    python experiments/read_precision.py --train openstax.jsonl.zst --heldout heldout_dev.jsonl teacher
    python experiments/read_precision.py --train openstax.jsonl.zst --heldout heldout_dev.jsonl heads --seed 0 1

What a head reads is a vector. One part comes from the tokens that it should read. The share is the squared length of
this part, divided by that of the whole.

- `teacher`: In the 20 heads of the teacher that retrieve most, noise replaces a part of what they read from 128 or more
  tokens back: values of random earlier tokens, at the same length. Prints recall for each share. Then the same for all
  heads. The first four tokens of a text, attention sinks, are left out.
- `heads`: Trains queries, keys and beta of two KDA heads without decay. Their inputs are those of the teacher's layer
  18. They hold random codes in place of values. They are to read the mean of these codes over the tokens that are 128
  or more tokens away, weighted by the teacher's attention. Prints the share on other rows than those of the training.

Takes about ten minutes on two CPU cores.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from deltify import kda
from deltify.config import DataSpec, load_recipe
from deltify.conversion.attention import FAR, best_retrieval_heads, measure_attention
from deltify.conversion.teacher import Teacher
from deltify.data.batches import Batch, MixedBatches
from deltify.training.recall import heldout_probes, read_answers, recall_buckets
from deltify.training.runner import open_text
from deltify.training.teachers import open_teacher

LENGTH = 2048  # tokens of a row
LAYER, HEADS = 18, (6, 7)  # the two heads that retrieve most
ROWS, TEST_ROWS = 64, 8
CODE_WIDTH = 64
LEAST_MASS = 0.2  # attention to far tokens below which a token does not count


def silu_squared(x: Tensor) -> Tensor:
    """Return the square of silu(x) with its sign."""
    return F.silu(x) * F.silu(x).abs()


# functions of queries and keys before their normalisation; "silu" is that of KDA
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "silu": F.silu,
    "silu squared": silu_squared,
    "silu cubed": lambda x: F.silu(x) ** 3,
    "relu squared": lambda x: F.relu(x).square(),
    "softmax": lambda x: x.softmax(-1),  # over the channels
    "silu of both signs": lambda x: torch.cat([F.silu(x), F.silu(-x)], -1),  # twice as many channels
    "silu squared of both signs": lambda x: torch.cat([silu_squared(x), silu_squared(-x)], -1),
}


def far_mask(tokens: int) -> Tensor:
    """Return whether key j is far from query t, [T, T]. The first four tokens are attention sinks."""
    place = torch.arange(tokens)
    return (place[:, None] - place >= FAR) & (place >= 4)


def far_attention(q_HTK: Tensor, k_GTK: Tensor, head: int, scaling: float) -> Tensor:
    """Return the attention [T, T] of a query head to far keys, for H query heads over G key heads."""
    place = torch.arange(q_HTK.shape[1])
    logits = (q_HTK[head] @ k_GTK[head * len(k_GTK) // len(q_HTK)].mT) * scaling
    attention = logits.masked_fill(place > place[:, None], -torch.inf).softmax(-1)
    return attention.masked_fill(~far_mask(len(place)), 0)


@contextmanager
def watched_attention(watch: Callable[..., None]) -> Iterator[None]:
    """Call `watch(module, q, k, v, scaling, out)` after the attention of each layer; q and so on are [B, H, T, K], out
    is [B, T, H, K] and may be changed in place."""
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(module, q, k, v, mask, scaling, **options):
        out, weights = plain(module, q, k, v, mask, scaling=scaling, **options)
        watch(module, q, k, v, scaling, out)
        return out, weights

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


# ---- how precisely the teacher must read -----------------------------------------------------------------------------


def noisy_heads(heads: dict[int, list[int]], share: float) -> Callable[..., None]:
    """Return what makes heads read with this share. What they read keeps its length, on average."""
    generator = torch.Generator().manual_seed(1)

    def add_noise(module, q, k, v, scaling, out):
        tokens = q.shape[2]
        place = torch.arange(tokens)
        for row in range(len(q)):
            for head in heads.get(module.layer_idx, ()):
                values = v[row, head * v.shape[1] // q.shape[1]]
                values = values - values.mean(0)
                read = far_attention(q[row], k[row], head, scaling) @ values
                noise = values[(torch.rand(tokens, generator=generator) * (place - FAR).clamp(min=1)).long()]
                noise = F.normalize(noise, dim=-1) * read.norm(dim=-1, keepdim=True)
                out[row, :, head] += (share**0.5 - 1) * read + (1 - share) ** 0.5 * noise

    return add_noise


def print_teacher(teacher: Teacher, calibration: Batch, heldout: list, tokens: int) -> None:
    probes = heldout_probes(heldout, LENGTH, tokens, teacher.tokenizer)
    probes = [probe for probe in probes if len(probe.ids) <= LENGTH]
    best = best_retrieval_heads(measure_attention(teacher, calibration), list(range(30)), 20)
    every = {layer: list(range(9)) for layer in range(30)}
    print("| heads | share | recall | right, % |\n|---|---|---|---|")
    for name, heads, shares in (("20", best, (1.0, 0.8, 0.6, 0.4, 0.2, 0.1, 0.0)), ("all", every, (0.8, 0.5, 0.2))):
        for share in shares:
            with watched_attention(noisy_heads(heads, share)):
                scores = [score for probe in probes for score in read_answers(teacher.model, [probe])]
            buckets = recall_buckets([probe.distances for probe in probes], scores)
            recall = sum(bucket.log_prob for bucket in buckets) / len(buckets)
            right = " / ".join(f"{100 * bucket.right:.0f}" for bucket in buckets)
            print(f"| {name} | {share} | {recall:.2f} | {right} |", flush=True)


# ---- how precisely KDA heads can read --------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """Inputs [T, D] of the layer; for each head, the tokens that look far back, their attention, and its sum."""

    x_TD: Tensor
    far: list[tuple[Tensor, Tensor, Tensor]]


def read_rows(teacher: Teacher, mix: MixedBatches, number: int) -> list[Row]:
    """Return rows of text, each of one document, as the teacher's layer sees them."""
    attention, rows, inputs = teacher.model.model.layers[LAYER].self_attn, [], []

    def watch(module, q, k, v, scaling, out):
        if module is attention:
            far = []
            for head in HEADS:
                weights = far_attention(q[0], k[0], head, scaling)
                at = (weights.sum(-1) > LEAST_MASS).nonzero().squeeze(1)
                far.append((at, weights[at].half(), weights[at].sum(-1)))
            rows.append(Row(inputs[-1], far))

    hook = attention.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append(kwargs["hidden_states"][0]), with_kwargs=True
    )
    with watched_attention(watch):
        for index in range(number):
            batch = mix.batch(index)
            teacher.model.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    hook.remove()
    return rows


class Heads(nn.Module):
    """Two KDA heads of width K that hold codes.

    The first channels of queries and keys begin as the teacher's, without their means. The others begin as random
    directions, equal for queries and keys.
    """

    def __init__(self, teacher: Teacher, rows: list[Row], width: int, activation: str, seed: int):
        super().__init__()
        attention = teacher.model.model.layers[LAYER].self_attn
        x = torch.cat([row.x_TD for row in rows[:8]])
        self.mean, self.activation = x.mean(0), ACTIVATIONS[activation]
        q, k = (
            projection.weight.detach().unflatten(0, (-1, 64)) for projection in (attention.q_proj, attention.k_proj)
        )
        start = torch.randn(len(HEADS), width, x.shape[1], generator=torch.Generator().manual_seed(seed))
        start *= k.square().mean().sqrt()
        self.q, self.k = nn.Parameter(start.clone()), nn.Parameter(start.clone())
        for index, head in enumerate(HEADS):
            self.q.data[index, :64], self.k.data[index, :64] = q[head], k[head * len(k) // len(q)]
        self.b, self.b_shift = nn.Parameter(torch.zeros(len(HEADS), x.shape[1])), nn.Parameter(torch.tensor(-3.5))

    def forward(self, row: Row, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss, and the mean share of the codes [T, H, K] that were to be read."""
        x = row.x_TD - self.mean
        q, k = (torch.einsum("td,hkd->thk", x, weight)[None] for weight in (self.q, self.k))
        q, k = self.activation(q), self.activation(k)
        beta, channels = (x @ self.b.mT + self.b_shift)[None], q.shape[-1]
        gates = torch.zeros_like(q), beta, torch.zeros(len(HEADS)), torch.full((len(HEADS) * channels,), -12.0)
        read, _ = kda(q, k, codes[None], *gates)  # softplus(-12): a half-life of 100,000 tokens
        loss = share = mass = torch.zeros(())
        for index, (at, weights, sums) in enumerate(row.far):
            wanted = weights.float() @ codes[:, index]
            right = F.cosine_similarity(read[0, at, index], wanted, dim=-1).clamp(min=0).square()
            loss = loss - ((right + 1e-3).log() * sums).sum()
            share, mass = share + (right.detach() * sums).sum(), mass + sums.sum()
        return loss / mass, share / mass


def train_heads(heads: Heads, rows: list[Row], steps: int, lr: float, seed: int) -> float:
    """Train heads on all rows but the last eight, and return the share on those."""
    generator = torch.Generator().manual_seed(seed)

    def codes() -> Tensor:
        return F.normalize(torch.randn(LENGTH, len(HEADS), CODE_WIDTH, generator=generator), dim=-1)

    optimizer = torch.optim.AdamW(heads.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20) * (1 - 0.9 * step / steps)
        row = rows[int(torch.randint(len(rows) - TEST_ROWS, (), generator=generator))]
        loss, _ = heads(row, codes())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(heads.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        return float(torch.stack([heads(row, codes())[1] for row in rows[-TEST_ROWS:]]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=("teacher", "heads"))
    parser.add_argument("--train", required=True, help="text that the facts are put into")
    parser.add_argument("--heldout", required=True, help="validation text")
    parser.add_argument("--width", nargs="+", type=int, default=[64, 128, 256], help="widths of the heads")
    parser.add_argument(
        "--activation", nargs="+", default=["none", "silu"], choices=ACTIVATIONS, metavar="NAME",
        help=f"of queries and keys: {', '.join(ACTIVATIONS)} (default: none, silu)",
    )  # fmt: skip
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=600, help="training steps of a row each")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--data", default="runs/data", help="folder of token files")
    options = parser.parse_args()
    source = f"sparse-recall:{options.train}"
    data = DataSpec(train={source: 1.0}, heldout=options.heldout, folder=options.data, max_tokens=1_000_000)
    recipe = dataclasses.replace(load_recipe("smollm2-135m-kda"), data=data)
    recipe = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, heldout_tokens=98_304))
    teacher = open_teacher(recipe, torch.device("cpu"), torch.float32)
    train, heldout, _ = open_text(recipe, teacher)
    with torch.no_grad():
        if options.experiment == "teacher":
            calibration = MixedBatches(train, [1.0], LENGTH, 4, 9).batch(0)
            return print_teacher(teacher, calibration, heldout, recipe.run.heldout_tokens)
        rows = read_rows(teacher, MixedBatches(train, [1.0], LENGTH, 1, 5), ROWS + TEST_ROWS)
    print("| width | activation | seed | share |\n|---|---|---|---|")
    for width, activation, seed in itertools.product(options.width, options.activation, options.seed):
        heads = Heads(teacher, rows, width, activation, seed)
        share = train_heads(heads, rows, options.steps, options.lr, seed)
        print(f"| {width} | {activation} | {seed} | {share:.3f} |", flush=True)


if __name__ == "__main__":
    main()
