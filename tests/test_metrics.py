"""Scores against brute force, closed forms and an independent library."""

import itertools
import math

import networkx
import numpy as np
import pytest
import torch

from deepclust_nb import metrics

SCORES = {name: getattr(metrics, name) for name in ("accuracy", "purity", "nmi", "ari")}


def tables():
    """(y_true, y_pred) with 1 to 6 classes and clusters, of every proportion, some far from uniform."""
    rng = np.random.default_rng(0)
    for n_classes, n_clusters in itertools.product(range(1, 7), repeat=2):
        n = int(rng.integers(max(n_classes, n_clusters), 60))
        y_true = rng.choice(n_classes, n, p=rng.dirichlet(np.ones(n_classes)))
        y_pred = np.where(rng.random(n) < 0.5, y_true % n_clusters, rng.choice(n_clusters, n))
        yield y_true, y_pred


TABLES = list(tables())


def counts(y_true, y_pred):
    classes, clusters = sorted(set(y_true.tolist())), sorted(set(y_pred.tolist()))
    return np.array([[np.sum((y_true == a) & (y_pred == b)) for b in clusters] for a in classes])


def brute_force(y_true, y_pred):
    """The largest share of points right over all one-to-one maps of the smaller side into the larger."""
    table = counts(y_true, y_pred)
    table = table if table.shape[0] <= table.shape[1] else table.T
    rows, columns = table.shape
    return (
        max(table[range(rows), image].sum() for image in itertools.permutations(range(columns), rows))
        / table.sum()
    )


def test_the_tables_hold_what_the_proofs_need():
    shapes = {counts(*pair).shape for pair in TABLES}
    assert (
        any(a < b for a, b in shapes) and any(a > b for a, b in shapes) and any(a == b > 4 for a, b in shapes)
    )
    # Letting several clusters take the same class would be wrong on these.
    assert sum(brute_force(*pair) < metrics.purity(*pair) for pair in TABLES) > 10


def test_accuracy_is_the_best_of_all_one_to_one_maps():
    for pair in TABLES:
        assert metrics.accuracy(*pair) == pytest.approx(brute_force(*pair), abs=1e-12)


def test_accuracy_against_a_matching_of_another_library():
    rng = np.random.default_rng(1)
    for n_classes, n_clusters in [(10, 10), (10, 20), (20, 7), (15, 15)]:
        y_true, y_pred = rng.integers(0, n_classes, 400), rng.integers(0, n_clusters, 400)
        y_pred = np.where(rng.random(400) < 0.4, y_true % n_clusters, y_pred)
        graph = networkx.Graph()
        for (a, b), weight in np.ndenumerate(counts(y_true, y_pred)):
            graph.add_edge(("class", a), ("cluster", b), weight=int(weight))
        matching = networkx.max_weight_matching(graph)
        best = sum(graph.edges[edge]["weight"] for edge in matching)
        assert metrics.accuracy(y_true, y_pred) == pytest.approx(best / 400, abs=1e-12)


def test_accuracy_by_hand_on_rectangular_tables():
    # Two classes of four in three clusters: the third cluster is nobody's, its two points are wrong.
    y_true = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    assert metrics.accuracy(y_true, np.array([0, 0, 0, 2, 1, 1, 1, 2])) == 6 / 8
    # Three classes in two clusters: the class without a cluster is wrong as a whole.
    assert metrics.accuracy(np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 0, 1, 1, 1])) == 5 / 6
    # Greedy matching would take 5 and then 0; the best is 4 + 4.
    table = np.array([[5, 4], [4, 0]])
    y_true, y_pred = (np.repeat(side.ravel(), table.ravel()) for side in np.indices(table.shape))
    assert metrics.accuracy(y_true, y_pred) == 8 / 13


def test_purity_by_hand_and_never_below_accuracy():
    y_true = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    assert metrics.purity(y_true, np.array([0, 0, 1, 1, 2, 2, 2, 1])) == 7 / 8
    assert metrics.purity(y_true, np.arange(8)) == 1 and metrics.accuracy(y_true, np.arange(8)) == 2 / 8
    for pair in TABLES:
        assert metrics.purity(*pair) == pytest.approx(
            counts(*pair).max(axis=0).sum() / len(pair[0]), abs=1e-12
        )
        assert metrics.accuracy(*pair) <= metrics.purity(*pair) + 1e-12


