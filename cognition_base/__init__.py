"""The cognition base: what published papers know about symptoms of sequence models, searchable over HTTP."""
