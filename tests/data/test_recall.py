"""Sparse recall text."""

import itertools
import json
import random
import re

import numpy as np
import pytest
import torch

from deltify.config import DataSpec
from deltify.conversion.teacher import byte_tokenizer
from deltify.data import encoding, recall, sources
from deltify.data.batches import MixedBatches
from deltify.data.recall import FACTS
from deltify.data.sources import documents, held_out, pieces
from deltify.data.sparse_recall import (
    HELDOUT_FACTS,
    LENGTHS,
    MOST_FACTS,
    draw_facts,
    sparse_document,
    sparse_documents,
)
from deltify.data.token_files import TokenFile, open_data, origin_of, tokenize
from deltify.utils.files import digest

SENTENCES = [f"Sentence {number} says {'very ' * (number % 7)}little." for number in range(4000)]


def characters(texts):
    return [len(text) for text in texts]


def test_a_sparse_document_says_where_each_value_is_stated_and_asked_for():
    for kinds in (FACTS, HELDOUT_FACTS):
        facts = draw_facts(random.Random(1), 40, kinds)
        document = sparse_document(random.Random(2), SENTENCES[:200], facts)
        assert len(document.recalls) == len(facts) == 40
        for fact, place in zip(facts, document.recalls):
            assert document.text[place.stated] == document.text[place.answered] == fact.statement[fact.stated]
            statement, question = document.text.index(fact.statement), document.text.index(fact.question)
            assert place.stated.start == statement + fact.stated.start
            assert place.answered.start == question + fact.answered.start
            assert len("Sentence 0") < statement and statement + len(fact.statement) < question
        last = document.text.rindex("little.")
        assert 20 <= sum(place.answered.start > last for place in document.recalls) < 40
        assert re.findall(r"Sentence (\d+)", document.text) == [str(number) for number in range(200)]


def test_sparse_documents_fill_their_length_and_lose_only_their_first_sentence_when_cut_to_it():
    for length in (64, 2000, 16000):
        texts = list(sparse_documents(SENTENCES, length, characters, "0"))
        assert texts == list(sparse_documents(SENTENCES, length, characters, "0"))
        assert texts != list(sparse_documents(SENTENCES, length, characters, "1")) or length == 64
        numbers = [number for document in texts for number in re.findall(r"Sentence (\d+)", document.text)]
        assert len(texts) > 4 and numbers == sorted(set(numbers), key=int)
        for document in texts:
            first = re.match(r"Sentence \d+ says[a-z ]+\. ", document.text).end()
            assert 0 <= len(f" {document.text}") - length < first
            assert len(document.recalls) <= MOST_FACTS and (len(document.recalls) > 0) == (length > 64)


def test_no_kind_of_fact_or_template_is_both_trained_on_and_held_out():
    templates = [
        {text for _, *texts in kinds.values() for ways in texts for text in ways} for kinds in (FACTS, HELDOUT_FACTS)
    ]
    assert not FACTS.keys() & HELDOUT_FACTS.keys() and not templates[0] & templates[1]
    for text in templates[0] | templates[1]:
        assert text.count("{who}") == text.count("{what}") == 1


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def text(tmp_path):
    """A file of 40 documents of 100 sentences, some of which are held out."""
    path = tmp_path / "text.jsonl"
    passages = [" ".join(SENTENCES[first : first + 100]) for first in range(0, 4000, 100)]
    path.write_text("".join(json.dumps({"text": passage}) + "\n" for passage in passages))
    return path


