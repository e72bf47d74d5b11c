"""VAE, VaDE and DCN against torch.distributions, exact likelihoods, loops, and steps taken by hand."""

import copy
import inspect
import itertools
import math
from types import SimpleNamespace

import golden
import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture
from torch.distributions import Bernoulli, Categorical, Independent, MultivariateNormal, Normal, kl_divergence

from deepclust_nb import baselines, metrics, mixtures, networks, training


def normal(mean, log_variance):
    """N(mean, diag exp(log_variance)), of whole codes."""
    return Independent(Normal(mean, (log_variance / 2).exp()), 1)


def weights(*modules):
    return torch.cat([w.detach().flatten() for module in modules for w in module.parameters()])


@pytest.fixture
def codes():
    """Means, log-variances and draws of nine posteriors, and a mixture of four components, in float64."""
    torch.manual_seed(0)
    mean, log_variance, z = torch.randn(9, 3), torch.randn(9, 3), torch.randn(9, 3)
    mixture = mixtures.Mixture(4, 3).double()
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return mean.double(), log_variance.double(), z.double(), mixture


# ---------------------------------------------------------------- the network


def test_the_encoder_is_the_autoencoders_and_a_second_head():
    torch.manual_seed(0)
    model = mixtures.VAE(12, n_code=3, widths=(7, 5))
    x = torch.rand(6, 1, 3, 4)
    mean, log_variance = model.posterior(x)
    hidden = x.flatten(1)
    for layer in (model.encoder[0], model.encoder[2]):
        hidden = (hidden @ layer.weight.T + layer.bias).clamp(min=0)
    torch.testing.assert_close(mean, hidden @ model.encoder[4].weight.T + model.encoder[4].bias)
    torch.testing.assert_close(log_variance, hidden @ model.log_variance.weight.T + model.log_variance.bias)
    torch.testing.assert_close(baselines.encode(model, x), mean)
    assert mean.shape == log_variance.shape == (6, 3) and not torch.allclose(mean, log_variance)
    sizes = [784, 500, 500, 2000, 10, 2000, 500, 500, 784]
    by_hand = sum(a * b + b for a, b in itertools.pairwise(sizes)) + 2001 * 10
    assert sum(w.numel() for w in mixtures.VAE(784).parameters()) == by_hand == 3_350_804


@pytest.mark.parametrize("init", ["glorot", "fan_in"])
def test_the_log_variance_starts_small_and_drawn_as_the_rest(init):
    torch.manual_seed(0)
    head = mixtures.VAE(12, n_code=50, widths=(400,), init=init).log_variance
    assert torch.equal(head.bias, torch.full((50,), -3.0))
    bound = (6 / 450) ** 0.5 if init == "glorot" else 400**-0.5
    assert head.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert inspect.signature(mixtures.VAE).parameters["init"].default == "glorot"


def test_log_variances_are_kept_within_bounds():
    model = mixtures.VAE(4, n_code=2, widths=(3,))
    torch.nn.init.constant_(model.log_variance.weight, 0)
    for given, kept in ((-30.0, -8.0), (30.0, 8.0), (-7.5, -7.5), (7.5, 7.5)):
        torch.nn.init.constant_(model.log_variance.bias, given)
        assert torch.equal(model.posterior(torch.rand(5, 4))[1], torch.full((5, 2), kept))


def test_a_model_without_hidden_layers_is_linear():
    model = mixtures.VAE(4, n_code=2, widths=())
    x = torch.rand(5, 4)
    torch.testing.assert_close(model.posterior(x)[1], x @ model.log_variance.weight.T - 3)


def test_draws_have_the_moments_of_the_posterior():
    torch.manual_seed(0)
    mean, log_variance = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.7, -1.5]])
    n = 200_000
    z = mixtures.VAE(4, 2, (3,)).sample(mean.expand(n, 2), log_variance.expand(n, 2))
    torch.testing.assert_close(z.mean(0), mean[0], rtol=0, atol=0.02)
    torch.testing.assert_close(z.var(0), log_variance[0].exp(), rtol=0.02, atol=0)
    assert torch.corrcoef(z.T)[0, 1].abs() < 0.01 and z[0, 0] != z[1, 0]


def test_gradients_flow_through_draws(codes):
    mean, log_variance, _, _ = codes
    model = mixtures.VAE(4, 3, (3,))

    def drawn(mean, log_variance):
        torch.manual_seed(1)
        return model.sample(mean, log_variance)

    given = [part.clone().requires_grad_() for part in (mean, log_variance)]
    assert torch.autograd.gradcheck(drawn, given)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_decoding_gives_the_mean_of_the_likelihood(likelihood):
    torch.manual_seed(0)
    model, z = mixtures.VAE(4, 2, (3,), likelihood=likelihood), 3 * torch.randn(50, 2)
    raw = model.logits(z)
    torch.testing.assert_close(raw, model.decoder(z))
    expected = 1 / (1 + (-raw).exp()) if likelihood == "bernoulli" else raw
    torch.testing.assert_close(model.decode(z), expected)


def test_the_start_is_copied_and_the_head_for_the_variance_kept():
    torch.manual_seed(0)
    autoencoder = networks.Autoencoder(12, n_code=2, widths=(7, 5))
    for bias in (w for w in autoencoder.parameters() if w.dim() == 1):
        torch.nn.init.normal_(bias)
    model, x = mixtures.VAE(12, n_code=2, widths=(7, 5), likelihood="gaussian"), torch.rand(6, 12)
    head = weights(model.log_variance)
    assert model.start_from(autoencoder) is model
    assert torch.equal(model.encode(x), autoencoder.encode(x))
    assert torch.equal(model.decode(model.encode(x)), autoencoder(x)[1])
    assert torch.equal(weights(model.log_variance), head)
    before = weights(autoencoder)
    with torch.no_grad():
        [w.add_(1) for w in model.parameters()]
    assert torch.equal(weights(autoencoder), before)


