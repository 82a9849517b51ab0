"""Requests, when they are sent, and what became of them.

workload (sizes, lengths, arrivals) and objectives are what a command line says of it; inputs makes requests that no
cache knows; endpoint finds a server, wire carries bytes, client asks and answer keeps what comes, with its moments;
loops sends, in flight or at a rate; sweep goes from one at a time to saturation; metrics has the formulas.
"""
