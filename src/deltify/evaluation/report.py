"""Reports of results.json: tables in the terminal, report.html, report.md, figures, and a model card."""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from rich.table import Table as RichTable

from ..config import STAGES
from ..utils.console import console
from ..utils.files import write_text
from .card import Layouts, card_metadata, last_stage, recipes_of, teacher_facts
from .plots import draw_by_length, draw_by_position, draw_decode_cost, draw_heat_map, draw_recall, draw_training, short


@dataclass(frozen=True)
class Table:
    """Cells as they are shown. The first column names the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def rich(self) -> RichTable:
        """Return the table for the terminal."""
        table = RichTable(title=self.title, caption=self.note or None)
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*row)
        return table


@dataclass(frozen=True)
class Section:
    """A section of the report.

    Args:
        title: Heading.
        text: Paragraph below the heading.
        tables: Tables.
        pictures: PNG files. Each has an SVG file of the same name beside it.
    """

    title: str
    text: str = ""
    tables: list[Table] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)


def report(run: str | Path) -> list[Path]:
    """Print the tables of an evaluation, write its pages, and return their paths.

    The pages are report.html (one file that needs no network), report.md with figures, and README.md in the folder of
    the run's last stage, a model card for the Hugging Face hub.

    Args:
        run: Folder with results.json.

    Raises:
        FileNotFoundError: If the folder has no results.json.
    """
    run = Path(run)
    results = read_results(run)
    measured = make_sections(run, results)
    sections = measured + make_export_sections(run)
    for section in sections:
        for table in section.tables:
            console.print(table.rich())
    for name, texts in results.get("samples", {}).items():
        console.print(f"\nSamples of [bold]{name}[/]")
        for text in texts:
            console.print(f"  {' '.join(text.split())!r}", highlight=False, markup=False)

    facts = {"name": run.name, "results": results, "sections": sections, "recipe": recipe_text(run, results)}
    pages = [run / "report.html", run / "report.md"]
    for path in pages:
        path.write_text(render(path.name, **facts), encoding="utf-8")
    if (stage := last_stage(run)) is not None:
        pages.append(stage / "README.md")
        card = render_card(run, stage.name, results, measured, teacher_facts(str(results["teacher"])), Layouts("PATH"))
        pages[-1].write_text(card, encoding="utf-8")
    console.print(f"\nreport: {', '.join(map(str, pages))}", highlight=False, soft_wrap=True)
    return pages


def combine(folders: Sequence[str | Path], output: str | Path) -> Path:
    """Merge the results.json of several evaluations into the folder `output`, and return it.

    Measures that several evaluations have, such as those of the teacher, are taken from the first.

    Raises:
        FileNotFoundError: If a folder has no results.json.
        ValueError: If evaluations differ in teacher, device, dtype or held-out text.
    """
    output = Path(output)
    parts = [read_results(folder) for folder in folders]
    for key in ("teacher", "device", "dtype", "heldout_tokens", "heldout_sequence_length"):
        if len(values := {str(part.get(key)) for part in parts}) > 1:
            raise ValueError(
                f"The evaluations differ in {key}: {', '.join(sorted(values))}. Repeat them with equal settings."
            )
    whole: dict = {}
    for part in parts:
        for key, value in part.items():
            if isinstance(value, list) and value and isinstance(value[0], dict):
                known = set(map(row_identity, whole.get(key, [])))
                whole[key] = whole.get(key, []) + [row for row in value if row_identity(row) not in known]
            elif key == "samples":
                whole[key] = value | whole.get(key, {})
            elif key not in whole:
                whole[key] = value
    whole["runs"] = list(dict.fromkeys(run for part in parts for run in part["runs"]))
    whole["trained_length"] = max((part["trained_length"] or 0 for part in parts), default=0) or None
    whole["seconds"] = round(sum(part["seconds"] for part in parts), 1)
    whole["command"] = "\n".join(part["command"] for part in parts)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "results.json", json.dumps(whole, indent=1))
    return output


def read_results(folder: str | Path) -> dict:
    """Return the results.json of a folder.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = Path(folder) / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no results.json. Run: deltify evaluate {folder}")
    return json.loads(path.read_text())


def row_identity(row: dict) -> tuple:
    """Return the model, task and length of a row, which are equal for equal measures."""
    return row.get("model", row.get("name")), row.get("task"), row.get("length")


def make_sections(run: Path, results: dict) -> list[Section]:
    """Return the sections of a report in their order, and draw their figures."""
    trained = results["trained_length"]
    sections = []
    if "scores" in results:
        sections.append(Section("Held-out text", tables=[heldout_table(results)]))
    if "benchmarks" in results:
        rows = results["benchmarks"]
        sections.append(Section("Benchmarks", BENCHMARKS, [benchmark_table(rows), *letter_tables(rows)]))
    if "needles" in results:
        pictures = [draw_by_length(results["needles"], run / "needles", trained=trained)[0]]
        pictures += [draw_heat_map(results["needle_rows"], run / "needles-by-depth", trained=trained)[0]]
        sections.append(Section("Needles in haystacks", NEEDLES, [needle_table(results["needles"])], pictures))
    if "recall" in results:
        pictures = [draw_recall(results["recall"], run / "recall", trained=trained)[0]]
        sections.append(Section("Recall by distance", RECALL, [recall_table(results["recall"])], pictures))
    if "positions" in results:
        pictures = [draw_by_position(results["positions"], run / "positions", trained=trained)[0]]
        sections.append(Section("Curves by position", POSITIONS, [position_table(results["positions"])], pictures))
    if "decode" in results:
        pictures = [draw_decode_cost(results["decode"], run / "decode")[0]]
        sections.append(Section("Decoding", tables=[decode_table(results["decode"])], pictures=pictures))
    if (run / "metrics.jsonl").is_file():
        sections.append(Section("Training", pictures=[draw_training(run, results)[0]]))
    return sections