@pytest.mark.parametrize("other", [(12, 2, (7, 6)), (11, 2, (7, 5)), (12, 3, (7, 5)), (12, 2, (7,))])
def test_a_start_of_other_widths_is_refused_and_changes_nothing(other):
    model = mixtures.VAE(12, 2, (7, 5))
    before = weights(model)
    with pytest.raises(ValueError, match=r"must take \[12, 7, 5, 2, 5, 7\] features, got \[1[12], 7"):
        model.start_from(networks.Autoencoder(*other))
    assert torch.equal(weights(model), before)


def test_wrong_networks_are_refused():
    with pytest.raises(ValueError, match='likelihood must be "bernoulli" or "gaussian", got \'poisson\''):
        mixtures.VAE(4, likelihood="poisson")
    with pytest.raises(ValueError, match="init must be"):
        mixtures.VAE(4, init="he")
    with pytest.raises(ValueError, match="at least 1"):
        mixtures.VAE(4, widths=(3, 0))


# ---------------------------------------------------------------- densities and the bound


def test_the_kl_is_that_of_torch_and_of_draws(codes):
    mean, log_variance, _, _ = codes
    posterior, prior = normal(mean, log_variance), normal(*torch.zeros(2, 9, 3).double())
    found = mixtures.gaussian_kl(mean, log_variance)
    torch.testing.assert_close(found, kl_divergence(posterior, prior))
    torch.manual_seed(0)
    z = posterior.sample((100_000,))
    drawn = (posterior.log_prob(z) - prior.log_prob(z)).mean(0)
    torch.testing.assert_close(found, drawn, rtol=0.02, atol=0.02)
    assert torch.equal(mixtures.gaussian_kl(torch.zeros(2, 3), torch.zeros(2, 3)), torch.zeros(2))


def test_the_reconstruction_is_minus_the_log_likelihood():
    torch.manual_seed(0)
    output, x = 3 * torch.randn(9, 5).double(), torch.randn(9, 5).double()
    expected = -Independent(Normal(output, torch.ones_like(output)), 1).log_prob(x)
    torch.testing.assert_close(mixtures.reconstruction_nll(output, x, "gaussian"), expected)
    x = (x > 0).double()
    expected = -Independent(Bernoulli(logits=output), 1).log_prob(x)
    torch.testing.assert_close(mixtures.reconstruction_nll(output, x, "bernoulli"), expected)
    far = mixtures.reconstruction_nll(torch.tensor([[1e4, -1e4]]), torch.tensor([[0.0, 0.0]]), "bernoulli")
    assert far.item() == 1e4
    grey = mixtures.reconstruction_nll(torch.tensor([[0.4, -0.2]]), torch.tensor([[0.25, 0.5]]), "bernoulli")
    p = [1 / (1 + math.exp(-0.4)), 1 / (1 + math.exp(0.2))]
    by_hand = -0.25 * math.log(p[0]) - 0.75 * math.log(1 - p[0]) - 0.5 * math.log(p[1] * (1 - p[1]))
    assert grey.item() == pytest.approx(by_hand, rel=1e-5)


def test_a_new_mixture_is_standard():
    mixture, z = mixtures.Mixture(4, 3), torch.randn(9, 3)
    expected = normal(torch.zeros(9, 3), torch.zeros(9, 3)).log_prob(z) - math.log(4)
    torch.testing.assert_close(mixture.log_joint(z), expected[:, None].expand(9, 4))
    assert {name: tuple(w.shape) for name, w in mixture.named_parameters()} == {
        "logits": (4,),
        "means": (4, 3),
        "log_variances": (4, 3),
    }


def test_the_joint_density_is_its_definition(codes):
    """log pi_c once, not once a dimension as in the public code; half of each log-variance."""
    _, _, z, mixture = codes
    pi = mixture.logits.exp() / mixture.logits.exp().sum()
    by_hand = torch.zeros(9, 4).double()
    for i in range(9):
        for c in range(4):
            component = Normal(mixture.means[c], (mixture.log_variances[c] / 2).exp())
            by_hand[i, c] = pi[c].log() + component.log_prob(z[i]).sum()
    torch.testing.assert_close(mixture.log_joint(z), by_hand)
    posterior = by_hand.exp() / by_hand.exp().sum(1, keepdim=True)
    torch.testing.assert_close(mixture.responsibilities(z), posterior)


def test_variances_of_the_mixture_are_bounded_wherever_they_are_used(codes):
    mean, log_variance, z, mixture = codes
    bounded = copy.deepcopy(mixture)
    with torch.no_grad():
        mixture.log_variances[:2], mixture.log_variances[2:] = -30, 30
        bounded.log_variances[:2], bounded.log_variances[2:] = -8, 8
    torch.testing.assert_close(mixture.log_joint(z), bounded.log_joint(z))
    found, expected = (mixtures.vade_bound(mean, log_variance, z, m) for m in (mixture, bounded))
    torch.testing.assert_close(found, expected)
    torch.manual_seed(0)
    found = mixture.draw(10)
    torch.manual_seed(0)
    torch.testing.assert_close(found, bounded.draw(10))


def test_draws_of_a_component_have_its_moments(codes):
    *_, mixture = codes
    torch.manual_seed(0)
    z = mixture.draw(100_000)
    assert z.shape == (4, 100_000, 3) and not z.requires_grad and z.dtype == torch.float64
    torch.testing.assert_close(z.mean(1), mixture.means.detach(), rtol=0, atol=0.03)
    torch.testing.assert_close(z.var(1), mixture.log_variances.detach().exp(), rtol=0.03, atol=0)


@pytest.mark.parametrize("uniform", [True, False])
def test_a_mixture_of_scikit_learn_gives_the_same_posteriors(uniform):
    rng = np.random.default_rng(0)
    z = np.concatenate([rng.normal(c, 0.5 + c / 4, (n, 3)) for c, n in ((0, 50), (1, 100), (3, 150))])
    fitted = GaussianMixture(3, covariance_type="diag", random_state=0).fit(z)
    assert np.ptp(fitted.weights_) > 0.1
    mixture = mixtures.Mixture.from_gmm(fitted, uniform=uniform)
    expected = copy.deepcopy(fitted)
    if uniform:
        expected.weights_ = np.full(3, 1 / 3)
    found = mixture.double().responsibilities(torch.as_tensor(z)).detach()
    np.testing.assert_allclose(found, expected.predict_proba(z), rtol=1e-4, atol=1e-6)
    density = mixture.log_joint(torch.as_tensor(z)).logsumexp(1).detach()
    np.testing.assert_allclose(density, expected.score_samples(z), rtol=1e-4)
    assert inspect.signature(mixtures.Mixture.from_gmm).parameters["uniform"].default is True


