"""Speed and memory against plain forward passes and against peers; every bench prints one JSON object."""
