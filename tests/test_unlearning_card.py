"""The model card of a result, and its upload to a hub."""

import json
import shutil
from unittest import mock

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import RepositoryNotFoundError
from test_documents import blocks
from test_public import ROOT
from unlearning_runs import run

from pyunlearn.errors import ArgumentError, OutputError
from pyunlearn.models import hub, load

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def result(story):
    """A run that forgets, from a model with a name of the hub."""
    model = story.fresh()
    model.name_or_path = "somebody/story"
    return run(story, story.forget + story.unseen, model=model, batch_size=1, learning_rate=1e-3)


@pytest.fixture
def local_hub(monkeypatch, tmp_path):
    """A hub in a folder, of the account "me": repository -> a folder of its files; calls fit the true signatures.

    As on the true hub a name without an account belongs to nobody when it is looked up, and to "me" when it is made.
    """
    api = mock.create_autospec(huggingface_hub.HfApi, instance=True)
    api.whoami.side_effect = lambda: {"name": "me"}
    api.repo_exists.side_effect = lambda repo_id: "/" in repo_id and (tmp_path / repo_id).exists()
    api.repo_info.side_effect = lambda repo_id: mock.Mock(private=False)

    def create(repo_id, *, exist_ok, **_):
        place = tmp_path / (repo_id if "/" in repo_id else f"me/{repo_id}")
        place.mkdir(parents=True, exist_ok=exist_ok)
        return mock.Mock(repo_id=repo_id)

    def receive(*, repo_id, folder_path, delete_patterns, **_):
        assert delete_patterns in (None, "*")
        if delete_patterns:
            shutil.rmtree(tmp_path / repo_id)
        shutil.copytree(folder_path, tmp_path / repo_id, dirs_exist_ok=True)
        return mock.Mock(commit_url=f"https://hub.invalid/{repo_id}/commit/1")

    api.create_repo.side_effect, api.upload_folder.side_effect = create, receive
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token=None: api)
    monkeypatch.setattr(hub, "reachable", lambda: True)
    return api


def words_of(trained):
    """Return pieces of the forget texts that no other file of a model's folder would hold."""
    return [text[i : i + 12] for text in trained.forget for i in range(0, len(text) - 12, 6)]


def test_the_card_has_the_verdict_and_no_forget_text(story, result, tmp_path):
    """Its metadata is what the hub reads; its numbers are those of the result."""
    folder = result.save(tmp_path / "out", show_text=True)
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "somebody/story"
    assert card.data.library_name == "transformers"
    assert "unlearned" in card.data.tags
    forgotten = sum(e.verdict == "forgotten" for e in result.examples)
    assert forgotten >= 1
    assert f"{forgotten} forgotten, {len(result.examples) - forgotten} not memorized" in card.text
    assert f"{result.utility.nll_before:.3f} nats a token before, {result.utility.nll_after:.3f} after" in card.text
    assert "| the run ended | forgotten |" in card.text
    assert all(note in card.text for note in result.notes)
    assert not [piece for piece in words_of(story) if piece in card.content]
    assert [piece for piece in words_of(story) if piece in (folder / "result.json").read_text()]  # show_text


def test_a_model_of_this_machine_is_named_without_its_path(story, tmp_path, monkeypatch):
    """A folder is no base model on the hub."""
    for part in (story.fresh(), story.tokenizer):
        part.save_pretrained(tmp_path / "mine")
    result = run(story, story.unseen, model=str(tmp_path / "mine"))
    card = ModelCard.load(result.save(tmp_path / "out") / "README.md")
    assert card.data.base_model is None
    assert "# mine, after unlearning" in card.text
    assert "removed from `mine` with" in card.text
    assert str(tmp_path) not in card.content
    monkeypatch.chdir(tmp_path.parent)
    near = run(story, story.unseen, model=f"{tmp_path.name}/mine")
    card = ModelCard.load(near.save(tmp_path / "near") / "README.md")
    assert card.data.base_model is None
    assert tmp_path.name not in card.content


