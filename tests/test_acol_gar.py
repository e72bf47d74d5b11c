"""The chapter `acol_gar`: its definitions against brute force, closed forms and the paper's identities, and
golden runs of its cells under each setting of each switch.
"""

import copy
import functools
import itertools
import json
import math
import types

import golden
import numpy as np
import pytest
import torch
from loader import chapter_file, definitions
from torch import nn

from deepclust_nb import baselines, metrics, records, training

CHAPTER = "acol_gar"
TINY = dict(side=8, width=2, n_features=12, n_duplicates=3, n_clusters=3, epochs=2, batch_size=20, n_looks=3)
TINY |= dict(lr=0.01)
AFTERWARDS = ("def energies", "signals = {", "def assign")  # cells without a tag that train or assign


def altered(change, *sizes):
    """A stand-in for `data.load` whose images are changed."""
    load = golden.digits(*sizes)

    def changed(name, split="all"):
        found = load(name, split)
        return found._replace(x=change(found.x))

    return changed


def noted_run(load=None, also=(), **changed):
    """A golden run: (namespace, Seen, {precisions: of each forward pass, asked: for which loops}).

    Loops run for five epochs at most, which is enough of IMSAT's fifty.
    """
    noted, autocast, steps = {"precisions": [], "asked": []}, training.autocast, training.steps

    def note_precision(precision):
        noted["precisions"].append(precision)
        return autocast(precision)

    def short(n, batch_size, epochs, *rest, **more):
        noted["asked"].append([n, batch_size, epochs, *rest, more])
        return steps(n, batch_size, min(epochs, 5), *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "autocast", note_precision)
        patch.setattr(training, "steps", short)
        return *golden.run(CHAPTER, load, also=also, **(TINY | changed)), noted


def kept(**changed):
    """A golden run's numbers, with what was noted and what each look saw."""
    namespace, seen, noted = noted_run(**changed)
    trace = [
        {name: golden.checksum(v) if name in ("map", "pair") else v for name, v in row.items()}
        for row in namespace["trace"]
    ]
    more = noted | {"trace": trace, "signals": namespace.get("signals")}
    return golden.summary(namespace, seen) | golden.plain(more)


