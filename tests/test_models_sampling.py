"""Non-members sampled from the model: their number, their length, and the first token that departs from the text."""

import random
import tracemalloc

import pytest
import tiny
import torch
from coverings import in_full

import pyunlearn
from pyunlearn.data import Tokens, encode, read_examples
from pyunlearn.models import sampling
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.sampling import COUNT, OWN_COUNT, sample_non_members, sample_own_texts, sample_unseen_answers

pytestmark = pytest.mark.usefixtures("one_thread")


def tokens_of(trained):
    """Return the tokenized forget set of a model."""
    both = trained.model.config.is_encoder_decoder
    examples = read_examples(trained.forget, role="forget")
    return encode(examples, trained.tokenizer, role="forget", max_length=None, encoder_decoder=both)


@pytest.fixture
def language_model(story):
    return LanguageModel.of(story.model, story.tokenizer)


def test_plain_texts_are_sampled_from_the_beginning_of_text_token(story, language_model):
    """Their number is `count`, all tokens are scored, the seed decides, and the global generator is not advanced."""
    tokens = tokens_of(story)
    state = torch.get_rng_state()
    samples = sample_non_members(language_model, tokens)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(samples) == COUNT
    length = sorted(len(t.scored) for t in tokens)[1]
    assert {(t.ids[0], t.first, len(t.scored)) for t in samples} == {(story.tokenizer.bos_token_id, 1, length)}
    assert len(set(samples)) > COUNT / 2
    assert sample_non_members(language_model, tokens) == samples
    assert sample_non_members(language_model, tokens, seed=1) != samples
    assert len(sample_non_members(language_model, tokens, count=5)) == 5


@pytest.mark.parametrize("scored", [3, 20, 60])
def test_samples_have_the_median_length_of_the_forget_texts_within_8_to_48(language_model, scored):
    """Lengths are in scored tokens."""
    tokens = [Tokens(tuple(range(10, 11 + n)), 1) for n in (2, scored, 70)]
    samples = sample_non_members(language_model, tokens, count=3)
    assert {len(t.scored) for t in samples} == {min(48, max(8, scored))}


