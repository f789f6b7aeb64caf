"""``kpmctl dashboard``: a page on loopback that shows what the daemon has of the caller.

``figures`` (pure) makes rates and histograms of entries, ``reading`` reads the daemon, ``feed``
listens to its events, ``watch`` does both while somebody looks, and ``server`` serves that and the
page. Nothing here writes to the daemon.
"""
