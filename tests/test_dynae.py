"""The chapter `dynae`: its definitions against brute force, closed forms and simulation."""

import copy
import functools
import itertools
import math

import golden
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loader import definitions

from deepclust_nb import baselines, checks, data, metrics, networks, training

CHAPTER = "dynae"
checked = functools.partial(golden.checked, CHAPTER)
TINY = dict(widths=[32, 32, 32], start="trained", batch_size=16, pretrain_iterations=6, iterations=9)
TINY |= dict(interval=3, n_clusters=3, kappa=1.2, tol=0.0, max_share=1.0, lr=0.05)


def case(n_train=48, n_test=40, **parameters):
    """A function to the numbers of one run, what its checks told among them."""

    def summary():
        namespace, seen = golden.run(CHAPTER, golden.digits(n_train, n_test), **parameters)
        trace = [{k: v for k, v in row.items() if k != "view"} for row in namespace["trace"]]
        return golden.summary(namespace, seen) | {"trace": golden.plain(trace)}

    return summary


GOLDEN = {
    "defaults": lambda: golden.plain(checked()),
    "moves alone, all rivals": case(**TINY, rivals="all", classical=True),
    "trained critic, thresholds as printed": case(
        **TINY | dict(adversary="trained", drops="printed", seed=3, gamma=0.5, interval=2, kappa=1.8)
    ),
    "frozen critic, no consistency": case(
        **TINY | dict(adversary="frozen", critic_weight=2.0, consistency=False, optimizer="adam", lr=0.01)
    ),
    # With the consistency term the code term of images that do not move is 0/0 up to rounding.
    "plain, test images alone, constant rate": case(
        **TINY
        | dict(degrees=0.0, shift=0.0, split="test", pretrain_schedule="constant", margin=0, side=10)
        | dict(rivals="DC*", seed=1, consistency=False)
    ),
    "the stored start": case(
        iterations=6, interval=2, batch_size=20, tol=0.0, n_clusters=3, kappa=1.2, rivals="IDEC*"
    ),
}


@pytest.fixture(scope="module")
def dynae():
    return definitions(CHAPTER)


