"""Text, token files and batches."""

import gzip
import json

import numpy as np
import pytest
import torch
import zstandard

from deltify.data import Mix, TokenFile, documents, heldout_batches, python_docs, split_heldout, tokenize
from deltify.teacher import byte_tokenizer


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


def test_wrong_sources_are_named(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match="no text at"):
        list(documents(str(tmp_path / "absent.txt")))
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"txt": 1}\n')
    with pytest.raises(ValueError, match="line 2"):
        list(documents(str(tmp_path / "bad.jsonl")))
    with pytest.raises(ValueError, match="no text"):
        tokenize(["", ""], tokenizer, tmp_path / "empty")


def test_tokens_and_bounds_survive_the_disk(tmp_path, tokenizer):
    file = tokenize(["ab", "", "cde"], tokenizer, tmp_path / "tokens")
    end = tokenizer.eos_token_id
    assert file.tokens.tolist() == [*tokenizer("ab")["input_ids"], end, *tokenizer("cde")["input_ids"], end]
    assert file.bounds.tolist() == [0, 3, 7]
    again = tokenize(["other text"], tokenizer, tmp_path / "tokens")  # a finished folder is used as it is
    assert again.tokens.tolist() == file.tokens.tolist()
    (tmp_path / "tokens" / "tokens.bin").write_bytes(b"\0\0")
    with pytest.raises(ValueError, match="damaged"):
        tokenize(["ab"], tokenizer, tmp_path / "tokens")


def test_another_tokenizer_is_refused(tmp_path, tokenizer):
    tokenize(["ab"], tokenizer, tmp_path / "tokens")
    other = byte_tokenizer()
    other.add_tokens(["<|new|>"])
    with pytest.raises(ValueError, match="another tokenizer"):
        tokenize(["ab"], other, tmp_path / "tokens")


def test_batches_depend_on_nothing_but_the_step():
    mix = Mix([token_file([50, 300, 700]), token_file([400], first=5000)], [3.0, 1.0], 32, 8, seed=1)
    late = mix.batch(7)
    for step in range(7):
        mix.batch(step)
    fresh = Mix(mix.files, mix.weights, 32, 8, seed=1)
    assert torch.equal(fresh.batch(7).input_ids, late.input_ids)
    halves = [fresh.batch(7, rank, 2).input_ids for rank in range(2)]
    assert torch.equal(torch.cat(halves), late.input_ids)
    with pytest.raises(ValueError, match="8 rows cannot be shared by 3"):
        mix.batch(0, 0, 3)


def test_weights_are_kept_and_an_epoch_shows_every_window_once():
    files = [token_file([640]), token_file([320], first=5000)]
    mix = Mix(files, [3.0, 1.0], 32, 10, seed=0)
    rows = torch.cat([mix.batch(step).input_ids for step in range(100)])
    assert int((rows[:, 0] < 5000).sum()) == 750
    single = Mix(files[:1], [1.0], 32, 10, seed=0)
    for epoch in range(2):  # 20 windows, two batches
        rows = torch.cat([single.batch(2 * epoch + step).input_ids for step in range(2)])
        assert sorted(rows[:, 0].tolist()) == list(range(0, 640, 32))


def test_positions_start_again_with_each_document():
    batch = Mix([token_file([10, 5, 17])], [1.0], 32, 1, seed=0).batch(0)
    assert batch.position_ids[0].tolist() == [*range(10), *range(5), *range(17)]
    assert int((~batch.same_document).sum()) == 2
    cut = heldout_batches([token_file([10, 54])], 8, 4, 16)
    assert cut[0].input_ids.shape == (2, 8) and cut[0].position_ids[1].tolist() == [0, 1, 0, 1, 2, 3, 4, 5]


def test_every_source_has_its_share_of_the_held_out_rows():
    files = [token_file([100]), token_file([100], first=5000)]
    firsts = [batch.input_ids[:, 0].tolist() for batch in heldout_batches(files, 8, 3, 32)]
    assert firsts == [[0, 8, 5000], [5008]]
    with pytest.raises(ValueError, match="held-out text has 5 tokens"):
        heldout_batches([token_file([5])], 8, 4, 16)


def test_a_source_shorter_than_a_row_is_refused():
    with pytest.raises(ValueError, match="fewer than one row"):
        Mix([token_file([10])], [1.0], 32, 1, seed=0)


def test_python_docs_are_english_and_split_the_same_everywhere():
    texts = list(python_docs())
    train, held = split_heldout(texts)
    assert sum(map(len, texts)) > 1_500_000 and len(train) + len(held) == len(texts)
    assert 0.02 < len(held) / len(texts) < 0.2 and not set(train) & set(held)
    assert split_heldout(reversed(texts))[1] == held[::-1]
