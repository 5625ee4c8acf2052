"""Benchmarks whose files are on the hub: those that are downloaded already, and what is said where there are none."""

import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants
from tofu_folder import bench, tofu_folder, tofu_rows

from pyunlearn.benchmarking.files import files_in, require_folder
from pyunlearn.benchmarking.registry import BENCHMARKS, BenchConfig
from pyunlearn.errors import DataError

COMMITS = ("a" * 40, "b" * 40)


@pytest.fixture(scope="module")
def rows(answers):
    """The rows of TOFU's four files."""
    return tofu_rows(answers)


@pytest.fixture
def cache(rows, tmp_path, monkeypatch):
    """Downloads of locuslab/TOFU, two commits, on a machine without a network: the second lacks a file."""
    place = tmp_path / "hub" / "datasets--locuslab--TOFU"
    for commit in COMMITS:
        (place / "snapshots").mkdir(parents=True, exist_ok=True)
        tofu_folder(place / "snapshots" / commit, rows)
    (place / "snapshots" / COMMITS[1] / "retain_perturbed.jsonl").unlink()
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMITS[0])
    (place / "refs" / "old").write_text(COMMITS[1])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return place / "snapshots"


SHORT = {"first": 2, "max_new_tokens": 1}


@pytest.mark.full
def test_a_name_on_the_hub_stands_for_its_files(answers, cache):
    """The numbers are those of the folder; the commit is in the result, where a folder has none."""
    local = bench(answers, cache / COMMITS[0], **SHORT)
    for name in ("locuslab/TOFU", "locuslab/TOFU@main", f"locuslab/TOFU@{COMMITS[0]}"):
        result = bench(answers, name, **SHORT)
        assert result.settings["data"] == f"locuslab/TOFU@{COMMITS[0]}"
        np.testing.assert_equal(result.numbers, local.numbers)
    assert local.settings["data"] is None
    with pytest.raises(DataError, match="has no retain_perturbed"):
        bench(answers, "locuslab/TOFU@old", **SHORT)


def test_a_folder_of_that_name_comes_first(answers, cache, rows, tmp_path):
    """As it does for models."""
    (tmp_path / "locuslab").mkdir()
    tofu_folder(tmp_path / "locuslab" / "TOFU", rows)
    assert bench(answers, "locuslab/TOFU", **SHORT).settings["data"] is None
    shutil.rmtree(tmp_path / "locuslab" / "TOFU")
    with pytest.raises(DataError, match="the data folder locuslab/TOFU was not found"):
        bench(answers, "locuslab/TOFU", **SHORT)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/TOFU", r"nobody/TOFU is neither a folder here nor among the downloads, and the hub \(.*\) cannot be"),
        ("locuslab/TOFU@other", "locuslab/TOFU@other is neither a folder here nor among the downloads"),
        (Path("nobody/TOFU"), "the data folder nobody/TOFU was not found"),
        ("../TOFU/x", "the data folder ../TOFU/x was not found"),
        ("a/b/c", "the data folder a/b/c was not found"),
    ],
)
def test_what_is_nowhere_is_one_sentence(answers, cache, name, message):
    """A path is never looked up on the hub."""
    with pytest.raises(DataError, match=message) as caught:
        bench(answers, name, **SHORT)
    assert "\n" not in str(caught.value)


def test_the_files_of_a_benchmark_alone_are_downloaded(answers, cache, monkeypatch):
    """By their names, and none of TOFU's other splits."""
    calls = []

    def download(name, **options):
        calls.append((name, options))
        return str(cache / COMMITS[0])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    bench(answers, "locuslab/TOFU@v1", **SHORT)
    ((name, options),) = calls
    assert (name, options["revision"], options["repo_type"]) == ("locuslab/TOFU", "v1", "dataset")
    assert "forget10_perturbed.json" in options["allow_patterns"]
    assert not any(word in file for file in options["allow_patterns"] for word in ("forget01", "*", "retain90"))


def test_the_numbered_file_of_a_set_comes_first(tmp_path):
    """MUSE-News has both; two of a kind are still refused."""
    (tmp_path / "verbmem").mkdir()
    for name in ("forget.json", "forget-00000-of-00001.parquet"):
        (tmp_path / "verbmem" / name).touch()
    assert [p.name for p in files_in(tmp_path, "verbmem/forget")] == ["forget-00000-of-00001.parquet"]
    (tmp_path / "verbmem" / "forget-00000-of-00001.jsonl").touch()
    with pytest.raises(DataError, match=r"has verbmem/forget-.*jsonl and verbmem/forget-.*parquet: remove or rename"):
        files_in(tmp_path, "verbmem/forget")


def test_the_files_of_rwku_are_in_a_folder(cache, monkeypatch):
    """Those of all persons together."""
    place = cache.parents[1] / "datasets--jinzhuoran--RWKU"
    (place / "snapshots" / COMMITS[0] / "All").mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMITS[0])
    row = BENCHMARKS["rwku"]
    folder = require_folder("jinzhuoran/RWKU", row.files(BenchConfig()), row.inside)
    assert folder.path == place / "snapshots" / COMMITS[0] / "All"
    assert folder.source == f"jinzhuoran/RWKU@{COMMITS[0]}"
    calls = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *_, **options: calls.append(options) or str(folder.path.parent)
    )
    require_folder("jinzhuoran/RWKU", row.files(BenchConfig()), row.inside)
    assert "All/forget_level3.json" in calls[0]["allow_patterns"]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("tofu", "world_facts_perturbed"),
        ("wmdp", "wmdp-cyber"),
        ("muse", "knowmem/retain_qa_icl"),
        ("rwku", "forget_level3"),
    ],
)
def test_every_benchmark_names_its_files(name, file):
    """Those that are read where they are there too."""
    assert file in BENCHMARKS[name].files(BenchConfig())
