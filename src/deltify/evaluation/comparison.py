"""Three numbers that compare a student with its teacher, all from results.json.

They are the share of the teacher's score above chance, memory and time of decoding, and how far back needles are found.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CONTEXT = 32768  # tokens of context at which memory and speed are compared, if they were measured there
FOUND = 0.9  # fraction of needles that counts as finding them
FLAGS = {  # flags of `deltify evaluate` that measure the three numbers
    "kept": "--tasks hellaswag,arc_easy,piqa",
    "cost": "--contexts 1024,8192,32768",
    "recall": "--needles niah_single_1,niah_single_2 --lengths 1024,4096,16384",
}


@dataclass(frozen=True)
class Absent:
    """A number that is not there.

    Args:
        why: Sentence that says why.
        command: Command that measures it, or an empty text.
    """

    why: str
    command: str = ""


@dataclass(frozen=True)
class Kept:
    """How much of the teacher's score above chance a student keeps.

    Args:
        share: Points above chance of the student, of all tasks that count, divided by the teacher's.
        interval: 95% interval of the share.
        points: Points above chance of student and teacher in each task that counts, as fractions.
        ratios: Ratio of the points in each of these tasks, and its 95% interval.
        left_out: Tasks that do not count, and why.
    """

    share: float
    interval: tuple[float, float]
    points: dict[str, tuple[float, float]]
    ratios: dict[str, tuple[float, float, float]]
    left_out: dict[str, str]


@dataclass(frozen=True)
class Cost:
    """Memory of the context and time per token, of student and teacher each.

    Args:
        context: Tokens of context.
        cache_bytes: Bytes of the cache, of student and teacher.
        ms: Milliseconds per token, of student and teacher.
        device: Device and dtype.
        cuda_graph: Whether a CUDA graph decoded the student's tokens.
    """

    context: int
    cache_bytes: tuple[int, int]
    ms: tuple[float, float]
    device: str
    cuda_graph: bool

    @property
    def memory(self) -> float:
        """Fraction of the teacher's memory that the student needs."""
        return self.cache_bytes[0] / self.cache_bytes[1]

    @property
    def speed(self) -> float:
        """Speed of the student, divided by the teacher's."""
        return self.ms[1] / self.ms[0]


@dataclass(frozen=True)
class Recall:
    """How far back a student finds needles.

    Args:
        length: Longest length at which the student finds `FOUND` of the needles, or None.
        teacher_length: The same of the teacher. None, too, if it was not measured.
        curve: Fraction of the needles that the student finds, by length.
        teacher_curve: The same of the teacher. Empty if it was not measured.
        tasks: Tasks that count.
        left_out: Tasks of which the teacher does not find `FOUND` of the needles at any length.
        asked: Number of the student's samples in the tasks that count, or in all tasks if none counts.
        none_found: Whether the student found nothing in any of these samples.
    """

    length: int | None
    teacher_length: int | None
    curve: dict[int, float]
    teacher_curve: dict[int, float]
    tasks: list[str]
    left_out: list[str]
    asked: int
    none_found: bool


def share_kept(results: dict, student: str) -> Kept | Absent:
    """Return the share of the teacher's score above chance that a student keeps.

    Tasks in which the teacher is not clearly above chance do not count: there, nothing can be kept. Tasks without
    choices have a chance of zero. The interval takes the tasks as independent.
    """
    rows = [row for row in results.get("benchmarks", []) if row.get("main", True)]
    mine = {row["task"]: row for row in rows if row["model"] == student}
    teacher = {row["task"]: row for row in rows if row["model"] == "teacher"}
    if not mine:
        return not_measured(results, student, "kept")
    if not teacher:
        return no_teacher(results, student)
    if not any("ratio_above_chance" in row for row in mine.values()):
        return Absent("The benchmarks did not run to their end. Run:", run_again(results, student))
    ratios, left_out = {}, {}
    for task, row in mine.items():
        if not row.get("fraction", True):
            left_out[task] = "its score is no fraction of right answers"
        elif "ratio_above_chance" not in row:
            left_out[task] = "its evaluation was stopped"
        elif not (ratio := row.get("ratio_above_chance")):
            left_out[task] = "the teacher is not clearly above chance"
        elif task not in teacher or teacher[task]["items"] != row["items"]:
            left_out[task] = "the teacher was measured with other items"
        else:
            ratios[task] = tuple(ratio)
    if not ratios:
        return Absent(
            f"No task counts: {reasons_of(left_out)}. Measure more items or easier tasks, such as hellaswag, arc_easy "
            "and piqa."
        )
    points = {}
    for task in ratios:
        chance = mine[task]["chance"] or 0.0
        points[task] = mine[task]["value"] - chance, teacher[task]["value"] - chance
    ours, theirs = (sum(side) for side in zip(*points.values()))
    weights = {task: points[task][1] / theirs for task in ratios}
    below, above = (
        sum((weights[task] * (ratio[side] - ratio[0])) ** 2 for task, ratio in ratios.items()) ** 0.5 for side in (1, 2)
    )
    share = ours / theirs
    return Kept(share, (share - below, share + above), points, ratios, left_out)


