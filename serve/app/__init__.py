"""What runs inside vLLM's process.

server is that process: vLLM's command line, mended. The rest is middleware before its application: ready answers
/ready, has the probe asked and drains the server; play serves the page at /play and passes on to a second server;
requestlog, outermost, gives each request an id, a line and a count.
"""
