"""A whole dataset, answered by a deployment at low priority."""
