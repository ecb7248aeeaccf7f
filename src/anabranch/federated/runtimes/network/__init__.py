"""A federation over a network: the coordinator's runtime, and the program that a site runs."""

from anabranch.federated.runtimes.network.errors import (
    CoordinatorGone,
    InvitationError,
    NameTaken,
    NotAllowed,
    NotKnown,
)
from anabranch.federated.runtimes.network.invitation import Invitation
from anabranch.federated.runtimes.network.roster import Member, Roster
from anabranch.federated.runtimes.network.runtime import Network, invitation
from anabranch.federated.runtimes.network.site import Membership, join, work

__all__ = [
    "CoordinatorGone",
    "Invitation",
    "InvitationError",
    "Member",
    "Membership",
    "NameTaken",
    "Network",
    "NotAllowed",
    "NotKnown",
    "Roster",
    "invitation",
    "join",
    "work",
]
