"""The chapter `semicatvae`: its definitions against brute force, closed forms and scikit-learn."""

import copy
import functools
import math

import golden
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loader import definitions
from scipy.ndimage import affine_transform
from scipy.stats import chisquare, kstest
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.metrics import pairwise_distances
from sklearn.neighbors import KNeighborsClassifier

from deepclust_nb import data, training

CHAPTER = "semicatvae"
checked = functools.partial(golden.checked, CHAPTER, tiny=True)
SETTINGS = dict(weights=(1.0, 1.0, 5.0, 1.0), alpha=0.6, temperature=1.0, noisy=True, assignment="bounded")
SETTINGS |= dict(assigner="nearest", lender_gradient=True)
# With few features or a fast rate codes become equal up to rounding, and the processor chooses who lends.
TINY = dict(width=2, n_features=40, epochs=3, batch_size=15, lr=0.0005, n_labels=6, n_map=100, n_looks=3)
PRINTED = dict(moves="none", schedule="halved")


def untied(cdist):
    """`torch.cdist`, but it refuses an image with two equally near lenders."""

    def spy(*given, **more):
        apart = cdist(*given, **more)
        assert apart.detach().sort(dim=1).values.diff(dim=1).min() > 1e-9, "a tie: choose other parameters"
        return apart

    return spy


def case(n_train=48, n_test=40, **parameters):
    """A function to the numbers of one run, the looks' among them: a record keeps those of seed 0 alone."""

    def summary():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "cdist", untied(torch.cdist))
            namespace, seen = golden.run(CHAPTER, golden.digits(n_train, n_test), **parameters)
        return golden.summary(namespace, seen) | {"trace": golden.plain(namespace["trace"])}

    return summary


GOLDEN = {
    "defaults": lambda: golden.plain(checked()),
    "moved copies": case(n_test=130, **TINY, with_self_training=True),
    "as printed": case(
        **TINY
        | PRINTED
        | dict(seed=1, draw=0, alpha=0.3, last_temperature=0.5, profile="laptop")
        | dict(w_reconstruction=4.0, w_category=2.0, w_assignment=3.0, w_feature=0.5)
    ),
    "the same copies borrow, from five": case(
        **TINY | dict(moves="same", assigner="five", noisy=False, temperature=1.5, n_images=40, seed=3)
    ),
    "labelled copies, class means, no gradient through lenders": case(
        **TINY
        | dict(moves="labelled", assigner="means", lender_gradient=False, draw=7)
        | dict(with_self_training=True)
    ),
    "the network's own answers in a cross-entropy": case(
        **TINY
        | dict(moves="none", assigner="network", assignment="cross-entropy", n_looks=5)
        | dict(with_self_training=True, dataset="fashion_5k", seed=2)
    ),
    "moved copies, clean cross-entropy, class means": case(
        **TINY | dict(assigner="means", assignment="cross-entropy", noisy=False, lender_gradient=False)
    ),
    "all labels": case(**TINY | dict(n_labels=0, seed=4, temperature=2.0, last_temperature=0.5)),
    "all labels, as printed": case(**TINY | PRINTED | dict(n_labels=0, with_self_training=True)),
}


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


def test_the_noise_follows_its_generator_and_else_torchs(cat):
    first, again = (cat.gumbel_noise((2, 3), generator=generator(4)) for _ in range(2))
    torch.manual_seed(4)
    assert torch.equal(first, again) and torch.equal(first, cat.gumbel_noise((2, 3)))


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
def test_summed_over_all_categories_equation_16_does_not_know_the_label_and_alone_it_does(cat, k):
    P = probabilities(20, k, concentration=2.0)
    each = torch.stack([cat.assignment_loss(P, torch.full((20,), c)) for c in range(k)], dim=1)
    s = 1 + torch.tanh(P.log())
    assert torch.allclose(each.sum(dim=1), (k + (k - 2) * s.sum(dim=1)) / 2)
    assert torch.equal(each.argsort(dim=1), P.argsort(dim=1, descending=True))


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


