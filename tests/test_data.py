"""deepclust_nb.data: what is loaded, what is refused, and that fetching happens once and is checked."""

import bz2
import functools
import gzip
import hashlib
import http.server
import importlib.util
import io
import json
import os
import pickle
import socket
import subprocess
import sys
import tarfile
import threading
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import scipy.sparse
import torch
from loader import definitions

from deepclust_nb import baselines, data, metrics, networks, records

ROOT = Path(__file__).resolve().parents[1]
needs_full_sets = pytest.mark.skipif(
    not os.environ.get("DEEPCLUST_DATA"), reason="DEEPCLUST_DATA is not set: no full data sets at hand"
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, no folder of full sets, and no way out to the network but this machine itself."""
    monkeypatch.delenv("DEEPCLUST_DATA", raising=False)
    monkeypatch.setenv("DEEPCLUST_CACHE", str(tmp_path / "cache"))
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "cache"


@pytest.fixture
def server(tmp_path):
    """A web server over an empty folder on this machine: .folder, .url and .gets, the paths asked for."""
    folder, gets = tmp_path / "served", []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            gets.append(self.path)
            super().do_GET()

        def log_message(self, *ignored):
            pass

    service = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
    )
    threading.Thread(target=service.serve_forever, daemon=True).start()
    yield types.SimpleNamespace(folder=folder, url=f"http://127.0.0.1:{service.server_port}/", gets=gets)
    service.shutdown()
    service.server_close()


def replace_source(monkeypatch, name, **changes):
    monkeypatch.setitem(data.SOURCES, name, data.SOURCES[name]._replace(**changes))


def small_arrays(n=6):
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (2 * n, 32, 32, 3), dtype=np.uint8)
    y = np.arange(2 * n) % 3
    return {"x_train": x[:n], "y_train": y[:n], "x_test": x[n:], "y_test": y[n:]}


def flip(path, at=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    path.write_bytes(content)


# Bundled images


@pytest.mark.parametrize("name", ["mnist_5k", "fashion_5k"])
def test_bundled_shapes_counts_and_order(name):
    for split, n in (("train", 4000), ("test", 1000), ("all", 5000)):
        x, y, *rest = data.load(name, split)
        assert rest == [name, split]
        assert x.shape == (n, 1, 28, 28) and x.dtype == torch.uint8 and x.is_contiguous()
        assert y.shape == (n,) and y.dtype == torch.int64
        assert torch.equal(y, torch.arange(10).repeat(n // 10))
        assert x.min() == 0 and x.max() == 255
    both = torch.cat([data.load(name, "train").x, data.load(name, "test").x])
    assert torch.equal(data.load(name).x, both)
    assert len(torch.unique(both.flatten(1), dim=0)) == 5000


def test_bundled_files_are_small_and_match_the_table():
    files = sorted((data.data_root() / "bundled").glob("*.npz"))
    assert [f.name for f in files] == ["fashion_5k.npz", "mnist_5k.npz"]
    assert sum(f.stat().st_size for f in files) < 4 * 2**20
    for file in files:
        assert hashlib.sha256(file.read_bytes()).hexdigest() == data.SHA256[file.name]


def test_mnist_5k_loads_quickly():
    seconds = []
    for _ in range(3):
        data._sha256.cache_clear()
        start = time.perf_counter()
        data.load("mnist_5k")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.2


def test_a_second_load_does_not_hash_again():
    data._sha256.cache_clear()
    data.load("mnist_5k")
    data.load("mnist_5k", "test")
    assert data._sha256.cache_info().misses == 1


# The rebuilding script


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("build", ROOT / "data" / "bundled" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_build_takes_the_right_images_in_the_right_order(build):
    y = np.repeat(np.arange(10), 500)[np.random.default_rng(0).permutation(5000)]
    chosen = build.balanced(y, 400, 100)
    assert np.array_equal(y[chosen], np.tile(np.arange(10), 100))
    for c in range(10):
        assert np.array_equal(chosen[c::10], np.flatnonzero(y == c)[400:500])


def test_build_writes_the_same_bytes_and_sees_a_changed_pixel(build, tmp_path):
    with np.load(ROOT / "data" / "bundled" / "mnist_5k.npz") as stored:
        arrays = {key: stored[key][:200] for key in stored.files}
    for name in ("a.npz", "b.npz"):
        build.write_npz(tmp_path / name, arrays)
        time.sleep(0.01)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert b"\x00\x00\x21\x00" in (tmp_path / "a.npz").read_bytes()[:14]  # the zip's date is 1 January 1980
    assert build.differences(tmp_path / "a.npz", arrays) == []
    arrays["x_test"] = arrays["x_test"].copy()
    arrays["x_test"][3, 2, 1] ^= 1
    assert build.differences(tmp_path / "a.npz", arrays) == ["x_test of a.npz differs from the package."]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "b.npz"]


def test_build_refuses_another_package(build, tmp_path):
    (tmp_path / "x.whl").write_bytes(b"something else")
    with pytest.raises(SystemExit, match="is the pinned one"):
        build.read_pinned(tmp_path / "x.whl", build.WHEEL_SHA256)


@pytest.mark.long
def test_bundled_files_equal_what_the_packages_hold():
    command = [sys.executable, str(ROOT / "data" / "bundled" / "build.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Helpers of every chapter


def test_to_float():
    image = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert data.to_float(image).dtype == torch.float32
    assert torch.equal(data.to_float(image), torch.tensor([0.0, 0.2, 1.0]))
    vector = torch.tensor([-3.0, 7.0])
    assert data.to_float(vector) is vector
    with pytest.raises(TypeError, match="not torch.int64"):
        data.to_float(torch.tensor([1]))


def test_labelled_subset_is_even_seeded_and_frozen():
    y = data.load("mnist_5k", "train").y
    chosen = data.labelled_subset(y, 100, seed=0)
    assert chosen.dtype == torch.int64 and chosen.shape == (100,)
    assert torch.equal(chosen, torch.unique(chosen))
    assert torch.bincount(y[chosen]).tolist() == [10] * 10
    assert torch.equal(chosen, data.labelled_subset(y.numpy(), np.int64(100), seed=0))
    assert not torch.equal(chosen, data.labelled_subset(y, 100, seed=1))
    # A seed names the same labels for good: a change here silently changes every semi-supervised result.
    assert chosen[:5].tolist() == [56, 100, 134, 139, 155]
    uneven = torch.bincount(y[data.labelled_subset(y, 23, seed=5)])
    assert sorted(uneven.tolist()) == [2] * 7 + [3] * 3
    others = torch.bincount(y[data.labelled_subset(y, 23, seed=6)])
    assert uneven.tolist() != others.tolist()


def test_labelled_subset_does_not_take_the_first_ones():
    y = torch.arange(10).repeat(100)
    chosen = data.labelled_subset(y, 200, seed=3)
    assert 350 < chosen.float().mean() < 650


@pytest.mark.parametrize(
    ("y", "n_labels", "seed", "message"),
    [
        ([0, 1, 2, 0], 2, 0, "n_labels is 2, but must be a whole number from 3 to 4"),
        ([0, 1, 2, 0], 5, 0, "n_labels is 5, but must be a whole number from 3 to 4"),
        ([0, 1, 2, 0], 3.0, 0, "n_labels is 3.0, but"),
        ([0, 0], True, 0, "n_labels is True, but"),
        ([0, 1, 2, 0], 3, True, "seed is True, but"),
        ([0, 1, 2, 0], 3, -1, "seed is -1, but must be a whole number from 0 to 4294967295"),
        ([0, 0, 0, 0, 7], 4, 0, "takes 2 of class 7, but it has only 1"),
        ([0.0, 1.0], 2, 0, "must be a non-empty vector of integers, not float64"),
        ([[0, 1]], 2, 0, "must be a non-empty vector of integers"),
        ([], 2, 0, "must be a non-empty vector of integers"),
    ],
)
def test_labelled_subset_refuses(y, n_labels, seed, message):
    with pytest.raises(ValueError, match=message):
        data.labelled_subset(np.array(y), n_labels, seed)


# torchvision on a CPU-only torch, and what importing needs


def run_python(code, **environment):
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}, timeout=120
    )


def test_torchvision_imports_and_works():
    done = run_python(
        "import torch\n"
        "from deepclust_nb import data\n"
        "torchvision = data.import_torchvision()\n"
        "from torchvision.transforms import v2\n"
        "x = torch.arange(12, dtype=torch.uint8).reshape(1, 3, 4)\n"
        "assert torch.equal(v2.RandomHorizontalFlip(1.0)(x), x.flip(-1))\n"
        "assert v2.functional.resize(x, [6, 8]).shape == (1, 6, 8)\n"
        "assert torchvision.utils.make_grid(torch.zeros(4, 3, 5, 5)).ndim == 3\n"
        "assert torchvision.models.resnet18(num_classes=3) is not None\n"
        "assert data.import_torchvision() is torchvision\n"
    )
    assert done.returncode == 0, done.stderr


def test_torchvision_guard_hides_no_other_error(monkeypatch):
    tried = []

    def broken(name):
        tried.append(name)
        raise RuntimeError("operator torchvision::roi_align does not exist")

    monkeypatch.setattr(data.importlib, "import_module", broken)
    with pytest.raises(RuntimeError, match="roi_align"):
        data.import_torchvision()
    assert tried == ["torchvision"]
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="This takes torchvision, which is not installed"):
        data.import_torchvision()


def test_importing_needs_and_does_nothing():
    done = run_python(
        "import sys\n"
        "for name in ('pooch', 'torchvision', 'sklearn', 'PIL', 'yaml'):\n"
        "    sys.modules[name] = None\n"
        "import torch\n"
        "import socket; socket.socket.connect = None\n"
        "from deepclust_nb import data\n"
        "assert 'filelock' not in vars(data)\n"
        "assert data.load('mnist_5k').x.shape == (5000, 1, 28, 28)\n",
        DEEPCLUST_DATA="/there/is/no/such/folder",
    )
    assert done.returncode == 0, done.stderr


# Names, splits, places and damage


def test_names_are_those_of_the_book():
    assert data.NAMES == tuple(
        "mnist_5k fashion_5k mnist usps fashion svhn cifar10 cifar100_20 stl10 har reuters_rcv1"
        " har_standin reuters_r8 cifar10_subset cifar10_jpeg".split()
    )
    for source in data.SOURCES.values():
        assert source.stored is None or source.stored in data.SHA256
        assert source.stored or source.fetch
        assert source.origin or not source.fetch


def test_unknown_names_and_splits():
    with pytest.raises(ValueError, match="There is no data set 'minst'; did you mean 'mnist'"):
        data.load("minst")
    with pytest.raises(ValueError, match="no data set 'q'. Known are mnist_5k, fashion_5k"):
        data.load("q")
    with pytest.raises(ValueError, match="mnist_5k has no split 'val'; allowed: all, train, test"):
        data.load("mnist_5k", "val")
    with pytest.raises(ValueError, match="reuters_rcv1 has no split 'test'; allowed: all"):
        data.load("reuters_rcv1", "test")


@pytest.fixture(params=["bundled", "stored", "cached"])
def placed(request, tmp_path, cache, monkeypatch):
    """A small data set in one of the three places of this machine: its name and its file."""
    name = {"bundled": "mnist_5k", "stored": "usps", "cached": "svhn"}[request.param]
    if request.param == "cached":
        replace_source(monkeypatch, name, fetch=lambda folder: small_arrays())
        data.load(name)
        return name, cache / "svhn.npz"
    folder = tmp_path / "bundled" if request.param == "bundled" else tmp_path
    folder.mkdir(exist_ok=True)
    path = folder / data.SOURCES[name].stored
    np.savez(path, **small_arrays())
    monkeypatch.setitem(data.SHA256, path.name, hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(data, "data_root", lambda: tmp_path)
    monkeypatch.setenv("DEEPCLUST_DATA", str(tmp_path))
    return name, path


@pytest.mark.parametrize("harm", ["flipped", "cut", "emptied"])
def test_a_damaged_file_gets_a_sentence(placed, harm):
    name, path = placed
    assert data.load(name, "test").x.shape == (6, 3, 32, 32)
    if harm == "flipped":
        flip(path)
    else:
        path.write_bytes(path.read_bytes()[:-20] if harm == "cut" else b"")
    says = (
        r"is damaged, or a file of another origin.*\(its sha256 is [0-9a-f]{64}, but should be [0-9a-f]{64}\)"
    )
    with pytest.raises(OSError, match=says):
        data.load(name)


def test_every_digit_of_a_checksum_counts(placed, monkeypatch):
    name, path = placed
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for at in (0, 40, 63):
        wrong = digest[:at] + ("0" if digest[at] != "0" else "1") + digest[at + 1 :]
        monkeypatch.setitem(data.SHA256, path.name, wrong)
        if name == "svhn":
            path.with_suffix(".sha256").write_text(wrong + "\n")
        with pytest.raises(OSError, match=f"its sha256 is {digest}, but should be {wrong}"):
            data.load(name)


def test_a_cached_file_without_its_checksum_is_refused(cache, monkeypatch):
    replace_source(monkeypatch, "svhn", fetch=lambda folder: small_arrays())
    data.load("svhn")
    (cache / "svhn.sha256").unlink()
    with pytest.raises(OSError, match="delete it and load again"):
        data.load("svhn")
    (cache / "svhn.npz").unlink()
    assert len(data.load("svhn").y) == 12


def test_pickles_are_never_opened(tmp_path, cache, monkeypatch):
    arrays = small_arrays() | {"x_train": np.array([{"an": "object"}], dtype=object)}
    np.savez(tmp_path / "usps.npz", **arrays)
    digest = hashlib.sha256((tmp_path / "usps.npz").read_bytes()).hexdigest()
    monkeypatch.setitem(data.SHA256, "usps.npz", digest)
    monkeypatch.setenv("DEEPCLUST_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        data.load("usps")


def test_places_are_searched_in_order(tmp_path, cache, monkeypatch):
    replace_source(monkeypatch, "usps", fetch=lambda folder: small_arrays(4))
    monkeypatch.setenv("DEEPCLUST_DATA", str(tmp_path))
    assert len(data.load("usps").y) == 8  # not in the folder, so it is fetched
    np.savez(tmp_path / "usps.npz", **small_arrays(6))
    digest = hashlib.sha256((tmp_path / "usps.npz").read_bytes()).hexdigest()
    monkeypatch.setitem(data.SHA256, "usps.npz", digest)
    assert len(data.load("usps").y) == 12  # the folder comes before the cache
    monkeypatch.setenv("DEEPCLUST_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere', which does not exist"):
        data.load("usps")


# Fetching


@pytest.mark.parametrize(
    "name", ["mnist", "svhn", "cifar10", "cifar100_20", "stl10", "usps", "fashion", "har"]
)
def test_offline_a_sentence_says_how_to_get_it(name, cache):
    with pytest.raises(FileNotFoundError) as caught:
        data.load(name)
    message = str(caught.value)
    assert message.startswith(
        f"{name} is not at hand and could not be fetched from {data.SOURCES[name].origin} ("
    )
    assert (
        "load it once with a network" in message and f"DEEPCLUST_CACHE to a cache with {name}.npz" in message
    )
    stored = data.SOURCES[name].stored
    assert (f"DEEPCLUST_DATA to a folder that holds {stored}" in message) == bool(stored)
    assert sorted(p.name for p in cache.iterdir()) == [f"{name}.lock"]


@pytest.mark.parametrize("name", ["har_standin", "reuters_r8", "cifar10_subset", "cifar10_jpeg"])
def test_stand_ins_cannot_be_fetched(name, cache):
    with pytest.raises(
        FileNotFoundError, match=f"{name} is not at hand: set DEEPCLUST_DATA .* cannot be downl"
    ):
        data.load(name)


@pytest.mark.parametrize("package", ["pooch", "filelock"])
def test_a_missing_package_gets_a_sentence(package, cache, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"Fetching har takes {package}, which is not installed"):
        data.load("har")
    monkeypatch.delenv("DEEPCLUST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    with pytest.raises(ImportError, match=f"Fetching svhn takes {package}, which is not installed"):
        data.load("svhn")


def test_a_fetch_is_kept_and_what_it_left_behind_is_gone(cache, monkeypatch):
    calls = []

    def fetch(folder):
        calls.append(sorted(p.name for p in folder.iterdir()))
        (folder / "archive").write_bytes(b"x")
        return small_arrays()

    (cache / "svhn.part").mkdir(parents=True)
    (cache / "svhn.part" / "half").write_bytes(b"left by a killed process")
    replace_source(monkeypatch, "svhn", fetch=fetch)
    first, second = data.load("svhn"), data.load("svhn")
    assert calls == [[]]
    assert first.x.shape == (12, 3, 32, 32) and torch.equal(first.x, second.x)
    expected = small_arrays()["x_train"].transpose(0, 3, 1, 2)
    assert np.array_equal(data.load("svhn", "train").x.numpy(), expected)
    assert sorted(p.name for p in cache.iterdir()) == ["svhn.lock", "svhn.npz", "svhn.sha256"]


def test_eight_processes_fetch_once(cache, server):
    np.savez(server.folder / "small.npz", **small_arrays())
    # One process imports torch and then splits into eight, which all ask at the same moment.
    done = run_python(
        "import multiprocessing, time, urllib.request, io, numpy as np\n"
        "from deepclust_nb import data\n"
        "def fetch(folder):\n"
        f"    content = urllib.request.urlopen('{server.url}small.npz').read()\n"
        "    time.sleep(0.5)\n"
        "    return dict(np.load(io.BytesIO(content)))\n"
        "data.SOURCES['svhn'] = data.SOURCES['svhn']._replace(fetch=fetch)\n"
        "context = multiprocessing.get_context('fork')\n"
        "barrier, sums = context.Barrier(8), context.Queue()\n"
        "def ask():\n"
        "    barrier.wait()\n"
        "    sums.put(int(data.load('svhn').x.sum(dtype=data.torch.int64)))\n"
        "processes = [context.Process(target=ask) for _ in range(8)]\n"
        "for p in processes: p.start()\n"
        "got = [sums.get(timeout=60) for _ in processes]\n"
        "for p in processes: p.join()\n"
        "print(*got)\n",
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 0, done.stderr
    arrays = small_arrays()
    total = int(arrays["x_train"].sum(dtype=np.int64) + arrays["x_test"].sum(dtype=np.int64))
    assert done.stdout.split() == [str(total)] * 8
    assert server.gets == ["/small.npz"]


# Official sources, served from this machine in their own formats


def md5(content):
    return hashlib.md5(content).hexdigest()


def idx(array):
    header = (0x0800 + array.ndim).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return gzip.compress(header + array.astype(np.uint8).tobytes())


def tar(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def serve_mnist(server, monkeypatch, x, y):
    """Four IDX files; x and y are dicts by part; returns what to expect of x."""
    resources = []
    for part, prefix in (("train", "train"), ("test", "t10k")):
        for kind, array in (("images-idx3", x[part][:, 0]), ("labels-idx1", y[part])):
            content = idx(array)
            (server.folder / f"{prefix}-{kind}-ubyte.gz").write_bytes(content)
            resources.append((f"{prefix}-{kind}-ubyte.gz", md5(content)))
    mnist = data.import_torchvision().datasets.FashionMNIST
    monkeypatch.setattr(mnist, "mirrors", [server.url])
    monkeypatch.setattr(mnist, "resources", resources)


def serve_usps(server, monkeypatch, x, y):
    splits = {}
    for part in ("train", "test"):
        rows = x[part].reshape(len(y[part]), -1) / 255 * 2 - 1 + 1e-3
        lines = [
            f"{label + 1} " + " ".join(f"{i + 1}:{v:.6f}" for i, v in enumerate(row))
            for row, label in zip(rows, y[part], strict=True)
        ]
        content = bz2.compress("\n".join(lines).encode())
        (server.folder / f"usps.{part}.bz2").write_bytes(content)
        splits[part] = [f"{server.url}usps.{part}.bz2", f"usps.{part}.bz2", md5(content)]
    monkeypatch.setattr(data.import_torchvision().datasets.USPS, "split_list", splits)


def serve_svhn(server, monkeypatch, x, y):
    splits = {}
    for part in ("train", "test"):
        buffer = io.BytesIO()
        tens = np.where(y[part] == 0, 10, y[part])  # SVHN writes the digit 0 as 10
        scipy.io.savemat(buffer, {"X": x[part].transpose(2, 3, 1, 0), "y": tens[:, None]})
        (server.folder / f"{part}.mat").write_bytes(buffer.getvalue())
        splits[part] = [f"{server.url}{part}.mat", f"{part}.mat", md5(buffer.getvalue())]
    monkeypatch.setattr(data.import_torchvision().datasets.SVHN, "split_list", splits)


def serve_archive(server, monkeypatch, class_name, files, folder):
    content = tar({f"{folder}/{name}": part for name, part in files.items()})
    (server.folder / "archive.tar.gz").write_bytes(content)
    dataset_class = getattr(data.import_torchvision().datasets, class_name)
    monkeypatch.setattr(dataset_class, "url", f"{server.url}archive.tar.gz")
    monkeypatch.setattr(dataset_class, "tgz_md5", md5(content))
    for key in ("train_list", "test_list"):
        names = [name for name, _ in getattr(dataset_class, key) if name in files]
        monkeypatch.setattr(dataset_class, key, [[name, md5(files[name])] for name in names])
    if "meta" in vars(dataset_class):
        meta = dataset_class.meta
        monkeypatch.setattr(dataset_class, "meta", meta | {"md5": md5(files[meta["filename"]])})


def serve_cifar10(server, monkeypatch, x, y):
    files = {"batches.meta": pickle.dumps({"label_names": list("abc")})}
    for part, name in (("train", "data_batch_1"), ("test", "test_batch")):
        entry = {"data": x[part].reshape(len(x[part]), -1), "labels": y[part].tolist()}
        files[name] = pickle.dumps(entry)
    serve_archive(server, monkeypatch, "CIFAR10", files, "cifar-10-batches-py")


def serve_cifar100(server, monkeypatch, x, y):
    files = {"meta": pickle.dumps({"fine_label_names": list("abc")})}
    for part in ("train", "test"):
        fine = [99 - int(label) for label in y[part]]
        entry = {
            "data": x[part].reshape(len(x[part]), -1),
            "fine_labels": fine,
            "coarse_labels": y[part].tolist(),
        }
        files[part] = pickle.dumps(entry)
    serve_archive(server, monkeypatch, "CIFAR100", files, "cifar-100-python")


def serve_stl10(server, monkeypatch, x, y):
    files = {}
    for part in ("train", "test"):
        files[f"{part}_X.bin"] = x[part].transpose(0, 1, 3, 2).tobytes()  # each channel column by column
        files[f"{part}_y.bin"] = (y[part] + 1).astype(np.uint8).tobytes()
    serve_archive(server, monkeypatch, "STL10", files, "stl10_binary")


def serve_har(server, monkeypatch, x, y):
    inner, outer = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        for part in ("train", "test"):
            rows = "\n".join("  " + " ".join(f"{v: .7e}" for v in row) for row in x[part])
            archive.writestr(f"UCI HAR Dataset/{part}/X_{part}.txt", rows)
            archive.writestr(
                f"UCI HAR Dataset/{part}/y_{part}.txt", "\n".join(str(label + 1) for label in y[part])
            )
    with zipfile.ZipFile(outer, "w") as archive:
        archive.writestr("UCI HAR Dataset.zip", inner.getvalue())
    (server.folder / "har.zip").write_bytes(outer.getvalue())
    monkeypatch.setattr(data, "HAR_URL", f"{server.url}har.zip")
    monkeypatch.setitem(data.SHA256, "har.zip", hashlib.sha256(outer.getvalue()).hexdigest())


OFFICIAL = {
    "fashion": (serve_mnist, (1, 28, 28)),
    "usps": (serve_usps, (1, 16, 16)),
    "svhn": (serve_svhn, (3, 32, 32)),
    "cifar10": (serve_cifar10, (3, 32, 32)),
    "cifar100_20": (serve_cifar100, (3, 32, 32)),
    "stl10": (serve_stl10, (3, 96, 96)),
    "har": (serve_har, (561,)),
}


def official(name, server, monkeypatch):
    serve, shape = OFFICIAL[name]
    random = np.random.default_rng(1)
    if name == "har":
        x = {p: random.uniform(-1, 1, (n, *shape)).astype(np.float32) for p, n in (("train", 7), ("test", 5))}
    else:
        x = {p: random.integers(0, 256, (n, *shape), dtype=np.uint8) for p, n in (("train", 7), ("test", 5))}
    y = {p: random.integers(0, 3, len(x[p])) for p in x}
    serve(server, monkeypatch, x, y)
    return x, y


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_sources_arrive_as_published(name, cache, server, monkeypatch):
    x, y = official(name, server, monkeypatch)
    data.load(name)
    asked = len(server.gets)
    for split in ("train", "test"):
        got = data.load(name, split)
        assert got.x.shape == x[split].shape and got.x.dtype == (
            torch.float32 if name == "har" else torch.uint8
        )
        assert np.allclose(got.x, x[split], atol=1e-6)
        assert got.y.tolist() == y[split].tolist()
    assert data.load(name).y.tolist() == [*y["train"], *y["test"]]
    assert len(server.gets) == asked > 0
    assert sorted(p.name for p in cache.iterdir()) == [f"{name}.{end}" for end in ("lock", "npz", "sha256")]


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_damaged_archive_is_not_taken(name, cache, server, monkeypatch):
    official(name, server, monkeypatch)
    for file in server.folder.iterdir():
        if file.suffix == ".zip":
            file.write_bytes(
                b"0" + file.read_bytes()
            )  # still a readable archive: the checksum alone can tell
        else:
            flip(file)
    with pytest.raises(FileNotFoundError, match=f"{name} is not at hand and could not be fetched"):
        data.load(name)
    assert not (cache / f"{name}.npz").exists()


def test_reuters_rcv1_keeps_single_root_documents_and_common_terms(cache, monkeypatch):
    random = np.random.default_rng(2)
    names = np.array(["C1", "CCAT", "ECAT", "E2", "GCAT", "MCAT"])
    target = (random.random((60, 6)) < 0.35).astype(np.uint8)
    weights = scipy.sparse.random(60, 40, 0.3, format="csr", random_state=3)
    corpus = types.SimpleNamespace(data=weights, target=scipy.sparse.csr_matrix(target), target_names=names)
    asked = []

    def fetch_rcv1(**how):
        asked.append(how["subset"])
        return corpus

    monkeypatch.setattr("sklearn.datasets.fetch_rcv1", fetch_rcv1)
    fetch = functools.partial(data._fetch_reuters_rcv1, n_documents=12, n_terms=5)
    replace_source(monkeypatch, "reuters_rcv1", fetch=fetch)
    x, y, *_ = data.load("reuters_rcv1")
    roots = target[:, [1, 4, 5, 2]]  # CCAT, GCAT, MCAT, ECAT
    rows = [i for i in range(60) if roots[i].sum() == 1]
    assert asked == ["test"] and len(rows) > 12
    dense = weights.toarray()
    counts = (dense[rows] > 0).sum(axis=0)
    terms = sorted(sorted(range(40), key=lambda j: (-counts[j], j))[:5])
    expected = dense[np.ix_(rows[:12], terms)]
    norms = np.linalg.norm(expected, axis=1, keepdims=True)
    expected = np.divide(expected, norms, out=np.zeros_like(expected), where=norms > 0) * np.sqrt(5)
    assert np.allclose(x, expected, atol=1e-6)
    assert y.tolist() == [int(roots[i].argmax()) for i in rows[:12]]


# Stored text and JPEG files, small ones in their format


def store(folder, name, monkeypatch, arrays):
    path = folder / data.SOURCES[name].stored
    np.savez(path, **arrays)
    monkeypatch.setitem(data.SHA256, path.name, hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setenv("DEEPCLUST_DATA", str(folder))


@pytest.fixture
def text(tmp_path, cache, monkeypatch):
    """Word counts as reuters_r8 stores them, 9 and 5 documents of 12 terms, the third without a word."""
    counts = np.random.default_rng(4).poisson(0.7, (14, 12)).astype(np.uint8)
    counts[2] = 0
    counts[9:, 1] = 0  # a term of training documents alone: a split on its own would weigh it otherwise
    y = np.arange(14, dtype=np.uint8) % 3
    arrays = {"x_train": counts[:9], "y_train": y[:9], "x_test": counts[9:], "y_test": y[9:]}
    store(tmp_path, "reuters_r8", monkeypatch, arrays)
    return counts.astype(int).tolist(), y


def tf_idf(counts):
    """Log counts times smoothed inverse document frequency, rows scaled to length sqrt(d): plain loops."""
    n, d = len(counts), len(counts[0])
    frequency = [sum(row[j] > 0 for row in counts) for j in range(d)]
    idf = [1 + np.log((1 + n) / (1 + f)) for f in frequency]
    rows = [[(1 + np.log(row[j])) * idf[j] if row[j] else 0.0 for j in range(d)] for row in counts]
    lengths = [sum(value**2 for value in row) ** 0.5 for row in rows]
    return np.array(
        [[v * d**0.5 / (norm or 1) for v in row] for row, norm in zip(rows, lengths, strict=True)]
    )


def test_words_are_weighed_over_the_whole_collection_whatever_the_split(text):
    counts, y = text
    expected = tf_idf(counts)
    for split, rows in (("all", slice(0, 14)), ("train", slice(0, 9)), ("test", slice(9, 14))):
        got = data.load("reuters_r8", split)
        np.testing.assert_allclose(got.x, expected[rows], rtol=1e-5, atol=1e-6)
        assert got.x.dtype == torch.float32 and got.y.tolist() == y[rows].tolist()
        assert got.x.is_contiguous() and got.y.dtype == torch.int64 and got.split == split
    assert not data.load("reuters_r8").x[2].any()
    assert np.abs(tf_idf(counts[9:]) - expected[9:]).max() > 0.05


@pytest.fixture
def jpeg(tmp_path, cache, monkeypatch):
    """Seven plain pictures, each of a colour of its own, as JPEG files in a row; the first is grey."""
    image = importlib.import_module("PIL.Image")
    colours = np.random.default_rng(5).integers(0, 256, (7, 3), dtype=np.uint8)
    colours[0] = colours[0, 0]
    files = []
    for number, colour in enumerate(colours):
        picture = np.broadcast_to(colour, (32, 32, 3)).copy()
        picture[:8] = 255 - colour  # the upper rows, so that a turned picture shows
        buffer = io.BytesIO()
        stored = image.fromarray(picture[:, :, 0] if number == 0 else picture)
        stored.save(buffer, "JPEG", quality=95, subsampling=0)
        files.append(buffer.getvalue())
    arrays = {
        "jpeg": np.frombuffer(b"".join(files), dtype=np.uint8),
        "y_train": np.arange(4),
        "y_test": np.arange(3)[::-1],
    }
    arrays["offsets"] = np.cumsum([0, *map(len, files)])
    store(tmp_path, "cifar10_jpeg", monkeypatch, arrays)
    return colours.astype(int)


def test_jpeg_files_are_opened_in_their_order_and_colours(jpeg):
    for split, rows, y in (
        ("all", range(7), [0, 1, 2, 3, 2, 1, 0]),
        ("train", range(4), [0, 1, 2, 3]),
        ("test", range(4, 7), [2, 1, 0]),
    ):
        got = data.load("cifar10_jpeg", split)
        assert got.x.shape == (len(rows), 3, 32, 32) and got.x.dtype == torch.uint8 and got.x.is_contiguous()
        assert got.y.tolist() == y
        lower, upper = got.x[:, :, 16:, :].float(), got.x[:, :, :8, :].float()
        for i, row in enumerate(rows):
            assert (lower[i].mean(dim=(1, 2)) - torch.tensor(jpeg[row])).abs().max() < 6
            assert (upper[i].mean(dim=(1, 2)) - (255 - torch.tensor(jpeg[row]))).abs().max() < 6


@pytest.mark.parametrize(
    ("name", "shape"), [("har_standin", (11,)), ("cifar10_subset", (8, 8, 3)), ("usps", (6, 5))]
)
def test_other_stored_arrays_come_as_they_are(name, shape, tmp_path, cache, monkeypatch):
    random = np.random.default_rng(6)
    vectors = len(shape) == 1
    x = random.normal(size=(9, *shape)) if vectors else random.integers(0, 256, (9, *shape), dtype=np.uint8)
    y = random.integers(0, 4, 9).astype(np.uint8)
    arrays = {"x_train": x[:6], "y_train": y[:6], "x_test": x[6:], "y_test": y[6:]}
    store(tmp_path, name, monkeypatch, arrays)
    expected = {1: x, 2: x[:, None], 3: x.transpose(0, 3, 1, 2) if len(shape) == 3 else x}[len(shape)]
    for split, rows in (("all", slice(0, 9)), ("train", slice(0, 6)), ("test", slice(6, 9))):
        got = data.load(name, split)
        np.testing.assert_array_equal(got.x, expected[rows].astype(np.float32 if vectors else np.uint8))
        assert got.y.tolist() == y[rows].tolist() and got.y.dtype == torch.int64
        assert got.x.dtype == (torch.float32 if vectors else torch.uint8) and got.name == name


def test_a_fetch_that_is_cut_off_leaves_nothing_that_needs_a_hand(cache, monkeypatch):
    """Whatever the moment at which the process dies, the next load works."""
    replace_source(monkeypatch, "svhn", fetch=lambda folder: small_arrays())
    replace, moved = os.replace, []
    for dies_after in (0, 1):

        def dying(source, target, dies_after=dies_after):
            if len(moved) == dies_after:
                raise KeyboardInterrupt
            moved.append(Path(target).name)
            replace(source, target)

        moved.clear()
        with monkeypatch.context() as patch:
            patch.setattr(data.os, "replace", dying)
            with pytest.raises(KeyboardInterrupt):
                data.load("svhn")
        assert not (cache / "svhn.npz").exists() and not (cache / "svhn.part").exists()
        assert len(data.load("svhn").y) == 12
        (cache / "svhn.npz").unlink()
    assert moved == ["svhn.sha256"]


def test_the_networks_patience_is_put_back_after_a_fetch(cache, monkeypatch):
    seen = []

    def fetch(folder):
        seen.append(socket.getdefaulttimeout())
        if len(seen) == 1:
            raise OSError("no route")
        return small_arrays()

    replace_source(monkeypatch, "svhn", fetch=fetch)
    socket.setdefaulttimeout(7)
    try:
        with pytest.raises(FileNotFoundError, match="no route"):
            data.load("svhn")
        assert socket.getdefaulttimeout() == 7
        data.load("svhn")
        assert socket.getdefaulttimeout() == 7 and seen == [60, 60]
    finally:
        socket.setdefaulttimeout(None)


def test_a_labelled_subset_is_drawn_class_by_class_from_a_frozen_stream():
    """The rule in plain steps: who gets one more, then each class's own draw, in the order of the classes."""
    y = np.array([7, 3, 3, 7, 5, 5, 3, 5, 7, 7, 3, 5, 5])
    random = np.random.RandomState(11)
    extra, expected = random.permutation(3)[:2], []
    for number, c in enumerate((3, 5, 7)):
        rows = [i for i, label in enumerate(y) if label == c]
        expected += random.permutation(rows)[: 2 + (number in extra)].tolist()
    assert data.labelled_subset(y, 8, 11).tolist() == sorted(expected)
    np.random.seed(0)
    before = np.random.get_state()[1].tolist()
    data.labelled_subset(y, 8, 11)
    assert np.random.get_state()[1].tolist() == before


# Full data sets, where they are at hand

FULL = {  # shape of one item; train and test sizes; number of classes; the largest class
    "mnist": ((1, 28, 28), 60000, 10000, 10, 7877),
    "usps": ((1, 16, 16), 7291, 2007, 10, 1553),
    "fashion": ((1, 28, 28), 60000, 10000, 10, 7000),
    "har_standin": ((561,), 7415, 2996, 6, 1979),
    "reuters_r8": ((2000,), 5485, 2189, 8, 3923),
    "cifar10_subset": ((3, 32, 32), 7728, 846, 10, 898),
    "cifar10_jpeg": ((3, 32, 32), 50000, 10000, 10, 6000),  # decoding 60,000 files takes a while
}


@needs_full_sets
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.long) if n == "cifar10_jpeg" else n for n in FULL]
)
def test_full_sets(name):
    shape, n_train, n_test, n_classes, largest = FULL[name]
    x, y, *_ = data.load(name)
    assert x.shape == (n_train + n_test, *shape)
    assert x.dtype == (torch.uint8 if len(shape) == 3 else torch.float32) and x.is_contiguous()
    assert len(torch.bincount(y)) == n_classes and torch.bincount(y).max() == largest
    test = data.load(name, "test")
    assert len(test.y) == n_test
    assert torch.equal(test.y, y[n_train:]) and torch.equal(test.x, x[n_train:])


