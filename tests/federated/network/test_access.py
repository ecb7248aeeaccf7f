"""Who may join, ask and reply, and who may not."""

from __future__ import annotations

import base64
import json
import sqlite3
import stat
from dataclasses import replace

import httpx
import pytest

from anabranch.errors import AnabranchError, ConfigurationError, UnknownName
from anabranch.federated.runtimes.network import (
    Invitation,
    InvitationError,
    Membership,
    NameTaken,
    Network,
    NotAllowed,
    NotKnown,
    Roster,
    join,
)
from anabranch.federated.runtimes.network.invitation import require_safe
from anabranch.federated.runtimes.network.joining import fetch_plan
from anabranch.federated.runtimes.network.link import Link
from tests.federated.helpers import EXAMPLES
from tests.federated.network.places import SiteThread, in_threads, over_network


@pytest.fixture
def network(tmp_path):
    made = Network(tmp_path / "network", insecure=True, plan={"job": "x"})
    made.listen()
    yield made
    made.close()


def get(network, path, token=None, method="GET", **options):
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    url = network.address + path
    return httpx.request(method, url, headers=headers, trust_env=False, **options)


def test_an_invitation_is_one_text():
    made = Invitation("https://fl.example.org:8443", "r1", "s3cret", "ab" * 32)
    text = str(made)
    assert Invitation.parse(text) == made and "s3cret" not in text
    assert Invitation.parse(f" {text[:40]}\n{text[40:]} ") == made


@pytest.mark.parametrize("text", ["", "hello", "anabranch-site-", "anabranch-site-e30"])
def test_texts_that_are_no_invitations(text):
    with pytest.raises(InvitationError, match="copy all of the line"):
        Invitation.parse(text)


def test_invitations_that_were_cut_or_changed():
    text = str(Invitation("https://h:1", "r", "s", "f"))
    for end in range(len(text)):
        with pytest.raises(InvitationError):
            Invitation.parse(text[:end])
    bad = {"address": "ftp://h", "run": "r", "secret": "s"}
    encoded = base64.urlsafe_b64encode(json.dumps(bad).encode()).decode()
    with pytest.raises(InvitationError, match="no http or https address"):
        Invitation.parse("anabranch-site-" + encoded)


def test_without_tls_only_on_this_machine():
    require_safe("http://127.0.0.1:80", insecure=False)
    require_safe("http://[::1]:80", insecure=False)
    require_safe("http://localhost:80", insecure=False)
    require_safe("https://example.org", insecure=False)
    require_safe("http://example.org", insecure=True)
    with pytest.raises(InvitationError, match="not encrypted"):
        require_safe("http://example.org", insecure=False)
    with pytest.raises(InvitationError, match="not encrypted"):
        Link("http://10.0.0.1:8000", "", "token")


def test_a_used_invitation_is_worthless(network, tmp_path):
    invitation = network.invite()
    member = join(invitation, tmp_path / "a", "a", 5)
    with pytest.raises(NotAllowed, match="was used by a"):
        join(invitation, tmp_path / "thief", "b", 5)
    with pytest.raises(NotAllowed, match="was used by a"):
        join(invitation, tmp_path / "thief2", "a", 5)
    # The one who joined finds that it did, with the examples of then.
    assert join(invitation, tmp_path / "a", "a", 500) == member
    assert network.roster.examples() == {"a": 5}
    # It may not even look at the plan, which the member still may.
    assert get(network, "/federation/plan", invitation.secret).status_code == 401
    assert get(network, "/federation/plan", member.key).json() == {"job": "x"}


def test_joining_again_after_the_answer_was_lost(network, tmp_path):
    invitation = network.invite()
    key = "k" * 40
    form = {"name": "a", "key": key, "examples": 3}
    answers = [
        get(network, "/federation/join", invitation.secret, "POST", json=form) for _ in range(2)
    ]
    assert [answer.json() for answer in answers] == [{"name": "a", "examples": 3}] * 2
    other = {**form, "key": "z" * 40}
    assert (
        get(network, "/federation/join", invitation.secret, "POST", json=other).status_code == 403
    )


