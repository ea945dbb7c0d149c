"""`deltify watch`: what the page says of a run, how it is served, and how it looks in a browser."""

import json
import shutil
import socket
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from browser import open_browser
from helpers import records, tiny_recipe

from deltify.cli import main
from deltify.config import Stage, write_recipe
from deltify.evaluation import watch
from deltify.evaluation.progress import read_progress
from deltify.evaluation.svg import BOTTOM, HEIGHT, TOP, WIDTH
from deltify.evaluation.training_charts import draw_curves
from deltify.evaluation.watch import render_page, serving
from deltify.training import runner

STAGE = Stage(tokens=10 * 1000, sequence_length=100, batch_size=10)


def write_run(folder: Path, *lines: dict, **changes) -> Path:
    """Write the recipe and metrics of a run with ten steps of 1000 tokens in align and in match."""
    recipe = tiny_recipe(folder, align=STAGE, match=STAGE)
    recipe.folder.mkdir(parents=True)
    write_recipe(replace(recipe, **changes), recipe.folder / "recipe.yaml")
    (recipe.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return recipe.folder


def step(stage: str, number: int, **figures) -> dict:
    """Return the line of a step that took 2 seconds."""
    line = {"stage": stage, "step": number, "tokens": 1000 * number, "loss": 1.0 / number, "tokens_per_second": 500.0}
    return line | {"seconds": 2.0 * number, "time": time.time() - 1000 + number} | figures


CONVERTED = {"stage": "converted", "step": 0, "tokens": 0, "heldout_kl": 2.0, "heldout_perplexity": 99.0}
CONVERTED |= {"validation_seconds": 3.0, "time": 0.0}


def get(url: str, host: str | None = None) -> tuple[int, str]:
    """Return status and text of a page."""
    request = urllib.request.Request(url, headers={"Host": host} if host else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


# ---- progress --------------------------------------------------------------------------------------------------------


def test_time_left_counts_steps_and_validations_of_all_stages(tmp_path):
    progress = read_progress(write_run(tmp_path, CONVERTED, *(step("align", n) for n in range(1, 7))))
    align, match = progress.stages  # validations every 4 steps: after steps 4 and 8 and the last, 10
    assert (align.done, align.steps, align.measured, match.measured) == (6, 10, True, False)
    assert align.seconds_left == 4 * 2 + 2 * 3 and match.seconds_left == 10 * 2 * 2 + 3 * 3
    assert progress.seconds_left == 63 and progress.fraction == 12 / 75
    assert not progress.finished and progress.current is align


def test_a_stage_that_has_begun_is_timed_by_its_own_steps(tmp_path):
    lines = [CONVERTED, *(step("align", n) for n in range(1, 11)), step("match", 1, tokens_per_second=100.0)]
    progress = read_progress(write_run(tmp_path, *lines))
    assert progress.stages[1].seconds_left == 9 * 10 + 3 * 3
    assert progress.records[-1]["tokens"] == 11_000  # counted from the start of the run


@pytest.mark.parametrize(
    "lines, state, sentence",
    [
        ([], "starting", "is being converted"),
        ([CONVERTED, ("align", 3, 0)], "running", "align, step 4 of 10"),
        ([CONVERTED, ("align", 3, 1000)], "quiet", "has written nothing for 1"),
        ([CONVERTED, ("align", 10, 1000), ("match", 10, 1000)], "finished", ""),
    ],
)
def test_state_of_a_run(lines, state, sentence, tmp_path):
    # times count from here, not from when the tests were collected
    now = time.time()
    lines = [line if isinstance(line, dict) else step(*line[:2], time=now - line[2]) for line in lines]
    word, text = watch.state_of(read_progress(write_run(tmp_path, *lines)))
    assert word == state and sentence in text and bool(text) == bool(sentence)


def test_a_run_that_max_minutes_ended_says_how_to_continue(tmp_path):
    folder = write_run(tmp_path, CONVERTED, step("align", 3))
    (folder / "align").mkdir()
    (folder / "align" / "unfinished.json").write_text(json.dumps({"step": 3}))
    assert watch.state_of(read_progress(folder)) == (
        "stopped",
        f"--max-minutes ended it. Continue it with: deltify distill {folder}/recipe.yaml --resume",
    )
    (folder / "align" / "unfinished.json").write_text(json.dumps({"step": 2}))  # resumed since
    assert watch.state_of(read_progress(folder))[0] == "quiet"


def test_lines_without_newer_figures_and_half_written_ones_are_read(tmp_path):
    old = {"stage": "align", "step": 1, "tokens": 1000, "loss": 1.0, "tokens_per_second": 500.0, "seconds": 2.0}
    folder = write_run(tmp_path, old)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "align", "st')
    page = render_page(read_progress(folder), "x")
    assert "align, step 2 of 10" in page and "1,000" not in page and "Samples" not in page
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("\n" + json.dumps(step("align", 3)) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: .* is not a JSON object"):
        read_progress(folder)


def test_a_folder_that_is_no_run_is_refused_with_the_runs_in_it(tmp_path, capsys):
    write_run(tmp_path)
    for folder, said in (
        (tmp_path, f"has no recipe.yaml, so it is no run. Choose one of the runs in it: {tmp_path}/tiny"),
        (tmp_path / "absent", "so it is no run. Give the folder of a run, runs/NAME"),
    ):
        assert main(["watch", str(folder), "--port", "0"]) == 1
        assert said in capsys.readouterr().err


# ---- the page --------------------------------------------------------------------------------------------------------


def test_page_of_a_finished_run_copied_without_its_models(whole, tmp_path):
    for name in ("recipe.yaml", "run.json", "metrics.jsonl", "samples.jsonl"):
        shutil.copy(whole / name, tmp_path / name)
    page = render_page(read_progress(tmp_path), "x")
    last = records(whole)[-1]
    assert '<span class="state finished">finished</span>' in page and "time left" not in page
    assert f"{last['heldout_kl']:.3f}" in page and f"{last['loss']:.4g}" in page and "8 / 8" in page
    for title in ("KL to the teacher", "Training loss<", "Training loss of align", "Speed"):
        assert page.count(f"<figcaption>{title}") == 1
    for name in ("teacher", "converted", "align, step 4", "align, step 8", "match, step 4", "match, step 8"):
        assert page.count(f"<dt>{name}</dt>") == 4  # prompts
    assert page.index("match, step 8</dt>") < page.index("match, step 4</dt>") < page.index("converted</dt>")


def test_recall_memory_and_the_gpu_are_shown_where_they_were_measured(tmp_path):
    recall = {"recall": -3.0, "recall_logprob_128": -2.0, "recall_logprob_4096": -4.0, "recall_right_128": 0.5}
    memory = {"peak_memory_bytes": 3 * 2**30, "heldout_kl": 1.5, "heldout_perplexity": 50.0}
    folder = write_run(tmp_path, CONVERTED | recall, step("align", 1, **memory, **recall))
    about = {"device": "cuda", "precision": "bf16", "gpu": "NVIDIA H200", "gpu_memory_bytes": 140 * 2**30}
    (folder / "run.json").write_text(json.dumps(about))
    page = render_page(read_progress(folder), "x")
    assert "NVIDIA H200, bf16" in page and "of 140.0 GiB" in page and page.count("3.0 GiB") == 2
    assert "Recall by distance" in page and "from 128 tokens <b>-2</b>" in page and "from 4k tokens <b>-4</b>" in page


def test_text_of_a_model_is_never_markup(tmp_path):
    folder = write_run(tmp_path, CONVERTED)
    samples = [{"prompt": "a < b", "continuation": "<script>alert(1)</script>\n\n\nend\0"}]
    line = {"stage": "converted", "step": 0, "tokens": 0, "samples": samples}
    (folder / "samples.jsonl").write_text(json.dumps(line) + "\n")
    page = render_page(read_progress(folder), "x")
    assert "a &lt; b" in page and "&lt;script&gt;alert(1)&lt;/script&gt; end\ufffd" in page
    assert page.count("<script") == page.count('<script nonce="x">') == 1


def test_charts_place_points_in_the_picture_and_shorten_long_lines():
    wave = [(float(x), 1.5 + (-1) ** x) for x in range(1000)]
    root, last = drawn({"align": wave, "match": []})
    (group,) = root.findall("g")
    places = [tuple(map(float, place.split(","))) for place in group.find("polyline").get("points").split()]
    assert len(places) == 143 and all(0 <= x <= WIDTH and TOP <= y <= HEIGHT - BOTTOM for x, y in places)
    assert not group.findall("path") and last == {"align": "0.5"}
    assert {"nats", "0", "200", "800"} <= texts(root)

    steep, last = drawn({"align": [(0, 10.0), (1e6, 0.1)]})
    assert {"nats, logarithmic", "0.1", "1", "10", "1M"} <= texts(steep) and last == {"align": "0.1"}
    assert [tip.text for tip in steep.findall("g/circle/title")] == ["align, 0: 10", "align, 1M: 0.1"]
    broken, last = drawn({"align": [(0, 1.0), (1000, float("nan"))], "match": [(2000, float("inf"))]})
    assert len(broken.findall("g")) == 1 and last == {"align": "1"}  # training diverged
    for value, shown in ((0.0, {"0", "0.2"}), (-10.2, {"-15", "-10"})):  # a single validation
        assert {"training tokens"} | shown <= texts(drawn({"align": [(0, value)]})[0])


def test_a_line_begins_at_the_end_of_the_one_before():
    root, _ = drawn({"align": [(0, 4.0), (1000, 2.0)], "match": [(2000, 1.0)]}, joined=True)
    first, second = (group.find("polyline").get("points").split() for group in root.findall("g"))
    assert second[0] == first[-1] and len(second) == 2
    assert [len(group.findall("circle")) for group in root.findall("g")] == [2, 1]


def drawn(data: dict, **options):
    """Return a chart as XML, and the last values in its legend."""
    curves = draw_curves("loss", "nats", data, **options)
    return ElementTree.fromstring(curves.svg), curves.last


def texts(root) -> set[str]:
    return {text.text for text in root.findall("text")}


# ---- serving ---------------------------------------------------------------------------------------------------------


def test_server_answers_this_machine_only_and_shows_new_lines(tmp_path):
    folder = write_run(tmp_path, CONVERTED)
    with serving(folder) as url:
        assert url.startswith("http://127.0.0.1:")
        status, page = get(url)
        assert status == 200 and "0 / 10" in page
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(step("align", 2)) + "\n")
        assert "2 / 10" in get(url)[1]
        assert get(f"{url}recipe.yaml") == (404, "There is one page here: /")
        assert get(url, host="example.org")[0] == 403 and get(url, host="localhost:1")[0] == 200
        (folder / "metrics.jsonl").write_text("{\n{}\n")
        status, said = get(url)
        assert status == 500 and "line 1: '{' is not a JSON object" in said
    with pytest.raises(urllib.error.URLError):
        get(url)


def test_a_port_in_use_is_named(tmp_path, capsys):
    folder = write_run(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["watch", str(folder), "--port", str(port)]) == 1
    assert f"cannot listen on 127.0.0.1, port {port}" in capsys.readouterr().err


def test_watch_prints_the_address_and_ends_with_ctrl_c(tmp_path, capsys, monkeypatch):
    class Interrupted:
        def wait(self):
            raise KeyboardInterrupt

    @contextmanager
    def served(run, *, host, port):
        yield f"http://{host}:{port}/"

    folder = write_run(tmp_path)
    monkeypatch.setattr(watch, "serving", served)
    monkeypatch.setattr(watch.threading, "Event", Interrupted)
    assert main(["watch", str(folder)]) == 0
    assert "http://127.0.0.1:8010/" in capsys.readouterr().out


def test_distill_serves_the_page_before_the_folder_of_the_run_exists(tmp_path, capsys, monkeypatch):
    pages = []

    def distill(recipe, **_):
        assert not recipe.folder.exists()
        pages.append(get(capsys.readouterr().out.removeprefix("progress: ").strip()))

    monkeypatch.setattr(runner, "distill", distill)
    write_recipe(tiny_recipe(tmp_path), tmp_path / "recipe.yaml")
    assert main(["distill", str(tmp_path / "recipe.yaml"), "--dashboard"]) == 0
    ((status, page),) = pages
    assert status == 200 and "0 / 8" in page and "starting" in page


# ---- in a browser ----------------------------------------------------------------------------------------------------


def test_page_fits_desktop_and_phone_and_follows_the_run(whole, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:-1]))  # one step to go
    monkeypatch.setattr(watch, "REFRESH_SECONDS", 0.2)
    with serving(folder) as url, open_browser(tmp_path / "profile") as tab:
        inks = []
        for width, dark in ((1280, False), (390, True)):
            tab.look(width=width, dark=dark)
            tab.open(url)
            assert tab.run("document.documentElement.scrollWidth <= innerWidth"), width
            widths = tab.run("[...document.querySelectorAll('.chart > svg')].map(svg => svg.clientWidth)")
            assert len(widths) == 4 and min(widths) > 300
            size = "parseFloat(getComputedStyle(document.querySelector('.chart .tick')).fontSize)"
            assert tab.run(f"{size} * document.querySelector('.chart > svg').clientWidth / {WIDTH}") > 9
            inks.append(tab.run("getComputedStyle(document.body).color"))
        assert inks[0] != inks[1]  # light and dark
        tab.run("document.querySelector('details').open = true")
        metrics.write_text("".join(lines))
        tab.wait("document.querySelector('.state.finished')")  # without loading the page again
        assert tab.run("document.querySelector('details').open && document.body.className === ''")
        assert not [line for line in tab.log if not line.startswith(url)]  # no errors, nothing fetched from elsewhere
    assert "100 %" in render_page(read_progress(folder), "x")