@pytest.mark.parametrize("kind", ["answers", *in_full("t5")])
def test_answers_to_a_prompt_depart_from_the_memorized_answer(kind, request):
    """Each prompt is answered, never with the memorized first token, and that token is not scored."""
    trained = request.getfixturevalue(kind)
    both = kind == "t5"
    lm = LanguageModel.of(trained.model, trained.tokenizer)
    tokens = tokens_of(trained)
    samples = sample_non_members(lm, tokens)
    assert COUNT - 3 <= len(samples) <= COUNT  # those that recite ten tokens are left out
    prompts = [source.ids if both else source.ids[: source.first] for source in tokens]
    sources = [next(i for i, p in enumerate(prompts) if t.ids[: len(p)] == p) for t in samples]
    assert all(sources.count(i) >= COUNT // 2 - 3 for i in (0, 1))
    for t, source, prompt in ((t, tokens[i], prompts[i]) for t, i in zip(samples, sources, strict=True)):
        assert t.first == (1 if both else len(prompt) + 1)
        assert t.written[t.first - 1] != source.scored[0]
        assert 1 <= len(t.scored) <= 48
        assert trained.tokenizer.eos_token_id not in t.scored[:-1]
    assert sample_non_members(lm, tokens) == samples
    assert sample_non_members(lm, tokens, seed=1) != samples


def test_samples_stay_within_the_model_s_context(answers):
    """A long prompt loses its beginning, so that prompt and answer do not run past GPT-2's last position."""
    long_prompt, long_answer = Tokens((9,) * 60, 56), Tokens((9,) * 60, 2)
    samples = sample_non_members(
        LanguageModel.of(answers.model, answers.tokenizer), [long_prompt, long_answer], count=4
    )
    assert len(samples) == 4
    assert all(len(t) <= 64 for t in samples)
    assert all(t.scored for t in samples)


def test_the_generation_config_of_a_model_does_not_change_its_samples(story):
    """A saved penalty, temperature or top-p would make non-members that the model does not typically write."""
    tokens = tokens_of(story)
    model = story.fresh()
    plain = sample_non_members(LanguageModel.of(model, story.tokenizer), tokens, count=20)
    config = model.generation_config
    config.update(repetition_penalty=1.5, no_repeat_ngram_size=1, temperature=0.3, top_p=0.5, do_sample=True)
    assert sample_non_members(LanguageModel.of(model, story.tokenizer), tokens, count=20) == plain
    assert model.generation_config is config


def test_samples_that_recite_the_forget_set_are_left_out(language_model, monkeypatch):
    """Ten scored tokens in a row of a forget text count as recited, nine do not, wherever they are."""
    forget = [Tokens(tuple(range(10, 40)), 1)]
    nine, ten = (Tokens((0, 50, 51, *range(20, 20 + n), 60), 1) for n in (9, 10))
    temperatures = []

    def sample(*_, temperature):
        temperatures.append(temperature)
        return [ten, nine, ten]

    monkeypatch.setattr(sampling, "_sample", sample)
    assert sample_non_members(language_model, forget, count=3) == [nine] * 3  # others are drawn in their place
    assert temperatures[:3] == [1.0, 1.5, 2.0]


def test_samples_that_begin_with_a_short_text_are_left_out(language_model, monkeypatch):
    """All of a text below ten tokens counts as recited, at the beginning alone, and so does a sample that it ends."""
    forget = [Tokens((0, *ids), 1) for ids in (range(10, 18), range(20, 29), (50, 51))]
    whole, ended, another, later, two = (
        Tokens((0, *ids), 1)
        for ids in ((*range(10, 18), 60), range(20, 28), (*range(10, 17), 60), (60, 61, *range(10, 18)), (50, 51, 60))
    )
    monkeypatch.setattr(sampling, "_sample", lambda *_, **__: [whole, ended, another, later, two])
    assert sample_non_members(language_model, forget, count=3) == [another, later, two]


@pytest.mark.full
def test_a_short_text_that_the_model_writes_by_heart_is_still_exposed(one_thread):
    """Each of four texts of eight tokens is one in ten that the model writes: none is compared with itself."""
    tokenizer, draw = tiny.make_tokenizer(), random.Random(5)
    words = [word for i in range(300, 400) if (word := tokenizer.decode([i])).startswith(" ")]
    secrets = ["".join(draw.sample(words, 8)).strip() for _ in range(4)]
    torch.manual_seed(0)
    model = tiny.tiny_llama(len(tokenizer))
    tiny.train(model, tokenizer, secrets * 6 + tiny.sentences(30, 7), epochs=100)
    audit = pyunlearn.audit(model, secrets, tokenizer=tokenizer)
    assert {e.tokens for e in audit.examples} <= {8, 9}
    assert audit.non_members.source == "self-sampled"
    assert [e.verdict for e in audit.examples] == ["still exposed"] * 4


def test_text_to_hold_starts_as_texts_openings_and_the_records_do(answers):
    """A third each; all that follows is scored, and the seed decides."""
    lm, tokens = LanguageModel.of(answers.model, answers.tokenizer), tokens_of(answers)
    texts = sample_own_texts(lm, tokens)
    assert OWN_COUNT - 5 <= len(texts) <= OWN_COUNT
    shared = sampling._shared_prefix([t.ids[: t.first] for t in tokens])
    assert 1 <= len(shared) < min(t.first for t in tokens)
    starts = [t.ids[: t.first] for t in texts]
    assert starts.count(shared) >= OWN_COUNT / 3 - 5
    assert starts.count((answers.tokenizer.bos_token_id,)) >= OWN_COUNT / 3 - 5
    assert len(set(starts)) > 2  # openings of which the tokenizer has the words
    assert all(len(t) <= lm.context_length for t in texts)
    assert sample_own_texts(lm, tokens) == texts
    assert sample_own_texts(lm, tokens, seed=1) != texts
    (first, *_), alone = tokens, sample_own_texts(lm, tokens[:1])
    assert first.ids[:1] in {t.ids[: t.first] for t in alone}  # the prompt of a single record is not answered


def test_text_to_hold_recites_no_record(answers, monkeypatch):
    """Nor a whole answer that is shorter than ten tokens."""
    lm = LanguageModel.of(answers.model, answers.tokenizer)
    secret = Tokens((5, 6, 7, 8, 9, 10), 2)
    recited, other = (Tokens((0, 50, *ids, 60), 1) for ids in ((7, 8, 9, 10), (7, 8, 9, 11)))
    monkeypatch.setattr(sampling, "_sample", lambda *_, **__: [recited, other])
    assert set(sample_own_texts(lm, [secret])) == {other}


def test_the_template_of_all_records_is_no_recitation(answers):
    """Of twelve tokens with which all prompts begin, a third of the samples begin, and none is left out for it."""
    template, lm = tuple(range(20, 32)), LanguageModel.of(answers.model, answers.tokenizer)
    forget = [Tokens((*template, *range(a, a + 12)), 16) for a in (40, 60)]
    starts = [t.ids[: t.first] for t in sample_own_texts(lm, forget)]
    assert starts.count(template) == OWN_COUNT // 3


def test_recitation_of_many_texts_takes_no_memory_for_each():
    """Every run of the forget set would take kilobytes a text; of 3000 that are read one by one, the last is seen."""
    forget = ((tuple(range(i, i + 50)), 49) for i in range(100, 3100))
    samples = [tuple(range(50)), (7, *range(3120, 3149))]
    tracemalloc.start()
    assert sampling._reciting(samples, forget) == {1}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def test_non_members_of_many_texts_take_little_memory(language_model, monkeypatch):
    """All runs of 3000 texts of 50 tokens would be 7 MB."""
    forget = [Tokens(range(i, i + 51), 1) for i in range(100, 3100)]
    own = Tokens((0, *range(20, 60)), 1)
    monkeypatch.setattr(sampling, "_sample", lambda *_, **__: [own] * 3)
    tracemalloc.start()
    assert sample_non_members(language_model, forget, count=3) == [own] * 3
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000


def test_a_text_of_one_token_recites_nothing(language_model):
    """It would be part of most samples: none is left out for it."""
    (short,) = encode(read_examples(["a"], role="forget"), language_model.tokenizer, role="forget", max_length=None)
    assert len(short.scored) == 1
    assert len(sample_own_texts(language_model, [short], count=6)) == 6


def test_an_encoder_decoder_model_writes_no_text_to_hold(t5):
    """It writes only in answer to something."""
    assert sample_own_texts(LanguageModel.of(t5.model, t5.tokenizer), tokens_of(t5)) == []


@pytest.mark.parametrize("kind", ["answers", *in_full("t5")])
def test_unseen_answers_are_to_prompts_that_no_record_has(kind, request):
    """Each begins as one record's prompt and ends as another's; the answer is scored, and the seed decides."""
    trained = request.getfixturevalue(kind)
    lm, tokens = LanguageModel.of(trained.model, trained.tokenizer), tokens_of(trained)
    prompts = {t.ids if lm.is_encoder_decoder else t.ids[: t.first] for t in tokens}
    samples = sample_unseen_answers(lm, tokens, tokens, count=20)
    assert samples
    for t in samples:
        own = t.ids if lm.is_encoder_decoder else t.ids[: t.first]
        assert own not in prompts
        assert any(own[:2] == p[:2] for p in prompts)
        assert any(own[-2:] == p[-2:] for p in prompts)
        assert 1 <= len(t.scored) <= 48
    assert sample_unseen_answers(lm, tokens, tokens, count=20) == samples
    assert len(sample_unseen_answers(lm, tokens, tokens, count=3)) <= 3


def test_unseen_answers_to_texts_without_prompts_follow_halves_of_their_beginnings(story, language_model):
    """One text alone has no other to be recombined with."""
    tokens = tokens_of(story)
    beginnings = {t.ids[: len(t.ids) // 2] for t in tokens}
    samples = sample_unseen_answers(language_model, tokens, tokens, count=10)
    assert samples
    assert not any(t.ids[: t.first] in beginnings for t in samples)
    assert sample_unseen_answers(language_model, tokens[:1], tokens) == []


def test_unseen_answers_that_recite_the_forget_set_are_left_out(answers):
    """The samples themselves as forget set leave none; a text of which one is another's beginning leaves that out."""
    lm, tokens = LanguageModel.of(answers.model, answers.tokenizer), tokens_of(answers)
    samples = sample_unseen_answers(lm, tokens, [], count=10)
    assert samples
    assert sample_unseen_answers(lm, tokens, samples, count=10) == []
    others = [Tokens((*range(5), *samples[0].scored), 5)]
    assert samples[0] not in sample_unseen_answers(lm, tokens, others, count=10)


@pytest.mark.parametrize("turns", ["all", "assistant"])
def test_unseen_answers_in_a_chat_template(turns):
    """What the template has in common with the forget texts is no recitation; no prompt is that of a record."""
    tokenizer = tiny.make_tokenizer()
    lm = LanguageModel.of(tiny.tiny_llama(len(tokenizer)).eval(), tokenizer)
    turn = "the {{ m['role'] }} who wrote the old book of the king: {{ m['content'] }}"
    template = "{% for m in messages %}" + turn + "\n{% endfor %}"
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in ((row["question"], row["answer"]) for row in tiny.facts(40, 3))
    ]
    examples = read_examples(rows, role="retain", turns=turns)
    tokens = encode(examples, tokenizer, role="retain", max_length=None, chat_template=template)
    retain, forget = tokens[:30], tokens[30:]
    samples = sample_unseen_answers(lm, retain, forget, count=50)
    assert len(samples) > 25
    assert not {t.ids[: t.first] for t in samples} & {t.ids[: t.first] for t in tokens}
