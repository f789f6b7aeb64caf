"""``kpmctl completion``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

_EPILOG = """\b
Now, in this shell:
  bash  eval "$(kpmctl completion bash)"
  zsh   eval "$(kpmctl completion zsh)"
  fish  kpmctl completion fish | source
\b
In every new one:
  bash  kpmctl completion bash > ~/.local/share/bash-completion/completions/kpmctl
  zsh   kpmctl completion zsh > ~/.zfunc/_kpmctl       # a folder of your $fpath
  fish  kpmctl completion fish > ~/.config/fish/completions/kpmctl.fish
"""


@click.command(epilog=_EPILOG)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Write what SHELL needs to complete kpmctl's commands, options, ids and functions.

    Ids and functions are asked for from the daemon, when there is one that answers at once.
    """
    found = get_completion_class(shell)
    if found is None:
        raise LookupError(f"click has no completion for {shell}")
    click.echo(found(ctx.find_root().command, {}, "kpmctl", "_KPMCTL_COMPLETE").source())
