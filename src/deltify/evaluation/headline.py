"""The first screen of a report: three numbers of each student, and a verdict in words.

All numbers come from results.json. The words follow from the thresholds below, which docs/guides/evaluate.md lists.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .plots import short

# least share of the teacher's score above chance, words for it, grade
KEPT = (
    (0.9, "nearly all", "good"),
    (0.7, "most", "fair"),
    (0.5, "more than half", "poor"),
    (0.2, "less than half", "poor"),
    (float("-inf"), "little or nothing", "poor"),
)
WIDEST = 0.4  # a share with a wider 95% interval gets no grade
CONTEXT = 32768  # tokens of context at which memory and speed are compared, if they were measured there
LEAN, FAST = 0.25, 0.9  # most of the teacher's memory and least of its speed for the grade good
HEAVY, SLOW = 1.0, 0.5  # this much of the teacher's memory, or less than this much of its speed, is poor
FOUND = 0.9  # fraction of needles that counts as finding them
FAR, NEAR = 1.0, 0.25  # least length for the grades good and fair, as a fraction of the teacher's

VERDICTS = {
    "good": "This student can replace its teacher, as far as was measured",
    "fair": "This student can replace its teacher, with limits",
    "poor": "This student does not replace its teacher",
    "": "There is no full verdict",
}
REPLACES = {"good": "yes, as far as was measured", "fair": "with limits", "poor": "no", "": "not known"}
NO_TEACHER = "The teacher was not measured, so there is nothing to compare with."
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
    """

    context: int
    cache_bytes: tuple[int, int]
    ms: tuple[float, float]
    device: str

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


@dataclass(frozen=True)
class Card:
    """One of the three numbers, as it is shown.

    Args:
        label: What the number is.
        value: The number, or an empty text.
        grade: good, fair, poor, or an empty text if there is none.
        sentence: What the number means. If there is no number, why.
        weakness: What the verdict says of it, if the grade is not good.
        note: How it was measured.
        command: Command that measures it, if it was not measured.
    """

    label: str
    value: str
    grade: str
    sentence: str
    weakness: str
    note: str = ""
    command: str = ""


@dataclass(frozen=True)
class Headline:
    """What the first screen says of a student."""

    student: str
    grade: str
    verdict: str
    cards: list[Card]
    heldout: str
    kept: Kept | Absent = field(repr=False)
    cost: Cost | Absent = field(repr=False)
    recall: Recall | Absent = field(repr=False)


def headlines(results: dict) -> list[Headline]:
    """Return the headline of each student in results.json."""
    return [headline(results, student["name"]) for student in results.get("students", [])]


def headline(results: dict, student: str) -> Headline:
    """Return the three numbers of a student and the verdict.

    The worst grade decides. Without a poor grade, all three are needed.
    """
    kept, cost, recall = share_kept(results, student), decoding_cost(results, student), needles_found(results, student)
    cards = [kept_card(kept), cost_card(cost, only_kda(results, student)), recall_card(recall)]
    grades = {card.grade for card in cards}
    worst = next(grade for grade in ("poor", "", "fair", "good") if grade in grades)
    reasons = [card.weakness for card in cards if card.grade == worst and worst != "good"]
    verdict = f"{VERDICTS[worst]}{': ' if reasons else ''}{'; '.join(reasons)}."
    return Headline(student, worst, verdict, cards, heldout_sentence(results, student), kept, cost, recall)


# ---- the numbers -----------------------------------------------------------------------------------------------------


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
        return Absent(NO_TEACHER)
    if not any("ratio_above_chance" in row for row in mine.values()):
        return Absent("The benchmarks did not run to their end. Run:", run_again(results, student))
    ratios, left_out = {}, {}
    for task, row in mine.items():
        if not (ratio := row.get("ratio_above_chance")):
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
        return Absent(NO_TEACHER)
    if not (common := contexts[student] & contexts["teacher"]):
        return Absent("Student and teacher have no context in common. Run:", run_again(results, student, FLAGS["cost"]))
    context = CONTEXT if CONTEXT in common else max(common)
    ours, theirs = rows[student, context], rows["teacher", context]
    return Cost(
        context,
        (ours["cache_bytes"], theirs["cache_bytes"]),
        (ours["ms_per_token"], theirs["ms_per_token"]),
        f"{ours['device']}, {ours['dtype']}",
    )


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


