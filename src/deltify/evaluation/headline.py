"""The first screen of a report: three numbers of each student, and a verdict in words.

All numbers come from results.json. The words follow from the thresholds below, which docs/guides/evaluate.md lists.
"""

from dataclasses import dataclass, field

from ..utils.formats import short
from .comparison import (
    FOUND,
    Absent,
    Cost,
    Kept,
    Recall,
    decoding_cost,
    listed,
    needles_found,
    reasons_of,
    share_kept,
)
from .tables import amount

# least share of the teacher's score above chance, words for it, grade
KEPT = (
    (0.9, "nearly all", "good"),
    (0.7, "most", "fair"),
    (0.5, "more than half", "poor"),
    (0.2, "less than half", "poor"),
    (float("-inf"), "little or nothing", "poor"),
)
WIDEST = 0.4  # a share with a wider 95% interval gets no grade
LEAN, FAST = 0.25, 0.9  # most of the teacher's memory and least of its speed for the grade good
HEAVY, SLOW = 1.0, 0.5  # this much of the teacher's memory, or less than this much of its speed, is poor
LEAST = f"{100 * FOUND:.0f} %"
FAR, NEAR = 1.0, 0.25  # least length for the grades good and fair, as a fraction of the teacher's

VERDICTS = {
    "good": "This student can replace its teacher, as far as was measured",
    "fair": "This student can replace its teacher, with limits",
    "poor": "This student does not replace its teacher",
    "": "No verdict yet",
}
REPLACES = {"good": "yes, as far as was measured", "fair": "with limits", "poor": "no", "": "not known"}


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
    cards = [kept_card(kept), cost_card(cost), recall_card(recall)]
    grades = {card.grade for card in cards}
    worst = next(grade for grade in ("poor", "", "fair", "good") if grade in grades)
    reasons = [card.weakness for card in cards if card.grade == worst and worst != "good"]
    verdict = f"{VERDICTS[worst]}{': ' if reasons else ''}{'; '.join(reasons)}."
    return Headline(student, worst, verdict, cards, heldout_sentence(results, student), kept, cost, recall)


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


def cost_card(cost: Cost | Absent) -> Card:
    """Return the card of memory and speed."""
    if isinstance(cost, Absent):
        label, weakness = "Memory and speed against the teacher", "memory and speed are missing"
        return Card(label, "", "", cost.why, weakness, command=cost.command)
    memory, speed = cost.memory, cost.speed
    grade = "good" if memory <= LEAN and speed >= FAST else "poor" if memory >= HEAVY or speed < SLOW else "fair"
    of_memory, of_speed = f"{significant(100 * memory)} % of the memory", f"{significant(speed)} times the speed"
    at = f"{short(cost.context)} tokens"
    mib = [f"{amount(size / 2**20)} MiB" for size in cost.cache_bytes]
    ms = [f"{amount(time)} ms" for time in cost.ms]
    sentence = f"Context: {mib[0]}, the teacher's {mib[1]}. Time per token: {ms[0]}, the teacher's {ms[1]}."
    note = f"Memory of the context, without the weights. Batch size 1 on {cost.device}."
    if cost.cuda_graph:
        note += " The student decodes with a CUDA graph, the teacher without one. That is a part of the difference."
    weakness = f"it needs {of_memory} and has {of_speed}"
    return Card(f"Memory and speed at {at} of context", f"{of_memory}, {of_speed}", grade, sentence, weakness, note)


def recall_card(recall: Recall | Absent) -> Card:
    """Return the card of the longest length with `FOUND` of the needles."""
    label = f"Longest context with {LEAST} of the needles found"
    if isinstance(recall, Absent):
        return Card(label, "", "", recall.why, "needles are missing", command=recall.command)
    sentence, weakness = recall_words(recall)
    value = "" if not recall.curve else "none" if recall.length is None else f"{short(recall.length)} tokens"
    return Card(label, value, recall_grade(recall), sentence, weakness, recall_note(recall))


def recall_grade(recall: Recall) -> str:
    """Return the grade of a length beside the teacher's. Without a teacher, only finding nothing has a grade."""
    if not recall.curve:
        return ""
    if recall.none_found:
        return "poor"
    if recall.teacher_length is None:
        return ""
    ratio = (recall.length or 0) / recall.teacher_length
    return "good" if ratio >= FAR else "fair" if ratio >= NEAR else "poor"


def recall_words(recall: Recall) -> tuple[str, str]:
    """Return what a student finds, and what the verdict says of it."""
    nothing = f"It finds no needles: none of {recall.asked}." if recall.none_found else ""
    if not recall.tasks:
        weakness = "it finds no needles, and the teacher too few" if nothing else "the teacher finds too few needles"
        return f"{nothing} No task counts: the teacher finds too few needles.".strip(), weakness
    if not recall.curve:
        return f"{nothing} No length was measured with all tasks that count.".strip(), "needles are missing"
    teacher = "" if recall.teacher_length is None else f" The teacher: {short(recall.teacher_length)} tokens."
    if nothing:
        return nothing + teacher, "it finds no needles"
    if recall.length is None:
        best = max(recall.curve, key=lambda length: recall.curve[length])
        sentence = f"At most {whole_percent(recall.curve[best])}, at {short(best)} tokens.{teacher}"
        return sentence, f"it finds less than {LEAST} of the needles at every length"
    missed = [length for length in recall.curve if length < recall.length and recall.curve[length] < FOUND]
    parts = [f"Only {whole_percent(recall.curve[length])} at {short(length)}." for length in missed]
    parts += ["No longer texts were measured."] if recall.length == max(recall.curve) else []
    weakness = (
        f"the teacher finds less than {LEAST} of the needles at every length"
        if recall.teacher_curve
        else "needles of the teacher were not measured"
    )
    if recall.teacher_length is not None:
        weakness = (
            f"it finds {LEAST} of the needles at up to {short(recall.length)} tokens, the teacher at up to "
            f"{short(recall.teacher_length)}"
        )
    return f"{' '.join(parts)}{teacher}".strip(), weakness


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


def significant(value: float) -> str:
    """Return two significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.95 else f"{value:.2g}"


def whole_percent(fraction: float) -> str:
    """Return a fraction in percent, rounded down: 89.9 % must not look like 90 %."""
    return f"{int(100 * fraction + 1e-9)} %"
