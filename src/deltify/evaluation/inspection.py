"""Table and figure of what each KDA head of a student can hold, beside what the teacher's head retrieves.

    deltify.evaluation.inspection.inspect_student("runs/kda")

Legend: B sequences, T tokens, H heads.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..config import Recipe, load_recipe
from ..conversion.attention import HeadStatistics, far_copies, measure_attention
from ..conversion.teacher import Teacher
from ..data.batches import Batch
from ..data.sources import PYTHON_DOCS, documents
from ..inference.loading import load_model, load_tokenizer
from ..inference.sample import MAX_CHARS_PER_TOKEN
from ..model.causal_lm import CausalLM
from ..utils.console import console, log
from ..utils.devices import device_name, pick_device
from ..utils.files import write_text
from ..utils.folders import model_folder, recipe_folder
from ..utils.tokens import token_ids
from . import plots
from .kda_heads import COSINES, DISTANCES, inspect_heads, kda_layers
from .results_file import command_line, versions
from .runner import open_reference, pick_dtype
from .tables import Table

SEQUENCE_LENGTH = 2048
LEAST_TOKENS = 256
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
        ValueError: If the model has no KDA layer, the teacher does not fit it, or text or sequences are too short.
    """
    if output is None and not Path(source).is_dir():
        raise ValueError(f"{source} is not a folder. Name a folder for the results with --output.")
    folder, torch_device = Path(output or source), pick_device(device)
    dtype = pick_dtype("auto", torch_device)
    student = load_model(source, device=torch_device, dtype=dtype)
    if not kda_layers(student):
        raise ValueError(f"{source} has no KDA layer. Give a student, or the folder of a run.")
    length = min(SEQUENCE_LENGTH, tokens, student.config.max_position_embeddings)
    if length < LEAST_TOKENS:
        raise ValueError(
            f"Sequences of {length} tokens are too short. At least {LEAST_TOKENS} are needed. Raise --tokens, or use a "
            "model with a larger context window."
        )
    batch = read_sequences(text, tokens // length, length, load_tokenizer(source)).to(torch_device)
    run = recipe_folder(str(source))
    recipe = None if run is None else load_recipe(run / "recipe.yaml")
    reference = find_teacher(recipe, teacher, torch_device, dtype)
    copies = sum(far_copies(*pair).shape[1] for pair in zip(batch.input_ids.tolist(), batch.position_ids.tolist()))
    if not copies:
        log(f"{text!r} has no copies in {batch.input_ids.numel():,} tokens, so that retrieval is not measured.")
    statistics = None if reference is None or not copies else teacher_statistics(reference, student, batch)
    rows = head_rows(inspect_heads(student, batch), statistics)
    content = {
        "model": model_folder(str(source)),
        "teacher": None if reference is None else teacher or (recipe and recipe.teacher.model),
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


def find_teacher(recipe: Recipe | None, name: str | None, device: torch.device, dtype: torch.dtype) -> Teacher | None:
    """Return the teacher of this name, by default that of the recipe, or None after a line that says why.

    Raises:
        ValueError: If a teacher is named and cannot be opened.
    """
    if name is not None:
        return open_reference(name, [], device, dtype)
    if recipe is None:
        log("The model belongs to no run. Name its teacher with --teacher to measure the teacher's heads.")
        return None
    try:
        return open_reference(None, [recipe], device, dtype)
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
    decay: list[Column] = [
        ("half-life", number("half_life", ",.0f")),
        ("10-90 %", lambda row: f"{row['half_life_p10']:,.0f}-{row['half_life_p90']:,.0f}"),
    ]
    writing: list[Column] = [("beta", number("beta_mean")), ("keys", number("effective_keys", ".1f"))]
    left: list[Column] = [(f"left {d:,}", number(f"left_{d}")) for d in DISTANCES]
    teacher: list[Column] = [(name, number(f"teacher_{name}")) for name in ("copy", "match")]
    reading: list[Column] = [(name.replace("_", " "), number(name)) for name in COSINES]

    def table(title: str, chosen: list[dict], columns: list[Column], note: str = "") -> Table:
        cells = [[f"{row['layer']}.{row['head']}", *(show(row) for _, show in columns)] for row in chosen]
        return Table(title, ["head", *(name for name, _ in columns)], cells, note)

    title = "Heads that remember longest (layer.head)"
    tables = [table(title, best(rows, longest), decay + writing + left)]
    if retrieving := best(rows, "teacher_retrieval"):
        title = f"Heads that retrieve most in the teacher, at {content['copies']} copies"
        note = "copy, match: the teacher's head. Other columns: the student's."
        tables.append(table(title, retrieving, teacher + writing[:1] + left[:1] + left[-1:] + reading, note))
    return tables