@pytest.fixture
def blobs():
    """Three far apart groups of "images" that are noise around three pictures, uint8 (90, 1, 4, 4)."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 2, (3, 1, 4, 4), generator=generator) * 180.0 + 30
    noise = torch.randn(90, 1, 4, 4, generator=generator) * 6
    return (pictures.repeat_interleave(30, dim=0) + noise).clamp(0, 255).byte()


def same(images):
    return images


# data


def test_images_are_cut_then_resized_as_pillow_would(dynae):
    from PIL import Image

    x = data.load("mnist_5k").x[:4]
    found = dynae.prepared(x, 2, 16)
    for image, own in zip(x[:, 0, 2:-2, 2:-2], found[:, 0], strict=True):
        theirs = Image.fromarray(image.numpy()).resize((16, 16), Image.BILINEAR)
        assert np.abs(np.asarray(theirs).astype(int) - own.numpy()).max() <= 1
    assert torch.equal(dynae.prepared(x, 0, 0), x) and dynae.prepared(x, 3, 0).shape[2:] == (22, 22)


def test_data_from_which_nothing_can_be_learned_are_refused(dynae):
    with pytest.raises(ValueError, match="n_clusters is 10, but there are only 9 images"):
        dynae.usable(torch.zeros(9, 1, 8, 8, dtype=torch.uint8), 10)
    x = torch.zeros(20, 5)
    x[3, 2] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        dynae.usable(x, 10)
    dynae.usable(x.nan_to_num(), 10)


# moves


def test_no_moves_is_the_identity(dynae):
    images = torch.rand(5, 2, 9, 12)
    assert torch.allclose(dynae.slightly_moved(images, 0.0, 0.0), images, atol=1e-5)


def test_moves_repeat_the_edge_and_invent_no_light(dynae):
    white = torch.ones(20, 1, 16, 16)
    assert torch.allclose(dynae.slightly_moved(white, 10.0, 0.1), white, atol=1e-5)


def test_shifts_cover_their_range_both_ways_and_no_more(dynae):
    torch.manual_seed(0)
    ramp = torch.arange(40.0).expand(4000, 1, 40, 40)  # brightness is the column
    across = dynae.slightly_moved(ramp, 0.0, 0.1)[:, 0, 20, 20] - 20
    down = dynae.slightly_moved(ramp.transpose(2, 3), 0.0, 0.1)[:, 0, 20, 20] - 20
    for away in (across, down):
        assert away.abs().max() <= 4.0 + 1e-4 and away.min() < -3.9 and away.max() > 3.9
        assert abs(away.mean()) < 0.15 and away.std() == pytest.approx(8 / 12**0.5, rel=0.05)
    assert abs(np.corrcoef(across, down)[0, 1]) < 0.05


def test_both_shifts_and_the_angle_are_drawn_apart_for_each_image(dynae):
    torch.manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(41.0), torch.arange(41.0), indexing="ij")
    pair = torch.stack([rows, columns]).expand(3000, 2, 41, 41)
    moved = dynae.slightly_moved(pair, 10.0, 0.05)
    down, across = (moved[:, :, 20, 20] - 20).T
    slope = moved[:, 0, 20, 25] - moved[:, 0, 20, 20]  # 5 sin(angle)
    angles = torch.rad2deg(torch.asin(slope / 5))
    assert angles.abs().max() <= 10.001 and angles.min() < -9.9 and angles.max() > 9.9
    assert angles.std() == pytest.approx(20 / 12**0.5, rel=0.05)
    table = np.corrcoef(torch.stack([down, across, angles]).numpy())
    assert np.abs(table - np.eye(3)).max() < 0.06


# mixed codes and the critic


def test_codes_are_mixed_with_the_batch_read_backwards(dynae):
    z, alpha = torch.randn(5, 3).double(), torch.rand(5).double()
    found = dynae.mixed(z, alpha)
    for i in range(5):
        assert torch.allclose(found[i], alpha[i] * z[i] + (1 - alpha[i]) * z[4 - i])
    assert torch.equal(dynae.mixed(z, torch.ones(5)), z)


def test_shares_of_the_lesser_code_are_uniform_up_to_one_half(dynae):
    torch.manual_seed(0)
    share = dynae.folded(20_000)
    assert share.min() >= 0 and share.max() <= 0.5 and share.mean() == pytest.approx(0.25, abs=0.005)
    assert share.std() == pytest.approx(0.5 / 12**0.5, rel=0.02)


def test_the_critics_loss_is_a_mean_over_samples(dynae):
    answer, alpha, blend = torch.rand(3, 7).double()
    by_hand = sum((answer[i] - alpha[i]) ** 2 + blend[i] ** 2 for i in range(7)) / 7
    found = dynae.critic_loss(answer, alpha, blend)
    assert found.shape == () and found == pytest.approx(by_hand.item())


def test_the_critic_has_the_papers_size_and_averages_its_outputs(dynae):
    critic = dynae.Critic(784, (500, 500, 2000))
    assert sum(w.numel() for w in critic.parameters()) == 1_665_010
    assert sum(w.numel() for w in networks.Autoencoder(784).parameters()) == 3_330_794
    x = torch.rand(6, 784)
    assert torch.allclose(critic(x), critic.layers(x).mean(dim=1)) and critic(x).shape == (6,)


def test_a_critic_learns_shares_that_can_be_told(dynae):
    torch.manual_seed(0)
    critic = dynae.Critic(2, (32, 32), 4)
    alpha = dynae.folded(500)
    mixed = torch.stack([alpha, 1 - alpha], dim=1)
    pure = torch.tensor([[0.0, 1.0]]).expand(500, 2)
    optimizer = torch.optim.Adam(critic.parameters(), lr=0.01)
    for _ in range(300):
        dynae.one_step(optimizer, dynae.critic_loss(critic(mixed), alpha, critic(pure)))
    assert (critic(mixed) - alpha).abs().mean() < 0.02 and critic(pure).abs().mean() < 0.03


# pretraining


def pretrained(dynae, blobs, monkeypatch, adversary, iterations=8, schedule="cosine", view=same, **more):
    """Pretrain on blobs. Returns (model, history, the critic, its weights before)."""
    made = []

    class Spy(dynae.Critic):
        def __init__(self, *given):
            super().__init__(*given)
            made.extend([self, copy.deepcopy(self.state_dict())])

    monkeypatch.setattr(dynae, "Critic", Spy)
    torch.manual_seed(0)
    model = networks.Autoencoder(16, n_code=2, widths=(8, 8))
    how = dict(iterations=iterations, lr=0.01, schedule=schedule, batch_size=20, seed=0, widths=(8, 8))
    how |= dict(precision="float32", view=view, adversary=adversary, critic_weight=0.5) | more
    return model, dynae.pretrain(model, blobs, **how), *made


def moved_by(critic, before):
    return max((value - before[name]).abs().max().item() for name, value in critic.state_dict().items())


@pytest.mark.parametrize("adversary, moves", [("none", False), ("frozen", False), ("trained", True)])
def test_only_a_trained_critic_is_trained(dynae, blobs, monkeypatch, adversary, moves):
    _, history, critic, before = pretrained(dynae, blobs, monkeypatch, adversary)
    assert (moved_by(critic, before) > 0) == moves
    assert ("fooling" in history) == (adversary != "none") and len(history["reconstruction"]) == 8


def test_a_frozen_critic_still_weighs_on_the_autoencoder(dynae, blobs, monkeypatch):
    plain = pretrained(dynae, blobs, monkeypatch, "frozen", critic_weight=0.0)[0]
    heavy = pretrained(dynae, blobs, monkeypatch, "frozen", critic_weight=9.0)[0]
    assert not torch.allclose(plain.encoder[0].weight, heavy.encoder[0].weight)


def test_the_critics_step_leaves_the_autoencoder_alone(dynae):
    torch.manual_seed(0)
    model, critic = networks.Autoencoder(16, 2, (8,)), dynae.Critic(16, (8,), 2)
    batch = torch.rand(6, 16)
    z, x_hat = model(batch)
    x_mixed = model.decode(dynae.mixed(z, torch.full((6,), 0.3)))
    step = next(iter(training.steps(6, 6, 1, 0)))
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.1)
    dynae.train_critic(critic, optimizer, step, batch, x_hat, x_mixed, torch.full((6,), 0.3))
    assert all(weight.grad is None for weight in model.parameters())
    assert all(weight.grad is not None for weight in critic.parameters())


def test_the_moved_image_is_the_target_of_pretraining(dynae, blobs, monkeypatch):
    history = pretrained(dynae, blobs, monkeypatch, "none", 300, view=lambda images: images * 0 + 0.4)[1]
    assert history["reconstruction"][-1] < 1e-3  # what all moves end in can be learned by heart


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_rate_of_pretraining_follows_its_schedule(dynae, blobs, monkeypatch, schedule):
    rates = []
    update = training.Steps.update

    def spy(loop, optimizer, *rest):
        rates.append(optimizer.param_groups[0]["lr"])
        return update(loop, optimizer, *rest)

    monkeypatch.setattr(training.Steps, "update", spy)
    pretrained(dynae, blobs, monkeypatch, "none", 10, schedule)
    expected = [
        0.01 * (1 + math.cos(math.pi * i / 10)) / 2 if schedule == "cosine" else 0.01 for i in range(10)
    ]
    assert rates == pytest.approx(expected)


# sure and unsure


def test_conflict_is_equation_8_row_by_row(dynae):
    q = torch.rand(200, 5, generator=torch.Generator().manual_seed(0)).double()
    q = q / q.sum(dim=1, keepdim=True)
    for beta in ((0.3, 0.1), (0.4, 0.0), (0.0, 0.2), (0.35, -0.1)):
        rows = [sorted(row, reverse=True)[:2] for row in q.tolist()]
        assert dynae.conflicted(q, beta).tolist() == [a < beta[0] or a - b < beta[1] for a, b in rows]


def test_a_tie_is_a_lead_of_zero(dynae):
    q = torch.tensor([[0.4, 0.4, 0.2]]).double()  # equation 5 as printed would take 0.2 for the second
    assert dynae.conflicted(q, (0.3, 0.1)).item() and not dynae.conflicted(q, (0.3, 0.0)).item()


def test_more_are_unsure_under_higher_thresholds(dynae):
    q = torch.rand(500, 4, generator=torch.Generator().manual_seed(1)).softmax(dim=1)
    for i in (0, 1):
        before = torch.zeros(500, dtype=torch.bool)
        for level in torch.linspace(0, 1, 11):
            beta = [0.26, 0.01]
            beta[i] = level.item()
            now = dynae.conflicted(q, beta)
            assert (now | ~before).all() if level else True
            before = now if level else before
    assert dynae.conflicted(q, (1.01, 0.0)).all() and not dynae.conflicted(q, (0.0, 0.0)).any()


def test_thresholds_fall_as_written(dynae):
    first = {
        "code": [(0.3, 0.15), (0.21, 0.06), (0.12, -0.03), (0.093, -0.057), (0.0849, -0.0651)],
        "printed": [(0.3, 0.15), (0.21, 0.06), (0.183, 0.033), (0.1749, 0.0249), (0.17247, 0.02247)],
    }
    for kind, expected in first.items():
        falls = list(itertools.islice(dynae.thresholds(3.0, 10, kind), 200))
        assert np.allclose(falls[:5], expected, rtol=0, atol=1e-12)
    assert np.allclose(falls[-1], (0.3 * 4 / 7, 0.3 / 14), rtol=0, atol=1e-12)
    start = next(dynae.thresholds(2.0, 4, "code"))
    assert start == pytest.approx((0.5, 0.25))


# centres and targets


def test_a_centre_is_the_nearest_code_and_its_picture_is_decoded(dynae):
    torch.manual_seed(0)
    z, means = torch.randn(40, 3), torch.randn(4, 3)
    by_hand = [min(range(40), key=lambda i: (z[i] - mean).norm().item()) for mean in means]
    assert dynae.nearest(z, means).tolist() == by_hand
    model = networks.Autoencoder(6, 3, (5,))
    centroids, pictures = dynae.centroids_of(model, z, 4, 0)
    means = baselines.kmeans(z, 4, 0, n_init=10)[1]
    assert torch.equal(centroids, z[dynae.nearest(z, means)])
    assert torch.allclose(pictures, model.decode(centroids)) and not pictures.requires_grad


def by_hand_targets(z, x, beta, centroids, pictures):
    q = baselines.student_t(z, centroids).tolist()
    for i, row in enumerate(q):
        first, second = sorted(row, reverse=True)[:2]
        unsure, k = first < beta[0] or first - second < beta[1], row.index(first)
        yield (x[i], z[i], True) if unsure else (pictures[k], centroids[k], False)


def test_targets_and_loss_equal_a_loop_over_images(dynae):
    torch.manual_seed(0)
    z, x, x_hat = torch.randn(50, 3).double(), torch.rand(50, 4).double(), torch.rand(50, 4).double()
    centroids, pictures = z[:4] + 0.1, torch.rand(4, 4).double()
    z_moved, beta, gamma = z + 0.3 * torch.randn_like(z), (0.45, 0.1), 0.7
    aims = dynae.targets(z, x, beta, centroids, pictures)
    expected = list(by_hand_targets(z, x, beta, centroids, pictures))
    for i, (image, codes, unsure) in enumerate(expected):
        assert torch.equal(aims[0][i], image) and torch.equal(aims[1][i], codes) and aims[2][i] == unsure
    assert 5 < aims[2].sum() < 45
    l1 = sum((x_hat[i] - image).square().sum() for i, (image, _, _) in enumerate(expected)) / 50
    for consistency in (True, False):
        own = [
            (z_moved[i] - c).square().sum() for i, (_, c, u) in enumerate(expected) if consistency or not u
        ]
        loss, *terms = dynae.dynae_loss(x_hat, z_moved, *aims, gamma, consistency)
        assert torch.allclose(torch.stack(terms), torch.stack([l1, sum(own) / 50]))
        assert torch.allclose(loss, (l1 + gamma * sum(own) / 50) / 3)


def test_no_gradient_reaches_a_target(dynae):
    z = torch.randn(5, 3, requires_grad=True)
    centroids, pictures = torch.randn(2, 3, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    images, codes, _ = dynae.targets(z, torch.rand(5, 4), (0.6, 0.0), centroids, pictures)
    assert not images.requires_grad and not codes.requires_grad


def test_targets_come_from_the_clean_image_and_the_step_from_the_moved_one(dynae):
    torch.manual_seed(0)
    model = networks.Autoencoder(4, 2, (6,))
    clean, moved = torch.rand(8, 4), torch.rand(8, 4)
    z = model.encode(clean).detach()
    q = baselines.student_t(z, z[:2])
    lead = (q[:, 0] - q[:, 1]).abs().median().item()
    state = dynae.look(0, z, z[:2], torch.rand(2, 4), (0.0, lead), 8, 0.0)
    assert 0 < state.unsure.sum() < 8
    loss, image_term, code_term, codes = dynae.dynae_terms(model, state, clean, moved, 0.5, True)
    aims = dynae.targets(z, clean, state.beta, state.centroids, state.pictures)
    z_moved, x_hat = model(moved)
    expected = dynae.dynae_loss(x_hat, z_moved, *aims, 0.5, True)
    assert torch.allclose(torch.stack([loss, image_term, code_term]), torch.stack(expected))
    assert torch.allclose(codes, z_moved)
    loss.backward()
    assert model.encoder[0].weight.grad.abs().sum() > 0


# Algorithm 1


HOW = dict(n_clusters=3, kappa=1.2, drops="code", gamma=1.0, consistency=True, optimizer="sgd", lr=0.01)
HOW |= dict(iterations=40, interval=4, tol=0.0, max_share=1.0, batch_size=30, seed=0, precision="float32")


def autoencoder():
    torch.manual_seed(0)
    return networks.Autoencoder(16, n_code=2, widths=(12,))


def test_centres_and_thresholds_change_only_when_the_count_did_not_fall(dynae, blobs):
    states = list(dynae.dynae(autoencoder(), blobs, view=same, **HOW))
    assert [state.iteration for state in states] == [*range(0, 40, 4), 40]
    falls = list(itertools.islice(dynae.thresholds(1.2, 3, "code"), 20))
    number, before = 0, len(blobs)
    for state, after in itertools.pairwise(states):
        count = int(state.unsure.sum())
        assert state.beta == falls[number] and state.renewed == (count >= before)
        if state.renewed:
            number += 1
            assert after.beta == falls[number]
        else:
            assert torch.equal(after.centroids, state.centroids)
            assert torch.equal(after.pictures, state.pictures)
        before = count
    assert 1 < number < 10


def test_renewed_centres_are_those_of_the_codes_at_the_check(dynae, blobs):
    model, kept = autoencoder(), None
    for state in dynae.dynae(model, blobs, view=same, **HOW):
        if kept is not None:
            assert torch.equal(state.centroids, kept[0]) and torch.allclose(state.pictures, kept[1])
            return
        if state.renewed:
            kept = dynae.centroids_of(model, state.embedding, 3, 0)
    raise AssertionError("nothing was renewed")


def test_a_state_tells_what_its_codes_say(dynae, blobs):
    model = autoencoder()
    for state in dynae.dynae(model, blobs, view=same, **HOW | {"iterations": 6}):
        z = baselines.encode(model, blobs)
        q = baselines.student_t(z, state.centroids)
        assert torch.equal(state.embedding, z) and torch.equal(state.q, q)
        assert state.labels.tolist() == q.argmax(dim=1).tolist()
        assert torch.equal(state.unsure, dynae.conflicted(q, state.beta))


@pytest.mark.parametrize("tol, length", [(1.01, 1), (0.0, 11)])
def test_it_stops_when_few_are_unsure(dynae, blobs, tol, length):
    states = list(dynae.dynae(autoencoder(), blobs, view=same, **HOW | {"tol": tol}))
    assert len(states) == length and states[-1].converged == (tol > 1)


def test_few_means_a_smaller_share_than_the_tolerance(dynae):
    z = torch.tensor([[0.0], [0.1], [0.2], [5.0], [10.0]])  # the fourth lies between two centres
    for tol, stops in ((0.19, False), (0.21, True), (0.81, True)):
        state = dynae.look(0, z, torch.tensor([[0.0], [10.0]]), torch.rand(2, 4), (0.6, 0.0), 5, tol)
        assert state.unsure.sum() == 1 and state.converged == stops


def test_a_collapse_is_stopped(dynae, blobs):
    with pytest.raises(training.CollapseError, match="max_share"):
        list(dynae.dynae(autoencoder(), blobs, view=same, **HOW | {"max_share": 0.2}))


def test_it_draws_the_centres_of_groups_that_are_plain(dynae, blobs):
    model = autoencoder()
    baselines.pretrain(model, blobs, torch.optim.Adam(model.parameters(), 0.01), 60, 0, batch_size=30)
    images = data.to_float(blobs).flatten(1)

    def apart():
        """Mean squared distance of the drawn images of a group from their mean."""
        drawn = model(images)[1].detach().reshape(3, 30, -1)
        return (drawn - drawn.mean(dim=1, keepdim=True)).square().sum(dim=2).mean()

    before = apart()
    state = list(dynae.dynae(model, blobs, view=same, **HOW | {"iterations": 400, "optimizer": "adam"}))[-1]
    assert metrics.accuracy(np.repeat([0, 1, 2], 30), state.labels) == 1
    assert state.unsure.float().mean() < 0.01 and apart() < before / 2


# diagnoses


def test_the_cosine_of_two_gradients(dynae):
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    along, across = (w * torch.tensor([3.0, 4.0])).sum(), (w * torch.tensor([-4.0, 3.0])).sum()
    assert dynae.gradient_cosine(along, along * 7, [w]) == pytest.approx(1)
    assert dynae.gradient_cosine(along, across, [w]) == pytest.approx(0, abs=1e-6)
    assert dynae.gradient_cosine(along, -along, [w]) == pytest.approx(-1)
    both = along + 2 * across
    assert dynae.gradient_cosine(along, both, [w]) == dynae.gradient_cosine(both, along, [w])


def test_guesses_that_are_right_have_no_feature_randomness(dynae):
    torch.manual_seed(0)
    model = networks.Autoencoder(6, 2, (9,))
    clean, moved = torch.rand(30, 6), torch.rand(30, 6)
    z = model.encode(clean).detach()
    state = dynae.look(0, z, z[:3], torch.rand(3, 6), (0.0, 0.0), 30, 0.0)
    renamed = np.array([2, 0, 1])[state.labels]  # classes under other names
    _, image_term, code_term, codes = dynae.dynae_terms(model, state, clean, moved, 1.0, False)
    found = dynae.directions(model, (code_term, image_term, code_term, codes), renamed, state)
    assert found["randomness"] == pytest.approx(1, abs=1e-5)
    weights = list(model.encoder.parameters())
    assert found["drift"] == pytest.approx(dynae.gradient_cosine(image_term, code_term, weights))
    wrong = np.roll(renamed, 7)
    terms = (code_term, image_term, code_term, codes)
    assert dynae.directions(model, terms, wrong, state)["randomness"] < 0.999


def test_right_answers_are_counted_among_sure_and_unsure(dynae):
    y = np.array([0, 0, 1, 1, 2, 2])
    labels = np.array([1, 1, 2, 0, 0, 0])
    unsure = torch.tensor([True, False, False, True, False, True])
    state = dynae.Check(0, None, labels, None, unsure, (), None, None, False, False)
    row = dynae.of_each(state, y)
    assert row["tau"] == 0.5 and row["acc_sure"] == 1 and row["acc_unsure"] == pytest.approx(2 / 3)
    assert row["nmi_sure"] == pytest.approx(1)
    none = dynae.of_each(state._replace(unsure=torch.zeros(6, dtype=torch.bool)), y)
    assert none["acc_unsure"] is None and none["acc_sure"] == pytest.approx(5 / 6)


def test_a_run_is_followed_check_by_check(dynae, blobs):
    model, y = autoencoder(), np.repeat([0, 1, 2], 30)
    flat = data.to_float(blobs).flatten(1)
    states = dynae.dynae(model, blobs, view=same, **HOW)
    state, trace = dynae.follow(
        states, lambda s: dynae.dynae_terms(model, s, flat, flat, 1.0, True), model, y, 90, n_view=12
    )
    assert [row["iteration"] for row in trace] == [*range(0, 40, 4), 40]
    assert trace[-1]["acc"] == metrics.accuracy(y, state.labels)
    kept = dynae.told(state, trace)
    assert kept["drift"] == pytest.approx(np.mean([row["drift"] for row in trace]))
    assert kept["randomness_first"] == trace[0]["randomness"] and kept["tau"] == trace[-1]["tau"]
    assert kept["looks"]["step"][-1] == 40 and len(kept["looks"]["acc"]) == len(kept["looks"]["step"])
    assert torch.equal(kept["arrays"]["code_first"], trace[0]["view"]) and len(trace[0]["view"]) == 12


# rivals


def test_means_of_clusters(dynae):
    torch.manual_seed(0)
    z, centroids = torch.randn(40, 3), torch.cat([torch.randn(3, 3), torch.full((1, 3), 99.0)])
    labels, means = dynae.cluster_means(z, centroids)
    for i in range(40):
        assert labels[i] == (z[i] - centroids).norm(dim=1).argmin()
    for k in range(3):
        assert torch.allclose(means[k], z[labels == k].mean(dim=0), atol=1e-6)
    assert torch.equal(means[3], torch.zeros(3))


def test_dc_rebuilds_everything_and_pulls_every_code(dynae):
    torch.manual_seed(0)
    model = networks.Autoencoder(5, 2, (7,))
    clean, moved = torch.rand(9, 5), torch.rand(9, 5)
    state = dynae.Seen(0, None, None, torch.randn(3, 2))
    loss, image_term, code_term, codes = dynae.dc_terms(model, state, clean, moved, 0.3)
    z_clean, (z, x_hat) = model.encode(clean), model(moved)
    own = state.centroids[torch.cdist(z_clean, state.centroids).argmin(1)]
    expected = (x_hat - clean).square().sum(1).mean(), (z - own).square().sum(1).mean()
    assert torch.allclose(torch.stack([image_term, code_term]), torch.stack(expected))
    assert loss.item() == pytest.approx((expected[0] + 0.3 * expected[1]).item() / 2)


def test_adecs_decoder_is_trained_by_reconstruction_alone(dynae, blobs):
    how = dict(optimizer="sgd", lr=0.0001, iterations=6, interval=2, max_share=1.0, batch_size=30, seed=0)
    how |= dict(precision="float32", view=same)
    decoders, critics = [], []
    for weight in (0.0, 50.0):
        model, critic = autoencoder(), dynae.Critic(16, (8,), 2)
        before = copy.deepcopy(critic.state_dict())
        encoder = copy.deepcopy(model.encoder.state_dict())
        means = baselines.kmeans(baselines.encode(model, blobs), 3, 0)[1]
        states = list(dynae.adec(model, blobs, means, critic, critic_weight=weight, **how))
        assert [state.iteration for state in states] == [0, 2, 4, 6]
        decoders.append(model.decoder[0].weight.detach())
        critics.append(moved_by(critic, before))
        assert any((model.encoder.state_dict()[k] - v).abs().max() > 0 for k, v in encoder.items())
    assert torch.allclose(*decoders, atol=2e-4) and min(critics) > 0
    assert not torch.allclose(decoders[0], autoencoder().decoder[0].weight, atol=2e-4)


def test_terms_of_adec_and_idec(dynae):
    torch.manual_seed(0)
    model, critic = networks.Autoencoder(5, 2, (7,)), dynae.Critic(5, (6,), 3)
    moved, centroids = torch.rand(9, 5), torch.randn(3, 2)
    z, x_hat = model(moved)
    q = baselines.student_t(z, centroids)
    p = baselines.target_distribution(q).detach()
    kl = (p * (p / q).log()).sum(1).mean()
    loss, fooling, clustering, codes = dynae.adec_terms(model, critic, centroids, p, moved, 0.3)
    assert torch.allclose(fooling, critic(x_hat).square().mean()) and torch.allclose(clustering, kl)
    assert torch.allclose(loss, kl + 0.3 * fooling) and torch.allclose(codes, z)
    state = dynae.Seen(0, None, None, centroids, p)
    for gamma, expected in ((None, kl), (0.2, F.mse_loss(x_hat, moved) + 0.2 * kl)):
        loss, image_term, clustering, _ = dynae.idec_terms(model, state, p, moved, gamma)
        assert torch.allclose(loss, expected) and torch.allclose(clustering, kl)
        assert torch.allclose(image_term, F.mse_loss(x_hat, moved))


def test_what_a_large_set_cannot_have_is_left_out(dynae):
    pixels = np.random.default_rng(0).random((60, 8)).astype(np.float32)
    names = [name for name, labels in dynae.on_pixels(pixels, 3, 0) if len(labels) == 60]
    assert names == ["k-means", "GMM", "LSNMF", "AC", "SC"]


# parameters


@pytest.mark.parametrize(
    "changed, sentence",
    [
        ({"kappa": 11.0}, "kappa must be above 0 and at most n_clusters"),
        ({"kappa": 0.0}, "kappa must be above 0"),
        ({"n_images": 499}, "at least 50 a cluster"),
        ({"side": 7}, "side must be 0 or at least 8"),
        ({"dataset": "fashion_5k"}, "choose start = trained"),
        ({"side": 20}, "choose start = trained"),
        ({"iterations": 100_000, "interval": 20}, "interval must be at least 100"),
        ({"widths": [300, 300]}, "widths must be one of"),
    ],
)
def test_wrong_parameters_are_refused_before_training(changed, sentence):
    with pytest.raises(ValueError, match=sentence):
        checked(**changed)


def test_a_very_large_weight_of_the_code_term_ends_in_an_infinite_loss():
    # The evidence page says so of runs that therefore have no record.
    quick = dict(n_images=1000, iterations=20, gamma=1000.0)
    for lr in (0.01, 0.001):
        with pytest.raises(FloatingPointError, match="at step"):
            golden.run(CHAPTER, data.load, double=False, lr=lr, **quick)


def test_a_torch_that_forgets_gradients_is_refused_in_bfloat16(monkeypatch):
    monkeypatch.setattr(checks, "keeps_gradients", lambda precision: precision == "float32")
    with pytest.raises(ValueError, match="forgets gradients in bfloat16"):
        checked(precision="auto")
    checked(precision="float32")


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    golden.check(CHAPTER, name)
