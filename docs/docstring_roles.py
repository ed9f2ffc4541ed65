"""Griffe extension: cross-references of docstrings, ``:class:`~circuits.symbolic.Circuit```, as links of the site."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|attr):`(~?)([\w.]+)`")


def _link(match: re.Match[str], module: str) -> str:
    is_short, target = match.groups()
    name = target.rpartition(".")[2] if is_short else target
    full = target if "." in target and target.split(".")[0] in ("circuits", "diffusion") else f"{module}.{target}"
    return f'<autoref identifier="{full}" optional>`{name}`</autoref>'


class DocstringRoles(griffe.Extension):
    """Rewrites the docstring of every object."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Replace the roles of one object's docstring."""
        if obj.docstring:
            holder = obj if obj.is_module or obj.is_class else obj.parent or obj
            scope = holder.path
            value = obj.docstring.value
            obj.docstring.value = _ROLE.sub(lambda match: _link(match, scope), value)
