"""all-MiniLM-L6-v2, a 12-head transformer that turns sentences into vectors, on sentences from documentation."""