HALF = functools.partial(altered, lambda x: x[:, :, ::2, ::2])
COLOURED = functools.partial(altered, lambda x: torch.cat([x, 255 - x, x // 3], dim=1))
SWITCHED = dict(terms="original", scale_term="printed", schedule="cosine", scored_on="all", centre=False)
CASES = {
    "defaults": {},
    "all switched": SWITCHED | dict(averaging=0.9, transformations="rotations", side=0, seed=3),
    "IMSAT": dict(
        load=HALF(40), with_imsat=True, n_images=12, transformations="half_turn", seed=1, batch_size=5
    ),
    "quarter turn": dict(
        transformations="quarter_turn", scale_term="printed", n_images=30, averaging=0.4, seed=2
    ),
    "scaling": dict(transformations="scaling", schedule="cosine", side=12, scored_on="all", n_looks=6),
    "shear": dict(transformations="shear", terms="original", averaging=0.7, centre=False, side=9, n_looks=1),
    "translation": dict(transformations="translation", c_affinity=0.7, c_balance=0.3, c_scale=0.01, side=10),
    "permutation": dict(
        load=COLOURED(), transformations="permutation", side=6, schedule="cosine", averaging=0.2
    ),
    "no terms": dict(
        c_affinity=0.0, c_balance=0.0, c_scale=0.0, n_duplicates=2, n_features=5, width=3, epochs=1
    ),
    "many scored": dict(
        load=golden.digits(24, 120), n_map=100, precision="bfloat16", dataset="fashion_5k", lr=1e-3
    ),
    "afterwards": dict(
        also=AFTERWARDS, transformations="half_turn", c_affinity=0.4, c_balance=2.0, c_scale=0.1
    ),
}
GOLDEN = {name: functools.partial(kept, **changed) for name, changed in CASES.items()}


@pytest.fixture(scope="module")
def acol():
    return definitions(CHAPTER)


def activities(m=30, n=12, seed=0):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def explicit(N):
    """Equation 5 or 6 from a matrix, entry by entry."""
    n = len(N)
    off = sum(N[i, j] for i, j in itertools.product(range(n), repeat=2) if i != j)
    return off / ((n - 1) * sum(N[i, i] for i in range(n)))


def by_hand(B, n_parents):
    """Equations 10 to 12 in plain loops: node j belongs to parent j mod n_parents."""
    affinity, balance = [], []
    for parent in range(n_parents):
        block = torch.stack([B[:, j] for j in range(B.shape[1]) if j % n_parents == parent], dim=1)
        N = block.T @ block
        affinity.append(explicit(N))
        balance.append(explicit(torch.outer(N.diagonal(), N.diagonal())))
    return sum(affinity) / n_parents, sum(balance) / n_parents


@pytest.mark.parametrize("n_parents", [1, 2, 3, 4])
def test_terms_equal_their_definition_in_loops(acol, n_parents):
    B = activities().relu()
    found = [term.mean() for term in acol.affinity_and_balance(acol.by_parent(B, n_parents))]
    assert torch.allclose(torch.stack(found), torch.stack(by_hand(B, n_parents)), atol=1e-7)


def test_one_parent_gives_the_original_terms(acol):
    B = activities().relu()
    blocks, whole = acol.affinity_and_balance(acol.by_parent(B, 1)), acol.affinity_and_balance(B)
    assert all(torch.allclose(a[0], b) for a, b in zip(blocks, whole, strict=True))
    assert all(torch.allclose(a, b) for a, b in zip(acol.by_definition(B), whole, strict=True))


@pytest.mark.parametrize("active, affinity, balance", [("each its own", 0, 1), ("all", 1, 1), ("one", 0, 0)])
def test_three_tables_with_known_terms(acol, active, affinity, balance):
    B = {"each its own": torch.eye(5), "all": torch.ones(7, 5), "one": torch.eye(5)[:1].repeat(7, 1)}[active]
    found = acol.affinity_and_balance(B.double())
    assert torch.allclose(torch.stack(found), torch.tensor([affinity, balance]).double(), atol=1e-6)


def test_terms_stay_in_range_and_ignore_scale_and_order(acol):
    generator = torch.Generator().manual_seed(0)
    for seed in range(20):
        B = activities(seed=seed).relu() * (seed + 1)
        terms = torch.stack(acol.affinity_and_balance(acol.by_parent(B, 3)))
        assert terms.min() >= 0 and terms.max() <= 1
        scaled = torch.stack(acol.affinity_and_balance(acol.by_parent(100 * B, 3)))
        rows = torch.stack(
            acol.affinity_and_balance(acol.by_parent(B[torch.randperm(30, generator=generator)], 3))
        )
        blocks = acol.by_parent(B, 3).clone()
        blocks[:, :, 1] = blocks[:, torch.randperm(4, generator=generator), 1]  # within one parent alone
        within = torch.stack(acol.affinity_and_balance(blocks))
        for other in (scaled, rows, within):
            assert torch.allclose(terms, other, atol=1e-6)


def test_activity_across_parents_alone_costs_nothing(acol):
    B = torch.zeros(6, 8).double()
    B[:3, 0] = B[:3, 1] = 1.0  # parents 0 and 1 of 2, one duplicate of each
    B[3:, 2] = B[3:, 3] = 1.0
    within = acol.affinity_and_balance(acol.by_parent(B, 2))[0].mean()
    assert within == 0 and acol.affinity_and_balance(B)[0] > 0.1


def test_blocks_follow_the_pooling(acol):
    """Interleaved nodes, not contiguous ones: duplicates of one parent that do the same must cost."""
    B = torch.zeros(10, 6).double()
    B[:, 0] = B[:, 2] = B[:, 4] = 1.0  # all three duplicates of parent 0 of 2
    assert acol.affinity_and_balance(acol.by_parent(B, 2))[0][0] > 0.99
    Z = torch.full((1, 6), -50.0).double()
    Z[0, [0, 2, 4]] = 3.0
    assert torch.allclose(acol.parents(Z, 2), torch.tensor([[1.0, 0.0]]).double())


def test_pooling_adds_every_kth_softmax(acol):
    Z = activities()
    Y, softmax = acol.parents(Z, 4), Z.softmax(dim=1)
    for k in range(4):
        assert torch.allclose(Y[:, k], sum(softmax[:, j] for j in range(12) if j % 4 == k))
    assert torch.allclose(Y.sum(dim=1), torch.ones(30).double())


@pytest.mark.parametrize("terms", ["modified", "original"])
@pytest.mark.parametrize("scale_term", ["code", "printed"])
def test_objective_is_its_formula(acol, terms, scale_term):
    Z, t = activities(), torch.arange(30) % 4
    loss, parts = acol.objective(Z, t, 4, (0.3, 0.7, 0.01), terms, scale_term)
    log_loss = -acol.parents(Z, 4)[torch.arange(30), t].log().mean()
    B = Z.relu()
    affinity, balance = by_hand(B, 4 if terms == "modified" else 1)
    scale = Z.square().sum() if scale_term == "code" else B.square().sum().sqrt()
    assert torch.allclose(parts["log loss"], log_loss)
    assert torch.allclose(loss, log_loss + 0.3 * affinity + 0.7 * (1 - balance) + 0.01 * scale, atol=1e-6)


@pytest.mark.parametrize("terms", ["modified", "original"])
@pytest.mark.parametrize("scale_term", ["code", "printed"])
def test_gradient_of_the_objective(acol, terms, scale_term):
    Z = activities(m=6, n=8, seed=1).requires_grad_()

    def loss(Z):
        return acol.objective(Z, torch.arange(6) % 2, 2, (0.5, 1.0, 0.1), terms, scale_term)[0]

    assert torch.autograd.gradcheck(loss, Z)


def test_a_dead_block_is_finite_and_gets_no_gradient_from_the_terms(acol):
    Z = -activities().abs()
    Z[:, 1::2] *= -1  # parent 1 of 2 is alive
    Z.requires_grad_()
    affinity, balance = acol.affinity_and_balance(acol.by_parent(Z, 2).relu())
    assert affinity[0] == balance[0] == 0
    (gradient,) = torch.autograd.grad((affinity - balance).sum(), Z)
    assert (
        torch.isfinite(gradient).all() and gradient[:, 0::2].abs().max() == 0 < gradient[:, 1::2].abs().max()
    )


@pytest.mark.parametrize("terms", ["modified", "original"])
@pytest.mark.parametrize("scale_term", ["code", "printed"])
@pytest.mark.parametrize("level", [0.0, -1.0])
def test_the_objective_is_finite_without_any_positive_activity(acol, terms, scale_term, level):
    """And its gradient wakes the nodes: the log loss does not ask for a sign."""
    Z = torch.full((4, 6), level, requires_grad=True)
    loss, _ = acol.objective(Z, torch.zeros(4).long(), 2, (0.1, 1.0, 1e-6), terms, scale_term)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(Z.grad).all() and (Z.grad[:, 0::2] < 0).all()


def test_contiguous_blocks_would_be_noticed(acol):
    B = torch.zeros(10, 6).double()
    B[:, 0::2] = 1.0  # the three duplicates of parent 0 of 2 all do the same
    right = acol.affinity_and_balance(acol.by_parent(B, 2))[0][0]
    wrong = acol.affinity_and_balance(B.unflatten(1, (2, 3)).transpose(1, 2))[0].mean()
    assert right > 0.99 and right - wrong > 0.4


def test_the_eight_turns_are_the_group_of_the_square(acol):
    tables = acol.dihedral(5)
    keys = [tuple(table.tolist()) for table in tables]
    assert len(set(keys)) == 8 and keys[0] == tuple(range(25))
    assert {tuple(a[b].tolist()) for a, b in itertools.product(tables, tables)} == set(keys)
    half, quarter = tables[2], tables[1]
    assert half[half].tolist() == list(range(25)) == quarter[quarter][quarter][quarter].tolist()


def test_transform_turns_each_image_by_its_own_table(acol):
    x = torch.randint(0, 256, (8, 3, 5, 5), dtype=torch.uint8)
    turned = acol.transform(acol.dihedral(5), x, torch.arange(8))
    for i in range(8):
        side = x[i].flip(2) if i >= 4 else x[i]
        assert torch.equal(turned[i], torch.rot90(side, i % 4, (1, 2)))
    assert turned.dtype == torch.uint8
    back = [table.argsort() for table in acol.dihedral(5)]
    assert torch.equal(acol.transform(torch.stack(back), turned, torch.arange(8)), x)


@pytest.mark.parametrize(
    "name, n_parents", [("dihedral", 8), ("rotations", 4), ("half_turn", 2), ("quarter_turn", 2)]
)
def test_sets_of_turns(acol, name, n_parents):
    tables = acol.tables_for(name, 6, 6)
    assert acol.check_tables(tables) == n_parents
    expected = {"half_turn": 2, "quarter_turn": 1}.get(name, 1)
    image = torch.arange(36, dtype=torch.uint8).reshape(1, 1, 6, 6)
    turned = acol.transform(tables, image, torch.tensor([1]))[0, 0]
    assert torch.equal(turned, torch.rot90(image[0, 0], expected))


@pytest.mark.parametrize("name", ["scaling", "shear", "translation", "permutation"])
def test_other_sets_have_eight_levels_and_the_identity(acol, name):
    tables = acol.tables_for(name, 28, 28)
    assert acol.check_tables(tables) == 8 and tables.shape == (8, 784)
    assert tables.min() >= 0 and tables.max() <= 784


def test_permutations_are_fixed_ones_of_all_pixels(acol):
    torch.manual_seed(5)
    tables = acol.tables_for("permutation", 6, 6)
    assert all(sorted(table.tolist()) == list(range(36)) for table in tables)
    generator = torch.Generator().manual_seed(0)
    for table in tables[1:]:
        assert torch.equal(table, torch.randperm(36, generator=generator))


def sources(table, size):
    """Row and column from which each pixel comes, nan for black ones."""
    table = table.reshape(size, size).double()
    table[table == size**2] = torch.nan
    return table // size, table % size


def is_nearest(exact, found, size, inside):
    """Whether `found` are the pixels nearest to the exact places, black ones being outside."""
    outside = ((exact < -0.499) | (exact > size - 0.501)).any(0)
    clearly = ((exact < -0.501) | (exact > size - 0.499)).any(0)
    black = found.isnan().any(0)
    assert not (black & ~outside).any() and not (~black & clearly).any() and (~black).sum() >= inside
    return ((exact - found).abs()[:, ~black] < 0.501).all()


@pytest.mark.parametrize("size", [15, 28])
def test_scaling_is_about_the_middle(acol, size):
    places = torch.stack(torch.meshgrid(*[torch.arange(size).double()] * 2, indexing="ij"))
    middle = (size - 1) / 2
    levels = (1.0, 0.9, 0.8, 0.7, 0.6, 1.1, 1.2, 1.3)
    for table, scale in zip(acol.tables_for("scaling", size, size), levels, strict=True):
        found = torch.stack(sources(table, size))
        assert is_nearest((places - middle) / scale + middle, found, size, size**2 * min(scale, 1) ** 2 / 1.2)


@pytest.mark.parametrize("size", [15, 28])
def test_shear_moves_rows_along_themselves(acol, size):
    rows, columns = torch.meshgrid(*[torch.arange(size).double()] * 2, indexing="ij")
    middle = (size - 1) / 2
    levels = (0.0, 10.0, 20.0, 30.0, -10.0, -20.0, -30.0, 40.0)
    for table, degrees in zip(acol.tables_for("shear", size, size), levels, strict=True):
        exact = torch.stack([rows, columns + math.tan(math.radians(degrees)) * (rows - middle)])
        assert is_nearest(exact, torch.stack(sources(table, size)), size, size**2 / 2)


@pytest.mark.parametrize("size, by", [(28, 4), (16, 2), (10, 1), (11, 2)])
def test_translation_moves_by_the_nearest_whole_pixels_and_fills_with_black(acol, size, by):
    """As far to the left as to the right; a seventh of 11 pixels is nearer to two than to one."""
    x = torch.randint(1, 256, (8, 1, size, size), dtype=torch.uint8)
    moved = acol.transform(acol.tables_for("translation", size, size), x, torch.arange(8))
    shifts = [(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, -1), (1, -1)]
    for image, result, (across, down) in zip(x[:, 0], moved[:, 0], shifts, strict=True):
        wide = torch.zeros(3 * size, 3 * size, dtype=torch.uint8)
        wide[size : 2 * size, size : 2 * size] = image
        top, left = size - by * down, size - by * across
        assert torch.equal(result, wide[top : top + size, left : left + size])


def test_wrong_transformations_are_refused(acol):
    with pytest.raises(ValueError, match="square images only, got 28 x 20"):
        acol.tables_for("dihedral", 28, 20)
    turns = acol.dihedral(4)
    with pytest.raises(ValueError, match="identity"):
        acol.check_tables(turns[1:])
    with pytest.raises(ValueError, match="at least two pseudo parent classes, got 1"):
        acol.check_tables(turns[:1])
    with pytest.raises(ValueError, match="two of these are equal"):
        acol.check_tables(torch.cat([turns, turns[3:4]]))


def test_networks_have_the_papers_size(acol):
    assert sum(p.numel() for p in acol.ACOL((1, 28, 28), 160).parameters()) == 6_817_408
    model = acol.ACOL((3, 32, 32), 40, width=8, n_features=16)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 40)


def test_the_network_has_the_papers_layers(acol):
    def told(layer):
        if isinstance(layer, nn.Conv2d):
            return ("conv", layer.kernel_size, layer.padding, layer.padding_mode)
        return (
            type(layer).__name__,
            *([layer.p, layer.inplace] if "Dropout" in type(layer).__name__ else []),
        )

    conv = ("conv", (3, 3), (1, 1), "zeros")
    block = [conv, ("ReLU",), conv, ("ReLU",), ("MaxPool2d",)]
    model = acol.ACOL((1, 28, 28), 160, width=4, n_features=8)
    blocks = [*block, ("Dropout", 0.2, False), *block, ("Dropout", 0.3, False)]
    assert [told(m) for m in model.features] == [*blocks, ("Flatten",), ("Linear",), ("ReLU",)]
    assert [told(m) for m in model.nodes] == [("Dropout", 0.5, False), ("Linear",)]
    assert all(
        (m.kernel_size, m.stride, m.padding) == (2, 2, 0) for m in (model.features[4], model.features[10])
    )


def test_each_layer_starts_as_glorot_and_bengio_have_it(acol):
    torch.manual_seed(0)
    model = acol.ACOL((1, 16, 16), 40, width=16, n_features=64)
    fans = [(9, 144), (144, 144), (144, 288), (288, 288), (512, 64), (64, 40)]
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer, (n_in, n_out) in zip(layers, fans, strict=True):
        limit = math.sqrt(6 / (n_in + n_out))
        assert 0.97 * limit < layer.weight.abs().max() <= limit and not layer.bias.any()
        assert layer.weight.var().item() == pytest.approx(limit**2 / 3, rel=0.12)
        assert abs(layer.weight.mean()) < 0.1 * limit


def test_dropout_drops_single_entries(acol):
    torch.manual_seed(0)
    model = acol.ACOL((1, 32, 32), 8, width=16, n_features=256)
    seen = []
    for layer in (model.features[5], model.features[11], model.nodes[0]):
        layer.register_forward_hook(lambda layer, given, out: seen.append((given[0], out)))
    model(torch.rand(40, 1, 32, 32) + 0.1)
    for (given, out), rate in zip(seen, (0.2, 0.3, 0.5), strict=True):
        alive = given > 0
        assert (out[alive] == 0).double().mean().item() == pytest.approx(rate, abs=0.01)
        stays = alive & (out != 0)
        assert torch.allclose(out[stays], given[stays] / (1 - rate))
        if out.ndim == 4:
            dropped = ((out == 0) & alive).double().sum((2, 3)) / alive.double().sum((2, 3)).clamp_min(1)
            assert dropped[alive.sum((2, 3)) > 20].max() < 0.9


def test_latent_is_without_dropout_and_leaves_the_model_training(acol):
    model = acol.ACOL((1, 8, 8), 8, width=4, n_features=32)
    x = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8)
    (first, nodes), (second, _) = acol.latent(model, x), acol.latent(model, x, batch_size=3)
    assert torch.allclose(first, second, atol=1e-5) and first.min() >= 0 and model.training
    assert torch.allclose(model.nodes[1](first), nodes, atol=1e-5)
    assert torch.allclose(first, model.eval().features(x / 255), atol=1e-5)


def products_in(model):
    """A list to which each forward pass adds the type that the model's last layer gave."""
    found = []
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    last.register_forward_hook(lambda layer, given, out: found.append(out.dtype))
    return found


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_networks_compute_in_the_precision_that_was_asked_for(acol, precision, monkeypatch):
    """And hand float32 to losses and to k-means."""
    torch.manual_seed(0)
    kind = getattr(torch, precision)
    model, x = acol.ACOL((1, 8, 8), 8, 4, 32), torch.randint(0, 256, (30, 1, 8, 8), dtype=torch.uint8)
    found = products_in(model)
    assert all(v.dtype == torch.float32 for v in acol.latent(model, x, precision)) and found == [kind]
    acol.pseudo_accuracy(model, x, acol.dihedral(8), precision)
    assert found == [kind] * 2

    def loss_of(Z, t):
        assert Z.dtype == torch.float32
        return acol.objective(Z, t, 8, (0.1, 1.0, 1e-6))

    settings = dict(epochs=1, batch_size=15, lr=0.01, seed=0, precision=precision, n_looks=1)
    list(acol.train(model, x, acol.dihedral(8), loss_of, schedule="constant", averaging=0.0, **settings))
    assert found == [kind] * 4
    rival = acol.imsat_network(64, 3, hidden=8)
    found = products_in(rival)
    monkeypatch.setattr(acol, "imsat_network", lambda n_in, n_clusters: rival)
    acol.imsat(x, 3, 0, precision, epochs=1, batch_size=15)
    assert found == [kind] * 6  # three forward passes a step


class Reader(nn.Module):
    """The smallest network with the parts that the chapter reads: F are the pixels, Z is linear in them."""

    def __init__(self, n_pixels, n_nodes, strength=3.0):
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), nn.Dropout(0.5))
        self.nodes = nn.Sequential(nn.Dropout(0.5), nn.Linear(n_pixels, n_nodes))
        generator = torch.Generator().manual_seed(0)
        self.nodes[1].bias.data.zero_()
        self.nodes[1].weight.data = strength * torch.randn(n_nodes, n_pixels, generator=generator)

    def read(self, x):
        """F and Z in NumPy."""
        codes = x.numpy().reshape(len(x), -1).astype(np.float64) / 255
        layer = self.nodes[1]
        return codes, codes @ layer.weight.detach().numpy().T.astype(np.float64) + layer.bias.detach().numpy()