def test_moves_are_five_independent_uniform_numbers(cat):
    torch.manual_seed(0)
    maps = cat.random_moves(4000, 20, shift=3.0, turn=0.2, scale=0.1, shear=0.3).double()
    assert torch.allclose(maps[:, 0, 0], maps[:, 1, 1])
    size, angle = maps[:, 1, :2].norm(dim=1), torch.atan2(maps[:, 1, 0], maps[:, 1, 1])
    shear = maps[:, 0, 1] + size * angle.sin()
    pixels = maps[:, :, 2] * 20 / 2
    found = torch.stack([(size - 1) / 0.1, angle / 0.2, shear / 0.3, pixels[:, 0] / 3, pixels[:, 1] / 3])
    assert all(kstest(row.numpy(), "uniform", (-1, 2)).pvalue > 1e-3 for row in found)
    assert (torch.corrcoef(found) - torch.eye(5)).abs().max() < 0.06


def test_the_usual_moves_are_two_pixels_and_a_fifth_of_a_turn_a_tenth_of_size_a_fifth_of_shear(cat):
    found = []
    for given in ({}, dict(shift=2.0, turn=0.2, scale=0.1, shear=0.2)):
        torch.manual_seed(0)
        found.append(cat.random_moves(9, 28, **given))
    assert torch.equal(*found)


def test_a_moved_picture_is_scipys(cat):
    images = torch.rand(3, 1, 28, 28, generator=generator()).double()
    torch.manual_seed(0)
    maps = cat.random_moves(3, 28, shift=4.0, turn=0.5, scale=0.2, shear=0.3).double()
    for image, found, move in zip(images, cat.moved(images, maps), maps.numpy(), strict=True):
        matrix, middle = move[::-1, 1::-1], np.array([13.5, 13.5])  # rows first
        offset = middle + 14 * move[::-1, 2] - matrix @ middle
        kept = dict(order=1, mode="grid-constant", cval=0.0)
        assert np.allclose(found[0], affine_transform(image[0].numpy(), matrix, offset, **kept), atol=1e-6)


# the network and the objective


def test_the_first_weights_are_normal_with_variance_one_over_the_inputs(cat):
    torch.manual_seed(0)
    net = cat.CatVAE(width=16)
    inputs = [36, 16 * 36, 32 * 16, 64 * 81] + [50, 50, 25] + [60, 50 * 81, 64 * 16 / 4, 32 * 36, 16 * 36]
    kinds = torch.nn.Conv2d | torch.nn.ConvTranspose2d | torch.nn.Linear
    layers = [layer for layer in net.modules() if isinstance(layer, kinds)]
    for layer, n in zip(layers, inputs, strict=True):
        w = layer.weight.detach().double().ravel() * n**0.5
        assert abs(w.var() - 1) < 5 * (2 / len(w)) ** 0.5 and layer.bias.abs().max() == 0
        assert kstest(w.numpy(), "norm").pvalue > 1e-4
    for norm in (layer for layer in net.modules() if isinstance(layer, torch.nn.BatchNorm2d)):
        assert (norm.weight == 1).all() and (norm.bias == 0).all()
        assert (norm.eps, norm.momentum) == (1e-5, 0.1)


def test_a_new_model_is_that_of_its_seed_with_channels_last(cat):
    for seed in (0, 5):
        net = cat.new_model(seed, "cpu", width=2, n_features=8)
        after = torch.rand(3)
        training.seed_everything(seed)
        expected = cat.CatVAE(width=2, n_features=8).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in net.state_dict().items())
        assert torch.equal(after, torch.rand(3))
        assert net.encoder[3].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_code_of_zeros_stays_zero_and_the_shortest_others_have_length_1(cat):
    net = cat.CatVAE(width=1, n_features=4)
    kept = torch.tensor([[0.0] * 4, [3e-8, 0, 0, 0], [2.0, 0, 0, 1.0]])
    net.encoder = torch.nn.Identity()
    f, _ = net(kept)
    assert torch.allclose(f, torch.tensor([[0.0] * 4, [1.0, 0, 0, 0], [0.8**0.5, 0, 0, 0.2**0.5]]))


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
    expected = sum(w * t for w, t in zip((2, 3, 5, 7), terms, strict=True))
    assert torch.allclose(loss, expected)
    weights = [p for p in net.parameters() if p.requires_grad]
    slopes = (torch.autograd.grad(value, weights) for value in (loss, expected))
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(*slopes, strict=True))


