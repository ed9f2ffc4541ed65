"""Writing files so that a reader never sees half of one."""

from circuits._files import replace_file

__all__ = ["replace_file"]
