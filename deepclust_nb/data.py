"""Data sets by name: where they are looked for, how they are checked, what shape they come in.

`load(name)` looks in four places, in this order: the files that come with the package, the folder named by
the environment variable DEEPCLUST_DATA (stored full sets), the user's cache (DEEPCLUST_CACHE, or the
platform's cache folder), and the official source on the network. Whatever is read has its sha256 checked
first. The cache holds plain .npz files: only official archives that passed their checksum are unpickled.

Images are kept as uint8 and turned into float32 a batch at a time by `to_float`. Nothing is augmented or
shuffled here. Below, in this order: what chapters use; finding and checking a file; from stored arrays to
x and y; fetching from official sources (an empty folder in, the arrays to store out); the table of them all.
"""

import difflib
import functools
import hashlib
import importlib
import io
import os
import pickle
import shutil
import socket
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .places import CACHE, DATA, data_root


class Dataset(NamedTuple):
    """One data set, or one split of it, whole in memory.

    x: uint8 images (n, channels, height, width), 0 to 255, or float32 vectors (n, d).
    y: int64 labels (n,), from 0. name: what `load` was asked for. split: "all", "train" or "test".
    """

    x: torch.Tensor
    y: torch.Tensor
    name: str
    split: str


def load(name, split="all"):
    """Load a data set by name.

    name: one of `NAMES`. split: "train", "test", or "all" (train followed by test, as clustering papers do).
    Returns a `Dataset`: uint8 images (n, channels, height, width) or float32 vectors (n, d); int64 labels.

    mnist_5k and fashion_5k come with the package: 400 train and 100 test images a class, row 10 i + c of a
    split being the i-th image of class c. stl10 is the 13,000 labelled images; cifar100_20 has CIFAR-100's 20
    coarse labels; reuters_rcv1 has no split. har_standin, reuters_r8, cifar10_subset and cifar10_jpeg are
    other data than the sets whose names they resemble: their numbers compare with no published ones.

    Raises ValueError for an unknown name or split, OSError for a damaged file, FileNotFoundError (an OSError)
    for a data set that is not at hand and cannot be fetched, ImportError where that needs a missing package.
    """
    if name not in SOURCES:
        close = difflib.get_close_matches(str(name), NAMES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"There is no data set {name!r}{hint} Known are {', '.join(NAMES)}.")
    source = SOURCES[name]
    allowed = ("all", "train", "test") if source.has_split else ("all",)
    if split not in allowed:
        raise ValueError(f"{name} has no split {split!r}; allowed: {', '.join(allowed)}.")
    parts = ("train", "test") if split == "all" and source.has_split else (split,)
    with np.load(_find(name, source), allow_pickle=False) as stored:
        x, y = source.prepare(stored, parts)
    x, y = torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(y.astype(np.int64))
    return Dataset(x, y, name, split)


def size(name, split="all"):
    """How many items a split of a data set in `SIZES` has, without loading it; KeyError for another name."""
    train, test = SIZES[name]
    return {"train": train, "test": test, "all": train + test}[split]


def to_float(x):
    """uint8 images as float32 in [0, 1]; float32 vectors unchanged. Any shape, any device; meant for a batch.

    x: a tensor, or a NumPy array. Returns a tensor. Raises TypeError for any other type, which has no agreed
    range.
    """
    x = torch.as_tensor(x)
    if x.dtype == torch.uint8:
        return x.to(torch.float32) / 255
    if x.dtype == torch.float32:
        return x
    raise TypeError(f"to_float takes uint8 images or float32 vectors, not {x.dtype}.")


def cropped(x, margin, side):
    """Images (n, c, h, w) uint8 without `margin` pixels at each edge, then resized to side x side, smoothed;
    0 leaves them as they are. Returns uint8.
    """
    if margin:
        x = x[..., margin:-margin, margin:-margin]
    if side:
        x = torch.nn.functional.interpolate(x.float(), (side, side), mode="bilinear", antialias=True)
        x = x.round().byte()
    return x


