"""The rivals by the names that `TrainConfig.method` takes."""

from __future__ import annotations

from facesnap_lab.rivals.consistentid import ConsistentID
from facesnap_lab.rivals.instantid import InstantID
from facesnap_lab.rivals.ip_adapter import IPAdapterFace, IPAdapterPlus
from facesnap_lab.rivals.method import Rival
from facesnap_lab.rivals.photomaker import PhotoMaker
from facesnap_lab.rivals.pulid import PuLID

METHODS: dict[str, type[Rival]] = {
    method.name: method for method in (IPAdapterFace, IPAdapterPlus, InstantID, PhotoMaker, PuLID, ConsistentID)
}