def turned_in_turn(x, n):
    return torch.stack([torch.rot90(image, i % n, (1, 2)) for i, image in enumerate(x)])


def told_right(model, x, n):
    """Pseudo accuracy in loops."""
    _, Z = model.read(turned_in_turn(x, n))
    p = np.exp(Z) / np.exp(Z).sum(axis=1, keepdims=True)
    answers = [np.argmax([p[i, parent::n].sum() for parent in range(n)]) for i in range(len(x))]
    return np.mean([answer == i % n for i, answer in enumerate(answers)])


def test_pseudo_accuracy_counts_turns_that_are_told_right(acol):
    model = Reader(16, 12)
    x = torch.randint(0, 256, (400, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    expected = told_right(model, x, 4)
    assert acol.pseudo_accuracy(model, x, acol.dihedral(4)[:4]) == pytest.approx(expected)
    assert 0.15 < expected < 0.35
    _, Z = model.read(x)
    unturned = np.mean([z.reshape(3, 4).max(0).argmax() == i % 4 for i, z in enumerate(Z)])
    assert abs(unturned - expected) > 0.01
    bright = torch.zeros(40, 1, 4, 4, dtype=torch.uint8)
    bright[:, 0, 0, 1] = 255
    model.nodes[1].weight.data.zero_()
    for parent, place in enumerate((1, 8, 14, 7)):  # where a quarter turn takes the pixel
        model.nodes[1].weight.data[4 + parent, place] = 9.0
    assert acol.pseudo_accuracy(model, bright, acol.dihedral(4)[:4]) == 1
    model.nodes[1].weight.data[[4, 6]] = model.nodes[1].weight.data[[6, 4]]
    assert acol.pseudo_accuracy(model, bright, acol.dihedral(4)[:4]) == 0.5


def test_in_two_parents_turns_the_first_images_by_the_second_table(acol):
    x = torch.randint(0, 256, (130, 2, 8, 8), dtype=torch.uint8)
    for n, few in ((125, x), (7, x[:7])):
        pair = acol.in_two_parents(few, acol.dihedral(8)[:4])
        assert torch.equal(pair[:n], x[:n]) and torch.equal(pair[n:], torch.rot90(x[:n], 1, (2, 3)))


@pytest.fixture
def estimators(monkeypatch, acol):
    """What k-means and t-SNE were given: lists of calls; t-SNE gives back the first two columns."""
    calls = {"k-means": [], "t-SNE": []}
    kmeans = baselines.kmeans

    def spied(z, n_clusters, seed, n_init=20):
        calls["k-means"].append((z.numpy(), n_clusters, seed, n_init))
        return kmeans(z, n_clusters, seed, n_init)

    class Map:
        def __init__(self, *given, **settings):
            calls["t-SNE"].append([given, settings])

        def fit_transform(self, x):
            calls["t-SNE"][-1].append(x)
            return np.asarray(x)[:, :2]

    monkeypatch.setattr(baselines, "kmeans", spied)
    monkeypatch.setattr(acol, "TSNE", Map)
    return calls


def test_a_look_reports_what_it_saw(acol, estimators):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(1030).numpy() % 3
    x = torch.randint(0, 100, (1030, 1, 4, 4), dtype=torch.uint8, generator=generator)
    x[torch.as_tensor(y) == 1, 0, 0] += 120
    model, tables = Reader(16, 12), acol.dihedral(4)[:4]
    model.nodes[1].bias.data = torch.linspace(-1, 1, 12)
    loop = types.SimpleNamespace(number=7, precision="float32", means=lambda since=0: {"since": since})
    row = acol.look(loop, model, x, y, tables, 3, 11, 5, n_map=100)
    codes, Z = model.read(x)
    ((found, *how),) = estimators["k-means"]
    assert np.allclose(found, codes, atol=1e-6) and how == [3, 11, 1]
    labels, _ = baselines.kmeans(torch.as_tensor(found), 3, 11, 1)
    assert row["acc"] == metrics.accuracy(y, labels) and 0.4 < row["acc"] < 1
    assert (row["step"], row["since"]) == (7, 5) and set(row) > {"map", "pair"} and len(row) == 11
    turned = acol.transform(tables, x[:1000], torch.arange(1000) % 4)
    B = torch.as_tensor(model.read(turned)[1]).relu()
    for kind, blocks in (("original", B), ("modified", acol.by_parent(B, 4))):
        for name, value in zip(("affinity", "balance"), acol.affinity_and_balance(blocks), strict=True):
            assert row[f"{name}, {kind}"] == pytest.approx(value.mean().item(), abs=1e-4)
    assert row["pseudo accuracy"] == pytest.approx(told_right(model, x[:1000], 4))
    assert row["pseudo accuracy"] != pytest.approx(told_right(model, x, 4))
    share = np.square(np.maximum(Z, 0))[:, 0::4].sum(axis=0)
    share /= share.sum()
    assert row["in use"] == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    ((given, settings, mapped),) = estimators["t-SNE"]
    assert given == (2,) and settings == dict(init="pca", random_state=0, perplexity=30)
    assert np.allclose(mapped, codes[:100], atol=1e-6)
    assert np.allclose(row["map"], codes[:100, :2] / codes[:100, :2].std(), atol=1e-5)
    both = torch.cat([x[:125], torch.rot90(x[:125], 1, (2, 3))])
    assert np.allclose(row["pair"], model.read(both)[1], atol=1e-4)
    assert not {"map", "pair"} & set(acol.look(loop, model, x, y, tables, 3, 0, 5, n_map=0))
    assert model.training


def test_labels_come_from_ten_starts_in_each_of_three_layers(acol, estimators):
    torch.manual_seed(0)
    codes, nodes = torch.rand(60, 5), 3 * torch.randn(60, 4)
    labels, agreement = acol.clusters_of(codes, nodes, 4, 8)
    softmax = np.exp(nodes.numpy()) / np.exp(nodes.numpy()).sum(axis=1, keepdims=True)
    places = [codes.numpy(), nodes.numpy(), softmax] + [codes.numpy()] * 10
    settings = [(4, 8, 10)] * 3 + [(4, start, 1) for start in range(10)]
    for (found, *how), place, expected in zip(estimators["k-means"], places, settings, strict=True):
        assert np.allclose(found, place, atol=1e-6) and tuple(how) == expected
    for name, place in (("F", codes), ("Z", nodes), ("softmax(Z)", torch.as_tensor(softmax))):
        assert (labels[name] == baselines.kmeans(place, 4, 8, 10)[0]).all()
    single = [baselines.kmeans(codes, 4, start, 1)[0] for start in range(10)]
    assert agreement == pytest.approx(np.mean([metrics.ari(labels["F"], other) for other in single]))
    assert 0 < agreement < 0.9  # single starts differ where there are no clusters


def test_what_a_record_keeps(acol, estimators):
    y = torch.arange(200).numpy() % 10
    codes = torch.eye(10)[y] + 0.01 * torch.rand(200, 10)
    halved = np.where(y == 0, 10 + np.arange(200) // 100, y)  # pure, but class 0 is in two clusters
    labels = {"F": y, "Z": np.minimum(y, 6), "softmax(Z)": halved}
    names = ("pseudo accuracy", "in use", "log loss", "affinity", "balance")
    rows = [{"step": 0, "acc": 0.25, "pseudo accuracy": 0.125, "in use": 4.0, "map": torch.zeros(50, 2)}]
    for step in (500, 1500):
        rows.append({name: step / 8 + i for i, name in enumerate(names)} | {"step": step, "acc": step / 2000})
    rows[-1]["map"] = torch.ones(50, 2)
    rows = [dict.fromkeys(acol.BOTH_KINDS, 0.123456) | {"pseudo accuracy": 0.1} | row for row in rows]
    nodes = torch.full((200, 8), -50.0)
    nodes[:, 0], nodes[:, 1] = 50.0, 49.0  # the others hold nothing, of probability or of energy
    kept = acol.told(labels, 0.5, rows, y, codes, nodes, 9)
    assert (kept["n_nodes"], kept["inactive_softmax"], kept["inactive_z"]) == (8, 6, 6)
    assert kept["used_f"] == 10 and kept["looks"]["acc"] == [0.25, 0.25, 0.75]
    assert kept["looks"]["affinity, original"] == [0.1235] * 3
    assert kept["groups_k7"].count("|") == 6 and sorted(kept["groups_k7"].replace("|", " ")) != []
    assert [call[1:] for call in estimators["k-means"]] == [(7, 9, 3), (20, 9, 3)]
    assert all(np.array_equal(call[0], codes) for call in estimators["k-means"])
    assert (kept["acc_z"], kept["acc_softmax"]) == (0.7, 0.95) and kept["agreement"] == 0.5
    assert kept["purity_k7"] == pytest.approx(0.7) and kept["kept_whole_k7"] == 1
    assert kept["purity_k20"] == 1 and kept["kept_whole_k20"] < 1
    assert kept["steps"] == 1500
    assert [kept[name.replace(" ", "_")] for name in names] == [187.5 + i for i in range(5)]
    arrays = kept["arrays"]
    curve = [[0, 0.25, 0.125, 4, 0, 0, 0], [0.5, 0.25, *(62.5 + np.arange(5))]]
    assert np.allclose(arrays["curve"], [*curve, [1.5, 0.75, *(187.5 + np.arange(5))]])
    assert (arrays["labels"].numpy() == y[:50]).all()
    assert set(arrays) == {"curve", "labels", "map_0", "map_2"}
    assert not arrays["map_0"].any() and arrays["map_2"].all()


def test_classes_that_share_a_cluster_stand_together(acol):
    y = np.array([0, 0, 0, 1, 1, 2, 2, 2, 3])
    found = np.array([5, 5, 1, 5, 5, 1, 1, 1, 0])
    assert acol.merged_classes(y, found) == "0 1|2|3"


def test_runs_with_centred_digits_have_a_name_of_their_own(acol):
    assert (acol.method_name(True), acol.method_name(False)) == ("ACOL-GAR (centred)", "ACOL-GAR")


def short_run(acol, seed=0, **changed):
    torch.manual_seed(seed)
    model = acol.ACOL((1, 8, 8), 8, width=4, n_features=32)
    x = torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = []

    def loss_of(Z, t):
        seen.append(t)
        return acol.objective(Z, t, 4, (0.1, 1.0, 1e-6))

    settings = dict(epochs=4, batch_size=20, lr=0.01, seed=seed, precision="float32", n_looks=3)
    settings |= dict(schedule="cosine", averaging=0.0) | changed
    steps = [loop.number for loop, _ in acol.train(model, x, acol.dihedral(8)[:4], loss_of, **settings)]
    return steps, seen, model


def test_training_pauses_evenly_and_repeats(acol):
    steps, seen, model = short_run(acol)
    assert steps == [0, 4, 8, 12] and len(seen) == 12
    assert short_run(acol, n_looks=5)[0] == [0, 2, 4, 7, 9, 12] and short_run(acol, n_looks=1)[0] == [0, 12]
    again = short_run(acol)[2]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    other = short_run(acol, seed=1)[2]
    assert not torch.equal(model.nodes[1].weight, other.nodes[1].weight)


def test_each_image_of_a_batch_draws_its_own_label(acol):
    """Counts in batches that neither all agree nor are evened out: those of a fair die."""
    _, seen, _ = short_run(acol, epochs=40)
    counts = torch.stack([torch.bincount(t, minlength=4) for t in seen]).double()
    assert (counts.sum(1) == 20).all() and (counts.sum(0) / 2400 - 0.25).abs().max() < 0.03
    spread = ((counts - 5).square() / 5).sum()  # chi-squared with 360 degrees of freedom
    assert 280 < spread < 450


def test_the_network_gets_each_image_turned_by_its_label(acol):
    x = torch.randint(0, 256, (50, 1, 8, 8), dtype=torch.uint8)
    model, given, drawn, answers = acol.ACOL((1, 8, 8), 8, width=2, n_features=8), [], [], []
    model.nodes[1].weight.data *= 100

    def note(layer, batch, Z):
        given.append(batch[0])
        answers.append(Z)

    model.register_forward_hook(note)

    def loss_of(Z, t):
        assert torch.equal(Z, answers[-1]) and Z.abs().max() > 10
        drawn.append(t)
        return acol.objective(Z, t, 8, (0.1, 1.0, 1e-6))

    settings = dict(epochs=1, batch_size=20, lr=0.01, seed=4, precision="float32", n_looks=1)
    list(acol.train(model, x, acol.dihedral(8), loss_of, schedule="constant", averaging=0.0, **settings))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(4))
    assert [len(batch) for batch in given] == [20, 20, 10]
    for image, i, t in zip(torch.cat(given), order, torch.cat(drawn), strict=True):
        side = x[i].flip(2) if t >= 4 else x[i]
        assert torch.allclose(image, torch.rot90(side, int(t) % 4, (1, 2)) / 255)


def test_pseudo_labels_are_independent_of_the_batch_order(acol):
    """One stream for both would tie an image's first label to its number."""
    n, drawn = 4000, []
    torch.manual_seed(0)
    model = acol.ACOL((1, 4, 4), 8, width=1, n_features=2)
    x = torch.arange(n)[:, None].remainder(256).byte().expand(-1, 16).reshape(n, 1, 4, 4)

    def loss_of(Z, t):
        drawn.append(t)
        return acol.objective(Z, t, 4, (0.1, 1.0, 1e-6))

    settings = dict(epochs=1, batch_size=100, lr=1e-3, seed=0, precision="float32", n_looks=1)
    list(acol.train(model, x, acol.dihedral(4)[:4], loss_of, schedule="constant", averaging=0.0, **settings))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))  # that of `training.steps`
    table = torch.zeros(8, 4).index_put_((order % 8, torch.cat(drawn)), torch.ones(n), accumulate=True)
    expected = table.sum(1, keepdim=True) * table.sum(0) / n
    assert ((table - expected).square() / expected).sum() < 50  # 21 degrees of freedom


