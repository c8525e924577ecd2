"""The identity loss L_id (eq. 4), whose gradient is cut off outside the face mask."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from facesnap_lab.training.arcface import ArcFace, align


def portrait_id_loss(
    arcface: ArcFace, portraits: Tensor, masks: Tensor, keypoints: Tensor, reference_embeddings: Tensor
) -> Tensor:
    """L_id of generated portraits. Gradients flow back through the face masks only.

    Args:
        portraits: [N,3,H,W] in 0…1.
        masks: face masks [N,1,h,w] in 0…1; see `limit_gradient_to_mask`.
        keypoints: [N,5,2]; see `arcface.align`.
        reference_embeddings: ArcFace embeddings of the references [N,E].

    Returns:
        A scalar in 0…2, float32.
    """
    portraits = limit_gradient_to_mask(portraits, masks)
    generated = arcface(align(portraits, keypoints, arcface.size))
    return id_loss(reference_embeddings, generated)


def limit_gradient_to_mask(images: Tensor, masks: Tensor) -> Tensor:
    """Return the images [N,3,H,W] unchanged, with gradients only inside the masks [N,1,h,w].

    ArcFace's crop also contains hair and background, and changes there can raise the cosine without improving the
    likeness. Without this cut, L_id changes the background to suit the person, whatever the prompt says.
    """
    masks = F.interpolate(masks.float(), images.shape[-2:])
    return masks * images + (1 - masks) * images.detach()


def id_loss(reference: Tensor, generated: Tensor) -> Tensor:
    """Eq. 4: 1 − cosine similarity of the ArcFace embeddings of reference and generated faces, averaged over the rows.

    Args:
        reference, generated: [N,E], not necessarily normalised.

    Returns:
        A scalar in 0…2, float32.
    """
    return (1 - F.cosine_similarity(reference.float(), generated.float(), dim=-1)).mean()
