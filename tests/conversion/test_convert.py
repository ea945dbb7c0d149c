"""The conversion: layer kinds, copied tensors, initialisation."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from deltify.conversion.attention import HeadStatistics, far_copies, measure_attention
from deltify.conversion.calibration import (
    MEMORIES,
    add_constant,
    center_projections,
    choose_memory,
    fit_output_gate,
    repeat_heads,
    ridge,
    set_memory,
    set_retrieval,
)
from deltify.conversion.folding import fold_biases, fold_gate
from deltify.conversion.student import convert, convert_further, layer_kinds, origins
from deltify.conversion.teacher import family_of, load_teacher, random_teacher
from deltify.data.batches import Batch
from deltify.model import ArceeKDAConfig, DeltifyConfig
from deltify.training.losses import mixer_loss


@pytest.fixture(scope="module")
def teacher():
    return random_teacher("llama")


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(3)
    positions = torch.cat([torch.arange(40), torch.arange(24)]).expand(8, 64)
    return Batch(torch.randint(0, 250, (8, 64), generator=generator), positions)


def test_key_value_heads_are_repeated_as_whole_blocks():
    x = torch.arange(2 * 3).view(6, 1)  # two heads of three rows
    assert repeat_heads(x, 4, 3).flatten().tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]


def test_wider_heads_begin_with_the_teachers_channels(teacher, rows, tmp_path):
    lines = []
    student = convert(teacher, calibration=rows, init="library", head_dim=24, log=lines.append)
    assert any("q_proj" in line and line.endswith("new channels: random directions") for line in lines)
    assert "heads of 24 channels are slow on a GPU: its kernels support (64, 128)" in lines
    other = convert(teacher, calibration=rows, init="library", head_dim=24, seed=1).model.layers[1].self_attn
    theirs, mixer = teacher.model.model.layers[1].self_attn, student.model.layers[1].self_attn
    q, k, v = (getattr(mixer, f"{name}_proj").weight.unflatten(0, (4, 24)) for name in "qkv")
    assert torch.equal(q[:, :16].flatten(0, 1), theirs.q_proj.weight)
    assert torch.equal(k[:, :16].flatten(0, 1), repeat_heads(theirs.k_proj.weight, 4, 16))
    new = [x[:, 16:] / x[:, :16].square().mean((1, 2), keepdim=True).sqrt() for x in (q, k, v)]
    assert torch.allclose(new[0], new[1], atol=1e-6) and not torch.allclose(new[0], new[2], atol=0.1)
    assert float(new[0].detach().std()) == pytest.approx(0.5, rel=0.1)
    assert not torch.equal(other.q_proj.weight, mixer.q_proj.weight)
    o = mixer.o_proj.weight.unflatten(1, (4, 24))
    assert torch.equal(o[..., :16].flatten(1), theirs.o_proj.weight) and not o[..., 16:].any()
    ids = rows.input_ids[:2]
    whole = student.eval()(ids).logits
    pieces = student.generate(
        ids[:, :40], max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    assert torch.allclose(pieces.logits[0], whole[:, 39], atol=1e-4)
    student.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, whole)


def test_new_channels_have_no_biases(rows):
    teacher = random_teacher("qwen2")
    bias = teacher.model.model.layers[0].self_attn.v_proj.bias
    torch.nn.init.normal_(bias)
    mixer = convert(teacher, calibration=rows, init="library", head_dim=24).model.layers[0].self_attn
    got = mixer.v_proj.bias.unflatten(0, (4, 24))
    assert torch.equal(got[:, :16].flatten(), repeat_heads(bias, 4, 16)) and not got[:, 16:].any()


@torch.no_grad()
def test_wider_heads_fit_the_teacher_better(rows):
    for architecture in ("llama", "qwen2"):  # without and with biases that are folded
        teacher = random_teacher(architecture)
        kl = []
        for width in (16, 32):
            student = convert(teacher, calibration=rows, head_dim=width, retrieval_heads=2, center="all").eval()
            batch = rows.split(4)[0]
            logits = [
                model(batch.input_ids, position_ids=batch.position_ids).logits for model in (teacher.model, student)
            ]
            p, q = (x.log_softmax(-1) for x in logits)
            kl.append(float((p.exp() * (p - q)).sum(-1).mean()))
        assert kl[1] < kl[0]


def test_a_width_of_heads_that_does_not_fit_is_refused(teacher, rows):
    for options in ({"head_dim": 8}, {"head_dim": 32, "full_attention_layers": "3:1"}):
        with pytest.raises(
            ValueError, match=rf"head_dim={options['head_dim']}; choose the width of .*, 16, or a larger"
        ):
            convert(teacher, calibration=rows, **options)


def test_layers_can_be_given_as_ratio_list_word_or_pattern():
    def letters(spec, layers):
        return "".join({"linear": "K", "full": "F", "sliding": "S"}[k.split("_")[0]] for k in layer_kinds(spec, layers))

    assert [i for i, kind in enumerate(letters("3:1", 30)) if kind == "F"] == [3, 7, 11, 15, 19, 23, 27]
    assert letters([5, 1, 5], 6) == "KFKKKF"
    assert letters("none", 3) == "KKK" and letters("all", 3) == "FFF"
    assert letters("KKKF", 8) == letters("3:1", 8) and letters("KSF", 7) == "KSFKSFK" and letters("S", 2) == "SS"
    with pytest.raises(ValueError, match=r"names \[9\]"):
        layer_kinds([9], 4)
    for wrong in ("some", "KKX", "0:0", ""):
        with pytest.raises(ValueError, match=f"full_attention_layers='{wrong}'; use none, all"):
            layer_kinds(wrong, 4)


@pytest.mark.parametrize("architecture, config", [("llama", DeltifyConfig), ("arcee", ArceeKDAConfig)])
def test_copied_tensors_equal_the_teachers(architecture, config):
    teacher = random_teacher(architecture)
    student = convert(teacher, full_attention_layers="3:1", init="library")
    assert type(student.config) is config
    mine, theirs = student.state_dict(), teacher.model.state_dict()
    for i in range(4):
        prefix = f"model.layers.{i}."
        for name in ("mlp.up_proj", "self_attn.q_proj", "self_attn.o_proj", "input_layernorm"):
            assert torch.equal(mine[f"{prefix}{name}.weight"], theirs[f"{prefix}{name}.weight"])
        keys, source = mine[f"{prefix}self_attn.k_proj.weight"], theirs[f"{prefix}self_attn.k_proj.weight"]
        if i == 3:
            assert torch.equal(keys, source)
        else:
            for head in range(4):
                assert torch.equal(keys.view(4, 16, -1)[head], source.view(2, 16, -1)[head // 2])


def test_every_tensor_has_an_origin_and_all_parameters_are_counted(teacher):
    student = convert(teacher, init="library")
    lines = origins(student, "library")
    counted = sum(int(line.split("tensors")[1].split("parameters")[0].replace(",", "")) for line in lines)
    assert counted == sum(p.numel() for p in student.parameters())


def test_attention_distances_are_those_of_the_weights(teacher, rows):
    row = Batch(rows.input_ids[:1], rows.position_ids[:1])
    distances = [layer.distance_H for layer in measure_attention(teacher, row)]
    teacher.model.set_attn_implementation("eager")
    out = teacher.model(row.input_ids, position_ids=row.position_ids, output_attentions=True, use_cache=False)
    teacher.model.set_attn_implementation("sdpa")
    weights = out.attentions[2][0, 1]
    total = mass = 0.0
    for i in range(64):
        for j in range(i + 1):
            if row.position_ids[0, j] > 0:
                total, mass = total + float(weights[i, j]) * (i - j), mass + float(weights[i, j])
    assert float(distances[2][1]) == pytest.approx(total / mass, rel=1e-4)


def test_the_calibrated_initialisation_is_nearer_to_the_teacher_than_the_others(teacher, rows):
    test = Batch(rows.input_ids.flip(0).roll(1, 1), rows.position_ids)

    def mean_error(student):
        errors = []
        hidden = {}
        hooks = [
            layer.self_attn.register_forward_hook(
                lambda m, a, kw, out: hidden.__setitem__(m.layer_idx, (kw["hidden_states"], out[0])), with_kwargs=True
            )
            for layer in teacher.model.model.layers
        ]
        with torch.no_grad():
            teacher.model(test.input_ids[:, :40], use_cache=False)
            for layer, (x, y) in zip(student.model.layers, hidden.values()):
                errors.append(float(mixer_loss(layer.self_attn(x), y)))
        for hook in hooks:
            hook.remove()
        return sum(errors) / len(errors)

    errors = {start: mean_error(convert(teacher, init=start, calibration=rows)) for start in ("library", "arcee")}
    for start in ("calibrated", "calibrated-constant"):
        assert mean_error(convert(teacher, init=start, calibration=rows)) < min(errors.values()), start


def test_initialisations_do_what_their_names_promise(teacher, rows):
    arcee = convert(teacher, init="arcee").model.layers[0].self_attn
    assert float(arcee.dt_bias.detach().abs().max()) == 0 and float(arcee.A_log.detach().exp().min()) >= 1
    library = convert(teacher, init="library").model.layers[0].self_attn
    dt = torch.nn.functional.softplus(library.dt_bias)
    assert float(dt.min()) >= 1e-3 * 0.99 and float(dt.max()) <= 0.1 * 1.01
    calibrated = convert(teacher, init="calibrated", calibration=rows).model.layers[0].self_attn
    assert float(calibrated.q_conv1d.weight[..., :-1].abs().max()) == 0
    with pytest.raises(ValueError, match="init='random'"):
        convert(teacher, init="random")
    with pytest.raises(ValueError, match="needs calibration text"):
        convert(teacher, init="calibrated")


def half_lives(student):
    mixers = [layer.self_attn for layer in student.model.layers]
    steps = [torch.nn.functional.softplus(m.dt_bias.unflatten(0, (len(m.A_log), -1))) for m in mixers]
    decays = [m.A_log.exp()[:, None] * step for m, step in zip(mixers, steps)]
    return math.log(2) / torch.stack(decays).detach()[:, :, 0]  # [layers, H]


def test_far_copies_have_one_earlier_occurrence_in_their_document():
    gap = list(range(100, 300))
    ids = [1, 2, 3, 4, *gap, 1, 2, 3, 4, 9, 1, 2, 3, 4]
    positions = list(range(len(ids)))
    assert far_copies(ids, positions).t().tolist() == [[206, 3]]  # 2 3 4 is followed by 100 before, by 9 now
    positions[204:] = range(len(ids) - 204)  # a document of its own
    assert far_copies(ids, positions).shape == (2, 0)
    assert far_copies([1, 2, 3, 4, *gap[:99], 1, 2, 3, 4], list(range(107))).shape == (2, 0)  # too near


def test_heads_that_retrieve_get_a_memory_that_lasts_and_write_what_is_looked_at(teacher):
    """A head that is made to attend to copies is found; the other heads start as without it."""
    torch.manual_seed(0)
    part = torch.randint(0, 200, (2, 180))
    rows = Batch(torch.cat([part, part], 1), torch.arange(360).expand(2, -1))
    statistics = measure_attention(teacher, rows)
    at, source = far_copies(rows.input_ids[0].tolist(), list(range(360)))
    assert (at - source + 1).unique().tolist() == [180]
    scores = torch.stack([layer.retrieval_H for layer in statistics]).flatten()
    plain = half_lives(convert(teacher, init="calibrated", calibration=rows))
    student = convert(teacher, init="calibrated", calibration=rows, retrieval_heads=3, center="retrieval")
    changed = half_lives(student).flatten() != plain.flatten()
    assert set(changed.nonzero().flatten().tolist()) == set(scores.topk(3).indices.tolist())
    torch.testing.assert_close(half_lives(student).flatten()[changed], torch.full((3,), 1e5), rtol=1e-3, atol=0)
    for wrong in (-1, 999):
        with pytest.raises(ValueError, match=f"retrieval_heads={wrong}"):
            convert(teacher, init="calibrated", calibration=rows, retrieval_heads=wrong)
    with pytest.raises(ValueError, match="center='keys'"):
        convert(teacher, init="calibrated", calibration=rows, center="keys")


def test_a_retrieving_head_writes_rarely_and_what_receives_attention(teacher):
    mixer = convert(teacher, init="library").model.layers[0].self_attn
    torch.manual_seed(0)
    width = mixer.q_proj.in_features
    x, one = torch.randn(500, width), torch.zeros(width)
    one[0] = x[:, 0] = 1
    heads = len(mixer.A_log)
    received = (2 * x[:, 1:2] - 4).exp().expand(-1, heads)
    statistics = HeadStatistics(torch.ones(heads), torch.eye(heads)[0], torch.full((heads,), 0.5), received)
    with torch.no_grad():
        set_retrieval(mixer, [0, 1], statistics, x, one)
        beta = mixer.b_proj(x).sigmoid()
    torch.testing.assert_close(beta[:, :2].mean(0), torch.full((2,), 0.03), rtol=0.01, atol=0)
    assert torch.corrcoef(torch.stack([beta[:, 0].logit(), x[:, 1]]))[0, 1] > 0.9
    torch.testing.assert_close(beta[:, 1], torch.full((500,), 0.03), rtol=0.01, atol=0)  # matches more than it copies


def test_centred_queries_and_keys_have_no_mean(rows):
    teacher = random_teacher("llama", num_hidden_layers=2)
    teacher.model.model.embed_tokens.weight += 0.1  # inputs share a direction, as in trained models
    means = {}
    for center in ("none", "all"):
        mixer = convert(teacher, init="calibrated", calibration=rows, center=center).model.layers[0].self_attn
        with torch.no_grad():
            x = teacher.model.model.layers[0].input_layernorm(teacher.model.model.embed_tokens(rows.input_ids))
            means[center] = max(float(p(x).flatten(0, 1).mean(0).norm()) for p in (mixer.q_proj, mixer.k_proj))
    assert means["all"] < 0.05 * means["none"]


def test_queries_and_keys_with_biases_are_centred_too():
    mixer = convert(random_teacher("qwen2", num_hidden_layers=2), init="library").model.layers[0].self_attn
    mixer.requires_grad_(False)
    x = torch.randn(50, mixer.q_proj.in_features) + 1
    assert mixer.q_proj.bias is not None
    center_projections(mixer, x, [0, 1], torch.zeros(mixer.q_proj.in_features))
    for projection in (mixer.q_proj, mixer.k_proj):
        assert float(projection(x).mean(0)[: 2 * mixer.head_dim].abs().max()) < 1e-4


def test_measured_layers_are_those_that_retrieve_most(teacher, rows):
    statistics = measure_attention(teacher, rows)
    statistics[1].copy_H += 2
    statistics[3].match_H += 1
    assert layer_kinds("measured:2", 4, statistics) == ["linear_attention", "full_attention"] * 2
    assert layer_kinds("measured:1", 4, statistics) == [
        f"{kind}_attention" for kind in ("linear", "full", "linear", "linear")
    ]
    student = convert(teacher, init="library", full_attention_layers="measured:2", calibration=rows)
    assert student.config.layer_types.count("full_attention") == 2
    with pytest.raises(ValueError, match="needs calibration text"):
        convert(teacher, init="library", full_attention_layers="measured:2")


ZERO, KEPT = "attention output is zero", "o_proj keeps the teacher's weights"
EQUAL = "all heads start with equal weights"
SILENCE = {  # changes to layer 1 (factor of each projection, and its number of heads), and facts in the log line
    "o": ({"o": 0.0}, [ZERO]),
    "v": ({"v": 0.0}, [ZERO, "values are zero in all heads", KEPT]),
    "q": ({"q": 0.0}, ["queries are zero in all heads", EQUAL]),
    "k": ({"k": 0.0}, ["keys are zero in all heads", EQUAL]),
    "all": (dict.fromkeys("qkvo", 0.0), [ZERO, "queries are", "keys are", "values are zero in all heads", EQUAL, KEPT]),
    "q of a head": ({"q": (0.0, 1)}, ["queries are zero in heads [0]", "heads [0] start with equal weights"]),
    "k of a head": ({"k": (0.0, 1)}, ["keys are zero in heads [0, 1]", "heads [0, 1] start with equal weights"]),
    "v of a head": ({"v": (0.0, 1)}, ["values are zero in heads [0, 1]"]),
    "tiny o": ({"o": 1e-12}, [ZERO]),
    "tiny v": ({"v": 1e-25}, [ZERO, "values are zero in all heads", KEPT]),
    "tiny q and k": ({"q": 1e-20, "k": 1e-20}, ["queries are", "keys are zero in all heads", EQUAL]),
}


def silence(teacher, changes) -> None:
    for name, scale in changes.items():
        scale, heads = scale if isinstance(scale, tuple) else (scale, 99)
        getattr(teacher.model.model.layers[1].self_attn, f"{name}_proj").weight[: heads * 16] *= scale


@pytest.fixture(scope="module")
def first_layer(rows):
    student = convert(random_teacher("llama", num_hidden_layers=2), init="calibrated", calibration=rows)
    return student.model.layers[0].state_dict()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dead", SILENCE)
def test_a_degenerate_layer_is_initialised_and_named_in_a_line(dead, exact, rows, first_layer):
    changes, facts = SILENCE[dead]
    teacher, lines = random_teacher("llama", num_hidden_layers=2), []
    silence(teacher, changes)
    if exact:
        student = convert(teacher, init="calibrated", calibration=rows, log=lines.append)
    else:
        teacher.model.bfloat16()
        options = {"init": "calibrated-constant", "retrieval_heads": 2}
        student = convert(teacher, **options, calibration=rows, log=lines.append)
    assert all(x.isfinite().all() and x.abs().max() < 100 for x in student.state_dict().values())
    (line,) = (line for line in lines if line.startswith("layer "))
    said = line.removeprefix("layer 1: ").split("; ")
    assert len(said) == len(facts) and all(fact.startswith(wanted) for fact, wanted in zip(said, facts)), line
    (explained,) = (line for line in lines if line.startswith("variance"))
    assert explained.endswith("nothing to explain") == (ZERO in facts) and "nan" not in explained
    if exact:  # the layer before it is initialised as usual
        for name, tensor in student.model.layers[0].state_dict().items():
            assert torch.equal(tensor, first_layer[name]), name


def test_only_degenerate_layers_get_a_line(teacher, rows):
    lines = []
    convert(teacher, init="calibrated", calibration=rows, log=lines.append)
    assert not [line for line in lines if line.startswith("layer ") or "nothing to explain" in line]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dead", ["o", "v"])
def test_a_layer_with_a_constant_output_is_initialised_to_it(dead, dtype, rows):
    teacher, lines = random_teacher("llama", num_hidden_layers=2, attention_bias=True), []
    teacher.model.model.embed_tokens.weight += 0.1  # inputs share a direction, as in trained models
    silence(teacher, {dead: 0.0})
    getattr(teacher.model.model.layers[1].self_attn, f"{dead}_proj").bias.normal_()
    teacher.model.to(dtype)
    student = convert(teacher, init="calibrated", calibration=rows, log=lines.append)
    (line,) = (line for line in lines if line.startswith("layer "))
    equal = "; all heads start with equal weights for all tokens" if dead == "v" else ""
    assert line == "layer 1: attention output is the same for every token" + equal
    assert next(line for line in lines if line.startswith("variance")).endswith("nothing to explain")
    said = []

    def compare(module, args, kwargs, output):
        said.append(mixer_loss(student.model.layers[1].self_attn(kwargs["hidden_states"].float()), output[0]))

    teacher.model.model.layers[1].self_attn.register_forward_hook(compare, with_kwargs=True)
    with torch.no_grad():
        teacher.model(rows.input_ids.flip(0)[:, :40])
    assert float(said[0]) < 1  # where the mean alone, in place of the rounding, would score 0, and nothing 10,000


def test_heads_without_queries_or_keys_take_a_mean_of_values(rows):
    teacher = random_teacher("llama", num_hidden_layers=2)
    silence(teacher, {"k": (0.0, 1)})  # of query heads 0 and 1
    mixer = convert(teacher, init="calibrated", calibration=rows).model.layers[1].self_attn
    copied = convert(teacher, init="library").model.layers[1].self_attn
    x = torch.randn(50, 64)
    for mine, theirs in ((mixer.q_proj, copied.q_proj), (mixer.k_proj, copied.k_proj)):
        assert torch.equal(mine.weight[32:], theirs.weight[32:])
        equal = mine(x)[:, :32].unflatten(1, (2, 16)).detach()
        torch.testing.assert_close(equal, equal[:, :1, :1].expand_as(equal))
    torch.testing.assert_close(mixer.q_proj.weight[:32], mixer.k_proj.weight[:32])


def test_each_head_gets_the_memory_that_predicts_it_best(teacher):
    """Heads whose output was computed with a memory get that memory."""
    student = convert(teacher, init="library")
    mixer, x = student.model.layers[0].self_attn, torch.randn(4, 64, student.config.hidden_size)
    x += torch.randn(student.config.hidden_size)  # a direction that all inputs share
    one = ridge(x.flatten(0, 1), torch.ones(256, 1), 1e-3)[:, 0]
    heads = student.config.num_attention_heads
    distance, silent = torch.full((heads,), 8.0), torch.zeros(256, heads, mixer.head_dim)
    positions = torch.arange(64).repeat(4, 1)
    for candidate in (MEMORIES[0], MEMORIES[-1]):
        with torch.no_grad():
            fit_output_gate(mixer, x.flatten(0, 1), silent, one)
            set_memory(mixer, [candidate] * heads, one, distance)
            wanted = mixer.inner(x).flatten(0, 1).unflatten(-1, (heads, -1))
            assert choose_memory(mixer, x, positions, one, distance, wanted) == [candidate] * heads


def test_the_output_gate_follows_the_size_of_a_heads_output(teacher):
    student = convert(teacher, init="library")
    mixer, x = student.model.layers[0].self_attn, torch.randn(400, student.config.hidden_size)
    heads, K = student.config.num_attention_heads, mixer.head_dim
    size = torch.sigmoid(x @ torch.randn(student.config.hidden_size, heads) / 8 - 1)
    x, one = torch.cat([torch.ones(400, 1), x[:, 1:]], 1), torch.eye(student.config.hidden_size)[0]
    outputs = size[..., None] * torch.nn.functional.normalize(torch.randn(400, heads, K), dim=-1)
    with torch.no_grad():
        fit_output_gate(mixer, x, outputs, one)
        gate = torch.sigmoid(mixer.g_proj(x)).unflatten(-1, (heads, K)).mean(-1)
    for head in range(heads):
        assert torch.corrcoef(torch.stack([gate[:, head], size[:, head]]))[0, 1] > 0.95
    largest = size.kthvalue(392, dim=0).values  # the gate is relative to it
    torch.testing.assert_close(gate.mean(0), (size / largest).clamp(0.02, 0.95).mean(0), rtol=0.1, atol=0)


def test_one_channel_of_each_heads_values_becomes_a_constant(teacher):
    student = convert(teacher, init="library")
    mixer = student.model.layers[1].self_attn
    torch.manual_seed(0)
    x = torch.randn(500, mixer.q_proj.in_features) + 3 * torch.randn(mixer.q_proj.in_features)
    before = mixer.v_proj.weight.detach().clone()
    with torch.no_grad():
        sizes = mixer.v_proj(x).unflatten(-1, (-1, mixer.head_dim)).square().sum(-1).mean(0).sqrt()
        one = ridge(x, torch.ones_like(x[:, :1]), 1e-3)[:, 0]
        fit_output_gate(mixer, x, torch.randn(500, student.config.num_attention_heads, mixer.head_dim), one)
        add_constant(mixer, x, one)
        changed = (mixer.v_proj.weight != before).any(1).unflatten(0, (-1, mixer.head_dim))
        v, gate = (y.unflatten(-1, (-1, mixer.head_dim)) for y in (mixer.v_proj(x), mixer.g_proj(x)))
    assert changed.sum(1).tolist() == [1] * len(changed)
    assert float(v[:, changed].std(0).max() / v[:, changed].mean()) < 0.1
    torch.testing.assert_close(v[:, changed].mean(0), 3 * sizes, rtol=0.02, atol=0)
    torch.testing.assert_close(gate[:, changed], torch.full_like(gate[:, changed], 4.0), rtol=0.2, atol=0)


def test_folded_biases_act_like_biases(rows):
    """A student without biases in KDA layers starts where one with them does."""
    teacher = random_teacher("qwen2", num_hidden_layers=2)
    teacher.model.model.embed_tokens.weight += 0.1  # inputs share a direction, as in trained models
    for layer in teacher.model.model.layers:
        for name in "qkv":
            getattr(layer.self_attn, f"{name}_proj").bias.normal_(std=0.3)
    lines = []
    options = {"init": "calibrated", "calibration": rows}
    folded = convert(teacher, **options, log=lines.append)
    assert any("biases of q, k and v are folded" in line for line in lines)
    assert not [name for name, _ in folded.named_parameters() if "self_attn" in name and name.endswith(".bias")]
    assert convert(teacher, init="library").config.kda_bias  # without calibration text, they cannot be folded
    biased = convert(teacher, **options, gate_bias=True)
    assert biased.model.layers[0].self_attn.g_proj[1].bias is not None
    with torch.no_grad():
        teacher_logits = teacher.model(rows.input_ids).logits
        losses = [kl(model(rows.input_ids).logits, teacher_logits) for model in (folded, biased)]
        for layer in folded.model.layers:
            layer.self_attn.g_proj[1].weight[:, -1] = 0
        losses.append(kl(folded(rows.input_ids).logits, teacher_logits))
    assert abs(losses[0] - losses[1]) < 0.05 * losses[1] < abs(losses[2] - losses[1])


def test_biases_of_a_trained_student_are_folded(rows):
    teacher = random_teacher("qwen2", num_hidden_layers=2)
    teacher.model.model.embed_tokens.weight += 0.1  # inputs share a direction, as in trained models
    student = convert(teacher, init="library", gate_bias=True).eval()
    with torch.no_grad():
        for layer in student.model.layers:
            for name in "qkv":
                getattr(layer.self_attn, f"{name}_proj").bias.normal_(std=0.3)
            layer.self_attn.g_proj[1].bias.normal_()
        want = student(rows.input_ids).logits
        folded = fold_biases(student, rows)
        assert torch.equal(student(rows.input_ids).logits, want)
        cost = kl(folded(rows.input_ids).logits, want)
        for layer in student.model.layers:
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                linear.bias.zero_()
            layer.self_attn.g_proj[1].bias.zero_()
        dropped = kl(student(rows.input_ids).logits, want)
    assert not [name for name in folded.state_dict() if "self_attn" in name and name.endswith(".bias")]
    assert cost < 0.03 * dropped


def test_a_gate_of_lower_rank_is_folded_exactly():
    torch.manual_seed(0)
    x, bias = torch.randn(200, 16) + 2, torch.randn(12)
    low, high = torch.randn(4, 16), torch.randn(12, 4) @ torch.diag(torch.tensor([1.0, 1, 1, 0]))
    low_KD, high_CK, moved_C = fold_gate(low, high, bias, x)
    assert low_KD.shape == (3, 16) and high_CK.shape == (12, 3)
    torch.testing.assert_close(x @ low_KD.T @ high_CK.T + moved_C, x @ low.T @ high.T + bias, atol=1e-4, rtol=1e-4)


def kl(student: torch.Tensor, teacher: torch.Tensor) -> float:
    p, q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_ridge_finds_the_map():
    X, W = torch.randn(200, 5, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    assert torch.allclose(ridge(X, X @ W, 1e-12), W, atol=1e-8)


def test_families_that_do_not_fit_are_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"'olmo2' cannot be converted yet \(it normalises after attention"):
        family_of(AutoConfig.for_model("olmo2"))
    with pytest.raises(ValueError, match=r"'gpt2' cannot be converted yet; supported are: arcee, llama"):
        family_of(AutoConfig.for_model("gpt2"))


def test_a_teachers_wrong_files_are_named(teacher, tmp_path):
    teacher.model.save_pretrained(tmp_path)
    teacher.tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    again = load_teacher(str(tmp_path))
    ids = torch.randint(0, 250, (1, 9))
    assert torch.equal(again.model(ids).logits, teacher.model(ids).logits)
    tensors, whole = load_file(file), file.read_bytes()
    save_file({k: v for k, v in tensors.items() if k != "model.norm.weight"}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.norm\.weight is missing"):
        load_teacher(str(tmp_path))
    file.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_teacher(str(tmp_path))
    file.unlink()
    with pytest.raises(ValueError, match="has no safetensors weights"):
        load_teacher(str(tmp_path))
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled weights"):
        load_teacher(str(tmp_path))


@pytest.mark.parametrize("start", ["all", "S"])
def test_converting_in_two_steps_equals_converting_at_once(teacher, start):
    """A student whose attention sees all tokens computes what the teacher does, so its layers are fitted alike."""
    rows = Batch(torch.randint(0, 200, (2, 64)), torch.arange(64).expand(2, -1))
    options = {"retrieval_heads": 3, "center": "retrieval"}
    whole = convert(teacher, init="calibrated", calibration=rows, **options)
    layers = len(whole.model.layers)
    student = convert(teacher, full_attention_layers=start, keep_rope=True, init="library", sliding_window=100)
    further = convert_further(student, ["linear_attention"] * layers, teacher, rows, **options)
    assert further.config.to_dict() == whole.config.to_dict() | {"sliding_window": 100}
    for name, expected in whole.state_dict().items():
        torch.testing.assert_close(further.state_dict()[name], expected, rtol=1e-3, atol=1e-4, msg=name)


def test_layers_are_converted_further_from_the_students_own_weights(teacher):
    rows = Batch(torch.randint(0, 200, (2, 64)), torch.arange(64).expand(2, -1))
    student = convert(teacher, full_attention_layers=[0, 1], keep_rope=True, init="calibrated", calibration=rows)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.01 * torch.randn_like(p))
    lines = []
    layers = len(student.model.layers)
    kinds = ["full_attention"] + ["linear_attention"] * (layers - 1)
    further = convert_further(student, kinds, teacher, rows, log=lines.append)
    assert lines[0] == "layers [1] become KDA, all other weights stay"
    assert further.config.layer_types == kinds and further.config.use_rope == [True] + [False] * (layers - 1)
    before, after = student.state_dict(), further.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in after if ".layers.1.self_attn." not in name)
    assert torch.equal(
        after["model.layers.1.self_attn.q_proj.weight"], before["model.layers.1.self_attn.q_proj.weight"]
    )
    with pytest.raises(ValueError, match="only attention layers of it can become KDA"):
        convert_further(further, student.config.layer_types, teacher, rows)