def test_nmi_is_the_closed_form_with_the_arithmetic_mean():
    def entropy(p):
        return -sum(x * math.log(x) for x in p if x > 0)

    told_apart = 0
    for pair in TABLES:
        joint = counts(*pair) / len(pair[0])
        rows, columns = joint.sum(axis=1), joint.sum(axis=0)
        h_true, h_pred = entropy(rows), entropy(columns)
        if h_true == 0 or h_pred == 0:
            continue  # of one class or one cluster: see the constant predictor
        information = sum(
            p * math.log(p / (rows[a] * columns[b])) for (a, b), p in np.ndenumerate(joint) if p > 0
        )
        assert metrics.nmi(*pair) == pytest.approx(2 * information / (h_true + h_pred), abs=1e-9)
        told_apart += abs(information / math.sqrt(h_true * h_pred) - metrics.nmi(*pair)) > 1e-3
    assert told_apart > 5  # the geometric mean of old scikit-learn would not pass


def test_ari_is_the_closed_form_over_pairs():
    for pair in TABLES:
        table = counts(*pair)
        both = sum(math.comb(int(n), 2) for n in table.ravel())
        rows = sum(math.comb(int(n), 2) for n in table.sum(axis=1))
        columns = sum(math.comb(int(n), 2) for n in table.sum(axis=0))
        expected = rows * columns / math.comb(len(pair[0]), 2)
        if (rows + columns) / 2 != expected:
            ari = (both - expected) / ((rows + columns) / 2 - expected)
            assert metrics.ari(*pair) == pytest.approx(ari, abs=1e-9)


@pytest.mark.parametrize("name", SCORES)
def test_names_of_clusters_and_classes_do_not_matter(name):
    rng = np.random.default_rng(2)
    for y_true, y_pred in TABLES:
        score = SCORES[name](y_true, y_pred)
        clusters, classes = rng.permutation(6), np.array([-7, 1000, 3, 4, 2**40, 0])
        assert SCORES[name](y_true, clusters[y_pred]) == pytest.approx(score, abs=1e-12)
        assert SCORES[name](classes[y_true], y_pred) == pytest.approx(score, abs=1e-12)
        order = rng.permutation(len(y_true))
        assert SCORES[name](y_true[order], y_pred[order]) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize("name", SCORES)
def test_the_truth_under_other_names_scores_one(name):
    y = np.arange(60) % 6
    assert SCORES[name](y, np.array([40, -1, 7, 8, 0, 3])[y]) == pytest.approx(1, abs=1e-12)


def test_a_constant_predictor():
    y_true = np.repeat([3, 5, 9], [5, 3, 2])
    constant = np.full(10, 77)
    assert metrics.accuracy(y_true, constant) == metrics.purity(y_true, constant) == 0.5
    assert metrics.nmi(y_true, constant) == pytest.approx(0) and metrics.ari(
        y_true, constant
    ) == pytest.approx(0)


def test_truth_and_prediction_are_not_the_same_argument():
    y_true, y_pred = np.array([0, 0, 1, 1]), np.array([0, 1, 2, 3])
    assert metrics.purity(y_true, y_pred) == 1 and metrics.purity(y_pred, y_true) == 0.5


@pytest.mark.parametrize("name", SCORES)
def test_tensors_lists_and_small_integers_are_welcome_and_floats_come_back(name):
    y_true, y_pred = TABLES[-1]
    score = SCORES[name](y_true, y_pred)
    assert type(score) is float
    for kind in (
        torch.tensor,
        list,
        lambda y: y.astype(np.uint8),
        lambda y: torch.tensor(y, dtype=torch.int32),
    ):
        assert SCORES[name](kind(y_true), kind(y_pred)) == score


def test_matching_pairs_each_cluster_with_one_class():
    for y_true, y_pred in TABLES:
        matching = metrics.match(y_true, y_pred)
        n_classes, n_clusters = counts(y_true, y_pred).shape
        assert len(matching) == len(set(matching.values())) == min(n_classes, n_clusters)
        right = sum(
            matching.get(int(cluster)) == int(label) for label, cluster in zip(y_true, y_pred, strict=True)
        )
        assert right / len(y_true) == pytest.approx(metrics.accuracy(y_true, y_pred), abs=1e-12)
    assert metrics.match([10, 10, 20, 20, 20], [-3, -3, 8, 8, 5]) == {-3: 10, 8: 20}


