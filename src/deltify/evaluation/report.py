"""Results as pages: tables in the terminal, report.html that opens from disk, report.md, pictures, and a model card."""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import yaml
from jinja2 import Environment, PackageLoader, select_autoescape
from rich.table import Table as RichTable

from ..config import STAGES
from ..utils.console import console
from ..utils.files import write_text
from .plots import draw_by_length, draw_by_position, draw_decode_cost, draw_heat_map, draw_training, short


@dataclass(frozen=True)
class Table:
    """Cells as they are shown; the first column names the row."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]]
    note: str = ""

    def rich(self) -> RichTable:
        table = RichTable(title=self.title, caption=self.note or None)
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*row)
        return table


@dataclass(frozen=True)
class Section:
    """A part of the report."""

    title: str
    text: str = ""
    tables: list[Table] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)  # PNG; an SVG of the same name lies beside each


def report(run: Path) -> list[Path]:
    """Prints an evaluated run's tables and writes its pages; returns their paths.

    Writes report.html (one file, no network), report.md, PNG and SVG pictures, and README.md, a Hugging Face model
    card, in the run's last stage.

    Raises:
        FileNotFoundError: if the run was not evaluated.
    """
    results = read_results(run)
    sections = make_sections(run, results)
    for section in sections:
        for table in section.tables:
            console.print(table.rich())
    for name, texts in results.get("samples", {}).items():
        console.print(f"\n[bold]{name}[/] writes")
        for text in texts:
            console.print(f"  {' '.join(text.split())!r}", highlight=False, markup=False)

    facts = {"name": run.name, "results": results, "sections": sections, "recipe": recipe_text(run, results)}
    pages = {"report.html": run / "report.html", "report.md": run / "report.md"}
    if (stage := last_stage(run)) is not None:
        pages["card.md"] = stage / "README.md"
        facts["card"] = card_metadata(run, results)
    escape = select_autoescape(["html"], default=False)
    environment = Environment(
        loader=PackageLoader("deltify.evaluation"), autoescape=escape, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"data_url": data_url, "flat": lambda text: " ".join(text.split())}
    for template, path in pages.items():
        path.write_text(environment.get_template(template).render(**facts), encoding="utf-8")
    console.print(f"\nreport: {', '.join(str(path) for path in pages.values())}", highlight=False, soft_wrap=True)
    return list(pages.values())


def combine(folders: Sequence[Path], output: Path) -> Path:
    """Writes results.json of several evaluations, made one by one or on several GPUs, into `output`, and returns that.

    What several of them have measured, as of the teacher, is taken from the first.

    Raises:
        FileNotFoundError: if a folder was not evaluated.
        ValueError: if they were measured with different teachers, on different devices or in different dtypes.
    """
    parts = [read_results(folder) for folder in folders]
    for key in ("teacher", "device", "dtype", "heldout_tokens", "heldout_sequence_length"):
        if len(values := {str(part.get(key)) for part in parts}) > 1:
            raise ValueError(
                f"{key} is not the same in all of them but {', '.join(sorted(values))}; evaluate them alike"
            )
    whole: dict = {}
    for part in parts:
        for key, value in part.items():
            if isinstance(value, list) and value and isinstance(value[0], dict):
                known = set(map(what_of, whole.get(key, [])))
                whole[key] = whole.get(key, []) + [row for row in value if what_of(row) not in known]
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


def read_results(folder: Path) -> dict:
    if not (folder / "results.json").is_file():
        raise FileNotFoundError(f"{folder} has no results.json; run: deltify evaluate {folder}")
    return json.loads((folder / "results.json").read_text())


def what_of(row: dict) -> tuple:
    """What a row of results measures: which model, and at what."""
    return row.get("model", row.get("name")), row.get("task"), row.get("length")


def make_sections(run: Path, results: dict) -> list[Section]:
    """What was measured, in the report's order, drawn as it goes."""
    trained = results["trained_length"]
    sections = []
    if "scores" in results:
        sections.append(Section("Held-out text", tables=[heldout_table(results)]))
    if "benchmarks" in results:
        rows = results["benchmarks"]
        text = (
            "Each cell: the score in percent and its standard error. Below it, against the teacher on the same items, "
            "the ratio of the scores, and of what lies above chance, each with its 95% interval (paired bootstrap over "
            "items; a dash where the teacher itself is not clearly above chance)."
        )
        sections.append(Section("Benchmarks", text, [benchmark_table(rows), *letter_tables(rows)]))
    if "needles" in results:
        pictures = [draw_by_length(results["needles"], run / "needles", trained=trained)[0]]
        pictures += [draw_heat_map(results["needle_rows"], run / "needles-by-depth", trained=trained)[0]]
        sections.append(Section("Needles in haystacks", NEEDLES, [needle_table(results["needles"])], pictures))
    if "positions" in results:
        pictures = [draw_by_position(results["positions"], run / "positions", trained=trained)[0]]
        sections.append(Section("By position", POSITIONS, [position_table(results["positions"])], pictures))
    if "decode" in results:
        pictures = [draw_decode_cost(results["decode"], run / "decode")[0]]
        sections.append(Section("Decoding", tables=[decode_table(results["decode"])], pictures=pictures))
    if (run / "metrics.jsonl").is_file():
        sections.append(Section("Training", pictures=[draw_training(run, results)[0]]))
    return sections


