"""What strangers may send: the guard before vLLM's application, and what it checks.

app takes a request from its key to the engine; upload reads its body and answer gives what the engine says, twice where
retry sees that it failed at once. parse reads JSON, schema knows the fields, body checks texts and messages,
attachments and images what is no text, fetch gets images by URL. keyfile reads the file of keys, keys says which are in
force and what each may do, listing shows a key its own models; rate slows clients down, usage counts their tokens.
"""