def test_a_site_that_did_not_hear_that_it_joined(network, tmp_path):
    """It was killed between its request and the answer; the same command goes on."""
    invitation, folder = network.invite(), tmp_path / "a"
    key = "k" * 40
    Membership(network.address, "", invitation.run, "a", key).save(folder)
    network.roster.join(invitation.secret, key, "a", 7)
    with pytest.raises(AnabranchError, match="the coordinator's job cannot be run"):
        fetch_plan(invitation, folder)  # which it was given, though this test has no whole one
    member = join(invitation, folder, "another-name", 9)
    assert (member.name, member.key, member.joined) == ("a", key, True)
    assert network.roster.examples() == {"a": 7}
    with pytest.raises(NotKnown):
        fetch_plan(invitation, tmp_path / "stranger")


@pytest.mark.parametrize(
    "form",
    [
        b"",
        b"[]",
        b"{",
        b'{"name": "a", "key": "short", "examples": 1}',
        b'{"name": "a", "key": "%s", "examples": -1}' % (b"k" * 40),
        b'{"name": "a", "key": "%s", "examples": 1.5}' % (b"k" * 40),
        b'{"name": "../a", "key": "%s", "examples": 1}' % (b"k" * 40),
        b'{"name": "", "key": "%s", "examples": 1}' % (b"k" * 40),
    ],
)
def test_forms_that_are_none(network, form):
    invitation = network.invite()
    answer = get(network, "/federation/join", invitation.secret, "POST", content=form)
    assert answer.status_code == 400, answer.text
    assert network.roster.invited(invitation.secret)


def test_large_forms_are_not_read(network):
    answer = get(network, "/federation/join", network.invite().secret, "POST", content=b"x" * 10**6)
    assert answer.status_code == 413


def test_names(network, tmp_path):
    with pytest.raises(ConfigurationError, match="no name for a site"):
        network.invite("a b")
    with pytest.raises(NotAllowed, match="for hospital"):
        join(network.invite("hospital"), tmp_path / "a", "a", 1)
    join(network.invite(), tmp_path / "b", "b", 1)
    with pytest.raises(NameTaken):
        join(network.invite(), tmp_path / "c", "b", 1)
    with pytest.raises(NameTaken):
        network.invite("b")


