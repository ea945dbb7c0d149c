"""The OpenAI-compatible endpoint, over HTTP on loopback."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch

from deltify import convert
from deltify.conversion.teacher import random_teacher
from deltify.inference.serve import serve
from deltify.training.checkpoint import save_model

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A saved model, its answer to MESSAGES, and the address of a server of it."""
    pytest.importorskip("fastapi")
    folder = tmp_path_factory.mktemp("served")
    teacher = random_teacher("llama")
    teacher.tokenizer.chat_template = TEMPLATE
    model = convert(teacher, full_attention_layers="KSFK", init="library").eval()
    # random bytes would end in the middle of a character, which a stream holds back
    words = [teacher.tokenizer.decode([i]) for i in range(len(teacher.tokenizer))]
    model.generation_config.suppress_tokens = [i for i, word in enumerate(words) if not word.isalnum()]
    save_model(folder / "model", model, teacher.tokenizer)
    prompt = teacher.tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        out = model.generate(**prompt, max_new_tokens=6, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"host": "127.0.0.1", "port": port, "device": "cpu"}
    call = f"from deltify.inference.serve import serve; serve({str(folder / 'model')!r}, **{options})"
    log = (folder / "log").open("w")
    server = subprocess.Popen([sys.executable, "-c", call], stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(f"{address}/health", server, folder / "log")
        yield address, str(folder / "model"), teacher.tokenizer.decode(out, skip_special_tokens=True)
    finally:
        server.kill()
        server.wait()


def wait_for(url: str, server: subprocess.Popen, log, seconds: float = 120) -> None:
    """Returns when `url` answers; fails with the server's log if it ends or takes too long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    pytest.fail(f"the server does not answer: {log.read_text()[-2000:]}")


def post(url: str, body: dict) -> str:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=60).read().decode()


def test_a_chat_answer_is_the_models_own(served):
    address, model, text = served
    body = {"model": model, "messages": MESSAGES, "max_tokens": 6, "temperature": 0}
    answer = json.loads(post(f"{address}/v1/chat/completions", body))
    assert answer["object"] == "chat.completion" and answer["usage"]["completion_tokens"] == 6
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": text}
    with urllib.request.urlopen(f"{address}/v1/models", timeout=60) as models:
        assert json.loads(models.read())["object"] == "list"


def test_a_streamed_answer_says_the_same_in_pieces(served):
    address, model, text = served
    body = {"model": model, "messages": MESSAGES, "max_tokens": 6, "temperature": 0, "stream": True}
    lines = post(f"{address}/v1/chat/completions", body).splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"} and len(chunks) > 2
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == text


def test_the_openai_client_is_answered(served):
    openai = pytest.importorskip("openai")
    address, model, text = served
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    answer = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=6, temperature=0)
    assert answer.choices[0].message.content == text


def test_the_page_reads_a_text_and_answers(served):
    address, _, _ = served
    with urllib.request.urlopen(f"{address}/", timeout=60) as page:
        html = page.read().decode()
    assert "/model</b> reads a text once" in " ".join(html.split()) and "1 of its 4 layers is attention" in html
    with urllib.request.urlopen(f"{address}/states", data=b"It was a dark night. " * 20, timeout=60) as lines:
        *_, last = map(json.loads, lines)
    assert last["read"] == last["tokens"] > 400
    answer = post(f"{address}/states/{last['id']}/ask", {"question": "Who?"}).splitlines()
    *pieces, facts = map(json.loads, answer)
    assert "".join(piece.get("text", "") for piece in pieces) and facts["tokens"] > 1


def test_absent_packages_and_folders_are_named(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr("deltify.inference.serve.is_serve_available", lambda: False)
        with pytest.raises(ValueError, match=r"pip install -e '\.\[serve\]'"):
            serve(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="holds neither a model"):
        serve(str(tmp_path))