def test_a_mixture_of_other_covariances_is_refused_and_tiny_ones_are_bounded():
    z = np.random.default_rng(0).normal(size=(50, 2))
    with pytest.raises(ValueError, match="covariance_type must be \"diag\", got 'full'"):
        mixtures.Mixture.from_gmm(GaussianMixture(2).fit(z))
    flat = GaussianMixture(2, covariance_type="diag", reg_covar=1e-9).fit(z * [1, 0])
    assert mixtures.Mixture.from_gmm(flat).log_variances[:, 1].tolist() == [-8, -8]


def test_the_terms_of_the_bound_are_their_definition(codes):
    mean, log_variance, z, mixture = codes
    gamma, pi = mixture.responsibilities(z), mixture.logits.softmax(0)
    prior, assignment, entropy = mixtures.vade_bound(mean, log_variance, z, mixture)
    for i in range(9):
        cross = sure = 0
        for c in range(4):
            for j in range(3):
                s, v = mixture.log_variances[c, j].exp(), log_variance[i, j].exp()
                gap = mean[i, j] - mixture.means[c, j]
                cross -= gamma[i, c] / 2 * (s.log() + v / s + gap**2 / s)
            sure += gamma[i, c] * (pi[c] / gamma[i, c]).log()
        assert prior[i].item() == pytest.approx(cross.item())
        assert assignment[i].item() == pytest.approx(sure.item())
        assert entropy[i].item() == pytest.approx(sum(1 + log_variance[i]).item() / 2)


def test_the_bound_is_minus_a_divergence(codes):
    """Against torch's closed form, and against draws of (z, c) from q."""
    mean, log_variance, z, mixture = codes
    gamma, pi = mixture.responsibilities(z), mixture.logits.softmax(0)
    found = sum(mixtures.vade_bound(mean, log_variance, z, mixture))
    posterior = normal(mean[:, None], log_variance[:, None])
    apart = kl_divergence(posterior, normal(mixture.means, mixture.log_variances))
    torch.testing.assert_close(found, -(gamma * (apart + (gamma / pi).log())).sum(1))
    torch.manual_seed(0)
    with torch.no_grad():
        c = Categorical(gamma).sample((100_000,))
        drawn = normal(mean, log_variance).sample((100_000,))
        of_c = normal(mixture.means[c], mixture.log_variances[c])
        ours = normal(mean, log_variance).log_prob(drawn) + Categorical(gamma).log_prob(c)
        theirs = of_c.log_prob(drawn) + Categorical(pi).log_prob(c)
    torch.testing.assert_close(found.detach(), (theirs - ours).mean(0), rtol=0.02, atol=0.05)


def test_one_standard_component_is_the_vae(codes):
    mean, log_variance, z, _ = codes
    terms = mixtures.vade_bound(mean, log_variance, z, mixtures.Mixture(1, 3).double())
    torch.testing.assert_close(sum(terms), -mixtures.gaussian_kl(mean, log_variance))
    assert terms[1].abs().max() == 0


@pytest.fixture
def linear():
    """x = W z + b + noise with codes from a mixture, whose density is known: (x, W, b, mixture, log p(x))."""
    torch.manual_seed(0)
    mixture = mixtures.Mixture(3, 2).double()
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.copy_(torch.randn(parameter.shape))
        w, b, x = torch.randn(5, 2).double(), torch.randn(5).double(), 2 * torch.randn(20, 5).double()

        def density():
            parts = [
                MultivariateNormal(w @ m + b, w @ torch.diag(s.exp()) @ w.T + torch.eye(5).double())
                for m, s in zip(mixture.means, mixture.log_variances, strict=True)
            ]
            inside = torch.stack([part.log_prob(x) for part in parts], dim=1)
            return (mixture.logits.log_softmax(0) + inside).logsumexp(1)

    return x, w, b, mixture, density


def expected_log_likelihood(x, w, b, mean, log_variance):
    """E over q(z) of log p(x | z) for p = N(W z + b, I)."""
    plain = mixtures.reconstruction_nll(mean @ w.T + b, x, "gaussian")
    return -plain - 0.5 * (log_variance.exp() * w.square().sum(0)).sum(1)


def test_the_bound_is_below_the_likelihood_whatever_the_posterior(linear):
    x, w, b, mixture, density = linear
    with torch.no_grad():
        limit = density()
        for _ in range(50):
            mean, log_variance, z = (2 * torch.randn(20, 2).double() for _ in range(3))
            bound = expected_log_likelihood(x, w, b, mean, log_variance)
            bound += sum(mixtures.vade_bound(mean, log_variance, z, mixture))
            assert (bound < limit).all()


def test_the_bound_reaches_the_likelihood_at_the_true_posterior(linear):
    """Columns of W at right angles, so that posteriors are diagonal, and components that are the same."""
    x, w, b, mixture, density = linear
    with torch.no_grad():
        w.copy_(torch.linalg.qr(w).Q * torch.tensor([0.5, 2.0]))
        mixture.means.copy_(mixture.means[:1].expand(3, 2))
        mixture.log_variances.copy_(mixture.log_variances[:1].expand(3, 2))
        s = mixture.log_variances[0].exp()
        v = 1 / (1 / s + w.square().sum(0))
        mean, log_variance = v * ((x - b) @ w + mixture.means[0] / s), v.log().expand(20, 2)
        bound = expected_log_likelihood(x, w, b, mean, log_variance)
        bound += sum(mixtures.vade_bound(mean, log_variance, torch.randn(20, 2).double(), mixture))
        torch.testing.assert_close(bound, density())