@needs_full_sets
def test_bundled_images_are_the_documented_ones():
    for small, full, test_part, first in (
        ("mnist_5k", "mnist", "train", 400),
        ("fashion_5k", "fashion", "test", 0),
    ):
        for split, part, start, count in (("train", "train", 0, 400), ("test", test_part, first, 100)):
            got, source = data.load(small, split), data.load(full, part)
            for c in range(10):
                rows = torch.nonzero(source.y == c).flatten()[start : start + count]
                assert torch.equal(got.x[got.y == c], source.x[rows])


@needs_full_sets
def test_text_vectors_have_the_papers_scale():
    x = data.load("reuters_r8").x
    norms = x.norm(dim=1)
    assert torch.allclose(norms[norms > 0], torch.tensor(2000.0).sqrt(), atol=1e-3)
    assert (norms == 0).float().mean() < 0.01


@needs_full_sets
def test_jpeg_images_show_what_the_exact_ones_show():
    exact = data.load("cifar10_subset", "test")
    lossy = data.load("cifar10_jpeg", "test")
    assert torch.equal(exact.y, lossy.y[: len(exact.y)])
    error = (data.to_float(exact.x) - data.to_float(lossy.x[: len(exact.x)])).square().mean((1, 2, 3))
    assert -10 * torch.log10(error).median() > 29  # decibel