ROUTES = [
    ("GET", "/federation/plan"),
    ("POST", "/federation/join"),
    ("GET", "/federation/agreement"),
    ("GET", "/federation/task"),
    ("POST", "/federation/tasks/1/reply"),
    ("POST", "/federation/alive"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_strangers_get_401_everywhere(network, method, path):
    form = {"name": "a", "key": "k" * 40, "examples": 3}
    for given in (None, "Bearer wrong", "Bearer é", "Basic wrong", "wrong"):
        headers = {} if given is None else {"authorization": given.encode()}
        answer = httpx.request(
            method,
            network.address + path,
            headers=headers,
            json=form if method == "POST" else None,
            trust_env=False,
        )
        assert answer.status_code == 401, (path, given)
        assert answer.json()["error"]["code"] == "not_known"


def test_foreign_replies_are_refused_and_leave_no_trace(tmp_path):
    federation = over_network(tmp_path, 2, 2)
    network = federation.runtime
    statuses = []

    def meddle(folder):
        def watch(task, reply):
            member = Membership.load(folder)
            if reply is None:
                return
            other = task.id - 1 if task.id % 2 == 0 else task.id + 1
            for number, client in ((other, member.name), (task.id, "c9")):
                data = replace(reply, task=number, client=client).to_bytes()
                path = f"/federation/tasks/{number}/reply"
                statuses.append(get(network, path, member.key, "POST", content=data).status_code)

        return watch

    folders = [tmp_path / "s0", tmp_path / "s1"]
    sites = [
        SiteThread(network.invite(), folder, f"c{i}", watch=meddle(folder))
        for i, folder in enumerate(folders)
    ]
    result = federation.run()
    assert [site.end() for site in sites] == ["finished"] * 2
    assert len(result.incidents) == 0
    # The last ones came when nobody listened any more.
    assert set(statuses) == {403}


def test_a_revoked_site_is_refused_and_the_run_goes_on(tmp_path):
    federation = over_network(tmp_path, 2, 4)
    network = federation.runtime

    def watch(task, reply):
        if task.version == 1 and reply is None:
            # As by the command line, beside the running coordinator.
            Roster(tmp_path / "network").revoke("c1")

    bad = SiteThread(network.invite(), tmp_path / "c1", "c1", watch=watch)
    good = SiteThread(network.invite(), tmp_path / "c0", "c0")
    result = federation.run()
    assert good.end() == "finished" and result.version == 4
    assert isinstance(bad.end(), NotAllowed) and "c1 was revoked" in str(bad.outcome)
    assert result.incidents.count("left", "c1") == 1
    assert list(federation.coordinator.state.members) == ["c0"]


def test_revoking_nobody(tmp_path):
    with pytest.raises(UnknownName, match="no site named 'x'"):
        Roster(tmp_path).revoke("x")


def test_secrets_are_stored_hashed_and_files_are_private(tmp_path):
    network = Network(tmp_path / "network")
    try:
        invitation = network.invite()
        member = join(invitation, tmp_path / "a", "a", EXAMPLES)
    finally:
        network.close()
    stored = b"".join(path.read_bytes() for path in (tmp_path / "network").glob("*"))
    assert member.key.encode() not in stored and invitation.secret.encode() not in stored
    rows = sqlite3.connect(tmp_path / "network" / "sites.sqlite").execute("SELECT * FROM sites")
    assert [row[0] for row in rows] == ["a"]
    private = [*(tmp_path / "network").glob("*"), tmp_path / "a" / "site.json"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in private} == {0o600}
    assert {path.name for path in private} >= {"key.pem", "certificate.pem", "sites.sqlite"}


def test_another_certificate_is_named(tmp_path):
    network, other = Network(tmp_path / "one"), Network(tmp_path / "two")
    try:
        invitation = network.invite()
        bent = Invitation(other.listen(), invitation.run, invitation.secret, invitation.fingerprint)
        with pytest.raises(NotAllowed, match="another certificate than the invitation says"):
            join(bent, tmp_path / "a", "a", 1)
        # Plain HTTP is not answered at all.
        plain = Invitation(network.address.replace("https", "http"), "r", invitation.secret)
        with pytest.raises(Exception, match="did not answer"):
            join(plain, tmp_path / "b", "b", 1, patience=0.5)
    finally:
        network.close()
        other.close()


def test_unknown_invitations(network, tmp_path):
    stranger = Invitation(network.address, network.roster.run, "guess")
    with pytest.raises(NotKnown, match="nobody was invited"):
        join(stranger, tmp_path / "a", "a", 1)


def test_a_folder_belongs_to_one_federation(network, tmp_path):
    join(network.invite(), tmp_path / "a", "a", 1)
    elsewhere = Invitation(network.address, "another run", "secret")
    with pytest.raises(InvitationError, match="another federation"):
        join(elsewhere, tmp_path / "a", "a", 1)


@pytest.mark.parametrize(
    ("host", "address", "reached"),
    [
        ("127.0.0.1", None, "https://127.0.0.1:{port}"),
        ("0.0.0.0", "fl.example.org", "https://fl.example.org:{port}"),
        ("0.0.0.0", "fl.example.org:443", "https://fl.example.org:443"),
        ("0.0.0.0", "2001:db8::1", "https://[2001:db8::1]:{port}"),
        ("0.0.0.0", "[2001:db8::1]:443", "https://[2001:db8::1]:443"),
    ],
)
def test_what_invitations_say(tmp_path, host, address, reached):
    network = Network(tmp_path / "network", host, address=address)
    try:
        found = network.invite().address
        port = network._server._listener.getsockname()[1]
        assert found == reached.format(port=port)
        assert Invitation.parse(str(network.invite())).address == found
    finally:
        network.close()


def test_every_address_is_none_to_connect_to(tmp_path):
    with pytest.raises(ConfigurationError, match="--address HOST"):
        Network(tmp_path / "network", "0.0.0.0")


def test_one_invitation_used_by_many_at_once(tmp_path):
    roster = Roster(tmp_path)
    secret = roster.invite()
    joins = in_threads(
        *(lambda i=i: Roster(tmp_path).join(secret, f"{i}" * 40, f"s{i}", 1) for i in range(8))
    )
    outcomes = [join.end() for join in joins]
    assert sum(isinstance(outcome, NotAllowed) for outcome in outcomes) == 7
    [winner] = [outcome for outcome in outcomes if not isinstance(outcome, Exception)]
    assert roster.examples() == {winner.name: 1} and roster.open_invitations() == 0
