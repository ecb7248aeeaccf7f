"""Plain ASGI middlewares, one concern each. They see every request before the routes do."""

from anabranch.api.middleware.allowed_hosts import AllowedHosts
from anabranch.api.middleware.api_keys import ApiKeys
from anabranch.api.middleware.body_limit import BodyLimit
from anabranch.api.middleware.context import RequestContext
from anabranch.api.middleware.draining import RefuseWhileDraining

__all__ = ["AllowedHosts", "ApiKeys", "BodyLimit", "RefuseWhileDraining", "RequestContext"]