def turned_and_shifted(images, degrees, shift):
    """Float images (n, c, h, w), each turned by up to `degrees` and shifted by up to `shift` of its side, at
    random, on their device; the edge pixels are repeated outwards. Built in the chapter `dynae`.
    """
    angle = torch.empty(len(images)).uniform_(-1, 1) * (torch.pi / 180 * degrees)
    away = torch.empty(len(images), 2).uniform_(-2 * shift, 2 * shift)  # coordinates run from -1 to 1
    rows = [torch.stack([angle.cos(), -angle.sin(), away[:, 0]], dim=1)]
    rows += [torch.stack([angle.sin(), angle.cos(), away[:, 1]], dim=1)]
    maps = torch.stack(rows, dim=1).to(images)
    grid = torch.nn.functional.affine_grid(maps, list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def labelled_subset(y, n_labels, seed):
    """Choose which labels a semi-supervised method is given: the same number from each class.

    y: (n,) integer labels. n_labels: from the number of classes to n; where it does not divide, classes drawn
    at random give one more. seed: integer from 0 to 2**32 - 1. Returns int64 indices (n_labels,), ascending.
    Raises ValueError for labels that are not such a vector, for n_labels or a seed outside these ranges, and
    where a class has too few items.
    """
    labels = np.asarray(y.cpu() if isinstance(y, torch.Tensor) else y)
    if labels.ndim != 1 or labels.size == 0 or labels.dtype.kind not in "iu":
        raise ValueError(f"y must be a non-empty vector of integers, not {labels.dtype} {labels.shape}.")
    classes, sizes = np.unique(labels, return_counts=True)
    for key, value, low, high in (("n_labels", n_labels, len(sizes), len(y)), ("seed", seed, 0, 2**32 - 1)):
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"{key} is {value!r}, but must be a whole number from {low} to {high}.")
    # RandomState's stream is frozen for good, so a seed names the same labels under every NumPy version.
    random = np.random.RandomState(seed)
    wanted = np.full(len(classes), n_labels // len(classes))
    wanted[random.permutation(len(classes))[: n_labels % len(classes)]] += 1
    chosen = []
    for c, size, k in zip(classes, sizes, wanted, strict=True):
        if size < k:
            raise ValueError(f"n_labels is {n_labels}, which takes {k} of class {c}, but it has only {size}.")
        chosen.append(random.permutation(np.flatnonzero(labels == c))[:k])
    return torch.from_numpy(np.sort(np.concatenate(chosen)).astype(np.int64))


def trained_start(name):
    """A trained start that comes with the package, as a state dict of float32 tensors (stored as float16).

    mnist_16: `Autoencoder(256, widths=(300, 300, 300))`, pretrained by the chapter `dynae` on moved copies of
    all 70,000 MNIST images, cut by 2 pixels and resized to 16 x 16; its record lies beside it.

    Raises ValueError for an unknown name, OSError for a missing or damaged file.
    """
    if name not in STARTS:
        raise ValueError(f"There is no trained start {name!r}. Known are {', '.join(STARTS)}.")
    path = _checked(data_root() / "weights" / f"{name}.npz", STARTS[name], "install the package again")
    with np.load(path, allow_pickle=False) as stored:
        return {key: torch.from_numpy(stored[key].astype(np.float32)) for key in stored.files}


def import_torchvision():
    """The torchvision module, also where torch has no CUDA but the installed torchvision was built for it.

    That pair fails to import because the CUDA build's own operators cannot be loaded. Declaring the two that
    torchvision names at import is enough for data sets, transforms, models and make_grid; ops.nms and
    io.read_image stay unusable. Raises ImportError where torchvision is not installed.
    """
    try:
        return _need("torchvision", "This")
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
    for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
        del sys.modules[module]
    for operator in ("nms", "qnms"):
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        torch.library.define(f"torchvision::{operator}", schema)
    return importlib.import_module("torchvision")


def _find(name, source):
    """Path of the checked .npz file of a data set, fetched first if need be."""
    if source.bundled:
        path = data_root() / "bundled" / source.stored
        return _checked(path, SHA256[source.stored], "install the package again")
    folder = os.environ.get(DATA)
    if folder and not Path(folder).is_dir():
        raise FileNotFoundError(f"DEEPCLUST_DATA names the folder {folder!r}, which does not exist.")
    if folder and source.stored and (path := Path(folder, source.stored)).is_file():
        return _checked(path, SHA256[source.stored], "replace it, or take it away")
    if source.fetch is None:
        remedy = f"set DEEPCLUST_DATA to a folder that holds {source.stored}; it cannot be downloaded"
        raise FileNotFoundError(f"{name} is not at hand: {remedy}.")
    cache = os.environ.get(CACHE) or _need("pooch", f"Fetching {name}").os_cache("deepclust_nb")
    path = Path(cache, f"{name}.npz")
    if not path.is_file():
        _fetch_once(name, source, path)
    beside = path.with_suffix(".sha256")
    recorded = beside.read_text().strip() if beside.is_file() else "recorded beside it"
    return _checked(path, recorded, "delete it and load again")


def _checked(path, expected, remedy):
    if (found := _sha256(path, path.stat().st_mtime_ns)) != expected:
        what = f"{path} is damaged, or a file of another origin with the same name"
        raise OSError(f"{what} (its sha256 is {found}, but should be {expected}): {remedy}.")
    return path


@functools.cache  # a second load need not read the file again: its time of change tells an exchanged one
def _sha256(path, changed=None):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _need(package, purpose):
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{purpose} takes {package}, which is not installed: install it first.") from error


def _fetch_once(name, source, path):
    """Fetch a data set into the cache. Of many processes that ask at once, one fetches, the others wait."""
    filelock = _need("filelock", f"Fetching {name}")
    staging, timeout = path.with_suffix(".part"), socket.getdefaulttimeout()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_suffix(".lock")):
            if path.is_file():
                return
            shutil.rmtree(staging, ignore_errors=True)  # what a killed process left
            staging.mkdir()
            print(f"Fetching {name} from {source.origin} into {path.parent}", file=sys.stderr)
            try:
                socket.setdefaulttimeout(60)  # a network that swallows packets must not hang the chapter
                np.savez(staging / "arrays.npz", **source.fetch(staging))
                (staging / "sha256").write_text(_sha256.__wrapped__(staging / "arrays.npz") + "\n")
                # The checksum goes first: once the data are in place, nothing is missing.
                os.replace(staging / "sha256", path.with_suffix(".sha256"))
                os.replace(staging / "arrays.npz", path)
            finally:
                socket.setdefaulttimeout(timeout)
                shutil.rmtree(staging, ignore_errors=True)
    except ImportError:
        raise
    except Exception as error:  # each source fails in ways of its own: say how it begins, and chain the rest
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        stored = f"set DEEPCLUST_DATA to a folder that holds {source.stored}, " if source.stored else ""
        raise FileNotFoundError(
            f"{name} is not at hand and could not be fetched from {source.origin} ({reason}): load it once"
            f" with a network, {stored}or set DEEPCLUST_CACHE to a cache with {name}.npz and {name}.sha256."
        ) from error


