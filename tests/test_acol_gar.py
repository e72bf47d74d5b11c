"""The chapter `acol_gar`: its definitions against brute force, closed forms and the paper's identities."""

import itertools
import math
import types

import pytest
import torch
from loader import definitions

from deepclust_nb import metrics

CHAPTER = "acol_gar"


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
    if name == "permutation":
        assert all(sorted(table.tolist()) == list(range(784)) for table in tables)


def test_translation_moves_by_whole_pixels_and_fills_with_black(acol):
    x = torch.full((8, 1, 28, 28), 255, dtype=torch.uint8)
    moved = acol.transform(acol.tables_for("translation", 28, 28), x, torch.arange(8))
    black = (moved == 0).sum(dim=(1, 2, 3)).tolist()
    assert black[:3] == [0, 4 * 28, 4 * 28] and black[5] == 28**2 - 24**2


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
    weight = acol.ACOL((1, 28, 28), 160).features[-2].weight
    assert weight.abs().max() <= math.sqrt(6 / (3136 + 2048)) and all(
        not m.bias.any() for m in [model.nodes[1]]
    )


def test_latent_is_without_dropout_and_leaves_the_model_training(acol):
    model = acol.ACOL((1, 8, 8), 8, width=4, n_features=32)
    x = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8)
    (first, nodes), (second, _) = acol.latent(model, x), acol.latent(model, x, batch_size=3)
    assert torch.allclose(first, second, atol=1e-5) and first.min() >= 0 and model.training
    assert torch.allclose(model.nodes[1](first), nodes, atol=1e-5)


def test_a_look_reports_what_it_saw(acol):
    steps, _, model = short_run(acol)
    x = torch.randint(0, 256, (130, 1, 8, 8), dtype=torch.uint8)
    tables, y = acol.dihedral(8)[:4], torch.arange(130).numpy() % 3
    pair = acol.in_two_parents(x, tables)
    assert torch.equal(pair[:125], x[:125]) and torch.equal(pair[125:], torch.rot90(x[:125], 1, (2, 3)))
    t = torch.arange(130) % 4
    Y = acol.parents(acol.latent(model, acol.transform(tables, x, t))[1], 4)
    assert acol.pseudo_accuracy(model, x, tables) == pytest.approx((Y.argmax(1) == t).float().mean().item())
    loop = types.SimpleNamespace(number=7, precision="float32", means=lambda since: {"since": since})
    row = acol.look(loop, model, x, y, tables, 3, 0, 5, n_map=100)
    assert (row["step"], row["since"], row["map"].shape, row["pair"].shape) == (7, 5, (100, 2), (250, 8))
    energy = acol.latent(model, x)[1].relu()[:, 0::4].square().sum(0)
    assert row["in use"] == pytest.approx(acol.effective_number(energy))
    assert "map" not in acol.look(loop, model, x, y, tables, 3, 0, 5, n_map=0)


def test_what_a_record_keeps(acol):
    torch.manual_seed(0)
    y = torch.arange(200).numpy() % 10
    codes = torch.eye(10)[y] + 0.01 * torch.rand(200, 10)
    labels, agreement = acol.clusters_of(codes, torch.rand(200, 4), 10, 0)
    assert metrics.accuracy(y, labels["F"]) == 1 and 0 < agreement <= 1
    blurred = torch.rand(200, 10)
    assert (
        acol.clusters_of(blurred, blurred, 10, 0)[1] < 0.9
    )  # single starts differ where there are no clusters
    names = ("pseudo accuracy", "in use", "log loss", "affinity", "balance")
    row = dict.fromkeys(names, 0.5) | {"step": 9, "acc": 1.0, "map": torch.zeros(50, 2)}
    kept = acol.told(labels, agreement, [row], y, codes, 0)
    assert kept["purity_k7"] == pytest.approx(0.7) and kept["kept_whole_k7"] == 1
    assert kept["purity_k20"] == 1 and kept["kept_whole_k20"] < 1
    assert (
        kept["acc_z"] < 0.5
        and kept["arrays"]["curve"].shape == (1, 7)
        and len(kept["arrays"]["labels"]) == 50
    )


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
    counts = torch.bincount(torch.cat(seen), minlength=4)
    assert counts.sum() == 240 and counts.min() > 30  # uniform pseudo labels, one an image and epoch
    again = short_run(acol)[2]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


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


