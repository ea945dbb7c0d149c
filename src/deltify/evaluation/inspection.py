"""Measure what each KDA head of a student can hold: decay, writing, overwriting, and reading at copies.

    deltify.evaluation.inspection.inspect_student("runs/kda")

Legend: T tokens, D model width, H heads, K head width, S sampled tokens, P copies.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..config import load_recipe
from ..conversion.attention import HeadStatistics, far_copies, measure_attention
from ..conversion.teacher import Teacher
from ..data.batches import Batch
from ..data.sources import PYTHON_DOCS, documents
from ..inference.loading import load_model, load_tokenizer
from ..inference.sample import MAX_CHARS_PER_TOKEN
from ..model.causal_lm import CausalLM
from ..model.mixers import DeltifyKDA
from ..ops import kda, short_conv
from ..ops.reference import l2norm, log_decay
from ..utils.console import console, log
from ..utils.devices import device_name, pick_device
from ..utils.files import write_text
from ..utils.folders import model_folder
from ..utils.tokens import token_ids
from . import plots
from .report import Table
from .results_file import command_line, versions
from .runner import open_reference, pick_dtype

SEQUENCE_LENGTH = 2048
LEAST_TOKENS = 256
DISTANCES = (128, 512, 1024)  # after which is measured what is left of a value
# No difference of two distances is a multiple of it, so that a token reads for one sampled token at most.
SAMPLE_EVERY = 17
STATES = 5  # states in the second half of a sequence whose keys are measured
STRONG = 0.3  # beta above which a write counts as strong
SLOWEST = 1e-9  # decay rate per token; half-lives are at most 7e8 tokens, because JSON has no infinity
COSINES = ("cosine_copy", "cosine_match", "cosine_others")
LISTED = 10  # heads of a table in the terminal


def inspect_student(
    source: str | Path,
    *,
    text: str = PYTHON_DOCS,
    tokens: int = 8192,
    teacher: str | None = None,
    output: str | Path | None = None,
    device: str = "auto",
) -> Path:
    """Measure every KDA head of a student, and return the path of inspect.json.

    A figure of the same name is written beside it, and the terminal gets a summary.

    Args:
        source: Folder of a run (its last stage) or of a model, or hub id.
        text: Source of the text that is read. Its documents are cut into sequences of SEQUENCE_LENGTH tokens.
        tokens: Number of tokens that are read.
        teacher: Teacher whose heads are measured, too. Defaults to that of the run, if it can be opened.
        output: Folder to write to. Defaults to the folder of the run or model.
        device: Device to run on.

    Raises:
        ValueError: If the model has no KDA layer, the teacher does not fit it, or the text is too short.
    """
    if output is None and not Path(source).is_dir():
        raise ValueError(f"{source} is not a folder. Name a folder for the results with --output.")
    if tokens < LEAST_TOKENS:
        raise ValueError(f"--tokens {tokens} is too few. Read at least {LEAST_TOKENS}.")
    folder, torch_device = Path(output or source), pick_device(device)
    dtype = pick_dtype("auto", torch_device)
    student = load_model(source, device=torch_device, dtype=dtype)
    if not kda_layers(student):
        raise ValueError(f"{source} has no KDA layer. Give a student, or the folder of a run.")
    length = min(SEQUENCE_LENGTH, tokens, student.config.max_position_embeddings)
    batch = read_sequences(text, tokens // length, length, load_tokenizer(source)).to(torch_device)
    reference = find_teacher(source, teacher, torch_device, dtype)
    statistics = None if reference is None else teacher_statistics(reference, student, batch)
    rows = head_rows(inspect_heads(student, batch), statistics)
    copies = sum(far_copies(*pair).shape[1] for pair in zip(batch.input_ids.tolist(), batch.position_ids.tolist()))
    content = {
        "model": model_folder(str(source)),
        "teacher": None if reference is None else reference.model.name_or_path,
        "text": text,
        "tokens": batch.input_ids.numel(),
        "sequence_length": length,
        "copies": copies,
        "head_dim": student.config.head_dim,
        "device": device_name(torch_device),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": versions(),
        "command": command_line(),
        "date": time.strftime("%Y-%m-%d"),
        "heads": rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "inspect.json", json.dumps(content, indent=1))
    draw_heads(content, folder / "inspect")
    for table in summary(content):
        console.print(table.rich())
    return folder / "inspect.json"


def read_sequences(source: str, count: int, length: int, tokenizer: PreTrainedTokenizerBase) -> Batch:
    """Return `count` sequences of `length` tokens, each of one document.

    Beginnings of different documents come first. Further sequences of a document are used if there are too few.

    Raises:
        ValueError: If the source has fewer sequences.
    """
    found: list[tuple[int, list[int]]] = []
    for text in documents(source):
        ids = token_ids(tokenizer, text[: MAX_CHARS_PER_TOKEN * count * length])
        found += [(start, ids[start : start + length]) for start in range(0, len(ids) - length + 1, length)]
        if sum(start == 0 for start, _ in found) == count:
            break
    if len(found) < count:
        raise ValueError(
            f"{source!r} has {len(found)} sequences of {length:,} tokens that lie in one document, of {count} that are "
            "needed. Lower --tokens, or give longer documents."
        )
    chosen = sorted(found, key=lambda pair: pair[0])[:count]
    ids_BT = torch.tensor([ids for _, ids in chosen])
    return Batch(ids_BT, torch.arange(length).repeat(count, 1))


# ---- the teacher -----------------------------------------------------------------------------------------------------


def find_teacher(source: str | Path, name: str | None, device: torch.device, dtype: torch.dtype) -> Teacher | None:
    """Return the teacher of this name, or that of the run that holds the model, or None with a line why.

    Raises:
        ValueError: If a teacher is named and cannot be opened.
    """
    recipes = [path for path in (Path(source) / "recipe.yaml", Path(source).parent / "recipe.yaml") if path.is_file()]
    if name is not None:
        return open_reference(name, [], device, dtype)
    if not recipes:
        log(f"{source} belongs to no run. Name its teacher with --teacher to measure the teacher's heads.")
        return None
    try:
        return open_reference(None, [load_recipe(recipes[0])], device, dtype)
    except (ValueError, OSError) as error:
        log(f"The teacher's heads are not measured: {error}")
        return None


def teacher_statistics(teacher: Teacher, student: CausalLM, batch: Batch) -> list[HeadStatistics]:
    """Return what the teacher's heads attend to in the text of the batch.

    Raises:
        ValueError: If the teacher has other layers or heads than the student.
    """
    shapes = [(c.num_hidden_layers, c.num_attention_heads, c.vocab_size) for c in (teacher.config, student.config)]
    if shapes[0] != shapes[1]:
        described = [f"{layers} layers, {heads} heads and {tokens} token ids" for layers, heads, tokens in shapes]
        raise ValueError(f"The teacher has {described[0]}, the student {described[1]}. Name the student's own teacher.")
    return measure_attention(teacher, batch)


# ---- the student -----------------------------------------------------------------------------------------------------


def kda_layers(model: nn.Module) -> list[DeltifyKDA]:
    """Return the KDA layers of a model."""
    return [module for module in model.modules() if isinstance(module, DeltifyKDA)]


@torch.no_grad()
def inspect_heads(model: CausalLM, batch: Batch) -> dict[int, dict[str, Tensor]]:
    """Return the quantities [H] of the heads of each KDA layer, on average over a batch.

    Args:
        model: Student.
        batch: Sequences that are one document each.

    Returns:
        Quantities by layer and name, see docs/guides/inspect.md. Those at copies are NaN if the text has none.
    """
    totals: dict[int, dict[str, Tensor]] = {}
    copies = 0
    for ids_1T, positions_1T in zip(batch.input_ids.split(1), batch.position_ids.split(1)):
        pairs_2P = far_copies(ids_1T[0].tolist(), positions_1T[0].tolist()).to(ids_1T.device)
        copies += pairs_2P.shape[1]

        def hook(mixer: nn.Module, args: tuple) -> None:
            assert isinstance(mixer, DeltifyKDA)
            measured = measure_layer(mixer, args[0], pairs_2P)  # noqa: B023  removed before the next sequence
            total = totals.setdefault(mixer.layer_idx, {})
            for name, x in measured.items():
                total[name] = total.get(name, 0) + x.cpu()

        handles = [mixer.register_forward_pre_hook(hook) for mixer in kda_layers(model)]
        try:
            model.get_decoder()(input_ids=ids_1T, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
    for total in totals.values():
        for name, x in total.items():
            total[name] = x / (copies if name in COSINES else len(batch.input_ids))
        half_life_HK = math.log(2) / total.pop("rate").clamp(min=SLOWEST)
        low_H, high_H = half_life_HK.quantile(torch.tensor([0.1, 0.9]), dim=1)
        # the half-life of the mean rate: the mean of half-lives would be that of the slowest channels
        mean_H = 1 / (1 / half_life_HK).mean(1)
        total |= {"half_life": mean_H, "half_life_p10": low_H, "half_life_p90": high_H}
        nearest_H = torch.maximum(total["cosine_copy"], total["cosine_match"])
        total["cosine_margin"] = nearest_H - total["cosine_others"]
    return totals


def measure_layer(mixer: DeltifyKDA, x_1TD: Tensor, pairs_2P: Tensor) -> dict[str, Tensor]:
    """Return means [H] over the tokens of one sequence, the mean decay `rate` [H, K], and sums [H] of cosines.

    Args:
        mixer: KDA layer.
        x_1TD: Inputs of the layer.
        pairs_2P: Copies, see `far_copies`, over which cosines are summed.
    """
    q_THK, k_THK, f_THK, b_TH = operator_inputs(mixer, x_1TD)
    rate, bias = mixer.A_log.float().exp()[:, None], mixer.dt_bias.float().view_as(f_THK[0])
    log_decay_THK = log_decay(f_THK, rate, bias, mixer.lower_bound)
    beta_TH = b_TH.sigmoid()
    measured = {
        "rate": -log_decay_THK.mean(0),
        "beta_mean": beta_TH.mean(0),
        "beta_median": beta_TH.median(0).values,
        "beta_strong": (beta_TH > STRONG).float().mean(0),
        "effective_keys": effective_keys(l2norm(k_THK), log_decay_THK, beta_TH),
    }
    for distance, left_H in values_left(mixer, k_THK, f_THK, b_TH).items():
        measured[f"left_{distance}"] = left_H
    return measured | cosines_at_copies(l2norm(q_THK), l2norm(k_THK), pairs_2P)


def operator_inputs(mixer: DeltifyKDA, x_1TD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries, keys and decay logits [T, H, K] and beta logits [T, H] of a layer, as its operator gets them."""
    q, _ = short_conv(mixer.q_proj(x_1TD), mixer.q_conv1d())
    k, _ = short_conv(mixer.k_proj(x_1TD), mixer.k_conv1d())
    q, k, f = (x[0].float().unflatten(-1, (-1, mixer.head_dim)) for x in (q, k, mixer.f_proj(x_1TD)))
    return q, k, f, mixer.b_proj(x_1TD)[0].float()


