"""What can be plugged in: every kind with its plug-ins, from the registry."""

from __future__ import annotations

from anabranch import registry
from tools.docs.markdown import code, first_paragraph, table

HEAD = """# Plug-ins

Every kind of plug-in with those that come with Anabranch, as `anabranch list KIND` shows them. A
kind is a base class; a package of yours adds a subclass that has a `name`, under an entry point:

```toml
[project.entry-points."anabranch.policies"]
mine = "my_package.policies:MyPolicy"
```

"""


def page() -> str:
    """A heading and a table for each kind."""
    return HEAD + "".join(_kind(kind) for kind in sorted(registry.KINDS))


def _kind(kind: str) -> str:
    found = registry.available(kind)
    rows = [[code(name), first_paragraph(cls.__doc__)] for name, cls in found.items()]
    base = registry.KINDS[kind].replace(":", ".")
    return f"## {kind.capitalize()}\n\nSubclasses of `{base}`.\n\n" + table(["name", ""], rows)