def test_the_averaged_model_lags_behind(acol):
    torch.manual_seed(0)
    model = acol.ACOL((1, 8, 8), 8, width=4, n_features=32)
    x = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
    start = [p.detach().clone() for p in model.parameters()]
    run = dict(epochs=2, batch_size=20, lr=0.01, seed=0, precision="float32", n_looks=1, schedule="constant")

    def loss_of(Z, t):
        return acol.objective(Z, t, 2, (0.1, 1.0, 1e-6))

    *_, (_, shown) = acol.train(model, x, acol.dihedral(8)[:2], loss_of, averaging=0.9, **run)

    def distance(parameters):
        return sum((a - b).square().sum() for a, b in zip(parameters, start, strict=True))

    assert shown is not model and 0 < distance(shown.parameters()) < distance(model.parameters())


def test_constant_and_cosine_rates_differ(acol):
    ends = [short_run(acol, schedule=schedule)[2].nodes[1].weight for schedule in ("cosine", "constant")]
    assert not torch.allclose(*ends)


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


def test_graphs_are_cosines(acol):
    Z = activities(m=5)
    Y_graph, M_graph = acol.graphs(Z, 3)
    B, Y = Z.relu(), acol.parents(Z, 3)
    for table, graph in ((Y, Y_graph), (B, M_graph)):
        cosine = torch.nn.functional.cosine_similarity(table[:, None], table[None], dim=2)
        assert torch.allclose(graph, cosine)


def test_mutual_information_is_at_most_log_k(acol):
    for seed in range(10):
        marginal, conditional = acol.entropies(5 * activities(seed=seed))
        assert -1e-9 <= marginal - conditional <= math.log(12)
    marginal, conditional = acol.entropies(80 * torch.eye(6).double())
    assert float(marginal - conditional) == pytest.approx(math.log(6))


def test_the_adversarial_change_has_its_size_and_beats_chance(acol):
    torch.manual_seed(0)
    model = acol.imsat_network(20, 3, hidden=16)
    torch.nn.init.normal_(model[-1].weight)
    x, size = torch.randn(64, 20), torch.full((64,), 0.5)
    before = [m.running_mean.clone() for m in model if hasattr(m, "running_mean")]
    logits = model(x)
    after_pass = [m.running_mean.clone() for m in model if hasattr(m, "running_mean")]
    change = acol.adversarial(model, x, logits, size)
    assert torch.allclose(change.norm(dim=1), size, atol=1e-4)
    worst = acol.away(model, x, logits, change)
    chance = [
        acol.away(model, x, logits, 0.5 * torch.nn.functional.normalize(torch.randn_like(x), dim=1))
        for _ in range(10)
    ]
    assert worst > 2 * max(chance)
    now = [m.running_mean for m in model if hasattr(m, "running_mean")]
    assert all(torch.equal(a, b) for a, b in zip(after_pass, now, strict=True))
    assert not torch.equal(before[0], now[0])


def test_imsats_network_starts_as_published(acol):
    torch.manual_seed(0)
    model = acol.imsat_network(500, 7)
    assert [type(m).__name__ for m in model] == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]
    for layer, n_in, scale in zip(model[::3], (500, 1200, 1200), (0.1, 0.1, 0.0001), strict=True):
        assert layer.weight.std().item() == pytest.approx(scale * math.sqrt(2 / n_in), rel=0.05)
        assert not layer.bias.any()
    assert model(torch.randn(3, 500)).shape == (3, 7)


def test_imsat_separates_two_heaps(acol):
    torch.manual_seed(0)
    y = torch.arange(200) % 2
    x = (torch.rand(200, 1, 4, 4) * 40 + 180 * y[:, None, None, None]).byte()
    model = acol.imsat(x, 2, seed=0, precision="float32", epochs=15, batch_size=50)
    with torch.no_grad():
        labels = model(x.float().div(255).flatten(1) * 2 - 1).argmax(dim=1)
    assert metrics.accuracy(y, labels) > 0.99