def test_codes_far_away_have_responsibilities_and_a_finite_bound(codes):
    *_, mixture = codes
    mixture = mixture.float()
    z = (1e4 * torch.randn(9, 3)).requires_grad_()
    gamma = mixture.responsibilities(z)
    torch.testing.assert_close(gamma.sum(1), torch.ones(9))
    bound = sum(mixtures.vade_bound(z, torch.zeros(9, 3), z, mixture)).sum()
    gradients = torch.autograd.grad(bound, [z, *mixture.parameters()])
    assert all(torch.isfinite(part).all() for part in (gamma, bound, *gradients))


def test_gradients_of_the_bound_are_those_of_finite_differences(codes):
    """To the posterior, to the draw through gamma, and to every part of the mixture."""
    mean, log_variance, z, mixture = codes

    def bound(mean, log_variance, z, logits, means, log_variances):
        own = SimpleNamespace(logits=logits, means=means, log_variances=log_variances)
        own.log_joint = lambda z: mixtures.Mixture.log_joint(own, z)
        return sum(mixtures.vade_bound(mean, log_variance, z, own))

    given = [part.detach().clone().requires_grad_() for part in (mean, log_variance, z)]
    given += [part.detach().clone().requires_grad_() for part in mixture.parameters()]
    assert torch.autograd.gradcheck(bound, given)
    gradients = torch.autograd.grad(bound(*given).sum(), given)
    assert all(part.abs().max() > 1e-3 for part in gradients)


# ---------------------------------------------------------------- DCN's centroids


def sequential(centroids, counts, z, labels):
    """DCN-New's update: the sample is counted, then the centroid moves by one part in that count."""
    centroids, counts = centroids.clone(), counts.clone()
    for code, label in zip(z, labels.tolist(), strict=True):
        counts[label] += 1
        centroids[label] -= (centroids[label] - code) / counts[label]
    return centroids, counts


def test_the_running_mean_is_the_update_of_one_sample_after_another():
    torch.manual_seed(0)
    centroids, z = 3 * torch.randn(5, 3).double(), torch.randn(40, 3).double()
    counts, labels = torch.tensor([100.0, 1.0, 7.0, 3.0, 2.5]).double(), torch.randint(0, 4, (40,))
    expected = sequential(centroids, counts, z, labels)
    assert (labels != 4).all() and len(labels.unique()) == 4
    found = mixtures.running_mean(centroids, counts, z, labels)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)
    assert torch.equal(found[0][4], centroids[4]) and found[1][4] == 2.5
    order = torch.randperm(40)
    torch.testing.assert_close(mixtures.running_mean(centroids, counts, z[order], labels[order]), found)


def test_centroids_are_the_mean_of_all_that_they_took():
    torch.manual_seed(0)
    z, labels = torch.randn(60, 3).double(), torch.arange(60) % 2
    centroids, counts = torch.stack([z[0], z[1]]), torch.ones(2).double()
    for batch in (torch.arange(2, 9), torch.arange(9, 60)):
        centroids, counts = mixtures.running_mean(centroids, counts, z[batch], labels[batch])
    torch.testing.assert_close(centroids, torch.stack([z[0::2].mean(0), z[1::2].mean(0)]))
    assert counts.tolist() == [30, 30]


# ---------------------------------------------------------------- training


@pytest.fixture
def small():
    """Three blobs in twelve dimensions within [0, 1], a small VAE, and the mixture fitted to its codes."""
    torch.manual_seed(1)
    y = torch.arange(90) % 3
    x = (torch.rand(3, 12)[y] + 0.05 * torch.randn(90, 12)).clamp(0, 1)
    model = mixtures.VAE(12, n_code=2, widths=(16,), likelihood="gaussian")
    adam = torch.optim.Adam(model.parameters(), 0.01)
    mixtures.train_vae(model, x, adam, 40, 0, 30, beta=0.01)
    _, fitted = baselines.gmm(baselines.encode(model, x), 3, 0)
    return x, y.numpy(), model, mixtures.Mixture.from_gmm(fitted)


SHORT = {"seed": 0, "iterations": 6, "update_interval": 3, "batch_size": 30}


def mirrored(batch):
    """A view that shows: another order of the features, some of them darker."""
    assert batch.dtype == torch.float32 and batch.shape[1:] == (12,)
    return 0.9 * batch.flip(1)


def centroids_of(model, x):
    return torch.as_tensor(baselines.kmeans(baselines.encode(model, x), 3, 0)[1])


def adam_by_hand(modules, rates, loss, eps):
    """Adam's first step: each weight by its rate, g / (|g| + eps) of it."""
    trained = [[*module.parameters()] for module in modules]
    gradients = iter(torch.autograd.grad(loss, sum(trained, [])))
    with torch.no_grad():
        for group, rate in zip(trained, rates, strict=True):
            for weight in group:
                gradient = next(gradients)
                weight -= rate * gradient / (gradient.abs() + eps)


