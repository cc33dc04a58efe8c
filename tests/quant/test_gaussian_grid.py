"""The Gaussian grids of pairs: published errors, exact integrals against a mesh, Lloyd's conditions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bitpalette.quant.gaussian_grid import _integrate, gaussian_grid, grid_error


def mesh_integrals(points: np.ndarray, step: float = 0.02) -> tuple[float, np.ndarray, np.ndarray]:
    """(squared error a coordinate, mass, first moment) by sums over a mesh of the plane."""
    line = np.arange(-6, 6 + step / 2, step)
    density = np.exp(-(line**2) / 2) * step / math.sqrt(2 * math.pi)
    error, mass, moment = 0.0, np.zeros(len(points)), np.zeros((len(points), 2))
    for x, p in zip(line, density, strict=True):
        squares = (x - points[:, 0, None]) ** 2 + (line - points[:, 1, None]) ** 2
        nearest, weight = squares.argmin(0), p * density
        error += squares.min(0) @ weight / 2
        mass += np.bincount(nearest, weight, len(points))
        moment += np.stack([np.bincount(nearest, weight * v, len(points)) for v in (np.full_like(line, x), line)], 1)
    return error, mass, moment


@pytest.mark.parametrize(("entries", "reached"), [(16, 0.107599), (64, 0.02954), (256, 0.00773)])
def test_error_is_below_the_published(entries: int, reached: float) -> None:
    error = grid_error(np.array(gaussian_grid(entries)))
    assert error < reached < {16: 0.1086, 64: 0.0297, 256: 0.00776}[entries]


def test_four_points_are_two_by_two() -> None:
    """Two levels of N(0, 1) leave 1 - 2/pi, and no four points in the plane do better."""
    assert abs(grid_error(np.array(gaussian_grid(4))) - (1 - 2 / math.pi)) < 1e-6


@pytest.mark.parametrize("entries", [4, 5, 16, 37])
def test_integrals_are_exact(entries: int) -> None:
    points = np.array(gaussian_grid(entries)) + np.random.default_rng(0).normal(size=(entries, 2)) / 4
    mass, moment = _integrate(points)
    error, by_mesh, moment_by_mesh = mesh_integrals(points)
    assert abs(mass.sum() - 1) < 1e-8
    assert abs(grid_error(points) / error - 1) < 1e-4
    assert np.abs(mass - by_mesh).max() < 1e-3 and np.abs(moment - moment_by_mesh).max() < 2e-3


@pytest.mark.parametrize("entries", [4, 7, 16, 64])
def test_points_are_the_means_of_their_cells(entries: int) -> None:
    points = np.array(gaussian_grid(entries))
    mass, moment = _integrate(points)
    assert np.abs(moment / mass[:, None] - points).max() < 1e-5


def test_every_size_gives_distinct_points() -> None:
    for entries in (6, 9, 17, 100):
        points = np.array(gaussian_grid(entries))
        apart = np.hypot(*(points[:, None] - points).T) + 9 * np.eye(entries)
        assert points.shape == (entries, 2) and apart.min() > 0.1


def test_the_same_every_time() -> None:
    assert gaussian_grid.__wrapped__(16) == gaussian_grid(16)


def test_points_that_coincide_are_refused() -> None:
    with pytest.raises(RuntimeError, match="coincide"), np.errstate(invalid="ignore", divide="ignore"):
        grid_error(np.array([[0.0, 0], [0, 0], [1, 1], [-1, 1]]))
