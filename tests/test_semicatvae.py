"""The chapter `semicatvae`: its definitions against brute force, closed forms and scikit-learn."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from loader import definitions
from scipy.stats import chisquare
from sklearn.metrics import pairwise_distances
from sklearn.neighbors import KNeighborsClassifier

from deepclust_nb import training

CHAPTER = "semicatvae"
SETTINGS = dict(weights=(1.0, 1.0, 5.0, 1.0), alpha=0.6, temperature=1.0, noisy=True, assignment="bounded")
SETTINGS |= dict(assigner="nearest", lender_gradient=True)


@pytest.fixture(scope="module")
def cat():
    return definitions(CHAPTER)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def probabilities(n, k=10, seed=0, concentration=0.3):
    torch.manual_seed(seed)
    return torch.distributions.Dirichlet(torch.full((k,), concentration, dtype=torch.float64)).sample((n,))


def codes(n, d=6, seed=0):
    return F.normalize(torch.randn(n, d, generator=generator(seed), dtype=torch.float64).relu() + 1e-3, dim=1)


# Gumbel-softmax


def test_the_noise_has_gumbels_mean_and_variance(cat):
    noise = cat.gumbel_noise((400_000,), generator=generator()).double()
    assert abs(noise.mean() - 0.5772156649) < 0.01
    assert abs(noise.var() - math.pi**2 / 6) < 0.02


def test_the_largest_noisy_logit_has_the_softmax_probabilities(cat):
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0])
    drawn = (logits + cat.gumbel_noise((50_000, 4), generator=generator())).argmax(dim=1)
    expected = 50_000 * logits.double().softmax(dim=0)
    assert chisquare(torch.bincount(drawn, minlength=4), expected.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [0.05, 1.0, 7.0])
def test_the_temperature_changes_how_sure_a_draw_is_and_not_which(cat, temperature):
    logits = torch.randn(200, 5, generator=generator(), dtype=torch.float64)
    noise = cat.gumbel_noise((200, 5), generator=generator(1)).double()
    c = cat.gumbel_softmax(logits, noise, temperature)
    assert torch.allclose(c.sum(dim=1), torch.ones(200).double())
    assert torch.equal(c.argmax(dim=1), (logits + noise).argmax(dim=1))
    assert torch.allclose(c, cat.gumbel_softmax(logits + 3, noise, temperature))


def test_the_two_ends_of_the_temperature(cat):
    logits, noise = torch.tensor([[1.0, 2.0, 0.0]]), torch.zeros(1, 3)
    assert torch.allclose(cat.gumbel_softmax(logits, noise, 1e-3), torch.tensor([[0.0, 1.0, 0.0]]))
    assert torch.allclose(cat.gumbel_softmax(logits, noise, 1e6), torch.full((1, 3), 1 / 3))
    odds = cat.gumbel_softmax(logits, noise, 0.5)
    assert torch.allclose((odds[0, 1] / odds[0, 0]).log(), torch.tensor(2.0))


# the losses


def test_category_loss_is_the_divergence_from_uniform_over_log_k(cat):
    logits = torch.randn(50, 10, generator=generator(), dtype=torch.float64)
    q = logits.softmax(dim=1)
    printed = (q * (10 * q).log()).sum() / (50 * math.log(10))
    assert torch.allclose(cat.category_loss(logits), printed)
    assert cat.category_loss(torch.zeros(3, 10)).abs() < 1e-6
    assert (cat.category_loss(1000 * torch.eye(10)) - 1).abs() < 1e-6


def test_assignment_loss_equals_equation_16_with_tanh(cat):
    P, assigned = probabilities(300, concentration=1.0), torch.randint(10, (300,), generator=generator())
    for p, a, found in zip(P, assigned, cat.assignment_loss(P, assigned), strict=True):
        own = math.tanh(-math.log(p[a]))
        rest = sum(math.tanh(math.log(p[j])) + 1 for j in range(10) if j != a)
        assert abs(found.item() - (own + rest) / 2) < 1e-9


def test_assignment_loss_lies_between_0_and_1_and_reaches_both(cat):
    P = probabilities(100_000, concentration=0.1)
    loss = cat.assignment_loss(P, torch.randint(10, (100_000,), generator=generator()))
    assert loss.min() >= -1e-12 and loss.max() <= 1 + 1e-12 and loss.max() > 0.99 and loss.min() < 0.01
    ends = cat.assignment_loss(torch.eye(10).double(), torch.zeros(10, dtype=torch.int64))
    assert torch.allclose(ends, torch.tensor([0.0] + 9 * [1.0]).double())
    uniform = cat.assignment_loss(torch.full((1, 10), 0.1).double(), torch.tensor([3]))
    assert abs(uniform.item() - 0.57921) < 5e-6


@pytest.mark.parametrize("k", [3, 4, 10])
def test_equation_15_as_printed_does_not_know_the_label(k):
    P = probabilities(20, k, concentration=2.0)
    printed = sum(-P[:, c].log() + sum(P[:, j].log() for j in range(k) if j != c) for c in range(k))
    assert torch.allclose(printed, (k - 2) * P.log().sum(dim=1))


def test_cross_entropy_is_torchs(cat):
    logits = torch.randn(40, 5, generator=generator(), dtype=torch.float64)
    a = torch.randint(5, (40,), generator=generator(1))
    assert torch.allclose(
        cat.cross_entropy(logits.softmax(1), a), F.cross_entropy(logits, a, reduction="none")
    )
    assert cat.cross_entropy(torch.eye(2), torch.tensor([1, 0])).isfinite().all()


def test_the_pull_has_the_closed_form_of_the_text(cat):
    p = torch.linspace(0.01, 0.99, 50).double()

    def slope(q):
        return 4 * q / (1 + q**2) ** 2

    assert torch.allclose(cat.pull(p, cat.assignment_loss), p * (1 - p) * (slope(p) + slope(1 - p)) / 2)
    assert torch.allclose(cat.pull(p, cat.cross_entropy), 1 - p)


def test_a_surely_wrong_image_gets_no_gradient_from_the_bounded_loss_alone(cat):
    logits = torch.tensor([[-20.0, 20.0, 0.0]], dtype=torch.float64, requires_grad=True)
    P, first = logits.softmax(dim=1), torch.tensor([0])
    (flat,) = torch.autograd.grad(cat.assignment_loss(P, first).sum(), logits, retain_graph=True)
    (steep,) = torch.autograd.grad(cat.cross_entropy(P, first).sum(), logits)
    assert flat.abs().max() < 1e-7 and steep.abs().max() > 0.99


@pytest.mark.parametrize("k", [2, 3, 10, 100])
def test_an_undecided_image_is_pulled_as_the_text_derives(cat, k):
    logits = torch.zeros(1, k, dtype=torch.float64, requires_grad=True)
    for loss_of, closed in (
        (cat.assignment_loss, 4 * k * (k - 1) / (k**2 + 1) ** 2),
        (cat.cross_entropy, 1 - 1 / k),
    ):
        (slope,) = torch.autograd.grad(loss_of(logits.softmax(dim=1), torch.tensor([k - 1])).sum(), logits)
        assert -slope[0, -1] == pytest.approx(closed, rel=1e-9)


def test_with_all_weights_one_the_brake_wins_and_with_the_papers_weights_the_label_does(cat):
    """Where the two losses of one image are lowest, averaged over noise: the shape of Figure 3."""
    at = torch.linspace(-1, 8, 91)
    logits = torch.zeros(91, 10).index_copy_(1, torch.tensor([4]), at[:, None])
    noise = cat.gumbel_noise((3000, 1, 10), generator=generator())
    P = cat.gumbel_softmax((logits + noise).flatten(0, 1), 0, 1.0)
    label = torch.full((len(P),), 4)
    pulled = cat.assignment_loss(P, label).unflatten(0, (-1, 91)).mean(dim=0)
    braked = torch.stack([cat.category_loss(row[None]) for row in logits])
    lowest = [
        at[(a * pulled + c * braked).argmin()] for a, c in ((1, 1), (5, 1), (30, 1), (1, 0.4), (1, 0.1))
    ]
    assert 0.5 < lowest[0] < 1.5 and lowest[1:] == [8.0] * 4


def test_feature_loss_equals_its_definition_in_loops(cat):
    f, given = codes(12), torch.tensor([0, 1, 2, 0, 1])
    assigned = torch.cat([given, torch.tensor([0, 0, 1, 2, 2, 1, 0])])
    apart, parts = cat.distances(f, f[:5]), []
    for i in range(12):
        lenders = [r for r in range(5) if given[r] == assigned[i]]
        parts.append(sum((f[i] - f[r]).norm() for r in lenders) / (math.sqrt(2) * len(lenders)))
    for alpha in (0.0, 0.6, 1.0):
        expected = alpha * sum(parts[:5]) / 5 + (1 - alpha) * sum(parts[5:]) / 7
        assert torch.allclose(cat.feature_loss(apart, assigned, given, alpha), expected)
    assert torch.allclose(cat.feature_loss(apart[:5], given, given, 0.6), sum(parts[:5]) / 5)


def test_feature_loss_has_the_ends_0_and_1(cat):
    f, given = torch.eye(4).double()[[0, 1, 0, 0, 1]], torch.tensor([0, 1])
    right, wrong = torch.tensor([0, 1, 0, 0, 1]), torch.tensor([0, 1, 1, 1, 0])
    apart = cat.distances(f, f[:2])
    assert cat.feature_loss(apart, right, given, 0.6) == 0
    assert torch.allclose(cat.feature_loss(apart, wrong, given, 0.0), torch.tensor(1.0).double())


def test_distances_of_nearly_equal_codes_are_exact(cat):
    f = codes(40).float()
    near = f + 1e-4 * torch.randn(f.shape, generator=generator(3))
    exact = pairwise_distances(near.double().numpy(), f.double().numpy())
    assert abs(cat.distances(near, f).double().numpy() / exact - 1).max() < 1e-4


# borrowing


def test_nearest_and_five_equal_scikit_learn_and_labelled_images_get_their_own(cat):
    f, labelled = codes(200, 20, seed=1), codes(40, 20, seed=2)
    given = torch.arange(40) % 4
    apart, logits = cat.distances(f, labelled), torch.zeros(200, 4)
    own = cat.assign(cat.distances(labelled, labelled), given, logits)
    assert torch.equal(own, given)
    known = KNeighborsClassifier(1, algorithm="brute").fit(labelled.numpy(), given.numpy())
    assert (cat.assign(apart, given, logits).numpy() == known.predict(f.numpy())).all()
    known = KNeighborsClassifier(5, algorithm="brute").fit(labelled.numpy(), given.numpy())
    assert (cat.assign(apart, given, logits, "five").numpy() == known.predict(f.numpy())).all()


def test_means_and_network_by_hand(cat):
    apart = torch.tensor([[1.0, 9.0, 4.0], [1.0, 4.0, 4.0]])
    given, logits = torch.tensor([0, 0, 1]), torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    assert cat.assign(apart, given, logits, "means").tolist() == [1, 0]
    assert cat.assign(apart, given, logits, "nearest").tolist() == [0, 0]
    assert cat.assign(apart, given, logits, "network").tolist() == [1, 0]


@pytest.mark.parametrize(
    "given, words",
    [
        (torch.arange(9), "at least the number of classes, 10, got 9"),
        (torch.arange(100) % 9, "class 9 has none"),
        (torch.arange(20) % 11, "between 0 and 9, got 10"),
        (torch.arange(20) % 10 - 1, "between 0 and 9, got -1"),
    ],
)
def test_labels_that_cannot_work_are_refused(cat, given, words):
    with pytest.raises(ValueError, match=words):
        cat.check_labels(given, 10)
    cat.check_labels(torch.arange(10), 10)


def test_leave_one_out_lends_no_image_its_own_label(cat):
    f, given = torch.eye(3)[[0, 0, 1, 2, 2]], torch.tensor([0, 0, 1, 2, 2])
    assert math.isclose(cat.leave_one_out(f, given), 1 / 5, rel_tol=1e-6)


# pictures


def test_moves_without_amount_change_nothing_and_a_pixel_is_a_pixel(cat):
    images = torch.rand(5, 1, 28, 28, generator=generator())
    still = cat.random_moves(5, 28, 0, 0, 0, 0)
    assert torch.allclose(cat.moved(images, still), images, atol=1e-5)
    still[:, 1, 2] = 2 / 28
    assert torch.allclose(cat.moved(images, still)[:, :, :-1], images[:, :, 1:], atol=1e-4)


def test_moves_are_drawn_for_each_image_and_stay_within_their_amounts(cat):
    torch.manual_seed(0)
    maps = cat.random_moves(2000, 28, shift=2, turn=0, scale=0, shear=0)
    largest = maps[:, :, 2].abs().amax(dim=0)
    assert largest.max() <= 4 / 28 and largest.min() > 3.9 / 28
    assert len(maps.unique(dim=0)) == 2000
    turned = cat.random_moves(2000, 28, shift=0, turn=0.2, scale=0, shear=0)[:, :, :2]
    eye = torch.eye(2).expand(2000, 2, 2)
    assert torch.allclose(turned @ turned.mT, eye, atol=1e-5)
    angle = torch.atan2(turned[:, 1, 0], turned[:, 0, 0])
    assert angle.abs().max() <= 0.2 and angle.max() > 0.19 and angle.min() < -0.19
    scaled = cat.random_moves(2000, 28, shift=0, turn=0, scale=0.1, shear=0)[:, 0, 0]
    assert scaled.min() >= 0.9 and scaled.max() <= 1.1 and scaled.std() > 0.05


# the network and the objective


def test_the_network_has_the_papers_sizes(cat):
    net, picture, sides = cat.CatVAE(), torch.rand(2, 1, 28, 28), []
    for layer in net.encoder:
        picture = layer(picture)
        sides += [picture.shape[-1]] if isinstance(layer, torch.nn.Conv2d) else []
    assert sides == [23, 18, 9, 1] and picture.shape == (2, 50)
    convolutions = [p for m in net.encoder if isinstance(m, torch.nn.Conv2d) for p in m.parameters()]
    assert sum(p.numel() for p in [*convolutions, *net.head.parameters()]) == 315_223
    back, z = [], torch.rand(2, 60)
    for layer in net.decoder:
        z = layer(z)
        back += [z.shape[-1]] if isinstance(layer, torch.nn.ConvTranspose2d) else []
    assert back == [9, 18, 23, 28] and z.shape == (2, 1, 28, 28)


def test_codes_are_not_negative_and_of_length_1(cat):
    torch.manual_seed(0)
    net, x = cat.CatVAE(width=4), torch.rand(20, 1, 28, 28, generator=generator())
    f, logits = net(x)
    assert f.min() >= 0 and torch.allclose(f.norm(dim=1), torch.ones(20)) and logits.shape == (20, 10)
    x_hat = net.decode(f, logits.softmax(dim=1))
    assert x_hat.shape == x.shape and x_hat.min() >= 0 and x_hat.max() <= 1


def test_lecuns_start_keeps_the_variance_of_a_layer(cat):
    torch.manual_seed(0)
    linear, conv = torch.nn.Linear(400, 300), torch.nn.Conv2d(20, 30, 5)
    up = torch.nn.ConvTranspose2d(30, 20, 4, stride=2)
    cat.lecun(torch.nn.ModuleList([linear, conv, up]))
    for layer, x in (
        (linear, torch.randn(500, 400)),
        (conv, torch.randn(40, 20, 12, 12)),
        (up, torch.randn(40, 30, 12, 12)),
    ):
        y = layer(x)
        y = y[:, :, 4:-4, 4:-4] if layer is up else y
        assert abs(y.var().item() - 1) < 0.1 and layer.bias.abs().max() == 0


@pytest.mark.parametrize("state", ["equal codes", "a zero code"])
def test_gradients_are_finite(cat, state):
    torch.manual_seed(0)
    net, images = cat.CatVAE(width=2), torch.rand(8, 1, 28, 28)
    if state == "equal codes":
        images = images[:1].repeat(8, 1, 1, 1)
    else:
        net.encoder[-3].weight.data.zero_()
        net.encoder[-3].bias.data.fill_(-1.0)
    loss, _ = cat.objective(net, images, images, torch.tensor([0, 1, 2, 3]), **SETTINGS)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


def joined(cat, net, images, seen, given, **changed):
    torch.manual_seed(7)
    return cat.objective(net, images, seen, given, **SETTINGS | changed)


def test_the_objective_is_the_weighted_sum_of_terms_computed_apart(cat):
    torch.manual_seed(0)
    net, images, given = cat.CatVAE(width=2).eval(), torch.rand(9, 1, 28, 28), torch.tensor([3, 1, 4])
    loss, parts = joined(cat, net, images, images, given, weights=(2.0, 3.0, 5.0, 7.0))
    f, logits = net(images)
    torch.manual_seed(7)
    c = cat.gumbel_softmax(logits, cat.gumbel_noise(logits.shape), 1.0)
    a = torch.cat([given, given[torch.cdist(f[3:], f[:3]).argmin(dim=1)]])
    terms = [F.mse_loss(net.decode(f, c), images), cat.category_loss(logits)]
    terms += [cat.assignment_loss(c, a).mean(), cat.feature_loss(torch.cdist(f, f[:3]), a, given, 0.6)]
    assert list(parts) == ["reconstruction", "category", "assignment", "feature"]
    assert torch.allclose(torch.stack(list(parts.values())), torch.stack(terms), atol=1e-6)
    assert torch.allclose(loss, sum(w * t for w, t in zip((2, 3, 5, 7), terms, strict=True)))


def test_noise_and_cross_entropy_are_switches(cat):
    torch.manual_seed(0)
    net, images, given = cat.CatVAE(width=2).eval(), torch.rand(9, 1, 28, 28), torch.tensor([3, 1, 4])
    f, logits = net(images)
    a = torch.cat([given, given[torch.cdist(f[3:], f[:3]).argmin(dim=1)]])
    _, parts = joined(cat, net, images, images, given, noisy=False)
    assert torch.allclose(parts["assignment"], cat.assignment_loss(logits.softmax(1), a).mean())
    _, parts = joined(cat, net, images, images, given, noisy=False, assignment="cross-entropy")
    assert torch.allclose(parts["assignment"], F.cross_entropy(logits, a), atol=1e-5)


def test_labels_are_borrowed_by_the_images_and_not_by_their_moved_pictures(cat):
    torch.manual_seed(0)
    net, given = cat.CatVAE(width=2).eval(), torch.arange(4)
    images = torch.rand(24, 1, 28, 28)
    seen = images.flip(2)
    of_images, of_pictures = (cat.borrow(net, x, given, "nearest") for x in (images, seen))
    assert not torch.equal(of_images, of_pictures)  # else the next line would say nothing
    _, parts = joined(cat, net, images, seen, given, noisy=False)
    P = net(seen)[1].softmax(dim=1)
    assert torch.allclose(parts["assignment"], cat.assignment_loss(P, torch.cat([given, of_images])).mean())
    f, logits = net(seen)
    torch.manual_seed(7)
    c = cat.gumbel_softmax(
        logits, cat.gumbel_noise(logits.shape), 1.0
    )  # the decoder's category keeps its noise
    assert torch.allclose(parts["reconstruction"], F.mse_loss(net.decode(f, c), seen))


def test_the_lending_codes_can_be_held_fixed(cat):
    torch.manual_seed(0)
    net, images = cat.CatVAE(width=2), torch.rand(9, 1, 28, 28)
    only = dict(weights=(0.0, 0.0, 0.0, 1.0))
    values = []
    for moves_them in (True, False):
        net.zero_grad()
        joined(cat, net, images, images, torch.arange(3), **only, lender_gradient=moves_them)[0].backward()
        values.append(net.encoder[0].weight.grad.clone())
    assert not torch.allclose(*values)


@pytest.mark.parametrize("moves, lends, learns", [("none", 0, 0), ("affine", 0, 1), ("same", 1, 1)])
def test_which_pictures_borrow_and_which_are_learned_from(cat, moves, lends, learns):
    torch.manual_seed(0)
    images = torch.rand(6, 1, 28, 28)
    borrowers, seen = cat.pictures(images, 2, moves)
    assert torch.equal(borrowers, images) == (not lends) and torch.equal(seen, images) == (not learns)
    assert (borrowers is seen) == (lends == learns)


def test_the_labelled_images_alone_can_be_moved(cat):
    torch.manual_seed(0)
    images = torch.rand(6, 1, 28, 28)
    borrowers, seen = cat.pictures(images, 2, "labelled")
    assert borrowers is seen and torch.equal(seen[2:], images[2:]) and not torch.equal(seen[:2], images[:2])


# training


def small(n=60, seed=0):
    """Images of three kinds, bars at three heights with noise, and their labels."""
    y = torch.arange(n) % 3
    x = 60 * torch.rand(n, 1, 28, 28, generator=generator(seed))
    for kind in range(3):
        x[y == kind, :, 4 + 8 * kind : 8 + 8 * kind] += 180
    return x.to(torch.uint8), y


def trained(cat, seed=0, moves="none", epochs=6, **changed):
    x, y = small()
    training.seed_everything(seed)
    net = cat.CatVAE(3, 8, 2)
    how = dict(epochs=epochs, batch_size=24, lr=0.01, seed=seed, precision="float32", schedule="cosine")
    how |= dict(moves=moves, n_looks=2, temperatures=(1.0, 1.0)) | changed
    settings = {name: value for name, value in SETTINGS.items() if name != "temperature"}
    loops = [
        loop.number
        for loop in cat.train(net, x, torch.arange(6), y[:6], torch.arange(6, 60), settings, **how)
    ]
    return net, loops


@pytest.mark.parametrize("moves", ["none", "affine"])
def test_training_finds_three_kinds_that_six_labels_name(cat, moves):
    net, loops = trained(cat, moves=moves, epochs=40)
    x, y = small(seed=5)
    assert cat.error(cat.predict(net, x)[1].argmax(dim=1), y) < 0.05
    assert loops == [0, 60, 120]


def test_training_is_repeatable_and_follows_its_seed(cat):
    first, again, other = (trained(cat, seed)[0].head[0].weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.allclose(first, other)


@pytest.mark.parametrize(
    "changed",
    [{"schedule": "halved"}, {"temperatures": (1.0, 0.2)}]
    + [{"moves": moves} for moves in ("affine", "same", "labelled")],
)
def test_a_run_follows_its_schedule_its_moves_and_its_temperatures(cat, changed):
    plain, other = trained(cat)[0], trained(cat, **changed)[0]
    assert not torch.allclose(plain.head[0].weight, other.head[0].weight)


def test_the_temperature_falls_exponentially(cat):
    assert [cat.temperature_at(p, 1.0, 0.25) for p in (0, 0.5, 1)] == [1.0, 0.5, 0.25]
    assert cat.temperature_at(0.3, 1.0, 1.0) == 1.0


def test_too_many_looks_are_refused(cat):
    with pytest.raises(ValueError, match="n_looks must be at most the number of steps, 18, got 19"):
        trained(cat, n_looks=19)


def test_the_rate_falls_to_zero_or_is_halved_every_fifty_epochs(cat):
    def rates(schedule, n_steps, epochs):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        rate, seen = cat.falling_rate(optimizer, schedule, n_steps, epochs), []
        for _ in range(n_steps):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            rate.step()
        return seen

    cosine = rates("cosine", 100, 10)
    assert math.isclose(cosine[50], 0.5) and cosine[-1] < 0.001
    halved = rates("halved", 240, 120)  # two steps an epoch
    assert [halved[0], halved[99], halved[100], halved[199], halved[200]] == [1.0, 1.0, 0.5, 0.5, 0.25]


def test_a_batch_holds_all_labelled_images_or_a_part_when_all_have_labels(cat):
    picked, others = torch.tensor([7, 8, 9]), torch.tensor([3, 4, 5, 6])
    labelled, unlabelled = cat.batch_of(torch.tensor([2, 0]), picked, others)
    assert labelled.tolist() == [0, 1, 2] and unlabelled.tolist() == [5, 3]
    labelled, unlabelled = cat.batch_of(torch.tensor([2, 0]), picked, others[:0])
    assert labelled.tolist() == [2, 0] and len(unlabelled) == 0
    settings = dict(epochs=1, seed=0)
    assert len(cat.loop_over(picked, torch.arange(100), 10, **settings)) == 10
    assert len(cat.loop_over(torch.arange(100), others[:0], 10, **settings)) == 5


def test_with_all_labels_nothing_is_borrowed(cat):
    x, y = small()
    training.seed_everything(0)
    net = cat.CatVAE(3, 8, 2)
    how = dict(
        epochs=30, batch_size=10, lr=0.01, seed=0, precision="float32", schedule="cosine", moves="none"
    )
    everything = torch.arange(60)
    settings = {name: value for name, value in SETTINGS.items() if name != "temperature"}
    how |= dict(temperatures=(1.0, 1.0), n_looks=1)
    loops = list(cat.train(net, x, everything, y, everything[:0], settings, **how))
    assert loops[-1].number == 90
    assert cat.error(cat.predict(net, x)[1].argmax(dim=1), y) < 0.05


def test_with_all_labels_moved_copies_cost_no_second_pass(cat, monkeypatch):
    torch.manual_seed(0)
    net, (x, y) = cat.CatVAE(3, 8, 2), small(9)
    images = cat.prepared(x)
    monkeypatch.setattr(cat, "borrow", None)  # calling it would fail
    loss, _ = cat.objective(net, images, images.roll(1, dims=3), y, **SETTINGS)
    assert loss.isfinite()


def neighbour(cat, moves, others=54, iterations=20):
    x, y = small()
    training.seed_everything(0)
    net = cat.CatVAE(3, 8, 2)
    how = dict(iterations=iterations, batch_size=24, lr=0.01, seed=0, precision="float32", moves=moves)
    cat.train_neighbour(net, x, torch.arange(6), y[:6], torch.arange(6, 6 + others), **how)
    return net


@pytest.mark.parametrize("others", [0, 54])
def test_the_neighbours_see_moved_copies_when_the_method_does(cat, others):
    weights = [neighbour(cat, moves, others).head[0].weight for moves in ("none", "affine")]
    assert not torch.allclose(*weights)


@pytest.mark.parametrize("run", [lambda cat: neighbour(cat, "none"), trained], ids=["neighbour", "method"])
def test_the_rate_has_fallen_to_zero_at_the_end_of_a_run(cat, monkeypatch, run):
    kept, falling_rate = [], cat.falling_rate
    monkeypatch.setattr(cat, "falling_rate", lambda *given: kept.append(falling_rate(*given)) or kept[-1])
    run(cat)
    assert kept[0].get_last_lr() == [pytest.approx(0, abs=1e-9)]


@pytest.mark.parametrize("others", [0, 54])
@pytest.mark.parametrize("moves", ["none", "affine"])
def test_the_neighbours_learn_the_labelled_images(cat, others, moves):
    (x, y), net = small(), neighbour(cat, moves, others, iterations=80)
    assert cat.error(cat.predict(net, x[:6])[1].argmax(dim=1), y[:6]) == 0
    if others:
        logits = cat.predict(net, x[6:])[1]
        assert cat.error(logits.argmax(dim=1), y[6:]) < 0.1


def test_prediction_has_no_noise_and_leaves_the_model_as_it_was(cat):
    torch.manual_seed(0)
    net, x = cat.CatVAE(width=2), small()[0]
    before = copy.deepcopy(net.state_dict())
    first, again = cat.predict(net, x)[1], cat.predict(net, x, batch_size=7)[1]
    assert torch.allclose(first, again, atol=1e-5) and net.training
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_fresh_statistics_are_those_of_the_images_and_the_model_keeps_its_own(cat):
    torch.manual_seed(0)
    net, x = cat.CatVAE(width=2), small(500)[0]
    before = net.encoder[1].running_mean.clone()
    copied = cat.with_statistics_of(net, x)
    own = net.encoder[0](cat.prepared(x)).mean(dim=(0, 2, 3))
    assert torch.allclose(copied.encoder[1].running_mean, own, atol=1e-4)
    assert torch.equal(net.encoder[1].running_mean, before)


def test_the_signals_of_a_look_are_what_they_say(cat):
    torch.manual_seed(0)
    net, (x, y) = cat.CatVAE(3, 8, 2), small()
    row, borrowed = cat.look(net, x[6:], x[:6], y[:6], "float32", "nearest")
    (f, logits), (lenders, _) = cat.predict(net, x[6:]), cat.predict(net, x[:6])
    nearest = y[:6][torch.cdist(f, lenders).argmin(dim=1)]
    assert torch.equal(borrowed, nearest) and "kept" not in row
    assert math.isclose(row["agree"], (logits.argmax(dim=1) == nearest).float().mean().item(), abs_tol=1e-6)
    apart = [torch.cdist(f[i : i + 1], lenders[y[:6] == nearest[i]]).mean() / 2**0.5 for i in range(54)]
    assert math.isclose(row["apart"], torch.stack(apart).mean().item(), abs_tol=1e-5)
    again, _ = cat.look(net, x[6:], x[:6], y[:6], "float32", "nearest", (borrowed + 1) % 3)
    assert again["kept"] == 0
    assert cat.look(net, x[6:], x[:6], y[:6], "float32", "network")[0]["agree"] == 1
    fresh = cat.predict(cat.with_statistics_of(net, x[6:]), x[6:])[1].argmax(dim=1)
    assert math.isclose(row["swayed"], cat.error(fresh, logits.argmax(dim=1)), abs_tol=1e-6)


def test_readers_score_what_they_say(cat):
    x, y = small(150)
    training.seed_everything(0)
    net = cat.CatVAE(3, 8, 2)
    how = dict(labelled=torch.arange(6), some=torch.arange(10, 60), precision="float32")
    scores, f, logits = cat.read(net, x=x, y=y, x_test=x[60:], y_test=y[60:], **how)
    codes_of = cat.predict(net, x)[0]
    assert torch.allclose(f, codes_of[60:], atol=1e-5)
    assert math.isclose(scores["error"], cat.error(logits.argmax(dim=1), y[60:]))
    for key, features in (("nearest_error", codes_of), ("pixel_error", x.flatten(1) / 255)):
        known = KNeighborsClassifier(1, algorithm="brute").fit(features[:6].numpy(), y[:6].numpy())
        expected = 1 - known.score(features[60:].numpy(), y[60:].numpy())
        assert math.isclose(scores[key], expected, abs_tol=1e-6)
    wrong = torch.cat([y[:10], (y[10:60] + 1) % 3, y[60:]])  # which labels each linear reader was fitted on
    other, _, _ = cat.read(net, x=x, y=wrong, x_test=x[60:], y_test=y[60:], **how)
    assert other["linear_error"] == scores["linear_error"]
    assert other["probe_error"] > 0.9 > 0.1 > scores["probe_error"]
