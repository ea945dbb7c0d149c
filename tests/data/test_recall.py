"""Sparse recall text."""

import random
import re

from deltify.data.recall import FACTS
from deltify.data.sparse_recall import HELDOUT_FACTS, MOST_FACTS, draw_facts, sparse_document, sparse_documents

SENTENCES = [f"Sentence {number} says {'very ' * (number % 7)}little." for number in range(4000)]


def characters(texts):
    return [len(text) for text in texts]


def test_a_sparse_document_says_where_each_value_is_stated_and_asked_for():
    for kinds in (FACTS, HELDOUT_FACTS):
        facts = draw_facts(random.Random(1), 40, kinds)
        document = sparse_document(random.Random(2), SENTENCES[:200], facts)
        assert len(document.recalls) == len(facts) == 40
        for fact, recall in zip(facts, document.recalls):
            assert document.text[recall.stated] == document.text[recall.answered] == fact.statement[fact.stated]
            statement, question = document.text.index(fact.statement), document.text.index(fact.question)
            assert recall.stated.start == statement + fact.stated.start
            assert recall.answered.start == question + fact.answered.start
            assert len("Sentence 0") < statement and statement + len(fact.statement) < question
        last = document.text.rindex("little.")
        assert 20 <= sum(recall.answered.start > last for recall in document.recalls) < 40
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
