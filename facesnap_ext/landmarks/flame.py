"""FLAME, the morphable head: from shape, expression and pose to a mesh.

Source: Li, Bolkart, Black, Li, Romero, "Learning a model of facial shape and expression from 4D scans" (2017); linear
blend skinning as in SMPL (Loper et al., 2015). With shape β, expression ψ and joint rotations θ:

    T(β, ψ, θ) = v_template + shapedirs·β + expressiondirs·ψ + posedirs·(R(θ₁…) - I)
    J(β, ψ)    = J_regressor · (v_template + shapedirs·β + expressiondirs·ψ)
    x'         = Σ_k w_k (G_k x + o_k)     with G_k = G_parent R_k,  o_k = o_parent + (G_parent - G_k) J_k

where x is a vertex of T and w its skinning weights, which sum to 1. The offset o_k says that a joint's own rotation
leaves the joint where its parent puts it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.weights.recognise import Kind, require
from facesnap_ext.weights.tensors import read_index, read_tensors
from facesnap_ext.weights.unpickle import read_pickled_arrays

VERSION = 1
SHAPE_COLUMNS = 300  # of FLAME's `shapedirs`; the columns behind them are the expressions
GLOBAL, NECK, JAW, LEFT_EYE, RIGHT_EYE = range(5)  # the joints' order in FLAME's files


@dataclass(frozen=True)
class Flame:
    """A model of V vertices, F triangles, J joints, S shape and E expression directions; metres, +y up, +z front.

    The names are those of FLAME's own files, and of the converted file's tensors.
    """

    v_template: Tensor  # [V,3]
    shapedirs: Tensor  # [V,3,S] metres for one standard deviation
    expressiondirs: Tensor  # [V,3,E]
    posedirs: Tensor  # [V,3,9·(J-1)]
    J_regressor: Tensor  # [J,V]
    weights: Tensor  # [V,J] skinning, rows sum to 1
    parents: Tensor  # [J] int64, -1 for the root, else smaller than the joint
    faces: Tensor  # [F,3] int64

    def to(self, device: torch.device | str) -> Flame:
        return Flame(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def rotation_matrices(rotation_vectors: Tensor) -> Tensor:
    """Rodrigues' formula, exact at zero: R = I + sin(θ)/θ K + (1 - cos(θ))/θ² K², K the cross product with the vector.

    Args:
        rotation_vectors: [...,3] axis times angle θ in radians.

    Returns:
        [...,3,3]
    """
    x, y, z = rotation_vectors.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))
    angle = rotation_vectors.norm(dim=-1)[..., None, None]
    identity = torch.eye(3, dtype=cross.dtype, device=cross.device)
    # torch.sinc(a) is sin(πa)/(πa)
    once, twice = torch.sinc(angle / math.pi), torch.sinc(angle / (2 * math.pi)) ** 2 / 2
    return identity + once * cross + twice * (cross @ cross)


def unposed_vertices(flame: Flame, shape: Tensor, expression: Tensor) -> Tensor:
    """The mesh at rest: v_template + shapedirs·β + expressiondirs·ψ.

    Args:
        shape: [N,≤S] in standard deviations; directions beyond it stay at zero.
        expression: [N,≤E]

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
    """The posed mesh (the equations of this module).

    Args:
        shape, expression: as for `unposed_vertices`.
        pose: [N,J,3] rotation vectors in radians, each relative to the joint's parent.

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
        before = rotations[parent] if joint else identity.expand_as(local[:, 0])
        rotation = before @ local[:, joint]
        offset = ((before - rotation) @ joints[:, joint, :, None]).squeeze(-1)
        rotations.append(rotation)
        offsets.append(offset + offsets[parent] if joint else offset)

    # Σ w_k G_k x is x + Σ w_k (G_k - I) x, which leaves an unposed mesh as it is to the last bit
    turns = torch.einsum("vj,njab->nvab", flame.weights, torch.stack(rotations, 1) - identity)
    shifts = torch.einsum("vj,nja->nva", flame.weights, torch.stack(offsets, 1))
    return corrected + torch.einsum("nvab,nvb->nva", turns, corrected) + shifts


def full_pose(flame: Flame, global_and_jaw: Tensor) -> Tensor:
    """DECA's six pose numbers, [N,6] global and jaw rotation vectors, as [N,J,3] with the other joints at rest."""
    pose = global_and_jaw.new_zeros(len(global_and_jaw), len(flame.parents), 3)
    pose[:, GLOBAL], pose[:, JAW] = global_and_jaw[:, :3], global_and_jaw[:, 3:]
    return pose