def effective_keys(k_THK: Tensor, log_decay_THK: Tensor, beta_TH: Tensor) -> Tensor:
    """Return the participation ratio [H] of the keys that the state holds, on average over STATES tokens.

    It is (tr C)^2 / tr C^2 of C = sum of beta k k^T over earlier tokens, with each key decayed since it was written. n
    orthogonal keys of equal weight give n. Overwriting is not counted.
    """
    tokens = len(k_THK)
    since_start_THK = log_decay_THK.cumsum(0)
    written_THK = beta_TH.sqrt()[..., None] * k_THK
    ratios = []
    for end in np.linspace(tokens / 2, tokens, STATES).astype(int):
        held_THK = written_THK[:end] * (since_start_THK[end - 1] - since_start_THK[:end]).exp()
        gram_HKK = torch.einsum("thk,thj->hkj", held_THK, held_THK)
        trace_H = gram_HKK.diagonal(dim1=1, dim2=2).sum(1)
        ratios.append(trace_H.square() / gram_HKK.square().sum((1, 2)).clamp(min=1e-30))
    return torch.stack(ratios).mean(0)


def values_left(mixer: DeltifyKDA, k_THK: Tensor, f_THK: Tensor, b_TH: Tensor) -> dict[int, Tensor]:
    """Return the fraction [H] of a value that its own key still reads, by distance in tokens.

    One pass of the operator measures all sampled tokens: each writes a 1 into a value channel of its own, and the
    tokens at the distances from it read with its key. Distances that the sequence is too short for are left out.
    """
    tokens, heads, _ = k_THK.shape
    distances = [distance for distance in DISTANCES if distance + SAMPLE_EVERY < tokens]
    start_S = torch.arange(SAMPLE_EVERY, tokens - distances[-1], SAMPLE_EVERY, device=k_THK.device)
    channel_S = torch.arange(len(start_S), device=k_THK.device)
    v_THS = k_THK.new_zeros(tokens, heads, len(start_S))
    v_THS[start_S, :, channel_S] = 1 / b_TH[start_S].sigmoid().clamp(min=1e-12)  # the operator multiplies by beta
    q_THK = torch.zeros_like(k_THK)
    for distance in distances:
        q_THK[start_S + distance] = k_THK[start_S]
    q, k, v, f, b = (x[None] for x in (q_THK, k_THK, v_THS, f_THK, b_TH))
    options = {"lower_bound": mixer.lower_bound, "scale": 1.0, "backend": "chunked"}  # in float32 on every device
    o, _ = kda(q, k, v, f, b, mixer.A_log, mixer.dt_bias, **options)
    o_THS = o[0]
    return {distance: o_THS[start_S + distance, :, channel_S].mean(0) for distance in distances}


