"""Measures latency, throughput and accuracy of an endpoint against another. Knows a server only as a URL."""