# Cut, resized, turned, shifted


@pytest.mark.parametrize(("margin", "side", "shape"), [(2, 16, 16), (0, 20, 20), (3, 0, 22), (1, 40, 40)])
def test_images_are_cut_then_resized_as_pillow_would_and_as_dynae_does(margin, side, shape):
    from PIL import Image

    x = torch.cat([data.load("mnist_5k").x[:6], data.load("fashion_5k").x[:6]])
    found, kept = data.cropped(x, margin, side), x.clone()
    assert found.shape == (12, 1, shape, shape) and found.dtype == torch.uint8 and torch.equal(x, kept)
    assert torch.equal(found, definitions("dynae").prepared(x, margin, side))
    for image, own in zip(x[:, 0], found[:, 0], strict=True):
        inside = image[margin : 28 - margin, margin : 28 - margin].numpy()
        theirs = Image.fromarray(inside).resize((shape, shape), Image.BILINEAR)
        assert np.abs(np.asarray(theirs).astype(int) - own.numpy()).max() <= 1


def test_images_that_are_neither_cut_nor_resized_stay_as_they_are():
    x = torch.randint(0, 256, (3, 3, 9, 11), dtype=torch.uint8)
    assert data.cropped(x, 0, 0) is x
    assert torch.equal(data.cropped(x, 2, 0), x[:, :, 2:7, 2:9])
    assert data.cropped(x, 0, 8).shape == (3, 3, 8, 8)  # channels stay, sides become equal
    light = torch.full((2, 1, 9, 9), 200, dtype=torch.uint8)
    assert (data.cropped(light, 1, 5) == 200).all()
    between = torch.tensor([[[[0, 3], [0, 3]]]], dtype=torch.uint8)  # 0, 0.75, 2.25 and 3 in between
    assert data.cropped(between, 0, 4)[0, 0, 0].tolist() == [0, 1, 2, 3]  # rounded, not cut off