def test_gradients_reach_the_codes_from_the_head_and_from_the_picture_and_the_category_too(cat):
    torch.manual_seed(0)
    net, f = cat.CatVAE(width=2), torch.rand(5, 50, requires_grad=True)
    c = torch.rand(5, 10).softmax(dim=1).requires_grad_()
    slopes = torch.autograd.grad(net.decode(f, c).square().sum(), (f, c))
    slopes += torch.autograd.grad(net(torch.rand(5, 1, 28, 28))[1].square().sum(), net.encoder[0].weight)
    assert all(slope.abs().max() > 1e-4 for slope in slopes)


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


@pytest.mark.parametrize("moves_them", [True, False])
def test_the_lending_codes_can_be_held_fixed(cat, moves_them):
    torch.manual_seed(0)
    net, images, given = cat.CatVAE(width=2), torch.rand(9, 1, 28, 28), torch.arange(3)
    loss, _ = joined(cat, net, images, images, given, weights=(0, 0, 0, 1.0), lender_gradient=moves_them)
    f, _ = net(images)
    apart = torch.stack([(row - (f[:3] if moves_them else f[:3].detach())).norm(dim=1) for row in f[3:]])
    expected = 0.4 * apart.amin(dim=1).mean() / 2**0.5
    found, expected = (torch.autograd.grad(value, net.encoder[0].weight)[0] for value in (loss, expected))
    assert found.abs().max() > 1e-4 and torch.allclose(found, expected, rtol=1e-4, atol=1e-7)


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


FIRST, REST = torch.arange(6), torch.arange(6, 60)


def trained(cat, seed=0, moves="none", epochs=6, picked=FIRST, others=REST, **changed):
    x, y = small()
    training.seed_everything(seed)
    net = cat.CatVAE(3, 8, 2)
    how = dict(epochs=epochs, batch_size=24, lr=0.01, seed=seed, precision="float32", schedule="cosine")
    how |= dict(moves=moves, n_looks=2, temperatures=(1.0, 1.0)) | changed
    settings = {name: value for name, value in SETTINGS.items() if name != "temperature"}
    loops = [loop.number for loop in cat.train(net, x, picked, y[picked], others, settings, **how)]
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


def require_plain_adam(optimizer, model, lr):
    assert type(optimizer) is torch.optim.Adam and len(optimizer.param_groups) == 1
    (group,) = optimizer.param_groups
    expected = torch.optim.Adam(model.parameters(), lr=lr, fused=True).param_groups[0]
    assert {id(p) for p in group["params"]} == {id(p) for p in expected.pop("params")}
    assert (expected | {"lr": group["lr"]}).items() <= group.items() and group["initial_lr"] == lr


def run_of(cat, monkeypatch, run):
    """What a training loop gave `objective` and its rates, with a loss in its place that costs nothing."""
    steps, update = [], training.Steps.update

    def cheap(model, images, seen, given, **settings):
        steps.append(settings | {"images": images.clone(), "seen": seen.clone(), "given": given})
        steps[-1] |= {"is": seen is images, "model": model}
        loss = model.head[0].bias.square().sum()
        return loss, {"all": loss}

    def noted(loop, optimizer, *rest):
        require_plain_adam(optimizer, steps[-1]["model"], 0.01)
        steps[-1]["lr"] = optimizer.param_groups[0]["lr"]
        update(loop, optimizer, *rest)

    monkeypatch.setattr(cat, "objective", cheap)
    monkeypatch.setattr(training.Steps, "update", noted)
    _, loops = run()
    return steps, loops


