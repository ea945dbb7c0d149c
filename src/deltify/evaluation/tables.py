"""Tables of results.json, one for each measure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from rich.table import Table as RichTable

from ..config import STAGES
from ..utils.formats import short


@dataclass(frozen=True)
class Table:
    """Cells as they are shown. The first column names the row.

    Args:
        title: What the table shows.
        columns: Heads of the columns.
        rows: Cells.
        note: Sentences below the table.
        text: Whether the cells are text, not numbers.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    text: bool = False

    def is_empty(self) -> bool:
        """Return whether all numbers are zeros or missing."""
        return all(set(cell.split()) <= {"0", "0.0", "±", "-"} for row in self.rows for cell in row[1:])

    def rich(self) -> RichTable:
        """Return the table for the terminal."""
        table = RichTable(title=self.title, caption=self.note or None)
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*row)
        return table


def percent(value: float | None, digits: int = 1) -> str:
    """Return a fraction as a percentage, or a dash."""
    return "-" if value is None else f"{100 * value:.{digits}f}"


def amount(value: float) -> str:
    """Return a value with one decimal, or with two significant digits below 1."""
    return f"{value:,.1f}" if value >= 1 else f"{value:.2g}"


def heldout_table(results: dict) -> Table:
    """Return the table of scores on held-out text."""
    tokens, length = results["heldout_tokens"], results["heldout_sequence_length"]
    title = f"{tokens:,} held-out tokens in sequences of {length} (teacher: {results['teacher']})"
    rows = [
        (
            score["name"],
            f"{score['tokens']:,}" if score["tokens"] else "-",
            f"{score['perplexity']:,.1f}",
            "-" if score["kl"] is None else f"{score['kl']:.3f}",
            "-" if score["top1"] is None else f"{percent(score['top1'])}%",
        )
        for score in results["scores"]
    ]
    columns = ("model", "training tokens", "perplexity", "KL to teacher, nats/token", "top-1 agreement")
    return Table(title, columns, rows, heldout_note(results["scores"]))


def heldout_note(scores: list[dict]) -> str:
    """Return whether KL fell at every stage of a run, and whether the student has a lower perplexity than a unigram."""
    by_name = {score["name"]: score for score in scores}
    stages = [by_name[name] for name in ("converted", *STAGES) if name in by_name]
    if len(stages) < 2 or "unigram model" not in by_name:
        return ""
    fell = all(a["kl"] > b["kl"] for a, b in pairwise(stages))
    below = stages[-1]["perplexity"] < by_name["unigram model"]["perplexity"]
    first = "KL falls at every stage." if fell else "KL does NOT fall at every stage."
    return f"{first} The student's perplexity is {'below' if below else 'NOT below'} that of a unigram model."


def interval(ratio: Sequence[float] | None) -> str:
    """Return a ratio and its interval in percent, or a dash."""
    return "-" if ratio is None else f"{percent(ratio[0], 0)}% [{percent(ratio[1], 0)}, {percent(ratio[2], 0)}]"


def score_text(row: dict | None) -> str:
    """Return a score and its standard error, in percent unless it is no fraction."""
    if row is None:
        return "-"
    show = percent if row.get("fraction", True) else lambda value: f"{value:.3g}"
    return show(row["value"]) + ("" if row["stderr"] is None else f" ± {show(row['stderr'])}")


def benchmark_table(rows: list[dict]) -> Table:
    """Return the table of each task's main metric, with a row for each model and a column for each task."""
    main = [row for row in rows if row.get("main", True) and not row["metric"].startswith(("share_", "same_"))]
    tasks = list(dict.fromkeys((row["task"], row["metric"]) for row in main))
    models = list(dict.fromkeys(row["model"] for row in main))
    by_cell = {(row["model"], row["task"], row["metric"]): row for row in main}
    lines = []
    for model in models:
        cells, ratios, above = [model], ["  ratio to teacher"], ["  ratio above chance"]
        for task in tasks:
            row = by_cell.get((model, *task))
            cells.append(score_text(row))
            ratios.append(interval(row.get("ratio") if row else None))
            above.append(interval(row.get("ratio_above_chance") if row else None))
        lines.append(tuple(cells))
        if model != "teacher" and any(cell != "-" for cell in ratios[1:]):
            lines += [tuple(ratios), tuple(above)]
    chances = {(row["task"], row["metric"]): row["chance"] for row in main}
    lines.append(("random chance", *(percent(chances[task]) for task in tasks)))
    items = {(row["task"], row["metric"]): row["items"] for row in main}
    columns = ("model", *(f"{task}, {metric} ({items[task, metric]:,})" for task, metric in tasks))
    return Table("Benchmarks, % (items)", columns, lines)


