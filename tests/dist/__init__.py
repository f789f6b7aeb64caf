"""What `make dist` builds: the files that are given out, installed and run."""
