"""Names on the hub where there is no network."""

import contextlib
import socket
import threading
import time
import types

import pytest
from huggingface_hub import constants

from pyunlearn.errors import ModelError
from pyunlearn.models import hub, load
from pyunlearn.models.loading import load_tokenizer, require_loadable


@pytest.fixture(params=["refuses", "is silent"])
def no_network(monkeypatch, request):
    """Look names up on a host that answers nothing, without a proxy."""
    end = threading.Event()

    def connect(*_, **__):
        if request.param == "is silent":
            end.wait(60)
        return contextlib.nullcontext() if end.is_set() else socket.create_connection(("127.0.0.1", 1))

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    for name in hub._PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(hub, "_SECONDS", 0.1)
    monkeypatch.setattr(hub, "socket", types.SimpleNamespace(create_connection=connect))
    hub._answers.cache_clear()
    yield
    end.set()
    hub._answers.cache_clear()


def test_a_name_that_is_nowhere_is_refused_at_once(no_network):
    """In place of half a minute of retries; the sentence says that there is no network."""
    began = time.monotonic()
    sentence = r"from nobody/model: nobody/model is neither here .*the hub \(hub\.invalid\) cannot be reached"
    with pytest.raises(ModelError, match=sentence):
        load("nobody/model")
    with pytest.raises(ModelError, match="nobody is neither here nor among the downloads"):
        require_loadable("model", "nobody")
    with pytest.raises(ModelError, match="no tokenizer could be loaded from nobody"):
        load_tokenizer("nobody")
    assert time.monotonic() - began < 10


def test_only_a_host_that_answers_nothing_counts_as_away(no_network, monkeypatch):
    """With a proxy it is not to be known, and a folder needs no hub."""
    assert hub.hub_options("nobody/model") == {"local_files_only": True}
    assert hub.hub_options("/") == {}
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.invalid")
    assert hub.hub_options("nobody/model") == {}
    monkeypatch.delenv("HTTPS_PROXY")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.undo()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        hub._answers.cache_clear()
        assert hub.reachable()
