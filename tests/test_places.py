"""Where files lie, which environment variables are ours, and that a write is whole or not at all."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from deepclust_nb import data, places

ROOT = Path(__file__).resolve().parents[1]


def test_data_root_prefers_what_the_package_carries(tmp_path, monkeypatch):
    assert places.data_root() == ROOT / "data"
    monkeypatch.setattr(places, "__file__", str(tmp_path / "deepclust_nb" / "places.py"))
    with pytest.raises(FileNotFoundError, match="There is no data folder in"):
        places.data_root()
    (tmp_path / "data" / "bundled").mkdir(parents=True)
    assert places.data_root() == tmp_path / "data"
    (tmp_path / "deepclust_nb" / "_data" / "bundled").mkdir(parents=True)
    assert places.data_root() == tmp_path / "deepclust_nb" / "_data"


def test_chapters_lie_in_the_checkout():
    assert places.root() == ROOT and places.chapter_file("foundations").is_file()


def test_every_variable_of_ours_stands_in_one_place():
    """And those that name folders are made absolute for a kernel, which starts elsewhere."""
    named = set()
    for path in [*(ROOT / "deepclust_nb").rglob("*.py"), *(ROOT / "book").glob("*.py")]:
        found = set(
            re.findall(r"DEEPCLUST_\w+", re.sub(r'"""(.*?)"""', "", path.read_text("utf-8"), flags=re.S))
        )
        assert path.name == "places.py" or not {x for x in found if f'"{x}"' in path.read_text("utf-8")}, path
        named |= found
    assert {"DEEPCLUST_DATA", "DEEPCLUST_CACHE", "DEEPCLUST_RECORDING"} <= named
    assert named <= {places.DATA, places.CACHE, places.RECORDING, places.GRAPHS}


def test_folders_travel_as_absolute_paths_where_they_are_set(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEEPCLUST_DATA", "sets")
    monkeypatch.setenv("DEEPCLUST_CACHE", "")
    assert places.absolute_folders() == {"DEEPCLUST_DATA": str(tmp_path / "sets")}
    monkeypatch.setenv("DEEPCLUST_CACHE", "../cache")
    assert places.absolute_folders()["DEEPCLUST_CACHE"] == str(tmp_path.parent / "cache")


def test_a_write_is_seen_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.txt"
    places.write_atomic(path, "one\n")
    assert path.read_bytes() == b"one\n" and [p.name for p in path.parent.iterdir()] == ["a.txt"]
    replace = os.replace

    def killed(part, target):
        assert Path(part).read_text() == "two\n" and path.read_text() == "one\n"
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        places.write_atomic(path, "two\n")
    monkeypatch.setattr(os, "replace", replace)
    assert path.read_text() == "one\n" and [p.name for p in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("name", ["mnist_5k", "fashion_5k"])
def test_the_size_of_a_data_set_is_known_before_it_is_loaded(name):
    for split in ("train", "test", "all"):
        assert data.size(name, split) == len(data.load(name, split).y)
    with pytest.raises(KeyError):
        data.size("har", "train")


@pytest.mark.skipif(not os.environ.get("DEEPCLUST_DATA"), reason="needs a folder of full data sets")
@pytest.mark.parametrize("name", ["mnist", "fashion", "usps"])
def test_the_sizes_of_full_sets(name):
    assert [data.size(name, part) for part in ("train", "test")] == [
        len(data.load(name, part).y) for part in ("train", "test")
    ]


def test_numpy_arrays_become_floats_too():
    image = np.array([0, 51, 255], dtype=np.uint8)
    assert torch.equal(data.to_float(image), torch.tensor([0.0, 0.2, 1.0]))
    vector = np.array([0.5, 2.0], dtype=np.float32)
    assert torch.equal(data.to_float(vector), torch.tensor([0.5, 2.0]))
    with pytest.raises(TypeError, match="not torch.float64"):
        data.to_float(np.array([0.5]))
