"""The chapter `foundations`: what it shows is what the helper runs."""

import ast
import inspect
import types

import pytest
import torch
from loader import definitions

from deepclust_nb import baselines, networks, training

CHAPTER = "foundations"


def tree(function):
    """A function's syntax tree without its docstring."""
    node = ast.parse(inspect.getsource(function)).body[0]
    if ast.get_docstring(node) is not None:
        node.body = node.body[1:]
    return ast.dump(node)


@pytest.mark.parametrize("name", ["student_t", "target_distribution", "pretrain"])
def test_shown_functions_are_the_helpers(name):
    shown, used = getattr(definitions(CHAPTER), name), getattr(baselines, name)
    assert tree(shown) == tree(used)
    assert len(inspect.getsource(shown).splitlines()) <= 25


@pytest.fixture
def stage():
    """A small model, its images and a state whose target is one-hot at the classes."""
    torch.manual_seed(0)
    model = networks.Autoencoder(12, n_code=2, widths=(16,))
    x, y = torch.rand(30, 1, 3, 4), torch.arange(30) % 3
    centroids = torch.randn(3, 2)
    q = baselines.student_t(model.encode(x), centroids).detach()
    perfect = torch.eye(3)[y]
    return model, x, y.numpy(), types.SimpleNamespace(centroids=centroids, p=perfect, q=q, labels=y.numpy())


def test_pseudo_labels_that_are_true_teach_what_labels_teach(stage):
    model, x, y, state = stage
    assert definitions(CHAPTER).conflict(model, state, x, y)["randomness"] == pytest.approx(1, abs=1e-5)


def test_renamed_clusters_teach_the_same_and_a_wrong_target_does_not(stage):
    """The match of clusters to classes is the best one, whatever the clusters are called."""
    model, x, y, state = stage
    conflict = definitions(CHAPTER).conflict
    turn = torch.tensor([2, 0, 1])
    renamed = types.SimpleNamespace(
        centroids=state.centroids[turn.argsort()],
        p=torch.eye(3)[turn[torch.as_tensor(y)]],
        labels=turn[y].numpy(),
    )
    q = baselines.student_t(model.encode(x), renamed.centroids)
    torch.testing.assert_close(q[:, turn], state.q)
    renamed_result, result = conflict(model, renamed, x, y), conflict(model, state, x, y)
    assert renamed_result["randomness"] == pytest.approx(1, abs=1e-5)
    assert renamed_result["drift"] == pytest.approx(result["drift"], abs=1e-5)
    state.p = torch.eye(3)[(torch.as_tensor(y) + 1) % 3]
    assert conflict(model, state, x, y)["randomness"] < 0.9


def test_drift_is_the_cosine_of_finite_differences(stage):
    """For a target unlike the truth, so that the two clustering gradients cannot be taken for each other."""
    model, x, y, state = stage
    state.p = torch.eye(3)[(torch.as_tensor(y) + 1) % 3]
    drift = definitions(CHAPTER).conflict(model, state, x, y)["drift"]
    model, x, p, centroids = model.double(), x.double(), state.p.double(), state.centroids.double()
    weights = list(model.encoder.parameters())
    flat = torch.nn.utils.parameters_to_vector(weights).detach()

    @torch.no_grad()
    def losses(vector):
        torch.nn.utils.vector_to_parameters(vector, weights)
        z, x_hat = model(x)
        q = baselines.student_t(z, centroids)
        return (x_hat - x.flatten(1)).square().mean(), -(p * q.log()).sum(1).mean()

    steps = 1e-6 * torch.eye(len(flat)).double()
    slopes = [
        [(a - b).item() for a, b in zip(losses(flat + h), losses(flat - h), strict=True)] for h in steps
    ]
    expected = torch.nn.functional.cosine_similarity(*torch.tensor(slopes).T, dim=0).item()
    assert drift == pytest.approx(expected, abs=1e-4)


def test_the_cosine_does_not_depend_on_order_or_length():
    weights = [torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)]

    def pair():
        return 5 * weights[0].sum() + 5 * weights[1].sum(), weights[0].sum() - weights[1].sum()

    cosine = definitions(CHAPTER).gradient_cosine
    assert cosine(*pair(), weights) == pytest.approx(1 / 3) == cosine(*pair()[::-1], weights)


def test_a_run_is_followed_whole(stage):
    chapter, (model, x, y, _) = definitions(CHAPTER), stage
    training.seed_everything(0)
    _, centroids = baselines.kmeans(baselines.encode(model, x), 3, 0)
    states = baselines.dec(
        model, x, centroids, seed=0, iterations=8, update_interval=2, tol=0.0, batch_size=10
    )
    last, trace = chapter.follow(states, model, x, y, every=2)
    assert [row["iteration"] for row in trace] == [0, 2, 4, 6, 8] and last.iteration == 8
    assert ["drift" in row for row in trace] == [True, False, True, False, True]
    kept = chapter.told(last, trace)
    assert kept["drift"] == pytest.approx(sum(row["drift"] for row in trace[::2]) / 3)
    assert kept["arrays"]["curve"].shape == (5, 3) and kept["steps"] == 8 and kept["converged"] is False
