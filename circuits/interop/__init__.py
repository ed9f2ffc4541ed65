"""Exchange of circuits with other libraries."""

from circuits.interop.backend import compile_with_pyjuice
from circuits.interop.jpc import find_jpc, load_jpc, save_jpc
from circuits.interop.pyjuice import from_pyjuice, to_pyjuice

__all__ = ["compile_with_pyjuice", "find_jpc", "from_pyjuice", "load_jpc", "save_jpc", "to_pyjuice"]