def run_again(results: dict, student: str, flags: str = "") -> str:
    """Return the command of the evaluation with more flags.

    An evaluation replaces results.json, so the command keeps the earlier flags. A common report has no such command.
    """
    command = str(results.get("command", ""))
    if not command.startswith("deltify evaluate ") or "\n" in command:
        folders = [run for run in results.get("runs", []) if Path(run).name == student]
        command = f"deltify evaluate {folders[0] if folders else 'FOLDER'} ..."
    return f"{command} {flags}".rstrip()


def only_kda(results: dict, student: str) -> bool:
    """Return whether all layers of a student are KDA."""
    layers = next((row["layers"] for row in results.get("students", []) if row["name"] == student), "")
    return bool(layers) and all(part.endswith(" of KDA") for part in layers.split(", "))


# ---- the words -------------------------------------------------------------------------------------------------------


def kept_card(kept: Kept | Absent) -> Card:
    """Return the card of the share of the teacher that is kept."""
    label = "Share of the teacher's benchmark scores kept"
    if isinstance(kept, Absent):
        return Card(label, "", "", kept.why, "benchmark scores are missing", command=kept.command)
    share = round(kept.share, 2)  # what is shown decides
    words, grade = next((words, grade) for least, words, grade in KEPT if share >= least)
    sentence = f"It keeps {words} of the teacher's scores above chance."
    weakness = f"it keeps {100 * share:.0f} % of the benchmark scores above chance"
    low, high = kept.interval
    if high - low > WIDEST:
        grade, sentence = "", "Measured with too few items to be sure."
        weakness = "the benchmarks have too few items"
    ours, theirs = (100 * sum(points) for points in zip(*kept.points.values()))
    note = (
        f"{ours:.1f} of the teacher's {theirs:.1f} points above chance in {listed(list(kept.points))}. "
        f"95 % interval: {100 * low:.0f} to {100 * high:.0f} %."
    )
    if kept.left_out:
        note += f" Not counted: {reasons_of(kept.left_out)}."
    return Card(label, f"{100 * share:.0f} %", grade, sentence, weakness, note)


def cost_card(cost: Cost | Absent, captured: bool = False) -> Card:
    """Return the card of memory and speed.

    Args:
        cost: Result of `decoding_cost`.
        captured: Whether all layers are KDA, so that a CUDA GPU decodes with a CUDA graph.
    """
    if isinstance(cost, Absent):
        label, weakness = "Memory and speed against the teacher", "memory and speed are missing"
        return Card(label, "", "", cost.why, weakness, command=cost.command)
    memory, speed = cost.memory, cost.speed
    grade = "good" if memory <= LEAN and speed >= FAST else "poor" if memory >= HEAVY or speed < SLOW else "fair"
    of_memory, of_speed = f"{significant(100 * memory)} % of the memory", f"{significant(speed)} times the speed"
    at = f"{short(cost.context)} tokens"
    mib = [f"{size / 2**20:,.1f} MiB" for size in cost.cache_bytes]
    ms = [f"{time:.1f} ms" for time in cost.ms]
    sentence = f"Context: {mib[0]}, the teacher's {mib[1]}. Time per token: {ms[0]}, the teacher's {ms[1]}."
    note = f"Measured with batch size 1 on {cost.device}."
    if captured and cost.device.split(",")[0] not in ("cpu", "mps"):
        note += " The student decodes with a CUDA graph, the teacher without one. That is a part of the difference."
    weakness = f"it needs {of_memory} and has {of_speed}"
    return Card(f"Memory and speed at {at} of context", f"{of_memory}, {of_speed}", grade, sentence, weakness, note)