def test_no_moves_change_nothing_and_moves_are_dynaes():
    images = data.to_float(data.load("mnist_5k").x[:40])
    kept = images.clone()
    still = data.turned_and_shifted(images, degrees=0.0, shift=0.0)
    torch.testing.assert_close(still, images, rtol=0, atol=1e-5)
    assert still is not images and torch.equal(images, kept)
    for degrees, shift in ((10.0, 0.1), (180.0, 0.0), (0.0, 0.4)):
        torch.manual_seed(1)
        theirs = definitions("dynae").slightly_moved(images, degrees, shift)
        torch.manual_seed(1)
        ours = data.turned_and_shifted(images, degrees, shift)
        assert torch.equal(ours, theirs) and not torch.allclose(ours, images, atol=0.1)
        assert ours.shape == images.shape and ours.dtype == torch.float32
        assert not torch.equal(data.turned_and_shifted(images, degrees, shift), ours)  # anew each time


def centre_of_light(images):
    """Rows and columns from the middle to the centre of the light in each image, (n, 2), pixels."""
    places = torch.stack(torch.meshgrid(*(torch.arange(n) for n in images.shape[-2:]), indexing="ij"))
    middle = torch.tensor(images.shape[-2:])[:, None, None] / 2 - 0.5
    light = images.sum(dim=1)[:, None]
    return ((places - middle) * light).sum(dim=(2, 3)) / light.sum(dim=(2, 3))