@pytest.mark.parametrize("view", [None, mirrored])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_one_step_of_vade_is_the_one_taken_by_hand(small, likelihood, view):
    """Posterior, draw, likelihood and divergence of one batch; then Adam with two rates."""
    x, _, model, mixture = small
    model.likelihood = likelihood
    with torch.no_grad():
        mixture.log_variances += 4  # so that clusters share samples
    twin, prior = copy.deepcopy(model), copy.deepcopy(mixture)
    batch = x[next(iter(training.steps(90, 30, epochs=1, seed=5))).index]
    batch = batch if view is None else view(batch)
    mean, log_variance = twin.posterior(batch)
    torch.manual_seed(7)
    z = mean + (log_variance / 2).exp() * torch.randn(30, 2)
    p = twin.decode(z)
    if likelihood == "bernoulli":
        inside = batch * p.log() + (1 - batch) * (1 - p).log()
    else:
        inside = Normal(p, 1.0).log_prob(batch)
    gamma = prior.responsibilities(z)
    apart = kl_divergence(
        normal(mean[:, None], log_variance[:, None]), normal(prior.means, prior.log_variances)
    )
    terms = (gamma * (apart + gamma.log() - prior.logits.log_softmax(0))).sum(1)
    adam_by_hand([twin, prior], [0.03, 0.02], (4 * -inside.sum(1) + terms).mean(), 0.05)
    torch.manual_seed(7)
    settings = dict(lr=0.03, mixture_lr=0.02, eps=0.05, reconstruction_weight=4.0, schedule="constant")
    settings |= SHORT | {"iterations": 1, "seed": 5}
    *_, last = mixtures.vade(model, mixture, x, view=view, **settings)
    torch.testing.assert_close(weights(model), weights(twin), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(weights(mixture), weights(prior), rtol=1e-3, atol=1e-5)
    assert last.losses["reconstruction"] == pytest.approx(-inside.sum(1).mean().item(), rel=1e-4)
    rest = sum(last.losses[name] for name in ("prior", "assignment", "entropy"))
    assert rest == pytest.approx(-terms.mean().item(), rel=1e-4) and len(last.losses) == 4
    torch.testing.assert_close(last.embedding, twin.encode(x).detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("view", [None, mirrored])
def test_one_step_of_the_vae_is_the_one_taken_by_hand(small, view):
    x, _, model, _ = small
    x, twin = x[:30], copy.deepcopy(model)
    batch = x[next(iter(training.steps(30, 30, epochs=1, seed=5))).index]
    batch = batch if view is None else view(batch)
    mean, log_variance = twin.posterior(batch)
    torch.manual_seed(7)
    x_hat = twin.decode(mean + (log_variance / 2).exp() * torch.randn(30, 2))
    reconstruction = -Normal(x_hat, 1.0).log_prob(batch).sum(1).mean()
    kl = kl_divergence(normal(mean, log_variance), normal(*torch.zeros(2, 30, 2))).mean()
    gradients = torch.autograd.grad(reconstruction + 0.3 * kl, [*twin.parameters()])
    with torch.no_grad():
        for weight, gradient in zip(twin.parameters(), gradients, strict=True):
            weight -= 0.05 * gradient
    torch.manual_seed(7)
    sgd = torch.optim.SGD(model.parameters(), 0.05)
    history = mixtures.train_vae(model, x, sgd, 1, 5, 30, view=view, beta=0.3)
    torch.testing.assert_close(weights(model), weights(twin), rtol=1e-4, atol=1e-6)
    assert set(history) == {"reconstruction", "kl"} and len(history["kl"]) == 1
    assert history["reconstruction"][0] == pytest.approx(reconstruction.item(), rel=1e-5)
    assert history["kl"][0] == pytest.approx(kl.item(), rel=1e-5)


@pytest.mark.parametrize("view", [None, mirrored])
@pytest.mark.parametrize("lam", [0.0, 3.0])
def test_steps_of_dcn_are_those_taken_by_hand(small, lam, view):
    """Clusters are those of the last time the sample was seen; both norms are sums; half of lam."""
    x, _, model, _ = small
    twin, means = copy.deepcopy(model), model.encode(x[[0, 3, 6]]).detach()  # all in one blob
    counts, start, stale = torch.full((3,), 2.0), means.clone(), 0

    def nearest(z):
        return torch.tensor([min(range(3), key=lambda c: math.dist(code, means[c])) for code in z.tolist()])

    clusters = nearest(twin.encode(x))
    for step in training.steps(90, 30, iterations=7, seed=5):
        batch = x[step.index] if view is None else view(x[step.index])
        z = twin.encode(batch)
        stale += (nearest(z) != clusters[step.index]).sum().item()
        loss = (twin.decode(z) - batch).square().sum() / 30
        loss = loss + lam / 2 * (z - means[clusters[step.index]]).square().sum() / 30
        gradients = torch.autograd.grad(loss, [*twin.encoder.parameters(), *twin.decoder.parameters()])
        with torch.no_grad():
            trained = [*twin.encoder.parameters(), *twin.decoder.parameters()]
            for weight, gradient in zip(trained, gradients, strict=True):
                weight -= 0.02 * gradient
            z = twin.encode(x[step.index])
        clusters[step.index] = nearest(z)
        means, counts = sequential(means, counts, z, clusters[step.index])
    assert stale > 0 or lam == 0
    settings = SHORT | dict(seed=5, iterations=7, optimizer="sgd", lr=0.02, momentum=0.0, count_start=2)
    *_, last = mixtures.dcn(model, x, start, lam=lam, max_share=1.0, view=view, **settings)
    torch.testing.assert_close(weights(model), weights(twin), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(last.centroids, means, rtol=1e-3, atol=1e-5)
    assert last.counts.tolist() == counts.tolist() and last.iteration == 7
    torch.testing.assert_close(last.embedding, twin.encode(x).detach(), rtol=1e-3, atol=1e-5)
    assert last.labels.tolist() == nearest(last.embedding).tolist()
    assert last.sizes.tolist() == np.bincount(last.labels, minlength=3).tolist()


def test_dcn_reports_its_two_norms(small):
    x, _, model, _ = small
    means = centroids_of(model, x)
    settings = SHORT | {"iterations": 1, "batch_size": 90, "optimizer": "sgd", "lr": 0.0}
    *_, last = mixtures.dcn(model, x, means, **settings)
    z, x_hat = model(x)
    distance = (z[:, None] - means).square().sum(2).amin(1).mean().item()
    assert last.losses["reconstruction"] == pytest.approx((x - x_hat).square().sum(1).mean().item())
    assert last.losses["clustering"] == pytest.approx(distance, rel=1e-4) and len(last.losses) == 2


@pytest.fixture
def optimisers(monkeypatch):
    """The optimiser of each step with the rates of its groups at that step."""
    seen, update = [], training.Steps.update

    def spy(step, optimizer, loss, terms):
        seen.append((optimizer, [group["lr"] for group in optimizer.param_groups]))
        return update(step, optimizer, loss, terms)

    monkeypatch.setattr(training.Steps, "update", spy)
    return seen


def test_rates_fall_by_steps_of_passes_to_their_floor(small, optimisers):
    """A pass of 90 samples in batches of 40 has three steps; every second one the rates are halved."""
    x, _, model, mixture = small
    settings = dict(lr=0.004, mixture_lr=3e-4, decay=0.5, decay_epochs=2, floor=6e-4, batch_size=40)
    for _ in mixtures.vade(model, mixture, x, seed=0, epochs=9, max_share=1.0, **settings):
        pass
    rates = [rate for _, rate in optimisers]
    assert len(rates) == 27 and [rate[1] for rate in rates] == pytest.approx([3e-4] * 27)
    expected = [0.004] * 6 + [0.002] * 6 + [0.001] * 6 + [6e-4] * 9
    assert [rate[0] for rate in rates] == pytest.approx(expected)


def test_rates_fall_as_in_the_public_code(small, optimisers):
    x, _, model, mixture = small
    settings = dict(batch_size=90, lr=0.002, mixture_lr=0.002, max_share=1.0, update_interval=400)
    for _ in mixtures.vade(model, mixture, x, seed=0, epochs=251, **settings):
        pass
    first = [rate for _, (rate, other) in optimisers if rate == other]
    assert len(first) == 251 and first[:10] == [0.002] * 10
    assert first[10:21] == pytest.approx([0.0018] * 10 + [0.00162])
    assert first[210:] == pytest.approx([0.002 * 0.9**21] * 10 + [2e-4] * 31)


def test_other_schedules(small, optimisers):
    x, _, model, mixture = small
    for schedule in ("cosine", "constant"):
        for _ in mixtures.vade(model, mixture, x, schedule=schedule, lr=0.004, mixture_lr=0.001, **SHORT):
            pass
    rates = [rate for _, rate in optimisers]
    cosine = [(1 + math.cos(math.pi * n / 6)) / 2 for n in range(6)]
    assert np.allclose(rates[:6], [[0.004 * c, 0.001 * c] for c in cosine])
    assert rates[6:] == [[0.004, 0.001]] * 6
    adam = torch.optim.Adam(model.parameters(), 0.004)
    mixtures.train_vae(model, x, adam, 2, 0, 30, schedule="cosine")
    assert np.allclose(rates[:6], [[4 * r, r] for (r,) in [[0.001 * c] for c in cosine]])
    assert [rate for _, (rate,) in optimisers[12:]] == pytest.approx([0.004 * c for c in cosine])


def test_optimisers_get_all_weights_and_their_settings(small, optimisers):
    x, _, model, mixture = small
    for _ in mixtures.vade(model, mixture, x, eps=0.01, lr=0.004, mixture_lr=0.001, **SHORT):
        pass
    for name in ("sgd", "adam"):
        means = centroids_of(model, x)
        for _ in mixtures.dcn(model, x, means, optimizer=name, lr=0.003, momentum=0.7, **SHORT):
            pass
    adam, sgd, other = (optimisers[i][0] for i in (0, 6, 12))
    assert len(optimisers) == 18 and len({id(found) for found, _ in optimisers}) == 3
    assert [type(o).__name__ for o in (adam, sgd, other)] == ["Adam", "SGD", "Adam"]
    held = [{id(w) for w in group["params"]} for group in adam.param_groups]
    assert held == [{id(w) for w in part.parameters()} for part in (model, mixture)]
    assert all(
        (g["eps"], g["betas"], g["weight_decay"]) == (0.01, (0.9, 0.999), 0) for g in adam.param_groups
    )
    (group,) = sgd.param_groups
    assert (group["lr"], group["momentum"], len(group["params"])) == (0.003, 0.7, len(held[0]))


def test_parameters_of_the_mixture_come_back_from_their_bounds(small):
    """A parameter left beyond its bound would get no gradient from the clamped value and stay there."""
    x, _, model, mixture = small
    with torch.no_grad():
        mixture.log_variances.fill_(-7.999)
    sizes = []
    settings = dict(mixture_lr=1.0, lr=0.0, schedule="constant", max_share=1.0)
    for _ in mixtures.vade(model, mixture, x, **SHORT | settings | {"update_interval": 1}):
        sizes.append(mixture.log_variances.detach().clone())
    assert all(size.abs().max() <= 8 for size in sizes)
    with torch.no_grad():
        mixture.log_variances.fill_(20.0)
    *_, last = mixtures.vade(model, mixture, x, **SHORT | settings)
    assert mixture.log_variances.max() < 8


# ---------------------------------------------------------------- states


def runs_of(small, **settings):
    """All states of VaDE and of DCN from the same start."""
    x, _, model, mixture = small
    ours, prior = copy.deepcopy(model), copy.deepcopy(mixture)
    training.seed_everything(9)
    drawn = SHORT | settings
    means = centroids_of(model, x)
    return (
        [(s, copy.deepcopy(ours), copy.deepcopy(prior)) for s in mixtures.vade(ours, prior, x, **drawn)],
        [(s, None, None) for s in mixtures.dcn(copy.deepcopy(model), x, means, **{"lr": 0.01} | drawn)],
    )


def test_states_come_at_the_start_at_every_interval_and_at_the_end(small):
    for run in runs_of(small, iterations=7):
        states = [state for state, _, _ in run]
        assert [s.iteration for s in states] == [0, 3, 6, 7]
        assert states[0].changed == 1 and states[0].losses == {}
        for before, after in itertools.pairwise(states):
            assert after.changed == (before.labels != after.labels).mean()
            assert after.sizes.sum() == 90 and after.labels.dtype == np.int64
            assert not torch.equal(before.embedding, after.embedding)
            assert not after.embedding.requires_grad


def test_labels_of_vade_are_of_the_means_and_of_the_mixture_at_that_time(small):
    x = small[0]
    for state, model, mixture in runs_of(small, lr=0.05, max_share=1.0)[0]:
        z = model.encode(x).detach()
        torch.testing.assert_close(state.embedding, z)
        torch.testing.assert_close(state.responsibilities, mixture.responsibilities(z).detach())
        assert state.labels.tolist() == state.responsibilities.argmax(1).tolist()
        assert state.sizes.tolist() == np.bincount(state.labels, minlength=3).tolist()
        assert not state.responsibilities.requires_grad


def test_the_reported_losses_are_means_since_the_last_look(small):
    """Looks draw nothing and change nothing, so that how often they come shows in averages alone."""
    each, three = runs_of(small, update_interval=1), runs_of(small)
    for single, run in zip(each, three, strict=True):
        rows = [state.losses for state, _, _ in single[1:]]
        assert len(rows) == 6
        for name in rows[0]:
            expected = np.mean([row[name] for row in rows[3:]])
            assert run[2][0].losses[name] == pytest.approx(expected, rel=1e-5)


def test_states_do_not_change_after_they_were_yielded(small):
    x, _, model, mixture = small
    means = centroids_of(model, x)
    for run in (
        mixtures.vade(copy.deepcopy(model), mixture, x, lr=0.05, mixture_lr=0.05, **SHORT),
        mixtures.dcn(copy.deepcopy(model), x, means, lr=0.05, **SHORT),
    ):
        kept = next(run)
        copies = copy.deepcopy(kept)
        assert next(run).iteration == 3
        for name, value in kept._asdict().items():
            same = torch.equal if torch.is_tensor(value) else np.array_equal
            assert same(value, getattr(copies, name)), name
    assert torch.equal(means, centroids_of(model, x))


def test_the_same_seed_is_the_same_run(small):
    x, y, *_ = small
    once, again, other = runs_of(small), runs_of(small), runs_of(small, seed=1)
    for kind in range(2):
        ends = [run[kind][-1][0].embedding for run in (once, again, other)]
        assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])
        assert metrics.accuracy(y, once[kind][-1][0].labels) == 1


def test_two_manifolds_are_found_and_the_bound_rises():
    """Two arcs in twenty dimensions, from an autoencoder to VaDE and DCN."""
    training.seed_everything(100)
    y = np.arange(400) % 2
    angle = torch.rand(400, 1) * math.pi
    arc = torch.cat([angle.cos(), angle.sin()], dim=1) @ torch.randn(2, 20)
    x = arc + 3 * torch.randn(2, 20)[y] + 0.05 * torch.randn(400, 20)
    start = networks.Autoencoder(20, n_code=3, widths=(32,), init="glorot")
    baselines.pretrain(start, x, torch.optim.Adam(start.parameters(), 0.01), 20, 100, 50)
    z = baselines.encode(start, x)
    model = mixtures.VAE(20, 3, (32,), likelihood="gaussian").start_from(start)
    mixture = mixtures.Mixture.from_gmm(baselines.gmm(z, 2, 100)[1])
    settings = dict(seed=100, iterations=160, update_interval=40, batch_size=50)
    states = list(mixtures.vade(model, mixture, x, **settings))
    bounds = [sum(s.losses.values()) - 2 * s.losses["reconstruction"] for s in states[1:]]
    assert metrics.accuracy(y, states[-1].labels) == 1 and bounds[-1] > bounds[0]
    *_, last = mixtures.dcn(start, x, baselines.kmeans(z, 2, 100)[1], **settings)
    assert metrics.accuracy(y, last.labels) == 1


def test_images_are_learned_from_in_bytes():
    """uint8 images are divided by 255 on the way in, and a view gets them with their two axes."""
    torch.manual_seed(0)
    images, seen = torch.randint(0, 256, (40, 1, 3, 4), dtype=torch.uint8), []

    def view(batch):
        seen.append((batch.shape[1:], batch.dtype, batch.max().item() <= 1))
        return batch

    ends = []
    for x, kind in ((images, view), (images.flatten(1) / 255, None)):
        training.seed_everything(2)
        model, mixture = mixtures.VAE(12, 2, (8,)), mixtures.Mixture(2, 2)
        adam = torch.optim.Adam(model.parameters(), 0.01)
        mixtures.train_vae(model, x, adam, 1, 0, 20, view=kind)
        for _ in mixtures.vade(model, mixture, x, max_share=1.0, view=kind, **SHORT):
            pass
        for state in mixtures.dcn(model, x, torch.eye(2), max_share=1.0, view=kind, **SHORT):
            ends.append(state.embedding)
    torch.testing.assert_close(ends[2], ends[-1])
    assert seen == [((1, 3, 4), torch.float32, True)] * (2 + 6 + 6)


# ---------------------------------------------------------------- what is refused


def test_collapse_stops_and_truly_unbalanced_data_may_be_let_through(small):
    x, _, model, mixture = small
    same, means = torch.zeros(90, 12), centroids_of(model, x)
    for run, start in ((mixtures.vade, mixture), (mixtures.dcn, means)):
        given = (model, start, same) if run is mixtures.vade else (model, same, start)
        with pytest.raises(training.CollapseError, match="step 0.*more than max_share = 0.9"):
            next(run(*copy.deepcopy(given), **SHORT))
        *_, last = run(*copy.deepcopy(given), max_share=1.0, **SHORT)
        assert last.sizes.max() == 90 and last.iteration == 6


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"update_interval": 0}, "update_interval must be at least 1, got 0"),
        ({"lr": -0.1}, "lr must be at least 0, got -0.1"),
        ({"mixture_lr": float("nan")}, "mixture_lr must be at least 0, got nan"),
        ({"eps": -1}, "eps must be at least 0, got -1"),
        ({"decay": -1}, "decay must be at least 0, got -1"),
        ({"decay_epochs": 0}, "decay_epochs must be at least 1, got 0"),
        ({"floor": -1}, "floor must be at least 0, got -1"),
        ({"reconstruction_weight": -2}, "reconstruction_weight must be at least 0, got -2"),
        ({"schedule": "linear"}, 'schedule must be "steps", "cosine" or "constant", got \'linear\''),
        ({"epochs": 2}, "either epochs or iterations"),
        ({"batch_size": 0}, "batch_size"),
        ({"precision": "float16"}, "precision must be"),
    ],
)
def test_wrong_settings_of_vade_stop_before_training(small, wrong, words):
    x, _, model, mixture = small
    before = weights(model, mixture)
    with pytest.raises(ValueError, match=words):
        next(mixtures.vade(model, mixture, x, **SHORT | wrong))
    assert torch.equal(weights(model, mixture), before)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"update_interval": 0}, "update_interval must be at least 1, got 0"),
        ({"lr": -0.1}, "lr must be at least 0, got -0.1"),
        ({"lam": -1}, "lam must be at least 0, got -1"),
        ({"count_start": 0}, "count_start must be at least 1, got 0"),
        ({"optimizer": "lion"}, 'optimizer must be "sgd" or "adam", got \'lion\''),
        ({"iterations": None}, "either epochs or iterations"),
    ],
)
def test_wrong_settings_of_dcn_stop_before_training(small, wrong, words):
    x, _, model, _ = small
    before = weights(model)
    with pytest.raises(ValueError, match=words):
        next(mixtures.dcn(model, x, torch.zeros(3, 2), **SHORT | wrong))
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize("wrong", [-0.1, 1.1])
def test_a_bernoulli_of_other_numbers_than_probabilities_is_refused(small, wrong):
    x, _, model, mixture = small
    x, adam, words = (
        x.clone(),
        torch.optim.Adam(model.parameters()),
        "x must lie in .0, 1. for the likelihood",
    )
    x[3, 4] = wrong
    next(mixtures.vade(model, mixture, x, **SHORT))
    with pytest.raises(ValueError, match="beta must be at least 0, got -1"):
        mixtures.train_vae(model, x, adam, 1, 0, beta=-1)
    model.likelihood = "bernoulli"
    with pytest.raises(ValueError, match=words):
        next(mixtures.vade(model, mixture, x, **SHORT))
    with pytest.raises(ValueError, match=words):
        mixtures.train_vae(model, x, adam, 1, 0)


