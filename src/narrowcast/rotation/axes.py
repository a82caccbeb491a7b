"""Axes for the residual stream: orthogonal matrices Q [E, E], whose columns are the new axes.

Covariances C_s [E, E] are second moments of the partial sums at site s, over ranks and tokens; Fisher matrices H_s
[E, E], those of the loss gradient in the site's output. Results are FP64.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from narrowcast.progress import Progress, tell

Moments = Mapping[str, Tensor]

RIDGE = 1e-4  # of the mean variance: what is smaller is noise of few tokens, and no axis should be chosen for it
MAX_STEPS = 100
ENOUGH = 2e-5  # nats a site and axis: a step that gains less is the last
SHORTEST = 2.0**-12
FLATTEST = 0.3  # curvature a matrix that is counted on at least, where two axes hardly differ


def hadamard(num_features: int) -> Tensor:
    """Sylvester's Hadamard matrix where E is a power of two; otherwise, E = m 2^k with m odd, DCT_m x Hadamard_2^k.

    DCT_m is the orthogonal cosine transform (type II), x the Kronecker product: no seed, hardly an entry is zero.

    >>> hadamard(2) * 2**0.5
    tensor([[ 1.,  1.],
            [ 1., -1.]], dtype=torch.float64)
    """
    rotation = _dct(num_features // (num_features & -num_features))
    while len(rotation) < num_features:
        rotation = torch.kron(rotation, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2**0.5)
    return rotation


def _dct(size: int) -> Tensor:
    frequency, place = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    waves = torch.cos(math.pi / size * (place + 0.5) * frequency)
    norms: Tensor = waves.norm(dim=1, keepdim=True)
    return waves / norms


def principal(covariances: Moments) -> Tensor:
    """Eigenvectors of the sum of covariances, each divided by its trace; the largest variance last."""
    return _eigenvectors([covariance.double() / covariance.double().trace() for covariance in covariances.values()])


def fisher_pooled(covariances: Moments, fishers: Moments) -> Tensor:
    """The same, each site weighted by the trace of its Fisher matrix: by how much its errors matter."""
    return _eigenvectors(
        [
            covariance.double() / covariance.double().trace() * fishers[site].double().trace()
            for site, covariance in covariances.items()
        ]
    )


def joint(covariances: Moments, fishers: Moments) -> Tensor:
    """Axes of least `objective`, downhill from `principal`: a local minimum.

    Joint diagonalization in the sense of Flury and Gautschi (1986), by conjugate gradients on rotations: all pairs of
    axes are turned at once, each as far as its own slope and curvature say, the whole made shorter until the objective
    falls. A step costs two products of [E, E] a matrix, in FP32, and another for each time that it is halved.
    """
    rotation_EE = principal(covariances)
    matrices = [_seen_from(rotation_EE, matrix).float() for matrix in _ridged(covariances, fishers)]
    value, length = _log_diagonals(matrix.diagonal() for matrix in matrices), 1.0
    slope_EE, newton_EE = _slope_and_newton_step(matrices)
    turn_EE = newton_EE
    for step in range(MAX_STEPS):
        tell(Progress("turning axes, step", step))
        step_EE, turned, gained, length = _shortened(turn_EE, length, matrices, value)
        if gained <= ENOUGH * len(covariances) * len(turn_EE):
            break
        rotation_EE, value, length = rotation_EE @ step_EE, value - gained, min(1.0, 2 * length)
        matrices = [step_EE.float().T @ half_turned for half_turned in turned]
        last_slope_EE, last_fall = slope_EE, (newton_EE * slope_EE).sum()
        slope_EE, newton_EE = _slope_and_newton_step(matrices)
        kept = (newton_EE * (slope_EE - last_slope_EE)).sum() / last_fall  # Polak and Ribiere
        turn_EE = newton_EE + kept.clamp(min=0) * turn_EE
        if (turn_EE * slope_EE).sum() <= 0:
            turn_EE = newton_EE
    orthogonal: Tensor = torch.linalg.qr(rotation_EE).Q  # of many products
    return orthogonal


def _shortened(
    turn_EE: Tensor, length: float, matrices: Sequence[Tensor], value: float
) -> tuple[Tensor, list[Tensor], float, float]:
    """The rotation along `turn_EE` at the first of `length`, half of it, ... where the objective is below `value`.

    With the products of the matrices and it, what it gains, and its length; a gain of zero or less where there is none.
    """
    while True:
        step_EE = torch.matrix_exp(length * turn_EE.double())
        tried_EE = step_EE.float()
        turned = [matrix @ tried_EE for matrix in matrices]
        gained = value - _log_diagonals((half_turned * tried_EE).sum(dim=0) for half_turned in turned)
        if gained > 0 or length < SHORTEST:
            return step_EE, turned, gained, length
        length /= 2


def objective(rotation_EE: Tensor, covariances: Moments, fishers: Moments) -> float:
    """Mean over sites and axes of log(variance x Fisher information) along the axis, in nats.

    At many bits a value, allotted to axes by what they are worth, it is the log of the loss but for a constant: ln 4 =
    1.39 nats less are worth a bit a value.
    """
    matrices = _ridged(covariances, fishers)
    total = _log_diagonals(_seen_from(rotation_EE, matrix).diagonal() for matrix in matrices)
    return total / (len(covariances) * len(rotation_EE))


def _eigenvectors(matrices: Sequence[Tensor]) -> Tensor:
    vectors: Tensor = torch.linalg.eigh(torch.stack(list(matrices)).sum(dim=0)).eigenvectors
    return vectors


def _ridged(covariances: Moments, fishers: Moments) -> list[Tensor]:
    matrices = [matrix.double() for matrix in (*covariances.values(), *(fishers[site] for site in covariances))]
    return [matrix + RIDGE * matrix.diagonal().mean() * torch.eye(len(matrix)) for matrix in matrices]


def _seen_from(rotation_EE: Tensor, matrix: Tensor) -> Tensor:
    return rotation_EE.T @ matrix @ rotation_EE


def _log_diagonals(diagonals: Iterable[Tensor]) -> float:
    return sum(diagonal.double().log().sum().item() for diagonal in diagonals)


def _slope_and_newton_step(matrices: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Skew [E, E]: how fast the objective falls as each pair of axes is turned, and that over its curvature.

    Turned by t in the plane (i, k), a_ii becomes a_ii + 2 t a_ik + t^2 (a_kk - a_ii) + ...
    """
    slope_EE, curvature_EE = torch.zeros_like(matrices[0]), torch.full_like(matrices[0], FLATTEST * len(matrices))
    for matrix in matrices:
        diagonal = matrix.diagonal()
        inverse = 1 / diagonal
        slope_EE.addcmul_(matrix, inverse[:, None] - inverse, value=2)
        curvature_EE.addmm_(diagonal[:, None], inverse[None], alpha=2)
        curvature_EE.addmm_(inverse[:, None], diagonal[None], alpha=2)
    return slope_EE, slope_EE / (curvature_EE - 4 * len(matrices))