def test_shifts_fill_their_range_both_ways_in_both_directions():
    torch.manual_seed(0)
    images = torch.zeros(2000, 1, 20, 40)  # a share of the side: twice as many pixels across as down
    images[:, :, 9:11, 19:21] = 1
    away = centre_of_light(data.turned_and_shifted(images, degrees=0.0, shift=0.2)) / torch.tensor([20, 40])
    assert (away.amax(dim=0) - 0.2).abs().max() < 0.003 and (away.amin(dim=0) + 0.2).abs().max() < 0.003
    assert away.mean(dim=0).abs().max() < 0.01 and (away.std(dim=0) - 0.4 / 12**0.5).abs().max() < 0.005
    assert torch.corrcoef(away.T)[0, 1].abs() < 0.08  # one has nothing to do with the other


def test_angles_fill_their_range_both_ways():
    torch.manual_seed(0)
    images = torch.zeros(2000, 1, 41, 41)
    images[:, :, 20, 32:34] = 1  # to the right of the middle by 12.5
    turned = data.turned_and_shifted(images, degrees=30.0, shift=0.0)
    down, right = centre_of_light(turned).T
    angle = torch.atan2(down, right).rad2deg()
    assert abs(angle.max() - 30) < 0.5 and abs(angle.min() + 30) < 0.5
    assert angle.mean().abs() < 1.5 and abs(angle.std() - 60 / 12**0.5) < 0.6
    assert (torch.hypot(down, right) - 12.5).abs().max() < 0.2  # about the middle, and no larger or smaller