def cosines_at_copies(q_THK: Tensor, k_THK: Tensor, pairs_2P: Tensor) -> dict[str, Tensor]:
    """Return sums [H] over copies of the cosines of the query with keys.

    `cosine_copy` is that with the key of the token that is copied, `cosine_match` that with the key of the token before
    it, and `cosine_others` the mean of those with all other keys up to the query.

    Args:
        q_THK: Normalised queries.
        k_THK: Normalised keys.
        pairs_2P: Index of the query, and of the token that is copied.
    """
    at_P, source_P = pairs_2P
    q_PHK, copied_PHK, matched_PHK = q_THK[at_P], k_THK[source_P], k_THK[source_P - 1]
    others_PHK = (k_THK.cumsum(0)[at_P] - copied_PHK - matched_PHK) / (at_P - 1)[:, None, None]
    keys = copied_PHK, matched_PHK, others_PHK
    return {name: (q_PHK * key_PHK).sum((0, 2)) for name, key_PHK in zip(COSINES, keys)}


# ---- table and figure ------------------------------------------------------------------------------------------------


FIELDS = (
    *("half_life", "half_life_p10", "half_life_p90", "beta_mean", "beta_median", "beta_strong", "effective_keys"),
    *(f"left_{distance}" for distance in DISTANCES),
    *("teacher_copy", "teacher_match", "teacher_retrieval"),
    *(*COSINES, "cosine_margin"),
)


