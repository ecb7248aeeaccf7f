"""The web page of a server: chat, models, jobs, engine, federations and claims in a browser.

It lies at ``/console/`` beside the HTTP API and calls the same services. What is read for several
tabs is read once (:mod:`~anabranch.console.live`); pages (:mod:`~anabranch.console.pages`) only
arrange what :class:`~anabranch.console.console.Console` offers. It needs the extra ``console``
(NiceGUI), serves every script, style and font itself, and asks no other host for anything.

Importing this package does not import NiceGUI.
"""

from anabranch.console.install import ConsoleOptions, install

__all__ = ["ConsoleOptions", "install"]
