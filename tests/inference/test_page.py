"""The page of `deltify serve`: a text is read once, and questions start from its state."""

import copy
import json
import socket
import threading
import time
import urllib.request

import pytest
import torch
from browser import open_browser
from helpers import random_student, small_tokenizer

from deltify import State
from deltify.conversion.teacher import random_teacher
from deltify.inference.prefill import cache_bytes, prefill
from deltify.model.cache import new_cache

fastapi = pytest.importorskip("fastapi")
uvicorn, testclient = pytest.importorskip("uvicorn"), pytest.importorskip("fastapi.testclient")
page = pytest.importorskip("deltify.inference.page")
pytestmark = pytest.mark.usefixtures("one_thread")

TEMPLATE = (
    "system: help\n{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXT = "It was a dark and stormy night. The cat sat on the hat. " * 20


def tiny(kinds: str, chat: bool = True):
    """A random student that writes letters only and forgets slowly, and its tokenizer."""
    tokenizer = small_tokenizer()
    tokenizer.chat_template = TEMPLATE if chat else None
    model = random_student(kinds, vocab_size=len(tokenizer), num_key_value_heads=1, initializer_range=0.3)
    words = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    model.generation_config.suppress_tokens = [
        i for i, word in enumerate(words) if not (word.isascii() and word.strip().isalnum())
    ]
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("A_log"):
                p.fill_(-7)
    return model, tokenizer


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(page, "MAX_NEW_TOKENS", 12)
    monkeypatch.setattr(page, "CPU_PIECE", 256)


def app_of(model, tokenizer):
    app = fastapi.FastAPI()
    app.include_router(page.page_routes(model, tokenizer, "tiny"))
    return app


def client_of(model, tokenizer):
    return testclient.TestClient(app_of(model, tokenizer))


def lines(response) -> list[dict]:
    assert response.status_code == 200, response.text
    return [json.loads(line) for line in response.text.splitlines()]


def read(client, text: str = TEXT) -> list[dict]:
    return lines(client.post("/states?name=book.txt", content=text.encode()))


def ask(client, book: str, question: str, turns=()) -> str:
    events = lines(client.post(f"/states/{book}/ask", json={"question": question, "turns": list(turns)}))
    assert events[-1]["tokens"] == 12 and events[-1]["cut"]
    return "".join(event.get("text", "") for event in events)


def generated(model, tokenizer, before: str, after: str) -> str:
    """The greedy answer of `generate` to a text that is read whole."""
    parts = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after)]
    ids = torch.tensor([parts[0] + parts[1]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_state_has_one_size_while_the_text_grows():
    model, tokenizer = tiny("KSK")
    client = client_of(model, tokenizer)
    events = read(client)
    growing = [event for event in events if event["read"]]
    assert len(growing) > 3 and len({event["bytes"] for event in growing}) == 1 and growing[0]["bytes"] > 0
    teacher = random_teacher("llama", num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=64)
    cache = new_cache(teacher.model)
    for before, event in zip([0, *(event["read"] for event in growing)], growing):
        prefill(teacher.model, torch.zeros(1, event["read"] - before, dtype=torch.long), cache, context=event["tokens"])
        assert event["teacher_bytes"] == cache_bytes(cache)
    last = events[-1]
    assert last["read"] == last["tokens"] and last["name"] == "book.txt" and last["dropped"] == 0
    assert client.get(f"/states/{last['id']}").json() | {"dropped": 0} == last
    assert read(client, TEXT[:100])[-1]["bytes"] == last["bytes"]


@pytest.mark.parametrize("kinds", ["KS", "KA"])
def test_answers_are_those_of_generate(kinds):
    model, tokenizer = tiny(kinds)
    client = client_of(model, tokenizer)
    book = read(client)[-1]["id"]
    first, second = "\n\nWho?\n<assistant>", "\n\nWhere is the hat?\n<assistant>"
    head = f"system: help\n<user>{TEXT}"
    want = [generated(model, tokenizer, head, after) for after in (first, second)]
    assert want[0] != want[1] and want[0] != generated(model, tokenizer, "system: help\n<user>", first)
    if "A" not in kinds:  # from the same state
        ids = [tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"] for text in (head, first)]
        state = State.from_text(model, ids[0][0])
        out = model.generate(ids[1], past_key_values=state.cache(model), max_new_tokens=12, do_sample=False)
        assert tokenizer.decode(out[0, ids[1].shape[1] :], skip_special_tokens=True) == want[0]
    # a question changes neither the state nor the answer to another one
    asked = ("Who?", "Where is the hat?", "Who?", "Where is the hat?")
    assert [ask(client, book, question) for question in asked] == want * 2
    follow = generated(model, tokenizer, head, f"\n\nWho?\n<assistant>{want[0].strip()}\n<user>Where?\n<assistant>")
    assert ask(client, book, "Where?", [("Who?", want[0])]) == follow != ask(client, book, "Where?")


def test_a_model_without_template_continues_the_text():
    model, tokenizer = tiny("KK", chat=False)
    client = client_of(model, tokenizer)
    assert "has no chat template" in client.get("/").text
    book = read(client)[-1]["id"]
    answer = generated(model, tokenizer, TEXT, "\n\nThe hat")
    assert ask(client, book, "The hat") == answer
    longer = generated(model, tokenizer, TEXT, f"\n\nThe hat{answer}\n\nThe cat")
    assert ask(client, book, "The cat", [("The hat", answer)]) == longer


def test_a_hybrid_says_that_it_grows():
    model, tokenizer = tiny("KAK")
    client = client_of(model, tokenizer)
    assert "1 of its 3 layers is attention" in " ".join(client.get("/").text.split())
    first, *_, last = (event for event in read(client) if event["read"])
    grown = last["bytes"] - first["bytes"]
    assert grown == (last["teacher_bytes"] - first["teacher_bytes"]) // 3 > 0
    assert "None of its 2 layers" in client_of(*tiny("KK")).get("/").text


def test_two_users_do_not_disturb_each_other():
    model, tokenizer = tiny("KK")
    client, texts = client_of(model, tokenizer), (TEXT, TEXT[::-1])
    alone = [ask(client, read(client, text)[-1]["id"], "Who?") for text in texts]
    together: dict[str, str] = {}

    def use(text: str) -> None:
        book = read(client, text)[-1]["id"]
        together[text] = ask(client, book, "Who?")

    users = [threading.Thread(target=use, args=(text,)) for text in texts]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert [together[text] for text in texts] == alone and alone[0] != alone[1]


def test_the_oldest_text_is_dropped(monkeypatch):
    monkeypatch.setattr(page, "MAX_BOOKS", 2)
    client = client_of(*tiny("KK"))
    reads = [read(client, text)[-1] for text in ("one", "two", "three")]
    assert [event["dropped"] for event in reads] == [0, 0, 1]
    gone = client.post(f"/states/{reads[0]['id']}/ask", json={"question": "Who?"})
    assert gone.status_code == 404 and "keeps the 2 newest texts" in gone.json()["detail"]
    assert all(ask(client, event["id"], "Who?") for event in reads[1:])
    monkeypatch.setattr(page, "max_cache_bytes", lambda model: reads[0]["bytes"] * 1.5)
    assert read(client, "four")[-1]["dropped"] == 2


def test_wrong_texts_and_questions_are_refused(monkeypatch):
    model, tokenizer = tiny("KA")
    client = client_of(model, tokenizer)
    for content, status, message in (
        ("caf\xe9".encode("latin-1"), 415, "not UTF-8: byte 4 is 0xe9"),
        ("cat".encode("utf-16"), 415, "not UTF-8"),
        (b"a\0b", 415, "not plain text"),
        (b" \n", 400, "The text is empty"),
        (b"a" * 5_000_001, 413, "at most 5 MB"),
    ):
        answer = client.post("/states", content=content)
        assert answer.status_code == status and message in answer.json()["detail"], answer.text
    pieces = client.post("/states", content=(b"a" * 10**6 for _ in range(6)))  # of unknown length
    assert pieces.status_code == 413
    book = read(client, "\ufeffcat")[-1]
    assert book["tokens"] == len(tokenizer("system: help\n<user>cat", add_special_tokens=False)["input_ids"])
    for question, status in (("  ", 400), ("a" * 20_001, 413)):
        assert client.post(f"/states/{book['id']}/ask", json={"question": question}).status_code == status
    monkeypatch.setattr(page, "max_cache_bytes", lambda model: 100_000)
    [error] = read(client)
    assert "attention layers of this model would keep" in error["error"]
    assert read(client, "cat")[-1]["id"]
    with pytest.raises(ValueError, match="Other texts are being read"):
        page.check_size(model, tokens=10, others=99_000)


def test_an_error_of_the_model_reaches_the_user():
    model, tokenizer = tiny("KK")
    client = client_of(model, tokenizer)
    book = read(client)[-1]["id"]
    broken = copy.deepcopy(TEMPLATE).replace("system", "{{ raise_exception('no systems here') }}")
    tokenizer.chat_template = broken
    assert "no systems here" in lines(client.post(f"/states/{book}/ask", json={"question": "Who?"}))[-1]["error"]
    tokenizer.chat_template = TEMPLATE
    assert ask(client, book, "Who?")


@pytest.fixture
def address():
    """The address of a server of a tiny student."""
    app = app_of(*tiny("KS"))

    @app.middleware("http")
    async def as_in_transformers(request, call_next):
        return await call_next(request)

    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        server.should_exit = True
        thread.join()


def test_work_for_a_user_who_left_ends(address, monkeypatch):
    done, whole = [], page.read_pieces

    def slow(*arguments):
        for hidden in whole(*arguments):
            done.append(hidden)
            time.sleep(0.1)
            yield hidden

    monkeypatch.setattr(page, "CPU_PIECE", 64)
    monkeypatch.setattr(page, "read_pieces", slow)
    response = urllib.request.urlopen(f"{address}states", data=TEXT.encode(), timeout=60)
    first = json.loads(response.readline())
    assert first["read"] == 0 and first["tokens"] > 10 * 64
    response.close()
    pieces = -1
    while len(done) != pieces:
        pieces = len(done)
        time.sleep(1)
    assert pieces * 64 < first["tokens"]  # the rest was not read
    monkeypatch.setattr(page, "read_pieces", whole)
    events = [json.loads(line) for line in urllib.request.urlopen(f"{address}states", data=b"cat", timeout=60)]
    monkeypatch.setattr(page, "MAX_NEW_TOKENS", 100_000)
    body, json_type = json.dumps({"question": "Who?"}).encode(), {"Content-Type": "application/json"}
    question = urllib.request.Request(f"{address}states/{events[-1]['id']}/ask", body, json_type)
    answer = urllib.request.urlopen(question, timeout=60)
    assert json.loads(answer.readline())
    answer.close()
    monkeypatch.setattr(page, "MAX_NEW_TOKENS", 12)
    urllib.request.urlopen(question, timeout=20).read()  # waits for the end of the first answer


def test_in_a_browser(address, tmp_path):
    with open_browser(tmp_path) as tab:
        tab.look(width=390)
        tab.open(address)
        tab.run(
            f"""{{ const data = new DataTransfer(); data.items.add(new File([{TEXT!r}], 'book.txt'));
            const drop = new DragEvent('drop', {{dataTransfer: data, bubbles: true, cancelable: true}});
            document.getElementById('drop').dispatchEvent(drop); }}"""
        )
        shown = "document.body.innerText"
        tab.wait(f"{shown}.includes('read once in')")
        assert tab.run("$('bar').value") == 1 and tab.run("$('title').textContent") == "book.txt"
        sizes = tab.run("[$('bytes').textContent, $('teacher').textContent]")
        book = tab.run("fetch(`/states/${book.id}`).then(r => r.json())")
        assert sizes == [f"{book['bytes'] / 2**10:.1f} KiB", f"{book['teacher_bytes'] / 2**10:.0f} KiB"]
        for number, question in enumerate(("Who?", "Where?"), 1):
            tab.run(f"$('question').value = {question!r}")
            tab.run("$('ask').click()")
            tab.wait(f"document.querySelectorAll('article').length === {number} && $('ask').textContent === 'Ask'")
        answers = tab.run("[...document.querySelectorAll('.answer')].map(p => p.textContent)")
        assert len(set(answers)) == 2 and all(answers)
        notes = tab.run("[...document.querySelectorAll('article .soft')].map(p => p.textContent)")
        assert all(note.startswith("12 tokens in") and f"Memory after it: {sizes[0]}" in note for note in notes)
        tab.run("$('follow').checked = true; $('question').value = 'Where?'; $('ask').click()")
        tab.wait("document.querySelectorAll('article').length === 3 && $('ask').textContent === 'Ask'")
        followed = tab.run("document.querySelector('article:last-child .answer').textContent")
        body = json.dumps({"question": "Where?", "turns": [("Where?", answers[1])]})
        options = f"{{method: 'POST', body: {body!r}, headers: {{'Content-Type': 'application/json'}}}}"
        asked = tab.run(f"fetch(`/states/${{book.id}}/ask`, {options}).then(r => r.text())")
        events = [json.loads(line) for line in asked.splitlines()]
        assert followed == "".join(event.get("text", "") for event in events) != answers[1]
        assert tab.run("document.documentElement.scrollWidth") == 390  # nothing is wider than a phone
        tab.open(f"{address}#{book['id']}")
        tab.call("Page.reload")
        time.sleep(0.2)
        tab.wait(f"{shown}.includes('read once in') && {shown}.includes('book.txt')")  # a reload keeps the text
        assert [entry for entry in tab.log if not entry.startswith((address, "data:"))] == []  # no error, no other host