def letter_tables(rows: list[dict]) -> list[Table]:
    """Return tables on how answers depend on letters, for tasks with options in every order."""
    tables = []
    for task in dict.fromkeys(row["task"] for row in rows if row["metric"] == "same_content"):
        of_task = [row for row in rows if row["task"] == task]
        metrics = list(dict.fromkeys(row["metric"] for row in of_task))
        values = {(row["model"], row["metric"]): row for row in of_task}
        lines = [
            (model, *(percent(values[model, metric]["value"]) for metric in metrics))
            for model in dict.fromkeys(row["model"] for row in of_task)
        ]
        lines.append(("random chance", *(percent(values[of_task[0]["model"], metric]["chance"]) for metric in metrics)))
        names = [LETTER_COLUMNS.get(metric, metric.removeprefix("share_")) for metric in metrics]
        tables.append(Table(f"{task}: generated letters, %", ("model", *names), lines, LETTERS))
    return tables


LETTER_COLUMNS = {"acc_generated": "accuracy", "acc_rotated": "accuracy, all orders", "same_content": "same content"}
LETTERS = (
    "Accuracy with the options in their original order, and over all orders. Then the percentage of answers with each "
    "letter, and of answers in another order that choose the same option as in the original order."
)


def needle_tables(summary: list[dict]) -> list[Table]:
    """Return the tables of needle scores. Tasks in which no model finds anything have a table of their own."""
    found = {row["task"] for row in summary if row["score"]}
    rest = [row for row in summary if row["task"] not in found]
    tables = [needle_table([row for row in summary if row["task"] in found])] if found else []
    if rest:
        title = f"No model finds a needle in {', '.join(dict.fromkeys(row['task'] for row in rest))}"
        tables.append(replace(needle_table(rest), title=title))
    return tables


def needle_table(summary: list[dict]) -> Table:
    """Return the table of needle scores, with a row for each task and model and a column for each length."""
    lengths = sorted({row["length"] for row in summary})
    cells = {(row["task"], row["model"], row["length"]): row for row in summary}
    rows = []
    for task, model in dict.fromkeys((row["task"], row["model"]) for row in summary):
        line = [f"{task}: {model}"]
        for length in lengths:
            row = cells.get((task, model, length))
            error = "" if row is None or row["stderr"] is None else f" ± {percent(row['stderr'], 0)}"
            line.append("-" if row is None else f"{percent(row['score'], 0)}{error}")
        rows.append(tuple(line))
    rows.sort(key=lambda line: line[0].split(":")[0])
    items = sorted({row["items"] for row in summary})
    number = " to ".join(str(n) for n in dict.fromkeys((items[0], items[-1])))
    return Table(f"Needles found, % ({number} samples per cell)", ("task: model", *map(short, lengths)), rows)


def recall_table(rows: list[dict]) -> Table:
    """Return the table of the recall curve, with a row for each task and model and a column for each distance."""
    distances = sorted({row["distance"] for row in rows})
    cells = {(row["task"], row["model"], row["distance"]): row for row in rows}
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        for model in dict.fromkeys(row["model"] for row in rows if row["task"] == task):
            found = [cells.get((task, model, distance)) for distance in distances]
            shown = ["-" if r is None else f"{r['log_prob']:.2f} ({percent(r['right'], 0)})" for r in found]
            lines.append((f"{task}: {model}", *shown))
    columns = ("task: model", *(f"from {short(distance)}" for distance in distances))
    return Table("Mean log-probability of answer tokens in nats (right, %), by distance in tokens", columns, lines)


def position_table(rows: list[dict]) -> Table:
    """Return the table of perplexity and KL, with a column for each bucket of positions."""
    buckets = list(dict.fromkeys((row["start"], row["end"]) for row in sorted(rows, key=lambda row: row["start"])))
    cells = {(row["model"], row["start"]): row for row in rows}
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        for metric in ("perplexity", "kl") if model != "teacher" else ("perplexity",):
            values = [cells.get((model, start), {}).get(metric) for start, _ in buckets]
            digits = 1 if metric == "perplexity" else 3
            shown = ["-" if value is None else f"{value:.{digits}f}" for value in values]
            lines.append((f"{model}: {'KL' if metric == 'kl' else metric}", *shown))
    columns = ("model", *(f"{short(start)}-{short(end)}" for start, end in buckets))
    return Table("Perplexity, and KL to the teacher in nats per token, by position", columns, lines)


def decode_table(rows: list[dict]) -> Table:
    """Return the table of cache sizes and times per token, with a column for each context."""
    contexts = sorted({row["context"] for row in rows})
    cells = {(row["model"], row["context"]): row for row in rows}
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [cells.get((model, context)) for context in contexts]
        lines.append(
            (f"{model}: cache, MiB", *("-" if r is None else amount(r["cache_bytes"] / 2**20) for r in of_model))
        )
        lines.append((f"{model}: ms per token", *("-" if r is None else amount(r["ms_per_token"]) for r in of_model)))
    device = f"{rows[0]['device']}, {rows[0]['dtype']}"
    return Table(
        f"Decoding with batch size 1, by context in tokens ({device})", ("model", *map(short, contexts)), lines
    )