def test_more_looks_than_steps_are_refused(acol):
    with pytest.raises(ValueError, match="n_looks must be at most the number of steps, 12, got 13"):
        short_run(acol, n_looks=13)


@pytest.mark.parametrize("averaging", [0.9, 0.25])
def test_the_averaged_model_is_the_running_mean_of_the_weights(acol, averaging):
    torch.manual_seed(0)
    model = acol.ACOL((1, 8, 8), 8, width=4, n_features=32)
    x = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
    run = dict(epochs=3, batch_size=20, lr=0.01, seed=0, precision="float32", n_looks=6, schedule="constant")
    mean = None
    looks = acol.train(
        model,
        x,
        acol.dihedral(8)[:2],
        lambda Z, t: acol.objective(Z, t, 2, (0.1, 1.0, 1e-6)),
        averaging=averaging,
        **run,
    )
    for number, (loop, shown) in enumerate(looks):
        now = [p.detach().clone().double() for p in model.parameters()]
        if number == 1:
            mean = now
        elif number > 1:
            mean = [averaging * old + (1 - averaging) * new for old, new in zip(mean, now, strict=True)]
        assert shown is not model and loop.number == number
        for found, expected in zip(shown.parameters(), mean or now, strict=True):
            assert torch.allclose(found.double(), expected, atol=1e-6)
    assert not torch.allclose(shown.nodes[1].weight, model.nodes[1].weight, atol=1e-4)


