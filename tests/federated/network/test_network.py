"""A federation over sockets: the same parameters as in simulation, whatever happens on the way."""

from __future__ import annotations

import torch

from tests.federated.helpers import names
from tests.federated.network.places import over_network, parameters, undisturbed, with_sites


def test_over_http_as_in_simulation(tmp_path):
    federation = over_network(tmp_path)
    sites = with_sites(federation, tmp_path)
    result = federation.run()
    whole = undisturbed()
    assert torch.equal(parameters(federation), parameters(whole))
    assert [site.end() for site in sites] == ["finished"] * 3
    assert len(result.incidents) == 0 and result.version == 3
    # Messages, payloads and envelopes are those of the simulation, but for what time shows.
    measured, expected = result.ledger, whole.coordinator.state.ledger
    assert measured.total().payload == expected.total().payload
    assert measured.total().messages == expected.total().messages
    assert whole.coordinator.clients == names(3) == list(federation.coordinator.state.members)


def test_over_tls_with_a_pinned_certificate(tmp_path):
    federation = over_network(tmp_path, 2, 1, insecure=False)
    assert federation.runtime.listen().startswith("https://127.0.0.1:")
    sites = with_sites(federation, tmp_path, 2)
    federation.run()
    assert torch.equal(parameters(federation), parameters(undisturbed(2, 1)))
    assert [site.end() for site in sites] == ["finished"] * 2
