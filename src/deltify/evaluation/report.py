"""Reports of results.json: tables in the terminal, report.html, report.md, figures, and a model card."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..training.history import trained_model
from ..utils.console import console
from ..utils.files import write_text
from ..utils.folders import saved_stages
from ..utils.formats import flat
from .card import Layouts, card_metadata, last_stage, recipes_of, runs_of, teacher_facts
from .charts import (
    Charts,
    cost_chart,
    decode_charts,
    kept_chart,
    looks_of,
    needle_charts,
    position_charts,
    recall_chart,
    recall_charts,
    training_charts,
)
from .comparison import FOUND, Absent, Kept
from .headline import REPLACES, Headline, headlines
from .pages import render
from .plots import draw_by_length, draw_by_position, draw_decode_cost, draw_heat_map, draw_recall, draw_training
from .svg import Look
from .tables import (
    Table,
    benchmark_table,
    decode_table,
    heldout_table,
    letter_tables,
    needle_tables,
    position_table,
    recall_table,
)

BASELINES = {"teacher", "unigram model", "bigram model"}  # names that all evaluations share


@dataclass(frozen=True)
class Section:
    """A section of the report.

    Args:
        title: Heading.
        text: Paragraph below the heading.
        tables: Tables.
        pictures: PNG files, for pages that cannot hold charts. Each has an SVG file of the same name beside it.
        charts: What report.html shows instead.
    """

    title: str
    text: str = ""
    tables: list[Table] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)
    charts: Charts | None = None


@dataclass(frozen=True)
class Screen:
    """The first screen of a student: what `headline` says of it, and a chart for each number that there is."""

    headline: Headline
    charts: list[Markup | None]
    looks: dict[str, Look]
    facts: dict[str, Any]


def report(run: str | Path) -> list[Path]:
    """Print the tables of an evaluation, write its pages, and return their paths.

    The pages are report.html (one file that needs no network), report.md with figures, and README.md in the folder of
    the run's last stage, a model card for the Hugging Face hub.

    Args:
        run: Folder with results.json.

    Raises:
        FileNotFoundError: If the folder has no results.json.
        ValueError: If models of the run were trained further after they were measured.
    """
    run = Path(run)
    results = read_results(run)
    check_current(run, results)
    measured = make_sections(run, results)
    sections = measured + make_export_sections(run)
    screens = make_screens(results)
    for section in sections:
        for table in section.tables:
            console.print(table.rich())
    for name, texts in results.get("samples", {}).items():
        console.print(f"\nSamples of [bold]{name}[/]")
        for text in texts:
            console.print(f"  {flat(text)!r}", highlight=False, markup=False)

    facts = {"name": run.name, "results": results, "sections": sections, "recipe": recipe_text(run, results)}
    facts |= {"screens": screens, "comparison": comparison(screens)}
    pages = [run / "report.html", run / "report.md"]
    for path in pages:
        path.write_text(render(path.name, **facts), encoding="utf-8")
    if (stage := last_stage(run)) is not None:
        pages.append(stage / "README.md")
        card = render_card(run, stage.name, results, measured, teacher_facts(str(results["teacher"])), Layouts("PATH"))
        pages[-1].write_text(card, encoding="utf-8")
    for screen in screens:
        console.print(f"\n[bold]{screen.headline.student}[/]: {screen.headline.verdict}", highlight=False)
        for card in screen.headline.cards:
            number = f"{card.value}. " if card.value else ""
            text = f"  {card.label}: {number}{card.sentence} {card.command}".rstrip()
            console.print(text, highlight=False, markup=False, soft_wrap=True)
    console.print(f"\nreport: {', '.join(map(str, pages))}", highlight=False, soft_wrap=True)
    return pages


def combine(folders: Sequence[str | Path], output: str | Path) -> Path:
    """Merge the results.json of several evaluations into the folder `output`, and return it.

    Measures that several evaluations have, such as those of the teacher, are taken from the first.

    Raises:
        FileNotFoundError: If a folder has no results.json.
        ValueError: If evaluations differ in teacher, device, dtype, held-out text or the settings of a measure, if they
            call two models by one name, if a model was trained further between them, or if `output` is one of them.
    """
    output = Path(output)
    if output.resolve() in [Path(folder).resolve() for folder in folders]:
        raise ValueError(
            f"{output} is one of the evaluations, whose results would be overwritten. Name another folder."
        )
    parts = [read_results(folder) for folder in folders]
    for key in ("teacher", "device", "dtype", "heldout_tokens", "heldout_sequence_length"):
        if len(values := {str(part.get(key)) for part in parts}) > 1:
            raise ValueError(
                f"The evaluations differ in {key}: {', '.join(sorted(values))}. Repeat them with equal settings."
            )
    if len(texts := {part.get("heldout_digest") for part in parts} - {None}) > 1:
        raise ValueError(f"The evaluations have {len(texts)} different held-out texts. Repeat them with one text.")
    check_names(parts)
    check_settings(parts)
    whole: dict = {}
    for part in parts:
        for key, value in part.items():
            if isinstance(value, list) and value and isinstance(value[0], dict):
                known = set(map(row_identity, whole.get(key, [])))
                whole[key] = whole.get(key, []) + [row for row in value if row_identity(row) not in known]
            elif key in ("samples", "settings", "weights"):
                whole[key] = value | whole.get(key, {})
            elif key not in whole:
                whole[key] = value
    whole["runs"] = list(dict.fromkeys(run for part in parts for run in part["runs"]))
    whole["trained_length"] = max((part["trained_length"] or 0 for part in parts), default=0) or None
    whole["seconds"] = round(sum(part["seconds"] for part in parts), 1)
    whole["command"], whole["combined"] = "\n".join(part["command"] for part in parts), True
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "results.json", json.dumps(whole, indent=1))
    return output


def check_current(run: Path, results: dict) -> None:
    """Raise ValueError if a model of a run was trained further after it was measured."""
    stages = saved_stages(run)
    if not stages or not (run / "recipe.yaml").is_file():
        return
    folders = {name: run / name for name in stages} | {run.name: run / stages[-1]}
    measured = {row["name"]: row["tokens"] for key in ("students", "scores") for row in results.get(key, [])}
    has_last = bool({run.name, stages[-1]} & measured.keys())
    if measured and not has_last and max(measured.values()) < trained_model(run / stages[-1]).tokens:
        raise ValueError(
            f"{run / 'results.json'} has no measurements of {stages[-1]}, the last stage. Run: deltify evaluate {run}"
        )
    for name in (measured.keys() & folders.keys()) - BASELINES:
        then, now = measured[name], trained_model(folders[name]).tokens
        if then not in (0, now):  # 0 may also mean that it was not known
            raise ValueError(
                f"{run / 'results.json'} was measured when {name} had been trained on {then:,} tokens. Now it has "
                f"{now:,}. Run: deltify evaluate {run}"
            )


def check_settings(parts: list[dict]) -> None:
    """Raise ValueError if evaluations took different texts or numbers of items for the same measure."""
    then: dict[str, dict] = {}
    for settings in (part.get("settings", {}) for part in parts):
        for measure, values in settings.items():
            if not same_settings(then.setdefault(measure, values), values):
                raise ValueError(
                    f"The evaluations differ in the settings of {measure}: {then[measure]} and {values}. Repeat them "
                    "with equal settings."
                )
    items: dict[str, int] = {}
    for row in (row for part in parts for row in part.get("benchmarks", [])):
        if items.setdefault(row["task"], row["items"]) != row["items"]:
            raise ValueError(
                f"{row['task']} was measured on {items[row['task']]:,} and on {row['items']:,} items. Repeat the "
                "evaluations with one --limit."
            )


def same_settings(some: dict, others: dict) -> bool:
    """Return whether settings are equal, as far as both are known: the hash of a text may be missing."""
    unknown = set() if "text" in some and "text" in others else {"text"}
    return all(some.get(key) == others.get(key) for key in (some.keys() | others.keys()) - unknown)


def check_names(parts: list[dict]) -> None:
    """Raise ValueError if two evaluations have models of one name from different runs, or with different weights."""
    run_of: dict[str, str] = {}
    for part in parts:
        runs = part["runs"] or [""]
        for name in {row["name"] for key in ("scores", "students") for row in part.get(key, [])} - BASELINES:
            run = next((run for run in runs if Path(run).name == name), runs[0])
            if run_of.setdefault(name, run) != run:
                raise ValueError(
                    f"{run_of[name]} and {run} both have a model called {name!r}. Evaluate each with --no-stages, "
                    "which calls models by their runs, or rename a folder"
                )
    weights: dict[str, str] = {}
    for name, value in (pair for part in parts for pair in part.get("weights", {}).items()):
        if weights.setdefault(name, value) != value:
            raise ValueError(
                f"{name} has other weights in one evaluation than in another (fingerprints {weights[name]} and {value})"
                ". Repeat the evaluations with the same weights"
            )


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


def make_screens(results: dict) -> list[Screen]:
    """Return the first screen of each student."""
    looks, screens = looks_of(results), []
    for headline, student in zip(headlines(results), results.get("students", [])):
        name = headline.student
        kept, cost, recall = headline.kept, headline.cost, headline.recall
        drawn = [
            None if isinstance(kept, Absent) else kept_chart(kept),
            None if isinstance(cost, Absent) else cost_chart(results, name, looks),
            None if isinstance(recall, Absent) or not recall.curve else recall_chart(recall, name, looks),
        ]
        shown = {model: look for model, look in looks.items() if model in ("teacher", name)} if any(drawn[1:]) else {}
        screens.append(Screen(headline, drawn, shown, student))
    return screens


def comparison(screens: list[Screen]) -> Table | None:
    """Return the table of all students and their numbers, or None if there is one student."""
    if len(screens) < 2:
        return None
    rows = []
    for headline in (screen.headline for screen in screens):
        kept, *others = (card.value or "not known" for card in headline.cards)
        if isinstance(headline.kept, Kept):
            kept = f"{kept} ({(n := len(headline.kept.points))} task{'s' * (n > 1)})"
        rows.append((headline.student, REPLACES[headline.grade], kept, *others))
    labels = ("replaces its teacher", "scores kept", "memory and speed", f"context with {100 * FOUND:.0f} % of needles")
    return Table("All students", ("student", *labels), rows, text=True)


def make_sections(run: Path, results: dict) -> list[Section]:
    """Return the sections of a report in their order, and draw their figures."""
    trained, looks = results["trained_length"], looks_of(results)
    sections = []
    if "scores" in results:
        sections.append(Section("Held-out text", tables=[heldout_table(results)]))
    if "benchmarks" in results:
        rows = results["benchmarks"]
        sections.append(Section("Benchmarks", BENCHMARKS, [benchmark_table(rows), *letter_tables(rows)]))
    if "needles" in results:
        pictures = [draw_by_length(results["needles"], run / "needles", trained=trained)[0]]
        pictures += [draw_heat_map(results["needle_rows"], run / "needles-by-depth", trained=trained)[0]]
        drawn = needle_charts(results, looks, trained)
        sections.append(Section("Needles in haystacks", NEEDLES, needle_tables(results["needles"]), pictures, drawn))
    if "recall" in results:
        pictures = [draw_recall(results["recall"], run / "recall", trained=trained)[0]]
        drawn = recall_charts(results["recall"], looks, trained)
        sections.append(Section("Recall by distance", RECALL, [recall_table(results["recall"])], pictures, drawn))
    if "positions" in results:
        pictures = [draw_by_position(results["positions"], run / "positions", trained=trained)[0]]
        drawn = position_charts(results["positions"], looks, trained)
        tables = [position_table(results["positions"])]
        sections.append(Section("Curves by position", POSITIONS, tables, pictures, drawn))
    if results.get("decode"):
        pictures = [draw_decode_cost(results["decode"], run / "decode")[0]]
        drawn = decode_charts(results["decode"], looks)
        sections.append(Section("Decoding", "", [decode_table(results["decode"])], pictures, drawn))
    if (run / "metrics.jsonl").is_file():
        pictures = [draw_training(run, results)[0]]
        sections.append(Section("Training", pictures=pictures, charts=training_charts(run)))
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
    table = Table("Programs and commands", ("program", "command"), commands, text=True)
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


# ---- pages -----------------------------------------------------------------------------------------------------------


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
    return "\n---\n".join(recipes_of(runs_of(run, results or {})).values())
