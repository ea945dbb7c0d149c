"""Publishing a run: what is gathered, and what a stand-in of the hub receives."""

import base64
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gguf
import pytest
import torch
import yaml
from helpers import small_model, small_tokenizer, tiny_recipe
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltify import distill, evaluate, report
from deltify.cli import main
from deltify.config import Stage, TeacherSpec
from deltify.evaluation.card import card_facts, hub_datasets, teacher_facts
from deltify.evaluation.settings import EvaluationSpec
from deltify.training.checkpoint import save_model

TOKEN = "hf_" + "secret" * 5
TEACHER_CARD = """---
license: other
license_name: cats
license_link: https://example.org/cats
language: [en, de]
base_model: somebody/else
---
"""


class Hub(ThreadingHTTPServer):
    """A stand-in for the hub's API: repositories, commits with the files inline, and the tokens of requests."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.files, self.tokens, self.requests = {}, {}, set(), []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def answer(self, method: str, path: str, body: bytes) -> dict:
        self.requests.append(f"{method} {path}")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.repos.setdefault(name, asked.get("visibility") == "private")
            return {"url": f"https://huggingface.co/{name}", "name": name}
        if path == "/api/validate-yaml":
            content = json.loads(body)["content"]
            assert isinstance(yaml.safe_load(content.split("---\n")[1]), dict)
            return {"errors": [], "warnings": []}
        if path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return {"commitUrl": "https://huggingface.co/me/cats/commit/1", "commitOid": "1", "success": True}
        if name := path.partition("/api/models/")[2]:
            return {"id": name, "private": self.repos[name], "siblings": [], "sha": "1"}
        return {}  # huggingface_hub looks for news of its own


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def reply(self):
        body = self.read_body()
        self.server.tokens.add(self.headers["Authorization"])
        content = json.dumps(self.server.answer(self.command, self.path.split("?")[0], body)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = reply

    def read_body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """An evaluated run whose teacher has a card and a tokenizer that GGUF files can hold."""
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = small_tokenizer()
    save_model(folder / "teacher", small_model(tokenizer, rms_norm_eps=1e-5), tokenizer)
    (folder / "teacher" / "README.md").write_text(TEACHER_CARD)
    run = distill(tiny_recipe(folder, teacher=TeacherSpec(model=str(folder / "teacher"))))
    evaluate(run, EvaluationSpec(controls=False, samples=False))
    return run


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_without_yes_nothing_is_sent(run, hub, monkeypatch, capsys):
    def refuse(*args):
        pytest.fail(f"a connection to {args[-1]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert main(["push", str(run), "me/cats"]) == 0
    output = capsys.readouterr().out
    assert not hub.requests and "Nothing was uploaded" in output and f"target: {constants.ENDPOINT}/me/cats" in output
    for name in ("README.md", "cats-f16.gguf", "model.safetensors", "deltify/model.safetensors"):
        assert f" {name}\n" in output and (run / "push" / name).is_file()
    with pytest.raises(pytest.fail.Exception):  # the guard is on
        socket.create_connection(("127.0.0.1", hub.server_port))


def test_what_is_uploaded_loads_and_its_card_says_where_it_came_from(run, hub, tmp_path, monkeypatch, capsys):
    assert main(["push", str(run), "me/cats", "--private", "--yes"]) == 0
    assert hub.repos == {"me/cats": True} and hub.files == files_of(run / "push")
    printed = "".join(capsys.readouterr())
    assert f"uploaded to {constants.ENDPOINT}/me/cats" in printed
    assert f"Bearer {TOKEN}" in hub.tokens
    assert TOKEN not in printed and not any(TOKEN.encode() in content for content in files_of(run).values())

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name, content in hub.files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    ids = torch.arange(20)[None]
    want = AutoModelForCausalLM.from_pretrained(run / "match")(ids).logits
    native, own = (AutoModelForCausalLM.from_pretrained(tmp_path, subfolder=folder) for folder in ("", "deltify"))
    assert native.config.model_type == "kimi_linear" and own.config.model_type == "deltify"
    assert torch.equal(own(ids).logits, want)
    assert torch.allclose(native(ids).logits, want, atol=1e-3)
    assert AutoTokenizer.from_pretrained(tmp_path)("the cat").input_ids
    assert gguf.GGUFReader(tmp_path / "cats-f16.gguf").tensors

    card = hub.files["README.md"].decode()
    head = yaml.safe_load(card.split("---\n")[1])
    assert card_facts(tmp_path / "README.md") == {
        "license": "other",
        "license_name": "cats",
        "license_link": "https://example.org/cats",
        "language": ["en", "de"],
    }
    assert head["library_name"] == "transformers" and "base_model" not in head  # a local teacher has no hub id
    snippets = (
        'from_pretrained("me/cats")',
        "vllm serve me/cats",
        "mlx_lm.generate --model me/cats",
        "llama-server -hf me/cats",
        'from_pretrained("me/cats", subfolder="deltify")',
        "perplexity",
    )
    assert all(snippet in card for snippet in snippets)


def test_a_model_that_other_layouts_cannot_express_is_pushed_in_deltifys(tmp_path, capsys):
    teacher = TeacherSpec(model="random:arcee")
    run = distill(tiny_recipe(tmp_path, teacher=teacher, match=Stage()))
    assert main(["push", str(run), "me/cats"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "left out: kimi_linear (transformers, vLLM, MLX-LM). Layout kimi_linear does not support an MLP" in output
    assert "left out: GGUF (llama.cpp). Layout gguf does not support" in output
    assert "that of random:arcee is not known" in output and f"Run: deltify evaluate {run}" in output
    card, model = (run / "push" / "README.md").read_text(), AutoModelForCausalLM.from_pretrained(run / "push")
    assert model.config.model_type == "arcee_kda" and yaml.safe_load(card.split("---\n")[1])["license"] == "other"
    assert not any(word in card for word in ("vllm", "mlx", "llama-server", "subfolder")) and "licence is not" in card
    assert main(["push", str(run), "me/cats", "--license", "mit"]) == 0
    assert "\nlicense: mit\n" in (run / "push" / "README.md").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{run}", "cats"], "Name it as OWNER/NAME"),
        (["{run}", "me/cats", "--stage", "extend"], r"no model of extend. With --stage, choose one of ['align', 'conv"),
        (["{run}/match", "me/cats"], "is not a run: it has no recipe.yaml"),
    ],
)
def test_bad_input_is_named(run, arguments, message, capsys):
    assert main(["push", *(argument.replace("{run}", str(run)) for argument in arguments)]) == 1
    assert message in capsys.readouterr().err


def test_a_private_push_to_a_public_repository_is_refused(run, hub, capsys):
    hub.repos["me/cats"] = False
    assert main(["push", str(run), "me/cats", "--private", "--yes"]) == 1
    assert "the repository is public" in capsys.readouterr().err and not hub.files


def test_a_failed_upload_names_the_reason(run, hub, monkeypatch, capsys):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(["push", str(run), "me/cats", "--yes"]) == 1
    error = capsys.readouterr().err
    assert "could not upload to me/cats" in error and "hf auth login" in error and TOKEN not in error


def test_facts_of_teachers(tmp_path, monkeypatch):
    facts = teacher_facts("smollm2-135m-instruct")
    assert (facts["license"], facts["base_model"]) == ("apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct")
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: other\nlicense_link: LICENSE\n---\n")
    seen = []

    def cached(repo, name, *, revision, local_files_only):
        seen.append((repo, name, revision, local_files_only))
        return str(card)

    monkeypatch.setattr("deltify.evaluation.card.hf_hub_download", cached)
    facts = teacher_facts("me/teacher", "v1")
    assert facts["license_link"] == "https://huggingface.co/me/teacher/blob/main/LICENSE"
    assert facts["base_model"] == "me/teacher" and seen == [("me/teacher", "README.md", "v1", True)]

    writer = gguf.GGUFWriter(tmp_path / "teacher.gguf", "llama")
    writer.add_license("mit")
    writer.add_source_repo_url("https://huggingface.co/me/teacher")
    writer.add_languages(["en"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    facts = teacher_facts(str(tmp_path / "teacher.gguf"))
    assert facts == {
        "teacher": "teacher.gguf",
        "license": "mit",
        "language": ["en"],
        "base_model": "me/teacher",
    }


def test_datasets_are_those_of_all_recipes():
    first = "data: {train: {python-docs: 1, 'hf:me/text:en:train': 1}}"
    second = "data: {train: {'recall:hf:me/other': 1, 'sparse-recall:hf:me/text:de': 1, recall: 1, book.txt: 1}}"
    assert hub_datasets({Path("a"): first, Path("b"): second}) == ["me/text", "me/other"]


def test_the_card_of_a_report_has_no_commands_for_other_layouts(run):
    card = report(run)[-1].read_text()
    assert 'from_pretrained("PATH")' in card and "vllm" not in card and "license_name: cats" in card
