"""Curves by position against plain computation, the cost of decoding, and the controls."""

import math
from itertools import pairwise

import pytest
import torch
from figures import drawn_by, lines_of
from torch import nn

from deltify import convert
from deltify.conversion.student import sliding_control
from deltify.conversion.teacher import random_teacher
from deltify.evaluation import positions
from deltify.evaluation.controls import equal_window, layer_state_bytes, make_controls, zero_state_every
from deltify.evaluation.decode_cost import decode_cost
from deltify.evaluation.plots import draw_by_position, draw_decode_cost
from deltify.evaluation.positions import by_position, position_edges
from deltify.inference.prefill import cache_bytes, key_value_bytes, prefill, read_pieces
from deltify.model.cache import new_cache

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def teacher():
    return random_teacher("llama", max_position_embeddings=300, initializer_range=0.2)


@pytest.fixture(scope="module")
def student(teacher):
    return convert(teacher, init="library").eval()


# ---- by position -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [64, 97, None])
def test_buckets_equal_whole_documents(piece, teacher, student):
    documents = [torch.randint(0, 250, (tokens,)) for tokens in (700, 300, 140)]
    rows = by_position({"student": student}, teacher.model, documents, piece=piece)
    assert [(row["start"], row["end"]) for row in rows if row["model"] == "student"] == [
        (0, 128),
        (128, 300),
        (300, 512),
        (512, 699),
    ]
    assert [row["end"] for row in rows if row["model"] == "teacher"] == [128, 300]
    with torch.no_grad():
        logs = [student(ids[None]).logits[0].log_softmax(-1) for ids in documents]
        wanted = [teacher.model(ids[None, :300]).logits[0].log_softmax(-1) for ids in documents]
    for row in rows:
        start, end = row["start"], row["end"]
        losses, kls = [], []
        for ids, log_q, log_p in zip(documents, logs, wanted):
            part = slice(start, min(end, len(ids) - 1))
            if part.start >= part.stop:
                continue
            own = log_q if row["model"] == "student" else log_p
            losses.append(-own[part].gather(1, ids[part.start + 1 : part.stop + 1, None]))
            kls.append((log_p[part].exp() * (log_p[part] - own[part])).sum(-1) if end <= 300 else None)
        loss = torch.cat(losses).mean().item()
        assert row["tokens"] == sum(map(len, losses)) and row["documents"] == len(losses)
        assert row["loss"] == pytest.approx(loss, abs=1e-4) and row["perplexity"] == pytest.approx(
            math.exp(row["loss"])
        )
        if end > 300:
            assert row["kl"] is None
        else:
            assert row["kl"] == pytest.approx(torch.cat(kls).mean().item(), abs=1e-4)
            assert (row["kl"] > 0.01) == (row["model"] == "student")


def test_standard_errors_are_over_documents(teacher, student):
    documents = [torch.randint(0, 250, (129,)) for _ in range(4)]
    row = by_position({"student": student}, teacher.model, documents)[1]
    alone = [by_position({"student": student}, teacher.model, [document])[1] for document in documents]
    for field in ("loss", "kl"):
        values = torch.tensor([other[field] for other in alone], dtype=torch.float64)
        assert row[field] == pytest.approx(values.mean().item(), abs=1e-5)
        assert row[f"{field}_stderr"] == pytest.approx(values.std().item() / 2, rel=1e-3)
        assert alone[0][f"{field}_stderr"] is None


def test_logits_exist_for_few_tokens(teacher, student, monkeypatch):
    sizes = []
    monkeypatch.setitem(positions.CHUNK_BYTES, "cpu", 4 * teacher.config.vocab_size * 50)
    with monkeypatch.context() as patch:
        for model in (teacher.model, student):
            head = model.lm_head.forward
            patch.setattr(model.lm_head, "forward", lambda x, head=head: sizes.append(len(x)) or head(x))
        rows = by_position({"student": student}, teacher.model, [torch.randint(0, 250, (290,))])
    assert max(sizes) == 50 and sum(sizes) == 2 * 289
    assert rows[-1]["tokens"] == 289 - 128


def test_edges_and_bad_documents(teacher, student):
    assert position_edges(5000) == [0, 128, 512, 1024, 2048, 4096, 5000]
    assert position_edges(1500, 300, 8192) == [0, 128, 300, 512, 1024, 1500]
    with pytest.raises(ValueError, match="at least two tokens"):
        by_position({}, teacher.model, [[1]])
    with pytest.raises(ValueError, match="cannot be named 'teacher'"):
        by_position({"teacher": student}, teacher.model, [[1, 2, 3]])
    rows = by_position({}, teacher.model, [list(range(200))], max_tokens=100)
    assert [row["tokens"] for row in rows] == [99]


