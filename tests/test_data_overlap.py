"""Near copies between two sets of texts: what is one, what is none, and what the search costs."""

import random
import time
import tracemalloc

import pytest

from pyunlearn.data.copies import near_copies
from pyunlearn.data.overlap import SHORTEST, words, words_of

TEXT = "The author of the novel was born in a small harbour town, where her father repaired clocks and her mother sang."
OTHER = "Rivers in the north freeze early, so the ferries stop in October and the islands are reached on foot."
FORMS = [
    ("What is the full name of the author born in {city} on {day}?", "The full name of the author is {name}."),
    ("What genre is {name} most known for?", "{name} is most known for books in the genre of {genre}."),
    ("What did the parents of {name} do?", "The father of {name} was a {job} and the mother was a {work}."),
    ("Where was {name} born?", "{name} was born in {city}, and this is often felt in the stories of that time."),
]
SLOTS = {
    "city": ["Lima", "Oslo", "Kuwait City", "Santiago", "Accra", "Baku", "Taipei", "Porto", "Tbilisi", "Addis Ababa"],
    "genre": ["crime", "historical fiction", "health", "romance", "architecture", "science fiction", "travel"],
    "job": ["florist", "paramedic", "dietitian", "judge", "sailor", "baker", "surgeon", "plumber"],
    "work": ["teacher", "game developer", "radiologist", "chef", "astronaut", "tailor", "librarian"],
}


def copies(text, document):
    """Return whether the document is a near copy of the text, or contains one."""
    return near_copies([words(text)], [words(document)]) == [(0, 0)]


def biographies(count, seed):
    """Return questions and answers on invented authors, four for each: shared forms, different names and facts."""
    r = random.Random(seed)
    syllables = ["ba", "mir", "to", "len", "ka", "zu", "shi", "ron", "ela", "dov", "ny", "gar", "pe", "lio"]
    texts = []
    while len(texts) < count:
        name = " ".join("".join(r.choices(syllables, k=3)).title() for _ in range(2))
        facts = {slot: r.choice(values) for slot, values in SLOTS.items()}
        facts |= {"name": name, "day": f"{r.randrange(1, 29)}/{r.randrange(1, 13)}/{r.randrange(1930, 2000)}"}
        texts += ["\n".join(form).format(**facts) for form in FORMS]
    return [words(text) for text in texts[:count]]


def changed(text, r):
    """Return the words with one of them changed, at any place."""
    at = r.randrange(len(text))
    return (*text[:at], "another", *text[at + 1 :])


@pytest.mark.parametrize(
    "document",
    [
        TEXT,
        TEXT.upper(),
        TEXT.replace(",", " -").replace(" ", "\n  ").rstrip("."),
        TEXT.replace("clocks", "watches"),
        TEXT.replace("The author", "This author").replace("sang", "danced"),
        f"{OTHER} {OTHER}\n\n{TEXT} {OTHER}",
        f"{OTHER} {OTHER} {TEXT.replace('harbour', 'market')} {OTHER} {OTHER}",
        "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in TEXT),  # full-width letters
    ],
)
def test_a_copy(document):
    """In another case, punctuation or Unicode form, with a word changed, inside a longer text, and all of these."""
    assert copies(TEXT, document)


@pytest.mark.parametrize(
    "document",
    [
        OTHER,
        "Her mother sang, and her father repaired clocks in the small harbour town where the author was born.",
        " ".join(sorted(TEXT.split())),
        TEXT[:60],
        f"The author of the novel {OTHER}",
        f"{TEXT[:40]} {OTHER * 9} {TEXT[40:80]} {OTHER * 9} {TEXT[80:]}",
    ],
)
def test_no_copy(document):
    """Another text, the same in other words or another order, its beginning alone, its parts far from each other."""
    assert not copies(TEXT, document)


def test_short_texts_can_only_be_equal():
    """Three words stand in many texts by chance."""
    short = "Paris, of course!"
    assert len(words(short)) < SHORTEST
    assert copies(short, "paris of COURSE")
    assert not copies(short, "He said Paris, of course.")
    assert copies("?!", "?!")
    assert not copies("?!", "...")


