"""FLAME, a morphable head model: compute a mesh from shape, expression and pose.

Source: Li, Bolkart, Black, Li, Romero, "Learning a model of facial shape and expression from 4D scans" (2017). Linear
blend skinning follows SMPL (Loper et al., 2015). With shape β, expression ψ and joint rotations θ:

    T(β, ψ, θ) = v_template + shapedirs·β + expressiondirs·ψ + posedirs·(R(θ₁…) - I)
    J(β, ψ)    = J_regressor · (v_template + shapedirs·β + expressiondirs·ψ)
    x'         = Σ_k w_k (G_k x + o_k)     with G_k = G_parent R_k,  o_k = o_parent + (G_parent - G_k) J_k

where x is a vertex of T and w its skinning weights, which sum to 1. The offset o_k keeps joint k fixed under its own
rotation.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from facesnap_ext.errors import FaceSnapError, reason_of
from facesnap_ext.weights.recognise import Kind, require
from facesnap_ext.weights.tensors import read_index, read_tensors
from facesnap_ext.weights.unpickle import read_pickled_arrays

VERSION = 1
SHAPE_COLUMNS = 300  # shape directions in FLAME's `shapedirs`; the remaining columns are expression directions
NOT_FINITE = (
    "FLAME computes points that are not finite or far outside the photo, so its file is damaged; convert FLAME's "
    "generic_model.pkl again."
)
GLOBAL, NECK, JAW, LEFT_EYE, RIGHT_EYE = range(5)  # indices of the joints in FLAME's files


@dataclass(frozen=True)
class Flame:
    """A FLAME model with V vertices, F triangles, J joints, S shape and E expression directions.

    Lengths are in metres; x points to the viewer's right, y up and z towards the viewer. The attributes are named as in
    FLAME's files and in the converted file.
    """

    v_template: Tensor  # [V,3]
    shapedirs: Tensor  # [V,3,S] metres per standard deviation
    expressiondirs: Tensor  # [V,3,E]
    posedirs: Tensor  # [V,3,9·(J-1)]
    J_regressor: Tensor  # [J,V]
    weights: Tensor  # [V,J] skinning weights; each row sums to 1
    parents: Tensor  # [J] int64; -1 for the root, otherwise less than the joint's own index
    faces: Tensor  # [F,3] int64

    def to(self, device: torch.device | str) -> Flame:
        """Return a copy on `device`."""
        return Flame(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def rotation_matrices(rotation_vectors: Tensor) -> Tensor:
    """Convert rotation vectors to matrices by Rodrigues' formula: R = I + sin(θ)/θ K + (1 - cos(θ))/θ² K².

    K is the cross-product matrix of the rotation vector. The result is exact at θ = 0.

    Args:
        rotation_vectors: [...,3] axis times angle θ, in radians.

    Returns:
        [...,3,3]
    """
    x, y, z = rotation_vectors.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))
    angle = rotation_vectors.norm(dim=-1)[..., None, None]
    identity = torch.eye(3, dtype=cross.dtype, device=cross.device)
    # torch.sinc(a) is sin(πa)/(πa)
    first, second = torch.sinc(angle / math.pi), torch.sinc(angle / (2 * math.pi)) ** 2 / 2
    return identity + first * cross + second * (cross @ cross)


def unposed_vertices(flame: Flame, shape: Tensor, expression: Tensor) -> Tensor:
    """Return the mesh in the rest pose: v_template + shapedirs·β + expressiondirs·ψ.

    Args:
        shape: [N,≤S] standard deviations; missing coefficients are zero.
        expression: [N,≤E] standard deviations; missing coefficients are zero.

    Returns:
        [N,V,3] metres.
    """
    shapedirs = flame.shapedirs[..., : shape.shape[1]]
    expressiondirs = flame.expressiondirs[..., : expression.shape[1]]
    return (
        flame.v_template
        + torch.einsum("vcs,ns->nvc", shapedirs, shape)
        + torch.einsum("vce,ne->nvc", expressiondirs, expression)
    )


def posed_vertices(flame: Flame, shape: Tensor, expression: Tensor, pose: Tensor) -> Tensor:
    """Return the posed mesh, by the equations in the module's docstring.

    Args:
        shape: [N,≤S] as in `unposed_vertices`.
        expression: [N,≤E] as in `unposed_vertices`.
        pose: [N,J,3] rotation vectors in radians, relative to each joint's parent.

    Returns:
        [N,V,3] metres.
    """
    unposed = unposed_vertices(flame, shape, expression)
    joints = torch.einsum("jv,nvc->njc", flame.J_regressor, unposed)
    local = rotation_matrices(pose)
    identity = torch.eye(3, dtype=local.dtype, device=local.device)
    corrected = unposed + torch.einsum("vcp,np->nvc", flame.posedirs, (local[:, 1:] - identity).flatten(1))

    rotations: list[Tensor] = []
    offsets: list[Tensor] = []
    for joint, parent in enumerate(flame.parents.tolist()):
        inherited = rotations[parent] if joint else identity.expand_as(local[:, 0])
        rotation = inherited @ local[:, joint]
        offset = ((inherited - rotation) @ joints[:, joint, :, None]).squeeze(-1)
        rotations.append(rotation)
        offsets.append(offset + offsets[parent] if joint else offset)

    # Σ w_k G_k x = x + Σ w_k (G_k - I) x; the second form leaves an unposed mesh bit-identical
    turns = torch.einsum("vj,njab->nvab", flame.weights, torch.stack(rotations, 1) - identity)
    shifts = torch.einsum("vj,nja->nva", flame.weights, torch.stack(offsets, 1))
    return corrected + torch.einsum("nvab,nvb->nva", turns, corrected) + shifts


def full_pose(flame: Flame, global_and_jaw: Tensor) -> Tensor:
    """Expand DECA's pose code to all joints.

    Args:
        global_and_jaw: [N,6] global and jaw rotation vectors in radians.

    Returns:
        [N,J,3] rotation vectors in radians; the other joints are zero.
    """
    pose = global_and_jaw.new_zeros(len(global_and_jaw), len(flame.parents), 3)
    pose[:, GLOBAL], pose[:, JAW] = global_and_jaw[:, :3], global_and_jaw[:, 3:]
    return pose


def load_flame(path: Path) -> Flame:
    """Load a FLAME model converted by `convert_flame` onto the CPU as float32.

    Raises:
        FaceSnapError: the file is not a converted FLAME model, has a newer format version, or its tensors are
            inconsistent.
    """
    require(path, Kind.FLAME, "convert FLAME's generic_model.pkl once with `python -m facesnap_ext convert`.")
    version = read_index(path).metadata.get("version", str(VERSION))
    if not re.fullmatch("[0-9]{1,9}", version):
        raise FaceSnapError(
            f"The metadata of {path.name} is damaged (its version is {reason_of(repr(version), 80)}); convert FLAME's "
            "generic_model.pkl again."
        )
    if int(version) > VERSION:
        raise FaceSnapError(f"{path.name} was written by a newer FaceSnap; update the extension.")
    tensors = read_tensors(path)
    check_flame(tensors, path.name)
    types = {"parents": torch.int64, "faces": torch.int64}
    return Flame(
        **{field.name: tensors[field.name].to(types.get(field.name, torch.float32)) for field in fields(Flame)}
    )


def save_flame(path: Path, tensors: dict[str, Tensor], source: str) -> None:
    """Write the tensors of a `Flame` as a converted file.

    Args:
        path: file to write.
        tensors: tensors by the attribute names of `Flame`.
        source: origin of the tensors, stored in the file's metadata and named in error messages.

    Raises:
        FaceSnapError: the tensors are inconsistent.
    """
    from safetensors.torch import save_file

    check_flame(tensors, source)
    metadata = {"format": "facesnap-flame", "version": str(VERSION), "source": source}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


def convert_flame(source: Path, destination: Path) -> None:
    """Convert FLAME's pickle (2020's `generic_model.pkl`, or 2023's) to dense float32 safetensors.

    Nothing in the pickle is executed.

    Raises:
        FaceSnapError: `read_pickled_arrays` rejects the pickle, or it is not a FLAME model.
    """
    arrays = read_pickled_arrays(source)
    names = ("v_template", "shapedirs", "posedirs", "J_regressor", "weights", "kintree_table", "f")
    if missing := [name for name in names if name not in arrays]:
        raise FaceSnapError(
            f"{source.name} is not a FLAME model: {missing[0]} is missing; use FLAME's generic_model.pkl."
        )
    tensors = {name: _float_tensor(arrays[name]) for name in names[:5]}
    directions = tensors["shapedirs"]
    tensors["shapedirs"] = directions[..., :SHAPE_COLUMNS]
    tensors["expressiondirs"] = directions[..., SHAPE_COLUMNS:]
    parents = torch.from_numpy(np.atleast_2d(arrays["kintree_table"])[0].astype(np.int64))
    parents[:1] = -1  # FLAME stores the root's parent as the largest uint32
    tensors["parents"] = parents
    tensors["faces"] = torch.from_numpy(arrays["f"].astype(np.int64))
    save_flame(destination, tensors, source.name)


def check_flame(tensors: dict[str, Tensor], name: str) -> None:
    """Check that the tensors form a consistent FLAME model.

    Args:
        tensors: tensors by the attribute names of `Flame`.
        name: file name for error messages.

    Raises:
        FaceSnapError: a tensor is missing, has the wrong shape, or contains invalid indices.
    """
    template, parents = tensors.get("v_template"), tensors.get("parents")
    vertices = len(template) if template is not None else 0
    joints = len(parents) if parents is not None else 0
    expected: dict[str, tuple[int | None, ...]] = {
        "v_template": (vertices, 3),
        "shapedirs": (vertices, 3, None),
        "expressiondirs": (vertices, 3, None),
        "posedirs": (vertices, 3, 9 * (joints - 1)),
        "J_regressor": (joints, vertices),
        "weights": (vertices, joints),
        "parents": (joints,),
        "faces": (None, 3),
    }
    for key, shape in expected.items():
        if key not in tensors:
            raise FaceSnapError(f"{name} is not a complete FLAME model: {key} is missing; download the file again.")
        actual = tuple(tensors[key].shape)
        if len(actual) != len(shape) or any(size not in (None, other) for size, other in zip(shape, actual)):
            raise FaceSnapError(
                f"{name} is not a valid FLAME model: {key} has the wrong shape {actual}; download the file again."
            )
    faces, parents = tensors["faces"], tensors["parents"]
    if faces.is_floating_point() or parents.is_floating_point() or not _are_indices(faces, parents, vertices):
        raise FaceSnapError(
            f"{name} is not a valid FLAME model: its joints or triangles are invalid; download the file again."
        )


def _are_indices(faces: Tensor, parents: Tensor, vertices: int) -> bool:
    """Return whether all triangles have vertices of the mesh, and all joints come after their parents."""
    if len(parents) <= JAW or not faces.numel():
        return False
    ordered = parents[0] == -1 and all(0 <= parent < joint for joint, parent in enumerate(parents.tolist()) if joint)
    return bool(ordered) and int(faces.min()) >= 0 and int(faces.max()) < vertices


def _float_tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))
