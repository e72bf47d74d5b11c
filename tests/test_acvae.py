"""The chapter `acvae`: copies, the behaviour loss, neighbours by z-scores, and the chapter's runs and
refusals."""

import contextlib
import functools
import json
import math

import golden
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loader import chapter_file, definitions
from sklearn.neighbors import NearestNeighbors
from torch import nn

from deepclust_nb import baselines, checks, data, mixtures, training

CHAPTER = "acvae"
checked = functools.partial(golden.checked, CHAPTER)
TINY = dict(dataset="mnist_5k", channels=4, n_latent=6, n_output=5, iterations=5, batch_size=22, n_clusters=3)
# a hundred neighbours ask for more images than a golden run usually has
digits = functools.partial(golden.digits, n_train=130, n_test=110)
TINY |= dict(flip=False, lr=0.01, kl_weight=0.05, theta=0.2)


def case(**parameters):
    """A function to the numbers of one run, how the losses fell among them."""

    def summary():
        namespace, seen = golden.run(CHAPTER, digits(), **TINY | parameters)
        return golden.summary(namespace, seen) | {"found": golden.plain(namespace["found"])}

    return summary


GOLDEN = {
    "defaults": lambda: golden.plain(checked()),
    "contrast": case(seed=1),
    "bank, flips": case(objective="bank", flip=True, seed=2, temperature=0.5),
    "attraction, decoder fed z": case(objective="attraction", decoder_input="z"),
    "reconstruction": case(objective="reconstruction", decoder_input="z", kl_weight=1.0, lr=0.002),
    "no noise, train and test": case(noise=0.0, kl_weight=0.0, split="train", seed=3),
    "resnet10, fewer anchors": case(
        encoder="resnet10", n_anchors=30, alpha=1.0, theta=0.3, crop=0.2, turn=40.0
    ),
}


@pytest.fixture(scope="module")
def acvae():
    return definitions(CHAPTER)


@pytest.fixture(scope="module")
def whole():
    """A run, and what was seen."""
    return golden.run(CHAPTER, digits(), **TINY | dict(seed=1))