def load_flame(path: Path) -> Flame:
    """Load a converted FLAME model (`convert_flame`) to the CPU as float32.

    Raises:
        FaceSnapError: the file is of another kind, of a newer version, or its tensors do not fit together.
    """
    require(path, Kind.FLAME, "convert FLAME's generic_model.pkl once with `facesnap convert`.")
    if int(read_index(path).metadata.get("version", VERSION)) > VERSION:
        raise FaceSnapError(f"{path.name} was written by a newer FaceSnap; update the extension.")
    tensors = read_tensors(path)
    check_flame(tensors, path.name)
    return Flame(**{field.name: tensors[field.name] for field in fields(Flame)})


def save_flame(path: Path, tensors: dict[str, Tensor], source: str) -> None:
    """Write the tensors of a `Flame` as a converted file; `source` says in its metadata where they come from."""
    from safetensors.torch import save_file

    check_flame(tensors, source)
    metadata = {"format": "facesnap-flame", "version": str(VERSION), "source": source}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


def convert_flame(source: Path, destination: Path) -> None:
    """Convert FLAME's pickle (2020 `generic_model.pkl`, 2023) to dense float32 safetensors, executing nothing in it.

    Raises:
        FaceSnapError: the pickle is refused (`read_pickled_arrays`), or is no FLAME model.
    """
    arrays = read_pickled_arrays(source)
    names = ("v_template", "shapedirs", "posedirs", "J_regressor", "weights", "kintree_table", "f")
    if missing := [name for name in names if name not in arrays]:
        raise FaceSnapError(f"{source.name} is no FLAME model: it lacks {missing[0]}; give FLAME's generic_model.pkl.")
    tensors = {name: _float_tensor(arrays[name]) for name in names[:5]}
    directions = tensors["shapedirs"]
    tensors["shapedirs"] = directions[..., :SHAPE_COLUMNS]
    tensors["expressiondirs"] = directions[..., SHAPE_COLUMNS:]
    parents = torch.from_numpy(np.atleast_2d(arrays["kintree_table"])[0].astype(np.int64))
    parents[:1] = -1  # FLAME writes the root's parent as the largest uint32
    tensors["parents"] = parents
    tensors["faces"] = torch.from_numpy(arrays["f"].astype(np.int64))
    save_flame(destination, tensors, source.name)


def check_flame(tensors: dict[str, Tensor], name: str) -> None:
    """Check that the tensors are a FLAME model's and fit together.

    Raises:
        FaceSnapError: they do not; the message calls the file `name`.
    """
    template, parents = tensors.get("v_template"), tensors.get("parents")
    vertices = len(template) if template is not None else 0
    joints = len(parents) if parents is not None else 0
    wanted: dict[str, tuple[int | None, ...]] = {
        "v_template": (vertices, 3),
        "shapedirs": (vertices, 3, None),
        "expressiondirs": (vertices, 3, None),
        "posedirs": (vertices, 3, 9 * (joints - 1)),
        "J_regressor": (joints, vertices),
        "weights": (vertices, joints),
        "parents": (joints,),
        "faces": (None, 3),
    }
    for key, shape in wanted.items():
        found = tuple(tensors[key].shape) if key in tensors else None
        if found is None or len(found) != len(shape) or any(w not in (None, f) for w, f in zip(shape, found)):
            raise FaceSnapError(f"{name} is no whole FLAME model: {key} is {found or 'missing'}; get the file again.")
    faces, parents = tensors["faces"], tensors["parents"]
    ordered = parents[0] == -1 and all(0 <= parent < joint for joint, parent in enumerate(parents.tolist()) if joint)
    if joints <= JAW or not ordered or not faces.numel() or faces.min() < 0 or faces.max() >= vertices:
        raise FaceSnapError(f"{name} is no whole FLAME model: its joints or triangles are wrong; get the file again.")


def _float_tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))