def test_the_edge_is_repeated_outwards():
    torch.manual_seed(0)
    flat = torch.full((50, 2, 8, 8), 0.7)
    torch.testing.assert_close(data.turned_and_shifted(flat, degrees=180.0, shift=0.5), flat)
    rows = torch.arange(8.0).expand(1, 1, 8, 8).repeat(50, 1, 1, 1)  # columns 0 to 7
    moved = data.turned_and_shifted(rows, degrees=0.0, shift=0.3)
    for image in moved[:, 0]:
        assert image.min() >= 0 and image.max() <= 7
        step = (image[0, 4] - 4).item()  # what stands in the middle came from so far to the right
        expected = (torch.arange(8.0) + step).clamp(0, 7)
        torch.testing.assert_close(image, expected.expand(8, 8), rtol=0, atol=1e-4)


def test_each_image_is_moved_on_its_own_with_all_its_channels():
    torch.manual_seed(0)
    images = data.to_float(data.load("mnist_5k").x[:1]).expand(6, 3, -1, -1)
    moved = data.turned_and_shifted(images, degrees=10.0, shift=0.1)
    assert torch.equal(moved[:, 0], moved[:, 1]) and torch.equal(moved[:, 0], moved[:, 2])
    assert len(torch.unique(moved[:, 0].flatten(1), dim=0)) == 6
    assert data.turned_and_shifted(images.double(), 10.0, 0.1).dtype == torch.float64