def _joined(stored, key, parts):
    return np.concatenate([stored[f"{key}_{part}"] for part in parts])


def _channels_first(x):
    if x.ndim == 3:
        return x[:, None]
    return x.transpose(0, 3, 1, 2) if x.shape[-1] == 3 else x


def _arrays(stored, parts):
    x, y = _joined(stored, "x", parts), _joined(stored, "y", parts)
    return _channels_first(x) if x.dtype == np.uint8 else x.astype(np.float32), y


def _word_counts(stored, parts):
    """tf-idf over the whole collection, unit rows times sqrt(d): the scaling of DEC and VaDE for text."""
    from sklearn.feature_extraction.text import TfidfTransformer

    counts = _joined(stored, "x", ("train", "test")).astype(np.float64)
    x = TfidfTransformer(norm="l2", sublinear_tf=True).fit_transform(counts).toarray()
    x = (x * np.sqrt(x.shape[1])).astype(np.float32)
    x_train, x_test = np.split(x, [len(stored["y_train"])])
    return _joined({"x_train": x_train, "x_test": x_test}, "x", parts), _joined(stored, "y", parts)


def _jpeg_images(stored, parts):
    from PIL import Image

    content, at, cut = stored["jpeg"], stored["offsets"], len(stored["y_train"])
    rows = {"train": range(cut), "test": range(cut, len(at) - 1)}
    files = (io.BytesIO(content[at[i] : at[i + 1]].tobytes()) for part in parts for i in rows[part])
    x = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    return _channels_first(x), _joined(stored, "y", parts)


