"""The image, the objects for Kubernetes, and containers that are made of both."""