def head_rows(measured: dict[int, dict[str, Tensor]], statistics: list[HeadStatistics] | None) -> list[dict]:
    """Return a row with layer, head and FIELDS for each head. What was not measured is None."""
    rows = []
    for layer, of_layer in sorted(measured.items()):
        if statistics is not None:
            s = statistics[layer]
            teacher = {"teacher_copy": s.copy_H, "teacher_match": s.match_H, "teacher_retrieval": s.retrieval_H}
            of_layer = of_layer | teacher
        lists = {name: x.tolist() for name, x in of_layer.items()}
        for head in range(len(lists["half_life"])):
            values = {name: lists[name][head] if name in lists else math.nan for name in FIELDS}
            known = {name: None if math.isnan(value) else value for name, value in values.items()}
            rows.append({"layer": layer, "head": head, **known})
    return rows


def best(rows: list[dict], field: str) -> list[dict]:
    """Return the rows of the LISTED heads with the largest values of a field, the largest first."""
    known = [row for row in rows if row[field] is not None]
    return sorted(known, key=lambda row: row[field], reverse=True)[:LISTED]


# field, title of its panel, smallest and largest value of the colours (None for those of the data), logarithmic
PANELS: tuple[tuple[str, str, float | None, float | None, bool], ...] = (
    ("half_life", "half-life by decay alone, tokens", None, None, True),
    ("beta_mean", "write strength: mean beta", 0, 1, False),
    ("effective_keys", "effective keys of the state", 1, None, False),
    ("teacher_retrieval", "retrieval of the teacher's head", 0, None, False),
    *((f"left_{d}", f"left of a value after {d:,} tokens", 0.0, 1.0, False) for d in DISTANCES),
    ("cosine_margin", "cosine of query and key at copies,\nminus that with other keys", 0, None, False),
)


