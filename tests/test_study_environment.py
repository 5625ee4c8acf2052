"""The versions and hardware behind each seed of a study."""

from types import SimpleNamespace

import pytest

from pyunlearn.study import environment, seeds
from pyunlearn.study.config import StudyConfig
from pyunlearn.study.folder import Folder


@pytest.fixture
def run_seed(tmp_path, monkeypatch):
    """Run seed 0, whose work is one run, under a version; returns its environments and leaves out the run."""
    folder = Folder(tmp_path / "s", {})
    job = SimpleNamespace(file="runs/0.json", which=SimpleNamespace(kind="id", dose=1), rate=1.0)
    lm = SimpleNamespace(module=SimpleNamespace(state_dict=dict, load_state_dict=lambda _: None))
    monkeypatch.setattr(seeds, "jobs", lambda *_: [job])
    monkeypatch.setattr(seeds, "train", lambda folder, name, *_, **__: folder.json(f"models/{name}", {}))
    monkeypatch.setattr(seeds, "_load", lambda *_: lm)
    monkeypatch.setattr(seeds, "_score", lambda *_: folder.json(seeds.scores_file("seed-0"), {}))
    sets = SimpleNamespace(learned=[], epochs=lambda *_: [])

    def run(version, unlearn):
        monkeypatch.setattr(environment, "__version__", version)
        monkeypatch.setattr(seeds, "unlearn_set", unlearn)
        monkeypatch.setattr(Folder, "arrays", lambda self, name, **values: self.json(name, values))
        seeds.run_seed(seeds.Inputs(folder, StudyConfig(), None, sets, "cpu"), 0, lambda _: None)

    return run, lambda: [e["pyunlearn"] for e in folder.read_json("environment/seed-0.json")]


def test_a_seed_that_resumes_names_both_versions(run_seed):
    """Its model comes from the first version and its run from the second; a call without work to do adds none."""
    run, versions = run_seed

    def stop(*_):
        raise KeyboardInterrupt

    for _ in range(2):  # the same version twice is one
        with pytest.raises(KeyboardInterrupt):
            run("1", stop)
    assert versions() == ["1"]
    run("2", lambda *_: {})
    assert versions() == ["1", "2"]
    run("3", stop)
    assert versions() == ["1", "2"]