def _torchvision(class_name, by_split=False):
    """A fetcher that leaves download, checksum and parsing to torchvision's class of that name."""

    def fetch(folder):
        dataset_class, arrays = getattr(import_torchvision().datasets, class_name), {}
        for part in ("train", "test"):
            which = {"split": part} if by_split else {"train": part == "train"}
            dataset = dataset_class(folder, download=True, **which)
            arrays[f"x_{part}"] = _channels_first(np.asarray(dataset.data))
            arrays[f"y_{part}"] = np.asarray(dataset.labels if by_split else dataset.targets)
        return arrays

    return fetch


def _fetch_cifar100_20(folder):
    arrays = _torchvision("CIFAR100")(folder)
    for part in (
        "train",
        "test",
    ):  # torchvision has just verified these files, but keeps the fine labels alone
        with open(folder / "cifar-100-python" / part, "rb") as file:
            arrays[f"y_{part}"] = np.asarray(pickle.load(file, encoding="latin1")["coarse_labels"])
    return arrays


def _fetch_har(folder):
    """The 561 features of Anguita et al. (2013), official split; activity 1 to 6 becomes label 0 to 5."""
    retrieve = _need("pooch", "Fetching har").retrieve
    outer = retrieve(HAR_URL, f"sha256:{SHA256['har.zip']}", "har.zip", folder, progressbar=True)
    with zipfile.ZipFile(outer) as archive:
        inner, arrays = zipfile.ZipFile(io.BytesIO(archive.read("UCI HAR Dataset.zip"))), {}
    for part in ("train", "test"):
        base = f"UCI HAR Dataset/{part}"
        arrays[f"x_{part}"] = np.loadtxt(inner.open(f"{base}/X_{part}.txt"), dtype=np.float32)
        arrays[f"y_{part}"] = np.loadtxt(inner.open(f"{base}/y_{part}.txt"), dtype=np.int64) - 1
    return arrays


def _fetch_reuters_rcv1(folder, n_documents=10_000, n_terms=2_000):
    """Reuters-10K after DEC-keras: 10,000 documents of RCV1 with just one of four root topics, 2,000 terms.

    The documents are those of DEC-keras, in their order before its shuffle (the first of the test part). What
    differs: the terms are those in most documents of the test part, not those counted most in the collection,
    and their weights are the log tf-idf that RCV1-v2 publishes (Lewis et al. 2004), cut to these terms. Rows
    again have norm sqrt(n_terms). Needs about 3 GB of memory.
    """
    from sklearn.datasets import fetch_rcv1
    from sklearn.preprocessing import normalize

    corpus = fetch_rcv1(data_home=str(folder), subset="test")
    topics = list(corpus.target_names)
    member = corpus.target[:, [topics.index(t) for t in ("CCAT", "GCAT", "MCAT", "ECAT")]].toarray()
    single = np.flatnonzero(member.sum(axis=1) == 1)
    in_documents = np.bincount(corpus.data[single].indices, minlength=corpus.data.shape[1])
    terms = np.sort(np.argsort(-in_documents, kind="stable")[:n_terms])
    chosen = single[:n_documents]
    x = normalize(corpus.data[chosen][:, terms]).toarray() * np.sqrt(n_terms)
    return {"x_all": x.astype(np.float32), "y_all": member[chosen].argmax(axis=1)}


HAR_URL = "https://archive.ics.uci.edu/static/public/240/human+activity+recognition+using+smartphones.zip"

