"""The ClientApp of a federation's node: it carries letters to the resident, and back."""

from __future__ import annotations

from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from anabranch.federated.runtimes.flower.letter import RECORD, VALUE
from anabranch.federated.runtimes.flower.resident import Resident, check_site
from anabranch.models.cache import root


def client_app(site: str) -> ClientApp:
    """A ClientApp for sites that ``site``, a ``module:function``, makes.

    The function is given the settings of the run and of the node, the latter first where both
    have one, and returns a :class:`Place`. It is called once in a process that stays, in which the
    federation's client then does its tasks. The setting ``folder`` is where a node keeps its state.

    Example, in the app's own module::

        client = client_app("hospital.federation:site")
    """
    check_site(site)
    app = ClientApp()

    @app.query()
    @app.train()
    def forward(message: Message, context: Context) -> Message:
        settings = {**context.run_config, **context.node_config}
        folder = settings.get("folder") or root() / "flower" / str(context.node_id)
        resident = Resident(str(Path(str(folder)).absolute()), site, settings)
        answer = resident.ask(message.content.config_records[RECORD][VALUE])
        return Message(RecordDict({RECORD: ConfigRecord({VALUE: answer})}), reply_to=message)

    return app
