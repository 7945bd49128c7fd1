"""Subspaces as mediators: an orthonormal basis, and the site whose projection onto it is swapped.

With `B [k, width]` a swap is `M <- M + (M' - M) B^T B`: what lies in the subspace is as on the other prompt, all else
stays. As a control the same change is written along another basis `A` instead, `M <- M + (M' - M) B^T A`, which has
the same norm at every token, as both are orthonormal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from numpy.typing import ArrayLike

from remote_mediation.errors import SiteError
from remote_mediation.sites import Site

if TYPE_CHECKING:
    import torch

# How far B B^T may be off the identity, in float32.
_ROUNDING = 1e-4
_NAME = "basis"
"""Of the tensor in a safetensors file."""


@dataclass(frozen=True, eq=False)
class Basis:
    """An orthonormal basis of a subspace; equal to another one of the same numbers."""

    vectors: npt.NDArray[np.float32]
    """`[k, width]`, rows orthonormal."""

    def __post_init__(self) -> None:
        """Refuse what is no orthonormal basis.

        Raises:
            SiteError: not a matrix, without a direction, with more of them than its width, or not orthonormal.
        """
        shape = self.vectors.shape
        if self.vectors.dtype != np.float32 or len(shape) != 2 or not 0 < shape[0] <= shape[1]:
            raise SiteError(
                f"a basis is float32 [k, width] with 1 to width directions, not {self.vectors.dtype} {list(shape)}"
            )
        off = np.abs(self.vectors @ self.vectors.T - np.eye(len(self.vectors))).max()
        if not off <= _ROUNDING:
            raise SiteError(
                f"the basis {list(shape)} is not orthonormal: B B^T is {off:.2g} off the identity; "
                "make one of its directions with Basis.spanning"
            )

    @classmethod
    def spanning(cls, directions: ArrayLike) -> Basis:
        """A basis of what directions `[k, width]`, or one `[width]`, span; one direction keeps its sign.

        Raises:
            SiteError: they are not independent, or not finite.
        """
        given = np.atleast_2d(np.asarray(directions, dtype=np.float64))
        if not np.isfinite(given).all() or np.linalg.matrix_rank(given) < len(given):
            raise SiteError(f"directions {list(given.shape)} span no subspace of {len(given)} dimensions")
        orthogonal, lengths = np.linalg.qr(given.T)
        return cls((orthogonal * np.sign(np.diag(lengths))).T.astype(np.float32))

    @classmethod
    def random(cls, size: int, width: int, rng: np.random.Generator) -> Basis:
        """A basis of a subspace of which none is likelier than another."""
        return cls.spanning(rng.normal(size=(size, width)))

    @property
    def size(self) -> int:
        """Directions in it."""
        return len(self.vectors)

    @property
    def width(self) -> int:
        """Numbers in a direction."""
        return int(self.vectors.shape[1])

    @cached_property
    def digest(self) -> str:
        """Hash of its numbers."""
        content = repr(self.vectors.shape).encode() + np.ascontiguousarray(self.vectors).tobytes()
        return hashlib.blake2b(content, digest_size=12).hexdigest()

    @cached_property
    def tensor(self) -> torch.Tensor:
        """As it is sent; many writes share it."""
        import torch

        return torch.from_numpy(self.vectors.copy())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Basis) and self.digest == other.digest

    def __lt__(self, other: Basis) -> bool:
        return self.digest < other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def cosine(self, vector: ArrayLike) -> float:
        """Of the angle with a vector `[width]`: with a sign where it is one direction, else with what it spans.

        NaN where the vector is 0.
        """
        given = np.asarray(vector, dtype=np.float64)
        length = float(np.linalg.norm(given))
        if not length:
            return np.nan
        along = self.vectors @ given / length
        return float(along[0]) if self.size == 1 else float(np.linalg.norm(along))

    def __repr__(self) -> str:
        return f"Basis({self.size} of {self.width}, {self.digest})"


@dataclass(frozen=True)
class DirectionRecord:
    """A `Direction` as JSON data, its basis as `[k, width]` numbers."""

    vectors: list[list[float]]
    layer: int | None
    position: str
    length: float
    model: str


@dataclass(frozen=True)
class Direction:
    """A direction of the residual stream, or a few, and where it was found: what one run saves and another applies."""

    basis: Basis
    """What it spans."""
    layer: int | None = None
    """Decoder layer after which it was found; None where nobody says."""
    position: str = ""
    """Token at which it was found, as pairs name it; empty where nobody says."""
    length: float = float("nan")
    """Of the difference of means; NaN of several directions."""
    model: str = ""
    """In which it was found."""

    @property
    def vector(self) -> npt.NDArray[np.float32]:
        """`[width]`, as long as the difference of means."""
        return np.asarray(self.length * self.basis.vectors[0], dtype=np.float32)

    def safetensors(self) -> bytes:
        """As a safetensors file with one tensor, the basis; all else stands in its metadata."""
        from safetensors.numpy import save

        about = {
            "model": self.model,
            "layer": "" if self.layer is None else str(self.layer),
            "position": self.position,
            "length": repr(self.length),
        }
        return bytes(save({_NAME: np.ascontiguousarray(self.basis.vectors)}, about))

    @classmethod
    def load(cls, path: Path) -> Self:
        """From a `.npy` file, or a safetensors file with one tensor, `[k, width]` or one direction `[width]`.

        The length of one direction is that in the metadata, or else its own; several are made orthonormal.

        Raises:
            SiteError: the file cannot be read, or holds no directions.
        """
        found, about = _read(path)
        if len(found) != 1:
            raise SiteError(f"{path} holds {len(found)} tensors; give a file with the one that is the basis")
        given = _checked(path, found[0])
        try:
            layer = int(about["layer"]) if about.get("layer") else None
            own = float(np.linalg.norm(given[0])) if len(given) == 1 else np.nan
            length = float(about.get("length", own))
        except ValueError as error:
            raise SiteError(f"the metadata of {path} say what is no number: {error}") from error
        return cls(Basis.spanning(given), layer, about.get("position", ""), length, about.get("model", ""))

    def record(self) -> DirectionRecord:
        """As JSON data."""
        return DirectionRecord(self.basis.vectors.tolist(), self.layer, self.position, self.length, self.model)

    @classmethod
    def of_record(cls, record: DirectionRecord) -> Self:
        """The inverse of `record`.

        Raises:
            SiteError, ValueError: its vectors are no basis.
        """
        basis = Basis(np.array(record.vectors, dtype=np.float32))
        return cls(basis, record.layer, record.position, record.length, record.model)


class _Content(NamedTuple):
    """Of a file."""

    tensors: list[npt.NDArray[Any]]
    about: Mapping[str, str]
    """Its metadata."""


def _read(path: Path) -> _Content:
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".npy":
            return _Content([np.asarray(np.load(path))], {})
        with safe_open(path, framework="numpy") as file:
            return _Content([file.get_tensor(name) for name in file.keys()], dict(file.metadata() or {}))  # noqa: SIM118
    except (OSError, ValueError, EOFError, TypeError, SafetensorError) as error:
        raise SiteError(f"no basis can be read from {path}: {error}; give a .npy or safetensors file") from error


def _checked(path: Path, found: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Directions `[k, width]`. Raises: SiteError, they are none."""
    if found.ndim not in (1, 2) or not found.size or found.dtype.kind not in "fiu":
        raise SiteError(f"{path} holds {found.dtype} {list(found.shape)}; a basis is [k, width] or [width] of numbers")
    given = np.atleast_2d(found).astype(np.float64)
    if not np.isfinite(given).all():
        raise SiteError(f"{path} holds numbers that are not finite; save the direction again")
    if not given.any(axis=1).all():
        raise SiteError(f"{path} holds a direction that is 0; save the direction again")
    return given


@dataclass(frozen=True, order=True)
class Subspace(Site):
    """A site of which only the projection onto a basis is the mediator."""

    basis: Basis = field(kw_only=True)
    """What is read of the difference between the prompts; as wide as the site's columns."""
    along: Basis | None = field(default=None, kw_only=True)
    """Directions that the change is written along where it is a control; the basis itself where None."""

    def __post_init__(self) -> None:
        """Refuse directions that are no match for the basis.

        Raises:
            SiteError: `along` has another shape.
        """
        if self.along and self.along.vectors.shape != self.basis.vectors.shape:
            raise SiteError(f"{self.basis} cannot be written along {self.along}: they differ in shape")