def codes(n=40, p=7, seed=0):
    """Means and widths, one point twice among them, and labels."""
    torch.manual_seed(seed)
    mean, width, y = torch.randn(n, p), torch.rand(n, p) + 0.2, torch.randint(0, 3, (n,))
    mean[n // 2] = mean[3]
    return mean, width, y


def brute_counts(mean, width, anchors, alpha):
    """Dimensions in range, one pair after another."""
    table = torch.empty(len(anchors), len(mean), dtype=torch.long)
    for row, i in enumerate(anchors.tolist()):
        for j in range(len(mean)):
            z = (mean[j] - mean[i]).abs() / width[i]
            table[row, j] = -1 if i == j else int((z <= alpha).sum())
    return table


# ---------------------------------------------------------------- copies


def ramps(n, side=33):
    """Images whose two channels hold each pixel's own place, from -1 to 1."""
    place = (2 * torch.arange(side) + 1) / side - 1
    grid = torch.stack(torch.meshgrid(place, place, indexing="xy"))
    return grid.expand(n, -1, -1, -1).clone()


def maps_of(acvae, n, crop, turn, flip, seed=0):
    """The linear map and the shift of each copy, read off its middle."""
    torch.manual_seed(seed)
    out, step = acvae.cut_and_turned(ramps(n), crop, turn, flip), 2 / 33
    middle = out[:, :, 16, 16]
    across = (out[:, :, 16, 17] - out[:, :, 16, 15]) / (2 * step)
    down = (out[:, :, 17, 16] - out[:, :, 15, 16]) / (2 * step)
    return torch.stack([across, down], dim=2), middle


def test_nothing_moves_where_nothing_may(acvae):
    x = torch.rand(4, 3, 9, 9)
    torch.testing.assert_close(acvae.cut_and_turned(x, 1.0, 0.0, False), x)
    torch.testing.assert_close(acvae.recoloured(x, 0.0, 0.0), x)


def test_a_cut_has_its_area_inside_the_picture(acvae):
    linear, shift = maps_of(acvae, 3000, 0.25, 0.0, False)
    side = linear[:, 0, 0]
    torch.testing.assert_close(linear[:, 1, 1], side)
    assert (linear[:, 0, 1].abs() < 1e-4).all() and (linear[:, 1, 0].abs() < 1e-4).all()
    area = side.square()
    assert 0.25 <= area.min() + 1e-4 and area.max() <= 1 + 1e-4
    assert area.mean().item() == pytest.approx(0.625, abs=0.02)  # uniform in area
    assert area.std().item() == pytest.approx(0.75 / math.sqrt(12), abs=0.01)
    room = (1 - side)[:, None]
    assert (shift.abs() <= room + 1e-4).all() and shift.abs().max() > 0.4
    used = (shift / room)[side < 0.8]
    assert used.mean().abs() < 0.05 and used.std().item() == pytest.approx(1 / math.sqrt(3), abs=0.03)
    assert abs(np.corrcoef(used.T)[0, 1]) < 0.06  # each direction its own draw


@pytest.mark.parametrize("flip", [False, True])
def test_copies_turn_by_at_most_turn_and_keep_their_shape(acvae, flip):
    linear, _ = maps_of(acvae, 2000, 0.5, 30.0, flip)
    linear = linear * linear.det().sign()[:, None, None] ** torch.tensor([1, 0])  # the mirror taken back
    side = linear.det().sqrt()
    turned = linear / side[:, None, None]
    torch.testing.assert_close(turned @ turned.mT, torch.eye(2).expand(2000, 2, 2), atol=1e-3, rtol=0)
    angle = torch.atan2(linear[:, 1, 0], linear[:, 0, 0]) * 180 / math.pi
    assert angle.abs().max() <= 30.1 and angle.min() < -28 and angle.max() > 28
    assert angle.std().item() == pytest.approx(60 / math.sqrt(12), abs=1)


@pytest.mark.parametrize(("flip", "share"), [(True, 0.5), (False, 0.0)])
def test_half_of_the_copies_are_mirrored_left_to_right(acvae, flip, share):
    linear, _ = maps_of(acvae, 2000, 1.0, 0.0, flip)
    assert (linear[:, 0, 0] < 0).double().mean().item() == pytest.approx(share, abs=0.04)
    assert (linear[:, 1, 1] > 0).all()


def test_brightness_and_contrast_are_factors_of_their_own(acvae):
    torch.manual_seed(0)
    even = torch.full((4000, 1, 4, 4), 0.4)
    bright = acvae.recoloured(even, 0.5, 0.0)
    assert bright.flatten(1).std(dim=1).max() < 1e-6  # contrast leaves an even image
    factor = bright[:, 0, 0, 0] / 0.4
    assert (
        0.5 <= factor.min()
        and factor.max() <= 1.5
        and factor.std().item() == pytest.approx(1 / math.sqrt(12), abs=0.01)
    )
    half = torch.cat([torch.full((4000, 1, 2, 4), 0.3), torch.full((4000, 1, 2, 4), 0.5)], dim=2)
    out = acvae.recoloured(half, 0.3, 0.0)
    gap, mean = (out[:, 0, 3, 0] - out[:, 0, 0, 0]) / 0.2, out.mean(dim=(1, 2, 3)) / 0.4
    contrast = gap / mean
    assert contrast.min() > 0.69 and contrast.max() < 1.31
    assert contrast.std().item() == pytest.approx(0.6 / math.sqrt(12), abs=0.01)
    assert abs(np.corrcoef(contrast, mean)[0, 1]) < 0.05


def test_colours_fade_and_go(acvae):
    torch.manual_seed(0)
    x = 0.4 + 0.2 * torch.rand(1000, 3, 3, 3)
    assert (acvae.recoloured(x, 0.2, 1.0).std(dim=1) < 1e-6).all()
    gone = (acvae.recoloured(x, 0.2, 0.3).std(dim=1) < 1e-6).flatten(1).all(dim=1)
    assert gone.double().mean().item() == pytest.approx(0.3, abs=0.05)
    one = torch.full((1000, 3, 1, 1), 0.5)
    one[:, 0], one[:, 1] = 0.6, 0.4
    out = acvae.recoloured(one, 0.2, 0.0)
    fade = (out[:, 0] - out[:, 1]).flatten() / 0.2
    # three factors: brightness, contrast (about the mean), saturation
    assert fade.std() > 0.17 and fade.min() > 0.8**3 - 1e-3 and fade.max() < 1.2**3 + 1e-3
    single = torch.rand(5, 1, 3, 3)
    torch.testing.assert_close(acvae.recoloured(single, 0.0, 1.0), single)  # grey has no colour to lose
    assert acvae.recoloured(torch.rand(50, 3, 4, 4), 1.0, 0.5).aminmax() == pytest.approx((0, 1), abs=0.2)


# ---------------------------------------------------------------- the network


def test_four_layers_of_stride_two(acvae):
    body = acvae.convolutions(3, 5)
    convs = [layer for layer in body if isinstance(layer, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.stride) for c in convs] == [
        (3, 5, (2, 2)), (5, 10, (2, 2)), (10, 20, (2, 2)), (20, 40, (2, 2))
    ]  # fmt: skip
    assert body(torch.zeros(2, 3, 28, 28)).shape == body(torch.zeros(2, 3, 32, 32)).shape == (2, 160)


def test_resnet34_is_torchvisions_but_for_the_stem(acvae):
    torchvision = data.import_torchvision()
    body = acvae.resnet(3, acvae.BLOCKS["resnet34"], 64)
    theirs = torchvision.models.resnet34()
    stages = [layer for name, layer in theirs.named_children() if name.startswith("layer")]
    ours = [layer for layer in body.modules() if type(layer).__name__ == "BasicBlock"]
    expected = [block for stage in stages for block in stage]
    assert len(ours) == len(expected) == 16
    for one, other in zip(ours, expected, strict=True):
        shapes = [{k: v.shape for k, v in block.state_dict().items()} for block in (one, other)]
        assert shapes[0] == shapes[1] and one.stride == other.stride
    assert body[0].kernel_size == (3, 3) and body[0].stride == (1, 1)
    x = torch.randn(2, 3, 32, 32)
    ours_then = body.eval()[3:](x.new_zeros(2, 64, 8, 8) + 1)
    for one, other in zip(ours, expected, strict=True):
        other.load_state_dict(one.state_dict())
    z = x.new_zeros(2, 64, 8, 8) + 1
    for stage in stages:
        z = stage.eval()(z)
    torch.testing.assert_close(ours_then, z.mean(dim=(2, 3)))


def test_resnets_start_as_kaiming_says(acvae):
    torch.manual_seed(0)
    for layer in acvae.resnet(1, acvae.BLOCKS["resnet10"], 32).modules():
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 5000:
            fan_out = layer.out_channels * layer.kernel_size[0] ** 2
            assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)


def small(acvae, add_mean=True, n_latent=3):
    torch.manual_seed(0)
    return acvae.ACVAE(nn.Flatten(), 16, n_latent, 5, add_mean)


@pytest.mark.parametrize("add_mean", [True, False])
def test_the_decoder_sees_the_draw_plus_the_mean(acvae, add_mean):
    model, seen = small(acvae, add_mean), []
    model.decoder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    x, eps = torch.rand(6, 1, 4, 4), torch.randn(6, 3)
    output, mean, log_variance = model(x, eps)
    z = mean + (log_variance / 2).exp() * eps
    torch.testing.assert_close(seen[0], z + mean if add_mean else z)
    torch.testing.assert_close(output, model.decoder(seen[0]))
    model(x, torch.zeros(6, 3))
    torch.testing.assert_close(seen[2], 2 * mean if add_mean else mean)
    sizes = [(layer.in_features, layer.out_features) for layer in model.decoder if hasattr(layer, "weight")]
    assert sizes == [(3, 512), (512, 5)]


