"""Renderings: the form in which the model reads a record, before any tokenizer."""

import pytest
from texts import CHAT, CHATML, make_tokenizer, one, read, sentence_of

from pyunlearn.data import Example, encode
from pyunlearn.data.rendering import Rendering, other_renderings, rendering_of
from pyunlearn.data.texts import rendered_text
from pyunlearn.errors import ArgumentError, DataError

QUESTION = {"question": "Who wrote it?", "answer": "Thomas Jefferson."}
PAIR = {"prompt": "Who wrote it?", "completion": "Thomas Jefferson."}
INSTRUCT = (
    "{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST] ' if m['role'] == 'user' else m['content'] }}"
    "{% endfor %}"
)


def halves(example, tokenizer):
    """The text that is tokenized, divided before its first scored character."""
    return rendered_text(example, tokenizer, "it", None)[:2]


@pytest.mark.parametrize(
    ("key", "question", "chat"),
    [
        ("plain", "Question: Who wrote it?\nAnswer: ", "Be brief.\nQuestion: Who wrote it?\nAnswer: "),
        ("short", "Q: Who wrote it?\nA: ", "Be brief.\nQ: Who wrote it?\nA: "),
        ("none", "Who wrote it?\n", "system: Be brief.\nuser: Who wrote it?\nassistant: "),
        ("joined", "Who wrote it? ", "Be brief. Who wrote it? "),
        ("alone", "", ""),
    ],
)
def test_a_question_and_a_chat_are_rendered(key, question, chat):
    """Labels in front of each turn, lines, one text, or the answer alone; the answer itself stays as it is."""
    for record, prompt in ((QUESTION, question), ({"messages": CHAT}, chat)):
        (example,) = read([record], turns="last")
        assert Rendering(key, key).of(example) == Example(prompt, "Thomas Jefferson.")
        assert halves(Rendering(key, key).of(example), make_tokenizer(template=CHATML))[0] == prompt


@pytest.mark.parametrize("key", ["chat", "plain", "none", "joined", "alone"])
def test_other_records_stay_as_they_are(key):
    """A prompt with its completion is rendered only where every record is meant, a plain text never."""
    pair, text = read([PAIR, "a text"])
    assert Rendering(key, key).of(pair) == pair
    assert Rendering(key, key, everything=True).of(text) == text
    rendered = Rendering(key, key, everything=True).of(pair)
    tokenizer = make_tokenizer(template=CHATML)
    (question,) = read([QUESTION])
    if key == "none":
        assert rendered == pair
    else:
        assert halves(rendered, tokenizer) == halves(Rendering(key, key).of(question), tokenizer)


@pytest.mark.parametrize(
    ("key", "everything", "assistant"),
    [
        ("plain", "Be brief.\nQuestion: user\nAnswer: Two.\nQuestion: Who?\nAnswer: He.", "Two. He."),
        ("none", "Be brief.\nuser: user\nassistant: Two.\nuser: Who?\nassistant: He.", "Two. He."),
        ("joined", "Be brief. user Two. Who? He.", "Two. He."),
        ("alone", "He.", "He."),
    ],
)
def test_the_turns_that_are_scored_are_those_of_the_conversation_in_each_form(key, everything, assistant):
    """Labels between the turns are scored with all, and only there; the label before the first turn never is."""
    contents = ["Be brief.", "user", "Two.", "Who?", "He."]
    roles = ["system", "user", "assistant", "user", "assistant"]
    chat = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    for turns, text in (("all", everything), ("assistant", assistant), ("last", "He.")):
        (example,) = read([{"messages": chat}], turns=turns)
        rendered = Rendering(key, key).of(example)
        assert rendered.scored_text == text
        assert rendered.prompted == (turns == "last" and key != "alone")
        assert Rendering(key, key).of(rendered) == rendered


def test_a_winner_and_the_space_at_a_seam_stay():
    """An answer that begins with white space gets no second one; wide characters get none."""
    (example,) = read([{"question": "Who?", "answer": " He.", "winner": "Nobody."}])
    rendered = Rendering("plain", "plain").of(example)
    assert (rendered.prompt + rendered.completion, rendered.winner) == ("Question: Who?\nAnswer: He.", "Nobody.")
    (wide,) = read([{"question": "谁？", "answer": "他"}])
    assert Rendering("joined", "joined").of(wide).prompt == "谁？"


def test_auto_stands_for_the_chat_template_if_there_is_one():
    """Explicit forms stand for themselves, and the others are listed once each."""
    with_template, without = make_tokenizer(template=CHATML), make_tokenizer()
    assert (rendering_of("auto", with_template).key, rendering_of("auto", without).key) == ("chat", "none")
    assert [rendering_of(key, with_template).key for key in ("chat", "plain", "none")] == ["chat", "plain", "none"]
    keys = [[r.key for r in other_renderings(t)] for t in (with_template, without)]
    assert keys[0] == ["chat", *keys[1]] == ["chat", "plain", "short", "none", "joined", "alone"]
    with pytest.raises(ArgumentError, match="this tokenizer has none: choose plain or none") as error:
        rendering_of("chat", without)
    sentence_of(error)


def test_a_file_is_used_in_place_of_the_tokenizers_chat_template(tmp_path):
    """Also where the tokenizer has none; the tokenizer itself is not changed."""
    (tmp_path / "instruct.jinja").write_text(INSTRUCT)
    for tokenizer in (make_tokenizer(), make_tokenizer(template=CHATML)):
        before = tokenizer.chat_template
        rendering = rendering_of(str(tmp_path / "instruct.jinja"), tokenizer)
        assert rendering.name == "the chat template instruct.jinja"
        (example,) = read([QUESTION])
        tokens = one(rendering.of(example), tokenizer, chat_template=rendering.chat_template)
        assert tokenizer.decode(tokens.ids) == "[INST] Who wrote it? [/INST] Thomas Jefferson."
        assert tokenizer.decode(tokens.scored).strip() == "Thomas Jefferson."
        assert tokenizer.chat_template == before


@pytest.mark.parametrize(("content", "fault"), [(b"\xff\xfe", "not UTF-8"), (b" \n", "is empty")])
def test_a_file_that_is_no_template_is_refused(tmp_path, content, fault):
    """In one sentence."""
    (tmp_path / "x.jinja").write_bytes(content)
    with pytest.raises(ArgumentError, match=f"^template: the chat template .*{fault}") as error:
        rendering_of(tmp_path / "x.jinja", make_tokenizer())
    sentence_of(error)


def test_a_given_template_that_raises_is_named():
    """A syntax error too, on one line."""
    for template in ("{{ raise_exception('no\\nroles') }}", "{% for m in %}"):
        with pytest.raises(DataError, match=r"is refused by the given chat template: .*template='none'") as error:
            encode(read([QUESTION]), make_tokenizer(), role="forget", max_length=None, chat_template=template)
        sentence_of(error)