def draw_heads(content: dict, stem: str | Path) -> list[Path]:
    """Draw a heat map of layers and heads for each measured quantity, as PNG and SVG.

    Args:
        content: Content of inspect.json.
        stem: Path of the figure without its suffix.
    """
    from matplotlib.colors import LogNorm, Normalize

    rows = content["heads"]
    layers = plots.ordered(rows, "layer")
    heads = 1 + max(row["head"] for row in rows)
    marked = best(rows, "teacher_retrieval")
    panels = [panel for panel in PANELS if any(row[panel[0]] is not None for row in rows)]
    lines = -(-len(panels) // 4)
    places_x, places_y = (list(range(0, count, 1 + count // 16)) for count in (heads, len(layers)))
    figure, axes = plots.open_figure(lines, 4, max(12, 1.2 * heads), lines * max(3, 0.14 * len(layers) + 0.8))
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (field, title, low, high, is_log) in zip(axes.flat, panels):
        values = np.array([[math.nan if row[field] is None else row[field]] for row in rows]).reshape(-1, heads)
        norm = LogNorm(low, high) if is_log else Normalize(low, high)
        image = axis.imshow(values, norm=norm, cmap="viridis", aspect="auto")
        axis.plot([row["head"] for row in marked], [layers.index(row["layer"]) for row in marked], "rs", mfc="none")
        axis.set_yticks(places_y, [layers[place] for place in places_y], fontsize=8)
        axis.set_xticks(places_x, places_x, fontsize=8)
        axis.set_title(title, fontsize=9)
        figure.colorbar(image, ax=axis, pad=0.02)
    figure.supxlabel("head", fontsize=9)
    figure.supylabel("layer", fontsize=9)
    note = f". Red frames: the {len(marked)} heads that retrieve most in the teacher" if marked else ""
    figure.suptitle(f"KDA heads of {content['model']} on {content['tokens']:,} tokens{note}", fontsize=10)
    return plots.save(figure, stem)


Column = tuple[str, Callable[[dict], str]]


def summary(content: dict) -> list[Table]:
    """Return tables of the heads that remember longest, and of those that retrieve most in the teacher."""

    def number(field: str, form: str = ".2f") -> Callable[[dict], str]:
        return lambda row: "-" if row[field] is None else format(row[field], form)

    rows = content["heads"]
    longest = [f"left_{d}" for d in DISTANCES if rows[0][f"left_{d}"] is not None][-1]
    memory: list[Column] = [
        ("half-life", number("half_life", ",.0f")),
        ("10-90 %", lambda row: f"{row['half_life_p10']:,.0f}-{row['half_life_p90']:,.0f}"),
        ("beta", number("beta_mean")),
        ("keys", number("effective_keys", ".1f")),
        *((f"left {d:,}", number(f"left_{d}")) for d in DISTANCES),
    ]
    teacher: list[Column] = [("teacher copy", number("teacher_copy")), ("match", number("teacher_match"))]
    reading: list[Column] = [
        ("cosine copy", number("cosine_copy")),
        ("match", number("cosine_match")),
        ("others", number("cosine_others")),
    ]

    def table(title: str, chosen: list[dict], columns: list[Column]) -> Table:
        cells = [[f"{row['layer']}.{row['head']}", *(show(row) for _, show in columns)] for row in chosen]
        return Table(title, ["layer.head", *(name for name, _ in columns)], cells)

    tables = [table("Heads that remember longest", best(rows, longest), memory)]
    if retrieving := best(rows, "teacher_retrieval"):
        title = f"Heads that retrieve most in the teacher, at {content['copies']} copies"
        tables.append(table(title, retrieving, teacher + memory[:1] + memory[2:] + reading))
    return tables
