"""What surrounds the library in a project: params.yaml, the user's model and data, metrics, weights, stages."""
