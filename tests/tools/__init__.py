"""Tools of the developers' make targets."""
