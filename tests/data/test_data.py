"""Text, token files and batches."""

import gzip
import itertools
import json
import os
import random
import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
import torch
import zstandard
from rich.console import Console
from tokenizers import Tokenizer, normalizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from deltify.config import DataSpec
from deltify.conversion.teacher import byte_tokenizer
from deltify.data import encoding, sources, token_files
from deltify.data.batches import MixedBatches, heldout_batches, ids_and_positions
from deltify.data.recall import BREAKS, recall_document, scattered_documents, scattered_outlines
from deltify.data.sources import Piece, documents, held_out, pieces, python_docs
from deltify.data.token_files import (
    HELDOUT_TOKENS,
    TokenFile,
    open_data,
    open_tokens,
    origin_of,
    sharing,
    tokenize,
    tokenize_split,
    tokenizer_fingerprint,
)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def token_file(lengths, first=0):
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    return TokenFile(np.arange(first, first + bounds[-1]).astype(np.uint32), bounds)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_json_lines_plain_and_compressed(tmp_path, suffix):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("one", "zwei", "три")).encode()
    path = tmp_path / f"texts{suffix}"
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(path.suffix, bytes)
    path.write_bytes(pack(lines))
    assert list(documents(str(path))) == ["one", "zwei", "три"]
    (tmp_path / "a.txt").write_text("a text")
    assert list(documents(str(tmp_path))) == ["a text", "one", "zwei", "три"]


def test_compressed_files_of_several_parts_are_read_whole_and_damaged_ones_are_named(tmp_path):
    lines = [json.dumps({"text": f"number {i} " + "x" * 50}).encode() + b"\n" for i in range(1000)]
    halves = b"".join(lines[:500]), b"".join(lines[500:])
    for suffix, pack in ((".gz", gzip.compress), (".zst", zstandard.ZstdCompressor().compress)):
        path = tmp_path / f"a.jsonl{suffix.upper()}"
        first, second = map(pack, halves)
        path.write_bytes(first + second)
        assert len(list(documents(str(path)))) == 1000
        for damaged in (first + second[:-9], first + second[:9], first[: len(first) // 2], b"plain text"):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=rf"{path} is damaged or incomplete"):
                list(documents(str(path)))


def test_a_folder_is_read_with_its_linked_folders_and_suffixes_in_capitals(tmp_path):
    (books := tmp_path / "books").mkdir()
    (links := tmp_path / "links").mkdir()
    (books / "a.TXT").write_text("a book")
    (books / "back").symlink_to(links)  # a circle
    (links / "more").symlink_to(books)
    (links / "again").symlink_to(books)
    (links / ".hidden.txt").write_text("hidden")
    (links / "b.md").write_text("a page")
    assert sorted(documents(str(links))) == ["a book", "a page"]


def test_a_long_document_is_not_held_out_with_most_of_the_text(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(token_files, "HELDOUT_TOKENS", 100)
    long = next(text for i in range(1000) if held_out(text := f"{i} " + "long " * 400))
    short = [text for i in range(20) if not held_out(text := f"short {i}")]
    train, held = tokenize_split([*short, long], tokenizer, tmp_path / "a", heldout_tokens=100)
    assert len(held) == 100 and len(train) > 1500
    train, held = tokenize_split([*short, long], tokenizer, tmp_path / "b", max_tokens=900, heldout_tokens=100)
    assert (len(held), len(train)) == (100, 900)


def test_a_tokenizer_that_splits_special_tokens_has_another_fingerprint(tokenizer):
    other = byte_tokenizer()
    other.split_special_tokens = True
    assert token_files.tokenizer_fingerprint(other) != token_files.tokenizer_fingerprint(tokenizer)


PACK = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress, ".jsonl": bytes, ".txt": bytes}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json.zst"])
def test_what_cannot_be_encoded_is_replaced_counted_and_named_once(tmp_path, tokenizer, capsys, suffix):
    lines = [r'{"text": "fine"}', "", r'{"text": "cut in two: \ud83d"}', r'{"text": "\ude00\ud83d, \ud83d\ude00"}']
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(PACK[path.suffix]("\n".join(lines).encode()))
    whole = ["fine", "cut in two: \ufffd", "\ufffd\ufffd, \U0001f600"]
    for source in (path, tmp_path):  # a file, and a folder
        with pytest.warns(UserWarning, match=rf"rows{suffix}, line 3: halves of surrogate pairs") as warned:
            assert list(documents(str(source))) == whole
        assert len(warned) == 1
    file = tokenize(pieces(str(path)), tokenizer, tmp_path / "tokens")
    assert tokenizer.decode(file.tokens) == "".join(one + "<|end|>" for one in whole)
    assert meta_of(tmp_path / "tokens")["replaced_characters"] == 3
    said = capsys.readouterr().out
    assert said.count("surrogate") == 1 and f"3 were, the first in {path}, line 3" in said


def test_texts_of_any_source_are_repaired(tmp_path, tokenizer, monkeypatch):
    texts = ["halves \ud83d\ude00 of one", "\udc80", "\ufeffmarked", "\ufeff", " \n", "fine"]
    whole = ["halves \U0001f600 of one", "\ufffd", "marked", "fine"]
    monkeypatch.setattr(sources, "hub_documents", lambda source: iter(texts))
    with pytest.warns(UserWarning, match="hf:name, document 2: halves of"):
        assert list(documents("hf:name")) == whole
    with pytest.warns(UserWarning, match="hf:name, document 2: halves of"):
        assert any("\ufffd" in document for document in documents("recall:hf:name"))
    train, held = tokenize_split(pieces("hf:name"), tokenizer, tmp_path / "pair", heldout_sequence_length=4)
    assert "".join(map(tokenizer.decode, (train.tokens, held.tokens))).count("<|end|>") == 4
    assert meta_of(tmp_path / "pair" / "heldout")["replaced_characters"] == 1


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_byte_order_marks_are_not_text(tmp_path, suffix):
    mark = b"\xef\xbb\xbf"
    path = tmp_path / f"a{suffix}"
    lines = [b'{"text": "one"}', b'{"text": "two"}', b'{"text": "\\ufeffthree"}']
    content = b"one" if suffix == ".txt" else b"\r\n".join(mark + line for line in lines)  # files put together
    path.write_bytes(PACK[path.suffix](content if suffix != ".txt" else mark + content))
    assert list(documents(str(path))) == (["one"] if suffix == ".txt" else ["one", "two", "three"])


def test_hidden_files_of_a_folder_are_left_out(tmp_path):
    for name in (
        "a.txt",
        "._a.txt",
        ".ipynb_checkpoints/a-checkpoint.txt",
        "sub/.hidden.md",
        "sub/b.md",
        "sub/.c/d.md",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07\xb0" if name.startswith("._") else name.encode())
    assert list(documents(str(tmp_path))) == ["a.txt", "sub/b.md"]
    assert list(documents(str(tmp_path / "sub" / ".c"))) == ["sub/.c/d.md"]  # a hidden folder that is named is read
    assert list(documents(str(tmp_path / "sub" / ".hidden.md"))) == ["sub/.hidden.md"]
    with pytest.raises(ValueError, match="has no text file"):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "._b.txt").write_bytes(b"\xb0")
        list(documents(str(tmp_path / "other")))


def test_all_frames_of_a_compressed_file_are_read(tmp_path):
    for suffix in (".gz", ".zst"):
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(b"".join(PACK[suffix](json.dumps({"text": one}).encode() + b"\n") for one in ("one", "two")))
        assert list(documents(str(path))) == ["one", "two"]


@pytest.mark.parametrize("size", [1, 7, 40, 10**6])
def test_lines_keep_their_numbers_in_blocks_of_any_size(tmp_path, monkeypatch, size):
    monkeypatch.setattr(sources, "PIECE", size)
    path = tmp_path / "a.jsonl"
    ends = itertools.cycle(["\n", "\r\n", "\r", "\n\n"])
    texts = [f"ünïcode\u2028 {number} " * (number % 5 + 1) for number in range(30)]
    lines = [json.dumps({"text": one}, ensure_ascii=False) + next(ends) for one in texts]
    path.write_bytes("".join(lines).encode() + b'{"text": 3}')
    found = documents(str(path))
    assert list(itertools.islice(found, 30)) == texts
    with pytest.raises(ValueError, match=rf"line {30 + 7 + 1}: the field"):
        next(found)


def test_wrong_sources_are_named(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match="no text at"):
        list(documents(str(tmp_path / "absent.txt")))
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"txt": 1}\n')
    with pytest.raises(ValueError, match="line 2"):
        list(documents(str(tmp_path / "bad.jsonl")))
    with pytest.raises(ValueError, match="no text"):
        tokenize(["", ""], tokenizer, tmp_path / "empty")
    with pytest.raises(ValueError, match="no text"):
        tokenize_split(["", ""], tokenizer, tmp_path / "empty")


def test_files_of_unknown_kinds_are_refused_unless_a_folder_has_others(tmp_path):
    (tmp_path / "a.rst").write_text("a text")
    with pytest.raises(ValueError, match=r"a\.rst' is not a text file; text files end in \.txt, \.md"):
        list(documents(str(tmp_path / "a.rst")))
    with pytest.raises(ValueError, match=r"has no text file; text files end in \.txt, \.md"):
        list(documents(str(tmp_path)))
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "b.md").write_text("b text")
    assert list(documents(str(tmp_path))) == ["b text"]