def test_a_code_starts_narrow_and_stays_within_bounds(acvae):
    model = small(acvae)
    assert (model.spread.bias == -3).all()
    x = torch.rand(6, 1, 4, 4)
    mean, log_variance = model.posterior(x)
    torch.testing.assert_close(mean, model.mean(x.flatten(1)))
    torch.testing.assert_close(log_variance, model.spread(x.flatten(1)))
    with torch.no_grad():
        model.spread.bias[:] = torch.tensor([-100.0, 100.0, 0.0])
    log_variance = model.posterior(x)[1]
    assert (log_variance[:, 0] == -8).all() and (log_variance[:, 1] == 8).all()


# ---------------------------------------------------------------- the behaviour loss


@pytest.mark.parametrize("temperature", [0.1, 0.7])
def test_nt_xent_is_the_formula(acvae, temperature):
    torch.manual_seed(0)
    one, two = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    d = [v / v.norm() for v in torch.cat([one, two])]
    terms = []
    for i in range(10):
        partner = (i + 5) % 10
        others = sum(math.exp(float(d[i] @ d[j]) / temperature) for j in range(10) if j != i)
        terms.append(-math.log(math.exp(float(d[i] @ d[partner]) / temperature) / others))
    assert acvae.nt_xent(one, two, temperature).item() == pytest.approx(sum(terms) / 10)


def test_nt_xent_sees_neither_order_nor_length_nor_which_copy_is_first(acvae):
    torch.manual_seed(0)
    one, two = torch.randn(6, 4).double(), torch.randn(6, 4).double()
    loss, order = acvae.nt_xent(one, two, 0.3), torch.randperm(6)
    torch.testing.assert_close(acvae.nt_xent(one[order], two[order], 0.3), loss)
    torch.testing.assert_close(acvae.nt_xent(two, one, 0.3), loss)
    torch.testing.assert_close(acvae.nt_xent(7 * one, 0.1 * two, 0.3), loss)
    assert acvae.nt_xent(one[order.roll(1)], two[order], 0.3) != loss  # partners count
    same = torch.ones(6, 4).double()
    assert acvae.nt_xent(same, same, 0.3).item() == pytest.approx(math.log(11))
    assert acvae.nt_xent(one, one, 0.3) < loss


def test_a_banks_loss_is_the_formula(acvae):
    torch.manual_seed(0)
    output, bank, index = torch.randn(3, 4), F.normalize(torch.randn(6, 4), dim=1), torch.tensor([5, 0, 2])
    terms = []
    for v, i in zip(output, index, strict=True):
        scores = [math.exp(float(v @ b) / float(v.norm()) / 0.4) for b in bank]
        terms.append(-math.log(scores[i] / sum(scores)))
    assert acvae.bank_loss(output, bank, index, 0.4).item() == pytest.approx(sum(terms) / 3, rel=1e-5)


def test_attraction_is_one_less_the_cosine(acvae):
    one = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    two = torch.tensor([[5.0, 0.0], [-1.0, 0.0], [0.0, 4.0]])
    assert acvae.attraction(one, two).item() == pytest.approx((0 + 2 + 1) / 3)


def test_the_objective_is_found_by_its_name(acvae):
    torch.manual_seed(0)
    output, batch, bank = torch.randn(6, 4), torch.rand(6, 1, 2, 2), F.normalize(torch.randn(9, 4), dim=1)
    one, two = output[:3], output[3:]
    index = torch.tensor([4, 0, 7])

    def loss(name):
        return acvae.behaviour_loss(name, output, batch, bank, index, 0.3)

    torch.testing.assert_close(loss("contrast"), acvae.nt_xent(one, two, 0.3))
    torch.testing.assert_close(loss("attraction"), acvae.attraction(one, two))
    expected = F.binary_cross_entropy_with_logits(output, batch.flatten(1), reduction="none").sum(dim=1)
    torch.testing.assert_close(loss("reconstruction"), expected.mean())
    before = bank.clone()
    torch.testing.assert_close(loss("bank"), acvae.bank_loss(output, before, index.repeat(2), 0.3))
    for row, i in enumerate(index):
        unit = [v / v.norm() for v in (one[row], two[row])]
        moved = before[i] + (unit[0] + unit[1]) / 2
        torch.testing.assert_close(bank[i], moved / moved.norm())
    still = [i for i in range(9) if i not in index]
    assert torch.equal(bank[still], before[still])


def trained(acvae, model, x, view=lambda images: images, **changed):
    how = dict(objective="contrast", temperature=0.5, kl_weight=0.0, noise=1.0, iterations=3, batch_size=4)
    torch.manual_seed(3)
    return acvae.train(model, x, view, **how | dict(lr=0.01, seed=0, precision="float32") | changed)


def images(n=12):
    torch.manual_seed(0)
    return torch.randint(0, 256, (n, 1, 4, 4), dtype=torch.uint8)


def test_both_halves_of_a_batch_are_copies_of_the_same_images(acvae, monkeypatch):
    seen, given = [], []

    def view(batch):
        seen.append(batch)
        return batch * len(seen)

    loss = acvae.behaviour_loss
    monkeypatch.setattr(acvae, "behaviour_loss", lambda *rest: given.append(rest) or loss(*rest))
    x = images()
    trained(acvae, small(acvae), x, view, iterations=3)
    assert len(seen) == 6
    for i, (_, output, batch, _, index, _) in enumerate(given):
        torch.testing.assert_close(seen[2 * i], data.to_float(x[index]))
        torch.testing.assert_close(batch[:4], (2 * i + 1) * data.to_float(x[index]))
        torch.testing.assert_close(batch[4:], (2 * i + 2) * data.to_float(x[index]))
        assert output.shape == (8, 5)


