"""The assignment of rows to columns with the largest sum of scores."""

import numpy as np


def best_assignment(score_CC: np.ndarray) -> list[int]:
    """The permutation with the largest sum of scores (Kuhn 1955, by shortest augmenting paths).

    Args:
        score_CC: Row i, column j: the score if i is assigned to j.

    Returns:
        The column of each row.
    """
    size = len(score_CC)
    cost = np.zeros((size + 1, size + 1))
    cost[1:, 1:] = -score_CC
    row_price, column_price = np.zeros(size + 1), np.zeros(size + 1)
    row_of = np.zeros(size + 1, dtype=int)  # column -> its row; column 0 holds the row to assign
    for row in range(1, size + 1):
        row_of[0], column = row, 0
        distance, previous = np.full(size + 1, np.inf), np.zeros(size + 1, dtype=int)
        visited = np.zeros(size + 1, dtype=bool)
        while row_of[column] != 0:
            visited[column] = True
            current = row_of[column]
            reduced = cost[current] - row_price[current] - column_price
            shorter = ~visited & (reduced < distance)
            distance[shorter], previous[shorter] = reduced[shorter], column
            nearest = int(np.where(visited, np.inf, distance).argmin())
            step = distance[nearest]
            row_price[row_of[visited]] += step
            column_price[visited] -= step
            distance[~visited] -= step
            column = nearest
        while column != 0:
            row_of[column], column = row_of[previous[column]], int(previous[column])
    order = [0] * size
    for column in range(1, size + 1):
        order[row_of[column] - 1] = column - 1
    return order