def test_confusion_has_the_matched_clusters_on_its_diagonal():
    for y_true, y_pred in TABLES:
        y_true, y_pred = y_true * 3 + 1, y_pred * 5 - 4
        table, order = metrics.confusion(y_true, y_pred)
        classes = np.unique(y_true)
        assert table.shape == (len(classes), len(order)) and np.issubdtype(table.dtype, np.integer)
        assert sorted(order.tolist()) == np.unique(y_pred).tolist()
        for (row, column), count in np.ndenumerate(table):
            assert count == np.sum((y_true == classes[row]) & (y_pred == order[column]))
        matching = metrics.match(y_true, y_pred)
        if len(order) >= len(classes):
            assert [matching[int(cluster)] for cluster in order[: len(classes)]] == classes.tolist()
            assert np.trace(table) / len(y_true) == pytest.approx(metrics.accuracy(y_true, y_pred), abs=1e-12)
            assert not set(order[len(classes) :].tolist()) & set(matching)  # unmatched clusters come last
        else:
            assert [matching[int(cluster)] for cluster in order] == sorted(matching.values())


def by_hand(codes, y, k):
    """Mean share of equal labels among the k nearest others, one point at a time."""
    shares = []
    for i in range(len(codes)):
        distance = ((codes - codes[i]) ** 2).sum(axis=1)
        distance[i] = np.inf
        shares.append(np.mean([y[j] == y[i] for j in np.argsort(distance)[:k]]))
    return float(np.mean(shares))


@pytest.mark.parametrize("k", [1, 10, 100])
def test_neighbour_accuracy_by_brute_force(k):
    rng = np.random.default_rng(3)
    y = rng.integers(0, 4, 700)
    codes = (rng.normal(size=(4, 5))[y] + rng.normal(size=(700, 5))).astype(np.float32)
    expected = by_hand(codes.astype(float), y, k)
    assert 0.3 < expected < 0.9
    assert metrics.neighbour_accuracy(codes, y, k) == pytest.approx(expected, abs=1e-6)
    assert metrics.neighbour_accuracy(torch.tensor(codes), torch.tensor(y), k) == pytest.approx(
        expected, abs=1e-6
    )


def test_a_point_is_no_neighbour_of_itself():
    line = np.array([[0.0], [1], [10], [11]])
    assert metrics.neighbour_accuracy(line, [0, 1, 0, 1], 1) == 0
    assert metrics.neighbour_accuracy(line, [0, 0, 1, 1], 1) == 1
    assert metrics.neighbour_accuracy(line, [0, 0, 1, 1], 3) == pytest.approx(1 / 3)
    twins = np.zeros((2, 3))  # two points in one place are each other's neighbours
    assert metrics.neighbour_accuracy(twins, [0, 1], 1) == 0


@pytest.mark.parametrize("score", [*SCORES.values(), metrics.match, metrics.confusion])
@pytest.mark.parametrize(
    ("y_true", "y_pred", "message"),
    [
        ([0, 1, 2], [0, 1], "equally long, got 3 and 2"),
        ([], [], r"y_true must be a non-empty vector of labels, got shape \(0,\)"),
        ([0, 1], [0.0, 1.0], "y_pred must hold integer labels, got float64"),
        ([0.5, 1], [0, 1], "y_true must hold integer labels, got float64"),
        ([[0, 1]], [[0, 1]], r"y_true must be a non-empty vector of labels, got shape \(1, 2\)"),
        ([0, 1], [[0], [1]], r"y_pred must be a non-empty vector of labels, got shape \(2, 1\)"),
        (["a", "b"], [0, 1], "y_true must hold integer labels"),
    ],
)
def test_wrong_labels_get_a_sentence(score, y_true, y_pred, message):
    with pytest.raises(ValueError, match=message):
        score(np.array(y_true), np.array(y_pred))


@pytest.mark.parametrize("k", [0, -1, 4])
def test_wrong_neighbours_get_a_sentence(k):
    with pytest.raises(ValueError, match=f"k must lie between 1 and n - 1 = 3, got {k}"):
        metrics.neighbour_accuracy(np.zeros((4, 2)), np.zeros(4, dtype=int), k)
    with pytest.raises(ValueError, match="equally long, got 4 and 3"):
        metrics.neighbour_accuracy(np.zeros((4, 2)), np.zeros(3, dtype=int), 1)