def test_a_loss_that_is_not_finite_stops_with_its_term(small):
    x, _, model, mixture = small
    x = x.clone()
    x[:, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="reconstruction is nan at step 0"):
        list(mixtures.vade(model, mixture, x, max_share=1.0, **SHORT))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_precision_reaches_every_pass_and_no_mixture(small, monkeypatch, precision):
    x, _, model, mixture = small
    asked, kinds, autocast, bound = [], [], training.autocast, mixtures.vade_bound
    monkeypatch.setattr(training, "autocast", lambda kind: asked.append(kind) or autocast(kind))

    def spy(*given):
        kinds.extend(part.dtype for part in (*given[:3], *bound(*given)))
        return bound(*given)

    monkeypatch.setattr(mixtures, "vade_bound", spy)
    for state in mixtures.vade(model, mixture, x, precision=precision, **SHORT):
        assert state.embedding.dtype == torch.float32
    assert asked == [precision] * (2 * 6 + 3) and set(kinds) == {torch.float32}
    del asked[:]
    for state in mixtures.dcn(model, x, centroids_of(model, x), precision=precision, **SHORT):
        assert state.centroids.dtype == torch.float32
    assert asked[1:] == [precision] * (1 + 2 * 6 + 3)
    del asked[:]
    adam = torch.optim.Adam(model.parameters())
    mixtures.train_vae(model, x, adam, 2, 0, 45, precision)
    assert asked == [precision] * 8


