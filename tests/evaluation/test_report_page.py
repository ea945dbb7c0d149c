"""report.html: its charts, and how it looks and works in a browser."""

import base64
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from browser import open_browser

from deltify import report
from deltify.evaluation import plots
from deltify.evaluation.charts import heat_maps
from deltify.evaluation.svg import Axis, Line, Look, bar_chart, line_chart, log_ticks, ticks

LONG = "hybrid-of-a-name-that-is-far-too-long-for-a-line-of-a-telephone-and-then-some<b>"
MODELS = ("teacher", "teacher, window 64", "kda & only", LONG)
LENGTHS = (1024, 4096, 16384)


def write_results(folder: Path) -> Path:
    """Write results.json of two students with every measure, and metrics.jsonl; return the folder."""
    students = [
        {"name": "kda & only", "layers": "30 layers of KDA", "parameters": 1_000_000, "tokens": 5_000_000},
        {"name": LONG, "layers": "2 layers of KDA, 1 layers of full attention", "parameters": 900_000, "tokens": 0},
    ]
    benchmarks = []
    for task, chance, ratio in (("arc_easy", 0.25, [0.8, 0.75, 0.85]), ("mmlu_of_all_kinds_of_questions", 0.25, None)):
        for model in ("teacher", "kda & only"):
            row = {"model": model, "task": task, "metric": "acc", "value": 0.65 if model == "teacher" else 0.57}
            row |= {"stderr": 0.01, "items": 1000, "chance": chance, "main": True}
            benchmarks.append(row if model == "teacher" else row | {"ratio": ratio, "ratio_above_chance": ratio})
    found = {"teacher": (1, 1, 0), "teacher, window 64": (0, 0, 0), "kda & only": (1, 0.5, 0), LONG: (1, 1, 1)}
    needles = [
        {"model": m, "task": task, "length": length, "score": y * able, "stderr": 0.1 * able, "items": 16}
        for task, able in (("niah_single_1", 1.0), ("niah_multikey_3", 0.0))
        for m, scores in found.items()
        for length, y in zip(LENGTHS, scores)
    ]
    needle_rows = [
        {"model": row["model"], "task": row["task"], "length": row["length"], "depths": [25, 75], "hits": [1, 0]}
        for row in needles
        if row["score"]
    ]
    positions = [
        {"model": m, "start": start, "end": end, "tokens": 100, "documents": 2, "perplexity": 20.0 + number}
        | {"loss": 3.0, "loss_stderr": 0.1, "kl": None if end > 4096 else 0.1 * number, "kl_stderr": 0.01}
        for number, m in enumerate(MODELS)
        for start, end in ((0, 128), (128, 4096), (4096, 16384))
    ]
    recall = [
        {"model": m, "task": "facts", "distance": distance, "log_prob": -1.5, "log_prob_stderr": 0.1, "right": 0.5}
        for m in MODELS
        for distance in (128, 256)
    ]
    decode = [
        {
            "model": m,
            "context": c,
            "cache_bytes": 2**20 * size,
            "ms_per_token": 5.0,
            "device": "cpu",
            "dtype": "float32",
        }
        for c in (1024, 8192)
        for m, size in (("teacher", c // 64), ("kda & only", 2))
    ]
    scores = [{"name": m, "perplexity": 20.0, "kl": 0.2, "top1": 0.8, "tokens": 0} for m in ("teacher", "kda & only")]
    results = {
        "teacher": "a-teacher",
        "runs": ["runs/kda & only"],
        "trained_length": 4096,
        "device": "cpu",
        "dtype": "float32",
        "versions": {"python": "3.11"},
        "command": "deltify evaluate a\ndeltify evaluate b " + "--a-long-flag " * 20,
        "date": "2026-11-29",
        "seconds": 12.0,
        "heldout_tokens": 1024,
        "heldout_sequence_length": 128,
        "scores": scores,
        "students": students,
        "samples": {"teacher": ["Once upon a time"], "kda & only": ["To open <b>a file</b>"]},
        "benchmarks": benchmarks,
        "needles": needles,
        "needle_rows": needle_rows,
        "recall": recall,
        "positions": positions,
        "decode": decode,
    }
    (folder / "results.json").write_text(json.dumps(results))
    records = [{"stage": "converted", "step": 0, "tokens": 0, "heldout_kl": 2.0}]
    records += [
        {"stage": "match", "step": n, "tokens": 1000 * n, "loss": 1 / n, "heldout_kl": 1 / n, "recall": -2.0}
        | {"recall_logprob_512": -2.0}
        for n in range(1, 700)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """The page of a report. Its PNG figures are tested elsewhere and left out."""
    folder = write_results(tmp_path_factory.mktemp("report"))

    def save(figure, stem):
        import matplotlib.pyplot as plt

        plt.close(figure)
        return [Path(f"{stem}.png")]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save", save)
        return report(folder)[0]


@pytest.fixture(scope="module")
def tab(page, tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


def show(tab, page: Path, width: int, *, dark: bool = False) -> None:
    tab.look(width=width, dark=dark)
    tab.open(page.resolve().as_uri())


# ---- without a browser -----------------------------------------------------------------------------------------------


def test_the_page_is_one_small_file_with_the_verdict_of_each_student(page):
    html = page.read_text()
    assert len(html) < 1_000_000 and "http" not in html and "<img" not in html and "src=" not in html
    assert "This student does not replace its teacher: it finds" not in html
    assert "This student can replace its teacher, with limits: it keeps 80\u00a0% of the benchmark scores" in html
    assert "No verdict yet: benchmark scores are missing; memory and speed are" in html
    assert "the teacher is not clearly above chance in mmlu_of_all_kinds_of_questions" in html
    assert "No model finds a needle in niah_multikey_3 (a table of zeros)" in html
    assert "<b>" not in html and "kda &amp; only" in html  # names and samples are text, not HTML
    markdown = page.with_name("report.md").read_text()
    assert "| Share of the teacher's benchmark scores kept | 80 % | fair |" in markdown
    assert "![Needles in haystacks: needles](needles.png)" in markdown


def test_lines_are_drawn_where_their_values_are():
    looks = {"teacher": Look(0), "a": Look(2, dashed=True)}
    lines = [Line("teacher", [(1, 0, 0, "low <"), (4, 100, 50, "high")]), Line("a", [(2, 50, 0, "half")])]
    x, y = Axis("x", (1, 2, 4), log=True), Axis("y", (0, 50, 100))
    root = ElementTree.fromstring(line_chart("title", lines, looks, x, y, trained=2, rule=90))
    groups = root.findall("g")
    assert [g.get("data-model") for g in groups] == ["teacher", "a"]
    assert groups[1].get("class") == "model line-2 dashed"
    (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in groups[0].find("polyline").get("points").split())
    hits = groups[0].findall("circle")
    assert [hit.find("title").text for hit in hits] == ["low <", "high"] and float(hits[0].get("cx")) == x1
    half = groups[1].find("circle")
    assert float(half.get("cx")) == pytest.approx((x1 + x2) / 2, abs=0.1)  # 2 is the middle of 1 and 4
    assert float(half.get("cy")) == pytest.approx((y1 + y2) / 2, abs=0.1) and y2 < y1
    error = groups[0].find("line")
    assert float(error.get("y1")) == pytest.approx((y1 + y2) / 2, abs=0.1)
    (trained,) = (line for line in root.findall("line") if line.get("class") == "trained")
    assert trained.get("x1") == half.get("cx")
    texts = [text.text for text in root.findall("text")]
    assert texts == ["y", "x", "0", "50", "100", "1", "2", "4"]


def test_bars_are_as_long_as_their_values():
    bars = [("one", 0.5, (0.4, 0.6), "50 %"), ("two", 1.0, (0.8, 1.25), "100 %"), ("three", -0.1, (-0.3, 0.1), "-10 %")]
    root = ElementTree.fromstring(bar_chart("title", bars))
    widths = [float(bar.get("width")) for bar in root.findall("rect")]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.2) and widths[2] == 1  # nothing, but visible
    assert root.find("rect/title").text == "one: 50 %, 95 % interval 40% to 60%"


@pytest.mark.parametrize(
    "found, expected",
    [
        (ticks(0, 100), [0, 20, 40, 60, 80, 100]),
        (ticks(-2.3, 0), [-2.5, -2, -1.5, -1, -0.5, 0]),
        (ticks(0, 0), [0, 0.2]),
        (log_ticks(22, 720), [20, 50, 100, 200, 500, 1000]),
        (log_ticks(0.0018, 0.83), [0.001, 0.01, 0.1, 1]),
        (log_ticks(5, 5), [5, 10]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(found, expected):
    assert found == pytest.approx(expected)


def test_heat_maps_leave_out_models_that_find_nothing():
    row = {"task": "t", "length": 1024, "depths": [50, 50], "hits": [1, 0]}
    rows = [
        row | {"model": "a"},
        row | {"model": "b", "hits": [0, 0]},
        row | {"model": "a", "length": 2048, "depths": []},
    ]
    (shown,) = heat_maps(rows)
    assert (shown.name, shown.columns, shown.rows) == ("a", ["1k", "2k"], [("50", [0.5, None])])


# ---- in a browser ----------------------------------------------------------------------------------------------------

NUMBERS = "[...document.querySelectorAll('.headline:not([hidden]) .number')]"
CONTRAST = """(() => {
  const light = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).map((x) => x / 255).map(
      (x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    const color = getComputedStyle(node).backgroundColor;
    return color === "rgba(0, 0, 0, 0)" ? behind(node.parentElement) : color;
  };
  return [...document.querySelectorAll(
    ".verdict, .label span, .value, .sentence, figcaption, .about, td, th, summary, .legend span, svg text"
  )].filter((node) => node.getClientRects().length && !node.closest(".heat")).map((node) => {
    const style = getComputedStyle(node), color = node.closest("svg") ? style.fill : style.color;
    const [dark, bright] = [light(color), light(behind(node))].sort((a, b) => a - b);
    return [(bright + 0.05) / (dark + 0.05), node.className.baseVal ?? node.className, node.textContent];
  }).sort((a, b) => a[0] - b[0])[0];
})()"""


@pytest.mark.parametrize("width, height", [(1280, 800), (390, 844)])
@pytest.mark.parametrize("dark", [False, True])
def test_the_first_screen_holds_the_verdict_and_three_numbers(tab, page, width, height, dark):
    show(tab, page, width, dark=dark)
    assert tab.run("document.documentElement.scrollWidth") <= width == tab.run("innerWidth")
    assert "with limits: it keeps 80\u00a0%" in tab.run("document.querySelector('.verdict').innerText")
    numbers = tab.run(f"{NUMBERS}.map((n) => [n.innerText, n.getBoundingClientRect().bottom])")
    shown = ("80\u00a0%", "1.6\u00a0% of the memory, 1.0 times the speed", "1k tokens")
    assert len(numbers) == 3 and all(text in number for text, (number, _) in zip(shown, numbers))
    assert max(bottom for _, bottom in numbers) <= height
    assert tab.run("document.querySelectorAll('.headline:not([hidden]) .trio svg').length") == 3
    contrast, *where = tab.run(CONTRAST)
    assert contrast >= 4.5, where
    paper = tab.run("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") != dark
    assert set(tab.log) == {page.resolve().as_uri()}  # no errors, nothing fetched


@pytest.mark.parametrize("width", [1280, 390])
def test_folded_parts_open_without_widening_the_page(tab, page, width):
    show(tab, page, width)
    folded = tab.run("[...document.querySelectorAll('details')].map((d) => [d.open, d.innerText.length])")
    assert len(folded) == 3 and not any(is_open for is_open, _ in folded)
    tab.run("document.querySelectorAll('summary').forEach((s) => s.click())")
    opened = tab.run("[...document.querySelectorAll('details')].map((d) => [d.open, d.innerText.length])")
    assert all(is_open for is_open, _ in opened) and all(b > a + 20 for (_, a), (_, b) in zip(folded, opened))
    assert tab.run("document.documentElement.scrollWidth") <= width


def test_students_models_and_points_answer_clicks(tab, page):
    show(tab, page, 1280)
    shown = "[...document.querySelectorAll('.headline')].map((h) => !h.hidden)"
    assert tab.run(shown) == [True, False]
    tab.run("document.querySelectorAll('.students button')[1].click()")
    assert tab.run(shown) == [False, True]
    assert "Run: deltify evaluate" in tab.run(f"{NUMBERS}[0].innerText.replace(/\\s+/g, ' ')")

    lines = (
        "[...document.querySelectorAll('.charts g[data-model=\"teacher\"]')].filter((g) => g.getClientRects().length)"
    )
    before = tab.run(f"{lines}.length")
    tab.run(
        "[...document.querySelectorAll('#section-3 .legend button')].find((b) => b.innerText === 'teacher').click()"
    )
    assert tab.run(f"{lines}.length") == before - 1  # in this section only

    tab.run("document.querySelector('#section-3 g:not(.off) .hit').dispatchEvent(new Event('pointerenter'))")
    assert "of 16 samples" in tab.run("document.getElementById('tip').innerText")
    assert tab.run("document.getElementById('tip').hidden") is False
    tab.run("document.querySelector('#section-3 g:not(.off) .hit').dispatchEvent(new Event('pointerleave'))")
    assert tab.run("document.getElementById('tip').hidden") is True


def test_paper_shows_all_students_and_folded_tables_in_light_colours(tab, page):
    show(tab, page, 1280, dark=True)
    count = "document.querySelectorAll('details:not([open], .listing)').length"
    tab.run(f"addEventListener('beforeprint', () => {{ folded = {count} }})")
    pdf = base64.b64decode(tab.call("Page.printToPDF", preferCSSPageSize=True)["data"])
    assert pdf.startswith(b"%PDF") and tab.run("folded") == 0
    assert tab.run("document.querySelectorAll('details[open]').length") == 0  # as before
    tab.call("Emulation.setEmulatedMedia", media="print")
    tab.call("Emulation.setDeviceMetricsOverride", width=703, height=1000, deviceScaleFactor=1, mobile=False)  # A4
    try:
        assert tab.run("document.documentElement.scrollWidth") <= 703
        assert tab.run("[...document.querySelectorAll('.headline')].every((h) => h.getClientRects().length)")
        assert tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    finally:
        tab.call("Emulation.setEmulatedMedia", media="")
