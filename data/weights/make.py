"""Train the start that ships with the package, mnist_16.npz, and write its record beside it.

    python data/weights/make.py [--folder F]       needs all of MNIST; a quarter of an hour on one thread

It is the pretraining of the chapter `dynae`, whose own cells are run here, on all 70,000 images of MNIST,
without labels. These are used once, to score k-means on the code for the record. Weights are float16.
Products are in bfloat16 where the processor has it, so another machine gets other last digits.
"""

import argparse
import functools
import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))
sys.path.insert(0, str(HERE.parents[1]))

from loader import definitions  # noqa: E402

from deepclust_nb import baselines, data, digest, metrics, networks, places, training  # noqa: E402

TRAINING = {"iterations": 60_000, "lr": 0.001, "schedule": "cosine", "batch_size": 256, "seed": 0}
TRAINING |= {"adversary": "none", "widths": [300, 300, 300]}
PICTURES = {"margin": 2, "side": 16}
MOVES = {"degrees": 10.0, "shift": 0.1}
SETTINGS = {"dataset": "mnist", **PICTURES, **TRAINING, **MOVES}


def trained(chapter, x, precision):
    """An Autoencoder pretrained on images x (n, c, h, w) uint8 by the chapter's own loop."""
    training.seed_everything(TRAINING["seed"])
    model = networks.Autoencoder(x[0].numel(), widths=TRAINING["widths"])
    view = functools.partial(chapter.slightly_moved, **MOVES)
    chapter.pretrain(model, x, precision=precision, view=view, critic_weight=0.0, **TRAINING)
    return model


def record_of(path, x, y, seconds, precision):
    """What is stored beside the weights: settings, k-means on the code of the stored weights, time, sum."""
    with np.load(path, allow_pickle=False) as stored:
        state = {name: torch.from_numpy(stored[name].astype(np.float32)) for name in stored.files}
    model = networks.Autoencoder(x[0].numel(), widths=TRAINING["widths"])
    model.load_state_dict(state)
    labels, _ = baselines.kmeans(baselines.encode(model, x), 10, TRAINING["seed"])
    record = {"settings": SETTINGS, "scored": "k-means on the code of the stored weights, all of MNIST"}
    record |= metrics.scores(y, labels) | {"seconds": round(seconds), "precision": precision, "threads": 1}
    record |= {"torch": torch.__version__, "commit": digest.commit()}
    return record | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def main(folder):
    torch.set_num_threads(1)
    chapter, precision = definitions("dynae"), training.resolve_precision("auto")
    stored = data.load(SETTINGS["dataset"])
    x = chapter.prepared(stored.x, **PICTURES)
    started = time.perf_counter()
    model = trained(chapter, x, precision)
    seconds = time.perf_counter() - started
    half = {name: value.numpy().astype(np.float16) for name, value in model.state_dict().items()}
    np.savez_compressed(folder / "mnist_16.npz", **half)
    record = record_of(folder / "mnist_16.npz", x, stored.y.numpy(), seconds, precision)
    places.write_atomic(folder / "mnist_16.json", json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--folder", type=Path, default=HERE)
    main(arguments.parse_args().folder)