def recall_card(recall: Recall | Absent) -> Card:
    """Return the card of the longest length with `FOUND` of the needles."""
    label = f"Longest context with {100 * FOUND:.0f} % of the needles found"
    if isinstance(recall, Absent):
        return Card(label, "", "", recall.why, "needles are missing", command=recall.command)
    teacher = "" if recall.teacher_length is None else f" The teacher: {short(recall.teacher_length)} tokens."
    nothing = f"It finds no needles: none of {recall.asked}." if recall.none_found else ""
    if not recall.tasks:
        sentence = f"{nothing} No task counts: the teacher finds too few needles, too.".strip()
        return Card(label, "", "", sentence, "no needle task counts", recall_note(recall))
    grade = recall_grade(recall)
    if recall.length is None:
        best = max(recall.curve, key=lambda length: recall.curve[length], default=None)
        missed = "" if best is None else f"At most {whole_percent(recall.curve[best])}, at {short(best)} tokens."
        weakness = (
            "it finds no needles"
            if nothing
            else f"it finds less than {100 * FOUND:.0f} % of the needles at every length"
        )
        return Card(label, "none", grade, f"{nothing or missed}{teacher}".strip(), weakness, recall_note(recall))
    value = f"{short(recall.length)} tokens"
    missed = [length for length in recall.curve if length < recall.length and recall.curve[length] < FOUND]
    parts = [f"Only {whole_percent(recall.curve[length])} at {short(length)}." for length in missed]
    parts += ["No longer texts were measured."] if recall.length == max(recall.curve) else []
    weakness = "needles of the teacher are missing"
    if recall.teacher_length is not None:
        weakness = f"it finds needles in up to {value}, the teacher in up to {short(recall.teacher_length)}"
    return Card(label, value, grade, f"{' '.join(parts)}{teacher}".strip(), weakness, recall_note(recall))


def recall_grade(recall: Recall) -> str:
    """Return the grade of a length beside the teacher's. Without a teacher, only finding nothing has a grade."""
    if recall.none_found or (recall.length is None and recall.teacher_length is not None):
        return "poor"
    if recall.length is None or recall.teacher_length is None:
        return ""
    ratio = recall.length / recall.teacher_length
    return "good" if ratio >= FAR else "fair" if ratio >= NEAR else "poor"


def recall_note(recall: Recall) -> str:
    """Return what was measured."""
    text = "Needles are facts in a long text, which is followed by a question about them."
    if recall.tasks:
        text += f" Tasks: {listed(recall.tasks)}."
    if recall.left_out:
        text += f" Not counted, as the teacher finds too few needles: {listed(recall.left_out)}."
    if recall.teacher_length is not None and recall.teacher_length == max(recall.teacher_curve):
        text += " The teacher was not measured with longer texts."
    if not recall.teacher_curve and recall.tasks:
        text += " The teacher was not measured."
    return text


def heldout_sentence(results: dict, student: str) -> str:
    """Return perplexity and top-1 agreement on held-out text, or an empty text."""
    scores = {score["name"]: score for score in results.get("scores", [])}
    if student not in scores:
        return ""
    mine, teacher = scores[student], scores.get("teacher")
    compared = f" (teacher: {teacher['perplexity']:,.1f})" if teacher else ""
    text = f"On held-out text its perplexity is {mine['perplexity']:,.1f}{compared}"
    if mine["top1"] is not None:
        text += f", and its most likely next token is the teacher's for {100 * mine['top1']:.0f} % of the tokens"
    return f"{text}. This does not enter the verdict."


def reasons_of(left_out: dict[str, str]) -> str:
    """Return tasks by the reason for which they do not count."""
    groups: dict[str, list[str]] = {}
    for task, reason in left_out.items():
        groups.setdefault(reason, []).append(task)
    return "; ".join(f"{reason} in {listed(tasks)}" for reason, tasks in groups.items())


def listed(names: Sequence[str]) -> str:
    """Return names as a list in a sentence."""
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def significant(value: float) -> str:
    """Return two significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 0.95 else f"{value:.2g}"


def whole_percent(fraction: float) -> str:
    """Return a fraction in percent, rounded down: 89.9 % must not look like 90 %."""
    return f"{int(100 * fraction + 1e-9)} %"
