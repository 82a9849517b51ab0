"""What everything that speaks HTTP here shares, client or server.

errors: refusals and errors in OpenAI's shape. middleware: the base of the ASGI classes, and the way past them. sse:
server-sent events decoded. images: images as the API takes them. logs: lines of JSON. metrics: counters of several
rooms.
"""