def test_without_averaging_the_model_itself_is_handed_over(acol):
    torch.manual_seed(0)
    model = acol.ACOL((1, 8, 8), 8, width=2, n_features=4)
    x = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8)
    settings = dict(epochs=2, batch_size=20, lr=0.01, seed=0, precision="float32", n_looks=2)
    settings |= dict(schedule="cosine", averaging=0.0)
    looks = acol.train(
        model, x, acol.dihedral(8)[:2], lambda Z, t: acol.objective(Z, t, 2, (0.1, 1.0, 0.0)), **settings
    )
    assert all(shown is model for _, shown in looks)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_rate_of_every_step(acol, schedule):
    with golden.watched(golden.digits(), double=False) as seen:
        short_run(acol, schedule=schedule, batch_size=25, epochs=3)  # 9 steps, the third of each epoch short
    falling = [0.01 * (1 + math.cos(math.pi * step / 9)) / 2 for step in range(9)]
    expected = falling if schedule == "cosine" else [0.01] * 9
    assert [row["lr"][0] for row in seen.steps] == pytest.approx(expected, abs=1e-12)
    (loop,) = seen.loops
    (group,) = loop["groups"]
    assert loop["optimizer"] == "Adam" and group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8
    assert not group["weight_decay"] and not group["amsgrad"]