def test_sparse_recall_has_documents_of_exact_lengths_from_any_number_of_processes(
    tmp_path, tokenizer, text, monkeypatch
):
    monkeypatch.setattr(sources, "PIECE", 40_000)
    monkeypatch.setattr(encoding, "PIECES_BEFORE_WORKERS", 1)
    source = f"sparse-recall:{text}"
    one, two = (tokenize(pieces(source), tokenizer, tmp_path / str(n), processes=n) for n in (1, 2))
    assert one.digest == two.digest and set(np.diff(one.bounds).tolist()) == {*LENGTHS}
    trained = "".join(passage for passage in documents(str(text)) if not held_out(passage))
    for start, end in itertools.pairwise(one.bounds.tolist()):
        document = tokenizer.decode(one.tokens[start:end])
        assert document.endswith("<|end|>")
        numbers = [int(number) for number in re.findall(r"Sentence (\d+) ", document)]
        assert numbers == sorted(set(numbers)) and all(f"Sentence {number} " in trained for number in numbers)
        for card in re.findall(r"(?:card of .+? bears the digits|signs as reader) (\d+)", document):
            assert document.count(card) == 2  # stated and asked for, so that no statement is cut off


def test_each_sequence_of_sparse_recall_is_the_end_of_one_document_of_the_smallest_length_that_is_enough():
    sizes = [8, 8, 16, 8, 16, 8, 8]
    bounds = np.cumsum([0, *sizes])
    file = TokenFile(np.arange(bounds[-1]).astype(np.uint16), bounds, lengths=(8, 16, 32))
    for length, enough in ((8, 8), (5, 8), (16, 16), (10, 16)):
        mix = MixedBatches([file], [1.0], length, 1, seed=0)
        ends = [int(end) for end, size in zip(bounds[1:], sizes) if size == enough]
        for epoch in range(3):
            batches = [mix.batch(epoch * len(ends) + step) for step in range(len(ends))]
            assert sorted(int(batch.input_ids[0, -1]) + 1 for batch in batches) == ends
            assert all(batch.position_ids.tolist() == [[*range(length)]] for batch in batches)
    for length in (20, 40):
        with pytest.raises(ValueError, match=f"fills a sequence of {length} tokens. .*up to 32"):
            MixedBatches([file], [1.0], length, 1, seed=0)


def test_sparse_recall_does_not_change_the_sequences_of_other_sources():
    plain, bounds = TokenFile(np.arange(1000).astype(np.uint16), np.array([0, 300, 1000])), np.arange(0, 808, 8)
    other, sparse = (TokenFile(np.arange(2000, 2800).astype(np.uint16), bounds, lengths=n) for n in ((), (8,)))
    rows = [
        torch.cat([MixedBatches([plain, file], [3.0, 1.0], 8, 4, seed=1).batch(step).input_ids for step in range(50)])
        for file in (other, sparse)
    ]
    assert torch.equal(rows[0][rows[0][:, 0] < 2000], rows[1][rows[1][:, 0] < 2000])
    assert torch.equal(rows[0][:, 0] < 2000, rows[1][:, 0] < 2000) and 140 < int((rows[0][:, 0] < 2000).sum()) < 160


def test_nothing_of_sparse_recall_is_held_out_and_a_change_of_its_rules_is_noticed(
    tmp_path, tokenizer, text, monkeypatch
):
    source = f"sparse-recall:{text}"
    spec = DataSpec({source: 0.5, str(text): 0.5}, None, str(tmp_path / "data"))
    trains, (held,) = open_data(spec, "teacher", tokenizer, 1000)
    assert trains[0].lengths == LENGTHS and trains[1].lengths == () and len(held)
    assert open_data(spec, "teacher", tokenizer, 1000)[0][0].lengths == LENGTHS
    with pytest.raises(ValueError, match="none of the sources sparse-recall:"):
        open_data(DataSpec({source: 1.0}, None, str(tmp_path / "data")), "teacher", tokenizer, 1000)
    # token files of recall text stay valid
    assert origin_of("recall:python-docs") == {"source": "recall:python-docs", "files": digest_of_recall() + " "}
    monkeypatch.setattr(
        "deltify.data.token_files.digest", lambda path: "0" * 16 if "sparse" in path.name else digest(path)
    )
    with pytest.raises(ValueError, match=r"the text at sparse-recall:.* changed"):
        open_data(spec, "teacher", tokenizer, 1000)


def digest_of_recall():
    return digest(sources.Path(recall.__file__))[:16]
