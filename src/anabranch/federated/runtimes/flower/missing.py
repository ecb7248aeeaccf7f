"""Why Flower is no extra, and what to do instead."""

from anabranch.errors import MissingExtra


class FlowerMissing(MissingExtra):
    """Flower is not installed. No extra can ask for it: it wants older libraries than we do."""

    def __init__(self) -> None:
        super().__init__("flwr", "federation")
        self.args = (
            "this needs Flower, which is not installed. It wants older versions of fastapi, rich, "
            "typer and uvicorn than anabranch up does, so give it an environment of its own: "
            "pip install 'anabranch[federation]', then pip install 'flwr>=1.41,<1.42' (pip names "
            "the conflict and goes on)",
        )