# ---- cost of decoding ------------------------------------------------------------------------------------------------


def test_decode_cost_counts_bytes(teacher, student):
    lines = []
    models = {"teacher": teacher.model, "student": student}
    rows = decode_cost(models, [256, 40, 100], steps=3, log=lines.append)
    assert [(row["model"], row["context"]) for row in rows] == [
        (name, context) for name in models for context in (40, 100, 256)
    ]
    per_token = 4 * key_value_bytes(teacher.config, 4)
    assert [row["cache_bytes"] for row in rows[:3]] == [per_token * context for context in (40, 100, 256)]
    assert {row["cache_bytes"] for row in rows[3:]} == {4 * layer_state_bytes(student, 4)}
    assert all(0 < row["ms_per_token"] < 10_000 and row["dtype"] == "float32" for row in rows)
    assert len(lines) == 6 and lines[0].startswith("teacher at 40 tokens")


def test_decode_cost_refuses_and_survives(teacher, student, monkeypatch):
    with pytest.raises(ValueError, match="too close"):
        decode_cost({}, [100, 110], steps=8)
    with pytest.raises(ValueError, match="more than 4"):
        decode_cost({}, [4])
    with pytest.raises(ValueError, match="The text has 50 tokens\. 116 are needed"):
        decode_cost({}, [100], ids=range(50))
    forward = student.forward
    calls = []

    def fail(**kw):
        calls.append(1)
        if len(calls) > 4 + 3:
            raise torch.OutOfMemoryError("no more")
        return forward(**kw)

    monkeypatch.setattr(student, "forward", fail)
    lines = []
    rows = decode_cost({"student": student, "teacher": teacher.model}, [40, 100], steps=3, log=lines.append)
    assert [(row["model"], row["context"]) for row in rows] == [("student", 40), ("teacher", 40), ("teacher", 100)]
    assert "student runs out of memory before 100 tokens" in lines


# ---- controls --------------------------------------------------------------------------------------------------------


def hidden(model: nn.Module, ids: torch.Tensor, **kw) -> torch.Tensor:
    with torch.no_grad():
        return model.model(input_ids=ids, use_cache=False, **kw).last_hidden_state


def test_controls_are_models_beside_the_student(teacher, student):
    models = make_controls(teacher, student, window=16, chunk=32)
    with pytest.raises(ValueError, match="--no-controls"):
        make_controls(teacher, teacher.model)
    window = equal_window(teacher, student)
    names = ["teacher, window 16", f"teacher, window {window} (the states' bytes)", "student, state zeroed every 32"]
    assert list(models) == names
    ids = torch.randint(0, 250, (2, 200))
    wanted, own = hidden(teacher.model, ids), hidden(student, ids)
    for name, model in models.items():
        reference = wanted if name.startswith("teacher") else own
        got = hidden(model, ids)
        torch.testing.assert_close(got[:, :16], reference[:, :16], atol=1e-4, rtol=1e-4)
        assert (got - reference)[:, 60:].abs().mean() > 0.01, name
    rows = by_position(models, teacher.model, [ids[0]])
    assert {row["model"] for row in rows} == {"teacher", *names}
    assert all(torch.isfinite(torch.tensor(row["kl"])) for row in rows)


@pytest.mark.parametrize("element_bytes", [2, 4])
def test_the_equal_window_has_the_students_bytes(element_bytes, teacher, student):
    dtype = {2: torch.bfloat16, 4: torch.float32}[element_bytes]
    window = equal_window(teacher, student, 4, element_bytes)
    sizes = []
    for model in (student, sliding_control(teacher, window=window, sinks=4)):
        model = model.to(dtype)
        cache = new_cache(model)
        prefill(model, torch.randint(0, 250, (1, 400)), cache)
        sizes.append(cache_bytes(cache) // 4)
        model.float()
    assert sizes[0] == layer_state_bytes(student, element_bytes)
    # the window's cache also counts its tokens, 8 bytes a layer
    assert 0 <= sizes[0] - (sizes[1] - 8) < key_value_bytes(teacher.config, element_bytes)


def test_a_zeroed_state_is_a_new_document(student):
    model = zero_state_every(student, 24)
    ids = torch.randint(0, 250, (2, 100))
    want = torch.cat([hidden(student, part) for part in ids.split(24, 1)], 1)
    torch.testing.assert_close(hidden(model, ids), want, atol=1e-4, rtol=1e-4)
    for sizes in ([100], [7, 24, 1, 40, 28], [1] * 100, [24, 76]):
        cache = new_cache(model)
        parts = [next(read_pieces(model, part, cache, 100)) for part in ids.split(sizes, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), want, atol=1e-4, rtol=1e-4)
    assert (hidden(student, ids) - want).abs().mean() > 0.01
    pairs = zip(model.parameters(), student.parameters())
    assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)
    with pytest.raises(ValueError, match="chunk=0"):
        zero_state_every(student, 0)


