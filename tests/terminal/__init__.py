"""kpmctl where people use it: on terminals, in shells, as a manual."""
