"""How a clustering is scored against labels that it never saw.

Labels measure here and choose nothing: no function of this module is called by a training loop of the book.
Every score takes `y_true` first and `y_pred` second, both (n,) integers with any values, as NumPy arrays,
tensors or lists. Introduced in the chapter `foundations`.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from sklearn.neighbors import NearestNeighbors


def accuracy(y_true, y_pred):
    """Clustering accuracy (ACC): the share of points that the best one-to-one matching of clusters to classes
    gets right.

    ACC = max over one-to-one maps m of (1/n) * #{i : y_true[i] = m(y_pred[i])}, found by linear assignment
    on the contingency table. The table may be rectangular: with more clusters than classes the points of
    an unmatched cluster all count as wrong, with fewer those of an unmatched class do.

    Parameters: y_true, y_pred: (n,) integers.
    Returns: a float in (0, 1].
    Raises: ValueError for empty, unequally long, two-dimensional or non-integer labels.
    Source: Xie, Girshick and Farhadi 2016 (DEC), equation 10.
    """
    table = contingency_matrix(*_labels(y_true, y_pred))
    return float(table[linear_sum_assignment(table, maximize=True)].sum() / table.sum())


def purity(y_true, y_pred):
    """Share of points that belong to the largest class of their cluster: every cluster votes, and two
    clusters may vote for the same class.

    Never below ACC, and 1 when every point is a cluster of its own, so the two must not be mixed.

    Parameters: y_true, y_pred: (n,) integers.
    Returns: a float in (0, 1].
    Raises: ValueError as `accuracy`.
    """
    table = contingency_matrix(*_labels(y_true, y_pred))
    return float(table.max(axis=0).sum() / table.sum())


def nmi(y_true, y_pred):
    """Normalised mutual information, 2 I(Y; C) / (H(Y) + H(C)): the arithmetic mean of the entropies.

    scikit-learn before 0.22 divided by the geometric mean, so old papers may differ in the third decimal.

    Parameters: y_true, y_pred: (n,) integers.
    Returns: a float in [0, 1].
    Raises: ValueError as `accuracy`.
    """
    return float(normalized_mutual_info_score(*_labels(y_true, y_pred), average_method="arithmetic"))


def ari(y_true, y_pred):
    """Rand index of all pairs of points, adjusted so that a random clustering scores 0 on average.

    Parameters: y_true, y_pred: (n,) integers.
    Returns: a float in [-0.5, 1].
    Raises: ValueError as `accuracy`.
    Source: Hubert and Arabie 1985.
    """
    return float(adjusted_rand_score(*_labels(y_true, y_pred)))


def scores(y_true, y_pred):
    """The scores that every record has, to six decimals: a dict of acc, purity, nmi and ari.

    Parameters: y_true, y_pred: (n,) integers.
    Raises: ValueError as `accuracy`.
    """
    found = {"acc": accuracy, "purity": purity, "nmi": nmi, "ari": ari}
    return {name: round(score(y_true, y_pred), 6) for name, score in found.items()}


def match(y_true, y_pred):
    """The one-to-one matching behind ACC.

    Parameters: y_true, y_pred: (n,) integers.
    Returns: a dict from cluster to class; a cluster without a class of its own is absent.
    Raises: ValueError as `accuracy`.
    """
    y_true, y_pred = _labels(y_true, y_pred)
    classes, clusters = np.unique(y_true), np.unique(y_pred)
    rows, columns = linear_sum_assignment(contingency_matrix(y_true, y_pred), maximize=True)
    return {int(clusters[c]): int(classes[r]) for r, c in zip(rows, columns, strict=True)}


def confusion(y_true, y_pred):
    """Contingency table with its columns ordered so that matched clusters lie on the diagonal.

    Parameters: y_true, y_pred: (n,) integers.
    Returns: (table, order): table (n_classes, n_clusters) of counts, rows in order of class; order
        (n_clusters,), the cluster that each column stands for. Unmatched clusters come last; when there
        are fewer clusters than classes, the columns follow the order of the classes they are matched to.
    Raises: ValueError as `accuracy`.
    """
    y_true, y_pred = _labels(y_true, y_pred)
    clusters = np.unique(y_pred)
    table = contingency_matrix(y_true, y_pred)
    _, matched = linear_sum_assignment(table, maximize=True)  # rows come back sorted
    columns = np.concatenate([matched, np.setdiff1d(np.arange(len(clusters)), matched)]).astype(int)
    return table[:, columns], clusters[columns]


def neighbour_accuracy(codes, y, k=10):
    """Mean share of the k nearest other points that carry the point's own label.

    Parameters: codes: (n, d) floats, compared by Euclidean distance; y: (n,) integers; k: 1 to n - 1.
    Returns: a float in [0, 1].
    Raises: ValueError when k is out of range or the lengths differ.
    """
    codes, y = np.asarray(codes, dtype=np.float32), np.asarray(y)
    if len(codes) != len(y):
        raise ValueError(f"codes and y must be equally long, got {len(codes)} and {len(y)}")
    if not 1 <= k < len(y):
        raise ValueError(f"k must lie between 1 and n - 1 = {len(y) - 1}, got {k}")
    # Without an argument scikit-learn leaves each point out of its own neighbours, duplicates included.
    neighbours = NearestNeighbors(n_neighbors=k).fit(codes).kneighbors(return_distance=False)
    return float((y[neighbours] == y[:, None]).mean())


def _labels(y_true, y_pred):
    y_true, y_pred = np.asarray(y_true), np.asarray(y_pred)
    for name, y in (("y_true", y_true), ("y_pred", y_pred)):
        if y.ndim != 1 or y.size == 0:
            raise ValueError(f"{name} must be a non-empty vector of labels, got shape {y.shape}")
        if not np.issubdtype(y.dtype, np.integer):
            raise ValueError(f"{name} must hold integer labels, got {y.dtype}")
    if len(y_true) != len(y_pred):
        raise ValueError(f"y_true and y_pred must be equally long, got {len(y_true)} and {len(y_pred)}")
    return y_true, y_pred