NEEDLES = (
    "RULER's tasks, scored as lm-eval does: the share of the values asked for that the answer holds. A sample's length "
    "counts prompt and answer."
)
POSITIONS = (
    "Whole documents, each read from its start. What a model with a short memory loses shows far into a document."
)


def percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}"


def heldout_table(results: dict) -> Table:
    size = f"{results['heldout_tokens']:,} held-out tokens, rows of {results['heldout_sequence_length']}"
    title = f"{size}; teacher: {results['teacher']}"
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
    columns = ("model", "trained on, tokens", "perplexity", "KL to teacher, nats/token", "top-1 agreement")
    return Table(title, columns, rows, verdict(results["scores"]))


def verdict(scores: list[dict]) -> str:
    """Whether each stage brought a run's student nearer to its teacher, and beyond a count of words."""
    by_name = {score["name"]: score for score in scores}
    stages = [by_name[name] for name in ("converted", *STAGES) if name in by_name]
    if len(stages) < 2 or "unigram model" not in by_name:
        return ""
    fell = all(a["kl"] > b["kl"] for a, b in pairwise(stages))
    below = stages[-1]["perplexity"] < by_name["unigram model"]["perplexity"]
    first = "KL falls at every stage" if fell else "KL does NOT fall at every stage"
    return f"{first}; the student is {'below' if below else 'NOT below'} a unigram model"


def interval(ratio: Sequence[float] | None) -> str:
    return "-" if ratio is None else f"{percent(ratio[0], 0)}% [{percent(ratio[1], 0)}, {percent(ratio[2], 0)}]"


def benchmark_table(rows: list[dict]) -> Table:
    """Models down, tasks across; each task's main metric."""
    main = [row for row in rows if row.get("main", True) and not row["metric"].startswith(("share_", "same_"))]
    tasks = list(dict.fromkeys((row["task"], row["metric"]) for row in main))
    models = list(dict.fromkeys(row["model"] for row in main))
    by_place = {(row["model"], row["task"], row["metric"]): row for row in main}
    lines = []
    for model in models:
        cells, ratios, above = [model], ["  of the teacher"], ["  above chance"]
        for task in tasks:
            row = by_place.get((model, *task))
            error = "" if row is None or row["stderr"] is None else f" ± {percent(row['stderr'])}"
            cells.append("-" if row is None else f"{percent(row['value'])}{error}")
            ratios.append(interval(row and row.get("ratio")))
            above.append(interval(row and row.get("ratio_above_chance")))
        lines.append(tuple(cells))
        if model != "teacher" and any(cell != "-" for cell in ratios[1:]):
            lines += [tuple(ratios), tuple(above)]
    chances = {(row["task"], row["metric"]): row["chance"] for row in main}
    lines.append(("random chance", *(percent(chances[task]) for task in tasks)))
    items = {(row["task"], row["metric"]): row["items"] for row in main}
    columns = ("model", *(f"{task}, {metric} ({items[task, metric]:,})" for task, metric in tasks))
    return Table("Benchmarks, % (items)", columns, lines)