def test_reconstruction_looks_at_whole_images_once(acvae, monkeypatch):
    given = []
    loss = acvae.behaviour_loss
    monkeypatch.setattr(acvae, "behaviour_loss", lambda *rest: given.append(rest) or loss(*rest))
    torch.manual_seed(0)
    model = acvae.ACVAE(nn.Flatten(), 16, 3, 16, False)
    trained(acvae, model, images(), lambda x: 1 / 0, objective="reconstruction")
    for _, output, batch, _, index, _ in given:
        torch.testing.assert_close(batch, data.to_float(images()[index]))
        assert output.shape == (4, 16)


def test_noise_is_scaled_and_drawn_for_each_copy(acvae, monkeypatch):
    seen = []
    forward = acvae.ACVAE.forward
    monkeypatch.setattr(acvae.ACVAE, "forward", lambda self, x, e: seen.append(e) or forward(self, x, e))
    for noise in (0.0, 0.5, 1.0):
        trained(acvae, small(acvae, n_latent=200), images(), noise=noise, iterations=2)
    assert [round(e.std().item(), 1) for e in seen] == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
    assert seen[-1].shape == (8, 200) and not torch.equal(seen[-1][:4], seen[-1][4:])
    assert not torch.equal(seen[-1], seen[-2])


def test_the_loss_is_behaviour_and_the_weighted_divergence(acvae, monkeypatch):
    rows = []
    update = training.Steps.update

    def spy(loop, optimizer, loss, terms):
        rows.append((loss.item(), {k: v.item() for k, v in terms.items()}, optimizer.param_groups[0]["lr"]))
        assert type(optimizer).__name__ == "AdamW" and optimizer.param_groups[0]["weight_decay"] == 1e-4
        return update(loop, optimizer, loss, terms)

    monkeypatch.setattr(training.Steps, "update", spy)
    model, x = small(acvae), images()
    mean, log_variance = model.posterior(data.to_float(x))
    history = trained(acvae, model, x, kl_weight=0.3, iterations=4, batch_size=12)
    for loss, terms, _ in rows:
        assert loss == pytest.approx(terms["behaviour"] + 0.3 * terms["divergence"], rel=1e-5)
    first = rows[0][1]
    assert first["divergence"] == pytest.approx(
        mixtures.gaussian_kl(mean, log_variance).mean().item(), rel=1e-4
    )
    assert first["width"] == pytest.approx((log_variance / 2).exp().mean().item(), rel=1e-4)
    assert first["spread"] == pytest.approx(torch.cat([mean, mean]).std(dim=0).mean().item(), rel=1e-4)
    rates = [0.01 * 0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]
    assert [rate for *_, rate in rows] == pytest.approx(rates)
    assert sorted(history) == ["behaviour", "divergence", "spread", "width"] and len(history["width"]) == 4
    assert not model.training


def test_the_divergence_widens_a_code(acvae):
    widths = []
    for weight in (0.0, 1.0):
        model = small(acvae)
        trained(acvae, model, images(), kl_weight=weight, iterations=60)
        widths.append(acvae.encoded(model, images())[1].mean().item())
    assert widths[1] > widths[0] + 0.2


def test_codes_are_of_whole_images_without_noise_in_any_batches(acvae):
    torch.manual_seed(0)
    model = acvae.ACVAE(acvae.convolutions(1, 4), 32, 3, 5)
    x = torch.randint(0, 256, (30, 1, 16, 16), dtype=torch.uint8)
    model.train()
    mean, width, output = acvae.encoded(model, x, batch_size=7)
    assert not model.training  # running averages, not those of a batch
    again = acvae.encoded(model, x)
    for one, other in zip((mean, width, output), again, strict=True):
        torch.testing.assert_close(one, other)
    expected = model.posterior(data.to_float(x))
    torch.testing.assert_close(mean, expected[0])
    torch.testing.assert_close(width, (expected[1] / 2).exp())
    torch.testing.assert_close(output, F.normalize(model.decoder(2 * mean), dim=1))
    assert not mean.requires_grad


# ---------------------------------------------------------------- within range


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.7])
def test_counts_are_those_of_pairs(acvae, alpha):
    mean, width, _ = codes()
    anchors = torch.tensor([5, 3, 20, 0])
    found = acvae.in_range(mean, width, anchors, alpha)
    assert found.dtype == torch.int16 and torch.equal(found.long(), brute_counts(mean, width, anchors, alpha))
    assert found[1, 20] == found[2, 3] == 7  # the same point twice is in range everywhere, at alpha 0 too
    assert (found[[0, 1, 2, 3], anchors] == -1).all()


def test_the_anchors_widths_count_alone(acvae):
    mean, width = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [0.1]])
    assert acvae.in_range(mean, width, torch.arange(2), 1.0).tolist() == [[-1, 1], [0, -1]]


def test_a_width_of_zero_is_refused(acvae):
    mean, width, _ = codes()
    width[4, 2] = 0
    with pytest.raises(ValueError, match="a width is 0"):
        acvae.in_range(mean, width, torch.arange(3), 1.0)


def test_counts_grow_with_the_range_and_follow_the_points(acvae):
    mean, width, _ = codes()
    every = torch.arange(40)
    last = None
    for alpha in (0.0, 0.3, 1.0, 2.0, 50.0):
        found = acvae.in_range(mean, width, every, alpha)
        assert last is None or (found >= last).all()
        last = found
    assert (last + 8 * torch.eye(40) == 7).all()
    order = torch.randperm(40)
    again = acvae.in_range(mean[order], width[order], every, 1.0)
    assert torch.equal(again, acvae.in_range(mean, width, every, 1.0)[order][:, order])