def decoding_cost(results: dict, student: str) -> Cost | Absent:
    """Return memory and time per token after `CONTEXT` tokens, or after the most that both models were measured at."""
    rows = {(row["model"], row["context"]): row for row in results.get("decode", [])}
    contexts = {name: {context for model, context in rows if model == name} for name in (student, "teacher")}
    if not contexts[student]:
        return not_measured(results, student, "cost")
    if not contexts["teacher"]:
        return no_teacher(results, student)
    if not (common := contexts[student] & contexts["teacher"]):
        return Absent("Student and teacher have no context in common. Run:", run_again(results, student, FLAGS["cost"]))
    context = CONTEXT if CONTEXT in common else max(common)
    ours, theirs = rows[student, context], rows["teacher", context]
    return Cost(
        context,
        (ours["cache_bytes"], theirs["cache_bytes"]),
        (ours["ms_per_token"], theirs["ms_per_token"]),
        f"{ours['device']}, {ours['dtype']}",
        ours.get("cuda_graph", only_kda(results, student) and ours["device"] not in ("cpu", "mps")),
    )


def only_kda(results: dict, student: str) -> bool:
    """Return whether all layers of a student are KDA. In results without `cuda_graph`, such students had graphs."""
    layers = next((row["layers"] for row in results.get("students", []) if row["name"] == student), "")
    return bool(layers) and all(part.endswith(" of KDA") for part in layers.split(", "))


def needles_found(results: dict, student: str) -> Recall | Absent:
    """Return how far back a student finds needles.

    Tasks count of which the teacher finds `FOUND` of the needles at one length or more. If the teacher was not
    measured, all count. Only lengths at which all of these tasks were measured count.
    """
    rows = results.get("needles", [])
    mine, teacher = ([row for row in rows if row["model"] == name] for name in (student, "teacher"))
    if not mine:
        return not_measured(results, student, "recall")
    able = {row["task"] for row in teacher if row["score"] >= FOUND}
    measured = list(dict.fromkeys(row["task"] for row in mine))
    tasks = [task for task in measured if task in able or not teacher]
    counted = [row for row in mine if row["task"] in (tasks or measured)]
    curve, teacher_curve = (found_by_length(side, tasks) for side in (mine, teacher))
    return Recall(
        longest(curve),
        longest(teacher_curve),
        curve,
        teacher_curve,
        tasks,
        [task for task in measured if task not in tasks],
        sum(row["items"] for row in counted),
        not any(row["score"] for row in counted),
    )


def found_by_length(rows: list[dict], tasks: Sequence[str]) -> dict[int, float]:
    """Return the fraction of needles found by length, where all of the tasks were measured."""
    curve = {}
    for length in sorted({row["length"] for row in rows}):
        here = [row for row in rows if row["length"] == length and row["task"] in tasks]
        if here and len(here) == len(tasks):
            curve[length] = sum(row["score"] * row["items"] for row in here) / sum(row["items"] for row in here)
    return curve


def longest(curve: dict[int, float]) -> int | None:
    """Return the longest length at which `FOUND` of the needles are found."""
    return max((length for length, found in curve.items() if found >= FOUND), default=None)


def not_measured(results: dict, student: str, number: str) -> Absent:
    """Return that a number was not measured, and the command that measures it."""
    return Absent("Not measured. Run:", run_again(results, student, FLAGS[number]))


def no_teacher(results: dict, student: str) -> Absent:
    """Return that a measure lacks the teacher, and how to name one if the evaluation had none."""
    why = "The teacher was not measured, so there is nothing to compare with."
    if results.get("teacher"):
        return Absent(why)
    return Absent(f"{why} Run:", run_again(results, student, "--teacher TEACHER"))


def run_again(results: dict, student: str, flags: str = "") -> str:
    """Return the last command of the evaluation with more flags. A common report has no such command."""
    lines = str(results.get("command", "")).splitlines() or [""]
    command, several = lines[-1], results.get("combined", len(lines) > 1 and "weights" not in results)
    if not command.startswith("deltify evaluate ") or several:
        folders = [run for run in results.get("runs", []) if Path(run).name == student]
        command = f"deltify evaluate {folders[0] if folders else 'FOLDER'} ..."
    return f"{command} {flags}".rstrip()


def reasons_of(left_out: dict[str, str]) -> str:
    """Return tasks by the reason for which they do not count."""
    groups: dict[str, list[str]] = {}
    for task, reason in left_out.items():
        groups.setdefault(reason, []).append(task)
    return "; ".join(f"{reason} in {listed(tasks)}" for reason, tasks in groups.items())


def listed(names: Sequence[str]) -> str:
    """Return names as a list in a sentence."""
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)