def test_effective_number_is_between_its_extremes(acol):
    assert acol.effective_number(torch.ones(7)) == pytest.approx(7)
    assert acol.effective_number(torch.eye(7)[2]) == pytest.approx(1)
    assert acol.effective_number(torch.zeros(7)) == 0
    shares = torch.tensor([0.5, 0.25, 0.25])
    assert acol.effective_number(10 * shares) == pytest.approx(2**1.5)


@pytest.mark.parametrize("n_images, n_duplicates", [(50, 20), (25, 10), (200, 5)])
def test_balance_of_the_perfect_solution_by_simulation(acol, n_images, n_duplicates):
    generator = torch.Generator().manual_seed(1)
    picks = torch.randint(n_duplicates, (4000, n_images), generator=generator)
    counts = torch.nn.functional.one_hot(picks, n_duplicates).sum(dim=1).double()
    balance = (n_images**2 - counts.square().sum(1)) / ((n_duplicates - 1) * counts.square().sum(1))
    assert acol.balance_in_a_batch(n_images, n_duplicates) == pytest.approx(balance.mean().item(), abs=0.015)
    squared = n_images**2 / n_duplicates + n_images * (
        1 - 1 / n_duplicates
    )  # the multinomial's second moment
    exact = (n_images**2 - squared) / ((n_duplicates - 1) * squared)
    assert acol.balance_in_a_batch(n_images, n_duplicates) == pytest.approx(exact)


def test_mass_and_centring(acol):
    x = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    x[0, 0, 20, 3] = 50
    assert acol.centre_of_mass(x).tolist() == [[20.0, 3.0]]
    x[0, 0, 20, 3], x[0, 0, 14, 10], x[0, 0, 14, 18] = 0, 100, 100
    assert acol.centre_of_mass(x).tolist() == [[14.0, 14.0]]
    centred = acol.prepare(x, True, 0)
    assert centred.shape[2:] == (29, 29) and torch.equal(centred[:, :, :28, :28], x)
    turned = torch.rot90(centred, 2, (2, 3))
    assert torch.allclose(acol.centre_of_mass(turned), acol.centre_of_mass(centred))
    off = acol.centre_of_mass(acol.prepare(x, True, 16)) - 7.5
    assert off.abs().max() < 0.02
    assert torch.equal(acol.prepare(x, False, 0), x)
    colours = torch.zeros(1, 2, 5, 7, dtype=torch.uint8)
    colours[0, 0, 0, 2], colours[0, 1, 4, 6] = 60, 180
    assert acol.centre_of_mass(colours).tolist() == [[3.0, 5.0]]


