"""Models and data to run the pipeline on. The library knows nothing of them but their entry points."""
