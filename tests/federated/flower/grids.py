"""A grid without a network: messages of flwr's own classes, answered in this process."""

from __future__ import annotations

import itertools
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from anabranch.federated.errors import FederationError


class LocalGrid(Grid):
    """``answer(message, context)`` is what a node does; an error of it becomes one of Flower's.

    ``there`` are the nodes; take one away, and it is gone. Messages get ``slow`` polls old before
    their answers are there.
    """

    def __init__(self, nodes, answer, slow=0) -> None:
        # What Flower's own processes know of themselves; messages cannot be made without.
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
        self.there = list(nodes)
        self.answer = answer
        self.slow = slow
        self.contexts = {node: context(node) for node in nodes}
        self.answers: dict[str, list[Any]] = {}
        self.pushed: list[Message] = []
        self._numbers = itertools.count(1)

    def set_run(self, run) -> None:
        raise NotImplementedError

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, *arguments, **options):
        raise NotImplementedError

    def get_node_ids(self):
        return list(self.there)

    def push_messages(self, messages):
        numbers = []
        for message in messages:
            number = f"m{next(self._numbers)}"
            message.metadata.__dict__["_message_id"] = number
            self.pushed.append(message)
            numbers.append(number)
            self.answers[number] = [self.slow, message]
        return numbers

    def pull_messages(self, message_ids):
        replies = []
        for number in message_ids:
            waiting = self.answers.get(number)
            if waiting is None or waiting[1].metadata.dst_node_id not in self.there:
                continue
            waiting[0] -= 1
            if waiting[0] < 0:
                replies.append(self.reply(self.answers.pop(number)[1]))
        return replies

    def send_and_receive(self, messages, *, timeout=None):
        return self.pull_messages(self.push_messages(messages))

    def reply(self, message):
        node = message.metadata.dst_node_id
        if node not in self.contexts:
            self.contexts[node] = context(node)
        try:
            return self.answer(message, self.contexts[node])
        except FederationError as error:
            return Message(Error(1, str(error)), reply_to=message)


def context(node, **config):
    return Context(1, node, {"node": str(node), **config}, RecordDict(), {})
