"""The HTTP server: OpenAI's routes over any models, metrics, and a drain that loses nothing.

Belongs here: what is HTTP. What a model is, and how it computes, is not known here: everything
goes through :class:`anabranch.models.protocol.Model`.
"""

from anabranch.api.app import create_app
from anabranch.api.server import bind, serve
from anabranch.api.service import ServerOptions, read_api_keys

__all__ = ["ServerOptions", "bind", "create_app", "read_api_keys", "serve"]