def test_defaults_are_those_of_the_named_codes():
    """VaDE: Adam 0.002 with eps 1e-4, 0.9 every 10 passes to 2e-4, batches of 100. DCN-New: weights 1 and 1,
    rate 1e-4, batches of 256, counts from 100.
    """

    def defaults(function):
        given = inspect.signature(function).parameters.values()
        return {p.name: p.default for p in given if p.default is not inspect.Parameter.empty}

    common = {"epochs": None, "iterations": None, "update_interval": 140, "max_share": 0.9, "view": None}
    common |= {"precision": "float32"}
    vade = {"lr": 0.002, "mixture_lr": 2e-4, "eps": 1e-4, "schedule": "steps", "decay": 0.9, "floor": 2e-4}
    vade |= {"decay_epochs": 10, "batch_size": 100, "reconstruction_weight": 1.0}
    assert defaults(mixtures.vade) == common | vade
    dcn = {"lam": 2.0, "optimizer": "adam", "lr": 1e-4, "momentum": 0.9, "count_start": 100}
    assert defaults(mixtures.dcn) == common | dcn | {"batch_size": 256}
    assert defaults(mixtures.train_vae) == defaults(baselines.pretrain) | {"beta": 1.0}
    vae = {"n_code": 10, "widths": (500, 500, 2000), "init": "glorot", "likelihood": "bernoulli"}
    assert defaults(mixtures.VAE) == vae