BENCHMARKS = (
    "Each cell shows the score in percent and its standard error. The rows below a student compare it with the teacher "
    "on the same items: the ratio of the scores, and the ratio of the scores above chance. Brackets hold 95% intervals "
    "from a paired bootstrap over items. A dash means that the teacher is not clearly above chance."
)
NEEDLES = (
    "Tasks of RULER with the score of lm-eval: the percentage of the requested values that the answer contains. The "
    "length of a sample includes prompt and answer."
)
RECALL = (
    "Answers repeat a fact of sparse recall text (facts) or the digits of a needle. Each document is read once: after "
    "each prediction, the model gets the right token. Certain answers score 0. A distance is the number of tokens from "
    "the repeated token to the answer token."
)
EXPORTS = "The student was exported for other programs, which need neither deltify nor trust_remote_code."
POSITIONS = (
    "Every document is read from its beginning. A model with a short memory gets worse with the distance from the "
    "beginning."
)


def make_export_sections(run: Path) -> list[Section]:
    """Return a section with commands for the exported models of a run, or none. Its paths are those of this machine."""
    commands = commands_for_exports(run)
    table = Table("Programs and commands", ("program", "command"), commands)
    return [Section("Run it without deltify", EXPORTS, [table])] if commands else []


def commands_for_exports(run: Path) -> list[tuple[str, str]]:
    """Return programs and the commands that run the exported models in a run's folder."""
    commands = []
    for config in sorted(run.glob("*/config.json")):
        if json.loads(config.read_text()).get("model_type") == "kimi_linear":
            folder = config.parent
            commands += [
                ("transformers", f'AutoModelForCausalLM.from_pretrained("{folder}")'),
                ("vLLM", f"vllm serve {folder}"),
                ("MLX-LM", f"mlx_lm.generate --model {folder} --prompt ..."),
            ]
    return commands + [("llama.cpp", f"llama-server -m {file}") for file in sorted(run.glob("**/*.gguf"))]


def percent(value: float | None, digits: int = 1) -> str:
    """Return a fraction as a percentage, or a dash."""
    return "-" if value is None else f"{100 * value:.{digits}f}"


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
    return Table(title, columns, rows, verdict(results["scores"]))


def verdict(scores: list[dict]) -> str:
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
            error = "" if row is None or row["stderr"] is None else f" ± {percent(row['stderr'])}"
            cells.append("-" if row is None else f"{percent(row['value'])}{error}")
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
            (f"{model}: cache, MiB", *("-" if r is None else f"{r['cache_bytes'] / 2**20:.1f}" for r in of_model))
        )
        lines.append((f"{model}: ms per token", *("-" if r is None else f"{r['ms_per_token']:.1f}" for r in of_model)))
    device = f"{rows[0]['device']}, {rows[0]['dtype']}"
    return Table(
        f"Decoding with batch size 1, by context in tokens ({device})", ("model", *map(short, contexts)), lines
    )


# ---- pages -----------------------------------------------------------------------------------------------------------


def render(template: str, **facts) -> str:
    """Return a page made from a template."""
    escape = select_autoescape(["html"], default=False)
    environment = Environment(
        loader=PackageLoader("deltify.evaluation"), autoescape=escape, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"data_url": data_url, "flat": flat}
    return environment.get_template(template).render(**facts)


def render_card(
    run: Path, stage: str, results: dict | None, sections: list[Section], facts: dict[str, Any], layouts: Layouts
) -> str:
    """Return the model card of a stage. Without `results`, it has no tables.

    Args:
        run: Folder of the run, or of a common report.
        stage: Name of the stage.
        results: Contents of results.json, or None if the run was not evaluated.
        sections: Result of `make_sections`, or an empty list.
        facts: Result of `teacher_facts`.
        layouts: Layouts that the card has commands for.
    """
    return render(
        "card.md",
        name=run.name,
        head=card_metadata(run, stage, results, facts),
        facts=facts,
        layouts=layouts,
        results=results,
        sections=[section for section in sections if section.tables],  # a card has no pictures
        recipe=recipe_text(run, results),
    )


def recipe_text(run: Path, results: dict | None) -> str:
    """Return the recipes of all runs, each after those of the runs that it started from."""
    return "\n---\n".join(recipes_of((results or {}).get("runs") or [run]).values())


def flat(text: str) -> str:
    """Return a text as one line."""
    return " ".join(text.split())


def data_url(picture: Path) -> str:
    """Return a PNG file as a URL that contains it."""
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