def test_rescaling_a_dimension_changes_nothing(acvae):
    mean, width, _ = codes()
    scale = torch.tensor([1.0, 64.0, 0.5, 1.0, 1.0, 8.0, 1.0])
    every = torch.arange(40)
    found = acvae.in_range(mean * scale, width * scale, every, 1.3)
    assert torch.equal(found, acvae.in_range(mean, width, every, 1.3))


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_draws_are_covered_as_the_error_function_says(acvae, alpha):
    torch.manual_seed(0)
    mean, width = torch.randn(1, 512), torch.rand(1, 512) + 0.1
    draws = mean + width * torch.randn(400, 512)
    counts = acvae.in_range(torch.cat([mean, draws]), width.expand(401, -1), torch.tensor([0]), alpha)[0, 1:]
    p = acvae.coverage(alpha)
    assert p == pytest.approx({1.0: 0.6827, 2.0: 0.9545}[alpha], abs=1e-4)
    error = math.sqrt(p * (1 - p) / (512 * 400))
    assert abs(counts.double().mean().item() / 512 - p) < 4 * error


def test_shares_within_by_hand(acvae):
    mean, width = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]), torch.full((2, 4), 0.5)
    width[1] = 2.0
    others = torch.tensor([[0.0, 1.0, -1.0, 1.1], [5.1, -3.0, 5.0, 9.0]])
    assert acvae.share_within(mean, width, others, 2.0).tolist() == [0.75, 0.5]


# ---------------------------------------------------------------- sets


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_tallies_are_those_of_pairs(acvae, chunk):
    mean, width, y = codes()
    anchors = torch.tensor([2, 3, 20, 39, 11, 0, 7, 8, 30])
    counts = brute_counts(mean, width, anchors, 1.1)
    sizes, hits = acvae.tallies(mean, width, y, anchors, 1.1, chunk)
    assert sizes.shape == hits.shape == (9, 8)
    for t in range(8):
        within = counts >= t
        assert torch.equal(sizes[:, t], within.sum(dim=1))
        assert torch.equal(hits[:, t], (within & (y == y[anchors][:, None])).sum(dim=1))
    assert (sizes[:, 0] == 39).all()  # all but the anchor


@pytest.mark.parametrize(("theta", "least"), [(0.0, 7), (0.1, 7), (1 / 7, 6), (2 / 7, 5), (0.3, 5), (1.0, 0)])
def test_so_many_dimensions_are_needed(acvae, theta, least):
    assert acvae.needed(theta, 7) == least
    assert [acvae.needed(0.1, p) for p in (10, 128, 512)] == [9, 116, 461]


@pytest.mark.parametrize(("theta", "target"), [(0.0, 3), (0.3, 10), (0.5, 30)])
def test_a_range_is_found_for_a_mean_size(acvae, theta, target):
    mean, width, y = codes(60)
    anchors = torch.arange(5, 55)
    alpha = acvae.range_for(mean, width, anchors, theta, target)
    least = acvae.needed(theta, 7)

    def size(alpha):
        return (brute_counts(mean, width, anchors, alpha) >= least).sum().item() / 50

    assert size(alpha - 0.02) <= target <= size(alpha + 0.02)
    assert size(alpha) == pytest.approx(target, abs=0.3)
    assert 0 < alpha < 16


def test_a_range_may_be_wide_and_is_refused_where_there_is_none(acvae):
    mean, width, _ = codes(60)
    wide = acvae.range_for(mean, width / 50, torch.arange(60), 0.0, 10)
    assert wide == pytest.approx(50 * acvae.range_for(mean, width, torch.arange(60), 0.0, 10), rel=0.02)
    with pytest.raises(ValueError, match="no range gives 10 neighbours: raise theta"):
        acvae.range_for(mean, width / 1e6, torch.arange(60), 0.0, 10)


@pytest.mark.parametrize("target", [0, 40, 41])
def test_more_neighbours_than_points_are_refused(acvae, target):
    mean, width, _ = codes()
    with pytest.raises(ValueError, match=f"40 points have no {target} neighbours each"):
        acvae.range_for(mean, width, torch.arange(5), 0.1, target)


def test_what_sets_are_worth_by_hand(acvae):
    found = acvae.told(torch.tensor([4, 0, 1, 5]), torch.tensor([4, 0, 0, 2]))
    expected = {"size": 2.5, "micro": 0.6, "macro": (1 + 0 + 0 + 0.4) / 4, "empty": 0.25, "median": 1}
    assert found == pytest.approx(expected)
    nobody = acvae.told(torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long))
    assert nobody == {"size": 0, "micro": 0, "macro": 0, "empty": 1, "median": 0}


def test_an_oracle_scores_one_and_chance_the_squared_shares(acvae):
    torch.manual_seed(0)
    y = torch.tensor([0] * 120 + [1] * 60 + [2] * 20)
    mean, width = torch.eye(3)[y], torch.full((200, 3), 0.1)
    sizes, hits = acvae.tallies(mean, width, y, torch.arange(200), 1.0)
    assert acvae.told(sizes[:, 3], hits[:, 3])["macro"] == 1
    chance = acvae.nearest_hits(torch.randn(200, 30), y, torch.arange(200), 50)
    assert chance[:, 49].double().mean() / 50 == pytest.approx(0.36 + 0.09 + 0.01, abs=0.03)


@pytest.mark.parametrize("chunk", [3, 500])
def test_the_nearest_are_those_of_scikit_learn(acvae, chunk):
    mean, _, y = codes()
    anchors = torch.tensor([1, 3, 20, 17, 2])
    rows = NearestNeighbors(n_neighbors=9).fit(mean.numpy()).kneighbors(return_distance=False)[anchors]
    expected = (y[torch.as_tensor(rows)] == y[anchors][:, None]).cumsum(dim=1)
    assert torch.equal(acvae.nearest_hits(mean, y, anchors, 9, chunk), expected)