def test_the_card_of_an_adapter_replaces_that_of_peft(story, tmp_path):
    """Its base model is the model under it."""
    pytest.importorskip("peft")
    model = story.fresh()
    model.name_or_path = "somebody/story"
    result = run(story, story.unseen, model=model, lora=2)
    card = ModelCard.load(result.save(tmp_path / "out") / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model == "somebody/story"
    assert "More Information Needed" not in card.content


def test_a_pushed_result_holds_a_card_and_no_forget_text(story, result, local_hub, tmp_path, capsys):
    """The model loads from there; result.json stays here, also where the run shows its texts."""
    address = result.push_to_hub("me/story-unlearned", private=True, token="t")
    assert address == "https://hub.invalid/me/story-unlearned/commit/1"
    there = tmp_path / "me" / "story-unlearned"
    names = {path.name for path in there.iterdir()}
    assert {"README.md", "model.safetensors", "config.json", "tokenizer.json"} <= names
    assert "result.json" not in names
    for path in there.iterdir():
        content = path.read_bytes()
        assert not [piece for piece in words_of(story) if piece.encode() in content]
    load(there)
    local_hub.create_repo.assert_called_once_with("me/story-unlearned", private=True, exist_ok=False)
    local_hub.create_branch.assert_not_called()
    result.push_to_hub("me/other", revision="v2")
    local_hub.create_branch.assert_called_once_with("me/other", branch="v2", exist_ok=True)


def test_the_document_runs(result, local_hub):
    """docs/upload.md."""
    (block,) = blocks(ROOT / "docs" / "upload.md", ("python",))
    names = {"result": result}
    exec(block, names)
    assert names["address"] == "https://hub.invalid/me/my-model-unlearned/commit/1"


def test_a_repository_that_is_there_is_refused_or_replaced(result, local_hub, monkeypatch, tmp_path):
    """Its files can be the model as it was, and its history; a name without the account is the account's own."""
    lines = []
    monkeypatch.setattr(hub.logger, "warning", lines.append)
    result.push_to_hub("model")
    (tmp_path / "me" / "model" / "model-00001-of-00002.safetensors").write_text("as it was")
    for name in ("model", "me/model"):
        with pytest.raises(OutputError, match=r"me/model is there already.*choose a new name, or pass replace=True"):
            result.push_to_hub(name)
    assert lines == []
    with pytest.raises(OutputError, match="me/model is public: make it private first"):
        result.push_to_hub("me/model", private=True, replace=True)
    result.push_to_hub("me/model", replace=True)
    assert ["can still hold the model with the texts" in line for line in lines] == [True]
    assert not (tmp_path / "me" / "model" / "model-00001-of-00002.safetensors").exists()
    load(tmp_path / "me" / "model")


@pytest.mark.parametrize("folder", ["", "secret-customer"])
def test_no_path_of_this_machine_is_uploaded(folder, story, local_hub, tmp_path, monkeypatch):
    """The configuration of an adapter has the path of its base model, which the saved folder needs.

    It is the whole path, however the model was named, so that the folder loads it from anywhere.
    """
    pytest.importorskip("peft")
    base = tmp_path / "secret-customer" / "base"
    for part in (story.fresh(), story.tokenizer):
        part.save_pretrained(base)
    monkeypatch.chdir(tmp_path / folder)
    result = run(story, story.unseen, model="./base" if folder else str(base), lora=2)
    saved = result.save(tmp_path / "out")
    assert json.loads((saved / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    for name in ("README.md", "result.json"):
        assert "secret-customer" not in (saved / name).read_text()
    monkeypatch.chdir(tmp_path)
    load(saved)
    result.push_to_hub("adapter")
    for path in (tmp_path / "me" / "adapter").iterdir():
        assert b"secret-customer" not in path.read_bytes(), path.name
    assert '"base_model_name_or_path": "base"' in (tmp_path / "me" / "adapter" / "adapter_config.json").read_text()


def test_the_card_of_a_model_that_was_not_changed_says_so(story, tmp_path):
    """Neither the tag nor the sentence claims that something was removed."""
    result = run(story, story.unseen)
    card = ModelCard.load(result.save(tmp_path / "out") / "README.md")
    assert "unlearned" not in card.data.tags
    assert "were to be removed from" in card.text
    assert "| the run ended | nothing memorized |" in card.text


def test_what_the_hub_refuses_is_one_sentence(result, local_hub, monkeypatch):
    """A wrong name, a missing right, and no network."""
    with pytest.raises(ArgumentError, match=r"repo_id must be the name of a repository.*got 'a/b/c'"):
        result.push_to_hub("a/b/c")
    with pytest.raises(ArgumentError, match="repo_id must be a name"):
        result.push_to_hub("")
    with pytest.raises(ArgumentError, match="private"):
        result.push_to_hub("me/model", private="yes")
    local_hub.create_repo.side_effect = RepositoryNotFoundError("403 Forbidden", response=mock.Mock())
    with pytest.raises(OutputError, match="did not take the model as me/model: 403 Forbidden"):
        result.push_to_hub("me/model")
    monkeypatch.setattr(hub, "reachable", lambda: False)
    with pytest.raises(OutputError, match="cannot be reached: save the result, and upload its folder later"):
        result.push_to_hub("me/model")
