import pytest
import torch

from rotopo.rotation.givens import Delta, chain, tree
from rotopo.rotation.householder import after_reflections
from tests.rotation.reference import givens_product, reflections, shifted

LAYOUTS = {"tree": tree, "chain": chain}
SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 48, 50]


def angles_of(D: int, directions: int = 2, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(D)
    return (torch.rand(directions, D - 1, generator=generator, dtype=dtype) - 0.5) * 6.2


def as_matrix(delta: Delta, D: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Rᵀ, given that rotate(rows) = rows @ Rᵀ."""
    return delta.rotate(torch.eye(D, dtype=dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("D", SIZES)
def test_is_the_product_of_plane_rotations(layout: str, directions: int, D: int):
    angles = angles_of(D, directions)
    expected = givens_product(angles, layout)
    delta = LAYOUTS[layout](angles)
    torch.testing.assert_close(as_matrix(delta, D), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(as_matrix(delta.inverse(), D), expected.T, rtol=0, atol=1e-14)


def two_factors(layout: str, angles: torch.Tensor) -> Delta:
    D = angles.shape[1] + 1
    first, second = (LAYOUTS[layout](part) for part in angles.chunk(2))
    return second.shifted(D).after(first)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("D", SIZES)
def test_a_second_factor_follows_the_first_one_coordinate_further_along(
    layout: str, directions: int, D: int
):
    angles = angles_of(D, 2 * directions)
    first, second = (givens_product(part, layout) for part in angles.chunk(2))
    expected = shifted(second, layout) @ first
    delta = two_factors(layout, angles)
    torch.testing.assert_close(as_matrix(delta, D), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(as_matrix(delta.inverse(), D), expected.T, rtol=0, atol=1e-14)


@pytest.mark.parametrize("D", [16, 18, 32])
def test_at_the_start_a_second_factor_turns_other_planes_than_the_first(D: int):
    """The derivatives of R by both factors' angles span twice the planes that one's do; at 18 the
    last block has two coordinates, which are one plane however they are shifted."""
    angles = torch.zeros(2, D - 1, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(
        lambda a: as_matrix(two_factors("tree", a), D).flatten(), angles
    )
    rank = torch.linalg.matrix_rank(jacobian.reshape(D * D, -1))
    assert rank == 2 * (D - 1) - (D == 18)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("D", [7, 48, 50, 96, 257, 576])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("factors", [1, 2])
def test_is_orthogonal_with_determinant_one(
    layout: str, D: int, dtype: torch.dtype, tolerance: float, factors: int
):
    angles = angles_of(D, 2 * factors, dtype)
    vectors = torch.randn(4, D, dtype=dtype, generator=torch.Generator().manual_seed(1))
    delta = LAYOUTS[layout](angles) if factors == 1 else two_factors(layout, angles)
    delta = after_reflections(delta, vectors)
    # The factors are of the dtype in question; the products in float64 add nothing.
    exact = Delta(*(None if part is None else part.double() for part in delta))
    R = as_matrix(exact, D)
    error = (R.T @ R - torch.eye(D, dtype=torch.float64)).abs().max()
    assert error <= factors * tolerance  # each adds its rounding
    assert torch.linalg.slogdet(R).sign == 1


@pytest.mark.parametrize("D", [3, 48, 50, 576])
def test_zero_angles_are_the_identity_bit_for_bit(D: int):
    rows = torch.randn(9, D)
    zero = torch.zeros(4, D - 1)
    for delta in (
        *(layout(zero[:2]) for layout in LAYOUTS.values()),
        *(two_factors(layout, zero) for layout in LAYOUTS),
    ):
        assert torch.equal(delta.rotate(rows), rows)
        assert torch.equal(delta.inverse().rotate(rows), rows)


def test_no_matrix_of_the_full_size_is_built_for_the_tree():
    D = 4096
    for delta, ranks in (
        (tree(torch.zeros(2, D - 1)), 1),
        (two_factors("tree", torch.zeros(4, D - 1)), 2),
    ):
        most = (1 + 2 * ranks) * D * 64
        assert sum(part.numel() for part in delta if part is not None) <= most


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("D", [2, 5, 6])
@pytest.mark.parametrize("start", ["zero", "random"])
def test_gradient_with_respect_to_the_angles(layout: str, D: int, start: str):
    angles = torch.zeros(2, D - 1, dtype=torch.float64) if start == "zero" else angles_of(D)
    rows = torch.randn(3, D, dtype=torch.float64)
    torch.autograd.gradcheck(
        lambda a: LAYOUTS[layout](a).rotate(rows), angles.requires_grad_(), raise_exception=True
    )


@pytest.mark.parametrize("parts", ["both", "blocks", "low rank"])
@pytest.mark.parametrize("D", [6, 7])
def test_gradient_with_respect_to_the_parts(parts: str, D: int):
    delta = tree(angles_of(D))
    if parts == "blocks":
        delta = Delta(delta.blocks)
    if parts == "low rank":
        delta = Delta(None, delta.left, delta.right)
    delta = Delta(*(None if part is None else part.detach().requires_grad_() for part in delta))
    rows, grad = torch.randn(2, 5, D, dtype=torch.float64)
    expected = torch.autograd.grad(
        (grad * delta.rotate(rows)).sum(), [part for part in delta if part is not None]
    )
    found = [part for part in delta.gradient(rows, grad) if part is not None]
    torch.testing.assert_close(found, list(expected))


@pytest.mark.parametrize("D", [2, 7, 48])
@pytest.mark.parametrize("n", [2, 4, 6])
def test_reflections_follow_in_order(D: int, n: int):
    vectors = torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    alone = as_matrix(after_reflections(Delta(), vectors), D)
    torch.testing.assert_close(alone, reflections(vectors), rtol=0, atol=1e-13)
    angles = angles_of(D)
    joined = as_matrix(after_reflections(tree(angles), vectors), D)
    expected = givens_product(angles, "tree") @ reflections(vectors)
    torch.testing.assert_close(joined, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("D", [1, 7, 48, 50, 576, 577])
def test_equal_reflections_are_the_identity_bit_for_bit(D: int):
    generator = torch.Generator().manual_seed(D)
    rows = torch.randn(9, D, generator=generator)
    vectors = torch.randn(2, D, generator=generator).repeat_interleave(2, 0)
    delta = after_reflections(Delta(), vectors)
    assert torch.equal(delta.rotate(rows), rows)
    assert torch.equal(delta.inverse().rotate(rows), rows)
    product = rows
    for u in vectors:  # which reflecting twice is not
        product = product - 2 * torch.outer(product @ u, u) / (u @ u)
    assert D == 1 or not torch.equal(product, rows)