@pytest.mark.parametrize("chunk", [4, 500])
def test_one_radius_is_that_of_the_wanted_mean_size(acvae, chunk):
    code, _, y = codes()
    anchors = torch.arange(30)
    sizes, hits = acvae.radius_sets(code, y, anchors, 6, chunk=chunk)
    distance = torch.cdist(code, code).fill_diagonal_(torch.inf)
    radius = distance[: min(chunk, 30)].flatten().sort().values[6 * min(chunk, 30) - 1]
    inside = distance[:30] <= radius
    assert torch.equal(sizes, inside.sum(dim=1)) and sizes[: min(chunk, 30)].double().mean() == 6
    assert torch.equal(hits, (inside & (y == y[:30, None])).sum(dim=1))


@pytest.mark.parametrize(("theta", "least"), [(0.0, 7), (0.1, 7), (1 / 7, 6), (0.3, 5), (1.0, 0)])
def test_neighbours_are_those_of_pairs(acvae, theta, least):
    mean, width, _ = codes()
    anchors = torch.arange(3, 30)
    rows, columns = acvae.neighbours(mean, width, anchors, 1.4, theta, chunk=5)
    expected = (brute_counts(mean, width, anchors, 1.4) >= least).nonzero()
    assert torch.equal(torch.stack([rows, columns], dim=1), expected)
    assert (anchors[rows] != columns).all()


@pytest.mark.parametrize(("alpha", "theta"), [(-0.1, 0.5), (1.0, -0.01), (1.0, 1.01)])
def test_a_range_or_match_that_cannot_be_is_refused(acvae, alpha, theta):
    mean, width, _ = codes()
    with pytest.raises(ValueError, match="alpha must be 0 or more and theta in"):
        acvae.neighbours(mean, width, torch.arange(3), alpha, theta)


def test_memory_stays_bounded(acvae, monkeypatch):
    """No tensor of a tally is larger than a chunk's counts, whatever the anchors."""
    mean, width, y = codes(200, 5)
    seen, real = [], acvae.in_range
    monkeypatch.setattr(
        acvae, "in_range", lambda m, w, part, a: seen.append(len(part)) or real(m, w, part, a)
    )
    acvae.tallies(mean, width, y, torch.arange(200), 1.0, chunk=32)
    assert seen == [32] * 6 + [8]


# ---------------------------------------------------------------- clusters


def blobs(n=60):
    torch.manual_seed(0)
    y = torch.arange(3).repeat(n // 3)
    return 5 * torch.eye(3)[y] + 0.3 * torch.randn(n, 3), y


def test_a_head_finds_what_its_pairs_tell(acvae):
    z, y = blobs()
    row, column = (y == y[:, None]).fill_diagonal_(False).nonzero().T
    labels = acvae.train_head(z, torch.stack([row, column]), 3, seed=0, steps=200, batch_size=64)(z)
    assert len({(int(a), int(b)) for a, b in zip(labels, y, strict=True)}) == 3


def test_a_head_takes_each_anchors_own_neighbours_with_equal_chance(acvae, monkeypatch):
    z = torch.eye(6) * 3
    pairs = torch.tensor([[1, 1, 1, 4], [0, 2, 5, 3]])
    seen = []

    class Spy(nn.Linear):
        def forward(self, x):
            seen.append(x)
            return super().forward(x)

    monkeypatch.setattr(acvae.nn, "Linear", Spy)
    acvae.train_head(z, pairs, 2, seed=0, steps=1, batch_size=6000)
    scaled = (z - z.mean(dim=0)) / z.std(dim=0)
    one, two = (torch.cdist(part, scaled).argmin(dim=1) for part in seen[:2])
    assert set(one.tolist()) == {1, 4}
    assert (one == 1).double().mean().item() == pytest.approx(0.5, abs=0.03)
    assert set(two[one == 4].tolist()) == {3}
    shares = two[one == 1].bincount(minlength=6) / (one == 1).sum()
    assert shares.tolist() == pytest.approx([1 / 3, 0, 1 / 3, 0, 0, 1 / 3], abs=0.04)


def test_a_head_without_a_pair_is_refused(acvae):
    with pytest.raises(ValueError, match="nobody has a neighbour"):
        acvae.train_head(torch.eye(4), torch.empty(2, 0, dtype=torch.long), 2, seed=0)


def test_a_heads_loss_is_scans(acvae, monkeypatch):
    z, y = blobs()
    row, column = (y == y[:, None]).fill_diagonal_(False).nonzero().T
    seen, backward = [], torch.Tensor.backward
    outputs = []

    class Spy(nn.Linear):
        def forward(self, x):
            outputs.append(super().forward(x))
            return outputs[-1]

    monkeypatch.setattr(acvae.nn, "Linear", Spy)
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: seen.append(self.item()) or backward(self))
    acvae.train_head(z, torch.stack([row, column]), 3, seed=1, steps=1, batch_size=50, weight=2.0)
    p, q = (output.detach().softmax(dim=1).double() for output in outputs[:2])
    agree = -sum(math.log(float(a @ b)) for a, b in zip(p, q, strict=True)) / 50
    mean = p.mean(dim=0)
    entropy = -sum(float(m) * math.log(float(m)) for m in mean)
    assert seen == pytest.approx([agree - 2 * entropy], rel=1e-4)


def test_components_by_hand(acvae):
    pairs = torch.tensor([[0, 1, 3], [1, 2, 6]])
    assert acvae.components(pairs, n=7, m=5) == (
        3,
        0.6,
    )  # {0, 1, 2}, {3, 6}, {4}; 5 is nobody's and no anchor


# ---------------------------------------------------------------- a run


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({}, "AC-VAE"),
        (dict(objective="bank"), "AC-VAE (bank objective)"),
        (dict(objective="attraction", decoder_input="z"), "AC-VAE (attraction objective, decoder fed z)"),
        (dict(noise=0.0), "AC-VAE (no noise)"),
        (dict(objective="reconstruction", decoder_input="z"), "VAE"),
        (dict(objective="reconstruction", noise=0.0), "autoencoder"),
    ],
)
def test_names_say_what_differs(acvae, changed, name):
    about = dict(objective="contrast", decoder_input="z + mean", noise=1.0) | changed
    assert acvae.named("AC-VAE", **about) == name
    with_kmeans = acvae.named("AC-VAE+k-means", **about)
    assert with_kmeans == name.replace("VAE", "VAE+k-means").replace("encoder", "encoder+k-means")