def letter_tables(rows: list[dict]) -> list[Table]:
    """What letters do to the answers, for tasks asked in every order of the options."""
    tables = []
    for task in dict.fromkeys(row["task"] for row in rows if row["metric"] == "same_content"):
        mine = [row for row in rows if row["task"] == task]
        metrics = list(dict.fromkeys(row["metric"] for row in mine))
        values = {(row["model"], row["metric"]): row for row in mine}
        lines = [
            (model, *(percent(values[model, metric]["value"]) for metric in metrics))
            for model in dict.fromkeys(row["model"] for row in mine)
        ]
        lines.append(("random chance", *(percent(values[mine[0]["model"], metric]["chance"]) for metric in metrics)))
        names = [LETTER_COLUMNS.get(metric, metric.removeprefix("share_")) for metric in metrics]
        tables.append(Table(f"{task}: letters by generation, %", ("model", *names), lines, LETTERS))
    return tables


LETTER_COLUMNS = {"acc_generated": "right", "acc_rotated": "right, all orders", "same_content": "same content"}
LETTERS = (
    "Right with the options in their own order, and over all orders; share of each letter in the answers; share of "
    "answers that choose the same content in another order."
)


def needle_table(summary: list[dict]) -> Table:
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
    return Table(f"Needles found, % ({number} samples a cell)", ("task: model", *map(short, lengths)), rows)


def position_table(rows: list[dict]) -> Table:
    buckets = list(dict.fromkeys((row["start"], row["end"]) for row in sorted(rows, key=lambda row: row["start"])))
    cells = {(row["model"], row["start"]): row for row in rows}
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        for what in ("perplexity", "kl") if model != "teacher" else ("perplexity",):
            values = [cells.get((model, start), {}).get(what) for start, _ in buckets]
            shown = [
                "-" if value is None else f"{value:.1f}" if what == "perplexity" else f"{value:.3f}" for value in values
            ]
            lines.append((f"{model}: {'KL' if what == 'kl' else what}", *shown))
    columns = ("model", *(f"{short(start)}-{short(end)}" for start, end in buckets))
    return Table("Perplexity, and KL to the teacher in nats per token, by position", columns, lines)


def decode_table(rows: list[dict]) -> Table:
    contexts = sorted({row["context"] for row in rows})
    cells = {(row["model"], row["context"]): row for row in rows}
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [cells.get((model, context)) for context in contexts]
        lines.append((f"{model}: cache, MiB", *("-" if r is None else f"{r['cache_bytes'] / 2**20:.1f}" for r in mine)))
        lines.append((f"{model}: ms per token", *("-" if r is None else f"{r['ms_per_token']:.1f}" for r in mine)))
    where = f"{rows[0]['device']}, {rows[0]['dtype']}"
    return Table(f"Decoding one text, by tokens read before ({where})", ("model", *map(short, contexts)), lines)


# ---- pages -----------------------------------------------------------------------------------------------------------


def recipe_text(run: Path, results: dict) -> str:
    """The recipes of all runs, and, before each, those of the runs that it goes on from (`student.init`)."""
    found: dict[Path, str] = {}
    for folder in results["runs"] or [run]:
        chain: dict[Path, str] = {}
        path = recipe_folder(str(folder))
        while path is not None and path not in chain:
            chain[path] = (path / "recipe.yaml").read_text()
            path = recipe_folder(yaml.safe_load(chain[path])["student"]["init"])
        found |= dict(reversed(chain.items()))
    return "\n---\n".join(found.values())


def recipe_folder(source: str) -> Path | None:
    """The run in this folder, or whose stage it is; None for what is no folder, as the names of starts, or no run."""
    path = Path(source).expanduser()
    places = (path, path.parent) if path.is_dir() else ()
    return next((place for place in places if (place / "recipe.yaml").is_file()), None)


def last_stage(run: Path) -> Path | None:
    for name in reversed(STAGES):
        if (run / name / "config.json").is_file():
            return run / name
    return None


def card_metadata(run: Path, results: dict) -> str:
    """The YAML head of a Hugging Face model card, benchmarks as its model-index."""
    stage = last_stage(run)
    name = "" if stage is None else stage.name
    measured = [row for row in results.get("benchmarks", []) if row["model"] == name and row.get("main", True)]
    entries = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": row["task"], "type": row["task"]},
            "metrics": [{"type": row["metric"], "value": round(row["value"], 4), "name": row["metric"]}],
        }
        for row in measured
    ]
    head: dict = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["kda", "deltify"]}
    if "/" in str(results["teacher"]):
        head["base_model"] = results["teacher"]
    if entries:
        head["model-index"] = [{"name": run.name, "results": entries}]
    return yaml.safe_dump(head, sort_keys=False)


def data_url(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
