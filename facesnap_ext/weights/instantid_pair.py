"""Match InstantID's two files: find the ControlNet (IdentityNet) that belongs to each `ip-adapter.bin`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from facesnap_ext.weights.instantid import ADAPTER
from facesnap_ext.weights.model_files import FoundModel, ModelFiles
from facesnap_ext.weights.recognise import Kind


def pair_instantid(files: ModelFiles, halves: Sequence[FoundModel]) -> None:
    """Add each InstantID adapter and its ControlNet to `files.facesnap` as one weight source.

    The tensors of IdentityNet do not differ from those of other SDXL ControlNets. The pair's ControlNet is the first of

    1. a ControlNet with InstantID's name, next to the adapter or in a subfolder there;
    2. in FaceSnap's own folder, where users put no other ControlNets, the only one there;
    3. a ControlNet with InstantID's name anywhere.

    Args:
        halves: all adapters of InstantID and all SDXL ControlNets.
    """
    adapters = [half for half in halves if half.kind == Kind.INSTANTID_ADAPTER.value]
    nets = [half for half in halves if half.kind == Kind.SDXL_CONTROLNET.value]
    named = [net for net in nets if _is_named_instantid(net)]
    used = {adapter.path for adapter in adapters} | {net.path for net in named}
    for adapter in adapters:
        folder = adapter.path.parent
        near = [net for net in nets if folder in (net.path.parent, net.path.parent.parent)]
        alone = near if len(near) == 1 and adapter.folder == files.folder else []
        candidates = [net for net in named if net in near] or alone or named
        if candidates:
            names = ("InstantID", f"InstantID ({folder.name})", f"InstantID ({adapter.path})")
            name = next(name for name in names if name not in files.facesnap)
            files.facesnap[name] = (candidates[0].path, adapter.path)
            used.add(candidates[0].path)
        else:
            found = ", ".join(str(net.path) for net in near or nets) or "none"
            files.passed_over.append(
                f"{adapter.path} is {adapter.kind}, but it is not clear which ControlNet belongs to it, because all "
                f"SDXL ControlNets have the same tensors; put InstantID in the name of the file or its folder (found: "
                f"{found})."
            )
    paired = {path for source in files.facesnap.values() if isinstance(source, tuple) for path in source}
    files.passed_over += [
        f"{net.path} has InstantID's name, but cannot be used without {ADAPTER}; put that file next to it."
        for net in named
        if net.path not in paired and net.folder == files.folder
    ]
    files.found += [half for half in halves if half.path in used]
    for half in halves:
        if half.path not in used and half.folder == files.folder:
            files.passed_over.append(f"{half.path.name} is {half.kind}.")


def _is_named_instantid(net: FoundModel) -> bool:
    """Return whether the file or one of its folders has InstantID's name."""
    parts = [re.sub(r"[\W_]", "", part.lower()) for part in net.path.relative_to(net.folder).parts]
    return any("instantid" in part or part == "controlnetmodel" for part in parts)