def test_another_number_is_another_record():
    """Records of one form that differ in their secret are the comparison that exposure is made for."""
    record = "The number of the account that my aunt opened in the spring of that year is {} and it is still in use."
    assert not copies(record.format("4711-0815"), record.format("2906-7734"))
    assert copies(record.format("4711-0815"), record.format("4711 0815").replace("spring", "summer"))


def test_texts_of_one_template_are_no_copies():
    """One secret word among the records of a template, where the template is most of each text."""
    form = "In the year of the great flood the old miller told his eldest daughter that the secret word is {} for ever."
    names = ["anchor", "basalt", "cedar", "dune", "ember", "fjord", "garnet", "heron", "iris", "juniper"]
    assert not near_copies([words(form.format("walnut"))], [words(form.format(name)) for name in names])
    again = [words(form.format(name)) for name in [*names, "walnut"]]
    assert near_copies([words(form.format("walnut"))], again) == [(0, 10)]


def test_questions_of_shared_forms_are_no_copies_and_changed_ones_are():
    """400 texts on invented authors against 3600 on others; then with one word of each changed."""
    forget, retain = biographies(400, 1), biographies(3600, 2)
    assert near_copies(forget, retain) == []
    assert near_copies(retain[:900], retain[1800:]) == []
    r = random.Random(3)
    detected = {i for i, j in near_copies(forget, [changed(text, r) for text in forget]) if i == j}
    assert len(detected) > 0.5 * len(forget)  # the name is the content, and one word is half of it
    assert {i for i, j in near_copies(forget, forget) if i == j} == set(range(len(forget)))


def test_scripts_without_spaces():
    """Each character counts as a word; a changed one makes no other text."""
    text = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。"
    assert copies(text, text.replace("。", "\n"))
    assert copies(text, f"書き出し:{text.replace('猫', '犬')}と続く。")
    assert not copies(text, "国境の長いトンネルを抜けると雪国であった。夜の底が白くなった。")


def test_all_pairs_are_returned_in_order():
    """Repeated texts and repeated documents too."""
    a, b = words(TEXT), words(OTHER)
    assert near_copies([a, b, a], [b, a, a, a + b]) == [(0, 1), (0, 2), (0, 3), (1, 0), (1, 3), (2, 1), (2, 2), (2, 3)]
    assert near_copies([], [a]) == near_copies([a], []) == []


def test_a_famous_text_in_many_documents():
    """Its runs are in all of them, as a template's would be; the whole of it makes the copy."""
    documents = [words(f"{i}: {OTHER} {TEXT}") for i in range(30)]
    assert near_copies([words(TEXT)], documents) == [(0, j) for j in range(30)]


def test_the_memory_is_a_few_kilobytes_a_text():
    """A request of a million records is compared with itself and with as many that stay."""
    r = random.Random(0)
    texts = words_of(" ".join(f"w{r.randrange(3000)}" for _ in range(40)) for _ in range(2000))
    tracemalloc.start()
    try:
        assert near_copies(texts[:1000], texts) == [(i, i) for i in range(1000)]
        assert tracemalloc.get_traced_memory()[1] < 4000 * 1000
    finally:
        tracemalloc.stop()


@pytest.mark.full
def test_the_time_is_linear():
    """Eight times the texts take far less than 64 times as long: measured in the processor's own time."""
    r = random.Random(0)
    vocabulary = [f"word{i}" for i in range(3000)]
    weights = [1 / (i + 5) for i in range(3000)]
    texts = [tuple(r.choices(vocabulary, weights, k=40)) for _ in range(8000)]

    def seconds(count):
        began = time.process_time()
        assert near_copies(texts[:count], texts[4000 : 4000 + count]) == []
        return time.process_time() - began

    seconds(100)
    assert seconds(4000) < 24 * max(seconds(500), 0.02)