@pytest.mark.parametrize("size, centre, rim", [(28, False, 2), (28, True, 2), (32, False, 2), (8, False, 1)])
def test_the_rim_is_cut_off_and_no_more(acol, size, centre, rim):
    """At the size that is left, resizing changes nothing."""
    x = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    whole = torch.zeros(2, 3, size + centre, size + centre, dtype=torch.uint8)
    whole[:, :, :size, :size] = x
    left = size + centre - 2 * rim
    assert torch.equal(acol.prepare(x, centre, left), whole[:, :, rim:-rim, rim:-rim])


@pytest.mark.parametrize("side", [12, 10])
def test_images_shrink_smoothly_and_are_rounded(acol, side):
    """Each pixel is the mean under a triangle as wide as the change of scale asks, to the nearest integer."""
    x = torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8)
    scale = 24 / side
    middles = (np.arange(side) + 0.5) * scale
    weight = np.maximum(0, 1 - np.abs(middles[:, None] - np.arange(24) - 0.5) / scale)
    weight /= weight.sum(axis=1, keepdims=True)
    exact = weight @ x[:, 0, 2:26, 2:26].numpy() @ weight.T
    found = acol.prepare(x, False, side)[:, 0]
    assert found.dtype == torch.uint8 and np.abs(found.numpy() - exact).max() <= 0.501


def test_pieces_against_union_find(acol):
    graph = torch.rand(12, 12, generator=torch.Generator().manual_seed(3))
    graph = (graph + graph.T) / 2
    root = list(range(12))

    def top(i):
        return i if root[i] == i else top(root[i])

    for i, j in itertools.combinations(range(12), 2):
        if graph[i, j] >= 0.8:
            root[top(i)] = top(j)
    assert acol.pieces(graph, 0.8) == len({top(i) for i in range(12)}) > 1
    edge = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    assert acol.pieces(edge, 0.5) == 1 and acol.pieces(edge, 0.51) == 2


def test_graphs_are_cosines(acol):
    Z = activities(m=5)
    Y_graph, M_graph = acol.graphs(Z, 3)
    B, Y = Z.relu(), acol.parents(Z, 3)
    for table, graph in ((Y, Y_graph), (B, M_graph)):
        cosine = torch.nn.functional.cosine_similarity(table[:, None], table[None], dim=2)
        assert torch.allclose(graph, cosine)


def test_entropies_are_their_sums(acol):
    logits = 2 * activities(m=9, n=5)
    p = np.exp(logits.numpy())
    p /= p.sum(axis=1, keepdims=True)
    mean = p.sum(axis=0) / 9
    marginal, conditional = acol.entropies(logits)
    assert float(marginal) == pytest.approx(-sum(q * math.log(q) for q in mean))
    assert float(conditional) == pytest.approx(-sum(q * math.log(q) for q in p.flatten()) / 9)
    assert conditional < marginal < math.log(5)
    marginal, conditional = acol.entropies(80 * torch.eye(6).double())
    assert float(marginal - conditional) == pytest.approx(math.log(6))


def small_imsat(acol, hidden=16):
    torch.manual_seed(0)
    model = acol.imsat_network(20, 3, hidden=hidden).double()
    nn.init.normal_(model[-1].weight)
    return model, torch.randn(64, 20).double()


def divergence(model, x, p, r):
    """Mean over images of the sum of p log(p / q), q at x + r by a copy of the network in training mode."""
    q = copy.deepcopy(model).train()(x + r).softmax(dim=1)
    return (p * (p / q).log()).sum(dim=1).mean()


def test_away_is_the_divergence_from_assignments_held_fixed(acol):
    model, x = small_imsat(acol)
    r = torch.randn_like(x)
    logits = model(x).detach().requires_grad_()
    before = copy.deepcopy(model.state_dict())
    found = acol.away(model, x, logits, r)
    assert torch.allclose(found, divergence(model, x, logits.softmax(dim=1), r))
    for name, value in model.state_dict().items():
        assert "num_batches" in name or torch.equal(value, before[name]), name
    assert all(m.momentum == 0.1 for m in model if isinstance(m, nn.BatchNorm1d)) and model.training
    found.backward()
    assert logits.grad is None and model[0].weight.grad.abs().sum() > 0


def test_the_adversarial_change_is_one_step_of_the_power_method(acol):
    model, x = small_imsat(acol)
    logits, size = model(x), torch.linspace(0.1, 2.0, 64).double()
    torch.manual_seed(3)
    found = acol.adversarial(model, x, logits, size)
    torch.manual_seed(3)
    direction = torch.randn(64, 20, dtype=torch.float64)
    direction = (direction / direction.square().sum(dim=1, keepdim=True).sqrt()).requires_grad_()
    p = logits.detach().softmax(dim=1)
    (slope,) = torch.autograd.grad(divergence(model, x, p, 10 * direction), direction)
    expected = size[:, None] * slope / slope.square().sum(dim=1, keepdim=True).sqrt()
    assert torch.allclose(found, expected, rtol=1e-4) and not found.requires_grad


def test_the_adversarial_change_beats_chance(acol):
    model, x = small_imsat(acol)
    logits = model(x)
    change = acol.adversarial(model, x, logits, torch.full((64,), 0.5).double())
    worst = acol.away(model, x, logits, change)
    chance = [
        acol.away(model, x, logits, 0.5 * torch.nn.functional.normalize(torch.randn_like(x), dim=1))
        for _ in range(10)
    ]
    assert worst > 2 * max(chance)


def test_imsats_network_starts_as_published(acol):
    torch.manual_seed(0)
    model = acol.imsat_network(500, 7)
    assert [type(m).__name__ for m in model] == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]
    for layer, n_in, scale in zip(model[::3], (500, 1200, 1200), (0.1, 0.1, 0.0001), strict=True):
        assert layer.weight.std().item() == pytest.approx(scale * math.sqrt(2 / n_in), rel=0.05)
        assert not layer.bias.any()
        assert layer.weight.abs().max() > 3 * layer.weight.std()  # a normal start, not a uniform one
    for layer in model[1::3]:
        assert (layer.eps, layer.momentum, layer.affine) == (2e-5, 0.1, True)
    assert model(torch.randn(3, 500)).shape == (3, 7)


