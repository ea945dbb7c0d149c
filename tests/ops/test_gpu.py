"""The same on a CUDA GPU; skipped where there is none."""

import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from gpu_cases import BOUNDS, NAMES, all_results, check_gradients, error, make_inputs, too_large

from deltify import convert, kda
from deltify.config import Stage
from deltify.conversion.teacher import freeze, random_teacher
from deltify.data.batches import Batch
from deltify.model import DeltifyConfig, DeltifyForCausalLM, capture, modeling
from deltify.model.mixers import attend_once
from deltify.ops import linear
from deltify.training.cuda_graphs import GraphedStep
from deltify.training.losses import DIVERGENCES, linear_kl
from deltify.training.steps import align_step, match_step
from deltify.training.teachers import LiveTeacher

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("gates", ["library", "slow", "fast", "zero", "strong", "mixed", "collinear", "bounded"])
@pytest.mark.parametrize("B, T, H, K, V", [(2, 1000, 3, 128, 128), (1, 2048, 8, 64, 64), (1, 333, 2, 128, 64)])
def test_the_kernels_equal_float64(gates, B, T, H, K, V):
    lower_bound = -5.0 if gates == "bounded" else None
    for dtype in (torch.bfloat16, torch.float16):
        inputs, state = make_inputs(B, T, H, K, V, gates, dtype), torch.randn(B, H, K, V, device="cuda")
        options = {"lower_bound": lower_bound}
        want = kda(*(x.double() for x in inputs), state=state.double(), backend="chunked", **options)
        got = kda(*inputs, state=state, backend="triton", **options)
        bound = BOUNDS.get(gates, 5e-3) if dtype is torch.bfloat16 else 2e-3
        assert error(got[0], want[0]) < bound and error(got[1], want[1]) < bound


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 127, 16384])
def test_lengths_with_and_without_a_split(T):
    inputs = make_inputs(1, T, 2, 128, 128, "slow")
    want = kda(*(x.double() for x in inputs), backend="chunked")
    for got, ref in zip(kda(*inputs, backend="triton"), want):
        assert error(got, ref) < 5e-3


def test_packed_documents_empty_ones_included():
    bounds = torch.tensor([0, 100, 100, 333, 700, 5000], dtype=torch.int32, device="cuda")
    inputs, state = make_inputs(1, 5000, 3, 64, 64), torch.randn(5, 3, 64, 64, device="cuda")
    want = kda(*(x.double() for x in inputs), state=state.double(), cu_seqlens=bounds.cpu(), backend="chunked")
    got = kda(*inputs, state=state, cu_seqlens=bounds, backend="triton")
    assert error(got[0], want[0]) < 5e-3 and error(got[1], want[1]) < 5e-3
    assert torch.equal(got[1][1], state[1])


def test_two_runs_are_equal_and_the_future_changes_no_bit_of_the_past():
    inputs = make_inputs(1, 3000, 4, 128, 128, "library")
    first, second = (kda(*inputs, backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    for x in inputs[:5]:
        x[:, 2050:] = torch.randn_like(x[:, 2050:]) * 10
    assert torch.equal(kda(*inputs, backend="triton")[0][:, :2048], first[0][:, :2048])


def test_a_thread_that_has_not_used_the_gpu_yet():
    inputs, found = make_inputs(1, 300, 2, 64, 64), []
    thread = threading.Thread(target=lambda: found.append(kda(*inputs, backend="triton")[0]))
    thread.start()
    thread.join()
    assert torch.equal(found[0], kda(*inputs, backend="triton")[0])


def test_inputs_that_are_not_contiguous():
    inputs = make_inputs(1, 500, 4, 64, 64)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:5]] + inputs[5:]
    assert not strided[0].is_contiguous()
    assert torch.equal(kda(*strided, backend="triton")[0], kda(*inputs, backend="triton")[0])