@pytest.mark.parametrize("value", ["null", "3", '["a"]'])
def test_a_text_that_is_not_a_string_is_refused_with_its_line(tmp_path, value):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "good"}}\n\n{{"text": {value}}}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3: the field 'text' is"):
        list(documents(str(tmp_path / "a.jsonl")))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_file_that_is_not_utf8_is_named(tmp_path, name):
    (tmp_path / name).write_bytes('{"text": "naïve"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{name} is not UTF-8"):
        list(documents(str(tmp_path / name)))


def test_tokens_and_bounds_survive_the_disk(tmp_path, tokenizer):
    file = tokenize(["ab", "", "cde"], tokenizer, tmp_path / "tokens")
    end = tokenizer.eos_token_id
    first = [*tokenizer("ab")["input_ids"], end]
    assert file.tokens.tolist() == [*first, *tokenizer("cde")["input_ids"], end]
    assert file.bounds.tolist() == [0, 3, 7]
    again = tokenize(["other text"], tokenizer, tmp_path / "tokens")  # an existing folder is used
    assert again.tokens.tolist() == file.tokens.tolist()
    (tmp_path / "tokens" / "tokens.bin").write_bytes(b"\0\0")  # a broken one is created again
    with pytest.raises(ValueError, match="damaged"):
        open_tokens(tmp_path / "tokens")
    assert tokenize(["ab"], tokenizer, tmp_path / "tokens").tokens.tolist() == first


def meta_of(folder):
    return json.loads((folder / "meta.json").read_text())


def framed_tokenizer(**options):
    """Return a tokenizer that adds a token before a text and one after it, drops X, and has no token for Y."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "unk_token": "<unk>", "extra_special_tokens": ["<|turn|>"]})
    backend = tokenizer.backend_tokenizer
    pairs = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "<|end|>")]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A <|end|>", special_tokens=pairs)
    backend.normalizer = normalizers.Sequence([normalizers.Replace("X", ""), normalizers.Replace("Y", "<unk>")])
    names = {"bos_token": "<s>", "eos_token": "<|end|>", "pad_token": "<|end|>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names, **options)


def test_a_text_that_has_only_added_tokens_is_not_a_document(tmp_path):
    tokenizer = framed_tokenizer()
    file = tokenize(["ab", "", "\n", "XX", "c<|end|>", "\u3000"], tokenizer, tmp_path / "tokens")
    assert tokenizer.decode(file.tokens) == "<s>ab<|end|><s>c<|end|><|end|>" and file.bounds.tolist() == [0, 4, 8]
    with pytest.raises(ValueError, match="no text"):
        tokenize(["", " ", "X"], tokenizer, tmp_path / "empty")


def test_names_of_special_tokens_in_a_text_are_counted(tmp_path, tokenizer, capsys):
    chats = ["<|turn|>hello<|turn|>", "plain", "<s>", "[<unk>] Y Y", "more<|end|>"]
    tokenizer = framed_tokenizer()
    file = tokenize(chats, tokenizer, tmp_path / "tokens")
    found = {"<s>": 1, "<unk>": 1, "<|turn|>": 2, "<|end|>": 1}
    assert meta_of(tmp_path / "tokens")["special_tokens_in_text"] == found
    assert (file.tokens == tokenizer.convert_tokens_to_ids("<|turn|>")).sum() == 2  # the names became special tokens
    said = capsys.readouterr().out
    assert said.count("become those tokens") == 1 and "<|turn|> 2" in said
    tokenize(chats, tokenizer, tmp_path / "first", max_tokens=10)  # only what was written counts
    assert meta_of(tmp_path / "first")["special_tokens_in_text"] == {"<|turn|>": 2}
    capsys.readouterr()
    tokenize(chats, framed_tokenizer(split_special_tokens=True), tmp_path / "split")
    assert meta_of(tmp_path / "split")["special_tokens_in_text"] == {} and not capsys.readouterr().out


# ---- processes -------------------------------------------------------------------------------------------------------


def plainly(texts, tokenizer, limit, room=None):
    """Return tokens and bounds of one file or two, computed document by document."""
    parts, skipped = ([], []), 0

    def size(part):
        return sum(map(len, parts[part]))

    for one in texts:
        part, full = int(room is not None and held_out(one)), limit is not None and size(0) >= limit
        skipped = skipped + 1 if full and not part else 0
        if (size(1) < room) if part else not full:
            ids = tokenizer(one)["input_ids"]
            parts[part].append(ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id])
        full = limit is not None and size(0) >= limit
        if full and (size(1) >= (room or 0) or skipped >= token_files.MAX_SKIPPED_DOCUMENTS):
            break
    return [(list(itertools.chain(*part)), np.cumsum([0, *map(len, part)]).tolist()) for part in parts]


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("limit", [None, 1, 5000])
def test_any_number_of_processes_makes_the_same_file(tmp_path, monkeypatch, processes, limit):
    monkeypatch.setattr(encoding, "PIECES_BEFORE_WORKERS", 1)
    monkeypatch.setattr(token_files, "MAX_SKIPPED_DOCUMENTS", 40)
    tokenizer, draw = framed_tokenizer(), random.Random(0)
    texts = ["".join(draw.choices("ab cXdé<|turn|>", k=draw.choice([1, 9, 90, 3000]))) + "." for _ in range(300)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    for size in (1, 500, 10**6):
        monkeypatch.setattr(sources, "PIECE", size)
        folder, options = tmp_path / str(size), {"max_tokens": limit, "processes": processes}
        expected = plainly(texts, tokenizer, limit)[0]
        for name, given in (("list", texts), ("file", pieces(str(path)))):
            file = tokenize(given, tokenizer, folder / name, **options)
            assert (file.tokens.tolist(), file.bounds.tolist()) == expected
        for room in (1, 800):
            pair = tokenize_split(pieces(str(path)), tokenizer, folder / f"{room}", heldout_tokens=room, **options)
            expected = plainly(texts, tokenizer, limit, room)
            assert [(file.tokens.tolist(), file.bounds.tolist()) for file in pair] == expected
        if processes == 1:
            continue
        meta = meta_of(folder / "list")
        assert meta == meta_of(folder / "file") | {"digest": meta["digest"]}


def test_a_source_without_more_held_out_text_ends_at_the_same_document(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(sources, "PIECE", 300)
    monkeypatch.setattr(token_files, "MAX_SKIPPED_DOCUMENTS", 7)
    texts = [f"document {number}" for number in range(2000)]
    expected = plainly(texts, tokenizer, 100, 10**6)
    for processes in (1, 2):
        options = {"max_tokens": 100, "heldout_tokens": 10**6, "processes": processes}
        pair = tokenize_split(texts, tokenizer, tmp_path / str(processes), **options)
        assert [(file.tokens.tolist(), file.bounds.tolist()) for file in pair] == expected


@pytest.mark.parametrize("source", ["recall", "recall:python-docs"])
def test_recall_made_in_processes_is_the_same(tmp_path, tokenizer, monkeypatch, source):
    monkeypatch.setattr(sources, "python_docs", lambda: (f"Topic {n}. " + "One. Two! Three? " * n for n in range(60)))
    monkeypatch.setattr(sources, "COUNT", 200)
    monkeypatch.setattr(sources, "PIECE", 1000)
    monkeypatch.setattr(encoding, "PIECES_BEFORE_WORKERS", 1)
    file = tokenize(pieces(source), tokenizer, tmp_path / "tokens", processes=2)
    expected = plainly(documents(source), tokenizer, None)[0]
    assert (file.tokens.tolist(), file.bounds.tolist()) == expected and len(file.bounds) > 100


def test_processes_import_neither_torch_nor_the_script(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(encoding, "PIECES_BEFORE_WORKERS", 0)
    asks = Piece(eval, ("[('here', ' '.join(__import__('sys').modules))]",))
    names = tokenizer.decode(tokenize([asks], tokenizer, tmp_path / "tokens", processes=2).tokens[:-1]).split()
    assert "deltify.data.encoding" in names
    assert not {"torch", "transformers", "pytest", "deltify.data.token_files"} & {*names}


def test_errors_come_as_they_are_and_after_the_documents_before_them(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(sources, "PIECE", 200)
    monkeypatch.setattr(encoding, "PIECES_BEFORE_WORKERS", 1)
    error = OSError("the line is dead")

    def broken():
        yield from (f"document {number}" for number in range(100))
        raise error

    with pytest.raises(OSError) as raised:
        tokenize(broken(), tokenizer, tmp_path / "a", processes=2)
    assert raised.value is error
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "document"}\n' * 99 + "broken\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 100: 'broken"):
        tokenize(pieces(str(path)), tokenizer, tmp_path / "b", processes=2)
    for name, texts in (("c", broken()), ("d", pieces(str(path)))):  # errors come only when their document is needed
        assert len(tokenize(texts, tokenizer, tmp_path / name, max_tokens=99 * 9, processes=2)) >= 99 * 9
    with pytest.raises(RuntimeError, match="a worker process for tokenization ended with status 3"):
        tokenize(["a" * 300, Piece(exec, ("import os; os._exit(3)",))], tokenizer, tmp_path / "e", processes=2)
    with pytest.raises(RuntimeError, match="ArithmeticError: "):  # an error that cannot be pickled
        code = "raise type('Local', (ArithmeticError,), {'__name__': 'ArithmeticError'})('odd')"
        tokenize(["a" * 300, Piece(exec, (code.replace("Local", "ArithmeticError"),))], tokenizer, tmp_path / "f")
    assert not any((tmp_path / name).exists() for name in "abef")


def test_an_interrupt_ends_the_processes(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(sources, "PIECE", 200)
    monkeypatch.setattr(encoding, "PIECES_BEFORE_WORKERS", 0)
    started = []
    monkeypatch.setattr(encoding.Processes, "__enter__", lambda self: started.append(self) or self)

    def interrupted():
        yield from (f"document {number}" for number in range(1000))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize(interrupted(), tokenizer, tmp_path / "tokens", processes=2)
    assert [process.poll() is not None for process in started[0].all] == [True, True]


def test_tokenizers_that_need_python_run_in_this_process(tmp_path):
    class Loud(PreTrainedTokenizerFast):
        def _encode_plus(self, text, *args, **options):
            return super()._encode_plus(text.upper() if isinstance(text, str) else text, *args, **options)

    texts = [f"document {number}" for number in range(100)]
    byte = byte_tokenizer()
    loud = Loud(tokenizer_object=byte.backend_tokenizer, eos_token="<|end|>")
    for name, tokenizer in (("loud", loud), ("slow", ByT5Tokenizer())):
        file = tokenize(texts, tokenizer, tmp_path / name, processes=2)
        assert (file.tokens.tolist(), file.bounds.tolist()) == plainly(texts, tokenizer, None)[0]
    assert byte.decode(tokenize(texts, loud, tmp_path / "loud").tokens).startswith("DOCUMENT 0<|end|>")
    slow = ByT5Tokenizer()
    slow.add_tokens(["new"])
    with pytest.raises(ValueError, match="another tokenizer"):
        tokenize(texts, slow, tmp_path / "slow")


def test_padding_and_truncation_of_earlier_calls_are_not_kept(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    file = tokenize(["a", "abc"], tokenizer, tmp_path / "tokens")
    assert tokenizer.decode(file.tokens) == "a<|end|>abc<|end|>"


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_on_a_terminal_only(tmp_path, tokenizer, monkeypatch, terminal):
    shown = StringIO()
    monkeypatch.setattr(token_files, "console", Console(file=shown, force_terminal=terminal, width=120))
    path = tmp_path / "a.txt"
    path.write_text("some text " * 200_000)
    tokenize(pieces(str(path)), tokenizer, tmp_path / "tokens", origin=origin_of(str(path)))
    assert ("tokenize a.txt" in shown.getvalue() and "2 MB, " in shown.getvalue()) is terminal
    assert (shown.getvalue() == "") is not terminal


def test_a_tokenizer_is_the_same_after_a_call_that_pads_and_another_with_another_end(tokenizer):
    mine = tokenizer_fingerprint(tokenizer)
    tokenizer(["ab", "abc"], padding=True, truncation=True, max_length=9)
    assert tokenizer_fingerprint(tokenizer) == mine
    other = byte_tokenizer()
    other.eos_token = "a"
    assert tokenizer_fingerprint(other) != mine


def test_ids_beyond_16_bits_are_kept_however_few_tokens_there_are(tmp_path):
    other = byte_tokenizer()
    state = json.loads(other.backend_tokenizer.to_str())
    state["model"]["vocab"]["b"] = 70_000
    far = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|end|>")
    file = tokenize(["ab"], far, tmp_path / "tokens")
    assert file.tokens.tolist() == [*far("a")["input_ids"], 70_000, far.eos_token_id]


def test_another_tokenizer_is_refused(tmp_path, tokenizer):
    tokenize(["ab"], tokenizer, tmp_path / "tokens")
    other = byte_tokenizer()
    other.add_tokens(["<|new|>"])
    with pytest.raises(ValueError, match="another tokenizer"):
        tokenize(["ab"], other, tmp_path / "tokens")


def test_batches_depend_on_nothing_but_the_step():
    mix = MixedBatches([token_file([50, 300, 700]), token_file([400], first=5000)], [3.0, 1.0], 32, 8, seed=1)
    late = mix.batch(7)
    for step in range(7):
        mix.batch(step)
    fresh = MixedBatches(mix.files, mix.weights, 32, 8, seed=1)
    assert torch.equal(fresh.batch(7).input_ids, late.input_ids)
    halves = [fresh.batch(7, rank, 2).input_ids for rank in range(2)]
    assert torch.equal(torch.cat(halves), late.input_ids)
    with pytest.raises(ValueError, match="8 sequences cannot be divided among 3"):
        mix.batch(0, 0, 3)


def test_weights_are_kept_and_an_epoch_shows_every_window_once():
    files = [token_file([640]), token_file([320], first=5000)]
    mix = MixedBatches(files, [3.0, 1.0], 32, 10, seed=0)
    rows = torch.cat([mix.batch(step).input_ids for step in range(100)])
    assert int((rows[:, 0] < 5000).sum()) == 750
    single = MixedBatches(files[:1], [1.0], 32, 10, seed=0)
    for epoch in range(2):  # 20 windows, two batches
        rows = torch.cat([single.batch(2 * epoch + step).input_ids for step in range(2)])
        assert sorted(rows[:, 0].tolist()) == list(range(0, 640, 32))


def test_positions_restart_with_each_document():
    batch = MixedBatches([token_file([10, 5, 17])], [1.0], 32, 1, seed=0).batch(0)
    assert batch.position_ids[0].tolist() == [*range(10), *range(5), *range(17)]
    assert int((~batch.same_document).sum()) == 2
    cut = heldout_batches([token_file([10, 54])], 8, 4, 16)
    assert cut[0].input_ids.shape == (2, 8) and cut[0].position_ids[1].tolist() == [0, 1, 0, 1, 2, 3, 4, 5]


def test_every_source_has_an_equal_share_of_the_held_out_sequences():
    files = [token_file([100]), token_file([100], first=5000)]
    firsts = [batch.input_ids[:, 0].tolist() for batch in heldout_batches(files, 8, 3, 32)]
    assert firsts == [[0, 8, 5000], [5008]]
    with pytest.raises(ValueError, match="held-out text has 5 tokens"):
        heldout_batches([token_file([5])], 8, 4, 16)


def test_a_source_shorter_than_a_sequence_is_refused():
    with pytest.raises(ValueError, match="fewer than one sequence"):
        MixedBatches([token_file([10])], [1.0], 32, 1, seed=0)


@pytest.mark.parametrize("rank, masked", [(0, False), (0, True), (1, True)])
def test_windows_are_shuffled_once_an_epoch(rank, masked, monkeypatch):
    files, length = [token_file([50, 300, 701]), token_file([415], first=5000)], 32
    if masked:
        files[0] = replace(files[0], loss_mask=np.ones(len(files[0]), np.uint8))
    mix = MixedBatches(files, [3.0, 1.0], length, 8, seed=1)
    seeds, generator = [], np.random.default_rng
    mix.source_of(0)  # shuffles the files
    monkeypatch.setattr(np.random, "default_rng", lambda seed: seeds.append(tuple(seed)) or generator(seed))
    batches = [mix.batch(step, rank, 2) for step in range(13)]
    epochs = {(1, which, turn // (len(files[which]) // length)) for which, turn in map(mix.source_of, range(8 * 13))}
    assert len(seeds) == len(epochs) > 4 and set(seeds) == epochs
    rows = [row for batch in batches for row in zip(batch.input_ids, batch.position_ids)]
    own = [index for index in range(8 * 13) if index % 8 // 4 == rank]
    for index, row in zip(own, rows, strict=True):
        which, turn = mix.source_of(index)
        windows = len(files[which]) // length
        order = generator([1, which, turn // windows])
        offset = order.integers(0, len(files[which]) - windows * length + 1)
        expected = ids_and_positions(files[which], offset + order.permutation(windows)[turn % windows] * length, length)
        assert all(np.array_equal(one, other) for one, other in zip(row, expected))


def test_python_docs_are_english_and_split_the_same_everywhere(tmp_path, tokenizer):
    texts = list(python_docs())
    held = [text for text in texts if held_out(text)]
    train = [text for text in texts if not held_out(text)]
    assert sum(map(len, texts)) > 1_500_000
    assert 0.02 < len(held) / len(texts) < 0.2 and not set(train) & set(held)
    assert [number for number in range(60) if held_out(f"document {number}")] == [6, 10, 39]  # must never change
    pair = open_data(DataSpec(folder=str(tmp_path)), "teacher", tokenizer, 2**20)
    for (file,), part in zip(pair, (train, held)):
        whole = tokenize(part, tokenizer, tmp_path / f"whole-{len(part)}")
        assert np.array_equal(file.tokens, whole.tokens) and np.array_equal(file.bounds, whole.bounds)


# ---- sources ---------------------------------------------------------------------------------------------------------


def test_an_endless_source_is_read_as_far_as_needed(tmp_path, tokenizer, monkeypatch):
    read = []

    def endless():
        for number in itertools.count():
            read.append(f"document {number}: " + "text " * 400)
            yield read[-1]

    monkeypatch.setattr(sources, "python_docs", endless)
    spec = DataSpec(folder=str(tmp_path / "data"), max_tokens=100_000)
    (train,), (held,) = open_data(spec, "teacher", tokenizer, 1000)
    size = len(tokenizer(read[0])["input_ids"]) + 2
    assert 100_000 <= len(train) < 100_000 + size
    assert HELDOUT_TOKENS <= len(held) < HELDOUT_TOKENS + size and len(read) < 2000
    expected = [text for text in read if not held_out(text)][: len(train.bounds) - 1]
    assert train.tokens.tolist() == tokenize(expected, tokenizer, tmp_path / "expected").tokens.tolist()
    count = len(read)
    open_data(spec, "teacher", tokenizer, 1000)  # from disk
    assert len(read) == count


def test_held_out_text_is_capped_while_training_text_is_not(tmp_path, tokenizer):
    texts = [f"document {number}" for number in range(2000)]
    train, held = tokenize_split(texts, tokenizer, tmp_path / "pair", heldout_tokens=100)
    assert 100 <= len(held) < 120
    assert len(train.bounds) - 1 == sum(not held_out(text) for text in texts)


def test_a_source_that_repeats_itself_ends(tmp_path, tokenizer):
    text = next(text for text in map(str, itertools.count()) if not held_out(text))
    train, held = tokenize_split(
        itertools.repeat(text), tokenizer, tmp_path / "pair", max_tokens=2000, heldout_sequence_length=64
    )
    assert len(train) + len(held) >= 2000 and len(held) >= 64


def test_a_given_held_out_source_is_read_as_far_as_needed(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(sources, "python_docs", lambda: map(str, itertools.count()))
    (tmp_path / "a.txt").write_text("training text")
    spec = DataSpec({str(tmp_path / "a.txt"): 1.0}, "python-docs", str(tmp_path / "data"))
    (train,), (held,) = open_data(spec, "teacher", tokenizer, 1000)
    assert len(train) == len("training text") + 1
    assert HELDOUT_TOKENS <= len(held) < HELDOUT_TOKENS + 10


def test_recall_asks_for_the_facts_it_states_and_is_the_same_everywhere(tmp_path, tokenizer):
    texts = list(itertools.islice(documents("recall"), 200))
    assert texts[7] == recall_document(random.Random("0:7")) and len(set(texts)) == 200
    asked = 0
    for text_ in texts:
        told, after = re.split(f"\n\n(?:{'|'.join(map(re.escape, BREAKS))})\n\n", text_)
        values = re.findall(r"\d+ \w+ Street|\w+ \w+ called \w+|[\d,]+ crowns|\w+-coated \w+", after)
        assert all(value in told for value in values), text_
        asked += len(values)
    assert asked > 2000
    spec = DataSpec({"recall": 1.0}, None, str(tmp_path / "data"), max_tokens=500_000)
    (train,), (held,) = open_data(spec, "teacher", tokenizer, 1000)
    assert len(train) > len(held) > 0


def test_recall_is_scattered_over_all_of_another_text_that_is_not_held_out(tmp_path, tokenizer):
    path = tmp_path / "text.jsonl"
    said = [f"Sentence {number} says little." for number in range(5000)]
    whole = [" ".join(said[i : i + 500]) for i in range(0, 5000, 500)] + [f"Held out or not, {i}." for i in range(500)]
    path.write_text("".join(json.dumps({"text": text_}) + "\n" for text_ in whole))
    texts = list(documents(f"recall:{path}"))
    assert texts == list(documents(f"recall:{path}"))
    trained = re.findall(r"Sentence \d+ |not, \d+", " ".join(text_ for text_ in whole if not held_out(text_)))
    spoken = [re.findall(r"Sentence \d+ |not, \d+", text_) for text_ in texts]
    assert [one for document in spoken for one in dict.fromkeys(document)] == trained  # in order, none lost
    lengths, again = [len(set(document)) for document in spoken], [len(d) - len(set(d)) for d in spoken]
    assert 100 < max(lengths) <= 256 and 0.2 < sum(again) / sum(lengths) < 0.3
    assert all(len({int(one[9:]) // 500 for one in document if one[0] == "S"}) <= 1 for document in spoken)
    asked = 0
    for text_ in texts:  # a fact is asked for twice, the last time at the end
        for value in re.findall(r"(?:card of .+? bears the digits|signs as reader) (\d+)", text_):
            assert text_.count(value) == 3 and text_.rindex(value) > max(map(text_.rfind, ("Sentence", "Held")))
            asked += 1
    assert asked > 20
    spec = DataSpec({f"recall:{path}": 0.5, str(path): 0.5}, None, str(tmp_path / "data"), max_tokens=50_000)
    trains, (held,) = open_data(spec, "teacher", tokenizer, 1000)  # only the text provides validation
    assert trains[0].digest != trains[1].digest and len(held)
    with pytest.raises(ValueError, match="none of the sources recall:"):
        open_data(replace(spec, train={f"recall:{path}": 1.0}), "teacher", tokenizer, 1000)
    path.write_text(path.read_text() + json.dumps({"text": "more"}) + "\n")
    with pytest.raises(ValueError, match=r"the text at recall:.* changed"):
        open_data(spec, "teacher", tokenizer, 1000)


def test_recall_documents_of_texts_with_equal_beginnings_state_different_facts():
    texts = list(scattered_documents(scattered_outlines(["Copyright 2020. All rights reserved.\n"] * 50)))
    told = {text_.replace("Copyright 2020.", "").replace("All rights reserved.", "") for text_ in texts}
    assert len(texts) == len(told) == 50 and all("Copyright" in text_ for text_ in texts)


def test_recall_of_text_without_files_is_tokenized_again_when_its_rules_change(monkeypatch):
    before = [origin_of(f"recall:{source}")["files"] for source in ("python-docs", "hf:name", "/gone")]
    monkeypatch.setattr("deltify.data.token_files.digest", lambda path: "another")
    after = [origin_of(f"recall:{source}")["files"] for source in ("python-docs", "hf:name", "/gone")]
    assert before[0] != after[0] and before[1] != after[1] and before[2] is after[2] is None


def test_of_several_processes_one_tokenizes_and_the_others_wait(tmp_path, tokenizer):
    reads, together = [], threading.Barrier(4)

    def texts():
        reads.append(1)
        for number in range(20):
            time.sleep(0.005)
            yield f"document {number}"

    def ask(_):
        together.wait()
        return tokenize(texts(), tokenizer, tmp_path / "data" / "text")

    with ThreadPoolExecutor(4) as pool:
        digests = {file.digest for file in pool.map(ask, range(4))}
    assert len(reads) == 1 and len(digests) == 1 and len(open_tokens(tmp_path / "data" / "text").bounds) == 21


def test_both_parts_appear_when_complete_or_neither_does(tmp_path, tokenizer):
    def broken():
        yield from (f"document {number}" for number in range(100))
        raise OSError("the line is dead")

    with pytest.raises(OSError, match="dead"):
        tokenize_split(broken(), tokenizer, tmp_path / "pair")
    assert not (tmp_path / "pair").exists()
    texts = [f"document {number}" for number in range(100)]
    train, held = tokenize_split(texts, tokenizer, tmp_path / "pair")
    assert len(train.bounds) + len(held.bounds) - 2 == 100 and not list(tmp_path.glob("*.unfinished"))
    shutil.rmtree(tmp_path / "pair" / "heldout")  # a broken pair is created again
    with pytest.raises(ValueError, match=r"pair.heldout lacks meta\.json, tokens\.bin, bounds\.npy"):
        open_tokens(tmp_path / "pair" / "heldout")
    assert tokenize_split(texts, tokenizer, tmp_path / "pair")[1].digest == held.digest


@pytest.mark.parametrize("judges", [False, True])
def test_of_one_document_a_twentieth_of_the_tokens_is_held_out(tmp_path, tokenizer, judges):
    texts = (f"{number} " + "".join(map(str, range(1000))) for number in itertools.count())
    text = next(text for text in texts if held_out(text) is judges)
    train, held = tokenize_split([text], tokenizer, tmp_path / "pair", heldout_sequence_length=32)
    whole = tokenize([text], tokenizer, tmp_path / "whole").tokens.tolist()
    both = (held, train) if judges else (train, held)
    assert [*both[0].tokens, *both[1].tokens] == whole and len(held) == len(whole) // 20
    assert [file.bounds.tolist() for file in (train, held)] == [[0, len(train)], [0, len(held)]]


def test_few_documents_are_cut_by_tokens_and_keep_their_bounds(tmp_path, tokenizer):
    texts = [text for text in (f"document {number:02}" for number in range(30)) if not held_out(text)][:10]
    train, held = tokenize_split(
        texts, tokenizer, tmp_path / "pair", heldout_sequence_length=32
    )  # 10 documents of 12 tokens
    whole = tokenize(texts, tokenizer, tmp_path / "whole").tokens.tolist()
    assert [*train.tokens, *held.tokens] == whole
    assert train.bounds.tolist() == [*range(0, 88, 12), 88] and held.bounds.tolist() == [0, 8, 20, 32]
    # a whole document is held out, but a row is longer: it stays so, and the tail joins it
    judge = next(text for text in (f"document {number:02}" for number in range(99)) if held_out(text))
    train, held = tokenize_split([judge, *texts], tokenizer, tmp_path / "other", heldout_sequence_length=32)
    assert held.bounds.tolist() == [0, 12, 20, 32, 44] and len(train) == 88


@pytest.mark.parametrize("kind", ["recall", "sparse-recall"])
def test_recall_over_a_text_whose_end_is_held_out_is_refused(kind, tmp_path, tokenizer):
    text, dev = tmp_path / "book.txt", tmp_path / "dev.txt"
    for path in (text, dev):
        path.write_text("A sentence of a book. Another one follows it. " * 1000)
    spec = DataSpec(train={str(text): 0.5, f"{kind}:{text}": 0.5}, folder=str(tmp_path / "data"))
    with pytest.raises(ValueError, match=r"would have validation text: .*book\.txt has too few documents"):
        open_data(spec, "teacher", tokenizer, 64)
    with pytest.raises(ValueError, match=r"would have validation text: .*book\.txt has too few documents"):
        other_name = f"{kind}:{tmp_path}/./book.txt"
        open_data(replace(spec, train={str(text): 0.5, other_name: 0.5}), "teacher", tokenizer, 64)
    open_data(replace(spec, heldout=str(dev)), "teacher", tokenizer, 64)


@pytest.mark.parametrize("kind", ["", "recall:", "sparse-recall:"])
def test_text_that_is_held_out_and_trained_on_is_refused(kind, tmp_path, tokenizer):
    text = tmp_path / "book.txt"
    text.write_text("A sentence of a book. Another one follows it. " * 1000)
    spec = DataSpec({f"{kind}{text}": 1.0}, f"{tmp_path}/./book.txt", str(tmp_path / "data"))
    with pytest.raises(ValueError, match=r"book\.txt: the student would be trained on its validation text"):
        open_data(spec, "teacher", tokenizer, 64)


def test_a_file_of_a_folder_is_text_of_the_folder(tmp_path, tokenizer):
    (tmp_path / "books").mkdir()
    book = tmp_path / "books" / "a.txt"
    book.write_text("A sentence of a book. Another one follows it. " * 1000)
    (tmp_path / "books" / "b.txt").write_text("Another book. " * 1000)
    for train, heldout in ((tmp_path / "books", book), (book, tmp_path / "books")):
        spec = DataSpec({str(train): 1.0}, str(heldout), str(tmp_path / "data"))
        with pytest.raises(ValueError, match="would be trained on its validation text"):
            open_data(spec, "teacher", tokenizer, 64)
    spec = DataSpec({str(book): 0.5, str(tmp_path / "books"): 0.5}, None, str(tmp_path / "data"))
    with pytest.raises(ValueError, match=r"books would have validation text: .*a\.txt has too few documents"):
        open_data(spec, "teacher", tokenizer, 64)
    assert sharing("hf:n:c", ["hf:n:c:train", "hf:n:c:test", "recall:hf:n:c", "python-docs"]) == [
        "hf:n:c:train", "recall:hf:n:c",
    ]  # fmt: skip


def test_text_that_was_cut_for_other_validation_sequences_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("A sentence of a book. Another one follows it. " * 1000)
    spec = DataSpec({str(tmp_path / "a.txt"): 1.0}, None, str(tmp_path / "data"))
    open_data(spec, "teacher", tokenizer, 64, 4096)
    open_data(spec, "teacher", tokenizer, 64, 4096)
    with pytest.raises(ValueError, match="for validation sequences of 4096 tokens, not of 512"):
        open_data(spec, "teacher", tokenizer, 64, 512)


def test_a_source_too_short_to_hold_some_out_is_named(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("short " * 20)
    spec = DataSpec({str(tmp_path / "a.txt"): 1.0}, None, str(tmp_path / "data"))
    with pytest.raises(ValueError, match=r"a\.txt' has 121 tokens, too few to hold out 64 .*data\.heldout"):
        open_data(spec, "teacher", tokenizer, 64, 64)
    (train,), (held,) = open_data(spec, "teacher", tokenizer, 64, 32)
    assert len(train) == 89 and len(held) == 32


@pytest.mark.parametrize("heldout", [None, "b.txt"])
def test_changed_text_is_refused(tmp_path, tokenizer, monkeypatch, heldout):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("some text " * 100)
    spec = DataSpec({"a.txt": 1.0}, heldout, "data")
    (train,), (held,) = open_data(spec, "teacher", tokenizer, 64, 16)
    text, tokens = train.tokens.tolist(), len(held)
    same = DataSpec({f"{tmp_path}/./a.txt": 1.0}, heldout and f"./{heldout}", "data")
    assert open_data(same, "teacher", tokenizer, 64, 16)[0][0].tokens.tolist() == text
    assert len(list((tmp_path / "data").glob("*/[!.]*"))) == (1 if heldout is None else 2)
    changed = tmp_path / (heldout or "a.txt")
    content, times = changed.read_text(), (changed.stat().st_atime_ns, changed.stat().st_mtime_ns)
    changed.write_text(content + "more")
    os.utime(changed, ns=times)  # only the size differs
    with pytest.raises(ValueError, match=rf"{changed.name} changed since it was tokenized into data/.*Delete that"):
        open_data(spec, "teacher", tokenizer, 64, 16)
    changed.write_text(content)
    os.utime(changed, ns=(times[0], times[1] + 1))  # only the time differs
    with pytest.raises(ValueError, match="changed since"):
        open_data(spec, "teacher", tokenizer, 64, 16)
    changed.unlink()  # deleting the text keeps the token file valid
    (train,), (held,) = open_data(spec, "teacher", tokenizer, 64, 16)
    assert train.tokens.tolist() == text and len(held) == tokens


def test_a_new_file_in_a_folder_is_a_change(tmp_path, tokenizer):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("some text " * 100)
    spec = DataSpec({str(tmp_path / "texts"): 1.0}, None, str(tmp_path / "data"))
    open_data(spec, "teacher", tokenizer, 64, 16)
    (tmp_path / "texts" / "b.rst").write_text("not read, so no change")
    open_data(spec, "teacher", tokenizer, 64, 16)
    (tmp_path / "texts" / "b.txt").write_text("")
    with pytest.raises(ValueError, match="changed since"):
        open_data(spec, "teacher", tokenizer, 64, 16)


def test_similar_names_do_not_share_token_files(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.txt").write_text("one text " * 100)
    (tmp_path / "a_b.txt").write_text("another text " * 100)
    spec = DataSpec({"a/b.txt": 1.0, "a_b.txt": 1.0}, None, "data")
    (one, other), _ = open_data(spec, "t", tokenizer, 64, 16)
    assert one.tokens[:3].tolist() == tokenizer("one")["input_ids"]
    assert other.tokens[:3].tolist() == tokenizer("ano")["input_ids"]
    single = DataSpec({"a_b.txt": 1.0}, None, "data")
    open_data(single, "o/t", tokenizer, 64, 16)
    open_data(single, "o_t", tokenizer, 64, 16)
    (tmp_path / "t").mkdir()
    for name in ("./t", "t", str(tmp_path / "t")):
        open_data(single, name, tokenizer, 64, 16)
    # t and o/t of the hub, o_t, and the folder t
    assert len(list((tmp_path / "data").iterdir())) == 4


def test_meta_describes_what_a_token_file_was_made_from(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("some text " * 100)
    spec = DataSpec({str(tmp_path / "a.txt"): 1.0}, None, str(tmp_path / "data"), 500)
    open_data(spec, "teacher", tokenizer, 64, 16)
    metas = [json.loads(path.read_text()) for path in sorted((tmp_path / "data").rglob("meta.json"))]
    assert [meta["split"] for meta in metas] == ["heldout", "train"]
    for meta in metas:
        assert meta["source"] == str(tmp_path / "a.txt") and meta["max_tokens"] == 500 and len(meta["files"]) == 16