def test_every_way_to_clusters_is_recorded_ac_vae_last(whole):
    namespace, seen = whole
    names = [record["method"] for record in seen.records]
    assert names == ["k-NN on pixels", "AC-VAE+k-means", "AC-VAE, 20 nearest", "AC-VAE"]
    ours = seen.records[-1]
    assert ours["neighbour_accuracy_100"] == pytest.approx(ours["at_100"]["macro"], abs=1e-4)
    assert ours["neighbour_accuracy_10"] == pytest.approx(ours["at_10"]["macro"], abs=1e-4)
    assert np.array_equal(seen.predicted["AC-VAE"], namespace["labels"])
    assert np.array_equal(seen.predicted["AC-VAE+k-means"], namespace["of_kmeans"])
    assert np.array_equal(seen.predicted["AC-VAE, 20 nearest"], namespace["of_nearest"])


def test_a_records_sets_are_those_of_the_run(whole):
    namespace, seen = whole
    mean, width, y = namespace["means"], namespace["widths"], namespace["y"]
    own, ours = y == y[:, None], seen.records[-1]
    for name in ("10", "100", "alpha"):
        told = ours[f"at_{name}"]
        exact = namespace["found"][name]["alpha"]
        assert told["alpha"] == pytest.approx(exact, abs=1e-4)
        within = brute_counts(mean, width, torch.arange(len(y)), exact) >= 5  # of six a fifth may miss
        size, hit = within.sum(dim=1), (within & own).sum(dim=1)
        assert told["size"] == pytest.approx(size.double().mean().item(), abs=1e-3)
        assert told["micro"] == pytest.approx((hit.sum() / size.sum()).item(), abs=1e-3)
        assert told["macro"] == pytest.approx((hit / size.clamp(min=1)).double().mean().item(), abs=1e-3)
        assert told["empty"] == pytest.approx((size == 0).double().mean().item(), abs=1e-3)
    assert ours["at_alpha"]["alpha"] == 2.0
    for name, target in (("10", 10), ("100", 100)):
        around = [namespace["found"][name]["alpha"] + shift for shift in (-0.008, 0.008)]
        sizes = [(brute_counts(mean, width, torch.arange(len(y)), a) >= 5).sum() / len(y) for a in around]
        assert sizes[0] <= target <= sizes[1]


def test_rivals_are_at_equal_size_and_at_each_anchors_own(whole):
    namespace, seen = whole
    y, told = namespace["y"], seen.records[-1]["at_10"]
    size, k = namespace["tables"]["10"][0][:, 5], max(1, round(told["size"]))
    assert size.unique().numel() > 5
    rivals = {"cosine": F.normalize(namespace["means"], dim=1), "euclid": namespace["means"]}
    rivals |= {"output": namespace["outputs"], "pixels": data.to_float(namespace["x"]).flatten(1)}
    for name, code in rivals.items():
        distance = torch.cdist(code, code).fill_diagonal_(torch.inf)
        hits = (y[distance.argsort(dim=1)] == y[:, None]).cumsum(dim=1).double()
        assert told[name][0] == pytest.approx((hits[:, k - 1] / k).mean().item(), abs=1e-3), name
        own = [hits[i, s - 1].item() / s if s else 0.0 for i, s in enumerate(size.tolist())]
        assert told[name][1] == pytest.approx(np.mean(own), abs=1e-3), name
        micro = sum(o * s for o, s in zip(own, size.tolist(), strict=True)) / size.sum().item()
        assert told[name][2] == pytest.approx(micro, abs=1e-3), name
    assert told["radius"]["size"] == pytest.approx(told["size"], abs=0.01)
    unit = rivals["cosine"]
    distance = torch.cdist(unit, unit).fill_diagonal_(torch.inf)
    radius = distance.flatten().sort().values[round(told["size"] * len(y)) - 1]
    inside, own = distance <= radius, y == y[:, None]
    share = (inside & own).sum(dim=1) / inside.sum(dim=1).clamp(min=1)
    assert told["radius"]["macro"] == pytest.approx(share.double().mean().item(), abs=2e-3)
    assert told["radius"]["empty"] == pytest.approx((inside.sum(dim=1) == 0).double().mean().item(), abs=5e-3)


def test_pixels_are_scored_at_ten_and_a_hundred():
    namespace, seen = golden.run(CHAPTER, digits(), **TINY)
    x, y = data.to_float(namespace["x"]).flatten(1), namespace["y"]
    distance = torch.cdist(x, x).fill_diagonal_(torch.inf)
    near = y[distance.argsort(dim=1)] == y[:, None]
    for k in (10, 100):
        expected = near[:, :k].double().mean().item()
        assert seen.records[0][f"neighbour_accuracy_{k}"] == pytest.approx(expected, abs=1e-4)


def test_train_and_test_are_scored_apart():
    namespace, seen = golden.run(CHAPTER, digits(), double=False, **TINY | dict(split="train"))
    ours = seen.records[-1]
    assert ours["trained_on"] == ours["scored_on"] == "train" and ours["n_scored"] == 130
    test = digits()("mnist_5k", "test")
    means, widths, _ = namespace["encoded"](namespace["model"], test.x)
    alpha = namespace["on_test"]["10"]["alpha"]
    around = [
        brute_counts(means, widths, torch.arange(110), alpha + shift) >= 5 for shift in (-0.01, 0, 0.01)
    ]
    assert around[0].sum() / 110 <= 10 <= around[2].sum() / 110
    within = around[1]
    assert ours["test_10"]["size"] == pytest.approx(within.sum().item() / 110, abs=0.05)
    own = test.y == test.y[:, None]
    share = ((within & own).sum(dim=1) / within.sum(dim=1).clamp(min=1)).double().mean().item()
    assert ours["test_10"]["macro"] == pytest.approx(share, abs=2e-3)
    assert 0 <= ours["test_acc"] <= 1