@pytest.fixture
def imsat_run(acol, monkeypatch):
    """Ten steps of IMSAT on noise, with what its parts were given: (images, network, list of steps)."""
    x = torch.randint(0, 256, (50, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen, now = [], {}
    network, adversarial, away = acol.imsat_network, acol.adversarial, acol.away
    update = training.Steps.update

    def small(n_in, n_clusters):
        model = network(n_in, n_clusters, hidden=12)
        nn.init.normal_(model[-1].weight)  # the published start answers nearly the same to all images
        return model

    def spied_change(model, batch, logits, size, **more):
        assert model.training and not more
        change = adversarial(model, batch, logits, size)
        now.update(batch=batch, logits=logits.detach().double(), size=size, change=change)
        return change

    def spied_away(model, batch, logits, r):
        smooth = away(model, batch, logits, r)
        now.update(smooth=smooth.item(), r=r)
        return smooth

    def spied_update(loop, optimizer, loss, terms):
        update(loop, optimizer, loss, terms)
        about = {"loss": loss.item(), "terms": {name: value.item() for name, value in terms.items()}}
        seen.append(now | about | {"index": loop.index, "optimizer": optimizer})

    monkeypatch.setattr(acol, "imsat_network", small)
    monkeypatch.setattr(acol, "adversarial", spied_change)
    monkeypatch.setattr(acol, "away", spied_away)
    monkeypatch.setattr(training.Steps, "update", spied_update)
    torch.manual_seed(0)
    model = acol.imsat(x, 3, seed=5, precision="float32", epochs=5, batch_size=25)
    return x, model, seen


def test_imsat_changes_each_image_by_a_quarter_of_the_way_to_its_tenth_neighbour(imsat_run):
    x, model, seen = imsat_run
    flat = x.flatten(1).double() / 127.5 - 1
    far = (flat[:, None] - flat[None]).square().sum(dim=2).sqrt().sort(dim=1)[0][:, 10]  # [0] is the image
    generator = torch.Generator().manual_seed(5)
    order = torch.cat([torch.randperm(50, generator=generator) for _ in range(5)]).split(25)
    assert len(seen) == 10 and flat.min() >= -1
    for step, index in zip(seen, order, strict=True):
        assert torch.equal(step["index"], index)
        assert torch.allclose(step["batch"].double(), flat[index], atol=1e-6)
        assert torch.allclose(step["size"].double(), far[index] / 4, atol=1e-6)
        assert torch.equal(step["r"], step["change"])
    assert not model.training


def test_imsat_weighs_its_terms_as_published(imsat_run):
    for step in imsat_run[2]:
        p = step["logits"].softmax(dim=1).numpy()
        conditional = -(p * np.log(p)).sum() / len(p)
        marginal = -(p.mean(axis=0) * np.log(p.mean(axis=0))).sum()
        expected = {"smooth": step["smooth"], "marginal": marginal, "conditional": conditional}
        assert step["terms"] == pytest.approx(expected, abs=1e-6)
        assert step["loss"] == pytest.approx(step["smooth"] + 0.1 * (conditional - 4 * marginal), abs=1e-6)
        assert step["smooth"] > 1e-3
        (group,) = step["optimizer"].param_groups
        assert type(step["optimizer"]).__name__ == "Adam" and group["lr"] == 0.002
        assert group["betas"] == (0.9, 0.999) and not group["weight_decay"]


def cell_with(text):
    """The source of the one code cell that holds a text."""
    cells = json.loads(chapter_file(CHAPTER).read_text(encoding="utf-8"))["cells"]
    (found,) = [s for c in cells if c["cell_type"] == "code" and text in (s := "".join(c["source"]))]
    return found


def test_energies_are_of_a_parents_own_duplicates_under_its_own_turn(acol):
    space = dict(vars(acol))
    exec(cell_with("def energies"), space)
    model = Reader(16, 12)
    x = torch.randint(0, 256, (30, 1, 4, 4), dtype=torch.uint8)
    found = space["energies"](model, x, acol.dihedral(4)[:4])
    for parent in range(4):
        _, Z = model.read(torch.rot90(x, parent, (2, 3)))
        expected = np.square(np.maximum(Z, 0))[:, parent::4].sum(axis=0)
        assert np.allclose(found[parent], expected, rtol=1e-4)


def test_records_count_their_own_work_on_their_own_images():
    """By the golden clock a step takes 1 second, k-means 100, t-SNE 10,000 and neighbours 1,000,000."""
    load = HALF(40)
    run = dict(with_imsat=True, n_images=12, epochs=3, batch_size=4, n_looks=2, scored_on="all", seed=0)
    space, seen, _ = noted_run(load, **run)
    pixels, ours, rival = seen.records
    assert pixels["seconds"] == 100 and rival["seconds"] == 1_000_000 + 5
    assert ours["seconds"] == 9 + 3 * 100 + 3 * 10_000 + 13 * 100
    stored, scored = load("mnist_5k", "train"), load("mnist_5k", "all")
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:12]
    assert torch.equal(space["x_raw"], stored.x[order]) and torch.equal(space["x_test_raw"], scored.x)
    assert np.array_equal(space["y"], scored.y)
    assert [record["n"] for record in seen.records] == [80, 12, 12]
    assert [record["trained_on"] for record in seen.records] == ["all", "train", "train"]
    assert all(record["scored_on"] == "all" and record["n_scored"] == 80 for record in seen.records)
    assert ours["acc"] == round(metrics.accuracy(scored.y, space["labels"]["F"]), 6)


def test_recorded_quick_runs_had_the_parameters_of_today():
    today = {}
    exec(cell_with("profile = "), today)
    del today["__builtins__"]
    for method in ("ACOL-GAR (centred)", "k-means"):
        found = records.load(CHAPTER, today["dataset"], today["profile"], method)
        assert found and all(r["parameters"] | {"seed": 0} == today for r in found)


def test_the_code_that_is_shown_takes_the_papers_terms_and_size_by_default(acol):
    Z, t, weights = activities(), torch.arange(30) % 4, (0.3, 0.7, 0.01)
    assert acol.objective(Z, t, 4, weights)[0] == acol.objective(Z, t, 4, weights, "modified", "code")[0]
    model = acol.ACOL((1, 8, 8), 6)
    assert model.features[0].out_channels == 32 and model.nodes[1].in_features == 2048


@pytest.mark.parametrize("precision", ["auto", "bfloat16"])
def test_a_record_tells_the_precision_that_was_used(precision):
    _, seen = golden.run(CHAPTER, precision=precision, **(TINY | dict(epochs=1, n_looks=1)))
    pixels, ours = seen.records
    assert ours["precision"] == training.resolve_precision(precision) and pixels["precision"] == "float32"
    assert ours["parameters"]["precision"] == precision


def test_new_images_get_the_nearest_centre():
    run = TINY | dict(epochs=4, lr=0.003, n_features=32, width=4)
    space, _ = golden.run(CHAPTER, also=AFTERWARDS[2:], double=False, **run)
    labels = space["assign"](space["shown"], space["centres"], space["x_test_raw"])
    assert (labels.numpy() == space["labels"]["F"]).all() and len(labels.unique()) == 3
    model, centres = Reader(64, 4), torch.rand(9, 64, generator=torch.Generator().manual_seed(0))
    codes, _ = model.read(space["x_test"])
    distances = np.square(codes[:, None] - centres.numpy()[None]).sum(axis=2)
    assert (space["assign"](model, centres, space["x_test_raw"]).numpy() == distances.argmin(axis=1)).all()
