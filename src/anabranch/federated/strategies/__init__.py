"""Methods of learning together; each module is one, found by its ``name``.

A method is a server and a client of 10 to 200 lines, and the schedule that it is usually run with.
It knows no runtime: the same method runs in simulation, in processes and over a network, with a
barrier or without, in a tree or (its client) by gossip. ``anabranch list strategies`` shows them.
"""

from anabranch.federated.strategies.base import Strategy
from anabranch.federated.strategies.fed_lora import FFA
from anabranch.federated.strategies.fed_sb import FedSB
from anabranch.federated.strategies.fedadam import FedAdam
from anabranch.federated.strategies.fedamd import FedAMD
from anabranch.federated.strategies.fedavg import FedAvg, FedAvgServer, LocalClient
from anabranch.federated.strategies.fedavg_m import FedAvgM
from anabranch.federated.strategies.fedex import FedEx
from anabranch.federated.strategies.fedit import FedIT
from anabranch.federated.strategies.fedkseed import FedKSeed, FedKSeedPro
from anabranch.federated.strategies.fedpage import FedPage
from anabranch.federated.strategies.fedprox import FedProx
from anabranch.federated.strategies.ferret import Ferret
from anabranch.federated.strategies.offsite import Offsite
from anabranch.federated.strategies.one_byte import JustOneByte
from anabranch.federated.strategies.pfedme import PFedMe
from anabranch.federated.strategies.scaffold import Scaffold, ScaffoldM
from anabranch.federated.strategies.scallion import Scafcom, Scallion

__all__ = [
    "FFA",
    "FedAMD",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedAvgServer",
    "FedEx",
    "FedIT",
    "FedKSeed",
    "FedKSeedPro",
    "FedPage",
    "FedProx",
    "FedSB",
    "Ferret",
    "JustOneByte",
    "LocalClient",
    "Offsite",
    "PFedMe",
    "Scafcom",
    "Scaffold",
    "ScaffoldM",
    "Scallion",
    "Strategy",
]
