"""``kpmctl``: the command line, made with ``kpmd.client`` alone."""