def test_a_zeroed_state_with_padding(student):
    model = zero_state_every(student, 16)
    rows = [torch.randint(0, 250, (tokens,)) for tokens in (50, 33, 3)]
    padded, mask = torch.zeros(3, 50, dtype=torch.long), torch.zeros(3, 50, dtype=torch.long)
    for place, row in enumerate(rows):
        padded[place, 50 - len(row) :], mask[place, 50 - len(row) :] = row, 1
    got = hidden(model, padded, attention_mask=mask)
    for place, row in enumerate(rows):
        want = torch.cat([hidden(student, part[None]) for part in row.split(16)], 1)[0]
        torch.testing.assert_close(got[place, 50 - len(row) :], want, atol=1e-4, rtol=1e-4)
    cache = new_cache(model)
    with torch.no_grad():
        got = model.model(
            input_ids=padded, attention_mask=mask, past_key_values=cache, use_cache=True
        ).last_hidden_state
    cuts = range(0, 51 + 16, 16)  # of the padded rows: all rows begin anew together
    for place, row in enumerate(rows):
        first = 50 - len(row)
        parts = [padded[place, max(a, first) : min(b, 50)] for a, b in pairwise(cuts) if max(a, first) < min(b, 50)]
        want = torch.cat([hidden(student, part[None]) for part in parts], 1)[0]
        torch.testing.assert_close(got[place, first:], want, atol=1e-4, rtol=1e-4)


def test_attention_layers_of_a_hybrid_remember(teacher):
    hybrid = convert(teacher, init="library", full_attention_layers=[2]).eval()
    ids = torch.randint(0, 250, (1, 90))
    model = zero_state_every(hybrid, 16)
    got = hidden(model, ids)
    cache = new_cache(model)
    parts = list(read_pieces(model, ids, cache, 37))
    torch.testing.assert_close(torch.cat(parts, 1), got, atol=1e-4, rtol=1e-4)
    alone = torch.cat([hidden(hybrid, part) for part in ids.split(16, 1)], 1)
    assert (got - alone)[:, 40:].abs().mean() > 0.01  # attention sees beyond the chunk
    assert (got - hidden(hybrid, ids))[:, 40:].abs().mean() > 0.01  # KDA does not


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_pictures(teacher, student, tmp_path):
    rows = by_position({"student": student}, teacher.model, [torch.randint(0, 250, (400,)) for _ in range(2)])
    costs = decode_cost({"teacher": teacher.model, "student": student}, [32, 64], steps=2)
    paths, figure = drawn_by(draw_by_position, rows, tmp_path / "position", trained=128)
    assert [path.name for path in paths] == ["position.png", "position.svg"] and all(p.is_file() for p in paths)
    divergence, perplexity = figure.axes
    of_student = [row for row in rows if row["model"] == "student"]
    assert list(lines_of(divergence)) == ["student"] and list(lines_of(perplexity)) == ["teacher", "student"]
    known = [row["kl"] for row in of_student if row["kl"] is not None]
    assert lines_of(divergence)["student"][1] == known and len(known) == len(of_student) - 1
    assert lines_of(perplexity)["student"][1] == [row["perplexity"] for row in of_student]
    assert "2 documents" in figure.get_suptitle() and "Context window of the teacher: 300" in figure.get_suptitle()
    paths, figure = drawn_by(draw_decode_cost, costs, tmp_path / "cost")
    assert [path.name for path in paths] == ["cost.png", "cost.svg"] and all(p.is_file() for p in paths)
    for axis, field, unit in zip(figure.axes, ("cache_bytes", "ms_per_token"), (2**20, 1)):
        for model, (x, y) in lines_of(axis).items():
            of_model = [row for row in costs if row["model"] == model]
            assert x == [32, 64] and y == [row[field] / unit for row in of_model]
    with pytest.raises(ValueError, match="no rows"):
        draw_by_position([], tmp_path / "none")