# ---------------------------------------------------------------- golden runs


def of_digits(train, likelihood="bernoulli"):
    """Numbers of `train(model, mixture, x)` on a small VAE of a few digits."""
    with golden.watched(golden.digits()) as seen:
        training.seed_everything(3)
        x = golden.digits()("any").x
        model = mixtures.VAE(784, n_code=4, widths=(16,), likelihood=likelihood)
        adam = torch.optim.Adam(model.parameters(), 0.01)
        history = mixtures.train_vae(model, x, adam, 3, 1, 32, beta=0.1)
        fitted = baselines.gmm(baselines.encode(model, x), 3, 5)[1]
        mixture = mixtures.Mixture.from_gmm(fitted)
        found = [history.values()] + train(model, mixture, x)
    kept = golden.plain(
        [[float(v) if np.size(v) == 1 else golden.checksum(v) for v in part] for part in found]
    )
    return golden.summary({"model": model, "mixture": mixture}, seen) | {"states": kept}


def flat(states):
    return [[v for v in state if not isinstance(v, dict)] + [*state.losses.values()] for state in states]


def by_vade(**settings):
    settings = dict(seed=2, iterations=7, update_interval=3, batch_size=24, max_share=1.0) | settings
    return lambda model, mixture, x: flat(mixtures.vade(model, mixture, x, **settings))


def by_dcn(**settings):
    settings = dict(seed=2, iterations=7, update_interval=3, batch_size=24, max_share=1.0) | settings
    return lambda model, mixture, x: flat(
        mixtures.dcn(model, x, baselines.kmeans(baselines.encode(model, x), 3, 5, n_init=2)[1], **settings)
    )


GOLDEN = {
    "vade": lambda: of_digits(by_vade()),
    "vade, gaussian, cosine": lambda: of_digits(
        by_vade(schedule="cosine", reconstruction_weight=5.0), "gaussian"
    ),
    "vade, falling": lambda: of_digits(by_vade(decay=0.5, decay_epochs=1, floor=1e-3)),
    "dcn": lambda: of_digits(by_dcn()),
    "dcn, sgd": lambda: of_digits(by_dcn(optimizer="sgd", lr=0.01, lam=0.5, count_start=3)),
}