# Of bundled, stored and fetched files: neither a damaged nor an exchanged one is taken for the real one.
SHA256 = {
    "mnist_5k.npz": "770f8ad360e8717bc3701ba3da9b4faa43757e012876f2201fe916e333f298d9",
    "fashion_5k.npz": "3651b9d3a9fa6b4ad90b35dec054179d090890b526cd7af80c01e8f8df1bb88e",
    "mnist.npz": "06af5dfe73b70e3bc1c36439982b18a8d76803db9b544f6fdf838a37fbb01b64",
    "usps.npz": "8c3a3b9c105409a4fcf3131f453beea7addf9354eac2c665c8cda272a52775c7",
    "fashion_mnist.npz": "5b6d2c4c694a91887af8ab7d039c04f80af3c29378d731c93a538d2e831aa469",
    "har_smartphone.npz": "949b3ac52f47ac7eae0f46be1f7953e35e2623fa42414862088b2876b0069e20",
    "reuters_r8.npz": "33f60903fe0638c4a1d1726d722882dabc3bd98e789fa6d9c99f90b627acd944",
    "cifar10_exact_subset.npz": "91a36fd565a8d0ce6b443389e21740c104005ce4585550338c83a6f90f8ee82b",
    "har.zip": "c00b803081a5c797cd5e4b83700a9810b38d53d9d84e01917e090e1fdbc81031",
    "cifar10_jpeg.npz": "857e5f455f7fd0ed7862e97676c9c9a56f8ab48a866baede6b7767b2a9f5ab69",
}


STARTS = {"mnist_16": "5319001272c271dbe37c1f1f25732931bd8aac9a3881a64fe6004d95bfd713b9"}


class _Source(NamedTuple):
    stored: str | None = None  # file name in data/bundled or in $DEEPCLUST_DATA
    fetch: Callable | None = None  # empty folder -> arrays to store in the cache
    origin: str = ""  # where fetch goes, and how much it brings
    prepare: Callable = _arrays  # (open .npz, parts) -> arrays x, y
    bundled: bool = False
    has_split: bool = True


SOURCES = {
    "mnist_5k": _Source("mnist_5k.npz", bundled=True),
    "fashion_5k": _Source("fashion_5k.npz", bundled=True),
    "mnist": _Source("mnist.npz", _torchvision("MNIST"), "torchvision's source, 12 MB"),
    "usps": _Source("usps.npz", _torchvision("USPS"), "torchvision's source, 9 MB"),
    "fashion": _Source("fashion_mnist.npz", _torchvision("FashionMNIST"), "torchvision's source, 31 MB"),
    "svhn": _Source(None, _torchvision("SVHN", by_split=True), "torchvision's source, 246 MB"),
    "cifar10": _Source(None, _torchvision("CIFAR10"), "torchvision's source, 170 MB"),
    "cifar100_20": _Source(None, _fetch_cifar100_20, "torchvision's source, 169 MB"),
    "stl10": _Source(None, _torchvision("STL10", by_split=True), "torchvision's source, 2.6 GB"),
    "har": _Source(None, _fetch_har, "the UCI repository, 61 MB"),
    "reuters_rcv1": _Source(None, _fetch_reuters_rcv1, "scikit-learn's source, 656 MB", has_split=False),
    "har_standin": _Source("har_smartphone.npz"),
    "reuters_r8": _Source("reuters_r8.npz", prepare=_word_counts),
    "cifar10_subset": _Source("cifar10_exact_subset.npz"),
    "cifar10_jpeg": _Source("cifar10_jpeg.npz", prepare=_jpeg_images),
}
NAMES = tuple(SOURCES)
# Items of the train and the test part, for limits that are checked before anything is loaded.
SIZES = {"mnist_5k": (4_000, 1_000), "fashion_5k": (4_000, 1_000), "usps": (7_291, 2_007)}
SIZES |= {"mnist": (60_000, 10_000), "fashion": (60_000, 10_000), "svhn": (73_257, 26_032)}
