"""Measures of KDA heads: a head made by hand, the layer's own operator, and the files of the command."""

import json
import math

import numpy as np
import pytest
import torch
from figures import drawn_by
from helpers import tiny_recipe
from torch import nn

from deltify import convert, distill
from deltify.cli import main
from deltify.config import Stage
from deltify.conversion.attention import far_copies, measure_attention
from deltify.conversion.teacher import byte_tokenizer, random_teacher
from deltify.evaluation.inspection import draw_heads, read_sequences
from deltify.evaluation.kda_heads import (
    cosines_at_copies,
    effective_keys,
    inspect_heads,
    kda_layers,
    measure_layer,
    operator_inputs,
    values_left,
)
from deltify.model.mixers import DeltifyKDA
from deltify.ops import kda
from deltify.ops.reference import kda_reference, l2norm

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTH, HEADS = 16, 4  # of heads of the tiny model


@pytest.fixture(scope="module")
def student():
    return convert(random_teacher("llama"), full_attention_layers=[1], init="library").eval()


@torch.no_grad()
def made_by_hand(mixer: DeltifyKDA, half_lives: list[float], betas: list[float]) -> torch.Tensor:
    """Set heads of known half-life and beta, whose keys are the input's first channels, and return 2,048 inputs.

    The inputs are unit vectors in turn, so that a key returns after WIDTH tokens, and others are orthogonal to it.
    """
    for parameter in (mixer.q_proj.weight, mixer.k_proj.weight, mixer.f_proj[1].weight, mixer.b_proj.weight):
        parameter.zero_()
    for conv in (mixer.q_conv1d, mixer.k_conv1d):
        conv.weight.zero_()
        conv.weight[:, 0, -1] = 1
    for head, (half_life, beta) in enumerate(zip(half_lives, betas)):
        channels = slice(head * WIDTH, (head + 1) * WIDTH)
        for projection in (mixer.q_proj, mixer.k_proj):
            projection.weight[channels, :WIDTH] = 9 * torch.eye(WIDTH)
        mixer.A_log[head] = 0
        mixer.dt_bias[channels] = math.log(math.expm1(math.log(2) / half_life))
        mixer.b_proj.weight[head, :WIDTH] = math.log(beta / (1 - beta))
    return torch.eye(WIDTH, mixer.q_proj.in_features).repeat(2048 // WIDTH, 1)[None]


@torch.no_grad()
def test_a_head_made_by_hand_has_the_measures_that_it_was_made_with(student):
    mixer = convert(random_teacher("llama"), init="library").model.layers[0].self_attn
    half_lives, betas = [100.0, 1000.0, 1e6, 1e6], [0.1, 0.5, 0.01, 0.4]
    x = made_by_hand(mixer, half_lives, betas)
    measured = measure_layer(mixer, x, torch.tensor([[500, 1000], [165, 329]]))
    for head, (half_life, beta) in enumerate(zip(half_lives, betas)):
        assert math.log(2) / measured["rate"][head].mean() == pytest.approx(half_life, rel=0.02)  # 1e6: float32
        assert measured["beta_mean"][head] == pytest.approx(beta, rel=1e-5)
        assert measured["beta_median"][head] == pytest.approx(beta, rel=1e-5)
        assert measured["beta_strong"][head] == (beta > 0.3)
        for distance in (128, 512, 1024):
            wanted = 0.5 ** (distance / half_life) * (1 - beta) ** (distance // WIDTH)
            assert measured[f"left_{distance}"][head] == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    assert measured["effective_keys"][2:].tolist() == pytest.approx([WIDTH] * 2, rel=1e-3)
    # places 500 and 165 have keys 4 and 5, and 1000 and 329 keys 8 and 9: orthogonal; the tokens before match
    assert measured["cosine_copy"].tolist() == pytest.approx([0] * HEADS, abs=1e-5)
    assert measured["cosine_match"].tolist() == pytest.approx([2] * HEADS, rel=1e-5)
    equal = [sum(s % WIDTH == t % WIDTH for s in range(t + 1)) - 1 for t in (500, 1000)]
    assert measured["cosine_others"].tolist() == pytest.approx([equal[0] / 499 + equal[1] / 999] * HEADS, rel=1e-4)


def test_effective_keys_count_orthogonal_keys_and_not_equal_ones():
    tokens, width = 64, 32
    k = torch.stack([torch.eye(width)[torch.arange(tokens) % n] for n in (1, 4, 8)], 1)
    none, half = torch.zeros(tokens, 3, width), torch.full((tokens, 3), 0.5)
    assert effective_keys(k, none, half).tolist() == pytest.approx([1, 4, 8])
    assert effective_keys(k, none - 50, half).tolist() == pytest.approx([1, 1, 1])  # only the last key is held
    # beta 1/4 and 1 in turn: two keys of weights 1 and 4, 25 / 17
    beta = torch.tensor([0.25, 1.0]).repeat(tokens // 2)[:, None]
    pair = torch.eye(width)[torch.arange(tokens) % 2][:, None]
    assert effective_keys(pair, none[:, :1], beta).item() == pytest.approx(25 / 17)


@torch.no_grad()
def test_the_inputs_of_the_operator_are_those_of_the_layer(student):
    seen = {}

    def spy(*args, **options):
        seen.update(args=args, options=options)
        return kda(*args, **options)

    mixer = kda_layers(student)[-1]
    for bound in (None, -5.0):
        mixer.lower_bound = bound
        x_1TD = torch.randn(1, 50, mixer.q_proj.in_features)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("deltify.model.mixers.kda", spy)
            mixer(x_1TD)
        q, k, _, f, b, A_log, dt_bias = seen["args"]
        assert seen["options"]["lower_bound"] == bound and A_log is mixer.A_log and dt_bias is mixer.dt_bias
        for got, want in zip(operator_inputs(mixer, x_1TD), (q, k, f, b)):
            assert torch.allclose(got, want[0], atol=1e-6)
    mixer.lower_bound = None


@torch.no_grad()
@pytest.mark.parametrize("bound", [None, -0.1])
def test_what_is_left_is_the_product_of_decay_and_overwriting(student, bound):
    mixer = kda_layers(student)[0]
    mixer.lower_bound = bound
    tokens = 300
    _, k, f, b = operator_inputs(mixer, torch.randn(1, tokens, mixer.q_proj.in_features))
    b = b - 2
    got = values_left(mixer, k, f - 3, b)
    assert list(got) == [128]
    # a single value is written into an empty state and read by the definition of the operator, without other values
    starts = range(17, tokens - 128, 17)
    wanted = torch.zeros(len(starts), HEADS)
    for number, start in enumerate(starts):
        part = slice(start + 1, start + 129)
        state = l2norm(k[start])[None, :, :, None]
        empty = torch.zeros(1, 128, HEADS, 1)
        gates = (mixer.A_log, mixer.dt_bias, state, None, bound, 1.0)
        _, end = kda_reference(k[None, part], k[None, part], empty, f[None, part] - 3, b[None, part], *gates)
        wanted[number] = (end[0, :, :, 0] * l2norm(k[start])).sum(-1)
    assert torch.allclose(got[128], wanted.mean(0), atol=1e-5) and (got[128] > 1e-3).any()
    mixer.lower_bound = None


def test_cosines_are_summed_over_copies():
    q, k = (nn.functional.normalize(torch.randn(20, 2, 8), dim=-1) for _ in range(2))
    sums = cosines_at_copies(q, k, torch.tensor([[12, 19], [3, 7]]))
    for head in range(2):
        cosine = q[:, head] @ k[:, head].T
        assert sums["cosine_copy"][head] == pytest.approx(float(cosine[12, 3] + cosine[19, 7]), abs=1e-5)
        assert sums["cosine_match"][head] == pytest.approx(float(cosine[12, 2] + cosine[19, 6]), abs=1e-5)
        first = [float(cosine[12, s]) for s in range(13) if s not in (2, 3)]
        last = [float(cosine[19, s]) for s in range(20) if s not in (6, 7)]
        assert sums["cosine_others"][head] == pytest.approx(np.mean(first) + np.mean(last), abs=1e-5)
    empty = cosines_at_copies(q, k, torch.zeros(2, 0, dtype=torch.long))
    assert all(x.tolist() == [0, 0] for x in empty.values())


def test_sequences_lie_in_one_document_and_begin_with_different_ones(tmp_path):
    texts = ["a" * 250, "b" * 99, "c" * 100, "d" * 150, "e" * 500]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    tokenizer = byte_tokenizer()

    def read(count: int) -> list[str]:
        batch = read_sequences(str(tmp_path / "texts.jsonl"), count, 100, tokenizer)
        assert batch.position_ids.tolist() == [list(range(100))] * count
        return [tokenizer.decode(ids)[0] for ids in batch.input_ids]

    assert read(3) == ["a", "c", "d"]
    assert read(6) == ["a", "c", "d", "e", "a", "e"]
    with pytest.raises(ValueError, match="has 9 sequences of 100 tokens that lie in one document, of 10"):
        read(10)


def test_means_are_over_sequences_and_copies(student, tmp_path):
    story = "The lighthouse keeper of Penmarch counted 4711 ships. "
    text = story + "It rained all day and the wind was cold. " * 8 + story
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in (text[:400], "x y z. " * 99)))
    batch = read_sequences(str(tmp_path / "text.jsonl"), 2, 400, byte_tokenizer())
    copies = far_copies(batch.input_ids[0].tolist(), batch.position_ids[0].tolist())
    assert copies.shape[1] > 10 and not far_copies(batch.input_ids[1].tolist(), list(range(400))).shape[1]
    both, one, other = (inspect_heads(student, part) for part in (batch, *batch.split(1)))
    assert list(both) == [0, 2, 3]  # layer 1 is attention
    for layer, of_layer in both.items():
        assert torch.allclose(of_layer["cosine_copy"], one[layer]["cosine_copy"], atol=1e-6)
        assert other[layer]["cosine_copy"].isnan().all()
        mean = (one[layer]["left_128"] + other[layer]["left_128"]) / 2
        assert torch.allclose(of_layer["left_128"], mean, atol=1e-6)
        assert (of_layer["half_life_p10"] <= of_layer["half_life_p90"]).all()
        assert "left_512" not in of_layer


def test_the_command_writes_table_and_figure(tmp_path, capsys):
    run = distill(tiny_recipe(tmp_path, match=Stage()))
    capsys.readouterr()
    assert main(["inspect", str(run), "--tokens", "800", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "Heads that remember longest" in printed and "Heads that retrieve most in the teacher" in printed
    content = json.loads((run / "inspect.json").read_text())
    assert content["tokens"] == content["sequence_length"] == 800 and content["copies"] > 0
    assert content["teacher"] == "random:llama"
    rows = content["heads"]
    assert [(row["layer"], row["head"]) for row in rows] == [(layer, head) for layer in range(4) for head in range(4)]
    teacher = random_teacher("llama")
    batch = read_sequences("python-docs", 1, 800, teacher.tokenizer)
    statistics = measure_attention(teacher, batch)
    for row in rows:
        retrieval = float(statistics[row["layer"]].retrieval_H[row["head"]])
        assert row["teacher_retrieval"] == pytest.approx(retrieval, abs=1e-6)
        assert row["left_512"] is not None and row["left_1024"] is None
    assert (run / "inspect.svg").is_file()
    (png, _), figure = drawn_by(draw_heads, content, tmp_path / "heads")
    assert png.is_file()
    titles = [axis.get_title() for axis in figure.axes if axis.images]
    assert titles[0] == "half-life by decay alone, tokens" and len(titles) == 7  # nothing after 1,024 tokens
    shown = figure.axes[0].images[0].get_array()
    assert shown[3, 2] == pytest.approx(next(r["half_life"] for r in rows if (r["layer"], r["head"]) == (3, 2)))


def test_a_stage_without_its_teacher_and_a_model_without_a_run(tmp_path, capsys):
    run = distill(tiny_recipe(tmp_path), stages=())
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("random:llama", str(tmp_path / "gone.gguf")))
    arguments = ["inspect", str(run / "converted"), "--tokens", "256", "--device", "cpu", "-o", str(tmp_path / "out")]
    capsys.readouterr()
    assert main(arguments) == 0
    assert "The teacher's heads are not measured: there is no GGUF file" in capsys.readouterr().out
    content = json.loads((tmp_path / "out/inspect.json").read_text())
    assert content["teacher"] is None and all(row["teacher_copy"] is None for row in content["heads"])
    recipe.unlink()
    assert main(arguments) == 0
    assert "The model belongs to no run. Name its teacher with --teacher" in capsys.readouterr().out
    (tmp_path / "new.txt").write_text("".join(f"{chr(33 + i)}{chr(200 + i)}" for i in range(90)))
    assert main([*arguments, "--text", str(tmp_path / "new.txt")]) == 0
    assert "has no copies in 256 tokens" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out/inspect.json").read_text())["heads"]
    assert all(row["cosine_margin"] is None and row["left_128"] is not None for row in rows)
    assert main([*arguments, "--teacher", str(tmp_path / "gone.gguf")]) == 1
    assert main(["inspect", "owner/model"]) == 1 and main([*arguments[:2], "--tokens", "9"]) == 1
    errors = capsys.readouterr().err.splitlines()
    for message, error in zip(("no GGUF file", "with --output", "At least 256 are needed"), errors, strict=True):
        assert message in error


def test_models_without_heads_to_measure_are_refused(tmp_path):
    teacher = random_teacher("llama")
    teacher.model.save_pretrained(tmp_path / "teacher")
    teacher.tokenizer.save_pretrained(tmp_path / "teacher")
    assert main(["inspect", str(tmp_path / "teacher"), "--tokens", "256"]) == 1