@pytest.mark.parametrize("schedule", ["cosine", "halved"])
def test_rate_and_temperature_of_each_step_are_those_of_the_text(cat, monkeypatch, schedule):
    how = dict(epochs=120, batch_size=27, schedule=schedule, temperatures=(2.0, 0.5))
    steps, _ = run_of(cat, monkeypatch, lambda: trained(cat, **how))
    hand = [0.005 + 0.005 * math.cos(math.pi * t / 240) for t in range(240)]
    if schedule == "halved":
        hand = [0.01 * 0.5 ** (t // 100) for t in range(240)]
    assert [step["lr"] for step in steps] == pytest.approx(hand, abs=1e-9)
    warm = [2 * 0.25 ** (t / 240) for t in range(240)]
    assert [step["temperature"] for step in steps] == pytest.approx(warm)


@pytest.mark.parametrize("n_labels, sizes", [(6, [30, 30, 12]), (60, [48, 12])])
def test_each_step_has_all_labelled_images_first_and_each_epoch_every_other_once(
    cat, monkeypatch, n_labels, sizes
):
    x, y = small()
    shuffled = torch.randperm(60, generator=generator(1))
    picked, others = shuffled[:n_labels], shuffled[n_labels:]
    steps, _ = run_of(cat, monkeypatch, lambda: trained(cat, 3, epochs=4, picked=picked, others=others))
    assert [len(step["images"]) for step in steps] == 4 * sizes
    order = []
    for step in steps:
        apart = torch.cdist(step["images"].flatten(1), cat.prepared(x).flatten(1))
        which = apart.argmin(dim=1)
        assert apart.amin() == 0 and torch.equal(step["given"], y[which[: len(step["given"])]])
        assert n_labels == 60 or torch.equal(which[:6], picked)
        order += which[6 if n_labels == 6 else 0 :].tolist()
        assert {name: step[name] for name in SETTINGS} == SETTINGS
    pool = others if n_labels == 6 else picked
    rounds = [order[i : i + len(pool)] for i in range(0, len(order), len(pool))]
    assert all(sorted(one) == sorted(pool.tolist()) for one in rounds)
    assert len(set(map(tuple, rounds))) == 4
    assert rounds[0] == pool[torch.randperm(len(pool), generator=generator(3))].tolist()


@pytest.mark.parametrize("moves", ["none", "affine", "same", "labelled"])
def test_each_step_draws_its_moves_anew(cat, monkeypatch, moves):
    steps, _ = run_of(cat, monkeypatch, lambda: trained(cat, moves=moves))
    assert all(step["is"] == (moves != "affine") for step in steps)
    pixels = cat.prepared(small()[0])
    stays = (torch.equal(step["seen"][:6], pixels[:6]) for step in steps)
    assert set(stays) == {moves == "none"}
    if moves != "none":
        assert not torch.equal(steps[0]["seen"][:6], steps[1]["seen"][:6])
        assert not torch.equal(steps[0]["seen"][0], steps[0]["seen"][3])


@pytest.mark.parametrize("n_looks, expected", [(1, [0, 7]), (3, [0, 2, 4, 7]), (4, [0, 1, 3, 5, 7])])
def test_looks_are_evenly_spaced_and_the_last_is_after_the_last_step(cat, monkeypatch, n_looks, expected):
    how = dict(epochs=7, batch_size=54, n_looks=n_looks)
    assert run_of(cat, monkeypatch, lambda: trained(cat, **how))[1] == expected


def test_the_temperature_falls_exponentially(cat):
    assert [cat.temperature_at(p, 1.0, 0.25) for p in (0, 0.5, 1)] == [1.0, 0.5, 0.25]
    assert cat.temperature_at(0.3, 1.0, 1.0) == 1.0


def test_too_many_looks_are_refused(cat, monkeypatch):
    run_of(cat, monkeypatch, lambda: trained(cat, n_looks=18))
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

    hand = [0.5 + 0.5 * math.cos(math.pi * t / 100) for t in range(100)]
    assert rates("cosine", 100, 10) == pytest.approx(hand)
    assert rates("halved", 240, 120) == 100 * [1.0] + 100 * [0.5] + 40 * [0.25]  # two steps an epoch
    assert rates("halved", 10, 60) == 9 * [1.0] + [0.5]  # fifty epochs are eight steps and a third


def test_a_batch_holds_all_labelled_images_or_a_part_when_all_have_labels(cat):
    picked, others = torch.tensor([7, 8, 9]), torch.tensor([3, 4, 5, 6])
    labelled, unlabelled = cat.batch_of(torch.tensor([2, 0]), picked, others)
    assert labelled.tolist() == [0, 1, 2] and unlabelled.tolist() == [5, 3]
    labelled, unlabelled = cat.batch_of(torch.tensor([2, 0]), picked, others[:0])
    assert labelled.tolist() == [2, 0] and len(unlabelled) == 0
    settings = dict(epochs=1, seed=0)
    assert len(cat.loop_over(picked, torch.arange(100), 10, **settings)) == 10
    assert len(cat.loop_over(torch.arange(100), others[:0], 10, **settings)) == 5


def test_one_image_that_is_left_over_is_a_batch_only_beside_labelled_ones(cat):
    """Batch normalisation in training cannot take one alone."""
    many, few, settings = torch.arange(21), torch.arange(3), dict(epochs=2, seed=0)
    beside = [len(step.index) for step in cat.loop_over(few, many, 10, **settings)]
    alone = [len(step.index) for step in cat.loop_over(many, few[:0], 5, **settings)]
    assert beside == 2 * [10, 10, 1] and alone == 2 * [10, 11]


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


class Linear(torch.nn.Module):
    """A network whose answers depend on each picture alone."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(784, 3)

    def forward(self, x):
        return None, self.layer(x.flatten(1))


@pytest.mark.parametrize("others", [0, 54])
@pytest.mark.parametrize("moves", ["none", "affine", "same", "labelled"])
def test_the_terms_and_rates_of_the_neighbours_are_those_of_their_docstring(cat, monkeypatch, others, moves):
    x, y = small()
    net, rows, pairs = Linear(), [], []
    update, pictures = training.Steps.update, cat.pictures

    def drawn(images, n_labelled, moves):
        pairs.append((images, *pictures(images, n_labelled, moves)))
        assert n_labelled == 6
        return pairs[-1][1:]

    def noted(loop, optimizer, loss, terms):
        images, guessers, seen = pairs[-1]
        labelled = torch.arange(6) if others else loop.index
        assert torch.equal(images[:6], cat.prepared(x[labelled]))
        assert len(images) == 6 + len(loop.index) * bool(others)
        assert torch.equal(guessers, images) == (moves in ("none", "affine"))
        assert torch.equal(seen, images) == (moves == "none")
        answers = net(seen)[1]
        expected = {"labelled": F.cross_entropy(answers[:6], y[labelled])}
        if others:
            guess = net(guessers)[1].argmax(dim=1)[6:]
            expected["guessed"] = min(1, 2 * loop.number / 20) * F.cross_entropy(answers[6:], guess)
        assert terms.keys() == expected.keys()
        assert all(torch.allclose(terms[name], expected[name]) for name in expected)
        losses = (loss, sum(expected.values()))
        slopes = [torch.autograd.grad(value, net.layer.weight, retain_graph=True)[0] for value in losses]
        assert torch.allclose(*losses) and torch.allclose(*slopes, atol=1e-7)
        require_plain_adam(optimizer, net, 0.01)
        rows.append(optimizer.param_groups[0]["lr"])
        update(loop, optimizer, loss, terms)

    monkeypatch.setattr(cat, "pictures", drawn)
    monkeypatch.setattr(training.Steps, "update", noted)
    how = dict(iterations=20, batch_size=24, lr=0.01, seed=0, precision="float32", moves=moves)
    cat.train_neighbour(net, x, torch.arange(6), y[:6], torch.arange(6, 6 + others), **how)
    assert rows == pytest.approx([0.005 + 0.005 * math.cos(math.pi * t / 20) for t in range(20)])


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


def test_fresh_statistics_are_a_plain_mean_over_batches_and_forget_the_old_ones(cat):
    torch.manual_seed(0)
    net, x = cat.CatVAE(width=2), small(1000)[0]
    x[500:] = x[500:] // 3
    net.encoder[1].running_mean += 100
    net.encoder[1].momentum = 0.3
    copied = cat.with_statistics_of(net, x).encoder[1]
    halves = [net.encoder[0](cat.prepared(part)).transpose(0, 1).flatten(1) for part in x.split(500)]
    mean, var = ([getattr(half, name)(dim=1) for half in halves] for name in ("mean", "var"))
    assert torch.allclose(copied.running_mean, (mean[0] + mean[1]) / 2, atol=1e-4)
    assert torch.allclose(copied.running_var, (var[0] + var[1]) / 2, atol=1e-4)
    assert copied.momentum == 0.3 and not torch.allclose(*mean, rtol=0.1)


@pytest.mark.parametrize("n", [502, 520, 1041])
def test_fresh_statistics_weigh_every_image_alike(cat, n):
    """A few images that are left over by batches of 500 count no more than the others."""
    torch.manual_seed(0)
    net, x = cat.CatVAE(width=2), small(n)[0]
    x[500:] = 255 - x[500:]
    given = net.encoder[0](cat.prepared(x)).transpose(0, 1).flatten(1)
    own = cat.with_statistics_of(net, x).encoder[1].running_mean
    assert torch.allclose(own, given.mean(dim=1), atol=1e-4)


def test_a_single_image_that_is_left_over_is_no_batch_of_its_own(cat):
    """Batch normalisation in training refuses one."""
    copied = cat.with_statistics_of(cat.CatVAE(width=2), small(501)[0])
    assert int(copied.encoder[1].num_batches_tracked) == 2


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
    half = torch.where(torch.arange(54) < 18, borrowed, (borrowed + 1) % 3)
    assert cat.look(net, x[6:], x[:6], y[:6], "float32", "nearest", half)[0]["kept"] == pytest.approx(1 / 3)
    assert row["sure"] == cat.category_loss(logits).item() and net.training
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
    fresh = cat.with_statistics_of(net, x[10:60])
    assert scores["fresh_error"] == cat.error(cat.predict(fresh, x[60:])[1].argmax(dim=1), y[60:])
    wrong = torch.cat([y[:10], (y[10:60] + 1) % 3, y[60:]])  # which labels each linear reader was fitted on
    other, _, _ = cat.read(net, x=x, y=wrong, x_test=x[60:], y_test=y[60:], **how)
    assert other["linear_error"] == scores["linear_error"]
    assert other["probe_error"] > 0.9 > 0.1 > scores["probe_error"]


def test_each_reader_gets_its_own_images_and_none_the_test_images_to_learn_from(cat, monkeypatch):
    x, y = small(150)
    net, probes, averaged, fresh = cat.new_model(0, "cpu", n_clusters=3, n_features=8, width=2), [], [], []

    def statistics(model, images):
        averaged.append(images)
        fresh.append(cat.new_model(1, "cpu", n_clusters=3, n_features=8, width=2))
        return fresh[0]

    monkeypatch.setattr(cat, "with_statistics_of", statistics)
    monkeypatch.setattr(cat, "linear_error", lambda *given: probes.append(given) or len(probes) / 10)
    parts = dict(labelled=torch.arange(6), some=torch.arange(10, 60), precision="float32")
    scores, f, logits = cat.read(net, x=x, y=y, x_test=x[60:], y_test=y[60:], **parts)
    codes_of = cat.predict(net, x)[0]
    assert len(averaged) == 1 and torch.equal(averaged[0], x[10:60])
    assert scores["fresh_error"] == cat.error(cat.predict(fresh[0], x[60:])[1].argmax(dim=1), y[60:])
    assert scores["fresh_error"] != scores["error"]
    assert (scores["linear_error"], scores["probe_error"]) == (0.1, 0.2)
    for given, part in zip(probes, (slice(6), slice(10, 60)), strict=True):
        expected = (codes_of[part], y[part], codes_of[60:], y[60:])
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(given, expected, strict=True))


def test_what_is_told_is_the_last_look_without_its_error_and_a_map_of_the_first_codes(cat, monkeypatch):
    columns = ["step", "error", "borrowed wrong", "sure", "agree", "apart", "category", "assignment"]
    later = {name: 0.01 * (i + 1) for i, name in enumerate(columns)} | {"step": 500, "kept": 0.7}
    first = {"step": 0, "sure": 0.3, "agree": 0.2, "apart": 0.6, "error": 0.001, "borrowed wrong": 0.4}
    maps, f = [], torch.rand(9, 5, generator=generator())

    def fit_transform(map_, given):
        maps.append((map_, given))
        return given[:, :3] * 7

    monkeypatch.setattr(TSNE, "fit_transform", fit_transform)
    kept = cat.told([first, later], f, torch.arange(9), 6)
    arrays = kept.pop("arrays")
    expected = {name.replace(" ", "_"): value for name, value in later.items() if name != "error"}
    assert kept == expected
    rows = [[0.0, 0.001, 0.4, 0.3, 0.2, 0.6, 1.0, 1.0], [0.5, *(0.01 * i for i in range(2, 9))]]
    assert torch.allclose(arrays["curve"], torch.tensor(rows).float())
    ((map_, given),) = maps
    assert np.array_equal(given, f[:6]) and arrays["labels"].tolist() == list(range(6))
    assert (map_.n_components, map_.init, map_.random_state) == (3, "pca", 0)
    points = f[:6, :3].numpy()
    assert np.allclose(arrays["map"], points / points.std(), atol=1e-5)


# the whole chapter


class EnoughSeen(Exception):
    pass


def asked_for(monkeypatch, **parameters):
    """What a run gives `data.labelled_subset`, which is where it ends."""

    def labelled_subset(*given):
        asked.append(given)
        raise EnoughSeen

    asked = []
    monkeypatch.setattr(data, "labelled_subset", labelled_subset)
    with pytest.raises(EnoughSeen):
        golden.run(CHAPTER, **TINY | parameters)
    return asked[0]


@pytest.mark.parametrize("seed, draw, expected", [(3, -1, 3), (3, 0, 0), (0, 5, 5), (2, 2, 2)])
def test_the_draw_of_labels_follows_the_seed_or_its_own(monkeypatch, seed, draw, expected):
    assert asked_for(monkeypatch, seed=seed, draw=draw)[1:] == (6, expected)


@pytest.mark.parametrize("n_images, n", [(0, 48), (40, 40)])
def test_training_images_come_in_one_order_whatever_the_seed_and_a_part_is_its_start(
    monkeypatch, n_images, n
):
    order = torch.randperm(48, generator=generator(0))
    for seed in (0, 4):
        y, _, _ = asked_for(monkeypatch, n_images=n_images, seed=seed)
        assert torch.equal(y, golden.digits()("mnist_5k", "train").y[order[:n]])


def test_a_class_without_a_label_stops_the_chapter():
    y = golden.digits()("mnist_5k", "train").y
    y = y[torch.randperm(48, generator=generator(0))]
    with pytest.raises(ValueError, match="every class needs a labelled image, class 1 has none"):
        golden.run(CHAPTER, picked=(y != 1).nonzero()[:6, 0], **TINY)


LIMITS = dict(seed=(0, 2**31 - 1), draw=(-1, 2**31 - 1), n_images=(0, 60_000), n_labels=(0, 60_000))
LIMITS |= dict(
    width=(1, 256), n_features=(4, 4096), epochs=(1, 10_000), batch_size=(2, 10_000), lr=(1e-6, 1.0)
)
LIMITS |= dict(temperature=(0.05, 20.0), last_temperature=(0.05, 20.0), alpha=(0.0, 1.0), n_looks=(1, 100))
LIMITS |= dict(w_reconstruction=(0.0, 1e4), w_category=(0.0, 100.0), w_assignment=(0.0, 100.0))
LIMITS |= dict(w_feature=(0.0, 100.0), n_map=(100, 2000))
CHOICES = dict(profile="quick laptop paper", dataset="mnist_5k fashion_5k mnist fashion")
CHOICES |= dict(
    precision="float32 bfloat16 auto", moves="affine none same labelled", schedule="cosine halved"
)
CHOICES |= dict(assignment="bounded cross-entropy", assigner="nearest five means network")
CHOICES = {name: words.split() for name, words in CHOICES.items()}
CHOICES |= {name: [True, False] for name in ("noisy", "lender_gradient", "with_self_training")}


def named(words):
    return sorted(line.split()[0] for line in str(words).splitlines())


def test_every_parameter_is_checked_against_its_range():
    assert set(checked()) == set(LIMITS) | set(CHOICES)
    for end, outwards in ((0, -1), (1, 1)):
        ends = {name: limits[end] for name, limits in LIMITS.items()}
        assert ends.items() <= checked(**ends).items()
        with pytest.raises(ValueError) as refused:
            beyond = {name: 1 if isinstance(value, int) else 1e-7 for name, value in ends.items()}
            checked(**{name: value + outwards * beyond[name] for name, value in ends.items()})
        assert named(refused.value) == sorted(LIMITS)


def test_every_choice_is_checked_against_its_list():
    for number in range(4):
        wanted = {name: options[number % len(options)] for name, options in CHOICES.items()}
        assert wanted.items() <= checked(**wanted).items()
    with pytest.raises(ValueError) as refused:
        checked(**dict.fromkeys(CHOICES, "other"))
    assert named(refused.value) == sorted(CHOICES)


@pytest.fixture
def passes():
    """Each pass through the network: is it in training mode, with gradients, in bfloat16; how many images."""
    seen = []

    def note(module, given):
        if type(module).__name__ == "CatVAE":
            low = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is torch.bfloat16
            seen.append((module.training, torch.is_grad_enabled(), low, len(given[0])))

    kind = training.device().type
    handle = torch.nn.modules.module.register_module_forward_pre_hook(note)
    yield seen
    handle.remove()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_borrowing_and_prediction_are_in_the_precision_asked_for(passes, precision):
    golden.run(CHAPTER, **TINY | dict(epochs=1, precision=precision, n_looks=1, with_self_training=True))
    low = precision == "bfloat16"
    training_step, borrowing, prediction = (True, True, low), (True, False, low), (False, False, low)
    averages = (True, False, False)
    assert {kind[:3] for kind in passes} == {training_step, borrowing, prediction, averages}


def test_at_most_two_thousand_images_are_watched_and_a_look_takes_one_thousand(passes, monkeypatch):
    def load(name, split):
        n = 3400 if split == "train" else 30
        x = torch.randint(256, (n, 1, 28, 28), generator=generator(), dtype=torch.uint8)
        return data.Dataset(x, torch.arange(n) % 3, name, split)

    def one_step(n, size, epochs=None, iterations=None, **more):
        return steps(n, size, iterations=1, **more)

    def quick_fit(probe, x, y):
        return fit(probe, x[:50], y[:50])

    def convolved(layer, x):
        shades = x.mean(dim=(1, 2, 3), keepdim=True) * layer.weight.mean()
        return shades.repeat(1, layer.out_channels, 1, 1)

    steps, fit = training.steps, LogisticRegression.fit
    monkeypatch.setattr(torch.nn.Conv2d, "forward", convolved)
    monkeypatch.setattr(training, "steps", one_step)
    monkeypatch.setattr(LogisticRegression, "fit", quick_fit)
    read = [30, 1000, 1000, 1000, 500, 500, 500, 500, 30]
    look = [1000, 1000, 500, 500, 1000, 30]
    for n_labels in (1203, 0):
        passes.clear()
        how = dict(width=1, n_features=4, batch_size=2, n_looks=1, moves="none", n_labels=n_labels)
        _, seen = golden.run(CHAPTER, load, double=False, **TINY | how)
        assert [n for *_, gradient, _, n in passes if not gradient] == read + look + look + read
        fits = [about["shape"][0] for about in seen.fits if about["kind"] == "LogisticRegression"]
        assert fits == [1000, 2000, 1000, 2000]