def test_offsets_beyond_32_bits():
    if torch.cuda.get_device_properties(0).total_memory < 100e9:
        pytest.skip("needs a GPU with 100 GB")
    T, H, K = 140_000, 128, 128
    q, k, f, v = (torch.randn(1, T, H, K, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    b = torch.randn(1, T, H, device="cuda", dtype=torch.bfloat16)
    A_log, dt_bias = torch.zeros(H, device="cuda"), torch.full((H * K,), -5.0, device="cuda")
    assert q.numel() > 2**31
    whole = kda(q, k, v, f, b, A_log, dt_bias, backend="triton")[0][:, -1000:, -2:].clone()
    part = [x[:, :, -2:].contiguous() for x in (q, k, v, f, b)]
    alone = kda(*part, A_log[-2:], dt_bias[-2 * K :], backend="triton")[0][:, -1000:]
    assert error(whole, alone.double()) < 5e-3


def test_widths_without_kernels_fall_back_with_a_notice(caplog):
    inputs = make_inputs(1, 100, 2, 96, 96)
    want = kda(*(x.double() for x in inputs), backend="chunked")[0]
    assert error(kda(*inputs)[0], want) < 5e-3
    assert "runs without its GPU kernels: heads of K=96" in caplog.text
    with pytest.raises(ValueError, match="K=96"):
        kda(*inputs, backend="triton")


@pytest.mark.parametrize("gates", ["library", "slow", "fast", "zero", "bounded"])
@pytest.mark.parametrize("B, T, H, K, V", [(2, 1000, 3, 128, 128), (1, 333, 8, 64, 64), (1, 2048, 2, 128, 64)])
def test_gradients_of_the_kernels_equal_float64(B, T, H, K, V, gates):
    errors = check_gradients(B, T, H, K, V, gates)
    assert not too_large(errors)


def test_gradients_of_packed_documents():
    errors = check_gradients(1, 5000, 3, 64, 64, "library", [0, 100, 100, 333, 700, 5000])
    assert not too_large(errors)


def test_gradients_of_long_rows_are_as_good_as_of_short_ones():
    short, long = (check_gradients(1, T, 4, 128, 128, "slow") for T in (1024, 65536))
    slack = dict.fromkeys(NAMES, 5e-4) | {"dA_log": 2e-3}  # four numbers, whose error varies more
    assert all(long[name] < 1.2 * short[name] + slack[name] for name in NAMES), (short, long)


def test_two_backwards_are_equal_bit_for_bit():
    inputs, state = make_inputs(1, 3000, 4, 128, 128), torch.randn(1, 4, 128, 128, device="cuda")
    weights = torch.randn(1, 3000, 4, 128, device="cuda").bfloat16(), torch.randn_like(state)
    first, second = (all_results(inputs, state, weights, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_gradients_without_kernels():
    errors = check_gradients(1, 700, 3, 64, 64, "slow", [0, 100, 100, 333, 700], torch.float32)
    assert all(e < 1e-4 for e in errors.values()), errors


def test_compiled_and_checkpointed_gradients_are_the_plain_ones():
    inputs, state = make_inputs(1, 500, 2, 64, 64), torch.randn(1, 2, 64, 64, device="cuda")

    def run(function):
        leaves = [x.clone().requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*leaves).float().square().sum(), leaves)

    plain = run(lambda *x: kda(*x, state=state)[0])
    again = run(
        lambda *x: torch.utils.checkpoint.checkpoint(lambda *y: kda(*y, state=state)[0], *x, use_reentrant=False)
    )
    compiled = run(torch.compile(lambda *x: kda(*x, state=state)[0], fullgraph=True))
    for a, b, c in zip(plain, again, compiled):
        assert torch.equal(a, b) and torch.equal(a, c)


@torch.no_grad()
def test_a_captured_step_gives_the_eager_logits(monkeypatch):
    facts = {"hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 64, "vocab_size": 300}
    model = DeltifyForCausalLM(DeltifyConfig(**facts)).to("cuda", torch.bfloat16).eval()
    ids = torch.randint(0, 300, (2, 110), device="cuda")

    def logits():
        cache, found = modeling.DeltifyCache(config=model.config), []
        model(ids[:, :50], past_key_values=cache)
        for at in range(50, 110):
            found.append(model(ids[:, at : at + 1], past_key_values=cache).logits)
        assert cache.get_seq_length() == 110
        return torch.cat(found, 1)

    captured = logits()
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "num_beams": 3}
    assert model.generate(ids, attention_mask=torch.ones_like(ids), **options).shape == (2, 130)
    monkeypatch.setattr(modeling, "captured_logits", lambda *_: None)
    eager = logits()
    assert error(captured, eager.double()) < 1e-3
    whole = model(ids).logits[:, 50:]
    assert error(captured, whole.double()) < 2e-2


@torch.no_grad()
@pytest.mark.parametrize("rope", [False, True])
def test_a_hybrids_captured_step_gives_the_eager_logits(rope, monkeypatch):
    facts = {"hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 64, "vocab_size": 300}
    kinds = {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "use_rope": [rope] * 3}
    config = DeltifyConfig(**facts, **kinds, num_key_value_heads=2)
    model = DeltifyForCausalLM(config).to("cuda", torch.bfloat16).eval()
    monkeypatch.setattr(capture, "LEAST_ROOM", 1)  # a new graph every 256 tokens
    ids, mask = torch.randint(0, 300, (2, 600), device="cuda"), torch.ones(2, 600, dtype=torch.long, device="cuda")
    mask[0, :9] = 0

    def logits():
        cache, found = modeling.DeltifyCache(config=model.config), []
        model(ids[:, :50], attention_mask=mask[:, :50], past_key_values=cache)
        for at in range(50, 600):
            options = {"attention_mask": mask[:, : at + 1], "past_key_values": cache}
            found.append(model(ids[:, at : at + 1], **options).logits)
        assert cache.get_seq_length() == 600
        return torch.cat(found, 1), capture.is_captured(cache)

    (captured, by_graph), _ = logits(), monkeypatch.setattr(modeling, "captured_logits", lambda *_: None)
    eager, without = logits()
    assert by_graph and not without and error(captured, eager.double()) < 1e-2


@torch.no_grad()
def test_a_captured_step_is_not_replayed_over_padding_nor_on_tensors_of_inference_mode():
    facts = {"hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 64, "vocab_size": 300}
    model = DeltifyForCausalLM(DeltifyConfig(**facts)).to("cuda", torch.bfloat16).eval()
    ids, mask = torch.randint(0, 300, (3, 90), device="cuda"), torch.ones(3, 90, dtype=torch.long, device="cuda")
    mask[0, :45], mask[1, 50:60], mask[:, 62:65], mask[2, 70] = 0, 0, 0, 0
    cache, found = modeling.DeltifyCache(config=model.config), []
    for at in range(90):
        with torch.inference_mode() if 30 <= at < 40 or 75 <= at < 80 else torch.no_grad():
            out = model(ids[:, at : at + 1], attention_mask=mask[:, : at + 1], past_key_values=cache)
            found.append(out.logits)
    assert cache in capture.STEPS and capture.STEPS[cache] is not None
    got = torch.cat(found, 1)
    for row in range(3):
        tokens = mask[row].bool()
        assert error(got[row, tokens], model(ids[row : row + 1, tokens]).logits[0].double()) < 2e-2


def test_conversion_and_one_step_of_each_stage():
    teacher = random_teacher("llama")
    freeze(teacher.model.cuda())
    positions = torch.cat([torch.arange(40), torch.arange(24)]).expand(4, 64)
    batch = Batch(torch.randint(0, 250, (4, 64)), positions).to("cuda")
    student = convert(teacher, full_attention_layers="3:1", calibration=batch)
    student.requires_grad_(True)
    for step in (align_step, match_step):
        with torch.autocast("cuda", torch.bfloat16):
            assert torch.isfinite(step(LiveTeacher(teacher), student, batch, Stage(), 1.0)["loss"])
    ids = batch.input_ids[:, :20]
    assert student.eval().generate(ids, max_new_tokens=4, do_sample=False).shape[0] == 4


@pytest.mark.parametrize("compute, masked", [(align_step, False), (match_step, False), (match_step, True)])
def test_replayed_steps_give_the_eager_gradients(compute, masked):
    teacher = random_teacher("llama", hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    freeze(teacher.model.cuda())
    ids = torch.randint(0, 250, (4, 4, 200))
    cuts = (200, 90, 70, 30)  # where documents start again
    batches = [Batch(x, (torch.arange(200) % cut).expand(4, 200)) for x, cut in zip(ids, cuts)]
    if masked:
        masks = [torch.rand(4, 200) < fraction for fraction in (0.9, 0.5, 0.3, 0.1)]
        batches = [replace(b, loss_mask=mask, counted=mask.float().mean()) for b, mask in zip(batches, masks)]
    student = convert(teacher, calibration=batches[0].to("cuda"), full_attention_layers="3:1")
    student.requires_grad_(compute is match_step)
    for layer in student.model.layers:
        layer.self_attn.requires_grad_(True)
    trained, complaints = [p for p in student.parameters() if p.requires_grad], []

    def step(batch, max_documents=None):
        with torch.autocast("cuda", torch.bfloat16):
            return compute(LiveTeacher(teacher), student, batch, Stage(ce_weight=0.2), 0.5, max_documents)

    results = []
    for run in (lambda batch, device: step(batch.to(device)), GraphedStep(step, trained, complaints.append)):
        for batch in batches * 2:
            for parameter in trained:
                parameter.grad = None if parameter.grad is None else parameter.grad.zero_()
            loss = run(batch, torch.device("cuda"))["loss"]
            results.append([loss.clone(), *(p.grad.clone() for p in trained)])
    assert not complaints
    for eager, replayed in zip(results[:8], results[8:]):
        for want, got in zip(eager, replayed):  # silent gates have gradients of 0
            assert (got - want).norm() <= 1e-2 * want.norm()


def test_graphs_are_released_where_another_batch_does_not_fit(monkeypatch):
    weight, complaints = torch.nn.Parameter(torch.randn(512, 512, device="cuda")), []

    def step(batch, max_documents=None):
        x = batch.input_ids.float()[..., None].expand(-1, -1, 512).contiguous() / 250
        loss = (x @ weight).square().mean()
        loss.backward()
        return {"loss": loss.detach()}

    def batch(documents):
        return Batch(torch.randint(0, 250, (64, 320)), (torch.arange(320) % (320 // documents)).expand(64, 320))

    graphed = GraphedStep(step, [weight], complaints.append)
    for _ in range(3):
        graphed(batch(1), torch.device("cuda"))
    held = torch.cuda.memory_reserved()
    assert graphed.pool_bytes > 2**20 and len(graphed.graphs) == 1
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (graphed.pool_bytes, 2**40))
    weight.grad.zero_()
    graphed(last := batch(20), torch.device("cuda"))
    got, weight.grad = weight.grad, None
    step(last.to("cuda"))
    assert torch.allclose(got, weight.grad, rtol=1e-3, atol=1e-6)
    assert len(complaints) == 1 and "another number of documents" in complaints[0]
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < held


@pytest.mark.parametrize("rows, width", [(128004, 2560), (2560, 18432), (1537, 1536)])
@torch.no_grad()
def test_products_of_one_row(rows, width):
    x, weight = (torch.randn(n, width, device="cuda", dtype=torch.bfloat16) for n in (1, rows))
    got = linear(x[None], weight)
    assert got.shape == (1, 1, rows) and torch.equal(got, linear(x[None], weight))
    assert error(got[0], x.double() @ weight.double().t()) < 5e-3
    assert torch.equal(linear(x, weight, x[0, :1].expand(rows)), F.linear(x, weight, x[0, :1].expand(rows)))


@pytest.mark.parametrize("keys", [1, 300, 8192, 10240])
@torch.no_grad()
def test_attention_of_one_token_equals_float64(keys):
    q = torch.randn(3, 20, 1, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(3, 4, keys, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    mask = torch.rand(3, 1, 1, keys, device="cuda") < 0.7
    mask[..., -1] = True
    want = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), attn_mask=mask, scale=0.1, enable_gqa=True)
    assert error(attend_once(q, k, v, mask, 0.1), want.transpose(1, 2)) < 5e-3


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_the_loss_equals_float64(kind):
    N, D, W = 700, 128, 50_000
    student, teacher = (torch.randn(N, D, device="cuda") for _ in range(2))
    head, t_head = (torch.randn(W, D, device="cuda") * 0.3 for _ in range(2))
    labels, mask = torch.randint(0, W, (N,), device="cuda"), torch.rand(N, device="cuda") < 0.8
    options = {"labels": labels, "ce_weight": 0.3, "divergence": kind, "temperature": 2.0}
    options["weights"] = mask / mask.float().mean()
    results = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        kind_of = torch.float64 if dtype is torch.float64 else torch.float32
        rounded = [x.bfloat16().to(kind_of) for x in (student, head, teacher, t_head)]
        leaves = [x.requires_grad_() for x in rounded[:2]]
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype is torch.bfloat16):
            loss, kl, ce = linear_kl(*leaves, *rounded[2:], **options)
        results.append([loss.detach(), kl, ce, *torch.autograd.grad(loss, leaves)])
    for want, single, half in zip(*results):
        assert error(single, want.double()) < 1e-3 and error(half, want.double()) < 5e-3
