"""The recall curve: distances of answer tokens, oracles, reading in pieces, and the figures of a run."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import with_special_tokens
from figures import drawn_by, lines_of
from helpers import records, small_tokenizer, tiny_recipe
from torch import nn
from transformers import AutoModelForCausalLM

from deltify import convert, distill
from deltify.conversion.teacher import byte_tokenizer, random_teacher
from deltify.data.probes import Probe, make_probe, text_probes
from deltify.data.sparse_recall import HELDOUT_FACTS
from deltify.data.token_files import open_data
from deltify.evaluation import recall_curve as module
from deltify.evaluation.needles import NeedleMaker
from deltify.evaluation.plots import draw_recall, draw_training
from deltify.evaluation.recall_curve import measure_recall, needle_probe, recall_curve, recall_probes
from deltify.evaluation.settings import RecallSpec
from deltify.evaluation.tables import recall_table
from deltify.training.recall import DISTANCES, evaluate_recall, heldout_probes, recall_buckets

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = ["It rained all day. " * 500]


class Oracle(nn.Module):
    """A model that predicts the token `shift` tokens after the one that an answer repeats.

    It sees less than `window` tokens back. Its other predictions are uniform. It reads the documents in their order.
    """

    def __init__(self, probes: list[Probe], vocab_size: int, window: float = math.inf, shift: int = 0):
        super().__init__()
        self.probes, self.window, self.shift, self.cache = iter(probes), window, shift, None
        self.config, self.device = random_teacher("llama").config, torch.device("cpu")
        self.lm_head = nn.Linear(vocab_size, vocab_size, bias=False)
        self.lm_head.weight.data = 100 * torch.eye(vocab_size)

    def model(self, input_ids, past_key_values, use_cache):
        if past_key_values is not self.cache:  # the next document
            self.cache, self.seen, self.probe = past_key_values, 0, next(self.probes)
        probe, tokens = self.probe, input_ids.shape[1]
        assert input_ids[0].tolist() == probe.ids[self.seen : self.seen + tokens].tolist()
        hidden = torch.zeros(1, tokens, self.lm_head.in_features)
        for place, source in zip(probe.answers - 1 - self.seen, probe.sources + self.shift):
            if 0 <= place < tokens and place + self.seen + 1 - source < self.window:
                hidden[0, place, int(probe.ids[source])] = 1
        self.seen += tokens
        return SimpleNamespace(last_hidden_state=hidden)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def probes(tokenizer):
    make = NeedleMaker(tokenizer, answer_tokens=16)
    needles = [needle_probe(make("niah_single_1", 1024, index), tokenizer) for index in range(3)]
    return needles + text_probes(TEXTS, {1500: 2, 3000: 1}, tokenizer)


# ---- documents -------------------------------------------------------------------------------------------------------


def test_distances_are_from_the_repeated_token(tokenizer):
    text = "The code is 4711. " + "x" * 300 + " Which code? 4711"
    spans = [(slice(12, 16), slice(len(text) - 4, len(text)))]
    probe = make_probe("facts", text, spans, tokenizer)
    assert probe.sources.tolist() == [12, 13, 14, 15] and set(probe.distances) == {len(text) - 16}
    assert tokenizer.decode(probe.ids[probe.answers]) == tokenizer.decode(probe.ids[probe.sources]) == "4711"
    cut = make_probe("facts", text, spans, tokenizer, len(text) - 10)
    assert len(cut.ids) == len(text) - 10 and cut.sources.tolist() == [2, 3, 4, 5]
    assert set(cut.distances) == {len(text) - 16}
    assert not len(make_probe("facts", text, spans, tokenizer, len(text) - 20).answers)  # the statement is cut off
    begun = with_special_tokens(byte_tokenizer(), end=True)
    probe = make_probe("facts", text, spans, begun, len(text) - 10)
    assert len(probe.ids) == len(text) - 10 and probe.ids[0] == begun.bos_token_id
    assert begun.decode(probe.ids[probe.answers]) == begun.decode(probe.ids[probe.sources]) == "4711"


def test_only_equal_tokens_at_equal_places_count():
    tokenizer = small_tokenizer()  # it joins " the" and "1234"
    text = "see the 1234, then 91234 and the 1234"
    whole = make_probe("facts", text, [(slice(4, 12), slice(29, 37))], tokenizer)
    assert [tokenizer.decode([token]) for token in whole.ids[whole.answers]][-1].endswith("1234")
    assert whole.ids[whole.answers].tolist() == whole.ids[whole.sources].tolist()
    assert len(whole.answers) >= 2
    shifted = make_probe("facts", text, [(slice(8, 12), slice(19, 23))], tokenizer)  # "1234" and "9123"
    assert not len(shifted.answers)
    slow = SimpleNamespace(is_fast=False)
    with pytest.raises(ValueError, match="Use the fast tokenizer of the model"):
        make_probe("facts", text, [], slow)


def test_documents_have_the_length_and_facts_of_other_kinds(tokenizer, probes):
    assert [len(p.ids) for p in probes] == [1024 - 16 + 8] * 3 + [1500, 1500, 3000]  # a space and seven digits
    for probe in probes:
        assert np.array_equal(probe.ids[probe.answers], probe.ids[probe.sources]) and (probe.distances > 0).all()
        assert (np.diff(probe.answers) > 0).all()
    for probe in probes[:3]:
        assert tokenizer.decode(probe.ids[probe.answers]).isdigit() and len(probe.answers) == 7
    again = text_probes(TEXTS, {1500: 2, 3000: 1}, tokenizer)
    assert [p.fingerprint for p in again] == [p.fingerprint for p in probes[3:]]
    assert len({p.fingerprint for p in probes}) == 6
    kinds = [template for _, *ways in HELDOUT_FACTS.values() for template in ways[0]]
    text = tokenizer.decode(probes[-1].ids)
    assert any(all(part in text for part in kind.replace("{who}", "{what}").split("{what}")) for kind in kinds)
    assert text_probes(["Too short.", ""], {1500: 2}, tokenizer) == text_probes([], {1500: 2}, tokenizer) == []


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_a_model_that_copies_scores_zero(tokenizer, probes):
    buckets = recall_curve(Oracle(probes, len(tokenizer)), probes, piece=128)
    distances = np.concatenate([probe.distances for probe in probes])
    assert [bucket.distance for bucket in buckets] == [
        low for low in DISTANCES if ((distances >= low) & (distances < 2 * low)).any()
    ]
    assert sum(bucket.tokens for bucket in buckets) == (distances >= 128).sum()
    for bucket in buckets:
        assert bucket.log_prob == pytest.approx(0, abs=1e-6) and bucket.right == 1
    wrong = recall_curve(Oracle(probes, len(tokenizer), shift=1), probes)
    assert all(bucket.right < 0.5 and bucket.log_prob < -10 for bucket in wrong)


def test_a_model_with_a_window_scores_chance_beyond_it(tokenizer, probes):
    buckets = recall_curve(Oracle(probes, len(tokenizer), window=512), probes)
    inside, beyond = ([b for b in buckets if (b.distance < 512) == near] for near in (True, False))
    assert inside and beyond
    assert all(bucket.log_prob == pytest.approx(0, abs=1e-6) for bucket in inside)
    assert all(bucket.log_prob == pytest.approx(-math.log(len(tokenizer)), abs=1e-4) for bucket in beyond)


def test_buckets_are_doublings_with_errors_over_documents():
    distances = [np.array([127, 128, 255]), np.array([200, 256, 10**6])]
    scores = [np.array([[-9.0, -1, -3], [0, 1, 0]]), np.array([[-5.0, -7, -8], [1, 0, 0]])]
    first, second, last = recall_buckets(distances, scores)
    assert (first.distance, first.tokens, first.documents) == (128, 3, 2) and first.log_prob == -3
    assert first.right == pytest.approx(2 / 3)
    # sums of the documents minus the mean times their tokens: -4 + 6 = 2 and -5 + 3 = -2
    assert first.log_prob_stderr == pytest.approx(math.sqrt((4 + 4) * 2) / 3)
    assert (second.distance, second.log_prob, second.log_prob_stderr) == (256, -7, None)
    assert (last.distance, last.log_prob, last.right) == (65536, -8, 0)


@pytest.mark.parametrize("kind", ["teacher", "K", "KF", "KS"])
def test_pieces_equal_whole_documents(kind, probes):
    probes = probes[2:4]
    teacher = random_teacher("llama", max_position_embeddings=4096, initializer_range=0.2)
    model = teacher.model if kind == "teacher" else convert(teacher, full_attention_layers=kind, init="library").eval()
    wanted = []
    for probe in probes:
        with torch.no_grad():
            log_p = model(torch.from_numpy(probe.ids)[None]).logits[0].float().log_softmax(-1)
        labels, places = (torch.from_numpy(x) for x in (probe.ids[probe.answers], probe.answers - 1))
        right = log_p[places].argmax(-1) == labels
        wanted.append(torch.stack([log_p[places, labels], right.float()]).numpy())
    wanted = recall_buckets([probe.distances for probe in probes], wanted)
    for piece in (193, None):
        buckets = recall_curve(model, probes, piece=piece)
        assert [(b.distance, b.tokens, b.documents, b.right) for b in buckets] == [
            (b.distance, b.tokens, b.documents, b.right) for b in wanted
        ]
        for got, want in zip(buckets, wanted):
            assert got.log_prob == pytest.approx(want.log_prob, abs=1e-4)
    if kind != "teacher":
        figures = evaluate_recall(model, probes, lambda: torch.autocast("cpu", enabled=False))
        assert figures["recall"] == pytest.approx(sum(b.log_prob for b in wanted) / len(wanted), abs=1e-4)


# ---- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_has_the_curve_at_each_validation(tmp_path, capsys):
    recipe = tiny_recipe(tmp_path)
    recipe = replace(recipe, run=replace(recipe.run, heldout_tokens=10240, heldout_sequence_length=64))
    run = distill(recipe)
    lines = records(run)
    validated = [line for line in lines if "heldout_kl" in line]
    assert len(validated) == 5 and [line for line in lines if "recall" in line] == validated
    teacher = random_teacher("llama")
    _, heldout = open_data(recipe.data, recipe.teacher.model, teacher.tokenizer, 10240, 64)
    probes = heldout_probes(heldout, 32, 10240, teacher.tokenizer)
    assert [len(probe.ids) for probe in probes] == [512] * 4
    for line, stage in ((validated[0], "converted"), (validated[2], "align"), (validated[-1], "match")):
        assert line["stage"] == stage
        buckets = recall_curve(AutoModelForCausalLM.from_pretrained(run / stage, dtype=torch.float32), probes)
        for bucket in buckets:
            assert line[f"recall_logprob_{bucket.distance}"] == pytest.approx(bucket.log_prob, abs=1e-4)
            assert line[f"recall_right_{bucket.distance}"] == pytest.approx(bucket.right)
        assert line["recall"] == pytest.approx(sum(b.log_prob for b in buckets) / len(buckets), abs=1e-4)
        assert sum(key.startswith("recall_") for key in line) == 2 * len(buckets)
    assert f", recall {validated[-1]['recall']:.2f}" in capsys.readouterr().out
    _, figure = drawn_by(draw_training, run, {"teacher": "random:llama"})
    lines = lines_of(figure.axes[2])
    assert lines["mean of distances"][1] == [line["recall"] for line in validated]
    assert lines["from 128 tokens"][1] == [line["recall_logprob_128"] for line in validated]


def test_the_documents_of_a_run_fit_into_a_fifth_of_the_validation(tmp_path):
    recipe = tiny_recipe(tmp_path)
    teacher = random_teacher("llama")
    _, heldout = open_data(recipe.data, recipe.teacher.model, teacher.tokenizer, 65536, 64)

    def lengths(sequence_length: int, heldout_tokens: int) -> list[int]:
        return [len(p.ids) for p in heldout_probes(heldout, sequence_length, heldout_tokens, teacher.tokenizer)]

    assert lengths(2048, 65536) == [2048] * 2 + [8192]
    assert lengths(8192, 65536) == [8192]
    assert lengths(8192, 16384) == [3276]
    assert lengths(32, 2**30) == [512] * 8 + [2048] * 4
    assert lengths(2048, 10239) == []


def test_scores_on_file_are_reused(tmp_path, tokenizer, probes, monkeypatch):
    student = convert(random_teacher("llama"), init="library").eval()
    path, read, lines = tmp_path / "recall.jsonl", [], []
    read_probe = module.read_probe
    monkeypatch.setattr(module, "read_probe", lambda *args: read.append(args[1]) or read_probe(*args))
    rows = measure_recall(student, probes, path, name="student", log=lines.append)
    assert len(read) == len(probes) == len(path.read_text().splitlines()) and len(lines) == 2
    path.write_text(path.read_text()[:-40])  # a cut line is measured again
    assert measure_recall(student, probes, path, name="student") == rows and len(read) == len(probes) + 1
    for task in ("niah_single_1", "facts"):
        wanted = recall_curve(student, [probe for probe in probes if probe.task == task])
        assert [(row["distance"], row["log_prob"]) for row in rows if row["task"] == task] == [
            (bucket.distance, pytest.approx(bucket.log_prob)) for bucket in wanted
        ]
    read.clear()
    with torch.no_grad():
        student.model.norm.weight.mul_(2)
    assert measure_recall(student, probes, path, name="student") != rows and len(read) == len(probes)
    assert json.loads(path.read_text().splitlines()[0])["model"] == "student"


def test_the_documents_of_an_evaluation(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHORTEST", 1024)  # a byte is a token
    (tmp_path / "rain.txt").write_text(TEXTS[0])
    made = recall_probes(tokenizer, RecallSpec(max_tokens=3000, samples=2, haystack=str(tmp_path / "rain.txt")))
    found = {(probe.task, len(probe.ids)) for probe in made}
    needles = [1024 - 16 + 8, 2048 - 16 + 8, 3000 - 16 + 8]
    wanted = {("facts", length) for length in (1024, 2048, 3000)}
    assert found == wanted | {(task, length) for task in module.NEEDLE_TASKS for length in needles}
    assert len(made) == 2 * len(found)
    for wrong in ({"max_tokens": 100}, {"max_tokens": 100_000}, {"samples": 0}):
        with pytest.raises(ValueError, match="choose"):
            RecallSpec(**wrong)


def test_table_and_figure_have_a_cell_for_each_distance(tmp_path):
    bucket = {"tokens": 9, "documents": 2, "right_stderr": 0.1}
    rows = [
        {"model": model, "task": task, "distance": distance, "log_prob": -number, "log_prob_stderr": error, **bucket}
        | {"right": 0.25}
        for number, (model, task, distance, error) in enumerate(
            [("teacher", "facts", 128, 0.1), ("teacher", "facts", 4096, None), ("a", "facts", 128, 0.2)]
            + [("teacher", "niah_single_1", 256, 0.1)]
        )
    ]
    table = recall_table(rows)
    assert list(table.columns) == ["task: model", "from 128", "from 256", "from 4k"]
    assert [tuple(row) for row in table.rows] == [
        ("facts: teacher", "0.00 (25)", "-", "-1.00 (25)"),
        ("facts: a", "-2.00 (25)", "-", "-"),
        ("niah_single_1: teacher", "-", "-3.00 (25)", "-"),
    ]
    paths, figure = drawn_by(draw_recall, rows, tmp_path / "recall", trained=2048)
    assert all(path.is_file() for path in paths)
    facts, needles = figure.axes
    assert lines_of(facts)["teacher"] == ([128, 4096], [0, -1]) and lines_of(facts)["a"] == ([128], [-2])
    assert lines_of(needles)["teacher"] == ([256], [-3]) and facts.get_xscale() == "log"
