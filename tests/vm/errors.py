"""The one exception of the tool."""


class VmError(Exception):
    """Something around the VM (not the command in it) failed; the message is for a person."""