def test_alphas_and_thetas_are_curves_of_the_run(whole):
    namespace, seen = whole
    ours, y = seen.records[-1], namespace["y"]
    own = y == y[:, None]

    def row(alpha, least):
        within = brute_counts(namespace["means"], namespace["widths"], torch.arange(len(y)), alpha) >= least
        size, hit = within.sum(dim=1), (within & own).sum(dim=1)
        share = hit / size.clamp(min=1)
        return [float(v) for v in (size.double().mean(), hit.sum() / size.sum().clamp(min=1), share.mean())]

    names = ("size", "micro", "macro")
    for i, alpha in enumerate(ours["alphas"]["alpha"]):
        assert [ours["alphas"][n][i] for n in names] == pytest.approx(row(alpha, 5), abs=0.01)
    for i, theta in enumerate(ours["thetas"]["theta"]):
        expected = row(2.0, math.ceil((1 - theta) * 6 - 1e-9))
        assert [ours["thetas"][n][i] for n in names] == pytest.approx(expected, abs=0.051)


def test_the_insight_is_told_at_two_widths(whole, acvae):
    namespace, seen = whole
    told, shares = seen.records[-1]["insight"], namespace["within"][2.0]
    means = {"copy": "a copy", "class": "same class", "image": "any other image"}
    for key, name in means.items():
        assert told[key] == pytest.approx(shares[name].mean().item(), abs=1e-4)
    in_set = {"copy_in": "a copy", "class_in": "same class", "image_in": "any other image"}
    for key, name in in_set.items():  # of six dimensions five are needed
        assert told[key] == pytest.approx((shares[name] > 4.5 / 6).double().mean().item(), abs=1e-4)
    pairs = [float(a > b) for a in shares["a copy"] for b in shares["any other image"]]
    assert told["apart"] == pytest.approx(np.mean(pairs), abs=1e-4)
    mean, width, asked = namespace["means"], namespace["widths"], namespace["asked"]
    for name, group in namespace["groups"].items():
        expected = acvae.share_within(mean[asked], width[asked], group, 2.0)
        torch.testing.assert_close(shares[name], expected)
    rows = (namespace["groups"]["same class"][:, None] == mean).all(dim=2).long().argmax(dim=1)
    assert (namespace["y"][rows] == namespace["y"][asked]).all() and (rows != asked).all()
    rows = (namespace["groups"]["any other image"][:, None] == mean).all(dim=2).long().argmax(dim=1)
    assert (rows != asked).all() and len(rows.unique()) > 20
    seen_by = (namespace["groups"]["a copy"] - mean[asked]).norm(dim=1)
    assert (seen_by > 0).all()  # moved, not the image itself


def test_a_head_learns_from_sets_of_twenty(whole):
    namespace, _ = whole
    mean, width, alpha = namespace["means"], namespace["widths"], namespace["of_twenty"]
    every = torch.arange(len(mean))
    within = brute_counts(mean, width, every, alpha) >= 5
    assert torch.equal(namespace["pairs"].T, within.nonzero())
    around = [(brute_counts(mean, width, every, alpha + s) >= 5).sum() / len(mean) for s in (-0.008, 0.008)]
    assert around[0] <= 20 <= around[1]


def test_k_means_is_on_the_directions(whole):
    namespace, _ = whole
    unit = F.normalize(namespace["means"], dim=1)
    expected, _ = baselines.kmeans(unit, 3, 1, n_init=5)
    assert np.array_equal(namespace["of_kmeans"], expected)


def test_weights_and_noise_follow_the_seed():
    def weights(seed):
        return golden.weights(
            golden.run(CHAPTER, digits(), **TINY | dict(seed=seed, iterations=2))[0]["model"]
        )

    assert weights(5) == weights(5) != weights(6)


def test_the_precision_reaches_training_and_codes(monkeypatch):
    seen = []
    monkeypatch.setattr(
        training, "autocast", lambda precision: seen.append(precision) or contextlib.nullcontext()
    )
    golden.run(CHAPTER, digits(), double=False, **TINY | dict(precision="bfloat16", iterations=2))
    assert set(seen) == {"bfloat16"} and len(seen) >= 3


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (dict(alpha=0.0), "alpha must be a number between 0.01 and 10.0"),
        (dict(theta=1.5), "theta must be a number between 0.0 and 1.0"),
        (dict(n_images=100), "n_images must be 0 or at least 500, got 100"),
        (dict(n_anchors=20), "n_anchors must be 0 or at least 100, got 20"),
        (dict(noise=0.0), "set kl_weight to 0 too"),
        (dict(objective="repulsion"), "objective must be one of"),
        (dict(dataset="har_standin"), "dataset must be one of"),
        (dict(crop=0.0), "crop must be a number between"),
        (dict(temperature=0.0), "temperature must be a number between"),
    ],
)
def test_wrong_parameters_are_refused_before_training(changed, sentence):
    with pytest.raises(ValueError, match=sentence):
        checked(**changed)


def test_what_may_be_asked_for_is_not_refused():
    for changed in (dict(noise=0.0, kl_weight=0.0), dict(n_images=500), dict(n_anchors=100), dict(theta=0.0)):
        assert checked(**changed)
    assert checked(noise=0.0, objective="reconstruction")["noise"] == 0.0


def test_every_parameter_is_declared():
    cells = json.loads(chapter_file(CHAPTER).read_text(encoding="utf-8"))["cells"]
    (source,) = (c["source"] for c in cells if "parameters" in c["metadata"].get("tags", []))
    assert list(checked()) == [name for name, _ in checks.assigned("".join(source))]