# trained starts


def score_of_start(dataset, n_init):
    """ACC of k-means on the code that mnist_16 gives to a data set."""
    state = data.trained_start("mnist_16")
    assert {value.dtype for value in state.values()} == {torch.float32}
    model = networks.Autoencoder(256, widths=(300, 300, 300))
    model.load_state_dict(state)
    digits = data.load(dataset)
    z = baselines.encode(model, definitions("dynae").prepared(digits.x, 2, 16))
    return metrics.accuracy(digits.y, baselines.kmeans(z, 10, 0, n_init=n_init)[0])


def test_a_trained_start_fits_its_network_and_gives_its_recorded_score():
    recorded = records.load("dynae", "mnist_5k", "quick", "AE+k-means (augmented)")
    assert score_of_start("mnist_5k", 20) == pytest.approx(records.mean(recorded, "acc"), abs=0.005)


def test_a_trained_start_lies_beside_the_record_that_made_it():
    weights = data.data_root() / "weights"
    for name, expected in data.STARTS.items():
        record = json.loads((weights / f"{name}.json").read_text(encoding="utf-8"))
        assert record["sha256"] == expected and (weights / f"{name}.npz").stat().st_size < 1_000_000
        assert {"settings", "acc", "nmi", "seconds", "precision", "threads", "torch", "commit"} <= set(record)


def test_an_unknown_or_damaged_start_is_refused(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="no trained start 'mnist'. Known are mnist_16"):
        data.trained_start("mnist")
    content = bytearray((data.data_root() / "weights" / "mnist_16.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "mnist_16.npz").write_bytes(content)
    monkeypatch.setattr(data, "data_root", lambda: tmp_path)
    with pytest.raises(OSError, match="damaged"):
        data.trained_start("mnist_16")


@needs_full_sets
def test_a_trained_start_scores_on_all_of_mnist_what_its_record_says():
    record = json.loads((data.data_root() / "weights" / "mnist_16.json").read_text(encoding="utf-8"))
    assert record["settings"]["widths"] == [300, 300, 300]
    assert score_of_start("mnist", 2) == pytest.approx(record["acc"], abs=0.01)
